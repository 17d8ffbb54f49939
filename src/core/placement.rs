//! Where a VM can run: hosts that are there, reach its storage, answer with libvirt and have the memory; of those the
//! one with the most memory left. The answer names for every other host why not.
//!
//! Deliberately simple: the joint search (`search`), which knows rules, is not asked yet.

mod board;
pub mod foresight;
pub mod order;
pub mod rules;
pub mod search;
pub mod site;

use super::Core;
use crate::types::{HostId, Time, VmId, VmRecord};

/// What a VM of unknown size counts as.
const UNKNOWN_KIB: u64 = 64 * 1024;

/// Why a host cannot take a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WhyNot {
    /// Not heard.
    Silent,
    /// Going down or in maintenance.
    Leaving,
    /// No valid lease on a datastore that it needs.
    NoDatastore(String),
    /// libvirt does not answer there.
    NoLibvirt,
    /// Too little memory.
    NoMemory { short_mib: u64 },
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
}

impl std::fmt::Display for WhyNot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent => f.write_str("not heard"),
            Self::Leaving => f.write_str("is leaving"),
            Self::NoDatastore(name) => write!(f, "has no lease on {name}"),
            Self::NoLibvirt => f.write_str("libvirt does not answer there"),
            Self::NoMemory { short_mib } => write!(f, "{short_mib} MiB of memory short"),
            Self::NoHugepages { short_mib } => write!(f, "{short_mib} MiB of large pages short"),
            Self::NoVcpus { short } => write!(f, "{short} vCPUs more than it may have"),
            Self::Tied { to } => write!(f, "late writes tie it to {to}"),
            Self::Kept => f.write_str("what is free there is kept for others"),
            Self::Rule { number } => write!(f, "placement rule {number} forbids it"),
            Self::NotTogether { .. } => f.write_str("others that it must be with are elsewhere"),
            Self::NotApart { .. } => f.write_str("another that it must not be with is there"),
            Self::Failed(why) => write!(f, "failed there: {why}"),
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
#[derive(Clone, Debug)]
pub struct Need {
    /// Datastores that must be reached.
    pub datastores: Vec<crate::types::DatastoreId>,
    /// Memory in KiB.
    pub memory_kib: u64,
}

impl Need {
    /// From a record.
    #[must_use]
    pub fn of(record: &VmRecord) -> Self {
        let mut datastores: Vec<_> = record.disks.iter().filter(|d| !d.optional).filter_map(|d| d.datastore).collect();
        datastores.push(record.home);
        datastores.sort_unstable();
        datastores.dedup();
        Self { datastores, memory_kib: record.memory_kib }
    }
}

impl Core {
    pub(super) fn place(&self, id: VmId, need: &Need, avoid: Option<HostId>, now: Time) -> Placed {
        let mut best: Option<(u64, HostId)> = None;
        let mut why_not = Vec::new();
        for member in &self.settings.members {
            if Some(member.host) == avoid {
                continue;
            }
            match self.room_on(member.host, id, need, now) {
                Ok(left) if best.is_none_or(|(most, _)| most < left) => best = Some((left, member.host)),
                Ok(_) => {}
                Err(why) => why_not.push((member.host, why)),
            }
        }
        best.map_or(Placed::Nowhere(why_not), |(_, host)| Placed::On(host))
    }

    /// Memory in KiB that would be left on a host, or why it cannot take the VM.
    pub(super) fn room_on(&self, host: HostId, id: VmId, need: &Need, now: Time) -> Result<u64, WhyNot> {
        if !self.is_heard(host, now) {
            return Err(WhyNot::Silent);
        }
        if !self.live_members(now).any(|member| member.host == host) || (host == self.me.host && self.going_down) {
            return Err(WhyNot::Leaving);
        }
        for datastore in &need.datastores {
            if !self.reaches(host, *datastore, now) {
                return Err(WhyNot::NoDatastore(self.store_name(*datastore)));
            }
        }
        if let Some((_, why)) = self.vms.get(&id).and_then(|vm| vm.failed.get(&host)) {
            return Err(WhyNot::Failed(why.clone()));
        }
        let (capacity, libvirt) = if host == self.me.host {
            (self.capacity, self.libvirt.up)
        } else {
            match self.peers.get(&host).and_then(|peer| peer.report.as_ref()) {
                Some(report) if self.is_master() => (report.capacity, report.libvirt),
                None if self.is_master() => return Err(WhyNot::NoLibvirt),
                // Hosts report to their master only; this one is asked and judges itself.
                Some(_) | None => return Ok(0),
            }
        };
        if !libvirt {
            return Err(WhyNot::NoLibvirt);
        }
        let asked = need.memory_kib + self.settings.vms.reserve_mib * 1024 + self.promised_kib(host);
        let short_mib = asked.saturating_sub(capacity.free_kib) / 1024;
        capacity.free_kib.checked_sub(asked).ok_or(WhyNot::NoMemory { short_mib })
    }

    /// Memory of VMs that are being started there and do not show in its report yet.
    fn promised_kib(&self, host: HostId) -> u64 {
        let starting = |vm: &&super::vms::Vm| match &vm.placing {
            Some(placing) => placing.host == host,
            None => host == self.me.host && vm.attempt.as_ref().is_some_and(super::attempt::Attempt::starts),
        };
        // A VM of unknown size counts as well, so that the VMs of one failure are spread.
        self.vms.values().filter(starting).map(|vm| vm.memory_kib().max(UNKNOWN_KIB)).sum()
    }

    /// A lease that others attest lets VMs run on; to start one, its host must reach the datastore itself.
    fn reaches(&self, host: HostId, datastore: crate::types::DatastoreId, now: Time) -> bool {
        if host == self.me.host {
            let lost = self.datastores_in(self.lost_datastores(now)).contains(&datastore);
            return !lost && self.guard.leases.get(&datastore).is_some_and(|lease| lease.until.is_some());
        }
        let Some(beat) = self.peers.get(&host).and_then(|peer| peer.beat.as_ref()) else { return false };
        self.datastores_in(beat.reaches).contains(&datastore)
            && !self.datastores_in(beat.agent.storage_lost).contains(&datastore)
    }
}
