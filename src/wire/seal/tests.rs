//! Golden datagram, replay tables, floods and junk for sealing.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::wire::beat::BadBeat;
use crate::wire::beat::tests::{any_beat, full, hex, largest};

fn key(id: u16, byte: u8) -> BeatKey {
    BeatKey { id, secret: [byte; 32] }
}

fn sealer_of(beat: &NetBeat, key: &BeatKey) -> Sealer {
    Sealer::new(key, beat.cluster, beat.host, beat.incarnation)
}

fn opener() -> Opener {
    Opener::new(&[key(7, 0x77), key(6, 0x66)], full().cluster)
}

fn beat_of(host: u128, incarnation: u64, counter: u64) -> NetBeat {
    let mut beat = full();
    beat.host = HostId(Uuid::from_u128(host));
    beat.agent.score.host = beat.host;
    beat.incarnation = Incarnation(incarnation);
    beat.counter = Counter(counter);
    beat
}

fn sealed(beat: &NetBeat) -> Vec<u8> {
    sealer_of(beat, &key(7, 0x77)).seal_beat(beat)
}

/// Released: these bytes never change. Checked against another implementation of HKDF and AES-GCM.
const GOLDEN: &str = include_str!("golden_datagram.hex");

#[test]
fn golden_datagram() {
    let datagram = sealed(&full());
    assert_eq!(hex(&datagram), GOLDEN.split_whitespace().collect::<String>());
    assert_eq!(opener().open(&datagram), Ok(full()));
}

#[test]
fn the_largest_beat_fits() {
    let datagram = sealed(&largest());
    assert_eq!(datagram.len(), 1176);
    assert_eq!(opener().open(&datagram), Ok(largest()));
}

#[test]
fn headers_that_are_refused() {
    let table: [(usize, u8, Dropped); 6] = [
        (0, b'X', Dropped::Magic),
        (4, 2, Dropped::Version(2)),
        (6, 9, Dropped::UnknownKey),
        (6, 6, Dropped::Seal), // In the ring, but not the one that sealed it.
        (8, 0, Dropped::OtherCluster),
        (24, 0, Dropped::Seal),
    ];
    for (at, value, expected) in table {
        let mut datagram = sealed(&full());
        datagram[at] = value;
        assert_eq!(opener().open(&datagram), Err(expected), "byte {at}");
    }
}

#[test]
fn a_right_seal_around_no_beat_is_counted_once() {
    let mut opener = opener();
    let datagram = sealer_of(&full(), &key(7, 0x77)).seal(Counter(9), b"short");
    assert_eq!(opener.open(&datagram), Err(Dropped::Bad(BadBeat::Short { len: 5 })));
    assert_eq!(opener.open(&datagram), Err(Dropped::Replayed));
    assert_eq!(opener.dropped(), DropCounts { bad: 1, replayed: 1, ..DropCounts::default() });
    assert_eq!(opener.opened(), 0);
}

#[test]
fn replays() {
    let (ok, again, old) = (None, Some(Dropped::Replayed), Some(Dropped::OldIncarnation));
    // (incarnation, counter, what becomes of it), one after another.
    let table = [
        (5, 100, ok),
        (5, 100, again),
        (5, 99, ok), // Overtaken on the way.
        (5, 99, again),
        (5, 37, ok),    // The last one in the window.
        (5, 36, again), // Too old to tell.
        (5, 0, again),
        (5, 163, ok), // 100 is the last one in the window now.
        (5, 100, again),
        (5, 101, ok),
        (5, 99, again),
        (5, 1000, ok), // Far ahead: nothing of the old window counts.
        (5, 936, again),
        (5, 937, ok),
        (5, 999, ok),
        (4, 5000, old),
        (6, 0, ok), // A new incarnation counts from anywhere.
        (6, 0, again),
        (6, 1, ok),
        (5, 2000, old),
        (6, u64::MAX - 1, ok),
        (6, 2, again),
    ];
    let mut opener = opener();
    for (row, (incarnation, counter, expected)) in table.into_iter().enumerate() {
        let result = opener.open(&sealed(&beat_of(1, incarnation, counter)));
        assert_eq!(result.err(), expected, "row {row}: incarnation {incarnation}, counter {counter}");
    }
    // Another sender has a window of its own.
    assert!(opener.open(&sealed(&beat_of(2, 1, 1))).is_ok());
}

