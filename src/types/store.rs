//! Orders to a datastore (the agent's side; beats and lists are written by the guard) and their answers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Attestation, BeatBlock, Claim, Digest, Generation, HostId, Nonce, Roster, Time, VmId, VmList, VmRecord};

/// One member's files as one complete read saw them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberRead {
    /// Whose.
    pub host: HostId,
    /// Of all bytes of its slots as they lie there (torn or not): any change changes it.
    pub bytes: Digest,
    /// Newest valid beat.
    pub beat: Option<BeatBlock>,
    /// Its VM list, only if it matches the beat.
    pub list: Option<VmList>,
}

/// A complete read (R3): member block first, then beat and VM list of every member, all successful.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CompleteRead {
    /// Before its first operation.
    pub began: Time,
    /// After its last.
    pub ended: Time,
    /// As read at the beginning.
    pub roster: Roster,
    /// Every member of the roster.
    pub members: Vec<MemberRead>,
    /// Newest per host out of all members' beats.
    pub attestations: Vec<Attestation>,
    /// Time each member's newest beat was first seen is kept by the core, not here.
    pub spent: Duration,
}

/// Which claims to read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ClaimsOf {
    /// Of every VM on the datastore.
    All,
    /// Of these.
    Vms(Vec<VmId>),
}

/// The claim that a new one follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum After {
    /// It lies on the same datastore, with this nonce.
    Here(Generation, Nonce),
    /// It lies on another one, and says that the home moves here: whoever orders has just read it there.
    Elsewhere(Generation),
}

impl After {
    /// Of that claim.
    #[must_use]
    pub fn generation(self) -> Generation {
        match self {
            Self::Here(generation, _) | Self::Elsewhere(generation) => generation,
        }
    }
}

/// An order to one datastore. Each runs on that datastore's own threads and has a deadline.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StoreOrder {
    /// Make a complete read.
    ReadAll,
    /// Read the highest claim of each.
    ReadClaims(ClaimsOf),
    /// Create claim g+1 exclusively. `after` = the claim g that the proof names; `None` for generation 1. The creator
    /// checks after the link that g is still that claim, and gives way if not.
    CreateClaim { claim: Box<Claim>, after: Option<After> },
    /// Write a record durably; the name carries its digest.
    WriteRecord(Box<VmRecord>),
    /// Read one.
    ReadRecord { vm: VmId, digest: Digest },
    /// Change the roster: create `members.<generation>` exclusively, then write the block.
    WriteRoster(Roster),
    /// Prepare the folder for a cluster: directories, scratch block, first roster if there is none.
    Prepare(Roster),
    /// Timed direct read of each path; which can be opened and read.
    Probe { paths: Vec<String> },
}

/// What became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StoreAnswer {
    /// Of `ReadAll`.
    Read(Box<CompleteRead>),
    /// Of `ReadClaims`: highest claim of each VM that has one. `bad` = VMs whose highest claim cannot be read.
    Claims { began: Time, ended: Time, claims: Vec<Claim>, bad: Vec<(VmId, String)> },
    /// The claim exists and is ours.
    Created,
    /// Somebody else's claim of that generation (or a higher one) exists: the highest.
    Exists(Box<Claim>),
    /// The predecessor is not the claim that the proof names; ours was removed.
    GaveWay,
    /// Done.
    Done,
    /// Of `WriteRecord`.
    Recorded(Digest),
    /// Of `ReadRecord`.
    Record(Box<VmRecord>),
    /// Of `Probe`: those that failed, with the reason.
    Probed { failed: Vec<(String, String)>, spent: Duration },
    /// Not done, or not known to be done. Says nothing about anybody.
    Failed(StoreFailure),
}

/// Why an operation failed. An error is never silence, and never an answer about a claim.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum StoreFailure {
    /// The deadline passed; the operation may still land.
    #[error("no answer within {0:?}; it may still take effect")]
    Timeout(Duration),
    /// All threads of this datastore hang.
    #[error("every thread of this datastore waits for storage that does not answer")]
    Hung,
    /// ENOSPC or EDQUOT.
    #[error("{path}: no space left; make room on the datastore")]
    Full { path: String },
    /// EROFS or EACCES.
    #[error("{path}: cannot be written ({why}); mount it read-write for root")]
    ReadOnly { path: String, why: String },
    /// The path is missing or not ours.
    #[error("{path}: {why}")]
    Missing { path: String, why: String },
    /// What lies there cannot be used.
    #[error("{path}: {why}")]
    Bad { path: String, why: String },
    /// Any other error of the system.
    #[error("{path}: {why}")]
    Io { path: String, why: String },
    /// ENODEV, ENXIO, or ESHUTDOWN (a client that Ceph has blocklisted): the storage itself says that it is gone.
    #[error("{path}: {why}; the storage is gone for this host")]
    Gone { path: String, why: String },
    /// ESTALE: what was open is not there any more. Every file was opened anew for this operation.
    #[error("{path}: {why}; another file system is there, or this host was shut out")]
    Stale { path: String, why: String },
}
