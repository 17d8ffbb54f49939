//! The lock table of all hosts, as a server of NFSv4 keeps it.
//!
//! ```text
//!            set                    another asks, owner's host     handle that held it
//!  free ───────────► held ────────── silent for the lease ──────► lost: writes get EIO
//!   ▲                 │                                              │
//!   └── unlock, close, fence, new boot ──────────────────────────────┘
//! ```
//!
//! Whole-file locks of flock(2) arrive as locks of all bytes, so they and byte ranges see each other, as over NFS. An
//! owner never conflicts with itself. A dead, frozen or hung host keeps its locks until its lease ended *and* another
//! asks (courtesy). Locks of a host that is silent but alive, for lack of anything to do, are not safer than that.
//!
//! Waiters are bounded by the threads of the hosts: each waits for one lock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use fuser::{Errno, ReplyEmpty};
use serde_json::{Value, json};

use super::LockMode;
use super::host::Host;

/// How often waiters look whether the lease of a silent host has ended; only while there are waiters.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Who holds a lock: an open file description or process of one mount of one host.
#[derive(Clone)]
pub struct Owner {
    /// The host.
    pub host: Arc<Host>,
    /// Which mount of it: owner numbers of two kernels' mounts may be equal.
    pub mount: u64,
    /// The kernel's number for the owner.
    pub number: u64,
}

impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        (self.mount, self.number) == (other.mount, other.number) && Arc::ptr_eq(&self.host, &other.host)
    }
}

/// A lock on the bytes `start` to `end`, both included.
#[derive(Clone)]
pub struct Lock {
    /// Who holds it.
    pub owner: Owner,
    /// The handle through which it was set; closing that drops it.
    pub handle: u64,
    /// Set when the lock is taken away.
    pub lost: Arc<AtomicBool>,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// Alone, or together with other readers.
    pub exclusive: bool,
    /// Process that asked, for the answer to others.
    pub pid: u32,
}

impl Lock {
    fn overlaps(&self, other: &Lock) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn conflicts(&self, other: &Lock) -> bool {
        self.owner != other.owner && self.overlaps(other) && (self.exclusive || other.exclusive)
    }
}

struct Waiter {
    inode: u64,
    lock: Lock,
    reply: ReplyEmpty,
}

struct Table {
    mode: LockMode,
    by_inode: HashMap<u64, Vec<Lock>>,
    waiters: Vec<Waiter>,
}

/// The one lock table of the daemon.
pub struct Locks {
    table: Mutex<Table>,
    waiting: Condvar,
}

impl Locks {
    /// An empty table, with the thread that serves its waiters.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let table = Table { mode: LockMode::default(), by_inode: HashMap::new(), waiters: Vec::new() };
        let locks = Arc::new(Locks { table: Mutex::new(table), waiting: Condvar::new() });
        let server = locks.clone();
        std::thread::Builder::new().name("lock-waiters".into()).spawn(move || server.serve_waiters())?;
        Ok(locks)
    }

    /// What holds for mounts made now.
    pub fn mode(&self) -> LockMode {
        self.table().mode
    }

    /// Changes the mode for mounts to come, and the lease for all.
    pub fn set_mode(&self, mode: LockMode) {
        self.table().mode = mode;
    }

    /// The lock that stands in the way, if one does.
    pub fn test(&self, inode: u64, lock: &Lock) -> Option<Lock> {
        self.table().obstacle(inode, lock)
    }

    /// Sets the lock if nothing stands in its way.
    pub fn set(&self, inode: u64, lock: Lock) -> bool {
        let mut table = self.table();
        let free = table.obstacle(inode, &lock).is_none();
        if free {
            table.put(inode, lock);
            table.serve_waiters(); // It may have weakened one of its own.
        }
        free
    }

    /// Sets the lock, now or when nothing stands in its way any more, and answers then.
    pub fn set_waiting(&self, inode: u64, lock: Lock, reply: ReplyEmpty) {
        let mut table = self.table();
        table.waiters.push(Waiter { inode, lock, reply });
        table.serve_waiters();
        self.waiting.notify_one();
    }

    /// Frees the bytes of `lock` for its owner.
    pub fn unlock(&self, inode: u64, lock: &Lock) {
        let mut table = self.table();
        table.cut(inode, lock);
        table.serve_waiters();
    }

    /// Drops what was locked through a handle.
    pub fn drop_handle(&self, inode: u64, handle: u64) {
        self.retain(Some(inode), |lock| lock.handle != handle);
    }

    /// Drops what an owner locked on an inode: a process closed the file.
    pub fn drop_owner(&self, inode: u64, owner: &Owner) {
        self.retain(Some(inode), |lock| lock.owner != *owner);
    }

    /// Drops all locks of a host; its handles that held them are lost. Its waiters are sent away.
    pub fn drop_host(&self, host: &Arc<Host>) {
        let mut table = self.table();
        table.take_from(host);
        table.dismiss(host);
        table.serve_waiters();
    }

    /// Sends a host's waiters away: nobody is there to get the lock.
    pub fn dismiss_waiters(&self, host: &Arc<Host>) {
        self.table().dismiss(host);
    }

    /// For people and tests.
    pub fn status(&self) -> Value {
        let table = self.table();
        let of_inode = |(inode, locks): (&u64, &Vec<Lock>)| {
            let inode = *inode;
            locks.iter().map(move |l| {
                json!({ "host": l.owner.host.name(), "inode": inode, "start": l.start, "end": l.end, "exclusive": l.exclusive })
            }).collect::<Vec<_>>()
        };
        let held: Vec<Value> = table.by_inode.iter().flat_map(of_inode).collect();
        json!({ "mode": table.mode, "held": held, "waiting": table.waiters.len() })
    }

    fn retain(&self, inode: Option<u64>, keep: impl Fn(&Lock) -> bool) {
        let mut table = self.table();
        table.retain(inode, keep);
        table.serve_waiters();
    }

    fn serve_waiters(&self) {
        let mut table = self.table();
        loop {
            table = if table.waiters.is_empty() {
                self.waiting.wait(table).expect("no holder of the table panics")
            } else {
                self.waiting.wait_timeout(table, LOOK_AGAIN).expect("no holder of the table panics").0
            };
            table.serve_waiters();
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder of the table panics")
    }
}

