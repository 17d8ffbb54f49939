//! The cluster-wide settings: one versioned document, the same on every host (design 10, Local state).

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::guests::GuestSettings;
use super::power::{FenceAt, FenceDevice, PowerSettings};
use super::rules::VmRules;
use super::{ClusterId, DatastoreId, HostId, HostIndex, StorageFence, VmId};

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
    /// Rises, above that of every datastore, when an operator accepts it as it is, after it had shown less than before.
    /// Claims that are made later have a generation above all that were made earlier, wherever those are remembered.
    #[serde(default)]
    pub accepted: u32,
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
    /// Rises when an operator ends its quarantine.
    #[serde(default)]
    pub released: u32,
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

impl OnDoubt {
    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::RunUntilStop => "run-until-stop",
        }
    }

    /// By that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Pause, Self::RunUntilStop].into_iter().find(|policy| policy.name() == name)
    }
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

/// What becomes of a person's `virsh migrate` of a protected VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum ForeignMigration {
    /// It goes on, under a handover claim.
    #[default]
    Allow,
    /// The target's hook refuses it and names `mainstay vm move`.
    Refuse,
}

impl ForeignMigration {
    /// By the name that people use.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "allow" => Some(Self::Allow),
            "refuse" => Some(Self::Refuse),
            _ => None,
        }
    }
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
    /// Power switches of hosts. Holds secrets: the document is for root only.
    #[serde(default)]
    pub power: PowerSettings,
    /// `virsh migrate` by people.
    #[serde(default)]
    pub foreign_migration: ForeignMigration,
    /// What is done about what guests say.
    #[serde(default)]
    pub guests: GuestSettings,
    /// Order and places of VMs, and what a start must leave possible.
    #[serde(default)]
    pub rules: VmRules,
    /// Hosts that people work on.
    #[serde(default)]
    pub maintenance: Vec<Maintenance>,
    /// Nothing is done by itself.
    #[serde(default)]
    pub disarmed: Option<Disarmed>,
}

/// Nothing is done by itself: people work on the network, the storage, …
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disarmed {
    /// Until then, in milliseconds since 1970; by the clock of day of each host.
    pub until_unix_ms: u64,
    /// Why, for people.
    pub why: String,
}

/// A host that people work on: nothing is started there, and what runs there is moved away.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Maintenance {
    /// Which.
    pub host: HostId,
    /// VMs that ran there when it began.
    pub vms: Vec<VmId>,
    /// It is over: these are brought back, and then this is forgotten.
    pub ends: bool,
}

impl ClusterSettings {
    /// The rules for guests as they are followed now: none while the cluster is disarmed.
    #[must_use]
    pub fn guests_in_use(&self) -> GuestSettings {
        match self.disarmed {
            None => self.guests.clone(),
            Some(_) => GuestSettings {
                rules: Vec::new(),
                permissions: Vec::new(),
                monitors: Vec::new(),
                ..self.guests.clone()
            },
        }
    }

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
    /// When silent hosts are powered off.
    SetFenceAt(FenceAt),
    /// A power switch is added.
    AddFenceDevice(FenceDevice),
    /// A power switch is taken away, by its name.
    RemoveFenceDevice(String),
    /// A power switch is not used any more, with the reason, or is used again.
    TrustFenceDevice { name: String, distrusted: Option<String> },
    /// `virsh migrate` by people is allowed or refused.
    SetForeignMigration(ForeignMigration),
    /// A datastore is accepted as it is, although it showed less than before.
    AcceptDatastore { name: String },
    /// Other rules for guests.
    SetGuests(Box<GuestSettings>),
    /// Other rules for the order and the places of VMs.
    SetRules(Box<VmRules>),
    /// How a host takes part.
    Host(HostChange),
    /// Nothing is done by itself until then; none = it is again.
    Disarm(Option<Disarmed>),
}

