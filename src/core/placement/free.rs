//! What is free on hosts, and what they lack, as far as they have told.
//!
//! ```text
//!   what a host tells ── less the reserve, and what others were promised that does not show there yet ─► free
//!   what it has ─────── compared with what a VM needs ────────────────────────────────────────────────► lacks
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::super::Core;
use super::super::attempt::Attempt;
use super::rules::Meaning;
use super::site::{Room, Site, Size};
use super::{Need, WhyNot};
use crate::types::control::Takes;
use crate::types::needs::{HostMeans, Pages};
use crate::types::vm::{DomainState, HostCapacity, PagesLeft};
use crate::types::{DatastoreId, HostId, Time, VmId, Wanted};

/// What a VM of unknown size counts as.
const UNKNOWN_KIB: u64 = 64 * 1024;
/// What is free on a host that reports to another: 1 PiB, so that it is enough, and the host judges itself.
const UNKNOWN_FREE: u64 = 1 << 40;
const UNKNOWN_PAGES: PagesLeft = PagesLeft { free_kib: UNKNOWN_FREE, total_kib: UNKNOWN_FREE };

impl Size {
    /// What a VM takes; `usual_1g`: the usual large page has 1 GiB.
    #[must_use]
    pub fn of(takes: &Takes, usual_1g: bool) -> Self {
        Self { vcpus: takes.vcpus.into(), ..Self::of_memory(takes.memory_kib, takes.needs.pages, usual_1g) }
    }

    fn of_memory(all: u64, pages: Pages, usual_1g: bool) -> Self {
        let (memory_kib, huge_2m_kib, huge_1g_kib) = match pages {
            Pages::Ordinary => (all, 0, 0),
            Pages::Usual if usual_1g => (0, 0, all),
            Pages::Usual | Pages::Of2Mib => (0, all, 0),
            Pages::Of1Gib => (0, 0, all),
            Pages::Other => (0, 0, 0),
        };
        Self { memory_kib, huge_2m_kib, huge_1g_kib, vcpus: 0 }
    }
}

