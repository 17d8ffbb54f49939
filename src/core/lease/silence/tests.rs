use super::*;
use crate::types::{Counter, HostIndex, Incarnation};

const L: Duration = Duration::from_millis(5000);
/// (L + margin)(1 + rho) for L = 5 s, rounded up to whole milliseconds.
const WINDOW: u64 = 5206;

fn at(millis: u64) -> Time {
    Time(millis * 1_000_000)
}

/// A read of 10 ms that shows a host with one block.
fn seen(began: u64) -> Seen {
    Seen {
        began: at(began),
        ended: at(began + 10),
        roster: 1,
        bytes: Digest([1; 32]),
        lease: Some(L),
        beat: Some((Incarnation(9), Counter(7))),
        unpunctual: false,
        attested: None,
    }
}

fn attestation(counter: u64, lease: Duration) -> Attestation {
    Attestation { index: HostIndex(3), incarnation: Incarnation(9), counter: Counter(counter), lease }
}

/// One thing that happens at a time in ms.
enum Step {
    /// A complete read that began then.
    Read(Seen),
    /// A complete read whose roster does not name the host.
    Absent,
    /// Own beats, each second from .. to, each persisted after 5 ms.
    Beats(u64, u64),
}
use Step::{Absent, Beats, Read};

fn run(steps: Vec<Step>) -> Silence {
    let mut silence = Silence::new(L);
    for step in steps {
        match step {
            Read(seen) => silence.read(Some(seen)),
            Absent => silence.read(None),
            Beats(from, to) => {
                for began in (from..=to).step_by(1000) {
                    silence.persisted(at(began), at(began + 5));
                }
            }
        }
    }
    silence
}

fn check(why: &str, steps: Vec<Step>, claim_read: u64, over: bool) {
    let silence = run(steps);
    assert_eq!(silence.over_since(at(claim_read)).is_some(), over, "{why}: {silence:?}");
}

/// Read from 10,000 to 10,010; closes with a read that begins at `s`.
fn plain(s: u64) -> Vec<Step> {
    vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, s), Read(seen(s))]
}

#[test]
fn the_window_counts_from_the_end_of_a_read_to_the_begin_of_a_read() {
    check("long enough", plain(10_010 + WINDOW), 10_000, true);
    check("one ms short", plain(10_010 + WINDOW - 1), 10_000, false);
    check("from the begin of the first it would be enough", plain(10_000 + WINDOW), 10_000, false);
    let mut late_end = seen(10_010 + WINDOW - 1);
    late_end.ended = at(20_000);
    let steps = vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, 15_000), Read(late_end)];
    check("the end of the last does not count", steps, 10_000, false);
    check("one read is no window", vec![Beats(5000, 10_000), Read(seen(10_000))], 9000, false);
}

#[test]
fn over_since_tells_the_window_and_next_due_when_to_read() {
    let silence = run(plain(10_010 + WINDOW));
    assert_eq!(silence.over_since(at(10_000)), Some(Duration::from_millis(WINDOW)));
    let silence = run(vec![Beats(5000, 10_000), Read(seen(10_000))]);
    let due = silence.next_due().unwrap();
    assert!(at(10_010 + WINDOW - 1) < due && due <= at(10_010 + WINDOW), "{due:?}");
    assert_eq!(Silence::new(L).next_due(), None);
}

#[test]
fn the_claim_must_have_been_read_before_the_closing_read_began() {
    let s = 10_010 + WINDOW;
    check("just before", plain(s), s - 1, true);
    check("at the same time", plain(s), s, false);
    check("after", plain(s), s + 1, false);
    let mut steps = plain(s);
    steps.push(Beats(16_000, 16_000));
    steps.push(Read(seen(s + 1000)));
    check("a further read allows later claims", steps, s + 1, true);
}

