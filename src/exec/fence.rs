//! Storage fences: the administrator's program, and a look at QEMU's image locks.
//!
//! ```text
//!   command ──► own thread ──► program HOST_NAME HOST_ID ── exit 0 ──► the host's late writes are excluded
//!                                  └─ deadline: its whole process group is killed ──► not excluded, and why
//!   probe   ──► own thread ──► F_OFD_GETLK on the bytes that a writing QEMU holds ──► free, or held (by whom)
//! ```
//!
//! Both can hang for ever (a program or an image on dead storage). Then the asker has its answer at the deadline, and
//! the thread stays with what hangs; at most 64 of each kind are kept, further orders are refused at once.
//!
//! Not here: when to fence, whether a fence that failed is tried again, what a held lock means.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};

use super::program::{self, AFTERWARDS, Ended, Places, Stop};
use crate::types::HostId;

/// Fence programs at the same time, hung ones included.
static COMMANDS: Places = Places::new(64);
/// Probes at the same time, hung ones included.
static PROBES: Places = Places::new(64);
/// QEMU marks what it does to an image by a lock on byte 100 + n, and what it lets nobody else do on byte 200 + n
/// (block/file-posix.c); n = 1 is writing. Whoever holds one of these two keeps another writer out.
const WRITES: i64 = 101;
/// See `WRITES`.
const LETS_NOBODY_WRITE: i64 = 201;

/// Runs `run_command` on a thread of its own and answers exactly once, soon after `within` at the latest.
pub fn command(
    program: String,
    host_name: String,
    host: HostId,
    within: Duration,
    answer: impl FnOnce(Result<(), String>) + Send + 'static,
) {
    let late = format!("{program} did not end within {} ms", within.as_millis());
    let work = move || run_command(&program, &host_name, host, within);
    // Killing takes a moment, and the program's own words are worth it.
    program::bounded(
        &COMMANDS,
        "fence-command",
        within + 3 * AFTERWARDS,
        work,
        move |why| Err(why.unwrap_or(late)),
        answer,
    );
}

/// Runs `image_locked` on a thread of its own and answers exactly once, at `within` at the latest.
pub fn probe(path: PathBuf, within: Duration, answer: impl FnOnce(io::Result<Option<String>>) + Send + 'static) {
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let work = move || image_locked(&path);
    program::bounded(
        &PROBES,
        "fence-probe",
        within,
        work,
        move |why| Err(why.map_or_else(late, io::Error::other)),
        answer,
    );
}

/// Runs `program HOST_NAME HOST_ID` and waits for its end. 0 = the host's late writes are excluded.
///
/// # Errors
/// When it cannot be run, ends otherwise, or not within the time: then every process of its group was killed. The text
/// holds the beginning of what it wrote. Whether something was changed only the program knows.
pub fn run_command(program: &str, host_name: &str, host: HostId, within: Duration) -> Result<(), String> {
    let mut command = Command::new(program);
    command.arg(host_name).arg(host.to_string());
    let (ended, said) = program::run(command, &[], within, &Stop::default())
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    let said = if said.is_empty() { String::new() } else { format!(": {said}") };
    match ended {
        Ended::Itself(status) if status.success() => Ok(()),
        Ended::Itself(status) => Err(format!("{program} failed ({status}){said}")),
        Ended::Stopped => Err(format!("{program} was stopped{said}")),
        Ended::Killed => Err(format!("{program} did not end within {} ms and was killed{said}", within.as_millis())),
        Ended::NotEven => Err(format!("{program} did not end within {} ms, nor when killed{said}", within.as_millis())),
        Ended::Unknown(error) => Err(format!("cannot wait for {program}: {error}{said}")),
    }
}

/// Whether somebody's QEMU writes to this image, or keeps others from it: what holds the lock, or none if it is free.
/// Only asks the kernel (on network storage: the server); takes no lock, reads nothing.
///
/// # Errors
/// When the image cannot be opened, or the file system knows no locks.
pub fn image_locked(path: &Path) -> io::Result<Option<String>> {
    let file = File::open(path)?;
    for (byte, what) in [(WRITES, "writes to it"), (LETS_NOBODY_WRITE, "lets nobody else write to it")] {
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        if lock.l_type != libc::F_UNLCK as libc::c_short {
            // Locks of open files, and those of other hosts, come without a process.
            let who =
                if 0 < lock.l_pid { format!("process {}", lock.l_pid) } else { "a process here or elsewhere".into() };
            return Ok(Some(format!("{who} {what} (lock on byte {byte})")));
        }
    }
    Ok(None)
}

#[cfg(test)]
#[path = "fence_tests.rs"]
mod tests;
