//! What the datastores show: complete reads, freshness of every member's beats, windows of silence, claims.
//!
//! ```text
//!   every renew, and exactly when a window can end:  ReadAll ──► seen (freshness) + Silence (R3)
//!   at start, when somebody falls silent, as new master:  ReadClaims(All) ──► vms
//!   master, when the roster differs from the settings:  WriteRoster
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::health::{Health, Loss};
use super::lease::{Seen as SilenceSeen, Silence};
use super::note::Note;
use crate::mutants::{Mutant, planted};
use crate::types::guard::LeaseView;
use crate::types::store::{ClaimsOf, CompleteRead, StoreAnswer, StoreFailure, StoreOrder};
use crate::types::{
    BeatBlock, BootId, DatastoreId, Debt, Digest, Freshness, HostId, Incarnation, Over, Roster, RosterEntry, Tenure,
    Time, VmEntry, VmId, VmList, VmState,
};

/// One datastore as this host reads it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Store {
    reading: bool,
    again: bool,
    listing: bool,
    read_at: Option<Time>,
    /// When the newest complete read began.
    read_began: Time,
    /// Claims of the whole datastore were read once.
    pub listed: Option<Time>,
    seen: BTreeMap<HostId, Seen>,
    pub(super) silence: BTreeMap<HostId, Silence>,
    /// It showed less than before, and nobody has accepted that (`trust`).
    pub(super) distrusted: Option<String>,
    roster: Option<Roster>,
    writing_roster: bool,
    trouble: Option<String>,
    /// What the last read that failed says of what is to come.
    pub(super) loss: Option<Loss>,
    /// As people were told last.
    pub health: Health,
}

#[derive(Debug, Serialize, Deserialize)]
struct Seen {
    bytes: Digest,
    changed: Time,
    beat: Option<BeatBlock>,
    list: Option<VmList>,
}

impl Store {
    /// The newest beat of a host that was read here.
    #[must_use]
    pub fn newest_of(&self, host: HostId) -> Option<&BeatBlock> {
        self.seen.get(&host).and_then(|seen| seen.beat.as_ref())
    }
    /// How long nothing new of a host was seen here.
    #[must_use]
    pub fn age_of(&self, host: HostId, now: Time) -> Option<Duration> {
        self.seen.get(&host).map(|seen| now.since(seen.changed))
    }
    /// When something new of a host was last seen here.
    #[must_use]
    pub fn changed_at(&self, host: HostId) -> Option<Time> {
        self.seen.get(&host).map(|seen| seen.changed)
    }
    /// What a host's guard says here of (v, g), if it says that it is over.
    #[must_use]
    pub fn said_over(&self, host: HostId, tenure: Tenure) -> Option<Over> {
        let list = self.seen.get(&host)?.list.as_ref()?;
        let entry = list.entries.iter().find(|entry| entry.tenure == tenure);
        if entry.is_none() && planted(Mutant::AbsenceIsProof) {
            return Some(Over::Exited { clean: true });
        }
        entry.and_then(|entry| match entry.state {
            VmState::Over(over) => Some(over),
            VmState::Expected | VmState::Running | VmState::Incoming => None,
        })
    }
    /// R3 and R4: how long the silence of `host` has been proven, for a claim that was read at `known`.
    #[must_use]
    pub fn lapsed(&self, host: HostId, known: Time) -> Option<Duration> {
        self.silence.get(&host).and_then(|silence| silence.over_since(known))
    }
    /// How long the silence of `host` must last here to prove a lapse, by the L that it announced lately.
    #[must_use]
    pub fn window_of(&self, host: HostId) -> Option<Duration> {
        self.silence.get(&host).and_then(Silence::needs)
    }
    /// How long complete reads have shown nothing new of `host`, attestations included, and since when.
    #[must_use]
    pub fn quiet(&self, host: HostId) -> Option<(Time, Duration)> {
        self.silence.get(&host).and_then(Silence::quiet)
    }
    /// When the running window of `host` can end at the earliest.
    #[must_use]
    pub fn window_ends(&self, host: HostId) -> Option<Time> {
        self.silence.get(&host).and_then(Silence::next_due)
    }
    /// When the last complete read ended.
    #[must_use]
    pub fn read_at(&self) -> Option<Time> {
        self.read_at
    }
    /// When it began.
    #[must_use]
    pub fn read_began(&self) -> Time {
        self.read_began
    }
    /// What is wrong with reading it.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
    /// Takes in what a complete read shows: whose VM list changed, and who has beaten, in which boot, since the read before it
    /// began.
    fn take_in(&mut self, read: &CompleteRead, own_lease: Duration) -> (Vec<HostId>, Vec<(HostId, BootId)>) {
        self.read_at = Some(read.ended);
        let mut changed_lists = Vec::new();
        let mut lives: Vec<(HostId, BootId)> = Vec::new();
        for member in &read.members {
            let silence = self.silence.entry(member.host).or_insert_with(|| Silence::new(own_lease));
            silence.read(SilenceSeen::of(read, member.host));
            let list_of = |seen: &Seen| seen.list.as_ref().map(|list| (list.incarnation, list.sequence));
            match self.seen.get_mut(&member.host) {
                Some(seen) if seen.bytes == member.bytes => {}
                Some(seen) => {
                    let before = list_of(seen);
                    seen.bytes = member.bytes;
                    seen.changed = read.ended;
                    seen.beat.clone_from(&member.beat);
                    lives.extend(member.beat.as_ref().map(|beat| (member.host, beat.boot)));
                    if member.list.is_some() {
                        seen.list.clone_from(&member.list); // A list that does not match says nothing.
                    }
                    if before != list_of(seen) {
                        changed_lists.push(member.host);
                    }
                }
                None => {
                    let seen = Seen {
                        bytes: member.bytes,
                        changed: read.ended,
                        beat: member.beat.clone(),
                        list: member.list.clone(),
                    };
                    self.seen.insert(member.host, seen);
                }
            }
        }
        (changed_lists, lives)
    }
}

