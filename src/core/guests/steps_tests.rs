//! Remedies, step by step. One VM.

use std::time::Duration;

use mainstay_guest::message::{Application, FromGuest, GuestHello, Report, ReportId, Severity, System, Wish};

use super::tests::{beat, unknown};
use super::*;
use crate::types::guests::{Consequence, Glob, Rule};

const WEB: VmId = VmId(uuid::Uuid::from_u128(1));

struct Story {
    guests: Guests,
    second: u64,
    reports: u8,
}

/// Any report of it gets this.
fn story(remedy: Remedy) -> Story {
    let rule = Rule { then: Consequence::Own(remedy), ..GuestSettings::default().rules[0].clone() };
    let settings = GuestSettings { rules: vec![Rule { kind: Glob::any(), ..rule }], ..GuestSettings::default() };
    let mut story = Story { guests: Guests::default(), second: 1000, reports: 0 };
    story.happens(GuestEvent::Settings(settings));
    story.happens(runs());
    story.happens(GuestEvent::Connected(WEB));
    story.boots(1);
    story
}

fn runs() -> GuestEvent {
    GuestEvent::Runs { vm: WEB, name: "web".to_owned(), stores: None }
}

impl Story {
    fn boots(&mut self, boot: u8) -> Vec<String> {
        let hello = GuestHello { protocol: 1, agent: String::new(), boot: [boot; 16], system: System::default() };
        self.happens(GuestEvent::Said(WEB, Box::new(FromGuest::Hello(hello))))
    }

    fn beats(&mut self, boot: u8) {
        let beat = beat(boot, 100, Application::Unwatched);
        self.happens(GuestEvent::Said(WEB, Box::new(FromGuest::Beat(beat))));
    }

    fn reports(&mut self) -> Vec<String> {
        self.reports += 1;
        let (kind, message) = ("app/db".to_owned(), "broken".to_owned());
        let (id, severity) = (ReportId([self.reports; 16]), Severity::Critical);
        let report = Report { id, sequence: 1, boot: [1; 16], severity, kind, message, wish: Wish::None };
        self.happens(GuestEvent::Said(WEB, Box::new(FromGuest::Report(report))))
    }

    fn done(&mut self, ticket: u64, result: Result<(), &str>) -> Vec<String> {
        self.happens(GuestEvent::Done(Ticket(ticket), result.map_err(str::to_owned)))
    }

    fn passes(&mut self, seconds: u64) -> Vec<String> {
        self.second += seconds;
        self.happens(GuestEvent::Due)
    }

    fn happens(&mut self, event: GuestEvent) -> Vec<String> {
        let (mut all, mut events) = (Vec::new(), vec![event]);
        while let Some(event) = events.pop() {
            for act in self.guests.step(Time::ZERO + Duration::from_secs(self.second), event) {
                match act {
                    GuestAct::Keep { ticket, .. } => events.push(GuestEvent::Looked(ticket, unknown())),
                    GuestAct::Order { ticket, step: Step::Dump { failure, .. }, .. } => {
                        all.push(format!("Dump of {} {}", failure.0, ticket.0));
                    }
                    GuestAct::Order { ticket, step, .. } => all.push(format!("{step:?} {}", ticket.0)),
                    GuestAct::Say(_, ToGuest::Ask { ask, order }) => all.push(format!("asked {order:?} {ask}")),
                    GuestAct::Say(_, ToGuest::Answer { verdict, why, .. }) => all.push(format!("{verdict}: {why}")),
                    GuestAct::Outcome(ticket, result) => all.push(format!("outcome {}: {result:?}", ticket.0)),
                    GuestAct::Save(number, _) => events.push(GuestEvent::Saved(number)),
                    GuestAct::TellOthers(_) => all.push("others are told".to_owned()),
                    GuestAct::Say(..)
                    | GuestAct::Inside(..)
                    | GuestAct::Sample(_)
                    | GuestAct::Glance { .. }
                    | GuestAct::Run { .. }
                    | GuestAct::Tell(..)
                    | GuestAct::TellMaster(_)
                    | GuestAct::Note(_) => {}
                }
            }
        }
        all
    }
}

#[test]
fn a_reboot_is_asked_of_the_agent_and_ends_with_the_boot() {
    let mut story = story(Remedy::Reboot);
    story.beats(1);
    assert_eq!(story.reports(), ["asked Reboot 1"]);
    assert_eq!(story.happens(GuestEvent::Said(WEB, Box::new(FromGuest::Outcome { ask: 1, result: Ok(()) }))), [""; 0]);
    assert_eq!(story.passes(60), [""; 0], "it takes its time");
    assert_eq!(story.boots(2), ["outcome 1: Ok(())", "done: reboot"]);
}

