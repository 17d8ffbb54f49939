//! All that the guard knows, behind one lock with short critical sections; no I/O in here.
//!
//! ```text
//!   agent ──orders──► ┌───────────────────────────────┐ ◄── datastore threads: opened, persisted, failed
//!                     │ leases · table · counter · me  │ ◄── watcher: QEMUs that appear and exit
//!   agent ◄─reports── └───────────────────────────────┘ ◄── enforcer: lapses, stops, lateness
//! ```
//!
//! One counter serves all datastores and the network: whoever beats, in whatever way, takes the next with its t_c, in
//! one step, so that counters and times rise together.
//!
//! Deliberately not here: threads, files, sockets; what the next guard is told (`carry`).

mod carry;
mod trust;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::carry::Carried;
use super::process::Process;
use super::store::Store;
use super::table::{MAX_ROWS, ProcessKey, Table};
use crate::core::lease::Persisted;
use crate::core::timing;
use crate::types::guard::{GUARD_PROTOCOL, GuardConfig, GuardReport};
use crate::types::{
    AgentBeat, Attestation, Attested, BootId, Counter, DatastoreId, DatastoreSet, HostId, Incarnation, ListName,
    NetBeat, Time, VmId,
};

/// How many lines for the log wait for the thread that writes them. When full, further ones are dropped.
const LOG_MAX: usize = 256;
/// How many reports wait to be sent: every row, and as much again. When full the connection ends.
const REPORTS_MAX: usize = 2 * MAX_ROWS;
/// How many hints of pids wait for the watcher. When full, further ones are dropped: pid files tell as well.
const HINTS_MAX: usize = 1024;
/// How many attestations a network beat names.
const ATTESTED_MAX: usize = 6;

/// A counter with its t_c, taken together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Taken {
    /// In which it was taken.
    pub incarnation: Incarnation,
    /// Never given twice.
    pub counter: Counter,
    /// t_c.
    pub at: Time,
    /// L to announce.
    pub lease: Duration,
}

/// Where reports go: the newest connection of an agent.
pub struct Outbox {
    /// Which connection.
    pub id: u64,
    to: SyncSender<GuardReport>,
}

/// See the module.
pub struct State {
    /// Of this kernel.
    pub boot: BootId,
    /// Of this guard; rises only.
    pub incarnation: Incarnation,
    /// What the agent configured last, and which change of it this is.
    pub config: Option<(u64, Arc<GuardConfig>)>,
    /// By datastore.
    pub stores: BTreeMap<DatastoreId, Store>,
    /// Rows and QEMUs.
    pub table: Table,
    /// Of every QEMU in the table.
    pub processes: BTreeMap<ProcessKey, Arc<Process>>,
    /// Pids that libvirt named, for the watcher.
    pub hints: Vec<(VmId, u32)>,
    /// Lines for the log.
    pub log: Vec<String>,
    counter: Counter,
    configured_at: Time,
    agent: Option<(AgentBeat, Time)>,
    list: ListName,
    real_time_refused: bool,
    late_until: Time,
    rotation: usize,
    outbox: Option<Outbox>,
    /// For the agent, as soon as the memory holds what they tell.
    pending: Vec<GuardReport>,
    /// What every agent must be told when it connects.
    standing: Vec<String>,
    /// Counts what changed beside the table.
    touched: u64,
    /// No further beat begins: this process ends in order, and the next one goes on.
    finishing: bool,
}

impl State {
    /// Knows nothing but who it is.
    #[must_use]
    pub fn new(boot: BootId, incarnation: Incarnation, table: Table) -> Self {
        Self {
            boot,
            incarnation,
            config: None,
            stores: BTreeMap::new(),
            table,
            processes: BTreeMap::new(),
            hints: Vec::new(),
            log: Vec::new(),
            counter: Counter(0),
            configured_at: Time::ZERO,
            agent: None,
            list: ListName::default(),
            real_time_refused: false,
            late_until: Time::ZERO,
            rotation: 0,
            outbox: None,
            pending: Vec::new(),
            standing: Vec::new(),
            touched: 0,
            finishing: false,
        }
    }

