//! Whom a fault may have touched, and when: what the judges of blame and of downtime are told.
//!
//! ```text
//!           fault ├────────── lasts ──────────┤ healed ├─ aftermath ─┤
//!  a copy there    may be paused, stopped, moved, and its VM may be down          elsewhere: nothing may happen
//! ```

use std::time::Duration;

use crate::host::Host;
use crate::judge::{Copy, Excuse, Moment, Reach, Write};

/// One fault, as far as others are concerned.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// Whom it reaches.
    pub reach: Reach,
    /// When it began.
    pub from: Moment,
    /// When all that follows from it is over; None: not yet.
    pub to: Option<Moment>,
    /// Whether running VMs may be touched. If not, it only explains that something else takes its time.
    pub touches: bool,
}

impl Trouble {
    /// Whether it reaches a VM or a host at any moment of a time.
    pub fn reaches(&self, host: &Host, vm: &str, from: Moment, to: Moment) -> bool {
        let meant = match &self.reach {
            Reach::All | Reach::Host(_) => self.is_of(host),
            Reach::Vm(id) => crate::guest::Guest::new(vm).is_ok_and(|guest| guest.uuid() == *id),
        };
        meant && self.from <= to && self.to.is_none_or(|end| from <= end)
    }

    /// Whether it is one of a host, or of all.
    pub fn is_of(&self, host: &Host) -> bool {
        match &self.reach {
            Reach::All => true,
            Reach::Host(name) => *name == host.name(),
            Reach::Vm(_) => false,
        }
    }

    /// For the judge of blame; None: nothing may be touched by it.
    pub fn excuse(&self, now: Moment) -> Option<Excuse> {
        let (reach, from, to) = (self.reach.clone(), self.from, self.to.unwrap_or(now));
        self.touches.then_some(Excuse { reach, from, to })
    }
}

/// The longest time for which a VM did not write and nothing explains why. `rests`: times in which it need not run.
pub fn unexplained(
    writes: &[Write],
    copies: &[&Copy],
    troubles: &[Trouble],
    rests: &[(Moment, Option<Moment>)],
    now: Moment,
) -> Duration {
    let mut longest = Duration::ZERO;
    let ends = writes.iter().map(|write| write.at).chain([now]);
    for (from, to) in writes.iter().map(|write| write.at).zip(ends.skip(1)) {
        if to.since(from) <= longest {
            continue;
        }
        let was_there = |copy: &&&Copy| copy.began <= to && copy.gone.is_none_or(|gone| from <= gone);
        let hosts: Vec<&str> = copies.iter().filter(was_there).map(|copy| copy.host.as_str()).collect();
        let explains = |trouble: &&Trouble| match &trouble.reach {
            Reach::All => true,
            Reach::Host(host) => hosts.contains(&host.as_str()),
            Reach::Vm(id) => copies.first().is_some_and(|copy| copy.vm == *id),
        };
        let of_troubles = troubles.iter().filter(explains).map(|trouble| (trouble.from, trouble.to));
        let mut times: Vec<(Moment, Moment)> =
            of_troubles.chain(rests.iter().copied()).map(|(from, to)| (from, to.unwrap_or(now))).collect();
        longest = longest.max(longest_rest(from, to, &mut times));
    }
    longest
}

/// The longest part of a time that none of the others covers.
fn longest_rest(from: Moment, to: Moment, times: &mut [(Moment, Moment)]) -> Duration {
    times.sort_unstable();
    let (mut at, mut longest) = (from, Duration::ZERO);
    for (begin, end) in times.iter() {
        longest = longest.max((*begin).min(to).since(at));
        at = at.max(*end);
    }
    longest.max(to.since(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_time() {
        let at = |seconds: u64| Moment(seconds * 1_000_000_000);
        let cases: [(&[(u64, u64)], u64); 6] = [
            (&[], 10),
            (&[(0, 100)], 0),
            (&[(12, 15)], 5),
            (&[(0, 13), (12, 19)], 1),
            (&[(30, 40)], 10),
            (&[(0, 5)], 10),
        ];
        for (times, left) in cases {
            let mut times: Vec<_> = times.iter().map(|(from, to)| (at(*from), at(*to))).collect();
            assert_eq!(longest_rest(at(10), at(20), &mut times), Duration::from_secs(left), "{times:?}");
        }
    }
}
