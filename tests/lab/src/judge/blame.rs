//! Judge 5: whom the fault did not reach, it did not touch.
//!
//! ```text
//!  window   fault ├───────────────────┤ settled      VMs in its reach: anything may happen
//!  others   ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁     one copy, that does not end and rests at most 100 ms
//! ```
//!
//! An idle guest executes each 100 ms to write its record, so a rest of up to 100 ms, and 100 ms of pause, and two
//! samples are allowed. Time in which a vCPU only lacked a CPU of the lab's machine is no pause.

use std::time::Duration;

use uuid::Uuid;

use super::copy::Copy;
use super::{Moment, ms};
use crate::guest_disk::PERIOD_MS;

const PAUSE: Duration = Duration::from_millis(100);
const REST: Duration = Duration::from_millis(PERIOD_MS + 40);

/// A fault, with what it may reach.
#[derive(Clone, Debug)]
pub struct Window {
    /// For messages.
    pub what: String,
    /// When it was made.
    pub from: Moment,
    /// When all that follows from it was over; None: not yet.
    pub to: Option<Moment>,
    /// VMs that may be paused, stopped or moved.
    pub reach: Vec<Uuid>,
}

/// What happened to a VM outside the reach.
pub fn judge(name: &str, vm: Uuid, copies: &[Copy], window: &Window, now: Moment) -> Vec<String> {
    if window.reach.contains(&vm) {
        return Vec::new();
    }
    let (from, to) = (window.from, window.to.unwrap_or(now));
    let mut found = Vec::new();
    for copy in copies.iter().filter(|c| c.first_ran.is_some_and(|at| at < from)) {
        if copy.gone.is_some_and(|gone| from < gone && gone <= to) {
            found.push(format!("{name} on {} was stopped or moved by: {}", copy.host, window.what));
            continue;
        }
        let pauses = copy.gaps(from, to).into_iter().map(|g| g.to.since(g.from).saturating_sub(g.waited));
        if let Some(pause) = pauses.max().filter(|pause| PAUSE + REST < *pause) {
            let text = format!("{name} on {} was paused for up to {} ms by: {}", copy.host, ms(pause), window.what);
            found.push(text);
        }
    }
    found
}
