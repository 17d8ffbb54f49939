//! Failures of guests on disk: written whole or not at all, within limits, read by people through the agent.
//!
//! ```text
//!   STATE/failures/          0700
//!     VM's UUID/
//!       .new-…/              being written; left behind only by a crash, and taken away by the next
//!       7/                   renamed from there when everything in it is on the disk
//!         failure.json       types::failure::Failure
//!         screen.txt …       types::failure::FailureFile, those that were kept
//!         memory.dump        its memory, if that was wanted (`dumps`)
//! ```
//!
//! Limits: `MAX_FAILURES` and `MAX_BYTES` (without dumps) for each VM, the oldest go first; `MAX_VMS` VMs, the one that failed longest ago goes;
//! nothing is written when less than `ROOM` would be left on the disk, on which the guard's state lies, too. Names are ours:
//! numbers and `FailureFile`s.
//!
//! Everything blocks: call it on a thread of your own. Not here: what is kept (`exec::evidence`), who may read it (`api`).

mod dumps;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::statvfs::statvfs;

pub use self::dumps::NewDump;
use crate::types::VmId;
use crate::types::failure::{Failure, FailureFile, KeptFile, MAX_PIECE, Piece};

/// Failures that are kept of one VM.
pub const MAX_FAILURES: usize = 20;
/// Bytes that they may have together.
pub const MAX_BYTES: u64 = 64 * 1024 * 1024;
/// VMs whose failures are kept.
pub const MAX_VMS: usize = 256;
/// Bytes that stay free on the disk.
const ROOM: u64 = 512 * 1024 * 1024;
/// The record.
const RECORD: &str = "failure.json";
/// Longest record that is read.
const MAX_RECORD: u64 = 256 * 1024;
/// Beginning of the name of a failure that is being written.
const NEW: &str = ".new-";

/// What was not done, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {why}", .path.display())]
pub struct FailuresError {
    what: &'static str,
    path: PathBuf,
    why: io::Error,
}

/// Makes an error of this path.
fn at<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> FailuresError + 'a {
    move |why| FailuresError { what, path: path.to_owned(), why }
}

/// The folder. One value writes to it.
#[derive(Debug)]
pub struct Failures {
    folder: PathBuf,
    /// Numbers are given and limits kept by one thread at a time.
    writing: Mutex<()>,
    /// A dump is being written.
    dumping: Arc<AtomicBool>,
    room: u64,
}

impl Failures {
    /// The same, and what a crash has left of dumps goes. On another thread: the disk may be slow.
    #[must_use]
    pub fn open(folder: PathBuf) -> Self {
        let (this, crashed) = (Self::new(folder.clone()), Self::new(folder));
        this.dumping.store(true, Ordering::Release); // None is begun before that.
        let dumping = Arc::clone(&this.dumping);
        let tidy = move || {
            crashed.tidy();
            dumping.store(false, Ordering::Release);
        };
        if let Err(error) = std::thread::Builder::new().name("tidy".into()).spawn(tidy) {
            tracing::warn!("no memory of guests is kept: no thread: {error}");
        }
        this
    }

