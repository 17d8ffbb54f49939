//! One host's mount: what its kernel knows, and the way of its operations to the host's gate.
//!
//! ```text
//!  kernel ─► session thread (4 per mount) ─► find inode or handle ─► gate ─► backing call ─► reply
//!            `requests`                      here                    `host`  `tree`
//! ```

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use fuser::{Errno, FileAttr, FileHandle, Generation, INodeNo, LockOwner, ReplyAttr, ReplyEmpty, ReplyEntry};

use super::host::{Class, Host, Verdict};
use super::locks::{Lock, Locks, Owner};
use super::tree::{Entry, Handle, Node, Nodes};

/// Nothing is cached: what another host did is seen at once.
pub const TTL: Duration = Duration::ZERO;
/// Numbers of inodes are not used again while a kernel knows them.
pub const GENERATION: Generation = Generation(0);

/// What `fuser` serves.
pub struct Mount(pub Arc<Shared>);

/// What the mount's operations share; they can outlive the session.
pub struct Shared {
    /// Number of the mount.
    pub id: u64,
    /// Whose it is.
    pub host: Arc<Host>,
    /// The table of all hosts.
    pub locks: Arc<Locks>,
    /// Whether the kernel forwards locks (mode `server`).
    pub forwards_locks: bool,
    /// Inodes that the kernel knows.
    pub nodes: Nodes,
    /// Open files.
    pub handles: RwLock<HashMap<u64, Arc<Handle>>>,
    /// Names of each open folder, as they were when it was last read from its start.
    pub folders: Mutex<HashMap<u64, Vec<Entry>>>,
    /// The next number for a file or folder that is opened; unique over all mounts.
    pub next_handle: AtomicU64,
}

impl Mount {
    /// A mount of `host`; `id` is of this mount alone.
    pub fn new(id: u64, host: Arc<Host>, locks: Arc<Locks>, forwards_locks: bool, nodes: Nodes) -> Self {
        Mount(Arc::new(Shared {
            id,
            host,
            locks,
            forwards_locks,
            nodes,
            handles: RwLock::default(),
            folders: Mutex::default(),
            next_handle: AtomicU64::new(id << 32 | 1),
        }))
    }

    /// Takes an operation on an inode to the gate.
    pub fn submit(&self, class: Class, node: &Node, act: impl FnOnce(&Shared, Verdict) + Send + 'static) {
        self.submit_on(class, node, None, act);
    }

    /// Takes an operation on an open file to the gate.
    pub fn submit_on(
        &self,
        class: Class,
        node: &Node,
        handle: Option<&Arc<Handle>>,
        act: impl FnOnce(&Shared, Verdict) + Send + 'static,
    ) {
        let shared = self.0.clone();
        shared.host.count(class, node.ours);
        self.0.host.submit(class, handle, move |verdict| act(&shared, verdict));
    }

    /// For operations that make a name in `parent`: makes it, looks it up, answers.
    pub fn submit_new(
        &self,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEntry,
        make: impl FnOnce(&Node, &OsStr) -> io::Result<()> + Send + 'static,
    ) {
        let Some(parent) = self.node(parent) else { return reply.error(Errno::ESTALE) };
        let name = name.to_owned();
        self.submit(Class::Change, &parent.clone(), move |shared, verdict| {
            let made = verdict.then(|| {
                make(&parent, &name)?;
                shared.nodes.look_up(&parent, &name)
            });
            answer_entry(reply, made.map(|(_, attributes)| attributes));
        });
    }

    /// The inode that the kernel means.
    pub fn node(&self, number: INodeNo) -> Option<Arc<Node>> {
        self.0.nodes.find(number)
    }

    /// The open file that the kernel means.
    pub fn handle(&self, handle: FileHandle) -> Option<Arc<Handle>> {
        self.0.handles.read().expect("no holder panics").get(&handle.0).cloned()
    }

    /// The lock that a request asks for.
    pub fn lock(
        &self,
        of: &Handle,
        handle: FileHandle,
        owner: LockOwner,
        bytes: (u64, u64),
        kind: i32,
        pid: u32,
    ) -> Lock {
        Lock {
            owner: self.0.owner(owner),
            handle: handle.0,
            lost: of.lost.clone(),
            start: bytes.0,
            end: bytes.1,
            exclusive: kind == libc::F_WRLCK,
            pid,
        }
    }
}

impl Shared {
    /// Numbers a file that was opened.
    pub fn add_handle(&self, file: std::fs::File, node: Arc<Node>) -> FileHandle {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        let lost = Arc::new(AtomicBool::new(false));
        let handle = Arc::new(Handle { file, node, epoch: self.host.epoch(), lost });
        self.handles.write().expect("no holder panics").insert(number, handle);
        FileHandle(number)
    }

    /// The owner of a lock, unique over all mounts.
    pub fn owner(&self, number: LockOwner) -> Owner {
        Owner { host: self.host.clone(), mount: self.id, number: number.0 }
    }

    /// Whether closing leaves the locks as they are: they are not here, or the host is to have lost its power.
    pub fn keeps_locks_on_close(&self) -> bool {
        !self.forwards_locks || self.host.is_dead()
    }
}

impl Verdict {
    /// Does it, unless it is refused.
    pub fn then<T>(self, act: impl FnOnce() -> io::Result<T>) -> Result<T, Errno> {
        match self {
            Verdict::Refuse(errno) => Err(errno),
            Verdict::Go | Verdict::Torn | Verdict::Late(_) | Verdict::SkipSync => act().map_err(Errno::from),
        }
    }
}

/// Answers a request that returns nothing.
pub fn answer_empty(reply: ReplyEmpty, done: Result<(), Errno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

/// Answers a request that looks up or makes a name.
pub fn answer_entry(reply: ReplyEntry, found: Result<FileAttr, Errno>) {
    match found {
        Ok(attributes) => reply.entry(&TTL, &attributes, GENERATION),
        Err(errno) => reply.error(errno),
    }
}

/// Answers a request that returns attributes.
pub fn answer_attributes(reply: ReplyAttr, found: Result<FileAttr, Errno>) {
    match found {
        Ok(attributes) => reply.attr(&TTL, &attributes),
        Err(errno) => reply.error(errno),
    }
}
