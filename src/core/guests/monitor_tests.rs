//! Silence, and what is made of it. One guest, second by second.

use std::time::Duration;

use mainstay_guest::message::{Application, FromGuest};

use super::tests::{beat, unknown};
use super::*;
use crate::types::failure::{FailureKind, Family};
use crate::types::guests::{Glob, Limits, Monitor, Preset};

const WEB: VmId = VmId(uuid::Uuid::from_u128(1));
/// Where its disks lie, and where they do not.
const STORE: DatastoreId = DatastoreId(uuid::Uuid::from_u128(11));
const ELSEWHERE: DatastoreId = DatastoreId(uuid::Uuid::from_u128(12));

/// What the guest does in a second.
#[derive(Clone, Copy)]
struct Second {
    beats: bool,
    io: u64,
    /// Of one CPU.
    cpu: f64,
    runs: bool,
    storage_well: bool,
    application: Application,
}

const FINE: Second =
    Second { beats: true, io: 5, cpu: 0.1, runs: true, storage_well: true, application: Application::Unwatched };
const HUNG: Second = Second { beats: false, io: 0, cpu: 1.0, ..FINE };

struct Story {
    guests: Guests,
    /// Tenths of a second.
    now: u64,
    io: u64,
    cpu: Duration,
    boot: u8,
    booted: u64,
    told: Vec<String>,
    /// What its screen shows when it is looked at.
    shows: Class,
    /// Whatever is done to it fails.
    fails: bool,
}

fn story(monitor: Monitor) -> Story {
    let settings = GuestSettings {
        monitors: vec![monitor],
        limits: Limits { resets_per_hour: 3, backoff_s: 1 },
        ..GuestSettings::default()
    };
    let mut guests = Guests::default();
    let at = Time::ZERO + Duration::from_secs(1000);
    guests.step(at, GuestEvent::Settings(settings));
    guests.step(at, GuestEvent::Runs { vm: WEB, name: "web".to_owned(), stores: Some(vec![STORE]) });
    guests.step(at, GuestEvent::Connected(WEB));
    Story {
        guests,
        now: 0,
        io: 0,
        cpu: Duration::ZERO,
        boot: 1,
        booted: 0,
        told: Vec::new(),
        shows: unknown(),
        fails: false,
    }
}

/// 10 s without beats and I/O, not in the first 20 s.
fn quick() -> Monitor {
    let (silence_s, io_s, uptime_s) = (Some(10), Some(10), Some(20));
    Monitor { vm: Glob::any(), preset: Preset::Medium, silence_s, io_s, uptime_s, screen_s: None, dump: false }
}

impl Story {
    fn time(&self) -> Time {
        Time::ZERO + Duration::from_secs(1000) + Duration::from_millis(self.now * 100)
    }

    fn step(&mut self, second: Second, event: GuestEvent) {
        for act in self.guests.step(self.time(), event) {
            match act {
                GuestAct::Sample(vm) => {
                    let Second { runs, storage_well, .. } = second;
                    let sample = Some(Sample { runs, io: self.io, cpu: self.cpu, cpus: 1 });
                    let unwell = if storage_well { vec![ELSEWHERE] } else { vec![STORE] };
                    self.step(second, GuestEvent::Sampled { vm, sample, unwell });
                }
                GuestAct::Keep { ticket, .. } => self.step(second, GuestEvent::Looked(ticket, self.shows.clone())),
                GuestAct::Order { ticket, step, .. } => {
                    let step = format!("{step:?}").to_lowercase();
                    self.told.push(format!("{} {step}", self.now / 10));
                    if !self.fails {
                        (self.boot, self.booted) = (self.boot + 1, self.now / 10);
                    }
                    let result = if self.fails { Err("libvirt hangs".to_owned()) } else { Ok(()) };
                    self.step(second, GuestEvent::Done(ticket, result));
                }
                GuestAct::Note(note) => self.told.push(format!("{} {}", self.now / 10, note.kind)),
                // Its screen cannot be had.
                GuestAct::Glance { vm, .. } => {
                    self.step(second, GuestEvent::Glimpsed { vm, glimpse: None, unwell: Vec::new() });
                }
                GuestAct::Say(..) | GuestAct::Tell(..) | GuestAct::TellMaster(_) | GuestAct::Outcome(..) => {}
                GuestAct::TellOthers(_) | GuestAct::Save(..) | GuestAct::Inside(..) | GuestAct::Run { .. } => {}
            }
        }
    }

    /// So many seconds of this; what was told.
    fn goes(&mut self, seconds: u64, second: Second) -> Vec<String> {
        for _ in 0..seconds * 10 {
            if self.now.is_multiple_of(10) && second.beats {
                let beat = beat(self.boot, self.now / 10 - self.booted, second.application);
                self.step(second, GuestEvent::Said(WEB, Box::new(FromGuest::Beat(beat))));
            }
            if self.now % 10 == 5 {
                self.io += second.io;
            }
            self.cpu += Duration::from_millis(100).mul_f64(second.cpu);
            if self.guests.next_due().is_some_and(|due| due <= self.time()) {
                self.step(second, GuestEvent::Due);
            }
            self.now += 1;
        }
        std::mem::take(&mut self.told)
    }
}

