//! Where VMs can run: hosts that are there, reach their storage, answer with libvirt, and may have them by the cluster's rules; and
//! have the room. The answer names for every other host why not.
//!
//! ```text
//!   one that moves ────────────► place ──┐
//!   those that must run again ─► restart ┴─► site + asks ─► search::plan ─► where, or for each host why not
//!                                            hosts, who is barred there and why
//! ```

mod board;
pub mod foresight;
pub mod order;
pub mod rules;
pub mod search;
pub mod site;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Core;
use super::tries::Tries;
use crate::types::rules::VmRules;
use crate::types::vm::{DomainState, HostCapacity};
use crate::types::{DatastoreId, HostId, Time, VmId, VmRecord, Wanted};
use rules::Meaning;
use search::plan;
use site::{Ask, Room, Site, Size};

/// What a VM of unknown size counts as.
const UNKNOWN_KIB: u64 = 64 * 1024;
/// What is free on a host that reports to another: 1 PiB, so that it is enough, and the host judges itself.
const UNKNOWN_FREE: u64 = 1 << 40;

/// Why a host cannot take a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WhyNot {
    /// Not heard.
    Silent,
    /// Going down.
    Leaving,
    /// It hears nobody, and others are alive.
    Isolated,
    /// People work on it.
    Maintenance,
    /// No valid lease on a datastore that it needs.
    NoDatastore(String),
    /// libvirt does not answer there.
    NoLibvirt,
    /// Too little memory.
    NoMemory { short_mib: u64 },
    /// It came and went too often.
    Quarantine,
    /// Too few large pages.
    NoHugepages { short_mib: u64 },
    /// More vCPUs than it may have.
    NoVcpus { short: u64 },
    /// Late writes of that host cannot be excluded: it alone may run it.
    Tied { to: String },
    /// Others come first, and need what is free there.
    Kept,
    /// A placement rule, by its number.
    Rule { number: usize },
    /// These must be on one host, and are on another.
    NotTogether { with: Vec<VmId> },
    /// One of these is there, and they must be on a host each.
    NotApart { from: Vec<VmId> },
    /// It failed there just now.
    Failed(String),
    /// None of the hosts that it belongs to.
    Strange,
    /// One of them, but not well for long enough.
    Unsteady,
}

impl std::fmt::Display for WhyNot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent => f.write_str("not heard"),
            Self::Leaving => f.write_str("is leaving"),
            Self::Isolated => f.write_str("is isolated"),
            Self::Maintenance => f.write_str("is in maintenance"),
            Self::NoDatastore(name) => write!(f, "has no lease on {name}"),
            Self::NoLibvirt => f.write_str("libvirt does not answer there"),
            Self::NoMemory { short_mib } => write!(f, "{short_mib} MiB of memory short"),
            Self::Quarantine => f.write_str("is quarantined: it came and went too often"),
            Self::NoHugepages { short_mib } => write!(f, "{short_mib} MiB of large pages short"),
            Self::NoVcpus { short } => write!(f, "{short} vCPUs more than it may have"),
            Self::Tied { to } => write!(f, "late writes tie it to {to}"),
            Self::Kept => f.write_str("what is free there is kept for others"),
            Self::Rule { number } => write!(f, "placement rule {number} forbids it"),
            Self::NotTogether { .. } => f.write_str("others that it must be with are elsewhere"),
            Self::NotApart { .. } => f.write_str("another that it must not be with is there"),
            Self::Failed(why) => write!(f, "failed there: {why}"),
            Self::Strange => f.write_str("is none of the hosts that it belongs to"),
            Self::Unsteady => f.write_str("has not been well for long enough"),
        }
    }
}

/// Where, or why nowhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Placed {
    /// Here.
    On(HostId),
    /// No host, each with its reason.
    Nowhere(Vec<(HostId, WhyNot)>),
}

/// What a VM needs, as far as it is known before its record is read.
#[derive(Clone, Debug, Default)]
pub struct Need {
    /// Datastores that must be reached.
    pub datastores: Vec<DatastoreId>,
    /// Memory in KiB.
    pub memory_kib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
}

impl Need {
    /// From a record.
    #[must_use]
    pub fn of(record: &VmRecord) -> Self {
        let mut datastores: Vec<_> = record.disks.iter().filter(|d| !d.optional).filter_map(|d| d.datastore).collect();
        datastores.push(record.home);
        datastores.sort_unstable();
        datastores.dedup();
        Self { datastores, memory_kib: record.memory_kib, vcpus: record.vcpus }
    }
}

