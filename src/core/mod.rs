//! Decides. Told the time and one event, it says what to save and what to do. Pure: no clock, disk, network, log.
//!
//! ```text
//!              ┌── members ── election ──┐            who is there, who is master
//!   event ──►  │   storage ── proofs     │            what datastores show, what is over
//!              │   trust                 │            what they showed once and do not any more
//!              │   local ── attempt ─────┼──► output  VMs of this host: protect, start, re-claim, release
//!              │   definitions ── ends   │            what changed, what is stale, why one ended
//!              │   homes                 │            claims follow disks to another datastore
//!              │   findings              │            what is wrong with hosts, and what follows
//!              │   failover ── placement │            the master: whom to restart, where; power
//!              │   room, failback        │            who makes room for whom; who is brought back
//!              │   tries ── access       │            starts that failed, and when they are tried again
//!              └── moving, hooks, asks ──┘            migrations, libvirt's hook, people and other agents
//! ```
//!
//! Safety does not rest on anything here but the rules of `attempt` (nobody starts what it has not claimed in its
//! present epoch) and `proofs` (nothing but a proof lets anybody create g+1); the guard enforces the rest.
//!
//! Deliberately not here: how things are done (`exec`), bytes (`wire`), the lease itself (`lease`, shared with the
//! guard), numbers (`timing`).

mod access;
pub mod action;
mod asks;
mod attempt;
mod beats;
mod changes;
pub mod cx;
mod definitions;
mod depends;
mod disarm;
mod doubt;
mod election;
mod ends;
mod evacuate;
pub mod event;
mod failback;
mod failover;
mod findings;
mod foresee;
pub mod guests;
mod handover;
pub mod health;
mod homes;
mod hooks;
mod images;
mod isolation;
mod late;
pub mod lease;
mod local;
mod maintenance;
mod members;
mod moving;
pub mod note;
pub mod placement;
mod policy;
mod power;
mod proofs;
mod restarts;
mod returns;
mod room;
mod steady;
mod step;
mod stops;
mod storage;
pub mod timing;
mod tries;
pub mod trust;
mod twins;
pub mod verdicts;
mod views;
mod vms;
mod yielding;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use cx::Desk;

use crate::types::guard::{LeaseView, RowView};
use crate::types::needs::HostMeans;
use crate::types::settings::ClusterSettings;
use crate::types::vm::{DomainInfo, HostCapacity, Underway};
use crate::types::{BootId, Counter, DatastoreId, HostId, HostIndex, Incarnation, Tenure, Time, VmId};

/// Who this agent is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Me {
    /// This host.
    pub host: HostId,
    /// Of its kernel.
    pub boot: BootId,
    /// When the agent was started.
    pub started: Time,
    /// Random: nonces of claims count on from here.
    pub nonce_seed: u128,
    /// Clock of day in nanoseconds: tickets count on from here.
    pub ticket_seed: u64,
    /// What an earlier agent of this boot had begun.
    pub underway: Vec<(VmId, Underway)>,
}

/// What the guard last said.
#[derive(Debug, Default, Serialize, Deserialize)]
struct GuardSide {
    connected: bool,
    incarnation: Option<Incarnation>,
    /// It said hello then.
    since: Time,
    /// All its rows have come.
    settled: bool,
    /// It said that it is not real-time, or was late.
    unpunctual: bool,
    beaten: Counter,
    /// Since when its network beats go out without a gap that others would notice.
    beating: Option<Time>,
    beaten_at: Time,
    leases: BTreeMap<DatastoreId, LeaseView>,
    rows: BTreeMap<Tenure, RowView>,
}

/// What libvirt last said.
#[derive(Debug, Default, Serialize, Deserialize)]
struct LibvirtSide {
    up: bool,
    listed: bool,
    /// The last list lacked a definition.
    partly: bool,
    domains: BTreeMap<VmId, DomainInfo>,
}

