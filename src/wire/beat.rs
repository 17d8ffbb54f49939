//! The body of a network beat, byte by byte. The clear header before it and the seal around it: `seal.rs`.
//!
//! ```text
//!  at  len                                           at  len
//!   0   1  index in the roster                       16  16  boot id
//!   1   1  role: 0 subordinate of nobody, 1 of the   32   8  term
//!          next byte, 2 candidate, 3 master          40   8  version of the settings document
//!   2   1  index of its master, else 0               48   8  reaches      ┐
//!   3   1  score: datastores                         56   8  attest me    ├ sets of datastores
//!   4   1  score: priority                           64   8  storage lost │
//!   5   1  score: uptime bucket                      72   8  distrusts    ┘
//!                                                    80   8  VM list: sequence
//!   6   2  flags, bit 0 upwards: isolated, leaving,  88  32  VM list: digest
//!          maintenance, agent dead, unpunctual,     120   1  a = number of attested counters, at most 6
//!          distrusts; bit 6 score: available        121   1  e = number of echoes, at most 128
//!   8   4  L in milliseconds, rounded up            122   2  reserved
//!  12   3  software version                         124  14a attested: datastore 1, index 1,
//!                                                           incarnation 4, counter 8
//!  15   1  reserved                                   …  7e echoes: index 1, incarnation 2, counter 4
//! ```
//!
//! Numbers are little endian; UUIDs stand in the order of their text. Cluster, host, incarnation and counter stand in
//! the header only, and the score's host is the sender.
//!
//! **Other versions.** A later minor release may put meaning into reserved bytes and bits (sent as 0, ignored when
//! read) and append fields after the echoes; old readers ignore what follows there, new readers take what is missing
//! as unset. Anything else needs a new version byte in the header, which readers must know one release before it is
//! sent. Largest today: 124 + 84 + 896 = 1104 bytes, 1176 sealed; 24 are left.
//!
//! Not here: whether a beat may be believed (`seal.rs`), what follows from it (core).

use std::time::Duration;

use uuid::Uuid;

use super::seal::SealHeader;
use crate::types::{
    AgentBeat, Attested, BootId, Counter, DatastoreSet, Digest, Echo, Flags, HostIndex, ListName, MAX_DATASTORES,
    MAX_HOSTS, NetBeat, Role, Score, Sequence, Term,
};

/// How many attested counters fit into one beat.
pub const MAX_ATTESTED: usize = 6;
/// Longest body that `encode` makes.
pub const MAX_BODY: usize = FIXED + MAX_ATTESTED * ATTESTED + MAX_HOSTS * ECHO;

const FIXED: usize = 124;
const ATTESTED_AT: usize = 120;
const ECHOES_AT: usize = 121;
const ATTESTED: usize = 14;
const ECHO: usize = 7;
const AVAILABLE: u16 = 1 << 6;

/// Why an opened body is no beat. Its sender holds the key, so it is broken or much newer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadBeat {
    /// Ends before its last field.
    #[error("ends after {len} bytes")]
    Short { len: usize },
    /// No such role.
    #[error("role {0} is unknown")]
    Role(u8),
    /// No such place in the roster.
    #[error("there is no host index {0}")]
    Index(u8),
    /// No such place in the settings document.
    #[error("there is no datastore {0}")]
    Datastore(u8),
    /// L of zero.
    #[error("a lease of zero")]
    Lease,
    /// More attested counters or echoes than there may be, or two echoes of one host.
    #[error("{what} does not fit its limit")]
    TooMany { what: &'static str },
}

/// The body of a beat, at most `MAX_BODY` bytes. What `decode` would refuse is left out: indexes that no host can have,
/// a second echo of one host, more than `MAX_ATTESTED` attested counters. L is rounded up, never down: takers wait by it.
#[must_use]
pub fn encode(beat: &NetBeat) -> Vec<u8> {
    let agent = &beat.agent;
    let lease_ms = u32::try_from(beat.lease.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX).max(1);
    let (role, master) = role_bytes(agent.role);
    let mut out = Vec::with_capacity(MAX_BODY);
    out.extend([beat.index.0, role, master, agent.score.datastores, agent.score.priority, agent.score.uptime_bucket]);
    out.extend(flag_bits(agent.flags, agent.score.available).to_le_bytes());
    out.extend(lease_ms.to_le_bytes());
    out.extend([beat.software.0, beat.software.1, beat.software.2, 0]);
    out.extend(beat.boot.0.as_bytes());
    let numbers = [
        agent.term.0,
        agent.settings_version,
        beat.reaches.0,
        beat.attest_me.0,
        agent.storage_lost.0,
        beat.distrusts.0,
        beat.list.sequence.0,
    ];
    for number in numbers {
        out.extend(number.to_le_bytes());
    }
    out.extend(beat.list.digest.0);
    out.extend([0; 4]);
    debug_assert_eq!(out.len(), FIXED);

    for attested in beat.attested.iter().filter(|attested| can_be(attested)).take(MAX_ATTESTED) {
        out[ATTESTED_AT] += 1;
        out.extend([attested.datastore, attested.index.0]);
        out.extend(attested.incarnation_low.to_le_bytes());
        out.extend(attested.counter.0.to_le_bytes());
    }
    let mut seen = 0u128;
    for echo in &agent.echoes {
        if first(&mut seen, echo.index) {
            out[ECHOES_AT] += 1;
            out.push(echo.index.0);
            out.extend(echo.incarnation_low.to_le_bytes());
            out.extend(echo.counter_low.to_le_bytes());
        }
    }
    out
}

