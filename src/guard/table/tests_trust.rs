//! What becomes of copies whose datastore went back in time.

use super::tests::{EPOCH, HOME, OTHER_HOME, QEMU, appeared, at, enforce, expect, running, tenure, vm};
use super::*;

#[test]
fn what_the_storage_lost_is_stopped_and_what_stood_there_is_killed() {
    let mut table = running(5);
    assert_eq!((table.living(HOME), table.held(vm(), HOME)), (vec![vm()], Some(tenure(5))));
    table.outdate(HOME);
    assert_eq!(enforce(&mut table), "", "it runs: nobody else did since");
    table.lapse_vm(vm());
    assert_eq!((table.living(HOME), table.held(vm(), HOME)), (vec![], None));
    assert_eq!(enforce(&mut table), "stop");
    table.outdate(HOME);
    assert_eq!(enforce(&mut table), "kill");
}

#[test]
fn what_stood_and_is_being_claimed_anew_is_killed_when_the_storage_went_back() {
    let mut table = running(5);
    table.lapse_vm(vm());
    assert_eq!(enforce(&mut table), "stop");
    expect(&mut table, 6, Purpose::Reclaim).unwrap();
    table.outdate(HOME);
    assert_eq!(enforce(&mut table), "kill");
}

#[test]
fn what_runs_by_another_home_since_is_let_alone() {
    let mut table = running(5);
    table.lapse_vm(vm());
    assert_eq!(enforce(&mut table), "stop");
    let there = Expected {
        tenure: tenure(6),
        name: "web".into(),
        home: OTHER_HOME,
        epoch: EPOCH,
        deadline: at(1000),
        purpose: Purpose::Reclaim,
        writes: vec![],
    };
    table.expect(there).unwrap();
    table.claimed(tenure(6), EPOCH, at(2000), at(500)).unwrap();
    assert_eq!(enforce(&mut table), "lift");
    table.outdate(HOME);
    assert_eq!(enforce(&mut table), "", "its disks are elsewhere, and nobody forgot the old row yet");
}

#[test]
fn what_came_by_a_move_and_waits_is_killed_when_the_storage_went_back() {
    let mut table = Table::default();
    table.incoming(tenure(5), "web".into(), HOME, EPOCH, at(1000)).unwrap();
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "");
    let mut claims = table.clone();
    expect(&mut claims, 6, Purpose::Adopt).unwrap(); // The source has said over; whether claim 6 was made nobody knows.
    for mut table in [table, claims] {
        table.outdate(HOME);
        assert_eq!(enforce(&mut table), "stop kill", "others may have run it after the source's word to this host");
    }
}
