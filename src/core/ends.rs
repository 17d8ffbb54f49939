//! Ends: a VM of this host does not run any more. What people, the guest or a fault wanted, and what follows.
//!
//! ```text
//!   a person, the guest ──► Release, wanted stopped          a signal, a crash, a panic ──► Run in place (3 per hour),
//!   this host goes down ──► Release, wanted running                                         then Release, wanted running
//! ```

use std::time::Duration;

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Timer};
use super::note::Note;
use crate::types::vm::{DomainInfo, DomainState, OffReason, Underway};
use crate::types::{Claim, ClaimReason, Over, Proof, VmId, VmState, Wanted};

/// How long an end waits for libvirt's reason before it counts as a crash.
const REASON_LIMIT: Duration = Duration::from_millis(1500);
/// Window of the restart limit.
const HOUR: Duration = Duration::from_secs(3600);

impl Core {
    /// A VM of ours is not running any more: what people, or the guest, or a fault wanted.
    pub(super) fn judge_end(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) {
        if claim.wanted == Wanted::Stopped {
            return;
        }
        let Some(reason) = self.end_reason(cx, id) else { return };
        match self.underway.get(&id).copied() {
            Some(Underway::Move { to }) if reason == OffReason::Migrated => {
                return self.take_up_move(cx, id, claim.tenure, to);
            }
            Some(Underway::Start) if self.vm(id).late.is_some() => {} // It may still come up, paused.
            Some(Underway::End) => return self.release(cx, id, claim, Wanted::Running, ClaimReason::Isolated),
            // Unless a person has said meanwhile that it is to stop.
            Some(Underway::Yield) if self.vm(id).stopping.is_empty() => {
                return self.release(cx, id, claim, Wanted::Running, ClaimReason::MadeRoom);
            }
            Some(_) => self.set_underway(cx, id, None),
            None => {}
        }
        let by_guest = self.vm(id).by_guest;
        if self.going_down {
            let why = if reason == OffReason::Saved { ClaimReason::Saved } else { ClaimReason::HostWentDown };
            return self.release(cx, id, claim, Wanted::Running, why);
        }
        if self.vm(id).own_end {
            return self.crashed(cx, id, claim, OffReason::Failed);
        }
        match reason {
            // libvirt tells a guest's power-off and `virsh shutdown` alike; the other kind is a signal from outside.
            OffReason::Shutdown if by_guest == Some(true) => {
                self.release(cx, id, claim, Wanted::Stopped, ClaimReason::StoppedInside);
            }
            OffReason::Shutdown if by_guest == Some(false) => self.crashed(cx, id, claim, reason),
            OffReason::Shutdown | OffReason::Destroyed => {
                self.release(cx, id, claim, Wanted::Stopped, ClaimReason::StoppedByPerson);
            }
            OffReason::Migrated if self.drains(id) => {} // Released then.
            OffReason::Saved => self.release(cx, id, claim, Wanted::Stopped, ClaimReason::Saved),
            OffReason::Migrated => {
                let name = self.vm_name(id);
                let text = format!(
                    "{name} was migrated away to a host that took no part in it, so outside the cluster; it is not \
                     restarted here by itself, and nothing keeps a second copy from being started"
                );
                cx.note(Note::alarm("migrated-away", text).of(&name));
                self.release(cx, id, claim, Wanted::Stopped, ClaimReason::MigratedAway);
            }
            OffReason::Crashed
            | OffReason::Failed
            | OffReason::Daemon
            | OffReason::Unknown
            | OffReason::FromSnapshot => {
                self.crashed(cx, id, claim, reason);
            }
        }
    }

    /// libvirt's reason: from its event, else from its list; after a while without either it counts as a crash.
    pub(super) fn end_reason(&mut self, cx: &mut Cx, id: VmId) -> Option<OffReason> {
        let listed = match self.libvirt.domains.get(&id) {
            Some(DomainInfo { state: DomainState::Off(reason), .. }) if *reason != OffReason::Unknown => Some(*reason),
            Some(_) | None => None,
        };
        if let Some(reason) = self.vm(id).ended.map(|(reason, _)| reason).or(listed) {
            self.vm(id).end_seen = None; // The next end has its own time.
            return Some(reason);
        }
        let first = *self.vm(id).end_seen.get_or_insert(cx.now);
        if self.libvirt.up && REASON_LIMIT <= cx.now.since(first) {
            self.vm(id).end_seen = None;
            return Some(OffReason::Unknown);
        }
        if first == cx.now {
            self.list_domains(cx);
        }
        cx.set(Timer::Judge(id), cx.now + REASON_LIMIT / 3);
        None
    }

    pub(super) fn judge_due(&mut self, cx: &mut Cx, id: VmId) {
        self.check = true;
        let _ = (cx, id);
    }

    /// Nobody owns it any more. Waits for the guard's word on its last writes: a claim that leaves them open would have
    /// this host fenced by whoever starts it next.
    pub(super) fn release(&mut self, cx: &mut Cx, id: VmId, claim: &Claim, wanted: Wanted, reason: ClaimReason) {
        if self.drains(id) {
            return;
        }
        self.vm(id).by_guest = None;
        self.begin(cx, id, Kind::Release { wanted, reason }, claim.next_home(), Vec::new());
    }

    /// Its copy has ended here, and the next beat shows whether its writes have landed. The row changes then.
    fn drains(&self, id: VmId) -> bool {
        self.guard.rows.iter().any(|(tenure, row)| tenure.vm == id && row.state == VmState::Over(Over::Draining))
    }

    /// Waits for the guard's word on its last writes, too, which takes a beat: else it would owe them.
    pub(super) fn crashed(&mut self, cx: &mut Cx, id: VmId, claim: &Claim, reason: OffReason) {
        if self.drains(id) {
            return;
        }
        let limit = self.settings.vms.restarts_per_hour as usize;
        let now = cx.now;
        let name = self.vm_name(id);
        let home = claim.next_home();
        let clean = matches!(self.said_over(self.me.host, claim.tenure), Some(Over::Exited { clean: true }));
        // Of a handover the other host's writes count as well.
        let both = self.vms.get(&id).and_then(|vm| self.proof_of(claim, vm.known, now));
        let proof = both.filter(|_| claim.owner().is_none()).unwrap_or(Proof::Said(Over::Exited { clean }));
        let leased = self.guard.leases.get(&home).is_some_and(|lease| lease.until.is_some());
        let vm = self.vm(id);
        vm.restarts.retain(|at| now.since(*at) < HOUR);
        let told = vm.end_told.replace(claim.tenure.generation) == Some(claim.tenure.generation);
        if limit <= vm.restarts.len() {
            let text = format!("{name} ended {limit} times within an hour here; it is started elsewhere");
            if !told {
                cx.note(Note::warning("vm-restart-limit", text).of(&name));
            }
            return self.release(cx, id, claim, Wanted::Running, ClaimReason::StartFailed);
        }
        if !leased {
            vm.end_told = None;
            return; // Tried again when the lease is valid.
        }
        if let Some(disarmed) = self.disarmed() {
            let what = format!("'mainstay cluster arm': {}", super::disarm::text(disarmed));
            self.waits_for(cx, id, what);
            self.vm(id).end_told = None;
            return;
        }
        let vm = self.vm(id);
        vm.end_seen = None;
        let text = format!("{name} ended by itself ({reason:?}); it is restarted in place");
        if !told {
            cx.note(Note::warning("vm-crashed", text).of(&name));
        }
        let kind = Kind::Run { proof, reason: ClaimReason::Crashed };
        self.begin(cx, id, kind, home, Vec::new());
    }
}
