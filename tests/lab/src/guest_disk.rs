//! What a lab guest writes to its own disk, shared by the guest and the judge of single writers.
//!
//! ```text
//! sector (512 bytes)   0          2 … 2 + RING                     30720 …               31744
//!                   ┌──────────┬────────────────────────────────┬─────────────────────┬───────────┐
//!                   │ head     │ ring: entry `counter` lies at  │ what outlives an    │ command   │
//!                   │ (latest) │ sector 2 + counter % RING      │ orderly reboot      │ lab→guest │
//!                   └──────────┴────────────────────────────────┴─────────────────────┴───────────┘
//!
//! every 100 ms:  obey the command; read head ──► write entry ──► write head      (all O_DIRECT | O_SYNC, one sector each)
//!                                      │             ▲
//!                                      └─ `previous` ┘   what the head said just before this write
//! ```
//!
//! Entries form a chain: each names the stamp it found in the head. With one writer it is always its own last one, or,
//! in the first entry of a boot, the last one of the boot before (counters go on over boots). Anything else means that
//! somebody wrote in between: the guest counts it in `conflicts` (which never falls), and the ring keeps both. A copy
//! of the same boot (a migration that left two) differs by its uptime, which is in nanoseconds for that reason.
//! `check_chain` is the judge's rule for a whole disk.
//!
//! A record is 512 bytes, little endian:
//!
//! ```text
//!   0  magic, 8 bytes        24  counter, u64          40  previous boot, 16 bytes    64  previous uptime, ns, u64
//!   8  boot id, 16 bytes     32  uptime, ns, u64       56  previous counter, u64      72  conflicts, u64
//!  80  zeros                504  FNV-1a 64 of bytes 0 to 503
//! ```
//!
//! The command sector is written by the lab only: ASCII (`poweroff`, `crash`, `ask db`, …: see the guest's program), then zeros. The guest
//! clears it before it obeys.
//!
//! Deliberately only `std`: the guest is built from this file by a single call of rustc.

/// Bytes of a sector, and of every record.
pub const SECTOR: usize = 512;
/// Size of the disk of a lab guest.
pub const DISK_BYTES: u64 = 16 << 20;
/// Sector of the latest record.
pub const HEAD_SECTOR: u64 = 0;
/// Sector of the lab's word to the guest. In a block of its own: where the storage takes whole blocks of 4 KiB only, QEMU reads and
/// writes the neighbours of what its guest writes, too, and a word that came between would be lost.
pub const COMMAND_SECTOR: u64 = 31_744;
/// First sector of the ring.
pub const RING_SECTOR: u64 = 2;
/// Entries in the ring: 50 minutes of them.
pub const RING: u64 = 30_000;
/// First sector of what the guest keeps over an orderly reboot: a length (u64), then bytes, at most `KEPT_BYTES` in all.
pub const KEPT_SECTOR: u64 = 30_720;
/// Room for it.
pub const KEPT_BYTES: usize = 256 * 1024;
/// Time between two entries.
pub const PERIOD_MS: u64 = 100;

const HEAD_MAGIC: &[u8; 8] = b"MSLABHD1";
const ENTRY_MAGIC: &[u8; 8] = b"MSLABEN1";

/// One write of one guest: who, which one, when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Random, chosen at boot.
    pub boot: [u8; 16],
    /// Rises by one per write, over boots too.
    pub counter: u64,
    /// Since this boot, by the guest's own clock.
    pub uptime_ns: u64,
}

/// What a sector of head or ring says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// This write.
    pub stamp: Stamp,
    /// What the head said just before; zeros on an empty disk.
    pub previous: Stamp,
    /// How often a writer of this disk found a stamp that it did not expect.
    pub conflicts: u64,
}

/// Which of the two places a record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Sector 0.
    Head,
    /// A sector of the ring.
    Ring,
}

/// A sector as read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sector {
    /// All zeros: never written.
    Empty,
    /// Neither a record nor empty: torn, or written by something else.
    Broken,
    /// A whole record.
    Record(Record),
}

/// The sector of the ring where the entry `counter` lies.
pub fn ring_sector(counter: u64) -> u64 {
    RING_SECTOR + counter % RING
}

impl Record {
    /// The sector for this record.
    pub fn to_bytes(self, place: Place) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        bytes[0..8].copy_from_slice(magic(place));
        put_stamp(&mut bytes[8..40], &self.stamp);
        put_stamp(&mut bytes[40..72], &self.previous);
        bytes[72..80].copy_from_slice(&self.conflicts.to_le_bytes());
        let sum = checksum(&bytes[..SECTOR - 8]);
        bytes[SECTOR - 8..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }
}

/// Reads a sector of `place`. Of a slice that is too short nothing can be said: it is broken.
pub fn parse(bytes: &[u8], place: Place) -> Sector {
    if bytes.len() < SECTOR {
        return Sector::Broken;
    }
    let bytes = &bytes[..SECTOR];
    if bytes.iter().all(|b| *b == 0) {
        return Sector::Empty;
    }
    if &bytes[0..8] != magic(place) || u64_at(bytes, SECTOR - 8) != checksum(&bytes[..SECTOR - 8]) {
        return Sector::Broken;
    }
    Sector::Record(Record { stamp: stamp_at(bytes, 8), previous: stamp_at(bytes, 40), conflicts: u64_at(bytes, 72) })
}

/// What is wrong with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A sector is neither empty nor a record.
    Broken { sector: u64 },
    /// A writer found a stamp that it did not expect.
    Conflict { at: Record },
    /// The ring holds another write than the one that the entry after it names.
    Chain { before: Record, after: Record },
}

