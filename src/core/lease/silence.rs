//! R3 with R4: whether one host's silence on one datastore proves that its claims are over.
//!
//! ```text
//!                 first read, change, other roster, gap of our own beats
//!        ┌──────────────────────────────────────────────────────────────┐
//!        ▼                                                              │
//!  no window ── read ended at r, nothing wrong ──► window(r … s) ── read begun at s, nothing of h changed ──┐
//!                                                       ▲─────────────────────────────────────────────────┘
//!  over, for every claim read before s:  s − r ≥ (L_h + margin)(1 + rho)
//! ```
//!
//! It is given only *complete* reads. A failed read is not given to it: an error is not silence, and it does not end
//! silence either. What lies there is compared as bytes: a torn block that stays the same is silence, too.
//!
//! Deliberately not here: who asks, which claims there are, and any other proof.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::core::timing;
use crate::mutants::{Mutant, planted};
use crate::types::store::CompleteRead;
use crate::types::{Attestation, Counter, Digest, HostId, Incarnation, Time};

/// What one complete read shows of one member.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Before the read's first operation.
    pub began: Time,
    /// After its last.
    pub ended: Time,
    /// Generation of the roster that it read.
    pub roster: u64,
    /// Of all bytes of the host's slots.
    pub bytes: Digest,
    /// L in the host's newest block, if one could be read.
    pub lease: Option<Duration>,
    /// Which beat that block is.
    pub beat: Option<(Incarnation, Counter)>,
    /// A block says that the guard is not punctual: margin is L/2.
    pub unpunctual: bool,
    /// Newest attestation of the host by any member.
    pub attested: Option<Attestation>,
}

impl Seen {
    /// What `read` shows of `host`; none if its roster does not name the host.
    #[must_use]
    pub fn of(read: &CompleteRead, host: HostId) -> Option<Self> {
        let entry = read.roster.members.iter().find(|entry| entry.host == host)?;
        let member = read.members.iter().find(|member| member.host == host)?;
        Some(Self {
            began: read.began,
            ended: read.ended,
            roster: read.roster.generation,
            bytes: member.bytes,
            lease: member.beat.as_ref().map(|beat| beat.lease),
            beat: member.beat.as_ref().map(|beat| (beat.incarnation, beat.counter)),
            unpunctual: member.beat.as_ref().is_some_and(|beat| beat.flags.unpunctual),
            attested: read
                .attestations
                .iter()
                .filter(|attestation| attestation.index == entry.index)
                .max_by_key(|attestation| order(attestation))
                .copied(),
        })
    }
}

/// A stretch in which nothing of the host changed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Window {
    /// r: when the read that opened it had ended.
    from: Time,
    /// s: when the last read that showed no change began; none if only the first was made.
    to: Option<Time>,
    /// What all reads of it showed.
    seen: Seen,
    /// The largest L seen in it; none = no block and no attestation told one.
    lease: Option<Duration>,
    /// At least one block in it said so.
    unpunctual: bool,
}

/// The reader's own beats on the datastore, persisted one after the other without a gap.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Witness {
    /// The chain reaches back to here: when its first beat was known to be persisted.
    since: Time,
    /// When the newest of them was begun.
    last: Time,
}

/// The taker's window for one host on one datastore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Silence {
    /// The reader's own L.
    lease: Duration,
    witness: Option<Witness>,
    window: Option<Window>,
}

impl Silence {
    /// Nothing known yet. `lease` = the reader's own L, for R4.
    #[must_use]
    pub fn new(lease: Duration) -> Self {
        Self { lease, witness: None, window: None }
    }

    /// The reader's own L changed.
    pub fn set_lease(&mut self, lease: Duration) {
        self.lease = lease;
    }

    /// R4: an own beat on this datastore, begun at `began`, is known to be persisted at `known`. A gap over L/2 since
    /// the one before starts the window anew: the storage may have stalled for the host, too.
    pub fn persisted(&mut self, began: Time, known: Time) {
        let limit = self.gap_limit();
        match &mut self.witness {
            Some(witness) if began <= witness.last => {} // Told twice.
            Some(witness) if known.since(witness.last) <= limit => witness.last = began,
            Some(_) | None => {
                self.witness = Some(Witness { since: known, last: began });
                self.window = self.window.filter(|_| planted(Mutant::NoWitness));
            }
        }
    }

    /// A complete read. `None`: its roster does not name the host, so R3 does not apply and the window is gone.
    pub fn read(&mut self, seen: Option<Seen>) {
        let Some(seen) = seen else {
            self.window = None;
            return;
        };
        match &mut self.window {
            Some(window) if seen.began < window.seen.began => {} // An answer that was overtaken says nothing new.
            Some(window) if window.continues(&seen) => window.extend(seen),
            Some(_) | None => self.open(seen),
        }
    }

