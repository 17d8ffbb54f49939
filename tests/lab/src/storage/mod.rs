//! The faulty shared storage of the lab: one backing folder, seen by each host through a FUSE mount of its own.
//!
//! ```text
//!  host h1 ── mounts/h1 ──┐                                  ┌── backing folder (the judges read here)
//!  host h2 ── mounts/h2 ──┤   gate of the host     backing   │
//!  host h3 ── mounts/h3 ──┴─► pass, hold, delay, ─► call ────┤
//!                             refuse, tear, late             └── one lock table (mode `server`)
//!                                  ▲
//!            control.sock ─────────┘  mount, unmount, dead, alive, fault, locks, expire, status, stop
//!            expire.sock               `expire HOST`: the product's storage fence, reachable from inside the hosts
//! ```
//!
//! - `host`: the gate: what happens to an operation of a host, and what is counted.
//! - `locks`: byte-range locks of all hosts, the lease after which a silent host loses them.
//! - `tree`: inodes, handles and the system calls on the backing folder.
//! - `mount`, `requests`: translate FUSE requests into operations that pass the gate.
//! - `daemon`: sockets, mounts, life and end of the process.
//!
//! Deliberately not here: no cache at all (every attribute and entry expires at once, all I/O is direct), no
//! permissions (everything in the lab is root), no shared `mmap`, and no automatic renewal of leases: a host that does
//! nothing on the storage for the time of a lease counts as silent, where a kernel NFS client would renew by itself.

mod daemon;
mod host;
mod locks;
mod mount;
mod requests;
#[cfg(test)]
mod tests;
mod tree;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use daemon::run_daemon;

/// How long the daemon may take to answer the lab.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// What goes wrong with the storage of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// Nothing.
    None,
    /// Operations get no answer, threads of the host wait in D; they are executed, in order, when the fault ends. An
    /// operation that is held does not renew the host's lease.
    Hang,
    /// All operations fail with EIO.
    Eio,
    /// Operations that need room fail with ENOSPC.
    Enospc,
    /// All operations fail with ESTALE.
    Estale,
    /// Operations are executed after this time.
    Slow(Duration),
    /// Writes of 4 KiB and more put down their first half only and fail with EIO.
    Torn,
    /// Writes fail with EIO at once and are put down after this time, even if the host dies meanwhile. A fence
    /// (`expire`) or a lease that ended drops them.
    Late(Duration),
    /// Syncs (also those of O_DSYNC) answer that all is well and do nothing.
    DropSync,
}

/// Who keeps the locks on files. A change of the kind holds for the mounts made after it; a change of the lease at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockMode {
    /// Each host's kernel for itself, as with `nolock`: locks do not reach other hosts.
    Local,
    /// One table for all hosts. A host without operations for the time of the lease loses its locks to the first that
    /// asks for a conflicting one, and handles that held them then fail with EIO (NFSv4, courteous server).
    Server {
        /// Time without operations after which locks can be lost.
        lease: Duration,
    },
}

impl Default for LockMode {
    fn default() -> Self {
        LockMode::Server { lease: Duration::from_secs(10) }
    }
}

/// One line on control.sock.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
enum Order {
    Mount { host: String },
    Unmount { host: String },
    Dead { host: String },
    Alive { host: String },
    Fault { host: String, fault: Fault },
    Locks { mode: LockMode },
    Expire { host: String },
    Status,
    Stop,
}

/// The line that answers it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Done(Value),
    Failed(String),
}

/// The lab's connection to the storage daemon.
pub struct Storage {
    connection: Mutex<BufReader<UnixStream>>,
}

