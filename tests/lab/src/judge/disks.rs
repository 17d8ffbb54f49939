//! What the guests write to their disks, read from the backing folder, where no fault reaches.
//!
//! ```text
//!  each 10 ms, each disk:  read sector 0 ──same bytes as before──► nothing
//!                                        ──another record───────► Write { at, stamp, conflicts }
//! ```
//!
//! `writer` and `downtime` judge the list of writes; the ring on the disk is read at the verdict only.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use uuid::Uuid;

use super::{Moment, go_first, thread_cpu};
use crate::guest_disk::{Place, SECTOR, Sector, Stamp, parse};

const PERIOD: Duration = Duration::from_millis(10);
/// A disk may be made anew: it is opened again after so many rounds.
const OPEN_AGAIN: u64 = 100;
/// Writes kept per disk, the oldest go: three hours of them.
const WRITES: usize = 120_000;

/// A write of a guest, when it was first seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Write {
    /// At most 10 ms after it was made, if the machine is not overloaded.
    pub at: Moment,
    /// Who wrote, and which one.
    pub stamp: Stamp,
    /// How often writers met foreign stamps up to then.
    pub conflicts: u64,
}

/// Follows the disks, on a thread of its own.
pub struct Disks {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    disks: Mutex<BTreeMap<Uuid, Disk>>,
    cpu_permyriad: AtomicU64,
    end: AtomicBool,
}

struct Disk {
    path: PathBuf,
    file: Option<File>,
    head: [u8; SECTOR],
    writes: Vec<Write>,
}

impl Disks {
    /// Starts without a disk.
    pub fn start() -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let run = move || of_thread.run();
        let thread =
            std::thread::Builder::new().name("judge-disks".into()).spawn(run).context("start the judge of disks")?;
        Ok(Disks { shared, thread: Some(thread) })
    }

    /// Follows a disk from now on.
    pub fn watch(&self, vm: Uuid, path: PathBuf) {
        let disk = Disk { path, file: None, head: [0; SECTOR], writes: Vec::new() };
        self.shared.disks().insert(vm, disk);
    }

    /// All writes to a VM's disk that were seen.
    pub fn writes(&self, vm: Uuid) -> Vec<Write> {
        self.shared.disks().get(&vm).map(|d| d.writes.clone()).unwrap_or_default()
    }

    /// CPU time of the judge's thread, in percent of one CPU.
    pub fn cpu_percent(&self) -> f64 {
        self.shared.cpu_permyriad.load(Ordering::Relaxed) as f64 / 100.0
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        go_first();
        let began = Instant::now();
        let mut round = 0_u64;
        while !self.end.load(Ordering::Relaxed) {
            let open_again = round.is_multiple_of(OPEN_AGAIN);
            round += 1;
            for disk in self.disks().values_mut() {
                if open_again || disk.file.is_none() {
                    disk.open();
                }
                disk.look();
            }
            let cpu = thread_cpu().as_secs_f64() / began.elapsed().as_secs_f64();
            self.cpu_permyriad.store((cpu * 10_000.0) as u64, Ordering::Relaxed);
            std::thread::sleep(PERIOD);
        }
    }

    fn disks(&self) -> MutexGuard<'_, BTreeMap<Uuid, Disk>> {
        self.disks.lock().expect("no holder panics")
    }
}

impl Disk {
    fn open(&mut self) {
        let number = |file: &File| file.metadata().ok().map(|m| m.ino());
        let old = self.file.as_ref().and_then(number);
        if old.is_none() || old != std::fs::metadata(&self.path).ok().map(|m| m.ino()) {
            self.file = File::open(&self.path).ok();
        }
    }

    fn look(&mut self) {
        let Some(file) = &self.file else { return };
        let mut head = [0; SECTOR];
        if file.read_exact_at(&mut head, 0).is_err() || head == self.head {
            return;
        }
        // A sector caught in the middle of its write is seen whole in the next round.
        if let Sector::Record(record) = parse(&head, Place::Head) {
            self.head = head;
            self.writes.push(Write { at: Moment::now(), stamp: record.stamp, conflicts: record.conflicts });
            if WRITES < self.writes.len() {
                self.writes.drain(..WRITES / 10);
            }
        }
    }
}
