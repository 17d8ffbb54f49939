//! Records on a datastore as bytes: what lies in the 4 KiB blocks, and nothing about files.
//!
//! ```text
//!   0        8     10      12      16     20        24          40              total
//!   ┌────────┬─────┬───────┬───────┬──────┬─────────┬───────────┬──────┬────────┐
//!   │MAINSTAY│kind │version│ total │ body │ 0 0 0 0 │ checksum  │ body │ zeros  │
//!   └────────┴─────┴───────┴───────┴──────┴─────────┴───────────┴──────┴────────┘
//!     8 B     u16    u16     u32    u32              16 B         postcard
//! ```
//!
//! Numbers are little-endian. `total` is a multiple of 4,096; the checksum is the first half of SHA-256 over everything
//! but itself, so that a torn block never passes. Postcard does not describe itself, so a body never changes once it was
//! released: another body is another version, and a reader that does not know it says [`BadRecord::Newer`].
//!
//! | record | size | limit |
//! |---|---|---|
//! | roster, beat, claim | one block | 128 hosts; 127 attestations; 16 debts |
//! | VM list | 1 to 12 blocks | 1,000 VMs |
//! | record of a VM | 1 to 128 blocks | 512 KiB |
//! | state file's slot | one block | see `exec/state.rs` |
//!
//! Deliberately not here: which slot is written, which claim is the highest, what a bad record means.

use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::types::{
    Attestation, BeatBlock, BootId, Claim, ClusterId, Counter, Digest, Flags, HostId, HostIndex, Incarnation, ListName,
    MAX_DEBTS, MAX_HOSTS, MAX_VMS_PER_HOST, Roster, Time, VmList, VmRecord,
};

#[cfg(test)]
mod tests;

/// Size of a block, in bytes; every file of ours is a whole number of them.
pub const BLOCK: usize = 4096;
/// Room for one VM list, in bytes: 1,000 entries at their largest.
pub const LIST_AREA: usize = 12 * BLOCK;
/// The largest record of a VM, in bytes.
pub const MAX_RECORD: usize = 512 * 1024;

const MAGIC: [u8; 8] = *b"MAINSTAY";
const HEAD: usize = 40;
const CHECKSUM: std::ops::Range<usize> = 24..HEAD;
const VERSION: u16 = 1;

// The largest encodings: an id 17 bytes, a u64 10, a u32 5, a u16 3.
const LARGEST_BEAT: usize = 17 + 17 + 1 + 17 + 10 + 10 + 10 + 5 + 3 + (10 + 32) + 1 + 10 + 2;
const LARGEST_ATTESTATION: usize = 1 + 10 + 10 + 5;
const LARGEST_LIST_ENTRY: usize = 17 + 10 + 1 + 1 + 17;
const _: () = assert!(HEAD + LARGEST_BEAT + (MAX_HOSTS - 1) * LARGEST_ATTESTATION <= BLOCK);
const _: () = assert!(HEAD + 17 + 10 + 10 + 2 + MAX_VMS_PER_HOST * LARGEST_LIST_ENTRY <= LIST_AREA);
const _: () = assert!(HEAD + 17 + 17 + 10 + 2 + MAX_HOSTS * (1 + 17) <= BLOCK);

/// What a block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Kind {
    /// Block `members` and the files `members.<generation>`.
    Roster = 1,
    /// A slot of `hosts/<id>`.
    Beat = 2,
    /// An area of `hosts/<id>.vms`.
    List = 3,
    /// A claim.
    Claim = 4,
    /// The record of a VM.
    Record = 5,
    /// A slot of a local state file.
    State = 6,
}

