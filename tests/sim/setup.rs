//! What a world is made of, before its time begins: hosts, VMs, storage, and what they are short of.

use std::collections::BTreeMap;
use std::time::Duration;

use mainstay::types::StorageFence;
use mainstay::types::power::FenceAt;
use mainstay::types::settings::{ForeignMigration, LateWrites, OnDoubt, Timing};

/// What the world is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Names of hosts.
    pub hosts: Vec<String>,
    /// Names of datastores.
    pub datastores: Vec<String>,
    /// VM, host that runs it at the beginning, datastore.
    pub vms: Vec<(String, String, String)>,
    /// VM, and whose disks it has; started by nobody.
    pub clones: Vec<(String, String)>,
    /// Late writes.
    pub fence: StorageFence,
    /// What if there is no fence.
    pub late_writes: LateWrites,
    /// Power switches: name, host, level.
    pub switches: Vec<(String, String, u8)>,
    /// When silent hosts are switched off.
    pub fence_at: FenceAt,
    /// How long the storage server keeps the state of a silent client; none = locks do not reach other hosts.
    pub locks: Option<Duration>,
    /// Profile.
    pub timing: Timing,
    /// What definitions say of doubt.
    pub on_doubt: Option<OnDoubt>,
    /// `virsh migrate` by people.
    pub foreign_migration: ForeignMigration,
    /// Everything random comes from it; 0 = nothing is random.
    pub seed: u64,
    /// Clocks with a rate of their own: host, parts per million by which it is fast.
    pub clocks: Vec<(String, i64)>,
    /// Order and places, in the words of `rules`.
    pub rules: Vec<String>,
    /// Memory in KiB of hosts and VMs, by name, which have another than all.
    pub memory: BTreeMap<String, u64>,
    /// Large pages of hosts, in KiB.
    pub pages: BTreeMap<String, u64>,
    /// What VMs need, in the words of `means`.
    pub needs: Vec<(String, String)>,
    /// What hosts have not, likewise.
    pub without: Vec<(String, String)>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            datastores: vec!["nfs".to_owned()],
            vms: Vec::new(),
            clones: Vec::new(),
            fence: StorageFence::Command { program: "/etc/mainstay/fence".to_owned() },
            late_writes: LateWrites::Exclude,
            switches: Vec::new(),
            fence_at: FenceAt::Lapse,
            locks: Some(Duration::from_secs(10)),
            timing: Timing::DEFAULT,
            on_doubt: None,
            foreign_migration: ForeignMigration::Allow,
            seed: 0,
            clocks: Vec::new(),
            rules: Vec::new(),
            memory: BTreeMap::new(),
            pages: BTreeMap::new(),
            needs: Vec::new(),
            without: Vec::new(),
        }
    }
}