const NOTHING: [&str; 0] = [];

#[test]
fn one_that_hangs_is_reset_within_two_seconds_of_its_time() {
    let mut story = story(quick());
    assert_eq!(story.goes(60, FINE), NOTHING);
    assert_eq!(story.goes(9, HUNG), NOTHING, "not before its time");
    let told = story.goes(3, HUNG);
    assert_eq!(told, ["70 guest-remedy", "70 reset"], "the last beat was at 59");
    // It does not come up: the uptime passes, then the same again, with back-off and at most three times.
    let told = story.goes(600, HUNG);
    let resets = told.iter().filter(|line| line.ends_with(" reset")).count();
    assert_eq!((resets, told.last().unwrap().ends_with("guest-needs-attention")), (2, true), "{told:?}");
}

#[test]
fn one_that_works_without_its_agent_is_told_once() {
    let mut story = story(quick());
    story.goes(60, FINE);
    let dead = Second { beats: false, ..FINE };
    assert_eq!(story.goes(300, dead), ["69 guest-agent-silent"]);
    assert_eq!(story.goes(60, FINE), NOTHING);
    assert_eq!(story.goes(15, dead), ["429 guest-agent-silent"], "a new silence");
}

#[test]
fn trouble_of_its_storage_and_a_pause_are_not_its_fault() {
    for trouble in [Second { storage_well: false, ..HUNG }, Second { runs: false, ..HUNG }] {
        let mut story = story(quick());
        story.goes(60, FINE);
        assert_eq!(story.goes(120, trouble), NOTHING);
        assert_eq!(story.goes(9, HUNG), NOTHING, "its time begins when the trouble is over");
        assert_eq!(story.goes(5, HUNG).last().unwrap(), "190 reset");
    }
}

#[test]
fn nothing_is_judged_soon_after_a_boot_or_without_an_agent() {
    let mut fresh = story(quick());
    fresh.goes(5, FINE);
    assert_eq!(fresh.goes(14, HUNG), NOTHING, "silent since 4, but booted at 0");
    assert_eq!(fresh.goes(3, HUNG).last().unwrap(), "20 reset");
    let mut without = story(quick());
    assert_eq!(without.goes(300, HUNG), NOTHING, "its agent was never heard");
    let mut leaves = story(quick());
    leaves.goes(60, FINE);
    leaves.step(FINE, GuestEvent::Said(WEB, Box::new(FromGuest::Leaves)));
    assert_eq!(leaves.goes(300, HUNG), NOTHING, "its agent was stopped");
    leaves.goes(5, FINE);
    assert_eq!(leaves.goes(15, HUNG).last().unwrap(), "375 reset", "it is there again");
}

#[test]
fn cpus_that_spin_or_stand_shorten_the_wait_for_io() {
    let high = Monitor { preset: Preset::High, silence_s: None, io_s: None, uptime_s: None, ..quick() };
    for (cpu, expected) in [(1.0, "230 reset"), (0.0, "230 reset"), (0.3, "260 reset")] {
        let mut story = story(high.clone());
        story.goes(200, FINE);
        let told = story.goes(100, Second { cpu, ..HUNG });
        assert_eq!(told.last().unwrap(), expected, "{cpu}");
    }
}

/// It works without its agent, and is looked at rarely: the time between two samples is longer than its I/O window.
#[test]
fn a_sample_that_does_not_come_in_time_is_no_stillness() {
    let mut story = story(Monitor { silence_s: Some(3), io_s: Some(3), ..quick() });
    story.goes(60, FINE);
    assert_eq!(story.goes(7, Second { beats: false, ..FINE }), ["62 guest-agent-silent"]);
    for _ in 0..10 {
        let acts = story.guests.step(story.time(), GuestEvent::Sampled { vm: WEB, sample: None, unwell: Vec::new() });
        assert!(acts.iter().all(|act| matches!(act, GuestAct::Glance { .. })), "{acts:?}");
        story.now += 2;
    }
}

#[test]
fn samples_that_do_not_come_judge_nobody() {
    let mut story = story(quick());
    story.goes(60, FINE);
    story.goes(5, HUNG);
    story.now += 600; // This host was asleep.
    assert_eq!(story.goes(9, HUNG), NOTHING);
    let lost = |story: &mut Story| {
        let acts = story.guests.step(story.time(), GuestEvent::Sampled { vm: WEB, sample: None, unwell: Vec::new() });
        assert!(acts.iter().all(|act| matches!(act, GuestAct::Glance { .. })), "libvirt did not answer: {acts:?}");
    };
    lost(&mut story);
    story.step(HUNG, GuestEvent::Disconnected(WEB));
    assert_eq!(story.goes(60, HUNG), NOTHING, "its channel is closed on this side");
}

