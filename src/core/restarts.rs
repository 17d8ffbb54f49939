//! The restart list: VMs whose claims are over get their places together, and start one after the other.
//!
//! ```text
//!   over, and those that only lack a proof ─► plan: who goes where ─► by priority, then who waits for whom, then size:
//!                                                │ nowhere                │ those it waits for are ready?
//!                                                ▼                        │ its host and its datastore have a turn for it?
//!                                              waits for a place          ▼ no: waits, says for what    yes: ordered
//! ```
//!
//! Whoever only lacks a proof is in the plan so that others leave it its room. Who waits for a turn is looked at as soon as a start has
//! ended; nothing here is decided for good: a plan is made anew with each look.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::failover::Candidate;
use super::note::Note;
use super::placement::Bars;
use super::placement::rules::Meaning;
use super::placement::search::{Plan, plan};
use super::placement::site::Ask;
use crate::types::control::Takes;
use crate::types::rules::Priority;
use crate::types::store::{StoreAnswer, StoreOrder};
use crate::types::{DatastoreId, HostId, VmId};

/// How it is called in words to wait for a host that can take it.
const A_PLACE: &str = "a place: ";
/// Whatever else happens, one that waits for a place is looked at after so long.
const AGAIN: Duration = Duration::from_secs(2);

/// A datastore's time to show a record.
const RECORD: Duration = Duration::from_secs(3);

/// Starts under way.
#[derive(Default)]
struct Turns {
    hosts: BTreeMap<HostId, u32>,
    datastores: BTreeMap<DatastoreId, u32>,
}

impl Core {
    pub(super) fn restart(&mut self, cx: &mut Cx, candidates: &[Candidate]) {
        let meaning = self.meaning();
        self.follow_dependencies(&meaning.order, cx.now);
        if candidates.iter().all(|candidate| candidate.over.is_none()) {
            return;
        }
        let (never, candidates): (Vec<&Candidate>, Vec<&Candidate>) =
            candidates.iter().partition(|candidate| meaning.priority(candidate.id) == Priority::Never);
        for candidate in never {
            self.waits_for(cx, candidate.id, "a person: by its priority, never, it is not restarted".to_owned());
        }
        let unsized_yet = candidates.iter().filter(|candidate| !self.is_sized(cx, candidate)).count();
        if 0 < unsized_yet {
            return; // Else those whose records come first would take the room of those that come first.
        }
        let candidates: Vec<&Candidate> =
            candidates.into_iter().filter(|candidate| self.rests(cx, candidate.id).is_none()).collect();
        self.follow_round(cx.now);
        let candidates: Vec<&Candidate> = candidates
            .into_iter()
            .filter(|candidate| !self.holds_room_free(cx, candidate.id, &candidate.claim))
            .collect();
        let asking: BTreeSet<VmId> = candidates.iter().map(|candidate| candidate.id).collect();
        let site = self.site(&meaning, &asking);
        let mut bars = Bars::of_lost(self, &meaning, cx.now);
        let ask = |candidate: &&Candidate| {
            let from = candidate.claim.owner().map(|owner| owner.host);
            let tied = candidate.over.and_then(|(_, tied)| tied);
            let ask = bars.ask(candidate.id, &self.need_of(candidate.id), from, tied);
            let first = tied.is_some() && self.has_room_back(&candidate.claim) == tied;
            Ask { priority: if first { Priority::Highest } else { ask.priority }, ..ask }
        };
        let asks: Vec<_> = candidates.iter().map(ask).collect();
        let mut plan = plan(&site, &asks);
        let mut order: Vec<usize> = (0..asks.len()).collect();
        order.sort_by_cached_key(|n| {
            let ask = &asks[*n];
            (ask.priority, meaning.order.depth(ask.vm), Reverse(ask.size.memory_kib), ask.vm)
        });
        let homeless = order.iter().copied().filter(|n| candidates[*n].over.is_some() && plan.host(*n).is_none());
        self.make_room(cx, &meaning, (&site, &asks), homeless);
        let mut turns = self.turns();
        for n in order.iter().copied() {
            self.restart_one(cx, candidates[n], (&mut plan, n), &meaning, &mut turns);
        }
    }

