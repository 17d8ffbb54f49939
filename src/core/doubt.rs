//! Doubt: a lease that was not renewed for 0.8 L will probably lapse. Its VMs are asked to pause, so that their clocks stand
//! and their guests see no more than a pause.
//!
//! ```text
//!  t_c ── 0.8 L: Suspend, each VM of that home ── L − reserve: the guard's stop, which alone counts
//!             └─ renewed: Resume                       └─ re-claimed: the stop is lifted, then Resume
//! ```
//!
//! On hung storage a pause gives no answer, stops the vCPUs all the same, and shows in libvirt only when the storage is back,
//! even if who asked for it has died. So what was asked is remembered beyond this agent (`Underway::Pause`), and a pause is
//! lifted whenever it shows, until its call has ended. What a person has paused is not asked, and stays paused.
//!
//! Deliberately not here: the guard's stop, and the re-claim (`attempt`).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::note::Note;
use super::timing;
use crate::types::guard::LeaseView;
use crate::types::settings::OnDoubt;
use crate::types::vm::{DomainAnswer, DomainFailure, DomainOrder, DomainState, Underway};
use crate::types::{DatastoreId, Holder, Over, Ticket, Time, VmId, VmState};

/// libvirt's time for a resume.
const CALL: Duration = Duration::from_secs(20);
/// A pause whose call ended with its connection, or with an earlier agent, may still show for so long.
const LATE: Duration = Duration::from_secs(60);
/// Between libvirt's answer and its event.
const SHOWN: Duration = Duration::from_secs(2);
/// A resume that failed is tried again after this.
const RETRY: Duration = Duration::from_millis(500);

/// A call to libvirt because of doubt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PauseCall {
    /// A pause: answered when it has taken effect, which may be long after the doubt.
    Suspend(Ticket),
    /// Its end.
    Resume(Ticket),
}

impl Core {
    /// The guard's word on a lease: doubt begins 0.8 L after the newest beat that counts.
    pub(super) fn follow_doubt(&mut self, cx: &mut Cx, lease: &LeaseView) {
        match lease.until {
            Some(until) => cx.set(Timer::Doubt(lease.datastore), self.doubt_at(until)),
            None => cx.unset(Timer::Doubt(lease.datastore)),
        }
    }

    fn doubt_at(&self, until: Time) -> Time {
        let lease = self.settings.timing.lease;
        until - (lease - timing::pause_after(lease))
    }

    /// Whether a lease is in doubt, or does not stand.
    pub(super) fn in_doubt(&self, home: DatastoreId, now: Time) -> bool {
        let until = self.guard.leases.get(&home).and_then(|lease| lease.until);
        until.is_none_or(|until| self.doubt_at(until) <= now)
    }

    /// 0.8 L have passed. What libvirt does not begin before the guard's stop it need not begin.
    pub(super) fn doubt_due(&mut self, cx: &mut Cx, home: DatastoreId) {
        let Some(until) = self.guard.leases.get(&home).and_then(|lease| lease.until) else { return };
        let left = (until - timing::reserve(self.settings.timing.lease)).since(cx.now);
        // After a silence of this agent's own, what it knows is old. The guard's word comes with each beat, and sets the timer.
        let held_up = cx.now.since(self.awake_since) < self.settings.timing.beat;
        if held_up || !self.in_doubt(home, cx.now) || left == Duration::ZERO {
            return;
        }
        let running = self.guard.rows.values().filter(|row| row.home == home && row.state == VmState::Running);
        let vms: Vec<VmId> = running.map(|row| row.tenure.vm).filter(|vm| self.may_pause(*vm)).collect();
        for vm in vms {
            let (name, store) = (self.vm_name(vm), self.store_name(home));
            let silent = timing::pause_after(self.settings.timing.lease).as_secs_f64();
            let text = format!("{name} is asked to pause: for {silent:.1} s no beat on datastore {store} has counted");
            cx.note(Note::warning("vm-doubt", text).of(&name));
            self.set_underway(cx, vm, Some(Underway::Pause));
            let ticket = cx.domain(DomainOrder::Suspend { vm }, left, Pending::Pause(vm));
            let vm = self.vm(vm);
            vm.pause_call = Some(PauseCall::Suspend(ticket));
            vm.pause_over = None;
            self.tell = true;
        }
    }

    fn may_pause(&self, id: VmId) -> bool {
        let Some(vm) = self.vms.get(&id) else { return false };
        // One that is handed over: a pause shows that libvirt has switched.
        let leaves = vm.claim.as_ref().is_some_and(|claim| matches!(claim.holder, Holder::Handover { .. }));
        let busy = vm.attempt.is_some() || vm.moving.is_some() || leaves || self.underway.contains_key(&id);
        let own = vm.record.as_ref().and_then(|record| record.as_ref().ok()?.on_doubt);
        let runs = self.libvirt.domains.get(&id).is_some_and(|domain| domain.state == DomainState::Running);
        !busy && runs && own.unwrap_or(self.settings.vms.on_doubt) == OnDoubt::Pause
    }

