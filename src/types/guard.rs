//! What agent and guard say to each other over `/run/mainstay/guard.sock` (design 10). Framed by `wire/frame.rs`.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::settings::Timing;
use super::{
    AgentBeat, Attestation, BootId, ClusterId, Counter, DatastoreId, Epoch, HostId, HostIndex, Incarnation, Tenure,
    Ticket, Time, VmState,
};

/// Version of this protocol. A guard answers other versions with `Refusal::Version`.
pub const GUARD_PROTOCOL: u16 = 2;

/// One network interface that carries beats.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BeatInterface {
    /// Its name, for example `eth0`.
    pub name: String,
    /// Multicast group and port.
    pub group: SocketAddr,
    /// Hops.
    pub ttl: u8,
}

/// A key of the ring that seals beats.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct BeatKey {
    /// Which key of the ring.
    pub id: u16,
    /// 32 bytes.
    pub secret: [u8; 32],
}

impl std::fmt::Debug for BeatKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BeatKey({}, …)", self.id)
    }
}

/// One datastore as the guard needs it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuardDatastore {
    /// Its id.
    pub id: DatastoreId,
    /// Its place in the settings document: its bit in a beat.
    pub position: u8,
    /// Mount point.
    pub path: String,
    /// How often an operator has accepted it as it is.
    pub accepted: u32,
}

/// Everything that the guard must know to beat without the agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuardConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// This host.
    pub host: HostId,
    /// Its place in the roster.
    pub index: HostIndex,
    /// Newest key first; the first seals.
    pub keys: Vec<BeatKey>,
    /// Periods and L.
    pub timing: Timing,
    /// Where beats go.
    pub interfaces: Vec<BeatInterface>,
    /// Unicast peers, in addition to or instead of multicast.
    pub peers: Vec<SocketAddr>,
    /// Where it holds leases.
    pub datastores: Vec<GuardDatastore>,
}

/// What a row is for: decides what the guard does when the claim is confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Purpose {
    /// QEMU does not exist yet and will appear before the deadline.
    Start,
    /// QEMU runs already, without a claim (first protection) or as a finished incoming migration.
    Adopt,
    /// QEMU is stopped by the guard after a lapse; confirmed = it goes on.
    Reclaim,
    /// QEMU runs here under the claim before; this one hands it to another host (R6). Confirmed: it may run until the
    /// switch, which the guard watches for.
    HandOver,
}

/// An order of the agent. Each comes with a ticket and is answered once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum GuardOrder {
    /// First message on a connection.
    Hello { protocol: u16 },
    /// Use this from now on. A smaller L is enforced at once and announced after the old one has passed.
    Configure(Box<GuardConfig>),
    /// The agent's part of the beats; also the sign that the agent lives (flag `agent_dead` after the suspect time).
    Beat(Box<AgentBeat>),
    /// A row (v, g+1), *before* any claim that names this host is created. Refused if `epoch` is not the present one of
    /// `home`, or its lease is not valid. After `deadline` without `Claimed` the guard bars the row and says over.
    /// `writes`: where else its QEMU writes.
    Expect {
        tenure: Tenure,
        name: String,
        home: DatastoreId,
        epoch: Epoch,
        deadline: Time,
        purpose: Purpose,
        writes: Vec<DatastoreId>,
    },
    /// The claim exists. Refused if the epoch has changed. `Reclaim`: lifts the stop. `Start`: QEMU may appear until
    /// `deadline`.
    Claimed { tenure: Tenure, epoch: Epoch, deadline: Time },
    /// The claim was not created, or the start failed and QEMU is gone: bar the row, say over (never started).
    Abandon { tenure: Tenure },
    /// A later claim of this VM stands, or nobody needs the row's word any more. Refused while its QEMU is alive.
    Forget { tenure: Tenure },
    /// A migration's target: QEMU will appear, paused, under the source's generation.
    Incoming { tenure: Tenure, name: String, home: DatastoreId, deadline: Time },
    /// The source's QEMU ended with libvirt's stopped/migrated and was not resumed since the switch: say over, handed
    /// to `to`, once the exit was seen and its writes have landed.
    HandOver { tenure: Tenure, to: HostId },
    /// A claim that ends this tenure was read (`seen` > its generation): SIGKILL.
    Kill { tenure: Tenure, seen: super::Generation },
    /// libvirt says which process runs this VM (a hint; the guard checks it).
    Found { tenure: Tenure, pid: u32 },
    /// Newest beats heard of hosts that asked for attestation; they stand in the next beats on `datastore`.
    Attest { datastore: DatastoreId, attestations: Vec<Attestation> },
    /// Another host says that this datastore shows less than before: own rows are compared with the claims there before
    /// the lease is renewed again.
    Distrust { datastore: DatastoreId, why: String },
    /// Another host persisted this counter of ours on `datastore`.
    Attested { datastore: DatastoreId, incarnation: Incarnation, counter: Counter },
    /// The target of `virsh migrate`: QEMU will appear until `deadline`, and may run after the switch, under a handover
    /// claim that the source is about to create.
    Receive { tenure: Tenure, name: String, home: DatastoreId, deadline: Time },
    /// The source of `virsh migrate`: libvirt says that its vCPUs have stopped because the memory has gone. From now on
    /// the guard stops the copy if they move.
    Switched { tenure: Tenure },
    /// The copy here is worth nothing any more: of a VM that was being handed over (its memory is older than the disks, or
    /// never came whole), or of a start that was given up before its vCPUs were let go. SIGKILL, over.
    Discard { tenure: Tenure },
}

