//! Screens, and what is made of them. One guest, tenth by tenth of a second.

use std::time::Duration;

use mainstay_guest::message::{Application, FromGuest};

use super::tests::beat;
use super::*;
use crate::types::failure::FailureKind;
use crate::types::guests::{Glob, Limits, Monitor, Preset};

const WEB: VmId = VmId(uuid::Uuid::from_u128(1));
const STORE: DatastoreId = DatastoreId(uuid::Uuid::from_u128(2));
const STOP: &str = "*** STOP: 0x0000007B (0xF78D2524,0xC0000034)";
const NOTHING: [&str; 0] = [];

/// What the guest does and shows.
#[derive(Clone, Copy)]
struct Shown {
    text: &'static str,
    /// In a graphics mode.
    is_picture: bool,
    /// Without a screen.
    is_blind: bool,
    /// On its serial console, and when that was written, in tenths.
    console: Option<(&'static str, u64)>,
    beats: bool,
    io: u64,
    cpu: f64,
    runs: bool,
    storage_well: bool,
}

const FINE: Shown = Shown {
    text: "web login:",
    is_picture: false,
    is_blind: false,
    console: None,
    beats: false,
    io: 1,
    cpu: 0.1,
    runs: true,
    storage_well: true,
};
/// Halted.
const STOPPED: Shown = Shown { text: STOP, io: 0, cpu: 0.0, ..FINE };

struct Story {
    guests: Guests,
    /// Tenths of a second.
    now: u64,
    io: u64,
    cpu: Duration,
    reads: usize,
    told: Vec<String>,
    signs: Vec<FailureKind>,
}

/// A guest without an agent, looked at so often.
fn story(screen_s: Option<u32>) -> Story {
    let (silence_s, io_s, uptime_s) = (Some(10), Some(20), Some(20));
    let monitor = Monitor { vm: Glob::any(), preset: Preset::Medium, silence_s, io_s, uptime_s, screen_s, dump: false };
    let limits = Limits { resets_per_hour: 3, backoff_s: 30 };
    let settings = GuestSettings { monitors: vec![monitor], limits, ..GuestSettings::default() };
    let (told, signs) = (Vec::new(), Vec::new());
    let mut story = Story { guests: Guests::default(), now: 0, io: 0, cpu: Duration::ZERO, reads: 0, told, signs };
    story.guests.step(story.time(), GuestEvent::Settings(settings));
    story.guests.step(story.time(), GuestEvent::Runs { vm: WEB, name: "web".to_owned(), stores: Some(vec![STORE]) });
    story.guests.step(story.time(), GuestEvent::Connected(WEB));
    story
}

impl Story {
    fn time(&self) -> Time {
        Time::ZERO + Duration::from_secs(1000) + Duration::from_millis(self.now * 100)
    }

    fn step(&mut self, shown: Shown, event: GuestEvent) {
        for act in self.guests.step(self.time(), event) {
            let Shown { text, is_picture, is_blind, console, runs, storage_well, .. } = shown;
            let sample = Sample { runs, io: self.io, cpu: self.cpu, cpus: 2 };
            let unwell = if storage_well { Vec::new() } else { vec![STORE] };
            match act {
                GuestAct::Sample(vm) => self.step(shown, GuestEvent::Sampled { vm, sample: Some(sample), unwell }),
                GuestAct::Glance { vm, read } => {
                    let mark = Mark(text.bytes().fold(7, |mark, byte| mark * 31 % 1_000_003 + u64::from(byte)));
                    let shows = match (is_picture, read == Some(mark)) {
                        _ if is_blind => Shows::Nothing,
                        (false, _) => Shows::Text(text.to_owned()),
                        (true, false) => Shows::Picture,
                        (true, true) => {
                            self.reads += 1;
                            Shows::Read(text.to_owned())
                        }
                    };
                    let console = console.map(|(text, written)| ConsoleEnd {
                        mark: Mark(written),
                        text: text.to_owned(),
                        written: Some(Time::ZERO + Duration::from_secs(1000) + Duration::from_millis(written * 100)),
                    });
                    let glimpse = Some(Glimpse { mark, shows, sample, console });
                    self.step(shown, GuestEvent::Glimpsed { vm, glimpse, unwell });
                }
                GuestAct::Keep { ticket, case, .. } => {
                    let class = case.sign.clone().expect("its screen was the reason");
                    self.signs.push(class.kind);
                    self.step(shown, GuestEvent::Looked(ticket, class));
                }
                GuestAct::Order { ticket, step, .. } => {
                    self.told.push(format!("{} {step:?}", self.now / 10).to_lowercase());
                    self.step(shown, GuestEvent::Done(ticket, Ok(())));
                }
                GuestAct::Note(note) => self.told.push(format!("{} {}", self.now / 10, note.text)),
                GuestAct::Say(..) | GuestAct::Tell(..) | GuestAct::TellMaster(_) | GuestAct::Outcome(..) => {}
                GuestAct::TellOthers(_) | GuestAct::Save(..) | GuestAct::Run { .. } | GuestAct::Inside(..) => {}
            }
        }
    }