/// Judges a whole disk (or its first bytes up to the end of the ring): the head's record, and all faults, at most 100.
pub fn check_chain(disk: &[u8]) -> (Option<Record>, Vec<Fault>) {
    const FAULTS: usize = 100;
    let mut faults = Vec::new();
    let head = match sector_of(disk, HEAD_SECTOR, Place::Head) {
        Sector::Record(record) => Some(record),
        Sector::Empty => None,
        Sector::Broken => {
            faults.push(Fault::Broken { sector: HEAD_SECTOR });
            None
        }
    };
    let mut entries = Vec::new();
    for sector in RING_SECTOR..RING_SECTOR + RING {
        match sector_of(disk, sector, Place::Ring) {
            Sector::Record(record) => entries.push(record),
            Sector::Empty => {}
            Sector::Broken => faults.push(Fault::Broken { sector }),
        }
    }
    entries.sort_by_key(|e| e.stamp.counter);
    let mut conflicts = entries.first().map_or(0, |e| e.conflicts_before_ring());
    for (i, entry) in entries.iter().enumerate() {
        if conflicts < entry.conflicts {
            faults.push(Fault::Conflict { at: *entry });
            conflicts = entry.conflicts;
        }
        let Some(before) = i.checked_sub(1).map(|i| &entries[i]) else { continue };
        // An entry whose predecessor was overwritten by the next lap of the ring has nothing to compare with.
        let adjacent = before.stamp.counter + 1 == entry.stamp.counter;
        if adjacent && before.stamp != entry.previous {
            faults.push(Fault::Chain { before: *before, after: *entry });
        }
    }
    faults.truncate(FAULTS);
    (head, faults)
}

impl Record {
    /// The count of conflicts before the oldest entry: an oldest entry that is the first ever has had none.
    fn conflicts_before_ring(&self) -> u64 {
        if self.previous == Stamp::default() { 0 } else { self.conflicts }
    }
}

fn sector_of(disk: &[u8], sector: u64, place: Place) -> Sector {
    let from = sector as usize * SECTOR;
    match disk.get(from..from + SECTOR) {
        Some(bytes) => parse(bytes, place),
        None => Sector::Empty, // A sparse copy may end early.
    }
}

fn magic(place: Place) -> &'static [u8; 8] {
    match place {
        Place::Head => HEAD_MAGIC,
        Place::Ring => ENTRY_MAGIC,
    }
}

fn put_stamp(to: &mut [u8], stamp: &Stamp) {
    to[0..16].copy_from_slice(&stamp.boot);
    to[16..24].copy_from_slice(&stamp.counter.to_le_bytes());
    to[24..32].copy_from_slice(&stamp.uptime_ns.to_le_bytes());
}

fn stamp_at(bytes: &[u8], at: usize) -> Stamp {
    let mut boot = [0; 16];
    boot.copy_from_slice(&bytes[at..at + 16]);
    Stamp { boot, counter: u64_at(bytes, at + 16), uptime_ns: u64_at(bytes, at + 24) }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, b| (sum ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &mut [u8], boot: u8, own_last: &mut Option<Stamp>) {
        let head = match sector_of(disk, HEAD_SECTOR, Place::Head) {
            Sector::Record(record) => record,
            Sector::Empty | Sector::Broken => Record::default(),
        };
        let expected = own_last.is_none_or(|own| own == head.stamp);
        let counter = own_last.unwrap_or(head.stamp).counter + 1;
        let stamp = Stamp { boot: [boot; 16], counter, uptime_ns: counter * 7 };
        let record = Record { stamp, previous: head.stamp, conflicts: head.conflicts + u64::from(!expected) };
        let at = ring_sector(counter) as usize * SECTOR;
        disk[at..at + SECTOR].copy_from_slice(&record.to_bytes(Place::Ring));
        disk[..SECTOR].copy_from_slice(&record.to_bytes(Place::Head));
        *own_last = Some(stamp);
    }

    #[test]
    fn one_writer_after_the_other_is_clean() {
        let mut disk = vec![0; DISK_BYTES as usize];
        for boot in 1..4 {
            let mut last = None;
            (0..50).for_each(|_| write(&mut disk, boot, &mut last));
        }
        let (head, faults) = check_chain(&disk);
        assert_eq!(faults, []);
        assert_eq!(head.map(|h| h.stamp.counter), Some(150));
    }

    #[test]
    fn a_full_ring_is_clean() {
        let mut disk = vec![0; DISK_BYTES as usize];
        let mut last = None;
        (0..RING + 50).for_each(|_| write(&mut disk, 1, &mut last));
        assert_eq!(check_chain(&disk).1, []);
    }

    #[test]
    fn two_writers_are_seen() {
        let mut disk = vec![0; DISK_BYTES as usize];
        let (mut old, mut new) = (None, None);
        (0..10).for_each(|_| write(&mut disk, 1, &mut old));
        (0..10).for_each(|_| write(&mut disk, 2, &mut new));
        write(&mut disk, 1, &mut old);
        write(&mut disk, 2, &mut new);
        let (_, faults) = check_chain(&disk);
        assert!(faults.iter().any(|f| matches!(f, Fault::Conflict { .. })), "{faults:?}");
        assert!(faults.iter().any(|f| matches!(f, Fault::Chain { .. })), "{faults:?}");
    }

    #[test]
    fn junk_is_broken() {
        let mut bytes = Record::default().to_bytes(Place::Head);
        assert_eq!(parse(&bytes, Place::Ring), Sector::Broken);
        bytes[100] = 1;
        assert_eq!(parse(&bytes, Place::Head), Sector::Broken);
        assert_eq!(parse(&bytes[..100], Place::Head), Sector::Broken);
        assert_eq!(parse(&[0; SECTOR], Place::Head), Sector::Empty);
    }
}
