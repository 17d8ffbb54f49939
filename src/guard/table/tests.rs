use super::*;
use crate::types::Counter;

pub(super) const HOME: DatastoreId = DatastoreId(uuid::Uuid::from_u128(0xd1));
pub(super) const OTHER_HOME: DatastoreId = DatastoreId(uuid::Uuid::from_u128(0xd2));
pub(super) const EPOCH: Epoch = Epoch { incarnation: crate::types::Incarnation(3), lapses: 0 };
pub(super) const QEMU: ProcessKey = ProcessKey { pid: 100, started: 7 };
pub(super) const LATER: ProcessKey = ProcessKey { pid: 200, started: 8 };
/// Of the last beat before an exit.
pub(super) const LAST: Counter = Counter(70);

pub(super) fn vm() -> VmId {
    VmId(uuid::Uuid::from_u128(1))
}

pub(super) fn at(millis: u64) -> Time {
    Time(millis * 1_000_000)
}

pub(super) fn tenure(generation: u64) -> Tenure {
    Tenure { vm: vm(), generation: Generation(generation) }
}

pub(super) fn expect(table: &mut Table, generation: u64, purpose: Purpose) -> Result<(), Refusal> {
    let tenure = tenure(generation);
    table.expect(Expected {
        tenure,
        name: "web".into(),
        home: HOME,
        epoch: EPOCH,
        deadline: at(1000),
        purpose,
        writes: vec![],
    })
}

pub(super) fn claimed(table: &mut Table, generation: u64) -> Result<(), Refusal> {
    table.claimed(tenure(generation), EPOCH, at(2000), at(500))
}

pub(super) fn appeared(table: &mut Table, key: ProcessKey) {
    assert!(!table.appeared(vm(), key, at(600)));
}

/// Carries the acts out; what was done, in short.
pub(super) fn enforce(table: &mut Table) -> String {
    let mut done = Vec::new();
    loop {
        let acts = table.reconcile();
        if acts.is_empty() {
            return done.join(" ");
        }
        for act in acts {
            match act {
                Act::Stop(..) => done.push("stop"),
                Act::Check(vm, key) => table.stands(vm, key),
                Act::Lift(..) => done.push("lift"),
                Act::Kill(..) => done.push("kill"),
            }
        }
    }
}

pub(super) fn state(table: &Table, generation: u64) -> Option<VmState> {
    table.views().find(|row| row.tenure == tenure(generation)).map(|row| row.state)
}

pub(super) fn stopped(table: &Table) -> bool {
    table.views().any(|row| row.stopped)
}

pub(super) fn running(generation: u64) -> Table {
    let mut table = Table::default();
    expect(&mut table, generation, Purpose::Start).unwrap();
    claimed(&mut table, generation).unwrap();
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "");
    assert_eq!(state(&table, generation), Some(VmState::Running));
    table
}

pub(super) fn lapsed(generation: u64) -> Table {
    let mut table = running(generation);
    table.lapse(HOME);
    assert_eq!(enforce(&mut table), "stop");
    assert_eq!(state(&table, generation), Some(VmState::Over(Over::Lapsed)));
    table
}

#[test]
fn a_start_runs_only_once_its_claim_is_confirmed() {
    let mut table = Table::default();
    expect(&mut table, 5, Purpose::Start).unwrap();
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "stop", "it came before the claim");
    assert_eq!(state(&table, 5), Some(VmState::Expected));
    claimed(&mut table, 5).unwrap();
    assert_eq!(enforce(&mut table), "lift");
    assert_eq!(state(&table, 5), Some(VmState::Running));
    claimed(&mut table, 5).unwrap();
    assert_eq!(enforce(&mut table), "", "told twice");
}

