//! From the confirmed claim to the VM that runs: late writes are excluded, then libvirt starts it paused, the guard sees
//! it, its vCPUs go.
//!
//! ```text
//!   Fencing ─► Locks ─► Defining ─► Starting ─► Adopting ─► Resuming
//! ```

use super::*;

impl Core {
    pub(in crate::core) fn wait(&mut self, cx: &mut Cx, id: VmId, pause: Duration, what: String) {
        self.wait_in(cx, id, Stage::Waiting, pause, what);
    }

    /// Keeps claim and row while something outside is waited for.
    pub(in crate::core) fn wait_in(&mut self, cx: &mut Cx, id: VmId, stage: Stage, pause: Duration, what: String) {
        let name = self.vm_name(id);
        let Some(attempt) = &mut self.vm(id).attempt else { return };
        let new = attempt.waits.as_ref() != Some(&what);
        attempt.waits = Some(what.clone());
        attempt.stage = stage;
        attempt.ticket = Ticket(0);
        let (claim, epoch) = (attempt.claim.clone(), attempt.epoch);
        if let Some(claim) = claim {
            let order = GuardOrder::Claimed { tenure: claim.tenure, epoch, deadline: cx.now + ROW_DEADLINE };
            cx.guard(order, Pending::Nothing);
        }
        if new {
            let verdict = self.wait_given(cx, id, &what);
            cx.note(Note::warning("vm-waits", format!("{name} waits for {what}")).of(&name).by(verdict));
            self.tell = true;
        }
        cx.set(Timer::Attempt(id), cx.now + pause);
    }

