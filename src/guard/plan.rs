//! Who must stop at the end of which lease: kept beside the state, so that a stop waits for nobody and allocates nothing.
//!
//! ```text
//! state changed ──► dues, runs (whoever changed it, before it lets go of the state)
//! time has come ──► strike: the plan's lock alone, signals, freezers ──► then the table is told
//! ```
//!
//! The state's lock may be held by a thread whose memory allocation waits for a disk that hangs; this one never is: its
//! vectors are filled in advance, and swapped in.
//!
//! Deliberately not here: every other reason to stop a VM; those have time (`table`).

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::process::Process;
use super::state::State;
use super::table::MAX_ROWS;
use crate::core::timing;
use crate::types::{DatastoreId, Time};

/// The end of one lease.
#[derive(Clone, Copy, Debug)]
struct Due {
    home: DatastoreId,
    stop_at: Time,
    /// After this the parent stops everything itself.
    grace: Duration,
}

impl Due {
    fn of((home, stop_at, lease): &(DatastoreId, Time, Duration)) -> Self {
        Self { home: *home, stop_at: *stop_at, grace: timing::reserve(*lease) / 2 }
    }
}

/// A VM with its home there, and its process.
type Run = (DatastoreId, Arc<Process>);

#[derive(Default)]
struct Lists {
    dues: Vec<Due>,
    runs: Vec<Run>,
}

/// See the module.
#[derive(Default)]
pub struct Plan {
    lists: Mutex<Lists>,
}

impl Plan {
    /// Follows the state. `rows`: the rows changed, too. Called while the state is locked, so that plans follow each other
    /// as the states did.
    pub fn follow(&self, state: &State, rows: bool) {
        let mut dues: Vec<Due> = state.leases().map(|lease| Due::of(&lease)).collect();
        let mut runs: Option<Vec<Run>> = rows.then(|| {
            let held = |(home, key)| Some((home, Arc::clone(state.processes.get(&key)?)));
            state.table.runs().filter_map(held).collect()
        });
        let mut lists = self.lock();
        std::mem::swap(&mut lists.dues, &mut dues);
        if let Some(runs) = &mut runs {
            std::mem::swap(&mut lists.runs, runs);
        }
        drop(lists); // What was there before is freed after it.
    }

    /// Puts into `struck` every process whose lease ends at `now` or has ended. Never allocates: `struck` has room for
    /// `STRUCK_MAX`.
    pub fn strike(&self, now: Time, struck: &mut Vec<Arc<Process>>) {
        let lists = self.lock();
        for due in lists.dues.iter().filter(|due| due.stop_at <= now) {
            let hit = lists.runs.iter().filter(|(home, _)| *home == due.home);
            hit.take(STRUCK_MAX - struck.len()).for_each(|(_, process)| struck.push(Arc::clone(process)));
        }
    }

    /// When the next lease under which something runs ends, after `now`; and until when that must have been enforced.
    #[must_use]
    pub fn next(&self, now: Time) -> Option<(Time, Time)> {
        let lists = self.lock();
        let runs = |due: &&Due| now < due.stop_at && lists.runs.iter().any(|(home, _)| *home == due.home);
        let next = lists.dues.iter().filter(runs).map(|due| (due.stop_at, due.stop_at + due.grace));
        next.min_by_key(|(stop_at, _)| *stop_at)
    }

    /// Every process that may run now, whatever its lease.
    pub fn everything(&self, struck: &mut Vec<Arc<Process>>) {
        let lists = self.lock();
        let all = lists.runs.iter().take(STRUCK_MAX - struck.len());
        all.for_each(|(_, process)| struck.push(Arc::clone(process)));
    }

    /// With these leases and these processes.
    #[cfg(test)]
    pub fn of(leases: &[(DatastoreId, Time, Duration)], runs: Vec<Run>) -> Self {
        let dues = leases.iter().map(Due::of).collect();
        Self { lists: Mutex::new(Lists { dues, runs }) }
    }

    fn lock(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(|_| unreachable!("the panic hook aborts"))
    }
}

/// The most processes that are stopped at once: each stands once per home, of which it has two while it moves.
pub const STRUCK_MAX: usize = 2 * MAX_ROWS;
