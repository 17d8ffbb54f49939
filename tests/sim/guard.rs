//! The guard of a host: the real state, leases and table; simulated are its threads, their I/O and their signals.
//!
//! ```text
//!   orders ──► with(state) ──► reports ──► agent         enforce: stop, check, lift, kill   (a fraction of a ms later)
//!                  │                                     watch:   QEMUs appear, exit, rows kept in /run
//!                  └── changed? ── wakes ───────────────► renew:   beat on each datastore; network: beat on the wire
//! ```

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use mainstay::core::event::Event;
use mainstay::core::timing;
use mainstay::guard::state::{State, Taken};
use mainstay::guard::store::Stage;
use mainstay::guard::table::{Act, Expected, ProcessKey, Table};
use mainstay::types::guard::{GuardOrder, GuardReport, Refusal};
use mainstay::types::vm::OffReason;
use mainstay::types::{
    Attestation, BeatBlock, Claim, Counter, DatastoreId, Digest, Holder, HostId, Incarnation, ListName, Sequence,
    Tenure, Time, VmEntry, VmId, VmList, Wanted,
};

use super::world::{Gate, H, World};

/// Reports that wait for the agent; drained after every use of the state.
const REPORTS: usize = 4096;

/// The thread of one datastore.
#[derive(Default)]
struct Renew {
    busy: bool,
    began: u64,
    /// Names the wake-up that counts.
    wake: u64,
    opened: bool,
    watch: Option<((Digest, Vec<Attestation>), Time, Duration)>,
    sequence: Sequence,
    listed: Option<(Incarnation, Vec<VmEntry>, ListName)>,
}

/// A running guard.
pub struct Guard {
    /// Which.
    pub life: u64,
    /// The real one.
    pub state: State,
    reports: Option<Receiver<GuardReport>>,
    agent: Option<u64>,
    renew: BTreeMap<DatastoreId, Renew>,
    enforced: u64,
    wakes: BTreeMap<u64, ()>,
    networked: bool,
}

impl Guard {
    /// The agent's end of the socket is gone.
    pub fn disconnect(&mut self) {
        if let Some(agent) = self.agent.take() {
            self.state.disconnect(agent);
        }
        self.reports = None;
    }
}

impl World {
    // ---- life ---------------------------------------------------------------------------------------------------

