//! The guard's side of a datastore: its own beats and VM list, and what it reads of others. Blocking calls, for the one
//! thread that the guard has per datastore.
//!
//! ```text
//!   hosts/<id>      │ slot 0 │ slot 1 │ … │ slot 7 │ scratch │      4 KiB each
//!   hosts/<id>.vms  │ area of even sequences │ area of odd ones │   48 KiB each, as many blocks used as needed
//!
//!   write: own slots read ─► as acknowledged? ─► (scratch) ─► slot ─► is the path still this file? ─► written
//! ```
//!
//! The file is opened once and never replaced. A counter counts only when [`BeatFile::roster`], read after
//! [`BeatFile::write`], names the writer.
//!
//! Deliberately not here: leases, when to write, what to do about a doubt.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::claims;
use super::files::{
    CLAIMS, Folder, HOSTS, Identity, MEMBERS, TMP, bad, beats_name, failure, identity, list_name, read_at, root_path,
    sweep, write_at,
};
use super::members;
use super::slots::{Book, Doubt, REST, SLOTS, Slots, SlotsKept, Stamp};
use crate::exec::clock;
use crate::types::{
    Attestation, BeatBlock, Claim, ClusterId, Counter, Digest, HostId, HostIndex, Incarnation, ListName, Roster, Time,
    VmId, VmList, store::StoreFailure,
};
use crate::wire::record::{self, BLOCK, LIST_AREA};

/// Size of `hosts/<id>`: slots and one scratch block.
pub const SLOTS_FILE: usize = (SLOTS + 1) * BLOCK;
const SCRATCH_AT: u64 = (SLOTS * BLOCK) as u64;
/// What this file leaves in `tmp/` begins so.
const TMP_KIND: &str = "guard";

/// Own slots as they lie there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnSlots {
    /// The beat that counts.
    pub newest: Option<BeatBlock>,
    /// Every valid beat: slot, incarnation, counter.
    pub valid: Vec<(usize, Incarnation, Counter)>,
    /// Of all bytes: any change changes it.
    pub bytes: Digest,
}

/// A beat that the storage acknowledged. It counts once the roster, read after it, names the writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// Where.
    pub slot: usize,
    /// What.
    pub counter: Counter,
}

/// Why a beat does not count.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WriteFailed {
    /// Every slot rests; the lease lapses, safely.
    #[error("every slot rests after failed writes; the next is free at {until:?}")]
    NoSlot { until: Time },
    /// An error. If it came from the slot itself, the beat may still land; the slot rests.
    #[error(transparent)]
    Store(#[from] StoreFailure),
    /// The storage or another host contradicts us: alarm, no more beats here.
    #[error("{path}: {doubt}")]
    Doubt { path: String, doubt: Doubt },
    /// The beat is not newer than what lies there: a higher incarnation is needed. Nothing was written.
    #[error("not newer than {newest:?}, which the datastore shows: take a higher incarnation")]
    Outdated { newest: Stamp },
    /// The path leads to another file now. Open it anew.
    #[error("{path}: was replaced by another file; open it anew")]
    Replaced { path: String },
}

/// `hosts/<id>` and `hosts/<id>.vms` of this host, held open.
pub struct BeatFile {
    root_path: PathBuf,
    cluster: ClusterId,
    me: HostId,
    pub(super) beats: File,
    beats_path: PathBuf,
    /// The member block.
    members: Option<File>,
    list: File,
    list_path: PathBuf,
    pub(super) book: Book,
    /// Which file `beats` is.
    which: Identity,
    /// The list last tried, as bytes.
    listed: Option<Vec<u8>>,
    /// Until then a list write of a dead predecessor, or one that failed, may still land over it.
    list_doubt_until: Time,
}

impl BeatFile {
    /// Opens the files, and creates them if they are missing.
    ///
    /// # Errors
    /// `Missing` if the datastore is not mounted or not prepared for the cluster; `Bad` if a file has a wrong size.
    pub fn open(root: &Path, cluster: ClusterId, me: HostId) -> Result<Self, StoreFailure> {
        Self::open_again(root, cluster, me, None)
    }

