//! Shared storage in memory: roster, beats, VM lists, claims, records, image locks; it hangs, fails and answers late.
//!
//! ```text
//!   order ──half──► lands at the server ──half──► answer, in the process that asked, unless its deadline has passed
//!                     │ path hangs: it waits in the host's kernel, and dies with the host
//!                     └ storage hangs for all: it waits at the server, and lands after the heal, even if its host died
//! ```
//!
//! A client that is silent for `locks` loses its state: image locks go, and what it had under way is refused. A storage
//! fence does that at once.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use mainstay::core::event::Outcome;
use mainstay::core::health::Loss;
use mainstay::types::settings::{ClusterSettings, LateWrites};
use mainstay::types::store::{After, ClaimsOf, CompleteRead, StoreAnswer, StoreFailure, StoreOrder};
use mainstay::types::{
    Claim, DatastoreId, Digest, Generation, HostId, Roster, RosterEntry, Tenure, Ticket, VmId, VmRecord,
};

use super::faults::{Deed, Fate};
use super::files::Files;
use super::host::Path;
use super::rollback::Copy;
use super::world::{Gate, H, World};

type Landing = Box<dyn FnOnce(&mut World, bool)>;

/// An operation that hangs.
pub(super) struct Parked {
    pub(super) host: H,
    pub(super) boot: u64,
    /// It has reached the server.
    pub(super) sent: bool,
    pub(super) work: Landing,
}

/// Claims of one VM: Err = torn. With the time at which each came to be.
pub(super) type Claims = BTreeMap<Generation, (Result<Claim, String>, u64)>;

/// One datastore.
pub struct Datastore {
    /// Its id.
    pub id: DatastoreId,
    /// Its block of members.
    pub roster: Roster,
    /// Nothing comes back, for anybody.
    pub hung: bool,
    pub(super) slots: BTreeMap<HostId, Files>,
    pub(super) claims: BTreeMap<VmId, Claims>,
    pub(super) records: BTreeMap<(VmId, Digest), VmRecord>,
    pub(super) parked: Vec<Parked>,
    /// How long the server keeps a silent client's state; none = no locks.
    keeps: Option<Duration>,
    silent: BTreeMap<(H, u64), u64>,
    /// When the server last dropped the state of a client.
    pub(super) expired: BTreeMap<(H, u64), u64>,
    pub(super) locks: BTreeMap<VmId, (H, u64)>,
    /// Copies whose writes may still land.
    pub writers: BTreeMap<VmId, BTreeSet<(H, u64)>>,
    /// The administrator takes that risk.
    pub accepts: bool,
    /// It once showed less than it had acknowledged: a guard may doubt it.
    pub lied: bool,
    pub(super) copy: Option<Copy>,
}

impl Datastore {
    /// With the first roster in it.
    pub fn new(settings: &ClusterSettings, id: DatastoreId, keeps: Option<Duration>) -> Self {
        let members =
            settings.members.iter().map(|member| RosterEntry { index: member.index, host: member.host }).collect();
        Self {
            id,
            roster: Roster { cluster: settings.cluster, datastore: id, generation: 1, members },
            hung: false,
            slots: BTreeMap::new(),
            claims: BTreeMap::new(),
            records: BTreeMap::new(),
            parked: Vec::new(),
            keeps,
            silent: BTreeMap::new(),
            expired: BTreeMap::new(),
            locks: BTreeMap::new(),
            writers: BTreeMap::new(),
            accepts: settings.datastore(id).is_some_and(|d| d.late_writes == LateWrites::Accept),
            lied: false,
            copy: None,
        }
    }

    // ---- claims -------------------------------------------------------------------------------------------------

    /// The highest claim of a VM; Err = it cannot be read.
    pub fn highest(&self, vm: VmId) -> Option<Result<Claim, String>> {
        self.highest_of(vm, u64::MAX)
    }

