//! The rules R1 to R7 as small exhaustive models: with all rules no state is wrong and the VM can run again from each;
//! without any one of them there is a wrong state, and the shortest way there is printed.
//!
//! ```text
//!   explore (breadth first)
//!     ├─ lease   R1 R2 R3 with clocks: owner, taker, attestor      proves: who has a proof of a lapse is right
//!     ├─ stall   R4: storage stalls for everybody                            │
//!     ├─ claims  R2 R5, late writes: three hosts ◄───────────────────────────┤ and may use it at any time after
//!     ├─ moves   R6: source, target, anybody else ◄──────────────────────────┤
//!     └─ homes   R7: two datastores ◄────────────────────────────────────────┘
//! ```
//!
//! The models are split there because clocks and claims together have too many states; the seam is "(v, g) is over",
//! which is permanent by design, so a proof of it may be used at any later time.
//!
//! `MODEL=large` widens the bounds (minutes, some GB); `ONLY=Rho TRACE=1` with `--nocapture` prints the ways of one rule.
//! `docs/notes/model.md` has results, findings, and what the models do not cover.

#[path = "model/claims.rs"]
mod claims;
#[path = "model/explore.rs"]
mod explore;
#[path = "model/homes.rs"]
mod homes;
#[path = "model/lease.rs"]
mod lease;
#[path = "model/moves.rs"]
mod moves;
#[path = "model/rules.rs"]
mod rules;
#[path = "model/stall.rs"]
mod stall;

use explore::{End, Model, Report, explore};
use lease::{Bounds, Roster, Way};
use rules::{ALL, Rule, Rules};

/// A model with its bounds.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Run {
    Own,
    OwnTrouble,
    Attested,
    AttestedTrouble,
    BothWays,
    OwnerLeaves,
    AttestorLeaves,
    Stall,
    Claims,
    LateWrites,
    LateWritesOfThree,
    OwnMove,
    ForeignMove,
    Homes,
}

fn large() -> bool {
    std::env::var("MODEL").is_ok_and(|size| size == "large")
}

/// `lease`: L in ticks.
fn lease(rules: Rules, run: Run, ticks: u8) -> Report {
    // Without the margin even perfect clocks must fail.
    let slow = u8::from(rules.keep(Rule::Margin));
    let plain = Bounds { lease: ticks, generations: 2, slow, way: Way::Own, roster: Roster::Fixed, trouble: false };
    let bounds = match run {
        Run::OwnTrouble => Bounds { trouble: true, ..plain },
        Run::Attested => Bounds { way: Way::Attested, ..plain },
        Run::AttestedTrouble => Bounds { way: Way::Attested, trouble: true, ..plain },
        Run::BothWays => Bounds { way: Way::Both, ..plain },
        Run::OwnerLeaves => Bounds { roster: Roster::OwnerLeaves, ..plain },
        Run::AttestorLeaves => Bounds { way: Way::Attested, roster: Roster::AttestorLeaves, ..plain },
        _ => plain,
    };
    explore(&lease::Lease { rules, bounds })
}

fn claims(rules: Rules, generations: u8, hosts: usize, writes: bool) -> Report {
    explore(&claims::Claims { rules, generations, hosts, writes })
}

fn explored(rules: Rules, run: Run, large: bool) -> Report {
    match run {
        Run::Own | Run::Attested => lease(rules, run, if large { 5 } else { 4 }),
        Run::OwnTrouble => lease(rules, run, if large { 4 } else { 3 }),
        Run::AttestedTrouble | Run::BothWays | Run::OwnerLeaves | Run::AttestorLeaves => {
            lease(rules, run, if large { 3 } else { 2 })
        }
        Run::Stall => explore(&stall::Stall { rules, lease: if large { 8 } else { 4 } }),
        Run::Claims => claims(rules, if large { 3 } else { 2 }, 3, false),
        Run::LateWrites => claims(rules, if large { 4 } else { 3 }, 2, true),
        Run::LateWritesOfThree => claims(rules, 2, 3, true),
        Run::OwnMove => explore(&moves::Moves { rules, foreign: false, generations: 5 }),
        Run::ForeignMove => explore(&moves::Moves { rules, foreign: true, generations: 5 }),
        Run::Homes => explore(&homes::Homes { rules, generations: 6 }),
    }
}

