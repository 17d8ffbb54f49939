//! Live migration by Mainstay (R6): under (v, g) only the source may run; the target runs it only after the source's
//! guard said "over, handed to you", under a g+1 of its own.
//!
//! ```text
//!  source: asking target ─► migrating ─► QEMU exited, stopped/migrated ─► guard says over ─► Handed ─► done
//!             │ no             │ failed: goes on here                                          │ no answer:
//!             ▼                ▼ Dropped                                                        ▼ claims decide
//!  target: Incoming row ─► paused copy ─► Handed ─► Expect, claim g+1, confirm, define, resume
//!             └── source silent, dropped, or time over: the copy is thrown away
//! ```
//!
//! If the source dies before it said over, the target's copy is never resumed: the source may have run on.

mod again;

use std::time::Duration;

pub use again::Unheard;

use serde::{Deserialize, Serialize};

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending, Timer};
use super::event::{AskId, Outcome};
use super::note::Note;
use super::placement::{Need, Placed};
use crate::mutants::{Mutant, planted};
use crate::types::control::{Denial, IncomingOrder, Mover, Reply, Request};
use crate::types::guard::{GuardOrder, Refusal};
use crate::types::vm::{DomainAnswer, DomainChange, DomainOrder, DomainState, OffReason, Underway};
use crate::types::{
    Claim, ClaimReason, DatastoreId, HostId, Over, Tenure, Ticket, Time, VmId, VmRecord, VmState, Wanted,
};

/// A move away from this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moving {
    /// To whom.
    pub to: HostId,
    /// Under which claim.
    pub tenure: Tenure,
    stage: MoveStage,
    ticket: Ticket,
    asks: Vec<AskId>,
    since: Time,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum MoveStage {
    /// The target makes its row.
    Asking,
    /// libvirt copies the memory; the VM may run here.
    Migrating,
    /// libvirt says stopped/migrated; the guard must see the exit.
    Leaving,
    /// The guard said over; the target is told, with every beat until it answers or this time has come.
    Handing { until: Time },
}

/// A move to this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Incoming {
    /// From whom.
    pub from: HostId,
    /// Under the source's claim.
    pub tenure: Tenure,
    /// What comes.
    pub record: VmRecord,
    /// Who wants that.
    pub by: Mover,
    claim: Claim,
}

/// A move takes at most this long before it is cancelled.
const MOVE_LIMIT: Duration = Duration::from_secs(600);
/// An answer of the other host.
const ANSWER: Duration = Duration::from_secs(10);
/// libvirt's time for short calls.
const CALL: Duration = Duration::from_secs(20);

impl Core {
    // ---- source -------------------------------------------------------------------------------------------------

    /// This VM, which runs here, is wanted elsewhere: by people who wait, or by this host itself.
    pub(super) fn begin_move(&mut self, cx: &mut Cx, asks: Vec<AskId>, id: VmId, to: Option<HostId>, by: Mover) {
        match self.move_target(cx.now, id, to) {
            Ok((to, claim, record)) => {
                let order = IncomingOrder { claim: claim.clone(), record, by };
                let ticket = cx.send(to, Request::Incoming(Box::new(order)), ANSWER, Pending::Move(id));
                self.vm(id).moving =
                    Some(Moving { to, tenure: claim.tenure, stage: MoveStage::Asking, ticket, asks, since: cx.now });
                self.tell = true;
            }
            Err(denial) => self.not_moved(cx, id, asks, &denial),
        }
    }