    /// Ends every lease whose time has come, with all that runs on its ground, and every wait for a path that was lost.
    /// Called first whenever the lock is taken.
    pub fn lapse_if_due(&mut self, now: Time) {
        let due = |(id, store): (&DatastoreId, &mut Store)| {
            let stop_at = store.lease.stop_at()?;
            store.lease.lapse_if_due(now).then_some((*id, stop_at))
        };
        let due: Vec<(DatastoreId, Time)> = self.stores.iter_mut().filter_map(due).collect();
        let lease = self.config.as_ref().map_or(Duration::ZERO, |(_, config)| config.timing.lease);
        let stores = &self.stores;
        self.table.lost(|home| stores.get(&home).is_some_and(|store| store.own_path(lease, now)));
        for (home, stop_at) in due {
            self.touch();
            self.table.lapse(home);
            self.say(format!("the lease on datastore {home} lapsed, noticed {:?} after it", now.since(stop_at)));
            self.report_lease(home, now);
        }
    }

    /// Rises with everything that the next guard must know.
    #[must_use]
    pub fn changes(&self) -> (u64, u64) {
        (self.table.version(), self.touched)
    }

    /// Something changed that the next guard must know.
    pub fn touch(&mut self) {
        self.touched += 1;
    }

    /// Begins no further beats.
    pub fn finish(&mut self) {
        self.finishing = true;
    }

    /// Whether no further beats begin.
    #[must_use]
    pub fn is_finishing(&self) -> bool {
        self.finishing
    }