/// Why bytes are not the record that they should be. They are left as they are.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadRecord {
    /// All zeros: preallocated, never written.
    #[error("never written")]
    Empty,
    /// Shorter than it says: the write was cut off.
    #[error("cut off after {len} of {need} bytes")]
    Short { len: usize, need: usize },
    /// Not ours.
    #[error("not a record of Mainstay (wrong magic)")]
    Magic,
    /// The envelope contradicts itself.
    #[error("damaged: a body of {body} bytes in {total}")]
    Size { body: usize, total: usize },
    /// Torn or damaged.
    #[error("torn or damaged (wrong checksum)")]
    Checksum,
    /// A record of another kind.
    #[error("a record of kind {found} lies where a {wanted:?} belongs")]
    Kind { wanted: Kind, found: u16 },
    /// Written by newer software.
    #[error("written by newer software (version {version}); upgrade Mainstay on this host")]
    Newer { version: u16 },
    /// Over its limit.
    #[error("too large: {len}, at most {max}")]
    TooLarge { len: usize, max: usize },
    /// The body is not what its version says.
    #[error("damaged body: {0}")]
    Body(String),
}

/// SHA-256 of `bytes`.
#[must_use]
pub fn digest(bytes: &[u8]) -> Digest {
    digest_of(&[bytes])
}

/// Puts a body into its envelope, filled up with zeros to whole blocks.
///
/// # Errors
/// [`BadRecord::TooLarge`] if that is more than `max` bytes.
pub fn seal<T: Serialize>(kind: Kind, body: &T, max: usize) -> Result<Vec<u8>, BadRecord> {
    let body = postcard::to_stdvec(body).map_err(|error| BadRecord::Body(error.to_string()))?;
    let total = (HEAD + body.len()).next_multiple_of(BLOCK);
    if max < total {
        return Err(BadRecord::TooLarge { len: body.len(), max: max - HEAD });
    }
    let mut bytes = vec![0; total];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&(kind as u16).to_le_bytes());
    bytes[10..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&u32_of(total).to_le_bytes());
    bytes[16..20].copy_from_slice(&u32_of(body.len()).to_le_bytes());
    bytes[HEAD..HEAD + body.len()].copy_from_slice(&body);
    let sum = checksum(&bytes);
    bytes[CHECKSUM].copy_from_slice(&sum);
    Ok(bytes)
}

