//! Late writes: what earlier owners may still have under way is excluded before the VM starts, and that is written down.
//!
//! ```text
//!   claim g+1 with debts ─► look (`returns`), fence each, or wait for the locks ─► claim g+2 without them ─► start
//!                             └── its copy ended cleanly there, a new boot, its own debt: nothing to do
//! ```
//!
//! Why g+2: debts are copied from claim to claim. One that stayed would be fenced again at every later takeover, by
//! then perhaps against a host that is well and runs VMs.

use super::*;
use crate::core::returns::FENCE_LIMIT;
use crate::mutants::{Mutant, planted};
use crate::types::Over;
use crate::types::guard::RowView;

impl Core {
    /// Fences what the debts of our new claim say, one after another; then the locks, then the start.
    pub(in crate::core) fn pay_debts(&mut self, cx: &mut Cx, id: VmId) {
        let Some(claim) = self.vm(id).claim.clone() else { return };
        let fenced = self.vm(id).attempt.as_ref().map(|attempt| attempt.fenced.clone()).unwrap_or_default();
        let after = self.vm(id).attempt.as_ref().map(|attempt| attempt.fence_after).unwrap_or_default();
        let over =
            |host| self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()).is_some_and(|attempt| attempt.ends(host));
        let mut lock = false;
        let hinders = |debt: &&Debt| !self.is_paid(debt) && !self.is_own(debt) && !fenced.contains(debt);
        for debt in claim.debts.iter().filter(hinders) {
            let host = self.name_of(debt.host);
            match self.late_write(debt) {
                _ if planted(Mutant::NoFence) => {}
                _ if self.ended_cleanly(id, debt, cx.now) => return self.paid(cx, id, &[*debt]),
                LateWrite::Command { .. }
                    if self.runs_vms_on(debt.datastore, debt.host, id, over(debt.host), cx.now) =>
                {
                    // The debtor itself need not wait for that: the master asks it.
                    let what = format!("a storage fence against {host} would hit the VMs that run there");
                    return self.give_up(cx, id, Denial::Waiting(what));
                }
                LateWrite::Command { .. } if !self.looked_at_debtor(debt, after, cx.now) => {
                    cx.set(Timer::Read(debt.datastore), cx.now);
                    cx.set(Timer::Attempt(id), cx.now + RETRY);
                    return self.stage_of(id, Stage::Sighting(*debt));
                }
                LateWrite::Command { program } => {
                    let ticket = cx.fence(program, debt.host, host, FENCE_LIMIT, Pending::Attempt(id));
                    return self.stage(id, Stage::Fencing(*debt), ticket);
                }
                LateWrite::Lock => lock = true,
                LateWrite::Accepted => {}
                LateWrite::Open => {
                    let what =
                        format!("a new boot of {host}, or proof that it is off: nothing else excludes its late writes");
                    return self.wait(cx, id, RETRY * 4, what);
                }
            }
        }
        // A new boot shows to everybody that a debt is paid; what a fence or a switch has paid is known here only.
        let here_only = |debt: &Debt| fenced.contains(debt) || self.is_off(debt.host, debt.boot);
        if lock {
            self.probe_locks(cx, id, cx.now);
        } else if claim.debts.iter().any(here_only) {
            self.claim_paid(cx, id);
        } else if self.may_be_locked(id) {
            self.probe_locks(cx, id, cx.now);
        } else {
            self.define(cx, id);
        }
    }

    /// Somebody else has excluded late writes of one of its debtors: what is waited for, or fenced, may be needless now.
    pub(in crate::core) fn look_at_debts_again(&mut self, cx: &mut Cx, id: VmId) {
        self.stage(id, Stage::Waiting, Ticket(0));
        cx.set(Timer::Attempt(id), cx.now);
    }

    pub(in crate::core) fn paid(&mut self, cx: &mut Cx, id: VmId, debts: &[Debt]) {
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.fenced.extend(debts);
        }
        self.pay_debts(cx, id);
    }

    /// The claim without debts. The one before was never started, so the guard says so, and the next generation follows.
    fn claim_paid(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = &mut self.vm(id).attempt else { return };
        let Some(claim) = attempt.claim.take() else { return };
        let tenure = claim.tenure;
        attempt.before = Some(claim);
        attempt.waits = None;
        if let Kind::Run { proof, .. } = &mut attempt.kind {
            *proof = Proof::Said(Over::NeverStarted);
        }
        cx.guard(GuardOrder::Abandon { tenure }, Pending::Nothing);
        self.expect(cx, id);
    }

    /// Debts of the claim that follows `before`: what the way there leaves open.
    pub(in crate::core) fn debts_of_next(&self, id: VmId, attempt: &Attempt, before: &Claim) -> Vec<Debt> {
        let written = match &attempt.record {
            Some(record) => record.written().chain([attempt.home]).collect(),
            None => self.written(id, attempt.home),
        };
        let known = self.vms.get(&id).map(|vm| vm.known).unwrap_or_default();
        let mut debts = match &attempt.kind {
            Kind::Run { proof, .. } => self.debts_after(before, Some(*proof), &written),
            Kind::Arrive => self.debts_after(before, Some(Proof::Said(Over::HandedTo(self.me.host))), &written),
            Kind::Hook { .. } | Kind::Release { .. } => {
                self.debts_after(before, self.proof_of(before, known, known), &written)
            }
            // The same copy goes on.
            Kind::Adopt
            | Kind::Reclaim { .. }
            | Kind::Change
            | Kind::Leave { .. }
            | Kind::HandOver { .. }
            | Kind::Settle => before.debts.iter().copied().filter(|debt| !self.is_paid(debt)).collect(),
        };
        if let Kind::Release { .. } = attempt.kind {
            debts.extend(self.own_debts(id, &written));
        }
        let mut seen = BTreeSet::new();
        debts.retain(|debt| !attempt.fenced.contains(debt) && seen.insert((debt.host, debt.boot, debt.datastore)));
        debts
    }

    /// Writes of a copy on this host that nobody has seen to be done: it is alive, or ended on a path that did not work.
    fn own_debts(&self, id: VmId, written: &BTreeSet<DatastoreId>) -> Vec<Debt> {
        let open = |row: &RowView| {
            row.pid.is_some()
                || matches!(row.state, VmState::Over(Over::Exited { clean: false } | Over::Draining | Over::Lapsed))
        };
        if !self.guard.rows.iter().any(|(tenure, row)| tenure.vm == id && open(row)) {
            return Vec::new();
        }
        let debt = |datastore: &DatastoreId| Debt { host: self.me.host, boot: self.me.boot, datastore: *datastore };
        written.iter().map(debt).collect()
    }

    /// Datastores to which the VM writes, as far as this host knows; its home is always one.
    fn written(&self, id: VmId, home: DatastoreId) -> BTreeSet<DatastoreId> {
        let record = self.vms.get(&id).and_then(|vm| vm.record.as_ref()?.as_ref().ok());
        record.iter().flat_map(|record| record.written()).chain([home]).collect()
    }

    pub(in crate::core) fn fenced(&mut self, cx: &mut Cx, id: VmId, debt: Debt, result: Result<(), String>) {
        match result {
            Ok(()) => self.paid(cx, id, &[debt]),
            Err(why) => {
                if let Some(attempt) = &mut self.vm(id).attempt {
                    attempt.fence_after = cx.now;
                }
                let host = self.name_of(debt.host);
                let what = format!("the storage fence against {host}, which failed and is tried again: {why}");
                self.wait(cx, id, RETRY * 2, what);
            }
        }
    }
}