#[test]
fn purposes_fit_only_what_is_there() {
    type Make = fn() -> Table;
    let empty: Make = Table::default;
    let stopped_without_row: Make = || {
        let mut table = lapsed(4);
        assert_eq!(table.forget(tenure(4)), Err(wrong("its QEMU is alive")));
        table.kill(tenure(4), Generation(6), "claimed elsewhere").unwrap();
        table
    };
    let cases: &[(&str, Make, Purpose, bool)] = &[
        ("start of nothing", empty, Purpose::Start, true),
        ("start of what runs", || running(4), Purpose::Start, false),
        ("start of what stands stopped", || lapsed(4), Purpose::Start, false),
        ("adoption of what is not seen yet", empty, Purpose::Adopt, true),
        ("adoption of what runs under an older claim", || running(4), Purpose::Adopt, true),
        ("adoption must not lift a stop", || lapsed(4), Purpose::Adopt, false),
        ("handing over what runs", || running(4), Purpose::HandOver, true),
        ("handing over what stands stopped", || lapsed(4), Purpose::HandOver, false),
        ("handing over nothing", empty, Purpose::HandOver, false),
        ("reclaim of nothing", empty, Purpose::Reclaim, false),
        ("reclaim of what runs", || running(4), Purpose::Reclaim, false),
        ("reclaim of what stands stopped", || lapsed(4), Purpose::Reclaim, true),
        ("reclaim of what is being killed", stopped_without_row, Purpose::Reclaim, false),
    ];
    for (why, make, purpose, fits) in cases {
        assert_eq!(expect(&mut make(), 7, *purpose).is_ok(), *fits, "{why}");
    }
    assert!(expect(&mut lapsed(4), 3, Purpose::Reclaim).is_err(), "an older generation");
    assert!(expect(&mut running(4), 4, Purpose::Adopt).is_err(), "the same row twice");
}

#[test]
fn a_lapse_stops_and_is_said_only_when_it_stands() {
    let mut table = running(5);
    table.lapse(OTHER_HOME);
    assert_eq!(enforce(&mut table), "");
    table.lapse(HOME);
    assert_eq!(state(&table, 5), Some(VmState::Running), "the stop is not even ordered");
    let acts = table.reconcile();
    assert_eq!(acts, [Act::Stop(vm(), QEMU)]);
    assert_eq!(table.list(HOME)[0].state, VmState::Running, "ordered is not seen");
    table.stands(vm(), QEMU);
    assert_eq!(table.list(HOME)[0].state, VmState::Over(Over::Lapsed));
    assert!(stopped(&table));
    assert!(claimed(&mut table, 5).is_err(), "over is for ever");
}

#[test]
fn a_reclaim_lifts_only_when_confirmed_and_the_old_row_stays() {
    let mut table = lapsed(5);
    expect(&mut table, 6, Purpose::Reclaim).unwrap();
    assert_eq!(enforce(&mut table), "");
    assert!(stopped(&table));
    claimed(&mut table, 6).unwrap();
    assert_eq!(enforce(&mut table), "lift");
    assert_eq!(state(&table, 6), Some(VmState::Running));
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::Lapsed)));
    table.forget(tenure(5)).unwrap();
    assert_eq!(state(&table, 5), None);
    assert!(table.forget(tenure(6)).is_err(), "it runs");
}

#[test]
fn over_stays_said_when_a_later_row_lapses_again() {
    let mut table = lapsed(5);
    expect(&mut table, 6, Purpose::Reclaim).unwrap();
    claimed(&mut table, 6).unwrap();
    enforce(&mut table);
    table.lapse(HOME);
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::Lapsed)));
    assert_eq!(state(&table, 6), Some(VmState::Running), "not standing yet");
}

#[test]
fn a_claim_in_a_newer_epoch_or_after_the_deadline_is_refused() {
    let mut table = Table::default();
    expect(&mut table, 5, Purpose::Start).unwrap();
    let newer = Epoch { lapses: 1, ..EPOCH };
    assert_eq!(table.claimed(tenure(5), newer, at(2000), at(500)), Err(Refusal::EpochChanged { now: newer }));
    assert!(table.claimed(tenure(5), EPOCH, at(3000), at(1000)).is_err(), "the deadline is now");
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::Lapsed)));
    assert!(table.claimed(tenure(5), EPOCH, at(3000), at(500)).is_err(), "barred for ever");
    assert!(table.claimed(tenure(6), EPOCH, at(3000), at(500)).is_err(), "never expected");
}

#[test]
fn a_missed_deadline_bars_and_never_started_needs_a_fresh_look() {
    let mut table = Table::default();
    expect(&mut table, 5, Purpose::Start).unwrap();
    table.deadlines(at(999));
    assert_eq!(state(&table, 5), Some(VmState::Expected));
    assert_eq!(table.next_deadline(), Some(at(1000)));
    table.deadlines(at(1000));
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::Lapsed)), "nobody looked yet");
    assert!(table.wanted().any(|(_, name, soon)| name == "web" && soon));
    table.absent(vm());
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::NeverStarted)));
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "stop kill", "it came after all");
}

