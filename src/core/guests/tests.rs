//! One host, or a master, and what it makes of messages.

use std::time::Duration;

use mainstay_guest::message::{
    Application, Beat, FromGuest, GuestHello, Report, ReportId, Severity, System, ToGuest, Verdict, Wish,
};

use super::*;
use crate::types::failure::{FailureKind, Family};
use crate::types::guests::{Consequence, Glob, Limits, Permission, Rule};

const WEB: VmId = VmId(uuid::Uuid::from_u128(1));
const DB: VmId = VmId(uuid::Uuid::from_u128(2));
const HERE: HostId = HostId(uuid::Uuid::from_u128(0xa));

fn at(seconds: u64) -> Time {
    Time::ZERO + Duration::from_secs(1000 + seconds)
}

fn id(n: u8) -> ReportId {
    ReportId([n; 16])
}

fn report(n: u8, severity: Severity, wish: Wish) -> Report {
    let (kind, message) = ("app/db".to_owned(), "no answer".to_owned());
    Report { id: id(n), sequence: u64::from(n), boot: [1; 16], severity, kind, message, wish }
}

/// Of a guest that is well.
pub(super) fn beat(boot: u8, uptime_s: u64, application: Application) -> Beat {
    Beat {
        boot: [boot; 16],
        uptime_s,
        load_centi: 0,
        available_kib: 0,
        root_writable: true,
        failed_units: 0,
        application,
        ready: true,
        frozen: false,
        dropped: 0,
    }
}

fn says(guests: &mut Guests, seconds: u64, vm: VmId, report: Report) -> Vec<String> {
    happens(guests, seconds, GuestEvent::Said(vm, Box::new(FromGuest::Report(report))))
}

fn done(guests: &mut Guests, seconds: u64, ticket: u64) -> Vec<String> {
    told(guests.step(at(seconds), GuestEvent::Done(Ticket(ticket), Ok(()))))
}

/// Looks show nothing, at once.
fn happens(guests: &mut Guests, seconds: u64, event: GuestEvent) -> Vec<String> {
    let mut all = Vec::new();
    let mut events = vec![event];
    while let Some(event) = events.pop() {
        let acts = guests.step(at(seconds), event);
        events.extend(acts.iter().filter_map(|act| match act {
            GuestAct::Keep { ticket, .. } => Some(GuestEvent::Looked(*ticket, unknown())),
            GuestAct::Save(number, _) => Some(GuestEvent::Saved(*number)),
            _ => None,
        }));
        all.extend(acts);
    }
    told(all)
}

pub(super) fn unknown() -> Class {
    Class { family: Family::Unknown, kind: FailureKind::Unknown, line: String::new() }
}

/// In words; notes are left out.
fn told(acts: Vec<GuestAct>) -> Vec<String> {
    let answer = |answer: &Answer| format!("{}: {}", answer.verdict, answer.why);
    let vm = |vm: VmId| if vm == WEB { "web" } else { "db" };
    let words = |act: GuestAct| match act {
        GuestAct::Say(to, ToGuest::Answer { id, verdict, why }) => {
            Some(format!("{} {}: {verdict}: {why}", vm(to), id.0[0]))
        }
        GuestAct::Say(..) => None,
        GuestAct::Order { ticket, vm: of, step } => {
            Some(format!("{} {} ({})", format!("{step:?}").to_lowercase(), vm(of), ticket.0))
        }
        GuestAct::Tell(_, word) | GuestAct::TellMaster(word) | GuestAct::TellOthers(word) => Some(match word {
            GuestWord::Requested(request) => format!("asks for {} of {}", request.remedy, request.target),
            GuestWord::Ordered { vm: of, remedy, id, .. } => format!("order {}: {remedy} {}", id.0[0], vm(of)),
            GuestWord::Obeyed { id, answer: of } => format!("order {} {}", id.0[0], answer(&of)),
            GuestWord::Decided { id, answer: of } => format!("decided {} {}", id.0[0], answer(&of)),
            word @ (GuestWord::Begun { .. } | GuestWord::Failures(_) | GuestWord::EnablePort { .. }) => {
                format!("{word:?}")
            }
        }),
        GuestAct::Run { ticket, program, said, .. } => {
            Some(format!("{program} ({}): {} {}: {}", ticket.0, said.severity, said.kind, said.message))
        }
        GuestAct::Note(note) if note.kind == "guest-needs-attention" => Some("needs attention".to_owned()),
        GuestAct::Note(_)
        | GuestAct::Inside(..)
        | GuestAct::Sample(_)
        | GuestAct::Glance { .. }
        | GuestAct::Keep { .. }
        | GuestAct::Outcome(..)
        | GuestAct::Save(..) => None,
    };
    acts.into_iter().filter_map(words).collect()
}