#[test]
fn keys_change_within_an_incarnation() {
    let mut opener = opener();
    assert!(opener.open(&sealed(&beat_of(1, 5, 10))).is_ok());
    let other = |counter| sealer_of(&beat_of(1, 5, counter), &key(6, 0x66)).seal_beat(&beat_of(1, 5, counter));
    assert_eq!(opener.open(&other(10)), Err(Dropped::Replayed));
    assert!(opener.open(&other(11)).is_ok());
    assert!(opener.open(&sealed(&beat_of(1, 5, 12))).is_ok());
}

#[test]
fn peeking_remembers_nothing() {
    let mut opener = opener();
    for _ in 0..2 {
        assert_eq!(opener.peek(&sealed(&full())), Ok(full()));
    }
    assert!(opener.senders.is_empty());
    assert_eq!(opener.open(&sealed(&full())), Ok(full()));
    assert_eq!(opener.dropped(), DropCounts::default());
}

#[test]
fn floods_create_no_state_and_disturb_nobody() {
    let mut opener = opener();
    assert!(opener.open(&sealed(&beat_of(1, 5, 10))).is_ok());
    let stranger = key(7, 0x78);
    for n in 0..1000u64 {
        // Strangers, higher incarnations of a known sender, higher counters of its present one.
        for forged in [beat_of(n.into(), 1, n), beat_of(1, 6 + n, 0), beat_of(1, 5, 11 + n)] {
            let datagram = sealer_of(&forged, &stranger).seal_beat(&forged);
            assert!(matches!(opener.open(&datagram), Err(Dropped::Seal | Dropped::OldIncarnation)));
        }
    }
    assert_eq!(opener.senders.len(), 1);
    assert!(opener.open(&sealed(&beat_of(1, 5, 11))).is_ok());
}

#[test]
fn the_longest_silent_of_129_is_forgotten() {
    let mut opener = opener();
    for host in 0..128 {
        assert!(opener.open(&sealed(&beat_of(host, 1, 1))).is_ok());
    }
    assert!(opener.open(&sealed(&beat_of(0, 1, 2))).is_ok());
    assert!(opener.open(&sealed(&beat_of(128, 1, 1))).is_ok());
    assert_eq!(opener.senders.len(), 128);
    assert!(!opener.senders.contains_key(&HostId(Uuid::from_u128(1))));
    assert_eq!(opener.open(&sealed(&beat_of(0, 1, 2))), Err(Dropped::Replayed));
}

#[test]
fn threads_may_share_them() {
    fn shared<T: Send + Sync>() {}
    shared::<Sealer>();
    shared::<Opener>();
}

#[test]
#[should_panic(expected = "was used already")]
fn a_counter_is_used_once() {
    let sealer = sealer_of(&full(), &key(7, 0x77));
    let _ = sealer.seal(Counter(5), b"one");
    let _ = sealer.seal(Counter(5), b"two");
}

proptest! {
    #[test]
    fn round_trip(beat in any_beat()) {
        let mut opener = Opener::new(&[key(7, 0x77)], beat.cluster);
        let datagram = sealed(&beat);
        prop_assert!(datagram.len() <= MAX_DATAGRAM);
        prop_assert_eq!(opener.open(&datagram), Ok(beat));
    }

    #[test]
    fn junk_never_opens(bytes in vec(any::<u8>(), 0..1400), headed: bool) {
        let mut datagram = bytes;
        if headed {
            let golden = sealed(&full());
            let len = datagram.len().min(HEADER);
            datagram[..len].copy_from_slice(&golden[..len]);
        }
        prop_assert!(opener().open(&datagram).is_err());
        prop_assert!(opener().peek(&datagram).is_err());
    }

    #[test]
    fn no_flipped_bit_opens(bit in 0usize..8 * 230, len in 0usize..230) {
        let golden = sealed(&full());
        prop_assert_eq!(golden.len(), 238);
        let mut opener = opener();
        let mut flipped = golden.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(opener.open(&flipped).is_err());
        prop_assert!(opener.open(&golden[..len]).is_err());
        let mut longer = golden.clone();
        longer.push(0);
        prop_assert!(opener.open(&longer).is_err());
        prop_assert!(opener.senders.is_empty());
        prop_assert!(opener.open(&golden).is_ok());
    }
}
