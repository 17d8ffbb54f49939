//! libvirt's hook asks whether it may start, receive or restore a VM (design 10, The hook).
//!
//! ```text
//!   prepare  our own start, or the target of our own move ─► yes
//!            not on a datastore                           ─► yes, it is not protected
//!            else an attempt: newest claim of every datastore, twins elsewhere, record, row, claim ─► yes
//!   migrate  the target of our own move ─► yes; else protected VMs are moved by 'mainstay vm move'
//!   restore  the image's generation against the newest claim: the rule is in `images`; `prepare` follows
//! ```
//!
//! Autostart is a `prepare` like any other.

use super::Core;
use super::attempt::{Kind, Stage, refusal_text};
use super::cx::Cx;
use super::event::{AskId, HookWish, Recorded};
use super::proofs::LateWrite;
use crate::types::control::Denial;
use crate::types::{Claim, Debt, Holder, Time, VmId, VmState};

impl Core {
    pub(super) fn hooked(&mut self, cx: &mut Cx, ask: AskId, id: VmId, name: &str, wish: HookWish, record: Recorded) {
        self.hook_seen = Some(cx.now);
        if self.vm(id).name.is_empty() {
            self.named(id, name);
        }
        match wish {
            HookWish::Prepare => self.hook_prepare(cx, ask, id, name, record),
            HookWish::Migrate => self.hook_migrate(cx, ask, id, name, &record),
            HookWish::Restore { saved } => self.hook_restore(cx, ask, id, name, saved, &record),
        }
    }

    fn hook_prepare(&mut self, cx: &mut Cx, ask: AskId, id: VmId, name: &str, record: Recorded) {
        let ours = self.vm(id).attempt.as_ref().is_some_and(|attempt| matches!(attempt.stage, Stage::Starting));
        let migrates = std::mem::take(&mut self.vm(id).prepare_due);
        let comes = self.vm(id).incoming.is_some() || self.comes_in(id);
        if ours || comes && migrates {
            return cx.hook_answer(ask, Ok(())); // Our own start, or the target's side of a migration.
        }
        if comes {
            // The guard would let it run, since it waits for a paused copy.
            let denial = Denial::Unable("a migration of it to this host is under way".into());
            return cx.hook_answer(ask, Err(refusal_text(name, &denial)));
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
        let home = self.vm(id).claim.as_ref().map_or(record.home, Claim::next_home);
        self.define_record(cx.now, id, Ok(record));
        self.begin(cx, id, Kind::Hook { ask }, home, Vec::new());
    }

    /// Our own move, or a person's migration: that one's source is asked, if the VM is protected.
    fn hook_migrate(&mut self, cx: &mut Cx, ask: AskId, id: VmId, name: &str, record: &Recorded) {
        let vm = self.vm(id);
        vm.prepare_due = true;
        if vm.incoming.is_some() {
            return cx.hook_answer(ask, Ok(()));
        }
        let home = match (&vm.claim, record) {
            (Some(claim), _) => claim.next_home(),
            (None, Ok(record)) => record.home,
            (None, Err(_)) => return cx.hook_answer(ask, Ok(())), // Not on a datastore: not protected.
        };
        if vm.attempt.is_some() || vm.moving.is_some() || vm.handover.receives() {
            let why = format!("mainstay: {name} is not migrated here: it is being worked on; try again in a moment");
            return cx.hook_answer(ask, Err(why));
        }
        self.receive(cx, ask, id, home);
    }

    /// Whether this VM may be started on this host: nobody else's tenure stands in the way.
    pub(super) fn may_start_here(&self, id: VmId, now: Time) -> Result<(), Denial> {
        let Some(vm) = self.vms.get(&id) else { return Ok(()) };
        let Some(claim) = &vm.claim else { return Ok(()) };
        match claim.holder {
            // A hook cannot wait for a fence.
            Holder::None | Holder::Deleted if !self.owes_nothing(claim) => {
                let what = "late writes of its last host to be excluded; 'mainstay vm start' starts it after that";
                Err(Denial::Waiting(what.into()))
            }
            Holder::None | Holder::Deleted => Ok(()),
            Holder::Handover { .. } if self.proof_of(claim, vm.known, now).is_none() => {
                Err(Denial::Unable("a person migrates it".into()))
            }
            Holder::Host(owner) | Holder::Moved { owner, .. } if owner.host == self.me.host => {
                let running = self.guard.rows.get(&claim.tenure).map(|row| row.state) == Some(VmState::Running);
                if running { Err(Denial::Contradiction("it runs here already".into())) } else { Ok(()) }
            }
            Holder::Host(_) | Holder::Moved { .. } | Holder::Handover { .. } => {
                let generation = claim.tenure.generation;
                let owner = claim.owners().first().map(|owner| self.name_of(owner.host)).unwrap_or_default();
                let owned = Denial::OwnedBy { owner, generation };
                let proof = self.proof_of(claim, vm.known, now).ok_or(owned)?;
                match self.late_writes_open(claim, proof, Some(self.me.host)) {
                    Some(what) => Err(Denial::Waiting(what)),
                    // Late writes that need a fence are the master's business.
                    None if proof.excludes_late_writes() && self.owes_nothing(claim) => Ok(()),
                    None => Err(Denial::Waiting("the master to restart it".into())),
                }
            }
        }
    }

    /// Whether no debt of this claim has to be paid before a start here.
    fn owes_nothing(&self, claim: &Claim) -> bool {
        let hinders =
            |debt: &Debt| !self.is_paid(debt) && !self.is_own(debt) && self.late_write(debt) != LateWrite::Accepted;
        !claim.debts.iter().any(hinders)
    }
}
