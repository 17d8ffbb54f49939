//! The thread of one datastore: beats there, and reads there what only the guard needs. It may hang with its storage;
//! nobody waits for it.
//!
//! ```text
//! open ─► our incarnation above all shown? ─► watch, if something of another boot is there ─► beat, each `renew`:
//!   roster names us? ─► VM list, if changed ─► take (c, t_c) ─► write slot ─► roster names us? ─► c is persisted
//! it shows less than before: own rows against its claims (`verify`), then beats go on
//! ```
//!
//! After a beat that counted: for VMs that stand after a lapse, the highest claim. One that ends their tenure kills.
//!
//! After an error the files are opened anew before the next beat: a descriptor can be stale for ever (the server came
//! back as another, this client was fenced and let in again) while the path leads to good ones. As long as opening fails
//! too, the old ones are tried: a server in its grace period takes writes before it lets anything be opened.
//!
//! Deliberately not here: what a lapse does (`state`, `enforce`).

mod verify;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::ends::ends;
use super::shared::Shared;
use super::state::{State, Taken};
use super::store::{Stage, Store};
use crate::core::timing;
use crate::exec::clock;
use crate::exec::datastore::{BeatFile, Doubt, SlotsKept, Stamp, WriteFailed, highest_claim};
use crate::types::guard::GuardConfig;
use crate::types::store::StoreFailure;
use crate::types::{
    Attestation, BeatBlock, Counter, DatastoreId, Digest, Flags, Incarnation, ListName, Sequence, Tenure, Time,
    VmEntry, VmList,
};

/// How many claims are read after one beat.
const CLAIMS_PER_BEAT: usize = 32;

/// What the thread needs to know of the world for one turn.
struct Facts {
    config: Arc<GuardConfig>,
    stage: Stage,
    /// Claims have to be read before the next beat.
    unverified: bool,
}

/// Why a turn failed.
enum Failed {
    /// The storage, or what lies there.
    Store(String),
    /// It has no space left.
    Full(String),
    /// The path leads to other files: open anew.
    Replaced(String),
    /// It contradicts us: no beats here any more.
    Doubt(String, bool),
    /// It shows an incarnation that is not below ours.
    Outdated(Incarnation),
}

impl From<StoreFailure> for Failed {
    fn from(failure: StoreFailure) -> Self {
        let text = failure.to_string();
        if let StoreFailure::Full { .. } = failure { Self::Full(text) } else { Self::Store(text) }
    }
}

impl From<WriteFailed> for Failed {
    fn from(failure: WriteFailed) -> Self {
        let text = failure.to_string();
        match failure {
            WriteFailed::Store(failure) => failure.into(),
            WriteFailed::NoSlot { .. } => Self::Store(text),
            WriteFailed::Replaced { .. } => Self::Replaced(text),
            WriteFailed::Doubt { doubt, .. } => Self::Doubt(text, matches!(doubt, Doubt::TwiceUsed { .. })),
            WriteFailed::Outdated { newest } => Self::Outdated(newest.incarnation),
        }
    }
}

/// What nobody else may change while a new boot watches.
type Quiet = (Digest, Vec<Attestation>);

/// The thread of one datastore.
pub struct Renew {
    shared: Arc<Shared>,
    id: DatastoreId,
    life: u64,
    path: PathBuf,
    file: Option<BeatFile>,
    /// The last try failed: open the files anew first.
    doubtful: bool,
    watch: Option<(Quiet, Time, Duration)>,
    sequence: Sequence,
    listed: Option<(Incarnation, Vec<VmEntry>, ListName)>,
    seen_version: u64,
    claims_from: usize,
    /// A claim that this host holds and that was not there when it was looked for last.
    missed: Option<Tenure>,
    held_from: usize,
}

impl Renew {
    /// For the datastore as it stands in the state.
    #[must_use]
    pub fn new(shared: Arc<Shared>, id: DatastoreId, life: u64, path: PathBuf) -> Self {
        Self {
            shared,
            id,
            life,
            path,
            file: None,
            doubtful: false,
            watch: None,
            sequence: Sequence(0),
            listed: None,
            seen_version: 0,
            claims_from: 0,
            missed: None,
            held_from: 0,
        }
    }

    /// Runs until the datastore is no longer configured.
    pub fn run(mut self) {
        while let Some(facts) = self.facts() {
            let began = clock::now();
            match self.turn(&facts) {
                Ok(()) => {}
                Err(failed) => self.failed(failed),
            }
            self.pause(began, &facts);
        }
    }