/// With all rules, or with those that back each other up.
fn holds(rules: Rules, run: Run, large: bool) {
    let Report { states, transitions, depth, missing, end } = explored(rules, run, large);
    println!("{run:?} without {:?}: {states} states, {transitions} transitions, depth {depth}", rules.removed);
    if let End::Wrong { what, steps, trace } = end {
        panic!("{run:?}: {what}, after {steps} steps:\n{trace}");
    }
    assert!(missing.is_empty(), "{run:?} shows nothing: never happens: {missing:?}");
}

#[test]
fn leases_hold_on_the_owners_path() {
    holds(Rules::KEPT, Run::Own, large());
    holds(Rules::KEPT, Run::OwnTrouble, large());
}

#[test]
fn leases_hold_through_attestation() {
    holds(Rules::KEPT, Run::Attested, large());
    if large() {
        holds(Rules::KEPT, Run::AttestedTrouble, true);
        holds(Rules::KEPT, Run::BothWays, true);
    }
}

#[test]
fn leases_hold_while_members_change() {
    holds(Rules::KEPT, Run::OwnerLeaves, large());
    holds(Rules::KEPT, Run::AttestorLeaves, large());
}

#[test]
fn a_stall_of_the_storage_makes_nobody_take() {
    holds(Rules::KEPT, Run::Stall, large());
}

#[test]
fn claims_hold() {
    holds(Rules::KEPT, Run::Claims, large());
    holds(Rules::KEPT, Run::LateWrites, large());
    holds(Rules::KEPT, Run::LateWritesOfThree, large());
}

#[test]
fn moves_and_homes_hold() {
    [Run::OwnMove, Run::ForeignMove, Run::Homes].into_iter().for_each(|run| holds(Rules::KEPT, run, large()));
}

/// Each removal, where it shows, and what it leads to.
#[rustfmt::skip]
const NEEDED: &[(&[Rule], Run, &str)] = &[
    (&[Rule::TimeFirst], Run::Own, "two copies run"),
    (&[Rule::KnownPersisted], Run::OwnTrouble, "two copies run"),
    (&[Rule::AttestAfterWrite], Run::Attested, "two copies run"),
    (&[Rule::WriterNamed], Run::AttestorLeaves, "two copies run"),
    (&[Rule::AttestationStays], Run::Attested, "two copies run"),
    (&[Rule::SlotRests], Run::Attested, "two copies run"),
    (&[Rule::StopInTime], Run::Own, "two copies run"),
    (&[Rule::ClaimAgain], Run::Own, "two copies run"),
    (&[Rule::SameEpoch], Run::Own, "two copies run"),
    (&[Rule::SameEpoch], Run::Claims, "two copies run"),
    (&[Rule::EarlierTry], Run::OwnTrouble, "two copies run"),
    (&[Rule::CarryOnInTime], Run::OwnTrouble, "two copies run"),
    (&[Rule::ClaimFirst], Run::Own, "two copies run"),
    (&[Rule::Complete], Run::Attested, "two copies run"),
    (&[Rule::ErrorIsNotSilence], Run::Own, "two copies run"),
    (&[Rule::Attestations], Run::Attested, "two copies run"),
    (&[Rule::OwnerNamed, Rule::RosterAnew], Run::OwnerLeaves, "two copies run"),
    (&[Rule::FromEnd], Run::Own, "two copies run"),
    (&[Rule::ToBegin], Run::Own, "two copies run"),
    (&[Rule::Margin], Run::Own, "two copies run"),
    (&[Rule::Rho], Run::Own, "two copies run"),
    (&[Rule::Witness], Run::Stall, "a VM is taken because the storage stalled"),
    (&[Rule::Exclusive], Run::Own, "two copies run"),
    (&[Rule::Exclusive], Run::Claims, "two copies run"),
    (&[Rule::ClaimToStart], Run::Claims, "two copies run"),
    (&[Rule::OwnClaim], Run::Claims, "two copies run"),
    (&[Rule::RowFirst], Run::Claims, "two copies run"),
    (&[Rule::HookAsks], Run::Claims, "two copies run"),
    (&[Rule::FenceFirst], Run::LateWrites, "a late write of an old copy lands under a new one"),
    (&[Rule::FenceAfterClaim], Run::LateWrites, "a fence hit a running copy"),
    (&[Rule::DebtsCopied], Run::LateWrites, "a late write of an old copy lands under a new one"),
    (&[Rule::OwnDebtStays], Run::LateWrites, "a late write of an old copy lands under a new one"),
    (&[Rule::CopyPays], Run::LateWrites, "a late write of an old copy lands under a new one"),
    (&[Rule::HandedOver], Run::OwnMove, "two copies run"),
    (&[Rule::ExitFirst], Run::OwnMove, "two copies run"),
    (&[Rule::ClaimToResume], Run::OwnMove, "two copies run"),
    (&[Rule::Discard], Run::OwnMove, "a copy goes on with memory older than its disks"),
    (&[Rule::TargetPaused], Run::OwnMove, "two copies run"),
    (&[Rule::Handover], Run::ForeignMove, "two copies run"),
    (&[Rule::RowBeforeHandover], Run::ForeignMove, "two copies run"),
    (&[Rule::BothProofs], Run::ForeignMove, "two copies run"),
    (&[Rule::StopAfterSwitch], Run::ForeignMove, "two copies run"),
    (&[Rule::NeverRanThere], Run::ForeignMove, "a copy goes on with memory older than its disks"),
    (&[Rule::OldLease], Run::Homes, "two copies run"),
    (&[Rule::NewLease], Run::Homes, "two copies run"),
    (&[Rule::NextOnNew], Run::Homes, "two copies run"),
];

