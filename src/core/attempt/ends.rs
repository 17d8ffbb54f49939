//! How an attempt ends: done, released, failed before a claim, given up after one; and its timer.

use super::*;

/// libvirt's end of a stopped QEMU has come by then, or not at all.
const DESTROYS: Duration = Duration::from_secs(12);
/// The guard has ended a QEMU by then; one that hangs in its storage keeps claim and row, and is looked at again.
const BARRING: Duration = Duration::from_secs(20);

impl Core {
    pub(in crate::core) fn finish(&mut self, cx: &mut Cx, id: VmId) {
        cx.unset(Timer::Attempt(id));
        let Some(attempt) = self.vm(id).attempt.take() else { return };
        // A copy that was half started when its lease lapsed may show its pause later: it is taken up then.
        // One that was told to end, as this host is isolated or others need its room, is released when it has.
        let stays = match self.underway.get(&id) {
            Some(Underway::Start) => attempt.has_copy(),
            Some(Underway::End | Underway::Yield) => !matches!(attempt.kind, Kind::Release { .. }),
            Some(Underway::Move { .. } | Underway::Pause) | None => false,
        };
        if !stays {
            self.end_underway(cx, id);
        }
        let name = self.vm_name(id);
        self.waits_no_more(cx, id);
        let vm = self.vm(id);
        if let Kind::Run { reason: ClaimReason::Crashed, .. } = attempt.kind {
            vm.restarts.push(cx.now);
        }
        if let Kind::Run { .. } = attempt.kind {
            vm.tries = Default::default();
        }
        if !(attempt.may_wait() || attempt.kind == Kind::Settle && attempt.crosses()) {
            vm.ended = None; // Else it ran all the time, and may have ended meanwhile.
        }
        vm.incoming = None;
        let generation = attempt.claim.as_ref().map(|claim| claim.tenure.generation).unwrap_or_default();
        let (kind, text) = self.done_text(&attempt, &name, cx.now);
        if !text.is_empty() {
            cx.note(Note::info(kind, text).of(&name));
        }
        for ask in attempt.asks {
            match (&attempt.kind, &attempt.claim) {
                (Kind::HandOver { .. }, Some(claim)) => cx.answer(ask, Reply::Claimed(Box::new(claim.clone()))),
                _ => cx.answer(ask, Reply::Ran { generation }),
            }
        }
        self.check = true;
        self.look = true;
        self.tell = true;
    }

    /// Kind and text of the note that says what an attempt has done.
    fn done_text(&self, attempt: &Attempt, name: &str, now: Time) -> (&'static str, String) {
        let generation = attempt.claim.as_ref().map(|claim| claim.tenure.generation).unwrap_or_default();
        let took = now.since(attempt.since).as_secs_f64();
        let home = || self.store_name(attempt.home);
        match &attempt.kind {
            Kind::Hook { .. } => ("vm-started", format!("{name} was started by a person (generation {generation})")),
            Kind::Run { reason, .. } => {
                let reason = crate::core::vms::reason_text(*reason);
                ("vm-started", format!("{name} runs here: {reason} (generation {generation}, {took:.2} s)"))
            }
            Kind::Adopt => ("vm-protected", format!("{name} is protected (generation {generation})")),
            Kind::Reclaim { .. } => {
                ("vm-reclaimed", format!("{name} goes on after its lease had lapsed (generation {generation})"))
            }
            Kind::Arrive => ("vm-arrived", format!("{name} runs here: moved (generation {generation})")),
            Kind::Settle if self.came_here(attempt.before.as_ref()) => {
                ("vm-settled", format!("{name} runs here: migrated by a person (generation {generation})"))
            }
            Kind::Settle if attempt.crosses() => {
                ("vm-home", format!("{name}: its home is datastore {} now (generation {generation})", home()))
            }
            Kind::Settle => {
                ("vm-settled", format!("{name} goes on here: it was not migrated away (generation {generation})"))
            }
            Kind::Leave { to } => {
                let (from, to) = (home(), self.store_name(*to));
                let text = format!(
                    "{name}: its disks lie on datastore {to} now, and its home moves there from {from} (generation \
                     {generation})"
                );
                ("vm-home", text)
            }
            Kind::HandOver { to } => {
                let to = self.name_of(to.host);
                let text = format!("generation {generation} hands it to {to}, which runs it after libvirt's switch");
                ("vm-handover", format!("{name}: {text}"))
            }
            Kind::Change if attempt.before.as_ref().is_some_and(|before| before.record == attempt.digest) => {
                ("vm-change", format!("{name} is claimed anew (generation {generation})"))
            }
            Kind::Change => {
                ("vm-change", format!("{name}: its changed definition is recorded (generation {generation})"))
            }
            Kind::Release { .. } => ("vm-released", String::new()),
        }
    }