    /// The highest that there was at a time: an old listing.
    pub fn highest_of(&self, vm: VmId, until: u64) -> Option<Result<Claim, String>> {
        let all = self.claims.get(&vm)?.values().rev();
        all.filter(|(_, made)| *made <= until).map(|(claim, _)| claim.clone()).next()
    }

    /// One claim.
    pub fn claim(&self, tenure: Tenure) -> Option<&Claim> {
        self.claims.get(&tenure.vm)?.get(&tenure.generation)?.0.as_ref().ok()
    }

    /// When a claim was made.
    pub fn made(&self, tenure: Tenure) -> Option<u64> {
        self.claims.get(&tenure.vm)?.get(&tenure.generation).map(|(_, made)| *made)
    }

    /// Whether a claim after this one named another host: it may have run there.
    pub fn named_another(&self, tenure: Tenure, me: HostId) -> bool {
        let all = self.claims.get(&tenure.vm).into_iter().flatten();
        all.filter(|(at, _)| tenure.generation < **at)
            .filter_map(|(_, (claim, _))| claim.as_ref().ok())
            .any(|claim| claim.owners().iter().any(|owner| owner.host != me))
    }

    /// Highest generation, readable or not.
    pub fn generation(&self, vm: VmId) -> Generation {
        self.claims.get(&vm).and_then(|all| all.last_key_value()).map(|(at, _)| *at).unwrap_or_default()
    }

    /// The newest claim becomes unreadable.
    pub fn tear(&mut self, vm: VmId) {
        if let Some(mut newest) = self.claims.get_mut(&vm).and_then(|all| all.last_entry()) {
            newest.get_mut().0 = Err("checksum does not match".to_owned());
        }
    }

    fn create(&mut self, claim: &Claim, after: Option<After>, now: u64) -> StoreAnswer {
        let all = self.claims.entry(claim.tenure.vm).or_default();
        let bad = |why: &str| StoreAnswer::Failed(StoreFailure::Bad { path: "claim".into(), why: why.to_owned() });
        match all.get(&claim.tenure.generation) {
            Some((Ok(same), _)) if same.nonce == claim.nonce => {}
            Some(_) => {
                return match &all.last_key_value().expect("one is there").1.0 {
                    Ok(highest) => StoreAnswer::Exists(Box::new(highest.clone())),
                    Err(why) => bad(why),
                };
            }
            None => {
                all.insert(claim.tenure.generation, (Ok(claim.clone()), now));
            }
        }
        let stands = |after: After| match after {
            After::Elsewhere(_) => true,
            After::Here(generation, nonce) => all
                .get(&generation)
                .is_some_and(|(before, _)| before.as_ref().is_ok_and(|before| before.nonce == nonce)),
        };
        let ours = claim.tenure.generation;
        if let Some((Ok(higher), _)) =
            all.range((Bound::Excluded(ours), Bound::Unbounded)).next_back().map(|(_, at)| at)
        {
            return StoreAnswer::Exists(Box::new(higher.clone()));
        }
        let between = after.is_some_and(|after| {
            all.range((Bound::Excluded(after.generation()), Bound::Excluded(ours))).next().is_some()
        });
        if after.is_none_or(stands) && !between {
            return StoreAnswer::Created;
        }
        all.remove(&claim.tenure.generation);
        StoreAnswer::GaveWay
    }

    fn claims_of(&self, which: &ClaimsOf, until: u64) -> (Vec<Claim>, Vec<(VmId, String)>) {
        let wanted: Vec<VmId> = match which {
            ClaimsOf::All => self.claims.keys().copied().collect(),
            ClaimsOf::Vms(vms) => vms.clone(),
        };
        let (mut claims, mut bad) = (Vec::new(), Vec::new());
        for vm in wanted {
            match self.highest_of(vm, until) {
                Some(Ok(claim)) => claims.push(claim),
                Some(Err(why)) => bad.push((vm, why)),
                None => {}
            }
        }
        (claims, bad)
    }

    // ---- image locks --------------------------------------------------------------------------------------------

