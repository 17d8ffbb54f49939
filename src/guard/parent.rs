//! The parent: waits for its child, and stops everything registered when that dies or misses what it promised.
//!
//! ```text
//!          fork             SIGTERM: finish? ──► ended ──► stop all ──► exit 0 ─┐
//!  start ──────► watching ──SIGHUP:  finish? ──► ended ──► execute the new      │   systemd: ExecStopPost, and again
//!                   │                            program in place ──► start     │
//!                   └── child dead, or late for its promise ──► stop all ──► exit 1
//! ```
//!
//! It holds a pidfd of every QEMU in the memory, real-time priority above the child's, locked memory. The child promises
//! on the board until when it will have stopped what must be stopped next; so a child that hangs, or was stopped by a
//! signal, is noticed just when that matters, and not by guessing how long a busy host may be slow.
//!
//! A reload ends the child in order, with its last writes done, and executes the program anew in the same process: no VM
//! is stopped, systemd sees nothing, and the leases go on by the memory. While no child is there nothing is lifted or
//! started, and the last promise still holds.
//!
//! It pets the hardware watchdog, if there is one, while the promise holds and nothing moves that was told to stand.
//!
//! One thread, no lock, nothing decided about single VMs: what it cannot judge it stops.

use std::ffi::CString;
use std::io::{PipeWriter, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::enforce::{FINISH, PRIORITY, real_time};
use super::kept::{self, Pair};
use super::memory::Memory;
use super::process::{Process, started};
use super::shared::Paths;
use super::state::Carried;
use super::table::ProcessKey;
use super::watchdog::{Watchdog, ask_device};
use super::{child, notify, privileges};
use crate::config;
use crate::exec::clock;
use crate::types::Time;
use crate::types::guard::Standing;
use crate::types::settings::Timing;

/// Names the memory's descriptor to the program that is executed in place.
const HANDED: &str = "MAINSTAY_GUARD_MEMORY";
/// Names the watchdog's.
const HANDED_WATCHDOG: &str = "MAINSTAY_GUARD_WATCHDOG";
/// A VM that moves for so long after it was told to stand is not to be stopped in any other way than with the host. Far
/// beyond what a thread waits for a CPU, which looks the same.
const MOVES: Duration = Duration::from_secs(5);
/// How long a child may take to end in order; longer than it waits for its last writes. Then it is killed: nothing is
/// lost by that but the use of a slot for a while.
const ENDING: Duration = Duration::from_millis(600);
/// Looks at the promise at least this often.
const TICK: Duration = Duration::from_secs(1);

/// Why the parent stops watching.
#[derive(Debug)]
enum End {
    /// The child is gone.
    Died(String),
    /// It is late for what it promised.
    Late(Duration),
    /// A planned stop.
    Stop,
    /// An upgrade.
    Reload,
}

struct Child {
    process: Process,
    to: PipeWriter,
}

struct Parent {
    paths: Paths,
    /// As it was started: after an upgrade the new file lies there.
    program: PathBuf,
    memory: Memory,
    news: EventFd,
    signals: SignalFd,
    timer: TimerFd,
    held: Vec<Process>,
    watchdog: Option<Watchdog>,
    timing: Timing,
}

/// Runs the guard. Returns only when it is over with it: all that was registered stands then.
///
/// # Errors
/// When it cannot begin, or when the child died.
pub fn run(paths: Paths) -> anyhow::Result<()> {
    let (mut parent, warnings) = Parent::begin(paths)?;
    loop {
        parent.hold();
        let child = parent.start(&warnings)?;
        let end = parent.watch(&child);
        match end {
            End::Died(how) => {
                parent.stop_everything();
                anyhow::bail!("the guard's child {how}; everything registered was stopped");
            }
            End::Late(by) => {
                parent.halt();
                parent.end(&child, ENDING / 10); // What hangs, or was stopped, must not lift anything later.
                parent.stop_everything();
                anyhow::bail!("the guard's child is {by:?} late for its promise; everything registered was stopped");
            }
            End::Stop => {
                parent.finish(child);
                if parent.stop_everything()
                    && let Some(watchdog) = parent.watchdog.take()
                {
                    watchdog.close();
                }
                return Ok(());
            }
            End::Reload => {
                parent.finish(child);
                let error = parent.execute();
                tracing::error!("{}: {error}; goes on as it was", parent.program.display());
            }
        }
    }
}

/// Where the memory comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    /// From the program that ran in this process before: no VM was stopped.
    Executed,
    /// From an earlier guard, by systemd's store.
    Stored,
    /// Nobody handed one over that can be used.
    New,
}

