//! The enforcing thread: waits for nothing but time and changes of the table, and stops, lifts, kills.
//!
//! ```text
//! ┌─► strike: SIGSTOP and freeze all whose lease ends ─► promise ─► leases due lapse ─► what must each QEMU do? ─►
//! │   SIGSTOP all ─► freeze all ─► seen standing? ─► promise ─► poll(timer, event, parent) ─┐
//! └─────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! It alone stops and lifts, so the two cannot overtake each other. It does no file or log I/O that storage or journal
//! could hold up; `/proc` and cgroup files are memory. The timer runs on CLOCK_BOOTTIME, so a host that slept wakes it.
//!
//! The strike comes before everything that could wait: it takes the plan's lock only, and allocates nothing (a test
//! counts). Where memory is short, an allocation may wait for a disk that hangs.
//!
//! The promise is the moment until which the next strike will have been done. The parent holds it to that: a child that
//! was stopped, or hangs, is late for it, and then the parent stops everything. The parent's own death is seen here: the
//! child stops everything and ends, since nobody would hold it to its promise any more; systemd starts both anew, and
//! what had a valid lease goes on then. To go on alone would be a needless risk, to find a new parent a second way up.
//!
//! While a VM is being handed over, each turn also samples its vCPU time (`handover`).
//!
//! Deliberately not here: looking for processes (`watch`), beats (`renew`, `network`).

use std::collections::BTreeMap;
use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::handover::Sampler;
use super::memory::Board;
use super::notify::Notify;
use super::plan::{Plan, STRUCK_MAX};
use super::process::Process;
use super::shared::Shared;
use super::table::{Act, ProcessKey};
use crate::core::timing::ENFORCER_TICK;
use crate::exec::clock;
use crate::types::{Time, VmId};

/// Between two looks whether a QEMU stands: at first, and when it took longer than `SLOW`.
const CHECK_EVERY: Duration = Duration::from_millis(1);
const CHECK_SLOWLY: Duration = Duration::from_millis(20);
const SLOW: Duration = Duration::from_millis(100);
/// Below the threads of the kernel that move interrupts and RCU, above everything else. The parent is one above.
pub const PRIORITY: i32 = 50;
/// A process that ends in order waits for writes that are under way: so long, and looks so often.
const LAST_WRITES: Duration = Duration::from_millis(300);
const LAST_LOOK: Duration = Duration::from_millis(2);
/// The parent asks the child to end in order.
pub const FINISH: u8 = b'f';

/// A stop under way.
struct Stopping {
    since: Time,
    told: bool,
}

struct Enforcer<'a> {
    shared: &'a Shared,
    handover: Sampler,
    stopping: BTreeMap<ProcessKey, Stopping>,
    /// With room for all, so that a strike needs no memory.
    struck: Vec<Arc<Process>>,
    /// When the parent asked to end.
    finishing: Option<Time>,
}

/// Runs until the parent dies or asks to end.
pub fn run(shared: &Shared, mut parent: PipeReader) {
    if let Err(error) = real_time(PRIORITY) {
        shared.enforce(|state, _| state.real_time_refused(&error.to_string()));
    }
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
        .expect("the kernel has timerfd, and descriptors are left at the start");
    let mut notify = Notify::from_environment();
    let struck = Vec::with_capacity(STRUCK_MAX);
    let mut enforcer =
        Enforcer { shared, handover: Sampler::default(), stopping: BTreeMap::new(), struck, finishing: None };
    loop {
        let wake_at = enforcer.turn();
        notify.ping(clock::now());
        let woken = sleep(shared, &timer, &parent, wake_at);
        let now = clock::now();
        shared.enforcer_woken();
        match woken {
            Woken::Time => {
                enforcer.strike(now);
                shared.enforce(|state, _| state.woke_late(now.since(wake_at), now));
            }
            Woken::Event => enforcer.strike(now),
            Woken::Parent => enforcer.parent(&mut parent, now),
        }
    }
}