    /// The same, for one who knows what became of the writes before: an earlier guard of this boot, or an earlier
    /// descriptor of this guard.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_again(
        root: &Path,
        cluster: ClusterId,
        me: HostId,
        kept: Option<&SlotsKept>,
    ) -> Result<Self, StoreFailure> {
        let root_path = root_path(root, cluster);
        let root = Folder::open(&root_path)?;
        let (hosts, tmp) = (root.sub(HOSTS)?, root.sub(TMP)?);
        sweep(&tmp, TMP_KIND, me)?;
        members::make_host_file(&hosts, &tmp, TMP_KIND, me, &beats_name(me), SLOTS_FILE)?;
        members::make_host_file(&hosts, &tmp, TMP_KIND, me, &list_name(me), 2 * LIST_AREA)?;
        // Also if they were there: whoever made them may have died before they were durable.
        hosts.sync()?;
        let (beats, beats_path) = open_own(&hosts, &beats_name(me), SLOTS_FILE)?;
        let (list, list_path) = open_own(&hosts, &list_name(me), 2 * LIST_AREA)?;
        let members = root.file(MEMBERS, OFlag::O_RDONLY)?;
        let raw = read_at(&beats, &beats_path, 0, SLOTS_FILE)?;
        let slots = Slots::parse(raw.as_slice(), cluster, me);
        let scratch = raw.as_slice().get(SLOTS * BLOCK..).and_then(|block| record::decode_beat(block).ok());
        let scratch = scratch.filter(|beat| beat.cluster == cluster && beat.host == me);
        let now = clock::now();
        let boot = clock::boot_id().map_err(|error| StoreFailure::Io {
            path: "/proc/sys/kernel/random/boot_id".into(),
            why: error.to_string(),
        })?;
        let which = identity(&beats, &beats_path)?;
        let book = match kept.filter(|kept| kept.file == which) {
            Some(kept) => Book::carried(&slots, kept, now),
            None => Book::opened(&slots, scratch.as_ref(), boot, now),
        };
        Ok(Self {
            root_path,
            cluster,
            me,
            beats,
            beats_path,
            members,
            list,
            list_path,
            book,
            which,
            listed: None,
            list_doubt_until: now + REST,
        })
    }

    /// Reads all own slots back.
    ///
    /// # Errors
    /// Of the system.
    pub fn own(&self) -> Result<OwnSlots, StoreFailure> {
        let slots = self.read_slots()?;
        let valid = slots.valid.iter().map(|(slot, beat)| (*slot, beat.incarnation, beat.counter)).collect();
        Ok(OwnSlots { newest: slots.newest().map(|(_, beat)| beat.clone()), valid, bytes: slots.bytes })
    }

    fn read_slots(&self) -> Result<Slots, StoreFailure> {
        let raw = read_at(&self.beats, &self.beats_path, 0, SLOTS * BLOCK)?;
        if raw.as_slice().len() != SLOTS * BLOCK {
            let why = format!("only {} of {} bytes could be read", raw.as_slice().len(), SLOTS * BLOCK);
            return Err(StoreFailure::Io { path: self.beats_path.display().to_string(), why });
        }
        Ok(Slots::parse(raw.as_slice(), self.cluster, self.me))
    }

    /// Newest beat acknowledged, or seen when it was opened.
    #[must_use]
    pub fn newest(&self) -> Option<Stamp> {
        self.book.newest()
    }

    /// What the next process must know of the slots.
    #[must_use]
    pub fn kept(&self) -> SlotsKept {
        self.book.kept(self.which, None)
    }

    /// Writes one beat into the next slot that does not rest; sets `resting` itself.
    ///
    /// # Errors
    /// [`WriteFailed`]; only a `Store` error of the slot's own write leaves its outcome unknown.
    pub fn write(&mut self, block: &BeatBlock, now: Time) -> Result<Written, WriteFailed> {
        self.write_telling(block, now, |_| {})
    }

    /// The same. `begins` is called just before the slot's own write, so that its outcome is known to be unknown should
    /// the process die in it.
    ///
    /// # Errors
    /// As `write`.
    pub fn write_telling(
        &mut self,
        block: &BeatBlock,
        now: Time,
        begins: impl FnOnce(SlotsKept),
    ) -> Result<Written, WriteFailed> {
        assert!(block.host == self.me && block.cluster == self.cluster, "a guard beats only for itself");
        let slots = self.read_slots()?;
        let path = self.beats_path.display().to_string();
        let compared = self.book.compare(&slots, block.incarnation, block.boot);
        compared.map_err(|doubt| WriteFailed::Doubt { path: path.clone(), doubt })?;
        if let Some(newest) = self.book.newest().filter(|newest| Stamp::of(block) <= *newest) {
            return Err(WriteFailed::Outdated { newest });
        }
        self.mend_list(now)?;
        let block = BeatBlock { resting: self.book.resting(now), ..block.clone() };
        let bytes = record::encode_beat(&block).map_err(|why| bad(&self.beats_path, &why))?;
        for _ in 0..self.book.scratches() {
            write_at(&self.beats, &self.beats_path, SCRATCH_AT, &bytes)?;
        }
        self.book.scratched();
        let slot = self.book.next(now).ok_or(WriteFailed::NoSlot { until: self.book.free_at() })?;
        let content = record::digest(&bytes);
        begins(self.book.kept(self.which, Some(slot)));
        if let Err(failure) = write_at(&self.beats, &self.beats_path, (slot * BLOCK) as u64, &bytes) {
            self.book.failed(slot, content, now.max(clock::now()));
            return Err(failure.into());
        }
        self.book.written(slot, content, Stamp::of(&block));
        if !self.in_place()? {
            return Err(WriteFailed::Replaced { path });
        }
        Ok(Written { slot, counter: block.counter })
    }

    /// Whether both paths still lead to the files that are open. The folder is opened anew, so that an NFS client asks
    /// the server; the files are not, since a server in its grace period refuses that.
    fn in_place(&self) -> Result<bool, StoreFailure> {
        let hosts = Folder::open(&self.root_path)?.sub(HOSTS)?;
        let same = |name: String, file: &File, path: &Path| -> Result<bool, StoreFailure> {
            let found = hosts.look(&name)?.map(|seen| seen.identity);
            Ok(found == Some(identity(file, path)?))
        };
        Ok(same(beats_name(self.me), &self.beats, &self.beats_path)?
            && same(list_name(self.me), &self.list, &self.list_path)?)
    }

    /// Writes the VM list durably, into the area of its sequence's parity; raise the sequence by one each time, so that
    /// the list which the last beat names stays until the next beat.
    ///
    /// # Errors
    /// `Bad` for more than 1,000 entries; else of the system: the outcome is unknown, and no beat may name this list.
    pub fn write_list(&mut self, list: &VmList) -> Result<ListName, StoreFailure> {
        let bytes = record::encode_list(list).map_err(|why| bad(&self.list_path, &why))?;
        let written = write_at(&self.list, &self.list_path, list_at(list.sequence.0), &bytes);
        if written.is_err() {
            self.list_doubt_until = clock::now() + REST;
        }
        self.listed = Some(bytes);
        written?;
        Ok(ListName { sequence: list.sequence, digest: record::list_digest(list) })
    }

    /// While another list write may still land, looks whether it did so over the list last tried, and repeats that.
    fn mend_list(&mut self, now: Time) -> Result<(), StoreFailure> {
        let Some(bytes) = self.listed.as_ref().filter(|_| now < self.list_doubt_until) else { return Ok(()) };
        let list = record::decode_list(bytes).expect("encoded by write_list");
        let at = list_at(list.sequence.0);
        let found = read_at(&self.list, &self.list_path, at, bytes.len())?;
        if found.as_slice() == bytes.as_slice() {
            return Ok(());
        }
        let mended = write_at(&self.list, &self.list_path, at, bytes);
        if mended.is_err() {
            self.list_doubt_until = clock::now() + REST;
        }
        mended
    }

    /// Reads the roster anew.
    ///
    /// # Errors
    /// Of the system, or `Bad`.
    pub fn roster(&self) -> Result<Roster, StoreFailure> {
        let root = Folder::open(&self.root_path)?;
        members::read_with(&root, self.cluster, self.members.as_ref()).map(|found| found.roster)
    }

    /// The highest incarnation that this datastore shows for this host: in its own slots, or attested by others.
    ///
    /// # Errors
    /// If any member's slots cannot be read: then nobody knows.
    pub fn highest_incarnation(&self) -> Result<Incarnation, StoreFailure> {
        let own = self.read_slots()?.valid.iter().map(|(_, beat)| beat.incarnation).max();
        let index = self.roster()?.members.iter().find(|member| member.host == self.me).map(|member| member.index);
        let attested = match index {
            Some(index) => self.attestations_of(index)?.iter().map(|a| a.incarnation).max(),
            None => None,
        };
        Ok(own.max(attested).unwrap_or_default())
    }

    /// The newest attestation of `index` by each member that has one.
    ///
    /// # Errors
    /// If any member's slots cannot be read.
    pub fn attestations_of(&self, index: HostIndex) -> Result<Vec<Attestation>, StoreFailure> {
        let root = Folder::open(&self.root_path)?;
        let roster = members::read(&root, self.cluster)?.roster;
        let hosts = root.sub(HOSTS)?;
        let mut found = Vec::new();
        for member in &roster.members {
            let slots = read_member(&hosts, self.cluster, member.host)?;
            let attestations = slots.valid.iter().flat_map(|(_, beat)| &beat.attestations);
            found.extend(attestations.filter(|a| a.index == index).max_by_key(|a| (a.incarnation, a.counter)));
        }
        Ok(found)
    }
}

