//! The lease of one host on one datastore, as its guard holds it (R1, R2), and the taker's view of it (`silence`, R3).
//!
//! ```text
//!            persisted(c), t_c + L − reserve > now
//!   ┌─────────────────────────────────────────────────┐
//!   │                                                 ▼
//! lapsed (new epoch)                                valid ──┐ persisted(newer c)
//!   ▲                                                 │ ▲───┘
//!   └─────────────────────────────────────────────────┘
//!            lapse_if_due: now ≥ t_c + L − reserve
//! ```
//!
//! c is the *newest* counter known to be persisted and t_c was read once, before c was given to a disk or the network.
//! Each counter carries the L that was announced with it, so that a changed L never makes the owner believe more than
//! the taker was told: a longer L counts only for beats that announced it; a shorter one is enforced from the next
//! persisted beat on (or from the lapse) and announced after the old one has passed.
//!
//! Deliberately not here: clocks, beats on disk, VMs. The simulator, the guard and the agent share this file.

mod silence;

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::timing;
use crate::types::{Counter, Epoch, Incarnation, Time};

pub use silence::{Seen, Silence};

/// How many given counters are remembered. When full the oldest is forgotten: its confirmation would come too late
/// anyway, or, at worst, the lease lapses.
pub const GIVEN_MAX: usize = 4096;

/// A counter that was given away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Given {
    counter: Counter,
    taken: Time,
    announced: Duration,
}

/// What `persisted` changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Persisted {
    /// The lease goes on, in the same epoch.
    Renewed,
    /// It had lapsed or never was; it is valid again, in the present epoch.
    Regained,
    /// Nothing: unknown, older than the newest known, or too late.
    Nothing,
}

/// One lease. All times are of one clock, CLOCK_BOOTTIME of the host. A guard hands it on to the next of its boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lease {
    epoch: Epoch,
    /// Enforced L.
    enforced: Duration,
    /// A shorter L that waits for the next persisted beat.
    shorter: Option<Duration>,
    /// A longer L than the enforced one that is still announced, until then.
    still_announced: Option<(Duration, Time)>,
    /// By rising counter.
    given: VecDeque<Given>,
    /// The newest persisted, while the lease is valid.
    newest: Option<Given>,
    /// The newest ever persisted in this incarnation: older ones never count again.
    persisted: Option<Counter>,
}

impl Lease {
    /// A lease that is not valid yet.
    #[must_use]
    pub fn new(incarnation: Incarnation, lease: Duration) -> Self {
        Self {
            epoch: Epoch { incarnation, lapses: 0 },
            enforced: lease,
            shorter: None,
            still_announced: None,
            given: VecDeque::new(),
            newest: None,
            persisted: None,
        }
    }

    /// Present epoch. A right to run never survives into the next.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The L to announce in a beat that is taken at `now`.
    #[must_use]
    pub fn announced(&self, now: Time) -> Duration {
        match self.still_announced {
            Some((longer, until)) if now < until => longer.max(self.enforced),
            Some(_) | None => self.enforced,
        }
    }

    /// `counter` was taken at `taken` and goes to a disk or the network now, with an announced L of at least
    /// `announced(taken)`. Must be called before it leaves, and with rising counters and times.
    pub fn given(&mut self, counter: Counter, taken: Time) {
        let announced = self.announced(taken);
        if let Some(last) = self.given.back() {
            assert!(last.counter < counter && last.taken <= taken, "counters are given in the order of their times");
        }
        while self.given.len() >= GIVEN_MAX
            || self.given.front().is_some_and(|oldest| oldest.taken + oldest.announced <= taken)
        {
            self.given.pop_front();
        }
        self.given.push_back(Given { counter, taken, announced });
    }