/// Why the guard refuses.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Other protocol.
    #[error("the guard speaks protocol {0}; restart mainstay-guard after the upgrade")]
    Version(u16),
    /// `Configure` must come first.
    #[error("the guard has no configuration yet")]
    Unconfigured,
    /// No such datastore.
    #[error("the guard knows no datastore {0}")]
    UnknownDatastore(DatastoreId),
    /// The lease is not valid now.
    #[error("no valid lease on the datastore")]
    NoLease,
    /// Another epoch began meanwhile.
    #[error("the lease lapsed meanwhile (now epoch {now:?})")]
    EpochChanged { now: Epoch },
    /// No such row, or in a state in which the order makes no sense.
    #[error("no such row, or {0}")]
    WrongState(String),
    /// The table is full.
    #[error("the guard's table is full ({0} rows)")]
    Full(usize),
}

/// One lease, for agent and people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseView {
    /// Where.
    pub datastore: DatastoreId,
    /// Present epoch.
    pub epoch: Epoch,
    /// Valid until then, if it is valid.
    pub until: Option<Time>,
    /// The last write of our own succeeded within L/2: R4's witness.
    pub own_path: bool,
    /// When the last write of our own that counted was begun.
    pub written: Time,
    /// How long that write took.
    pub latency: Duration,
    /// The last write found no space.
    pub full: bool,
    /// What is wrong, for people.
    pub trouble: Option<String>,
    /// It showed less than before, and no operator has accepted that: no claims, no windows.
    pub rolled_back: Option<String>,
}

/// One row, for agent and people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RowView {
    /// (v, g).
    pub tenure: Tenure,
    /// v's name.
    pub name: String,
    /// Where its claims live.
    pub home: DatastoreId,
    /// What the guard says of it.
    pub state: VmState,
    /// QEMU's process, while it is alive.
    pub pid: Option<u32>,
    /// The guard holds it stopped.
    pub stopped: bool,
    /// Its claim was confirmed, and its QEMU could run under it.
    pub ran: bool,
}

/// What the guard says, unasked or in answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum GuardReport {
    /// Answer to `Hello`; then every lease and row follows once.
    Hello { protocol: u16, incarnation: Incarnation, boot: BootId, host: Option<HostId> },
    /// Answer to an order.
    Done { ticket: Ticket, result: Result<(), Refusal> },
    /// A lease changed (valid, lapsed, trouble), and each beat period.
    Lease(LeaseView),
    /// A row changed.
    Row(RowView),
    /// A row is gone.
    Forgotten { tenure: Tenure },
    /// A network beat went out.
    Beaten { counter: Counter },
    /// Something for the operator: object, what, cure.
    Alarm(String),
}

/// How the hardware watchdog stands, for people. The guard keeps it in `/run/mainstay/guard/watchdog.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Standing {
    /// None is configured.
    None,
    /// It resets this host before its leases end.
    Safe(String),
    /// It resets this host, but too late to rely on, or nobody knows when.
    Late(String),
    /// It cannot be used.
    Failed(String),
}

/// Message from agent to guard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuardMessage {
    /// Comes back in `Done`.
    pub ticket: Ticket,
    /// The order.
    pub order: GuardOrder,
}
