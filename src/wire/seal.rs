//! Seals datagrams with the cluster's key, and opens them; each at most once.
//!
//! ```text
//! byte 0     4  5  6     8               24              40            48        56
//!      ┌─────┬──┬──┬─────┬───────────────┬───────────────┬─────────────┬─────────┬───────────┬──────────┐
//!      │magic│v │0 │key  │ cluster       │ sender        │ incarnation │ counter │ encrypted │ tag (16) │
//!      │"MBT"│1 │  │id   │ UUID          │ UUID          │ u64         │ u64     │ body      │          │
//!      └─────┴──┴──┴─────┴───────────────┴───────────────┴─────────────┴─────────┴───────────┴──────────┘
//!       clear, authenticated (associated data); numbers little endian
//! ```
//!
//! AES-256-GCM; nonce = four zero bytes and the counter; key = HKDF-SHA256 of the ring's secret with the cluster id as
//! salt and info = "beat" ‖ key id ‖ sender ‖ incarnation. A new incarnation is a new key, so counters may begin anew.
//! Nobody may ever seal two bodies under one counter of one incarnation: the counter must be kept before it is used.
//!
//! Opening, in this order, cheapest first, nothing is remembered before the seal was found right:
//! length, magic, version, cluster, key id, replay (by the window of the newest incarnation), seal, body.
//!
//! Rules in numbers: window 64 counters per sender; newest incarnation of a sender only; state for 128 senders, and for
//! one more the one that was silent longest is forgotten. A sealed datagram has at most 1,200 bytes.
//!
//! Not here: sockets (`exec/net.rs`), whether the sender is a member, one-way links (echoes, in the core). A replay of
//! what was sent before this `Opener` was made passes once; whether a peer is alive is therefore decided by echoes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Prk, Salt};
use uuid::Uuid;
use zeroize::Zeroize;

use super::beat;
use crate::types::guard::BeatKey;
use crate::types::{ClusterId, Counter, HostId, Incarnation, MAX_HOSTS, NetBeat};

mod dropped;

pub use dropped::{DropCounts, Dropped};

/// Longest datagram, sealed.
pub const MAX_DATAGRAM: usize = 1200;
/// Clear bytes before the body.
pub const HEADER: usize = 56;
/// Bytes after the body.
pub const TAG: usize = 16;

const MAGIC: [u8; 4] = *b"MBT\0";
const VERSION: u8 = 1;

const _: () = assert!(HEADER + beat::MAX_BODY + TAG <= MAX_DATAGRAM, "a full beat must fit into one datagram");

/// The clear part of a datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SealHeader {
    /// Which key of the ring.
    pub key_id: u16,
    /// The cluster.
    pub cluster: ClusterId,
    /// The sender.
    pub host: HostId,
    /// Of its guard.
    pub incarnation: Incarnation,
    /// Of this datagram.
    pub counter: Counter,
}

impl SealHeader {
    fn encode(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[0..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[6..8].copy_from_slice(&self.key_id.to_le_bytes());
        out[8..24].copy_from_slice(self.cluster.0.as_bytes());
        out[24..40].copy_from_slice(self.host.0.as_bytes());
        out[40..48].copy_from_slice(&self.incarnation.0.to_le_bytes());
        out[48..56].copy_from_slice(&self.counter.0.to_le_bytes());
        out
    }

    /// What a datagram says of itself, before anything is proven.
    ///
    /// # Errors
    /// `Short`, `Magic` or `Version`.
    pub fn decode(datagram: &[u8]) -> Result<Self, Dropped> {
        if datagram.len() < HEADER + TAG {
            return Err(Dropped::Short);
        }
        if datagram[0..4] != MAGIC {
            return Err(Dropped::Magic);
        }
        if datagram[4] != VERSION {
            return Err(Dropped::Version(datagram[4]));
        }
        Ok(Self {
            key_id: u16::from_le_bytes(part(datagram, 6)),
            cluster: ClusterId(Uuid::from_bytes(part(datagram, 8))),
            host: HostId(Uuid::from_bytes(part(datagram, 24))),
            incarnation: Incarnation(u64::from_le_bytes(part(datagram, 40))),
            counter: Counter(u64::from_le_bytes(part(datagram, 48))),
        })
    }
}

/// `N` bytes of the header, which is there.
fn part<const N: usize>(datagram: &[u8], at: usize) -> [u8; N] {
    datagram[at..at + N].try_into().expect("a range of N bytes has N bytes")
}

/// Seals the beats of one incarnation of one host.
pub struct Sealer {
    key_id: u16,
    cluster: ClusterId,
    host: HostId,
    incarnation: Incarnation,
    key: LessSafeKey,
    /// Smallest counter that was not used yet.
    unused: AtomicU64,
}

impl Sealer {
    /// Derives the key.
    #[must_use]
    pub fn new(key: &BeatKey, cluster: ClusterId, host: HostId, incarnation: Incarnation) -> Self {
        let key_of_sender = derive(&root(key, cluster), key.id, host, incarnation);
        Self { key_id: key.id, cluster, host, incarnation, key: key_of_sender, unused: AtomicU64::new(0) }
    }