    /// `counter` is known to be persisted on this datastore. Looks for a lapse first: a lease that ended before the
    /// word came stays ended, and a new epoch begins.
    pub fn persisted(&mut self, counter: Counter, now: Time) -> Persisted {
        self.lapse_if_due(now);
        if self.persisted.is_some_and(|newest| counter <= newest) {
            return Persisted::Nothing;
        }
        let Ok(at) = self.given.binary_search_by_key(&counter, |given| given.counter) else {
            return Persisted::Nothing;
        };
        let given = self.given[at];
        self.given.drain(..=at);
        self.persisted = Some(counter);
        self.adopt_shorter(given, now);
        let before = self.newest;
        if self.ends(given) <= now {
            // Too late to help. An older ground that still stood is no longer the newest: the taker goes by this one.
            if before.is_some() {
                self.newest = Some(given);
                self.lapse_if_due(now);
            }
            return Persisted::Nothing;
        }
        self.newest = Some(given);
        if before.is_some() { Persisted::Renewed } else { Persisted::Regained }
    }

    /// t_c + L of the newest persisted counter; nothing may run at or after it. None = not valid.
    #[must_use]
    pub fn valid_until(&self) -> Option<Time> {
        self.newest.map(|given| given.taken + self.span(given))
    }

    /// When the VMs must be stopped: `valid_until` − reserve. None = not valid.
    #[must_use]
    pub fn stop_at(&self) -> Option<Time> {
        self.newest.map(|given| self.ends(given))
    }

    /// Whether something may run, or begin to, at `now`. Call `lapse_if_due` with the same `now` first.
    #[must_use]
    pub fn is_valid(&self, now: Time) -> bool {
        self.stop_at().is_some_and(|stop| now < stop)
    }

    /// Ends the lease if its time has come. True exactly once per lapse; from then on a new epoch counts.
    pub fn lapse_if_due(&mut self, now: Time) -> bool {
        match self.stop_at() {
            Some(stop) if stop <= now => {
                self.lapse();
                true
            }
            Some(_) | None => false,
        }
    }

    /// Another L. A longer one counts for the beats that announce it; a shorter one is enforced from the next
    /// persisted beat on, so that a change never costs a lapse, and announced one old L later.
    pub fn set_lease(&mut self, lease: Duration) {
        self.shorter = None;
        if lease < self.enforced && self.newest.is_some() {
            self.shorter = Some(lease);
        } else if lease < self.enforced {
            // Nothing runs, but counters given with the longer L may still be on their way: they keep their own L or
            // less, and `announced` goes down only with them.
            let until = self.given.back().map_or(Time::ZERO, |given| given.taken + given.announced);
            self.still_announced = Some((self.enforced, until));
            self.enforced = lease;
        } else {
            self.enforced = lease;
        }
    }

    /// The guard takes another incarnation: everything given before counts no more, and the lease is lapsed.
    pub fn restart(&mut self, incarnation: Incarnation) {
        assert!(self.epoch.incarnation < incarnation, "an incarnation only rises");
        self.epoch = Epoch { incarnation, lapses: 0 };
        self.given.clear();
        self.newest = None;
        self.persisted = None;
    }

    /// Enforces a shorter L from this counter on, unless that would end the lease now; until then the longer one is
    /// announced, so waiting is safe.
    fn adopt_shorter(&mut self, given: Given, now: Time) {
        let Some(shorter) = self.shorter else { return };
        if now < given.taken + (shorter - timing::reserve(shorter)) {
            self.shorter = None;
            self.still_announced = Some((self.enforced, now + self.enforced));
            self.enforced = shorter;
        }
    }

    fn lapse(&mut self) {
        self.newest = None;
        self.epoch.lapses += 1;
    }

    /// L for this counter: what was announced with it, or less.
    fn span(&self, given: Given) -> Duration {
        given.announced.min(self.enforced)
    }

    fn ends(&self, given: Given) -> Time {
        let span = self.span(given);
        given.taken + (span - timing::reserve(span))
    }
}

#[cfg(test)]
mod tests;