/// The memory that was handed over, or a new one. What cannot be read, or is of another layout, is left behind for good:
/// an older program must not find it later.
fn memory() -> (Memory, Origin) {
    let usable = |fd| {
        let memory = Memory::adopt(fd).ok()?;
        Carried::decode(&memory.read()?).ok()?;
        Some(memory)
    };
    let (found, origin) = match std::env::var(HANDED).map(|text| text.parse()) {
        // What systemd handed to the program before has its own owner by now.
        Ok(fd) => (fd.ok().and_then(notify::take).and_then(usable), Origin::Executed),
        Err(_) => {
            let stored = notify::stored().into_iter().filter_map(usable);
            (stored.max_by_key(Memory::sequence), Origin::Stored)
        }
    };
    match found {
        Some(memory) => (memory, origin),
        None => (Memory::new().expect("a kernel with pidfds has memfds, and memory is left at the start"), Origin::New),
    }
}

impl Parent {
    /// Opens what it needs, and stops what an earlier guard may have left running. Also what every agent must be told.
    fn begin(paths: Paths) -> anyhow::Result<(Self, Vec<String>)> {
        let program = std::env::current_exe().context("the path of this program")?;
        let mut mask = SigSet::empty();
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|signal| mask.add(signal));
        mask.thread_block().context("blocking signals")?;
        let (memory, origin) = memory();
        std::fs::create_dir_all(&paths.kept).with_context(|| paths.kept.display().to_string())?;
        kept::end_last(&paths.kept, true);
        drop(privileges::claim()); // The child tells what is refused to both.
        let mut warnings = Vec::new();
        if let Err(error) = real_time(PRIORITY + 1) {
            warnings.push(format!(
                "mainstay-guard: its parent has no real-time priority ({error}); allow it (LimitRTPRIO)"
            ));
        }
        if origin == Origin::New
            && let Err(error) = notify::store(memory.fd())
        {
            warnings.push(format!(
                "mainstay-guard: systemd does not keep its memory ({error}); a restart ends every lease of this host"
            ));
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let timer = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let mut parent = Self {
            program,
            memory,
            news: EventFd::from_flags(flags)?,
            signals: SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            timer: TimerFd::new(ClockId::CLOCK_BOOTTIME, timer)?,
            held: Vec::new(),
            watchdog: None,
            timing: Timing::DEFAULT,
            paths,
        };
        warnings.extend(parent.begin_watchdog());
        if origin != Origin::Executed {
            // Whatever stopped the last guard may have left something running, and nobody has promised anything.
            parent.hold();
            parent.stop_everything();
            parent.memory.board().promise(Time::NEVER);
        }
        Ok((parent, warnings))
    }

    /// Takes a descriptor of every QEMU in the memory.
    fn hold(&mut self) {
        let Some(bytes) = self.memory.read() else { return };
        let Ok(carried) = Carried::decode(&bytes) else { return };
        self.follow(carried.config().map_or(Timing::DEFAULT, |config| config.timing));
        let wanted: Vec<ProcessKey> = carried.processes().collect();
        self.held.retain(|process| wanted.contains(&process.key()));
        for key in wanted {
            if !self.held.iter().any(|process| process.key() == key) {
                // Gone, or no descriptor left: the list in /run is the second way to it.
                self.held.extend(Process::open(key).ok().flatten());
            }
        }
    }

    /// Opens the watchdog, if one is configured. What stands in its way is no reason not to guard.
    fn begin_watchdog(&mut self) -> Option<String> {
        let config = config::load(&self.paths.config).map(|config| config.guard.watchdog);
        let handed = std::env::var(HANDED_WATCHDOG).ok().and_then(|text| text.parse().ok()).and_then(notify::take);
        let opened = match (config, handed) {
            (Ok(Some(path)), Some(fd)) => Ok(Some(Watchdog::handed(fd, &path, ask_device))),
            (Ok(Some(path)), None) => Watchdog::open(&path, ask_device)
                .map(Some)
                .map_err(|error| format!("{}: {error}; does systemd (RuntimeWatchdogSec) use it?", path.display())),
            (Ok(None), _) => Ok(None),
            (Err(error), _) => Err(error.to_string()),
        };
        let standing = match opened {
            Ok(Some(mut watchdog)) => {
                let standing = watchdog.set(&self.timing);
                self.watchdog = Some(watchdog);
                standing
            }
            Ok(None) => Standing::None,
            Err(why) => Standing::Failed(format!("hardware watchdog: {why}")),
        };
        self.tell(&standing)
    }

