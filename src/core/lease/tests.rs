use super::*;

const L: Duration = Duration::from_millis(5000);

fn at(millis: u64) -> Time {
    Time(millis * 1_000_000)
}

fn lease() -> Lease {
    Lease::new(Incarnation(7), L)
}

/// A lease whose counter 1 was taken at 0 and persisted at 100 ms.
fn fresh() -> Lease {
    let mut lease = lease();
    lease.given(Counter(1), at(0));
    assert_eq!(lease.persisted(Counter(1), at(100)), Persisted::Regained);
    lease
}

#[test]
fn nothing_is_valid_before_a_beat_is_known_to_be_persisted() {
    let mut lease = lease();
    assert!(!lease.is_valid(at(0)));
    lease.given(Counter(1), at(0));
    assert!(!lease.is_valid(at(1)), "given is not persisted");
    assert_eq!(lease.valid_until(), None);
    assert!(!lease.lapse_if_due(at(99_999)), "what never was cannot lapse");
    assert_eq!(lease.epoch(), Epoch { incarnation: Incarnation(7), lapses: 0 });
}

#[test]
fn counts_from_before_the_write_not_from_its_answer() {
    let lease = fresh();
    assert_eq!(lease.valid_until(), Some(at(5000)));
    assert_eq!(lease.stop_at(), Some(at(4800)));
}

#[test]
fn table_of_renewals() {
    // (given and taken at, persisted word at, what it says, end after it)
    let table: &[(u64, u64, u64, Persisted, Option<u64>)] = &[
        (2, 1000, 1100, Persisted::Renewed, Some(6000)),
        (2, 4790, 4799, Persisted::Renewed, Some(9790)),
        // The word comes after the stop was due: the epoch is over even though t_c is recent.
        (2, 4790, 4800, Persisted::Regained, Some(9790)),
        // The write took longer than the lease it would give.
        (2, 100, 4900, Persisted::Nothing, None),
    ];
    for &(counter, taken, known, expected, until) in table {
        let mut lease = fresh();
        lease.given(Counter(counter), at(taken));
        assert_eq!(lease.persisted(Counter(counter), at(known)), expected, "taken {taken}, known {known}");
        assert_eq!(lease.valid_until(), until.map(at), "taken {taken}, known {known}");
    }
}

#[test]
fn lapses_once_and_then_in_a_new_epoch() {
    let mut lease = fresh();
    assert!(lease.is_valid(at(4799)));
    assert!(!lease.lapse_if_due(at(4799)));
    assert!(!lease.is_valid(at(4800)), "the reserve is not for running");
    assert!(lease.lapse_if_due(at(4800)));
    assert!(!lease.lapse_if_due(at(4801)), "one lapse is one lapse");
    assert_eq!(lease.epoch().lapses, 1);
    lease.given(Counter(2), at(6000));
    assert_eq!(lease.persisted(Counter(2), at(6010)), Persisted::Regained);
    assert_eq!(lease.epoch().lapses, 1);
    assert!(lease.lapse_if_due(at(10_800)));
    assert_eq!(lease.epoch().lapses, 2);
}

#[test]
fn a_lapse_is_noticed_even_if_nobody_looked() {
    let mut lease = fresh();
    lease.given(Counter(2), at(20_000));
    assert_eq!(lease.persisted(Counter(2), at(20_001)), Persisted::Regained);
    assert_eq!(lease.epoch().lapses, 1, "nothing may run on from before");
}

#[test]
fn only_what_was_given_and_is_newer_counts() {
    let mut lease = fresh();
    assert_eq!(lease.persisted(Counter(9), at(200)), Persisted::Nothing, "never given");
    lease.given(Counter(5), at(500));
    lease.given(Counter(6), at(900));
    assert_eq!(lease.persisted(Counter(6), at(1000)), Persisted::Renewed);
    assert_eq!(lease.persisted(Counter(5), at(1001)), Persisted::Nothing, "older than the newest known");
    assert_eq!(lease.persisted(Counter(6), at(1002)), Persisted::Nothing, "told twice");
    assert_eq!(lease.valid_until(), Some(at(5900)));
}

