//! The core's step with 64 hosts and 2,000 VMs: a beat, the beat period's look at everything, a host's report.

mod cluster;

use std::time::Duration;

use cluster::{HOSTS, beat, host, report};
use divan::Bencher;
use mainstay::core::Core;
use mainstay::core::event::{AskId, Event};
use mainstay::types::control::Request;
use mainstay::types::*;

const VMS_PER_HOST: u32 = 32;

fn main() {
    divan::main();
}

/// A core that has heard of everything.
fn core(now: &mut Time) -> Core {
    let mut core = cluster::core(*now);
    for index in 1..HOSTS {
        core.step(*now, Event::Heard(Box::new(beat(index, 1))));
        let request = Box::new(Request::Report(Box::new(report(index, VMS_PER_HOST))));
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
        .with_inputs(|| Box::new(Request::Report(Box::new(report(7, VMS_PER_HOST)))))
        .bench_local_values(|request| core.step(now, Event::Asked { ask: AskId(1), from: Some(host(7)), request }));
}
