//! The master: VMs of the lowest priority make room for one of a higher priority that has no place, where the rules let them.
//!
//! ```text
//!   no place ─► who could go: lowest, runs, nothing is under way ─► sets of one, of two, … on one host ─► a plan with them gone:
//!                                                                       it has a place, and nobody loses one?
//!                     they move, or they are stopped (`yielding`) ◄── the smallest set, with the fewest that stop ──┘
//!                                       └─► their room is seen free ─► it is started; whoever was stopped waits for a place
//! ```
//!
//! Whoever was stopped is not started before what it has freed can show: it would take it back. It does take it back if it has ended
//! uncleanly, and can run nowhere else. One round at a time, and for one VM not again within `AGAIN`. A master that dies leaves VMs that
//! run, or wait for a place: the next one begins anew. Never asked to go: who is starting or moving, whose storage is in doubt, who must
//! be with others, whom others wait for (`placement/rules`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::note::Note;
use super::placement::rules::{MakesRoom, Meaning};
use super::placement::search::plan;
use super::placement::site::{Ask, Room, Site, Size};
use super::placement::{Bars, WhyNot};
use crate::types::control::{Reply, Request};
use crate::types::rules::Priority;
use crate::types::vm::DomainState;
use crate::types::{Claim, ClaimReason, Holder, HostId, Time, VmId, Wanted};

/// Not again for the same VM before.
const AGAIN: Duration = Duration::from_secs(300);
/// Nor before, if nobody could make room.
const NOBODY: Duration = Duration::from_secs(30);
/// Until what a round has freed shows in what hosts report.
const SHOWS: Duration = Duration::from_secs(10);
/// An answer of the host that shall end one.
const ANSWER: Duration = Duration::from_secs(10);
/// Beyond a guest's time: for its end, and its claim.
const ENDS: Duration = Duration::from_secs(60);
/// The longest move.
const MOVES: Duration = Duration::from_secs(660);
/// So many go at most.
const MOST: usize = 4;
/// So many of one host are looked at, the largest.
const POOL: usize = 8;
/// So many plans are made for one VM: each is one of a failover.
const PLANS: usize = 24;

/// Those who make room now.
#[derive(Debug, Serialize, Deserialize)]
pub struct Round {
    goers: BTreeMap<VmId, Goes>,
    /// Those of them who stop.
    stopped: BTreeSet<VmId>,
    /// It is over then, whatever has become of them; while none goes any more, the next begins then.
    until: Time,
}

/// How one of them goes, and from where.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Goes {
    Moves { from: HostId },
    Stops { from: HostId },
}

/// One that may go, and how.
type Maker = (VmId, MakesRoom);
type Makers = Vec<Maker>;

/// A set that would do.
struct Found {
    host: HostId,
    goers: Vec<(VmId, Option<HostId>)>,
}

impl Core {
    /// These of those who ask have no place, the first first: one of them is looked at.
    pub(super) fn make_room(
        &mut self,
        cx: &mut Cx,
        meaning: &Meaning,
        (site, asks): (&Site, &[Ask]),
        mut homeless: impl Iterator<Item = usize>,
    ) {
        if self.settings.rules.room.is_off() {
            return;
        }
        let rests = |id| self.vms.get(&id).and_then(|vm| vm.room_again).is_some_and(|at| cx.now < at);
        let next = homeless.find(|n| meaning.priority(asks[*n].vm) < Priority::Lowest && !rests(asks[*n].vm));
        let Some(n) = next.filter(|_| !self.round_goes_on(cx.now)) else { return };
        let (whom, found) = (asks[n].vm, self.who_goes(cx.now, meaning, (site, asks), n));
        self.vm(whom).room_again = Some(cx.now + if found.is_some() { AGAIN } else { NOBODY });
        if let Some(found) = found {
            self.begin_round(cx, whom, found);
        }
    }

    /// The only host that may have one which has ended uncleanly when it made room: writes of it may still be under way there. The room
    /// that it gave is its own again, whoever else asks for it; that one may have it made again when it runs.
    pub(super) fn has_room_back(&self, claim: &Claim) -> Option<HostId> {
        let gave = claim.reason == ClaimReason::MadeRoom && claim.wanted == Wanted::Running;
        let debt = claim.debts.iter().filter(|_| gave).find(|debt| !self.is_paid(debt));
        debt.map(|debt| debt.host)
    }

    /// Who has made room waits a moment: what it has freed shows later than its end, and is not for itself.
    pub(super) fn holds_room_free(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) -> bool {
        if claim.reason != ClaimReason::MadeRoom || self.has_room_back(claim).is_some() {
            return false;
        }
        let of_round = self.room.as_ref().filter(|round| round.stopped.contains(&id)).map(|round| round.until);
        let known = self.vms.get(&id).map(|vm| vm.known).unwrap_or_default();
        let until = of_round.unwrap_or_default().max(known + SHOWS);
        if cx.now < until {
            cx.set(Timer::Place(id), until.min(cx.now + SHOWS));
            self.waits_for(cx, id, "a moment: it has made room for another".to_owned());
        }
        cx.now < until
    }

