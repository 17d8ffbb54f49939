//! Records on a datastore (design 2, Records, and 4). Encoded by `wire/record.rs`, each in 4 KiB blocks.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::needs::Needs;
use super::settings::OnDoubt;
use super::{
    BootId, ClusterId, Counter, DatastoreId, Digest, Flags, HostId, HostIndex, Incarnation, ListName, Nonce, Sequence,
    Tenure, Time, VmId,
};

/// One member as the datastore names it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RosterEntry {
    /// Its place; never reused for another host.
    pub index: HostIndex,
    /// The host.
    pub host: HostId,
}

/// Block `members`: who may write here. Replaced only by a higher generation, created exclusively.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Roster {
    /// The cluster that this folder belongs to.
    pub cluster: ClusterId,
    /// The datastore's own id, so that a mount of another one is noticed.
    pub datastore: DatastoreId,
    /// Rises with every change.
    pub generation: u64,
    /// By rising index, at most 128.
    pub members: Vec<RosterEntry>,
}

impl Roster {
    /// Whether `host` may beat here.
    #[must_use]
    pub fn names(&self, host: HostId) -> bool {
        self.members.iter().any(|entry| entry.host == host)
    }
}

/// The newest beat of another host heard on the network: what keeps the lease of a host that lost its path.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attestation {
    /// For whom.
    pub index: HostIndex,
    /// Of its guard.
    pub incarnation: Incarnation,
    /// Of the beat heard.
    pub counter: Counter,
    /// Its L.
    pub lease: Duration,
}

/// One datastore beat: one 4 KiB block in one of the slots of `hosts/<id>`. Written only by that host's guard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BeatBlock {
    /// The cluster.
    pub cluster: ClusterId,
    /// The writer.
    pub host: HostId,
    /// Its place.
    pub index: HostIndex,
    /// Of its kernel.
    pub boot: BootId,
    /// Of its guard.
    pub incarnation: Incarnation,
    /// Of this beat.
    pub counter: Counter,
    /// t_c: the writer's clock, read once before `counter` was given away. For the writer's own use.
    pub taken: Time,
    /// The writer's L.
    pub lease: Duration,
    /// Facts about the writer. `distrusts`: this datastore showed it less than before.
    pub flags: Flags,
    /// How often an operator has accepted this datastore, as far as the writer knows.
    pub accepted: u32,
    /// Its VM list here.
    pub list: ListName,
    /// Bit n: slot n rests, since a write with unknown outcome may still land in it.
    pub resting: u8,
    /// Generation of the roster that the writer saw after its last write.
    pub roster: u64,
    /// For other hosts that asked.
    pub attestations: Vec<Attestation>,
}

/// Why (v, g) is over, as its owner's guard says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Over {
    /// QEMU's exit was seen by pidfd. `clean`: no write of it is under way, since a beat that was begun after it was
    /// persisted on every datastore that it wrote to.
    Exited { clean: bool },
    /// Never started, and barred from starting.
    NeverStarted,
    /// The lease lapsed and the VM was stopped (or its stop is under way at the guard).
    Lapsed,
    /// QEMU exited after its memory went to this host, and no write of it is under way.
    HandedTo(HostId),
    /// QEMU's exit was seen; whether it was clean is known after the next beat. Becomes one of the others.
    Draining,
}

/// State of one row of the guard's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum VmState {
    /// The row stands, QEMU was not seen yet.
    Expected,
    /// QEMU was seen under this generation.
    Running,
    /// A migration's target: paused, under the source's generation.
    Incoming,
    /// For ever.
    Over(Over),
}

/// One line of a VM list.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmEntry {
    /// (v, g).
    pub tenure: Tenure,
    /// What the guard says of it.
    pub state: VmState,
}

/// `hosts/<id>.vms`: every VM of a home here that the host holds a row of.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VmList {
    /// The writer.
    pub host: HostId,
    /// Of its guard.
    pub incarnation: Incarnation,
    /// Rises with every change within an incarnation.
    pub sequence: Sequence,
    /// At most 1,000.
    pub entries: Vec<VmEntry>,
}

/// Kind of object that a claim owns. Later phases add series, volumes, groups, sites.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ObjectKind {
    /// A VM.
    Vm,
}

/// An owner: which guard of which boot of which host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owner {
    /// The host.
    pub host: HostId,
    /// Of its kernel.
    pub boot: BootId,
    /// Of its guard.
    pub incarnation: Incarnation,
}

/// Who holds a VM by this claim.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Holder {
    /// Nobody: whoever creates g+1 may run it, if it is wanted running.
    None,
    /// This host.
    Host(Owner),
    /// `virsh migrate`: `from` until the switch, `to` after it (R6).
    Handover { from: Owner, to: Owner },
    /// The home moves to another datastore (R7), while `owner` runs on by its lease on the old one. The next claim is made
    /// there, and never here, or each of the two could get one of the same generation.
    Moved { to: DatastoreId, owner: Owner },
    /// The VM was removed. A new one with the same id counts on from here.
    Deleted,
}