impl Core {
    pub(super) fn read_stores_soon(&mut self, cx: &mut Cx) {
        let ids: Vec<DatastoreId> = self.stores.keys().copied().collect();
        for id in ids {
            cx.set(Timer::Read(id), cx.now);
        }
    }

    pub(super) fn read_store(&mut self, cx: &mut Cx, id: DatastoreId) {
        let timing = self.settings.timing;
        cx.set(Timer::Read(id), cx.now + timing.renew);
        let Some(store) = self.stores.get_mut(&id) else { return };
        if store.reading {
            store.again = true;
            return;
        }
        store.reading = true;
        cx.store(id, StoreOrder::ReadAll, timing.lease, Pending::Read(id));
    }

    pub(super) fn read_done(&mut self, cx: &mut Cx, id: DatastoreId, answer: StoreAnswer) {
        let renew = self.settings.timing.renew;
        let Some(store) = self.stores.get_mut(&id) else { return };
        store.reading = false;
        if std::mem::take(&mut store.again) {
            cx.set(Timer::Read(id), cx.now);
        }
        match answer {
            StoreAnswer::Read(read) => self.read_came(cx, id, *read),
            StoreAnswer::Failed(why) => {
                if planted(Mutant::FailedReadIsSilence) {
                    store.silence.values_mut().for_each(|silence| silence.read_failed(cx.now));
                    self.look = true;
                }
                self.store_trouble(cx, id, Some(why));
                cx.set_earlier(Timer::Read(id), cx.now + renew);
            }
            _ => {}
        }
    }

    fn read_came(&mut self, cx: &mut Cx, id: DatastoreId, read: CompleteRead) {
        self.store_trouble(cx, id, None);
        let boots: Vec<(HostId, Incarnation, BootId)> = read
            .members
            .iter()
            .filter_map(|member| member.beat.as_ref().map(|beat| (member.host, beat.incarnation, beat.boot)))
            .collect();
        for (host, incarnation, boot) in boots {
            self.saw_boot(host, incarnation, boot);
        }
        let own_lease = self.settings.timing.lease;
        let Some(store) = self.stores.get_mut(&id) else { return };
        let since = std::mem::replace(&mut store.read_began, read.began);
        let first = store.read_at.is_none();
        let (changed_lists, lives) = store.take_in(&read, own_lease);
        let roster = read.roster.clone();
        store.silence.retain(|host, _| roster.names(*host));
        store.seen.retain(|host, _| roster.names(*host));
        store.roster = Some(read.roster);
        for (host, boot) in lives {
            self.shows_life(cx, host, boot, since);
        }
        self.follow_trust(cx, id);
        self.look_at_fences(cx, id);
        self.plan_next_read(cx, id);
        self.mend_roster(cx, id);
        let since = self.master_since;
        if self.stores.get(&id).is_some_and(|store| store.listed.is_none_or(|at| at < since)) {
            self.list_claims(cx);
        }
        // What a host claims that nobody hears, or gives up, is told by its list alone; the claim follows the list by a moment.
        if changed_lists.iter().any(|host| !self.is_heard(*host, cx.now)) {
            self.list_claims(cx);
            cx.set_earlier(Timer::Relist, cx.now + self.settings.timing.renew);
        }
        // Silence that grew, beats that came: both may change a verdict or complete a proof.
        if first || !changed_lists.is_empty() || self.anybody_silent(cx.now) {
            self.judge_all(cx);
            self.look = true;
        }
    }

