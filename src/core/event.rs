//! What happened: everything that the core is told. Executors turn the outside into these; nothing else reaches it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::control::{Reply, Request};
use crate::types::finding::Finding;
use crate::types::guard::{GuardReport, Refusal};
use crate::types::guests::Inside;
use crate::types::needs::HostMeans;
use crate::types::power::PowerAnswer;
use crate::types::store::StoreAnswer;
use crate::types::vm::{DomainAnswer, DomainChange, DomainInfo, HostCapacity};
use crate::types::{DatastoreId, Generation, HostId, NetBeat, Ticket, VmId, VmRecord};

/// Names somebody who waits for an answer (a connection, a hook, a person).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct AskId(pub u64);

/// What the hook wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum HookWish {
    /// A start, also the target's side of a migration.
    Prepare,
    /// The target's side of a migration, before `Prepare`.
    Migrate,
    /// Memory from a saved image, before `Prepare`; the generation that the image says it ran under.
    Restore { saved: Option<Generation> },
}

/// What a definition says: enough to protect the VM, or why it cannot be protected.
pub type Recorded = Result<Box<VmRecord>, String>;

/// One domain of libvirt's list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// What libvirt says of it.
    pub domain: DomainInfo,
    /// What its definition says, if that is known now.
    pub record: Option<Recorded>,
    /// What it runs with, if it runs and that is known now.
    pub live: Option<Recorded>,
}

/// Something happened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// A network beat was opened.
    Heard(Box<NetBeat>),
    /// Another machine beats under our host id.
    HeardTwice(Box<NetBeat>),
    /// The guard's socket is there; its leases and rows follow.
    GuardConnected,
    /// The guard said something.
    Guard(GuardReport),
    /// The guard's socket is gone.
    GuardLost(String),
    /// libvirt answers.
    LibvirtUp,
    /// libvirt does not answer.
    LibvirtDown(String),
    /// Every domain.
    Listed(Vec<Listed>),
    /// Something happened to a domain.
    Changed { vm: VmId, name: String, change: DomainChange },
    /// The answer to a question of ours.
    Done(Ticket, Outcome),
    /// Another agent (`from`), or a person through this one (`None`), asks.
    Asked { ask: AskId, from: Option<HostId>, request: Box<Request> },
    /// libvirt's hook asks.
    Hooked { ask: AskId, vm: VmId, name: String, wish: HookWish, record: Recorded },
    /// How far a VM of this host is inside.
    Inside { vm: VmId, inside: Inside },
    /// The time of day, in milliseconds since 1970.
    Day(u64),
    /// Memory and CPUs of this host.
    Capacity(HostCapacity),
    /// What else this host has for VMs.
    Means(HostMeans),
    /// All that is wrong with this host now.
    Health(Vec<Finding>),
    /// How long the servers of datastores keep what a silent client has locked, where this host can tell.
    LockLeases(Vec<(DatastoreId, Duration)>),
    /// This host goes down.
    GoingDown,
    /// Time has passed; some timer may be due.
    Due,
}

/// Answer to an action that carried a ticket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// Of a datastore.
    Store(StoreAnswer),
    /// Of libvirt.
    Domain(DomainAnswer),
    /// Of the guard.
    Guard(Result<(), Refusal>),
    /// Of another agent.
    Reply(Result<Reply, String>),
    /// Of a power switch.
    Power(Result<PowerAnswer, String>),
    /// Of isolation addresses: one has answered.
    Network(bool),
    /// Of a storage fence.
    Fenced(Result<(), String>),
    /// Of a look at disks: whether each could be read.
    Access(Result<(), String>),
    /// Of a probe of image locks: who holds one.
    Locks(Result<Option<String>, String>),
}
