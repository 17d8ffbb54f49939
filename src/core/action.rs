//! What is to be done: orders to the executors, carried out in order after `save` is durable.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::event::AskId;
use super::note::Note;
use super::verdicts::Given;
use crate::types::control::{Reply, Request};
use crate::types::guard::GuardOrder;
use crate::types::power::{FenceDevice, PowerOrder};
use crate::types::settings::ClusterSettings;
use crate::types::store::StoreOrder;
use crate::types::vm::{DomainOrder, Underway};
use crate::types::{DatastoreId, HostId, Ticket, VmId};

/// Everything that came out of one step.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Output {
    /// Made durable before any of `actions`.
    pub save: Option<Box<ClusterSettings>>,
    /// In this order.
    pub actions: Vec<Action>,
}

/// One order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Action {
    /// To the guard.
    Guard(Ticket, GuardOrder),
    /// To a datastore.
    Store { ticket: Ticket, datastore: DatastoreId, order: StoreOrder, within: Duration },
    /// To libvirt.
    Domain { ticket: Ticket, order: DomainOrder, within: Duration },
    /// To another agent.
    Send { ticket: Ticket, to: HostId, request: Box<Request>, within: Duration },
    /// Ask a power switch.
    Power { ticket: Ticket, device: Box<FenceDevice>, order: PowerOrder, within: Duration },
    /// End the program that asks a power switch, at once; it answers all the same.
    CallOffPower(Ticket),
    /// Run the storage fence against a host.
    Fence { ticket: Ticket, program: String, host: HostId, name: String, within: Duration },
    /// Does any isolation address of this host answer?
    AskNetwork { ticket: Ticket, within: Duration },
    /// Who holds QEMU's locks of these images?
    ProbeLocks { ticket: Ticket, paths: Vec<String>, within: Duration },
    /// Can each of these disks be read, past all caches?
    ProbeAccess { ticket: Ticket, paths: Vec<String>, within: Duration },
    /// Answer an `Asked`.
    Answer(AskId, Reply),
    /// Answer a `Hooked`: allowed, or refused with a message.
    HookAnswer(AskId, Result<(), String>),
    /// Open this path as a datastore, before the settings name it.
    OpenDatastore(DatastoreId, String),
    /// Use this document from now on: open datastores, set peers, configure the guard.
    Apply(Box<ClusterSettings>),
    /// VMs that the hook lets start while the agent is down.
    Unprotected(Vec<VmId>),
    /// What this agent must end, should it be restarted: made durable (for this boot) before what follows is done.
    Underway(Vec<(VmId, Underway)>),
    /// Tell people.
    Note(Note),
    /// Keep a verdict with its evidence, for people who ask.
    Verdict(Box<Given>),
}
