//! Claims: the highest is found by listing; a new one is created exclusively and never changed.
//!
//! ```text
//!   prepared file ─ write, fsync ─► link(2) to claims/<vm>/<g+1> ──┬─► linked ──────────┐
//!                                                                 │                    ▼
//!                                   taken: read it ── our nonce ──┘        is g still that claim?
//!                                        │                                  │ yes           │ no
//!                                        ▼                                  ▼               ▼
//!                                     Exists                             Created    remove ours: GaveWay
//! ```
//!
//! An agent that dies at any point leaves g+1 whole or not at all; its nonce tells later which. An error says nothing:
//! g+1 may exist. Removal of old claims: only by whoever has just created one, in rising order, never claim 1, only
//! below the newest 64 *and* a day older than the newest (both times are the server's), at most 16 at once.
//!
//! Deliberately not here: proofs, and who may create.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;

use super::files::{CLAIMS, Folder, Seen, TMP, bad, failure, vm_name, write_at};
use super::prepared::{Pool, Ready};
use crate::types::store::{After, StoreAnswer, StoreFailure};
use crate::types::{Claim, Generation, HostId, Nonce, Tenure, VmId};
use crate::wire::record::{self, BLOCK};

/// How often a listing is repeated when its highest claim vanished meanwhile (its creator gave way).
const LISTINGS: usize = 3;
/// Claims that are read side by side, at most.
const READERS: usize = 64;
/// A reader of its own for each so many.
const EACH: usize = 16;
/// Claims that are kept whatever their age.
const KEPT: usize = 64;
/// Seconds by which a claim must be older than the newest before it is removed.
const KEPT_SECONDS: i64 = 24 * 3600;
/// Removed at once, at most.
const REMOVED_AT_ONCE: usize = 16;
/// Own claims that are known again without opening them; above it all are forgotten and read again.
const MAX_MINE: usize = 4096;

/// The highest claim of a VM; `claims` is the folder of that name.
pub fn highest(claims: &Folder, vm: VmId) -> Result<Option<Claim>, StoreFailure> {
    let Some(folder) = claims.sub_if_there(&vm_name(vm))? else { return Ok(None) };
    for _ in 0..LISTINGS {
        let Some(generation) = generations(&folder)?.last().copied() else { return Ok(None) };
        if let Some(claim) = read(&folder, Tenure { vm, generation })? {
            return Ok(Some(claim));
        }
    }
    let why = "its claims come and go; look again".to_owned();
    Err(StoreFailure::Io { path: folder.path("").display().to_string(), why })
}

/// The highest claim of each. Many are read side by side: over a network each of the four or five calls for one costs a round trip.
pub fn highest_of(claims: &Folder, vms: &[VmId]) -> Vec<(VmId, Result<Option<Claim>, StoreFailure>)> {
    let look = |vms: &[VmId]| vms.iter().map(|vm| (*vm, highest(claims, *vm))).collect::<Vec<_>>();
    let readers = (vms.len() / EACH).min(READERS);
    if readers < 2 {
        return look(vms);
    }
    std::thread::scope(|scope| {
        let parts = vms.chunks(vms.len().div_ceil(readers));
        let readers: Vec<_> = parts.map(|part| scope.spawn(move || look(part))).collect();
        readers.into_iter().flat_map(|reader| reader.join().expect("reading claims panics nowhere")).collect()
    })
}

/// VMs that have a folder of claims.
pub fn vms(claims: &Folder) -> Result<Vec<VmId>, StoreFailure> {
    let mut found: Vec<VmId> = claims.names()?.iter().filter_map(|name| name.parse().ok()).collect();
    found.sort_unstable();
    Ok(found)
}

/// Generations that exist, rising.
fn generations(folder: &Folder) -> Result<Vec<Generation>, StoreFailure> {
    let names = folder.names()?;
    let mut found: Vec<_> = names.iter().filter_map(|name| generation_of(name)).collect();
    found.sort_unstable();
    Ok(found)
}

/// Only the way in which we write it: `07` is not ours.
fn generation_of(name: &str) -> Option<Generation> {
    name.parse().ok().map(Generation).filter(|generation| generation.to_string() == name)
}

/// One claim; `None` if it does not exist.
fn read(folder: &Folder, tenure: Tenure) -> Result<Option<Claim>, StoreFailure> {
    let name = tenure.generation.to_string();
    let Some(bytes) = folder.read(&name, BLOCK)? else { return Ok(None) };
    let path = folder.path(&name);
    let claim = record::decode_claim(bytes.as_slice()).map_err(|why| bad(&path, &why))?;
    if claim.tenure != tenure {
        let why = format!("contains the claim of {} generation {}", claim.tenure.vm, claim.tenure.generation);
        return Err(StoreFailure::Bad { path: path.display().to_string(), why });
    }
    Ok(Some(claim))
}