fn guests(settings: GuestSettings) -> Guests {
    let mut guests = Guests::default();
    guests.step(at(0), GuestEvent::Settings(settings));
    for (vm, name) in [(WEB, "web"), (DB, "db")] {
        guests.step(at(0), GuestEvent::Runs { vm, name: name.to_owned(), stores: None });
        boots(&mut guests, vm, 1);
    }
    guests
}

fn boots(guests: &mut Guests, vm: VmId, boot: u8) {
    let hello = GuestHello { protocol: 1, agent: String::new(), boot: [boot; 16], system: System::default() };
    guests.step(at(0), GuestEvent::Said(vm, Box::new(FromGuest::Hello(hello))));
}

#[test]
fn a_critical_report_gets_what_it_asks_for_once() {
    let mut guests = guests(GuestSettings::default());
    let reset = || report(1, Severity::Critical, Wish::Reset);
    assert_eq!(says(&mut guests, 1, WEB, reset()), ["reset web (2)"]);
    assert_eq!(done(&mut guests, 1, 2), ["web 1: done: reset"]);
    assert_eq!(says(&mut guests, 2, WEB, reset()), ["web 1: done: reset"], "said again: nothing is done again");
    assert_eq!(done(&mut guests, 2, 2), [""; 0], "nobody waits for it");
    let warning = report(2, Severity::Warning, Wish::Reset);
    assert_eq!(says(&mut guests, 3, WEB, warning), ["web 2: accepted: noted"]);
    let nothing = report(3, Severity::Critical, Wish::None);
    assert_eq!(says(&mut guests, 3, WEB, nothing), ["web 3: accepted: noted"]);
    let broken = Report { kind: "A".to_owned(), ..report(4, Severity::Critical, Wish::Reset) };
    assert!(says(&mut guests, 3, WEB, broken)[0].starts_with("web 4: denied: a kind is"));
}

#[test]
fn greetings_end() {
    let mut guests = guests(GuestSettings::default());
    let greets = |guests: &mut Guests, event| {
        let acts = guests.step(at(0), event);
        acts.iter().filter(|act| matches!(act, GuestAct::Say(_, ToGuest::Hello(_)))).count()
    };
    let hello = |boot| {
        let (agent, system) = (String::new(), System::default());
        let hello = GuestHello { protocol: 1, agent, boot: [boot; 16], system };
        GuestEvent::Said(WEB, Box::new(FromGuest::Hello(hello)))
    };
    assert_eq!(greets(&mut guests, GuestEvent::Connected(WEB)), 1);
    assert_eq!(greets(&mut guests, hello(1)), 0, "its answer");
    assert_eq!(greets(&mut guests, hello(1)), 1, "its agent is a new one");
    assert_eq!(greets(&mut guests, hello(1)), 0, "its answer");
    assert_eq!(greets(&mut guests, hello(2)), 1, "it has booted");
    assert_eq!(greets(&mut guests, hello(2)), 0, "its answer");
    assert_eq!(greets(&mut guests, GuestEvent::Connected(WEB)), 1);
    assert_eq!(greets(&mut guests, hello(3)), 1, "who was greeted is gone");
    assert_eq!(greets(&mut guests, hello(3)), 0, "its answer");
}

