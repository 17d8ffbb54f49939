//! Storage fences: the administrator's program, and a look at QEMU's image locks.
//!
//! ```text
//!   command ──► own thread ──► program HOST_NAME HOST_ID ── exit 0 ──► the host's late writes are excluded
//!                                  └─ deadline: its whole process group is killed ──► not excluded, and why
//!   probe   ──► own thread ──► F_OFD_GETLK on the bytes that a writing QEMU holds ──► free, or held (by whom)
//! ```
//!
//! Both can hang for ever (a program or an image on dead storage). Then the asker has its answer at the deadline, and
//! the thread stays with what hangs; at most 64 such threads are kept, further orders are refused at once.
//!
//! Not here: when to fence, whether a fence that failed is tried again, what a held lock means.

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::types::HostId;

/// Output of a program that is kept for the message: its first bytes.
const OUTPUT_MAX: usize = 2048;
/// Time for the last output after the program has ended, and for its death after it was killed.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// Threads with fences or probes at the same time, hung ones included.
const THREADS_MAX: usize = 64;
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
    bounded("fence-command", within + 3 * AFTERWARDS, work, move |why| Err(why.unwrap_or(late)), answer);
}

/// Runs `image_locked` on a thread of its own and answers exactly once, at `within` at the latest.
pub fn probe(path: PathBuf, within: Duration, answer: impl FnOnce(io::Result<Option<String>>) + Send + 'static) {
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let work = move || image_locked(&path);
    bounded("fence-probe", within, work, move |why| Err(why.map_or_else(late, io::Error::other)), answer);
}

/// Does `work` on one thread and waits for it on another: one of them calls `answer`.
fn bounded<T: Send + 'static>(
    name: &'static str,
    within: Duration,
    work: impl FnOnce() -> T + Send + 'static,
    failed: impl FnOnce(Option<String>) -> T + Send + 'static,
    answer: impl FnOnce(T) + Send + 'static,
) {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    /// Counts a working thread while it lives.
    struct Place;
    impl Drop for Place {
        fn drop(&mut self) {
            THREADS.fetch_sub(1, Ordering::AcqRel);
        }
    }
    if THREADS_MAX <= THREADS.fetch_add(1, Ordering::AcqRel) {
        drop(Place);
        return answer(failed(Some(format!("{THREADS_MAX} fences and probes hang already"))));
    }
    let place = Place;
    let (tell, told) = channel();
    let worked = std::thread::Builder::new().name(name.into()).spawn(move || {
        let _place = place;
        let _ = tell.send(work());
    });
    if let Err(error) = worked {
        return answer(failed(Some(format!("cannot start a thread: {error}"))));
    }
    let parts = Arc::new(Mutex::new(Some((failed, answer))));
    let waiting = Arc::clone(&parts);
    let wait = move || {
        let taken = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((failed, answer)) = taken {
            // A panic in the work shows as a closed channel: no result, like a late one.
            answer(told.recv_timeout(within).unwrap_or_else(|_| failed(None)));
        }
    };
    if let Err(error) = std::thread::Builder::new().name(format!("{name}-wait")).spawn(wait) {
        let taken = parts.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((failed, answer)) = taken {
            answer(failed(Some(format!("cannot start a thread: {error}"))));
        }
    }
}

/// Runs `program HOST_NAME HOST_ID` and waits for its end. 0 = the host's late writes are excluded.
///
/// # Errors
/// When it cannot be run, ends otherwise, or not within the time: then every process of its group was killed. The text
/// holds the beginning of what it wrote. Whether something was changed only the program knows.
pub fn run_command(program: &str, host_name: &str, host: HostId, within: Duration) -> Result<(), String> {
    let failed = |error: io::Error| format!("cannot run {program}: {error}");
    let (read, write) = io::pipe().map_err(failed)?;
    let mut command = Command::new(program);
    command
        .arg(host_name)
        .arg(host.to_string())
        .stdin(Stdio::null())
        .stdout(write.try_clone().map_err(failed)?)
        .stderr(write)
        .process_group(0);
    let child = command.spawn().map_err(failed)?;
    drop(command); // It holds the pipe's other end, whose last close is the end of the output.
    let output = Output::collect(read);
    let ended = wait(child, within);
    let said = output.finish();
    let said = if said.is_empty() { String::new() } else { format!(": {said}") };
    match ended {
        Ended::Itself(status) if status.success() => Ok(()),
        Ended::Itself(status) => Err(format!("{program} failed ({status}){said}")),
        Ended::Killed => Err(format!("{program} did not end within {} ms and was killed{said}", within.as_millis())),
        Ended::NotEven => Err(format!("{program} did not end within {} ms, nor when killed{said}", within.as_millis())),
        Ended::Unknown(error) => Err(format!("cannot wait for {program}: {error}{said}")),
    }
}

