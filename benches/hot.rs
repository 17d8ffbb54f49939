//! What runs for every beat: seal and open. Budget: 5 µs each (`encode_seal`, `open_decode`), with 3 and with 128 hosts.
//! `drop_*`: what a datagram costs that is not ours.

use std::time::Duration;

use divan::Bencher;
use mainstay::types::guard::BeatKey;
use mainstay::types::{
    AgentBeat, BootId, ClusterId, Counter, DatastoreSet, Echo, Flags, HostId, HostIndex, Incarnation, ListName,
    NetBeat, Role, Score, Term,
};
use mainstay::wire::seal::{Dropped, Opener, Sealer};
use uuid::Uuid;

fn main() {
    divan::main();
}

const HOSTS: [u8; 3] = [3, 64, 128];

fn beat(hosts: u8) -> NetBeat {
    let host = HostId(Uuid::from_u128(1));
    NetBeat {
        cluster: ClusterId(Uuid::from_u128(2)),
        host,
        index: HostIndex(0),
        boot: BootId(Uuid::from_u128(3)),
        incarnation: Incarnation(4),
        counter: Counter(0),
        lease: Duration::from_secs(5),
        list: ListName::default(),
        reaches: DatastoreSet(1),
        attest_me: DatastoreSet(0),
        distrusts: DatastoreSet(0),
        attested: Vec::new(),
        software: (0, 1, 0),
        agent: AgentBeat {
            role: Role::Master,
            term: Term(1),
            score: Score { datastores: 1, available: true, priority: 100, uptime_bucket: 3, host },
            flags: Flags::default(),
            storage_lost: DatastoreSet(0),
            settings_version: 1,
            echoes: (0..hosts).map(|n| Echo { index: HostIndex(n), incarnation_low: 1, counter_low: 2 }).collect(),
        },
    }
}

fn key(byte: u8) -> BeatKey {
    BeatKey { id: 1, secret: [byte; 32] }
}

fn sealer(beat: &NetBeat, byte: u8) -> Sealer {
    Sealer::new(&key(byte), beat.cluster, beat.host, beat.incarnation)
}

fn rising(beat: NetBeat) -> impl FnMut() -> NetBeat {
    let mut counter = Counter(0);
    move || {
        counter = counter.next();
        NetBeat { counter, ..beat.clone() }
    }
}

#[divan::bench(args = HOSTS)]
fn encode_seal(bencher: Bencher, hosts: u8) {
    let sealer = sealer(&beat(hosts), 7);
    bencher.with_inputs(rising(beat(hosts))).bench_local_refs(|beat| sealer.seal_beat(beat));
}

#[divan::bench(args = HOSTS)]
fn open_decode(bencher: Bencher, hosts: u8) {
    let sealer = sealer(&beat(hosts), 7);
    let mut opener = Opener::new(&[key(7)], beat(hosts).cluster);
    let mut next = rising(beat(hosts));
    bencher
        .with_inputs(|| sealer.seal_beat(&next()))
        .bench_local_refs(|datagram| opener.open(datagram).expect("opens"));
}

/// Sealed by a stranger who names a sender that we know, in its present incarnation.
#[divan::bench]
fn drop_wrong_seal(bencher: Bencher) {
    let mut next = rising(beat(128));
    let mut opener = Opener::new(&[key(7)], beat(128).cluster);
    opener.open(&sealer(&beat(128), 7).seal_beat(&next())).expect("opens");
    let stranger = sealer(&beat(128), 8);
    bencher
        .with_inputs(|| stranger.seal_beat(&next()))
        .bench_local_refs(|datagram| assert_eq!(opener.open(datagram), Err(Dropped::Seal)));
}

/// Sealed by a stranger who names a sender that we do not know: a key is derived first.
#[divan::bench]
fn drop_wrong_sender(bencher: Bencher) {
    let mut next = rising(beat(128));
    let mut opener = Opener::new(&[key(7)], beat(128).cluster);
    let stranger = sealer(&beat(128), 8);
    bencher
        .with_inputs(|| stranger.seal_beat(&next()))
        .bench_local_refs(|datagram| assert_eq!(opener.open(datagram), Err(Dropped::Seal)));
}

#[divan::bench]
fn drop_replayed(bencher: Bencher) {
    let datagram = sealer(&beat(128), 7).seal_beat(&beat(128));
    let mut opener = Opener::new(&[key(7)], beat(128).cluster);
    opener.open(&datagram).expect("opens");
    bencher.bench_local(|| opener.open(&datagram));
}

#[divan::bench]
fn drop_junk(bencher: Bencher) {
    let mut opener = Opener::new(&[key(7)], beat(128).cluster);
    bencher.bench_local(|| opener.open(&[0x55; 1200]));
}