#[test]
fn a_wish_of_an_earlier_boot_is_fulfilled() {
    let mut guests = guests(GuestSettings::default());
    boots(&mut guests, WEB, 2);
    let found = says(&mut guests, 1, WEB, report(1, Severity::Critical, Wish::Reset));
    assert_eq!(found, ["web 1: accepted: it was said before this boot, which has come since"]);
}

#[test]
fn resets_wait_and_end() {
    let limits = Limits { resets_per_hour: 3, backoff_s: 30 };
    let mut guests = guests(GuestSettings { limits, ..GuestSettings::default() });
    let reset = |n| report(n, Severity::Critical, Wish::Reset);
    assert_eq!(says(&mut guests, 0, WEB, reset(1)), ["reset web (2)"]);
    let meanwhile = says(&mut guests, 0, WEB, reset(2));
    assert_eq!(meanwhile, ["web 2: delayed: a reset is on its way"]);
    assert_eq!(done(&mut guests, 0, 2), ["web 1: done: reset", "web 2: done: reset"]);
    let soon = says(&mut guests, 10, WEB, reset(3));
    assert_eq!(soon, ["web 3: delayed: a reset follows in 21 s, since the last was not long ago"]);
    assert_eq!(guests.next_due(), Some(at(30)));
    assert_eq!(told(guests.step(at(29), GuestEvent::Due)), [""; 0]);
    assert_eq!(happens(&mut guests, 30, GuestEvent::Due), ["reset web (4)"]);
    done(&mut guests, 30, 4);
    assert_eq!(guests.next_due(), None);
    assert!(says(&mut guests, 89, WEB, reset(4))[0].contains("follows in 2 s"), "twice as long");
    assert_eq!(happens(&mut guests, 90, GuestEvent::Due), ["reset web (6)"]);
    done(&mut guests, 90, 6);
    let why = "denied: it was started anew 3 times within an hour; it needs attention";
    assert_eq!(says(&mut guests, 1000, WEB, reset(5)), ["needs attention".to_owned(), format!("web 5: {why}")]);
    assert_eq!(says(&mut guests, 1001, WEB, reset(6)), [format!("web 6: {why}")], "people are told once");
    assert_eq!(says(&mut guests, 3700, WEB, reset(7)), ["reset web (8)"], "the hour of the first three is over");
}

#[test]
fn what_failed_is_said_and_does_not_count() {
    let limits = Limits { resets_per_hour: 1, ..Limits::default() };
    let mut guests = guests(GuestSettings { limits, ..GuestSettings::default() });
    says(&mut guests, 0, WEB, report(1, Severity::Critical, Wish::Reset));
    let failed = guests.step(at(1), GuestEvent::Done(Ticket(2), Err("libvirt hangs".to_owned())));
    assert_eq!(told(failed), ["web 1: denied: the reset failed: libvirt hangs"]);
    let again = says(&mut guests, 2, WEB, report(2, Severity::Critical, Wish::Reset));
    assert_eq!(again, ["web 2: delayed: a reset follows in 30 s, since the last was not long ago"]);
    assert_eq!(happens(&mut guests, 31, GuestEvent::Due), ["reset web (4)"]);
    told(guests.step(at(32), GuestEvent::Done(Ticket(4), Err("libvirt hangs".to_owned()))));
    let third = says(&mut guests, 32, WEB, report(3, Severity::Critical, Wish::Reset));
    assert_eq!(third, ["web 3: delayed: a reset follows in 61 s, since the last was not long ago"], "twice as long");
}