    fn move_target(&self, now: Time, id: VmId, to: Option<HostId>) -> Result<(HostId, Claim, VmRecord), Denial> {
        let vm = self.vms.get(&id).ok_or(Denial::UnknownVm)?;
        let claim = vm.claim.clone().ok_or(Denial::NotHere)?;
        let row = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        if vm.attempt.is_some() || vm.moving.is_some() {
            return Err(Denial::Unable("it is being worked on; try again in a moment".into()));
        }
        if !self.is_mine(vm) || row != Some(VmState::Running) {
            return Err(Denial::NotHere);
        }
        if let Some(DomainState::Paused { .. }) = self.libvirt.domains.get(&id).map(|domain| domain.state) {
            // The target resumes what has come to it.
            return Err(Denial::Unable("it is paused; resume it first ('virsh resume'), or shut it down".into()));
        }
        if claim.next_home() != claim.home {
            return Err(Denial::Unable("its home is being moved; try again in a moment".into()));
        }
        let Some(Ok(record)) = vm.record.clone() else {
            return Err(Denial::Unable("its definition cannot be protected, so it cannot be moved".into()));
        };
        if let Some(store) = self.path_lost(&record) {
            let why = format!("writes to datastore {store} fail or hang here, and what is under way could land later");
            return Err(Denial::Unable(why));
        }
        if let Some(what) = self.waits_for_trust(claim.home) {
            return Err(Denial::Unable(format!("it waits for {what}")));
        }
        let need = Need::of(&record);
        let to = match to {
            Some(to) if to == self.me.host => return Err(Denial::Contradiction("it runs on that host already".into())),
            Some(to) => {
                self.room_on(to, id, &need, now)
                    .map_err(|why| Denial::Capacity(format!("{} {why}", self.name_of(to))))?;
                to
            }
            None => match self.place(id, &need, Some(self.me.host), now) {
                Placed::On(host) => host,
                Placed::Nowhere(why) => {
                    let why: Vec<String> = why.iter().map(|(h, why)| format!("{} {why}", self.name_of(*h))).collect();
                    return Err(Denial::Capacity(why.join("; ")));
                }
            },
        };
        Ok((to, claim, record))
    }

    /// A datastore that this VM writes to and this host does not reach by itself.
    fn path_lost(&self, record: &VmRecord) -> Option<String> {
        let lost = |id: &DatastoreId| self.guard.leases.get(id).is_none_or(|lease| !lease.own_path);
        record.written().find(lost).map(|id| self.store_name(id))
    }

    pub(super) fn move_done(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, outcome: Outcome) {
        let Some(moving) = self.vms.get(&id).and_then(|vm| vm.moving.clone()) else { return };
        if moving.ticket != ticket {
            return;
        }
        match (moving.stage, outcome) {
            (MoveStage::Asking, Outcome::Reply(Ok(Reply::Done))) => self.migrate(cx, id, &moving),
            (MoveStage::Asking, Outcome::Reply(Ok(Reply::Denied(denial)))) => self.move_failed(cx, id, denial),
            (MoveStage::Asking, Outcome::Reply(other)) => {
                let why = other.err().unwrap_or_else(|| "an answer of the wrong kind".into());
                self.move_failed(cx, id, Denial::Unable(format!("{} does not answer: {why}", self.name_of(moving.to))));
            }
            (MoveStage::Migrating, Outcome::Domain(answer)) => self.migrated(cx, id, &moving, answer),
            (MoveStage::Leaving, Outcome::Guard(Err(refusal))) => {
                // Still running, or the row is another: nothing was handed over.
                self.move_failed(cx, id, Denial::Unable(format!("the guard does not hand it over: {refusal}")));
            }
            (MoveStage::Handing { .. }, Outcome::Reply(Err(_))) if self.is_handed_again(cx.now, id, &moving) => {}
            (MoveStage::Handing { .. }, Outcome::Reply(reply)) => self.handed_answered(cx, id, &moving, reply),
            _ => {}
        }
    }

    fn migrate(&mut self, cx: &mut Cx, id: VmId, moving: &Moving) {
        let Some(member) = self.settings.member(moving.to) else { return };
        let order = DomainOrder::Migrate { vm: id, uri: member.migration_uri.clone(), bandwidth_mib: None };
        self.set_underway(cx, id, Some(Underway::Move { to: moving.to }));
        let ticket = cx.domain(order, MOVE_LIMIT, Pending::Move(id));
        let (name, to) = (self.vm_name(id), self.name_of(moving.to));
        cx.note(Note::info("vm-move", format!("{name} is being moved to {to}")).of(&name));
        self.move_stage(id, MoveStage::Migrating, ticket);
    }

