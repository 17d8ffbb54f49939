//! The roster on a datastore: block `members`, and `members.<generation>` created exclusively.
//!
//! ```text
//!   create members.8 exclusively ──► write block `members` := 8
//!            (taken: somebody else changed it first)
//!   whoever sees a file newer than the block writes its content into the block
//! ```
//!
//! The block is what a direct read shows at once, whatever a client's caches of names say; the files make a change
//! exclusive. A late write of an older block is mended by the next reader.

use std::fs::File;
use std::path::Path;

use nix::fcntl::OFlag;

use super::beats::SLOTS_FILE;
use super::files::{
    CLAIMS, Folder, HOSTS, MEMBERS, TMP, VMS, bad, beats_name, failure, identity, list_name, members_name, read_at,
    tmp_name, write_at,
};
use crate::types::store::StoreFailure;
use crate::types::{ClusterId, DatastoreId, HostId, Roster};
use crate::wire::record::{self, BLOCK, LIST_AREA};

/// The roster, and whether the block has to be mended with it.
pub struct Found {
    /// The newest.
    pub roster: Roster,
    /// The block shows an older one.
    pub block_is_old: bool,
}

/// Reads the newest roster: the block, or a newer file.
pub fn read(root: &Folder, cluster: ClusterId) -> Result<Found, StoreFailure> {
    read_with(root, cluster, None)
}

/// The same, the block through a descriptor that is kept open, if its name still leads there: a server in its grace
/// period refuses to open, and the leases of a whole cluster must not end for that.
pub fn read_with(root: &Folder, cluster: ClusterId, kept: Option<&File>) -> Result<Found, StoreFailure> {
    let found = find(root, cluster, kept)?;
    found.ok_or_else(|| failure(root.path(MEMBERS), &nix::errno::Errno::ENOENT.into()))
}

fn find(root: &Folder, cluster: ClusterId, kept: Option<&File>) -> Result<Option<Found>, StoreFailure> {
    let block = match kept {
        Some(kept) => read_kept(root, cluster, kept),
        None => read_one(root, MEMBERS, cluster),
    };
    let newest = root.names()?.iter().filter_map(|name| generation_of(name)).max();
    let Some(newest) = newest else {
        return Ok(block?.map(|roster| Found { roster, block_is_old: false }));
    };
    let shown = match &block {
        Ok(roster) => roster.as_ref().map_or(0, |roster| roster.generation),
        // Torn by a writer that died: the file mends it.
        Err(StoreFailure::Bad { .. }) => 0,
        Err(failure) => return Err(failure.clone()),
    };
    if shown < newest
        && let Some(roster) = read_one(root, &members_name(newest), cluster)?
    {
        return Ok(Some(Found { roster, block_is_old: true }));
    }
    Ok(block?.map(|roster| Found { roster, block_is_old: false }))
}

fn generation_of(name: &str) -> Option<u64> {
    name.strip_prefix(MEMBERS)?.strip_prefix('.')?.parse().ok()
}

fn read_one(root: &Folder, name: &str, cluster: ClusterId) -> Result<Option<Roster>, StoreFailure> {
    let Some(bytes) = root.read(name, BLOCK)? else { return Ok(None) };
    parse(root, name, cluster, bytes.as_slice()).map(Some)
}

fn read_kept(root: &Folder, cluster: ClusterId, kept: &File) -> Result<Option<Roster>, StoreFailure> {
    let path = root.path(MEMBERS);
    if root.look(MEMBERS)?.map(|seen| seen.identity) != Some(identity(kept, &path)?) {
        return read_one(root, MEMBERS, cluster);
    }
    parse(root, MEMBERS, cluster, read_at(kept, &path, 0, BLOCK)?.as_slice()).map(Some)
}

fn parse(root: &Folder, name: &str, cluster: ClusterId, bytes: &[u8]) -> Result<Roster, StoreFailure> {
    let path = root.path(name);
    let roster = record::decode_roster(bytes).map_err(|why| bad(&path, &why))?;
    if roster.cluster != cluster {
        let why = format!("belongs to cluster {}, not to {cluster}", roster.cluster);
        return Err(StoreFailure::Bad { path: path.display().to_string(), why });
    }
    if generation_of(name).is_some_and(|generation| generation != roster.generation) {
        let why = format!("contains generation {}", roster.generation);
        return Err(StoreFailure::Bad { path: path.display().to_string(), why });
    }
    Ok(roster)
}

