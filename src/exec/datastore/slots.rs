//! Which slot of `hosts/<id>` is written next, which rest, and whether the storage still shows what it acknowledged.
//!
//! ```text
//!            write acknowledged                       next beat
//!   free ───────────────────────► newest ───────────────────────────► free
//!    │                                                                  ▲
//!    └── outcome unknown ──► rests ── 10 min from the write's return ───┘
//!         (error; or its process died)
//! ```
//!
//! Slots are written in a circle. A write with unknown outcome may land later: as long as its slot rests, the old beat
//! can reappear beside newer ones and never replaces one. After an error a scratch block is written before the next
//! slot is tried, so that a burst of errors costs one slot; it carries the resting slots, so that they are known even if
//! the process dies before its next beat. After several errors as many scratch blocks as slots rest for them have to
//! succeed in a row: a path on which every other write fails would else use up all slots within seconds, and be without
//! beats for minutes after it is well again.
//!
//! Deliberately not here: files.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::mutants::{Mutant, planted};
use crate::types::{BeatBlock, BootId, ClusterId, Counter, Digest, HostId, Incarnation, Time};
use crate::wire::record::{self, BLOCK};

/// Number of slots.
pub const SLOTS: usize = 8;
/// How long a slot rests.
pub const REST: Duration = Duration::from_secs(600);
/// How long a slot rests whose writer's kernel is gone: nothing can send that write again, it can only be on its way
/// through the network or in the server.
pub const REST_REBOOTED: Duration = Duration::from_secs(60);
/// Slots after the newest that rest when a process starts: the one that its predecessor may have been writing when it
/// died, and one more for an error before that whose scratch block was itself hidden by a late write.
const REST_AT_START: usize = 2;

/// What orders beats of one host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Stamp {
    /// First.
    pub incarnation: Incarnation,
    /// Then.
    pub counter: Counter,
}

impl Stamp {
    /// Of a beat.
    #[must_use]
    pub fn of(block: &BeatBlock) -> Self {
        Self { incarnation: block.incarnation, counter: block.counter }
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "beat {}.{}", self.incarnation, self.counter)
    }
}

/// All slots of one host as they lie there.
#[derive(Clone)]
pub struct Slots {
    /// Valid beats of that host, by slot.
    pub valid: Vec<(usize, BeatBlock)>,
    /// Of each slot's bytes; of nothing where the file ends.
    pub digests: [Digest; SLOTS],
    /// Of all bytes.
    pub bytes: Digest,
}

impl Slots {
    /// Nothing was ever written.
    #[must_use]
    pub fn empty() -> Self {
        Self { valid: Vec::new(), digests: [Digest::default(); SLOTS], bytes: Digest::default() }
    }

    /// From the first 32 KiB of the file, or less if it is shorter. A torn or foreign block is no beat.
    #[must_use]
    pub fn parse(raw: &[u8], cluster: ClusterId, host: HostId) -> Self {
        let raw = &raw[..raw.len().min(SLOTS * BLOCK)];
        let mut digests = [record::digest(&[]); SLOTS];
        let mut valid = Vec::new();
        for (slot, block) in raw.chunks(BLOCK).enumerate() {
            digests[slot] = record::digest(block);
            if let Ok(beat) = record::decode_beat(block)
                && beat.cluster == cluster
                && beat.host == host
            {
                valid.push((slot, beat));
            }
        }
        Self { valid, digests, bytes: record::digest(raw) }
    }

    /// The beat that counts, and its slot.
    #[must_use]
    pub fn newest(&self) -> Option<&(usize, BeatBlock)> {
        self.valid.iter().max_by_key(|(_, beat)| Stamp::of(beat))
    }
}

/// Our own slots show something that cannot be. Beats on this datastore end; the operator decides.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Doubt {
    /// Less than was acknowledged.
    #[error(
        "shows {} as this host's newest, but {acknowledged} was acknowledged: the storage went back in time",
        found.map_or_else(|| "no beat".to_owned(), |found| found.to_string())
    )]
    RolledBack {
        /// What the storage once confirmed or showed.
        acknowledged: Stamp,
        /// What it shows now.
        found: Option<Stamp>,
    },
    /// A beat under our name that this guard did not write.
    #[error("holds {found:?} of boot {boot}, which this guard never wrote: this host id is in use twice")]
    TwiceUsed {
        /// Its stamp.
        found: Stamp,
        /// Its writer's boot.
        boot: BootId,
    },
}

