//! Proofs that (v, g) is over (design 2): said, rebooted, power off (`power`), lapsed. The only ground on which anybody creates g+1 for a VM
//! that another host owned. Absence, silence on the network, errors and verdicts are no proofs.
//!
//! "Over" says that nothing runs. Writes that the owner's kernel still holds may land later, so a proof that does not
//! exclude them makes a **debt** of the owner (host, boot, datastore), which goes from claim to claim until it is paid:
//!
//! ```text
//!   paid by a new boot of the debtor, or its power switch          its old kernel is gone, and every write in it
//!           a storage fence or a free image lock after the claim   `attempt/debts.rs`; then a claim without it
//!           the debtor's guard: v ran there again, ended cleanly   one kernel keeps its order: the older writes came first
//!   not by  the debtor's own next claim                            it may never start v, and say so: that says nothing
//!                                                                  of what an older copy left behind
//! ```
//!
//! The debtor itself need not wait for its own debt (its kernel puts the new copy's writes behind the old ones), but its
//! claim carries it. A crash on a path that works leaves none: the guard says so within a beat, and the restart in
//! place waits for that.

use std::collections::BTreeSet;

use super::Core;
use super::cx::Cx;
use crate::mutants::{Mutant, planted};
use crate::types::control::MAX_OVER;
use crate::types::settings::LateWrites;
use crate::types::{
    Against, BootId, Claim, DatastoreId, Debt, Holder, HostId, Incarnation, Over, Owner, Proof, StorageFence, Tenure,
    Time, VmState, Wanted,
};

/// What must happen between the claim and the start, because of writes that may still be under way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LateWrite {
    /// Run this storage fence.
    Command { program: String },
    /// Wait for the image locks at the server.
    Lock,
    /// The administrator accepts them.
    Accepted,
    /// Nothing excludes them: only "rebooted" or "power off" will do.
    Open,
}

impl Core {
    /// The best proof that this claim's tenure is over, if there is one now. `known` = when the claim was read.
    pub(super) fn proof_of(&self, claim: &Claim, known: Time, now: Time) -> Option<Proof> {
        match claim.holder {
            Holder::None => Some(Proof::Unowned),
            Holder::Deleted => None,
            // Of one whose home moves: by the lease on the old home, which its owner holds until the next claim stands.
            Holder::Host(owner) | Holder::Moved { owner, .. } => {
                let proof = self.proof_against(owner, claim, known, now);
                // One that is heard speaks for itself.
                let passed = || self.proof_passed(claim).filter(|_| !self.is_heard(owner.host, now));
                proof.or_else(passed)
            }
            Holder::Handover { from, to } => {
                let from = against(self.proof_against(from, claim, known, now)?)?;
                let to = against(self.proof_against(to, claim, known, now)?)?;
                Some(Proof::Both { from, to })
            }
        }
    }

    /// Each owner of a claim, other than this host, against whom there is a proof now. What others have passed on is not among
    /// them. The simulator holds each against what is true.
    pub fn proven(&self, now: Time) -> impl Iterator<Item = (&Claim, Owner, Proof)> {
        let claims = self.vms.values().filter_map(|vm| Some((vm.claim.as_ref()?, vm.known)));
        claims.flat_map(move |(claim, known)| {
            let others = claim.owners().into_iter().filter(|owner| owner.host != self.me.host);
            others.filter_map(move |owner| Some((claim, owner, self.proof_against(owner, claim, known, now)?)))
        })
    }

    /// The best proof that one owner of this claim lets the VM run under it no more.
    pub(super) fn proof_against(&self, owner: Owner, claim: &Claim, known: Time, now: Time) -> Option<Proof> {
        if let Some(over) = self.said_over(owner.host, claim.tenure) {
            return Some(Proof::Said(over));
        }
        if let Some((incarnation, boot)) = self.boot_of(owner.host)
            && owner.incarnation < incarnation
            && (owner.boot != boot || planted(Mutant::RebootWithoutBoot))
        {
            return Some(Proof::Rebooted { boot, incarnation });
        }
        if self.proves_off(&owner, known) {
            return Some(Proof::PowerOff); // Before the lapse: it excludes late writes, too.
        }
        if self.is_heard(owner.host, now) {
            return None; // It speaks for itself; a lapse would be said.
        }
        let window = self.stores.get(&claim.home)?.lapsed(owner.host, known)?;
        Some(Proof::Lapsed { window })
    }

