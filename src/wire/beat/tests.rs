//! Golden bytes, round trips, limits and junk for beats. `full` and `any_beat` serve other tests, too.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::types::{ClusterId, HostId, Incarnation};

/// A beat in which every field has a value of its own.
pub(crate) fn full() -> NetBeat {
    let host = HostId(Uuid::from_u128(0x0a0b_0c0d_0e0f_4011_9213_1415_1617_1819));
    NetBeat {
        cluster: ClusterId(Uuid::from_u128(0xc0c1_c2c3_c4c5_46c7_88c9_cacb_cccd_cecf)),
        host,
        index: HostIndex(5),
        boot: BootId(Uuid::from_u128(0xb0b1_b2b3_b4b5_46b7_88b9_babb_bcbd_bebf)),
        incarnation: Incarnation(0x0102_0304_0506_0708),
        counter: Counter(0x1112_1314_1516_1718),
        lease: Duration::from_millis(5000),
        list: ListName { sequence: Sequence(0x2122_2324_2526_2728), digest: Digest(std::array::from_fn(|n| n as u8)) },
        reaches: DatastoreSet(0x3132_3334_3536_3738),
        attest_me: DatastoreSet(0x4142_4344_4546_4748),
        distrusts: DatastoreSet(0x0102),
        attested: vec![
            Attested {
                datastore: 63,
                index: HostIndex(127),
                incarnation_low: 0x4142_4344,
                counter: Counter(0x5152_5354_5556_5758),
            },
            Attested { datastore: 0, index: HostIndex(1), incarnation_low: 3, counter: Counter(2) },
        ],
        software: (1, 2, 3),
        agent: AgentBeat {
            role: Role::Subordinate { master: Some(HostIndex(9)) },
            term: Term(0x6162_6364_6566_6768),
            score: Score { datastores: 4, available: true, priority: 100, uptime_bucket: 12, host },
            flags: Flags { isolated: true, maintenance: true, unpunctual: true, ..Flags::default() },
            storage_lost: DatastoreSet(0x7172_7374_7576_7778),
            settings_version: 0x8182_8384_8586_8788,
            echoes: vec![
                Echo { index: HostIndex(0), incarnation_low: 0x9192, counter_low: 0x9394_9596 },
                Echo { index: HostIndex(127), incarnation_low: 1, counter_low: 2 },
            ],
        },
    }
}

/// The largest beat there can be.
pub(crate) fn largest() -> NetBeat {
    let mut beat = full();
    beat.attested = vec![beat.attested[0]; MAX_ATTESTED];
    beat.agent.echoes = (0..128).map(|n| Echo { index: HostIndex(n), incarnation_low: 1, counter_low: 2 }).collect();
    beat
}

pub(crate) fn header(beat: &NetBeat) -> SealHeader {
    SealHeader {
        key_id: 1,
        cluster: beat.cluster,
        host: beat.host,
        incarnation: beat.incarnation,
        counter: beat.counter,
    }
}

