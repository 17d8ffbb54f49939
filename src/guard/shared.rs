//! The one lock, who is woken when something changed, and what outlives the process: the memory and two files.
//!
//! Every use of the state goes through `with`: leases that are due lapse first, then the work is done, then the memory
//! holds all of it, then reports go out; whoever must act on a change is woken after the lock was left. The enforcing
//! thread uses `enforce`, which leaves memory and reports to the watcher: it tells nobody anything.
//!
//! Deliberately not here: what the threads do.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::memory::{Board, Memory};
use super::plan::Plan;
use super::state::State;
use super::{kept, risen_above};
use crate::exec::clock;
use crate::exec::state::{HostState, StateFile};
use crate::types::guard::GuardConfig;
use crate::types::{Incarnation, Time};

/// Where everything lies.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Socket for the agent.
    pub socket: PathBuf,
    /// Two-slot file of host id and incarnation.
    pub state: PathBuf,
    /// Folder with the rows that `--stop-all` needs.
    pub kept: PathBuf,
    /// libvirt's folder of pid files.
    pub libvirt: PathBuf,
    /// The host's configuration.
    pub config: PathBuf,
}

/// The state file and what it says.
pub type Identity = (StateFile<HostState>, HostState);

/// See the module.
pub struct Shared {
    /// Where everything lies.
    pub paths: Paths,
    /// Who must stop when.
    pub plan: Plan,
    /// What is promised to the parent.
    pub board: Arc<Board>,
    state: Mutex<Inner>,
    changed: Condvar,
    enforcer: EventFd,
    watcher: EventFd,
    /// Tells the parent that rows changed.
    news: OwnedFd,
    /// Version of the table that was kept last.
    keeper: Mutex<Option<u64>>,
    identity: Mutex<Identity>,
}

struct Inner {
    state: State,
    memory: Memory,
    /// What the memory holds.
    held: Option<(u64, u64)>,
}

impl Inner {
    /// Makes memory and plan hold what the state says, if they do not.
    fn hold(&mut self, plan: &Plan) {
        let changes = self.state.changes();
        if self.held == Some(changes) {
            return;
        }
        if !self.memory.write(&self.state.carry().encode()) && self.held.is_some() {
            self.state.warn(
                "mainstay-guard: its memory is full or was refused; its next restart ends every lease of this host"
                    .to_owned(),
            );
        }
        let rows = self.held.is_none_or(|(table, _)| table != changes.0);
        self.held = Some(changes);
        plan.follow(&self.state, rows);
    }
}