    fn turn(&mut self, facts: &Facts) -> Result<(), Failed> {
        if facts.unverified {
            self.verify(facts)?;
        }
        if std::mem::take(&mut self.doubtful) {
            self.open_anew(facts);
        }
        match (self.file.take(), facts.stage) {
            (None, _) | (Some(_), Stage::Opening) => self.open(facts),
            (Some(file), Stage::Watching) => {
                let result = self.look_on(&file, facts);
                self.file = Some(file);
                result
            }
            (Some(mut file), Stage::Beating) => {
                let result = self.beat(&mut file, facts);
                if !matches!(result, Err(Failed::Replaced(_))) {
                    self.file = Some(file);
                }
                result
            }
        }
    }

    /// Takes other descriptors of the same files, if they can be had. What shows less than the old ones were acknowledged
    /// is not taken: the next beat finds out what that is.
    fn open_anew(&mut self, facts: &Facts) {
        let Some(old) = &self.file else { return };
        let (config, kept) = (&facts.config, old.kept());
        if let Ok(new) = BeatFile::open_again(&self.path, config.cluster, config.host, Some(&kept))
            && old.newest() <= new.newest()
        {
            self.file = Some(new);
            self.listed = None;
        }
    }

    fn open(&mut self, facts: &Facts) -> Result<(), Failed> {
        let config = &facts.config;
        let kept = self.shared.with(|state, _| state.stores.get(&self.id).and_then(|store| store.slots));
        let file = BeatFile::open_again(&self.path, config.cluster, config.host, kept.as_ref())?;
        let own = file.own()?;
        let attested = file.attestations_of(config.index)?;
        let mut shown: Vec<(Incarnation, Counter)> = attested.iter().map(|a| (a.incarnation, a.counter)).collect();
        shown.extend(own.valid.iter().map(|(_, incarnation, counter)| (*incarnation, *counter)));
        let ours = self.shared.with(|state, _| state.last_given());
        if let Some((incarnation, _)) = shown.into_iter().max().filter(|shown| ours < *shown) {
            return Err(Failed::Outdated(incarnation));
        }
        let newest = own.newest;
        let found = newest.as_ref().map(Stamp::of);
        let (acknowledged, doubted) = self.shared.with(|state, _| {
            let store = state.stores.get(&self.id);
            (store.and_then(Store::acknowledged), store.is_some_and(|store| store.doubt.is_some()))
        });
        let stamp = |(incarnation, counter)| Stamp { incarnation, counter };
        if let Some(acknowledged) = acknowledged.map(stamp).filter(|acknowledged| found < Some(*acknowledged)) {
            let text = format!("{}: {}", self.path.display(), Doubt::RolledBack { acknowledged, found });
            return Err(Failed::Doubt(text, false));
        }
        self.heed_own_flag(newest.as_ref())?;
        self.sequence = newest.as_ref().map_or(Sequence(0), |beat| beat.list.sequence).max(self.sequence);
        self.listed = None;
        let old = newest.as_ref().map(|beat| beat.attestations.clone()).unwrap_or_default();
        let (boot, beaten) = self.shared.with(|state, now| {
            if let Some(store) = state.stores.get_mut(&self.id) {
                old.into_iter().for_each(|attestation| store.attest(attestation, now));
            }
            (state.boot, Counter(0) < state.last_given().1)
        });
        // Only what another boot left can be another host's; of this boot it is an earlier guard's. After our first beat
        // anywhere a watch comes too late: a twin shows in our slots.
        let foreign = newest.as_ref().map_or(!attested.is_empty(), |beat| beat.boot != boot);
        if facts.stage == Stage::Opening && (doubted || foreign && !beaten) {
            let leases = newest.iter().map(|beat| beat.lease).chain(attested.iter().map(|a| a.lease));
            let lease = leases.max().unwrap_or_default().max(config.timing.lease);
            let late = newest.as_ref().is_some_and(|beat| beat.flags.unpunctual);
            self.watch = Some(((own.bytes, attested), clock::now(), timing::window(lease, late)));
            self.stage(Stage::Watching);
        } else if facts.stage == Stage::Opening {
            self.stage(Stage::Beating);
        }
        self.file = Some(file);
        Ok(())
    }

    /// A new boot: nothing may change under our name for one window.
    fn look_on(&mut self, file: &BeatFile, facts: &Facts) -> Result<(), Failed> {
        let began = clock::now();
        let seen = (file.own()?.bytes, file.attestations_of(facts.config.index)?);
        let Some((quiet, since, window)) = &mut self.watch else {
            self.stage(Stage::Opening);
            return Ok(());
        };
        if seen != *quiet {
            (*quiet, *since) = (seen, clock::now());
            return Err(Failed::Store(format!(
                "another host beats here under our host id {}: the id is in use twice; no beats until that ends",
                facts.config.host
            )));
        }
        if *window <= began.since(*since) {
            self.watch = None;
            self.shared.with(|state, _| {
                // The twin is gone.
                if let Some(store) = state.stores.get_mut(&self.id).filter(|store| store.life == self.life) {
                    (store.doubt, store.trouble) = (None, None);
                }
                state.touch();
            });
            self.stage(Stage::Beating);
        }
        Ok(())
    }