    fn migrated(&mut self, cx: &mut Cx, id: VmId, moving: &Moving, answer: DomainAnswer) {
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => self.leave(cx, id, moving),
            DomainAnswer::Failed(why) => {
                let gone = matches!(self.vm(id).ended, Some((OffReason::Migrated, at)) if moving.since <= at);
                if gone {
                    return self.leave(cx, id, moving); // libvirt's event says that it went, whatever the call says.
                }
                self.move_failed(cx, id, Denial::Unable(format!("the migration failed ({why:?}); it goes on here")));
            }
        }
    }

    /// libvirt's event: the source's QEMU has ended because it was migrated.
    pub(super) fn move_saw(&mut self, cx: &mut Cx, id: VmId, change: DomainChange) {
        let Some(moving) = self.vms.get(&id).and_then(|vm| vm.moving.clone()) else { return };
        match change {
            DomainChange::Suspended { migrated: true, .. } if planted(Mutant::SourceResumed) => {
                cx.domain(DomainOrder::Resume { vm: id }, CALL, Pending::Nothing);
            }
            DomainChange::Stopped(OffReason::Migrated) if moving.stage == MoveStage::Migrating => {
                self.leave(cx, id, &moving)
            }
            DomainChange::Stopped(_) if moving.stage == MoveStage::Migrating => {
                self.move_failed(cx, id, Denial::Unable("it ended during the migration".into()));
            }
            _ => {}
        }
    }

    fn leave(&mut self, cx: &mut Cx, id: VmId, moving: &Moving) {
        if moving.stage == MoveStage::Migrating {
            let record = self.vm(id).record.clone().and_then(Result::ok);
            if let Some(store) = record.and_then(|record| self.path_lost(&record)) {
                // Handed over would mean that nothing is under way. It is restarted instead, with a fence.
                self.vm(id).own_end = true;
                let why = format!("datastore {store} was lost here meanwhile; it is restarted");
                return self.move_failed(cx, id, Denial::Unable(why));
            }
            let order = GuardOrder::HandOver { tenure: moving.tenure, to: moving.to };
            let ticket = cx.guard(order, Pending::Move(id));
            self.move_stage(id, MoveStage::Leaving, ticket);
            if let Some(state) = self.guard.rows.get(&moving.tenure).map(|row| row.state) {
                self.handed_over(cx, moving.tenure, state);
            }
        }
    }

    /// The guard's row changed: "over, handed to T" lets the target be told.
    pub(super) fn handed_over(&mut self, cx: &mut Cx, tenure: Tenure, state: VmState) {
        let id = tenure.vm;
        let Some(moving) = self.vms.get(&id).and_then(|vm| vm.moving.clone()) else { return };
        if moving.tenure != tenure || matches!(moving.stage, MoveStage::Handing { .. }) {
            return;
        }
        match state {
            VmState::Over(Over::HandedTo(to)) if to == moving.to => {
                self.move_stage(id, MoveStage::Handing { until: cx.now + ANSWER }, Ticket(0));
                self.hand(cx, id);
            }
            // The guard may see the exit before libvirt tells of the migration's end: libvirt says which end it was.
            VmState::Over(Over::Exited { .. } | Over::Draining) if moving.stage == MoveStage::Migrating => {}
            // A beat shows next whether its writes have landed.
            VmState::Over(Over::Draining) if moving.stage == MoveStage::Leaving => {}
            VmState::Over(Over::Exited { clean: true }) if moving.stage == MoveStage::Leaving => {
                // Its lease lapsed between our order and the exit, or the exit came first.
                let order = GuardOrder::HandOver { tenure, to: moving.to };
                let ticket = cx.guard(order, Pending::Move(id));
                self.move_stage(id, MoveStage::Leaving, ticket);
            }
            VmState::Over(Over::Exited { clean: false } | Over::Lapsed) if moving.stage == MoveStage::Leaving => {
                // What it had under way may still land: it is restarted, with a fence.
                self.vm(id).own_end = true;
                self.move_failed(
                    cx,
                    id,
                    Denial::Unable("its storage was lost during the move; it is restarted".into()),
                );
            }
            VmState::Over(_) if moving.stage != MoveStage::Leaving => {
                self.move_failed(cx, id, Denial::Unable("it ended, or its lease lapsed, during the move".into()));
            }
            VmState::Over(_) | VmState::Expected | VmState::Running | VmState::Incoming => {}
        }
    }

    fn handed_answered(&mut self, cx: &mut Cx, id: VmId, moving: &Moving, reply: Result<Reply, String>) {
        let (name, to) = (self.vm_name(id), self.name_of(moving.to));
        self.vm(id).moving = None;
        if reply.is_err() {
            // It may not have heard it, and waits for it with the copy. It is told again until it answers, or the claims have
            // gone on; see `take_up_move`.
            self.vm(id).pause = cx.now + self.settings.timing.beat;
        } else {
            self.set_underway(cx, id, None);
        }
        let refused = matches!(reply, Ok(Reply::Denied(_)));
        let reply = match reply {
            Ok(Reply::Ran { generation }) => {
                let took = cx.now.since(moving.since).as_secs_f64();
                cx.note(Note::info("vm-moved", format!("{name} was moved to {to} in {took:.2} s")).of(&name));
                Reply::Ran { generation }
            }
            Ok(Reply::Denied(denial)) => Reply::Denied(denial),
            Ok(_) | Err(_) => {
                Reply::Denied(Denial::Unable(format!("{to} was handed {name} but did not answer; its claims decide")))
            }
        };
        for ask in &moving.asks {
            cx.answer(*ask, reply.clone());
        }
        let claim = self.vm(id).claim.clone().filter(|claim| claim.tenure == moving.tenure);
        if let (true, Some(claim), None) = (refused, claim, self.vm(id).attempt.as_ref()) {
            // It surely does not run there: whoever is master restarts it. If the target has claimed, this one gives way.
            let kind = Kind::Release { wanted: Wanted::Running, reason: ClaimReason::StartFailed };
            self.begin(cx, id, kind, claim.home, Vec::new());
        }
        self.list_claims(cx);
        self.list_domains(cx);
        self.check = true;
        self.tell = true;
    }

    fn move_failed(&mut self, cx: &mut Cx, id: VmId, denial: Denial) {
        let name = self.vm_name(id);
        let Some(moving) = self.vm(id).moving.take() else { return };
        self.set_underway(cx, id, None);
        if moving.stage != MoveStage::Asking {
            self.drop_move(cx, moving.tenure, moving.to);
        }
        cx.note(Note::warning("vm-move-failed", format!("{name} was not moved: {denial}")).of(&name));
        self.not_moved(cx, id, moving.asks, &denial);
        self.check = true;
        self.tell = true;
    }

    fn not_moved(&mut self, cx: &mut Cx, id: VmId, asks: Vec<AskId>, denial: &Denial) {
        if asks.is_empty() {
            self.stays(cx, id, denial.to_string());
        }
        for ask in asks {
            cx.answer(ask, Reply::Denied(denial.clone()));
        }
    }

    /// The guard is gone: its word about a hand-over will not come; its rows will.
    pub(super) fn moves_lost_guard(&mut self, cx: &mut Cx) {
        let leaving = |vm: &super::vms::Vm| vm.moving.as_ref().is_some_and(|moving| moving.stage == MoveStage::Leaving);
        let stuck: Vec<VmId> = self.vms.iter().filter(|(_, vm)| leaving(vm)).map(|(id, _)| *id).collect();
        for id in stuck {
            self.move_failed(cx, id, Denial::Unable("the guard was restarted during the hand-over".into()));
        }
    }

    /// An earlier agent of this host died during a move, and the source's copy has ended as migrated; or the target did not
    /// answer when it was handed over: goes on with the guard's word.
    pub(super) fn take_up_move(&mut self, cx: &mut Cx, id: VmId, tenure: Tenure, to: HostId) {
        let moving =
            Moving { to, tenure, stage: MoveStage::Migrating, ticket: Ticket(0), asks: Vec::new(), since: cx.now };
        self.vm(id).moving = Some(moving.clone());
        self.leave(cx, id, &moving);
    }

    fn move_stage(&mut self, id: VmId, stage: MoveStage, ticket: Ticket) {
        if let Some(moving) = &mut self.vm(id).moving {
            moving.stage = stage;
            moving.ticket = ticket;
        }
    }

    // ---- target -------------------------------------------------------------------------------------------------

    /// The source asks whether its VM may come.
    pub(super) fn incoming(&mut self, cx: &mut Cx, ask: AskId, from: HostId, order: IncomingOrder) {
        let id = order.claim.tenure.vm;
        let tenure = order.claim.tenure;
        self.learn(cx, order.claim.clone(), cx.now);
        let alive = self.libvirt.domains.get(&id).is_some_and(|domain| domain.pid.is_some());
        let newest = self.vm(id).tenure();
        let vm = self.vm(id);
        let busy = vm.attempt.is_some() || vm.incoming.is_some() || alive;
        if busy || newest != Some(tenure) || order.claim.owner().map(|owner| owner.host) != Some(from) {
            return cx.answer(
                ask,
                Reply::Denied(Denial::Unable("it is being worked on there, or its claim has changed".into())),
            );
        }
        if self.going_down {
            return cx.answer(ask, Reply::Denied(Denial::Unable("that host goes down".into())));
        }
        if let Err(why) = self.room_on(self.me.host, id, &Need::of(&order.record), cx.now) {
            return cx.answer(ask, Reply::Denied(Denial::Capacity(format!("{} {why}", self.name_of(self.me.host)))));
        }
        let name = order.claim.name.clone();
        let home = order.claim.home;
        self.vm(id).incoming = Some(Incoming { from, tenure, record: order.record, by: order.by, claim: order.claim });
        cx.set(Timer::Incoming(id), cx.now + MOVE_LIMIT + ANSWER);
        let deadline = cx.now + MOVE_LIMIT + ANSWER;
        cx.guard(GuardOrder::Incoming { tenure, name, home, deadline }, Pending::Incoming(id, ask));
    }

    pub(super) fn incoming_done(&mut self, cx: &mut Cx, id: VmId, ask: AskId, result: Result<(), Refusal>) {
        match result {
            Ok(()) => cx.answer(ask, Reply::Done),
            Err(refusal) => {
                self.vm(id).incoming = None;
                cx.answer(ask, Reply::Denied(Denial::Unable(format!("the guard there refuses: {refusal}"))));
            }
        }
    }

    /// The source's word: (v, g) is over and handed to this host.
    pub(super) fn handed(&mut self, cx: &mut Cx, ask: AskId, from: HostId, tenure: Tenure) {
        let id = tenure.vm;
        let Some(incoming) = self.vms.get(&id).and_then(|vm| vm.incoming.clone()) else {
            return cx.answer(ask, self.handed_before(tenure));
        };
        if let Some(attempt) = self.vm(id).attempt.as_mut().filter(|attempt| matches!(attempt.kind, Kind::Arrive)) {
            return attempt.asks.push(ask); // Told again: its first answer was lost, or comes yet.
        }
        let confirmed = self.guard.rows.get(&tenure).map(|row| row.state) == Some(VmState::Incoming);
        let newest = self.vm(id).tenure();
        if incoming.from != from || incoming.tenure != tenure || newest != Some(tenure) || !confirmed {
            self.drop_incoming(cx, id);
            return cx.answer(
                ask,
                Reply::Denied(Denial::Unable("the copy there is not the one that was handed over".into())),
            );
        }
        if self.vm(id).attempt.is_some() {
            return cx.answer(ask, Reply::Denied(Denial::Unable("it is being worked on there".into())));
        }
        cx.unset(Timer::Incoming(id));
        self.set_underway(cx, id, Some(Underway::Start));
        self.begin(cx, id, Kind::Arrive, incoming.claim.home, vec![ask]);
    }

    pub(super) fn dropped(&mut self, cx: &mut Cx, ask: AskId, from: HostId, tenure: Tenure) {
        let ours = self.vms.get(&tenure.vm).and_then(|vm| vm.incoming.as_ref());
        if ours.is_some_and(|incoming| incoming.from == from && incoming.tenure == tenure) {
            self.drop_incoming(cx, tenure.vm);
        }
        self.handover_dropped(cx, from, tenure);
        cx.answer(ask, Reply::Done);
    }

    pub(super) fn incoming_due(&mut self, cx: &mut Cx, id: VmId) {
        self.drop_incoming(cx, id);
    }

    /// The source is silent: its memory may be older than its disks, so the copy is never resumed.
    pub(super) fn incoming_from_silent(&mut self, cx: &mut Cx, host: HostId) {
        let from = |vm: &super::vms::Vm| {
            vm.incoming.as_ref().is_some_and(|incoming| incoming.from == host) && vm.attempt.is_none()
        };
        let lost: Vec<VmId> = self.vms.iter().filter(|(_, vm)| from(vm)).map(|(id, _)| *id).collect();
        for id in lost {
            if planted(Mutant::TargetEarly) {
                let home = self.vm(id).incoming.as_ref().map(|incoming| incoming.claim.home).expect("just found");
                self.begin(cx, id, Kind::Arrive, home, Vec::new());
                continue;
            }
            self.drop_incoming(cx, id);
        }
        // The other side: a target that is silent cannot be told; libvirt ends the migration, or we do.
        let to =
            |vm: &super::vms::Vm| vm.moving.as_ref().is_some_and(|m| m.to == host && m.stage == MoveStage::Migrating);
        let stuck: Vec<VmId> = self.vms.iter().filter(|(_, vm)| to(vm)).map(|(id, _)| *id).collect();
        for id in stuck {
            cx.domain(DomainOrder::AbortJob { vm: id }, CALL, Pending::Nothing);
        }
    }

    pub(super) fn drop_incoming(&mut self, cx: &mut Cx, id: VmId) {
        let name = self.vm_name(id);
        let Some(incoming) = self.vm(id).incoming.take() else { return };
        cx.unset(Timer::Incoming(id));
        self.destroy(cx, id);
        cx.guard(GuardOrder::Abandon { tenure: incoming.tenure }, Pending::Nothing);
        let from = self.name_of(incoming.from);
        cx.note(
            Note::warning("vm-move-failed", format!("{name}: the half-finished copy from {from} is thrown away"))
                .of(&name),
        );
        self.check = true;
    }
}
