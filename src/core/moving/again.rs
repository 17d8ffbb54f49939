//! What a move's target must hear, said again with every beat until it has: that it was handed the VM, or that its copy
//! is to be thrown away.
//!
//! Why so soon: while the target waits for "handed" nobody runs the VM, and a word that was lost in a short cut is not
//! answered for as long as an answer may take.

use serde::{Deserialize, Serialize};

use super::*;

/// A target that was not reached when its copy was to be thrown away. At most one per move that failed within
/// `MOVE_LIMIT`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Unheard {
    to: HostId,
    tenure: Tenure,
    until: Time,
}

impl Core {
    /// Tells the target that its time has come.
    pub(super) fn hand(&mut self, cx: &mut Cx, id: VmId) {
        let Some(moving) = self.vm(id).moving.clone() else { return };
        let request = Request::Handed { tenure: moving.tenure };
        let ticket = cx.send(moving.to, request, self.settings.timing.beat, Pending::Move(id));
        self.move_stage(id, moving.stage, ticket);
    }

    /// Whether the target, which did not answer in time, is told again.
    pub(super) fn is_handed_again(&mut self, now: Time, id: VmId, moving: &Moving) -> bool {
        let again = matches!(moving.stage, MoveStage::Handing { until } if now < until);
        if again {
            self.move_stage(id, moving.stage, Ticket(0)); // With the next beat.
        }
        again
    }

    /// Once per beat.
    pub(in crate::core) fn hand_again(&mut self, cx: &mut Cx) {
        let waits = |moving: &Moving| matches!(moving.stage, MoveStage::Handing { .. }) && moving.ticket == Ticket(0);
        let unheard = |vm: &crate::core::vms::Vm| vm.moving.as_ref().is_some_and(waits);
        let ids: Vec<VmId> = self.vms.iter().filter(|(_, vm)| unheard(vm)).map(|(id, _)| *id).collect();
        for id in ids {
            self.hand(cx, id);
        }
    }

    /// What the source is told that says it again: the VM runs here since, or nothing of it is here.
    pub(super) fn handed_before(&self, tenure: Tenure) -> Reply {
        let generation = tenure.generation.next();
        let came = Tenure { generation, ..tenure };
        let claimed = self.vms.get(&tenure.vm).is_some_and(|vm| vm.tenure() == Some(came) && self.is_mine(vm));
        if claimed && self.guard.rows.get(&came).map(|row| row.state) == Some(VmState::Running) {
            Reply::Ran { generation }
        } else {
            Reply::Denied(Denial::NotHere)
        }
    }

    /// A move came to nothing: the target throws its copy away. One that does not hear it is told with every beat, as
    /// long as it may wait for the memory: until then it takes no other copy of this VM.
    pub(in crate::core) fn drop_move(&mut self, cx: &mut Cx, tenure: Tenure, to: HostId) {
        self.send_dropped(cx, Unheard { to, tenure, until: cx.now + MOVE_LIMIT });
    }

    fn send_dropped(&self, cx: &mut Cx, unheard: Unheard) {
        let Unheard { to, tenure, .. } = unheard;
        cx.send(to, Request::Dropped { tenure }, ANSWER, Pending::Dropped(unheard));
    }

    /// The target answers, or did not hear it.
    pub(in crate::core) fn dropped_answered(&mut self, now: Time, unheard: Unheard, reply: &Result<Reply, String>) {
        let again = self.vms.get(&unheard.tenure.vm).is_some_and(|vm| vm.moving.is_some());
        if reply.is_err() && now < unheard.until && !again {
            self.unheard.push(unheard);
        }
    }

    /// Once per beat.
    pub(in crate::core) fn drop_moves_again(&mut self, cx: &mut Cx) {
        for unheard in std::mem::take(&mut self.unheard) {
            // Another move of it may be under way to the same host.
            if self.vms.get(&unheard.tenure.vm).is_none_or(|vm| vm.moving.is_none()) {
                self.send_dropped(cx, unheard);
            }
        }
    }
}
