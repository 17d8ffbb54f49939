//! The guard: the small process that owns the right to run. No libvirt, no async, no claims made.
//!
//! ```text
//!           agent ◄── socket ──► orders ─┐            ┌─► renew (one thread per datastore) ──► beats, VM lists
//!                                        ▼            │
//!                              ┌── shared(state) ─────┼─► network ──► sealed datagrams
//!     enforce (FIFO) ◄─────────┤   leases · table     │
//!     SIGSTOP, freeze, SIGKILL └──────────────────────┴─► watch ──► pid files, exits, rows kept in /run
//! ```
//!
//! Its death is survived by others: systemd runs `--stop-all`, which stops every QEMU of a kept row, and starts a new
//! guard, whose rows come up as over. So a panic in any thread ends the process at once.
//!
//! Deliberately not here yet: parent and child, carrying on through a memfd, the hardware watchdog.

mod enforce;
mod kept;
mod network;
mod notify;
mod orders;
mod process;
mod renew;
mod shared;
mod socket;
pub mod state; // These three are pure: the simulator runs them, too.
pub mod store;
pub mod table;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

use crate::exec::clock;
use crate::exec::state::{HostState, Read, StateFile};
use crate::mutants::{Mutant, planted};
use crate::types::Incarnation;

pub use kept::stop_all;
pub use renew::ends;
pub use shared::Paths;

/// Stack of each thread: they are few and shallow, and locked in memory.
const STACK: usize = 512 * 1024;

impl Default for Paths {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/run/mainstay/guard.sock"),
            state: PathBuf::from("/var/lib/mainstay/host.state"),
            kept: PathBuf::from("/run/mainstay/guard"),
            libvirt: PathBuf::from("/run/libvirt/qemu"),
        }
    }
}

/// Runs the guard; never returns but with an error.
///
/// # Errors
/// When it cannot begin: state file, kept rows, socket, threads.
pub fn run(paths: Paths) -> anyhow::Result<()> {
    abort_on_panic();
    std::fs::create_dir_all(&paths.kept).with_context(|| paths.kept.display().to_string())?;
    let privileges = claim_privileges();
    let boot = clock::boot_id().context("boot id")?;
    let (file, identity) = next_incarnation(&paths.state)?;
    let mut table = table::Table::default();
    let processes = kept::restore(&paths.kept, &mut table)
        .with_context(|| format!("{}: rows of the last guard", paths.kept.display()))?;
    let mut state = state::State::new(boot, identity.incarnation, table);
    state.processes.extend(processes.into_iter().map(|process| (process.key(), Arc::new(process))));
    privileges.into_iter().for_each(|text| state.alarm(text));
    let shared = Arc::new(shared::Shared::new(paths, state, file, identity)?);
    let listener = socket::listen(&shared).with_context(|| shared.paths.socket.display().to_string())?;
    let start = |name: &str, body: fn(&shared::Shared)| {
        let shared = Arc::clone(&shared);
        spawn(name, move || body(&shared))
    };
    start("enforce", enforce::run)?;
    start("watch", watch::run)?;
    start("network", network::run)?;
    drop(sd_notify::notify(&[sd_notify::NotifyState::Ready])); // Started by hand: nobody listens.
    tracing::info!("incarnation {} of boot {boot}", identity.incarnation);
    socket::serve(&shared, &listener);
    anyhow::bail!("the socket for the agent ended")
}

/// A thread with a small stack.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(body).map(drop)
}

/// A guard that lost a thread is no guard: systemd starts another.
fn abort_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tell(info);
        std::process::abort();
    }));
}

/// Opens the state file and takes the next incarnation, durably. If nothing is known: the clock of day in microseconds,
/// which every datastore is asked to confirm before the first beat there.
fn next_incarnation(path: &Path) -> anyhow::Result<(StateFile<HostState>, HostState)> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut file = StateFile::<HostState>::open(path)?;
    let identity = match file.read()? {
        Read::Known(known) => HostState { incarnation: risen(known.incarnation), ..known },
        Read::Unknown { why } => {
            tracing::warn!("{why}; the incarnation begins with the clock of day");
            HostState { host: None, incarnation: Incarnation(clock::unix_ms() * 1000) }
        }
    };
    file.write(&identity)?;
    Ok((file, identity))
}

/// The incarnation of a guard that begins after one of incarnation `known`.
#[must_use]
pub fn risen(known: Incarnation) -> Incarnation {
    if planted(Mutant::CounterReused) { known } else { known.next() }
}

/// Everything that makes it less likely that this process is late or killed. What is refused is told, and goes on.
fn claim_privileges() -> Vec<String> {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    let mut refused = Vec::new();
    let unlimited = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    // Only what is touched is held, so that stacks cost what they use.
    let flags = MlockAllFlags::MCL_CURRENT.union(MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT));
    let flags = if unlimited.is_ok() { flags | MlockAllFlags::MCL_FUTURE } else { flags };
    if let Err(error) = mlockall(flags) {
        refused.push(format!("mainstay-guard: memory cannot be locked ({error}); set LimitMEMLOCK=infinity"));
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        refused.push(format!("mainstay-guard: may be killed when memory runs out ({error}); set OOMScoreAdjust=-1000"));
    }
    // SAFETY: three integers; 0 is this process. Threads to come inherit it.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) } != 0 {
        refused.push("mainstay-guard: has no priority over other processes; it must run as root".to_owned());
    }
    refused
}