#[test]
fn any_change_of_the_hosts_blocks_starts_anew() {
    let mut changed = seen(12_000);
    changed.bytes = Digest([2; 32]);
    let mut back = seen(10_010 + WINDOW);
    back.bytes = Digest([2; 32]);
    let steps = || vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, 12_000), Read(changed)];
    let mut short = steps();
    short.extend([Beats(13_000, 15_000), Read(back)]);
    check("counted from the change", short, 10_000, false);
    let mut full = steps();
    let mut last = back;
    last.began = at(12_010 + WINDOW);
    full.extend([Beats(13_000, 17_000), Read(last)]);
    check("a whole window after it", full, 10_000, true);
    let mut and_back = steps();
    and_back.extend([Beats(13_000, 15_000), Read(seen(10_010 + WINDOW))]);
    check("bytes that return are a change as well", and_back, 10_000, false);
}

#[test]
fn a_torn_block_that_stays_the_same_is_silence() {
    // The newest block is torn; an older one still tells L.
    let torn = |began| Seen { bytes: Digest([9; 32]), ..seen(began) };
    let steps = vec![
        Beats(5000, 10_000),
        Read(torn(10_000)),
        Beats(11_000, 15_000),
        Read(torn(12_000)),
        Read(torn(10_010 + WINDOW)),
    ];
    check("torn and the same", steps, 10_000, true);
}

#[test]
fn without_any_known_lease_nothing_is_proven() {
    let unknown = |began| Seen { lease: None, ..seen(began) };
    let steps = vec![Beats(5000, 10_000), Read(unknown(10_000)), Beats(11_000, 60_000), Read(unknown(60_000))];
    check("no L", steps, 10_000, false);
}

#[test]
fn an_attestation_that_changes_is_life() {
    let with = |began, counter| Seen { attested: Some(attestation(counter, L)), ..seen(began) };
    let steps = |second| {
        vec![Beats(5000, 10_000), Read(with(10_000, 5)), Beats(11_000, 15_000), Read(with(10_010 + WINDOW, second))]
    };
    check("the same one", steps(5), 10_000, true);
    check("a newer one", steps(6), 10_000, false);
    check("an older one, of a member that heard less", steps(4), 10_000, true);
    let gone = vec![Beats(5000, 10_000), Read(with(10_000, 5)), Beats(11_000, 15_000), Read(seen(10_010 + WINDOW))];
    check("one that is gone has aged out", gone, 10_000, true);
    let back = |counter| {
        let begin = vec![Beats(5000, 10_000), Read(with(10_000, 5)), Beats(11_000, 13_000), Read(seen(13_500))];
        begin.into_iter().chain([Beats(14_000, 15_000), Read(with(10_010 + WINDOW, counter))]).collect()
    };
    check("gone, then the same one again", back(5), 10_000, true);
    check("gone, then a newer one", back(6), 10_000, false);
}

#[test]
fn the_largest_lease_of_blocks_and_attestations_counts() {
    let long = Duration::from_millis(15_000);
    let steps = |counter, s| {
        let attested = |began| Seen { attested: Some(attestation(counter, long)), ..seen(began) };
        vec![Beats(5000, 10_000), Read(attested(10_000)), Beats(11_000, s), Read(attested(s))]
    };
    check("5 s are not enough for 15", steps(8, 10_010 + WINDOW), 10_000, false);
    check("15 s", steps(8, 10_010 + 15_616), 10_000, true);
    check("of a beat older than the newest block: L was lowered since", steps(6, 10_010 + WINDOW), 10_000, true);
    let block = |began| Seen { lease: Some(long), attested: Some(attestation(5, L)), ..seen(began) };
    let steps = |s| vec![Beats(5000, 10_000), Read(block(10_000)), Beats(11_000, s), Read(block(s))];
    check("the block's", steps(10_010 + WINDOW), 10_000, false);
    check("the block's 15 s", steps(10_010 + 15_616), 10_000, true);
}

#[test]
fn an_unpunctual_guard_gets_half_a_lease_more() {
    let late = |began| Seen { unpunctual: true, ..seen(began) };
    let steps = |s| vec![Beats(5000, 10_000), Read(late(10_000)), Beats(11_000, s), Read(late(s))];
    check("normal margin", steps(10_010 + WINDOW), 10_000, false);
    check("L/2", steps(10_010 + 7508), 10_000, true);
}