#[test]
fn the_first_rule_decides_and_counts() {
    let rule = |kind: &str, count, then| Rule {
        kind: Glob::new(kind).unwrap(),
        count,
        severity: Severity::Warning,
        ..GuestSettings {
            rules: vec![Rule { then, ..GuestSettings::default().rules[0].clone() }],
            ..GuestSettings::default()
        }
        .rules[0]
            .clone()
    };
    let rules =
        vec![rule("app/*", 3, Consequence::Own(Remedy::PowerCycle)), rule("*", 1, Consequence::Own(Remedy::Reset))];
    let mut guests = guests(GuestSettings { rules, ..GuestSettings::default() });
    let warning = |n| report(n, Severity::Warning, Wish::None);
    assert_eq!(says(&mut guests, 0, WEB, warning(1)), ["web 1: accepted: noted"]);
    assert_eq!(says(&mut guests, 10, WEB, warning(2)), ["web 2: accepted: noted"]);
    assert_eq!(says(&mut guests, 20, DB, warning(3)), ["db 3: accepted: noted"], "each VM has its own count");
    assert_eq!(says(&mut guests, 65, WEB, warning(4)), ["web 4: accepted: noted"], "the first was a minute ago");
    assert_eq!(says(&mut guests, 66, WEB, warning(5)), ["end web (2)"]);
    assert_eq!(says(&mut guests, 66, DB, report(6, Severity::Info, Wish::Reset)), ["db 6: accepted: noted"]);
}

fn request(n: u8, by: &str) -> GuestRequest {
    let (target, why) = ("db".to_owned(), "app/db: no answer".to_owned());
    GuestRequest { id: id(n), by: by.to_owned(), target, remedy: Remedy::Reset, why }
}

fn requested(guests: &mut Guests, seconds: u64, n: u8, by: &str) -> Vec<String> {
    let event = GuestEvent::Requested { from: HERE, request: request(n, by), at: Some((DB, HERE)) };
    told(guests.step(at(seconds), event))
}

fn voting(votes: u32) -> GuestSettings {
    let glob = |text| Glob::new(text).unwrap();
    let permission = Permission { target: glob("db"), by: glob("app*"), remedy: Remedy::Reset, votes, within_s: 60 };
    GuestSettings { permissions: vec![permission], ..GuestSettings::default() }
}

#[test]
fn another_vm_is_reset_on_the_masters_word() {
    let mut guests = guests(voting(1));
    let wish = Wish::ResetVm("db".to_owned());
    let asked = says(&mut guests, 0, WEB, report(1, Severity::Critical, wish));
    assert_eq!(asked, ["web 1: delayed: the master is asked for a reset of db", "asks for reset of db"]);
    assert_eq!(told(guests.step(at(1), GuestEvent::Due)), ["asks for reset of db"], "no answer yet");
    // As the master.
    assert_eq!(requested(&mut guests, 0, 1, "web"), ["decided 1 denied: db lets web ask for no reset"]);
    assert_eq!(requested(&mut guests, 1, 2, "app1"), ["order 2: reset db"]);
    // As the host of the VM.
    let order =
        || GuestEvent::Told(GuestWord::Ordered { id: id(2), vm: DB, remedy: Remedy::Reset, why: String::new() });
    assert_eq!(happens(&mut guests, 1, order()), ["reset db (2)"]);
    assert_eq!(told(guests.step(at(1), order())), [""; 0], "the same order");
    assert_eq!(done(&mut guests, 1, 2), ["order 2 done: reset"]);
    assert_eq!(told(guests.step(at(2), order())), ["order 2 done: reset"], "a new master's");
    // As the master, and as the host of the asker.
    let answer = Answer::new(Verdict::Done, "reset");
    let found = told(guests.step(at(2), GuestEvent::Told(GuestWord::Obeyed { id: id(2), answer: answer.clone() })));
    assert_eq!(found, ["decided 2 done: reset"]);
    assert_eq!(requested(&mut guests, 3, 2, "app1"), ["decided 2 done: reset"], "asked again");
    assert_eq!(
        told(guests.step(at(3), GuestEvent::Told(GuestWord::Decided { id: id(1), answer }))),
        ["web 1: done: reset"]
    );
    assert_eq!(guests.next_due(), None);
}

