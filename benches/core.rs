//! The core's step with 64 hosts and 2,000 VMs: a beat, the beat period's look at everything, a host's report.

mod cluster;

use std::time::Duration;

use cluster::{HOSTS, claim, host};
use divan::Bencher;
use mainstay::core::Core;
use mainstay::core::event::{AskId, Event};
use mainstay::types::control::{HostReport, Request, Takes, VmReport};
use mainstay::types::guests::Inside;
use mainstay::types::needs::HostMeans;
use mainstay::types::settings::Timing;
use mainstay::types::vm::{DomainState, HostCapacity};
use mainstay::types::*;
use uuid::Uuid;

const VMS_PER_HOST: u32 = 32;

fn main() {
    divan::main();
}

fn beat(index: u8, counter: u64) -> NetBeat {
    NetBeat {
        cluster: ClusterId(Uuid::from_u128(7)),
        host: host(index),
        index: HostIndex(index),
        boot: BootId(Uuid::from_u128(u128::from(index))),
        incarnation: Incarnation(1),
        counter: Counter(counter),
        lease: Timing::DEFAULT.lease,
        list: ListName::default(),
        reaches: DatastoreSet(1),
        attest_me: DatastoreSet(0),
        distrusts: DatastoreSet(0),
        attested: Vec::new(),
        software: (0, 1, 0),
        agent: AgentBeat {
            role: Role::Subordinate { master: Some(HostIndex(0)) },
            term: Term(1),
            score: Score { datastores: 1, available: true, priority: 0, uptime_bucket: 1, host: host(index) },
            flags: Flags::default(),
            storage_lost: DatastoreSet(0),
            settings_version: 1,
            echoes: Vec::new(),
        },
    }
}

fn report(index: u8) -> HostReport {
    let vms = (0..VMS_PER_HOST).map(|n| {
        let claim = claim(index, n);
        VmReport {
            vm: claim.tenure.vm,
            name: claim.name.clone(),
            claim: Some(claim),
            domain: Some(DomainState::Running),
            stopped: false,
            takes: Takes { memory_kib: 1 << 20, vcpus: 1, ..Takes::default() },
            inside: Inside::Silent,
            doing: None,
            unprotected: None,
            on_doubt: None,
        }
    });
    HostReport {
        host: host(index),
        capacity: HostCapacity::default(),
        means: HostMeans::default(),
        conditions: Vec::new(),
        libvirt: true,
        vms: vms.collect(),
        over: Vec::new(),
    }
}

/// A core that has heard of everything.
fn core(now: &mut Time) -> Core {
    let mut core = cluster::core(*now);
    for index in 1..HOSTS {
        core.step(*now, Event::Heard(Box::new(beat(index, 1))));
        let request = Box::new(Request::Report(Box::new(report(index))));
        core.step(*now, Event::Asked { ask: AskId(1), from: Some(host(index)), request });
    }
    core
}

#[divan::bench]
fn heard(bencher: Bencher) {
    let mut now = Time(1_000_000_000);
    let mut core = core(&mut now);
    let mut counter = 1;
    bencher.bench_local(|| {
        counter += 1;
        core.step(now, Event::Heard(Box::new(beat(7, counter))))
    });
}

/// Once a second: verdicts on 63 hosts, the election, a look at 2,000 VMs.
#[divan::bench]
fn beat_period(bencher: Bencher) {
    let mut now = Time(1_000_000_000);
    let mut core = core(&mut now);
    bencher.bench_local(|| {
        now = now + Duration::from_secs(1);
        core.step(now, Event::Due)
    });
}

#[divan::bench]
fn reported(bencher: Bencher) {
    let mut now = Time(1_000_000_000);
    let mut core = core(&mut now);
    bencher
        .with_inputs(|| Box::new(Request::Report(Box::new(report(7)))))
        .bench_local_values(|request| core.step(now, Event::Asked { ask: AskId(1), from: Some(host(7)), request }));
}
