//! The enforcing thread: waits for nothing but time and changes of the table, and stops, lifts, kills.
//!
//! ```text
//! ┌─► leases due lapse ─► what must each QEMU do? ─► SIGSTOP all ─► freeze all ─► seen standing? ─► poll(timer, event) ─┐
//! └─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! It alone stops and lifts, so the two cannot overtake each other. It does no file or log I/O that storage or journal
//! could hold up; `/proc` and cgroup files are memory. The timer runs on CLOCK_BOOTTIME, so a host that slept wakes it.
//!
//! While a VM is being handed over, each turn also samples its vCPU time (`handover`).
//!
//! Deliberately not here: looking for processes (`watch`), beats (`renew`, `network`).

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::handover::Sampler;
use super::notify::Notify;
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
/// Below the threads of the kernel that move interrupts and RCU, above everything else.
const PRIORITY: i32 = 50;

/// A stop under way.
struct Stopping {
    since: Time,
    told: bool,
}

struct Enforcer<'a> {
    shared: &'a Shared,
    handover: Sampler,
    stopping: BTreeMap<ProcessKey, Stopping>,
}

/// Runs for ever.
pub fn run(shared: &Shared) {
    if let Err(error) = real_time() {
        shared.with(|state, _| state.real_time_refused(&error.to_string()));
    }
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
        .expect("the kernel has timerfd, and descriptors are left at the start");
    let mut notify = Notify::from_environment();
    let mut enforcer = Enforcer { shared, handover: Sampler::default(), stopping: BTreeMap::new() };
    loop {
        let wake_at = enforcer.turn();
        notify.ping(clock::now());
        let woken_by_time = sleep(shared, &timer, wake_at);
        shared.enforcer_woken();
        let now = clock::now();
        if woken_by_time {
            shared.with(|state, _| state.woke_late(now.since(wake_at), now));
        }
    }
}

impl Enforcer<'_> {
    /// Does what is to be done now; when to wake next.
    fn turn(&mut self) -> Time {
        let sample = self.handover.turn(self.shared);
        let (acts, next) = self.shared.with(|state, now| {
            let acts = state.table.reconcile();
            let found = |act: Act| {
                let key = act.key();
                state.processes.get(&key).cloned().map(|process| (act, process))
            };
            let acts: Vec<(Act, Arc<Process>)> = acts.into_iter().filter_map(found).collect();
            let tick = now + ENFORCER_TICK;
            (acts, state.next_stop().map_or(tick, |stop| stop.min(tick)))
        });
        self.stop_all(&acts);
        for (act, process) in acts {
            match act {
                Act::Stop(..) => {}
                Act::Check(vm, key) => self.check(vm, key, &process),
                Act::Lift(vm, key) => self.lift(vm, key, &process),
                Act::Kill(vm, _, why) => self.kill(vm, &why, &process),
            }
        }
        [self.next_check(), sample].into_iter().flatten().fold(next, Time::min)
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
            self.shared.with(|state, _| {
                state.table.stands(vm, key);
                state.say(format!("VM {vm}: stands, {took:?} after SIGSTOP"));
            });
            return;
        }
        if SLOW <= took && !stopping.told {
            stopping.told = true;
            self.shared.with(|state, _| state.alarm(format!("VM {vm}: still moves {took:?} after SIGSTOP; goes on")));
        }
        if SLOW <= took {
            drop(process.halt()); // A stray SIGCONT may have come between.
            drop(process.freeze());
        }
    }

    fn lift(&mut self, vm: VmId, key: ProcessKey, process: &Process) {
        self.stopping.remove(&key);
        if let Err(error) = process.lift() {
            self.shared.with(|state, _| state.alarm(format!("VM {vm}: the stop could not be lifted: {error}")));
        }
    }

    fn kill(&mut self, vm: VmId, why: &str, process: &Process) {
        let result = process.kill();
        self.shared.with(|state, _| match result {
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
        self.shared.with(|state, _| stopping.retain(|key, _| state.processes.contains_key(key)));
        let pace = |stopping: &Stopping| if now.since(stopping.since) < SLOW { CHECK_EVERY } else { CHECK_SLOWLY };
        self.stopping.values().map(pace).min().map(|pause| now + pause)
    }
}

/// True if time woke it.
fn sleep(shared: &Shared, timer: &TimerFd, until: Time) -> bool {
    // Zero would disarm the timer.
    let at = TimeSpec::from_duration(Duration::from_nanos(until.0.max(1)));
    let armed = timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME);
    let timeout = if armed.is_ok() { PollTimeout::NONE } else { PollTimeout::from(1u8) };
    let mut fds = [PollFd::new(timer.as_fd(), PollFlags::POLLIN), PollFd::new(shared.enforcer(), PollFlags::POLLIN)];
    let _ = poll(&mut fds, timeout); // Interrupted = look again, which is always right.
    fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN))
        && !fds[1].revents().is_some_and(|events| events.contains(PollFlags::POLLIN))
}

fn real_time() -> std::io::Result<()> {
    let parameter = libc::sched_param { sched_priority: PRIORITY };
    // SAFETY: 0 is the calling thread; the parameter lives through the call and is only read.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameter) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
