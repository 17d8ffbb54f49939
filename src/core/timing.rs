//! Every time span that safety or verdicts depend on, derived from the few bases of `types::settings::Timing`.
//!
//! ```text
//! owner h        t_c                         0.8 L        L − reserve   L
//! (clock of h)   ├─ beat c given to disk ──────┤ pause ──────┤ SIGSTOP ──┤ by now every copy stands
//!                │                                            └ reserve ──┘
//!                └──► on disk ──► seen by the taker
//! taker          r ≥ t_c                                                       s
//! (own clock)    ├─ complete read ended ─── nothing of h changes ──────────────┤ complete read begun: (v, g) is over
//!                └──────────────── (L + margin)(1 + rho) ──────────────────────┘
//! ```
//!
//! Why the two can never overlap: the owner's last persisted beat was taken at t_c ≤ r (a later one would have been seen
//! as a change). The owner stops at t_c + L − reserve on its clock and has stopped `STOPPING` later, at worst. The taker
//! waits (L + margin)(1 + rho) on its clock, which is at least L + margin of true time, during which the owner's clock
//! shows at least (L + margin)(1 − rho). So the argument holds while (L + margin)(1 − rho) ≥ L + what stopping may be
//! late: `margin ≥ rho·L/(1 − rho) + STOPPING`. `check` asserts just that, and the relations that keep a healthy cluster
//! quiet. Change a number only together with this argument.
//!
//! Deliberately not here: clocks, and policy times of a single VM (those are the VM's settings).

use std::time::Duration;

use crate::mutants::{Mutant, planted};
use crate::types::settings::Timing;

/// 1/rho: the rate error of CLOCK_BOOTTIME is at most 1/1000.
const RHO_DIVISOR: u32 = 1000;
/// reserve and margin are L/25 = 0.04 L.
const RESERVE_DIVISOR: u32 = 25;
/// How late the last thread of the last VM may stop after SIGSTOP was due (tried under full load: at worst 36 ms). A thread
/// that waits for a CPU shows the stop later, but executes nothing before it takes the signal.
pub const STOPPING: Duration = Duration::from_millis(40);
/// The longest lease that is allowed; bounds how long a dead host keeps its VMs.
pub const LONGEST_LEASE: Duration = Duration::from_secs(60);
/// The shortest period; bounds counters kept in memory and load on storage.
pub const SHORTEST_PERIOD: Duration = Duration::from_millis(50);
/// How long a guard remembers that it was late.
pub const LATENESS_REMEMBERED: Duration = Duration::from_secs(3600);
/// The enforcing thread wakes at least this often, to measure its own lateness and to ping systemd's watchdog.
pub const ENFORCER_TICK: Duration = Duration::from_millis(250);
/// How often a guard looks for a QEMU that is expected.
pub const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Reconnecting to the guard: first and longest pause.
pub const RECONNECT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Two numbers of the timing contradict each other; the text is for people.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("timing contradicts itself: {0}")]
pub struct Contradiction(pub String);

/// How long before the end of a lease its VMs are stopped.
#[must_use]
pub fn reserve(lease: Duration) -> Duration {
    lease / RESERVE_DIVISOR
}

/// What a taker waits beyond L. An unpunctual guard gets L/2.
#[must_use]
pub fn margin(lease: Duration, unpunctual: bool) -> Duration {
    if unpunctual { lease / 2 } else { lease / RESERVE_DIVISOR }
}

/// R3's window, (L + margin)(1 + rho): from the end of the read that opens it to the begin of the read that closes it.
#[must_use]
pub fn window(lease: Duration, unpunctual: bool) -> Duration {
    if planted(Mutant::NoMargin) {
        return lease;
    }
    let silent = lease.saturating_add(margin(lease, unpunctual));
    // One nanosecond more, because the division rounds down.
    silent.saturating_add(silent / RHO_DIVISOR).saturating_add(Duration::from_nanos(1))
}

/// R4: a longer gap between the reader's own persisted beats starts its windows anew. Also how old a guard's last own
/// write may be for "its own path works".
#[must_use]
pub fn witness_gap(lease: Duration) -> Duration {
    lease / 2
}

/// How long a host's datastore beats are silent before it may be switched off on suspicion: never less than three beats.
#[must_use]
pub fn power_silence(timing: &Timing) -> Duration {
    timing.suspect.max(timing.renew * 3)
}

/// After t_c: the agent asks libvirt to pause.
#[must_use]
pub fn pause_after(lease: Duration) -> Duration {
    lease * 4 / 5
}

/// A guard whose own beat on a datastore has not counted for this long asks others to attest. So early that their answer
/// comes before 0.8 L: one network beat there, one beat of theirs on the datastore (hurried), one network beat back.
#[must_use]
pub fn attest_after(timing: &Timing) -> Duration {
    timing.renew + timing.renew / 4
}