    /// A further complete read is begun exactly when a window of a silent host can end.
    fn plan_next_read(&mut self, cx: &mut Cx, id: DatastoreId) {
        let Some(store) = self.stores.get(&id) else { return };
        let silent = self.settings.members.iter().filter(|member| !self.is_heard(member.host, cx.now));
        let ends = silent.filter_map(|member| store.window_ends(member.host)).filter(|at| cx.now < *at).min();
        if let Some(at) = ends {
            cx.set_earlier(Timer::Read(id), at + Duration::from_millis(1));
        }
    }

    fn anybody_silent(&self, now: Time) -> bool {
        self.settings.members.iter().any(|member| !self.is_heard(member.host, now))
    }

    /// The datastore's roster follows the settings; only the master changes it.
    fn mend_roster(&mut self, cx: &mut Cx, id: DatastoreId) {
        if !self.is_master() {
            return;
        }
        let wanted: Vec<RosterEntry> =
            self.settings.members.iter().map(|member| RosterEntry { index: member.index, host: member.host }).collect();
        let within = self.settings.timing.lease;
        let Some(store) = self.stores.get_mut(&id) else { return };
        let Some(roster) = &store.roster else { return };
        if store.writing_roster || roster.members == wanted {
            return;
        }
        // A host leaves the roster only when all its claims are over: nobody is removed here.
        if roster.members.iter().any(|entry| !wanted.contains(entry)) {
            return;
        }
        store.writing_roster = true;
        let roster = Roster {
            cluster: roster.cluster,
            datastore: roster.datastore,
            generation: roster.generation + 1,
            members: wanted,
        };
        cx.store(id, StoreOrder::WriteRoster(roster), within, Pending::Roster(id));
    }

    pub(super) fn roster_done(&mut self, cx: &mut Cx, id: DatastoreId, answer: &StoreAnswer) {
        if let Some(store) = self.stores.get_mut(&id) {
            store.writing_roster = false;
        }
        if let StoreAnswer::Failed(why) = answer {
            let name = self.store_name(id);
            cx.note(Note::warning("roster", format!("datastore {name}: members could not be written: {why}")));
        }
        cx.set(Timer::Read(id), cx.now);
    }

    /// Reads every claim of every datastore.
    pub(super) fn list_claims(&mut self, cx: &mut Cx) {
        let within = self.settings.timing.lease * 2;
        for (id, store) in &mut self.stores {
            if !store.listing {
                store.listing = true;
                cx.store(*id, StoreOrder::ReadClaims(ClaimsOf::All), within, Pending::Claims(*id));
            }
        }
    }

    pub(super) fn claims_done(&mut self, cx: &mut Cx, id: DatastoreId, answer: StoreAnswer) {
        let Some(store) = self.stores.get_mut(&id) else { return };
        store.listing = false;
        match answer {
            StoreAnswer::Claims { began, ended, claims, bad } => {
                store.listed = Some(ended);
                self.all_looked(id, began);
                for claim in claims {
                    self.learn(cx, claim, ended);
                }
                for (vm, why) in bad {
                    self.bad_claim(cx, vm, &why);
                }
                self.check = true;
                self.look = true;
                // R3 wants a complete read that begins after the claims were read.
                cx.set(Timer::Read(id), cx.now);
            }
            StoreAnswer::Failed(why) => self.store_trouble(cx, id, Some(why)),
            _ => {}
        }
    }

    fn store_trouble(&mut self, cx: &mut Cx, id: DatastoreId, why: Option<StoreFailure>) {
        let name = self.store_name(id);
        let Some(store) = self.stores.get_mut(&id) else { return };
        store.loss = match &why {
            Some(StoreFailure::Timeout(_) | StoreFailure::Hung) => store.loss, // Says nothing new.
            Some(why) => Loss::of(why),
            None => None,
        };
        match (store.trouble.is_some(), why) {
            (false, Some(why)) => {
                store.trouble = Some(why.to_string());
                cx.note(Note::warning("datastore-trouble", format!("datastore {name} cannot be read here: {why}")));
            }
            (true, Some(why)) => store.trouble = Some(why.to_string()),
            (true, None) => {
                store.trouble = None;
                cx.note(Note::info("datastore-well", format!("datastore {name} can be read here again")));
                if store.listed.is_none() {
                    self.list_claims(cx);
                }
            }
            (false, None) => {}
        }
    }

    /// Whether a host's beats are fresh on any datastore.
    pub(super) fn beats_somewhere(&self, host: HostId, now: Time) -> bool {
        self.stores.keys().any(|id| self.freshness(*id, host, now) == Some(Freshness::Fresh))
    }

