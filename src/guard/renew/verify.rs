//! Whether the claims on the datastore are those that this host holds.
//!
//! - After it has shown less than before, or was accepted so: own slots are read anew as the base of the next beat, then
//!   the claims of every VM that lives here. A further roll-back in between shows in the slots when that beat is written.
//! - Else one VM after the other, one per beat. A claim that was missed twice is gone: the storage lost it.

use super::{Facts, Failed, Renew};
use crate::exec::datastore::highest_claim;
use crate::guard::store::Store;
use crate::types::guard::GuardConfig;
use crate::types::{BeatBlock, Claim, VmId};

impl Renew {
    /// An earlier guard of this host found that the storage went back, and said so in its last beat there.
    pub(super) fn heed_own_flag(&self, newest: Option<&BeatBlock>) -> Result<(), Failed> {
        let Some(beat) = newest.filter(|beat| beat.flags.distrusts) else { return Ok(()) };
        let new = |store: &Store| store.rolled_back.is_none() && store.accepted <= beat.accepted;
        if !self.shared.with(|state, _| state.stores.get(&self.id).is_some_and(new)) {
            return Ok(());
        }
        let path = self.path.display();
        let text = format!("{path}: an earlier guard of this host found that the storage went back in time");
        Err(Failed::Doubt(text, false))
    }

    pub(super) fn verify(&mut self, facts: &Facts) -> Result<(), Failed> {
        self.open(facts)?;
        let config = &facts.config;
        let living = self.shared.with(|state, _| state.table.living(self.id));
        let mut claims: Vec<(VmId, Option<Claim>)> = Vec::with_capacity(living.len());
        for vm in living {
            claims.push((vm, highest_claim(&self.path, config.cluster, vm)?));
        }
        self.missed = None;
        self.shared.with(|state, now| state.verified(self.id, &claims, now));
        Ok(())
    }

    /// The claim of the next VM that runs here.
    pub(super) fn look_for_held(&mut self, config: &GuardConfig) -> Result<(), Failed> {
        self.held_from = self.held_from.wrapping_add(1);
        let missed = self.missed;
        let held = self.shared.with(|state, _| {
            let living = state.table.living(self.id);
            let next = living.get(self.held_from.checked_rem(living.len())?).copied();
            state.table.held(missed.map_or(next?, |missed| missed.vm), self.id)
        });
        self.missed = None;
        let Some(held) = held else { return Ok(()) };
        let Ok(found) = highest_claim(&self.path, config.cluster, held.vm) else { return Ok(()) };
        if found.is_some_and(|claim| held.generation <= claim.tenure.generation) {
            return Ok(());
        }
        if missed != Some(held) {
            self.missed = Some(held);
            return Ok(());
        }
        let (path, generation) = (self.path.display(), held.generation);
        let text = format!("{path}: claim {generation} of VM {}, which this host holds, is gone", held.vm);
        Err(Failed::Doubt(text, false))
    }
}