/// All slots of a member through a descriptor opened anew. A member without a file has written nothing: empty slots.
pub fn read_member(hosts: &Folder, cluster: ClusterId, host: HostId) -> Result<Slots, StoreFailure> {
    let name = beats_name(host);
    let Some(file) = hosts.file(&name, OFlag::O_RDONLY)? else { return Ok(Slots::parse(&[], cluster, host)) };
    let raw = read_at(&file, &hosts.path(&name), 0, SLOTS * BLOCK)?;
    Ok(Slots::parse(raw.as_slice(), cluster, host))
}

/// The list that `beat` names, if it lies there whole. Anything else says nothing, and is no failure.
pub fn read_list(hosts: &Folder, beat: &BeatBlock) -> Result<Option<VmList>, StoreFailure> {
    let name = list_name(beat.host);
    let Some(file) = hosts.file(&name, OFlag::O_RDONLY)? else { return Ok(None) };
    let (path, at) = (hosts.path(&name), list_at(beat.list.sequence.0));
    let mut bytes = read_at(&file, &path, at, BLOCK)?;
    match record::total(bytes.as_slice()) {
        Ok(total) if total <= BLOCK => {}
        Ok(total) if total <= LIST_AREA => bytes = read_at(&file, &path, at, total)?,
        Ok(_) | Err(_) => return Ok(None),
    }
    let Ok(list) = record::decode_list(bytes.as_slice()) else { return Ok(None) };
    let named = list.host == beat.host && list.sequence == beat.list.sequence;
    Ok((named && record::list_digest(&list) == beat.list.digest).then_some(list))
}

/// The highest claim of a VM: does g+1 exist, and whom does it name.
///
/// # Errors
/// `Bad` if it cannot be read: the owner is unknown. Any error says nothing about anybody.
pub fn highest_claim(root: &Path, cluster: ClusterId, vm: VmId) -> Result<Option<Claim>, StoreFailure> {
    claims::highest(&Folder::open(&root_path(root, cluster))?.sub(CLAIMS)?, vm)
}

fn list_at(sequence: u64) -> u64 {
    sequence % 2 * LIST_AREA as u64
}

fn open_own(hosts: &Folder, name: &str, len: usize) -> Result<(File, PathBuf), StoreFailure> {
    let path = hosts.path(name);
    let file = hosts.file(name, OFlag::O_RDWR | OFlag::O_DSYNC)?;
    let file = file.ok_or_else(|| failure(&path, &nix::errno::Errno::ENOENT.into()))?;
    let found = file.metadata().map_err(|error| failure(&path, &error))?.len();
    if found != len as u64 {
        let why = format!("has {found} bytes instead of {len}; end this host's VMs, move the file away, start again");
        return Err(StoreFailure::Bad { path: path.display().to_string(), why });
    }
    Ok((file, path))
}
