//! Storage fences and hosts that come back in that very moment.
//!
//! ```text
//!   taker   claims v, which owes late writes of h on D ──► reads D whole ──► h shows nothing new ──► fences h on D
//!   h       its beat lies on D again ──► reads the claims of what it held ──► none of another owes its writes ──► its VMs go on
//! ```
//!
//! One of the two sees the other: if the read, which begins when the claim stands, does not show h's beat, then that came later, and
//! what h reads after it shows the claim. Then h's other VMs stand until that claim is followed by one that owes nothing, or for as
//! long as such a fence can be under way: the next try of the taker sees the beat. An agent that stood for a while is bound by the same
//! rule: it knows of nothing that has booted and been started since.
//!
//! Deliberately not here: fences and VMs with several datastores (a VM whose home is another one is held back by nothing), VMs that are
//! started there meanwhile by order or by hand, and what a host fenced for good may still do.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::attempt::Stage;
use super::cx::{Cx, Pending, Timer};
use super::proofs::LateWrite;
use crate::types::store::{ClaimsOf, StoreAnswer, StoreOrder};
use crate::types::{DatastoreId, Debt, Time, VmId};

/// The longest run of a fence program.
pub(super) const FENCE_LIMIT: Duration = Duration::from_secs(20);
/// Whoever waits for another's fence looks again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// A lease on one datastore that became valid.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Return {
    /// Then, as far as this agent knows: its beat was there before.
    since: Time,
    /// The claims of what it held were read since.
    looked: bool,
    /// When they were last asked for; none while an answer is due.
    asked: Option<Time>,
}

impl Core {
    /// Its lease there is valid, and was not before.
    pub(super) fn came_back(&mut self, cx: &mut Cx, id: DatastoreId) {
        self.returns.insert(id, Return { since: cx.now, looked: false, asked: Some(Time::ZERO) });
        self.look_what_was_taken(cx, id);
    }

    /// Reads the claims of all that this host has held, or owes late writes of.
    fn look_what_was_taken(&mut self, cx: &mut Cx, id: DatastoreId) {
        let me = self.me.host;
        let row = |vm: VmId| self.guard.rows.keys().any(|tenure| tenure.vm == vm);
        let held = self.vms.iter().filter(|(vm, state)| {
            let claimed = |claim: &crate::types::Claim| {
                claim.names(me) || claim.maker == me || claim.debts.iter().any(|debt| debt.host == me)
            };
            state.claim.as_ref().is_some_and(claimed) || row(**vm)
        });
        let held: Vec<VmId> = held.map(|(vm, _)| *vm).collect();
        let within = self.settings.timing.lease;
        let rested = |back: &&mut Return| back.asked.is_some_and(|at| at + AGAIN <= cx.now);
        let Some(back) = self.returns.get_mut(&id).filter(rested) else { return };
        if held.is_empty() {
            back.looked = true;
            return;
        }
        back.asked = None;
        cx.store(id, StoreOrder::ReadClaims(ClaimsOf::Vms(held)), within, Pending::Taken(id));
    }

    pub(super) fn taken_looked(&mut self, cx: &mut Cx, id: DatastoreId, answer: StoreAnswer) {
        let Some(back) = self.returns.get_mut(&id) else { return };
        back.asked = Some(cx.now);
        if let StoreAnswer::Claims { began, ended, claims, .. } = answer {
            back.looked |= back.since <= began;
            claims.into_iter().for_each(|claim| self.learn(cx, claim, ended));
            self.check = true; // Else it is asked for again in a moment: a path that fails at once is not to be hammered.
        }
    }

    /// Claims of a whole datastore were read.
    pub(super) fn all_looked(&mut self, id: DatastoreId, began: Time) {
        if let Some(back) = self.returns.get_mut(&id) {
            back.looked |= back.since <= began;
        }
    }

    /// Whether another may be about to fence this host on a datastore, where it has just come back; looks again if so.
    pub(super) fn may_be_fenced(&mut self, cx: &mut Cx, home: DatastoreId, but: VmId) -> bool {
        let Some(back) = self.returns.get(&home).copied() else { return false };
        let timing = self.settings.timing;
        if back.since + timing.lease + timing.suspect + FENCE_LIMIT <= cx.now {
            return false;
        }
        if !back.looked {
            self.look_what_was_taken(cx, home);
            return true;
        }
        let me = self.me.host;
        let fences = |debt: &Debt| {
            debt.host == me && debt.datastore == home && matches!(self.late_write(debt), LateWrite::Command { .. })
        };
        let taken = self.vms.iter().any(|(vm, state)| {
            let claim = state.claim.as_ref().filter(|_| *vm != but);
            let by_another = claim.filter(|claim| claim.owner().is_some_and(|owner| owner.host != me));
            by_another.is_some_and(|claim| claim.debts.iter().any(fences))
        });
        if taken {
            self.look_what_was_taken(cx, home);
        }
        taken
    }

    /// Whether a complete read that began at `after` or later shows what the debtor does.
    pub(super) fn looked_at_debtor(&self, debt: &Debt, after: Time, now: Time) -> bool {
        let began = self.stores.get(&debt.datastore).map(super::storage::Store::read_began);
        began.is_some_and(|began| after <= began) && self.reads_well(debt.datastore, now)
    }

    /// A complete read has come: fences that waited for it.
    pub(super) fn look_at_fences(&self, cx: &mut Cx, id: DatastoreId) {
        let waits = |vm: &super::vms::Vm| {
            let stage = vm.attempt.as_ref().map(|attempt| &attempt.stage);
            matches!(stage, Some(Stage::Sighting(debt)) if debt.datastore == id)
        };
        let waiting: Vec<VmId> = self.vms.iter().filter(|(_, vm)| waits(vm)).map(|(vm, _)| *vm).collect();
        waiting.into_iter().for_each(|vm| cx.set(Timer::Attempt(vm), cx.now));
    }
}