impl Core {
    /// All hosts, with what is free there and who runs there, without those who ask for a place.
    pub(in crate::core) fn site(&self, meaning: &Meaning, asking: &BTreeSet<VmId>) -> Site {
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
            let runs = runs.remove(&host).unwrap_or_default();
            let vcpus = match self.settings.rules.limits.vcpus_per_cpu {
                Some(each) if 0 < capacity.cpus => u64::from(capacity.cpus) * u64::from(each),
                Some(_) | None => u64::MAX,
            };
            let taken: u64 = runs.iter().filter_map(|id| self.vms.get(id)).map(|vm| u64::from(vm.vcpus())).sum();
            let (free, owed_kib) = self.free(&capacity, promised.get(&host).copied().unwrap_or_default());
            let free = Size { vcpus: vcpus.saturating_sub(taken), ..free };
            let (huge_2m_kib, huge_1g_kib) = (capacity.pages_2m.total_kib, capacity.pages_1g.total_kib);
            let ordinary = capacity.total_kib.saturating_sub(huge_2m_kib.saturating_add(huge_1g_kib));
            let total = Size { memory_kib: ordinary.max(free.memory_kib), huge_2m_kib, huge_1g_kib, vcpus };
            Room { host, free, total, runs, owed_kib }
        };
        let rooms = self.settings.members.iter().map(|member| member.host).map(room).collect();
        Site { rooms, affinities: meaning.affinities.clone() }
    }

    /// What may be given away of a host, and what is missing there of ordinary memory before anybody comes.
    fn free(&self, capacity: &HostCapacity, promised: Size) -> (Size, u64) {
        let kept = Size { memory_kib: promised.memory_kib + self.settings.vms.reserve_mib * 1024, ..promised };
        let all = Size {
            memory_kib: capacity.free_kib,
            huge_2m_kib: capacity.pages_2m.free_kib,
            huge_1g_kib: capacity.pages_1g.free_kib,
            vcpus: u64::MAX,
        };
        (Size { vcpus: u64::MAX, ..all.minus(kept) }, kept.memory_kib.saturating_sub(all.memory_kib))
    }

    /// What a host lacks for a VM.
    pub(super) fn lacks(&self, host: HostId, need: &Need, now: Time) -> Option<WhyNot> {
        let lacking = need.datastores.iter().find(|datastore| !self.reaches(host, **datastore, now));
        if let Some(lacking) = lacking {
            return Some(WhyNot::NoDatastore(self.store_name(*lacking)));
        }
        if self.capacity_of(host).is_none() {
            return Some(WhyNot::NoLibvirt);
        }
        self.means_of(host)?.lacks(&need.takes.needs).map(WhyNot::Lacks)
    }

    /// What there is on a host whose libvirt answers. Hosts report to their master only: another one takes it that there is enough,
    /// and the host that is asked judges itself.
    pub(in crate::core) fn capacity_of(&self, host: HostId) -> Option<HostCapacity> {
        if host == self.me.host {
            return self.libvirt.up.then(|| self.own_capacity());
        }
        match self.peers.get(&host)?.report.as_ref() {
            Some(report) if self.is_master() => report.libvirt.then_some(report.capacity),
            None if self.is_master() => None,
            Some(_) | None => Some(HostCapacity {
                free_kib: UNKNOWN_FREE,
                total_kib: UNKNOWN_FREE,
                pages_2m: UNKNOWN_PAGES,
                pages_1g: UNKNOWN_PAGES,
                ..HostCapacity::default()
            }),
        }
    }

    /// What a host has told of what it has.
    fn means_of(&self, host: HostId) -> Option<&HostMeans> {
        if host == self.me.host {
            return Some(&self.means);
        }
        self.peers.get(&host)?.report.as_ref().filter(|_| self.is_master()).map(|report| &report.means)
    }

    /// The only host that can run a VM, since devices of it are passed through: that it ran on last.
    pub(super) fn bound(&self, id: VmId, need: &Need) -> Option<HostId> {
        let claim = self.vms.get(&id)?.claim.as_ref().filter(|_| need.takes.needs.devices)?;
        Some(claim.owners().last().map_or(claim.maker, |owner| owner.host))
    }

    /// Hosts with large pages usually have those of 1 GiB.
    pub(in crate::core) fn usual_pages_are_1g(&self) -> bool {
        let hosts = self.settings.members.iter().filter_map(|member| self.capacity_of(member.host));
        let with_pages = hosts.filter(|host| 0 < host.pages_2m.total_kib + host.pages_1g.total_kib);
        let (of_1g, of_2m): (Vec<_>, Vec<_>) = with_pages.partition(|host| host.usual_1g);
        of_2m.len() < of_1g.len()
    }

    /// Whether a host can take a VM now.
    ///
    /// # Errors
    /// Why not.
    pub(in crate::core) fn room_on(&self, host: HostId, id: VmId, need: &Need, now: Time) -> Result<(), WhyNot> {
        if let Some(why) = self.away(host, now).or_else(|| self.lacks(host, need, now)) {
            return Err(why);
        }
        if let Some(why) = self.uplink_lost(host, &need.takes.needs) {
            return Err(why);
        }
        if let Some(to) = self.bound(id, need).filter(|to| *to != host) {
            return Err(WhyNot::Bound { to: self.name_of(to) });
        }
        if let Some(why) = self.vms.get(&id).and_then(|vm| vm.tries.bars(host)) {
            return Err(WhyNot::Failed(why.to_owned()));
        }
        let Some(capacity) = self.capacity_of(host) else { return Err(WhyNot::NoLibvirt) };
        let promised = self.promised(&BTreeSet::from([id])).get(&host).copied().unwrap_or_default();
        let (free, owed_kib) = self.free(&capacity, promised);
        let size = Size::of(&need.takes, self.usual_pages_are_1g());
        match size.short_of(free) {
            Some(WhyNot::NoMemory { short_mib }) => {
                Err(WhyNot::NoMemory { short_mib: short_mib + owed_kib.div_ceil(1024) })
            }
            Some(why) => Err(why),
            None => Ok(()),
        }
    }

    /// Memory of VMs, but for some, that will need it on each host and do not show there yet: they are being started, or their host
    /// has claimed them.
    fn promised(&self, but: &BTreeSet<VmId>) -> BTreeMap<HostId, Size> {
        let is_there = |state: Option<DomainState>| !matches!(state, None | Some(DomainState::Off(_)));
        let mut shown: BTreeSet<(HostId, VmId)> = BTreeSet::new();
        for (host, peer) in &self.peers {
            let vms = peer.report.iter().flat_map(|report| &report.vms);
            shown.extend(vms.filter(|vm| is_there(vm.domain)).map(|vm| (*host, vm.vm)));
        }
        let own = self.libvirt.domains.iter().filter(|(_, domain)| is_there(Some(domain.state)));
        shown.extend(own.map(|(id, _)| (self.me.host, *id)));
        let usual_1g = self.usual_pages_are_1g();
        let mut promised: BTreeMap<HostId, Size> = BTreeMap::new();
        for (id, vm) in self.vms.iter().filter(|(id, _)| !but.contains(id)) {
            let starts = vm.attempt.as_ref().is_some_and(Attempt::starts).then_some(self.me.host);
            let owner = || {
                let claim = vm.claim.as_ref().filter(|claim| claim.wanted == Wanted::Running)?;
                claim.owners().last().map(|owner| owner.host)
            };
            let gave = || vm.claim.as_ref().and_then(|claim| self.has_room_back(claim));
            let host = vm.placing.as_ref().map(|placing| placing.host).or(starts).or_else(owner).or_else(gave);
            if let Some(host) = host.filter(|host| !shown.contains(&(*host, *id))) {
                // A VM of unknown size counts as well, so that the VMs of one failure are spread.
                let all = promised.entry(host).or_default();
                *all = all.plus(Size::of_memory(vm.memory_kib().max(UNKNOWN_KIB), vm.pages(), usual_1g));
            }
        }
        promised
    }

    /// Of this host: without what its guests may still touch, since Linux gives memory when it is used; and without large pages of
    /// guests that were started since they were counted.
    pub(in crate::core) fn own_capacity(&self) -> HostCapacity {
        let running = self.libvirt.domains.iter().filter(|(_, domain)| !matches!(domain.state, DomainState::Off(_)));
        let sizes = running
            .filter_map(|(id, _)| self.vms.get(id))
            .map(|vm| Size::of_memory(vm.memory_kib(), vm.pages(), self.capacity.usual_1g));
        let given = sizes.fold(Size::default(), Size::plus);
        let untouched = given.memory_kib.saturating_sub(self.capacity.resident_kib);
        let left = |pages: PagesLeft, given: u64| PagesLeft {
            free_kib: pages.free_kib.min(pages.total_kib.saturating_sub(given)),
            ..pages
        };
        HostCapacity {
            free_kib: self.capacity.free_kib.saturating_sub(untouched),
            pages_2m: left(self.capacity.pages_2m, given.huge_2m_kib),
            pages_1g: left(self.capacity.pages_1g, given.huge_1g_kib),
            ..self.capacity
        }
    }

    /// A lease that others attest lets VMs run on; to start one, its host must reach the datastore itself.
    pub(in crate::core) fn reaches(&self, host: HostId, datastore: DatastoreId, now: Time) -> bool {
        if host == self.me.host {
            let lost = self.datastores_in(self.lost_datastores(now)).contains(&datastore);
            return !lost && self.guard.leases.get(&datastore).is_some_and(|lease| lease.until.is_some());
        }
        let Some(beat) = self.peers.get(&host).and_then(|peer| peer.beat.as_ref()) else { return false };
        self.datastores_in(beat.reaches).contains(&datastore)
            && !self.datastores_in(beat.agent.storage_lost).contains(&datastore)
    }
}
