//! Recordings on disk: STATE/verdicts/ID.verdict, for root only, written whole or not at all, within limits.
//!
//! Limits: `MAX_FILES` and `MAX_BYTES`, the oldest go first; nothing is written when less than `ROOM` would be left on the disk, on
//! which the guard's state lies, too. At most `WAITING` recordings wait for the disk; a further one is given up, and that is logged.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::SystemTime;

use nix::sys::statvfs::statvfs;

use super::{Recording, Sink, file};

/// Files that are kept.
const MAX_FILES: usize = 50;
/// Bytes that they may have together.
const MAX_BYTES: u64 = 256 << 20;
/// Bytes that stay free on the disk.
const ROOM: u64 = 512 << 20;
/// Recordings that may wait for the disk.
const WAITING: usize = 2;
/// End of their names.
const END: &str = ".verdict";
/// Beginning of the name of one that is being written.
const NEW: &str = ".new-";

/// Where the recording of this id lies, if it was written.
#[must_use]
pub fn path(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}{END}"))
}

/// A thread that writes what it is given into this folder.
#[must_use]
pub fn open(folder: PathBuf) -> Sink {
    let (sender, receiver) = mpsc::sync_channel::<Recording>(WAITING);
    let keep_all = move || {
        for recording in receiver {
            match keep(&folder, &recording) {
                Ok(path) => tracing::info!("what led to verdict {} is kept in {}", recording.id, path.display()),
                Err(error) => {
                    let (id, folder) = (&recording.id, folder.display());
                    tracing::warn!("what led to verdict {id} is not kept in {folder}: {error}");
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("verdicts".into()).spawn(keep_all) {
        tracing::warn!("what leads to verdicts is not kept: no thread: {error}");
    }
    Box::new(move |recording| {
        if sender.try_send(recording).is_err() {
            tracing::warn!("what led to a verdict is not kept: the disk is too slow");
        }
    })
}

/// Writes one.
///
/// # Errors
/// The disk's reason; then nothing of it is there, but older ones may have gone.
pub fn keep(folder: &Path, recording: &Recording) -> io::Result<PathBuf> {
    let bytes = file::encode(recording).map_err(io::Error::other)?;
    if !folder.is_dir() {
        DirBuilder::new().mode(0o700).recursive(true).create(folder)?;
    }
    make_place(folder, bytes.len() as u64)?;
    let disk = statvfs(folder)?;
    #[allow(clippy::useless_conversion)] // Not everywhere 64 bits.
    let free = u64::from(disk.blocks_available()).saturating_mul(u64::from(disk.fragment_size()));
    if free < ROOM + bytes.len() as u64 {
        return Err(io::Error::new(io::ErrorKind::StorageFull, format!("{} MiB are free there", free >> 20)));
    }
    let new = folder.join(format!("{NEW}{}", recording.id));
    let mut open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    open.write_all(&bytes)?;
    open.sync_all()?;
    let place = path(folder, &recording.id);
    fs::rename(&new, &place)?;
    File::open(folder)?.sync_all()?;
    Ok(place)
}

/// Takes away what is left of a crash, and the oldest until one more of this size has a place.
fn make_place(folder: &Path, bytes: u64) -> io::Result<()> {
    let mut kept: Vec<(SystemTime, PathBuf, u64)> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let metadata = entry.metadata()?;
        if name.starts_with(NEW) {
            fs::remove_file(entry.path())?;
        } else if name.ends_with(END) && metadata.is_file() {
            kept.push((metadata.modified()?, entry.path(), metadata.len()));
        }
    }
    kept.sort();
    let mut total = bytes + kept.iter().map(|(_, _, size)| size).sum::<u64>();
    for (at, (_, path, size)) in kept.iter().enumerate() {
        if total <= MAX_BYTES && kept.len() - at < MAX_FILES {
            break;
        }
        fs::remove_file(path)?;
        total -= size;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use super::*;
    use crate::exec::recorder::Segment;
    use crate::exec::scratch::Scratch;
    use crate::types::Time;

    fn recording(id: &str) -> Recording {
        let segments = vec![Arc::new(Segment { core: vec![1], steps: vec![2; 10], count: 1 })];
        Recording { id: id.into(), host: "a".into(), clocks: (Time(1), 2), segments }
    }

    #[test]
    fn kept_for_root_only_and_the_oldest_go() {
        let scratch = Scratch::new();
        let folder = scratch.path().join("verdicts");
        let first = keep(&folder, &recording("a-0")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&first)), (0o700, 0o600));
        assert_eq!(file::decode(&fs::read(&first).unwrap(), false).unwrap(), recording("a-0"));
        fs::write(folder.join(".new-a-7"), "of a crash").unwrap();
        for n in 1..=MAX_FILES {
            keep(&folder, &recording(&format!("a-{n}"))).unwrap();
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), MAX_FILES);
        assert!(!folder.join(".new-a-7").exists());
    }
}