    /// In this folder, which is made when there is something to keep.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, writing: Mutex::new(()), dumping: Arc::default(), room: ROOM }
    }

    /// Keeps one; its number and files are filled in.
    ///
    /// # Errors
    /// Too little room, or the disk's reason; then nothing of it is there, but older ones may have gone.
    pub fn keep(&self, mut failure: Failure, files: &[(FailureFile, Vec<u8>)]) -> Result<u32, FailuresError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        make(&self.folder)?;
        self.check_room()?;
        let home = self.folder.join(failure.vm.to_string());
        make(&home)?;
        let numbers = numbers(&home)?;
        failure.number = numbers.last().map_or(1, |last| last.saturating_add(1));
        failure.files = files.iter().map(|(file, bytes)| KeptFile { file: *file, bytes: bytes.len() as u64 }).collect();
        make_place(&home, &numbers, files.iter().map(|(_, bytes)| bytes.len() as u64).sum())?;
        let new = home.join(format!("{NEW}{}", failure.number));
        DirBuilder::new().mode(0o700).create(&new).map_err(at("cannot make", &new))?;
        for (file, bytes) in files {
            write(&new.join(file.name()), bytes)?;
        }
        write(&new.join(RECORD), &record(&failure))?;
        sync(&new)?;
        let place = home.join(failure.number.to_string());
        fs::rename(&new, &place).map_err(at("cannot make", &place))?;
        sync(&home)?;
        self.forget_old_vms(&home)?;
        Ok(failure.number)
    }

    /// What became of its remedy. One that is gone meanwhile stays gone.
    ///
    /// # Errors
    /// When the disk fails; the record is then as it was.
    pub fn set_outcome(&self, vm: VmId, number: u32, outcome: &str) -> Result<(), FailuresError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.change(vm, number, |failure| outcome.clone_into(&mut failure.outcome))
    }

    /// Writes another record in the place of a failure's. Whoever calls holds the lock.
    fn change(&self, vm: VmId, number: u32, change: impl FnOnce(&mut Failure)) -> Result<(), FailuresError> {
        let place = self.place(vm, number);
        let Some(mut failure) = read(&place) else { return Ok(()) };
        change(&mut failure);
        let new = place.join(format!("{NEW}{RECORD}"));
        let _ = fs::remove_file(&new); // Of a crash.
        write(&new, &record(&failure))?;
        fs::rename(&new, place.join(RECORD)).map_err(at("cannot replace the record in", &place))?;
        sync(&place)
    }

    /// Those of a VM, oldest first. What cannot be read is left out.
    #[must_use]
    pub fn list(&self, vm: VmId) -> Vec<Failure> {
        let home = self.folder.join(vm.to_string());
        numbers(&home)
            .unwrap_or_default()
            .into_iter()
            .filter_map(|number| read(&home.join(number.to_string())))
            .collect()
    }

    /// A part of a file; empty at its end.
    ///
    /// # Errors
    /// When it is not there, or cannot be read.
    pub fn piece(&self, vm: VmId, number: u32, file: FailureFile, from: u64) -> Result<Piece, FailuresError> {
        let path = self.place(vm, number).join(file.name());
        let open = open(&path).map_err(at("cannot read", &path))?;
        let total = open.metadata().map_err(at("cannot read", &path))?.len();
        let left = usize::try_from(total.saturating_sub(from)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(MAX_PIECE)];
        open.read_exact_at(&mut bytes, from).map_err(at("cannot read", &path))?;
        Ok(Piece { bytes, total })
    }

    fn place(&self, vm: VmId, number: u32) -> PathBuf {
        self.folder.join(vm.to_string()).join(number.to_string())
    }

    /// Bytes that may be written before only `room` is left.
    fn check_room(&self) -> Result<u64, FailuresError> {
        let error = at("nothing is kept in", &self.folder);
        let disk = statvfs(&self.folder).map_err(|why| error(why.into()))?;
        #[allow(clippy::useless_conversion)] // Not everywhere 64 bits.
        let free = u64::from(disk.blocks_available()).saturating_mul(u64::from(disk.fragment_size()));
        free.checked_sub(self.room).ok_or_else(|| {
            let why = format!("{} MiB are free there, fewer than {}", free >> 20, self.room >> 20);
            error(io::Error::new(io::ErrorKind::StorageFull, why))
        })
    }

    /// The VMs that failed longest ago go when there are too many; the one that just failed stays.
    fn forget_old_vms(&self, newest: &Path) -> Result<(), FailuresError> {
        let error = at("cannot list", &self.folder);
        let mut homes = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(&error)? {
            let path = entry.map_err(&error)?.path();
            if path != newest {
                let changed =
                    path.metadata().and_then(|metadata| metadata.modified()).map_err(at("cannot read", &path))?;
                homes.push((changed, path));
            }
        }
        homes.sort();
        let too_many = (homes.len() + 1).saturating_sub(MAX_VMS);
        homes.iter().take(too_many).try_for_each(|(_, path)| remove(path))
    }
}