#[test]
fn another_roster_or_an_absent_host_starts_anew() {
    let roster = |began| Seen { roster: 2, ..seen(began) };
    let s = 10_010 + WINDOW;
    let other = vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, 15_000), Read(roster(s))];
    check("the roster changed in it", other, 10_000, false);
    let absent = vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, 15_000), Absent, Read(seen(s))];
    check("not a member in between", absent, 10_000, false);
    let gone = vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, 15_000), Read(seen(s)), Absent];
    check("not a member at the end", gone, 10_000, false);
    let not_yet = vec![Beats(5000, 10_000), Absent, Beats(11_000, 15_000), Read(seen(s))];
    check("not a member at the beginning", not_yet, 10_000, false);
}

#[test]
fn the_readers_own_beats_must_cover_the_window() {
    let s = 10_010 + WINDOW;
    let none = vec![Read(seen(10_000)), Read(seen(s))];
    check("no own beat at all", none, 10_000, false);
    let gap = vec![
        Beats(5000, 10_000),
        Read(seen(10_000)),
        Beats(11_000, 11_000),
        Beats(13_600, 15_000), // 2.6 s after the last one: the storage stalled, for the host as well.
        Read(seen(s)),
    ];
    check("a gap over L/2", gap, 10_000, false);
    let slow = vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(12_400, 14_400), Read(seen(s))];
    check("a gap below L/2", slow, 10_000, true);
    let ends = vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, 12_000), Read(seen(s))];
    check("own beats ended before the window did", ends, 10_000, false);
    let told_late =
        vec![Beats(5000, 10_000), Read(seen(10_000)), Beats(11_000, 12_000), Read(seen(s)), Beats(13_000, 15_000)];
    check("a word that came after the read still witnesses", told_late, 10_000, true);
}

#[test]
fn a_read_from_before_the_end_of_a_stall_opens_no_window() {
    let s = 10_010 + WINDOW;
    // The first own beat after the stall was persisted at 10,505, after the read.
    let steps =
        vec![Beats(2000, 2000), Beats(10_500, 10_500), Read(seen(10_000)), Beats(11_500, 15_500), Read(seen(s))];
    check("the read lies in the stall", steps, 9000, false);
    let mut later = vec![Beats(2000, 2000), Beats(10_500, 10_500), Read(seen(10_000)), Read(seen(10_600))];
    later.extend([Beats(11_500, 15_500), Read(seen(10_610 + WINDOW))]);
    check("counted from the first read after it", later, 9000, true);
    // The read was told first, the own beat that ends the stall later.
    let told = vec![Beats(2000, 4000), Read(seen(10_000)), Beats(10_500, 15_500), Read(seen(s))];
    check("the gap is noticed late", told, 9000, false);
}

#[test]
fn a_write_that_hung_is_a_gap_although_it_began_in_time() {
    let mut silence = run(vec![Beats(5000, 10_000), Read(seen(10_000))]);
    silence.persisted(at(11_000), at(14_000));
    silence.persisted(at(14_100), at(14_105));
    silence.persisted(at(15_100), at(15_105));
    silence.read(Some(seen(10_010 + WINDOW)));
    assert_eq!(silence.over_since(at(10_000)), None);
}

#[test]
fn failed_and_overtaken_reads_change_nothing() {
    let s = 10_010 + WINDOW;
    // Reads between failed: they are not given. Then an older answer comes late and is ignored.
    let mut overtaken = seen(9000);
    overtaken.bytes = Digest([3; 32]);
    let mut steps = plain(s);
    steps.push(Read(overtaken));
    check("an older answer", steps, 10_000, true);
}

#[test]
fn a_shorter_lease_of_the_host_bounds_the_gap() {
    let short = Duration::from_millis(1500);
    let fast = |began| Seen { lease: Some(short), ..seen(began) };
    // Own beats each second: a gap of 1 s is over 1.5 s / 2, so nothing is proven although our own L is 5 s.
    let steps = vec![Beats(5000, 10_000), Read(fast(10_000)), Beats(11_000, 15_000), Read(fast(15_500))];
    check("a gap over the host's L/2", steps, 10_000, false);
}