    fn beat(&mut self, file: &mut BeatFile, facts: &Facts) -> Result<(), Failed> {
        let config = &facts.config;
        let roster = member(file, config)?;
        let list = self.write_list(file, config)?;
        let Some((taken, block)) = self.take(config, list, roster) else { return Ok(()) };
        let written = file.write_telling(&block, taken.at, |slots| self.remember(slots));
        self.remember(file.kept());
        let written = written?;
        assert_eq!(written.counter, taken.counter, "a write answers for its own counter");
        member(file, config)?;
        let lapsed = self.shared.with(|state, now| self.persisted(state, taken, &block, now));
        self.read_claims(config, &lapsed);
        self.look_for_held(config)
    }

    /// For the next guard: which slots rest, and what is under way.
    fn remember(&self, slots: SlotsKept) {
        self.shared.with(|state, _| {
            if let Some(store) = state.stores.get_mut(&self.id).filter(|store| store.life == self.life) {
                store.slots = Some(slots);
                state.touch();
            }
        });
    }

    /// The name of the list that lies there for the rows as they are now.
    fn write_list(&mut self, file: &mut BeatFile, config: &GuardConfig) -> Result<ListName, Failed> {
        let (version, incarnation, entries) =
            self.shared.with(|state, _| (state.table.version(), state.incarnation, state.table.list(self.id)));
        if let Some((of, listed, name)) = &self.listed
            && *of == incarnation
            && *listed == entries
        {
            self.seen_version = version;
            return Ok(*name);
        }
        self.sequence = self.sequence.next();
        self.listed = None;
        let list = VmList { host: config.host, incarnation, sequence: self.sequence, entries };
        let name = file.write_list(&list)?;
        self.listed = Some((incarnation, list.entries, name));
        self.seen_version = version;
        self.shared.with(|state, _| state.listed(name));
        Ok(name)
    }

    /// The counter and t_c, and the block around them. None: replaced, another incarnation began meanwhile, or the
    /// process ends.
    fn take(&self, config: &GuardConfig, list: ListName, roster: u64) -> Option<(Taken, BeatBlock)> {
        self.shared.with(|state, now| {
            if state.is_finishing() {
                return None;
            }
            let listed_in = self.listed.as_ref().map(|(incarnation, ..)| *incarnation);
            let store = state.stores.get_mut(&self.id).filter(|store| store.life == self.life)?;
            let attestations = store.attestations(config.index, now);
            let (accepted, distrusts) = (store.accepted, store.rolled_back.is_some());
            if store.unverified {
                return None;
            }
            if listed_in != Some(state.incarnation) {
                return None;
            }
            let flags = Flags { distrusts, ..state.flags(now) };
            let taken = state.take(now);
            let block = BeatBlock {
                cluster: config.cluster,
                host: config.host,
                index: config.index,
                boot: state.boot,
                incarnation: taken.incarnation,
                counter: taken.counter,
                taken: taken.at,
                lease: taken.lease,
                flags,
                accepted,
                list,
                resting: 0,
                roster,
                attestations,
            };
            Some((taken, block))
        })
    }

    /// The beat counts. Gives the VMs whose claims are worth reading.
    fn persisted(&self, state: &mut State, taken: Taken, block: &BeatBlock, now: Time) -> Vec<Tenure> {
        if state.incarnation != taken.incarnation {
            return Vec::new();
        }
        let Some(store) = state.stores.get(&self.id).filter(|store| store.life == self.life) else {
            return Vec::new();
        };
        if let Some(trouble) = &store.trouble {
            let text = format!("datastore {}: beats again after: {trouble}", store.path);
            state.say(text);
        }
        state.counted(self.id, taken, &block.attestations, now);
        state.table.lapsed_on(self.id)
    }

    /// R2: only a claim that was read ever kills a copy.
    fn read_claims(&mut self, config: &GuardConfig, lapsed: &[Tenure]) {
        let until = clock::now() + config.timing.renew / 2;
        let count = lapsed.len().min(CLAIMS_PER_BEAT);
        for tenure in lapsed.iter().cycle().skip(self.claims_from % lapsed.len().max(1)).take(count) {
            if until < clock::now() {
                return; // The next beat is worth more.
            }
            self.claims_from = self.claims_from.wrapping_add(1);
            let Ok(Some(claim)) = highest_claim(&self.path, config.cluster, tenure.vm) else { continue };
            let Some(why) = ends(&claim, *tenure, config.host) else { continue };
            self.shared.with(|state, _| {
                if let Err(refusal) = state.table.kill(*tenure, claim.tenure.generation, &why) {
                    state.say(format!("VM {}: not killed: {refusal}", claim.name));
                }
            });
        }
    }