    /// Takes the image lock of a VM, as QEMU does when it starts. Err = who holds it.
    pub fn lock(&mut self, vm: VmId, host: H, boot: u64) -> Result<(), H> {
        match self.locks.get(&vm) {
            Some(holder) if self.keeps.is_some() && *holder != (host, boot) => Err(holder.0),
            Some(_) | None => {
                self.locks.insert(vm, (host, boot));
                Ok(())
            }
        }
    }

    /// A QEMU closed its image, on a path that works.
    pub fn release(&mut self, vm: VmId, host: H, boot: u64) {
        if self.locks.get(&vm) == Some(&(host, boot)) {
            self.locks.remove(&vm);
        }
        if let Some(writers) = self.writers.get_mut(&vm) {
            writers.remove(&(host, boot));
        }
    }

    pub(super) fn holder(&self, vm: VmId) -> Option<H> {
        self.locks.get(&vm).filter(|_| self.keeps.is_some()).map(|(host, _)| *host)
    }
}

impl World {
    // ---- operations ---------------------------------------------------------------------------------------------

    /// One operation of a process: `effect` at the server, `answer` in the process.
    #[allow(clippy::too_many_arguments)] // Who, where, how, how long, what, and then.
    pub fn io<T: 'static>(
        &mut self,
        h: H,
        home: DatastoreId,
        gate: Gate,
        deed: Deed,
        micros: u64,
        effect: impl FnOnce(&mut Self) -> T + 'static,
        answer: impl FnOnce(&mut Self, Result<T, String>) + 'static,
    ) {
        let half = self.latency(micros / 2) + self.slowness(h);
        let boot = self.hosts[h].life.unwrap_or(0);
        let fate = self.fate(h, deed);
        let failed = || Err("input/output error".to_owned());
        let work: Landing = Box::new(move |world, lands| {
            let half = world.latency(micros / 2) + world.slowness(h);
            match fate {
                Fate::Done if lands => {
                    let value = effect(world);
                    return world.after(gate, half, move |world| answer(world, Ok(value)));
                }
                Fate::Unheard if lands => drop(effect(world)),
                Fate::Late(delay) if lands => world.land_late(home, (h, boot), delay, effect),
                Fate::Done | Fate::Refused | Fate::Unheard | Fate::Late(_) => {}
            }
            world.after(gate, half, move |world| answer(world, failed()));
        });
        self.after(Gate::World, half, move |world| world.land(h, boot, home, gate, work));
    }

    /// A write whose process was told that it failed; an expired client's no longer land.
    fn land_late<T>(
        &mut self,
        home: DatastoreId,
        client: (H, u64),
        delay: Duration,
        effect: impl FnOnce(&mut Self) -> T + 'static,
    ) {
        let given = self.now;
        self.after(Gate::World, delay, move |world| {
            if world.stores[&home].expired.get(&client).is_none_or(|at| *at < given) {
                drop(effect(world));
            }
        });
    }

    fn land(&mut self, h: H, boot: u64, home: DatastoreId, gate: Gate, work: Landing) {
        let host = &self.hosts[h];
        let alive = host.life == Some(boot);
        let path = host.path(home);
        let Some(store) = self.stores.get_mut(&home) else { return };
        let refused: Landing = Box::new(move |world, lands| {
            if lands {
                work(world, true);
            } else {
                world.after(gate, Duration::from_millis(1), move |world| work(world, false));
            }
        });
        if store.hung {
            store.parked.push(Parked { host: h, boot, sent: true, work: refused });
        } else if alive && path == Path::Hung {
            store.parked.push(Parked { host: h, boot, sent: false, work: refused });
        } else if alive && path == Path::Broken {
            refused(self, false);
        } else if alive || self.dice(2) == 0 {
            refused(self, true);
        }
    }

    /// An order of an agent.
    pub fn store_order(&mut self, h: H, ticket: Ticket, home: DatastoreId, order: StoreOrder, within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let gate = Gate::Agent(h, life);
        if !self.stores.contains_key(&home) {
            self.open.insert((h, life, ticket.0));
            let why = StoreFailure::Missing { path: home.to_string(), why: "not open on this host".into() };
            return self.after(gate, Duration::from_millis(1), move |world| {
                world.done(h, life, ticket, Outcome::Store(StoreAnswer::Failed(why)));
            });
        }
        self.due(gate, within, ticket, Outcome::Store(StoreAnswer::Failed(StoreFailure::Timeout(within))));
        if let StoreOrder::CreateClaim { claim, .. } = &order {
            self.claim_ordered(h, claim);
        }
        let began = self.local(h);
        let micros = match &order {
            StoreOrder::ReadAll | StoreOrder::Probe { .. } => 3000,
            StoreOrder::ReadClaims(_) | StoreOrder::ReadRecord { .. } => 2000,
            StoreOrder::CreateClaim { .. } => 6000,
            StoreOrder::WriteRecord(_) | StoreOrder::WriteRoster(_) | StoreOrder::Prepare(_) => 5000,
        };
        let deed = match &order {
            StoreOrder::ReadAll => Deed::ReadOthers,
            StoreOrder::ReadClaims(_) | StoreOrder::ReadRecord { .. } | StoreOrder::Probe { .. } => Deed::Read,
            StoreOrder::CreateClaim { .. }
            | StoreOrder::WriteRecord(_)
            | StoreOrder::WriteRoster(_)
            | StoreOrder::Prepare(_) => Deed::Write,
        };
        let effect = move |world: &mut Self| world.carry(h, home, order);
        self.io(h, home, gate, deed, micros, effect, move |world, result| {
            let ended = world.local(h);
            let path = "/srv".to_owned();
            let failed = |why| match world.sick[h].loss {
                None => StoreFailure::Io { path, why },
                Some(Loss::Gone) => StoreFailure::Gone { path, why: "no such device".to_owned() },
                Some(Loss::Stale) => StoreFailure::Stale { path, why: "stale file handle".to_owned() },
            };
            let mut answer = result.unwrap_or_else(|why| StoreAnswer::Failed(failed(why)));
            match &mut answer {
                StoreAnswer::Read(read) => {
                    (read.began, read.ended, read.spent) = (began, ended, ended.since(began));
                }
                StoreAnswer::Claims { began: from, ended: to, .. } => (*from, *to) = (began, ended),
                _ => {}
            }
            world.done(h, life, ticket, Outcome::Store(answer));
        });
    }

    fn carry(&mut self, h: H, home: DatastoreId, order: StoreOrder) -> StoreAnswer {
        let until = self.cached_since(h);
        let now = self.now;
        let store = self.stores.get_mut(&home).expect("looked up before");
        let zero = mainstay::types::Time::ZERO;
        match order {
            StoreOrder::ReadAll => {
                let (roster, members, attestations) = store.read_all();
                let spent = Duration::ZERO;
                StoreAnswer::Read(Box::new(CompleteRead {
                    began: zero,
                    ended: zero,
                    roster,
                    members,
                    attestations,
                    spent,
                }))
            }
            StoreOrder::ReadClaims(which) => {
                let (claims, bad) = store.claims_of(&which, until);
                StoreAnswer::Claims { began: zero, ended: zero, claims, bad }
            }
            StoreOrder::CreateClaim { claim, after } => {
                let before = store.generation(claim.tenure.vm);
                let answer = store.create(&claim, after, now);
                let now = store.generation(claim.tenure.vm);
                self.claim_landed(home, &claim, before, now, &answer);
                answer
            }
            StoreOrder::WriteRecord(record) => {
                let bytes = mainstay::wire::record::encode_record(&record).expect("records of the world are small");
                let digest = mainstay::wire::record::digest(&bytes);
                store.records.insert((record.vm, digest), *record);
                StoreAnswer::Recorded(digest)
            }
            StoreOrder::ReadRecord { vm, digest } => match store.records.get(&(vm, digest)) {
                Some(record) => StoreAnswer::Record(Box::new(record.clone())),
                None => {
                    StoreAnswer::Failed(StoreFailure::Missing { path: "record".into(), why: "no such file".into() })
                }
            },
            StoreOrder::WriteRoster(roster) => {
                if store.roster.generation < roster.generation {
                    store.roster = roster;
                }
                StoreAnswer::Done
            }
            StoreOrder::Prepare(_) => StoreAnswer::Done,
            StoreOrder::Probe { .. } => StoreAnswer::Probed { failed: Vec::new(), spent: Duration::ZERO },
        }
    }

    // ---- faults -------------------------------------------------------------------------------------------------

    /// A host's path to every datastore changes. What hung there goes on, or fails.
    pub fn set_path(&mut self, h: H, path: Path) {
        let homes = self.homes();
        // A host whose path was well all the time has no excuse when the storage is healed for all.
        if homes.iter().any(|home| self.hosts[h].path(*home) != path) {
            self.excuse(h);
        }
        for home in &homes {
            self.hosts[h].paths.insert(*home, path);
        }
        if path == Path::Well {
            self.reconnect_storage(h);
            homes.into_iter().for_each(|home| self.unpark(home));
        } else {
            self.silence_storage(h);
        }
    }

    /// Storage hangs for everybody, or answers again.
    pub fn set_hung(&mut self, hung: bool) {
        self.stalled();
        for home in self.homes() {
            self.stores.get_mut(&home).expect("its own key").hung = hung;
            if !hung {
                self.unpark(home);
            }
        }
    }

    pub(super) fn unpark(&mut self, home: DatastoreId) {
        // Each client finds out in its own time that the server answers again.
        let most = self.settings.timing.lease.as_micros() as u64 / 2;
        let late: Vec<u64> = (0..self.hosts.len()).map(|_| if self.jitter { self.dice(most) } else { 0 }).collect();
        let Some(store) = self.stores.get_mut(&home) else { return };
        for (n, parked) in (1_u64..).zip(std::mem::take(&mut store.parked)) {
            let Parked { host, boot, sent, work } = parked;
            self.after(Gate::World, Duration::from_micros(200 * n + late[host]), move |world| {
                let alive = world.hosts[host].life == Some(boot);
                let hung = alive && world.hosts[host].path(home) == Path::Hung;
                let Some(store) = world.stores.get_mut(&home) else { return };
                if store.hung || hung {
                    store.parked.push(Parked { host, boot, sent, work });
                } else if alive || sent {
                    work(world, true);
                }
            });
        }
    }

    /// The server hears no more of this client; after a while it drops its state.
    pub fn silence_storage(&mut self, h: H) {
        self.homes().into_iter().for_each(|home| self.silence_store(h, home));
    }

    /// That of one datastore.
    pub(super) fn silence_store(&mut self, h: H, home: DatastoreId) {
        let Some(boot) = self.hosts[h].life else { return };
        let now = self.now;
        let store = self.stores.get_mut(&home).expect("its own key");
        store.silent.entry((h, boot)).or_insert(now);
        let Some(keeps) = store.keeps else { return };
        self.after(Gate::World, keeps, move |world| {
            let still = world.stores[&home].silent.get(&(h, boot)) == Some(&now);
            if still {
                world.expire(home, h, Some(boot));
            }
        });
    }

    /// The client is back. If it has booted, the server knows that its old self is gone.
    pub fn reconnect_storage(&mut self, h: H) {
        let Some(boot) = self.hosts[h].life else { return };
        if self.hosts[h].frozen {
            return;
        }
        for home in self.homes() {
            self.expire_old(home, h, boot); // A boot ends whatever the kernel before it had under way.
            if self.hosts[h].path(home) != Path::Well {
                continue;
            }
            let store = self.stores.get_mut(&home).expect("its own key");
            let away = store.silent.remove(&(h, boot)).map_or(0, |since| self.now - since);
            self.bring_back_writes(home, h, boot, Duration::from_nanos(away));
        }
    }
}
