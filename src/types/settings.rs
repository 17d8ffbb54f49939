//! The cluster-wide settings: one versioned document, the same on every host (design 10, Local state).

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ClusterId, DatastoreId, HostId, HostIndex, StorageFence};

/// The few bases of all timing; everything else is derived in `core/timing.rs`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Timing {
    /// Period of network beats.
    #[serde(with = "millis")]
    pub beat: Duration,
    /// Period of datastore beats.
    #[serde(with = "millis")]
    pub renew: Duration,
    /// Silence on the network after which a host is suspected.
    #[serde(with = "millis")]
    pub suspect: Duration,
    /// L: how long a datastore beat lets a host run its VMs.
    #[serde(with = "millis")]
    pub lease: Duration,
}

impl Timing {
    /// Profile `default`.
    pub const DEFAULT: Self = Self::of(1000, 1000, 3000, 5000);
    /// Profile `fast`.
    pub const FAST: Self = Self::of(250, 250, 750, 1500);
    /// Profile `patient`, for bad storage.
    pub const PATIENT: Self = Self::of(1000, 2000, 6000, 15000);

    const fn of(beat: u64, renew: u64, suspect: u64, lease: u64) -> Self {
        Self {
            beat: Duration::from_millis(beat),
            renew: Duration::from_millis(renew),
            suspect: Duration::from_millis(suspect),
            lease: Duration::from_millis(lease),
        }
    }

    /// A profile by its name.
    #[must_use]
    pub fn profile(name: &str) -> Option<Self> {
        match name {
            "default" => Some(Self::DEFAULT),
            "fast" => Some(Self::FAST),
            "patient" => Some(Self::PATIENT),
            _ => None,
        }
    }
}

/// What happens to writes that may still be under way when there is no fence.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum LateWrites {
    /// A VM waits for "rebooted" or "power off".
    #[default]
    Exclude,
    /// The administrator takes the risk.
    Accept,
}

/// One datastore of the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DatastoreSettings {
    /// Its id; also in its member block.
    pub id: DatastoreId,
    /// Its name, for people.
    pub name: String,
    /// Mount point, the same on every host.
    pub path: String,
    /// How late writes of a dead host are excluded.
    pub fence: StorageFence,
    /// What to do when they are not.
    #[serde(default)]
    pub late_writes: LateWrites,
}

/// One member of the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberSettings {
    /// Its place; never reused.
    pub index: HostIndex,
    /// Its id.
    pub host: HostId,
    /// Its name.
    pub name: String,
    /// Where its agent listens for orders.
    pub control: SocketAddr,
    /// Host or address that libvirt migrations to it use.
    pub migration_uri: String,
}

/// What is done with a VM whose lease is in doubt, before the guard stops it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum OnDoubt {
    /// libvirt pauses it at 0.8 L, so that its clock stands.
    #[default]
    Pause,
    /// It runs on until the guard's stop.
    RunUntilStop,
}

/// Defaults for VMs that do not say otherwise.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmDefaults {
    /// Restarts in place of one VM per hour before it goes elsewhere.
    pub restarts_per_hour: u32,
    /// Memory in MiB that stays free on every host.
    pub reserve_mib: u64,
    /// What is done in doubt.
    #[serde(default)]
    pub on_doubt: OnDoubt,
    /// A datastore that does not answer a host for so long counts as down there.
    #[serde(with = "millis", default = "apd_after")]
    pub apd_after: Duration,
}

impl Default for VmDefaults {
    fn default() -> Self {
        Self { restarts_per_hour: 3, reserve_mib: 64, on_doubt: OnDoubt::default(), apd_after: apd_after() }
    }
}

fn apd_after() -> Duration {
    Duration::from_secs(20)
}

/// The document.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterSettings {
    /// Version of this format.
    pub schema: u16,
    /// Rises with every change; the higher wins.
    pub version: u64,
    /// The cluster.
    pub cluster: ClusterId,
    /// Its name.
    pub name: String,
    /// Bases of all timing.
    pub timing: Timing,
    /// By index.
    pub members: Vec<MemberSettings>,
    /// By position: bit n of a beat's sets. Only appended to.
    pub datastores: Vec<DatastoreSettings>,
    /// Defaults for VMs.
    #[serde(default)]
    pub vms: VmDefaults,
}

impl ClusterSettings {
    /// A member by id.
    #[must_use]
    pub fn member(&self, host: HostId) -> Option<&MemberSettings> {
        self.members.iter().find(|member| member.host == host)
    }
    /// A datastore by id.
    #[must_use]
    pub fn datastore(&self, id: DatastoreId) -> Option<&DatastoreSettings> {
        self.datastores.iter().find(|datastore| datastore.id == id)
    }
    /// The datastore that holds this path: the one with the longest matching mount point.
    #[must_use]
    pub fn datastore_of_path(&self, path: &str) -> Option<&DatastoreSettings> {
        let holds =
            |root: &str| path.strip_prefix(root.trim_end_matches('/')).is_some_and(|rest| rest.starts_with('/'));
        self.datastores.iter().filter(|d| holds(&d.path)).max_by_key(|d| d.path.len())
    }
}

/// One change of the document, asked for by a person; carried out by the master.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum SettingsChange {
    /// A host joins.
    AddMember(MemberSettings),
    /// A datastore is added.
    AddDatastore(DatastoreSettings),
    /// Its fence or late-writes change.
    ChangeDatastore { name: String, fence: Option<StorageFence>, late_writes: Option<LateWrites> },
    /// Other timing.
    SetTiming(Timing),
    /// Another default for VMs in doubt.
    SetOnDoubt(OnDoubt),
    /// Another patience with datastores that do not answer.
    SetApdAfter(#[serde(with = "millis")] Duration),
}

/// Durations as whole milliseconds, in JSON and in messages.
pub mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes milliseconds.
    pub fn serialize<S: Serializer>(span: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
    }
    /// Reads milliseconds.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}
