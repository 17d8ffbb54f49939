//! The judge: what must hold after every event, and what is true at the end. It looks at the world, not at what agents
//! say. What it knows of claims and beats: `ownership.rs`; of needless stops: `blame.rs`.
//!
//! - never two running copies of one VM (running = vCPUs go, not stopped by the guard, host neither frozen nor dead)
//! - nobody runs beyond its lease, and no lease reaches beyond what truly lies on its datastore
//! - nobody starts while an earlier copy's writes may still land (unless the administrator accepts that)
//! - a copy never goes on after another one has executed: its memory would be older than the disks
//! - no host has a proof that is not true (`soundness.rs`)
//! - no storage fence hits a host that runs something

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use mainstay::guard::table::ProcessKey;
use mainstay::types::{
    BootId, Counter, DatastoreId, Generation, Holder, HostId, Incarnation, Owner, Tenure, Time, VmId, Wanted,
};

use super::world::{Gate, H, World, nanos};

/// What an old copy may do in the moment of the thaw (design 2, assumption 4).
pub const THAW: Duration = Duration::from_millis(20);
/// A counter that a guard gave away.
#[derive(Clone, Copy)]
pub(super) struct Given {
    pub(super) incarnation: Incarnation,
    pub(super) counter: Counter,
    pub(super) until: Time,
}

/// What a source may execute that libvirt lets go on after the switch (R6): until its second sample (20 ms) shows it, and
/// until its vCPUs stand after that (`begin_halt`: 4.2 ms at most).
pub const SAMPLED: Duration = Duration::from_millis(25);

/// What the judge remembers.
#[derive(Default)]
pub struct Judge {
    /// The first violation.
    pub verdict: Option<String>,
    running: BTreeMap<VmId, BTreeSet<H>>,
    /// The world as it was looked at last.
    looked: u64,
    /// The newest claim of each VM that was ever made, and whom it names.
    pub followed: BTreeMap<VmId, (Generation, Vec<HostId>)>,
    /// How often each VM began to run.
    pub starts: BTreeMap<VmId, u32>,
    /// Copies that have executed, and the one of each VM that did last.
    pub(super) executed: BTreeSet<ProcessKey>,
    newest: BTreeMap<VmId, ProcessKey>,
    spent: u64,
    busy: BTreeSet<ProcessKey>,
    /// No lease of a running VM ends before.
    calm_until: u64,
    /// Leases as last seen, also of guards that have died.
    pub(super) last: BTreeMap<(H, DatastoreId), Time>,
    /// The newest counters of each host.
    pub(super) given: BTreeMap<H, VecDeque<Given>>,
    /// Until when a lease can reach, by what lies on its datastore.
    pub(super) grounds: BTreeMap<(H, DatastoreId), Time>,
    /// Until when a lease that stood can have reached since, whether its guard knew it or not.
    pub(super) reach: BTreeMap<(H, DatastoreId), Time>,
    /// When the lease before the present one had ended, in the world's time: whatever was claimed before that is over.
    pub(super) lapsed: BTreeMap<(H, DatastoreId), u64>,
    /// Boots that a power switch has ended.
    pub(super) off: BTreeSet<BootId>,
    /// Where the highest claim of each VM lies.
    pub(super) homes: BTreeMap<VmId, DatastoreId>,
    /// Until then network beats may show a guard that nobody has heard of.
    pub(super) reborn: u64,
    /// What guards have said to be over.
    pub(super) said: BTreeSet<(HostId, Tenure)>,
    /// When a copy stopped running, by VM and host.
    stood: BTreeMap<(VmId, H), u64>,
    /// When a copy last wrote to its disks, of the writes that those have kept.
    wrote: BTreeMap<(VmId, H), u64>,
    pub(super) touched: BTreeMap<VmId, u64>,
    pub(super) stall: Option<u64>,
    /// Claims that came about.
    pub claims: u64,
    /// Those by which a VM went to another host without a move.
    pub takeovers: u64,
    /// Leases that lapsed under a living guard.
    pub lapses: u64,
}

impl World {
    /// Something is not as it must be.
    pub fn violated(&mut self, what: &str) {
        if self.judge.verdict.is_none() {
            self.judge.verdict = Some(what.to_owned());
            self.tell("!!", what);
        }
    }

    /// Looks at everything that an event in this host may have changed.
    pub fn look(&mut self, host: Option<H>) {
        if let Some(h) = host {
            self.look_at_leases(h);
        }
        if self.judge.looked != self.changes {
            self.judge.looked = self.changes;
            self.look_at_copies();
        }
        if self.judge.calm_until <= self.now {
            self.look_at_ends();
        }
    }

