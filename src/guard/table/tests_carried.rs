use super::tests::*;
use super::*;

/// As the next guard finds it.
fn carried(table: &Table) -> Table {
    let bytes = postcard::to_stdvec(table).unwrap();
    let mut next: Table = postcard::from_bytes(&bytes).unwrap();
    next.carry_on();
    next
}

#[test]
fn the_next_guard_lifts_what_may_run_and_stops_what_may_not() {
    let mut table = Table::default();
    expect(&mut table, 1, Purpose::Start).unwrap();
    claimed(&mut table, 1).unwrap();
    appeared(&mut table, QEMU);
    enforce(&mut table);
    // `--stop-all` may have stopped it, and a lift does nothing to one that runs.
    let mut next = carried(&table);
    assert_eq!(enforce(&mut next), "lift");
    assert_eq!((state(&next, 1), stopped(&next)), (Some(VmState::Running), false));
    assert_eq!(enforce(&mut next), "");
    // Its lease ended meanwhile.
    let mut next = carried(&table);
    next.lapse(HOME);
    assert_eq!(enforce(&mut next), "");
    assert_eq!((state(&next, 1), stopped(&next)), (Some(VmState::Over(Over::Lapsed)), true));
    // The last guard died between the lapse and the signal.
    table.lapse(HOME);
    assert_eq!(table.reconcile().len(), 1);
    let mut next = carried(&table);
    assert_eq!(state(&next, 1), Some(VmState::Running), "not said before it stands");
    assert_eq!(enforce(&mut next), "stop");
    assert_eq!(state(&next, 1), Some(VmState::Over(Over::Lapsed)));
    assert_eq!(enforce(&mut carried(&next)), "", "what stands goes on standing");
}

#[test]
fn what_came_up_while_nobody_watched_is_lifted_if_it_may_run() {
    let mut table = Table::default();
    expect(&mut table, 1, Purpose::Start).unwrap();
    let mut unconfirmed = carried(&table);
    appeared(&mut unconfirmed, QEMU);
    assert_eq!(enforce(&mut unconfirmed), "stop");
    claimed(&mut table, 1).unwrap();
    let mut next = carried(&table);
    appeared(&mut next, QEMU);
    assert_eq!(enforce(&mut next), "lift");
    assert_eq!(state(&next, 1), Some(VmState::Running));
    // One that did not come up by its deadline may have been there unseen.
    let mut next = carried(&table);
    next.deadlines(at(3000));
    next.absent(vm());
    assert_eq!(state(&next, 1), Some(VmState::Over(Over::Lapsed)), "never started cannot be said");
}

#[test]
fn what_was_struck_before_the_table_was_asked_is_lifted_if_it_may_run() {
    let mut table = Table::default();
    expect(&mut table, 1, Purpose::Start).unwrap();
    claimed(&mut table, 1).unwrap();
    appeared(&mut table, QEMU);
    assert_eq!(table.runs().collect::<Vec<_>>(), [(HOME, QEMU)]);
    table.struck(QEMU);
    assert_eq!(enforce(&mut table), "lift", "the lease was renewed at that very moment");
    table.struck(QEMU);
    table.lapse(HOME);
    assert_eq!(table.runs().count(), 0);
    assert_eq!(enforce(&mut table), "");
    assert!(stopped(&table));
}