    /// Whether it is known what it takes. After a cold start nobody has reported it: its record says.
    fn is_sized(&mut self, cx: &mut Cx, candidate: &Candidate) -> bool {
        let vm = self.vm(candidate.id);
        if 0 < vm.memory_kib() || vm.sized == Some(true) {
            return true;
        }
        if vm.sized.is_none() {
            vm.sized = Some(false);
            let order = StoreOrder::ReadRecord { vm: candidate.id, digest: candidate.claim.record };
            cx.store(candidate.claim.next_home(), order, RECORD, Pending::Sized(candidate.id));
        }
        false
    }

    /// One that cannot be read counts as little: whoever starts it has to read it, too.
    pub(super) fn sized(&mut self, id: VmId, answer: StoreAnswer) {
        let vm = self.vm(id);
        vm.sized = Some(true);
        if let StoreAnswer::Record(record) = answer {
            vm.reported = Takes::of(&record);
        }
        self.look = true;
    }

    fn restart_one(
        &mut self,
        cx: &mut Cx,
        candidate: &Candidate,
        (plan, n): (&mut Plan<'_>, usize),
        meaning: &Meaning,
        turns: &mut Turns,
    ) {
        let Some((proof, _)) = candidate.over else { return };
        let id = candidate.id;
        let Some(host) = plan.host(n) else {
            let why = plan.why_nowhere(n);
            let why: Vec<String> = why.iter().map(|(host, why)| format!("{} {why}", self.name_of(*host))).collect();
            let round = self.no_place_left(cx.now, id).map(|round| format!("; or {round}")).unwrap_or_default();
            return self.waits_for_place(cx, id, format!("{A_PLACE}{}{round}", why.join("; ")));
        };
        if let Some(what) = self.held_up(cx, id, &meaning.order) {
            self.waits_for(cx, id, what);
            return;
        }
        if let Some(what) = self.not_its_turn(host, candidate.claim.next_home(), turns) {
            self.waits_for(cx, id, what);
            return cx.set(Timer::Place(id), cx.now + self.settings.timing.beat);
        }
        turns.take(host, candidate.claim.next_home());
        let instead = plan.why_there(n);
        let instead = instead.iter().map(|(host, why)| format!("not on {}: {why}", self.name_of(*host))).collect();
        self.order(cx, id, candidate.claim.clone(), proof, host, instead);
    }

    /// It is looked at again with whatever changes: told when it begins, since every change of some host's memory changes the words.
    fn waits_for_place(&mut self, cx: &mut Cx, id: VmId, what: String) {
        let name = self.vm_name(id);
        cx.set_earlier(Timer::Place(id), cx.now + AGAIN);
        let verdict = self.waits_for(cx, id, what.clone());
        if verdict.is_some() {
            cx.note(Note::warning("vm-waits", format!("{name} waits for {what}")).of(&name).by(verdict));
        }
    }

    /// Starts under way that are known here.
    fn turns(&self) -> Turns {
        let mut turns = Turns::default();
        for vm in self.vms.values() {
            let starts = vm.attempt.as_ref().is_some_and(super::attempt::Attempt::starts);
            let host = vm.placing.as_ref().map(|placing| placing.host).or(starts.then_some(self.me.host));
            if let (Some(host), Some(claim)) = (host, &vm.claim) {
                turns.take(host, claim.next_home());
            }
        }
        turns
    }

    fn not_its_turn(&self, host: HostId, datastore: DatastoreId, turns: &Turns) -> Option<String> {
        let limits = &self.settings.rules.limits;
        let of = |count: Option<&u32>, most: u32| count.copied().unwrap_or_default() >= most;
        if of(turns.hosts.get(&host), limits.starts_per_host) {
            return Some(format!("its turn: {} starts at once on {}", limits.starts_per_host, self.name_of(host)));
        }
        let full = of(turns.datastores.get(&datastore), limits.starts_per_datastore);
        let name = || self.store_name(datastore);
        full.then(|| format!("its turn: {} starts at once from {}", limits.starts_per_datastore, name()))
    }
}

impl Turns {
    fn take(&mut self, host: HostId, datastore: DatastoreId) {
        *self.hosts.entry(host).or_default() += 1;
        *self.datastores.entry(datastore).or_default() += 1;
    }
}
