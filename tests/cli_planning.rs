//! The command line for what is planned: what-if, maintenance, quarantine, rules for VMs.

mod bus;

use std::io::Write;
use std::process::Stdio;

use bus::say::{fails, say, shows};
use bus::{FakeAgent, PrivateBus, mainstay};
use mainstay::api::dbus::Ask;
use mainstay::types::rules::Priority;
use mainstay::types::settings::{HostChange, SettingsChange};
use mainstay::types::view::MaintenanceView;
use serde_json::Value;

/// The change that the agent was asked for last.
fn last_change(agent: &FakeAgent) -> SettingsChange {
    match agent.asked.lock().unwrap().last() {
        Some(Ask::Change(change)) => SettingsChange::clone(change),
        other => panic!("no change: {other:?}"),
    }
}

#[test]
fn what_if() {
    let bus = PrivateBus::started();
    let _agent = FakeAgent::on(&bus);
    shows(
        &bus,
        "what-if a",
        "
VM   PRIORITY  FROM  TO       RUNS AFTER  WHY
db   medium    a     b        6.0 s
web  medium    a     c        6.8 s       after db
big  medium    a     nowhere  -           no place: b 4096 MiB of memory short;
                                          c is in maintenance

b would have 12 vCPUs on 8 CPUs: 34 % less CPU, if all are busy; the rules
tolerate 25 %.
1 of 3 VMs would have no place. Times are at the latest: 5.2 s until their
leases are proven over, 0.8 s for a start (as last measured); a fence or a power
switch that is waited for is not in them.
",
    );
    let (code, out, _) = say(&bus, "what-if a --json");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["schema"], json["vms"].as_array().map(Vec::len)), (0, &Value::from(1), Some(3)));
    assert_eq!(json["vms"][1]["after"][0], "db");
    fails(&bus, "what-if a q", 1, "was not answered", "no host \"q\"", "mainstay host list");
    assert_eq!(say(&bus, "what-if").0, 2, "of whom?");
}

#[test]
fn evacuation() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    // No systemd on this bus: nobody says that the host goes down.
    shows(&bus, "host evacuate --for-shutdown", "this host is not going down: nothing is moved.\n");
    shows(&bus, "host evacuate", "nothing that is protected runs here.\n");
    let stay = vec![("web".to_owned(), "no place: b is in maintenance".to_owned())];
    let seen = MaintenanceView { ends: false, left: 1, stay };
    agent.view.lock().unwrap().hosts[0].maintenance = Some(seen.clone());
    let (what, why, next) = ("1 VM(s) were not moved", "web: no place: b is in maintenance", "shut down with the host");
    fails(&bus, "host evacuate", 1, what, why, next);
    agent.view.lock().unwrap().hosts[0].maintenance = Some(MaintenanceView { ends: true, ..seen });
    shows(&bus, "host evacuate", "by the rules its VMs are started on other hosts when it is down.\n");
}

#[test]
fn maintenance() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    shows(&bus, "host maintenance enter b --no-wait", "b: its VMs are being moved away.\n");
    assert!(matches!(last_change(&agent), SettingsChange::Host(HostChange::EnterMaintenance { .. })));
    shows(&bus, "host maintenance enter b", "b: is empty: nothing that is protected runs there.\n");
    let stays = |left, stay: &[(&str, &str)]| {
        let stay = stay.iter().map(|(vm, why)| ((*vm).to_owned(), (*why).to_owned())).collect();
        agent.view.lock().unwrap().hosts[1].maintenance = Some(MaintenanceView { ends: false, left, stay });
    };
    stays(1, &[("db", "no place: a 512 MiB of memory short; c not heard")]);
    let (what, why) = ("not all VMs of b were moved", "db: no place: a 512 MiB of memory short; c not heard");
    fails(&bus, "host maintenance enter b", 1, what, why, "tried again every 30 s");
    let (_, out, _) = say(&bus, "host show b");
    assert!(out.contains("on; 1 VM(s) to be moved away; db stays: no place"), "{out}");
    let (_, out, _) = say(&bus, "host list");
    assert!(out.contains("live, maintenance"), "{out}");
    agent.view.lock().unwrap().hosts[1].maintenance = None;
    shows(&bus, "host maintenance leave b --stay", "b: takes part again.\n");
    assert!(matches!(last_change(&agent), SettingsChange::Host(HostChange::LeaveMaintenance { back: false, .. })));
    fails(&bus, "host maintenance enter q", 1, "\"q\" was not begun", "no host \"q\"", "mainstay host list");
}

