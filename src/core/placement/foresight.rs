//! What would become of VMs if hosts failed: the same search as after a real failure, on the cluster as it is.
//!
//! ```text
//!  hosts with their VMs ── lose a, b ─► the other hosts + VMs that ask ─► plan ─► who has a place, and who has none
//! ```
//!
//! Admission control asks it before a start: with the new VM, would all still find a place after the failure of the policy? Slots and
//! shares of a sum say yes where no single host has the room; a plan does not.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use super::order::Order;
use super::search::plan;
use super::site::{Affinity, Ask, Room, Site};
use crate::types::rules::Priority;
use crate::types::{HostId, VmId};

/// Sets of failing hosts that admission control tries at most.
const TRIED: usize = 256;

/// A host and what it runs.
#[derive(Clone, Debug)]
pub struct House {
    /// With what is free beside its VMs; `runs` has those only that are not listed in `vms`.
    pub room: Room,
    /// VMs that would be restarted elsewhere.
    pub vms: Vec<Ask>,
    /// Logical CPUs; 0 = not known.
    pub cpus: u32,
}

/// A cluster as it is.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// Hosts.
    pub houses: Vec<House>,
    /// Rules between VMs.
    pub affinities: Vec<Affinity>,
}

/// What a failure would be too much for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TooMuch {
    /// Hosts that fail.
    pub hosts: Vec<HostId>,
    /// VMs that would have no place then.
    pub vms: Vec<VmId>,
}

/// What would become too slow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TooSlow {
    /// Too much runs on this host as it is.
    Now { host: HostId, vcpus: u64, cpus: u32 },
    /// There would be no place where they are fast enough.
    Then(TooMuch),
}

impl Live {
    /// Whether, after the loss of any so many hosts, all VMs would have one CPU for each vCPU, less so many percent, were all busy: with
    /// a place for each, since CPUs of several hosts help no VM.
    ///
    /// # Errors
    /// The first failure after which they would not, or what is too slow already.
    pub fn survives_fast(&self, failures: usize, loss_percent: u32) -> Result<(), TooSlow> {
        let mut limited = self.clone();
        for house in limited.houses.iter_mut().filter(|house| 0 < house.cpus) {
            let (most, vcpus) = (most_vcpus(house.cpus, loss_percent), house.vcpus());
            if most < vcpus {
                return Err(TooSlow::Now { host: house.room.host, vcpus, cpus: house.cpus });
            }
            house.room.free.vcpus = house.room.free.vcpus.min(most - vcpus);
            house.room.total.vcpus = house.room.total.vcpus.min(most);
        }
        limited.survives(failures).map_err(TooSlow::Then)
    }

    /// What is left after the loss of hosts, and who asks for a place then: nobody whose priority is "never".
    #[must_use]
    pub fn without(&self, lost: &BTreeSet<HostId>) -> (Site, Vec<Ask>) {
        let (gone, left): (Vec<&House>, Vec<&House>) =
            self.houses.iter().partition(|house| lost.contains(&house.room.host));
        let rooms = left.into_iter().map(|house| {
            let mut room = house.room.clone();
            room.runs.extend(house.vms.iter().map(|ask| ask.vm));
            room
        });
        let asks = gone.into_iter().flat_map(|house| {
            let restarted = house.vms.iter().filter(|ask| ask.priority != Priority::Never);
            restarted.map(|ask| Ask { from: Some(house.room.host), ..ask.clone() })
        });
        (Site { rooms: rooms.collect(), affinities: self.affinities.clone() }, asks.collect())
    }

    /// The VMs that would have no place.
    #[must_use]
    pub fn homeless(&self, lost: &BTreeSet<HostId>) -> Vec<VmId> {
        let (site, asks) = self.without(lost);
        let plan = plan(&site, &asks);
        let nowhere = asks.iter().enumerate().filter(|(n, _)| plan.host(*n).is_none());
        nowhere.map(|(_, ask)| ask.vm).collect()
    }

    /// Whether the loss of any so many hosts is too much. Every single host is tried, and with it the largest of the others; so are all
    /// sets, while there are at most `TRIED`.
    ///
    /// # Errors
    /// The first failure that is.
    pub fn survives(&self, failures: usize) -> Result<(), TooMuch> {
        for lost in self.failures(failures) {
            let vms = self.homeless(&lost);
            if !vms.is_empty() {
                return Err(TooMuch { hosts: lost.into_iter().collect(), vms });
            }
        }
        Ok(())
    }

