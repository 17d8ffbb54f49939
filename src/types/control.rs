//! What agents ask each other over TLS: orders, reports and lists (design 3, Control channel). Framed by
//! `wire/frame.rs`. Every request has a ticket; asking twice gives the first answer.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::failure::{Failure, Piece};
use super::finding::Condition;
use super::guests::{GuestWord, Inside};
use super::needs::{HostMeans, Needs};
use super::settings::{ClusterSettings, OnDoubt, SettingsChange};
use super::verdict::{VerdictAsk, VerdictView};
use super::view::{ClusterView, EvacuationView, NoteView, VmView, WhatIfView};
use super::vm::{DomainState, HostCapacity};
use super::{BootId, Claim, Generation, HostId, Owner, Proof, Tenure, Ticket, VmId, VmRecord, Wanted};

/// Version of this protocol.
pub const CONTROL_PROTOCOL: u16 = 5;

/// One request on the wire.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Envelope {
    /// Version of the sender.
    pub protocol: u16,
    /// The sender's; unique per sender and incarnation.
    pub ticket: Ticket,
    /// What is asked.
    pub request: Request,
}

/// Its answer on the wire.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReplyEnvelope {
    /// Version of the sender.
    pub protocol: u16,
    /// Of the request.
    pub ticket: Ticket,
    /// What is answered.
    pub reply: Reply,
}

/// What one agent asks another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Subordinate to master, once per beat and at every change.
    Report(Box<HostReport>),
    /// A newer settings document.
    Settings(Box<ClusterSettings>),
    /// Asks for the other's document, to take it if it is newer.
    FetchSettings,
    /// A person's change; only the master carries it out, others answer `NotMaster`.
    Change(Box<SettingsChange>),
    /// Master to the host that shall run a VM.
    Run(Box<RunOrder>),
    /// The same for one that a person wants stopped: nobody owns it any more.
    PutDown(Box<RunOrder>),
    /// A person's wish about a VM; whoever can carry it out does, others answer `NotHere`.
    Vm(VmCommand),
    /// Source to target of a move: expect this VM, paused, under the source's generation.
    Incoming(Box<IncomingOrder>),
    /// Source to target: QEMU ended, (v, g) is over and handed to you.
    Handed { tenure: Tenure },
    /// Source to target: the move failed; throw the copy away.
    Dropped { tenure: Tenure },
    /// Target to source of `virsh migrate`: create the handover claim.
    Handover(Box<HandoverOrder>),
    /// Target to source: the next generation is over at the target already, by a migration that came to nothing; use
    /// it up.
    Spent { tenure: Tenure },
    /// Master to the host of a VM of the lowest priority: end it, `whom` needs its room. It stays wanted running.
    Yield { vm: VmId, whom: String },
    /// A host (none: the one that asks) is to be emptied now; `for_shutdown`: if that is the policy before it goes down. Asked again and
    /// again, for as long as it is wanted; the master moves its VMs away.
    Evacuate { host: Option<HostId>, for_shutdown: bool },
    /// The cluster as the master sees it.
    View,
    /// Notes of the other host since this clock-of-day time.
    Notes { since_unix_ms: u64 },
    /// Master to all: this boot of a host is over, by its power switch. Its late writes are excluded.
    PoweredOff { host: HostId, boot: BootId },
    /// A host that is no member yet; the only request that needs no client certificate.
    Join(Box<JoinRequest>),
    /// A host is about to start this VM for a person: denied if it, or one that writes to these disks, is there.
    Twins { vm: VmId, disks: Vec<String>, takes: Takes },
    /// What would become of VMs if hosts of these names failed; the master knows.
    WhatIf { hosts: Vec<String> },
    /// All about one VM; the master knows.
    Explain { vm: VmId },
    /// About what a guest asks for another VM.
    Guest(Box<GuestWord>),
    /// Verdicts that the other host has given.
    Verdicts(VerdictAsk),
}

/// What a VM takes of its host.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Takes {
    /// Memory in KiB.
    pub memory_kib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What its host must have.
    pub needs: Needs,
}

impl Takes {
    /// As a record says.
    #[must_use]
    pub fn of(record: &VmRecord) -> Self {
        Self { memory_kib: record.memory_kib, vcpus: record.vcpus, needs: record.needs.clone() }
    }
}