#[test]
fn a_silent_application_and_a_panic_count_at_once() {
    let mut story = story(quick());
    story.goes(60, Second { application: Application::Active, ..FINE });
    let silent = Second { application: Application::Silent, ..FINE };
    assert_eq!(story.goes(2, silent), ["60 guest-remedy", "60 reset"]);
    story.goes(60, FINE);
    story.step(FINE, GuestEvent::Panicked { vm: WEB, held: true });
    assert_eq!(story.told, ["122 guest-remedy", "122 reset", "122 resume"], "its CPUs stood");
}

#[test]
fn one_whose_reset_fails_is_judged_again_and_one_that_it_would_not_help_is_not() {
    let mut story = story(quick());
    story.goes(60, FINE);
    story.fails = true;
    let told = story.goes(50, HUNG);
    let expected = ["70 guest-remedy", "70 reset", "70 guest-remedy-failed"];
    assert_eq!(told[..3], expected);
    assert_eq!(told[3..6], ["71 guest-remedy", "71 reset", "71 guest-remedy-failed"], "after the back-off");
    assert!(told.len() < 20, "ever later: {told:?}");
    story.fails = false;
    assert_eq!(story.goes(30, HUNG).last().unwrap().split_once(' ').unwrap().1, "reset", "libvirt answers again");

    let mut story = self::story(quick());
    story.goes(60, FINE);
    story.shows = Class { family: Family::Boot, kind: FailureKind::NoBootDevice, line: "No bootable device.".into() };
    assert_eq!(story.goes(300, HUNG), ["70 guest-remedy", "70 guest-remedy-refused"], "once");
}

#[test]
fn without_knowing_its_disks_any_datastore_of_the_host_excuses_it() {
    for (stores, expected) in [(None, 0), (Some(vec![STORE, ELSEWHERE]), 0), (Some(vec![STORE]), 2)] {
        let mut story = story(quick());
        story.step(FINE, GuestEvent::Runs { vm: WEB, name: "web".to_owned(), stores });
        story.goes(60, FINE);
        assert_eq!(story.goes(20, HUNG).len(), expected);
    }
}

#[test]
fn a_watchdog_counts_at_once_where_nothing_else_follows() {
    for (action, expected) in [
        (Some("none"), vec!["5 guest-remedy", "5 reset"]),
        (Some("pause"), vec!["5 guest-remedy", "5 reset", "5 resume"]),
        (Some("reset"), vec!["5 guest-watchdog"]),
        (Some("inject-nmi"), vec!["5 guest-watchdog"]),
        (None, vec!["5 guest-watchdog"]),
    ] {
        let mut story = story(quick());
        story.goes(5, FINE);
        story.step(FINE, GuestEvent::WatchdogFired(WEB, Watchdog::named(action)));
        assert_eq!(story.told, expected, "{action:?}");
    }
    let mut unwatched = story(Monitor { preset: Preset::Off, ..quick() });
    unwatched.step(FINE, GuestEvent::WatchdogFired(WEB, Watchdog::Nothing));
    unwatched.step(FINE, GuestEvent::Panicked { vm: WEB, held: true });
    assert_eq!(unwatched.told, ["0 guest-failed", "0 guest-failed"]);
}

#[test]
fn a_panic_at_every_boot_is_reset_three_times_and_then_needs_attention() {
    let (mut story, mut told) = (story(quick()), Vec::new());
    for _ in 0..6 {
        told.extend(story.goes(60, FINE));
        story.step(FINE, GuestEvent::Panicked { vm: WEB, held: true });
    }
    told.extend(story.goes(60, FINE));
    let count = |word: &str| told.iter().filter(|line| line.ends_with(word)).count();
    assert_eq!((count(" reset"), count("guest-needs-attention")), (3, 1), "{told:?}");

    let mut by_libvirt = self::story(quick());
    for _ in 0..3 {
        by_libvirt.step(FINE, GuestEvent::Panicked { vm: WEB, held: false });
    }
    assert_eq!(by_libvirt.told, NOTHING, "libvirt starts it anew, or the crash is mended as one");
    by_libvirt.step(FINE, GuestEvent::Panicked { vm: WEB, held: false });
    assert_eq!(by_libvirt.told, ["0 guest-needs-attention"]);
}

#[test]
fn reboots_again_and_again_are_told_but_not_those_of_remedies() {
    let mut story = story(quick());
    for _ in 0..4 {
        story.goes(60, FINE);
        story.step(FINE, GuestEvent::Rebooted(WEB));
    }
    assert_eq!(story.told, NOTHING);
    story.step(FINE, GuestEvent::Panicked { vm: WEB, held: true });
    story.step(FINE, GuestEvent::Rebooted(WEB));
    assert_eq!(story.told.len(), 3, "that was the reset: {:?}", story.told);
    story.goes(60, FINE);
    story.step(FINE, GuestEvent::Rebooted(WEB));
    assert_eq!(story.told, ["300 guest-reboots"]);
}
