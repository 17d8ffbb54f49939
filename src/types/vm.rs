//! What libvirt says of a domain, in our words.

use serde::{Deserialize, Serialize};

use super::settings::OnDoubt;
use super::{Generation, VmId};

/// State of a domain as libvirt lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    /// Its vCPUs may run.
    Running,
    /// Paused by somebody, by an I/O error, or not yet resumed.
    Paused { by_io_error: bool },
    /// Shutting down.
    ShuttingDown,
    /// Not running; why it stopped last.
    Off(OffReason),
}

/// Why a domain stopped last (libvirt's shut-off reason or the stop event's detail).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffReason {
    /// Never ran, or the daemon does not know.
    Unknown,
    /// The guest powered itself off (or was asked to by `virsh shutdown`).
    Shutdown,
    /// `virsh destroy`.
    Destroyed,
    /// The guest crashed or panicked.
    Crashed,
    /// QEMU ended in another way than asked for.
    Failed,
    /// Went to another host.
    Migrated,
    /// Memory was saved to a file.
    Saved,
    /// A snapshot was reverted.
    FromSnapshot,
    /// The daemon restarted and found it gone.
    Daemon,
}

/// What an agent has begun with a VM of its host. It outlives the agent (not the boot), so that the next one ends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Underway {
    /// libvirt was told to start it with its vCPUs standing; or it has arrived so.
    Start,
    /// libvirt was told to migrate it to this host.
    Move { to: super::HostId },
    /// libvirt was told to pause it, because its lease is in doubt.
    Pause,
    /// libvirt was told to end it, because this host is isolated: no person wants it stopped.
    End,
    /// The same, because another VM needs its room.
    Yield,
}

/// One domain as listed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DomainInfo {
    /// libvirt's UUID.
    pub vm: VmId,
    /// libvirt's name.
    pub name: String,
    /// What it does now.
    pub state: DomainState,
    /// Has a definition on disk.
    pub persistent: bool,
    /// libvirt starts it at boot.
    pub autostart: bool,
    /// Inactive XML (migratable, secure), if persistent; else the live XML.
    ///
    /// Not known while `busy`: libvirt shows it only when no call is under way, and would keep the whole list waiting.
    pub xml: Option<String>,
    /// Live XML of one that runs and has a definition of its own; not known while `busy`, either.
    pub live_xml: Option<String>,
    /// Socket on this host of the channel to Mainstay's agent inside, if it runs and has one; not known while `busy`.
    pub guest_socket: Option<String>,
    /// QEMU's process, if it runs.
    pub pid: Option<u32>,
    /// A saved image waits (`virsh managedsave`).
    pub managed_save: bool,
    /// A call to libvirt is under way about it, by whomever.
    pub busy: bool,
}

/// Something happened to a domain. Events are hints; the list is the truth.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DomainChange {
    /// Defined or changed on disk.
    Defined,
    /// The definition was removed.
    Undefined,
    /// A block job has ended: its disks may lie elsewhere now (`virsh blockcopy --pivot`).
    DisksMoved,
    /// QEMU runs.
    Started { by_migration: bool },
    /// vCPUs stand still.
    Suspended { migrated: bool, by_io_error: bool },
    /// vCPUs stand still; they go on at a migration's target, which fetches missing memory from here (post-copy).
    PostCopy,
    /// vCPUs go on.
    Resumed,
    /// QEMU is gone.
    Stopped(OffReason),
    /// The guest is shutting down; `by_guest` = asked for from inside.
    ShuttingDown { by_guest: bool },
    /// The guest rebooted itself.
    Rebooted,
    /// pvpanic fired.
    Panicked,
    /// The guest's watchdog fired.
    WatchdogFired,
    /// A disk reported an error; QEMU's action is in the domain's state. `full`: there was no space.
    IoError { full: bool },
}

/// What was ordered of libvirt, and what became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DomainFailure {
    /// libvirtd does not answer or is down.
    NoDaemon(String),
    /// The domain does not exist (any more).
    NoDomain,
    /// Another process holds the lock of an image.
    ImageLocked(String),
    /// A disk, network, device or memory is missing on this host.
    Host(String),
    /// A disk cannot be opened on this host.
    Storage(String),
    /// Not enough memory or hugepages.
    Capacity(String),
    /// It is in another state than the order needs: another call is under way.
    Busy(String),
    /// Our hook refused.
    Refused(String),
    /// The definition is wrong.
    Definition(String),
    /// The deadline passed; the call may still take effect.
    Timeout,
}

/// Memory and load of this host, for placement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostCapacity {
    /// What may be given to VMs, in KiB: MemAvailable, and in reports without what running guests may still touch.
    pub free_kib: u64,
    /// MemTotal in KiB.
    pub total_kib: u64,
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory in KiB that QEMUs have taken already.
    pub resident_kib: u64,
    /// Pages of 2 MiB.
    pub pages_2m: PagesLeft,
    /// Pages of 1 GiB.
    pub pages_1g: PagesLeft,
    /// The usual large page has 1 GiB.
    pub usual_1g: bool,
}

/// Large pages of one size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PagesLeft {
    /// Not used, in KiB.
    pub free_kib: u64,
    /// All, in KiB.
    pub total_kib: u64,
}

/// An order to libvirt. Every one is carried out on a worker thread with a deadline.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DomainOrder {
    /// List all domains.
    List,
    /// Write this definition (replaces an older one of the same UUID).
    Define { xml: String },
    /// Remove the definition; NVRAM, TPM state and checkpoints stay.
    Undefine { vm: VmId },
    /// Start the defined domain with its vCPUs standing. A saved image that libvirt keeps for it is discarded.
    StartPaused { vm: VmId },
    /// The same from the saved image that libvirt keeps for it. The hook sees the image.
    RestorePaused { vm: VmId },
    /// Write into the running domain, not into its definition, under which generation it runs: an image of its memory
    /// then says so.
    Mark { vm: VmId, generation: Generation },
    /// Write into its definition what is done with it in doubt; none = remove that.
    SetOnDoubt { vm: VmId, on_doubt: Option<OnDoubt> },
    /// Let its vCPUs go.
    Resume { vm: VmId },
    /// Pause it; on a connection of its own. One that was begun is answered when it has ended, however late.
    Suspend { vm: VmId },
    /// Ask the guest to power off.
    Shutdown { vm: VmId },
    /// End QEMU at once.
    Destroy { vm: VmId },
    /// Reset the machine.
    Reset { vm: VmId },
    /// Live migration to `uri` (peer to peer is not used); target stays paused, source stays defined.
    Migrate { vm: VmId, uri: String, bandwidth_mib: Option<u64> },
    /// Cancel a running migration.
    AbortJob { vm: VmId },
}

/// What libvirt answered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DomainAnswer {
    /// Done.
    Done,
    /// Of `List`.
    Listed(Vec<DomainInfo>),
    /// Not done, or not known to be done.
    Failed(DomainFailure),
}
