//! When a claim that was read ends a tenure for good, so that its copy is killed. R2: nothing else ever kills one.

use crate::mutants::{Mutant, planted};
use crate::types::{Claim, Holder, HostId, Tenure, Wanted};

/// Why this claim ends the tenure for good, if it does: it names another, or says stopped or deleted.
#[must_use]
pub fn ends(claim: &Claim, tenure: Tenure, me: HostId) -> Option<String> {
    if claim.tenure.vm != tenure.vm || claim.tenure.generation <= tenure.generation {
        return None;
    }
    let generation = claim.tenure.generation;
    if claim.wanted == Wanted::Stopped {
        return Some(format!("claim {generation} says that it is to be stopped"));
    }
    match claim.holder {
        Holder::Host(owner) | Holder::Moved { owner, .. } if owner.host != me => {
            Some(format!("claim {generation} names host {}", owner.host))
        }
        Holder::Handover { from, to } if from.host != me && to.host != me => {
            Some(format!("claim {generation} hands it from {} to {}", from.host, to.host))
        }
        Holder::Deleted => Some(format!("claim {generation} says that it was deleted")),
        Holder::None if planted(Mutant::KilledUnclaimed) => Some(format!("claim {generation} names nobody")),
        Holder::Host(_) | Holder::Handover { .. } | Holder::None | Holder::Moved { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ClaimReason, DatastoreId, Digest, Generation, Incarnation, Nonce, ObjectKind, Owner, VmId};

    #[test]
    fn only_a_claim_that_ends_the_tenure_kills() {
        let (me, other) = (HostId(uuid::Uuid::from_u128(1)), HostId(uuid::Uuid::from_u128(2)));
        let owner = |host| Owner { host, boot: Default::default(), incarnation: Incarnation(1) };
        let table = [
            (Holder::Host(owner(other)), Wanted::Running, 8, true),
            (Holder::Host(owner(other)), Wanted::Running, 7, false),
            (Holder::Host(owner(me)), Wanted::Running, 8, false),
            (Holder::Host(owner(me)), Wanted::Stopped, 8, true),
            (Holder::None, Wanted::Running, 8, false),
            (Holder::None, Wanted::Stopped, 8, true),
            (Holder::Deleted, Wanted::Running, 8, true),
            (Holder::Moved { to: DatastoreId::default(), owner: owner(me) }, Wanted::Running, 8, false),
            (Holder::Moved { to: DatastoreId::default(), owner: owner(other) }, Wanted::Running, 8, true),
            (Holder::Handover { from: owner(me), to: owner(other) }, Wanted::Running, 8, false),
            (Holder::Handover { from: owner(other), to: owner(me) }, Wanted::Running, 8, false),
            (Holder::Handover { from: owner(other), to: owner(other) }, Wanted::Running, 8, true),
        ];
        let tenure = Tenure { vm: VmId::default(), generation: Generation(7) };
        for (holder, wanted, generation, expected) in table {
            let claim = Claim {
                kind: ObjectKind::Vm,
                tenure: Tenure { generation: Generation(generation), ..tenure },
                name: "web".to_owned(),
                holder,
                home: DatastoreId::default(),
                wanted,
                reason: ClaimReason::Failover,
                record: Digest::default(),
                nonce: Nonce(1),
                maker: other,
                made_unix_ms: 0,
                debts: Vec::new(),
            };
            assert_eq!(ends(&claim, tenure, me).is_some(), expected, "{holder:?} {wanted:?} {generation}");
        }
    }
}
