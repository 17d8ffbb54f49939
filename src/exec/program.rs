//! Programs of administrators and packages, run as children: with a deadline, their whole process group killed at it, their
//! output bounded; and work that may hang, on a thread that is left behind when it does.
//!
//! ```text
//!   bounded ──► own thread ──► work ── result ──► answer
//!                  └─ nothing by the deadline: answer all the same, the thread stays with what hangs
//!   run ──► child in its own process group ── input, output ── its end
//!                  └─ deadline, or stopped: the group is killed by its id, which is nobody else's until the child is reaped
//! ```
//!
//! Not here: what the programs mean (`fence`, `power`).

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// Output of a program that is kept for the message: its first bytes.
pub const OUTPUT_MAX: usize = 2048;
/// Time for the last output after the program has ended, and for its death after it was killed.
pub const AFTERWARDS: Duration = Duration::from_millis(500);

/// How many pieces of work of one kind are under way, hung ones included; beyond `most` further ones are refused at once.
pub struct Places {
    taken: AtomicUsize,
    most: usize,
}

impl Places {
    /// All free.
    pub const fn new(most: usize) -> Self {
        Self { taken: AtomicUsize::new(0), most }
    }
}

/// A place that is taken while this lives.
struct Place(&'static Places);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Does `work` on one thread and waits for it on another, which calls `answer` exactly once, at `within` at the latest.
/// `failed` makes an answer without a result: with a reason, or none when the time was up.
pub fn bounded<T: Send + 'static>(
    places: &'static Places,
    name: &'static str,
    within: Duration,
    work: impl FnOnce() -> T + Send + 'static,
    failed: impl FnOnce(Option<String>) -> T + Send + 'static,
    answer: impl FnOnce(T) + Send + 'static,
) {
    let busy = places.taken.fetch_add(1, Ordering::AcqRel);
    let place = Place(places);
    if places.most <= busy {
        drop(place);
        return answer(failed(Some(format!("{} of that kind hang already", places.most))));
    }
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

/// Ends a program before its deadline, from any thread; one that is not begun yet is then not begun.
#[derive(Default)]
pub struct Stop(Mutex<Stopping>);

#[derive(Default)]
enum Stopping {
    #[default]
    NotBegun,
    /// Who waits for its end.
    Runs(Sender<Word>),
    Stopped,
}

/// What whoever waits for a program is told.
enum Word {
    /// It has ended, or cannot be waited for.
    Ended(Result<(), Errno>),
    /// End it.
    Stop,
}

impl Stop {
    /// Asks for the end; does not wait for it.
    pub fn stop(&self) {
        let before = std::mem::replace(&mut *self.state(), Stopping::Stopped);
        if let Stopping::Runs(waiting) = before {
            let _ = waiting.send(Word::Stop); // Nobody waits any more: it has ended.
        }
    }

    fn is_stopped(&self) -> bool {
        matches!(*self.state(), Stopping::Stopped)
    }

    /// From now on `waiting` is told.
    fn begun(&self, waiting: &Sender<Word>) {
        let mut state = self.state();
        match *state {
            Stopping::Stopped => {
                let _ = waiting.send(Word::Stop); // It listens by now, or soon.
            }
            Stopping::NotBegun | Stopping::Runs(_) => *state = Stopping::Runs(waiting.clone()),
        }
    }

    fn state(&self) -> MutexGuard<'_, Stopping> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a program ended.
pub enum Ended {
    /// By itself.
    Itself(ExitStatus),
    /// At its deadline, with its group.
    Killed,
    /// By `Stop`, with its group; or it was never begun.
    Stopped,
    /// It hangs in the kernel; it dies whenever it comes back.
    NotEven,
    /// It cannot be waited for.
    Unknown(io::Error),
}

/// Runs a program in its own process group to its end, to its deadline, or until it is stopped; gives the beginning of what it wrote, on one
/// line. `input` must fit into a pipe (64 KiB), so that a program that does not read it holds nobody up.
///
/// # Errors
/// When it cannot be started.
pub fn run(mut command: Command, input: &[u8], within: Duration, stop: &Stop) -> io::Result<(Ended, String)> {
    if stop.is_stopped() {
        return Ok((Ended::Stopped, String::new()));
    }
    let (read, write) = io::pipe()?;
    let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
    command.stdin(stdin).stdout(write.try_clone()?).stderr(write).process_group(0);
    let mut child = command.spawn()?;
    drop(command); // It holds the pipe's other end, whose last close is the end of the output.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input); // Whoever does not read it says more by his end.
    }
    let output = Output::collect(read);
    let ended = wait(child, within, stop);
    Ok((ended, output.finish()))
}

/// The same for a program whose input and output are files; what it says otherwise is not kept.
///
/// # Errors
/// When it cannot be started.
pub fn run_on(mut command: Command, input: File, output: File, within: Duration) -> io::Result<Ended> {
    let child = command.stdin(input).stdout(output).stderr(Stdio::null()).process_group(0).spawn()?;
    Ok(wait(child, within, &Stop::default()))
}

/// Waits for a child that leads its own process group, and kills the group at the deadline or when it is stopped.
///
/// A thread sees the child's end without reaping it. Until it is reaped, after our word, its id belongs to nobody
/// else, so the kill cannot hit a stranger.
fn wait(mut child: Child, within: Duration, stop: &Stop) -> Ended {
    let Ok(id) = i32::try_from(child.id()).map(Pid::from_raw) else {
        return Ended::Unknown(io::ErrorKind::InvalidData.into());
    };
    let (tell, words) = channel();
    stop.begun(&tell);
    let (reap, may_reap) = channel::<()>();
    let waiting = std::thread::Builder::new().name("program".into()).spawn(move || {
        let seen = loop {
            match waitid(Id::Pid(id), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Err(Errno::EINTR) => {}
                other => break other.map(drop),
            }
        };
        let _ = tell.send(Word::Ended(seen));
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
    let word = words.recv_timeout(within);
    let died = match word {
        Ok(Word::Ended(Ok(()))) => true,
        Ok(Word::Ended(Err(errno))) => return Ended::Unknown(errno.into()),
        Ok(Word::Stop) | Err(_) => {
            let _ = killpg(id, Signal::SIGKILL);
            let mut later = std::iter::from_fn(|| words.recv_timeout(AFTERWARDS).ok());
            later.any(|word| matches!(word, Word::Ended(_)))
        }
    };
    drop(reap); // A process that hangs in the kernel is reaped by its thread whenever it ends.
    if !died {
        return Ended::NotEven;
    }
    match (waiting.join(), word) {
        // Whoever had ended before he was killed has done what his own end says.
        (Ok(Ok(status)), Err(_)) if status.signal() == Some(Signal::SIGKILL as i32) => Ended::Killed,
        (Ok(Ok(status)), Ok(Word::Stop)) if status.signal() == Some(Signal::SIGKILL as i32) => Ended::Stopped,
        (Ok(Ok(status)), _) => Ended::Itself(status),
        (Ok(Err(error)), _) => Ended::Unknown(error),
        (Err(_), _) => Ended::Unknown(io::Error::other("the waiting thread panicked")),
    }
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
        let _ = std::thread::Builder::new().name("program-output".into()).spawn(reading);
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