/// A guard that heard no beat of its agent for this long says "agent dead".
#[must_use]
pub fn agent_dead_after(timing: &Timing) -> Duration {
    timing.suspect
}

/// How long an attestation stays in later beats without a newer one.
#[must_use]
pub fn attestation_kept(lease: Duration) -> Duration {
    lease * 10
}

/// A guard that was later than this says "unpunctual".
#[must_use]
pub fn late_limit(lease: Duration) -> Duration {
    reserve(lease) / 2
}

/// A guard beats sooner than `renew` when its VM list changed, but never more often than this.
#[must_use]
pub fn hurried_renew(timing: &Timing) -> Duration {
    (timing.renew / 4).max(SHORTEST_PERIOD)
}

/// Whether these bases can be used.
///
/// # Errors
/// The first relation that does not hold, with the cure.
pub fn check(timing: &Timing) -> Result<(), Contradiction> {
    let Timing { beat, renew, suspect, lease } = *timing;
    let rules = [
        (SHORTEST_PERIOD <= beat, format!("beat {beat:?} is shorter than {SHORTEST_PERIOD:?}")),
        (SHORTEST_PERIOD <= renew, format!("renew {renew:?} is shorter than {SHORTEST_PERIOD:?}")),
        (lease <= LONGEST_LEASE, format!("lease {lease:?} is longer than {LONGEST_LEASE:?}")),
        (beat * 2 <= suspect, format!("suspect {suspect:?} must be at least two beats of {beat:?}")),
        (suspect < lease, format!("suspect {suspect:?} must be shorter than the lease {lease:?}")),
        (renew * 4 <= lease, format!("the lease {lease:?} must be at least four times renew {renew:?}")),
        (
            rho_loss(lease) + STOPPING <= margin(lease, false),
            format!("a lease of {lease:?} is too short to stop VMs in time; take at least 1100 ms"),
        ),
        (
            attest_after(timing) + beat * 2 + hurried_renew(timing) <= pause_after(lease),
            format!("a lease of {lease:?} is too short for others to attest; take longer, or shorter beat and renew"),
        ),
        (
            pause_after(lease) + STOPPING <= lease.saturating_sub(reserve(lease)),
            format!("a lease of {lease:?} leaves no time between pausing and stopping"),
        ),
    ];
    match rules.into_iter().find(|(holds, _)| !holds) {
        None => Ok(()),
        Some((_, why)) => Err(Contradiction(why)),
    }
}

/// rho·L/(1 − rho).
fn rho_loss(lease: Duration) -> Duration {
    lease / (RHO_DIVISOR - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn timing(beat: u64, renew: u64, suspect: u64, lease: u64) -> Timing {
        Timing { beat: ms(beat), renew: ms(renew), suspect: ms(suspect), lease: ms(lease) }
    }

    #[test]
    fn profiles_agree_with_themselves() {
        for profile in [Timing::DEFAULT, Timing::FAST, Timing::PATIENT] {
            assert_eq!(check(&profile), Ok(()), "{profile:?}");
        }
    }

    #[test]
    fn each_relation_is_asserted() {
        let table = [
            (timing(10, 1000, 3000, 5000), "beat"),
            (timing(1000, 10, 3000, 5000), "renew"),
            (timing(1000, 1000, 3000, 61_000), "longer than"),
            (timing(1000, 1000, 1500, 5000), "two beats"),
            (timing(1000, 1000, 5000, 5000), "shorter than the lease"),
            (timing(1000, 2000, 3000, 5000), "four times"),
            (timing(100, 100, 300, 1000), "too short to stop"),
        ];
        for (bases, part) in table {
            let Contradiction(why) = check(&bases).expect_err(part);
            assert!(why.contains(part), "{why} should name {part}");
        }
    }

    #[test]
    fn derived_times() {
        let lease = ms(5000);
        assert_eq!(reserve(lease), ms(200));
        assert_eq!(margin(lease, false), ms(200));
        assert_eq!(margin(lease, true), ms(2500));
        assert_eq!(pause_after(lease), ms(4000));
        assert_eq!(window(lease, false), ms(5200) + Duration::from_micros(5200) + Duration::from_nanos(1));
        assert_eq!(late_limit(lease), ms(100));
    }

    /// The argument of the module's text, with both clocks wrong in the worst direction.
    #[test]
    fn owner_has_stopped_before_the_taker_acts() {
        for lease in [ms(1500), ms(5000), ms(15_000), ms(60_000)] {
            let taker_waits_true = window(lease, false).as_secs_f64() / 1.001;
            let owner_clock = taker_waits_true * 0.999;
            let stopped = (lease - reserve(lease) + STOPPING).as_secs_f64();
            assert!(stopped < owner_clock, "{lease:?}");
            // Even a guard that is late by its whole reserve, and then stops slowly.
            assert!((lease + STOPPING).as_secs_f64() < owner_clock, "{lease:?}");
        }
    }
}
