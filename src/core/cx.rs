//! The context of one step: the time, and what is to be saved and done. Also timers and tickets.
//!
//! A question takes a ticket and leaves a `Pending` behind, which says what its answer means. An answer whose ticket
//! is no longer held is dropped.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::action::{Action, Output};
use super::event::AskId;
use super::note::Note;
use super::verdicts::{Given, Kind};
use crate::types::control::{Reply, Request};
use crate::types::guard::GuardOrder;
use crate::types::power::{FenceDevice, PowerOrder};
use crate::types::settings::{ClusterSettings, SettingsChange};
use crate::types::store::StoreOrder;
use crate::types::vm::DomainOrder;
use crate::types::{DatastoreId, Digest, Generation, HostId, Ticket, Time, VerdictId, VmId};

/// Something that happens at a time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Timer {
    /// Every beat period: the agent's part of the beat, verdicts, election.
    Beat,
    /// A peer's silence becomes long enough to suspect it.
    Silent(HostId),
    /// A complete read is due.
    Read(DatastoreId),
    /// A VM's attempt has something to try again, or to give up.
    Attempt(VmId),
    /// A VM waits for a retry of its placement.
    Place(VmId),
    /// An incoming migration's time is over.
    Incoming(VmId),
    /// The hook waits for the source of an incoming migration.
    Receive(VmId),
    /// A VM's end waits for libvirt's reason.
    Judge(VmId),
    /// A lease has not been renewed for 0.8 L.
    Doubt(DatastoreId),
    /// A silent host may be powered off, or a try may be made again.
    Power(HostId),
    /// Report to the master.
    Report,
    /// A claim whose creation had an unknown outcome may have landed by now: claims are listed again.
    Relist,
}

/// What an answer is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Pending {
    /// Nothing depends on it.
    Nothing,
    /// A complete read.
    Read(DatastoreId),
    /// Claims of a datastore.
    Claims(DatastoreId),
    /// Claims of what this host has held, after its lease there became valid.
    Taken(DatastoreId),
    /// Claims of what people want stopped.
    Stopped(DatastoreId),
    /// A step of this VM's attempt.
    Attempt(VmId),
    /// A step of this VM's move away.
    Move(VmId),
    /// A target is told to throw its copy away.
    Dropped(super::moving::Unheard),
    /// An order to run this VM elsewhere.
    Placed(VmId, HostId),
    /// The record of a VM whose size is not known.
    Sized(VmId),
    /// Whether the disks of this VM can be read.
    Access(VmId),
    /// A host shall end this VM, to make room.
    Yields(VmId),
    /// Isolation addresses.
    Network,
    /// An order to move this VM away.
    Evacuated(VmId),
    /// A person's request that was passed on.
    Forward(AskId),
    /// The newest claim of a VM that a person wants something of.
    Wish(AskId),
    /// The guard has answered everything that it was asked before: its rows are complete.
    Settled,
    /// The guard's word about an incoming VM.
    Incoming(VmId, AskId),
    /// A step of the hook's question about a person's migration to this host.
    Receive(VmId),
    /// libvirt is told to cancel a person's migration of this VM.
    Cancelled(VmId),
    /// A new datastore's folder is made; then the change is carried out.
    Prepare(AskId, Box<SettingsChange>),
    /// A roster change on this datastore.
    Roster(DatastoreId),
    /// Another host's settings document.
    Settings,
    /// A list of domains.
    List,
    /// A power switch of this host.
    Power(HostId),
    /// A power switch of this host, by name, was called off.
    CalledOff(HostId, String),
    /// A person's stop of this VM.
    Stop(VmId, AskId),
    /// The removal of a stale definition.
    Undefine(VmId),
    /// A change of a VM's policy in its definition.
    Policy(AskId),
    /// A pause because of doubt, or its end.
    Pause(VmId),
    /// The running domain is marked with its generation.
    Mark(VmId),
    /// The newest claim of a VM whose saved image is to be restored, and what that image says.
    Restore { vm: VmId, ask: AskId, saved: Option<Generation> },
    /// Whether a host, or a record, knows a twin of this VM.
    Twins(VmId),
    /// Whether a record of this digest, that of the definition here, was ever written.
    Recorded(VmId, Digest),
}

/// Tickets and timers: survive a step.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Desk {
    next: u64,
    verdicts: VerdictId,
    pending: BTreeMap<Ticket, Pending>,
    timers: BTreeMap<Timer, Time>,
}

/// Verdicts are numbered from the second in which the agent was started, counted from the begin of 2026: short, and higher than those
/// of an earlier agent as long as that has given less than one in a second.
const VERDICTS_SINCE: u64 = 1_767_225_600;

/// Questions under way at most; beyond it the oldest are given up (their answers will be dropped).
const MAX_PENDING: usize = 20_000;

impl Desk {
    /// Tickets start above everything that an earlier process used: `seed` is the clock of day in nanoseconds.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let verdicts = VerdictId((seed / 1_000_000_000).saturating_sub(VERDICTS_SINCE));
        Self { next: seed, verdicts, ..Self::default() }
    }
    /// Takes back what a ticket was for.
    pub fn take(&mut self, ticket: Ticket) -> Option<Pending> {
        self.pending.remove(&ticket)
    }
    /// Earliest timer.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        self.timers.values().min().copied()
    }
    /// Takes every timer that is due, earliest first.
    pub fn due(&mut self, now: Time) -> Vec<Timer> {
        let mut due: Vec<(Time, Timer)> =
            self.timers.iter().filter(|(_, at)| **at <= now).map(|(timer, at)| (*at, *timer)).collect();
        due.sort_unstable();
        for (_, timer) in &due {
            self.timers.remove(timer);
        }
        due.into_iter().map(|(_, timer)| timer).collect()
    }
}