    /// The proof against this very claim that another host has passed on.
    pub(super) fn proof_passed(&self, claim: &Claim) -> Option<Proof> {
        let (nonce, proof) = self.vms.get(&claim.tenure.vm)?.passed?;
        (nonce == claim.nonce).then_some(proof)
    }

    /// For a master that does not reach the home of a VM: what this host's reads prove of its claim.
    pub(super) fn over_for_master(&self, now: Time) -> Vec<(Claim, Proof)> {
        let master = self.master().filter(|master| *master != self.me.host);
        let Some(beat) = master.and_then(|master| self.peers.get(&master)?.beat.as_ref()) else { return Vec::new() };
        // Attestation keeps a lease of a master that cannot read: what it has lost counts as not reached.
        let (reached, lost) = (self.datastores_in(beat.reaches), self.datastores_in(beat.agent.storage_lost));
        let blind = |id: &DatastoreId| !reached.contains(id) || lost.contains(id);
        let homes: Vec<DatastoreId> =
            self.stores.keys().copied().filter(|id| blind(id) && self.reads_well(*id, now)).collect();
        if homes.is_empty() {
            return Vec::new();
        }
        let needed = |claim: &&Claim| {
            let speaks = claim.owner().is_some_and(|owner| self.is_heard(owner.host, now));
            homes.contains(&claim.home) && claim.wanted == Wanted::Running && !speaks
        };
        self.vms
            .values()
            .filter_map(|vm| Some((vm.claim.as_ref().filter(needed)?, vm.known)))
            .filter_map(|(claim, known)| Some((claim.clone(), self.proof_of(claim, known, now)?)))
            .take(MAX_OVER)
            .collect()
    }

    /// Tells the master as soon as there is something new to be told.
    pub(super) fn pass_proofs_on(&mut self, now: Time) {
        let over: Vec<Tenure> = self.over_for_master(now).iter().map(|(claim, _)| claim.tenure).collect();
        if over != self.passed_on {
            self.passed_on = over;
            self.tell = true;
        }
    }

    /// Another host proves by its own reads that a claim is over. That is for ever, so it is used as it is.
    pub(super) fn passed(&mut self, cx: &mut Cx, claim: Claim, proof: Proof) {
        let (id, nonce) = (claim.tenure.vm, claim.nonce);
        self.learn(cx, claim, cx.now);
        self.vm(id).passed = Some((nonce, proof));
    }

    /// What the owner's guard says: here by its rows, of others by their lists on any datastore.
    pub(super) fn said_over(&self, host: HostId, tenure: Tenure) -> Option<Over> {
        if host == self.me.host {
            return self.guard.rows.get(&tenure).and_then(|row| match row.state {
                VmState::Over(over) => Some(over),
                VmState::Expected | VmState::Running | VmState::Incoming => None,
            });
        }
        self.stores.values().find_map(|store| store.said_over(host, tenure))
    }

    /// Newest incarnation and boot known of a host.
    pub(super) fn boot_of(&self, host: HostId) -> Option<(Incarnation, BootId)> {
        if host == self.me.host {
            return self.guard.incarnation.map(|incarnation| (incarnation, self.me.boot));
        }
        self.boots.get(&host).copied()
    }

    pub(super) fn saw_boot(&mut self, host: HostId, incarnation: Incarnation, boot: BootId) {
        if host == self.me.host {
            return;
        }
        let newest = self.boots.entry(host).or_insert((incarnation, boot));
        if newest.0 < incarnation {
            if newest.1 != boot {
                self.look = true; // A new boot proves every older tenure over.
            }
            *newest = (incarnation, boot);
        }
    }

    /// Debts of the claim that succeeds `claim` by `proof` (none = nobody has said how its copy ended): the old ones that
    /// are not paid, and new ones where the VM writes.
    pub(super) fn debts_after(
        &self,
        claim: &Claim,
        proof: Option<Proof>,
        written: &BTreeSet<DatastoreId>,
    ) -> Vec<Debt> {
        let mut owing = owed(claim, proof);
        let mut clean = ended_cleanly(claim, proof);
        // Of itself a host knows more than anybody's proof says.
        if let Some(me) = claim.owners().into_iter().find(|owner| self.is_me(owner.host, owner.boot)) {
            let word = self.own_word(claim.tenure);
            owing.retain(|owner| *owner != me);
            clean.retain(|owner| *owner != me);
            match word {
                Some(word) if word.ended_cleanly() => clean.push(me),
                Some(word) if word.excludes_late_writes() => {}
                Some(_) | None => owing.push(me),
            }
        }
        let by = |owners: &[Owner], debt: &Debt| owners.iter().any(|by| by.host == debt.host && by.boot == debt.boot);
        let old = claim.debts.iter().copied().filter(|debt| !(by(&clean, debt) && written.contains(&debt.datastore)));
        let new = |owner: Owner| {
            let debt =
                move |datastore: &DatastoreId| Debt { host: owner.host, boot: owner.boot, datastore: *datastore };
            written.iter().map(debt)
        };
        let mut debts: Vec<Debt> = Vec::new();
        for debt in old.chain(owing.into_iter().flat_map(new)).filter(|debt| !self.is_paid(debt)) {
            if !debts.contains(&debt) {
                debts.push(debt);
            }
        }
        debts
    }