/// Takes away what is left of a crash, and the oldest until one more of this size has a place.
fn make_place(home: &Path, numbers: &[u32], bytes: u64) -> Result<(), FailuresError> {
    let error = at("cannot list", home);
    for entry in fs::read_dir(home).map_err(&error)? {
        let entry = entry.map_err(&error)?;
        if entry.file_name().to_string_lossy().starts_with(NEW) {
            remove(&entry.path())?;
        }
    }
    let places: Vec<(PathBuf, u64)> = numbers
        .iter()
        .map(|number| home.join(number.to_string()))
        .map(|place| size(&place).map(|size| (place, size)))
        .collect::<Result<_, _>>()?;
    let mut total: u64 = bytes + places.iter().map(|(_, size)| size).sum::<u64>();
    for (at, (place, size)) in places.iter().enumerate() {
        if total <= MAX_BYTES && places.len() - at < MAX_FAILURES {
            break;
        }
        remove(place)?;
        total -= size;
    }
    Ok(())
}

/// In rising order; other names are not ours.
fn numbers(home: &Path) -> Result<Vec<u32>, FailuresError> {
    let error = at("cannot list", home);
    let mut numbers = Vec::new();
    for entry in fs::read_dir(home).map_err(&error)? {
        let name = entry.map_err(&error)?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Without its dump, which has a limit of its own, and which may be on its way there.
fn size(place: &Path) -> Result<u64, FailuresError> {
    let error = at("cannot list", place);
    let mut size = 0;
    for entry in fs::read_dir(place).map_err(&error)? {
        let entry = entry.map_err(&error)?;
        if !dumps::is_dump(&entry.file_name()) {
            size += entry.metadata().map_err(&error)?.len();
        }
    }
    Ok(size)
}

fn read(place: &Path) -> Option<Failure> {
    let file = open(&place.join(RECORD)).ok()?;
    let length = file.metadata().ok()?.len();
    let mut bytes = vec![0; usize::try_from(length).ok().filter(|_| length <= MAX_RECORD)?];
    file.read_exact_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn record(failure: &Failure) -> Vec<u8> {
    serde_json::to_vec_pretty(failure).expect("plain data with text keys can be written as JSON")
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), FailuresError> {
    let error = at("cannot write", path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(&error)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(&error)
}

fn make(folder: &Path) -> Result<(), FailuresError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at("cannot make", folder))
}

fn sync(folder: &Path) -> Result<(), FailuresError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at("cannot sync", folder))
}