/// One step's context.
#[derive(Debug)]
pub struct Cx<'a> {
    /// The time of this step.
    pub now: Time,
    desk: &'a mut Desk,
    output: Output,
}

impl<'a> Cx<'a> {
    /// A fresh one.
    pub fn new(now: Time, desk: &'a mut Desk) -> Self {
        Self { now, desk, output: Output::default() }
    }
    /// What came out.
    #[must_use]
    pub fn into_output(self) -> Output {
        self.output
    }
    /// Sets a timer; an earlier setting of the same one is replaced.
    pub fn set(&mut self, timer: Timer, at: Time) {
        self.desk.timers.insert(timer, at);
    }
    /// Sets a timer unless it is set to something earlier already.
    pub fn set_earlier(&mut self, timer: Timer, at: Time) {
        let entry = self.desk.timers.entry(timer).or_insert(at);
        *entry = at.min(*entry);
    }
    /// Forgets a timer.
    pub fn unset(&mut self, timer: Timer) {
        self.desk.timers.remove(&timer);
    }
    /// Takes every timer that is due.
    pub fn take_due(&mut self) -> Vec<Timer> {
        self.desk.due(self.now)
    }
    /// Takes back what a ticket was for.
    pub fn take(&mut self, ticket: Ticket) -> Option<Pending> {
        self.desk.take(ticket)
    }
    fn ticket(&mut self, pending: Pending) -> Ticket {
        self.desk.next += 1;
        let ticket = Ticket(self.desk.next);
        if MAX_PENDING <= self.desk.pending.len() {
            self.desk.pending.pop_first();
        }
        if !matches!(pending, Pending::Nothing) {
            self.desk.pending.insert(ticket, pending);
        }
        ticket
    }
    /// Orders the guard.
    pub fn guard(&mut self, order: GuardOrder, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::Guard(ticket, order));
        ticket
    }
    /// Orders a datastore.
    pub fn store(&mut self, datastore: DatastoreId, order: StoreOrder, within: Duration, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::Store { ticket, datastore, order, within });
        ticket
    }
    /// Orders libvirt.
    pub fn domain(&mut self, order: DomainOrder, within: Duration, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::Domain { ticket, order, within });
        ticket
    }
    /// Asks another agent.
    pub fn send(&mut self, to: HostId, request: Request, within: Duration, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::Send { ticket, to, request: Box::new(request), within });
        ticket
    }
    /// Asks a power switch.
    pub fn power(&mut self, device: FenceDevice, order: PowerOrder, within: Duration) -> Ticket {
        let ticket = self.ticket(Pending::Power(device.host));
        self.output.actions.push(Action::Power { ticket, device: Box::new(device), order, within });
        ticket
    }
    /// Calls an order to a power switch off: its answer says only whether that came too late.
    pub fn call_off_power(&mut self, ticket: Ticket, host: HostId, device: String) {
        self.desk.pending.insert(ticket, Pending::CalledOff(host, device));
        self.output.actions.push(Action::CallOffPower(ticket));
    }
    /// Runs a storage fence.
    pub fn fence(&mut self, program: String, host: HostId, name: String, within: Duration, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::Fence { ticket, program, host, name, within });
        ticket
    }
    /// Asks the isolation addresses.
    pub fn ask_network(&mut self, within: Duration, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::AskNetwork { ticket, within });
        ticket
    }
    /// Probes image locks.
    pub fn probe_locks(&mut self, paths: Vec<String>, within: Duration, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::ProbeLocks { ticket, paths, within });
        ticket
    }
    /// Looks whether disks can be read.
    pub fn probe_access(&mut self, paths: Vec<String>, within: Duration, pending: Pending) -> Ticket {
        let ticket = self.ticket(pending);
        self.output.actions.push(Action::ProbeAccess { ticket, paths, within });
        ticket
    }
    /// Answers.
    pub fn answer(&mut self, ask: AskId, reply: Reply) {
        self.output.actions.push(Action::Answer(ask, reply));
    }
    /// Answers a hook.
    pub fn hook_answer(&mut self, ask: AskId, result: Result<(), String>) {
        self.output.actions.push(Action::HookAnswer(ask, result));
    }
    /// Tells people.
    pub fn note(&mut self, note: Note) {
        self.output.actions.push(Action::Note(note));
    }
    /// Gives a verdict.
    pub fn verdict(
        &mut self,
        kind: Kind,
        host: Option<String>,
        vm: Option<String>,
        text: &str,
        evidence: Vec<String>,
    ) -> VerdictId {
        self.desk.verdicts = self.desk.verdicts.next();
        let id = self.desk.verdicts;
        let given = Given { id, kind, host, vm, text: text.to_owned(), evidence };
        self.output.actions.push(Action::Verdict(Box::new(given)));
        id
    }
    /// Saves a settings document, then uses it.
    pub fn save(&mut self, settings: &ClusterSettings) {
        self.output.save = Some(Box::new(settings.clone()));
        self.output.actions.push(Action::Apply(Box::new(settings.clone())));
    }
    /// Any other order without an answer.
    pub fn act(&mut self, action: Action) {
        self.output.actions.push(action);
    }
}
