//! What is said to systemd: its watchdog is pinged without ever waiting, since a systemd that does not read must not hold
//! the enforcing thread up; and the guard's memory lies in its descriptor store.
//!
//! ```text
//! first start ── FDSTORE=1 FDPOLL=0 FDNAME=… + memfd ──► systemd ── LISTEN_FDS, LISTEN_FDNAMES ──► next start
//! ```
//!
//! Only the memory is kept there, no pidfd: a pid with its start time names one process for a whole boot, so a process is
//! found again from the memory as surely as through a stored descriptor, and nothing is lost when the store is full.
//! Tried with systemd 252: the store survives restart, SIGKILL, watchdog and daemon-reexec, but not stop and start.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::types::Time;

/// Under which the memory is kept.
pub const MEMORY: &str = "mainstay-guard";
/// The first descriptor that systemd hands over.
const FIRST: RawFd = 3;
/// How long a systemd that does not read may hold up a start.
const PATIENCE: Duration = Duration::from_secs(2);
/// More descriptors than this are not ours.
const HANDED_MAX: RawFd = 4096;

/// The socket to systemd, if the watchdog is on.
pub struct Notify {
    socket: Option<UnixDatagram>,
    every: Duration,
    last: Time,
}

impl Notify {
    /// From `NOTIFY_SOCKET` and `WATCHDOG_USEC`.
    #[must_use]
    pub fn from_environment() -> Self {
        let every = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok()).map(Duration::from_micros);
        let socket = every.and_then(|_| connect()).filter(|socket| socket.set_nonblocking(true).is_ok());
        Self { socket, every: every.unwrap_or_default() / 4, last: Time::ZERO }
    }

    /// Four times per period; a ping that the socket does not take at once is left out.
    pub fn ping(&mut self, now: Time) {
        let Some(socket) = &self.socket else { return };
        if self.every <= now.since(self.last) {
            self.last = now;
            drop(socket.send(b"WATCHDOG=1"));
        }
    }
}

/// Ready to be used. Started by hand: nobody listens.
pub fn ready() {
    if let Some(socket) = connect_patiently() {
        drop(socket.send(b"READY=1"));
    }
}

/// Puts the memory into the store, instead of any that lies there.
///
/// # Errors
/// When there is no systemd, or it does not read.
pub fn store(memory: BorrowedFd<'_>) -> io::Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Err(io::Error::other("not started by systemd"));
    }
    let socket = connect_patiently().ok_or_else(|| io::Error::other("NOTIFY_SOCKET leads nowhere"))?;
    socket.send(format!("FDSTOREREMOVE=1\nFDNAME={MEMORY}\n").as_bytes())?;
    // Polled descriptors are dropped by systemd when something happens to them.
    let text = format!("FDSTORE=1\nFDNAME={MEMORY}\nFDPOLL=0\n");
    let descriptors = [memory.as_raw_fd()];
    let with = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text.as_bytes())], &with, MsgFlags::empty(), None)?;
    Ok(())
}

/// Takes the stored descriptors of this name. Their order can change, so only names count. To be called once, before
/// anything else was opened that could sit there.
pub fn stored() -> Vec<OwnedFd> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    if variable("LISTEN_PID").parse() != Ok(std::process::id()) {
        return Vec::new(); // Meant for another process.
    }
    let count = variable("LISTEN_FDS").parse::<RawFd>().unwrap_or(0).clamp(0, HANDED_MAX);
    let names = variable("LISTEN_FDNAMES");
    let named = (FIRST..FIRST + count).zip(names.split(':'));
    named.filter(|(_, name)| *name == MEMORY).filter_map(|(fd, _)| take(fd)).collect()
}

/// A descriptor that was handed to this process, from now on closed by an exec. None: there is no such descriptor.
pub fn take(fd: RawFd) -> Option<OwnedFd> {
    if fd < FIRST {
        return None;
    }
    // SAFETY: borrowed for this call only, which fails if it is not open.
    let handed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(handed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: it is open, it was handed over for this process to use, and nothing else here knows its number.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn connect() -> Option<UnixDatagram> {
    let path = std::env::var("NOTIFY_SOCKET").ok()?;
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect_addr(&address.ok()?).ok()?;
    Some(socket)
}

fn connect_patiently() -> Option<UnixDatagram> {
    connect().filter(|socket| socket.set_write_timeout(Some(PATIENCE)).is_ok())
}