    /// A datagram.
    ///
    /// # Panics
    /// When `counter` is not above that of every earlier call (one nonce for two bodies would give the key away), or
    /// the datagram would be longer than `MAX_DATAGRAM`.
    #[must_use]
    pub fn seal(&self, counter: Counter, body: &[u8]) -> Vec<u8> {
        assert!(HEADER + body.len() + TAG <= MAX_DATAGRAM, "a body of {} bytes does not fit", body.len());
        let unused = self.unused.fetch_max(counter.0.saturating_add(1), Ordering::SeqCst);
        assert!(unused <= counter.0 && counter.0 != u64::MAX, "counter {counter} was used already");
        let header = SealHeader {
            key_id: self.key_id,
            cluster: self.cluster,
            host: self.host,
            incarnation: self.incarnation,
            counter,
        }
        .encode();
        let mut out = Vec::with_capacity(HEADER + body.len() + TAG);
        out.extend(header);
        out.extend(body);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce(counter), Aad::from(&header), &mut out[HEADER..])
            .expect("AES-GCM seals any body that fits into a datagram");
        out.extend(tag.as_ref());
        out
    }

    /// The datagram of a beat.
    ///
    /// # Panics
    /// As `seal`, and when the beat is of another cluster, host or incarnation than this sealer.
    #[must_use]
    pub fn seal_beat(&self, beat: &NetBeat) -> Vec<u8> {
        assert!(
            (beat.cluster, beat.host, beat.incarnation) == (self.cluster, self.host, self.incarnation),
            "a beat is sealed as what it says it is"
        );
        self.seal(beat.counter, &beat::encode(beat))
    }
}

/// Opens the beats of everybody in one cluster.
pub struct Opener {
    cluster: ClusterId,
    ring: Vec<(u16, Prk)>,
    senders: BTreeMap<HostId, Sender>,
    /// Datagrams opened so far; tells which sender was silent longest.
    opened: u64,
    dropped: DropCounts,
    scratch: Vec<u8>,
}

/// What is remembered of a sender: never made or changed by a datagram whose seal is wrong.
struct Sender {
    key_id: u16,
    incarnation: Incarnation,
    key: LessSafeKey,
    window: Window,
    last_opened: u64,
}

impl Opener {
    /// Opens what is sealed with any of these keys.
    #[must_use]
    pub fn new(keys: &[BeatKey], cluster: ClusterId) -> Self {
        Self {
            cluster,
            ring: keys.iter().map(|key| (key.id, root(key, cluster))).collect(),
            senders: BTreeMap::new(),
            opened: 0,
            dropped: DropCounts::default(),
            scratch: Vec::with_capacity(MAX_DATAGRAM),
        }
    }

    /// The beat in a datagram, if it is sealed by a holder of the key and was not opened before.
    ///
    /// # Errors
    /// When it is dropped; it was counted.
    pub fn open(&mut self, datagram: &[u8]) -> Result<NetBeat, Dropped> {
        let opened = self.open_once(datagram);
        if let Err(dropped) = opened {
            self.dropped.count(dropped);
        }
        opened
    }

    /// Like `open`, but nothing is remembered, nor dropped as seen before.
    ///
    /// # Errors
    /// When it is no beat of this cluster; it was counted.
    pub fn peek(&mut self, datagram: &[u8]) -> Result<NetBeat, Dropped> {
        let peeked = self.peek_once(datagram);
        if let Err(dropped) = peeked {
            self.dropped.count(dropped);
        }
        peeked
    }

    /// What was dropped so far.
    #[must_use]
    pub fn dropped(&self) -> DropCounts {
        self.dropped
    }

