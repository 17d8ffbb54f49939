//! Beats between two hosts on links of their own (`lan.rs`).

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::lan::{Host, Lan};
use super::*;
use crate::exec::clock;
use crate::types::guard::{BeatInterface, BeatKey};
use crate::types::{BootId, Counter, HostId, Incarnation, NetBeat};
use crate::wire::beat::tests::full;
use crate::wire::seal::Sealer;

const LONG: Duration = Duration::from_secs(20);
const V4: &str = "239.66.0.1:5499";
const V6: &str = "[ff15::66]:5499";
const NOBODY: HostId = HostId(Uuid::from_u128(99));

fn interface(n: u8, group: &str) -> BeatInterface {
    BeatInterface { name: format!("net{n}"), group: group.parse().unwrap(), ttl: 1 }
}

fn key() -> BeatKey {
    BeatKey { id: 1, secret: [7; 32] }
}

/// A host that beats.
struct Beating {
    sealer: Sealer,
    beat: NetBeat,
    sender: Arc<Mutex<BeatSender>>,
}

impl Beating {
    fn new(host: &Host, interfaces: Vec<BeatInterface>, peers: Vec<SocketAddr>) -> Self {
        let (sender, troubles) = host.run(move || BeatSender::open(&interfaces, &peers));
        assert_eq!(troubles, Vec::<String>::new());
        let sealer = Sealer::new(&key(), full().cluster, full().host, full().incarnation);
        Self { sealer, beat: NetBeat { counter: Counter(0), ..full() }, sender: Arc::new(Mutex::new(sender)) }
    }

    /// Sends from that host; gives the new troubles.
    fn send(&self, host: &Host, datagram: Vec<u8>) -> Vec<String> {
        let sender = self.sender.clone();
        host.run(move || sender.lock().unwrap().send(&datagram))
    }

    /// Sends the next beat; gives the new troubles.
    fn beat(&mut self, host: &Host) -> Vec<String> {
        let (_, datagram) = self.next();
        self.send(host, datagram)
    }

    fn next(&mut self) -> (NetBeat, Vec<u8>) {
        self.beat.counter = self.beat.counter.next();
        (self.beat.clone(), self.sealer.seal_beat(&self.beat))
    }
}

/// A host that hears, and what it heard.
struct Hearing {
    receiver: BeatReceiver,
    heard: Receiver<Heard>,
    twice: Receiver<NetBeat>,
}

fn hear(host: &Host, me: HostId, interfaces: Vec<BeatInterface>, unicast: bool) -> Hearing {
    let (to_heard, heard) = channel();
    let (to_twice, twice) = channel();
    let receiver = host.run(move || {
        let (heard, twice) = (move |h| to_heard.send(h).unwrap(), move |b| to_twice.send(b).unwrap());
        BeatReceiver::spawn(full().cluster, vec![key()], me, interfaces, unicast, heard, twice).unwrap()
    });
    Hearing { receiver, heard, twice }
}

impl Hearing {
    /// Waits until the counts are as wanted.
    fn counts(&self, wanted: impl Fn(&ReceiveCounts) -> bool) -> ReceiveCounts {
        let end = Instant::now() + LONG;
        loop {
            let counts = self.receiver.counts();
            if wanted(&counts) {
                return counts;
            }
            assert!(Instant::now() < end, "{counts:?}");
            std::thread::yield_now();
        }
    }
}

/// For times when a datagram may be lost: the kernel does not know its neighbour yet, an interface is opened anew.
fn beat_until_heard(beating: &mut Beating, lan: &Lan, hearing: &Hearing) {
    let end = Instant::now() + LONG;
    loop {
        assert_eq!(beating.beat(&lan.a), Vec::<String>::new());
        if hearing.heard.recv_timeout(Duration::from_millis(50)).is_ok() {
            return;
        }
        assert!(Instant::now() < end, "{:?}", hearing.receiver.counts());
    }
}

#[test]
fn beats_go_from_host_to_host() {
    for group in [V4, V6] {
        let lan = Lan::new(1);
        let hearing = hear(&lan.b, NOBODY, vec![interface(0, group)], false);
        let looped = hear(&lan.a, NOBODY, vec![interface(0, group)], false);
        let mut beating = Beating::new(&lan.a, vec![interface(0, group)], vec![]);
        for _ in 0..5 {
            let (beat, datagram) = beating.next();
            let before = clock::now();
            assert!(beating.send(&lan.a, datagram).is_empty());
            let heard = hearing.heard.recv_timeout(LONG).unwrap();
            assert_eq!((&heard.beat, heard.interface), (&beat, 0), "{group}");
            assert!(before <= heard.at && heard.at <= clock::now());
            assert!(heard.queued < Duration::from_secs(2), "{:?}", heard.queued);
        }
        let counts = hearing.counts(|counts| counts.opened == 5);
        assert_eq!((counts.dropped, counts.overflowed, counts.paths[0].heard), (Default::default(), 0, 5));
        assert_eq!(counts.paths[0].trouble, None);
        assert!(looped.heard.try_recv().is_err(), "the sender's own host hears nothing of its group");
    }
}