    /// libvirt's answer to a pause, or to its end.
    pub(super) fn pause_done(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, answer: &DomainAnswer) {
        let vm = self.vm(id);
        let suspend = vm.pause_call == Some(PauseCall::Suspend(ticket));
        if !suspend && vm.pause_call != Some(PauseCall::Resume(ticket)) {
            return;
        }
        vm.pause_call = None;
        match answer {
            DomainAnswer::Failed(DomainFailure::Timeout) if suspend => self.set_underway(cx, id, None), // Never begun.
            DomainAnswer::Failed(DomainFailure::NoDaemon(_)) if suspend => {} // It may still show.
            _ if suspend => vm.pause_over = Some(cx.now + SHOWN),
            DomainAnswer::Failed(_) => vm.pause = cx.now + RETRY,
            DomainAnswer::Done | DomainAnswer::Listed(_) => {}
        }
        if suspend && matches!(answer, DomainAnswer::Done) {
            self.pause_shows(id);
        }
        self.list_domains(cx);
        self.check = true;
    }

    /// Its pause shows: by libvirt's answer or its event, whichever is first.
    pub(super) fn pause_shows(&mut self, id: VmId) {
        if self.underway.get(&id) == Some(&Underway::Pause) {
            self.vm(id).pause = Time::ZERO; // Looked at now.
            if let Some(domain) = self.libvirt.domains.get_mut(&id) {
                domain.state = DomainState::Paused { by_io_error: false };
            }
        }
    }

    /// A VM that was asked to pause has the right to run: it goes on as soon as its pause shows.
    pub(super) fn lift_pause(&mut self, cx: &mut Cx, id: VmId, home: DatastoreId, state: DomainState) {
        if self.in_doubt(home, cx.now) {
            return;
        }
        let vm = self.vm(id);
        let over = *vm.pause_over.get_or_insert(cx.now + LATE);
        match (state, vm.pause_call) {
            (DomainState::Paused { by_io_error: false }, Some(PauseCall::Suspend(_)) | None) => {
                let ticket = cx.domain(DomainOrder::Resume { vm: id }, CALL, Pending::Pause(id));
                // If its own call is not answered yet: the pause that it asked for has shown.
                self.vm(id).pause_call = Some(PauseCall::Resume(ticket));
                self.vm(id).pause_over = Some(cx.now + SHOWN);
            }
            (DomainState::Running | DomainState::ShuttingDown, None) if over <= cx.now => {
                self.set_underway(cx, id, None);
            }
            _ => {}
        }
    }

    /// A stopped VM that libvirt has paused, and a call that waits for its QEMU: most likely somebody resumes it.
    pub(super) fn note_held(&mut self, cx: &mut Cx) {
        let stopped = |state| matches!(state, VmState::Over(Over::Lapsed));
        let held = self.guard.rows.values().filter(|row| row.stopped && stopped(row.state)).filter(|row| {
            let domain = self.libvirt.domains.get(&row.tenure.vm);
            let vm = self.vms.get(&row.tenure.vm);
            domain.is_some_and(|domain| domain.busy && matches!(domain.state, DomainState::Paused { .. }))
                && vm.is_some_and(|vm| vm.pause_call.is_none() && vm.held != Some(row.tenure.generation))
        });
        let held: Vec<_> = held.map(|row| (row.tenure, row.home)).collect();
        for (tenure, home) in held {
            self.vm(tenure.vm).held = Some(tenure.generation);
            let name = self.vm_name(tenure.vm);
            let text =
                format!("{name}: a call of libvirt waits for it (virsh resume?), in vain: {}", self.held_by(home));
            cx.note(Note::warning("vm-resume-held", text).of(&name));
        }
    }

    /// Why a VM that the guard stopped does not go on, for people.
    pub(super) fn held_by(&self, home: DatastoreId) -> String {
        let store = self.store_name(home);
        format!(
            "its lease on datastore {store} lapsed, so the guard holds it until this host has claimed it anew; \
             virsh resume does not lift that"
        )
    }

    /// While something stands, calls that wait for it show only in a list; and a list that lacked something is taken again.
    pub(super) fn look_at_libvirt(&mut self, cx: &mut Cx) {
        let stands = self.guard.rows.values().any(|row| row.stopped && row.pid.is_some());
        if self.libvirt.up && (stands || self.libvirt.partly) {
            self.list_domains(cx);
        }
    }
}
