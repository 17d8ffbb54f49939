pub mod process;
pub mod state;
pub mod store;
pub mod table;
use crate::mutants::*;
use crate::types::*;
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
        Holder::Host(owner) if owner.host != me => Some(format!("claim {generation} names host {}", owner.host)),
        Holder::Handover { from, to } if from.host != me && to.host != me => {
            Some(format!("claim {generation} hands it from {} to {}", from.host, to.host))
        }
        Holder::Deleted => Some(format!("claim {generation} says that it was deleted")),
        Holder::None if planted(Mutant::KilledUnclaimed) => Some(format!("claim {generation} names nobody")),
        Holder::Host(_) | Holder::Handover { .. } | Holder::None | Holder::MovedTo(_) => None,
    }
}

/// The incarnation of a guard that begins after one of incarnation `known`.
#[must_use]
pub fn risen(known: Incarnation) -> Incarnation {
    if planted(Mutant::CounterReused) { known } else { known.next() }
}