    /// Another lease needs another time-out.
    fn follow(&mut self, timing: Timing) {
        if std::mem::replace(&mut self.timing, timing) == timing {
            return;
        }
        if let Some(watchdog) = &mut self.watchdog {
            let standing = watchdog.set(&timing);
            self.tell(&standing);
        }
    }

    /// Log and doctor; what every agent must know.
    fn tell(&self, standing: &Standing) -> Option<String> {
        drop(kept::write_standing(&self.paths.kept, standing)); // Only doctor would miss it.
        match standing {
            Standing::None => {
                tracing::info!("no hardware watchdog: should systemd itself hang on this host, nothing resets it");
                None
            }
            Standing::Safe(text) => {
                tracing::info!("{text}");
                None
            }
            Standing::Late(text) | Standing::Failed(text) => {
                tracing::warn!("{text}");
                Some(format!("mainstay-guard: {text}"))
            }
        }
    }

    fn start(&mut self, warnings: &[String]) -> anyhow::Result<Child> {
        let (from, to) = std::io::pipe().context("a pipe to the child")?;
        // SAFETY: this process has one thread, so that nothing is locked or half done in the child.
        match unsafe { fork() }.context("the child could not be made")? {
            ForkResult::Child => {
                drop(to);
                self.held.clear();
                self.watchdog = None; // Else a child that hangs would keep it from the next parent.
                let failed = SigSet::all().thread_unblock().map_err(anyhow::Error::from);
                let memory = Memory::adopt(self.memory.fd().try_clone_to_owned()?)?;
                let news = self.news.as_fd().try_clone_to_owned()?;
                let result = failed.and_then(|()| child::run(self.paths.clone(), memory, news, from, warnings));
                tracing::error!("{:#}", result.expect_err("a child that works never returns"));
                std::process::exit(1)
            }
            ForkResult::Parent { child } => {
                drop(from);
                let pid = u32::try_from(child.as_raw()).expect("a pid is positive");
                let key = |pid: u32| started(pid).map(|started| ProcessKey { pid, started });
                let (me, child) = (key(std::process::id()), key(pid));
                let pair = me.zip(child).map(|(parent, child)| Pair { parent, child });
                let pair = pair.context("/proc does not show this process")?;
                kept::write_pair(&self.paths.kept, &pair).with_context(|| self.paths.kept.display().to_string())?;
                let process = Process::open(pair.child)?.context("the child is gone at once")?;
                Ok(Child { process, to })
            }
        }
    }

    fn watch(&mut self, child: &Child) -> End {
        loop {
            let now = clock::now();
            let due = self.memory.board().due();
            if due < now {
                return End::Late(now.since(due));
            }
            self.sleep(due.min(now + TICK), child);
            if let Some(end) = died(child) {
                return end;
            }
            if self.news.read().is_ok() {
                self.hold();
            }
            match self.signals.read_signal().ok().flatten().map(|signal| signal.ssi_signo.cast_signed()) {
                Some(libc::SIGHUP) => return End::Reload,
                Some(_) => return End::Stop,
                None => {}
            }
        }
    }

    /// Until then, or until something comes that `watch` takes.
    fn sleep(&mut self, until: Time, child: &Child) {
        let timeout = self.arm(until);
        let fds = [self.timer.as_fd(), self.news.as_fd(), self.signals.as_fd(), child.process.pidfd()];
        let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let _ = poll(&mut fds, timeout); // Interrupted = look again, which is always right.
    }