/// A host asks to become a member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// From the token.
    pub secret: [u8; 32],
    /// Its id, chosen by itself.
    pub host: HostId,
    /// Its name; must be new in the cluster.
    pub name: String,
    /// Where its agent will listen.
    pub control: SocketAddr,
    /// What libvirt migrations to it use.
    pub migration_uri: String,
    /// Certificate signing request, PEM.
    pub csr_pem: String,
}

/// What a new member needs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// With the new member in it.
    pub settings: ClusterSettings,
    /// Ring of beat keys.
    pub keys: Vec<super::guard::BeatKey>,
    /// The cluster's certificate authority, PEM.
    pub ca_pem: String,
    /// Its key, PEM: every member can let others join.
    pub ca_key_pem: String,
    /// The new member's certificate, PEM.
    pub certificate_pem: String,
    /// Secret of join tokens.
    pub join_secret: [u8; 32],
}

impl std::fmt::Debug for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Joined({:?}, …)", self.settings.name)
    }
}

/// Run this VM: you may create exactly g+1.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunOrder {
    /// Claim g in full: generation, nonce, home, record, debts.
    pub claim: Claim,
    /// Why (v, g) is over.
    pub proof: Proof,
    /// Why it is to be started.
    pub reason: super::ClaimReason,
}

/// Make ready for a migration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct IncomingOrder {
    /// The source's claim.
    pub claim: Claim,
    /// So that the target can judge whether it has what the VM needs.
    pub record: VmRecord,
    /// Who wants that.
    pub by: Mover,
}

/// A person migrates a VM with libvirt, and its target asks the source to agree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HandoverOrder {
    /// The source's claim, as the target has read it.
    pub claim: Claim,
    /// The target; its guard holds a row of the next generation.
    pub to: Owner,
}

/// Who wants a VM moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Mover {
    /// Somebody who wants it there: it stays.
    Person,
    /// The cluster, for the time being: it may be brought back to where it belongs.
    Cluster,
}

/// A person's wish about one VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum VmCommand {
    /// Should run; here, or where there is room.
    Start { vm: VmId },
    /// Should not run. `force` = end at once.
    Stop { vm: VmId, force: bool },
    /// Live migration; `None` = the best host.
    Move { vm: VmId, to: Option<HostId>, by: Mover },
    /// What is done with it in doubt; `None` = the cluster's default.
    SetOnDoubt { vm: VmId, on_doubt: Option<OnDoubt> },
    /// Forget that starts of it have failed, and try again; for the master.
    Retry { vm: VmId },
}

impl VmCommand {
    /// Which VM.
    #[must_use]
    pub fn vm(&self) -> VmId {
        match self {
            Self::Start { vm }
            | Self::Stop { vm, .. }
            | Self::Move { vm, .. }
            | Self::SetOnDoubt { vm, .. }
            | Self::Retry { vm } => *vm,
        }
    }
}

/// What a host says of itself to its master.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostReport {
    /// Who.
    pub host: HostId,
    /// Memory and CPUs.
    pub capacity: HostCapacity,
    /// What it has for VMs beside that.
    pub means: HostMeans,
    /// What it finds wrong with itself; at most twice `MAX_FINDINGS`.
    pub conditions: Vec<Condition>,
    /// libvirtd answers.
    pub libvirt: bool,
    /// Every domain that it has or holds a row of.
    pub vms: Vec<VmReport>,
    /// Claims that its own reads prove to be over, of VMs whose home the master does not reach; at most `MAX_OVER`.
    pub over: Vec<(Claim, Proof)>,
    /// Claims whose VMs people want stopped, while their owners are not heard; at most `MAX_STOPS`.
    pub stops: Vec<Tenure>,
    /// VMs whose disks it could not open when it was to start them, and has not read since.
    pub unreachable: Vec<VmId>,
}

/// Proofs in one report; the rest follows when these VMs run again.
pub const MAX_OVER: usize = 256;

/// One VM as its host sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmReport {
    /// Which.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Newest claim that this host knows.
    pub claim: Option<Claim>,
    /// libvirt's state; none = no domain here (yet, or any more).
    pub domain: Option<DomainState>,
    /// The guard holds it stopped.
    pub stopped: bool,
    /// What it takes, as far as its definition is known here.
    pub takes: Takes,
    /// How far it is inside.
    pub inside: Inside,
    /// What this host is doing with it, or what it waits for.
    pub doing: Option<String>,
    /// Why it is not protected, if it is not.
    pub unprotected: Option<String>,
    /// What is done with it in doubt, if its definition says so.
    pub on_doubt: Option<OnDoubt>,
}