#[test]
fn quarantine() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    agent.view.lock().unwrap().hosts[1].quarantined = true;
    let (_, out, _) = say(&bus, "host list");
    assert!(out.contains("live, quarantined"), "{out}");
    let (_, out, _) = say(&bus, "host show b");
    assert!(out.replace("\n             ", " ").contains("mainstay host release b"), "{out}");
    shows(&bus, "host release b", "b: VMs may be placed there again.\n");
    assert!(matches!(last_change(&agent), SettingsChange::Host(HostChange::Release { .. })));
}

#[test]
fn disarmed() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    shows(&bus, "cluster disarm --for 30m --because switch", "disarmed: settings 8 are in force on 3 hosts\n");
    let SettingsChange::Disarm(Some(disarmed)) = last_change(&agent) else { panic!("nothing is disarmed") };
    let left = disarmed.until_unix_ms - mainstay::exec::clock::unix_ms();
    assert!((1_700_000..=1_800_000).contains(&left) && disarmed.why == "switch", "{left}");
    shows(&bus, "cluster arm", "armed: settings 8 are in force on 3 hosts\n");
    assert_eq!(last_change(&agent), SettingsChange::Disarm(None));
    fails(&bus, "cluster disarm --for 30", 2, "was not disarmed", "has no unit", "--for 30m");
    fails(&bus, "cluster disarm --for 8d", 2, "was not disarmed", "1 s to 7 days", "--for 30m");
    agent.view.lock().unwrap().disarmed = Some("the cluster is disarmed until noon".into());
    let (_, out, _) = say(&bus, "status");
    assert!(out.contains("DISARMED: the cluster is disarmed until noon (mainstay cluster arm)"), "{out}");
}

#[test]
fn rules_for_vms() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    let give = |text: &str| {
        let mut child = mainstay(&bus)
            .args(["cluster", "vm-rules", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let ended = child.wait_with_output().unwrap();
        let said = [ended.stdout, ended.stderr].concat();
        (ended.status.code(), String::from_utf8(said).unwrap())
    };
    let (code, said) = give("[[priority]]\nvms = [\"db*\"]\npriority = \"high\"\n");
    assert_eq!((code, said.as_str()), (Some(0), "vm-rules: settings 8 are in force on 3 hosts\n"));
    agent.view.lock().unwrap().rule_problems = vec!["priority rule 1: no VM is called db".into()];
    let (code, said) = give("[[priority]]\nvms = [\"db\"]\npriority = \"high\"\n");
    assert_eq!(code, Some(0));
    assert!(said.ends_with("warning: priority rule 1: no VM is called db\n"), "{said}");
    let (_, out, _) = say(&bus, "status");
    assert!(out.contains("Rules: priority rule 1: no VM is called db"), "{out}");
    let SettingsChange::SetRules(rules) = last_change(&agent) else { panic!("other rules") };
    assert_eq!(rules.priorities[0].priority, Priority::High);
    for (text, why) in [
        ("[[priority]]\nvms = []\npriority = \"high\"\n", "priority rule 1 names no VMs"),
        ("[[priority]]\nvms = [\"a\"]\npriority = \"top\"\n", "unknown variant `top`"),
        ("nonsense", "expected"),
    ] {
        let (code, said) = give(text);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(why) && said.contains("mainstay cluster vm-rules shows the rules in use"), "{said}");
    }
    assert_eq!(agent.asked.lock().unwrap().len(), 2, "bad rules do not reach the agent");
    fails(&bus, "cluster vm-rules /no/such", 2, "was not taken", "No such file", "vm-rules");
}