    fn look_at_copies(&mut self) {
        self.spend();
        let mut running: BTreeMap<VmId, BTreeSet<H>> = BTreeMap::new();
        for (h, vm, qemu) in self.qemus() {
            let host = &self.hosts[h];
            let waking = host.thawed.is_some_and(|at| self.now < at + nanos(THAW))
                && !self.judge.running.get(&vm).is_some_and(|hosts| hosts.contains(&h));
            // libvirt let a source go on after the switch: its guard sees that at its next sample.
            let waking = waking || qemu.let_go.is_some_and(|at| self.now < at + nanos(SAMPLED));
            if qemu.cpus && !qemu.halted && !qemu.dying && !host.frozen && !waking {
                running.entry(vm).or_default().insert(h);
            }
        }
        let clone = running.keys().find(|vm| {
            let disks_of = self.vms[*vm].disks_of;
            disks_of != **vm && running.contains_key(&disks_of)
        });
        if let Some(clone) = clone.copied() {
            let (name, other) = (self.vm_name(clone), self.vm_name(self.vms[&clone].disks_of));
            self.violated(&format!("{name} and {other} run on the same disks"));
        }
        if running == self.judge.running {
            return;
        }
        self.judge.calm_until = 0;
        let before = std::mem::replace(&mut self.judge.running, running);
        let vms: BTreeSet<VmId> = before.keys().chain(self.judge.running.keys()).copied().collect();
        for vm in vms {
            let old = before.get(&vm).cloned().unwrap_or_default();
            let new = self.judge.running.get(&vm).cloned().unwrap_or_default();
            if old != new {
                self.moved(vm, &old, &new);
            }
        }
    }

    /// Copies count again when the moment of a thaw, or of a sample, is over.
    pub fn look_again(&mut self, after: Duration) {
        self.after(Gate::World, after, |world| world.changes += 1);
    }

    fn moved(&mut self, vm: VmId, old: &BTreeSet<H>, new: &BTreeSet<H>) {
        let name = self.vm_name(vm);
        let names = |world: &Self, hosts: &BTreeSet<H>| -> Vec<String> {
            hosts.iter().map(|h| world.hosts[*h].name.clone()).collect()
        };
        if new.is_empty() {
            let was = names(self, old).join(", ");
            self.tell("", &format!("{name} runs nowhere (was on {was})"));
        } else {
            let on = names(self, new).join(", ");
            self.tell("", &format!("{name} runs on {on}"));
            if old.is_empty() {
                *self.judge.starts.entry(vm).or_default() += 1;
            }
            if 1 < new.len() {
                self.violated(&format!("{name} runs {} times: on {on}", new.len()));
            }
        }
        for h in old.difference(new).copied() {
            let now = self.now;
            self.judge.stood.insert((vm, h), now);
            self.judge.wrote.insert((vm, h), now);
            self.check_blame(vm, h);
        }
        for h in new.difference(old).copied() {
            self.check_age(vm, h);
            self.check_memory(vm, h);
            self.check_late_writes(vm, h);
        }
    }

    /// A copy that stood goes on, or an incoming one begins: nobody may have run since its memory was made.
    fn check_age(&mut self, vm: VmId, h: H) {
        let made = self.hosts[h].domains.get(&vm).and_then(|domain| domain.qemu.as_ref()).and_then(|qemu| qemu.memory);
        let own = self.judge.stood.get(&(vm, h)).copied();
        if let Some(qemu) = self.qemu(h, vm) {
            qemu.memory = Some(u64::MAX); // From now on: whenever it stands.
        }
        let made = match made {
            None => return, // Begun anew, from its disks.
            Some(u64::MAX) => own.unwrap_or(0),
            Some(made) => made,
        };
        let since = |(of, at): (&(VmId, H), &u64)| (of.0 == vm && of.1 != h && made < *at).then_some(of.1);
        if let Some(other) = self.judge.wrote.iter().find_map(since) {
            let (name, host, other) = (self.vm_name(vm), self.hosts[h].name.clone(), self.hosts[other].name.clone());
            self.violated(&format!(
                "{name} goes on at {host} with memory that is older than its disks: {other} ran it"
            ));
        }
    }

    /// Who has written to disks until now, and when last.
    pub(super) fn writes(&self) -> BTreeMap<(VmId, H), u64> {
        let running = self.judge.running.iter().flat_map(|(vm, hosts)| hosts.iter().map(|h| ((*vm, *h), self.now)));
        self.judge.wrote.clone().into_iter().chain(running).collect()
    }

    /// Disks are what they were when these were their writes: what ran since has not happened to them. (A copy that runs
    /// goes on, and writes to them from now on.)
    pub(super) fn disks_went_back(&mut self, wrote: BTreeMap<(VmId, H), u64>) {
        self.judge.wrote = wrote;
        let running = &self.judge.running;
        self.judge.newest.retain(|vm, _| running.contains_key(vm));
    }

