//! The files of one host on a datastore: eight slots of beats, a scratch block, two areas of VM lists.
//!
//! Which slot is written is the real book's choice (`exec::datastore::slots`), so a write that lands late hits the slot
//! that it was meant for. Contents are compared by what they hold, not by bytes: equal contents, equal digests.
//!
//! Harder than the real thing: of a host's attestations only those in its newest beat are seen, so that everything
//! rests on their standing in every later beat. Easier: a list that lands late never replaces a newer one (the guard
//! would write that again).

use std::collections::{BTreeMap, VecDeque};

use mainstay::exec::datastore::slots::{Book, SLOTS, Slots, SlotsKept};
use mainstay::types::store::MemberRead;
use mainstay::types::{Attestation, BeatBlock, BootId, DatastoreId, Digest, HostId, HostIndex, Roster, Time, VmList};
use mainstay::wire::record;

use super::datastore::Datastore;
use super::world::{H, World};

/// See the module.
#[derive(Clone)]
pub struct Files {
    /// As they lie there.
    pub slots: Slots,
    /// The scratch block.
    pub scratch: Option<BeatBlock>,
    lists: [Option<(VmList, Digest)>; 2],
    changes: u64,
    /// When the last beats landed, in the world's time.
    landed: VecDeque<u64>,
}

impl Default for Files {
    fn default() -> Self {
        Self { slots: Slots::empty(), scratch: None, lists: [None, None], changes: 0, landed: VecDeque::new() }
    }
}

/// A digest of the beat with this stamp.
pub fn content(block: &BeatBlock) -> Digest {
    digest_of([block.incarnation.0, block.counter.0, 0])
}

fn digest_of(numbers: [u64; 3]) -> Digest {
    let mut digest = Digest::default();
    for (at, number) in numbers.into_iter().enumerate() {
        digest.0[8 * at..8 * at + 8].copy_from_slice(&number.to_le_bytes());
    }
    digest.0[31] = 1; // Differs from a slot that was never written.
    digest
}

impl Files {
    /// A beat lands in its slot.
    fn put(&mut self, slot: usize, block: BeatBlock) {
        let digest = content(&block);
        self.slots.valid.retain(|(at, _)| *at != slot);
        self.slots.valid.push((slot, block));
        self.changed(slot, digest);
    }

    fn changed(&mut self, slot: usize, digest: Digest) {
        self.slots.digests[slot] = digest;
        let mut all = Digest::default();
        for (at, digest) in self.slots.digests.iter().enumerate() {
            for (n, byte) in digest.0.iter().enumerate() {
                // Slot and place are mixed in, so that slots that change places are a change.
                all.0[(n + 3 * at) % 32] = all.0[(n + 3 * at) % 32].wrapping_mul(31).wrapping_add(*byte);
            }
        }
        self.slots.bytes = all;
    }

    fn newest(&self) -> Option<&BeatBlock> {
        self.slots.newest().map(|(_, beat)| beat)
    }

    fn list_of(&self, beat: &BeatBlock) -> Option<&VmList> {
        let (list, digest) = self.lists[(beat.list.sequence.0 % 2) as usize].as_ref()?;
        (list.sequence == beat.list.sequence && *digest == beat.list.digest).then_some(list)
    }
}

impl Datastore {
    /// A host's own slots: all bytes, and the newest beat.
    pub fn own(&self, host: HostId) -> (Digest, Option<BeatBlock>) {
        let Some(files) = self.slots.get(&host) else { return (Digest::default(), None) };
        (files.slots.bytes, files.newest().cloned())
    }

    /// What a guard's memory of its slots begins with: what its predecessor handed on, or what lies there.
    pub fn book(&self, host: HostId, boot: BootId, kept: Option<&SlotsKept>, now: Time) -> Book {
        let none = Files::default();
        let files = self.slots.get(&host).unwrap_or(&none);
        match kept {
            Some(kept) => Book::carried(&files.slots, kept, now),
            None => Book::opened(&files.slots, files.scratch.as_ref(), boot, now),
        }
    }