    fn failures(&self, count: usize) -> Vec<BTreeSet<HostId>> {
        let mut hosts: Vec<(u64, HostId)> = self.houses.iter().map(|house| (house.taken(), house.room.host)).collect();
        hosts.sort_unstable_by(|one, other| other.cmp(one));
        let hosts: Vec<HostId> = hosts.into_iter().map(|(_, host)| host).collect();
        let count = count.min(hosts.len());
        if count == 0 {
            return Vec::new();
        }
        if let Some(all) = sets(&hosts, count) {
            return all;
        }
        let with = |one: &HostId| {
            let others = hosts.iter().filter(|host| *host != one).take(count - 1).copied();
            others.chain([*one]).collect::<BTreeSet<HostId>>()
        };
        hosts.iter().map(with).collect()
    }
}

/// vCPUs that so many CPUs carry, if each may lose so many percent of one.
fn most_vcpus(cpus: u32, loss_percent: u32) -> u64 {
    u64::from(cpus) * 100 / u64::from(100 - loss_percent.min(99))
}

/// How much less than one CPU for each vCPU there is, in percent, were all busy.
#[must_use]
pub fn cpu_loss_percent(cpus: u32, vcpus: u64) -> u32 {
    let has = u64::from(cpus) * 100 / vcpus.max(1);
    u32::try_from(100_u64.saturating_sub(has)).unwrap_or(100)
}

impl House {
    /// Of its VMs.
    #[must_use]
    pub fn vcpus(&self) -> u64 {
        self.vms.iter().map(|ask| ask.size.vcpus).sum()
    }

    /// Memory that its VMs would need elsewhere, in KiB.
    fn taken(&self) -> u64 {
        let sizes = self.vms.iter().map(|ask| ask.size);
        sizes.map(|size| size.memory_kib + size.huge_2m_kib + size.huge_1g_kib).sum()
    }
}

/// When each of those that have a place runs, counted from when all of them are over: by priority, then who waits for whom, then size;
/// so many starts at once on each host.
#[must_use]
pub fn schedule(
    asks: &[Ask],
    places: &[Option<HostId>],
    order: &Order,
    start: Duration,
    at_once: u32,
) -> Vec<Option<Duration>> {
    let mut turn: Vec<usize> = (0..asks.len()).collect();
    turn.sort_by_cached_key(|n| {
        let ask = &asks[*n];
        (order.depth(ask.vm), ask.priority, Reverse(ask.size.memory_kib), ask.vm)
    });
    let by_vm: BTreeMap<VmId, usize> = asks.iter().enumerate().map(|(n, ask)| (ask.vm, n)).collect();
    let mut lanes: BTreeMap<HostId, BinaryHeap<Reverse<Duration>>> = BTreeMap::new();
    let mut runs: Vec<Option<Duration>> = vec![None; asks.len()];
    for n in turn {
        let Some(host) = places[n] else { continue };
        let waits =
            order.waits_for(asks[n].vm).iter().map(|one| match by_vm.get(&one.after).map(|after| runs[*after]) {
                Some(Some(at)) => at + one.delay,
                Some(None) => one.within, // It has no place itself.
                None => Duration::ZERO,
            });
        let ready = waits.max().unwrap_or_default();
        let lanes = lanes.entry(host).or_default();
        let free =
            if (lanes.len() as u32) < at_once { Duration::ZERO } else { lanes.pop().map_or(Duration::ZERO, |at| at.0) };
        let ends = ready.max(free) + start;
        lanes.push(Reverse(ends));
        runs[n] = Some(ends);
    }
    runs
}