    /// vCPU time passes for what has been running since the last look.
    pub fn spend(&mut self) {
        let passed = self.now - std::mem::replace(&mut self.judge.spent, self.now);
        let before = std::mem::take(&mut self.judge.busy);
        for host in &mut self.hosts {
            let frozen = host.frozen;
            for qemu in host.domains.values_mut().filter_map(|domain| domain.qemu.as_mut()) {
                if before.contains(&qemu.key) {
                    qemu.spent += passed;
                }
                if qemu.cpus && !qemu.halted && !frozen {
                    self.judge.busy.insert(qemu.key);
                }
            }
        }
    }

    fn check_memory(&mut self, vm: VmId, h: H) {
        let Some(key) = self.qemu(h, vm).map(|qemu| qemu.key) else { return };
        let ran = !self.judge.executed.insert(key);
        let newest = self.judge.newest.insert(vm, key);
        if ran && newest.is_some_and(|newest| newest != key) {
            let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
            self.violated(&format!("{name} goes on at {host} with memory that is older than its disks"));
        }
    }

    fn check_late_writes(&mut self, vm: VmId, h: H) {
        let home = self.disk_of(h, vm);
        let boot = self.hosts[h].life.unwrap_or(0);
        let stale = self.qemu(h, vm).is_some_and(|qemu| qemu.stale);
        let store = self.stores.get_mut(&home).expect("its home");
        let (accepts, lied) = (store.accepts, store.lied);
        let writers = store.writers.entry(vm).or_default();
        let other = writers.iter().find(|writer| **writer != (h, boot)).copied();
        if accepts {
            writers.clear();
        }
        if !stale {
            writers.insert((h, boot));
        }
        // Who may still write is written in claims: an operator who accepts that those are gone is told to look.
        if let Some((other, _)) = other.filter(|_| !accepts && !lied) {
            let (name, host, other) = (self.vm_name(vm), self.hosts[h].name.clone(), self.hosts[other].name.clone());
            self.violated(&format!("{name} starts on {host} while writes of its copy on {other} may still land"));
        }
    }

    // ---- leases -------------------------------------------------------------------------------------------------

    /// Whether a VM was ever claimed; one that was not may run without a lease.
    fn is_claimed(&self, vm: VmId) -> bool {
        self.stores[&self.home_of(vm)].generation(vm) != Generation(0)
    }

    /// Leases of a host that have changed.
    fn look_at_leases(&mut self, h: H) {
        let Some(guard) = &self.hosts[h].guard else { return };
        let mut beyond = None;
        for (home, store) in &guard.state.stores {
            let Some(until) = store.lease.valid_until() else { continue };
            let last = self.judge.last.entry((h, *home)).or_default();
            if *last == until {
                continue;
            }
            let ended = self.judge.reach.get(&(h, *home)).copied().unwrap_or_default().max(*last);
            if ended <= self.hosts[h].clock.at(self.now) {
                self.judge.lapsed.insert((h, *home), self.hosts[h].clock.when(ended));
            }
            *last = until;
            self.judge.calm_until = 0;
            if self.judge.grounds.get(&(h, *home)).is_none_or(|ground| *ground < until) {
                beyond = Some(until);
            }
        }
        if beyond.is_some() {
            let host = self.hosts[h].name.clone();
            self.violated(&format!("{host} believes in a lease for which nothing lies on the datastore"));
        }
    }

    /// Whether a running VM has come to the end of its lease; and when the next could.
    fn look_at_ends(&mut self) {
        let (mut beyond, mut calm) = (None, u64::MAX);
        for (vm, hosts) in &self.judge.running {
            if !self.is_claimed(*vm) {
                continue;
            }
            let home = self.home_of(*vm);
            for h in hosts {
                match self.judge.last.get(&(*h, home)) {
                    Some(until) if self.local(*h) < *until => {
                        calm = calm.min(self.hosts[*h].clock.when(*until).saturating_sub(1_000_000).max(self.now + 1));
                    }
                    Some(_) | None => beyond = Some((*vm, *h)),
                }
            }
        }
        self.judge.calm_until = calm;
        if let Some((vm, h)) = beyond {
            let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
            self.violated(&format!("{name} runs on {host} beyond its lease"));
        }
    }

    /// A storage fence hits this host.
    pub fn fenced(&mut self, victim: H, homes: &[DatastoreId]) {
        let name = self.hosts[victim].name.clone();
        self.tell("", &format!("storage fence against {name}"));
        let hit: Vec<VmId> =
            self.judge.running.iter().filter(|(_, hosts)| hosts.contains(&victim)).map(|(vm, _)| *vm).collect();
        let hit: Vec<VmId> = hit.into_iter().filter(|vm| homes.contains(&self.home_of(*vm))).collect();
        if let Some(vm) = hit.first() {
            let vm = self.vm_name(*vm);
            self.violated(&format!("a storage fence hits {name}, which runs {vm}"));
        }
    }