/// Who is barred where, for VMs of one failure: most need the same datastores.
pub(super) struct Bars<'a> {
    core: &'a Core,
    meaning: &'a Meaning,
    now: Time,
    hosts: BTreeMap<HostId, WhyNot>,
    /// Those who have nowhere else to run are better off there than nowhere.
    last_resort: BTreeSet<HostId>,
    by_need: BTreeMap<Vec<DatastoreId>, Arc<BTreeMap<HostId, WhyNot>>>,
}

impl<'a> Bars<'a> {
    /// For VMs that run, and can stay where they are.
    pub(super) fn of_planned(core: &'a Core, meaning: &'a Meaning, now: Time) -> Self {
        let members = core.settings.members.iter().map(|member| member.host);
        let hosts = members.filter_map(|host| core.away(host, now).map(|why| (host, why))).collect();
        Self { core, meaning, now, hosts, last_resort: BTreeSet::new(), by_need: BTreeMap::new() }
    }

    /// For VMs that do not run, or would not. A quarantined host takes them when no other can.
    pub(super) fn of_lost(core: &'a Core, meaning: &'a Meaning, now: Time) -> Self {
        let mut bars = Self::of_planned(core, meaning, now);
        bars.last_resort =
            bars.hosts.extract_if(.., |_, why| *why == WhyNot::Quarantine).map(|(host, _)| host).collect();
        bars
    }

    /// What one asks for; `tied`: the only host that may have it.
    pub(super) fn ask(&mut self, id: VmId, need: &Need, from: Option<HostId>, tied: Option<HostId>) -> Ask {
        let mut barred = Arc::clone(self.of_need(&need.datastores));
        let tries = self.core.vms.get(&id).map(|vm| &vm.tries).filter(|tries| tries.barred().next().is_some());
        let by_rule = self.meaning.barred(id);
        if tries.is_some() || tied.is_some() || !by_rule.is_empty() {
            let mut own = by_rule;
            let failed = tries.into_iter().flat_map(Tries::barred);
            own.extend(failed.map(|(host, why)| (host, WhyNot::Failed(why.to_owned()))));
            if let Some(to) = tied {
                let others = self.core.settings.members.iter().map(|member| member.host).filter(|host| *host != to);
                let why = WhyNot::Tied { to: self.core.name_of(to) };
                own.extend(others.map(|host| (host, why.clone())));
            }
            own.extend(barred.iter().map(|(host, why)| (*host, why.clone()))); // What is not there has no other fault.
            barred = Arc::new(own);
        }
        let mut shunned = self.meaning.shunned(id);
        shunned.extend(&self.last_resort);
        Ask {
            vm: id,
            priority: self.meaning.priority(id),
            size: Size { memory_kib: need.memory_kib, vcpus: need.vcpus.into(), ..Size::default() },
            from,
            barred,
            shunned: Arc::new(shunned),
        }
    }

    fn of_need(&mut self, datastores: &[DatastoreId]) -> &Arc<BTreeMap<HostId, WhyNot>> {
        let Self { core, now, hosts, .. } = self;
        self.by_need.entry(datastores.to_vec()).or_insert_with(|| {
            let members = core.settings.members.iter().map(|member| member.host);
            let lacks = |host| core.lacks(host, datastores, *now).or_else(|| core.no_libvirt(host));
            let why = |host| hosts.get(&host).cloned().or_else(|| lacks(host));
            Arc::new(members.filter_map(|host| why(host).map(|why| (host, why))).collect())
        })
    }
}

impl Core {
    /// What the cluster's rules mean for those who are there.
    pub(super) fn meaning(&self) -> Arc<Meaning> {
        let (known, old) = &self.meaning;
        if !old {
            return Arc::clone(known);
        }
        if self.settings.rules == VmRules::default() {
            return Arc::default(); // The rule in large clusters, too.
        }
        let vms = self.vms.keys().map(|id| (*id, self.vm_name(*id))).collect();
        let hosts = self.settings.members.iter().map(|member| (member.host, member.name.clone())).collect();
        Arc::new(Meaning::of(&self.settings.rules, &vms, &hosts))
    }

    /// Rules that cannot do what they were made for, in words. Only the master knows all VMs.
    pub(super) fn rule_problems(&self) -> Vec<String> {
        let problems = self.is_master().then(|| self.meaning());
        problems.iter().flat_map(|meaning| &meaning.problems).map(ToString::to_string).collect()
    }