#[test]
fn a_start_that_came_up_but_was_not_confirmed_dies() {
    let mut table = Table::default();
    expect(&mut table, 5, Purpose::Start).unwrap();
    appeared(&mut table, QEMU);
    table.deadlines(at(1000));
    assert_eq!(enforce(&mut table), "stop kill");
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::Draining)));
}

#[test]
fn a_confirmed_start_that_comes_too_late_is_stopped() {
    let mut table = Table::default();
    expect(&mut table, 5, Purpose::Start).unwrap();
    claimed(&mut table, 5).unwrap();
    assert!(!table.appeared(vm(), QEMU, at(2000)));
    assert_eq!(enforce(&mut table), "stop kill");
}

#[test]
fn a_claim_for_a_running_vm_that_is_not_confirmed_leaves_it_as_it_was() {
    let mut table = running(5);
    expect(&mut table, 6, Purpose::Adopt).unwrap();
    assert_eq!(enforce(&mut table), "");
    let mut good = table.clone();
    claimed(&mut good, 6).unwrap();
    assert_eq!((state(&good, 5), state(&good, 6)), (None, Some(VmState::Running)), "superseded");
    assert_eq!(enforce(&mut good), "");
    // The claim of 6 may exist and names this host: nothing is said of it while the copy runs under 5.
    table.deadlines(at(1000));
    assert_eq!(enforce(&mut table), "");
    assert_eq!((state(&table, 5), state(&table, 6)), (Some(VmState::Running), None));
    // A copy that came by migration has no right of its own to run.
    let mut comes = Table::default();
    comes.incoming(tenure(5), "web".into(), HOME, EPOCH, at(9000)).unwrap();
    appeared(&mut comes, QEMU);
    expect(&mut comes, 6, Purpose::Adopt).unwrap();
    comes.deadlines(at(1000));
    assert_eq!(enforce(&mut comes), "stop");
    assert_eq!(state(&comes, 6), Some(VmState::Over(Over::Lapsed)));
}

#[test]
fn an_abandoned_adoption_leaves_the_vm_alone() {
    let mut table = running(5);
    expect(&mut table, 6, Purpose::Adopt).unwrap();
    table.abandon(tenure(6)).unwrap();
    assert_eq!(enforce(&mut table), "");
    assert_eq!(state(&table, 5), Some(VmState::Running));
    let mut first = Table::default();
    expect(&mut first, 1, Purpose::Adopt).unwrap();
    appeared(&mut first, QEMU);
    first.abandon(tenure(1)).unwrap();
    assert_eq!(enforce(&mut first), "", "it was never protected");
    assert_eq!(state(&first, 1), None, "a row that is over would stop it");
    first.forget(tenure(1)).unwrap();
    appeared(&mut first, LATER);
    assert_eq!(enforce(&mut first), "", "nobody's");
    // A confirmed one cannot be taken back: the claim exists.
    let mut table = running(5);
    assert!(table.abandon(tenure(5)).is_err());
}

#[test]
fn an_adoption_that_was_not_found_in_time_is_stopped_not_killed() {
    let mut table = Table::default();
    expect(&mut table, 1, Purpose::Adopt).unwrap();
    table.deadlines(at(1000));
    table.absent(vm());
    assert_eq!(
        state(&table, 1),
        Some(VmState::Over(Over::Lapsed)),
        "it ran before the row: never started is not known"
    );
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "stop");
}

#[test]
fn a_lapse_ends_an_adoption_under_way_too() {
    let mut table = running(5);
    expect(&mut table, 6, Purpose::Adopt).unwrap();
    table.lapse(HOME);
    assert_eq!(enforce(&mut table), "stop");
    assert!(claimed(&mut table, 6).is_err());
}

#[test]
fn rows_on_two_homes_never_vouch_for_each_other() {
    let mut table = running(5);
    let new = Expected {
        tenure: tenure(6),
        name: "web".into(),
        home: OTHER_HOME,
        epoch: EPOCH,
        deadline: at(1000),
        purpose: Purpose::Adopt,
        writes: vec![],
    };
    table.expect(new).unwrap();
    let mut late = table.clone();
    late.deadlines(at(1000));
    assert_eq!(enforce(&mut late), "stop", "the claim of 6 may exist, and its home's lease is not that of 5");
    // No claim is looked for on a home that does not have it yet.
    assert_eq!((table.held(vm(), HOME), table.held(vm(), OTHER_HOME)), (Some(tenure(5)), None));
    let mut moved = table.clone();
    claimed(&mut moved, 6).unwrap();
    assert_eq!((moved.held(vm(), HOME), moved.held(vm(), OTHER_HOME)), (None, Some(tenure(6))));
    moved.lapse(HOME);
    assert_eq!(enforce(&mut moved), "", "the old home is left");
    table.lapse(HOME);
    assert_eq!(enforce(&mut table), "stop");
    assert_eq!(state(&table, 6), Some(VmState::Over(Over::Lapsed)));
}

