//! Saved images (`virsh save`, `virsh managedsave`, libvirt-guests): a VM's memory in a file, useless and dangerous once
//! its disks have changed.
//!
//! **Rule.** An image carries the generation g under which its memory ran. It may be restored, on any host, exactly while
//! the newest claim of the VM is the one that ended g by that saving: g+1, "nobody, its memory was saved". Any later claim
//! says that the VM ran since, or may have; then restoring old memory onto newer disks would destroy them.
//!
//! ```text
//!   runs under g ──► the domain that runs is marked with g       (libvirt writes the mark into every image that it saves)
//!   saved        ──► claim g+1: nobody, saved
//!   restore      ──► hook: image says g, newest claim read is g+1 "saved" ─► allowed ─► prepare ─► claim g+2, only after
//!                    else refused                                               exactly that g+1
//! ```
//!
//! The mark is metadata of the running domain, never of its definition: so it is in the image wherever that lies, in a copy
//! of it, too, and a boot begins without one. An image without a mark, or with another, is refused; a lapse or a change
//! of the definition while the memory is being written makes an image that is refused: never the other way round.
//!
//! This agent's own starts restore the image of the last claim's host, if the rule allows it; any other they discard, and
//! say so.
//!
//! Not covered: memory of a snapshot (`snapshot-create --memspec`), which libvirt writes while the VM goes on.

use std::time::Duration;

use super::Core;
use super::attempt::Stage;
use super::cx::{Cx, Pending};
use super::event::{AskId, Recorded};
use crate::types::guard::RowView;
use crate::types::store::{ClaimsOf, StoreAnswer, StoreOrder};
use crate::types::vm::{DomainAnswer, DomainOrder, DomainState};
use crate::types::{Claim, ClaimReason, Generation, Holder, Time, VmId};

/// The datastore's time to show the newest claim; the hook waits 3 s in all.
const LOOK: Duration = Duration::from_millis(2000);
/// libvirt's time to take a mark.
const MARK: Duration = Duration::from_secs(5);
/// Marks under way at the same time: a libvirtd that is slow must keep workers for starts.
const MARKS: usize = 2;
/// `prepare` follows an allowed `restore` at once; what was allowed is void after this.
const RESTORES: Duration = Duration::from_secs(10);

/// Whether a claim says that generation g was ended by saving its memory.
pub(super) fn saved_from(claim: &Claim, image: Option<Generation>) -> bool {
    claim.holder == Holder::None
        && claim.reason == ClaimReason::Saved
        && image.is_some_and(|generation| generation.next() == claim.tenure.generation)
}

impl Core {
    /// It runs under our claim: the running domain says so, for whoever saves its memory.
    pub(super) fn mark(&mut self, cx: &mut Cx, id: VmId, row: &RowView) {
        let generation = row.tenure.generation;
        let runs = self.libvirt.domains.get(&id).is_some_and(|domain| domain.state == DomainState::Running);
        let marked = self.vm(id).marked == Some(generation);
        if marked || !runs || row.stopped || !self.libvirt.up || cx.now < self.vm(id).mark_retry {
            return;
        }
        if MARKS <= self.vms.values().filter(|vm| vm.marking.is_some()).count() || self.vm(id).marking.is_some() {
            return;
        }
        self.vm(id).marking = Some(generation);
        cx.domain(DomainOrder::Mark { vm: id, generation }, MARK, Pending::Mark(id));
    }

    pub(super) fn mark_done(&mut self, cx: &mut Cx, id: VmId, answer: &DomainAnswer) {
        let vm = self.vm(id);
        let Some(generation) = vm.marking.take() else { return };
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => vm.marked = Some(generation),
            DomainAnswer::Failed(_) => vm.mark_retry = cx.now + MARK,
        }
        self.check = true; // Others may wait for their turn.
    }

    /// libvirt is about to load an image that says `saved`.
    pub(super) fn hook_restore(
        &mut self,
        cx: &mut Cx,
        ask: AskId,
        id: VmId,
        name: &str,
        saved: Option<Generation>,
        record: &Recorded,
    ) {
        let attempt = self.vm(id).attempt.as_ref().filter(|attempt| matches!(attempt.stage, Stage::Starting));
        if let Some(before) = attempt.and_then(|attempt| attempt.before.clone()) {
            // Our own start: the claim that it follows was the newest, for its own was created exclusively.
            let allowed = saved_from(&before, saved);
            return cx.hook_answer(ask, if allowed { Ok(()) } else { Err(self.older_text(name, &before, saved)) });
        }
        let home = match (&self.vm(id).claim, record) {
            (Some(claim), _) => claim.next_home(),
            (None, Ok(record)) => record.home,
            (None, Err(_)) => return cx.hook_answer(ask, Ok(())), // Not protected: restores as ever.
        };
        cx.store(home, StoreOrder::ReadClaims(ClaimsOf::Vms(vec![id])), LOOK, Pending::Restore { vm: id, ask, saved });
    }

    pub(super) fn restore_looked(
        &mut self,
        cx: &mut Cx,
        id: VmId,
        ask: AskId,
        saved: Option<Generation>,
        answer: StoreAnswer,
    ) {
        let name = self.vm_name(id);
        let unreadable =
            |why: String| Err(format!("mainstay: {name} is not restored: its newest claim cannot be read: {why}"));
        let result = match answer {
            StoreAnswer::Claims { ended, claims, bad, .. } => {
                claims.into_iter().for_each(|claim| self.learn(cx, claim, ended));
                match (bad.into_iter().next(), self.vm(id).claim.clone()) {
                    (Some((_, why)), _) => unreadable(why),
                    (None, None) => Ok(()), // Never protected: nobody but this host can have run it.
                    (None, Some(claim)) if saved_from(&claim, saved) => {
                        self.vm(id).restoring = Some((claim.tenure.generation, cx.now));
                        Ok(())
                    }
                    (None, Some(claim)) => Err(self.older_text(&name, &claim, saved)),
                }
            }
            StoreAnswer::Failed(why) => unreadable(why.to_string()),
            _ => return,
        };
        cx.hook_answer(ask, result);
    }

    /// The claim that a start must follow because its memory was saved under the one before; used up by asking.
    pub(super) fn take_restoring(&mut self, id: VmId, now: Time) -> Option<Generation> {
        self.vm(id).restoring.take().filter(|(_, at)| now.since(*at) < RESTORES).map(|(generation, _)| generation)
    }

    /// Whether our own start of it may take the saved image that lies here.
    pub(super) fn restores(&self, id: VmId, before: Option<&Claim>) -> bool {
        let image = self.libvirt.domains.get(&id).is_some_and(|domain| domain.managed_save);
        // The image's own mark is seen by the hook.
        image
            && before.is_some_and(|before| {
                before.maker == self.me.host && before.holder == Holder::None && before.reason == ClaimReason::Saved
            })
    }

    fn older_text(&self, name: &str, newest: &Claim, saved: Option<Generation>) -> String {
        let image = match saved {
            Some(generation) => format!("this memory was saved under generation {generation}"),
            None => "this image does not say under which generation its memory was saved".to_owned(),
        };
        format!(
            "mainstay: {name} is not restored: {image}, but it ran since, or may have: generation {} is {}. Restoring it \
             would destroy its disks; if the image is libvirt's own, remove it with 'virsh managedsave-remove {name}'; \
             'mainstay vm start {name}' boots it",
            newest.tenure.generation,
            self.holder_text(newest)
        )
    }
}