    /// Before they are used often.
    pub(super) fn read_rules(&mut self) {
        self.meaning = (self.meaning(), false);
    }

    /// A place for one VM, on another host than `avoid`.
    pub(super) fn place(&self, id: VmId, need: &Need, avoid: Option<HostId>, now: Time) -> Placed {
        let meaning = self.meaning();
        let site = self.site(&meaning, &BTreeSet::from([id]));
        let mut ask = Bars::of_planned(self, &meaning, now).ask(id, need, None, None);
        if let Some(avoid) = avoid {
            let mut barred = BTreeMap::clone(&ask.barred);
            barred.insert(avoid, WhyNot::Leaving);
            ask.barred = Arc::new(barred);
        }
        let asks = [ask];
        let plan = plan(&site, &asks);
        match plan.host(0) {
            Some(host) => Placed::On(host),
            None => Placed::Nowhere(plan.why_nowhere(0).into_iter().filter(|(host, _)| Some(*host) != avoid).collect()),
        }
    }

    /// All hosts, with what is free there and who runs there, without those who ask for a place.
    pub(super) fn site(&self, meaning: &Meaning, asking: &BTreeSet<VmId>) -> Site {
        let mut runs: BTreeMap<HostId, BTreeSet<VmId>> = BTreeMap::new();
        for (id, vm) in self.vms.iter().filter(|(id, vm)| vm.wanted() == Some(Wanted::Running) && !asking.contains(id))
        {
            let placing = vm.placing.as_ref().map(|placing| placing.host);
            let owner = || vm.claim.as_ref().and_then(|claim| claim.owners().last().map(|owner| owner.host));
            if let Some(host) = placing.or_else(owner) {
                runs.entry(host).or_default().insert(*id);
            }
        }
        let promised = self.promised(asking);
        let room = |host| {
            // A plan looks at memory only where somebody is not barred.
            let capacity = self.capacity_of(host).unwrap_or_default();
            let kept = self.settings.vms.reserve_mib * 1024 + promised.get(&host).copied().unwrap_or_default();
            let runs = runs.remove(&host).unwrap_or_default();
            let vcpus = match self.settings.rules.limits.vcpus_per_cpu {
                Some(each) if 0 < capacity.cpus => u64::from(capacity.cpus) * u64::from(each),
                Some(_) | None => u64::MAX,
            };
            let taken: u64 = runs.iter().filter_map(|id| self.vms.get(id)).map(|vm| u64::from(vm.vcpus())).sum();
            let memory_kib = capacity.free_kib.saturating_sub(kept);
            let free = Size { memory_kib, vcpus: vcpus.saturating_sub(taken), ..Size::default() };
            let total = Size { memory_kib: capacity.total_kib.max(memory_kib), vcpus, ..Size::default() };
            Room { host, free, total, runs, owed_kib: kept.saturating_sub(capacity.free_kib) }
        };
        let rooms = self.settings.members.iter().map(|member| member.host).map(room).collect();
        Site { rooms, affinities: meaning.affinities.clone() }
    }

    /// Why a host can take nobody.
    pub(super) fn away(&self, host: HostId, now: Time) -> Option<WhyNot> {
        if !self.is_heard(host, now) {
            return Some(WhyNot::Silent);
        }
        if !self.live_members(now).any(|member| member.host == host) || (host == self.me.host && self.going_down) {
            return Some(WhyNot::Leaving);
        }
        if host == self.me.host && self.leaves_to_others(now) {
            return Some(WhyNot::Isolated);
        }
        if self.in_maintenance(host) {
            return Some(WhyNot::Maintenance);
        }
        if self.is_evacuated(host, now) {
            return Some(WhyNot::Leaving);
        }
        self.is_quarantined(host, now).then_some(WhyNot::Quarantine)
    }

    fn no_libvirt(&self, host: HostId) -> Option<WhyNot> {
        self.capacity_of(host).is_none().then_some(WhyNot::NoLibvirt)
    }

    /// A datastore that a host does not reach.
    fn lacks(&self, host: HostId, datastores: &[DatastoreId], now: Time) -> Option<WhyNot> {
        let lacking = datastores.iter().find(|datastore| !self.reaches(host, **datastore, now))?;
        Some(WhyNot::NoDatastore(self.store_name(*lacking)))
    }