#[test]
fn votes_are_of_different_vms_within_the_window() {
    let mut guests = guests(voting(3));
    assert_eq!(requested(&mut guests, 0, 1, "app1"), ["decided 1 delayed: 1 of 3 VMs ask for it"]);
    assert_eq!(requested(&mut guests, 1, 2, "app1"), ["decided 2 delayed: 1 of 3 VMs ask for it"], "the same VM");
    assert_eq!(requested(&mut guests, 50, 3, "app2"), ["decided 3 delayed: 2 of 3 VMs ask for it"]);
    let over = |n| format!("decided {n} denied: fewer than 3 VMs have asked for it within 60 s");
    let third = requested(&mut guests, 62, 4, "app3");
    assert_eq!(third, ["decided 4 delayed: 2 of 3 VMs ask for it"], "the first is old");
    assert_eq!(requested(&mut guests, 62, 1, "app1"), [over(1)], "and hears so when it asks again");
    assert_eq!(requested(&mut guests, 63, 5, "app4"), ["order 5: reset db"]);
    assert_eq!(requested(&mut guests, 63, 6, "app5"), ["order 5: reset db"], "the same order, not another");
    let answer = Answer::new(Verdict::Done, "reset");
    let found = told(guests.step(at(64), GuestEvent::Told(GuestWord::Obeyed { id: id(5), answer })));
    assert_eq!(found.len(), 4, "{found:?}");
    assert_eq!(guests.next_due(), None);
    assert_eq!(requested(&mut guests, 65, 7, "app1"), ["decided 7 delayed: 1 of 3 VMs ask for it"], "a new vote");
}

#[test]
fn nothing_is_kept_without_bound() {
    let mut guests = guests(GuestSettings::default());
    for n in 0..2000_u32 {
        let mut one = report(1, Severity::Info, Wish::None);
        one.id.0[..4].copy_from_slice(&n.to_le_bytes());
        says(&mut guests, 0, WEB, one);
    }
    assert_eq!(guests.vms[&WEB].answers.0.len(), MAX_ANSWERS);
}

#[test]
fn a_guest_that_says_too_much_costs_one_line_a_minute() {
    let mut guests = guests(GuestSettings::default());
    let mut lines = Vec::new();
    let mut told = |second: u64, acts: Vec<GuestAct>| {
        lines.extend(acts.into_iter().filter_map(|act| match act {
            GuestAct::Note(note) => Some((second, note.text)),
            _ => None,
        }));
    };
    for n in 0..6000_u64 {
        let second = n / 20;
        while guests.next_due().is_some_and(|due| due <= at(second)) {
            told(second, guests.step(at(second), GuestEvent::Due));
        }
        let mut id = [0; 16];
        id[..8].copy_from_slice(&n.to_le_bytes());
        let said = Report { id: ReportId(id), ..report(1, Severity::Warning, Wish::None) };
        told(second, guests.step(at(second), GuestEvent::Said(WEB, Box::new(FromGuest::Report(said)))));
    }
    assert_eq!(lines.len(), 10 + 4, "ten at once, then one a minute: {lines:#?}");
    let (second, last) = lines.last().unwrap();
    assert_eq!(*second, 240);
    assert!(last.contains("one of 1200 that were not told"), "{last}");
    let before = |guests: &mut Guests| {
        let other = report(2, Severity::Warning, Wish::None);
        guests.step(at(300), GuestEvent::Said(DB, Box::new(FromGuest::Report(other))))
    };
    assert!(before(&mut guests).iter().any(|act| matches!(act, GuestAct::Note(_))), "others are heard");
}

#[test]
fn a_vote_ends_with_its_window_however_often_it_is_repeated() {
    let mut guests = guests(voting(3));
    for second in 0..59 {
        let found = requested(&mut guests, second, 1, "app1");
        assert_eq!(found, ["decided 1 delayed: 1 of 3 VMs ask for it"], "asked again");
    }
    assert_eq!(requested(&mut guests, 59, 2, "app2"), ["decided 2 delayed: 2 of 3 VMs ask for it"]);
    let over = "decided 1 denied: fewer than 3 VMs have asked for it within 60 s";
    assert_eq!(requested(&mut guests, 60, 1, "app1"), [over]);
    assert_eq!(requested(&mut guests, 61, 1, "app1"), [over], "for good");
    let third = requested(&mut guests, 62, 3, "app3");
    assert_eq!(third, ["decided 3 delayed: 2 of 3 VMs ask for it"], "app1 did so too long ago");
    assert_eq!(guests.ballots.votes().max(), Some(1));
}

