//! The judge's view of claims and of the grounds of leases.
//!
//! - generations of claims only rise, each by one, except after a datastore was accepted anew
//! - nobody makes a claim that names its host without a row at its guard (R5)
//! - (v, g) is over before anybody else creates g+1; the owner releases nothing that still runs
//! - nobody says "over" of what runs
//! - nothing is taken from a host that is well and still has its copy (R4: after a stall owners come first)
//! - a stopped copy whose newest claim lets it go on is not killed, unless it may have run elsewhere (R2)
//! - a counter is given once

use mainstay::guard::state::Taken;
use mainstay::types::guard::GuardReport;
use mainstay::types::store::StoreAnswer;
use mainstay::types::{
    BeatBlock, Claim, ClaimReason, DatastoreId, Generation, Holder, Tenure, Time, VmId, VmState, Wanted,
};

use super::invariants::Given;
use super::rollback::leaps;
use super::world::{H, World};

/// How many counters of a host are remembered: older ones ground no lease.
const GIVEN: usize = 512;

impl World {
    // ---- beats --------------------------------------------------------------------------------------------------

    /// A guard has taken a counter.
    pub fn given(&mut self, h: H, taken: Taken) {
        let all = self.judge.given.entry(h).or_default();
        let stamp = |given: &Given| (given.incarnation, given.counter);
        let new = (taken.incarnation, taken.counter);
        let rises = all.back().is_none_or(|last| stamp(last) < new); // Then it is new: they rise, but for a lost disk.
        let twice = !rises && all.iter().any(|given| stamp(given) == new);
        if GIVEN <= all.len() {
            all.pop_front();
        }
        let (incarnation, counter) = (taken.incarnation, taken.counter);
        all.push_back(Given { incarnation, counter, until: taken.at + taken.lease });
        if twice {
            let host = self.hosts[h].name.clone();
            self.violated(&format!("the guard of {host} gives counter {counter} of incarnation {incarnation} twice"));
        }
    }

    /// A beat has landed: what it grounds.
    pub fn landed(&mut self, h: H, home: DatastoreId, block: &BeatBlock) {
        self.grounds(h, home, block.taken + block.lease);
        for attestation in &block.attestations {
            let of = usize::from(attestation.index.0);
            let same =
                |given: &&Given| (given.incarnation, given.counter) == (attestation.incarnation, attestation.counter);
            let Some(given) = self.judge.given.get(&of).and_then(|all| all.iter().rev().find(same)) else { continue };
            let until = given.until;
            self.grounds(of, home, until);
        }
    }

    /// A lease of this host may reach until then, whether its guard knows it yet or not. What lands after its end says
    /// nothing for what ran before.
    fn grounds(&mut self, h: H, home: DatastoreId, until: Time) {
        let now = self.local(h);
        let ground = self.judge.grounds.entry((h, home)).or_default();
        *ground = until.max(*ground);
        let known = self.judge.last.get(&(h, home)).copied().unwrap_or_default();
        let reach = self.judge.reach.entry((h, home)).or_default();
        if now < known.max(*reach) {
            *reach = until.max(*reach);
        }
    }

    // ---- words --------------------------------------------------------------------------------------------------

    /// A guard reports to its agent.
    pub fn reported(&mut self, h: H, report: &GuardReport) {
        if let GuardReport::Row(row) = report
            && let VmState::Over(_) = row.state
        {
            self.says_over(h, row.tenure);
        }
    }

    /// A guard says that (v, g) is over.
    pub fn says_over(&mut self, h: H, tenure: Tenure) {
        if !self.judge.said.insert((self.hosts[h].id, tenure)) || !self.runs_on(tenure.vm).contains(&h) {
            return;
        }
        let Some(guard) = &self.hosts[h].guard else { return };
        let newest = guard.state.table.views().filter(|row| row.tenure.vm == tenure.vm).map(|row| row.tenure).max();
        if newest == Some(tenure) {
            let (name, host) = (self.vm_name(tenure.vm), self.hosts[h].name.clone());
            self.violated(&format!("the guard of {host} says over of {name}, which runs there"));
        }
    }