/// What the next guard of this boot must know of the slots to go on with them: without it two more rest at each start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlotsKept {
    /// Which file they are in: of another one this says nothing.
    pub file: (u64, u64),
    /// Until when each rests.
    pub rests: [Time; SLOTS],
    /// The one that was written last.
    pub last: u8,
    /// The one whose write is under way; if its process dies now, the outcome is unknown.
    pub writing: Option<u8>,
    /// Whether a scratch block has to be written before a slot is tried.
    pub scratch_first: bool,
}

/// The memory of one guard about its slots on one datastore.
pub struct Book {
    /// Of each slot, as acknowledged or last seen.
    held: [Digest; SLOTS],
    /// Until when each slot rests.
    rests: [Time; SLOTS],
    /// Writes with unknown outcome into resting slots.
    attempts: Vec<(usize, Digest)>,
    newest: Option<Stamp>,
    /// Where the newest lies.
    newest_at: Option<usize>,
    /// Since when each rests, or is known to.
    since: [Time; SLOTS],
    last: usize,
    scratch_first: bool,
}

impl Book {
    /// At the start of a process, from the slots and the scratch block as they lie there.
    #[must_use]
    pub fn opened(slots: &Slots, scratch: Option<&BeatBlock>, boot: BootId, now: Time) -> Self {
        let newest = slots.newest();
        let same_boot = |beat: &BeatBlock| beat.boot == boot;
        let rest = match (newest, scratch) {
            (Some((_, beat)), _) if same_boot(beat) => REST,
            (_, Some(beat)) if same_boot(beat) => REST,
            _ => REST_REBOOTED,
        };
        let last = newest.map_or(SLOTS - 1, |(slot, _)| *slot);
        let mut book = Self {
            held: slots.digests,
            rests: [Time::ZERO; SLOTS],
            attempts: Vec::new(),
            newest: newest.map(|(_, beat)| Stamp::of(beat)),
            newest_at: newest.map(|(slot, _)| *slot),
            since: [now; SLOTS],
            last,
            scratch_first: false,
        };
        let named = newest.map_or(0, |(_, beat)| beat.resting) | scratch.map_or(0, |beat| beat.resting);
        for slot in (0..SLOTS).filter(|slot| named >> slot & 1 == 1) {
            book.rests[slot] = now + rest;
        }
        for _ in 0..REST_AT_START {
            // One stays free, however often a guard is started.
            let free = (0..SLOTS).filter(|slot| book.rests[*slot] <= now && book.newest_at != Some(*slot)).count();
            if let Some(slot) = book.next(now).filter(|_| 1 < free) {
                book.rests[slot] = now + rest;
            }
        }
        book
    }

    /// At the start of a process that goes on with what its predecessor knew. A write under way when that died may
    /// land later, so its slot rests as after an error.
    #[must_use]
    pub fn carried(slots: &Slots, kept: &SlotsKept, now: Time) -> Self {
        let mut book = Self {
            held: slots.digests,
            rests: kept.rests,
            attempts: Vec::new(),
            newest: slots.newest().map(|(_, beat)| Stamp::of(beat)),
            newest_at: slots.newest().map(|(slot, _)| *slot),
            since: [now; SLOTS],
            last: usize::from(kept.last) % SLOTS,
            scratch_first: kept.scratch_first,
        };
        if let Some(slot) = kept.writing.map(|slot| usize::from(slot) % SLOTS) {
            book.rests[slot] = now + REST;
            book.last = slot;
            book.scratch_first = true;
        }
        book
    }

