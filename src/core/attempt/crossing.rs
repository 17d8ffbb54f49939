//! A claim on another datastore than the one that it follows (R7): that one is read again where it lies.
//!
//! The storage checks the predecessor of a claim when it creates it; across two datastores it cannot. What is excluded here
//! is a host that remembers a claim which was lost meanwhile with its datastore's memory, and followed by another.

use super::*;

impl Core {
    pub(in crate::core) fn look_back(&mut self, cx: &mut Cx, id: VmId) {
        let before = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.before.as_ref()).map(|before| before.home);
        if let Some(what) = before.and_then(|home| self.waits_for_trust(home)) {
            return self.fail(cx, id, Denial::Unable(format!("it waits for {what}")));
        }
        let order = StoreOrder::ReadClaims(ClaimsOf::Vms(vec![id]));
        self.ask_store(cx, id, Stage::LookingBack, order);
    }

    pub(in crate::core) fn looked_back(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        let Some(before) = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.before.clone()) else { return };
        let store = self.store_name(before.home);
        match answer {
            StoreAnswer::Claims { ended, claims, bad, .. } => {
                let stands = claims.iter().any(|claim| claim.tenure == before.tenure && claim.nonce == before.nonce);
                claims.into_iter().for_each(|claim| self.learn(cx, claim, ended));
                if let Some((_, why)) = bad.into_iter().next() {
                    self.fail(cx, id, Denial::Unable(format!("its newest claim cannot be read: {why}")));
                } else if stands {
                    self.second_stage(cx, id);
                } else {
                    let why = format!("its claim that moves its home is not the newest on datastore {store} any more");
                    self.fail(cx, id, Denial::Unable(why));
                }
            }
            StoreAnswer::Failed(why) => {
                let why = format!("its home moves, and its claims cannot be read on datastore {store}: {why}");
                self.fail(cx, id, Denial::Unable(why));
            }
            _ => {}
        }
    }

    /// The old home is left: the claim on the new one follows at once, for until then both must work.
    pub(in crate::core) fn left(&mut self, cx: &mut Cx, id: VmId) {
        self.finish(cx, id);
        if let Some(claim) = self.vm(id).claim.clone() {
            self.home_moves(cx, id, &claim);
        }
    }
}