    pub(in crate::core) fn released(&mut self, cx: &mut Cx, id: VmId) {
        let name = self.vm_name(id);
        let Some(claim) = self.vm(id).claim.clone() else { return };
        let rows: Vec<Tenure> = self.guard.rows.keys().filter(|row| row.vm == id).copied().collect();
        for tenure in rows {
            self.forget(cx, tenure);
        }
        let stopping = std::mem::take(&mut self.vm(id).stopping);
        for ask in stopping {
            cx.answer(ask, Reply::Done);
        }
        let text = format!("{name} is released (generation {}): {}", claim.tenure.generation, self.holder_text(&claim));
        cx.note(Note::info("vm-released", text).of(&name));
        let denial = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.waits.clone());
        let asks = self.vm(id).attempt.as_ref().map(|attempt| attempt.asks.clone()).unwrap_or_default();
        for ask in asks {
            cx.answer(ask, denial.clone().map_or(Reply::Done, |why| Reply::Denied(Denial::Host(why))));
        }
        self.vm(id).attempt = None;
        self.check = true;
        self.look = true;
        self.tell = true;
    }

    /// Nothing was claimed: answer and end. What should go on is begun again by `reconcile` or by the master.
    pub(in crate::core) fn fail(&mut self, cx: &mut Cx, id: VmId, denial: Denial) {
        cx.unset(Timer::Attempt(id));
        let me = self.me.host;
        let name = self.vm_name(id);
        let Some(attempt) = self.vm(id).attempt.take() else { return };
        if attempt.may_wait() {
            return self.change_failed(cx, id, &attempt.kind, &denial.to_string());
        }
        self.waits_for(cx, id, denial.to_string());
        let vm = self.vm(id);
        vm.pause = cx.now + RETRY;
        let beaten = matches!(denial, Denial::OwnedBy { .. } | Denial::Superseded { .. });
        if let (Kind::Run { .. }, false) = (&attempt.kind, beaten) {
            self.start_failed_on(cx.now, id, me, &denial);
        }
        match &attempt.kind {
            Kind::Hook { ask } => cx.hook_answer(*ask, Err(refusal_text(&name, &denial))),
            Kind::Release { .. } | Kind::Reclaim { .. } | Kind::Adopt | Kind::Settle | Kind::HandOver { .. } => {
                // The retry is a matter of milliseconds after a heal; the beat's reconcile is the fallback.
                cx.set(Timer::Judge(id), cx.now + RETRY);
            }
            Kind::Run { .. } | Kind::Change | Kind::Leave { .. } => {}
            Kind::Arrive => {
                self.set_underway(cx, id, None);
                self.drop_incoming(cx, id);
            }
        }
        // Denied would mean that no claim hands it over; one that was tried may.
        let tried = matches!(attempt.kind, Kind::HandOver { .. }) && attempt.claim.is_some();
        for ask in attempt.asks {
            cx.answer(ask, if tried { Reply::Done } else { Reply::Denied(denial.clone()) });
        }
        self.look = true;
        self.tell = true;
    }

    /// Something failed after the claim was created: bar the row, then g+2 "none, wanted as before".
    pub(in crate::core) fn give_up(&mut self, cx: &mut Cx, id: VmId, denial: Denial) {
        cx.unset(Timer::Attempt(id));
        let name = self.vm_name(id);
        if let (Denial::Storage(_), Some(Kind::Run { .. })) = (&denial, self.vm(id).attempt.as_ref().map(|a| &a.kind)) {
            self.watch_access(cx.now, id);
        }
        let Some(attempt) = self.vm(id).attempt.take() else { return };
        if attempt.kind != Kind::Arrive {
            self.end_underway(cx, id); // A copy that has arrived stands paused: whoever claims it lets it go on.
        }
        let claim = attempt.claim.clone().expect("given up only after a claim");
        if attempt.may_wait() {
            return self.change_failed(cx, id, &attempt.kind, &denial.to_string()); // Should it have lapsed, it is re-claimed.
        }
        cx.note(Note::warning("vm-start-failed", format!("{name}: not started here: {denial}")).of(&name));
        if let Kind::Hook { ask } = &attempt.kind {
            cx.hook_answer(*ask, Err(refusal_text(&name, &denial)));
        }
        for ask in &attempt.asks {
            let hands_over = matches!(attempt.kind, Kind::HandOver { .. });
            cx.answer(*ask, if hands_over { Reply::Done } else { Reply::Denied(denial.clone()) });
        }
        if attempt.has_copy() {
            // The copy is alive and stopped by the guard: the next try claims the next generation.
            self.waits_for(cx, id, denial.to_string());
            self.vm(id).incoming = None;
            cx.set(Timer::Judge(id), cx.now + RETRY);
            self.check = true;
            return;
        }
        if let Kind::Run { .. } = &attempt.kind {
            let me = self.me.host;
            self.start_failed_on(cx.now, id, me, &denial);
        }
        let wanted = match &attempt.kind {
            Kind::Hook { .. } => attempt.before.as_ref().map_or(Wanted::Stopped, |before| before.wanted),
            _ => Wanted::Running,
        };
        self.vm(id).attempt = Some(Attempt { asks: Vec::new(), waits: None, ..attempt });
        cx.set(Timer::Attempt(id), cx.now + BARRING);
        self.bar(cx, id, claim.tenure, wanted);
    }

    fn bar(&mut self, cx: &mut Cx, id: VmId, tenure: Tenure, wanted: Wanted) {
        let ticket = cx.guard(GuardOrder::Abandon { tenure }, Pending::Attempt(id));
        self.stage(id, Stage::Barring { wanted }, ticket);
    }

    /// Another guard, which was asked for nothing yet.
    pub(in crate::core) fn bar_again(&mut self, cx: &mut Cx) {
        let given_up = |(id, vm): (&VmId, &crate::core::vms::Vm)| {
            let attempt = vm.attempt.as_ref()?;
            let Stage::Barring { wanted } = attempt.stage else { return None };
            Some((*id, attempt.claim.as_ref()?.tenure, wanted))
        };
        let again: Vec<(VmId, Tenure, Wanted)> = self.vms.iter().filter_map(given_up).collect();
        again.into_iter().for_each(|(id, tenure, wanted)| self.bar(cx, id, tenure, wanted));
    }

    /// The guard has barred the row of what was given up; or it refuses, since a QEMU runs under it already: libvirt has
    /// not answered, or has lost it, but got that far. Its guest has not moved yet, and never will.
    pub(in crate::core) fn barred(&mut self, cx: &mut Cx, id: VmId, wanted: Wanted, result: Result<(), Refusal>) {
        let Some(claim) = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()?.claim.clone()) else { return };
        if result.is_err() {
            cx.guard(GuardOrder::Discard { tenure: claim.tenure }, Pending::Nothing);
        }
        self.stage(id, Stage::Barring { wanted }, Ticket(0));
        self.barring(cx, id);
    }

    /// Called whenever the row changed: goes on as soon as the QEMU has ended, and the guard has said how.
    pub(in crate::core) fn barring(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()) else { return };
        let (Stage::Barring { wanted }, Ticket(0), Some(claim)) = (&attempt.stage, attempt.ticket, &attempt.claim)
        else {
            return;
        };
        let (wanted, claim) = (*wanted, claim.clone());
        let over = self.guard.rows.get(&claim.tenure).is_none_or(|row| match row.state {
            VmState::Over(Over::Draining) => false,
            VmState::Over(_) => row.pid.is_none(),
            VmState::Expected | VmState::Running | VmState::Incoming => false,
        });
        if !over {
            return;
        }
        self.leave_barring(cx, id);
        if self.vm(id).tenure() == Some(claim.tenure) {
            let kind = Kind::Release { wanted, reason: ClaimReason::StartFailed };
            self.begin(cx, id, kind, claim.home, Vec::new());
        } // Else somebody has claimed it since: nothing of ours is left to be released.
    }

    /// What becomes of row and claim is seen by the next look at them, as after a restart of this agent.
    fn leave_barring(&mut self, cx: &mut Cx, id: VmId) {
        cx.unset(Timer::Attempt(id));
        self.vm(id).attempt = None;
        self.check = true;
    }

    /// The guard is gone: what it was asked will not be answered.
    pub(in crate::core) fn guard_answers_no_more(&mut self, cx: &mut Cx) {
        let asked = |vm: &crate::core::vms::Vm| {
            vm.attempt
                .as_ref()
                .map(|attempt| attempt.stage.clone())
                .filter(|stage| matches!(stage, Stage::Expecting | Stage::Confirming))
        };
        let stuck: Vec<(VmId, Stage)> =
            self.vms.iter().filter_map(|(id, vm)| asked(vm).map(|stage| (*id, stage))).collect();
        for (id, stage) in stuck {
            let denial = Denial::Unable("the guard was restarted meanwhile".into());
            if stage == Stage::Expecting { self.fail(cx, id, denial) } else { self.give_up(cx, id, denial) }
        }
    }

    /// The attempt's timer: a retry, or the end of patience.
    pub(in crate::core) fn attempt_due(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.clone()) else { return };
        if matches!(attempt.stage, Stage::Waiting | Stage::Sighting(_) | Stage::Locks { .. }) && !self.stands(&attempt)
        {
            return self.give_up(
                cx,
                id,
                Denial::Unable("its lease lapsed, or it was claimed anew, while it waited".into()),
            );
        }
        match attempt.stage {
            Stage::Waiting => self.pay_debts(cx, id),
            Stage::Sighting(debt) if self.looked_at_debtor(&debt, attempt.fence_after, cx.now) => {
                self.pay_debts(cx, id)
            }
            Stage::Sighting(debt) => {
                cx.set(Timer::Read(debt.datastore), cx.now);
                let (host, store) = (self.name_of(debt.host), self.store_name(debt.datastore));
                let what = format!("a look at {store}, before the storage fence against {host}");
                self.wait_in(cx, id, Stage::Sighting(debt), RETRY, what);
            }
            Stage::Locks { since } => self.probe_locks(cx, id, since),
            Stage::Adopting if attempt.ticket == Ticket(0) => self.look_for_qemu(cx, id, &attempt),
            Stage::Adopting => self.never_appeared(cx, id), // Nor has the guard answered.
            Stage::Resuming if attempt.ticket == Ticket(0) => self.resume_again(cx, id, &attempt),
            Stage::Barring { .. } => self.leave_barring(cx, id),
            Stage::Confirming
            | Stage::Fencing(_)
            | Stage::Freeing { .. }
            | Stage::Defining
            | Stage::Starting
            | Stage::Resuming => {}
            Stage::Claiming if attempt.has_copy() => self.claim_again(cx, id, &attempt),
            Stage::Reading
            | Stage::LookingBack
            | Stage::Twins
            | Stage::Recording
            | Stage::FetchingRecord
            | Stage::Expecting
            | Stage::Claiming => {
                // The hook's patience ends; a claim that lands later is freed by the guard's word.
                if let Some(claim) = &attempt.claim {
                    self.abandon(cx, claim.tenure, &attempt.kind);
                    cx.set(Timer::Relist, cx.now + LANDED);
                }
                self.fail(cx, id, Denial::Unable("the datastore does not answer in time".into()));
            }
        }
    }

    /// The same claim, with the same nonce, as long as its row stands.
    pub(in crate::core) fn claim_again(&mut self, cx: &mut Cx, id: VmId, attempt: &Attempt) {
        let Some(claim) = &attempt.claim else { return };
        let state = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        if state != Some(VmState::Expected) {
            self.list_claims(cx);
            return self.fail(cx, id, Denial::Unable("its lease lapsed before its claim could be created".into()));
        }
        if let Some(newest) = self.vms.get(&id).and_then(|vm| vm.claim.clone())
            && claim.tenure.generation <= newest.tenure.generation
            && claim.nonce != newest.nonce
        {
            self.abandon(cx, claim.tenure, &attempt.kind);
            return self.lost_to(cx, id, &newest);
        }
        // A host that was fenced may still read what it cannot write: whose the VM is by now.
        self.list_claims(cx);
        let after = attempt.after();
        self.ask_store(cx, id, Stage::Claiming, StoreOrder::CreateClaim { claim: Box::new(claim.clone()), after });
    }

    /// Our own end of a half-started copy: not a person's. One that the guard has stopped takes libvirt ten seconds, and is
    /// not claimed anew meanwhile, only to be hit by that end.
    pub(in crate::core) fn destroy(&mut self, cx: &mut Cx, id: VmId) {
        self.vm(id).own_end = true;
        if self.guard.rows.iter().any(|(tenure, row)| tenure.vm == id && row.stopped) {
            self.vm(id).pause = cx.now + DESTROYS;
        }
        cx.domain(DomainOrder::Destroy { vm: id }, CALL, Pending::Nothing);
    }

    /// Its right to run may have ended meanwhile.
    fn resume_again(&mut self, cx: &mut Cx, id: VmId, attempt: &Attempt) {
        let row = attempt.claim.as_ref().and_then(|claim| self.guard.rows.get(&claim.tenure));
        if row.is_some_and(|row| row.state == VmState::Running) {
            return self.resume(cx, id);
        }
        self.destroy(cx, id);
        self.give_up(cx, id, Denial::Unable("it ended, or its lease lapsed, before it was resumed".into()));
    }

    /// Whether the guard still expects what this attempt has claimed.
    fn stands(&self, attempt: &Attempt) -> bool {
        let Some(claim) = &attempt.claim else { return true };
        let newest = self.vms.get(&claim.tenure.vm).and_then(crate::core::vms::Vm::tenure);
        let state = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        newest == Some(claim.tenure) && state == Some(VmState::Expected)
    }
}