    /// What others attested of a host.
    pub fn attestations_of(&self, index: HostIndex, host: HostId) -> Vec<Attestation> {
        let newest = self.slots.iter().filter(|(of, _)| **of != host).filter_map(|(_, files)| files.newest());
        newest.flat_map(|block| block.attestations.iter().filter(|a| a.index == index).copied()).collect()
    }

    /// When a host's last beats landed.
    pub fn landed(&self, host: HostId) -> impl Iterator<Item = u64> {
        self.slots.get(&host).into_iter().flat_map(|files| files.landed.iter().copied())
    }

    /// A beat lands in a slot (none: in the scratch block).
    pub fn write_beat(&mut self, host: HostId, slot: Option<usize>, block: BeatBlock, now: u64) {
        let files = self.slots.entry(host).or_default();
        match slot {
            Some(slot) => {
                files.landed.push_back(now);
                files.landed.drain(..files.landed.len().saturating_sub(16));
                files.put(slot, block);
            }
            None => files.scratch = Some(block),
        }
    }

    /// A list lands.
    pub fn write_list(&mut self, host: HostId, list: VmList) {
        let area = &mut self.slots.entry(host).or_default().lists[(list.sequence.0 % 2) as usize];
        if area.as_ref().is_none_or(|(there, _)| there.sequence < list.sequence) {
            let digest = record::list_digest(&list);
            *area = Some((list, digest));
        }
    }

    /// What a host's list says there now.
    pub fn list(&self, host: HostId) -> Option<&VmList> {
        let files = self.slots.get(&host)?;
        files.list_of(files.newest()?)
    }

    pub(super) fn read_all(&self) -> (Roster, Vec<MemberRead>, Vec<Attestation>) {
        let mut attestations: BTreeMap<HostIndex, Attestation> = BTreeMap::new();
        let mut members = Vec::with_capacity(self.roster.members.len());
        for entry in &self.roster.members {
            let Some(files) = self.slots.get(&entry.host) else {
                members.push(MemberRead { host: entry.host, bytes: Digest::default(), beat: None, list: None });
                continue;
            };
            let beat = files.newest();
            for new in beat.iter().flat_map(|beat| &beat.attestations) {
                let newest = attestations.entry(new.index).or_insert(*new);
                if (newest.incarnation, newest.counter) < (new.incarnation, new.counter) {
                    *newest = *new;
                }
            }
            let list = beat.and_then(|beat| files.list_of(beat)).cloned();
            members.push(MemberRead { host: entry.host, bytes: files.slots.bytes, beat: beat.cloned(), list });
        }
        (self.roster.clone(), members, attestations.into_values().collect())
    }
}

impl World {
    /// A write into this slot was cut off in the middle, unless it has landed.
    pub fn tear(&mut self, h: H, home: DatastoreId, slot: usize, whole: Digest) {
        let host = self.hosts[h].id;
        let Some(files) = self.stores.get_mut(&home).and_then(|store| store.slots.get_mut(&host)) else { return };
        if files.slots.digests[slot] == whole {
            return;
        }
        files.changes += 1;
        let changes = files.changes;
        files.slots.valid.retain(|(at, _)| *at != slot);
        files.changed(slot, digest_of([0, changes, 1]));
    }

    /// The power goes while a beat is being written: sometimes half of it lies there.
    pub fn tear_next(&mut self, h: H) {
        let host = self.hosts[h].id;
        for home in self.homes() {
            let newest = self.stores[&home].slots.get(&host).and_then(|files| files.slots.newest().map(|(at, _)| *at));
            if let Some(newest) = newest.filter(|_| self.jitter && self.dice(2) == 0) {
                self.tear(h, home, (newest + 1) % SLOTS, Digest::default());
            }
        }
    }
}