/// Creates claims for one host on one datastore.
pub struct Claims {
    me: HostId,
    /// Files to make claims of.
    pub pool: Pool,
    /// Newest claim per VM that this process made, with its file: the predecessor of the next is checked without
    /// opening it, which a server in its grace period would refuse.
    mine: Mutex<BTreeMap<VmId, Mine>>,
}

/// A claim of ours: its mark, and which file it is. A claim is never written again, so the same file is the same claim.
#[derive(Clone, Copy)]
struct Mine {
    generation: Generation,
    nonce: Nonce,
    file: Seen,
}

/// What became of the link.
enum Linked {
    New,
    Taken,
}

impl Claims {
    /// Nothing is prepared yet.
    pub fn new(me: HostId) -> Self {
        Self { me, pool: Pool::new(me), mine: Mutex::default() }
    }

    /// Creates one; see the module's picture. `before_deadline` fails once nobody waits any more: after a write that
    /// hung, nothing is linked. `used` takes names in `tmp` that have to be removed afterwards.
    pub fn create(
        &self,
        root: &Folder,
        claim: &Claim,
        after: Option<After>,
        before_deadline: &dyn Fn() -> Result<(), StoreFailure>,
        used: &mut Vec<String>,
    ) -> Result<StoreAnswer, StoreFailure> {
        let generation = claim.tenure.generation;
        assert!(after.is_none_or(|after| after.generation() < generation), "a claim follows the one of its proof");
        let claims = root.sub(CLAIMS)?;
        let vm_folder = vm_name(claim.tenure.vm);
        let folder = match claims.sub_if_there(&vm_folder)? {
            Some(folder) => folder,
            None => claims.make_sub(&vm_folder)?,
        };
        let name = generation.to_string();
        let block = record::encode_claim(claim).map_err(|why| bad(&folder.path(&name), &why))?;
        match self.link(root, &folder, &name, &block, before_deadline, used)? {
            Linked::New => {
                folder.sync()?;
                self.remember(claim, &folder);
            }
            Linked::Taken => {
                let found = read(&folder, claim.tenure)?;
                let highest = highest(&claims, claim.tenure.vm)?;
                let top = highest.filter(|top| generation < top.tenure.generation);
                match (found, top) {
                    (_, Some(top)) => return Ok(StoreAnswer::Exists(Box::new(top))),
                    (Some(found), None) if is_same(&found, claim) => {}
                    (Some(found), None) => return Ok(StoreAnswer::Exists(Box::new(found))),
                    (None, None) => return Err(vanished(&folder, &name)),
                }
                folder.sync()?;
            }
        }
        // After a datastore was accepted generations make a leap: who did not know of it may have made one in between, or
        // may be the one that comes too late.
        if let Some(other) = apart(&folder, claim, after)? {
            return match other {
                higher if generation < higher => match highest(&claims, claim.tenure.vm)? {
                    Some(highest) => Ok(StoreAnswer::Exists(Box::new(highest))),
                    None => Err(vanished(&folder, &higher.to_string())),
                },
                _ => remove_ours(&folder, claim).map(|()| StoreAnswer::GaveWay),
            };
        }
        match after {
            Some(After::Here(before, nonce)) if !self.stands(&folder, claim.tenure.vm, before, nonce)? => {
                remove_ours(&folder, claim)?;
                Ok(StoreAnswer::GaveWay)
            }
            Some(_) | None => Ok(StoreAnswer::Created),
        }
    }

    /// Writes the block into a file without a name of its own and gives it that name. A file is tried once: whether the
    /// server linked it is not always known, and a claim must never be written again.
    fn link(
        &self,
        root: &Folder,
        folder: &Folder,
        name: &str,
        block: &[u8],
        before_deadline: &dyn Fn() -> Result<(), StoreFailure>,
        used: &mut Vec<String>,
    ) -> Result<Linked, StoreFailure> {
        let tmp = root.sub(TMP)?;
        let link = |ready: &Ready| before_deadline().map(|()| tmp.link(&ready.name, folder, name));
        if let Some(ready) = self.pool.take() {
            used.push(ready.name.clone());
            match fill(&tmp, &ready, block) {
                Ok(()) => match link(&ready)? {
                    // Somebody removed the file's own name; a new one is made below.
                    Err(Errno::ENOENT) => {}
                    result => return linked(result, folder, name),
                },
                // Files of a mount that is gone: none of them is any good.
                Err(_) => used.extend(self.pool.take_all().into_iter().map(|ready| ready.name)),
            }
        }
        let ready = Ready::make(&tmp, self.me)?;
        used.push(ready.name.clone());
        fill(&tmp, &ready, block)?;
        linked(link(&ready)?, folder, name)
    }