    /// For the next process. `writing`: the slot whose write begins now.
    #[must_use]
    pub fn kept(&self, file: (u64, u64), writing: Option<usize>) -> SlotsKept {
        let small = |slot: usize| u8::try_from(slot).expect("there are eight slots");
        SlotsKept {
            file,
            rests: self.rests,
            last: small(self.last),
            writing: writing.map(small),
            scratch_first: self.scratch_first,
        }
    }

    /// Newest beat acknowledged, or seen at the start.
    #[must_use]
    pub fn newest(&self) -> Option<Stamp> {
        self.newest
    }

    /// Compares what the storage shows with what it acknowledged; `mine` and `boot` are this guard's.
    ///
    /// # Errors
    /// [`Doubt`].
    pub fn compare(&mut self, slots: &Slots, mine: Incarnation, boot: BootId) -> Result<(), Doubt> {
        for (slot, beat) in &slots.valid {
            let known =
                slots.digests[*slot] == self.held[*slot] || self.attempts.contains(&(*slot, slots.digests[*slot]));
            // A lower incarnation is a late write of a predecessor; were it a living twin, the twin would see us.
            // The same one of this boot is a late write of the process whose work this one carries on.
            // An older beat of our own is judged by the newest, below.
            let foreign = mine < beat.incarnation || (mine == beat.incarnation && boot != beat.boot);
            let older = Some(Stamp::of(beat)) < self.newest;
            if !known && foreign && !older {
                return Err(Doubt::TwiceUsed { found: Stamp::of(beat), boot: beat.boot });
            }
        }
        let found = slots.newest().map(|(_, beat)| Stamp::of(beat));
        if found < self.newest {
            let acknowledged = self.newest.expect("greater than something");
            return Err(Doubt::RolledBack { acknowledged, found });
        }
        self.held = slots.digests;
        self.newest = found;
        self.newest_at = slots.newest().map(|(slot, _)| *slot);
        Ok(())
    }

    /// The slot to write next; `None`: no beats for now. Never the one with the newest beat: a write over it that is cut
    /// off would leave less than was acknowledged. When all others rest, one whose write has been on its way for longer
    /// than a reboot would let it: that it lands just then is less to be feared than a host without beats.
    #[must_use]
    pub fn next(&self, now: Time) -> Option<usize> {
        let in_turn = (1..=SLOTS).map(|step| (self.last + step) % SLOTS);
        let others: Vec<usize> = in_turn.filter(|slot| self.newest_at != Some(*slot)).collect();
        let free = others.iter().find(|slot| self.rests[**slot] <= now);
        let old = |slot: &&usize| REST_REBOOTED <= now.since(self.since[**slot]);
        free.or_else(|| others.iter().filter(old).min_by_key(|slot| self.since[**slot])).copied()
    }

    /// When the first slot ends its rest.
    #[must_use]
    pub fn free_at(&self) -> Time {
        self.rests.iter().copied().min().unwrap_or(Time::ZERO)
    }

    /// Bit n: slot n rests.
    #[must_use]
    pub fn resting(&self, now: Time) -> u8 {
        (0..SLOTS).filter(|slot| now < self.rests[*slot]).fold(0, |mask, slot| mask | 1 << slot)
    }

    /// How often the scratch block has to be written, one success after the other, before a slot is tried.
    #[must_use]
    pub fn scratches(&self) -> usize {
        if self.scratch_first { self.attempts.len().clamp(1, SLOTS) } else { 0 }
    }

    /// The scratch block was acknowledged so often.
    pub fn scratched(&mut self) {
        self.scratch_first = false;
    }

    /// A write came back with an error at `returned`.
    pub fn failed(&mut self, slot: usize, content: Digest, returned: Time) {
        self.attempts.retain(|(slot, _)| returned < self.rests[*slot]);
        self.since[slot] = returned;
        self.rests[slot] = if planted(Mutant::SlotReused) { returned } else { returned + REST };
        self.attempts.push((slot, content));
        self.last = slot;
        self.scratch_first = true;
    }

    /// A write was acknowledged.
    pub fn written(&mut self, slot: usize, content: Digest, stamp: Stamp) {
        self.held[slot] = content;
        self.newest = Some(stamp);
        self.newest_at = Some(slot);
        self.last = slot;
    }
}
