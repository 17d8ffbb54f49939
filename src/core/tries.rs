//! As master: starts that failed, and when each host may be tried again. What a failure means stands in its class.
//!
//! | class | of | what is done |
//! |---|---|---|
//! | host | something is missing on that host | elsewhere at once, each host once per round; then like definition |
//! | definition | it would start nowhere | rounds begin `ROUNDS` after the first failure; then it has failed, and a person says when it is tried again |
//! | capacity | memory was short after all | that host again when it has more room than it had then |
//! | storage | its disks cannot be opened there | that host again when it says that it reaches them (`access`) |
//! | now | no lease, no libvirt, no answer, it is busy | that host again after a moment |
//!
//! ```text
//!   ─► round: hosts one by one ── started ──────────────────────────────────────────────────► forgotten
//!          ▲      │ no host left, or definition                                                 ▲
//!          │      ▼                                                                             │ it was changed, it ran,
//!          └── rests until the next round ── there is none ─► failed: shown ── mainstay vm retry ┘ the master is another
//! ```
//!
//! An image whose lock is held is no failure: the host that tries keeps its claim (`attempt/locks`). A host that has booted since is as new.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Timer};
use super::event::AskId;
use super::note::Note;
use crate::types::control::{Denial, Reply, Request, VmCommand};
use crate::types::{BootId, ClaimReason, HostId, Time, VmId, Wanted};

/// When rounds begin after the first failure, in minutes.
const ROUNDS: [u64; 5] = [0, 2, 6, 14, 30];
/// A host that could not for a moment is tried again after this.
const FAILED_TIME: Duration = Duration::from_secs(30);
/// One that did not answer, after this.
const SILENT_TIME: Duration = Duration::from_secs(5);
/// What a host must have gained of free memory after it was short of it: less comes and goes.
const GAINED_KIB: u64 = 64 * 1024;
/// A host that says that it reaches the disks is not tried again before; doubled each time that it fails all the same.
const REACHED: Duration = Duration::from_secs(2);
/// Nor is it left alone for longer, whatever it says: it looks as another user than QEMU, and at files only.
const STORAGE_LATEST: Duration = Duration::from_secs(600);

/// Starts of one VM that failed.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Tries {
    /// When a round began to fail for the first time.
    first: Option<Time>,
    /// Rounds that have failed.
    rounds: usize,
    rest: Rest,
    /// The last failure that counts against a round.
    last: Option<(HostId, String)>,
    on: BTreeMap<HostId, Failed>,
    /// How often the storage has failed each host.
    storage: BTreeMap<HostId, u32>,
}

/// What is waited for beside a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
enum Rest {
    /// Nothing: a round is under way.
    #[default]
    No,
    /// The hosts that were tried are not tried again before.
    Hosts { again: Time },
    /// It is not tried again before, anywhere.
    Everywhere { again: Time },
    /// All rounds have failed.
    Failed,
}