    /// Whether the round is over, or will be soon.
    pub(super) fn follow_round(&mut self, now: Time) {
        self.round_goes_on(now);
    }

    fn round_goes_on(&mut self, now: Time) -> bool {
        let Some(round) = &self.room else { return false };
        let stopped = round.stopped.clone();
        let goes_on = |(id, goes): (&VmId, &Goes)| {
            let claim = self.vms.get(id).and_then(|vm| vm.claim.as_ref());
            let there = |from| claim.is_some_and(|claim| claim.names(from));
            match *goes {
                Goes::Moves { from } => there(from) && self.is_under_way(*id, now),
                Goes::Stops { from } => there(from) && self.is_heard(from, now),
            }
        };
        if now < round.until && !round.goers.is_empty() && !round.goers.iter().any(goes_on) {
            self.room = Some(Round { goers: BTreeMap::new(), stopped, until: now + SHOWS });
        }
        self.room.as_ref().is_some_and(|round| now < round.until)
    }

    /// VMs that may go now, by host, the largest first.
    fn room_makers(&self, now: Time, meaning: &Meaning) -> BTreeMap<HostId, Makers> {
        let mut all: BTreeMap<HostId, Makers> = BTreeMap::new();
        for (id, may) in meaning.room_makers() {
            let Some(vm) = self.vms.get(&id) else { continue };
            let Some(claim) = vm.claim.as_ref().filter(|claim| claim.wanted == Wanted::Running) else { continue };
            let Holder::Host(owner) = claim.holder else { continue };
            let busy = vm.attempt.is_some() || vm.placing.is_some() || vm.incoming.is_some() || vm.moving.is_some();
            let runs = self.state_on(owner.host, id) == Some(DomainState::Running);
            // Else late writes might tie it to the host whose room it gives (`yielding`).
            let paths_work = || self.need_of(id).datastores.iter().all(|store| self.reaches(owner.host, *store, now));
            if runs && !busy && vm.evacuation.is_none() && self.is_heard(owner.host, now) && paths_work() {
                all.entry(owner.host).or_default().push((id, may));
            }
        }
        for makers in all.values_mut() {
            makers.sort_by_key(|(id, _)| (std::cmp::Reverse(self.size_of(*id).memory_kib), *id));
            makers.truncate(POOL);
        }
        all
    }

    fn size_of(&self, id: VmId) -> Size {
        Size::of(&self.need_of(id).takes, self.usual_pages_are_1g())
    }

    /// The fewest that really make room: of sets of one size that with the fewest that stop, and then the smallest.
    fn who_goes(&self, now: Time, meaning: &Meaning, (site, asks): (&Site, &[Ask]), n: usize) -> Option<Found> {
        let makers = self.room_makers(now, meaning);
        let placed: Vec<bool> = {
            let plan = plan(site, asks);
            (0..asks.len()).map(|m| plan.host(m).is_some()).collect()
        };
        let mut plans = 0;
        for count in 1..=MOST {
            let mut sets: Vec<(u64, HostId, Makers)> = Vec::new();
            for (host, makers) in makers.iter().filter(|(host, _)| !asks[n].barred.contains_key(host)) {
                for set in subsets(makers, count) {
                    let memory = set.iter().map(|(id, _)| self.size_of(*id).memory_kib).sum();
                    sets.push((memory, *host, set));
                }
            }
            sets.sort_by_key(|(memory, host, set)| (*memory, *host, set[0].0));
            let mut best: Option<(usize, Found)> = None;
            for (_, host, set) in sets {
                let room = site.rooms.iter().find(|room| room.host == host);
                if room.is_none_or(|room| !asks[n].size.fits(self.free_without(room, &set))) {
                    continue; // Not even if nobody else took any of it.
                }
                let freed = self.without_goers(site, host, &set);
                plans += 1;
                if PLANS < plans {
                    break;
                }
                let found = self.with_place(now, meaning, (&freed, asks), n, (&placed, host, &set));
                let Some(found) = found else { continue };
                let stops = found.goers.iter().filter(|(_, to)| to.is_none()).count();
                if best.as_ref().is_none_or(|(least, _)| stops < *least) {
                    best = Some((stops, found));
                }
            }
            if let Some((_, found)) = best {
                return Some(found);
            }
        }
        None
    }

    /// The hosts, with some VMs gone from one of them.
    fn without_goers(&self, site: &Site, host: HostId, set: &[Maker]) -> Site {
        let mut site = site.clone();
        for room in site.rooms.iter_mut().filter(|room| room.host == host) {
            room.free = self.free_without(room, set);
            room.owed_kib = room.owed_kib.saturating_sub(self.size_of_all(set).memory_kib);
            room.runs.retain(|id| set.iter().all(|(goer, _)| goer != id));
        }
        site
    }

    fn size_of_all(&self, set: &[Maker]) -> Size {
        set.iter().fold(Size::default(), |all, (id, _)| all.plus(self.size_of(*id)))
    }