/// What people, or Mainstay for them, want of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// It should run somewhere.
    Running,
    /// It should not.
    Stopped,
}

/// Why a claim was created.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClaimReason {
    /// A running VM became protected.
    Adopted,
    /// A stopped VM became protected.
    Registered,
    /// A person started it.
    StartedByPerson,
    /// Taken over with a proof.
    Failover,
    /// Restarted in place after a crash.
    Crashed,
    /// Its lease had lapsed; the same host goes on.
    Reclaimed,
    /// Came by live migration.
    Migrated,
    /// A start failed.
    StartFailed,
    /// `virsh shutdown`, `virsh destroy`, `mainstay vm stop`.
    StoppedByPerson,
    /// The guest powered itself off.
    StoppedInside,
    /// The host went down.
    HostWentDown,
    /// The definition was removed.
    Deleted,
    /// Only the record changed.
    RecordChanged,
    /// Its memory was saved to a file.
    Saved,
    /// A person migrates it with libvirt: it is handed from one host to another.
    HandedOver,
    /// A person migrated it with libvirt to a host that took no part in the handover, so outside the cluster.
    MigratedAway,
    /// Its disks lie on another datastore now, and its claims follow.
    HomeMoved,
    /// Its host was isolated, and ended it as its isolation response says.
    Isolated,
    /// Moved by the cluster: away from a host in maintenance, back to where it belongs, to make room.
    Planned,
    /// It was stopped to make room for a VM of higher priority.
    MadeRoom,
}

/// Debts in one claim.
pub const MAX_DEBTS: usize = 16;

/// Late writes of an earlier owner that are not yet excluded on one datastore.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Debt {
    /// The earlier owner.
    pub host: HostId,
    /// In that boot.
    pub boot: BootId,
    /// Where it may still write.
    pub datastore: DatastoreId,
}

/// Claim (v, g): created exclusively, never changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Claim {
    /// What is owned.
    pub kind: ObjectKind,
    /// (v, g).
    pub tenure: Tenure,
    /// v's name, for people.
    pub name: String,
    /// Who holds it.
    pub holder: Holder,
    /// Where v's claims live.
    pub home: DatastoreId,
    /// Wanted state; stands here only.
    pub wanted: Wanted,
    /// Why this claim was made.
    pub reason: ClaimReason,
    /// Of v's record.
    pub record: Digest,
    /// The creator's mark.
    pub nonce: Nonce,
    /// The creator.
    pub maker: HostId,
    /// Milliseconds since 1970 by the creator's clock of day; for people only.
    pub made_unix_ms: u64,
    /// Copied from claim to claim until paid; at most `MAX_DEBTS`. A claim that would have more is not made.
    pub debts: Vec<Debt>,
}

impl Claim {
    /// The host that may run v under this claim, if one alone may.
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        match self.holder {
            Holder::Host(owner) | Holder::Moved { owner, .. } => Some(owner),
            Holder::None | Holder::Handover { .. } | Holder::Deleted => None,
        }
    }

    /// Everybody who may run v under this claim, now or later: a proof that it is over must be one against each.
    #[must_use]
    pub fn owners(&self) -> Vec<Owner> {
        match self.holder {
            Holder::Host(owner) | Holder::Moved { owner, .. } => vec![owner],
            Holder::Handover { from, to } => vec![from, to],
            Holder::None | Holder::Deleted => Vec::new(),
        }
    }

    /// Where the claim after this one is made, and where the record that it names lies.
    #[must_use]
    pub fn next_home(&self) -> DatastoreId {
        match self.holder {
            Holder::Moved { to, .. } => to,
            Holder::None | Holder::Host(_) | Holder::Handover { .. } | Holder::Deleted => self.home,
        }
    }

    /// Whether this host may run v under this claim, now or later.
    #[must_use]
    pub fn names(&self, host: HostId) -> bool {
        self.owners().iter().any(|owner| owner.host == host)
    }
}

/// How late writes of a dead host are kept out of a datastore.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StorageFence {
    /// Wait until QEMU's image locks of the old owner are free at the server.
    Lock,
    /// The administrator's program, called as `program HOST_NAME HOST_ID`; 0 = the host's late writes are excluded.
    Command { program: String },
    /// Nothing: the VM needs "rebooted" or "power off", or a datastore that accepts late writes.
    None,
}