#[derive(Debug, Serialize, Deserialize)]
struct Failed {
    at: Time,
    why: String,
    class: Class,
    boot: Option<BootId>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Class {
    Host,
    /// What was free there, and who ran there.
    Capacity {
        free_kib: u64,
        runs: BTreeSet<VmId>,
    },
    Storage {
        before: Time,
    },
    Now {
        until: Time,
    },
}

impl Tries {
    /// Why a host is not tried.
    pub(super) fn bars(&self, host: HostId) -> Option<&str> {
        self.on.get(&host).map(|failed| failed.why.as_str())
    }
    /// Hosts that are not tried, and why.
    pub(super) fn barred(&self) -> impl Iterator<Item = (HostId, &str)> {
        self.on.iter().map(|(host, failed)| (*host, failed.why.as_str()))
    }
    /// What follows from a failed round: when the next begins.
    fn round_failed(&mut self, now: Time, rest: fn(Time) -> Rest) {
        let first = *self.first.get_or_insert(now);
        self.rounds += 1;
        self.rest = match ROUNDS.get(self.rounds) {
            Some(minutes) => rest(now.max(first + Duration::from_secs(minutes * 60))),
            None => Rest::Failed,
        };
    }
    fn nothing_failed(&self) -> bool {
        self.on.is_empty() && self.rounds == 0
    }
    /// The rounds, in words; none while one is under way.
    fn text(&self, name: &str, host: &str) -> Option<String> {
        let why = self.last.as_ref().map_or("", |(_, why)| why.as_str());
        let next = || format!("round {} of {}", self.rounds + 1, ROUNDS.len());
        let minutes = || ROUNDS.get(self.rounds).copied().unwrap_or_default();
        match self.rest {
            Rest::No => None,
            Rest::Hosts { .. } => Some(format!("{}, {} min after its first failure", next(), minutes())),
            Rest::Everywhere { .. } => {
                Some(format!("{}, {} min after its first failure ({host}: {why})", next(), minutes()))
            }
            Rest::Failed => Some(format!(
                "a person: it has failed {} times within {} min, last on {host}: {why}; 'mainstay vm retry {name}' tries again",
                ROUNDS.len(),
                ROUNDS[ROUNDS.len() - 1]
            )),
        }
    }
}

/// Whether a claim with this reason shows that it runs, that a person tries, or that it is not what it was.
pub(super) fn ends_tries(reason: ClaimReason) -> bool {
    match reason {
        ClaimReason::Adopted
        | ClaimReason::Registered
        | ClaimReason::StartedByPerson
        | ClaimReason::Reclaimed
        | ClaimReason::Migrated
        | ClaimReason::Planned
        | ClaimReason::RecordChanged
        | ClaimReason::HandedOver
        | ClaimReason::HomeMoved
        | ClaimReason::Deleted => true,
        ClaimReason::Failover
        | ClaimReason::Crashed
        | ClaimReason::StartFailed
        | ClaimReason::StoppedByPerson
        | ClaimReason::StoppedInside
        | ClaimReason::HostWentDown
        | ClaimReason::Saved
        | ClaimReason::MigratedAway
        | ClaimReason::Isolated
        | ClaimReason::MadeRoom => false,
    }
}

impl Core {
    /// A host could not start it. What it knows of that, only the master needs.
    pub(super) fn start_failed_on(&mut self, now: Time, id: VmId, host: HostId, denial: &Denial) {
        if !self.is_master() {
            return;
        }
        let boot = self.last_boot(host);
        let why = denial.to_string();
        let class = match denial {
            Denial::Definition(_) => {
                let tries = &mut self.vm(id).tries;
                tries.last = Some((host, why));
                return tries.round_failed(now, |again| Rest::Everywhere { again });
            }
            Denial::Host(_) => {
                let tries = &mut self.vm(id).tries;
                tries.first.get_or_insert(now);
                tries.last = Some((host, why.clone()));
                Class::Host
            }
            Denial::Capacity(_) => {
                let free_kib = self.capacity_of(host).map(|capacity| capacity.free_kib).unwrap_or_default();
                Class::Capacity { free_kib, runs: self.running_on(host).into_iter().collect() }
            }
            Denial::Storage(_) => {
                let times = self.vm(id).tries.storage.entry(host).or_default();
                let pause = REACHED * 2_u32.saturating_pow((*times).min(16));
                *times += 1;
                Class::Storage { before: now + pause.min(STORAGE_LATEST) }
            }
            Denial::NotMaster { .. }
            | Denial::NotHere
            | Denial::UnknownVm
            | Denial::OwnedBy { .. }
            | Denial::Superseded { .. }
            | Denial::Waiting(_)
            | Denial::Unable(_)
            | Denial::NotAllowed(_)
            | Denial::Contradiction(_) => Class::Now { until: now + FAILED_TIME },
        };
        self.vm(id).tries.on.insert(host, Failed { at: now, why, class, boot });
    }

    /// It did not answer: its agent was restarted, or the network is slow.
    pub(super) fn silent_about_start(&mut self, now: Time, id: VmId, host: HostId, why: String) {
        let failed =
            Failed { at: now, why, class: Class::Now { until: now + SILENT_TIME }, boot: self.last_boot(host) };
        self.vm(id).tries.on.insert(host, failed);
    }

