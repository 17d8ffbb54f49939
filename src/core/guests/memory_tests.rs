//! What is remembered, over restarts of the agent at any moment.

use std::time::Duration;

use mainstay_guest::message::{FromGuest, Report, ReportId, Severity, Verdict, Wish};

use super::tests::unknown;
use super::*;
use crate::types::guests::{Consequence, Rule};

const WEB: VmId = VmId(uuid::Uuid::from_u128(1));

/// An agent of a host on which every report leads to this, and what is on its disk.
struct Agent {
    guests: Guests,
    disk: GuestMemory,
    /// The disk answers.
    writes: bool,
    now: Time,
}

fn agent(remedy: Remedy, disk: GuestMemory) -> Agent {
    let rule = Rule { then: Consequence::Own(remedy), ..GuestSettings::default().rules[0].clone() };
    let settings = GuestSettings { rules: vec![rule], ..GuestSettings::default() };
    let (guests, now) = (Guests::default(), Time::ZERO + Duration::from_secs(1000));
    let mut agent = Agent { guests, disk: disk.clone(), writes: true, now };
    agent.happens(GuestEvent::Recalled(disk));
    agent.happens(GuestEvent::Settings(settings));
    agent.happens(GuestEvent::Runs { vm: WEB, name: "web".to_owned(), stores: None });
    agent
}

fn report(n: u8) -> GuestEvent {
    let (kind, message, severity) = ("app/db".to_owned(), "broken".to_owned(), Severity::Critical);
    let id = ReportId([n; 16]);
    let report = Report { id, sequence: 1, boot: [1; 16], severity, kind, message, wish: Wish::None };
    GuestEvent::Said(WEB, Box::new(FromGuest::Report(report)))
}

fn order() -> GuestEvent {
    let (id, why) = (ReportId([9; 16]), "app asks".to_owned());
    GuestEvent::Told(GuestWord::Ordered { id, vm: WEB, remedy: Remedy::Reset, why })
}

impl Agent {
    fn happens(&mut self, event: GuestEvent) -> Vec<String> {
        let (mut all, mut events) = (Vec::new(), VecDeque::from([event]));
        while let Some(event) = events.pop_front() {
            for act in self.guests.step(self.now, event) {
                match act {
                    GuestAct::Save(number, memory) if self.writes => {
                        self.disk = memory;
                        events.push_back(GuestEvent::Saved(number));
                    }
                    GuestAct::Keep { ticket, .. } => events.push_back(GuestEvent::Looked(ticket, unknown())),
                    GuestAct::Order { ticket, step, .. } => all.push(format!("{step:?} {}", ticket.0)),
                    GuestAct::Say(_, ToGuest::Answer { verdict, .. }) => all.push(format!("answered {verdict}")),
                    GuestAct::TellMaster(GuestWord::Obeyed { answer, .. }) => {
                        all.push(format!("obeyed {}", answer.verdict));
                    }
                    GuestAct::TellOthers(GuestWord::Begun { ids, remedy, .. }) => {
                        all.push(format!("others: {remedy} for {}", ids.len()));
                    }
                    _ => {}
                }
            }
        }
        all
    }
}

#[test]
fn nothing_is_done_twice_wherever_the_agent_dies() {
    for event in [|| report(1), order as fn() -> GuestEvent] {
        let mut first = agent(Remedy::Reset, GuestMemory::default());
        assert_eq!(first.happens(event()), ["Reset 2"]);
        // It dies after libvirt was told, before its answer came.
        let mut second = agent(Remedy::Reset, first.disk.clone());
        let found = second.happens(event());
        assert!(["answered accepted", "obeyed accepted"].contains(&found[0].as_str()), "{found:?}");
        // It dies after the answer.
        first.happens(GuestEvent::Done(Ticket(2), Ok(())));
        let mut third = agent(Remedy::Reset, first.disk);
        let found = third.happens(event());
        assert!(["answered done", "obeyed done"].contains(&found[0].as_str()), "{found:?}");
        assert_eq!(third.happens(report(2)), ["answered delayed"], "another report: after the back-off");
    }
    // What had not begun begins anew.
    let mut fresh = agent(Remedy::Reset, GuestMemory::default());
    assert_eq!(fresh.happens(report(1)), ["Reset 2"]);
}

#[test]
fn a_disk_that_hangs_holds_up_a_remedy_for_its_patience_only() {
    let mut agent = agent(Remedy::Reset, GuestMemory::default());
    agent.writes = false;
    assert_eq!(agent.happens(report(1)), [""; 0]);
    assert_eq!(agent.guests.next_due(), Some(agent.now + Duration::from_millis(100)));
    agent.now = agent.now + Duration::from_millis(100);
    assert_eq!(agent.happens(GuestEvent::Due), ["Reset 2"]);
    assert_eq!(agent.happens(GuestEvent::Saved(1)), [""; 0], "late");
}

#[test]
fn what_takes_a_vm_to_another_host_is_remembered_there() {
    let mut from = agent(Remedy::Migrate, GuestMemory::default());
    assert_eq!(from.happens(report(1)), ["others: migrate for 1", "Move 2"]);
    let mut to = agent(Remedy::Migrate, GuestMemory::default());
    let ids = vec![ReportId([1; 16])];
    to.happens(GuestEvent::Told(GuestWord::Begun { vm: WEB, ids, remedy: Remedy::Migrate }));
    assert_eq!(to.happens(report(1)), ["answered accepted"]);
    assert_eq!(agent(Remedy::Migrate, to.disk.clone()).happens(report(1)), ["answered accepted"], "also later");
    assert_eq!(to.happens(report(2)), ["answered delayed"], "it counts there, too");
}

#[test]
fn the_oldest_are_forgotten_first() {
    let remembered = |n: u16| {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&n.to_le_bytes());
        Remembered { vm: WEB, id: ReportId(id), answer: Answer::new(Verdict::Done, "reset") }
    };
    let reports = (0..300).map(remembered).collect();
    let mut agent = agent(Remedy::Reset, GuestMemory { reports, remedies: Vec::new() });
    agent.happens(report(200));
    assert_eq!((agent.disk.reports.len(), agent.guests.overfull()), (256, None));
    assert_eq!(agent.disk.reports[0], remembered(45));
}

#[test]
fn the_limit_holds_over_restarts() {
    let (mut disk, mut now) = (GuestMemory::default(), Time::ZERO + Duration::from_secs(1000));
    for n in 0..5_u8 {
        let mut agent = agent(Remedy::Reset, disk);
        agent.now = now;
        let found = agent.happens(report(n));
        assert_eq!(found, [if n < 3 { "Reset 2" } else { "answered denied" }], "{n}");
        agent.happens(GuestEvent::Done(Ticket(2), Ok(())));
        (disk, now) = (agent.disk, now + Duration::from_secs(600));
    }
    let mut later = agent(Remedy::Reset, disk);
    later.now = now + Duration::from_secs(3600);
    assert_eq!(later.happens(report(9)), ["Reset 2"]);
    assert_eq!(later.disk.remedies, [(WEB, vec![later.now])], "older ones are forgotten");
}