#[test]
fn an_exit_is_clean_only_after_a_beat_that_was_begun_after_it() {
    let to = HostId(uuid::Uuid::from_u128(9));
    let over = |why| Some(VmState::Over(why));
    let mut table = running(5);
    table.exited(vm(), LATER, LAST, |_| true);
    assert_eq!(state(&table, 5), Some(VmState::Running), "another process");
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(state(&table, 5), over(Over::Draining), "over is said at once");
    assert!(table.drains_on(HOME) && !table.drains_on(OTHER_HOME));
    table.landed(HOME, LAST);
    table.landed(OTHER_HOME, LAST.next());
    table.lost(|home| home == HOME);
    assert_eq!(state(&table, 5), over(Over::Draining), "a beat begun before, or on another datastore, says nothing");
    let mut broken = table.clone();
    table.landed(HOME, LAST.next());
    assert_eq!(state(&table, 5), over(Over::Exited { clean: true }));
    table.hand_over(tenure(5), to).unwrap();
    assert_eq!(state(&table, 5), over(Over::HandedTo(to)), "the word came after the exit");
    broken.hand_over(tenure(5), to).unwrap();
    broken.lost(|home| home != HOME);
    broken.landed(HOME, LAST.next());
    assert_eq!(state(&broken, 5), over(Over::Exited { clean: false }), "its path broke meanwhile");
    assert!(broken.hand_over(tenure(5), to).is_err(), "what was under way may still land");
    let mut table = running(5);
    table.exited(vm(), QEMU, LAST, |home| home != HOME);
    assert_eq!(state(&table, 5), over(Over::Exited { clean: false }), "its path did not work");
    let mut table = lapsed(5);
    table.exited(vm(), QEMU, LAST, |_| true);
    assert_eq!(state(&table, 5), over(Over::Draining), "says more than lapsed");
    let mut again = Table::default();
    again.restore(table.kept(|_| None)[0].clone(), None);
    assert_eq!(state(&again, 5), over(Over::Exited { clean: false }), "nobody watched meanwhile");
}

#[test]
fn a_handover_names_the_receiver_once_all_that_it_wrote_has_landed() {
    let to = HostId(uuid::Uuid::from_u128(9));
    let mut table = Table::default();
    let new = Expected {
        tenure: tenure(5),
        name: "web".into(),
        home: HOME,
        epoch: EPOCH,
        deadline: at(1000),
        purpose: Purpose::Start,
        writes: vec![OTHER_HOME],
    };
    table.expect(new).unwrap();
    claimed(&mut table, 5).unwrap();
    appeared(&mut table, QEMU);
    // Re-claimed: the same process, which still has open what it had.
    table.lapse(HOME);
    enforce(&mut table);
    expect(&mut table, 6, Purpose::Reclaim).unwrap();
    claimed(&mut table, 6).unwrap();
    table.hand_over(tenure(6), to).unwrap();
    assert_eq!(state(&table, 6), Some(VmState::Running));
    table.exited(vm(), QEMU, LAST, |_| true);
    table.landed(HOME, LAST.next());
    assert_eq!(state(&table, 6), Some(VmState::Over(Over::Draining)));
    table.landed(OTHER_HOME, LAST.next());
    assert_eq!(state(&table, 6), Some(VmState::Over(Over::HandedTo(to))));
    assert!(lapsed(5).hand_over(tenure(5), to).is_err(), "it stands here with its memory");
}

