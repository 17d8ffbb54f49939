//! Proofs that (v, g) is over (design 2): said, rebooted, lapsed. The only ground on which anybody creates g+1 for a VM
//! that another host owned. Absence, silence on the network, errors and verdicts are no proofs.

use super::Core;
use crate::mutants::{Mutant, planted};
use crate::types::settings::LateWrites;
use crate::types::{
    BootId, Claim, Debt, Holder, HostId, Incarnation, Over, Proof, StorageFence, Tenure, Time, VmRecord, VmState,
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
            Holder::Deleted | Holder::MovedTo(_) | Holder::Handover { .. } => None,
            Holder::Host(owner) => {
                if let Some(over) = self.said_over(owner.host, claim.tenure) {
                    return Some(Proof::Said(over));
                }
                if let Some((incarnation, boot)) = self.boot_of(owner.host)
                    && owner.incarnation < incarnation
                    && (owner.boot != boot || planted(Mutant::RebootWithoutBoot))
                {
                    return Some(Proof::Rebooted { boot, incarnation });
                }
                if self.is_heard(owner.host, now) {
                    return None; // It speaks for itself; a lapse would be said.
                }
                let window = self.stores.get(&claim.home)?.lapsed(owner.host, known)?;
                Some(Proof::Lapsed { window })
            }
        }
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

    /// Debts of the claim that succeeds `claim` by `proof`: the old ones that are not paid, and the new one.
    pub(super) fn debts_after(&self, claim: &Claim, proof: Proof, record: &VmRecord) -> Vec<Debt> {
        let mut debts: Vec<Debt> = claim.debts.iter().copied().filter(|debt| !self.is_paid(debt)).collect();
        if let Some(owner) = claim.owner()
            && !proof.excludes_late_writes()
            && owner.host != self.me.host
        {
            for datastore in record.written() {
                let debt = Debt { host: owner.host, boot: owner.boot, datastore };
                if !debts.contains(&debt) {
                    debts.push(debt);
                }
            }
        }
        debts
    }

    /// A new boot of the debtor shows that its old kernel, and every write in it, is gone.
    pub(super) fn is_paid(&self, debt: &Debt) -> bool {
        self.boot_of(debt.host).is_some_and(|(_, boot)| boot != debt.boot)
            || (debt.host == self.me.host && debt.boot == self.me.boot)
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