    /// So many seconds of this; what was told.
    fn goes(&mut self, seconds: u64, shown: Shown) -> Vec<String> {
        for _ in 0..seconds * 10 {
            if self.now.is_multiple_of(10) && shown.beats {
                let beat = beat(1, self.now / 10, Application::Unwatched);
                self.step(shown, GuestEvent::Said(WEB, Box::new(FromGuest::Beat(beat))));
            }
            self.io += shown.io;
            self.cpu += Duration::from_millis(100).mul_f64(shown.cpu);
            if self.guests.next_due().is_some_and(|due| due <= self.time()) {
                self.step(shown, GuestEvent::Due);
            }
            self.now += 1;
        }
        std::mem::take(&mut self.told)
    }
}

#[test]
fn a_stop_screen_that_stands_is_reset_without_an_agent() {
    for is_picture in [false, true] {
        let mut story = story(Some(2));
        let fine = Shown { is_picture, ..FINE };
        assert_eq!(story.goes(61, fine), NOTHING);
        let told = story.goes(10, Shown { is_picture, ..STOPPED });
        let why = format!("its screen has shown for 4 s: Windows stop screen ({STOP})");
        assert_eq!(told, [format!("66 web: reset: {why}"), "66 reset".to_owned()], "seen at 62, and at 66 for 4 s");
        // Read once; what it showed when it worked is not.
        assert_eq!((story.signs.as_slice(), story.reads), (&[FailureKind::StopScreen][..], usize::from(is_picture)));
    }
    let mut unasked = story(None);
    assert_eq!(unasked.goes(300, STOPPED), NOTHING, "the policy does not say so");
}

#[test]
fn what_moves_beats_or_is_held_up_is_not_stuck() {
    for (what, shown) in [
        ("it does I/O", Shown { io: 1, ..STOPPED }),
        ("its agent is heard", Shown { beats: true, ..STOPPED }),
        ("it is paused", Shown { runs: false, ..STOPPED }),
        ("its storage is in trouble", Shown { storage_well: false, ..STOPPED }),
        ("an oops may be survived", Shown { text: "Oops: 0002 [#1] PREEMPT SMP NOPTI", ..STOPPED }),
        ("nothing of that", Shown { text: "C:\\>", ..STOPPED }),
    ] {
        assert_eq!(story(Some(2)).goes(300, shown), NOTHING, "{what}");
    }
    let mut changes = story(Some(2));
    for _ in 0..10 {
        assert_eq!(changes.goes(3, STOPPED), NOTHING);
        assert_eq!(changes.goes(2, Shown { text: "*** STOP: 0x0000007B dumping", ..STOPPED }), NOTHING);
    }
    let mut works = story(Some(2));
    let told = works.goes(30, Shown { cpu: 0.3, ..STOPPED });
    assert_eq!(told.last().unwrap(), "20 reset", "its CPUs neither spin nor stand: after the I/O window");
    assert_eq!(story(Some(2)).goes(8, Shown { cpu: 1.0, ..STOPPED }).last().unwrap(), "4 reset", "one of two spins");
}

#[test]
fn what_waits_for_a_person_is_told_once_and_left_alone() {
    for (text, expected) in [
        ("No bootable device.", "no bootable device (No bootable device.); nothing is done: look at its disks"),
        (
            "error: unknown filesystem.\ngrub rescue>",
            "boot loader (error: unknown filesystem.); nothing is done: look at its console",
        ),
        ("(initramfs)", "Linux initramfs shell ((initramfs)); nothing is done: look at its console"),
    ] {
        let mut story = story(Some(2));
        assert_eq!(story.goes(9, Shown { text, ..STOPPED }), NOTHING, "a boot passes by that");
        let told = story.goes(600, Shown { text, ..STOPPED });
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains(expected), "{told:?}");
    }
}