/// All sets of so many hosts; none if there are too many.
fn sets(hosts: &[HostId], count: usize) -> Option<Vec<BTreeSet<HostId>>> {
    let mut all = vec![BTreeSet::new()];
    for n in 0..count {
        // Each set is made once: its hosts come in the order of the list.
        let mut longer = Vec::new();
        for set in &all {
            let last = hosts.iter().rposition(|host| set.contains(host)).map_or(0, |last| last + 1);
            let more = hosts.len().saturating_sub(count - n - 1);
            for host in hosts.get(last..more).unwrap_or_default() {
                let mut set: BTreeSet<HostId> = set.clone();
                set.insert(*host);
                longer.push(set);
            }
        }
        if TRIED < longer.len() {
            return None;
        }
        all = longer;
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;

    use super::super::order::Dependency;
    use super::super::site::Size;
    use super::*;
    use crate::types::rules::Ready;

    fn host(n: u128) -> HostId {
        HostId(Uuid::from_u128(n))
    }

    fn ask(n: u128, gib: u64, priority: Priority) -> Ask {
        let size = Size { memory_kib: gib << 20, ..Size::default() };
        let (barred, shunned) = (Arc::default(), Arc::default());
        Ask { vm: VmId(Uuid::from_u128(n)), priority, size, from: None, barred, shunned }
    }

    /// Hosts with so much free, and the sizes of their VMs.
    fn live(hosts: &[(u64, &[u64])]) -> Live {
        let house = |(h, (free, vms)): (usize, &(u64, &[u64]))| {
            let vm = |(n, gib): (usize, &u64)| ask((h * 100 + n) as u128, *gib, Priority::Medium);
            let free = Size { memory_kib: free << 20, ..Size::default() };
            let room = Room { host: host(h as u128), free, total: free, runs: BTreeSet::new(), owed_kib: 0 };
            House { room, vms: vms.iter().enumerate().map(vm).collect(), cpus: 0 }
        };
        Live { houses: hosts.iter().enumerate().map(house).collect(), affinities: Vec::new() }
    }

    #[test]
    fn any_so_many_hosts_may_fail_or_it_is_said_which_may_not() {
        // 4 GiB are free on two hosts, but not 3 on one of them.
        let split = live(&[(0, &[3]), (2, &[]), (2, &[])]);
        let too_much = split.survives(1).unwrap_err();
        assert_eq!((too_much.hosts, too_much.vms.len()), (vec![host(0)], 1));
        let whole = live(&[(0, &[2, 2]), (2, &[]), (2, &[])]);
        assert_eq!(whole.survives(1), Ok(()));
        assert!(whole.survives(2).is_err());
        assert_eq!(live(&[(0, &[])]).survives(1), Ok(()));
    }

    #[test]
    fn cpus_are_counted_host_by_host() {
        // Each VM has 4 vCPUs; memory is enough for all on one host.
        let busy = |hosts: &[(u32, usize)]| {
            let sizes: Vec<Vec<u64>> = hosts.iter().map(|(_, vms)| vec![1; *vms]).collect();
            let shape: Vec<(u64, &[u64])> = sizes.iter().map(|vms| (100, vms.as_slice())).collect();
            let mut live = live(&shape);
            for (house, (cpus, _)) in live.houses.iter_mut().zip(hosts) {
                house.cpus = *cpus;
                (house.room.free.vcpus, house.room.total.vcpus) = (u64::MAX, u64::MAX);
                house.vms.iter_mut().for_each(|ask| ask.size.vcpus = 4);
            }
            live
        };
        assert_eq!(busy(&[(8, 1), (8, 1), (8, 1)]).survives_fast(1, 0), Ok(()));
        // Two of 8 vCPUs would be on 8 CPUs with 8 of another: half of what they are made for.
        let full = busy(&[(8, 2), (8, 2)]);
        assert!(matches!(full.survives_fast(1, 49), Err(TooSlow::Then(TooMuch { .. }))));
        assert_eq!(full.survives_fast(1, 50), Ok(()));
        // What runs now is too slow, whatever fails.
        let crowded = TooSlow::Now { host: host(0), vcpus: 12, cpus: 8 };
        assert_eq!(busy(&[(8, 3), (8, 0)]).survives_fast(1, 25), Err(crowded));
        // 10 CPUs on two hosts are 5 on each: no place for one more VM there.
        assert!(matches!(busy(&[(5, 1), (5, 1), (8, 2)]).survives_fast(1, 20), Err(TooSlow::Then(_))));
        // Where nobody knows how many there are, they are enough.
        assert_eq!(busy(&[(0, 9), (0, 9)]).survives_fast(1, 0), Ok(()));
        for (cpus, vcpus, loss) in [(8, 0, 0), (8, 8, 0), (8, 12, 34), (8, 16, 50), (1, 1000, 100)] {
            assert_eq!(cpu_loss_percent(cpus, vcpus), loss, "{vcpus} on {cpus}");
        }
    }

    #[test]
    fn starts_take_turns_and_wait_for_each_other() {
        let asks =
            [ask(1, 1, Priority::Low), ask(2, 1, Priority::High), ask(3, 1, Priority::High), ask(4, 9, Priority::High)];
        let places = [Some(host(1)), Some(host(1)), Some(host(2)), None];
        let mut order = Order::default();
        let (delay, within) = (Duration::from_secs(5), Duration::from_secs(60));
        let wait =
            |vm: &Ask, after: &Ask| Dependency { vm: vm.vm, after: after.vm, ready: Ready::Started, delay, within };
        order.add(wait(&asks[2], &asks[1])).unwrap();
        let seconds = |n: u64| Some(Duration::from_secs(n));
        let runs = schedule(&asks, &places, &order, Duration::from_secs(2), 1);
        assert_eq!(runs, [seconds(4), seconds(2), seconds(9), None]);
        // One that has no place itself holds up others until their limit.
        order.add(wait(&asks[0], &asks[3])).unwrap();
        assert_eq!(schedule(&asks, &places, &order, Duration::from_secs(2), 1)[0], seconds(62));
    }
}
