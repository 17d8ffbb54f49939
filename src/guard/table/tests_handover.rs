use std::time::Duration;

use super::tests::{EPOCH, HOME, LAST, QEMU, appeared, at, claimed, enforce, expect, running, state, tenure, vm};
use super::*;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A source under handover claim 5.
fn source() -> Table {
    let mut table = running(4);
    expect(&mut table, 5, Purpose::HandOver).unwrap();
    assert_eq!(enforce(&mut table), "", "it goes on while the claim is made");
    claimed(&mut table, 5).unwrap();
    assert_eq!((state(&table, 4), state(&table, 5)), (None, Some(VmState::Running)));
    table
}

/// A target under handover claim 5, its QEMU seen.
fn target() -> Table {
    let mut table = Table::default();
    table.receive(tenure(5), "web".into(), HOME, EPOCH, at(1000)).unwrap();
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "", "it takes memory in");
    table
}

fn sample(table: &mut Table, spent: u64, millis: u64, alone: bool) {
    table.sampled(vm(), QEMU, ms(spent), at(millis), alone);
}

fn over(table: &Table) -> Option<Over> {
    match state(table, 5) {
        Some(VmState::Over(over)) => Some(over),
        _ => None,
    }
}

#[test]
fn a_source_runs_until_the_switch_and_is_stopped_after_it() {
    let mut table = source();
    assert_eq!(table.watched().collect::<Vec<_>>(), [(vm(), QEMU)]);
    for n in 0..100 {
        sample(&mut table, n * 9, 600 + n * 10, false);
    }
    assert_eq!(enforce(&mut table), "");
    table.switched(tenure(5)).unwrap();
    table.switched(tenure(5)).unwrap();
    // What it had spent until it stood is not held against it.
    sample(&mut table, 905, 1610, false);
    sample(&mut table, 905, 1700, false);
    assert_eq!((enforce(&mut table).as_str(), state(&table, 5)), ("", Some(VmState::Running)));
    sample(&mut table, 912, 1705, false);
    assert_eq!(enforce(&mut table), "", "a QEMU that ends does that, too");
    sample(&mut table, 914, 1710, false);
    assert_eq!((enforce(&mut table).as_str(), over(&table)), ("stop", Some(Over::Lapsed)));
    assert_eq!(table.watched().count(), 0);
    table.discard(tenure(5)).unwrap();
    assert_eq!(enforce(&mut table), "kill");
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(over(&table), Some(Over::Draining));
}

#[test]
fn an_idle_source_has_not_switched_unless_it_is_alone() {
    for alone in [false, true] {
        let mut table = source();
        sample(&mut table, 100, 600, alone);
        sample(&mut table, 100, 640, alone);
        sample(&mut table, 100, 650, alone);
        sample(&mut table, 110, 660, alone);
        sample(&mut table, 110, 670, alone);
        sample(&mut table, 120, 680, alone);
        assert_eq!(enforce(&mut table), if alone { "stop" } else { "" });
    }
}

#[test]
fn only_a_copy_that_never_ran_never_started() {
    let mut table = target();
    sample(&mut table, 3, 700, false);
    sample(&mut table, 3, 710, false);
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(over(&table), Some(Over::NeverStarted));

    let mut table = target();
    sample(&mut table, 3, 700, false);
    sample(&mut table, 9, 710, false);
    assert_eq!(table.watched().count(), 0, "it has run: nothing more is to be found out");
    table.exited(vm(), QEMU, LAST, |_| false);
    assert_eq!(over(&table), Some(Over::Exited { clean: false }));
}

