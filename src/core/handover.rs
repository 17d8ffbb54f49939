//! `virsh migrate` by people (R6): libvirt lets the target run on its own word, and lets the source go on when the
//! target's last answer is lost. So both are named by one claim, and neither goes on under it for long.
//!
//! ```text
//!  target: hook migrate ─► Reading claim g ─► Expecting: row (v, g+1) ─► Asking the source ─► allowed ─► incoming copy
//!                              │ no, or nobody                              │ no: row withdrawn   │
//!                              ▼                                            │ nobody: said over   │ it runs: claims g+2
//!                           refused ◄───────────────────────────────────────┘                     ▼
//!  source: asked ─► row (v, g+1) ─► claim g+1 "handover S to T" ─► runs until the switch      Settle ─► its own
//!                                     │ the target is over: claims g+2                            ▲
//!                                     └───────────────────────────────────────────────────────────┘
//! ```
//!
//! | what stands here under g+1 | the other is over by | then |
//! |---|---|---|
//! | source, before the switch | any proof | claims g+2 and goes on |
//! | source after the switch, or stopped | "never started" | claims g+2 and goes on: nothing ran on newer disks |
//! | source after the switch, or stopped | any other proof | its memory may be older than the disks: thrown away |
//! | target, running | nothing needed | claims g+2 |
//! | target, stopped after a lapse | any proof | claims g+2 and goes on |
//! | target, not yet running | any proof, or the source's word | thrown away after a while, if libvirt does not do it |
//! | nothing | any proof, and its own word | the master restarts it |
//!
//! Why the row comes before the question: a target that lapsed between claim and row would be over by its silence, and then
//! run by its row. Why only "never started" lets the source go on after the switch: anything else says that nothing runs
//! there now, not that nothing ran.
//!
//! A source that does not hear its target has libvirt cancel the migration, and tells the target when it hears it again.
//! The switch itself is seen by the guard (`guard::table::handover`); this agent only passes libvirt's word on. There
//! is no way to refuse post-copy: libvirt's hook is not told; it is an alarm, and the source's copy is then left alone.
//!
//! Deliberately not here: moves by Mainstay (`moving`), proofs (`proofs`).

mod receive;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending, Timer};
use super::event::AskId;
use super::note::Note;
use crate::types::control::{Denial, HandoverOrder, Reply, Request};
use crate::types::guard::{GuardOrder, RowView};
use crate::types::settings::ForeignMigration;
use crate::types::vm::{DomainAnswer, DomainChange, DomainFailure, DomainOrder, DomainState, OffReason, Underway};
use crate::types::{
    Claim, ClaimReason, DatastoreId, Generation, Holder, HostId, Over, Owner, Proof, Tenure, VmId, VmState,
};

/// A copy that stands here, while the other side is over: libvirt, or the other's own word, is given so long.
const SETTLES: Duration = Duration::from_secs(2);
/// The same, when the source ended as if all had gone well; or when only a stopped copy here hinders the source.
const SETTLES_SLOWLY: Duration = Duration::from_secs(10);
/// libvirt ends the source's copy after the target has run; beyond this it is killed.
const LEAVES: Duration = Duration::from_secs(30);
/// libvirt's time to cancel a migration.
const CALL: Duration = Duration::from_secs(5);
/// Between two looks at the claims while the other side may have made one.
const LOOK: Duration = Duration::from_secs(1);

/// What this host knows of a VM's handover beyond its claim.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Handover {
    /// The hook's question under way here, at the target.
    receiving: Option<receive::Receiving>,
    /// libvirt said that the memory has left (source) under this generation.
    switched: Option<Generation>,
    /// libvirt said that it has arrived (target) under this generation.
    arrived: Option<Generation>,
    /// The source serves pages to the target.
    post_copy: bool,
    /// The source has cancelled its libvirt's migration under this generation, since the target is not heard.
    cancelled: Option<Generation>,
    /// Since when a copy here waits although the other side is over.
    stands: Option<crate::types::Time>,
    /// What was told of a copy that is thrown away.
    told: Option<Generation>,
}

impl Handover {
    /// The hook's question is under way.
    #[must_use]
    pub fn receives(&self) -> bool {
        self.receiving.is_some()
    }
}

impl Core {
    // ---- source: asked ------------------------------------------------------------------------------------------