enum Ended {
    Itself(ExitStatus),
    Killed,
    NotEven,
    Unknown(io::Error),
}

/// Waits for a child that leads its own process group, and kills the group at the deadline.
///
/// A thread sees the child's end without reaping it. Until it is reaped, after our word, its id belongs to nobody
/// else, so the kill cannot hit a stranger.
fn wait(mut child: Child, within: Duration) -> Ended {
    let Ok(id) = i32::try_from(child.id()).map(Pid::from_raw) else {
        return Ended::Unknown(io::ErrorKind::InvalidData.into());
    };
    let (tell, ended) = channel();
    let (reap, may_reap) = channel::<()>();
    let waiting = std::thread::Builder::new().name("fence-child".into()).spawn(move || {
        let seen = loop {
            match waitid(Id::Pid(id), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Err(Errno::EINTR) => {}
                other => break other.map(drop),
            }
        };
        let _ = tell.send(seen);
        let _ = may_reap.recv(); // Or the sender is gone: it is done with the id as well.
        child.wait()
    });
    let waiting = match waiting {
        Ok(thread) => thread,
        Err(error) => {
            let _ = killpg(id, Signal::SIGKILL); // The child went with the closure and stays a zombie of ours.
            return Ended::Unknown(error);
        }
    };
    if let Ok(seen) = ended.recv_timeout(within) {
        drop(reap);
        return match (seen, waiting.join()) {
            (Ok(()), Ok(Ok(status))) => Ended::Itself(status),
            (Err(errno), _) => Ended::Unknown(errno.into()),
            (_, Ok(Err(error))) => Ended::Unknown(error),
            (_, Err(_)) => Ended::Unknown(io::Error::other("the waiting thread panicked")),
        };
    }
    let _ = killpg(id, Signal::SIGKILL);
    let died = ended.recv_timeout(AFTERWARDS).is_ok();
    drop(reap); // A process that hangs in the kernel is reaped by its thread whenever it ends.
    if died { Ended::Killed } else { Ended::NotEven }
}

/// The beginning of what a program writes. All of it is read, so that the program never blocks.
struct Output {
    kept: Arc<Mutex<Vec<u8>>>,
    stop: Arc<AtomicBool>,
    end: Receiver<()>,
}

impl Output {
    fn collect(mut from: PipeReader) -> Self {
        let (kept, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (tell, end) = channel();
        let (into, stopped) = (Arc::clone(&kept), Arc::clone(&stop));
        let reading = move || {
            let mut buffer = [0; 4096];
            // Something that the program left running may keep the pipe open: so it is polled, and left when told.
            while !stopped.load(Ordering::Acquire) {
                let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
                match poll(&mut ready, PollTimeout::from(100_u8)) {
                    Ok(0) | Err(_) => continue,
                    Ok(_) => {}
                }
                let Ok(len @ 1..) = from.read(&mut buffer) else { break };
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                let room = OUTPUT_MAX - kept.len();
                kept.extend_from_slice(&buffer[..len.min(room)]);
            }
            drop(tell);
        };
        // Without a thread nothing is kept, and the closed pipe tells the program so.
        let _ = std::thread::Builder::new().name("fence-output".into()).spawn(reading);
        Self { kept, stop, end }
    }

    /// What was written until now, on one line.
    fn finish(self) -> String {
        let _ = self.end.recv_timeout(AFTERWARDS);
        self.stop.store(true, Ordering::Release);
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept)
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect::<Vec<_>>()
            .join("; ")
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