/// Why (v, g) is over (design 2, Proofs). Each allows exactly one thing: that somebody creates g+1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Proof {
    /// The owner's guard said so, in its VM list, a beat or over TLS.
    Said(Over),
    /// The claim itself names nobody: its owner created it after QEMU's exit, or it never had one.
    Unowned,
    /// A beat of the owner with a higher incarnation and another boot id.
    Rebooted { boot: BootId, incarnation: Incarnation },
    /// R3 and R4: nothing new from the owner for (L + margin)(1 + rho), by complete reads.
    Lapsed { window: Duration },
    /// A fence agent confirmed it.
    PowerOff,
    /// Of a handover claim: against the source and against the target, each by a proof of its own.
    Both { from: Against, to: Against },
}

/// What proves that one of the two hosts of a handover claim lets v run under it no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Against {
    /// Its guard said so.
    Said(Over),
    /// It has rebooted since.
    Rebooted,
    /// R3 and R4.
    Lapsed,
    /// A fence agent confirmed it.
    PowerOff,
}

impl Against {
    /// Whether it also excludes that host's writes still under way.
    #[must_use]
    pub fn excludes_late_writes(self) -> bool {
        match self {
            Self::Said(over) => Proof::Said(over).excludes_late_writes(),
            Self::Rebooted | Self::PowerOff => true,
            Self::Lapsed => false,
        }
    }
}

impl Proof {
    /// Whether it ends whatever its owner ran, not this tenure alone.
    #[must_use]
    pub fn ends_host(self) -> bool {
        match self {
            Self::Rebooted { .. } | Self::Lapsed { .. } | Self::PowerOff => true,
            Self::Both { from, to } => ![from, to].into_iter().any(|half| matches!(half, Against::Said(_))),
            Self::Said(_) | Self::Unowned => false,
        }
    }

    /// Whether its guard says that a copy ran under it, has ended, and left no write under way.
    #[must_use]
    pub fn ended_cleanly(self) -> bool {
        matches!(self, Self::Said(Over::Exited { clean: true } | Over::HandedTo(_)))
    }

    /// Whether it also excludes writes still under way; else a storage fence is owed.
    #[must_use]
    pub fn excludes_late_writes(self) -> bool {
        match self {
            Self::Said(Over::Exited { clean }) => clean,
            Self::Said(Over::NeverStarted | Over::HandedTo(_)) | Self::Unowned => true,
            Self::Said(Over::Lapsed | Over::Draining) | Self::Lapsed { .. } => false,
            Self::Rebooted { .. } | Self::PowerOff => true,
            Self::Both { from, to } => from.excludes_late_writes() && to.excludes_late_writes(),
        }
    }
}

/// One file, block device or network disk that a VM needs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskNeed {
    /// Path on the host.
    pub path: String,
    /// Datastore that holds it; none = local.
    pub datastore: Option<DatastoreId>,
    /// The VM writes to it.
    pub writable: bool,
    /// Not needed for a start (CD-ROM, `startupPolicy='optional'`).
    pub optional: bool,
    /// Declared to be written by several VMs at once (`<shareable/>`).
    pub shareable: bool,
}

/// `vms/<uuid>/record.<digest>`: what a new host needs to run v without any other host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmRecord {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Where its claims live.
    pub home: DatastoreId,
    /// Persistent domain XML (inactive, secure, migratable), at most 256 KiB.
    pub xml: String,
    /// Guest memory in KiB, for placement.
    pub memory_kib: u64,
    /// Number of vCPUs, for placement.
    pub vcpus: u32,
    /// Everything that it opens.
    pub disks: Vec<DiskNeed>,
    /// What its host must have beside that.
    pub needs: Needs,
    /// Why it is only partly protected (NVRAM or TPM state on a local disk); empty = fully.
    pub gaps: Vec<String>,
    /// What is done in doubt, if its definition says so.
    pub on_doubt: Option<OnDoubt>,
}

impl VmRecord {
    /// Paths that no other VM may use while this one runs.
    pub fn exclusive(&self) -> impl Iterator<Item = &str> {
        let alone = |disk: &&DiskNeed| disk.writable && !disk.shareable && !disk.optional;
        self.disks.iter().filter(alone).map(|disk| disk.path.as_str())
    }
    /// The one datastore on which everything lies that a start needs; none if there are several, or something is on none.
    #[must_use]
    pub fn place(&self) -> Option<DatastoreId> {
        let mut needed = self.disks.iter().filter(|disk| !disk.optional).map(|disk| disk.datastore);
        let first = needed.next()??;
        needed.all(|datastore| datastore == Some(first)).then_some(first)
    }
    /// Datastores that hold a writable disk: a storage fence is owed for each.
    pub fn written(&self) -> impl Iterator<Item = DatastoreId> + '_ {
        let mut seen = std::collections::BTreeSet::new();
        self.disks
            .iter()
            .filter(|disk| disk.writable)
            .filter_map(|disk| disk.datastore)
            .filter(move |d| seen.insert(*d))
    }
}