fn remove(folder: &Path) -> Result<(), FailuresError> {
    fs::remove_dir_all(folder).map_err(at("cannot remove", folder))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::types::failure::{Class, FailureKind, Family, MemoryDump};
    use crate::types::guests::Remedy;

    const WEB: VmId = VmId(uuid::Uuid::from_u128(1));

    pub(super) fn failure(vm: VmId) -> Failure {
        let line = "Kernel panic - not syncing: x".to_owned();
        Failure {
            number: 0,
            vm,
            name: "web".to_owned(),
            host: "a".to_owned(),
            unix_ms: 1,
            class: Class { family: Family::Linux, kind: FailureKind::Panic, line },
            cause: "app/db: no answer".to_owned(),
            system: String::new(),
            remedy: Remedy::Reset,
            outcome: String::new(),
            waited_ms: 12,
            files: Vec::new(),
            missing: Vec::new(),
            dump: MemoryDump::NotWanted,
        }
    }

    fn kept(failures: &Failures, vm: VmId) -> Vec<u32> {
        failures.list(vm).iter().map(|failure| failure.number).collect()
    }

    pub(super) fn of_size(bytes: usize) -> [(FailureFile, Vec<u8>); 1] {
        [(FailureFile::Picture, vec![7; bytes])]
    }

    #[test]
    fn what_is_kept_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures::new(folder.path().join("failures"));
        assert_eq!(failures.list(WEB), []);
        let long = vec![b'x'; MAX_PIECE + 10];
        let files = [(FailureFile::Screen, b"panic\n".to_vec()), (FailureFile::Console, long.clone())];
        assert_eq!(failures.keep(failure(WEB), &files).unwrap(), 1);
        failures.set_outcome(WEB, 1, "done").unwrap();
        failures.set_outcome(WEB, 2, "done").unwrap();
        let list = failures.list(WEB);
        let bytes: Vec<u64> = list[0].files.iter().map(|file| file.bytes).collect();
        assert_eq!((list.len(), list[0].outcome.as_str(), bytes), (1, "done", vec![6, MAX_PIECE as u64 + 10]));
        let piece = |file, from| failures.piece(WEB, 1, file, from).map(|piece| (piece.bytes.len(), piece.total));
        assert_eq!(piece(FailureFile::Console, 0).unwrap(), (MAX_PIECE, long.len() as u64));
        assert_eq!(piece(FailureFile::Console, MAX_PIECE as u64).unwrap(), (10, long.len() as u64));
        assert_eq!(piece(FailureFile::Console, u64::MAX).unwrap(), (0, long.len() as u64));
        let missing = piece(FailureFile::Picture, 0).unwrap_err().to_string();
        assert!(missing.starts_with("cannot read /") && missing.contains("screen.png: No such file"), "{missing}");
        for (path, mode) in [("", 0o700), ("1", 0o700), ("1/failure.json", 0o600), ("1/screen.txt", 0o600)] {
            let path = folder.path().join("failures").join(WEB.to_string()).join(path);
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, mode, "{}", path.display());
        }
    }

    #[test]
    fn the_oldest_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures::new(folder.path().to_owned());
        for _ in 0..MAX_FAILURES + 5 {
            failures.keep(failure(WEB), &of_size(10)).unwrap();
        }
        let expected: Vec<u32> = (6..=25).collect();
        assert_eq!(kept(&failures, WEB), expected);
        let half = usize::try_from(MAX_BYTES / 2).unwrap() - 100_000;
        for n in 26..=28 {
            assert_eq!(failures.keep(failure(WEB), &of_size(half)).unwrap(), n);
        }
        assert_eq!(kept(&failures, WEB), [27, 28], "two of them have a place");
    }

    #[test]
    fn vms_that_failed_long_ago_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures::new(folder.path().to_owned());
        for n in 0..MAX_VMS as u128 + 2 {
            failures.keep(failure(VmId(uuid::Uuid::from_u128(n))), &[]).unwrap();
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), MAX_VMS);
        assert_eq!(kept(&failures, VmId(uuid::Uuid::from_u128(MAX_VMS as u128 + 1))), [1]);
    }

    #[test]
    fn what_a_crash_left_and_what_is_not_ours_does_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures::new(folder.path().to_owned());
        let home = folder.path().join(WEB.to_string());
        for name in [".new-1", "7", "8", "notes"] {
            fs::create_dir_all(home.join(name)).unwrap();
        }
        fs::write(home.join(".new-1/screen.txt"), "half").unwrap();
        fs::write(home.join("7/failure.json"), "{").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", home.join("8/screen.txt")).unwrap();
        assert_eq!(failures.list(WEB), []);
        assert!(failures.piece(WEB, 8, FailureFile::Screen, 0).is_err(), "a link is not followed");
        assert_eq!(failures.keep(failure(WEB), &[]).unwrap(), 9);
        assert!(!home.join(".new-1").exists() && home.join("notes").exists());
    }

    #[test]
    fn a_full_disk_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures { room: u64::MAX, ..Failures::new(folder.path().to_owned()) };
        let why = failures.keep(failure(WEB), &of_size(10)).unwrap_err().to_string();
        assert!(why.starts_with("nothing is kept in /") && why.contains("MiB are free there, fewer than"), "{why}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