/// Refuses a folder that is another datastore's: the wrong export is mounted here.
pub fn check_datastore(root: &Folder, roster: &Roster, id: DatastoreId) -> Result<(), StoreFailure> {
    if roster.datastore == id {
        return Ok(());
    }
    let why = format!("belongs to datastore {}, not to {id}; mount the right one here", roster.datastore);
    Err(StoreFailure::Bad { path: root.path(MEMBERS).display().to_string(), why })
}

/// Writes the block. Only a roster whose file exists.
pub fn write_block(root: &Folder, roster: &Roster) -> Result<(), StoreFailure> {
    let path = root.path(MEMBERS);
    let bytes = record::encode_roster(roster).map_err(|why| bad(&path, &why))?;
    let file = root.file(MEMBERS, OFlag::O_WRONLY | OFlag::O_DSYNC)?;
    let file = file.ok_or_else(|| failure(&path, &nix::errno::Errno::ENOENT.into()))?;
    write_at(&file, &path, 0, &bytes)
}

/// Changes the roster. The new members' files are made first: a member's file is there before its name is.
///
/// # Errors
/// `Bad` if somebody else made that generation, or it does not follow the present one.
pub fn change(root: &Folder, roster: &Roster, me: HostId) -> Result<(), StoreFailure> {
    let present = read(root, roster.cluster)?.roster;
    let name = members_name(roster.generation);
    let refuse = |why: String| Err(StoreFailure::Bad { path: root.path(&name).display().to_string(), why });
    if present.datastore != roster.datastore {
        return check_datastore(root, &present, roster.datastore);
    }
    if present == *roster {
        return write_block(root, roster);
    }
    if roster.generation != present.generation + 1 {
        return refuse(format!("the roster is at generation {}; read it and change that one", present.generation));
    }
    let bytes = record::encode_roster(roster).map_err(|why| bad(&root.path(&name), &why))?;
    let tmp = root.sub(TMP)?;
    make_host_files(root, &tmp, roster, me)?;
    if !root.create_whole(&tmp, &tmp_name("roster", me), &name, &bytes)?
        && read_one(root, &name, roster.cluster)?.as_ref() != Some(roster)
    {
        return refuse("somebody else changed the roster at the same time; read it and try again".to_owned());
    }
    write_block(root, roster)
}

/// Makes folders, the first roster if there is none, and the files of its members. Done again, it changes nothing.
///
/// To be called once per datastore, by the host on which it is added: on a host where the datastore is not mounted it
/// would make folders on the local disk.
pub fn prepare(mount: &Path, roster: &Roster, me: HostId) -> Result<(), StoreFailure> {
    let root = Folder::open(mount)?.make_sub(".mainstay")?.make_sub(&roster.cluster.to_string())?;
    for name in [HOSTS, CLAIMS, VMS] {
        root.make_sub(name)?;
    }
    let tmp = root.make_sub(TMP)?;
    let found = match find(&root, roster.cluster, None)? {
        Some(found) => found.roster,
        None => {
            let name = members_name(roster.generation);
            let bytes = record::encode_roster(roster).map_err(|why| bad(&root.path(&name), &why))?;
            root.create_whole(&tmp, &tmp_name("roster", me), &name, &bytes)?;
            read_one(&root, &name, roster.cluster)?.ok_or_else(|| StoreFailure::Missing {
                path: root.path(&name).display().to_string(),
                why: "was made and is gone again".to_owned(),
            })?
        }
    };
    check_datastore(&root, &found, roster.datastore)?;
    make_host_files(&root, &tmp, &found, me)?;
    let bytes = record::encode_roster(&found).map_err(|why| bad(&root.path(MEMBERS), &why))?;
    root.create_whole(&tmp, &tmp_name("roster", me), MEMBERS, &bytes)?;
    Ok(())
}

/// Files of every member, all zeros. What is there already is never touched.
fn make_host_files(root: &Folder, tmp: &Folder, roster: &Roster, me: HostId) -> Result<(), StoreFailure> {
    let hosts = root.sub(HOSTS)?;
    for member in &roster.members {
        make_host_file(&hosts, tmp, "roster", me, &beats_name(member.host), SLOTS_FILE)?;
        make_host_file(&hosts, tmp, "roster", me, &list_name(member.host), 2 * LIST_AREA)?;
    }
    hosts.sync()
}

/// One file of zeros in `hosts/`, allocated now so that a full disk cannot stop a beat later.
pub fn make_host_file(
    hosts: &Folder,
    tmp: &Folder,
    what: &str,
    me: HostId,
    name: &str,
    len: usize,
) -> Result<(), StoreFailure> {
    if hosts.look(name)?.is_none() {
        hosts.create_whole(tmp, &tmp_name(what, me), name, &vec![0; len])?;
    }
    Ok(())
}
