//! Judge 3: for how long a guest did not answer, by its writes.
//!
//! ```text
//!  writes   │ │ │ │ │            ┃ ┃ ┃ ┃      │ old boot, ┃ new boot
//!                  ▲ fault       ▲ guest_up
//!                  └─ downtime ──┘            within one boot: longest_gap (a migration, a pause)
//! ```
//!
//! A guest that could write each 100 ms shows gaps of up to 100 ms and the 10 ms between two looks.

use std::time::Duration;

use super::Moment;
use super::disks::Write;

/// The first write, at or after `since`, of a boot that had not written before.
pub fn guest_up(writes: &[Write], since: Moment) -> Option<Moment> {
    let (before, after) = writes.split_at(writes.partition_point(|w| w.at < since));
    after.iter().find(|w| before.iter().rev().all(|b| b.stamp.boot != w.stamp.boot)).map(|w| w.at)
}

/// The longest time without a write that overlaps `from` to `to`, within one boot or at the end; zero if nothing was
/// written by `to`.
pub fn longest_gap(writes: &[Write], from: Moment, to: Moment) -> Duration {
    let within = writes.windows(2).filter(|pair| pair[0].stamp.boot == pair[1].stamp.boot);
    let gaps = within.map(|pair| (pair[0].at, pair[1].at));
    let last = writes.last().map(|w| (w.at, to.max(w.at)));
    gaps.chain(last).filter(|(a, b)| from < *b && *a < to).map(|(a, b)| b.since(a)).max().unwrap_or_default()
}