    /// How this host's own copy under (v, g) ended; none = it is alive, or its guard does not know any more.
    fn own_word(&self, tenure: Tenure) -> Option<Proof> {
        let row = self.guard.rows.get(&tenure)?;
        match row.state {
            VmState::Over(over) => Some(Proof::Said(over)),
            VmState::Expected if row.pid.is_none() => Some(Proof::Said(Over::NeverStarted)), // It is being abandoned.
            VmState::Expected | VmState::Running | VmState::Incoming => None,
        }
    }

    /// A new boot of the debtor, or the end of its old one by its power switch, shows that its old kernel, and every
    /// write in it, is gone. For what else pays a debt see this module's text.
    pub(super) fn is_paid(&self, debt: &Debt) -> bool {
        self.boot_of(debt.host).is_some_and(|(_, boot)| boot != debt.boot) || self.is_off(debt.host, debt.boot)
    }

    /// A debt of this host's own kernel, which does not hinder a start here.
    pub(super) fn is_own(&self, debt: &Debt) -> bool {
        self.is_me(debt.host, debt.boot)
    }

    fn is_me(&self, host: HostId, boot: BootId) -> bool {
        host == self.me.host && boot == self.me.boot
    }

    /// What excludes late writes on a debt's datastore.
    pub(super) fn late_write(&self, debt: &Debt) -> LateWrite {
        let Some(datastore) = self.settings.datastore(debt.datastore) else { return LateWrite::Open };
        match &datastore.fence {
            StorageFence::Command { program } => LateWrite::Command { program: program.clone() },
            StorageFence::Lock => LateWrite::Lock,
            StorageFence::None if datastore.late_writes == LateWrites::Accept => LateWrite::Accepted,
            StorageFence::None => LateWrite::Open,
        }
    }
}

/// Owners of a claim whose late writes this proof does not exclude; without one, all of them.
fn owed(claim: &Claim, proof: Option<Proof>) -> Vec<Owner> {
    match (claim.holder, proof) {
        (Holder::Handover { from, to }, Some(Proof::Both { from: of_source, to: of_target })) => {
            let halves = [(from, of_source), (to, of_target)];
            halves.into_iter().filter(|(_, half)| !half.excludes_late_writes()).map(|(owner, _)| owner).collect()
        }
        (Holder::Handover { .. }, _) => claim.owners(), // One word speaks for one of the two only.
        (_, Some(proof)) if proof.excludes_late_writes() => Vec::new(),
        _ => claim.owners(),
    }
}

/// Owners of a claim whose copy has run under it and ended cleanly: see "what pays a debt".
fn ended_cleanly(claim: &Claim, proof: Option<Proof>) -> Vec<Owner> {
    match (claim.holder, proof) {
        (Holder::Handover { from, to }, Some(Proof::Both { from: of_source, to: of_target })) => {
            let halves = [(from, of_source), (to, of_target)];
            let clean = |half| matches!(half, Against::Said(over) if Proof::Said(over).ended_cleanly());
            halves.into_iter().filter(|(_, half)| clean(*half)).map(|(owner, _)| owner).collect()
        }
        (_, Some(proof)) if proof.ended_cleanly() => claim.owner().into_iter().collect(),
        _ => Vec::new(),
    }
}

/// A proof against one of the two hosts of a handover claim, as half of the proof against both.
fn against(proof: Proof) -> Option<Against> {
    match proof {
        Proof::Said(over) => Some(Against::Said(over)),
        Proof::Rebooted { .. } => Some(Against::Rebooted),
        Proof::Lapsed { .. } => Some(Against::Lapsed),
        Proof::PowerOff => Some(Against::PowerOff),
        Proof::Unowned | Proof::Both { .. } => None,
    }
}
