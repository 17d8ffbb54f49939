//! What is remembered over a restart of the agent, and on other hosts: for which reports and orders something was begun, so that
//! nothing is done twice.
//!
//! ```text
//!   remedy ── Save: "begun" ──► on disk, or `PATIENCE` has passed ──► its first step … ended ── Save: its answer
//!   restart ── Recalled ──► whoever says or orders the same again gets that answer
//!   a remedy after which the VM runs elsewhere ── Begun ──► all other hosts: its guest says the same again there
//! ```
//!
//! What an agent's end cuts off between the two Saves is done at most once, not at least once: its answer is then that it was begun.
//! If that was not enough the guest says something new, or falls silent, and monitoring sees it. What only waited its turn is not
//! remembered, and begins anew.
//!
//! Bound: `MAX_REMEMBERED` on each host, whatever the VMs; the oldest go first.

use std::time::Duration;

use mainstay_guest::message::{ReportId, Verdict};

use super::{GuestAct, Guests};
use crate::types::guests::{Answer, GuestWord, Remedy, Remembered};
use crate::types::{Time, VmId};

/// Reports and orders that are remembered.
pub(super) const MAX_REMEMBERED: usize = 256;
/// How long a remedy waits for its memory to be on disk: no longer than it may for what the guest shows, since both happen at once.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

impl Guests {
    /// This is about to be done for these. Gives the number of the Save that it has to wait for, if there is one.
    pub(super) fn begins(&mut self, vm: VmId, remedy: Remedy, ids: &[ReportId]) -> Option<u64> {
        if ids.is_empty() {
            return None;
        }
        if remedy.leaves() {
            self.act(GuestAct::TellOthers(GuestWord::Begun { vm, ids: ids.to_vec(), remedy }));
        }
        self.remember(vm, ids, &begun(remedy));
        Some(self.saves)
    }

    /// All of them have this answer from now on.
    pub(super) fn remember(&mut self, vm: VmId, ids: &[ReportId], answer: &Answer) {
        if ids.is_empty() {
            return;
        }
        self.memory.retain(|one| !ids.contains(&one.id));
        self.memory.extend(ids.iter().map(|id| Remembered { vm, id: *id, answer: answer.clone() }));
        let over = self.memory.len().saturating_sub(MAX_REMEMBERED);
        self.memory.drain(..over);
        self.saves += 1;
        self.act(GuestAct::Save(self.saves, self.memory.iter().cloned().collect()));
    }

    /// What an earlier agent of this host has saved.
    pub(super) fn recalled(&mut self, memory: Vec<Remembered>) {
        let over = memory.len().saturating_sub(MAX_REMEMBERED);
        self.memory = memory.into_iter().skip(over).collect();
        for Remembered { vm, id, answer } in &self.memory {
            self.vms.entry(*vm).or_default().answers.keep(*id, answer.clone());
        }
    }

    /// Another host does this, and the VM may come here meanwhile.
    pub(super) fn begun_elsewhere(&mut self, now: Time, vm: VmId, ids: &[ReportId], remedy: Remedy) {
        let guest = self.vms.entry(vm).or_default();
        ids.iter().for_each(|id| guest.answers.keep(*id, begun(remedy)));
        guest.history.begun_elsewhere(now);
        self.remember(vm, ids, &begun(remedy));
    }
}

fn begun(remedy: Remedy) -> Answer {
    Answer::new(Verdict::Accepted, format!("a {remedy} was begun; what became of it is in the cluster's events"))
}