#[test]
fn only_a_later_claim_of_another_kills() {
    let mut table = running(5);
    assert!(table.kill(tenure(5), Generation(5), "").is_err());
    table.kill(tenure(5), Generation(6), "claim 6 names another").unwrap();
    assert_eq!(enforce(&mut table), "stop kill");
    let mut table = lapsed(5);
    expect(&mut table, 6, Purpose::Reclaim).unwrap();
    assert!(table.kill(tenure(5), Generation(6), "").is_err(), "this host is making claim 6 itself");
    table.abandon(tenure(6)).unwrap();
    table.kill(tenure(5), Generation(6), "").unwrap();
    assert_eq!(enforce(&mut table), "kill");
    assert_eq!(table.lapsed_on(HOME), [], "nothing more to read");
}

#[test]
fn an_incoming_copy_waits_and_becomes_ours_by_its_own_claim() {
    let incoming = |table: &mut Table| table.incoming(tenure(5), "web".into(), HOME, EPOCH, at(1000));
    let mut table = Table::default();
    incoming(&mut table).unwrap();
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "", "libvirt holds it paused; a stop would break the migration");
    assert_eq!(state(&table, 5), Some(VmState::Incoming));
    let mut failed = table.clone();
    expect(&mut table, 6, Purpose::Adopt).unwrap();
    table.deadlines(at(999));
    claimed(&mut table, 6).unwrap();
    assert_eq!((state(&table, 5), state(&table, 6)), (None, Some(VmState::Running)));
    // No word of the source: the copy is thrown away, and the same generation may come again.
    failed.deadlines(at(1000));
    assert_eq!(enforce(&mut failed), "stop kill");
    assert!(incoming(&mut failed).is_err(), "still there");
    failed.exited(vm(), QEMU, LAST, |_| true);
    incoming(&mut failed).unwrap();
    assert!(incoming(&mut running(5)).is_err(), "this host is the owner");
}

#[test]
fn a_restored_row_is_over_and_its_qemu_is_stopped() {
    let kept = running(5).kept(|_| None);
    let mut table = Table::default();
    table.restore(kept[0].clone(), Some(QEMU));
    assert_eq!(state(&table, 5), Some(VmState::Running), "not seen standing by this guard");
    assert_eq!(enforce(&mut table), "stop");
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::Lapsed)));
    expect(&mut table, 6, Purpose::Reclaim).unwrap();
    let mut gone = Table::default();
    gone.restore(kept[0].clone(), None);
    assert_eq!(state(&gone, 5), Some(VmState::Over(Over::Exited { clean: false })));
    // A row that was expected when the guard died: perhaps it was confirmed, came up and ended. Nobody knows.
    let mut expected = Table::default();
    expect(&mut expected, 5, Purpose::Start).unwrap();
    let mut table = Table::default();
    table.restore(expected.kept(|_| None)[0].clone(), None);
    table.absent(vm());
    assert_eq!(state(&table, 5), Some(VmState::Over(Over::Lapsed)));
    appeared(&mut table, QEMU);
    assert_eq!(enforce(&mut table), "stop");
}

#[test]
fn what_appears_for_a_row_that_is_over_is_stopped() {
    let mut table = running(5);
    table.exited(vm(), QEMU, LAST, |_| true);
    appeared(&mut table, LATER);
    assert_eq!(enforce(&mut table), "stop", "it ran here once: an agent may claim it");
    assert!(table.take_reports().iter().any(|report| matches!(report, crate::types::guard::GuardReport::Alarm(_))));
    let mut second = running(5);
    assert!(second.appeared(vm(), LATER, at(600)), "two at once");
}

#[test]
fn the_table_is_bounded_and_the_oldest_that_is_over_goes_first() {
    let mut table = Table::default();
    let one = |n: u64| Tenure { vm: VmId(uuid::Uuid::from_u128(u128::from(n))), generation: Generation(1) };
    let new = |n: u64| Expected {
        tenure: one(n),
        name: format!("vm{n}"),
        home: HOME,
        epoch: EPOCH,
        deadline: at(1000),
        purpose: Purpose::Start,
        writes: vec![],
    };
    for n in 0..MAX_ROWS as u64 {
        table.expect(new(n)).unwrap();
    }
    assert_eq!(table.expect(new(9999)), Err(Refusal::Full(MAX_ROWS)));
    table.abandon(one(7)).unwrap();
    table.abandon(one(3)).unwrap();
    table.expect(new(9999)).unwrap();
    assert!(!table.knows(one(7)) && table.knows(one(3)));
    let list = table.list(HOME);
    assert_eq!(list.len(), MAX_VMS_PER_HOST);
    assert!(list.iter().all(|entry| entry.state == VmState::Expected), "living rows first");
}
