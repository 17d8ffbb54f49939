//! The core, asked directly: answers of a datastore and orders of a master that no story of `tests/scenarios` can time.

#[allow(dead_code)] // It has more than is used here.
#[path = "../benches/cluster/mod.rs"]
mod cluster;

use std::time::Duration;

use cluster::{beat, claim, core, host, report, store};
use mainstay::core::Core;
use mainstay::core::action::{Action, Output};
use mainstay::core::event::{AskId, Event, Outcome};
use mainstay::types::control::{Denial, HostReport, Reply, Request, RunOrder};
use mainstay::types::guard::{GuardReport, LeaseView, RowView};
use mainstay::types::store::{ClaimsOf, StoreAnswer, StoreFailure, StoreOrder};
use mainstay::types::*;
use uuid::Uuid;

const NOW: Time = Time(1_000_000_000_000);

fn replies(output: &Output) -> Vec<Reply> {
    let reply = |action: &'_ Action| match action {
        Action::Answer(_, reply) => Some(reply.clone()),
        _ => None,
    };
    output.actions.iter().filter_map(reply).collect()
}

/// The datastore is asked for the claims of some VMs.
fn claims_asked(output: &Output) -> Vec<Ticket> {
    let asked = |action: &Action| match action {
        Action::Store { ticket, order: StoreOrder::ReadClaims(ClaimsOf::Vms(_)), .. } => Some(*ticket),
        _ => None,
    };
    output.actions.iter().filter_map(asked).collect()
}

/// An order that rests on a switch which says "off" is not followed where its host is heard.
#[test]
fn who_hears_a_host_does_not_take_it_for_off() {
    for put_down in [false, true] {
        let mut core = core(NOW);
        core.step(NOW, Event::Heard(Box::new(beat(1, 1))));
        core.step(NOW, Event::Heard(Box::new(beat(2, 1))));
        let order = RunOrder { claim: claim(1, 0), proof: Proof::PowerOff, reason: ClaimReason::Failover };
        let order = Box::new(order);
        let request = Box::new(if put_down { Request::PutDown(order) } else { Request::Run(order) });
        let output = core.step(NOW, Event::Asked { ask: AskId(7), from: Some(host(2)), request });
        let said = replies(&output);
        assert!(
            matches!(&said[..], [Reply::Denied(Denial::Unable(why))] if why.contains("said to be off, and is heard here")),
            "put down: {put_down}: {said:?}"
        );
    }
}

/// A guard that goes on with a lease, after a lapse in which it has stopped a VM of this host.
fn with_one_that_stands(core: &mut Core) -> Output {
    let epoch = Epoch { incarnation: Incarnation(1), lapses: 1 };
    let tenure = claim(0, 0).tenure;
    let boot = BootId(Uuid::from_u128(0));
    let guard = |core: &mut Core, report| core.step(NOW, Event::Guard(report));
    core.step(NOW, Event::GuardConnected);
    let incarnation = Incarnation(1);
    let hello = guard(core, GuardReport::Hello { protocol: 0, incarnation, boot, host: Some(host(0)) });
    let row = RowView {
        tenure,
        name: "vm".into(),
        home: store(),
        state: VmState::Over(Over::Lapsed),
        pid: Some(1),
        stopped: true,
        ran: true,
    };
    guard(core, GuardReport::Row(row));
    for action in hello.actions {
        if let Action::Guard(ticket, _) = action {
            guard(core, GuardReport::Done { ticket, result: Ok(()) });
        }
    }
    core.step(NOW, Event::LibvirtUp);
    core.step(NOW, Event::Listed(Vec::new()));
    let report = HostReport { host: host(1), ..report(0, 1) };
    let request = Box::new(Request::Report(Box::new(report)));
    core.step(NOW, Event::Asked { ask: AskId(1), from: Some(host(1)), request });
    let lease = LeaseView {
        datastore: store(),
        epoch,
        until: Some(NOW + Duration::from_secs(5)),
        own_path: true,
        written: NOW,
        latency: Duration::ZERO,
        full: false,
        trouble: None,
        rolled_back: None,
    };
    guard(core, GuardReport::Lease(lease))
}

/// A path that fails at once is asked again in a moment, not without end.
#[test]
fn what_was_taken_is_not_asked_for_in_a_circle() {
    let mut core = core(NOW);
    let first = claims_asked(&with_one_that_stands(&mut core));
    assert_eq!(first.len(), 1, "claims of what it held are read when it comes back");
    let fails = |core: &mut Core, ticket, now| {
        let why = StoreFailure::Io { path: "/srv".into(), why: "input/output error".into() };
        core.step(now, Event::Done(ticket, Outcome::Store(StoreAnswer::Failed(why))))
    };
    assert_eq!(claims_asked(&fails(&mut core, first[0], NOW)), []);
    let later = NOW + Duration::from_secs(1);
    let again = claims_asked(&core.step(later, Event::Due));
    assert_eq!(again.len(), 1, "and again a beat later");
    assert_eq!(claims_asked(&fails(&mut core, again[0], later)), []);
}