    pub(super) fn handover_asked(&mut self, cx: &mut Cx, ask: AskId, from: HostId, order: HandoverOrder) {
        let id = order.claim.tenure.vm;
        match self.may_hand_over(from, &order) {
            Ok(home) => {
                let (name, to) = (self.vm_name(id), self.name_of(from));
                cx.note(Note::info("vm-handover", format!("{name} is being migrated to {to} by a person")).of(&name));
                self.begin(cx, id, Kind::HandOver { to: order.to }, home, vec![ask]);
            }
            Err(denial) => cx.answer(ask, Reply::Denied(denial)),
        }
    }

    fn may_hand_over(&self, from: HostId, order: &HandoverOrder) -> Result<DatastoreId, Denial> {
        if self.settings.foreign_migration == ForeignMigration::Refuse {
            return Err(Denial::NotAllowed("this cluster refuses 'virsh migrate' (foreign-migration=refuse)".into()));
        }
        let vm = self.vms.get(&order.claim.tenure.vm).ok_or(Denial::UnknownVm)?;
        let claim = vm.claim.as_ref().ok_or(Denial::NotHere)?;
        let same = claim.tenure == order.claim.tenure && claim.nonce == order.claim.nonce;
        if !same || !self.is_mine(vm) || order.to.host != from {
            return Err(Denial::Superseded { newest: claim.tenure.generation });
        }
        if vm.attempt.is_some() || vm.moving.is_some() {
            return Err(Denial::Unable("it is being worked on; try again in a moment".into()));
        }
        if let Holder::Moved { .. } = claim.holder {
            return Err(Denial::Unable("its home is being moved; try again in a moment".into()));
        }
        if self.guard.rows.get(&claim.tenure).map(|row| row.state) != Some(VmState::Running) {
            return Err(Denial::Unable("its lease lapsed here, or it does not run".into()));
        }
        if self.underway.get(&order.claim.tenure.vm) == Some(&Underway::Pause) {
            return Err(Denial::Unable("it is paused in doubt of its storage; try again in a moment".into()));
        }
        if let Some(what) = self.waits_for_trust(claim.home) {
            return Err(Denial::Unable(format!("it waits for {what}")));
        }
        // The target's guard has a row for the generation after this one.
        if claim.tenure.generation.next() < self.floor(claim.home) {
            return Err(Denial::Unable("its datastore was accepted anew and it is claimed first; try again".into()));
        }
        Ok(claim.home)
    }

    /// The target cannot use the next generation: this host's own claim takes it.
    pub(super) fn spent(&mut self, cx: &mut Cx, ask: AskId, tenure: Tenure) {
        let id = tenure.vm;
        let Some(claim) = self.vms.get(&id).filter(|vm| self.is_mine(vm)).and_then(|vm| vm.claim.clone()) else {
            return cx.answer(ask, Reply::Denied(Denial::NotHere));
        };
        let runs = self.guard.rows.get(&claim.tenure).map(|row| row.state) == Some(VmState::Running);
        let busy = self.vm(id).attempt.is_some() || self.vm(id).moving.is_some();
        if runs && !busy && claim.tenure.generation.next() == tenure.generation {
            self.begin(cx, id, Kind::Settle, claim.next_home(), Vec::new());
        }
        cx.answer(ask, Reply::Done);
    }

    // ---- libvirt's word -----------------------------------------------------------------------------------------

    pub(super) fn handover_saw(&mut self, cx: &mut Cx, id: VmId, change: DomainChange) {
        let Some(claim) = self.vms.get(&id).and_then(|vm| vm.claim.clone()) else { return };
        let Holder::Handover { from, to } = claim.holder else { return };
        let (me, generation) = (self.me.host, claim.tenure.generation);
        match change {
            DomainChange::Suspended { migrated: true, .. } if from.host == me => self.switched(cx, claim.tenure),
            DomainChange::PostCopy if from.host == me => {
                let name = self.vm_name(id);
                let text = format!(
                    "{name} is migrated by post-copy: until that ends it is lost if either host fails; use pre-copy, or \
                     'mainstay vm move {name}'"
                );
                cx.note(Note::alarm("post-copy", text).of(&name));
                self.vm(id).handover.post_copy = true;
                self.switched(cx, claim.tenure);
            }
            DomainChange::Resumed | DomainChange::Suspended { .. } if to.host == me => {
                self.vm(id).handover.arrived = Some(generation);
            }
            _ => {}
        }
    }

    fn switched(&mut self, cx: &mut Cx, tenure: Tenure) {
        self.vm(tenure.vm).handover.switched = Some(tenure.generation);
        cx.guard(GuardOrder::Switched { tenure }, Pending::Nothing);
    }

