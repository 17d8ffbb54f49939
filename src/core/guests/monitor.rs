//! Whether a guest that has become silent has failed. Several signals have to agree; none of them alone resets anything.
//!
//! ```text
//!   beats come ───────────────────────────────────────────► well; nothing is asked of libvirt
//!   late ── sampled twice a second, from then on:
//!           paused, or a datastore of its disks (of this
//!             host, if they are not known) is not well ───► starts anew: not the guest's fault
//!           silent for `silence`, but it does I/O ────────► told, once: its agent has died, not the guest; looked at on
//!           silent, and no I/O for `io` ──────────────────► failed
//!           silent, no I/O meanwhile, and all its CPUs
//!             spin or none has moved ─────────────────────► failed, before `io` has passed
//!   the application inside is silent by its own time ─────► failed
//! ```
//!
//! Only a guest whose agent has been heard on this host, and did not say that it leaves, is judged, and none in the first `uptime` after a boot. Samples that do
//! not come, or come late, judge nobody: who was asleep here, or could not ask libvirt, has not seen a silence.
//!
//! The idea, and the presets, are those of vSphere HA's VM monitoring (failure interval, minimum uptime, I/O check).

use std::time::Duration;

use mainstay_guest::message::{Application, Beat};

use super::{GuestAct, Guests};
use crate::core::guests::remedies::Cause;
use crate::core::note::Note;
use crate::types::guests::{Inside, Remedy, Watchfulness};
use crate::types::{DatastoreId, Time, VmId};

/// A beat that is later than this is missed.
const LATE: Duration = Duration::from_millis(1200);
/// Between two samples of a guest that is late.
const PACE: Duration = Duration::from_millis(500);
/// The same, when people know that only its agent is silent.
const SLOW: Duration = Duration::from_secs(4);
/// Samples further apart than this do not belong together; one that has not come by then is asked for again.
const GAP: Duration = Duration::from_secs(10);
/// It works if it has done I/O within this time.
const LATELY: Duration = Duration::from_secs(5);
/// CPUs that have moved less than this part of the time stand; more than the second, of each, and they spin.
pub(super) const STILL: f64 = 0.0005;
pub(super) const SPINS: f64 = 0.95;

/// What libvirt says of a VM at one moment.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sample {
    /// Its CPUs may move.
    pub runs: bool,
    /// Requests of its disks and packets that it has sent, all together; only a change says something.
    pub io: u64,
    /// CPU time of all its CPUs.
    pub cpu: Duration,
    /// CPUs.
    pub cpus: u32,
}

/// One sample, and since when what it shows has not changed.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: Time,
    sample: Sample,
    /// No I/O since; and whether there was any before.
    still: Time,
    moved: bool,
    /// All CPUs spin, or none moves, since; none = neither.
    stuck: Option<Time>,
}

/// What is known of one guest.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Its channel is open on this side.
    connected: bool,
    /// Its agent was heard, in this or an earlier boot.
    known: bool,
    /// When it booted, as far as known.
    booted: Time,
    /// The boot that it is in, and the one that was ended from outside: what that one said may come late.
    boot: Option<[u8; 16]>,
    ended: Option<[u8; 16]>,
    beat: Time,
    application: Application,
    /// How far it is.
    pub(super) inside: Inside,
    /// Silence before this is not the guest's.
    excused: Time,
    seen: Option<Seen>,
    /// A sample is being asked for, since.
    asked: Option<Time>,
    /// People know that its agent is silent.
    told: bool,
    /// Something is done about it, or nothing would help: until it is heard again, or what was done has failed.
    settled: bool,
}

enum Verdict {
    Well,
    Works(String),
    Failed(String),
}

impl Watch {
    pub(super) fn connected(&mut self, now: Time, connected: bool) {
        if connected && !self.connected {
            self.excuse(now);
        }
        self.connected = connected;
    }

    pub(super) fn beats(&mut self, now: Time, beat: &Beat) {
        if self.ended == Some(beat.boot) {
            return;
        }
        let uptime = Duration::from_secs(beat.uptime_s);
        self.boot = Some(beat.boot);
        (self.known, self.beat, self.application) = (true, now, beat.application);
        // Never less within a boot: who starts after it waits for the first time, and a guest that changes its word costs nothing.
        self.inside = self.inside.max(if beat.ready { Inside::Ready } else { Inside::Heard });
        self.booted = Time::ZERO + now.since(Time::ZERO).saturating_sub(uptime);
        if self.application != Application::Silent {
            (self.seen, self.told, self.settled) = (None, false, false);
        }
    }

    /// It is started anew; its agent is expected again.
    pub(super) fn boots(&mut self, now: Time) {
        (self.ended, self.booted, self.application) = (self.boot.take(), now, Application::Unwatched);
        (self.told, self.settled, self.inside) = (false, false, Inside::Silent);
        self.excuse(now);
    }

    /// Its agent was told to end: until it is heard again its silence means nothing.
    pub(super) fn leaves(&mut self) {
        (self.known, self.seen, self.application) = (false, None, Application::Unwatched);
    }

    /// It does not run here any more.
    pub(super) fn ended(&mut self) {
        *self = Self::default();
    }

    /// It is heard, and well.
    pub(super) fn is_well(&self, now: Time) -> bool {
        now.since(self.beat) < LATE && self.application != Application::Silent
    }

