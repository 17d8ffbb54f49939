//! The rules of the safety design, condition by condition, each as a thing that can be taken out of a model.
//!
//! | rule | model | code that keeps it |
//! |---|---|---|
//! | R1, R2, attestation | `lease` | `core/lease.rs`, `guard/renew.rs`, `guard/state.rs`, `core/beats.rs` |
//! | R3 | `lease` | `core/lease/silence.rs`, `core/storage.rs` |
//! | R4 | `stall` | `core/lease/silence.rs` (`persisted`, `over_since`) |
//! | R2 (claims), R5, late writes | `claims` | `core/attempt/`, `guard/table.rs`, `core/proofs.rs` |
//! | R6 | `moves` | `core/moving.rs`, `guard/table.rs` (`hand_over`); people's: `core/handover.rs` |
//! | R7 | `homes` | the claims of a home move |

/// One condition of one rule; `text` says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    TimeFirst,
    KnownPersisted,
    AttestAfterWrite,
    WriterNamed,
    AttestationStays,
    SlotRests,
    StopInTime,
    ClaimAgain,
    SameEpoch,
    EarlierTry,
    CarryOnInTime,
    ClaimFirst,
    Complete,
    ErrorIsNotSilence,
    Attestations,
    OwnerNamed,
    RosterAnew,
    FromEnd,
    ToBegin,
    Margin,
    Rho,
    Witness,
    Exclusive,
    ClaimToStart,
    OwnClaim,
    RowFirst,
    HookAsks,
    FenceFirst,
    FenceAfterClaim,
    DebtsCopied,
    OwnDebtStays,
    CopyPays,
    HandedOver,
    ExitFirst,
    ClaimToResume,
    Discard,
    TargetPaused,
    BarredTarget,
    Handover,
    RowBeforeHandover,
    BothProofs,
    StopAfterSwitch,
    NeverRanThere,
    OldLease,
    NewLease,
    NextOnNew,
}

use Rule::*;

/// All of them, each with what it says.
pub const ALL: [(Rule, &str); 46] = [
    (TimeFirst, "R1: t_c is read before the beat is given away"),
    (KnownPersisted, "R1: a beat with an unknown outcome renews nothing"),
    (AttestAfterWrite, "R1: an attestation is told to its host after it is persisted"),
    (WriterNamed, "R1: the roster, read after the write, names the writer"),
    (AttestationStays, "R1: an attestation stays in every later beat, also after a restart"),
    (SlotRests, "R1: the slot of a write with an unknown outcome rests"),
    (StopInTime, "R2: a lapse stops the copy"),
    (ClaimAgain, "R2: after a lapse the copy goes on only under a new claim"),
    (SameEpoch, "R2, R5: the lease is unbroken from before the claim's creation until v runs"),
    (EarlierTry, "R2: an own claim found there, of a try before a lapse, gives no right to run"),
    (CarryOnInTime, "R2: a restarted guard carries on only while the lease stands"),
    (ClaimFirst, "R3: g was read before the read that closes the window began"),
    (Complete, "R3: the read is complete"),
    (ErrorIsNotSilence, "R3: an error is not silence"),
    (Attestations, "R3: an attestation is a change, too"),
    (OwnerNamed, "R3: never for an owner that is missing in the roster at an end of the window"),
    (RosterAnew, "R3: a change of the members starts the window anew"),
    (FromEnd, "R3: the window begins when the first read has ended"),
    (ToBegin, "R3: the window ends where the last read began"),
    (Margin, "R3: the margin, for the latency of stopping"),
    (Rho, "R3: rho, for clocks that go wrong"),
    (Witness, "R4: the reader's own beats were persisted at normal pace"),
    (Exclusive, "R5: a claim is created exclusively"),
    (ClaimToStart, "R5: a start needs a claim, a proof alone is not enough"),
    (OwnClaim, "R5: who runs v has created the claim itself"),
    (RowFirst, "R5: the guard has its row before the claim is created"),
    (HookAsks, "R5: a start by a person asks"),
    (FenceFirst, "late writes: a storage fence before the start"),
    (FenceAfterClaim, "late writes: the fence only after the claim"),
    (DebtsCopied, "late writes: debts are copied from claim to claim"),
    (OwnDebtStays, "late writes: a debtor that claims v again still owes what its kernel holds"),
    (CopyPays, "late writes: a claim that was never started pays no debt of its maker; a copy that ended cleanly does"),
    (HandedOver, "R6: the target goes on only on the source's word"),
    (ExitFirst, "R6: the source says over only after its QEMU's exit"),
    (ClaimToResume, "R6: the target resumes only under a claim of its own"),
    (Discard, "R6: without the word the target's copy is thrown away"),
    (TargetPaused, "R6: the target takes v in paused"),
    (BarredTarget, "R6: the target's row is unbroken from before the memory came"),
    (Handover, "R6, people: a handover claim before the migration"),
    (RowBeforeHandover, "R6, people: the target's row stands before the handover claim is created"),
    (BothProofs, "R6, people: anybody else needs proofs against both"),
    (StopAfterSwitch, "R6, people: the source's copy is stopped if it moves after the switch"),
    (NeverRanThere, "R6, people: after the switch the source goes on only if v never ran at the target"),
    (OldLease, "R7: the old home's lease is enforced until the claim on the new one is known"),
    (NewLease, "R7: the new home's lease is enforced from before the claim there"),
    (NextOnNew, "R7: after \"moved\" the next claim is made on the new home only"),
];

/// Which are kept.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub removed: &'static [Rule],
}

impl Rules {
    pub const KEPT: Self = Self { removed: &[] };

    pub fn keep(&self, rule: Rule) -> bool {
        !self.removed.contains(&rule)
    }
}

impl Rule {
    pub fn text(self) -> &'static str {
        ALL.iter().find(|(rule, _)| *rule == self).expect("all rules are listed").1
    }
}