    fn remember(&self, claim: &Claim, folder: &Folder) {
        // Not seen means read again next time, nothing worse.
        let Ok(Some(file)) = folder.look(&claim.tenure.generation.to_string()) else { return };
        let mut mine = self.mine.lock().unwrap_or_else(PoisonError::into_inner);
        if MAX_MINE <= mine.len() {
            mine.clear();
        }
        mine.insert(claim.tenure.vm, Mine { generation: claim.tenure.generation, nonce: claim.nonce, file });
    }

    /// Whether claim (v, g) is there and carries this nonce.
    fn stands(&self, folder: &Folder, vm: VmId, generation: Generation, nonce: Nonce) -> Result<bool, StoreFailure> {
        let mine = self.mine.lock().unwrap_or_else(PoisonError::into_inner).get(&vm).copied();
        if let Some(mine) = mine.filter(|mine| mine.generation == generation && mine.nonce == nonce)
            && folder.look(&generation.to_string())? == Some(mine.file)
        {
            return Ok(true);
        }
        Ok(read(folder, Tenure { vm, generation })?.is_some_and(|claim| claim.nonce == nonce))
    }
}

fn fill(tmp: &Folder, ready: &Ready, block: &[u8]) -> Result<(), StoreFailure> {
    let path = tmp.path(&ready.name);
    write_at(&ready.file, &path, 0, block)?;
    ready.file.sync_all().map_err(|error| failure(&path, &error))
}

fn linked(result: Result<(), Errno>, folder: &Folder, name: &str) -> Result<Linked, StoreFailure> {
    match result {
        Ok(()) => Ok(Linked::New),
        Err(Errno::EEXIST) => Ok(Linked::Taken),
        Err(errno) => Err(failure(folder.path(name), &errno.into())),
    }
}

/// Whether `found` is the claim that we tried to create: our lost reply had succeeded.
fn is_same(found: &Claim, wanted: &Claim) -> bool {
    found.nonce == wanted.nonce && found.holder == wanted.holder && found.wanted == wanted.wanted
}

/// A claim above ours, or between ours and the one that it follows.
fn apart(folder: &Folder, claim: &Claim, after: Option<After>) -> Result<Option<Generation>, StoreFailure> {
    let ours = claim.tenure.generation;
    let before = after.map(After::generation);
    let all = generations(folder)?;
    let between = |other: &Generation| before.is_some_and(|before| before < *other && *other < ours);
    Ok(all.into_iter().rev().find(|other| ours < *other || between(other)))
}

fn remove_ours(folder: &Folder, claim: &Claim) -> Result<(), StoreFailure> {
    match read(folder, claim.tenure)? {
        Some(found) if is_same(&found, claim) => {
            folder.remove(&claim.tenure.generation.to_string())?;
            folder.sync()
        }
        Some(_) | None => Ok(()),
    }
}

fn vanished(folder: &Folder, name: &str) -> StoreFailure {
    let why = "existed and is gone: its creator gave way; look again".to_owned();
    StoreFailure::Io { path: folder.path(name).display().to_string(), why }
}

/// Removes old claims of a VM; see the module's rule. To be called by whoever has just created one.
pub fn prune(claims: &Folder, vm: VmId) -> Result<(), StoreFailure> {
    let Some(folder) = claims.sub_if_there(&vm_name(vm))? else { return Ok(()) };
    let all = generations(&folder)?;
    let old = &all[..all.len().saturating_sub(KEPT)];
    let Some(newest) = all.last() else { return Ok(()) };
    let Some(newest) = folder.look(&newest.to_string())? else { return Ok(()) };
    for generation in old.iter().filter(|generation| generation.0 != 1).take(REMOVED_AT_ONCE) {
        let name = generation.to_string();
        // In rising order, and never past one that stays: whoever finds claim g may count on all above it.
        match folder.look(&name)? {
            Some(old) if old.written_at.0 + KEPT_SECONDS < newest.written_at.0 => folder.remove(&name)?,
            Some(_) => break,
            None => {}
        }
    }
    Ok(())
}