    /// What is free on a host when some VMs are gone from it. More may be promised or taken there than there is.
    fn free_without(&self, room: &Room, set: &[Maker]) -> Size {
        let freed = self.size_of_all(set);
        let mut free = room.free.plus(freed);
        free.memory_kib = free.memory_kib.saturating_sub(room.owed_kib);
        if room.total.vcpus == u64::MAX {
            return free;
        }
        let taken: u64 = room.runs.iter().map(|id| self.size_of(*id).vcpus).sum();
        Size { vcpus: (room.total.vcpus + freed.vcpus).saturating_sub(taken), ..free }
    }

    /// Whether it has a place then, nobody has lost one, and each of those who go may go as they would have to.
    fn with_place(
        &self,
        now: Time,
        meaning: &Meaning,
        (freed, asks): (&Site, &[Ask]),
        n: usize,
        (placed, host, set): (&[bool], HostId, &[Maker]),
    ) -> Option<Found> {
        let mut bars = Bars::of_planned(self, meaning, now);
        let goer = |(id, may): &(VmId, MakesRoom)| {
            let mut ask = bars.ask(*id, &self.need_of(*id), None, None);
            let mut barred = BTreeMap::clone(&ask.barred);
            let others = freed.rooms.iter().map(|room| room.host).filter(|other| !may.moved || *other == host);
            for other in others {
                barred.entry(other).or_insert(WhyNot::Kept);
            }
            ask.barred = Arc::new(barred);
            ask
        };
        let all: Vec<Ask> = asks.iter().cloned().chain(set.iter().map(goer)).collect();
        let plan = plan(freed, &all);
        let kept = placed.iter().enumerate().all(|(m, placed)| !placed || plan.host(m).is_some());
        if plan.host(n).is_none() || !kept {
            return None;
        }
        let goers: Vec<(VmId, Option<HostId>)> =
            set.iter().enumerate().map(|(m, (id, _))| (*id, plan.host(asks.len() + m))).collect();
        let may = goers.iter().zip(set).all(|((_, to), (_, may))| to.is_some() || may.stopped);
        may.then_some(Found { host, goers })
    }

    fn begin_round(&mut self, cx: &mut Cx, whom: VmId, found: Found) {
        let Found { host, goers } = found;
        let (name, from) = (self.vm_name(whom), self.name_of(host));
        let how = |(id, to): &(VmId, Option<HostId>)| match to {
            Some(to) => format!("{} is moved to {}", self.vm_name(*id), self.name_of(*to)),
            None => format!("{} is stopped", self.vm_name(*id)),
        };
        let how: Vec<String> = goers.iter().map(how).collect();
        let text = format!("{name} has no place; to make room for it on {from}: {}", how.join(", "));
        cx.note(Note::warning("vm-room", text).of(&name));
        let stops = Duration::from_secs(self.settings.rules.room.within_s.into()) + ENDS;
        let longest = goers.iter().map(|(_, to)| if to.is_some() { MOVES } else { stops }).max();
        let stopped = goers.iter().filter(|(_, to)| to.is_none()).map(|(id, _)| *id).collect();
        let going = goers.iter().map(|(id, to)| {
            let goes = if to.is_some() { Goes::Moves { from: host } } else { Goes::Stops { from: host } };
            (*id, goes)
        });
        self.room = Some(Round { goers: going.collect(), stopped, until: cx.now + longest.unwrap_or_default() });
        for (id, to) in goers {
            match to {
                Some(to) => self.move_there(cx, id, host, to),
                None if host == self.me.host => {
                    if let Err(denial) = self.begin_yield(cx, id, &name) {
                        self.does_not_yield(cx, id, &denial.to_string());
                    }
                }
                None => {
                    let request = Request::Yield { vm: id, whom: name.clone() };
                    cx.send(host, request, ANSWER, Pending::Yields(id));
                }
            }
        }
    }

    /// The host of one that shall end has answered.
    pub(super) fn yield_answered(&mut self, cx: &mut Cx, id: VmId, reply: Result<Reply, String>) {
        match reply {
            Ok(Reply::Denied(denial)) => self.does_not_yield(cx, id, &denial.to_string()),
            Ok(_) => {}
            Err(why) => self.does_not_yield(cx, id, &why), // If it ends all the same, the better.
        }
    }

    fn does_not_yield(&mut self, cx: &mut Cx, id: VmId, why: &str) {
        let name = self.vm_name(id);
        cx.note(Note::warning("vm-room", format!("{name} makes no room: {why}")).of(&name));
        if let Some(round) = &mut self.room {
            round.goers.remove(&id);
        }
    }
}

/// All sets of so many, each in the order of the list.
fn subsets<T: Clone>(all: &[T], count: usize) -> Vec<Vec<T>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut sets = Vec::new();
    for (n, first) in all.iter().enumerate() {
        for rest in subsets(&all[n + 1..], count - 1) {
            sets.push(std::iter::once(first.clone()).chain(rest).collect());
        }
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_made_once() {
        assert_eq!(subsets(&[1, 2, 3], 1), [[1], [2], [3]]);
        assert_eq!(subsets(&[1, 2, 3], 2), [[1, 2], [1, 3], [2, 3]]);
        assert_eq!(subsets(&[1, 2, 3], 3), [[1, 2, 3]]);
        assert!(subsets(&[1, 2], 3).is_empty());
    }
}