impl Storage {
    /// Connects to the daemon whose runtime folder is `run`.
    pub fn connect(run: &Path) -> Result<Self> {
        let path = run.join("control.sock");
        let stream = UnixStream::connect(&path).with_context(|| format!("connect to storage at {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        Ok(Storage { connection: Mutex::new(BufReader::new(stream)) })
    }

    /// Mounts the storage for `host` and says where. A mount that is there is returned as it is.
    pub fn mount(&self, host: &str) -> Result<PathBuf> {
        let answer = self.order(&Order::Mount { host: host.into() })?;
        Ok(PathBuf::from(answer.as_str().ok_or_else(|| anyhow!("storage answered without a path"))?))
    }

    /// Takes the mount of `host` away; what is held there fails with EIO. Stop its users first.
    pub fn unmount(&self, host: &str) -> Result<()> {
        self.order(&Order::Unmount { host: host.into() }).map(drop)
    }

    /// Says that `host` is about to be killed: operations fail with EIO from now on, those held too, and closing files
    /// does not release its locks, which stay for the rest of its lease.
    pub fn dead(&self, host: &str) -> Result<()> {
        self.order(&Order::Dead { host: host.into() }).map(drop)
    }

    /// Says that `host` has booted again, or that its fence is lifted: locks and handles of before are void, faults end.
    /// Without effect on a host that was neither dead nor expired, but for the end of its fault.
    pub fn alive(&self, host: &str) -> Result<()> {
        self.order(&Order::Alive { host: host.into() }).map(drop)
    }

    /// Sets what goes wrong for `host`; `Fault::None` heals.
    pub fn fault(&self, host: &str, fault: Fault) -> Result<()> {
        self.order(&Order::Fault { host: host.into(), fault }).map(drop)
    }

    /// Sets who keeps the locks.
    pub fn locks(&self, mode: LockMode) -> Result<()> {
        self.order(&Order::Locks { mode }).map(drop)
    }

    /// The storage fence: drops the locks of `host` now; its later writes, and late ones on their way, fail with EIO
    /// until [`Storage::alive`], those on handles opened before for ever. Nothing of it lands once this returned.
    pub fn expire(&self, host: &str) -> Result<()> {
        self.order(&Order::Expire { host: host.into() }).map(drop)
    }

    /// Faults, counts of operations and locks, per host.
    pub fn status(&self) -> Result<Value> {
        self.order(&Order::Status)
    }

    /// Unmounts everything and ends the daemon; returns when it has gone.
    pub fn stop(&self) -> Result<()> {
        self.order(&Order::Stop)?;
        let mut rest = Vec::new();
        let mut connection = self.connection.lock().expect("no user of the connection panics");
        connection.read_to_end(&mut rest).context("wait for the end of the storage daemon").map(drop)
    }

    fn order(&self, order: &Order) -> Result<Value> {
        let mut connection = self.connection.lock().expect("no user of the connection panics");
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        connection.get_mut().write_all(line.as_bytes()).context("write to the storage daemon")?;
        let mut answer = String::new();
        connection.read_line(&mut answer).with_context(|| format!("storage daemon did not answer {order:?}"))?;
        if answer.is_empty() {
            bail!("storage daemon ended before it answered {order:?}");
        }
        match serde_json::from_str(&answer).context("answer of the storage daemon")? {
            Answer::Done(value) => Ok(value),
            Answer::Failed(why) => Err(anyhow!("storage: {why}")),
        }
    }
}

/// The `command` fence of Mainstay calls this in a host (as `lab-expire HOST`).
pub fn expire_from_inside(host: &str) -> Result<()> {
    let stream = UnixStream::connect(crate::EXPIRE_INSIDE).context("reaching the storage")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    (&stream).write_all(format!("expire {host}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    match answer.trim() {
        "ok" => Ok(()),
        other => bail!("expiring {host}: {other}"),
    }
}

/// `local`, `server` or `server=SECONDS`.
pub fn parse_locks(text: &str) -> Result<LockMode> {
    let lease = match text.split_once('=') {
        None if text == "local" => return Ok(LockMode::Local),
        None if text == "server" => 10,
        Some(("server", seconds)) => seconds.parse().with_context(|| format!("{seconds} is no number of seconds"))?,
        _ => bail!("locks are `local`, `server` or `server=SECONDS`"),
    };
    Ok(LockMode::Server { lease: Duration::from_secs(lease) })
}
