//! Orders on real files: races, lost replies, damage, full and hung datastores.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use uuid::Uuid;

use super::beats::BeatFile;
use super::*;
use crate::exec::clock;
use crate::exec::scratch::Scratch;
use crate::types::store::{After, ClaimsOf, CompleteRead, StoreFailure};
use crate::types::*;
use crate::wire::record::{self, BLOCK};

mod agent;
mod faults;
mod guard;

const SOON: Duration = Duration::from_secs(30);

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}
fn host(n: u128) -> HostId {
    HostId(id(n))
}
const CLUSTER: ClusterId = ClusterId(Uuid::from_u128(1));
const STORE: DatastoreId = DatastoreId(Uuid::from_u128(2));
const VM: VmId = VmId(Uuid::from_u128(3));

fn roster(generation: u64, hosts: u8) -> Roster {
    let entry = |n: u8| RosterEntry { index: HostIndex(n), host: host(u128::from(n) + 10) };
    Roster { cluster: CLUSTER, datastore: STORE, generation, members: (0..hosts).map(entry).collect() }
}

/// A datastore with members 10, 11, 12 (indices 0, 1, 2).
fn prepared() -> Scratch {
    let dir = Scratch::new();
    prepare(dir.path(), &roster(1, 3), host(10)).unwrap();
    dir
}

fn root(dir: &Path) -> PathBuf {
    files::root_path(dir, CLUSTER)
}

fn agent(dir: &Path, me: u128) -> Datastore {
    Datastore::open(CLUSTER, STORE, host(me), dir.to_owned())
}

fn ask(store: &Datastore, order: StoreOrder) -> StoreAnswer {
    ask_within(store, order, SOON)
}

fn ask_within(store: &Datastore, order: StoreOrder, within: Duration) -> StoreAnswer {
    let (send, answer) = mpsc::channel();
    store.ask(order, within, move |found| send.send(found).unwrap());
    answer.recv_timeout(within + SOON).expect("every order is answered")
}

fn read_all(store: &Datastore) -> CompleteRead {
    match ask(store, StoreOrder::ReadAll) {
        StoreAnswer::Read(read) => *read,
        other => panic!("{other:?}"),
    }
}

fn failed(answer: StoreAnswer) -> StoreFailure {
    match answer {
        StoreAnswer::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

fn claim(generation: u64, owner: u128) -> Claim {
    let owner = Owner { host: host(owner), boot: BootId(id(owner)), incarnation: Incarnation(1) };
    Claim {
        kind: ObjectKind::Vm,
        tenure: Tenure { vm: VM, generation: Generation(generation) },
        name: "web".to_owned(),
        holder: Holder::Host(owner),
        home: STORE,
        wanted: Wanted::Running,
        reason: ClaimReason::Failover,
        record: Digest::default(),
        nonce: clock::nonce(),
        maker: owner.host,
        made_unix_ms: 0,
        debts: Vec::new(),
    }
}

fn create(claim: &Claim, after: Option<&Claim>) -> StoreOrder {
    let after = after.map(|before| After::Here(before.tenure.generation, before.nonce));
    StoreOrder::CreateClaim { claim: Box::new(claim.clone()), after }
}

fn highest(store: &Datastore) -> (Vec<Claim>, Vec<(VmId, String)>) {
    match ask(store, StoreOrder::ReadClaims(ClaimsOf::Vms(vec![VM]))) {
        StoreAnswer::Claims { claims, bad, .. } => (claims, bad),
        other => panic!("{other:?}"),
    }
}

fn claim_path(dir: &Path, generation: u64) -> PathBuf {
    root(dir).join("claims").join(VM.to_string()).join(generation.to_string())
}

fn beat(me: u8, incarnation: u64, counter: u64) -> BeatBlock {
    BeatBlock {
        cluster: CLUSTER,
        host: host(u128::from(me) + 10),
        index: HostIndex(me),
        boot: BootId(id(u128::from(me) + 100)),
        incarnation: Incarnation(incarnation),
        counter: Counter(counter),
        taken: clock::now(),
        lease: Duration::from_secs(5),
        flags: Flags::default(),
        accepted: 0,
        list: ListName::default(),
        resting: 0,
        roster: 1,
        attestations: Vec::new(),
    }
}

fn guard(dir: &Path, me: u8) -> BeatFile {
    BeatFile::open(dir, CLUSTER, host(u128::from(me) + 10)).unwrap()
}

/// Waits for something that a thread does in its own time.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = clock::now() + SOON;
    while !done() {
        assert!(clock::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}