    /// Whether VMs run on a host with a lease on this datastore, as it said last, or stand after a lapse and may go on at any
    /// moment: a fence for `but` would hit them, too. `over` = the proof in hand ends all that the host ran. A host that is
    /// only silent may run them on: its lease says, and others may attest it. What was not read yet is no sign of none.
    pub(super) fn runs_vms_on(&self, id: DatastoreId, host: HostId, but: VmId, over: bool, now: Time) -> bool {
        let Some(store) = self.stores.get(&id) else { return false };
        let Some(seen) = store.seen.get(&host) else { return !over && store.read_at.is_none() };
        let Some(beat) = &seen.beat else { return false };
        let lives = self.is_heard(host, now) || self.freshness(id, host, now) == Some(Freshness::Fresh);
        let gone = || {
            over || store.lapsed(host, Time::ZERO).is_some()
                || self.boot_of(host).is_some_and(|(_, boot)| boot != beat.boot)
                || self.is_off(host, beat.boot)
        };
        let alive = |entry: &VmEntry| match entry.state {
            VmState::Over(Over::Lapsed) => lives && entry.tenure.vm != but,
            VmState::Over(_) => false,
            VmState::Expected | VmState::Running | VmState::Incoming => true,
        };
        (lives || !gone()) && seen.list.as_ref().is_none_or(|list| list.entries.iter().any(alive))
    }

    /// Whether a debtor that lives and reaches this datastore says that its copy has ended there, cleanly.
    pub(super) fn ended_cleanly(&self, vm: VmId, debt: &Debt, now: Time) -> bool {
        if self.freshness(debt.datastore, debt.host, now) != Some(Freshness::Fresh) {
            return false;
        }
        let Some(seen) = self.stores.get(&debt.datastore).and_then(|store| store.seen.get(&debt.host)) else {
            return false;
        };
        let (Some(beat), Some(list)) = (&seen.beat, &seen.list) else { return false };
        let mut states = list.entries.iter().filter(|entry| entry.tenure.vm == vm).map(|entry| entry.state);
        let done = |state| matches!(state, VmState::Over(Over::Exited { clean: true } | Over::NeverStarted));
        let ended = list
            .entries
            .iter()
            .any(|entry| entry.tenure.vm == vm && entry.state == VmState::Over(Over::Exited { clean: true }));
        beat.boot == debt.boot && ended && states.all(done)
    }

    /// Whether our own path works, as reader and as witness (R4): else the age of a beat says nothing about its host.
    pub(super) fn reads_well(&self, id: DatastoreId, now: Time) -> bool {
        let suspect = self.settings.timing.suspect;
        let read_at = self.stores.get(&id).and_then(|store| store.read_at);
        read_at.is_some_and(|at| now.since(at) < suspect)
            && self.guard.leases.get(&id).is_some_and(|lease| lease.own_path)
    }

    /// How fresh a host's beats are here; `None` = it never beat here.
    pub(super) fn freshness(&self, id: DatastoreId, host: HostId, now: Time) -> Option<Freshness> {
        let suspect = self.settings.timing.suspect;
        let store = self.stores.get(&id)?;
        let age = store.age_of(host, now)?;
        store.newest_of(host)?;
        Some(if age < suspect {
            Freshness::Fresh
        } else if self.reads_well(id, now) {
            Freshness::Stale
        } else {
            Freshness::Unknown
        })
    }

    /// The guard's word on a lease: R4's witness, and the right to claim.
    pub(super) fn lease_changed(&mut self, cx: &mut Cx, lease: LeaseView) {
        let id = lease.datastore;
        let (own_lease, now) = (self.settings.timing.lease, cx.now);
        if let Some(store) = self.stores.get_mut(&id)
            && lease.written != Time::ZERO
        {
            for silence in store.silence.values_mut() {
                silence.set_lease(own_lease);
                silence.persisted(lease.written, now);
            }
        }
        self.follow_doubt(cx, &lease);
        let name = self.store_name(id);
        let before = self.guard.leases.insert(id, lease.clone());
        let was = before.as_ref().is_some_and(|lease| lease.until.is_some());
        let is = lease.until.is_some();
        self.follow_trust(cx, id);
        let renewed = before.as_ref().is_some_and(|before| before.until < lease.until) && !self.underway.is_empty();
        self.check |= renewed; // What was paused in doubt goes on.
        if was != is || before.as_ref().is_none_or(|before| before.epoch != lease.epoch) {
            self.check = true;
            self.look = true;
        }
        if was && !is {
            let why = lease.trouble.clone().unwrap_or_else(|| "no beat was persisted".to_owned());
            cx.note(Note::warning("lease-lapsed", format!("lease on datastore {name} lapsed: {why}")));
        } else if !was && is {
            cx.note(Note::info("lease-valid", format!("lease on datastore {name} is valid")));
            cx.set(Timer::Read(id), cx.now);
            self.came_back(cx, id);
        }
    }
}