#[test]
fn a_copy_that_lapses_before_it_ran_is_killed_and_never_started() {
    let mut table = target();
    sample(&mut table, 3, 700, false);
    table.lapse(HOME);
    assert_eq!(enforce(&mut table), "stop");
    assert_eq!(over(&table), None, "lapsed would mean that it may have run");
    sample(&mut table, 3, 720, false);
    assert_eq!(enforce(&mut table), "kill");
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(over(&table), Some(Over::NeverStarted));

    // One that began to run in its last moments keeps what it has.
    let mut table = target();
    sample(&mut table, 3, 700, false);
    table.lapse(HOME);
    assert_eq!(enforce(&mut table), "stop");
    sample(&mut table, 6, 720, false);
    assert_eq!((enforce(&mut table).as_str(), over(&table)), ("", Some(Over::Lapsed)));
    expect(&mut table, 6, Purpose::Reclaim).unwrap();
    claimed(&mut table, 6).unwrap();
    assert_eq!(enforce(&mut table), "lift");

    // Whether one ran that was never sampled before it was stopped, nobody knows.
    let mut table = target();
    table.lapse(HOME);
    assert_eq!(enforce(&mut table), "stop");
    sample(&mut table, 6, 720, false);
    sample(&mut table, 6, 730, false);
    assert_eq!((enforce(&mut table).as_str(), over(&table)), ("", Some(Over::Lapsed)));

    // Thrown away by the agent: the same word.
    let mut table = target();
    table.discard(tenure(5)).unwrap();
    assert_eq!(enforce(&mut table), "stop kill");
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(over(&table), Some(Over::NeverStarted));
}

#[test]
fn a_target_claims_and_its_deadline_counts_only_until_its_qemu_is_there() {
    let mut table = Table::default();
    table.receive(tenure(5), "web".into(), HOME, EPOCH, at(1000)).unwrap();
    table.receive(tenure(5), "web".into(), HOME, EPOCH, at(1100)).unwrap();
    assert_eq!(table.next_deadline(), Some(at(1100)));
    table.deadlines(at(1100));
    table.absent(vm());
    assert_eq!(over(&table), Some(Over::NeverStarted));
    let again = table.receive(tenure(5), "web".into(), HOME, EPOCH, at(2000));
    assert!(again.is_err(), "what was said to be over stays so");

    let mut table = target();
    assert_eq!(table.next_deadline(), None);
    table.deadlines(at(5000));
    assert_eq!(state(&table, 5), Some(VmState::Incoming));
    assert!(table.forget(tenure(5)).is_err(), "its QEMU is here");
    expect(&mut table, 6, Purpose::Adopt).unwrap();
    claimed(&mut table, 6).unwrap();
    assert_eq!((state(&table, 5), state(&table, 6)), (None, Some(VmState::Running)));
    assert!(table.discard(tenure(6)).is_err(), "it is nobody's leftover");
}

#[test]
fn a_withdrawn_row_goes_without_a_word() {
    let mut table = Table::default();
    table.receive(tenure(5), "web".into(), HOME, EPOCH, at(1000)).unwrap();
    table.forget(tenure(5)).unwrap();
    assert_eq!(state(&table, 5), None);
    table.receive(tenure(5), "web".into(), HOME, EPOCH, at(1000)).unwrap();
}

#[test]
fn a_new_guard_does_not_know_whether_an_incoming_copy_ran() {
    let table = target();
    let kept = table.kept(|_| None);
    let mut table = Table::default();
    kept.into_iter().for_each(|row| table.restore(row, Some(QEMU)));
    assert_eq!(enforce(&mut table), "stop");
    sample(&mut table, 0, 700, false);
    sample(&mut table, 0, 710, false);
    assert_eq!(enforce(&mut table), "");
    table.discard(tenure(5)).unwrap();
    assert_eq!(enforce(&mut table), "kill");
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(over(&table), Some(Over::Draining));
}

#[test]
fn the_next_guard_of_a_carried_table_does_not_know_either() {
    let bytes = postcard::to_stdvec(&target()).unwrap();
    let mut next: Table = postcard::from_bytes(&bytes).unwrap();
    next.carry_on();
    // It dies before any guard has seen a vCPU move; it may have run while none was there.
    next.exited(vm(), QEMU, LAST, |_| true);
    let said = over(&next);
    assert!(said.is_some() && said != Some(Over::NeverStarted), "{said:?}");
    // The one that was watched all the time says so.
    let mut watched = target();
    watched.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(over(&watched), Some(Over::NeverStarted));
}