#[test]
fn gaps_between_counters_are_normal() {
    // One counter for all datastores and the network: each sees only some.
    let mut lease = fresh();
    for (counter, taken) in [(3, 1000), (8, 2000), (9, 2001)] {
        lease.given(Counter(counter), at(taken));
    }
    assert_eq!(lease.persisted(Counter(8), at(2500)), Persisted::Renewed);
    assert_eq!(lease.valid_until(), Some(at(7000)));
}

#[test]
#[should_panic(expected = "order of their times")]
fn counters_only_rise() {
    let mut lease = fresh();
    lease.given(Counter(3), at(1000));
    lease.given(Counter(3), at(1001));
}

#[test]
fn memory_of_given_counters_is_bounded() {
    let mut lease = lease();
    for counter in 0..10 * GIVEN_MAX as u64 {
        lease.given(Counter(counter), at(0));
    }
    assert_eq!(lease.given.len(), GIVEN_MAX);
    assert_eq!(lease.persisted(Counter(1), at(1)), Persisted::Nothing, "forgotten is not persisted");
    // And what is too old to matter goes by itself.
    lease.given(Counter(1_000_000), at(60_000));
    assert_eq!(lease.given.len(), 1);
}

#[test]
fn a_longer_lease_counts_only_for_beats_that_announced_it() {
    let mut lease = fresh();
    lease.given(Counter(2), at(1000));
    lease.set_lease(3 * L);
    assert_eq!(lease.announced(at(1001)), 3 * L);
    assert_eq!(lease.persisted(Counter(2), at(1100)), Persisted::Renewed);
    assert_eq!(lease.valid_until(), Some(at(6000)), "the takers were told 5 s with this one");
    lease.given(Counter(3), at(2000));
    assert_eq!(lease.persisted(Counter(3), at(2100)), Persisted::Renewed);
    assert_eq!(lease.valid_until(), Some(at(17_000)));
}

#[test]
fn a_shorter_lease_is_enforced_first_and_announced_later() {
    let mut lease = fresh();
    let short = Duration::from_millis(1500);
    lease.set_lease(short);
    assert_eq!(lease.valid_until(), Some(at(5000)), "no lapse by the change itself");
    lease.given(Counter(2), at(2000));
    assert_eq!(lease.persisted(Counter(2), at(2010)), Persisted::Renewed);
    assert_eq!(lease.valid_until(), Some(at(3500)), "enforced at once");
    assert_eq!(lease.announced(at(2011)), L, "not announced yet");
    assert_eq!(lease.announced(at(7009)), L);
    assert_eq!(lease.announced(at(7010)), short, "the old one has passed");
}

#[test]
fn a_shorter_lease_waits_while_it_would_cost_a_lapse() {
    let mut lease = fresh();
    lease.set_lease(Duration::from_millis(1500));
    lease.given(Counter(2), at(1000));
    assert_eq!(lease.persisted(Counter(2), at(3000)), Persisted::Renewed, "this write took 2 s");
    assert_eq!((lease.valid_until(), lease.announced(at(3001))), (Some(at(6000)), L));
}

#[test]
fn a_shorter_lease_while_lapsed_is_safe_at_once() {
    let mut lease = lease();
    lease.given(Counter(1), at(0));
    lease.set_lease(Duration::from_millis(1500));
    assert_eq!(lease.persisted(Counter(1), at(100)), Persisted::Regained);
    assert_eq!(lease.valid_until(), Some(at(1500)));
    assert_eq!(lease.announced(at(101)), L, "counter 1 said 5 s");
    assert_eq!(lease.announced(at(5000)), Duration::from_millis(1500));
}

#[test]
fn another_incarnation_forgets_everything() {
    let mut lease = fresh();
    lease.given(Counter(2), at(1000));
    lease.restart(Incarnation(8));
    assert!(!lease.is_valid(at(1001)));
    assert_eq!(lease.epoch(), Epoch { incarnation: Incarnation(8), lapses: 0 });
    assert_eq!(lease.persisted(Counter(2), at(1100)), Persisted::Nothing);
}