/// Answer to a request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// It was so already.
    AlreadySo,
    /// Not done.
    Denied(Denial),
    /// The VM runs here under this generation.
    Ran { generation: Generation },
    /// Of `FetchSettings`.
    Settings(Box<ClusterSettings>),
    /// Of `Join`.
    Joined(Box<Joined>),
    /// Of `View`.
    View(Box<ClusterView>),
    /// Of `Notes`.
    Notes(Vec<NoteView>),
    /// Of `Handover`: this claim stands. To `Handover`, `Denied` means that no claim was made and none will be; any
    /// other answer, and none, that it may exist.
    Claimed(Box<Claim>),
    /// Failures of a VM that are kept on the host that is asked, oldest first.
    Failures(Vec<Failure>),
    /// A part of a file of one.
    Piece(Piece),
    /// Of `WhatIf`.
    WhatIf(Box<WhatIfView>),
    /// Of `Explain`.
    Explain(Box<VmView>),
    /// Of `Verdicts`, oldest first.
    Verdicts(Vec<VerdictView>),
    /// Of `Evacuate`.
    Evacuating(Box<EvacuationView>),
}

/// Why not.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Denial {
    /// Ask that one.
    #[error("this host is not the master{}", .master.map(|m| format!("; ask {m}")).unwrap_or_default())]
    NotMaster { master: Option<HostId> },
    /// The VM is not here.
    #[error("the VM is not on this host")]
    NotHere,
    /// No VM of that id anywhere.
    #[error("no such VM; `mainstay vm list` shows those known")]
    UnknownVm,
    /// Somebody else owns it.
    #[error("it belongs to {owner} (generation {generation})")]
    OwnedBy { owner: String, generation: Generation },
    /// The newest claim is another one than the order names.
    #[error("its newest claim is generation {newest}")]
    Superseded { newest: Generation },
    /// This host lacks something that the VM needs.
    #[error("this host cannot run it: {0}")]
    Host(String),
    /// No place, storage, memory.
    #[error("no place: {0}")]
    Capacity(String),
    /// Its disks cannot be opened here.
    #[error("its storage is not accessible: {0}")]
    Storage(String),
    /// A lock of the image is still held, a fence has failed: waiting.
    #[error("waiting: {0}")]
    Waiting(String),
    /// The definition does not start.
    #[error("it does not start: {0}")]
    Definition(String),
    /// No lease, no guard, no libvirt, no storage: this host cannot now.
    #[error("this host cannot now: {0}")]
    Unable(String),
    /// Wrong secret, wrong protocol.
    #[error("not allowed: {0}")]
    NotAllowed(String),
    /// The name, id or address is in use, or the change contradicts itself.
    #[error("{0}")]
    Contradiction(String),
}

/// What the VM should be, with the reason, for `vm list`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WantedView {
    /// Running or stopped.
    pub wanted: Wanted,
    /// By which generation.
    pub generation: Generation,
}

/// The VM of a request, if it is about one.
impl Request {
    /// Short name for logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Report(_) => "report",
            Self::Settings(_) => "settings",
            Self::FetchSettings => "fetch settings",
            Self::Change(_) => "change",
            Self::Run(_) => "run",
            Self::PutDown(_) => "put down",
            Self::Vm(_) => "vm",
            Self::Incoming(_) => "incoming",
            Self::Handed { .. } => "handed",
            Self::Dropped { .. } => "dropped",
            Self::Handover(_) => "handover",
            Self::Spent { .. } => "spent",
            Self::Yield { .. } => "yield",
            Self::Evacuate { .. } => "evacuate",
            Self::View => "view",
            Self::Notes { .. } => "notes",
            Self::PoweredOff { .. } => "powered off",
            Self::Join(_) => "join",
            Self::Twins { .. } => "twins",
            Self::WhatIf { .. } => "what if",
            Self::Explain { .. } => "explain",
            Self::Guest(_) => "guest",
            Self::Verdicts(_) => "verdicts",
        }
    }
}