#[test]
fn the_screen_of_a_silent_agents_guest_shortens_the_wait() {
    let mut story = story(None);
    story.goes(60, Shown { beats: true, ..FINE });
    let panic = Shown { text: "Kernel panic - not syncing: sysrq triggered crash", cpu: 1.0, ..STOPPED };
    let told = story.goes(30, panic);
    assert_eq!(told.last().unwrap(), "63 reset", "the last beat was at 59; without a screen it would be 70");
    assert_eq!(story.signs, [FailureKind::Panic]);
}

#[test]
fn resets_have_their_limits_and_one_that_is_not_needed_any_more_is_not_done() {
    let mut limited = story(Some(2));
    let told = limited.goes(600, STOPPED);
    let resets: Vec<&String> = told.iter().filter(|line| line.ends_with(" reset")).collect();
    assert_eq!(resets, ["4 reset", "34 reset", "94 reset"]);
    assert!(told.last().unwrap().contains("needs attention"), "{told:?}");

    for is_reset_by_a_person in [false, true] {
        let mut story = story(Some(2));
        assert_eq!(story.goes(20, STOPPED).last().unwrap(), "4 reset", "and the next one waits");
        if is_reset_by_a_person {
            story.step(FINE, GuestEvent::Rebooted(WEB));
        }
        let told = story.goes(60, FINE);
        assert_eq!(told, ["34 web is heard again, or shows something else: nothing is done any more"]);
    }
}

const PANIC: &str =
    "[ 9.1] Kernel Offset: disabled\r\n[ 9.2] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n";

#[test]
fn a_panic_that_ends_a_console_is_as_good_as_a_screen() {
    for is_blind in [true, false] {
        let mut story = story(Some(2));
        assert_eq!(story.goes(61, Shown { is_blind, console: Some(("web login:", 300)), ..FINE }), NOTHING);
        let told = story.goes(10, Shown { text: "", is_blind, console: Some((PANIC, 605)), ..STOPPED });
        let why =
            "its serial console has ended for 4 s: Linux panic (Kernel panic - not syncing: sysrq triggered crash)";
        assert_eq!(told, [format!("66 web: reset: {why}"), "66 reset".to_owned()]);
        assert_eq!(story.signs, [FailureKind::Panic]);
    }
}

#[test]
fn a_console_that_may_be_of_another_boot_or_goes_on_counts_nothing() {
    let of = |text, written| Shown { text: "", console: Some((text, written)), ..STOPPED };
    for (what, shown) in [
        ("it was written before the guest was seen", of(PANIC, 0)),
        ("somebody may log in", of("Kernel panic - not syncing: x\nweb login:", 5)),
        ("it goes on", of("Kernel panic - not syncing: x\nCall Trace:", 5)),
        ("it does I/O", Shown { io: 1, ..of(PANIC, 5) }),
        ("its agent is heard", Shown { beats: true, ..of(PANIC, 5) }),
        ("an oops may be survived", of("Oops: 0002 [#1] PREEMPT SMP NOPTI", 5)),
        ("a prompt on it says nothing", of("grub> ", 5)),
    ] {
        assert_eq!(story(Some(2)).goes(300, shown), NOTHING, "{what}");
    }
    let mut booted = story(Some(2));
    booted.goes(10, of("", 5));
    booted.step(FINE, GuestEvent::Rebooted(WEB));
    assert_eq!(booted.goes(300, of(PANIC, 50)), NOTHING, "its boot says nothing on it");
}

#[test]
fn what_was_seen_once_has_not_stood() {
    let blind = |console| Shown { text: "", is_blind: true, console, ..STOPPED };
    let mut goes_on = story(Some(2));
    assert_eq!(goes_on.goes(3, blind(Some((PANIC, 5)))), NOTHING);
    assert_eq!(goes_on.goes(300, blind(Some(("web login:", 25)))), NOTHING, "it has booted");
    let mut unread = story(Some(2));
    assert_eq!(unread.goes(3, blind(Some((PANIC, 5)))), NOTHING);
    assert_eq!(unread.goes(10, blind(None)), NOTHING, "looks that show nothing");
    assert_eq!(unread.goes(3, blind(Some((PANIC, 5)))).last().unwrap(), "14 reset", "seen again");
}
