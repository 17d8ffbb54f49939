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
use mainstay::exec::datastore::slots::Book;
use mainstay::guard::state::{Carried, State, Taken};
use mainstay::guard::table::{Act, Expected, ProcessKey, Table};
use mainstay::types::guard::{GuardOrder, GuardReport, Refusal};
use mainstay::types::vm::OffReason;
use mainstay::types::{Attestation, DatastoreId, Digest, Incarnation, ListName, Sequence, Tenure, Time, VmEntry, VmId};

use super::host::Host;
use super::world::{Gate, H, World};

/// Reports that wait for the agent; drained after every use of the state.
const REPORTS: usize = 4096;

/// The thread of one datastore.
#[derive(Default)]
pub(super) struct Renew {
    pub(super) busy: bool,
    pub(super) began: u64,
    /// Names the wake-up that counts.
    pub(super) wake: u64,
    pub(super) opened: bool,
    /// The real memory of its slots.
    pub(super) book: Option<Book>,
    pub(super) watch: Option<((Digest, Vec<Attestation>), Time, Duration)>,
    pub(super) sequence: Sequence,
    pub(super) listed: Option<(Incarnation, Vec<VmEntry>, ListName)>,
    /// A claim that this host holds and that was not there when it was looked for last.
    pub(super) missed: Option<Tenure>,
    pub(super) held_from: usize,
}

/// A running guard.
pub struct Guard {
    /// Which.
    pub life: u64,
    /// The real one.
    pub state: State,
    reports: Option<Receiver<GuardReport>>,
    agent: Option<u64>,
    pub(super) renew: BTreeMap<DatastoreId, Renew>,
    enforced: u64,
    /// When its enforcing thread wakes by itself.
    wakes: u64,
    networked: bool,
    /// It samples vCPU time.
    pub samples: bool,
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

