//! What people are shown, by D-Bus and CLI; also the JSON of `--json` (schema version in `ClusterView`).

use serde::{Deserialize, Serialize};

use super::{DatastoreId, HostId, VmId};

/// Version of the JSON. Fields are only added within one version.
pub const VIEW_SCHEMA: u16 = 1;

/// The cluster as one agent sees it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ClusterView {
    /// `VIEW_SCHEMA`.
    pub schema: u16,
    /// Name of the cluster; none = this host is no member yet.
    pub cluster: Option<String>,
    /// Who says this.
    pub seen_by: String,
    /// The master that it follows or is.
    pub master: Option<String>,
    /// Its term.
    pub term: u64,
    /// Version of the settings document.
    pub settings_version: u64,
    /// By index.
    pub hosts: Vec<HostView>,
    /// By name.
    pub vms: Vec<VmView>,
    /// In the order of the settings.
    pub datastores: Vec<DatastoreView>,
    /// By name.
    pub fence_devices: Vec<FenceDeviceView>,
    /// Rules for VMs that cannot do what they were made for; as the master sees it.
    #[serde(default)]
    pub rule_problems: Vec<String>,
    /// Nothing is done by itself: until when, and why.
    #[serde(default)]
    pub disarmed: Option<String>,
}

/// One host.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HostView {
    /// Its id.
    pub id: HostId,
    /// Its name.
    pub name: String,
    /// master, subordinate, candidate or unknown.
    pub role: String,
    /// live, agent-failed, storage-lost, partitioned, isolated, dead, left or unknown.
    pub verdict: String,
    /// The evidence: one line.
    pub evidence: String,
    /// Milliseconds since its last network beat.
    pub beat_age_ms: Option<u64>,
    /// How long its silence on a datastore must last to prove a lapse, in milliseconds, as the host that says this would
    /// judge now; none for that host itself.
    pub window_ms: Option<u64>,
    /// libvirtd answers there.
    pub libvirt: Option<bool>,
    /// VMs that run there.
    pub vms: u32,
    /// Free memory in MiB.
    pub free_mib: Option<u64>,
    /// Its control address.
    pub address: String,
    /// It is in maintenance: how many VMs are still to be moved, away or back.
    #[serde(default)]
    pub maintenance: Option<MaintenanceView>,
    /// It came and went too often: nothing is placed on it.
    #[serde(default)]
    pub quarantined: bool,
    /// What it finds wrong with itself, and what is done about it.
    #[serde(default)]
    pub findings: Vec<String>,
}

/// A host that people work on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MaintenanceView {
    /// It is over, and its VMs are moved back.
    pub ends: bool,
    /// VMs that are still to be moved.
    pub left: u32,
    /// Those that are not moved, and why: tried again.
    pub stay: Vec<(String, String)>,
}

/// How far a host is emptied before it goes down.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EvacuationView {
    /// The rules want it.
    pub wanted: bool,
    /// VMs that are still there.
    pub left: u32,
    /// Those that are not moved, and why.
    pub stay: Vec<(String, String)>,
    /// It is waited for so many seconds at most.
    pub within_s: u32,
}

/// One VM.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmView {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// running, paused, stopped-by-guard, starting, waiting, off, unknown.
    pub state: String,
    /// Host that owns it.
    pub host: Option<String>,
    /// Newest claim known.
    pub generation: Option<u64>,
    /// running or stopped.
    pub wanted: Option<String>,
    /// It has record and claim.
    pub protected: bool,
    /// Name of its home datastore.
    pub home: Option<String>,
    /// What is done with it while its lease is in doubt: pause or run-until-stop, "(default)" if it is the cluster's.
    #[serde(default)]
    pub on_doubt: String,
    /// What it waits for and what would release it; or why it is not protected.
    pub why: Option<String>,
    /// Lines of `vm explain`: proof that would be used, fence, time to expect.
    pub explain: Vec<String>,
}

/// One datastore.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DatastoreView {
    /// Its id.
    pub id: DatastoreId,
    /// Its name.
    pub name: String,
    /// Its mount point.
    pub path: String,
    /// lock, command, none.
    pub fence: String,
    /// exclude or accept.
    pub late_writes: String,
    /// This host's lease: valid, lapsed, none.
    pub lease: String,
    /// Milliseconds the last beat took to write.
    pub latency_ms: Option<f64>,
    /// How it is for this host: well, stalls, down (all paths), full, gone.
    #[serde(default)]
    pub health: String,
    /// It shows less than before, and waits for `mainstay datastore accept`.
    #[serde(default)]
    pub rolled_back: bool,
    /// Trouble, for people.
    pub trouble: Option<String>,
    /// Hosts with a valid lease there, by their beats.
    pub reached_by: Vec<String>,
}

/// One power switch of a host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceDeviceView {
    /// Its name.
    pub name: String,
    /// The host that it switches.
    pub host: String,
    /// Program or path.
    pub agent: String,
    /// Lower ones are tried first.
    pub level: u8,
    /// suspect or lapse.
    pub fence_at: String,
    /// As given to the program.
    pub parameters: std::collections::BTreeMap<String, String>,
    /// Names of those that are not shown.
    pub secrets: Vec<String>,
    /// Why it failed last, or is not trusted.
    pub trouble: Option<String>,
    /// It may be used.
    pub trusted: bool,
}

/// What would become of VMs if hosts failed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WhatIfView {
    /// `VIEW_SCHEMA`.
    pub schema: u16,
    /// Hosts that fail, by name.
    pub hosts: Vec<String>,
    /// After so many seconds their VMs are over at the latest.
    pub over_s: f64,
    /// What one start takes in seconds; measured, if VMs were started under this master.
    pub start_s: f64,
    /// `start_s` was measured.
    pub measured: bool,
    /// Their VMs, in the order of their starts; those without a place last.
    pub vms: Vec<WhatIfVm>,
    /// CPUs of the hosts that are left, where they are known.
    #[serde(default)]
    pub cpus: Vec<WhatIfCpu>,
    /// How much less CPU the rules tolerate, in percent.
    #[serde(default)]
    pub floor_percent: Option<u32>,
}

/// The CPUs of a host that is left.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WhatIfCpu {
    /// Its name.
    pub host: String,
    /// Logical CPUs.
    pub cpus: u32,
    /// vCPUs of all VMs that would run there.
    pub vcpus: u64,
    /// How much less than one CPU for each of them there would be, in percent, were all busy.
    pub loss_percent: u32,
}

/// One of them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WhatIfVm {
    /// Its name.
    pub name: String,
    /// Its priority.
    pub priority: String,
    /// Where it runs.
    pub from: String,
    /// Where it would run.
    pub to: Option<String>,
    /// When it would run there, in seconds from the failure, at the latest.
    pub runs_s: Option<f64>,
    /// Names of those that it would wait for.
    pub after: Vec<String>,
    /// Why it would run on none of the other hosts, if it would run.
    #[serde(default)]
    pub instead: Vec<String>,
    /// Why it would run nowhere.
    pub why: Option<String>,
}

/// One note: what happened, where and why.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NoteView {
    /// Clock of day, milliseconds since 1970.
    pub unix_ms: u64,
    /// The host that says it.
    pub host: String,
    /// info, warning or alarm.
    pub level: String,
    /// Machine-readable kind, for example `host-dead`.
    pub kind: String,
    /// The VM concerned, by name.
    pub vm: Option<String>,
    /// One line for people.
    pub text: String,
    /// Id of the verdict that it tells; `mainstay verdict show` has the evidence.
    #[serde(default)]
    pub verdict: Option<String>,
}