#[test]
fn what_nobody_asks_for_any_more_ends_by_itself() {
    let mut guests = guests(voting(2));
    requested(&mut guests, 0, 1, "app1");
    assert_eq!(guests.next_due(), Some(at(60)));
    assert_eq!(told(guests.step(at(60), GuestEvent::Due)), [""; 0], "it may not be the master any more");
    assert_eq!((guests.ballots.open(), guests.next_due()), (0, None));
    let over = "decided 1 denied: fewer than 2 VMs have asked for it within 60 s";
    assert_eq!(requested(&mut guests, 61, 1, "app1"), [over], "it was asleep");
    requested(&mut guests, 70, 2, "app1");
    assert_eq!(requested(&mut guests, 71, 3, "app2"), ["order 3: reset db"]);
    assert_eq!(requested(&mut guests, 120, 2, "app1"), ["order 3: reset db"], "its host has said nothing yet");
    assert_eq!(told(guests.step(at(179), GuestEvent::Due)), [""; 0]);
    assert_eq!(guests.ballots.open(), 1);
    guests.step(at(180), GuestEvent::Due);
    assert_eq!((guests.ballots.open(), guests.next_due()), (0, None), "those who asked are gone");
}

#[test]
fn one_vm_does_not_fill_a_ballot_without_end() {
    let mut guests = guests(voting(3));
    for n in 0..1000_u32 {
        let mut one = request(1, "app1");
        one.id.0[..4].copy_from_slice(&n.to_le_bytes());
        guests.step(at(0), GuestEvent::Requested { from: HERE, request: one, at: Some((DB, HERE)) });
    }
    assert_eq!(guests.overfull(), None);
    assert_eq!(requested(&mut guests, 1, 1, "app1"), ["decided 1 denied: too many requests of this VM are open"]);
    assert_eq!(requested(&mut guests, 1, 2, "app2"), ["decided 2 delayed: 2 of 3 VMs ask for it"], "others are heard");
}

#[test]
fn a_hook_runs_once_for_a_report_and_not_too_often() {
    let rule = Rule { then: Consequence::Hook("/hook".to_owned()), ..GuestSettings::default().rules[0].clone() };
    let mut guests = guests(GuestSettings { rules: vec![rule], ..GuestSettings::default() });
    let wish = |n| report(n, Severity::Critical, Wish::None);
    let ran = |guests: &mut Guests, seconds, ticket, result| {
        told(guests.step(at(seconds), GuestEvent::Ran(Ticket(ticket), result)))
    };
    let begun = says(&mut guests, 0, WEB, wish(1));
    assert_eq!(begun, ["web 1: delayed: its hook runs", "/hook (1): critical app/db: no answer"]);
    assert_eq!(says(&mut guests, 1, WEB, wish(1)), ["web 1: delayed: its hook runs"], "said again");
    let busy = "web 2: accepted: noted; its hook runs, or was run a moment ago";
    assert_eq!(says(&mut guests, 2, WEB, wish(2)), [busy]);
    assert_eq!(ran(&mut guests, 3, 1, Ok(())), ["web 1: done: hook"]);
    assert_eq!(ran(&mut guests, 3, 1, Ok(())), [""; 0]);
    assert!(says(&mut guests, 9, WEB, wish(3))[0].starts_with("web 3: accepted"));
    assert_eq!(says(&mut guests, 10, WEB, wish(4)).len(), 2);
    let failed = ran(&mut guests, 11, 2, Err("exit 3".to_owned()));
    assert_eq!(failed, ["web 4: denied: the hook failed: exit 3"]);
    assert_eq!(says(&mut guests, 12, WEB, wish(1)), ["web 1: done: hook"]);
}