    /// A new process. It goes on with what the last one handed on; without that, rows of an earlier one of this boot come
    /// back as over.
    pub fn start_guard(&mut self, h: H) {
        if self.hosts[h].guard.is_some() || self.hosts[h].life.is_none() {
            return;
        }
        self.excuse(h);
        self.is_reborn();
        let life = self.new_life();
        let now = self.local(h);
        let host = &mut self.hosts[h];
        let handed_on = host.memory.take().map(|bytes| Carried::decode(&bytes).expect("encoded by stop_guard"));
        let usable = |carried: &Carried| carried.boot == host.boot() && carried.incarnation == host.incarnation;
        let alive = |key: ProcessKey| host.domains.values().any(|d| d.qemu.as_ref().is_some_and(|q| q.key == key));
        let carried = handed_on.filter(usable);
        let goes_on = carried.is_some();
        let state = if let Some(carried) = carried {
            let mut state = State::carry_on(carried);
            state.lapse_if_due(now);
            let gone: Vec<_> = state.table.processes().filter(|(_, key)| !alive(*key)).collect();
            gone.into_iter().for_each(|(vm, key)| state.exited(vm, key, now));
            state
        } else {
            host.incarnation = mainstay::guard::risen(host.incarnation);
            let mut table = Table::default();
            for row in &host.kept {
                let process = row.process.as_ref().map(|process| process.key).filter(|key| alive(*key));
                table.restore(row.clone(), process);
            }
            State::new(host.boot(), host.incarnation, table)
        };
        host.guard = Some(Guard {
            life,
            state,
            reports: None,
            agent: None,
            renew: BTreeMap::new(),
            enforced: u64::MAX,
            wakes: u64::MAX,
            networked: false,
            samples: false,
        });
        self.with_guard(h, |_, _| ());
        if goes_on {
            self.begin_threads(h, life);
            self.after(Gate::Guard(h, life), Duration::ZERO, move |world| world.enforce(h));
        }
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(60), move |world| world.connect_guard(h));
    }

    /// As `restart_guard`, but what it would have handed on is lost.
    pub fn restart_guard_anew(&mut self, h: H) {
        self.restart_guard(h);
        if !self.hosts[h].frozen {
            self.hosts[h].memory = None;
        }
    }

    /// SIGKILL. systemd stops every QEMU of a kept row, and starts another. In a frozen host nothing of that happens.
    pub fn restart_guard(&mut self, h: H) {
        if self.hosts[h].frozen {
            return;
        }
        self.stop_guard(h);
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(100), move |world| world.start_guard(h));
    }

    /// SIGKILL and `ExecStopPost`.
    pub fn stop_guard(&mut self, h: H) {
        let Some(guard) = self.hosts[h].guard.take() else { return };
        self.excuse(h);
        self.hosts[h].memory = Some(guard.state.carry().encode());
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(20), move |world| {
            if world.hosts[h].guard.is_some() {
                return; // A frozen host was healed meanwhile; in truth systemd starts the next one only after this.
            }
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
        self.judge.lapses += u64::from(guard.state.next_stop().is_some_and(|stop| stop <= now));
        guard.state.lapse_if_due(now);
        let result = work(&mut guard.state, now);
        guard.state.flush();
        guard.state.log.clear();
        let told: Vec<GuardReport> = guard.reports.iter().flat_map(Receiver::try_iter).collect();
        let (life, agent) = (guard.life, guard.agent);
        let changed = guard.enforced != guard.state.table.version();
        guard.enforced = guard.state.table.version();
        told.iter().for_each(|report| self.reported(h, report));
        if !told.is_empty() {
            let gate = Gate::Agent(h, agent.unwrap_or(0));
            self.after(gate, Duration::from_micros(100), move |world| {
                told.into_iter().for_each(|report| world.agent_event(h, Event::Guard(report)));
            });
        }
        if changed {
            let gate = Gate::Guard(h, life);
            self.after(gate, Duration::from_micros(200), move |world| world.enforce(h));
            self.after(gate, Duration::from_micros(300), move |world| world.watch(h));
            self.keep(h);
            self.hurry(h);
            let Some(guard) = &mut self.hosts[h].guard else { return Some(result) };
            if guard.state.table.watched().next().is_some() && !std::mem::replace(&mut guard.samples, true) {
                self.after(gate, Duration::from_micros(250), move |world| world.sample(h));
            }
        }
        self.arm_guard(h);
        Some(result)
    }

    /// Wakes the enforcing thread when a lease or a row's deadline ends.
    fn arm_guard(&mut self, h: H) {
        let host = &mut self.hosts[h];
        let Some(guard) = &mut host.guard else { return };
        let next = guard.state.next_stop().into_iter().chain(guard.state.table.next_deadline()).min();
        let Some(at) = next.map(|at| host.clock.when(at)).filter(|at| *at < guard.wakes) else { return };
        guard.wakes = at;
        let life = guard.life;
        let late = self.latency(300);
        self.at(Gate::Guard(h, life), at + late.as_nanos() as u64, move |world| {
            let Some(guard) = &mut world.hosts[h].guard else { return };
            if guard.wakes != at {
                return; // It was to wake earlier since, and has been armed anew by that.
            }
            guard.wakes = u64::MAX;
            world.with_guard(h, |state, now| state.table.deadlines(now));
            world.enforce(h);
        });
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
        let mut again = false;
        for act in acts {
            match act {
                Act::Stop(vm, key) => {
                    self.begin_halt(h, vm, key);
                    again = true;
                }
                Act::Check(vm, key) if self.qemu(h, vm).is_some_and(|qemu| qemu.key == key && !qemu.stands()) => {
                    again = true;
                }
                Act::Check(vm, key) => {
                    self.with_guard(h, |state, _| state.table.stands(vm, key));
                }
                Act::Lift(vm, key) => self.lift(h, vm, key),
                Act::Kill(vm, key, why) => {
                    let named = |text: String, other: &Host| text.replace(&other.id.to_string(), &other.name);
                    let why = self.hosts.iter().fold(why, named);
                    let name = self.vm_name(vm);
                    let host = self.hosts[h].name.clone();
                    self.tell(&host, &format!("guard kills {name}: {why}"));
                    self.kills(h, vm);
                    self.kill_qemu(h, vm, key);
                }
            }
        }
        if again {
            self.after(Gate::Guard(h, life), Duration::from_millis(1), move |world| world.enforce(h));
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
            let attests =
                matches!(order, GuardOrder::Attest { .. } | GuardOrder::Distrust { .. } | GuardOrder::Configure(_));
            world.with_guard(h, |state, now| {
                let result = obey(state, order, now);
                state.report(GuardReport::Done { ticket, result });
            });
            if configures {
                world.begin_threads(h, life);
            }
            if attests {
                world.hurry(h);
            }
        });
    }

    fn begin_threads(&mut self, h: H, life: u64) {
        let Some(guard) = &mut self.hosts[h].guard else { return };
        let homes: Vec<DatastoreId> = guard.state.stores.keys().copied().collect();
        let networked = std::mem::replace(&mut guard.networked, true);
        for home in homes {
            let Some(guard) = &mut self.hosts[h].guard else { return };
            if let std::collections::btree_map::Entry::Vacant(thread) = guard.renew.entry(home) {
                thread.insert(Renew::default());
                self.after(Gate::Guard(h, life), Duration::ZERO, move |world| world.turn(h, home));
            }
        }
        if !networked {
            self.after(Gate::Guard(h, life), Duration::ZERO, move |world| world.beat_on_network(h));
        }
    }

    fn beat_on_network(&mut self, h: H) {
        let beat = self.with_guard(h, |state, now| {
            let beat = state.net_beat(now);
            if let Some((beat, _)) = &beat {
                state.report(GuardReport::Beaten { counter: beat.counter });
            }
            let homes: Vec<DatastoreId> = state.stores.keys().copied().collect();
            homes.into_iter().for_each(|home| state.report_lease(home, now));
            beat
        });
        let (Some(beat), Some(guard)) = (beat, &self.hosts[h].guard) else { return };
        let life = guard.life;
        let period = guard.state.config.as_ref().map_or(Duration::from_millis(200), |(_, config)| config.timing.beat);
        let period = if beat.is_some() { period } else { period.min(Duration::from_millis(200)) };
        if let Some((beat, _)) = beat {
            let at = self.local(h);
            let (incarnation, counter, lease) = (beat.incarnation, beat.counter, beat.lease);
            self.given(h, Taken { incarnation, counter, at, lease });
            self.multicast(h, &beat);
        }
        self.after(Gate::Guard(h, life), period, move |world| world.beat_on_network(h));
    }

    // ---- the thread of a datastore ------------------------------------------------------------------------------

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
        GuardOrder::Expect { tenure, name, home, epoch, deadline, purpose, writes } => {
            present(state, home, epoch)?;
            state.table.expect(Expected { tenure, name, home, epoch, deadline, purpose, writes })
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
        GuardOrder::Receive { tenure, name, home, deadline } => {
            let epoch = state.epoch(home, now)?;
            state.table.receive(tenure, name, home, epoch, deadline)
        }
        GuardOrder::Switched { tenure } => state.table.switched(tenure),
        GuardOrder::Discard { tenure } => state.table.discard(tenure),
        GuardOrder::Attest { datastore, attestations } => {
            let store = state.stores.get_mut(&datastore).ok_or(Refusal::UnknownDatastore(datastore))?;
            attestations.into_iter().for_each(|attestation| store.attest(attestation, now));
            Ok(())
        }
        GuardOrder::Distrust { datastore, why } => {
            state.distrust(datastore, &why, now);
            Ok(())
        }
        GuardOrder::Attested { datastore, incarnation, counter } => {
            if incarnation == state.incarnation {
                state.persisted(datastore, counter, now);
                state.report_lease(datastore, now);
            }
            Ok(())
        }
    }
}