fn again(beat: &NetBeat) -> Result<NetBeat, BadBeat> {
    decode(&header(beat), &encode(beat))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Released: these bytes never change.
pub(crate) const GOLDEN_BODY: &str = concat!(
    "050109",                                                           // index, role, master
    "04640c",                                                           // datastores, priority, uptime
    "5500",                                                             // isolated, maintenance, unpunctual, available
    "88130000",                                                         // 5000 ms
    "01020300",                                                         // software
    "b0b1b2b3b4b546b788b9babbbcbdbebf",                                 // boot
    "6867666564636261",                                                 // term
    "8887868584838281",                                                 // settings
    "3837363534333231",                                                 // reaches
    "4847464544434241",                                                 // attest me
    "7877767574737271",                                                 // storage lost
    "0201000000000000",                                                 // distrusts
    "2827262524232221",                                                 // list sequence
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", // list digest
    "02020000",                                                         // two attested, two echoes
    "3f7f444342415857565554535251",
    "0001030000000200000000000000",
    "00929196959493",
    "7f010002000000",
);

#[test]
fn golden_body() {
    assert_eq!(hex(&encode(&full())), GOLDEN_BODY);
    assert_eq!(again(&full()), Ok(full()));
}

#[test]
fn the_largest_beat_fits() {
    let body = encode(&largest());
    assert_eq!(body.len(), MAX_BODY);
    assert_eq!(again(&largest()), Ok(largest()));
}

#[test]
fn leases_are_rounded_up() {
    let table = [
        (Duration::ZERO, 1),
        (Duration::from_nanos(1), 1),
        (Duration::from_millis(1500), 1500),
        (Duration::from_nanos(1_500_000_001), 1501),
        (Duration::MAX, u32::MAX.into()),
    ];
    for (lease, millis) in table {
        let beat = NetBeat { lease, ..full() };
        assert_eq!(again(&beat).unwrap().lease, Duration::from_millis(millis), "{lease:?}");
    }
}

#[test]
fn what_would_be_refused_is_left_out() {
    let mut beat = full();
    beat.attested = vec![beat.attested[1]; 20];
    beat.attested[0].datastore = 64;
    beat.attested[1].index = HostIndex(128);
    beat.agent.role = Role::Subordinate { master: Some(HostIndex(200)) };
    let echo = |index, counter_low| Echo { index: HostIndex(index), incarnation_low: 0, counter_low };
    beat.agent.echoes = vec![echo(3, 1), echo(3, 2), echo(128, 3), echo(255, 4), echo(4, 5)];
    let read = again(&beat).unwrap();
    assert_eq!(read.attested, vec![full().attested[1]; MAX_ATTESTED]);
    assert_eq!(read.agent.role, Role::Subordinate { master: None });
    assert_eq!(read.agent.echoes, [echo(3, 1), echo(4, 5)]);
}

#[test]
fn bodies_that_are_refused() {
    let many = |what| Err(BadBeat::TooMany { what });
    let table: [(&str, usize, u8, Result<(), BadBeat>); 10] = [
        ("index", 0, 128, Err(BadBeat::Index(128))),
        ("role", 1, 4, Err(BadBeat::Role(4))),
        ("master", 2, 128, Err(BadBeat::Index(128))),
        ("seven attested", ATTESTED_AT, 7, many("the number of attested counters")),
        ("129 echoes", ECHOES_AT, 129, many("the number of echoes")),
        ("more echoes than there are", ECHOES_AT, 3, Err(BadBeat::Short { len: 166 })),
        ("datastore", 124, 64, Err(BadBeat::Datastore(64))),
        ("attested host", 125, 128, Err(BadBeat::Index(128))),
        ("echoed host", 152, 128, Err(BadBeat::Index(128))),
        ("the same echo twice", 159, 0, many("the number of echoes of one host")),
    ];
    for (what, at, value, expected) in table {
        let mut body = encode(&full());
        body[at] = value;
        assert_eq!(decode(&header(&full()), &body).map(drop), expected, "{what}");
    }
    let mut body = encode(&full());
    body[8..12].fill(0);
    assert_eq!(decode(&header(&full()), &body), Err(BadBeat::Lease));
    let body = encode(&full());
    for len in 0..body.len() {
        assert_eq!(decode(&header(&full()), &body[..len]), Err(BadBeat::Short { len }));
    }
}

#[test]
fn a_newer_minor_release_is_understood() {
    let mut body = encode(&full());
    body[7] |= 0xfe; // Flags that we do not know.
    body[15] = 0xff;
    body[122..124].fill(0xff);
    body.extend([0xff; 36]);
    assert_eq!(decode(&header(&full()), &body), Ok(full()));
}

pub(crate) fn any_beat() -> impl Strategy<Value = NetBeat> {
    let index = || (0u8..128).prop_map(HostIndex);
    let role = prop_oneof![
        Just(Role::Candidate),
        Just(Role::Master),
        proptest::option::of(index()).prop_map(|master| Role::Subordinate { master })
    ];
    let attested =
        (0u8..64, index(), any::<u32>(), any::<u64>()).prop_map(|(datastore, index, incarnation_low, counter)| {
            Attested { incarnation_low, datastore, index, counter: Counter(counter) }
        });
    let echoes = btree_map(0u8..128, any::<(u16, u32)>(), 0..=128).prop_map(|map| {
        let echo =
            |(index, (incarnation_low, counter_low))| Echo { index: HostIndex(index), incarnation_low, counter_low };
        map.into_iter().map(echo).collect::<Vec<_>>()
    });
    let ids = any::<([u8; 16], [u8; 16], [u8; 16], [u8; 32])>();
    let numbers = (any::<[u64; 5]>(), 0..u64::MAX, any::<[u64; 3]>(), any::<[u8; 6]>(), 1..u32::MAX);
    let rest = (any::<[bool; 7]>(), role, index(), vec(attested, 0..=MAX_ATTESTED), echoes);
    (ids, numbers, rest).prop_map(
        |((cluster, host, boot, digest), (n, counter, m, b, lease), (f, role, index, attested, echoes))| {
            let host = HostId(Uuid::from_bytes(host));
            NetBeat {
                cluster: ClusterId(Uuid::from_bytes(cluster)),
                host,
                index,
                boot: BootId(Uuid::from_bytes(boot)),
                incarnation: Incarnation(n[0]),
                counter: Counter(counter),
                lease: Duration::from_millis(lease.into()),
                list: ListName { sequence: Sequence(n[1]), digest: Digest(digest) },
                reaches: DatastoreSet(n[2]),
                attest_me: DatastoreSet(n[3]),
                distrusts: DatastoreSet(m[2]),
                attested,
                software: (b[0], b[1], b[2]),
                agent: AgentBeat {
                    role,
                    term: Term(n[4]),
                    score: Score { datastores: b[3], available: f[6], priority: b[4], uptime_bucket: b[5], host },
                    flags: Flags {
                        isolated: f[0],
                        leaving: f[1],
                        maintenance: f[2],
                        agent_dead: f[3],
                        unpunctual: f[4],
                        distrusts: f[5],
                    },
                    storage_lost: DatastoreSet(m[0]),
                    settings_version: m[1],
                    echoes,
                },
            }
        },
    )
}

proptest! {
    #[test]
    fn round_trip(beat in any_beat()) {
        prop_assert_eq!(again(&beat), Ok(beat));
    }

    #[test]
    fn junk_never_panics(body in vec(any::<u8>(), 0..1300)) {
        let _ = decode(&header(&full()), &body);
    }

    /// What was decoded from junk is a beat like any other.
    #[test]
    fn near_misses_never_panic(flips in vec((0usize..1104, any::<u8>()), 1..20)) {
        let mut body = encode(&largest());
        for (at, value) in flips {
            body[at] = value;
        }
        if let Ok(beat) = decode(&header(&full()), &body) {
            prop_assert_eq!(again(&beat), Ok(beat));
        }
    }
}