    /// A new process; rows of an earlier one of this boot come back as over.
    pub fn start_guard(&mut self, h: H) {
        if self.hosts[h].guard.is_some() || self.hosts[h].life.is_none() {
            return;
        }
        let life = self.new_life();
        let host = &mut self.hosts[h];
        host.incarnation = host.incarnation.next();
        let mut table = Table::default();
        for row in &host.kept {
            let alive = |key: ProcessKey| host.domains.values().any(|d| d.qemu.as_ref().is_some_and(|q| q.key == key));
            let process = row.process.as_ref().map(|process| process.key).filter(|key| alive(*key));
            table.restore(row.clone(), process);
        }
        let state = State::new(host.boot(), host.incarnation, table);
        host.guard = Some(Guard {
            life,
            state,
            reports: None,
            agent: None,
            renew: BTreeMap::new(),
            enforced: u64::MAX,
            wakes: BTreeMap::new(),
            networked: false,
        });
        self.with_guard(h, |_, _| ());
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(60), move |world| world.connect_guard(h));
    }

    /// SIGKILL. systemd stops every QEMU of a kept row, and starts another.
    pub fn restart_guard(&mut self, h: H) {
        self.stop_guard(h);
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(100), move |world| world.start_guard(h));
    }

    /// SIGKILL and `ExecStopPost`.
    pub fn stop_guard(&mut self, h: H) {
        if self.hosts[h].guard.take().is_none() {
            return;
        }
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(20), move |world| {
            let rows: Vec<VmId> = world.hosts[h].kept.iter().map(|row| row.tenure.vm).collect();
            for vm in rows {
                world.halt(h, vm);
            }
        });
        if let Some(agent) = &self.hosts[h].agent {
            let gate = Gate::Agent(h, agent.life);
            self.after(gate, Duration::from_millis(1), move |world| {
                world.agent_event(h, Event::GuardLost("the guard ended the connection".to_owned()));
            });
        }
    }

    /// The agent finds the guard's socket.
    pub fn connect_guard(&mut self, h: H) {
        let Some(agent) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let Some(guard) = &mut self.hosts[h].guard else { return };
        if guard.agent == Some(agent) {
            return;
        }
        let (to, from) = sync_channel(REPORTS);
        guard.state.connect(agent, to);
        guard.reports = Some(from);
        guard.agent = Some(agent);
        self.agent_event(h, Event::GuardConnected);
        self.with_guard(h, |state, now| state.greet(now));
    }

    /// Uses the state at one moment, as `guard::shared` does.
    pub fn with_guard<R>(&mut self, h: H, work: impl FnOnce(&mut State, Time) -> R) -> Option<R> {
        let now = self.local(h);
        let guard = self.hosts[h].guard.as_mut()?;
        guard.state.lapse_if_due(now);
        let result = work(&mut guard.state, now);
        guard.state.flush();
        guard.state.log.clear();
        let told: Vec<GuardReport> = guard.reports.iter().flat_map(Receiver::try_iter).collect();
        let (life, agent) = (guard.life, guard.agent);
        let changed = guard.enforced != guard.state.table.version();
        guard.enforced = guard.state.table.version();
        for report in told {
            let gate = Gate::Agent(h, agent.unwrap_or(0));
            self.after(gate, Duration::from_micros(100), move |world| world.agent_event(h, Event::Guard(report)));
        }
        if changed {
            let gate = Gate::Guard(h, life);
            self.after(gate, Duration::from_micros(200), move |world| world.enforce(h));
            self.after(gate, Duration::from_micros(300), move |world| world.watch(h));
            self.keep(h);
            self.hurry(h);
        }
        self.arm_guard(h);
        Some(result)
    }

    /// Wakes the enforcing thread when a lease or a row's deadline ends.
    fn arm_guard(&mut self, h: H) {
        let host = &mut self.hosts[h];
        let Some(guard) = &mut host.guard else { return };
        let next = guard.state.next_stop().into_iter().chain(guard.state.table.next_deadline()).min();
        let Some(at) = next.map(|at| host.clock.when(at)) else { return };
        if guard.wakes.insert(at, ()).is_none() {
            let life = guard.life;
            let late = self.latency(300);
            self.at(Gate::Guard(h, life), at + late.as_nanos() as u64, move |world| {
                if let Some(guard) = &mut world.hosts[h].guard {
                    guard.wakes.remove(&at);
                }
                world.with_guard(h, |state, now| state.table.deadlines(now));
                world.enforce(h);
            });
        }
    }

    fn keep(&mut self, h: H) {
        if let Some(guard) = &self.hosts[h].guard {
            self.hosts[h].kept = guard.state.table.kept(|_| None);
        }
    }

    // ---- threads ------------------------------------------------------------------------------------------------

    /// The enforcing thread: signals.
    pub fn enforce(&mut self, h: H) {
        let Some(acts) = self.with_guard(h, |state, _| state.table.reconcile()) else { return };
        let Some(life) = self.hosts[h].guard.as_ref().map(|guard| guard.life) else { return };
        for act in acts {
            match act {
                Act::Stop(vm, _) => {
                    self.halt(h, vm);
                    self.after(Gate::Guard(h, life), Duration::from_millis(1), move |world| world.enforce(h));
                }
                Act::Check(vm, key) => {
                    self.with_guard(h, |state, _| state.table.stands(vm, key));
                }
                Act::Lift(vm, key) => self.lift(h, vm, key),
                Act::Kill(vm, key, why) => {
                    let name = self.vm_name(vm);
                    let host = self.hosts[h].name.clone();
                    self.tell(&host, &format!("guard kills {name}: {why}"));
                    self.kill_qemu(h, vm, key);
                }
            }
        }
    }

    /// The watching thread: QEMUs of rows.
    pub fn watch(&mut self, h: H) {
        let Some(guard) = &self.hosts[h].guard else { return };
        let wanted: Vec<VmId> = guard.state.table.wanted().map(|(vm, _, _)| vm).collect();
        for vm in wanted {
            let found = self.hosts[h].domains.get(&vm).and_then(|domain| domain.qemu.as_ref()).map(|qemu| qemu.key);
            self.with_guard(h, |state, now| match found {
                Some(key) => assert!(!state.table.appeared(vm, key, now), "one QEMU per VM and host"),
                None => state.table.absent(vm),
            });
        }
    }

    /// An order of the agent, a moment later.
    pub fn guard_order(&mut self, h: H, ticket: mainstay::types::Ticket, order: GuardOrder) {
        let Some(agent) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let connected = self.hosts[h].guard.as_ref().filter(|guard| guard.agent == Some(agent)).map(|guard| guard.life);
        let Some(life) = connected else {
            let report = GuardReport::Done { ticket, result: Err(Refusal::Unconfigured) };
            return self.after(Gate::Agent(h, agent), Duration::from_micros(50), move |world| {
                world.agent_event(h, Event::Guard(report));
            });
        };
        self.after(Gate::Guard(h, life), Duration::from_micros(100), move |world| {
            let configures = matches!(order, GuardOrder::Configure(_));
            world.with_guard(h, |state, now| {
                let result = obey(state, order, now);
                state.report(GuardReport::Done { ticket, result });
            });
            if configures {
                world.begin_threads(h, life);
            }
        });
    }

    fn begin_threads(&mut self, h: H, life: u64) {
        let Some(guard) = &mut self.hosts[h].guard else { return };
        let homes: Vec<DatastoreId> = guard.state.stores.keys().copied().collect();
        let networked = std::mem::replace(&mut guard.networked, true);
        for home in homes {
            let Some(guard) = &mut self.hosts[h].guard else { return };
            if !guard.renew.contains_key(&home) {
                guard.renew.insert(home, Renew::default());
                self.after(Gate::Guard(h, life), Duration::ZERO, move |world| world.turn(h, home));
            }
        }
        if !networked {
            self.after(Gate::Guard(h, life), Duration::ZERO, move |world| world.beat_on_network(h));
        }
    }

    fn beat_on_network(&mut self, h: H) {
        let Some(beat) = self.with_guard(h, State::net_beat) else { return };
        let Some(guard) = &self.hosts[h].guard else { return };
        let life = guard.life;
        let period = guard.state.config.as_ref().map_or(Duration::from_millis(200), |(_, config)| config.timing.beat);
        let period = if beat.is_some() { period } else { period.min(Duration::from_millis(200)) };
        if let Some((beat, _)) = beat {
            self.multicast(h, &beat);
            self.with_guard(h, |state, _| state.report(GuardReport::Beaten { counter: beat.counter }));
        }
        self.with_guard(h, |state, now| {
            let homes: Vec<DatastoreId> = state.stores.keys().copied().collect();
            homes.into_iter().for_each(|home| state.report_lease(home, now));
        });
        self.after(Gate::Guard(h, life), period, move |world| world.beat_on_network(h));
    }

    // ---- the thread of a datastore ------------------------------------------------------------------------------

    fn renew(&mut self, h: H, home: DatastoreId) -> Option<&mut Renew> {
        self.hosts[h].guard.as_mut()?.renew.get_mut(&home)
    }

    /// The table changed: beat sooner, if what lies there differs.
    fn hurry(&mut self, h: H) {
        let Some(guard) = &self.hosts[h].guard else { return };
        let Some(timing) = guard.state.config.as_ref().map(|(_, config)| config.timing) else { return };
        let differs = |home: &DatastoreId, renew: &Renew| {
            let list = guard.state.table.list(*home);
            !renew.busy && renew.opened && renew.listed.as_ref().is_none_or(|(_, listed, _)| *listed != list)
        };
        let homes: Vec<(DatastoreId, u64)> =
            guard.renew.iter().filter(|(home, renew)| differs(home, renew)).map(|(home, r)| (*home, r.began)).collect();
        for (home, began) in homes {
            self.turn_at(h, home, began + timing::hurried_renew(&timing).as_nanos() as u64);
        }
    }

    fn turn_at(&mut self, h: H, home: DatastoreId, at: u64) {
        let wake = self.new_life();
        let Some(life) = self.hosts[h].guard.as_ref().map(|guard| guard.life) else { return };
        let Some(renew) = self.renew(h, home) else { return };
        renew.wake = wake;
        self.at(Gate::Guard(h, life), at, move |world| {
            if world.renew(h, home).is_some_and(|renew| renew.wake == wake) {
                world.turn(h, home);
            }
        });
    }

    fn turn(&mut self, h: H, home: DatastoreId) {
        let now = self.now;
        let Some(stage) = self.with_guard(h, |state, _| state.stores.get(&home).map(|store| store.stage)).flatten()
        else {
            return;
        };
        let Some(renew) = self.renew(h, home) else { return };
        if renew.busy {
            return;
        }
        renew.busy = true;
        renew.began = now;
        match (renew.opened, stage) {
            (false, _) | (true, Stage::Opening) => self.open_beats(h, home),
            (true, Stage::Watching) => self.look_on(h, home),
            (true, Stage::Beating) => self.beat_there(h, home),
        }
    }

    /// The turn is over: the next comes after `renew`, sooner if the rows have changed meanwhile.
    fn turned(&mut self, h: H, home: DatastoreId, trouble: Option<String>) {
        if let Some(text) = trouble {
            self.with_guard(h, |state, now| {
                if let Some(store) = state.stores.get_mut(&home) {
                    store.trouble = Some(text);
                }
                state.report_lease(home, now);
            });
        }
        let Some(guard) = &self.hosts[h].guard else { return };
        let Some(timing) = guard.state.config.as_ref().map(|(_, config)| config.timing) else { return };
        let Some(renew) = self.renew(h, home) else { return };
        renew.busy = false;
        let next = renew.began + timing.renew.as_nanos() as u64;
        self.turn_at(h, home, next);
        self.hurry(h);
    }

    fn again_at_once(&mut self, h: H, home: DatastoreId) {
        if let Some(renew) = self.renew(h, home) {
            renew.busy = false;
        }
        let now = self.now;
        self.turn_at(h, home, now);
    }

    fn guard_gate(&self, h: H) -> Gate {
        Gate::Guard(h, self.hosts[h].guard.as_ref().map_or(0, |guard| guard.life))
    }

    fn open_beats(&mut self, h: H, home: DatastoreId) {
        let (me, index) = (self.hosts[h].id, self.hosts[h].index);
        let gate = self.guard_gate(h);
        let read = move |world: &mut World| {
            let store = &world.stores[&home];
            (store.own(me), store.attestations_of(index, me))
        };
        self.io(h, home, gate, 2000, read, move |world, result| match result {
            Err(why) => world.turned(h, home, Some(why)),
            Ok((own, attested)) => world.opened(h, home, own, attested),
        });
    }

    fn opened(&mut self, h: H, home: DatastoreId, own: (Digest, Option<BeatBlock>), attested: Vec<Attestation>) {
        let (bytes, newest) = own;
        let Some(ours) = self.hosts[h].guard.as_ref().map(|guard| guard.state.last_given()) else { return };
        let mut shown: Vec<(Incarnation, Counter)> = attested.iter().map(|a| (a.incarnation, a.counter)).collect();
        shown.extend(newest.as_ref().map(|beat| (beat.incarnation, beat.counter)));
        if let Some((above, _)) = shown.into_iter().max().filter(|shown| ours < *shown) {
            self.rise(h, above);
            return self.again_at_once(h, home);
        }
        let old = newest.as_ref().map(|beat| beat.attestations.clone()).unwrap_or_default();
        let facts = self.with_guard(h, |state, now| {
            if let Some(store) = state.stores.get_mut(&home) {
                old.into_iter().for_each(|attestation| store.attest(attestation, now));
            }
            let stage = state.stores.get(&home).map(|store| store.stage);
            let lease = state.config.as_ref().map(|(_, config)| config.timing.lease).unwrap_or_default();
            (state.boot, lease, stage)
        });
        let Some((boot, lease, stage)) = facts else { return };
        let foreign = newest.as_ref().map_or(!attested.is_empty(), |beat| beat.boot != boot);
        let now = self.local(h);
        let sequence = newest.as_ref().map_or(Sequence(0), |beat| beat.list.sequence);
        let late = newest.as_ref().is_some_and(|beat| beat.flags.unpunctual);
        let longest = newest.iter().map(|beat| beat.lease).chain(attested.iter().map(|a| a.lease)).max();
        let Some(renew) = self.renew(h, home) else { return };
        renew.opened = true;
        renew.sequence = renew.sequence.max(sequence);
        renew.listed = None;
        if stage == Some(Stage::Opening) {
            let next = if foreign {
                let window = timing::window(longest.unwrap_or_default().max(lease), late);
                renew.watch = Some(((bytes, attested), now, window));
                Stage::Watching
            } else {
                Stage::Beating
            };
            self.stage(h, home, next);
        }
        self.again_at_once(h, home);
    }

    fn stage(&mut self, h: H, home: DatastoreId, stage: Stage) {
        self.with_guard(h, |state, _| {
            if let Some(store) = state.stores.get_mut(&home) {
                store.stage = stage;
            }
        });
    }

    fn rise(&mut self, h: H, above: Incarnation) {
        let next = above.next();
        self.hosts[h].incarnation = next;
        self.with_guard(h, |state, _| state.restart(next));
    }

    fn look_on(&mut self, h: H, home: DatastoreId) {
        let (me, index) = (self.hosts[h].id, self.hosts[h].index);
        let began = self.local(h);
        let gate = self.guard_gate(h);
        let read = move |world: &mut World| {
            let store = &world.stores[&home];
            (store.own(me).0, store.attestations_of(index, me))
        };
        self.io(h, home, gate, 2000, read, move |world, result| {
            let seen = match result {
                Err(why) => return world.turned(h, home, Some(why)),
                Ok(seen) => seen,
            };
            let now = world.local(h);
            let Some(renew) = world.renew(h, home) else { return };
            let Some((quiet, since, window)) = &mut renew.watch else {
                world.stage(h, home, Stage::Opening);
                return world.again_at_once(h, home);
            };
            if seen != *quiet {
                (*quiet, *since) = (seen, now);
                return world.turned(h, home, Some("another host beats here under our host id".to_owned()));
            }
            if *window <= began.since(*since) {
                renew.watch = None;
                world.stage(h, home, Stage::Beating);
                return world.again_at_once(h, home);
            }
            world.turned(h, home, None);
        });
    }

    /// Roster and list first, then (c, t_c) and the block, then the roster again.
    fn beat_there(&mut self, h: H, home: DatastoreId) {
        let me = self.hosts[h].id;
        let Some(guard) = &self.hosts[h].guard else { return };
        let (incarnation, entries) = (guard.state.incarnation, guard.state.table.list(home));
        let same = guard.renew.get(&home).and_then(|renew| renew.listed.as_ref());
        let new = same.is_none_or(|(of, listed, _)| *of != incarnation || *listed != entries);
        let gate = self.guard_gate(h);
        let list = new.then(|| {
            let renew = self.renew(h, home).expect("its thread runs");
            renew.sequence = renew.sequence.next();
            renew.listed = None;
            VmList { host: me, incarnation, sequence: renew.sequence, entries }
        });
        let written = list.clone();
        let first = move |world: &mut World| {
            let store = world.stores.get_mut(&home).expect("a datastore of the world");
            store.roster.names(me).then(|| {
                if let Some(list) = list {
                    store.write_list(me, list);
                }
                store.roster.generation
            })
        };
        self.io(h, home, gate, 1000, first, move |world, result| match result {
            Err(why) => world.turned(h, home, Some(why)),
            Ok(None) => world.turned(h, home, Some("its roster does not name this host".to_owned())),
            Ok(Some(roster)) => {
                if let Some(list) = written {
                    let name = ListName { sequence: list.sequence, digest: mainstay::wire::record::list_digest(&list) };
                    if let Some(renew) = world.renew(h, home) {
                        renew.listed = Some((list.incarnation, list.entries, name));
                    }
                    world.with_guard(h, |state, _| state.listed(name));
                }
                world.write_beat(h, home, roster);
            }
        });
    }

    fn write_beat(&mut self, h: H, home: DatastoreId, roster: u64) {
        let listed = self.renew(h, home).and_then(|renew| renew.listed.as_ref().map(|(of, _, name)| (*of, *name)));
        let taken = self.with_guard(h, |state, now| {
            let (_, config) = state.config.clone()?;
            let store = state.stores.get_mut(&home)?;
            let attestations = store.attestations(config.index, now);
            let (of, list) = listed.filter(|(of, _)| *of == state.incarnation)?;
            let flags = state.flags(now);
            let taken = state.take(now);
            let block = BeatBlock {
                cluster: config.cluster,
                host: config.host,
                index: config.index,
                boot: state.boot,
                incarnation: of,
                counter: taken.counter,
                taken: taken.at,
                lease: taken.lease,
                flags,
                list,
                resting: 0,
                roster,
                attestations,
            };
            Some((taken, block))
        });
        let Some((taken, block)) = taken.flatten() else { return self.turned(h, home, None) };
        let me = self.hosts[h].id;
        let with = block.attestations.clone();
        let gate = self.guard_gate(h);
        let write = move |world: &mut World| {
            let store = world.stores.get_mut(&home).expect("a datastore of the world");
            store.write_beat(me, block);
            store.roster.names(me)
        };
        self.io(h, home, gate, 2000, write, move |world, result| match result {
            Err(why) => world.turned(h, home, Some(why)),
            Ok(false) => world.turned(h, home, Some("its roster does not name this host".to_owned())),
            Ok(true) => world.persisted(h, home, taken, &with),
        });
    }

    fn persisted(&mut self, h: H, home: DatastoreId, taken: Taken, with: &[Attestation]) {
        let lapsed = self.with_guard(h, |state, now| {
            if state.incarnation != taken.incarnation {
                return Vec::new();
            }
            let Some(store) = state.stores.get_mut(&home) else { return Vec::new() };
            store.counted(taken.at, now, with);
            state.persisted(home, taken.counter, now);
            state.report_lease(home, now);
            state.table.lapsed_on(home)
        });
        let lapsed = lapsed.unwrap_or_default();
        if lapsed.is_empty() {
            return self.turned(h, home, None);
        }
        let gate = self.guard_gate(h);
        let read = move |world: &mut World| {
            let store = &world.stores[&home];
            lapsed.into_iter().filter_map(|at| Some((at, store.highest(at.vm)?.ok()?))).collect::<Vec<_>>()
        };
        self.io(h, home, gate, 2000, read, move |world, result| {
            let me = world.hosts[h].id;
            for (tenure, claim) in result.unwrap_or_default() {
                let Some(why) = ends(&claim, tenure, me) else { continue };
                world.with_guard(h, |state, _| state.table.kill(tenure, claim.tenure.generation, &why));
            }
            world.turned(h, home, None);
        });
    }

    /// The exit of a QEMU is seen by its pidfd.
    pub fn saw_exit(&mut self, h: H, vm: VmId, key: ProcessKey, reason: OffReason) {
        let _ = reason;
        self.with_guard(h, |state, now| state.exited(vm, key, now));
    }
}

