use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::guard::memory::LAYOUT;
use crate::guard::table::Expected;
use crate::types::guard::{BeatKey, GuardDatastore, Purpose};
use crate::types::settings::Timing;
use crate::types::{
    Attestation, ClusterId, Flags, Generation, HostId, HostIndex, Role, Score, Tenure, Term, VmId, VmState,
};
use crate::wire::record;

const HOME: DatastoreId = DatastoreId(Uuid::from_u128(0xd1));
const VM: VmId = VmId(Uuid::from_u128(0x11));
const QEMU: ProcessKey = ProcessKey { pid: 4711, started: 99 };

fn at(millis: u64) -> Time {
    Time(millis * 1_000_000)
}

/// A guard with one of everything.
fn state() -> State {
    let mut state = State::new(BootId(Uuid::from_u128(1)), Incarnation(7), Table::default());
    let host = HostId(Uuid::from_u128(2));
    let config = GuardConfig {
        cluster: ClusterId(Uuid::from_u128(3)),
        host,
        index: HostIndex(4),
        keys: vec![BeatKey { id: 1, secret: [7; 32] }],
        timing: Timing::FAST,
        interfaces: Vec::new(),
        peers: Vec::new(),
        datastores: vec![GuardDatastore { id: HOME, position: 0, path: "/srv/nfs".to_owned(), accepted: 0 }],
    };
    state.configure(config, at(1000));
    let score = Score { datastores: 1, available: true, priority: 2, uptime_bucket: 3, host };
    let beat = AgentBeat {
        role: Role::Master,
        term: Term(5),
        score,
        flags: Flags::default(),
        storage_lost: Default::default(),
        settings_version: 6,
        echoes: Vec::new(),
    };
    state.agent_beat(beat, at(1100));
    let taken = state.take(at(1200));
    let other = Attestation {
        index: HostIndex(9),
        incarnation: Incarnation(3),
        counter: Counter(8),
        lease: Duration::from_millis(1500),
    };
    let store = state.stores.get_mut(&HOME).unwrap();
    store.attest(other, at(1200));
    store.counted(taken, at(1210), &[other]);
    state.persisted(HOME, taken.counter, at(1210));
    let tenure = Tenure { vm: VM, generation: Generation(1) };
    let epoch = state.epoch(HOME, at(1220)).unwrap();
    let (name, deadline) = ("web".to_owned(), at(2000));
    state
        .table
        .expect(Expected { tenure, name, home: HOME, epoch, deadline, purpose: Purpose::Start, writes: vec![] })
        .unwrap();
    state.table.claimed(tenure, epoch, deadline, at(1220)).unwrap();
    assert!(!state.table.appeared(VM, QEMU, at(1230)));
    state.take(at(1240));
    state
}

#[test]
fn the_next_guard_knows_what_the_last_one_promised() {
    let before = state();
    let bytes = before.carry().encode();
    let carried = Carried::decode(&bytes).unwrap();
    assert_eq!(carried.encode(), bytes);
    assert_eq!(carried.processes().collect::<Vec<_>>(), [QEMU]);
    let mut next = State::carry_on(carried);
    assert_eq!(next.last_given(), before.last_given());
    assert_eq!(next.next_stop(), before.next_stop());
    assert_eq!(next.take(at(1300)).counter, Counter(3), "no counter is given twice");
    // A beat that was under way when the last guard died, and is attested now, counts.
    let valid = |state: &State| state.leases().map(|(_, stop_at, _)| stop_at).next();
    let old = valid(&next);
    next.persisted(HOME, Counter(2), at(1310));
    assert!(old < valid(&next));
    assert_eq!(next.epoch(HOME, at(1320)), before.epoch(HOME, at(1320)));
    assert!(next.net_beat(at(4000)).is_some(), "it beats without waiting for the agent");
}

#[test]
fn a_lease_that_ended_meanwhile_ends_its_claims() {
    let before = state();
    let mut next = State::carry_on(Carried::decode(&before.carry().encode()).unwrap());
    next.lapse_if_due(at(60_000));
    assert!(next.epoch(HOME, at(60_000)).is_err());
    let row = next.table.views().next().unwrap();
    assert_eq!(row.state, VmState::Running, "not said before it stands");
    assert!(next.table.runs().next().is_none());
    // What was persisted before does not bring it back: its time is over.
    next.persisted(HOME, Counter(2), at(60_010));
    assert!(next.epoch(HOME, at(60_010)).is_err());
}

#[test]
fn another_encoding_is_another_layout() {
    let digest = record::digest(&state().carry().encode()).to_string();
    assert_eq!(
        (LAYOUT, &digest[..16]),
        (4, "95dcca3968c705b3"),
        "what is carried has changed: raise memory::LAYOUT, so that a program of before or after does not misread it"
    );
    for junk in [&[][..], &[0xff; 100], &state().carry().encode()[1..]] {
        assert!(Carried::decode(junk).is_err(), "{junk:?}");
    }
}
