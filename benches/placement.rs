//! Places for the VMs of failed hosts. Budgets: 8 of 128 hosts with 10,000 VMs within 1 s, 100 VMs on 16 hosts within 10 ms.
//!
//! `roomy`: all find a place. `tight`: about one in ten does not, so that every way is tried. `cold_start`: 10,000 VMs, none runs.

use std::collections::BTreeSet;
use std::sync::Arc;

use divan::Bencher;
use mainstay::core::placement::foresight::{House, Live};
use mainstay::core::placement::search::plan;
use mainstay::core::placement::site::{Affinity, Ask, Room, Site, Size};
use mainstay::types::rules::{Force, Priority, Tie};
use mainstay::types::{HostId, VmId};
use uuid::Uuid;

const GIB: u64 = 1 << 20;

fn main() {
    divan::main();
}

fn host(n: u64) -> HostId {
    HostId(Uuid::from_u128(100 + u128::from(n)))
}

fn vm(n: u64) -> VmId {
    VmId(Uuid::from_u128(10_000 + u128::from(n)))
}

/// VMs of 1 to 16 GiB, a rule among ten of each hundred; on each host so much is free, in thousandths of what its VMs take.
fn live(hosts: u64, vms: u64, free: u64) -> Live {
    let size = |n: u64| 1 + n.wrapping_mul(2_654_435_761) % 16;
    let ask = |n: u64| Ask {
        vm: vm(n),
        priority: Priority::ALL[(n % 5) as usize],
        size: Size { memory_kib: size(n) * GIB, vcpus: size(n).div_ceil(4), ..Size::default() },
        from: None,
        barred: Arc::default(),
        shunned: Arc::default(),
    };
    let houses = (0..hosts).map(|h| {
        let asks: Vec<Ask> = (0..vms).filter(|n| n % hosts == h).map(ask).collect();
        let taken = asks.iter().fold(Size::default(), |all, ask| all.plus(ask.size));
        let part = |of: u64| of * free / 1000;
        let free = Size { memory_kib: part(taken.memory_kib), vcpus: part(taken.vcpus), ..Size::default() };
        House {
            room: Room { host: host(h), free, total: free.plus(taken), runs: BTreeSet::new(), owed_kib: 0 },
            vms: asks,
            cpus: 0,
        }
    });
    let affinities = (0..vms / 100).map(|n| Affinity {
        vms: (0..10).map(|k| vm(n * 100 + k * 7)).collect(),
        tie: if n % 4 == 0 { Tie::Together } else { Tie::Apart },
        force: if n % 2 == 0 { Force::Must } else { Force::Should },
    });
    Live { houses: houses.collect(), affinities: affinities.collect() }
}

fn fail(bencher: Bencher<'_, '_>, live: &Live, hosts: u64) {
    let (site, asks) = live.without(&(0..hosts).map(host).collect());
    let places = place(&site, &asks);
    eprintln!("{} VMs ask, {places} get a place on {} hosts", asks.len(), site.rooms.len());
    bencher.bench(|| place(&site, &asks));
}

fn place(site: &Site, asks: &[Ask]) -> usize {
    let plan = plan(site, asks);
    (0..asks.len()).filter(|n| plan.host(*n).is_some()).count()
}

/// Thousandths of what runs there that are free on each host.
const ROOMY: u64 = 200;
const TIGHT: u64 = 58;

#[divan::bench(args = [ROOMY, TIGHT])]
fn large_8_of_128_hosts(bencher: Bencher<'_, '_>, free: u64) {
    fail(bencher, &live(128, 10_000, free), 8);
}

#[divan::bench(args = [ROOMY * 5, TIGHT * 8])]
fn small_100_vms_to_16_hosts(bencher: Bencher<'_, '_>, free: u64) {
    // 8 of 24 hosts fail, with 100 of 300 VMs.
    fail(bencher, &live(24, 300, free), 8);
}

#[divan::bench]
fn cold_start(bencher: Bencher<'_, '_>) {
    let live = live(128, 10_000, 200);
    let site = Site {
        rooms: live.houses.iter().map(|house| Room { free: house.room.total, ..house.room.clone() }).collect(),
        affinities: live.affinities.clone(),
    };
    let asks: Vec<Ask> = live.houses.iter().flat_map(|house| house.vms.clone()).collect();
    bencher.bench(|| place(&site, &asks));
}

/// Whether any one of 16 hosts may fail.
#[divan::bench]
fn admission_16_hosts_300_vms(bencher: Bencher<'_, '_>) {
    let live = live(16, 300, 200);
    bencher.bench(|| live.survives(1));
}