    /// Whether libvirt, not a person, has paused what stands here.
    pub(super) fn paused_by_switch(&self, id: VmId) -> bool {
        let Some(vm) = self.vms.get(&id) else { return false };
        let before = vm.claim.as_ref().map(|claim| claim.tenure.generation);
        before.is_some_and(|newest| vm.handover.switched.is_some_and(|at| at.next() == newest))
    }

    // ---- both: what stands here ---------------------------------------------------------------------------------

    /// The newest claim hands the VM over. True: nothing else is to be concluded from it here.
    pub(super) fn check_handover(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) -> bool {
        let Holder::Handover { from, to } = claim.holder else { return false };
        let here = |owner: &Owner| owner.host == self.me.host && owner.boot == self.me.boot;
        let newest = self.guard.rows.iter().rfind(|(tenure, _)| tenure.vm == id);
        let row = self.guard.rows.get(&claim.tenure).or(newest.map(|(_, row)| row)).cloned();
        let Some(row) = row else { return false };
        let known = self.vms.get(&id).map(|vm| vm.known).unwrap_or_default();
        if here(&from) {
            let other = self.proof_against(to, claim, known, cx.now);
            self.as_source(cx, id, &row, claim, to.host, other);
        } else if here(&to) {
            let other = self.proof_against(from, claim, known, cx.now);
            self.as_target(cx, id, &row, claim, other);
        } else {
            return false;
        }
        true
    }

    fn as_source(&mut self, cx: &mut Cx, id: VmId, row: &RowView, claim: &Claim, to: HostId, target: Option<Proof>) {
        let switched = self.vm(id).handover.switched == Some(claim.tenure.generation);
        let unran = target == Some(Proof::Said(Over::NeverStarted));
        match (row.state, target) {
            // An earlier agent of this host died before it was confirmed.
            (VmState::Expected, _) if row.tenure == claim.tenure => self.take_up_row(cx, id, row),
            (VmState::Running, None) => self.await_switch(cx, id, claim, to, switched),
            (VmState::Running, Some(_)) if switched && !unran => self.discard(cx, id, claim),
            (VmState::Running, Some(_)) => self.begin(cx, id, Kind::Settle, claim.home, Vec::new()),
            (_, None) => self.look_again(cx, id),
            (_, Some(_)) if row.pid.is_some() && unran => self.reclaim(cx, row),
            (_, Some(_)) if row.pid.is_some() => self.discard(cx, id, claim),
            (_, Some(_)) => match self.end_reason(cx, id) {
                Some(OffReason::Migrated) | None => {} // Nobody has it: the master restarts it.
                Some(_) => self.judge_end(cx, id, claim),
            },
        }
    }

    /// It runs here until the switch. A new agent that finds it paused may have missed the event.
    fn await_switch(&mut self, cx: &mut Cx, id: VmId, claim: &Claim, to: HostId, switched: bool) {
        let state = self.libvirt.domains.get(&id).map(|domain| domain.state);
        // An agent that was just started has heard nobody yet.
        let heard = self.is_heard(to, cx.now) || cx.now.since(self.me.started) < self.settings.timing.suspect * 2;
        let cancelled = self.vm(id).handover.cancelled == Some(claim.tenure.generation);
        if switched {
            // The guard that was told may have been followed by another. The target claims as soon as it runs.
            cx.guard(GuardOrder::Switched { tenure: claim.tenure }, Pending::Nothing);
            self.look_again(cx, id);
        } else if state == Some(DomainState::Paused { by_io_error: false }) {
            self.switched(cx, claim.tenure);
        } else if !heard && !cancelled {
            self.vm(id).pause = cx.now + CALL;
            cx.domain(DomainOrder::AbortJob { vm: id }, CALL, Pending::Cancelled(id));
        } else if heard && cancelled {
            // What came in there waits for memory that will not come.
            self.vm(id).pause = cx.now + LOOK;
            cx.send(to, Request::Dropped { tenure: claim.tenure }, LOOK, Pending::Nothing);
        }
    }

    /// libvirt was told to cancel: whatever it says, no migration is under way any more, unless it said nothing.
    pub(super) fn cancelled(&mut self, id: VmId, answer: &DomainAnswer) {
        let vm = self.vm(id);
        let silent = matches!(answer, DomainAnswer::Failed(DomainFailure::NoDaemon(_) | DomainFailure::Timeout));
        if let (Some(claim), false) = (&vm.claim, silent) {
            vm.handover.cancelled = Some(claim.tenure.generation);
        }
        vm.pause = crate::types::Time::ZERO;
        self.check = true;
    }