#[test]
fn a_reboot_that_does_not_come_becomes_a_reset() {
    let mut refused = story(Remedy::Reboot);
    refused.beats(1);
    refused.reports();
    let no = |ask| GuestEvent::Said(WEB, Box::new(FromGuest::Outcome { ask, result: Err("busy".to_owned()) }));
    assert_eq!(refused.happens(no(7)), [""; 0], "nobody has asked that");
    assert_eq!(refused.happens(no(1)), ["Reset 2"]);
    assert_eq!(refused.happens(no(1)), [""; 0]);
    assert_eq!(refused.done(2, Ok(())), ["outcome 1: Ok(())", "done: reboot"]);

    let mut silent = story(Remedy::Reboot);
    assert_eq!(silent.reports(), ["Reboot 2"], "its agent is not heard: libvirt asks it");
    assert_eq!(silent.done(2, Ok(())), [""; 0]);
    assert_eq!(silent.passes(119), [""; 0]);
    assert_eq!(silent.passes(1), ["Reset 3"]);
    assert_eq!(silent.done(3, Ok(())), ["outcome 1: Ok(())", "done: reboot"]);

    let mut gone = story(Remedy::Reboot);
    gone.reports();
    gone.done(2, Ok(()));
    let outcome = gone.happens(GuestEvent::Ended(WEB));
    assert_eq!(outcome[0], "outcome 1: Err(\"it has ended, and did not boot\")");
}

#[test]
fn a_power_cycle_is_done_when_it_runs_again() {
    let mut story = story(Remedy::PowerCycle);
    assert_eq!(story.reports(), ["End 2"]);
    assert_eq!(story.done(2, Ok(())), [""; 0]);
    assert_eq!(story.happens(runs()), [""; 0], "it still runs");
    assert_eq!(story.happens(GuestEvent::Ended(WEB)), [""; 0]);
    assert_eq!(story.happens(runs()), ["outcome 1: Ok(())", "done: power-cycle"]);
}

#[test]
fn one_that_does_not_come_back_has_lost_its_state_and_counts() {
    let mut story = story(Remedy::PowerCycle);
    story.reports();
    story.done(2, Ok(()));
    story.happens(GuestEvent::Ended(WEB));
    let told = story.passes(60);
    assert!(
        told[1].starts_with("denied: the power-cycle failed: its QEMU was ended, and it has not come back"),
        "{told:?}"
    );
    assert!(story.reports()[0].starts_with("delayed"), "not at once again");
    assert_eq!(story.guests.vms[&WEB].history.counted(), 1);
}

#[test]
fn a_restart_elsewhere_moves_what_has_come_back() {
    let mut story = story(Remedy::RestartElsewhere);
    assert_eq!(story.reports(), ["others are told", "End 2"]);
    story.done(2, Ok(()));
    story.happens(GuestEvent::Ended(WEB));
    assert_eq!(story.happens(runs()), ["Move 3"]);
    assert_eq!(story.done(3, Err("it is being worked on")), [""; 0]);
    assert_eq!(story.passes(1), ["Move 4"]);
    assert_eq!(story.done(4, Ok(())), ["outcome 1: Ok(())", "done: restart-elsewhere"]);
}

#[test]
fn a_move_that_is_denied_for_long_has_failed() {
    let mut story = story(Remedy::Migrate);
    assert_eq!(story.reports(), ["others are told", "Move 2"]);
    let mut ticket = 2;
    let failed = loop {
        let told = story.done(ticket, Err("no place"));
        if !told.is_empty() {
            break told;
        }
        ticket += 1;
        assert_eq!(story.passes(1), [format!("Move {ticket}")]);
    };
    assert_eq!(failed[1], "denied: the migrate failed: no place");
    assert_eq!(story.second, 1030);
}

#[test]
fn one_that_has_left_is_not_moved_from_where_it_is() {
    let mut story = story(Remedy::Migrate);
    story.reports();
    story.done(2, Err("it is being worked on"));
    story.happens(GuestEvent::Ended(WEB));
    let told = story.passes(1);
    assert_eq!(told[1], "denied: the migrate failed: it does not run here any more");
}

#[test]
fn whatever_hangs_has_its_time() {
    let mut story = story(Remedy::Suspend);
    assert_eq!(story.reports(), ["Suspend 2"]);
    let told = story.passes(900);
    assert_eq!(told[1], "denied: the suspend failed: nobody says what became of it (Suspend)");
    assert_eq!(story.done(2, Ok(())), [""; 0], "too late");
}