    // ---- the end ------------------------------------------------------------------------------------------------

    /// Hosts on which a VM runs now.
    pub fn runs_on(&self, vm: VmId) -> Vec<H> {
        self.judge.running.get(&vm).into_iter().flatten().copied().collect()
    }

    /// One line per VM.
    pub fn facts(&self) -> Vec<String> {
        let fact = |vm: &VmId| {
            let name = self.vm_name(*vm);
            let home = self.home_of(*vm);
            let where_ = match self.runs_on(*vm).first() {
                Some(h) => {
                    let edit = self.domains(*h).get(vm).and_then(|domain| domain.qemu.as_ref()).map_or(0, |q| q.edit);
                    let edit = if edit == 0 { String::new() } else { format!(" as of edit {edit}") };
                    format!("runs on {}{edit}", self.hosts[*h].name)
                }
                None => match self.hosts.iter().find(|host| host.domains.get(vm).is_some_and(|d| d.saved.is_some())) {
                    Some(host) => format!("does not run, its memory lies on {}", host.name),
                    None => "does not run".to_owned(),
                },
            };
            let claim = match self.stores[&home].highest(*vm) {
                Some(Ok(claim)) => {
                    let holder = match claim.holder {
                        Holder::Host(owner) | Holder::Moved { owner, .. } => {
                            let h = self.host_of(owner.host).expect("a host of the world");
                            format!("owned by {}", self.hosts[h].name)
                        }
                        Holder::Deleted => "deleted".to_owned(),
                        Holder::Handover { from, to } => {
                            let name = |owner: Owner| {
                                let h = self.host_of(owner.host).expect("a host of the world");
                                self.hosts[h].name.clone()
                            };
                            format!("handed from {} to {}", name(from), name(to))
                        }
                        _ => "owned by nobody".to_owned(),
                    };
                    let wanted = if claim.wanted == Wanted::Running { "running" } else { "stopped" };
                    let elsewhere = if home == self.vms[vm].record.home { "" } else { ", on another home" };
                    format!("generation {}, {holder}, wanted {wanted}{elsewhere}", claim.tenure.generation)
                }
                Some(Err(why)) => format!("newest claim unreadable: {why}"),
                None => "no claim".to_owned(),
            };
            format!("{name} {where_}; {claim}")
        };
        self.vms.keys().map(fact).collect()
    }

    /// After a heal: every VM that is wanted runs exactly once, in nobody's way. Else what is wrong.
    pub fn unsettled(&self) -> Option<String> {
        for (vm, spec) in &self.vms {
            let Some(Ok(claim)) = self.stores[&self.home_of(*vm)].highest(*vm) else { continue };
            let on = self.runs_on(*vm);
            let wanted = claim.wanted == Wanted::Running;
            if wanted != (on.len() == 1) {
                return Some(format!("{}: runs on {} hosts, wanted {:?}", spec.name, on.len(), claim.wanted));
            }
            let owner = claim.owner().and_then(|owner| self.host_of(owner.host));
            if wanted && owner != on.first().copied() {
                return Some(format!("{}: runs elsewhere than its claim says", spec.name));
            }
            let (home, edit) = (claim.next_home(), |h: &H| self.domains(*h).get(vm).map_or(0, |domain| domain.edit));
            let astray = |h: &&H| self.disk_of(**h, *vm) != home && self.place(*vm, edit(h)) == self.disk_of(**h, *vm);
            if claim.home != home || on.iter().any(|h| astray(&h)) {
                return Some(format!("{}: its home has not followed its disks", spec.name));
            }
        }
        if let Some((h, vm, _)) = self.qemus().find(|(_, _, qemu)| qemu.halted || !qemu.cpus) {
            return Some(format!("{} stands on {}", self.vm_name(vm), self.hosts[h].name));
        }
        for host in &self.hosts {
            let Some(agent) = &host.agent else { return Some(format!("{} has no agent", host.name)) };
            let view = agent.core.view(self.local(host.n));
            if view.master.is_none() {
                return Some(format!("{} knows no master", host.name));
            }
            if view.master.as_deref() != Some(host.name.as_str()) {
                continue; // People are shown the master's view.
            }
            let busy = view.vms.iter().find(|vm| matches!(vm.state.as_str(), "waiting" | "starting" | "unknown"));
            if let Some(vm) = busy {
                return Some(format!("{}: {} is {} ({:?})", host.name, vm.name, vm.state, vm.why));
            }
        }
        let masters: BTreeSet<Option<String>> = self
            .hosts
            .iter()
            .filter_map(|host| host.agent.as_ref().map(|agent| agent.core.view(self.local(host.n)).master))
            .collect();
        (1 < masters.len()).then(|| format!("several masters: {masters:?}"))
    }
}