    /// Until then, or until the child has ended. What else comes must wait, and must not keep this thread from waiting:
    /// nothing with less priority would run beside it.
    fn doze(&mut self, until: Time, child: &Child) {
        let timeout = self.arm(until);
        let mut fds = [self.timer.as_fd(), child.process.pidfd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let _ = poll(&mut fds, timeout); // As above.
    }

    /// Sets the timer; pets the watchdog, if all is well.
    fn arm(&mut self, until: Time) -> PollTimeout {
        let now = clock::now();
        let board = self.memory.board();
        let stands = board.moving().is_none_or(|since| now.since(since) < MOVES);
        let until = match &mut self.watchdog {
            Some(watchdog) if stands && now <= board.due() => {
                watchdog.pet(now);
                until.min(watchdog.next())
            }
            Some(_) | None => until,
        };
        let at = TimeSpec::from_duration(Duration::from_nanos(until.0.max(1) + 1));
        let armed = self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME);
        if armed.is_ok() { PollTimeout::NONE } else { PollTimeout::from(10u8) }
    }

    /// Ends the child in order: no further beats, and the last writes done. Its promise holds all the time.
    fn finish(&mut self, mut child: Child) {
        let until = clock::now() + ENDING;
        drop(child.to.write_all(&[FINISH])); // It may be gone already.
        let mut stopped = false;
        while !child.process.has_exited() && clock::now() < until {
            let due = if stopped { Time::NEVER } else { self.memory.board().due() };
            if due < clock::now() {
                self.stop_everything();
                stopped = true;
            }
            self.doze(until.min(due), &child);
        }
        self.end(&child, ENDING / 4);
        self.hold();
    }

    /// Kills the child, and waits for its end for a moment: a thread that hangs in dead storage ends later, but executes
    /// nothing more.
    fn end(&mut self, child: &Child, patience: Duration) {
        drop(child.process.kill()); // Refused = it has ended.
        let until = clock::now() + patience;
        while !child.process.has_exited() && clock::now() < until {
            self.doze(until, child);
        }
        let _ = died(child); // Reaped.
    }

    fn halt(&self) {
        self.held.iter().for_each(|process| drop(process.halt())); // Refused = it has exited.
        self.held.iter().for_each(|process| drop(process.freeze())); // Refused = the signal stands.
    }

    /// SIGSTOP to all, then their freezers; then whatever came up in between and is on the list in /run.
    /// True if all stand.
    fn stop_everything(&self) -> bool {
        self.halt();
        match kept::stop_all(&self.paths.kept, &self.paths.libvirt) {
            Ok((_, failed)) => {
                failed.iter().for_each(|line| tracing::error!("{line}"));
                failed.is_empty() && self.held.iter().all(Process::stands)
            }
            Err(error) => {
                tracing::error!("{}: {error}", self.paths.kept.display());
                false
            }
        }
    }

    /// Executes the program that lies there now, in this process. Returns only if that failed.
    fn execute(&self) -> anyhow::Error {
        let pass = || -> anyhow::Result<()> {
            fcntl(self.memory.fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
            if let Some(watchdog) = &self.watchdog {
                fcntl(watchdog.fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            let text = |text: std::ffi::OsString| CString::new(text.into_vec());
            let program = text(self.program.clone().into_os_string())?;
            let arguments: Vec<CString> = std::env::args_os().map(text).collect::<Result<_, _>>()?;
            let kept = std::env::vars_os().filter(|(name, _)| name != HANDED && name != HANDED_WATCHDOG);
            let mut variables: Vec<CString> = kept
                .map(|(mut name, value)| {
                    name.push("=");
                    name.push(value);
                    text(name)
                })
                .collect::<Result<_, _>>()?;
            variables.push(CString::new(format!("{HANDED}={}", self.memory.fd().as_raw_fd()))?);
            if let Some(watchdog) = &self.watchdog {
                variables.push(CString::new(format!("{HANDED_WATCHDOG}={}", watchdog.fd().as_raw_fd()))?);
            }
            nix::unistd::execve(&program, &arguments, &variables)?;
            Ok(())
        };
        let error = pass().expect_err("an exec that succeeds does not return");
        let handed = [Some(self.memory.fd()), self.watchdog.as_ref().map(Watchdog::fd)];
        for fd in handed.into_iter().flatten() {
            let _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)); // It was set so before.
        }
        error
    }
}

/// How the child ended, if it did.
fn died(child: &Child) -> Option<End> {
    let pid = Pid::from_raw(child.process.key().pid.cast_signed());
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Some(End::Died(format!("ended with code {code}"))),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(End::Died(format!("was killed by {signal}"))),
        Err(error) => Some(End::Died(format!("cannot be waited for ({error})"))),
        Ok(_) => None,
    }
}