/// `guard::orders`, without files.
fn obey(state: &mut State, order: GuardOrder, now: Time) -> Result<(), Refusal> {
    if state.config.is_none() && !matches!(order, GuardOrder::Configure(_) | GuardOrder::Beat(_)) {
        return Err(Refusal::Unconfigured);
    }
    let present = |state: &State, home, epoch| match state.epoch(home, now)? {
        present if present == epoch => Ok(present),
        present => Err(Refusal::EpochChanged { now: present }),
    };
    let unknown = || Refusal::WrongState("it was never expected".to_owned());
    match order {
        GuardOrder::Hello { .. } | GuardOrder::Found { .. } => Ok(()),
        GuardOrder::Configure(config) => {
            state.configure(*config, now);
            Ok(())
        }
        GuardOrder::Beat(beat) => {
            state.agent_beat(*beat, now);
            Ok(())
        }
        GuardOrder::Expect { tenure, name, home, epoch, deadline, purpose } => {
            present(state, home, epoch)?;
            state.table.expect(Expected { tenure, name, home, epoch, deadline, purpose })
        }
        GuardOrder::Incoming { tenure, name, home, deadline } => {
            let epoch = state.epoch(home, now)?;
            state.table.incoming(tenure, name, home, epoch, deadline)
        }
        GuardOrder::Claimed { tenure, epoch, deadline } => {
            let home = state.table.home(tenure).ok_or_else(unknown)?;
            let epoch = present(state, home, epoch)?;
            state.table.claimed(tenure, epoch, deadline, now)
        }
        GuardOrder::Abandon { tenure } => state.table.abandon(tenure),
        GuardOrder::Forget { tenure } => state.table.forget(tenure),
        GuardOrder::HandOver { tenure, to } => state.table.hand_over(tenure, to),
        GuardOrder::Kill { tenure, seen } => {
            let why = format!("the agent read claim {seen}, which ends generation {}", tenure.generation);
            state.table.kill(tenure, seen, &why)
        }
        GuardOrder::Attest { datastore, attestations } => {
            let store = state.stores.get_mut(&datastore).ok_or(Refusal::UnknownDatastore(datastore))?;
            attestations.into_iter().for_each(|attestation| store.attest(attestation, now));
            Ok(())
        }
        GuardOrder::Attested { datastore, incarnation, counter } => {
            if incarnation == state.incarnation {
                state.persisted(datastore, counter, now);
            }
            Ok(())
        }
    }
}

/// `guard::renew::ends`.
fn ends(claim: &Claim, tenure: Tenure, me: HostId) -> Option<String> {
    let generation = claim.tenure.generation;
    if generation <= tenure.generation {
        return None;
    }
    if claim.wanted == Wanted::Stopped {
        return Some(format!("claim {generation} says that it is to be stopped"));
    }
    match claim.holder {
        Holder::Host(owner) if owner.host != me => Some(format!("claim {generation} names another host")),
        Holder::Deleted => Some(format!("claim {generation} says that it was deleted")),
        Holder::Host(_) | Holder::Handover { .. } | Holder::None | Holder::MovedTo(_) => None,
    }
}
