//! Records of VMs: `vms/<vm>/record.<digest>`, whole or not at all, and the paths that a VM needs.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::claims;
use super::files::{CLAIMS, Folder, TMP, VMS, bad, failure, read_at, record_name, tmp_name, vm_name, write_at};
use crate::types::store::StoreFailure;
use crate::types::{Digest, HostId, VmId, VmRecord};
use crate::wire::record::{self, BLOCK, MAX_RECORD};

/// Newest records that are kept beside the one that the newest claim names.
const KEPT: usize = 3;
/// Removed at once, at most.
const REMOVED_AT_ONCE: usize = 16;

/// Writes a record durably; the same record again is no change.
pub fn write(root: &Folder, found: &VmRecord, me: HostId) -> Result<Digest, StoreFailure> {
    let folder = root.sub(VMS)?.make_sub(&vm_name(found.vm))?;
    let bytes = record::encode_record(found).map_err(|why| bad(&folder.path("record"), &why))?;
    let digest = record::digest(&bytes);
    let name = record_name(digest);
    if folder.read(&name, MAX_RECORD)?.is_some_and(|there| there.as_slice() == bytes) {
        folder.sync()?;
        return Ok(digest);
    }
    let (tmp, tmp_name) = (root.sub(TMP)?, tmp_name("record", me));
    let file = tmp.create(&tmp_name)?;
    let path = tmp.path(&tmp_name);
    let moved = write_at(&file, &path, 0, &bytes)
        .and_then(|()| file.sync_all().map_err(|error| failure(&path, &error)))
        .and_then(|()| tmp.rename(&tmp_name, &folder, &name))
        .and_then(|()| folder.sync());
    if moved.is_err() {
        let _ = tmp.remove(&tmp_name);
    }
    moved.map(|()| digest)
}

/// Reads the record of that digest.
pub fn read(root: &Folder, vm: VmId, digest: Digest) -> Result<VmRecord, StoreFailure> {
    let name = record_name(digest);
    let vms = root.sub(VMS)?;
    let path = vms.path(&vm_name(vm)).join(&name);
    let missing = || StoreFailure::Missing {
        path: path.display().to_string(),
        why: "does not exist; write the VM's record anew on a host that has its definition".to_owned(),
    };
    let folder = vms.sub_if_there(&vm_name(vm))?.ok_or_else(missing)?;
    let bytes = folder.read(&name, MAX_RECORD)?.ok_or_else(missing)?;
    let found = record::decode_record(bytes.as_slice()).map_err(|why| bad(&path, &why))?;
    if record::digest(bytes.as_slice()) != digest || found.vm != vm {
        let why = "is not the record that its name says".to_owned();
        return Err(StoreFailure::Bad { path: path.display().to_string(), why });
    }
    Ok(found)
}

/// Removes old records of a VM, after a claim was created: neither the one that the newest claim names nor the newest 3.
pub fn prune(root: &Folder, vm: VmId) -> Result<(), StoreFailure> {
    let Some(named) = claims::highest(&root.sub(CLAIMS)?, vm)?.map(|claim| claim.record) else { return Ok(()) };
    let Some(folder) = root.sub(VMS)?.sub_if_there(&vm_name(vm))? else { return Ok(()) };
    let mut records = Vec::new();
    for name in folder.names()?.into_iter().filter(|name| name.starts_with("record.")) {
        if let Some(seen) = folder.look(&name)? {
            records.push((seen.written_at, name));
        }
    }
    records.sort_unstable();
    let old = &records[..records.len().saturating_sub(KEPT)];
    let old = old.iter().filter(|(_, name)| *name != record_name(named));
    old.take(REMOVED_AT_ONCE).try_for_each(|(_, name)| folder.remove(name))
}

/// Reads the first block of each path directly; those that fail, with the reason.
pub fn probe(paths: &[String]) -> Vec<(String, String)> {
    let failed = paths.iter().filter_map(|path| probe_one(Path::new(path)).err().map(|why| (path.clone(), why)));
    failed.map(|(path, why)| (path, why.to_string())).collect()
}

fn probe_one(path: &Path) -> Result<(), StoreFailure> {
    let open = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(path);
    let file = open.map_err(|error| failure(path, &error))?;
    read_at(&file, path, 0, BLOCK).map(|_| ())
}
