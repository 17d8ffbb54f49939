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
const PAUSE_IN_CHAOS: Duration = Duration::from_millis(500);
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

/// Whom a fault reaches, where many overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Every VM.
    All,
    /// Copies on that host.
    Host(String),
    /// Copies of that VM.
    Vm(Uuid),
}

/// A time in which something may happen to copies.
#[derive(Clone, Debug)]
pub struct Excuse {
    /// To which.
    pub reach: Reach,
    /// From when.
    pub from: Moment,
    /// Until when.
    pub to: Moment,
}

impl Excuse {
    fn covers(&self, copy: &Copy, from: Moment, to: Moment) -> bool {
        let meant = match &self.reach {
            Reach::All => true,
            Reach::Host(host) => *host == copy.host,
            Reach::Vm(vm) => *vm == copy.vm,
        };
        meant && self.from <= to && from <= self.to
    }
}

/// What happened to copies of a VM that no excuse covers. While hosts boot and die the machine itself is short of time,
/// which shows as rests of everything; so only long ones are told.
pub fn judge_all(name: &str, copies: &[&Copy], excuses: &[Excuse], since: Moment, now: Moment) -> Vec<String> {
    let mut found = Vec::new();
    for (copy, first_ran) in copies.iter().filter_map(|copy| Some((copy, copy.first_ran?))) {
        let excused = |from, to| excuses.iter().any(|excuse| excuse.covers(copy, from, to));
        let after = |at: Moment| ms(at.since(since)) / 1000.0;
        if let Some(gone) = copy.gone.filter(|gone| since < *gone && !excused(*gone, *gone)) {
            let text = format!("{name} on {} ended after {:.1} s, out of reach of every fault", copy.host, after(gone));
            found.push(text);
        }
        // A QEMU is made paused, and waits for its first order.
        for gap in copy.gaps(since, now).into_iter().filter(|gap| first_ran <= gap.from) {
            let pause = gap.to.since(gap.from).saturating_sub(gap.waited);
            if PAUSE_IN_CHAOS < pause && !excused(gap.from, gap.to) {
                found.push(format!(
                    "{name} on {} was paused for {} ms, {:.1} s after the beginning, out of reach of every fault",
                    copy.host,
                    ms(pause),
                    after(gap.from)
                ));
            }
        }
    }
    found
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