#[test]
fn two_interfaces_give_each_beat_once() {
    let lan = Lan::new(2);
    let both = || vec![interface(0, V4), interface(1, V6)];
    let hearing = hear(&lan.b, NOBODY, both(), false);
    let mut beating = Beating::new(&lan.a, both(), vec![]);
    for _ in 0..3 {
        let (beat, datagram) = beating.next();
        assert!(beating.send(&lan.a, datagram).is_empty());
        assert_eq!(hearing.heard.recv_timeout(LONG).unwrap().beat, beat);
    }
    let counts = hearing.counts(|counts| counts.paths.iter().map(|path| path.heard + path.repeated).sum::<u64>() == 6);
    assert_eq!((counts.opened, counts.dropped.replayed), (3, 3));
    assert!(counts.paths.iter().all(|path| path.heard + path.repeated == 3 && path.last.is_some()), "{counts:?}");
    assert!(hearing.heard.try_recv().is_err());
}

#[test]
fn junk_is_counted_and_disturbs_nobody() {
    let lan = Lan::new(1);
    let hearing = hear(&lan.b, NOBODY, vec![interface(0, V4)], false);
    let mut beating = Beating::new(&lan.a, vec![interface(0, V4)], vec![]);
    let stranger = Sealer::new(&BeatKey { id: 1, secret: [8; 32] }, full().cluster, full().host, full().incarnation);
    let (beat, datagram) = beating.next();
    let mut forged = stranger.seal_beat(&NetBeat { counter: Counter(77), ..full() });
    for junk in [vec![], vec![0; 30], vec![0x55; 1400], forged.clone(), datagram[..200].to_vec()] {
        beating.send(&lan.a, junk);
    }
    forged[4] = 9;
    beating.send(&lan.a, forged);
    beating.send(&lan.a, datagram.clone());
    beating.send(&lan.a, datagram);
    assert_eq!(hearing.heard.recv_timeout(LONG).unwrap().beat, beat);
    let counts = hearing.counts(|counts| counts.dropped.replayed == 1);
    let dropped = counts.dropped;
    assert_eq!((dropped.short, dropped.magic, dropped.seal, dropped.version), (2, 1, 2, 1));
    assert_eq!((counts.opened, dropped.bad, dropped.other_cluster), (1, 0, 0));
}

#[test]
fn an_interface_vanishes_and_comes_back() {
    let lan = Lan::new(1);
    let hearing = hear(&lan.b, NOBODY, vec![interface(0, V4)], false);
    let mut beating = Beating::new(&lan.a, vec![interface(0, V4)], vec![]);
    assert!(beating.beat(&lan.a).is_empty());
    hearing.heard.recv_timeout(LONG).unwrap();

    lan.unlink(0);
    let troubles = beating.beat(&lan.a);
    assert_eq!(troubles, ["net0 sends no beats: there is no such interface; beats go on when it is there"]);
    assert!(beating.beat(&lan.a).is_empty(), "told once");
    assert_eq!(beating.sender.lock().unwrap().troubles(), troubles);
    let counts = hearing.counts(|counts| counts.paths[0].trouble.is_some());
    let trouble = "net0 hears no beats: there is no such interface; beats go on when it is there";
    assert_eq!(counts.paths[0].trouble.as_deref(), Some(trouble));

    lan.link(0);
    beat_until_heard(&mut beating, &lan, &hearing);
    assert!(beating.sender.lock().unwrap().troubles().is_empty());
    hearing.counts(|counts| counts.paths[0].trouble.is_none());
}

/// The old interface is gone and another one has its name before anybody looked.
#[test]
fn an_interface_is_replaced() {
    let lan = Lan::new(1);
    let hearing = hear(&lan.b, NOBODY, vec![interface(0, V6)], false);
    let mut beating = Beating::new(&lan.a, vec![interface(0, V6)], vec![]);
    lan.unlink(0);
    lan.link(0);
    beat_until_heard(&mut beating, &lan, &hearing);
}

