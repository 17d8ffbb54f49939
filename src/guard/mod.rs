//! The guard: the small process that owns the right to run. No libvirt, no async, no claims made.
//!
//! ```text
//!     parent ── fork, watches ──► child:
//!           agent ◄── socket ──► orders ─┐            ┌─► renew (one thread per datastore) ──► beats, VM lists
//!                                        ▼            │
//!                              ┌── shared(state) ─────┼─► network ──► sealed datagrams
//!     enforce (FIFO) ◄─────────┤   leases · table     │
//!     SIGSTOP, freeze, SIGKILL └──────────────────────┴─► watch ──► pid files, exits, rows kept in /run
//! ```
//!
//! Its death is survived by others: the parent stops everything when its child dies, the child when its parent does, and
//! `--stop-all`, run by systemd, when both are gone. Then systemd starts a new guard, which goes on with what the last one
//! handed on: what has a valid lease runs again under the same claim. So a panic in any thread ends the process at once.

mod child;
mod ends;
mod enforce;
mod handover;
mod kept;
mod memory;
mod network;
mod notify;
mod orders;
mod parent;
mod plan;
mod privileges;
mod process;
mod reload;
mod renew;
mod shared;
mod socket;
pub mod state; // These three are pure: the simulator runs them, too.
pub mod store;
pub mod table;
mod watch;
mod watchdog;

use std::path::PathBuf;

pub use child::{risen, risen_above};
pub use ends::ends;
pub use kept::stop_all;
pub use parent::run;
pub use reload::reload;
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
            config: PathBuf::from(crate::config::PATH),
        }
    }
}

/// A thread with a small stack.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(body).map(drop)
}