impl Shared {
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn new(paths: Paths, state: State, memory: Memory, news: OwnedFd, identity: Identity) -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            paths,
            plan: Plan::default(),
            board: memory.board(),
            state: Mutex::new(Inner { state, memory, held: None }),
            news,
            changed: Condvar::new(),
            enforcer: EventFd::from_flags(flags)?,
            watcher: EventFd::from_flags(flags)?,
            keeper: Mutex::new(None),
            identity: Mutex::new(identity),
        })
    }

    /// Uses the state at one moment. Must not do I/O inside.
    pub fn with<R>(&self, work: impl FnOnce(&mut State, Time) -> R) -> R {
        let mut inner = self.lock();
        let (before, due) = (inner.state.table.version(), inner.state.next_stop());
        let now = clock::now();
        inner.state.lapse_if_due(now);
        let result = work(&mut inner.state, now);
        let unheld = inner.held.is_none_or(|(table, _)| table != inner.state.table.version());
        inner.hold(&self.plan);
        inner.state.flush();
        let changed = before != inner.state.table.version();
        let sooner = inner.state.next_stop().is_some_and(|next| due.is_none_or(|due| next < due));
        drop(inner);
        if unheld {
            let _ = nix::unistd::write(&self.news, &1u64.to_ne_bytes()); // Full = already told.
        }
        if changed || sooner {
            wake(&self.enforcer);
        }
        if changed {
            wake(&self.watcher);
            self.changed.notify_all();
        }
        result
    }

    /// Uses the state on the enforcing thread. What changes is told by the watcher, after the memory holds it.
    pub fn enforce<R>(&self, work: impl FnOnce(&mut State, Time) -> R) -> R {
        let mut inner = self.lock();
        let before = inner.state.changes();
        let now = clock::now();
        inner.state.lapse_if_due(now);
        let result = work(&mut inner.state, now);
        let changed = before != inner.state.changes();
        drop(inner);
        if changed {
            wake(&self.watcher);
            self.changed.notify_all();
        }
        result
    }

    /// Waits until `ready` says so or `until` has come.
    pub fn wait(&self, until: Time, ready: impl Fn(&State) -> bool) {
        let mut state = self.lock();
        loop {
            let left = until.since(clock::now());
            if ready(&state.state) || left == Duration::ZERO {
                return;
            }
            // CLOCK_MONOTONIC stands still while a host sleeps, so look again at least each second.
            let left = left.min(Duration::from_secs(1));
            state = self.changed.wait_timeout(state, left).map_or_else(|_| never(), |(state, _)| state);
        }
    }

    /// Wakes everybody: the configuration changed, or there are hints.
    pub fn wake_all(&self) {
        wake(&self.enforcer);
        wake(&self.watcher);
        self.changed.notify_all();
    }

    /// Readable when the enforcing thread must look.
    pub fn enforcer(&self) -> BorrowedFd<'_> {
        self.enforcer.as_fd()
    }

    /// Readable when the watcher must look.
    pub fn watcher(&self) -> BorrowedFd<'_> {
        self.watcher.as_fd()
    }

    /// Takes the enforcing thread's wake-up.
    pub fn enforcer_woken(&self) {
        let _ = self.enforcer.read(); // Nothing to read = nothing to take.
    }

    /// Takes the watcher's wake-up.
    pub fn watcher_woken(&self) {
        let _ = self.watcher.read(); // Nothing to read = nothing to take.
    }

    /// Writes the rows for `--stop-all`, if they changed. When it returns, all that was in the table is kept.
    ///
    /// # Errors
    /// Of the file system.
    pub fn keep(&self) -> std::io::Result<()> {
        let mut keeper = self.keeper.lock().unwrap_or_else(|_| never());
        let (version, rows) = {
            let state = &self.lock().state;
            if *keeper == Some(state.table.version()) {
                return Ok(());
            }
            let scope = |key| Some(state.processes.get(&key)?.scope()?.display().to_string());
            (state.table.version(), state.table.kept(scope))
        };
        kept::write(&self.paths.kept, &rows)?;
        *keeper = Some(version);
        Ok(())
    }

    /// Takes an incarnation above `above`, durably first. Does nothing if ours is higher already.
    ///
    /// # Errors
    /// When it cannot be made durable: then there must be no beat.
    pub fn rise(&self, above: Incarnation) -> Result<(), String> {
        let mut identity = self.identity.lock().unwrap_or_else(|_| never());
        let (file, known) = &mut *identity;
        if above < known.incarnation {
            return Ok(());
        }
        let next = HostState { incarnation: risen_above(above, u32::from_le_bytes(clock::random())), ..*known };
        file.write(&next).map_err(|error| error.to_string())?;
        *known = next;
        self.with(|state, _| state.restart(next.incarnation));
        Ok(())
    }

    /// Keeps the host's id beside the incarnation.
    ///
    /// # Errors
    /// When it cannot be made durable.
    pub fn name(&self, config: &GuardConfig) -> Result<(), String> {
        let mut identity = self.identity.lock().unwrap_or_else(|_| never());
        let (file, known) = &mut *identity;
        if known.host == Some(config.host) {
            return Ok(());
        }
        let next = HostState { host: Some(config.host), ..*known };
        file.write(&next).map_err(|error| error.to_string())?;
        *known = next;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(|_| never())
    }
}

fn wake(event: &EventFd) {
    let _ = event.write(1); // Full = already woken.
}

/// A thread that panics ends the process before it lets go of a lock.
fn never() -> ! {
    unreachable!("the panic hook aborts")
}