    /// What there is on a host whose libvirt answers. Hosts report to their master only: another one takes it that there is enough,
    /// and the host that is asked judges itself.
    pub(super) fn capacity_of(&self, host: HostId) -> Option<HostCapacity> {
        if host == self.me.host {
            return self.libvirt.up.then(|| self.own_capacity());
        }
        match self.peers.get(&host)?.report.as_ref() {
            Some(report) if self.is_master() => report.libvirt.then_some(report.capacity),
            None if self.is_master() => None,
            Some(_) | None => {
                Some(HostCapacity { free_kib: UNKNOWN_FREE, total_kib: UNKNOWN_FREE, ..HostCapacity::default() })
            }
        }
    }

    /// Whether a host can take a VM now.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn room_on(&self, host: HostId, id: VmId, need: &Need, now: Time) -> Result<(), WhyNot> {
        if let Some(why) = self.away(host, now).or_else(|| self.lacks(host, &need.datastores, now)) {
            return Err(why);
        }
        if let Some(why) = self.vms.get(&id).and_then(|vm| vm.tries.bars(host)) {
            return Err(WhyNot::Failed(why.to_owned()));
        }
        let Some(HostCapacity { free_kib, .. }) = self.capacity_of(host) else { return Err(WhyNot::NoLibvirt) };
        let promised = self.promised(&BTreeSet::from([id])).get(&host).copied().unwrap_or_default();
        let asked = need.memory_kib + self.settings.vms.reserve_mib * 1024 + promised;
        let short_mib = asked.saturating_sub(free_kib).div_ceil(1024);
        if short_mib == 0 { Ok(()) } else { Err(WhyNot::NoMemory { short_mib }) }
    }

    /// Memory in KiB of VMs, but for some, that will need it on each host and do not show there yet: they are being started, or their
    /// host has claimed them.
    fn promised(&self, but: &BTreeSet<VmId>) -> BTreeMap<HostId, u64> {
        let is_there = |state: Option<DomainState>| !matches!(state, None | Some(DomainState::Off(_)));
        let mut shown: BTreeSet<(HostId, VmId)> = BTreeSet::new();
        for (host, peer) in &self.peers {
            let vms = peer.report.iter().flat_map(|report| &report.vms);
            shown.extend(vms.filter(|vm| is_there(vm.domain)).map(|vm| (*host, vm.vm)));
        }
        let own = self.libvirt.domains.iter().filter(|(_, domain)| is_there(Some(domain.state)));
        shown.extend(own.map(|(id, _)| (self.me.host, *id)));
        let mut promised: BTreeMap<HostId, u64> = BTreeMap::new();
        for (id, vm) in self.vms.iter().filter(|(id, _)| !but.contains(id)) {
            let starts = vm.attempt.as_ref().is_some_and(super::attempt::Attempt::starts).then_some(self.me.host);
            let owner = || {
                let claim = vm.claim.as_ref().filter(|claim| claim.wanted == Wanted::Running)?;
                claim.owners().last().map(|owner| owner.host)
            };
            let host = vm.placing.as_ref().map(|placing| placing.host).or(starts).or_else(owner);
            if let Some(host) = host.filter(|host| !shown.contains(&(*host, *id))) {
                // A VM of unknown size counts as well, so that the VMs of one failure are spread.
                *promised.entry(host).or_default() += vm.memory_kib().max(UNKNOWN_KIB);
            }
        }
        promised
    }

    /// Of this host: without what its guests may still touch, since Linux gives memory when it is used.
    pub(super) fn own_capacity(&self) -> HostCapacity {
        let running = self.libvirt.domains.iter().filter(|(_, domain)| !matches!(domain.state, DomainState::Off(_)));
        let given: u64 = running.filter_map(|(id, _)| self.vms.get(id)).map(super::vms::Vm::memory_kib).sum();
        let untouched = given.saturating_sub(self.capacity.resident_kib);
        HostCapacity { free_kib: self.capacity.free_kib.saturating_sub(untouched), ..self.capacity }
    }

    /// A lease that others attest lets VMs run on; to start one, its host must reach the datastore itself.
    pub(super) fn reaches(&self, host: HostId, datastore: DatastoreId, now: Time) -> bool {
        if host == self.me.host {
            let lost = self.datastores_in(self.lost_datastores(now)).contains(&datastore);
            return !lost && self.guard.leases.get(&datastore).is_some_and(|lease| lease.until.is_some());
        }
        let Some(beat) = self.peers.get(&host).and_then(|peer| peer.beat.as_ref()) else { return false };
        self.datastores_in(beat.reaches).contains(&datastore)
            && !self.datastores_in(beat.agent.storage_lost).contains(&datastore)
    }
}
