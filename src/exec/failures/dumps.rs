//! Dumps of guests' memory, each in the folder of its failure: whole or not at all, and never so many that the disk is full.
//!
//! ```text
//!   begin_dump ──► .new-memory/pipe (who writes it), .new-memory.dump (what came) ── keep ──► memory.dump, the record says so
//!                                                        └─ dropped ──► both are taken away; after a crash, by `tidy`
//! ```
//!
//! Limits: one is written at a time; one is kept of each VM; all together have as many bytes as the policy says, the oldest go
//! (their failures stay); `ROOM` stays free on the disk.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::{Failures, FailuresError, at, numbers, sync};
use crate::types::VmId;
use crate::types::failure::MemoryDump;

/// A whole one.
const DUMP: &str = "memory.dump";
/// One that is being written, and the folder of the pipe through which it comes.
const NEW: &str = ".new-memory.dump";
const COMES: &str = ".new-memory";

/// A dump that is being written. What is not kept goes when this does.
#[derive(Debug)]
pub struct NewDump {
    vm: VmId,
    number: u32,
    folder: PathBuf,
    /// To be filled; empty.
    pub file: File,
    /// Bytes that it may have.
    pub most: u64,
    dumping: Arc<AtomicBool>,
}

impl NewDump {
    /// A new pipe.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn pipe(&self) -> io::Result<PathBuf> {
        let comes = self.folder.join(COMES);
        let _ = fs::remove_dir_all(&comes); // Of a crash.
        DirBuilder::new().mode(0o700).create(&comes)?;
        let path = comes.join("pipe");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(path)
    }

    /// Whoever has not opened the pipe by now never will, nor make a file in its place: its folder is gone. To be called as long as
    /// somebody reads it, for an opening without a reader would hang.
    pub fn close_pipe(&self) {
        let _ = fs::remove_dir_all(self.folder.join(COMES)); // It may be gone already.
    }
}

impl Drop for NewDump {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.folder.join(NEW)); // Renamed, if it was kept.
        self.close_pipe();
        self.dumping.store(false, Ordering::Release);
    }
}

/// One that is whole.
struct Kept {
    written: SystemTime,
    vm: VmId,
    number: u32,
    bytes: u64,
}

impl Failures {
    /// Makes a place for the dump of a failure that is kept.
    ///
    /// # Errors
    /// Another one is being written; too little room; the disk's reason.
    pub fn begin_dump(&self, vm: VmId, number: u32, most: u64) -> Result<NewDump, FailuresError> {
        let folder = self.place(vm, number);
        if self.dumping.swap(true, Ordering::AcqRel) {
            return Err(at("no dump is written to", &folder)(io::Error::other(
                "that of another guest is being written",
            )));
        }
        let path = folder.join(NEW);
        let begun = self.check_room().and_then(|room| {
            let _ = fs::remove_file(&path); // Of a crash.
            let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            opened.map(|file| (file, room)).map_err(at("cannot write", &path))
        });
        match begun {
            Ok((file, room)) => {
                let dumping = Arc::clone(&self.dumping);
                Ok(NewDump { vm, number, folder, file, most: most.min(room), dumping })
            }
            Err(why) => {
                self.dumping.store(false, Ordering::Release);
                Err(why)
            }
        }
    }

    /// It is whole. Others go, so that all together have at most so many bytes.
    ///
    /// # Errors
    /// When the disk fails; then it is not kept.
    pub fn keep_dump(&self, new: &NewDump, most_of_all: u64) -> Result<(), FailuresError> {
        let path = new.folder.join(DUMP);
        new.file.sync_all().map_err(at("cannot write", &path))?;
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        fs::rename(new.folder.join(NEW), &path).map_err(at("cannot make", &path))?;
        sync(&new.folder)?;
        let bytes = path.metadata().map_err(at("cannot read", &path))?.len();
        let kept = MemoryDump::Kept { path: path.display().to_string(), bytes };
        self.change(new.vm, new.number, |failure| failure.dump = kept)?;
        self.forget_dumps(new, most_of_all.saturating_sub(bytes))
    }

    /// It was wanted, and there is none.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn set_no_dump(&self, vm: VmId, number: u32, why: &str) -> Result<(), FailuresError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.change(vm, number, |failure| failure.dump = MemoryDump::Missing { why: why.to_owned() })
    }

    /// Takes away what a crash left half-written. Before the first dump: while one is being written, that is it.
    pub fn tidy(&self) {
        for (vm, number) in self.all() {
            let place = self.place(vm, number);
            let _ = fs::remove_file(place.join(NEW)); // Nearly always not there.
            let _ = fs::remove_dir_all(place.join(COMES));
        }
    }

    /// All others of this VM, and the oldest of all until the others have at most so many bytes.
    fn forget_dumps(&self, newest: &NewDump, most: u64) -> Result<(), FailuresError> {
        let mut others: Vec<Kept> = self.all().into_iter().filter_map(|(vm, number)| self.dump(vm, number)).collect();
        others.retain(|one| (one.vm, one.number) != (newest.vm, newest.number));
        others.sort_by_key(|one| (one.vm != newest.vm, one.written));
        let mut bytes: u64 = others.iter().map(|one| one.bytes).sum();
        for one in others {
            if bytes <= most && one.vm != newest.vm {
                break;
            }
            let path = self.place(one.vm, one.number).join(DUMP);
            fs::remove_file(&path).map_err(at("cannot remove", &path))?;
            let why = "it gave way to a newer one".to_owned();
            self.change(one.vm, one.number, |failure| failure.dump = MemoryDump::Missing { why })?;
            bytes -= one.bytes;
        }
        Ok(())
    }

    fn dump(&self, vm: VmId, number: u32) -> Option<Kept> {
        let metadata = self.place(vm, number).join(DUMP).metadata().ok()?;
        Some(Kept { written: metadata.modified().ok()?, vm, number, bytes: metadata.len() })
    }

    /// All failures that are there. What cannot be read is left out.
    fn all(&self) -> Vec<(VmId, u32)> {
        let homes = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let vms = homes.filter_map(|home| home.file_name().to_str()?.parse::<VmId>().ok());
        vms.flat_map(|vm| {
            let numbers = numbers(&self.folder.join(vm.to_string())).unwrap_or_default();
            numbers.into_iter().map(move |number| (vm, number))
        })
        .collect()
    }
}

