//! Bugs planted on purpose, to show that the simulator finds them (`cargo lab sim --mutants`).
//!
//! ```text
//!   feature "mutants" off (every shipped binary):  planted(…) is a constant false, and its branch is no code
//!   feature "mutants" on (the simulator only):     at most one bug per thread, by `plant`
//! ```
//!
//! Each is one broken rule of design 2 or 10, in the code that ships, at the one place that asks for it. Nothing else
//! may depend on the feature; `tests/tidy.rs` keeps that.
//!
//! Deliberately not here: how they are found (`tests/sim`).

/// One planted bug.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mutant {
    /// R2: after a lapse the VM runs again before its new claim exists.
    ResumedUnclaimed,
    /// R3: the window reaches from the begin of the read that opens it to the end of the one that closes it.
    WindowTooWide,
    /// R3: a claim that was read after the last read of the beats is covered by that window.
    ClaimReadLate,
    /// A proof for g is used although g+1 is known.
    ProofOfOlder,
    /// R4: the reader's own beats do not matter.
    NoWitness,
    /// R3: the window is L, without margin and rate error.
    NoMargin,
    /// A new guard takes up a row that had lapsed.
    LapseForgotten,
    /// A new guard goes on in the incarnation of the old one, with its counters from the beginning.
    CounterReused,
    /// An attestation stands in one beat only.
    AttestationDropped,
    /// The answer to an attestation of an earlier incarnation counts for this one.
    AttestationOfOlder,
    /// A host is told that its counter was attested before that is written.
    AttestedUnwritten,
    /// A slot is written again at once after a write with unknown outcome.
    SlotReused,
    /// R6: the target goes on when the source is silent, without its word.
    TargetEarly,
    /// R6: the source is resumed after the switch.
    SourceResumed,
    /// A VM that is missing in a list is over.
    AbsenceIsProof,
    /// A failed read shows that nothing changed.
    FailedReadIsSilence,
    /// "Nobody owns it" is claimed while its QEMU still runs.
    ReleasedEarly,
    /// A VM starts without the storage fence that its claim owes.
    NoFence,
    /// "Lapsed" is said before the QEMU stands.
    SaidBeforeStopped,
    /// A higher incarnation of the same boot counts as a new boot.
    RebootWithoutBoot,
    /// R5: the claim is created before the guard has its row.
    ClaimBeforeRow,
    /// R2: a stopped copy is killed although its newest claim, which names nobody, lets it go on: by guard and agent,
    /// whoever reads that first.
    KilledUnclaimed,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::ResumedUnclaimed,
        Self::WindowTooWide,
        Self::ClaimReadLate,
        Self::ProofOfOlder,
        Self::NoWitness,
        Self::NoMargin,
        Self::LapseForgotten,
        Self::CounterReused,
        Self::AttestationDropped,
        Self::AttestationOfOlder,
        Self::AttestedUnwritten,
        Self::SlotReused,
        Self::TargetEarly,
        Self::SourceResumed,
        Self::AbsenceIsProof,
        Self::FailedReadIsSilence,
        Self::ReleasedEarly,
        Self::NoFence,
        Self::SaidBeforeStopped,
        Self::RebootWithoutBoot,
        Self::ClaimBeforeRow,
        Self::KilledUnclaimed,
    ];
}

#[cfg(feature = "mutants")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Plants one bug, or none, in everything that this thread runs.
#[cfg(feature = "mutants")]
pub fn plant(mutant: Option<Mutant>) {
    PLANTED.set(mutant);
}

/// Whether this bug is planted.
#[cfg(feature = "mutants")]
#[must_use]
pub fn planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

/// Whether this bug is planted: never.
#[cfg(not(feature = "mutants"))]
#[must_use]
#[inline(always)]
pub const fn planted(_: Mutant) -> bool {
    false
}