/// All that an agent knows. One value, one owner, changed only by `step`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Core {
    me: Me,
    index: HostIndex,
    settings: ClusterSettings,
    guard: GuardSide,
    libvirt: LibvirtSide,
    capacity: HostCapacity,
    means: HostMeans,
    /// What is wrong with this host, or was lately.
    findings: Vec<findings::Found>,
    going_down: bool,
    peers: BTreeMap<HostId, members::Peer>,
    boots: BTreeMap<HostId, (Incarnation, BootId)>,
    /// Power switches: what is under way, and who is off.
    power: BTreeMap<HostId, power::Power>,
    election: election::Election,
    /// Claims that were listed before it became master say too little to restart anything.
    master_since: Time,
    /// When the last beat period began: shows that this agent itself was held up.
    beat_at: Option<Time>,
    /// Silence before that was perhaps our own.
    awake_since: Time,
    stores: BTreeMap<DatastoreId, storage::Store>,
    /// What people want stopped whose hosts are gone.
    stops: BTreeMap<VmId, stops::Stop>,
    /// Leases that became valid.
    returns: BTreeMap<DatastoreId, returns::Return>,
    /// How long servers keep locks of silent clients.
    lock_leases: BTreeMap<DatastoreId, Duration>,
    isolation: isolation::Isolation,
    /// The time of day as last told, in milliseconds since 1970: for an end that people set.
    unix_ms: u64,
    vms: BTreeMap<VmId, vms::Vm>,
    /// What the cluster's rules mean, and whether names have changed since.
    #[serde(skip, default = "unread")]
    meaning: (Arc<placement::rules::Meaning>, bool),
    /// Starts and moves of this host that libvirt was told of; at most one per VM.
    underway: BTreeMap<VmId, Underway>,
    /// What people want of VMs whose newest claim is being read, and how many datastores have not answered. As many as
    /// people wait.
    wishes: BTreeMap<event::AskId, (crate::types::control::VmCommand, usize)>,
    /// Targets of moves that came to nothing, which do not know it yet.
    unheard: Vec<moving::Unheard>,
    nonces: u128,
    desk: Desk,
    /// Claims that the master was told to be over.
    passed_on: Vec<Tenure>,
    /// Something changed that may matter to the VMs of this host.
    check: bool,
    /// Something changed that may matter to the master's restarts.
    look: bool,
    /// Something changed that the master should be told.
    tell: bool,
    unprotected: Option<Vec<VmId>>,
    /// When libvirt's hook last asked: shows that the daemon in use knows it.
    hook_seen: Option<Time>,
    /// Too many hosts were lost at once: nothing is done about them until then.
    storm: Option<steady::Storm>,
    /// Since when each host is well, as this host sees it; see `failback`.
    well: BTreeMap<HostId, Time>,
    /// As master: hosts that are being emptied before they go down, until when.
    evacuations: BTreeMap<HostId, Time>,
    /// As master: VMs that make room for another.
    room: Option<room::Round>,
    /// As master: what the last start took that was ordered, from the order to the answer.
    start_took: Option<Duration>,
}

/// The rules have to be read.
fn unread() -> (Arc<placement::rules::Meaning>, bool) {
    (Arc::default(), true)
}

impl Core {
    /// An agent of this cluster that has heard nothing yet. `settings` must name this host.
    ///
    /// # Panics
    /// When the settings do not name this host: a state of ours that cannot be.
    #[must_use]
    pub fn new(me: Me, settings: ClusterSettings) -> Self {
        let index = settings.member(me.host).expect("the settings name this host").index;
        let now = me.started;
        let mut core = Self {
            index,
            guard: GuardSide::default(),
            libvirt: LibvirtSide::default(),
            capacity: HostCapacity::default(),
            means: HostMeans::default(),
            findings: Vec::new(),
            going_down: false,
            peers: BTreeMap::new(),
            boots: BTreeMap::new(),
            power: BTreeMap::new(),
            election: election::Election::new(now),
            master_since: Time::ZERO,
            beat_at: None,
            awake_since: now,
            stores: BTreeMap::new(),
            stops: BTreeMap::new(),
            returns: BTreeMap::new(),
            lock_leases: BTreeMap::new(),
            vms: BTreeMap::new(),
            wishes: BTreeMap::new(),
            unheard: Vec::new(),
            underway: me.underway.iter().copied().collect(),
            nonces: me.nonce_seed,
            desk: Desk::new(me.ticket_seed),
            passed_on: Vec::new(),
            check: false,
            look: false,
            tell: false,
            unprotected: None,
            hook_seen: None,
            storm: None,
            isolation: Default::default(),
            unix_ms: 0,
            meaning: Default::default(),
            start_took: None,
            room: None,
            evacuations: BTreeMap::new(),
            well: BTreeMap::new(),
            me,
            settings,
        };
        core.follow_settings(now);
        core
    }

    /// When `step` must be called with `Event::Due` at the latest.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        self.desk.next_due()
    }

    /// The document in use.
    #[must_use]
    pub fn settings(&self) -> &ClusterSettings {
        &self.settings
    }

    /// Shows all of it to somebody who writes it down, with this document in the place of the one in use. What is read again
    /// goes on as this does.
    pub fn shown<T>(&mut self, settings: ClusterSettings, write: impl FnOnce(&Self) -> T) -> T {
        self.meaning = unread(); // It is not written: so that it is made anew in both.
        let own = std::mem::replace(&mut self.settings, settings);
        let written = write(self);
        self.settings = own;
        written
    }

    fn name_of(&self, host: HostId) -> String {
        self.settings.member(host).map_or_else(|| host.to_string(), |member| member.name.clone())
    }

    fn store_name(&self, id: DatastoreId) -> String {
        self.settings.datastore(id).map_or_else(|| id.to_string(), |datastore| datastore.name.clone())
    }

    /// Peers, members and datastores follow the document.
    fn follow_settings(&mut self, now: Time) {
        for member in &self.settings.members {
            if member.host != self.me.host {
                self.peers.entry(member.host).or_insert_with(|| members::Peer::new(now));
            }
        }
        let members: Vec<HostId> = self.settings.members.iter().map(|member| member.host).collect();
        self.peers.retain(|host, _| members.contains(host));
        self.power.retain(|host, _| members.contains(host));
        for datastore in &self.settings.datastores {
            self.stores.entry(datastore.id).or_default();
        }
        self.meaning.1 = true;
        self.check = true;
        self.look = true;
    }
}