    pub(in crate::core) fn define(&mut self, cx: &mut Cx, id: VmId) {
        let Some(record) = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone()) else {
            return self.give_up(cx, id, Denial::Unable("its record is not known".into()));
        };
        let ticket = cx.domain(DomainOrder::Define { xml: record.xml }, CALL, Pending::Attempt(id));
        self.stage(id, Stage::Defining, ticket);
    }

    pub(in crate::core) fn defined(&mut self, cx: &mut Cx, id: VmId, answer: DomainAnswer) {
        let kind = self.vm(id).attempt.as_ref().map(|attempt| attempt.kind.clone());
        let record = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone());
        if let (DomainAnswer::Done | DomainAnswer::Listed(_), Some(record)) = (&answer, record) {
            self.define_record(cx.now, id, Ok(record)); // A list made while it starts does not show it.
        }
        let arrives = kind == Some(Kind::Arrive);
        match answer {
            _ if kind == Some(Kind::Settle) => self.finish(cx, id), // It runs, whether it could be written or not.
            DomainAnswer::Done | DomainAnswer::Listed(_) if arrives => self.resume(cx, id),
            DomainAnswer::Done | DomainAnswer::Listed(_) => {
                let before = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.before.clone());
                let restores = self.restores(id, before.as_ref());
                self.start_paused(cx, id, restores);
            }
            DomainAnswer::Failed(_) if arrives => self.resume(cx, id), // It runs; the definition is written later.
            DomainAnswer::Failed(why) => self.start_failed(cx, id, why),
        }
    }

    /// From its saved image, or by a boot; then an image that lies here is discarded.
    fn start_paused(&mut self, cx: &mut Cx, id: VmId, restores: bool) {
        let name = self.vm_name(id);
        let image = self.libvirt.domains.get(&id).is_some_and(|domain| domain.managed_save);
        let (order, what) = if restores {
            (DomainOrder::RestorePaused { vm: id }, "libvirt is told to restore its saved memory")
        } else {
            (DomainOrder::StartPaused { vm: id }, "libvirt is told to start it")
        };
        if image && !restores {
            let text = format!("{name}: the saved image here is discarded: it ran since, and its disks are newer");
            cx.note(Note::warning("saved-image", text).of(&name));
        }
        cx.note(Note::info("vm-starting", format!("{name}: {what}")).of(&name));
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.restores = restores;
        }
        self.set_underway(cx, id, Some(Underway::Start));
        let ticket = cx.domain(order, CALL, Pending::Attempt(id));
        self.stage(id, Stage::Starting, ticket);
    }

    pub(in crate::core) fn started_paused(&mut self, cx: &mut Cx, id: VmId, answer: DomainAnswer) {
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => self.await_adoption(cx, id),
            DomainAnswer::Failed(why) => self.start_failed(cx, id, why),
        }
    }

    pub(in crate::core) fn start_failed(&mut self, cx: &mut Cx, id: VmId, why: DomainFailure) {
        match why {
            DomainFailure::ImageLocked(holder) => {
                let what = self.lock_text(id, &holder, Duration::ZERO);
                self.wait_in(cx, id, Stage::Locks { since: cx.now }, RETRY, what);
            }
            DomainFailure::NoDaemon(why) => {
                self.start_is_late(id);
                self.give_up(cx, id, Denial::Unable(format!("libvirt does not answer: {why}")));
                self.set_underway(cx, id, Some(Underway::Start)); // Should it come up after all, it stands paused.
            }
            DomainFailure::NoDomain => self.give_up(cx, id, Denial::Unable("its definition vanished".into())),
            DomainFailure::Host(why) => self.give_up(cx, id, Denial::Host(why)),
            DomainFailure::Capacity(why) => self.give_up(cx, id, Denial::Capacity(why)),
            DomainFailure::Storage(why) => self.give_up(cx, id, Denial::Storage(why)),
            DomainFailure::Busy(why) => self.give_up(cx, id, Denial::Unable(why)),
            // The hook saw an image of another generation.
            DomainFailure::Refused(_) if self.vm(id).attempt.as_ref().is_some_and(|attempt| attempt.restores) => {
                self.start_paused(cx, id, false);
            }
            // By this host's own hook: its agent was slow, or its lease has gone meanwhile.
            DomainFailure::Refused(why) => self.give_up(cx, id, Denial::Unable(why)),
            DomainFailure::Definition(why) => self.give_up(cx, id, Denial::Definition(why)),
            DomainFailure::Timeout => {
                self.start_is_late(id);
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Unable("libvirt did not answer in time".into()));
                self.set_underway(cx, id, Some(Underway::Start)); // Should it come up after all, it stands paused.
            }
        }
    }

    pub(in crate::core) fn await_adoption(&mut self, cx: &mut Cx, id: VmId) {
        self.stage(id, Stage::Adopting, Ticket(0));
        cx.set(Timer::Attempt(id), cx.now + ADOPT_LIMIT);
        self.adoption(cx, id);
    }

    /// Called whenever the row changed: goes on as soon as the guard has the QEMU.
    pub(in crate::core) fn adoption(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.clone()) else { return };
        if attempt.stage != Stage::Adopting {
            return;
        }
        let Some(claim) = &attempt.claim else { return };
        let state = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        match (state, &attempt.kind) {
            (Some(VmState::Running), Kind::Hook { .. }) => self.finish(cx, id),
            (Some(VmState::Running), _) => self.resume(cx, id),
            (Some(VmState::Over(_)), _) => {
                if matches!(attempt.kind, Kind::Hook { .. }) || attempt.ticket != Ticket(0) {
                    self.start_is_late(id); // libvirt was let go on, and its QEMU may still come up.
                }
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Unable("it ended, or its lease lapsed, during the start".into()));
            }
            (Some(VmState::Expected | VmState::Incoming) | None, _) => {}
        }
    }

    /// Its time is over. This agent may have been held meanwhile, and have heard nothing: the guard bars what it has not seen, and says
    /// so of what it has.
    pub(in crate::core) fn look_for_qemu(&mut self, cx: &mut Cx, id: VmId, attempt: &Attempt) {
        let Some(claim) = &attempt.claim else { return };
        let ticket = cx.guard(GuardOrder::Abandon { tenure: claim.tenure }, Pending::Attempt(id));
        self.stage(id, Stage::Adopting, ticket);
        cx.set(Timer::Attempt(id), cx.now + LOOKS);
    }

    pub(in crate::core) fn looked_for_qemu(&mut self, cx: &mut Cx, id: VmId, result: Result<(), Refusal>) {
        let claim = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()?.claim.clone());
        let row = claim.and_then(|claim| self.guard.rows.get(&claim.tenure));
        if result.is_err() && row.is_some_and(|row| row.state == VmState::Running) {
            return self.adoption(cx, id);
        }
        self.never_appeared(cx, id);
    }

    pub(in crate::core) fn never_appeared(&mut self, cx: &mut Cx, id: VmId) {
        self.start_is_late(id);
        self.destroy(cx, id);
        self.give_up(cx, id, Denial::Unable("its QEMU did not appear in time".into()));
    }

    pub(in crate::core) fn resume(&mut self, cx: &mut Cx, id: VmId) {
        let ticket = cx.domain(DomainOrder::Resume { vm: id }, CALL, Pending::Attempt(id));
        self.stage(id, Stage::Resuming, ticket);
    }

    pub(in crate::core) fn lift_late_pause(&mut self, cx: &mut Cx, id: VmId) {
        let paused = self
            .libvirt
            .domains
            .get(&id)
            .is_some_and(|domain| domain.state == DomainState::Paused { by_io_error: false })
            // By this agent in doubt, on arrival, by libvirt at a migration's switch, or by an error of its disk. What a person
            // has paused stays so.
            && (matches!(self.underway.get(&id), Some(Underway::Pause | Underway::Start))
                || self.paused_by_switch(id)
                || self.fails_on_disk(id));
        if paused { self.resume(cx, id) } else { self.finish(cx, id) }
    }

    pub(in crate::core) fn resumed(&mut self, cx: &mut Cx, id: VmId, answer: DomainAnswer) {
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => self.finish(cx, id),
            // libvirtd restarts, or is slow: the copy is well and waits.
            DomainAnswer::Failed(DomainFailure::NoDaemon(_) | DomainFailure::Timeout) => self.resume_later(cx, id),
            // Its images are locked by its other half that is just ending.
            DomainAnswer::Failed(DomainFailure::ImageLocked(_)) if self.is_held(id) => self.resume_later(cx, id),
            DomainAnswer::Failed(why) => {
                let kind = self.vm(id).attempt.as_ref().map(|attempt| attempt.kind.clone());
                if matches!(kind, Some(Kind::Adopt | Kind::Reclaim { .. } | Kind::Settle)) {
                    return self.finish(cx, id); // It runs under its claim; reconcile looks at the pause again.
                }
                self.destroy(cx, id);
                self.give_up(cx, id, not_resumed(why));
            }
        }
    }

    fn resume_later(&mut self, cx: &mut Cx, id: VmId) {
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.ticket = Ticket(0);
        }
        cx.set(Timer::Attempt(id), cx.now + RETRY);
    }

    /// Whether the copy was here before the attempt, so that it must not be thrown away for a failed resume.
    fn is_held(&self, id: VmId) -> bool {
        let kind = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()).map(|attempt| &attempt.kind);
        matches!(kind, Some(Kind::Adopt | Kind::Reclaim { .. } | Kind::Settle))
    }
}

/// Why a start that libvirt has carried out came to nothing.
fn not_resumed(why: DomainFailure) -> Denial {
    let text = format!("it could not be resumed: {why:?}");
    match why {
        DomainFailure::Storage(_) => Denial::Storage(text),
        DomainFailure::Capacity(_) => Denial::Capacity(text),
        DomainFailure::Host(_) | DomainFailure::ImageLocked(_) => Denial::Host(text),
        DomainFailure::Definition(_) => Denial::Definition(text),
        DomainFailure::NoDaemon(_)
        | DomainFailure::NoDomain
        | DomainFailure::Refused(_)
        | DomainFailure::Busy(_)
        | DomainFailure::Timeout => Denial::Unable(text),
    }
}
