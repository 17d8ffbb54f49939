//! What is remembered over a restart of the agent, and on other hosts: for which reports and orders something was begun, so that
//! nothing is done twice; and when VMs had remedies that count, so that the limit holds.
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
//! Bounds: `MAX_REMEMBERED` reports and orders on each host, whatever the VMs, and `MAX_TIMES` of each VM; the oldest go first.

use std::time::Duration;

use mainstay_guest::message::{ReportId, Verdict};

use super::{GuestAct, Guests};
use crate::types::guests::{Answer, GuestMemory, GuestWord, Remedy, Remembered};
use crate::types::{Time, VmId};

/// Reports and orders that are remembered.
pub(super) const MAX_REMEMBERED: usize = 256;
/// Remedies of one VM whose times are remembered; a higher limit is not held over a restart.
const MAX_TIMES: usize = 64;
/// How long a remedy waits for its memory to be on disk: no longer than it may for what the guest shows, since both happen at once.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

impl Guests {
    /// This is about to be done for these. Gives the number of the Save that it has to wait for, if there is one.
    pub(super) fn begins(&mut self, now: Time, vm: VmId, remedy: Remedy, ids: &[ReportId]) -> Option<u64> {
        if remedy.leaves() && !ids.is_empty() {
            self.act(GuestAct::TellOthers(GuestWord::Begun { vm, ids: ids.to_vec(), remedy }));
        }
        self.remember(now, vm, ids, &begun(remedy));
        Some(self.saves).filter(|_| !ids.is_empty())
    }

    /// All of them have this answer from now on; and what counts has changed.
    pub(super) fn remember(&mut self, now: Time, vm: VmId, ids: &[ReportId], answer: &Answer) {
        self.memory.retain(|one| !ids.contains(&one.id));
        self.memory.extend(ids.iter().map(|id| Remembered { vm, id: *id, answer: answer.clone() }));
        let over = self.memory.len().saturating_sub(MAX_REMEMBERED);
        self.memory.drain(..over);
        let counted = self.vms.iter().map(|(vm, guest)| (*vm, guest.history.lately(now, MAX_TIMES)));
        let remedies = counted.filter(|(_, times)| !times.is_empty()).collect();
        self.saves += 1;
        self.act(GuestAct::Save(self.saves, GuestMemory { reports: self.memory.iter().cloned().collect(), remedies }));
    }

    /// What an earlier agent of this host has saved.
    pub(super) fn recalled(&mut self, memory: GuestMemory) {
        let over = memory.reports.len().saturating_sub(MAX_REMEMBERED);
        self.memory = memory.reports.into_iter().skip(over).collect();
        for Remembered { vm, id, answer } in &self.memory {
            self.vms.entry(*vm).or_default().answers.keep(*id, answer.clone());
        }
        for (vm, times) in memory.remedies {
            self.vms.entry(vm).or_default().history.recall(times);
        }
    }

    /// Another host does this, and the VM may come here meanwhile.
    pub(super) fn begun_elsewhere(&mut self, now: Time, vm: VmId, ids: &[ReportId], remedy: Remedy) {
        let guest = self.vms.entry(vm).or_default();
        ids.iter().for_each(|id| guest.answers.keep(*id, begun(remedy)));
        guest.history.begun_elsewhere(now);
        self.remember(now, vm, ids, &begun(remedy));
    }
}

fn begun(remedy: Remedy) -> Answer {
    Answer::new(Verdict::Accepted, format!("a {remedy} was begun; what became of it is in the cluster's events"))
}