/// The beat in an opened body.
///
/// # Errors
/// When the body is no beat; see `BadBeat`.
pub fn decode(header: &SealHeader, body: &[u8]) -> Result<NetBeat, BadBeat> {
    let mut fields = Fields { all: body.len(), rest: body };
    let [index, role, master, datastores, priority, uptime_bucket] = fields.take()?;
    let bits = u16::from_le_bytes(fields.take()?);
    let lease_ms = u32::from_le_bytes(fields.take()?);
    let [major, minor, patch, _reserved] = fields.take()?;
    let boot = BootId(Uuid::from_bytes(fields.take()?));
    let term = Term(fields.number()?);
    let settings_version = fields.number()?;
    let reaches = DatastoreSet(fields.number()?);
    let attest_me = DatastoreSet(fields.number()?);
    let storage_lost = DatastoreSet(fields.number()?);
    let distrusts = DatastoreSet(fields.number()?);
    let list = ListName { sequence: Sequence(fields.number()?), digest: Digest(fields.take()?) };
    let [attested_len, echoes_len, _, _] = fields.take()?;
    if lease_ms == 0 {
        return Err(BadBeat::Lease);
    }
    Ok(NetBeat {
        cluster: header.cluster,
        host: header.host,
        index: index_of(index)?,
        boot,
        incarnation: header.incarnation,
        counter: header.counter,
        lease: Duration::from_millis(lease_ms.into()),
        list,
        reaches,
        attest_me,
        distrusts,
        attested: fields.attested(attested_len)?,
        software: (major, minor, patch),
        agent: AgentBeat {
            role: role_of(role, master)?,
            term,
            score: Score { datastores, available: bits & AVAILABLE != 0, priority, uptime_bucket, host: header.host },
            flags: flags_of(bits),
            storage_lost,
            settings_version,
            echoes: fields.echoes(echoes_len)?,
        },
    })
}

struct Fields<'a> {
    all: usize,
    rest: &'a [u8],
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], BadBeat> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(BadBeat::Short { len: self.all })?;
        self.rest = rest;
        Ok(*taken)
    }

    fn number(&mut self) -> Result<u64, BadBeat> {
        self.take().map(u64::from_le_bytes)
    }

    fn attested(&mut self, len: u8) -> Result<Vec<Attested>, BadBeat> {
        if MAX_ATTESTED < len.into() {
            return Err(BadBeat::TooMany { what: "the number of attested counters" });
        }
        let mut all = Vec::with_capacity(len.into());
        for _ in 0..len {
            let [datastore, index] = self.take()?;
            let incarnation_low = u32::from_le_bytes(self.take()?);
            let counter = Counter(self.number()?);
            if MAX_DATASTORES <= datastore.into() {
                return Err(BadBeat::Datastore(datastore));
            }
            all.push(Attested { datastore, index: index_of(index)?, incarnation_low, counter });
        }
        Ok(all)
    }

    fn echoes(&mut self, len: u8) -> Result<Vec<Echo>, BadBeat> {
        if MAX_HOSTS < len.into() {
            return Err(BadBeat::TooMany { what: "the number of echoes" });
        }
        let mut seen = 0;
        let mut all = Vec::with_capacity(len.into());
        for _ in 0..len {
            let [index] = self.take()?;
            let incarnation_low = u16::from_le_bytes(self.take()?);
            let counter_low = u32::from_le_bytes(self.take()?);
            let index = index_of(index)?;
            if !first(&mut seen, index) {
                return Err(BadBeat::TooMany { what: "the number of echoes of one host" });
            }
            all.push(Echo { index, incarnation_low, counter_low });
        }
        Ok(all)
    }
}

fn index_of(byte: u8) -> Result<HostIndex, BadBeat> {
    if usize::from(byte) < MAX_HOSTS { Ok(HostIndex(byte)) } else { Err(BadBeat::Index(byte)) }
}

fn can_be(attested: &Attested) -> bool {
    usize::from(attested.datastore) < MAX_DATASTORES && usize::from(attested.index.0) < MAX_HOSTS
}

/// Whether this index can be, and was not in `seen`; now it is.
fn first(seen: &mut u128, index: HostIndex) -> bool {
    let bit = 1u128.checked_shl(index.0.into()).unwrap_or(0);
    let new = bit & !*seen != 0;
    *seen |= bit;
    new
}

fn role_bytes(role: Role) -> (u8, u8) {
    match role {
        Role::Subordinate { master: None } => (0, 0),
        Role::Subordinate { master: Some(index) } if index_of(index.0).is_ok() => (1, index.0),
        Role::Subordinate { master: Some(_) } => (0, 0),
        Role::Candidate => (2, 0),
        Role::Master => (3, 0),
    }
}

fn role_of(role: u8, master: u8) -> Result<Role, BadBeat> {
    match role {
        0 => Ok(Role::Subordinate { master: None }),
        1 => Ok(Role::Subordinate { master: Some(index_of(master)?) }),
        2 => Ok(Role::Candidate),
        3 => Ok(Role::Master),
        unknown => Err(BadBeat::Role(unknown)),
    }
}

fn flag_bits(flags: Flags, available: bool) -> u16 {
    let Flags { isolated, leaving, maintenance, agent_dead, unpunctual, distrusts } = flags;
    [isolated, leaving, maintenance, agent_dead, unpunctual, distrusts, available]
        .into_iter()
        .enumerate()
        .fold(0, |bits, (place, set)| bits | u16::from(set) << place)
}

fn flags_of(bits: u16) -> Flags {
    let set = |place: u16| bits & 1 << place != 0;
    Flags {
        isolated: set(0),
        leaving: set(1),
        maintenance: set(2),
        agent_dead: set(3),
        unpunctual: set(4),
        distrusts: set(5),
    }
}

#[cfg(test)]
pub(crate) mod tests;