#[test]
fn an_orderly_end_waits_for_what_is_over_in_a_moment() {
    let waits = |story: &Story| story.guests.would_be_cut_off();
    let mut reset = story(Remedy::Reset);
    assert!(!waits(&reset), "nothing is under way");
    reset.reports();
    assert!(waits(&reset));
    reset.happens(GuestEvent::Leaves);
    assert_eq!(reset.done(2, Ok(())), ["outcome 1: Ok(())", "done: reset"]);
    assert!(!waits(&reset));
    assert_eq!(reset.reports(), [""; 0], "it is said again to the next agent");

    let mut cycle = story(Remedy::PowerCycle);
    cycle.reports();
    assert!(waits(&cycle));
    cycle.done(2, Ok(()));
    assert!(!waits(&cycle), "the core starts it again, of this agent or of the next");

    let mut moves = story(Remedy::Migrate);
    moves.reports();
    assert!(!waits(&moves));

    let mut reboots = story(Remedy::Reboot);
    reboots.beats(1);
    reboots.reports();
    assert!(!waits(&reboots), "it takes as long as the guest likes");
}

#[test]
fn an_orderly_end_waits_for_what_is_to_be_remembered() {
    let mut guests = story(Remedy::Reset).guests;
    (guests.saves, guests.saved) = (2, 1);
    assert!(guests.would_be_cut_off());
    guests.step(Time::ZERO, GuestEvent::Saved(2));
    assert!(!guests.would_be_cut_off());
}

#[test]
fn a_dump_does_not_count_but_has_its_pace() {
    let mut story = story(Remedy::Dump);
    assert_eq!(story.reports(), ["Dump of 1 2"]);
    assert_eq!(story.done(2, Ok(())), ["outcome 1: Ok(())", "done: dump"]);
    assert_eq!(story.reports(), ["denied: its memory was written less than 600 s ago"]);
    story.passes(600);
    assert_eq!(story.reports(), ["Dump of 3 4"]);
    let failed = story.done(4, Err("no room"));
    assert_eq!(failed, ["outcome 3: Err(\"no room\")", "denied: the dump failed: no room"]);
    assert_eq!(story.guests.vms[&WEB].history.counted(), 0);
}

#[test]
fn what_is_wanted_during_a_dump_follows_it() {
    let mut story = story(Remedy::Dump);
    story.reports();
    let order =
        GuestWord::Ordered { id: ReportId([9; 16]), vm: WEB, remedy: Remedy::Reset, why: "app says so".to_owned() };
    assert_eq!(story.happens(GuestEvent::Told(order.clone())), [""; 0]);
    assert_eq!(story.happens(GuestEvent::Told(order)), [""; 0], "the same again");
    assert_eq!(story.happens(GuestEvent::Panicked { vm: WEB, held: true }), [""; 0]);
    assert_eq!(
        story.done(2, Err("libvirt is down")),
        ["outcome 1: Err(\"libvirt is down\")", "denied: the dump failed: libvirt is down", "Reset 4"],
        "one for both, at once"
    );
}

/// Guests that are watched have their memory kept before they are reset.
fn dumped_first() -> Story {
    let mut story = story(Remedy::Reset);
    let mut settings = story.guests.settings.clone();
    settings.monitors[0].dump = true;
    story.happens(GuestEvent::Settings(settings));
    story
}

#[test]
fn what_monitoring_finds_is_dumped_first_and_reset_whatever_comes_of_that() {
    for (result, outcome) in [(Ok(()), "fine"), (Err("no room"), "failed")] {
        let mut story = dumped_first();
        assert_eq!(story.happens(GuestEvent::Panicked { vm: WEB, held: true }), ["Dump of 1 2"]);
        assert_eq!(story.done(2, result), ["Reset 3"], "{outcome}");
        assert_eq!(story.done(3, Ok(())), ["Resume 4"]);
        assert_eq!(story.done(4, Ok(())), ["outcome 1: Ok(())"]);
        story.passes(60);
        assert_eq!(
            story.happens(GuestEvent::Panicked { vm: WEB, held: true }),
            ["Reset 6"],
            "not in each of its boots"
        );
    }
    let mut hangs = dumped_first();
    hangs.happens(GuestEvent::Panicked { vm: WEB, held: true });
    assert_eq!(hangs.passes(900), ["Reset 3"], "nobody says what became of the dump");
    let mut gone = dumped_first();
    gone.happens(GuestEvent::Panicked { vm: WEB, held: true });
    gone.happens(GuestEvent::Ended(WEB));
    assert_eq!(gone.done(2, Err("QEMU has died")), ["outcome 1: Err(\"it does not run here any more\")"]);
}

#[test]
fn what_a_message_asks_for_is_not_held_up_by_a_dump() {
    let mut story = dumped_first();
    assert_eq!(story.reports(), ["Reset 2"]);
}