    /// Whether no slot is being written.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        !self.stores.values().any(Store::is_writing)
    }

    /// When the enforcing thread must wake next.
    #[must_use]
    pub fn next_stop(&self) -> Option<Time> {
        self.stores.values().filter_map(|store| store.lease.stop_at()).min()
    }

    /// Every valid lease: its home, when its VMs must be stopped, and L.
    pub fn leases(&self) -> impl Iterator<Item = (DatastoreId, Time, Duration)> {
        let lease = self.config.as_ref().map_or(Duration::ZERO, |(_, config)| config.timing.lease);
        self.stores.iter().filter_map(move |(home, store)| Some((*home, store.lease.stop_at()?, lease)))
    }

    /// Takes the next counter with its t_c. It counts on every datastore on which it turns out to be persisted.
    pub fn take(&mut self, now: Time) -> Taken {
        self.touch();
        self.counter = self.counter.next();
        let lease = self.stores.values().map(|store| store.lease.announced(now)).max();
        let lease = lease.or(self.config.as_ref().map(|(_, config)| config.timing.lease)).unwrap_or_default();
        for store in self.stores.values_mut() {
            store.lease.given(self.counter, now);
        }
        Taken { incarnation: self.incarnation, counter: self.counter, at: now, lease }
    }

    /// The newest beat that can be ours: anything newer under our name is another's.
    #[must_use]
    pub fn last_given(&self) -> (Incarnation, Counter) {
        (self.incarnation, self.counter)
    }

    /// An own beat counts on that datastore, and so do the attestations that stood in it.
    pub fn counted(&mut self, home: DatastoreId, taken: Taken, with: &[Attestation], now: Time) {
        let Some(store) = self.stores.get_mut(&home) else { return };
        store.counted(taken, now, with);
        self.table.landed(home, taken.counter);
        self.persisted(home, taken.counter, now);
        self.report_lease(home, now);
    }

    /// `counter` stands on that datastore, by our own write or an attestation, in a roster that names the writer.
    pub fn persisted(&mut self, home: DatastoreId, counter: Counter, now: Time) {
        self.touch();
        let Some(store) = self.stores.get_mut(&home).filter(|store| !store.unverified) else { return };
        match store.lease.persisted(counter, now) {
            Persisted::Renewed | Persisted::Nothing => {}
            Persisted::Regained => {
                let epoch = store.lease.epoch();
                self.say(format!("the lease on datastore {home} is valid, epoch {epoch:?}"));
                self.report_lease(home, now);
            }
        }
    }

    /// Uses another configuration from now on. The caller has checked it.
    pub fn configure(&mut self, config: GuardConfig, now: Time) {
        self.touch();
        let lease = config.timing.lease;
        let version = self.config.as_ref().map_or(1, |(version, _)| version + 1);
        if self.config.is_none() {
            self.configured_at = now;
        }
        self.stores.retain(|id, _| config.datastores.iter().any(|datastore| datastore.id == *id));
        for datastore in &config.datastores {
            let (incarnation, life) = (self.incarnation, version);
            let store = self
                .stores
                .entry(datastore.id)
                .or_insert_with(|| Store::new(datastore.clone(), life, incarnation, lease));
            store.position = datastore.position;
            store.accept(datastore.accepted);
            store.lease.set_lease(lease);
        }
        self.config = Some((version, Arc::new(config)));
    }

    /// The exit of a QEMU was seen.
    pub fn exited(&mut self, vm: VmId, key: ProcessKey, now: Time) {
        let lease = self.config.as_ref().map_or(Duration::ZERO, |(_, config)| config.timing.lease);
        let stores = &self.stores;
        let works = |home| stores.get(&home).is_some_and(|store| store.own_path(lease, now));
        self.table.exited(vm, key, self.counter, works);
        self.processes.remove(&key);
    }

    /// Another, higher incarnation: every lease is lapsed, every right to run is gone.
    pub fn restart(&mut self, incarnation: Incarnation) {
        self.touch();
        self.incarnation = incarnation;
        self.stores.values_mut().for_each(|store| store.lease.restart(incarnation));
        self.table.lapse_everything();
        self.say(format!("takes incarnation {incarnation}: a datastore showed one that is not lower"));
        self.introduce();
    }

    /// The agent's part of the beats, which also shows that it lives.
    pub fn agent_beat(&mut self, beat: AgentBeat, now: Time) {
        self.agent = Some((beat, now));
    }

    /// Nobody here would say what libvirt tells: there is no agent, or it is silent.
    #[must_use]
    pub fn is_alone(&self, now: Time) -> bool {
        let patience =
            self.config.as_ref().map_or(Duration::ZERO, |(_, config)| timing::agent_dead_after(&config.timing));
        self.outbox.is_none() || self.agent.as_ref().is_none_or(|(_, heard)| patience <= now.since(*heard))
    }

    /// The list that was written last.
    pub fn listed(&mut self, name: ListName) {
        self.touch();
        self.list = name;
    }

    /// Builds the next network beat and takes its counter. None: not configured, no agent was ever heard, or some
    /// datastore shows that another host may be using our name.
    pub fn net_beat(&mut self, now: Time) -> Option<(NetBeat, Arc<GuardConfig>)> {
        let (_, config) = self.config.clone()?;
        let mut agent = self.agent.as_ref()?.0.clone();
        if self.finishing || !self.may_beat_on_network(now) {
            return None;
        }
        agent.flags = self.flags(now);
        let taken = self.take(now);
        let set = |test: &dyn Fn(&Store) -> bool| {
            DatastoreSet(self.stores.values().filter(|store| test(store)).fold(0, |set, store| set | store.bit()))
        };
        let beat = NetBeat {
            cluster: config.cluster,
            host: config.host,
            index: config.index,
            boot: self.boot,
            incarnation: taken.incarnation,
            counter: taken.counter,
            lease: taken.lease,
            list: self.list,
            reaches: set(&|store| store.lease.is_valid(now)),
            attest_me: set(&|store| !store.own_path(config.timing.lease, now) || store.is_overdue(&config.timing, now)),
            distrusts: set(&|store| store.rolled_back.is_some()),
            attested: self.attested(),
            software: software(),
            agent,
        };
        Some((beat, config))
    }

    /// Facts about this host, for any beat.
    #[must_use]
    pub fn flags(&self, now: Time) -> crate::types::Flags {
        let mut flags = self.agent.as_ref().map(|(beat, _)| beat.flags).unwrap_or_default();
        let patience =
            self.config.as_ref().map_or(Duration::ZERO, |(_, config)| timing::agent_dead_after(&config.timing));
        flags.agent_dead = self.agent.as_ref().is_none_or(|(_, heard)| patience <= now.since(*heard));
        flags.unpunctual = self.unpunctual(now);
        flags.distrusts |= self.stores.values().any(|store| store.distrusted().is_some());
        flags
    }

    /// The kernel refuses real-time scheduling: never punctual for certain.
    pub fn real_time_refused(&mut self, why: &str) {
        self.real_time_refused = true;
        self.warn(format!(
            "mainstay-guard: real-time scheduling was refused ({why}); takers wait L/2 longer for this host; \
             allow it (LimitRTPRIO, kernel.sched_rt_runtime_us)"
        ));
    }

    /// The enforcing thread woke `late` after the time it had set.
    pub fn woke_late(&mut self, late: Duration, now: Time) {
        let Some((_, config)) = &self.config else { return };
        if late <= timing::late_limit(config.timing.lease) {
            return;
        }
        let already = now < self.late_until;
        self.late_until = now + timing::LATENESS_REMEMBERED;
        if !already {
            self.alarm(format!(
                "mainstay-guard: woke {} ms late; for an hour takers wait L/2 longer for this host; \
                 find what keeps its CPUs (stalled or overloaded host?)",
                late.as_millis()
            ));
        }
    }

    fn unpunctual(&self, now: Time) -> bool {
        self.real_time_refused || now < self.late_until
    }

    /// Before the first beat of a new boot no other host may be seen to use our name; a datastore that does not answer
    /// holds the network back for one window only.
    fn may_beat_on_network(&self, now: Time) -> bool {
        let Some((_, config)) = &self.config else { return false };
        let window = timing::window(config.timing.lease, false);
        let waited = self.configured_at + window <= now;
        self.stores.values().all(|store| store.network_may(waited))
    }

    /// What we attested for others and persisted; in turns, if it is much.
    fn attested(&mut self) -> Vec<Attested> {
        let all: Vec<Attested> = self.stores.values().flat_map(Store::attested).collect();
        if all.len() <= ATTESTED_MAX {
            return all;
        }
        self.rotation = (self.rotation + ATTESTED_MAX) % all.len();
        all.iter().cycle().skip(self.rotation).take(ATTESTED_MAX).copied().collect()
    }

    // Reports.

    /// A new connection; reports go there from now on, beginning with all that is known.
    pub fn connect(&mut self, id: u64, to: SyncSender<GuardReport>) {
        self.pending.clear();
        self.outbox = Some(Outbox { id, to });
    }

    /// That connection is gone.
    pub fn disconnect(&mut self, id: u64) {
        if self.connected(id) {
            self.outbox = None;
        }
    }

    /// Whether that connection is the newest.
    #[must_use]
    pub fn connected(&self, id: u64) -> bool {
        self.outbox.as_ref().is_some_and(|outbox| outbox.id == id)
    }

    /// Hello, and every row: the agent forgets all with a hello.
    fn introduce(&mut self) {
        let all: Vec<_> = [self.hello()].into_iter().chain(self.table.views().map(GuardReport::Row)).collect();
        all.into_iter().for_each(|report| self.report(report));
    }

    /// Hello, every row, every lease.
    pub fn greet(&mut self, now: Time) {
        self.introduce();
        let homes: Vec<DatastoreId> = self.stores.keys().copied().collect();
        homes.into_iter().for_each(|home| self.report_lease(home, now));
        let doubts = self.stores.values().filter_map(|store| store.doubt.clone());
        let all: Vec<_> = self.standing.iter().cloned().chain(doubts).map(GuardReport::Alarm).collect();
        all.into_iter().for_each(|alarm| self.report(alarm));
    }

    /// To the agent, if there is one, with the next `flush`.
    pub fn report(&mut self, report: GuardReport) {
        if self.outbox.is_some() && self.pending.len() < REPORTS_MAX {
            self.pending.push(report);
        } else {
            self.outbox = None;
        }
    }

    /// How a lease stands.
    pub fn report_lease(&mut self, home: DatastoreId, now: Time) {
        let Some((_, config)) = &self.config else { return };
        let lease = config.timing.lease;
        if let Some(view) = self.stores.get(&home).map(|store| store.view(home, lease, now)) {
            self.report(GuardReport::Lease(view));
        }
    }

    /// Changed rows and reports go to the agent. Called last before the lock is left, when the memory holds all of it.
    /// An agent that does not read loses its connection and begins anew.
    pub fn flush(&mut self) {
        for report in self.table.take_reports() {
            match report {
                GuardReport::Alarm(text) => self.alarm(text),
                other => self.report(other),
            }
        }
        let Some(outbox) = &self.outbox else { return self.pending.clear() };
        if self.pending.drain(..).any(|report| outbox.to.try_send(report).is_err()) {
            self.outbox = None;
        }
    }

    /// For the operator, by agent and log.
    pub fn alarm(&mut self, text: String) {
        self.say(text.clone());
        self.report(GuardReport::Alarm(text));
    }

    /// For the operator, now and whenever an agent connects: it stays so while this guard runs.
    pub fn warn(&mut self, text: String) {
        if !self.standing.contains(&text) {
            self.standing.push(text.clone());
            self.alarm(text);
        }
    }

    /// For the log.
    pub fn say(&mut self, text: String) {
        if self.log.len() < LOG_MAX {
            self.log.push(text);
        }
    }

    /// libvirt named a pid.
    pub fn hint(&mut self, vm: VmId, pid: u32) {
        if self.hints.len() < HINTS_MAX {
            self.hints.push((vm, pid));
        }
    }

    fn hello(&self) -> GuardReport {
        let host: Option<HostId> = self.config.as_ref().map(|(_, config)| config.host);
        GuardReport::Hello { protocol: GUARD_PROTOCOL, incarnation: self.incarnation, boot: self.boot, host }
    }
}

fn software() -> (u8, u8, u8) {
    let mut parts = env!("CARGO_PKG_VERSION").split('.').map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next())
}