/// Takes a body out of its envelope. Bytes after the record's own total are not looked at.
///
/// # Errors
/// Every variant of [`BadRecord`], in the order in which they can be told apart.
pub fn open<T: DeserializeOwned>(kind: Kind, bytes: &[u8]) -> Result<T, BadRecord> {
    let total = total(bytes)?;
    let record = bytes.get(..total).ok_or(BadRecord::Short { len: bytes.len(), need: total })?;
    let body_len = u32_at(record, 16);
    let body = record.get(HEAD..HEAD + body_len).ok_or(BadRecord::Size { body: body_len, total })?;
    if record[CHECKSUM] != checksum(record) {
        return Err(BadRecord::Checksum);
    }
    let (found, version) = (u16_at(record, 8), u16_at(record, 10));
    if found != kind as u16 {
        return Err(BadRecord::Kind { wanted: kind, found });
    }
    if VERSION < version {
        return Err(BadRecord::Newer { version });
    }
    match postcard::take_from_bytes::<T>(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(BadRecord::Body(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(BadRecord::Body(error.to_string())),
    }
}

/// How many bytes the record that begins here has; its first block is enough to tell.
///
/// # Errors
/// `Empty`, `Short`, `Magic` or `Size`.
pub fn total(bytes: &[u8]) -> Result<usize, BadRecord> {
    if bytes.len() < BLOCK {
        return Err(BadRecord::Short { len: bytes.len(), need: BLOCK });
    }
    if bytes[..8] != MAGIC {
        let empty = bytes[..BLOCK].iter().all(|byte| *byte == 0);
        return Err(if empty { BadRecord::Empty } else { BadRecord::Magic });
    }
    let (total, body) = (u32_at(bytes, 12), u32_at(bytes, 16));
    if total == 0 || total % BLOCK != 0 || MAX_RECORD < total || total < HEAD + body {
        return Err(BadRecord::Size { body, total });
    }
    Ok(total)
}

/// A roster as one block.
///
/// # Errors
/// [`BadRecord::Body`] if it breaks its own rules, which are: rising indices under 128, no host twice.
pub fn encode_roster(roster: &Roster) -> Result<Vec<u8>, BadRecord> {
    check_roster(roster)?;
    seal(Kind::Roster, roster, BLOCK)
}

/// A roster from its block.
///
/// # Errors
/// See [`BadRecord`].
pub fn decode_roster(bytes: &[u8]) -> Result<Roster, BadRecord> {
    let roster = open(Kind::Roster, bytes)?;
    check_roster(&roster)?;
    Ok(roster)
}

/// A beat as one block.
///
/// # Errors
/// [`BadRecord::TooLarge`] for more than 127 attestations or an L over 49 days.
pub fn encode_beat(beat: &BeatBlock) -> Result<Vec<u8>, BadRecord> {
    seal(Kind::Beat, &BeatBody::of(beat)?, BLOCK)
}

/// A beat from its block.
///
/// # Errors
/// See [`BadRecord`].
pub fn decode_beat(bytes: &[u8]) -> Result<BeatBlock, BadRecord> {
    open::<BeatBody>(Kind::Beat, bytes)?.into_beat()
}

/// A VM list, 1 to 12 blocks.
///
/// # Errors
/// [`BadRecord::TooLarge`] for more than 1,000 entries.
pub fn encode_list(list: &VmList) -> Result<Vec<u8>, BadRecord> {
    at_most(list.entries.len(), MAX_VMS_PER_HOST)?;
    seal(Kind::List, list, LIST_AREA)
}

/// A VM list from its blocks.
///
/// # Errors
/// See [`BadRecord`].
pub fn decode_list(bytes: &[u8]) -> Result<VmList, BadRecord> {
    let list: VmList = open(Kind::List, bytes)?;
    at_most(list.entries.len(), MAX_VMS_PER_HOST)?;
    Ok(list)
}

/// What a beat names its list by: SHA-256 of the list's body.
#[must_use]
pub fn list_digest(list: &VmList) -> Digest {
    digest(&postcard::to_stdvec(list).expect("a list of plain values always encodes"))
}

/// A claim as one block.
///
/// # Errors
/// [`BadRecord::TooLarge`] for more than 16 debts or a name of kilobytes.
pub fn encode_claim(claim: &Claim) -> Result<Vec<u8>, BadRecord> {
    at_most(claim.debts.len(), MAX_DEBTS)?;
    seal(Kind::Claim, claim, BLOCK)
}

/// A claim from its block.
///
/// # Errors
/// See [`BadRecord`].
pub fn decode_claim(bytes: &[u8]) -> Result<Claim, BadRecord> {
    let claim: Claim = open(Kind::Claim, bytes)?;
    at_most(claim.debts.len(), MAX_DEBTS)?;
    Ok(claim)
}

/// The record of a VM. Its name is the [`digest`] of these bytes.
///
/// # Errors
/// [`BadRecord::TooLarge`] over 512 KiB.
pub fn encode_record(record: &VmRecord) -> Result<Vec<u8>, BadRecord> {
    seal(Kind::Record, record, MAX_RECORD)
}

/// The record of a VM from its bytes.
///
/// # Errors
/// See [`BadRecord`].
pub fn decode_record(bytes: &[u8]) -> Result<VmRecord, BadRecord> {
    open(Kind::Record, bytes)
}

/// A beat's body: flags as bits and L in milliseconds, so that 127 attestations fit at their largest.
#[derive(Serialize, Deserialize)]
struct BeatBody {
    cluster: ClusterId,
    host: HostId,
    index: HostIndex,
    boot: BootId,
    incarnation: Incarnation,
    counter: Counter,
    taken: Time,
    lease_ms: u32,
    flags: u16,
    accepted: u32,
    list: ListName,
    resting: u8,
    roster: u64,
    attestations: Vec<(HostIndex, Incarnation, Counter, u32)>,
}

impl BeatBody {
    fn of(beat: &BeatBlock) -> Result<Self, BadRecord> {
        at_most(beat.attestations.len(), MAX_HOSTS - 1)?;
        let attested = |a: &Attestation| Ok((a.index, a.incarnation, a.counter, lease_ms(a.lease)?));
        Ok(Self {
            cluster: beat.cluster,
            host: beat.host,
            index: beat.index,
            boot: beat.boot,
            incarnation: beat.incarnation,
            counter: beat.counter,
            taken: beat.taken,
            lease_ms: lease_ms(beat.lease)?,
            flags: flag_bits(beat.flags),
            accepted: beat.accepted,
            list: beat.list,
            resting: beat.resting,
            roster: beat.roster,
            attestations: beat.attestations.iter().map(attested).collect::<Result<_, BadRecord>>()?,
        })
    }

    fn into_beat(self) -> Result<BeatBlock, BadRecord> {
        at_most(self.attestations.len(), MAX_HOSTS - 1)?;
        let attestations = self.attestations.into_iter().map(|(index, incarnation, counter, ms)| {
            index_checked(index)?;
            Ok(Attestation { index, incarnation, counter, lease: Duration::from_millis(ms.into()) })
        });
        index_checked(self.index)?;
        Ok(BeatBlock {
            cluster: self.cluster,
            host: self.host,
            index: self.index,
            boot: self.boot,
            incarnation: self.incarnation,
            counter: self.counter,
            taken: self.taken,
            lease: Duration::from_millis(self.lease_ms.into()),
            flags: flags_of(self.flags),
            accepted: self.accepted,
            list: self.list,
            resting: self.resting,
            roster: self.roster,
            attestations: attestations.collect::<Result<_, BadRecord>>()?,
        })
    }
}

/// Rounded up: whoever waits for the end of a lease must not wait too short.
fn lease_ms(lease: Duration) -> Result<u32, BadRecord> {
    u32::try_from(lease.as_nanos().div_ceil(1_000_000))
        .map_err(|_| BadRecord::TooLarge { len: usize::MAX, max: u32::MAX as usize })
}

fn flag_bits(flags: Flags) -> u16 {
    let Flags { isolated, leaving, maintenance, agent_dead, unpunctual, distrusts } = flags;
    let bits = [isolated, leaving, maintenance, agent_dead, unpunctual, distrusts];
    bits.iter().rev().fold(0, |all, bit| all << 1 | u16::from(*bit))
}

/// Bits of later versions are not looked at.
fn flags_of(bits: u16) -> Flags {
    let bit = |n: u16| bits >> n & 1 == 1;
    Flags {
        isolated: bit(0),
        leaving: bit(1),
        maintenance: bit(2),
        agent_dead: bit(3),
        unpunctual: bit(4),
        distrusts: bit(5),
    }
}

fn check_roster(roster: &Roster) -> Result<(), BadRecord> {
    at_most(roster.members.len(), MAX_HOSTS)?;
    let mut hosts = std::collections::BTreeSet::new();
    for (n, member) in roster.members.iter().enumerate() {
        index_checked(member.index)?;
        if 0 < n && member.index <= roster.members[n - 1].index {
            return Err(BadRecord::Body(format!("index {} out of order", member.index)));
        }
        if !hosts.insert(member.host) {
            return Err(BadRecord::Body(format!("host {} stands there twice", member.host)));
        }
    }
    Ok(())
}

fn index_checked(index: HostIndex) -> Result<(), BadRecord> {
    if MAX_HOSTS <= usize::from(index.0) {
        return Err(BadRecord::Body(format!("host index {index} is not under {MAX_HOSTS}")));
    }
    Ok(())
}

fn at_most(len: usize, max: usize) -> Result<(), BadRecord> {
    if max < len {
        return Err(BadRecord::TooLarge { len, max });
    }
    Ok(())
}

fn checksum(record: &[u8]) -> [u8; 16] {
    let whole = digest_of(&[&record[..CHECKSUM.start], &record[CHECKSUM.end..]]);
    *whole.0.first_chunk().expect("32 bytes begin with 16")
}

fn digest_of(parts: &[&[u8]]) -> Digest {
    let mut context = Context::new(&SHA256);
    parts.iter().for_each(|part| context.update(part));
    Digest(context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("records are at most 512 KiB")
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