    /// Forgets what bars no host any more. What it waits for, if it is not to be tried anywhere now.
    pub(super) fn rests(&mut self, cx: &mut Cx, id: VmId) -> Option<String> {
        let mut tries = std::mem::take(&mut self.vm(id).tries);
        if let Rest::Hosts { again } | Rest::Everywhere { again } = tries.rest {
            if again <= cx.now {
                tries.rest = Rest::No;
                tries.on.retain(|_, failed| !matches!(failed.class, Class::Host));
            } else {
                cx.set(Timer::Place(id), again);
            }
        }
        tries.on.retain(|host, failed| self.still_bars(id, *host, failed, cx.now));
        let name = self.vm_name(id);
        let host = tries.last.as_ref().map(|(host, _)| self.name_of(*host)).unwrap_or_default();
        let text = match tries.rest {
            Rest::No | Rest::Hosts { .. } => None,
            Rest::Everywhere { .. } | Rest::Failed => tries.text(&name, &host),
        };
        self.vm(id).tries = tries;
        let what = text?;
        if self.vm(id).waits.as_ref() != Some(&what) {
            self.waits_for(cx, id, what.clone());
            self.told_rest(cx, id, &name, &what);
        }
        Some(what)
    }

    /// No host is left for it. If that is because each was tried, this round has failed; what it waits for beside a place.
    pub(super) fn no_place_left(&mut self, now: Time, id: VmId) -> Option<String> {
        let name = self.vm_name(id);
        let tries = &mut self.vm(id).tries;
        let tried = tries.on.values().any(|failed| matches!(failed.class, Class::Host));
        if tried && tries.rest == Rest::No {
            tries.round_failed(now, |again| Rest::Hosts { again });
            self.look |= self.vm(id).tries.rest == Rest::Failed;
        }
        self.vm(id).tries.text(&name, "")
    }

    fn told_rest(&self, cx: &mut Cx, id: VmId, name: &str, what: &str) {
        let failed = self.vms.get(&id).is_some_and(|vm| vm.tries.rest == Rest::Failed);
        let note = match failed {
            true => Note::alarm("vm-failed", format!("{name} is not started any more; it waits for {what}")),
            false => Note::warning("vm-waits", format!("{name} waits for {what}")),
        };
        cx.note(note.of(name));
    }

    fn last_boot(&self, host: HostId) -> Option<BootId> {
        self.boot_of(host).map(|(_, boot)| boot)
    }

    fn still_bars(&self, id: VmId, host: HostId, failed: &Failed, now: Time) -> bool {
        if self.last_boot(host) != failed.boot {
            return false;
        }
        match &failed.class {
            Class::Host => true,
            Class::Now { until } => now < *until,
            Class::Storage { before } => {
                now < *before || now < failed.at + STORAGE_LATEST && !self.reaches_disks(host, id)
            }
            Class::Capacity { free_kib, runs } => {
                let gained = self.capacity_of(host).is_some_and(|now| free_kib + GAINED_KIB <= now.free_kib);
                let there = |id: &VmId| {
                    let claim = self.vms.get(id).and_then(|vm| vm.claim.as_ref());
                    let claim = claim.filter(|claim| claim.wanted == Wanted::Running);
                    claim.is_some_and(|claim| claim.names(host))
                };
                !gained && runs.iter().all(there)
            }
        }
    }

    /// A person says that it is to be tried again.
    pub(super) fn retry(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, id: VmId) {
        if !self.is_master() {
            let master = self.master();
            return self.forward(cx, ask, from, master, Request::Vm(VmCommand::Retry { vm: id }));
        }
        let Some(vm) = self.vms.get_mut(&id) else {
            return cx.answer(ask, Reply::Denied(Denial::UnknownVm));
        };
        if vm.tries.nothing_failed() {
            return cx.answer(ask, Reply::AlreadySo);
        }
        vm.tries = Tries::default();
        vm.retry = cx.now;
        self.look = true;
        cx.answer(ask, Reply::Done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_begin_later_and_later_and_end() {
        let at = |minutes: u64| Time::ZERO + Duration::from_secs(600 + minutes * 60);
        let mut tries = Tries::default();
        for (now, again) in [(0, Some(2)), (2, Some(6)), (6, Some(14)), (14, Some(30)), (30, None)] {
            tries.round_failed(at(now), |again| Rest::Everywhere { again });
            let expected = again.map_or(Rest::Failed, |again| Rest::Everywhere { again: at(again) });
            assert_eq!(tries.rest, expected, "after {now} minutes");
        }
        // One that took longer than the pause is followed by the next at once.
        let mut tries = Tries::default();
        tries.round_failed(at(0), |again| Rest::Hosts { again });
        tries.round_failed(at(9), |again| Rest::Hosts { again });
        assert_eq!(tries.rest, Rest::Hosts { again: at(9) });
    }
}
