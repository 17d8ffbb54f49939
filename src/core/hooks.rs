//! libvirt's hook asks whether it may start, receive or restore a VM (design 10, The hook).

use super::Core;
use super::attempt::{Kind, Stage, refusal_text};
use super::cx::Cx;
use super::event::{AskId, HookWish, Recorded};
use crate::types::control::Denial;
use crate::types::{Holder, Time, VmId, VmState};

impl Core {
    pub(super) fn hooked(&mut self, cx: &mut Cx, ask: AskId, id: VmId, name: &str, wish: HookWish, record: Recorded) {
        self.hook_seen = Some(cx.now);
        let vm = self.vm(id);
        if vm.name.is_empty() {
            name.clone_into(&mut vm.name);
        }
        match wish {
            HookWish::Prepare => self.hook_prepare(cx, ask, id, name, record),
            HookWish::Migrate => self.hook_migrate(cx, ask, id, name),
            HookWish::Restore => self.hook_restore(cx, ask, id, name),
        }
    }

    fn hook_prepare(&mut self, cx: &mut Cx, ask: AskId, id: VmId, name: &str, record: Recorded) {
        let ours = self.vm(id).attempt.as_ref().is_some_and(|attempt| matches!(attempt.stage, Stage::Starting));
        if ours || self.vm(id).incoming.is_some() {
            return cx.hook_answer(ask, Ok(())); // Our own start, or the target's side of our own move.
        }
        let known = self.vm(id).record.clone();
        let record = match (known, record) {
            (Some(Ok(inactive)), _) => inactive,
            (_, Ok(given)) => *given,
            (_, Err(_)) => return cx.hook_answer(ask, Ok(())), // Not on a datastore: not protected, starts as ever.
        };
        if self.vm(id).attempt.is_some() {
            let denial = Denial::Unable("Mainstay is working on it; try again in a moment".into());
            return cx.hook_answer(ask, Err(refusal_text(name, &denial)));
        }
        let home = self.vm(id).claim.as_ref().map_or(record.home, |claim| claim.home);
        self.define_record(cx.now, id, Ok(record));
        self.begin(cx, id, Kind::Hook { ask }, home, Vec::new());
    }

    fn hook_migrate(&mut self, cx: &mut Cx, ask: AskId, id: VmId, name: &str) {
        let claimed = self.vm(id).claim.is_some();
        let result = if self.vm(id).incoming.is_some() || !claimed {
            Ok(())
        } else {
            Err(format!(
                "mainstay: {name} is protected and is moved by 'mainstay vm move {name}' only; 'virsh migrate' is refused"
            ))
        };
        cx.hook_answer(ask, result);
    }

    /// A saved image may only go on where nothing ran since: this host made the newest claim when it was saved.
    fn hook_restore(&mut self, cx: &mut Cx, ask: AskId, id: VmId, name: &str) {
        let stale = match self.vms.get(&id).and_then(|vm| vm.claim.as_ref()) {
            None => None,
            Some(claim) if claim.maker == self.me.host && claim.holder == Holder::None => None,
            Some(claim) => Some((self.holder_text(claim), claim.tenure.generation)),
        };
        let result = match stale {
            None => Ok(()),
            Some((holder, generation)) => Err(format!(
                "mainstay: {name} ran since this memory was saved ({holder}, generation {generation}); restoring it would \
                 destroy its disks; remove the image with 'virsh managedsave-remove {name}'"
            )),
        };
        cx.hook_answer(ask, result);
    }

    /// Whether this VM may be started on this host: nobody else's tenure stands in the way.
    pub(super) fn may_start_here(&self, id: VmId, now: Time) -> Result<(), Denial> {
        let Some(vm) = self.vms.get(&id) else { return Ok(()) };
        let Some(claim) = &vm.claim else { return Ok(()) };
        match claim.holder {
            Holder::None | Holder::Deleted => Ok(()),
            Holder::MovedTo(to) => {
                Err(Denial::Unable(format!("its claims live on datastore {} now", self.store_name(to))))
            }
            Holder::Handover { .. } => Err(Denial::Unable("it is being migrated".into())),
            Holder::Host(owner) if owner.host == self.me.host => {
                let running = self.guard.rows.get(&claim.tenure).map(|row| row.state) == Some(VmState::Running);
                if running { Err(Denial::Contradiction("it runs here already".into())) } else { Ok(()) }
            }
            Holder::Host(owner) => {
                let generation = claim.tenure.generation;
                let owned = Denial::OwnedBy { owner: self.name_of(owner.host), generation };
                let proof = self.proof_of(claim, vm.known, now).ok_or(owned)?;
                match self.late_writes_open(claim, proof) {
                    Some(what) => Err(Denial::Waiting(what)),
                    // Late writes that need a fence are the master's business: a hook cannot wait for one.
                    None if proof.excludes_late_writes() && claim.debts.iter().all(|debt| self.is_paid(debt)) => Ok(()),
                    None => Err(Denial::Waiting("the master to restart it".into())),
                }
            }
        }
    }
}
