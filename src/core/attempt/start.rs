//! From the confirmed claim to the VM that runs: late writes are excluded, then libvirt starts it paused, the guard sees
//! it, its vCPUs go.
//!
//! ```text
//!   Fencing ─► Locks ─► Defining ─► Starting ─► Adopting ─► Resuming
//! ```

use super::*;

impl Core {
    /// Fences what the debts of our new claim say, one after another; then the locks, then the start.
    pub(in crate::core) fn pay_debts(&mut self, cx: &mut Cx, id: VmId) {
        let Some(claim) = self.vm(id).claim.clone() else { return };
        let fenced = self.vm(id).fenced.clone();
        let mut lock = false;
        for debt in claim.debts.iter().filter(|debt| !self.is_paid(debt) && !fenced.contains(debt)) {
            match self.late_write(debt) {
                LateWrite::Command { .. } if self.runs_vms_on(debt.datastore, debt.host, cx.now) => {
                    let host = self.name_of(debt.host);
                    let what = format!("a storage fence against {host}, which would hit the VMs that run there");
                    return self.wait(cx, id, RETRY * 2, what);
                }
                LateWrite::Command { program } => {
                    let name = self.name_of(debt.host);
                    let ticket = cx.fence(program, debt.host, name, CALL, Pending::Attempt(id));
                    return self.stage(id, Stage::Fencing(*debt), ticket);
                }
                LateWrite::Lock => lock = true,
                LateWrite::Accepted => {}
                LateWrite::Open => {
                    let host = self.name_of(debt.host);
                    return self.wait(
                        cx,
                        id,
                        RETRY * 4,
                        format!("a new boot of {host}, or proof that it is off: nothing else excludes its late writes"),
                    );
                }
            }
        }
        if lock { self.probe_locks(cx, id, cx.now) } else { self.define(cx, id) }
    }

    pub(in crate::core) fn fenced(&mut self, cx: &mut Cx, id: VmId, debt: Debt, result: Result<(), String>) {
        let host = self.name_of(debt.host);
        match result {
            Ok(()) => {
                self.vm(id).fenced.push(debt);
                self.pay_debts(cx, id);
            }
            Err(why) => {
                self.wait(
                    cx,
                    id,
                    RETRY * 2,
                    format!("the storage fence against {host}, which failed and is tried again: {why}"),
                );
            }
        }
    }

    pub(in crate::core) fn probe_locks(&mut self, cx: &mut Cx, id: VmId, since: Time) {
        let record = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone());
        let paths: BTreeSet<String> = record
            .iter()
            .flat_map(|record| record.disks.iter())
            .filter(|disk| disk.writable && disk.datastore.is_some())
            .map(|disk| disk.path.clone())
            .collect();
        let ticket = cx.probe_locks(paths.into_iter().collect(), CALL, Pending::Attempt(id));
        self.stage(id, Stage::Locks { since }, ticket);
    }

    pub(in crate::core) fn locks_probed(
        &mut self,
        cx: &mut Cx,
        id: VmId,
        since: Time,
        result: Result<Option<String>, String>,
    ) {
        match result {
            Ok(None) => self.define(cx, id),
            Ok(Some(holder)) => {
                let waited = cx.now.since(since);
                let pause = if waited < Duration::from_secs(120) { RETRY } else { Duration::from_secs(30) };
                if let Some(attempt) = &mut self.vm(id).attempt {
                    attempt.stage = Stage::Locks { since };
                }
                self.wait_in(cx, id, Stage::Locks { since }, pause, format!("the image lock of its old copy ({holder}), held at the storage server until its client's lease ends"));
            }
            Err(why) => self.wait_in(
                cx,
                id,
                Stage::Locks { since },
                RETRY * 2,
                format!("its image locks, which cannot be probed: {why}"),
            ),
        }
    }

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
            cx.note(Note::warning("vm-waits", format!("{name} waits for {what}")).of(&name));
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
        let arrives = self.vm(id).attempt.as_ref().is_some_and(|attempt| attempt.kind == Kind::Arrive);
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) if arrives => self.resume(cx, id),
            DomainAnswer::Done | DomainAnswer::Listed(_) => {
                let name = self.vm_name(id);
                cx.note(Note::info("vm-starting", format!("{name}: libvirt is told to start it")).of(&name));
                self.set_underway(cx, id, Some(Underway::Start));
                let ticket = cx.domain(DomainOrder::StartPaused { vm: id }, CALL, Pending::Attempt(id));
                self.stage(id, Stage::Starting, ticket);
            }
            DomainAnswer::Failed(_) if arrives => self.resume(cx, id), // It runs; the definition is written later.
            DomainAnswer::Failed(why) => self.start_failed(cx, id, why),
        }
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
                let what = format!(
                    "the image lock of its old copy ({holder}), held at the storage server until its client's lease ends"
                );
                self.wait_in(cx, id, Stage::Locks { since: cx.now }, RETRY, what);
            }
            DomainFailure::NoDaemon(why) => {
                self.give_up(cx, id, Denial::Unable(format!("libvirt does not answer: {why}")))
            }
            DomainFailure::NoDomain => self.give_up(cx, id, Denial::Unable("its definition vanished".into())),
            DomainFailure::Host(why) => self.give_up(cx, id, Denial::Host(why)),
            DomainFailure::Capacity(why) => self.give_up(cx, id, Denial::Capacity(why)),
            DomainFailure::Refused(why) | DomainFailure::Definition(why) => {
                self.give_up(cx, id, Denial::Definition(why))
            }
            DomainFailure::Timeout => {
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Unable("libvirt did not answer in time".into()));
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
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Unable("it ended, or its lease lapsed, during the start".into()));
            }
            (Some(VmState::Expected | VmState::Incoming) | None, _) => {}
        }
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
            .is_some_and(|domain| domain.state == DomainState::Paused { by_io_error: false });
        if paused { self.resume(cx, id) } else { self.finish(cx, id) }
    }

    pub(in crate::core) fn resumed(&mut self, cx: &mut Cx, id: VmId, answer: DomainAnswer) {
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => self.finish(cx, id),
            DomainAnswer::Failed(why) => {
                let reclaim =
                    self.vm(id).attempt.as_ref().is_some_and(|attempt| matches!(attempt.kind, Kind::Reclaim { .. }));
                if reclaim {
                    return self.finish(cx, id); // It runs under its claim; reconcile looks at the pause again.
                }
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Definition(format!("it could not be resumed: {why:?}")));
            }
        }
    }
}