impl Enforcer<'_> {
    /// Stops what runs on a lease that ends, before anything is asked that could wait.
    fn strike(&mut self, now: Time) {
        strike(&self.shared.plan, &self.shared.board, now, &mut self.struck);
    }

    /// Something came from the parent: an order to end, or its death.
    fn parent(&mut self, parent: &mut PipeReader, now: Time) {
        let mut order = [0];
        if parent.read(&mut order).is_ok_and(|read| 0 < read) && order[0] == FINISH {
            self.finishing = Some(now);
            self.shared.enforce(|state, _| state.finish());
            return;
        }
        self.shared.plan.everything(&mut self.struck);
        self.struck.iter().for_each(|process| drop(process.halt())); // As in a strike.
        self.struck.iter().for_each(|process| drop(process.freeze()));
        leave(1);
    }

    /// Does what is to be done now; when to wake next.
    fn turn(&mut self) -> Time {
        let sample = self.handover.turn(self.shared);
        let struck = &mut self.struck;
        let (acts, next, quiet) = self.shared.enforce(|state, now| {
            struck.drain(..).for_each(|process| state.table.struck(process.key()));
            let acts = state.table.reconcile();
            let found = |act: Act| {
                let key = act.key();
                state.processes.get(&key).cloned().map(|process| (act, process))
            };
            let acts: Vec<(Act, Arc<Process>)> = acts.into_iter().filter_map(found).collect();
            let tick = now + ENFORCER_TICK;
            (acts, state.next_stop().map_or(tick, |stop| stop.min(tick)), state.is_quiet())
        });
        // Before anything is lifted: from then on the parent holds this thread to it.
        promise(&self.shared.plan, &self.shared.board, clock::now());
        self.stop_all(&acts);
        for (act, process) in acts {
            match act {
                Act::Stop(..) => {}
                Act::Check(vm, key) => self.check(vm, key, &process),
                Act::Lift(vm, key) => self.lift(vm, key, &process),
                Act::Kill(vm, _, why) => self.kill(vm, &why, &process),
            }
        }
        let now = clock::now();
        promise(&self.shared.plan, &self.shared.board, now);
        self.shared.board.tell_moving(self.stopping.values().map(|stopping| stopping.since).min());
        let next = [self.next_check(), sample].into_iter().flatten().fold(next, Time::min);
        match self.finishing {
            Some(since) if quiet || LAST_WRITES <= now.since(since) => leave(0),
            Some(_) => next.min(now + LAST_LOOK),
            None => next,
        }
    }

    /// Signals go to all before the first freezer is told.
    fn stop_all(&mut self, acts: &[(Act, Arc<Process>)]) {
        let stops = || acts.iter().filter(|(act, _)| matches!(act, Act::Stop(..)));
        for (act, process) in stops() {
            self.stopping.insert(act.key(), Stopping { since: clock::now(), told: false });
            drop(process.halt()); // Refused = it has exited, or the check says so.
        }
        for (_, process) in stops() {
            drop(process.freeze()); // Refused = the signal stands; the check goes by the threads.
        }
    }

    fn check(&mut self, vm: VmId, key: ProcessKey, process: &Process) {
        let now = clock::now();
        let stopping = self.stopping.entry(key).or_insert(Stopping { since: now, told: false });
        let took = now.since(stopping.since);
        if process.stands() {
            self.stopping.remove(&key);
            self.shared.enforce(|state, _| {
                state.table.stands(vm, key);
                state.say(format!("VM {vm}: stands, {took:?} after SIGSTOP"));
            });
            return;
        }
        if SLOW <= took && !stopping.told {
            stopping.told = true;
            self.shared
                .enforce(|state, _| state.alarm(format!("VM {vm}: still moves {took:?} after SIGSTOP; goes on")));
        }
        if SLOW <= took {
            drop(process.halt()); // A stray SIGCONT may have come between.
            drop(process.freeze());
        }
    }

    fn lift(&mut self, vm: VmId, key: ProcessKey, process: &Process) {
        self.stopping.remove(&key);
        if let Err(error) = process.lift() {
            self.shared.enforce(|state, _| state.alarm(format!("VM {vm}: the stop could not be lifted: {error}")));
        }
    }

    fn kill(&mut self, vm: VmId, why: &str, process: &Process) {
        let result = process.kill();
        self.shared.enforce(|state, _| match result {
            Ok(()) => state.alarm(format!("VM {vm}: killed: {why}")),
            Err(error) => state.say(format!("VM {vm}: SIGKILL: {error}")),
        });
    }

    fn next_check(&mut self) -> Option<Time> {
        if self.stopping.is_empty() {
            return None;
        }
        let now = clock::now();
        let stopping = &mut self.stopping;
        self.shared.enforce(|state, _| stopping.retain(|key, _| state.processes.contains_key(key)));
        let pace = |stopping: &Stopping| if now.since(stopping.since) < SLOW { CHECK_EVERY } else { CHECK_SLOWLY };
        self.stopping.values().map(pace).min().map(|pause| now + pause)
    }
}

/// The stop itself: allocates nothing, and waits for nothing but the plan's lock.
fn strike(plan: &Plan, board: &Board, now: Time, struck: &mut Vec<Arc<Process>>) {
    plan.strike(now, struck);
    struck.iter().for_each(|process| drop(process.halt())); // Refused = it has exited.
    struck.iter().for_each(|process| drop(process.freeze())); // Refused = the signal stands.
    promise(plan, board, now);
}

/// Until when the next strike will have been done.
fn promise(plan: &Plan, board: &Board, now: Time) {
    board.promise(plan.next(now).map_or(Time::NEVER, |(_, due)| due));
}

/// What woke it.
enum Woken {
    Time,
    Event,
    Parent,
}

/// Ends this process and nothing else: no thread of it is waited for.
fn leave(code: i32) -> ! {
    // SAFETY: ends the process at once, without running anything of it.
    unsafe { libc::_exit(code) }
}

fn sleep(shared: &Shared, timer: &TimerFd, parent: &PipeReader, until: Time) -> Woken {
    // Zero would disarm the timer.
    let at = TimeSpec::from_duration(Duration::from_nanos(until.0.max(1)));
    let armed = timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME);
    let timeout = if armed.is_ok() { PollTimeout::NONE } else { PollTimeout::from(1u8) };
    let mut fds = [timer.as_fd(), shared.enforcer(), parent.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    let _ = poll(&mut fds, timeout); // Interrupted = look again, which is always right.
    let ready = |at: usize| fds[at].revents().is_some_and(|events| !events.is_empty());
    match (ready(2), ready(1), ready(0)) {
        (true, _, _) => Woken::Parent,
        (false, false, true) => Woken::Time,
        (false, true, _) | (false, false, false) => Woken::Event,
    }
}

/// Puts the calling thread before everything that is not real-time; threads and processes that it makes are not.
///
/// # Errors
/// When the kernel refuses.
pub fn real_time(priority: i32) -> std::io::Result<()> {
    let parameter = libc::sched_param { sched_priority: priority };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 is the calling thread; the parameter lives through the call and is only read.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
