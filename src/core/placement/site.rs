//! What a plan is made of: hosts with what is free on them, VMs that need a place, and what ties VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::WhyNot;
use crate::types::rules::{Force, Priority, Tie};
use crate::types::{HostId, VmId};

/// What a VM takes of its host, or what is free there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Size {
    /// Ordinary memory, in KiB.
    pub memory_kib: u64,
    /// Memory in pages of 2 MiB, in KiB.
    pub huge_2m_kib: u64,
    /// Memory in pages of 1 GiB, in KiB.
    pub huge_1g_kib: u64,
    /// Virtual CPUs.
    pub vcpus: u64,
}

impl Size {
    fn parts(self) -> [u64; 4] {
        [self.memory_kib, self.huge_2m_kib, self.huge_1g_kib, self.vcpus]
    }

    fn each(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            memory_kib: with(self.memory_kib, other.memory_kib),
            huge_2m_kib: with(self.huge_2m_kib, other.huge_2m_kib),
            huge_1g_kib: with(self.huge_1g_kib, other.huge_1g_kib),
            vcpus: with(self.vcpus, other.vcpus),
        }
    }

    /// Whether there is room for it.
    #[must_use]
    pub fn fits(self, free: Self) -> bool {
        self.parts().iter().zip(free.parts()).all(|(need, free)| *need <= free)
    }

    /// Both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.each(other, u64::saturating_add)
    }

    /// What is left of it; never less than nothing.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.each(other, u64::saturating_sub)
    }

    /// Its largest share of what there is, in millionths: what decides how large it is there.
    #[must_use]
    pub fn share_of(self, all: Self) -> u64 {
        let share = |(part, all): (u64, u64)| if part == 0 { 0 } else { part.saturating_mul(1_000_000) / all.max(1) };
        self.parts().into_iter().zip(all.parts()).map(share).fold(0, u64::max)
    }

    /// At most so many of these fit into one place, by each part for itself.
    #[must_use]
    pub fn most_that_fit(sizes: &[Self], free: Self) -> usize {
        let most = |n: usize| {
            let mut parts: Vec<u64> = sizes.iter().map(|size| size.parts()[n]).collect();
            parts.sort_unstable();
            let mut left = free.parts()[n];
            let fits = |part: &&u64| left.checked_sub(**part).map(|rest| left = rest).is_some();
            parts.iter().take_while(fits).count()
        };
        (0..4).map(most).fold(sizes.len(), usize::min)
    }

    /// Why there is no room for it.
    #[must_use]
    pub fn short_of(self, free: Self) -> Option<WhyNot> {
        let short = self.minus(free);
        if 0 < short.memory_kib {
            return Some(WhyNot::NoMemory { short_mib: short.memory_kib.div_ceil(1024) });
        }
        if 0 < short.huge_2m_kib + short.huge_1g_kib {
            return Some(WhyNot::NoHugepages { short_mib: (short.huge_2m_kib + short.huge_1g_kib).div_ceil(1024) });
        }
        (0 < short.vcpus).then_some(WhyNot::NoVcpus { short: short.vcpus })
    }
}

/// A host that may take VMs.
#[derive(Clone, Debug)]
pub struct Room {
    /// Which.
    pub host: HostId,
    /// What a plan may give away: reserves are taken off, and so is what others have been promised.
    pub free: Size,
    /// What there is for VMs, free or not.
    pub total: Size,
    /// VMs that run there and stay.
    pub runs: BTreeSet<VmId>,
    /// Memory in KiB that is missing there before anybody comes: of the reserve, or of what others were promised.
    pub owed_kib: u64,
}

/// A VM that needs a place.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Which.
    pub vm: VmId,
    /// Who comes first where not all find a place.
    pub priority: Priority,
    /// What it takes.
    pub size: Size,
    /// The host that it was lost with: such VMs are spread.
    pub from: Option<HostId>,
    /// Hosts that cannot run it, whatever is free there.
    pub barred: Arc<BTreeMap<HostId, WhyNot>>,
    /// Hosts that it should not be put on while another can take it.
    pub shunned: Arc<BTreeSet<HostId>>,
}

/// A rule between VMs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Affinity {
    /// Which.
    pub vms: BTreeSet<VmId>,
    /// How.
    pub tie: Tie,
    /// How strictly.
    pub force: Force,
}

/// All that a plan is made for.
#[derive(Clone, Debug, Default)]
pub struct Site {
    /// Hosts.
    pub rooms: Vec<Room>,
    /// Rules between VMs.
    pub affinities: Vec<Affinity>,
}