/// A dump by its name, whole or not.
pub(super) fn is_dump(name: &OsStr) -> bool {
    name == DUMP || name == NEW || name == COMES
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::exec::failures::tests::{failure, of_size};

    const WEB: VmId = VmId(uuid::Uuid::from_u128(1));
    const DB: VmId = VmId(uuid::Uuid::from_u128(2));

    fn dumped(failures: &Failures, vm: VmId, bytes: usize, most: u64) -> u32 {
        let number = failures.keep(failure(vm), &of_size(10)).unwrap();
        let mut new = failures.begin_dump(vm, number, most).unwrap();
        new.file.write_all(&vec![1; bytes]).unwrap();
        failures.keep_dump(&new, most).unwrap();
        number
    }

    /// Bytes of the dumps of a VM's failures, or why there is none.
    fn dumps(failures: &Failures, vm: VmId) -> Vec<String> {
        let all = failures.list(vm).into_iter().map(|failure| match failure.dump {
            MemoryDump::NotWanted => "-".to_owned(),
            MemoryDump::Kept { path, bytes } => {
                assert_eq!(fs::metadata(&path).unwrap().len(), bytes, "{path}");
                bytes.to_string()
            }
            MemoryDump::Missing { why } => why,
        });
        all.collect()
    }

    #[test]
    fn one_of_each_vm_is_kept_and_the_oldest_give_way() {
        const GONE: &str = "it gave way to a newer one";
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures::new(folder.path().to_owned());
        failures.keep(failure(WEB), &[]).unwrap();
        dumped(&failures, WEB, 600, 1000);
        assert_eq!(dumps(&failures, WEB), ["-", "600"]);
        dumped(&failures, WEB, 300, 1000);
        assert_eq!(dumps(&failures, WEB), ["-", GONE, "300"]);
        dumped(&failures, DB, 700, 1000);
        assert_eq!(
            (dumps(&failures, WEB), dumps(&failures, DB)),
            (vec!["-".into(), GONE.into(), "300".into()], vec!["700".into()])
        );
        dumped(&failures, DB, 701, 1000);
        assert_eq!(dumps(&failures, DB), [GONE, "701"]);
        assert_eq!(dumps(&failures, WEB), ["-", GONE, GONE], "its failure stays");
    }

    #[test]
    fn a_dump_does_not_push_out_what_else_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures::new(folder.path().to_owned());
        let number = failures.keep(failure(WEB), &[]).unwrap();
        let new = failures.begin_dump(WEB, number, u64::MAX).unwrap();
        new.file.set_len(2 * super::super::MAX_BYTES).unwrap();
        failures.keep_dump(&new, u64::MAX).unwrap();
        drop(new);
        failures.keep(failure(WEB), &of_size(10)).unwrap();
        assert_eq!(dumps(&failures, WEB).len(), 2);
    }

    #[test]
    fn what_is_not_kept_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let failures = Failures::new(folder.path().to_owned());
        let number = failures.keep(failure(WEB), &[]).unwrap();
        let place = failures.place(WEB, number);
        let names = || {
            let mut all: Vec<_> = fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            all.sort();
            all
        };
        let new = failures.begin_dump(WEB, number, u64::MAX).unwrap();
        assert!(new.most < u64::MAX, "the disk's room is known");
        new.pipe().unwrap();
        let pipe = new.pipe().unwrap();
        assert_eq!(names(), [COMES, NEW, "failure.json"]);
        new.close_pipe();
        let late = OpenOptions::new().write(true).create(true).truncate(true).open(&pipe);
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::NotFound, "a libvirt that comes late makes no file");
        let busy = failures.begin_dump(WEB, number, 1).unwrap_err().to_string();
        assert!(busy.ends_with("that of another guest is being written"), "{busy}");
        drop(new);
        assert_eq!(names(), ["failure.json"]);
        std::mem::forget(failures.begin_dump(WEB, number, u64::MAX).unwrap()); // A crash.
        failures.tidy();
        assert_eq!(names(), ["failure.json"]);
        failures.set_no_dump(WEB, number, "no room").unwrap();
        assert_eq!(dumps(&failures, WEB), ["no room"]);
    }

    #[test]
    fn a_full_disk_gets_no_dump() {
        let folder = tempfile::tempdir().unwrap();
        let number = Failures::new(folder.path().to_owned()).keep(failure(WEB), &[]).unwrap();
        let failures = Failures { room: u64::MAX, ..Failures::new(folder.path().to_owned()) };
        for _ in 0..2 {
            let why = failures.begin_dump(WEB, number, 1).unwrap_err().to_string();
            assert!(why.contains("MiB are free there, fewer than"), "{why}");
        }
    }
}