    fn failed(&mut self, failed: Failed) {
        match failed {
            Failed::Store(text) => {
                self.doubtful = true;
                self.trouble(text, false);
            }
            Failed::Full(text) => {
                self.doubtful = true;
                self.trouble(text, true);
            }
            Failed::Replaced(text) => {
                self.file = None;
                self.trouble(text, false);
            }
            Failed::Outdated(shown) => {
                if let Err(error) = self.shared.rise(shown) {
                    self.trouble(format!("a higher incarnation cannot be kept: {error}"), false);
                }
            }
            Failed::Doubt(text, twice) => self.shared.with(|state, now| {
                let Some(store) = state.stores.get_mut(&self.id).filter(|store| store.life == self.life) else {
                    return;
                };
                store.trouble = Some(text.clone());
                if !twice {
                    return state.distrust(self.id, &text, now);
                }
                let new = store.doubt.is_none();
                store.doubt = Some(text.clone());
                store.stage = Stage::Watching;
                if new {
                    state.alarm(text);
                }
                state.touch(); // The next guard must not trust it, either.
                state.report_lease(self.id, now);
            }),
        }
    }

    fn trouble(&self, text: String, full: bool) {
        self.shared.with(|state, now| {
            let Some(store) = state.stores.get_mut(&self.id).filter(|store| store.life == self.life) else { return };
            let new = store.trouble.is_none();
            store.trouble = Some(text.clone());
            store.full = full;
            if new {
                let path = store.path.clone();
                state.alarm(format!("datastore {path}: {text}"));
            }
            state.report_lease(self.id, now);
        });
    }

    fn stage(&self, stage: Stage) {
        self.shared.with(|state, _| {
            if let Some(store) = state.stores.get_mut(&self.id).filter(|store| store.life == self.life) {
                store.stage = stage;
            }
        });
        self.shared.wake_all();
    }

    /// None: this thread is not needed any more.
    fn facts(&self) -> Option<Facts> {
        self.shared.with(|state, _| {
            let store = state.stores.get(&self.id).filter(|store| store.life == self.life)?;
            let (stage, unverified) = (store.stage, store.unverified);
            Some(Facts { config: state.config.as_ref()?.1.clone(), stage, unverified })
        })
    }

    /// Until the next beat; shorter when the rows changed, an attestation came, the stage, or the configuration; shortest
    /// while an exit waits for a beat: so does a move.
    fn pause(&mut self, began: Time, facts: &Facts) {
        let timing = facts.config.timing;
        let changed = |now: Facts| now.stage != facts.stage || now.unverified && !facts.unverified;
        if self.facts().is_some_and(changed) {
            return;
        }
        let next = began + timing.renew;
        self.shared.wait((began + timing::SHORTEST_PERIOD).min(next), |_| false);
        let drains = |state: &State| state.table.drains_on(self.id);
        self.shared.wait((began + timing::hurried_renew(&timing)).min(next), drains);
        let hurried = |store: &Store| store.owes() || store.unverified && !facts.unverified;
        let hurries = |state: &State| drains(state) || state.stores.get(&self.id).is_some_and(hurried);
        loop {
            let version = self.seen_version;
            self.shared.wait(next, |state| {
                state.table.version() != version
                    || hurries(state)
                    || state.config.as_ref().is_none_or(|(_, config)| !Arc::ptr_eq(config, &facts.config))
                    || state.stores.get(&self.id).is_none_or(|store| store.life != self.life)
            });
            let same = self.shared.with(|state, _| {
                let listed = self
                    .listed
                    .as_ref()
                    .is_some_and(|(of, listed, _)| *of == state.incarnation && *listed == state.table.list(self.id));
                let configured = state.config.as_ref().is_some_and(|(_, config)| Arc::ptr_eq(config, &facts.config));
                (listed && configured && !hurries(state) && state.stores.contains_key(&self.id))
                    .then_some(state.table.version())
            });
            match same {
                Some(version) if clock::now() < next => self.seen_version = version,
                Some(_) | None => return,
            }
        }
    }
}

/// The roster must name us before a beat, and again after it: only then it counts. Its generation.
fn member(file: &BeatFile, config: &GuardConfig) -> Result<u64, Failed> {
    let roster = file.roster()?;
    if roster.members.iter().any(|entry| entry.host == config.host && entry.index == config.index) {
        return Ok(roster.generation);
    }
    Err(Failed::Store(format!(
        "its roster (generation {}) does not name this host {}: no beats count here; add the host to the datastore",
        roster.generation, config.host
    )))
}