    /// The planted bug [`Mutant::FailedReadIsSilence`]: a read that failed just now counts as one without a change.
    pub fn read_failed(&mut self, now: Time) {
        if let Some(window) = self.window.as_mut().filter(|_| planted(Mutant::FailedReadIsSilence)) {
            window.to = Some(now);
        }
    }

    /// If (v, g) of the host is over: the window that proves it. `claim_read_at` = when the reading of claim g had
    /// ended; it must lie before the read that closes the window began.
    #[must_use]
    pub fn over_since(&self, claim_read_at: Time) -> Option<Duration> {
        let window = self.window.as_ref()?;
        let closed = window.to?;
        let witness = self.witness?;
        let silent = closed.since(window.from);
        let proven = (claim_read_at < closed || planted(Mutant::ClaimReadLate))
            && window.needs()? <= silent
            && (witness.since <= window.from && closed.since(witness.last) <= self.gap_limit()
                || planted(Mutant::NoWitness));
        proven.then_some(silent)
    }

    /// How long nothing of the host has changed in complete reads, under R4, and since when; none = nothing can be said.
    /// No proof: for what is asked before there can be one.
    #[must_use]
    pub fn quiet(&self) -> Option<(Time, Duration)> {
        let window = self.window.as_ref()?;
        let witness = self.witness?;
        let closed = window.to.unwrap_or(window.from);
        let stands = witness.since <= window.from && closed.since(witness.last) <= self.gap_limit();
        stands.then(|| (window.from, closed.since(window.from)))
    }

    /// When a further complete read, begun then, can close the window; none while no window is open.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        let window = self.window.as_ref()?;
        Some(window.from + window.needs()?)
    }

    /// How long a silence must be now to prove anything; none while no window is open.
    #[must_use]
    pub fn needs(&self) -> Option<Duration> {
        self.window.as_ref().and_then(Window::needs)
    }

    fn open(&mut self, seen: Seen) {
        // Before the end of the last gap nothing counts: the owner may have been stalled with us.
        let witnessed = |witness: &Witness| witness.since <= seen.ended || planted(Mutant::NoWitness);
        self.window = self.witness.filter(witnessed).map(|_| Window {
            from: if planted(Mutant::WindowTooWide) { seen.began } else { seen.ended },
            to: None,
            seen,
            lease: seen.longest_lease(),
            unpunctual: seen.unpunctual,
        });
    }

    /// R4's limit: L/2 of the reader, or of the host if that is shorter.
    fn gap_limit(&self) -> Duration {
        let of_host = self.window.and_then(|window| window.lease).unwrap_or(self.lease);
        timing::witness_gap(self.lease.min(of_host))
    }
}

impl Seen {
    /// L_h: no lease of the host can be longer. An attestation of a beat that is older than the newest block says
    /// nothing more: a host that lowers its L announces that only after all leases of the former L have passed
    /// (`Lease::announced`). Otherwise an old attestation, in a slot that rests, would lengthen windows for minutes.
    fn longest_lease(&self) -> Option<Duration> {
        let newer = self.attested.filter(|attestation| self.beat < Some(order(attestation)));
        self.lease.max(newer.map(|attestation| attestation.lease))
    }
}

/// Which of two attestations of one host is newer.
fn order(attestation: &Attestation) -> (Incarnation, Counter) {
    (attestation.incarnation, attestation.counter)
}

impl Window {
    /// Whether a further read shows that nothing changed. That an attestation is gone, or that only an older one is
    /// left, is no sign of life: members drop it 10 L after it was made, and all that it said was seen. Were it a
    /// change, a failover whose window spans that moment would begin anew.
    fn continues(&self, seen: &Seen) -> bool {
        let known = self.seen.attested;
        let nothing_new =
            seen.attested.is_none_or(|one| known == Some(one) || Some(order(&one)) < known.as_ref().map(order));
        seen.bytes == self.seen.bytes && nothing_new && seen.roster == self.seen.roster
    }

    fn extend(&mut self, seen: Seen) {
        self.to = Some(if planted(Mutant::WindowTooWide) { seen.ended } else { seen.began });
        self.lease = self.lease.max(seen.longest_lease());
        self.unpunctual |= seen.unpunctual;
        self.seen = Seen { attested: self.seen.attested, ..seen }; // The newest ever seen in it, even when it is gone.
    }

    fn needs(&self) -> Option<Duration> {
        self.lease.map(|lease| timing::window(lease, self.unpunctual))
    }
}

#[cfg(test)]
mod tests;