impl Table {
    /// What stands in the way of `lock`, after silent hosts have lost theirs.
    fn obstacle(&mut self, inode: u64, lock: &Lock) -> Option<Lock> {
        loop {
            let found = self.by_inode.get(&inode)?.iter().find(|l| l.conflicts(lock))?.clone();
            let LockMode::Server { lease } = self.mode else { return Some(found) };
            let holder = &found.owner.host;
            if Arc::ptr_eq(holder, &lock.owner.host) || !holder.is_silent(lease) {
                return Some(found);
            }
            eprintln!("storage: the lease of {} has ended, its locks are dropped", holder.name());
            self.take_from(holder);
        }
    }

    fn put(&mut self, inode: u64, lock: Lock) {
        self.cut(inode, &lock);
        self.by_inode.entry(inode).or_default().push(lock);
    }

    /// Removes the bytes of `hole` from what its owner holds.
    fn cut(&mut self, inode: u64, hole: &Lock) {
        let Some(locks) = self.by_inode.get_mut(&inode) else { return };
        let mut rest = Vec::new();
        locks.retain(|lock| {
            if lock.owner != hole.owner || !lock.overlaps(hole) {
                return true;
            }
            if lock.start < hole.start {
                rest.push(Lock { end: hole.start - 1, ..lock.clone() });
            }
            if hole.end < lock.end {
                rest.push(Lock { start: hole.end + 1, ..lock.clone() });
            }
            false
        });
        locks.append(&mut rest);
    }

    fn retain(&mut self, inode: Option<u64>, keep: impl Fn(&Lock) -> bool) {
        match inode {
            Some(inode) => {
                if let Some(locks) = self.by_inode.get_mut(&inode) {
                    locks.retain(keep);
                }
            }
            None => self.by_inode.values_mut().for_each(|locks| locks.retain(&keep)),
        }
        self.by_inode.retain(|_, locks| !locks.is_empty());
    }

    fn take_from(&mut self, host: &Arc<Host>) {
        for lock in self.by_inode.values().flatten().filter(|l| Arc::ptr_eq(&l.owner.host, host)) {
            lock.lost.store(true, Ordering::Relaxed);
        }
        // Writes through them that are under way come before the new owner's.
        host.landing_barrier();
        self.retain(None, |lock| !Arc::ptr_eq(&lock.owner.host, host));
    }

    fn dismiss(&mut self, host: &Arc<Host>) {
        for waiter in self.waiters.extract_if(.., |w| Arc::ptr_eq(&w.lock.owner.host, host)) {
            waiter.reply.error(Errno::EIO);
        }
    }

    fn serve_waiters(&mut self) {
        for waiter in std::mem::take(&mut self.waiters) {
            if self.obstacle(waiter.inode, &waiter.lock).is_some() {
                self.waiters.push(waiter);
            } else {
                self.put(waiter.inode, waiter.lock);
                waiter.reply.ok();
            }
        }
    }
}