#[test]
fn each_rule_is_needed() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let traces = std::env::var_os("TRACE").is_some();
    let mut missed = Vec::new();
    for (removed, run, expected) in NEEDED.iter().filter(|(removed, ..)| format!("{removed:?}").contains(&only)) {
        // The shortest way ends the search, so that even wide bounds cost little; clocks do best with narrow ones.
        let wide = matches!(run, Run::Claims | Run::LateWrites);
        let report = explored(Rules { removed }, *run, wide);
        let texts: Vec<&str> = removed.iter().map(|rule| rule.text()).collect();
        match report.end {
            End::Wrong { what, steps, trace } => {
                println!("{:>3} steps, {:>8} states: {what}: {}", steps, report.states, texts.join("; "));
                if traces {
                    println!("{trace}");
                }
                if what != *expected {
                    missed.push(format!("{removed:?} in {run:?}: {what}, not {expected}"));
                }
            }
            End::Holds => missed.push(format!("{removed:?} in {run:?}: holds without it")),
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// Rules that stand twice: taken out alone they change nothing.
const BACKED: [(&[Rule], Run); 3] = [
    (&[Rule::OwnerNamed], Run::OwnerLeaves),
    (&[Rule::RosterAnew], Run::OwnerLeaves),
    // The target's claim in its own present epoch is enough.
    (&[Rule::BarredTarget], Run::OwnMove),
];

#[test]
fn rules_that_back_each_other_up() {
    BACKED.iter().for_each(|(removed, run)| holds(Rules { removed }, *run, false));
}

#[test]
fn every_rule_is_tried() {
    let tried = |rule: &Rule| {
        NEEDED.iter().any(|(removed, ..)| removed.contains(rule))
            || BACKED.iter().any(|(removed, _)| removed.contains(rule))
    };
    let forgotten: Vec<&Rule> = ALL.iter().map(|(rule, _)| rule).filter(|rule| !tried(rule)).collect();
    assert!(forgotten.is_empty(), "no case removes {forgotten:?}");
}

/// The explorer itself: a counter to five that must not reach three finds the shortest way, and a pit is found.
#[test]
fn the_explorer_finds_what_is_there() {
    struct Counter {
        bad: u8,
    }
    impl Model for Counter {
        type State = u8;
        fn start(&self) -> u8 {
            0
        }
        fn steps(&self, from: &u8, to: &mut Vec<(explore::Step, u8)>) {
            if *from < 5 {
                to.extend([(("x", "one"), from + 1), (("x", "two"), from + 2)]);
            }
        }
        fn wrong(&self, state: &u8) -> Option<&'static str> {
            (*state == self.bad).then_some("bad")
        }
        fn well(&self, state: &u8) -> bool {
            *state == 6
        }
        fn happens(&self) -> Vec<explore::Happens<u8>> {
            vec![("two", |state| *state == 2), ("seven", |state| *state == 7)]
        }
        fn show(&self, state: &u8) -> String {
            state.to_string()
        }
    }
    let wrong = explore(&Counter { bad: 3 });
    assert!(matches!(wrong.end, End::Wrong { what: "bad", steps: 2, .. }));
    let pit = explore(&Counter { bad: 9 });
    assert_eq!((pit.states, pit.depth), (7, 3));
    assert_eq!(pit.missing, ["seven"]);
    // Five is an end from which six cannot be reached.
    assert!(matches!(pit.end, End::Wrong { what: "the VM can never run again", .. }));
}
