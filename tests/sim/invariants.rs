//! The judge: what must hold after every event, and what is true at the end. It looks at the world, not at what agents
//! say.
//!
//! - never two running copies of one VM (running = vCPUs go, not stopped by the guard, host neither frozen nor dead)
//! - generations of claims only rise, each by one
//! - nobody runs beyond its lease
//! - nobody makes a claim that names its host without a row at its guard (R5)
//! - nobody starts while an earlier copy's writes may still land (unless the administrator accepts that)
//! - a copy never goes on after another one has executed: its memory would be older than the disks
//! - no storage fence hits a host that runs something

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mainstay::guard::table::ProcessKey;
use mainstay::types::store::StoreAnswer;
use mainstay::types::{Claim, DatastoreId, Generation, Holder, Owner, Time, VmId, Wanted};

use super::world::{H, World, nanos};

/// What an old copy may do in the moment of the thaw (design 2, assumption 4).
const THAW: Duration = Duration::from_millis(20);

/// What a source may execute that libvirt lets go on after the switch (R6): until it is sampled, and stopped.
const SAMPLED: Duration = Duration::from_millis(25);

/// What the judge remembers.
#[derive(Default)]
pub struct Judge {
    /// The first violation.
    pub verdict: Option<String>,
    running: BTreeMap<VmId, BTreeSet<H>>,
    /// Leases of guards that have died.
    last: BTreeMap<(H, DatastoreId), Time>,
    /// How often each VM began to run.
    pub starts: BTreeMap<VmId, u32>,
    /// When each VM last stood still, and began to run again.
    pub gaps: Vec<(VmId, u64, u64)>,
    stood: BTreeMap<VmId, u64>,
    /// Copies that have executed, and the one of each VM that did last.
    executed: BTreeSet<ProcessKey>,
    newest: BTreeMap<VmId, ProcessKey>,
    looked: u64,
    busy: BTreeSet<ProcessKey>,
}

impl World {
    /// Something is not as it must be.
    pub fn violated(&mut self, what: &str) {
        if self.judge.verdict.is_none() {
            self.judge.verdict = Some(what.to_owned());
            self.tell("!!", what);
        }
    }

    /// Looks at everything after an event.
    pub fn look(&mut self) {
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
        self.check_leases(&running);
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

    fn moved(&mut self, vm: VmId, old: &BTreeSet<H>, new: &BTreeSet<H>) {
        let name = self.vm_name(vm);
        let names = |world: &Self, hosts: &BTreeSet<H>| -> Vec<String> {
            hosts.iter().map(|h| world.hosts[*h].name.clone()).collect()
        };
        match new.first() {
            None => {
                let was = names(self, old).join(", ");
                self.tell("", &format!("{name} runs nowhere (was on {was})"));
                self.judge.stood.insert(vm, self.now);
            }
            Some(h) => {
                let on = names(self, new).join(", ");
                self.tell("", &format!("{name} runs on {on}"));
                if old.is_empty() {
                    *self.judge.starts.entry(vm).or_default() += 1;
                    let stood = self.judge.stood.remove(&vm).unwrap_or(self.now);
                    self.judge.gaps.push((vm, stood, self.now));
                }
                if 1 < new.len() {
                    self.violated(&format!("{name} runs {} times: on {on}", new.len()));
                }
                for h in new.difference(old) {
                    self.check_late_writes(vm, *h);
                    self.check_memory(vm, *h);
                }
                let _ = h;
            }
        }
    }

    /// vCPU time passes for what has been running since the last look.
    fn spend(&mut self) {
        let passed = self.now - std::mem::replace(&mut self.judge.looked, self.now);
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
        if ran && newest != Some(key) {
            let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
            self.violated(&format!("{name} goes on at {host} with memory that is older than its disks"));
        }
    }

    fn check_late_writes(&mut self, vm: VmId, h: H) {
        let home = self.vms[&vm].record.home;
        let boot = self.hosts[h].life.unwrap_or(0);
        let stale = self.qemu(h, vm).is_some_and(|qemu| qemu.stale);
        let store = self.stores.get_mut(&home).expect("its home");
        let accepts = store.accepts;
        let writers = store.writers.entry(vm).or_default();
        let other = writers.iter().find(|writer| **writer != (h, boot)).copied();
        if accepts {
            writers.clear();
        }
        if !stale {
            writers.insert((h, boot));
        }
        if let Some((other, _)) = other.filter(|_| !accepts) {
            let (name, host, other) = (self.vm_name(vm), self.hosts[h].name.clone(), self.hosts[other].name.clone());
            self.violated(&format!("{name} starts on {host} while writes of its copy on {other} may still land"));
        }
    }

    /// Whether a VM was ever claimed; one that was not may run without a lease.
    fn is_claimed(&self, vm: VmId) -> bool {
        self.stores[&self.vms[&vm].record.home].generation(vm) != Generation(0)
    }

    fn check_leases(&mut self, running: &BTreeMap<VmId, BTreeSet<H>>) {
        let mut beyond = None;
        for (vm, hosts) in running {
            if !self.is_claimed(*vm) {
                continue;
            }
            let home = self.vms[vm].record.home;
            for h in hosts {
                let now = self.local(*h);
                let guard = self.hosts[*h].guard.as_ref();
                let until = guard.and_then(|guard| guard.state.stores.get(&home)?.lease.valid_until());
                if let Some(until) = until {
                    self.judge.last.insert((*h, home), until);
                }
                let until = until.or_else(|| self.judge.last.get(&(*h, home)).copied());
                if until.is_none_or(|until| until <= now) {
                    beyond = Some((*vm, *h));
                }
            }
        }
        if let Some((vm, h)) = beyond {
            let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
            self.violated(&format!("{name} runs on {host} beyond its lease"));
        }
    }

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
        _: DatastoreId,
        claim: &Claim,
        before: Generation,
        now: Generation,
        a: &StoreAnswer,
    ) {
        let name = claim.name.clone();
        // The first claim on a datastore counts on from what lies on others.
        if now < before || (before != Generation(0) && before.next() < now) {
            self.violated(&format!("claims of {name} went from generation {before} to {now}"));
        }
        if self.trace {
            self.tell("", &format!("claim {name} {}: {a:?}", claim.tenure.generation));
        }
    }

    /// A storage fence hits this host.
    pub fn fenced(&mut self, victim: H) {
        let name = self.hosts[victim].name.clone();
        self.tell("", &format!("storage fence against {name}"));
        let hit: Vec<VmId> =
            self.judge.running.iter().filter(|(_, hosts)| hosts.contains(&victim)).map(|(vm, _)| *vm).collect();
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
            let home = self.vms[vm].record.home;
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
                        Holder::Host(owner) => {
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
                    format!("generation {}, {holder}, wanted {wanted}", claim.tenure.generation)
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
            let Some(Ok(claim)) = self.stores[&spec.record.home].highest(*vm) else { continue };
            let on = self.runs_on(*vm);
            let wanted = claim.wanted == Wanted::Running;
            if wanted != (on.len() == 1) {
                return Some(format!("{}: runs on {} hosts, wanted {:?}", spec.name, on.len(), claim.wanted));
            }
            let owner = claim.owner().and_then(|owner| self.host_of(owner.host));
            if wanted && owner != on.first().copied() {
                return Some(format!("{}: runs elsewhere than its claim says", spec.name));
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