/// One change of how a host takes part.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum HostChange {
    /// People will work on it.
    EnterMaintenance {
        /// Which.
        host: HostId,
    },
    /// They have.
    LeaveMaintenance {
        /// Which.
        host: HostId,
        /// VMs that ran there before are moved back.
        back: bool,
    },
    /// The master's own word: all that come back are back.
    EndMaintenance {
        /// Of which.
        host: HostId,
    },
    /// An operator ends its quarantine.
    Release {
        /// Which.
        host: HostId,
    },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::power::Secret;

    fn document() -> ClusterSettings {
        let host = HostId(uuid::Uuid::from_u128(0xa));
        ClusterSettings {
            schema: 1,
            version: 7,
            cluster: ClusterId(uuid::Uuid::from_u128(0xc)),
            name: "prod".into(),
            timing: Timing::DEFAULT,
            members: vec![MemberSettings {
                index: HostIndex(0),
                host,
                name: "a".into(),
                control: ([10, 0, 0, 1], 7784).into(),
                migration_uri: "a".into(),
                released: 0,
            }],
            datastores: vec![DatastoreSettings {
                id: DatastoreId(uuid::Uuid::from_u128(0xd)),
                name: "nfs".into(),
                path: "/srv/nfs".into(),
                fence: StorageFence::Lock,
                late_writes: LateWrites::Exclude,
                accepted: 0,
            }],
            vms: VmDefaults::default(),
            foreign_migration: ForeignMigration::Allow,
            guests: GuestSettings::default(),
            rules: VmRules::default(),
            maintenance: Vec::new(),
            disarmed: None,
            power: PowerSettings {
                fence_at: FenceAt::Suspect,
                devices: vec![FenceDevice {
                    name: "ipmi".into(),
                    host,
                    agent: "fence_ipmilan".into(),
                    level: 1,
                    parameters: [("ip".into(), "10.0.9.1".into())].into(),
                    secrets: [("password".into(), Secret("x".into()))].into(),
                    fence_at: None,
                    distrusted: None,
                }],
            },
        }
    }

    /// On disk: JSON. A document of before fence devices is read, too.
    #[test]
    fn golden_power_on_disk() {
        let text = serde_json::to_string(&document()).unwrap();
        let power = concat!(
            r#""power":{"fence_at":"suspect","devices":[{"name":"ipmi","host":"00000000-0000-0000-0000-00000000000a","#,
            r#""agent":"fence_ipmilan","level":1,"parameters":{"ip":"10.0.9.1"},"secrets":{"password":"x"},"#,
            r#""fence_at":null,"distrusted":null}]},"foreign_migration":"allow","guests":{"rule":[{"kind":"*","vm":"*","severity":"critical","#,
            r#""message":null,"count":1,"within_s":60,"then":"as-asked"}],"permission":[],"#,
            r#""limits":{"resets_per_hour":3,"backoff_s":30},"dumps":{"mib":8192,"within_s":120},"#,
            r#""monitor":[{"vm":"*","preset":"medium","silence_s":null,"io_s":null,"uptime_s":null,"screen_s":null,"dump":false}]},"#,
            r#""rules":{"priority":[],"dependency":[],"affinity":[],"placement":[],"isolation":[],"health":[],"admission":"off","floor":null,"#,
            r#""failback":[],"room":{"move":[],"stop":[],"within_s":60},"shutdown":{"vms":"release","within_s":300},"#,
            r#""limits":{"starts_per_host":4,"starts_per_datastore":16,"moves_per_host":1,"vcpus_per_cpu":null}},"maintenance":[],"disarmed":null}"#
        );
        assert!(text.ends_with(power), "{text}");
        assert_eq!(serde_json::from_str::<ClusterSettings>(&text).unwrap(), document());
        let old = format!("{}}}", text.split_once(r#","power""#).unwrap().0);
        let old: ClusterSettings = serde_json::from_str(&old).unwrap();
        assert_eq!(old, ClusterSettings { power: PowerSettings::default(), ..document() });
    }

    /// Between agents: postcard, versioned by `CONTROL_PROTOCOL`.
    #[test]
    fn golden_power_on_the_wire() {
        let bytes = postcard::to_allocvec(&document().power).unwrap();
        let host = document().members[0].host;
        let mut golden = vec![1, 1, 4];
        golden.extend(b"ipmi");
        golden.push(16);
        golden.extend(host.0.as_bytes());
        golden.push(13);
        golden.extend(b"fence_ipmilan");
        golden.extend([1, 1, 2]);
        golden.extend(b"ip");
        golden.push(8);
        golden.extend(b"10.0.9.1");
        golden.extend([1, 8]);
        golden.extend(b"password");
        golden.extend([1, b'x', 0, 0]);
        assert_eq!(bytes, golden);
        assert_eq!(postcard::from_bytes::<PowerSettings>(&bytes).unwrap(), document().power);
    }
}