    /// The source's migration was cancelled: what came in is thrown away, unless it runs.
    pub(super) fn handover_dropped(&mut self, cx: &mut Cx, from: HostId, tenure: Tenure) {
        let id = tenure.vm;
        let Some(claim) = self.vms.get(&id).and_then(|vm| vm.claim.clone()) else { return };
        let its = matches!(claim.holder, Holder::Handover { from: source, .. } if source.host == from);
        let state = self.libvirt.domains.get(&id).map(|domain| domain.state);
        let runs = state == Some(DomainState::Running) || self.vm(id).handover.arrived == Some(tenure.generation);
        if its && claim.tenure == tenure && self.comes_in(id) && !runs && self.vm(id).attempt.is_none() {
            self.discard(cx, id, &claim);
        }
    }

    fn as_target(&mut self, cx: &mut Cx, id: VmId, row: &RowView, claim: &Claim, source: Option<Proof>) {
        let state = self.libvirt.domains.get(&id).map(|domain| domain.state);
        let left = matches!(source, Some(Proof::Said(Over::Exited { .. })));
        match (row.state, source) {
            (VmState::Incoming, _) if row.pid.is_none() => {}
            (VmState::Incoming, _) if matches!(state, Some(DomainState::Running | DomainState::ShuttingDown)) => {
                self.begin(cx, id, Kind::Settle, claim.home, Vec::new());
            }
            // `virsh migrate --paused`: it came whole, and stands because a person wants that.
            (VmState::Incoming, _) if left && self.vm(id).handover.arrived == Some(claim.tenure.generation) => {
                self.begin(cx, id, Kind::Settle, claim.home, Vec::new());
            }
            (VmState::Incoming, Some(_)) => {
                self.discard_later(cx, id, claim, if left { SETTLES_SLOWLY } else { SETTLES });
            }
            (VmState::Over(_), Some(_)) if row.pid.is_some() => self.reclaim(cx, row),
            // The source may run, and cannot claim before this copy is gone.
            (VmState::Over(_), None) if row.pid.is_some() => self.discard_later(cx, id, claim, SETTLES_SLOWLY),
            (VmState::Incoming | VmState::Over(_) | VmState::Expected | VmState::Running, _) => {
                self.vm(id).handover.stands = None;
            }
        }
    }

    fn discard_later(&mut self, cx: &mut Cx, id: VmId, claim: &Claim, pause: Duration) {
        let since = *self.vm(id).handover.stands.get_or_insert(cx.now);
        if pause <= cx.now.since(since) {
            return self.discard(cx, id, claim);
        }
        cx.set_earlier(Timer::Judge(id), since + pause);
        self.look_again(cx, id);
    }

    /// The copy here must not go on.
    fn discard(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) {
        let name = self.vm_name(id);
        self.vm(id).own_end = true;
        self.vm(id).pause = cx.now + LOOK / 2;
        cx.guard(GuardOrder::Discard { tenure: claim.tenure }, Pending::Nothing);
        if self.vm(id).handover.told.replace(claim.tenure.generation) != Some(claim.tenure.generation) {
            let text =
                format!("{name}: a migration by a person broke; the copy here, which must not go on, is thrown away");
            cx.note(Note::warning("vm-handover-failed", text).of(&name));
        }
    }

    /// The other side may have made a claim.
    fn look_again(&mut self, cx: &mut Cx, id: VmId) {
        self.vm(id).pause = cx.now + LOOK;
        cx.set_earlier(Timer::Judge(id), cx.now + LOOK);
        self.list_claims(cx);
    }

    /// The target has claimed what left this host: libvirt ends the copy here, which stands. A source that missed the
    /// switch learns of it here.
    pub(super) fn is_leaving(&mut self, cx: &mut Cx, row: &RowView, claim: &Claim) -> bool {
        let id = row.tenure.vm;
        let came = matches!(claim.reason, ClaimReason::Migrated | ClaimReason::Planned);
        let next = row.tenure.generation.next() == claim.tenure.generation && came;
        let known = self.vm(id).known;
        if row.state != VmState::Running || !next {
            return false;
        }
        if self.vm(id).handover.switched != Some(row.tenure.generation) {
            self.switched(cx, row.tenure);
        }
        let waits = self.vm(id).handover.post_copy || cx.now.since(known) < LEAVES;
        if waits {
            self.vm(id).pause = cx.now + LOOK;
            cx.set_earlier(Timer::Judge(id), known + LEAVES);
        }
        waits
    }
}