#[test]
fn unicast_peers() {
    let lan = Lan::new(1);
    for (n, peer) in ["10.99.0.2:5499", "[fd99:0::2]:5499"].into_iter().enumerate() {
        // With a group, without one, and on all interfaces.
        let multicast = interface(0, [V4, V6][n]);
        let none = interface(0, ["0.0.0.0:5499", "[::]:5499"][n]);
        let anywhere = BeatInterface { name: String::new(), ..none.clone() };
        for interface in [multicast, none, anywhere] {
            let hearing = hear(&lan.b, NOBODY, vec![interface.clone()], true);
            let mut beating = Beating::new(&lan.a, vec![], vec![peer.parse().unwrap()]);
            beat_until_heard(&mut beating, &lan, &hearing);
        }
    }
    // Nothing but the group is taken when unicast is not wanted.
    let hearing = hear(&lan.b, NOBODY, vec![interface(0, V4)], false);
    let mut beating = Beating::new(&lan.a, vec![interface(0, V4)], vec!["10.99.0.2:5499".parse().unwrap()]);
    beat_until_heard(&mut beating, &lan, &hearing);
    let counts = hearing.counts(|counts| 0 < counts.opened);
    assert_eq!(counts.dropped.replayed, 0);
}

#[test]
fn a_peer_without_a_route_is_told_once() {
    let lan = Lan::new(1);
    let peers = vec!["192.0.2.1:5499".parse().unwrap(), "10.99.0.2:5499".parse().unwrap()];
    let mut beating = Beating::new(&lan.a, vec![], peers);
    let troubles = beating.beat(&lan.a);
    assert!(troubles.len() == 1 && troubles[0].starts_with("beats do not reach 192.0.2.1:5499: "), "{troubles:?}");
    assert!(beating.beat(&lan.a).is_empty());
}

#[test]
fn our_own_host_id() {
    let lan = Lan::new(1);
    let hearing = hear(&lan.b, full().host, vec![interface(0, V4)], false);
    let mut beating = Beating::new(&lan.a, vec![interface(0, V4)], vec![]);
    // Ours, by a way around.
    beating.beat.boot = clock::boot_id().unwrap();
    beating.beat(&lan.a);
    hearing.counts(|counts| counts.own == 1);
    // A twin: another boot.
    beating.beat.boot = BootId(Uuid::from_u128(1));
    let (twin, datagram) = beating.next();
    beating.send(&lan.a, datagram.clone());
    beating.send(&lan.a, datagram);
    assert_eq!(hearing.twice.recv_timeout(LONG).unwrap(), twin);
    hearing.counts(|counts| counts.dropped.replayed == 1);
    // A twin: another guard of this boot.
    hearing.receiver.own(Incarnation(full().incarnation.0 - 1));
    beating.beat.boot = clock::boot_id().unwrap();
    let (twin, datagram) = beating.next();
    beating.send(&lan.a, datagram);
    assert_eq!(hearing.twice.recv_timeout(LONG).unwrap(), twin);
    assert!(hearing.heard.try_recv().is_err() && hearing.twice.try_recv().is_err());
}

#[test]
fn being_late_is_noticed() {
    let lan = Lan::new(1);
    let (to_heard, heard) = channel();
    let (go, wait) = channel::<()>();
    let receiver = lan.b.run(move || {
        let heard = move |heard| {
            to_heard.send(heard).unwrap();
            let _ = wait.recv(); // Until `go` is dropped.
        };
        BeatReceiver::spawn(full().cluster, vec![key()], NOBODY, vec![interface(0, V4)], false, heard, drop).unwrap()
    });
    let mut beating = Beating::new(&lan.a, vec![interface(0, V4)], vec![]);
    beating.beat(&lan.a);
    heard.recv_timeout(LONG).unwrap();
    // The thread is held now. More than its buffer can hold:
    for _ in 0..5000 {
        beating.beat(&lan.a);
    }
    let sent = clock::now();
    while clock::now().since(sent) < Duration::from_millis(50) {
        std::thread::yield_now();
    }
    drop(go);
    let late = heard.recv_timeout(LONG).unwrap();
    assert!(Duration::from_millis(45) < late.queued, "{:?}", late.queued);
    // The kernel tells with a later datagram what was lost before it.
    let end = Instant::now() + LONG;
    while receiver.counts().overflowed == 0 {
        beating.beat(&lan.a);
        assert!(Instant::now() < end, "{:?}", receiver.counts());
    }
    let counts = receiver.counts();
    assert!(counts.opened + counts.overflowed <= beating.beat.counter.0, "{counts:?}");
}