    /// A guard kills a stopped copy.
    pub fn kills(&mut self, h: H, vm: VmId) {
        let me = self.hosts[h].id;
        let home = self.home_of(vm);
        if self.stores.values().any(|store| store.lied) {
            return; // What its claims say may be less than what was.
        }
        let Some(Ok(claim)) = self.stores[&home].highest(vm) else { return };
        let goes_on = claim.wanted == Wanted::Running
            && match claim.holder {
                Holder::None => true,
                Holder::Host(owner) | Holder::Moved { owner, .. } => {
                    owner.host == me && owner.boot == self.hosts[h].boot()
                }
                Holder::Handover { .. } | Holder::Deleted => false,
            };
        let Some(guard) = &self.hosts[h].guard else { return };
        let rows = guard.state.table.kept(|_| None).into_iter().filter(|row| row.tenure.vm == vm && row.ran);
        let Some(ran) = rows.map(|row| row.tenure).max() else { return };
        // Its memory is older than its disks, should it have run elsewhere meanwhile.
        let old = self.stores.values().any(|store| store.named_another(ran, me));
        // One whose vCPUs were never let go is worth nothing: its start is given up.
        let key = self.hosts[h].domains.get(&vm).and_then(|domain| domain.qemu.as_ref()).map(|qemu| qemu.key);
        let moved = key.is_some_and(|key| self.judge.executed.contains(&key));
        if goes_on && !old && moved {
            let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
            self.violated(&format!("the guard of {host} kills {name}, which its newest claim lets go on"));
        }
    }

    // ---- claims -------------------------------------------------------------------------------------------------

    /// An agent orders a claim.
    pub fn claim_ordered(&mut self, h: H, claim: &Claim) {
        if let Holder::Handover { to, .. } = claim.holder {
            let target = self.host_of(to.host).map(|h| &self.hosts[h]).filter(|target| target.boot() == to.boot);
            let guard = target.and_then(|target| target.guard.as_ref());
            if guard.is_some_and(|guard| !guard.state.table.knows(claim.tenure)) {
                self.violated(&format!("{} is handed over without a row at the target's guard", claim.name));
            }
        }
        let Some(owner) = claim.owners().first().copied() else { return };
        let name = claim.name.clone();
        let host = self.hosts[h].name.clone();
        if owner.host != self.hosts[h].id {
            self.violated(&format!("{host} claims {name} for another host"));
        } else if self.hosts[h].guard.as_ref().is_some_and(|guard| !guard.state.table.knows(claim.tenure)) {
            let generation = claim.tenure.generation;
            self.violated(&format!("{host} claims {name} (generation {generation}) without a row at its guard"));
        }
    }

    /// A claim was tried at the storage.
    pub fn claim_landed(
        &mut self,
        home: DatastoreId,
        claim: &Claim,
        before: Generation,
        now: Generation,
        answer: &StoreAnswer,
    ) {
        let name = claim.name.clone();
        // The first claim on a datastore counts on from what lies on others, and so does one after the home came back.
        let top = self.stores[&home].claim(Tenure { vm: claim.tenure.vm, generation: before });
        let left = top.is_some_and(|top| top.next_home() != home);
        if now < before || (before != Generation(0) && before.next() < now && !leaps(now) && !left) {
            self.violated(&format!("claims of {name} went from generation {before} to {now}"));
        }
        if self.trace {
            self.tell("", &format!("claim {name} {}: {answer:?}", claim.tenure.generation));
        }
        if before < now && *answer == StoreAnswer::Created {
            self.judge.claims += 1;
            if let Some(last) = self.predecessor(home, claim) {
                self.succeeds(last.home, &last, claim);
            }
            let owners = claim.owners().iter().map(|owner| owner.host).collect();
            self.judge.followed.insert(claim.tenure.vm, (claim.tenure.generation, owners));
            self.find_home(claim.tenure.vm);
        }
    }

    fn succeeds(&mut self, home: DatastoreId, last: &Claim, claim: &Claim) {
        let vm = claim.tenure.vm;
        let Some(owner) = last.owner() else { return };
        let (Some(h), Some(maker)) = (self.host_of(owner.host), self.host_of(claim.maker)) else { return };
        let (name, host, taker) = (claim.name.clone(), self.hosts[h].name.clone(), self.hosts[maker].name.clone());
        if h == maker {
            let runs = self.runs_on(vm).contains(&h);
            let held =
                self.hosts[h].guard.as_ref().is_some_and(|guard| guard.state.table.held(vm, home) == Some(last.tenure));
            if claim.holder == Holder::None && (runs || held) && self.hosts[h].boot() == owner.boot {
                self.violated(&format!("{host} releases {name}, which runs there, or may"));
            }
            return;
        }
        if !matches!(claim.reason, ClaimReason::Migrated | ClaimReason::Planned) {
            self.judge.takeovers += 1;
        }
        if !self.is_over(owner, last.tenure, home, self.now) {
            let generation = last.tenure.generation;
            self.violated(&format!("{taker} claims {name} although generation {generation}, of {host}, is not over"));
        }
        let there = self.hosts[h].domains.get(&vm).and_then(|domain| domain.qemu.as_ref());
        // A datastore that went back has had its copies stopped; whoever learns of the acceptance first has them.
        let lied = self.stores[&home].lied;
        if there.is_some_and(|qemu| !qemu.dying) && !self.troubled(h) && !lied {
            self.violated(&format!("{taker} takes {name} from {host}, which is well and still has it"));
        }
    }
}