    /// How often it is sampled; none = its beats come, or are not expected, or enough was made of their absence.
    pub(super) fn pace(&self) -> Option<Duration> {
        let is_late = self.connected && self.known && !self.settled && self.seen.is_some();
        is_late.then_some(if self.told { SLOW } else { PACE })
    }

    /// Its agent was heard within this time, and its channel is open.
    pub(super) fn is_heard(&self, now: Time, within: Duration) -> bool {
        self.connected && self.known && now.since(self.beat) <= within
    }

    /// What was to be done about it has failed: it is as before.
    pub(super) fn judge_again(&mut self) {
        self.settled = false;
    }

    fn excuse(&mut self, now: Time) {
        (self.excused, self.seen) = (now, None);
    }

    /// Since when nothing was heard that should have been.
    fn silent_since(&self) -> Time {
        self.beat.max(self.booted).max(self.excused)
    }

    /// When a sample is wanted, or its answer is overdue.
    pub(super) fn due(&self, limits: Option<Watchfulness>) -> Option<Time> {
        let limits = limits.filter(|_| self.connected && self.known && !self.settled)?;
        if let Some(asked) = self.asked {
            return Some(asked + GAP);
        }
        if let Some(seen) = self.seen {
            return Some(seen.at + if self.told { SLOW } else { PACE });
        }
        // What happens soon after a boot is not looked at.
        let quiet = self.booted + limits.uptime.saturating_sub(limits.silence);
        let late = if self.application == Application::Silent { self.beat } else { self.silent_since() + LATE };
        Some(late.max(quiet))
    }

    fn take(&mut self, now: Time, sample: Option<Sample>, storage_well: bool) {
        self.asked = None;
        let before = self.seen.filter(|seen| now.since(seen.at) <= GAP);
        if self.seen.is_some() && before.is_none() {
            self.excuse(now);
        }
        let Some(sample) = sample else { return };
        if !sample.runs || !storage_well {
            return self.excuse(now);
        }
        let first = Seen { at: now, sample, still: now, moved: false, stuck: Some(now) };
        self.seen = Some(before.map_or(first, |seen| seen.next(now, sample)));
    }

    fn verdict(&self, now: Time, limits: Watchfulness) -> Verdict {
        let Some(seen) = self.seen.filter(|_| !self.settled && limits.uptime <= now.since(self.booted)) else {
            return Verdict::Well;
        };
        if self.application == Application::Silent {
            return Verdict::Failed("the application inside is silent".to_owned());
        }
        let (silent, still) = (now.since(self.silent_since()), now.since(seen.still));
        if silent < limits.silence {
            return Verdict::Well;
        }
        let stuck = seen.stuck.is_some_and(|since| limits.silence <= now.since(since));
        let text = format!("its agent has been silent for {} s", silent.as_secs());
        if limits.io <= still || stuck && limits.silence <= still {
            let cpus = if stuck { ", and its CPUs spin or stand" } else { "" };
            Verdict::Failed(format!("{text}, it did no I/O for {} s{cpus}", still.as_secs()))
        } else if seen.moved && still < LATELY && !self.told {
            Verdict::Works(text)
        } else {
            Verdict::Well
        }
    }
}

impl Seen {
    fn next(self, now: Time, sample: Sample) -> Self {
        let moves = sample.io != self.sample.io;
        let used = sample.cpu.saturating_sub(self.sample.cpu).as_secs_f64();
        let part = used / now.since(self.at).as_secs_f64().max(f64::MIN_POSITIVE);
        let is_stuck = part < STILL || SPINS * f64::from(sample.cpus) <= part;
        Self {
            at: now,
            sample,
            still: if moves { now } else { self.still },
            moved: self.moved || moves,
            stuck: if is_stuck { self.stuck.or(Some(self.at)) } else { None },
        }
    }
}

impl Guests {
    /// Asks for samples that are due.
    pub(super) fn look(&mut self, now: Time) {
        let settings = &self.settings;
        let due = |(vm, guest): (&VmId, &mut super::Guest)| {
            let limits = settings.watchfulness(&guest.name);
            guest.watch.due(limits).filter(|due| *due <= now)?;
            guest.watch.asked = Some(now);
            Some(*vm)
        };
        let due: Vec<VmId> = self.vms.iter_mut().filter_map(due).collect();
        due.into_iter().for_each(|vm| self.act(GuestAct::Sample(vm)));
    }

    /// A sample has come, or could not be had. `unwell`: datastores that are not well for this host.
    pub(super) fn sampled(&mut self, now: Time, vm: VmId, sample: Option<Sample>, unwell: &[DatastoreId]) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        let (storage_well, came) = (guest.storage_well(unwell), sample.is_some());
        guest.watch.take(now, sample, storage_well);
        if !came {
            return; // What was seen before says nothing about the time since.
        }
        let Some(limits) = self.settings.watchfulness(&guest.name) else { return };
        match guest.watch.verdict(now, limits) {
            Verdict::Well => {}
            Verdict::Works(text) => {
                guest.watch.told = true;
                let text = format!("{}: {text}, but it does I/O: nothing is done", guest.name);
                self.note(now, vm, Note::warning("guest-agent-silent", text));
            }
            Verdict::Failed(why) => {
                guest.watch.settled = true;
                self.remedy(now, vm, Remedy::Reset, Cause::Monitor, &why);
            }
        }
    }
}
