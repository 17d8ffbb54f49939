//! A cluster of 64 hosts, claims in it, and what they say. Benches use it, and tests that ask a core directly.

use mainstay::core::{Core, Me};
use mainstay::types::control::{HostReport, Takes, VmReport};
use mainstay::types::guests::Inside;
use mainstay::types::needs::HostMeans;
use mainstay::types::power::PowerSettings;
use mainstay::types::settings::{ClusterSettings, DatastoreSettings, LateWrites, MemberSettings, Timing, VmDefaults};
use mainstay::types::vm::{DomainState, HostCapacity};
use mainstay::types::*;
use uuid::Uuid;

/// Members.
pub const HOSTS: u8 = 64;

/// By index.
pub fn host(index: u8) -> HostId {
    HostId(Uuid::from_u128(1000 + u128::from(index)))
}

/// The one datastore.
pub fn store() -> DatastoreId {
    DatastoreId(Uuid::from_u128(1))
}

/// All of it.
pub fn settings() -> ClusterSettings {
    let members = (0..HOSTS).map(|index| MemberSettings {
        index: HostIndex(index),
        host: host(index),
        name: format!("h{index}"),
        control: ([10, 0, 0, index], 7784).into(),
        migration_uri: String::new(),
        released: 0,
    });
    ClusterSettings {
        schema: 1,
        version: 1,
        cluster: ClusterId(Uuid::from_u128(7)),
        name: "bench".into(),
        timing: Timing::DEFAULT,
        members: members.collect(),
        datastores: vec![DatastoreSettings {
            id: store(),
            name: "shared".into(),
            path: "/srv/shared".into(),
            fence: StorageFence::Lock,
            late_writes: LateWrites::Exclude,
            accepted: 0,
        }],
        vms: VmDefaults::default(),
        power: PowerSettings::default(),
        foreign_migration: Default::default(),
        guests: Default::default(),
        rules: Default::default(),
        maintenance: Vec::new(),
        disarmed: None,
    }
}

/// The n-th VM of a host runs there.
pub fn claim(index: u8, n: u32) -> Claim {
    let vm = VmId(Uuid::from_u128(u128::from(index) << 32 | u128::from(n) | 1 << 64));
    let owner =
        Owner { host: host(index), boot: BootId(Uuid::from_u128(u128::from(index))), incarnation: Incarnation(1) };
    Claim {
        kind: ObjectKind::Vm,
        tenure: Tenure { vm, generation: Generation(1) },
        name: format!("vm-{index}-{n}"),
        holder: Holder::Host(owner),
        home: store(),
        wanted: Wanted::Running,
        reason: ClaimReason::StartedByPerson,
        record: Digest::default(),
        nonce: Nonce(1),
        maker: host(index),
        made_unix_ms: 0,
        debts: Vec::new(),
    }
}

/// What the guard of a host tells all others.
pub fn beat(index: u8, counter: u64) -> NetBeat {
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

/// What a host tells its master, with so many VMs.
pub fn report(index: u8, vms: u32) -> HostReport {
    let vms = (0..vms).map(|n| {
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
        stops: Vec::new(),
        unreachable: Vec::new(),
    }
}

/// This host's agent, which knows nobody yet.
pub fn core(now: Time) -> Core {
    let me = Me {
        host: host(0),
        boot: BootId(Uuid::from_u128(0)),
        started: now,
        nonce_seed: 1,
        ticket_seed: 1,
        underway: Vec::new(),
    };
    let mut core = Core::new(me, settings());
    core.start(now);
    core
}