    /// How many were opened so far.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.opened
    }

    fn header(&self, datagram: &[u8]) -> Result<SealHeader, Dropped> {
        let header = SealHeader::decode(datagram)?;
        if header.cluster != self.cluster {
            return Err(Dropped::OtherCluster);
        }
        Ok(header)
    }

    fn derive(&self, header: &SealHeader) -> Result<LessSafeKey, Dropped> {
        let (id, root) = self.ring.iter().find(|(id, _)| *id == header.key_id).ok_or(Dropped::UnknownKey)?;
        Ok(derive(root, *id, header.host, header.incarnation))
    }

    fn peek_once(&mut self, datagram: &[u8]) -> Result<NetBeat, Dropped> {
        let header = self.header(datagram)?;
        let key = self.derive(&header)?;
        unseal(&key, &header, datagram, &mut self.scratch)?;
        beat::decode(&header, &self.scratch).map_err(Dropped::Bad)
    }

    fn open_once(&mut self, datagram: &[u8]) -> Result<NetBeat, Dropped> {
        let header = self.header(datagram)?;
        let known = self.senders.get(&header.host);
        if let Some(sender) = known {
            if header.incarnation < sender.incarnation {
                return Err(Dropped::OldIncarnation);
            }
            if header.incarnation == sender.incarnation && !sender.window.is_new(header.counter) {
                return Err(Dropped::Replayed);
            }
        }
        let same = known.filter(|sender| (sender.incarnation, sender.key_id) == (header.incarnation, header.key_id));
        let derived = if let Some(sender) = same {
            unseal(&sender.key, &header, datagram, &mut self.scratch)?;
            None
        } else {
            let key = self.derive(&header)?;
            unseal(&key, &header, datagram, &mut self.scratch)?;
            Some(key)
        };
        // From here on the sender is known to hold the key.
        self.remember(&header, derived);
        let beat = beat::decode(&header, &self.scratch).map_err(Dropped::Bad)?;
        self.opened += 1;
        Ok(beat)
    }

    fn remember(&mut self, header: &SealHeader, derived: Option<LessSafeKey>) {
        let now = self.opened;
        if let Some(sender) = self.senders.get_mut(&header.host) {
            if sender.incarnation != header.incarnation {
                sender.incarnation = header.incarnation;
                sender.window = Window::default();
            }
            if let Some(key) = derived {
                sender.key_id = header.key_id;
                sender.key = key;
            }
            sender.window.mark(header.counter);
            sender.last_opened = now;
            return;
        }
        if MAX_HOSTS <= self.senders.len() {
            let silent = self.senders.iter().min_by_key(|(_, sender)| sender.last_opened).map(|(host, _)| *host);
            if let Some(host) = silent {
                self.senders.remove(&host);
            }
        }
        let key = derived.expect("no key is cached for a sender that is not known");
        let mut window = Window::default();
        window.mark(header.counter);
        self.senders.insert(
            header.host,
            Sender { key_id: header.key_id, incarnation: header.incarnation, key, window, last_opened: now },
        );
    }
}

/// Which of the last 64 counters were seen. Bit n: newest − n.
#[derive(Clone, Copy, Default)]
struct Window {
    newest: Counter,
    seen: u64,
}

impl Window {
    fn is_new(&self, counter: Counter) -> bool {
        match self.newest.0.checked_sub(counter.0) {
            None => true,
            Some(age) if age < 64 => self.seen & 1 << age == 0,
            Some(_) => false,
        }
    }

    fn mark(&mut self, counter: Counter) {
        if self.newest < counter {
            let step = counter.0 - self.newest.0;
            self.seen = if step < 64 { self.seen << step } else { 0 };
            self.newest = counter;
        }
        let age = self.newest.0 - counter.0;
        assert!(age < 64, "only a counter that is new is marked");
        self.seen |= 1 << age;
    }
}

/// Root of all keys that come from one key of the ring.
fn root(key: &BeatKey, cluster: ClusterId) -> Prk {
    Salt::new(HKDF_SHA256, cluster.0.as_bytes()).extract(&key.secret)
}

fn derive(root: &Prk, key_id: u16, host: HostId, incarnation: Incarnation) -> LessSafeKey {
    let info = [&b"beat"[..], &key_id.to_le_bytes()[..], &host.0.as_bytes()[..], &incarnation.0.to_le_bytes()[..]];
    let mut bytes = [0; 32];
    root.expand(&info, HKDF_SHA256).and_then(|key| key.fill(&mut bytes)).expect("HKDF gives 32 bytes");
    let key = UnboundKey::new(&AES_256_GCM, &bytes).expect("32 bytes are a key of AES-256");
    bytes.zeroize();
    LessSafeKey::new(key)
}

fn nonce(counter: Counter) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.0.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// The body, into `scratch`.
fn unseal(key: &LessSafeKey, header: &SealHeader, datagram: &[u8], scratch: &mut Vec<u8>) -> Result<(), Dropped> {
    let (clear, sealed) = datagram.split_at(HEADER);
    scratch.clear();
    scratch.extend_from_slice(sealed);
    let len = key.open_in_place(nonce(header.counter), Aad::from(clear), scratch).map_err(|_| Dropped::Seal)?.len();
    scratch.truncate(len);
    Ok(())
}

#[cfg(test)]
mod tests;
