//! Virtual time: what will happen, and whose death or freeze keeps it from happening.
//!
//! Every item has a gate: the process that it happens in. If that process has died, the item is dropped; if its host is
//! frozen, the item waits for the thaw. Items of one instant happen in the order in which they were made.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use mainstay::types::power::PowerSettings;
use mainstay::types::settings::{ClusterSettings, DatastoreSettings, MemberSettings, OnDoubt, VmDefaults};
use mainstay::types::vm::DomainFailure;
use mainstay::types::{ClusterId, DatastoreId, DiskNeed, HostId, HostIndex, StorageFence, Time, VmId, VmRecord};
use uuid::Uuid;

use super::agenda::Agenda;
use super::datastore::Datastore;
use super::faults::{Sick, Weather};
use super::host::{Host, MEMORY_KIB};
use super::invariants::Judge;
use super::means::Short;
use super::network::Links;
use super::people::Waiter;
use super::power::{Switch, device};
use super::setup::Setup;

/// Items in one simulated second: far more than nine hosts have reason for.
const EVENTS_MAX: u32 = 300_000;

/// Index of a host in the world.
pub type H = usize;

/// What is done when an item's time has come.
pub type Work = Box<dyn FnOnce(&mut World)>;

/// In which process something happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gate {
    /// Outside all hosts: network, storage server, people.
    World,
    /// In this boot of a host.
    Kernel(H, u64),
    /// In this agent.
    Agent(H, u64),
    /// In this guard.
    Guard(H, u64),
    /// In this libvirtd.
    Libvirt(H, u64),
}

impl Gate {
    /// The host, if it is in one.
    pub fn host(self) -> Option<H> {
        match self {
            Self::World => None,
            Self::Kernel(h, _) | Self::Agent(h, _) | Self::Guard(h, _) | Self::Libvirt(h, _) => Some(h),
        }
    }
}

/// Something that will happen.
pub struct Item {
    /// When.
    pub at: u64,
    /// Where.
    pub gate: Gate,
    /// What.
    pub work: Work,
}

/// One VM of the world.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// What its definition says.
    pub record: VmRecord,
    /// Whose disks it has: its own, unless it is a clone.
    pub disks_of: VmId,
}

/// Time that a world has to become a cluster before a story begins.
pub const SETTLING: Duration = Duration::from_secs(30);

/// Everything.
pub struct World {
    /// Nanoseconds of the world's time.
    pub now: u64,
    /// The present second, and how many items happened in it.
    second: (u64, u32),
    /// How many events have happened.
    pub events: u64,
    /// Rises whenever a copy may have begun to run, or stopped.
    pub changes: u64,
    lives: u64,
    random: u64,
    /// Whether latencies vary.
    pub jitter: bool,
    agenda: Agenda,
    /// Hosts.
    pub hosts: Vec<Host>,
    /// Who hears whom.
    pub links: Links,
    /// Shared storage.
    pub stores: BTreeMap<DatastoreId, Datastore>,
    /// VMs.
    pub vms: BTreeMap<VmId, Spec>,
    /// As the cluster was founded.
    pub settings: ClusterSettings,
    /// Who waits for an agent's answer.
    pub waiters: BTreeMap<u64, Waiter>,
    /// Orders of agents that were not answered yet.
    pub open: BTreeSet<(H, u64, u64)>,
    /// The story, line by line.
    pub story: Vec<String>,
    /// What the judge knows.
    pub judge: Judge,
    /// Power switches that do not just work.
    pub switches: BTreeMap<String, Switch>,
    /// Storage fences fail.
    pub fence_fails: bool,
    /// Migrations break in the middle.
    pub migrations_fail: bool,
    /// A target's last word never reaches the source.
    pub answers_lost: bool,
    /// Starts fail on these hosts, and why.
    pub starts_fail: BTreeMap<H, DomainFailure>,
    /// Guests that do not listen when they are asked to shut down.
    pub deaf: BTreeSet<VmId>,
    /// QEMUs that libvirt is told to end do not.
    pub stops_fail: bool,
    /// How long writes outlive a long break of their host's path, where that is not left to chance.
    pub linger: Duration,
    /// Who had written to disks when the last copies of all datastores were made.
    pub copied: Option<BTreeMap<(VmId, H), u64>>,
    /// How the storage path of each host is sick.
    pub sick: Vec<Sick>,
    /// How the network is sick.
    pub weather: Weather,
    /// Lines of the story that belong to the settling.
    pub told: usize,
    /// Every step of every agent is told.
    pub trace: bool,
    /// Verdicts are told, with their evidence.
    pub verdicts: bool,
    /// Agents are recorded.
    pub tapes: Option<super::recorded::Tapes>,
    /// Saved memory on shared storage, by file.
    pub files: BTreeMap<String, super::images::Image>,
    /// How often the definition of each VM was changed, anywhere.
    pub edits: BTreeMap<VmId, u32>,
    /// What the n-th change of a definition has made of its policy.
    pub policies: BTreeMap<(VmId, u32), Option<OnDoubt>>,
    /// Where the n-th change of a definition has its disks.
    pub places: BTreeMap<(VmId, u32), DatastoreId>,
    /// What hosts have not, and what is wrong with them.
    pub short: Short,
}

/// Each datastore has a program of its own.
fn fence_of(fence: &StorageFence, n: usize, name: &str) -> StorageFence {
    match fence {
        StorageFence::Command { program } if 0 < n => StorageFence::Command { program: format!("{program}-{name}") },
        StorageFence::Command { .. } | StorageFence::Lock | StorageFence::None => fence.clone(),
    }
}

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// An id that says what it is.
pub fn id(kind: u128, n: usize) -> Uuid {
    Uuid::from_u128((kind << 64) | (n as u128 + 1))
}

impl World {
    /// Hosts are off.
    pub fn new(setup: &Setup) -> Self {
        let members = setup.hosts.iter().enumerate().map(|(n, name)| MemberSettings {
            index: HostIndex(n as u8),
            host: HostId(id(0xa, n)),
            name: name.clone(),
            control: format!("10.0.0.{}:16525", n + 1).parse().unwrap(),
            migration_uri: name.clone(),
            released: 0,
        });
        let datastores = setup.datastores.iter().enumerate().map(|(n, name)| DatastoreSettings {
            id: DatastoreId(id(0xd, n)),
            name: name.clone(),
            path: format!("/srv/{name}"),
            fence: fence_of(&setup.fence, n, name),
            late_writes: setup.late_writes,
            accepted: 0,
        });
        let id_of = |name: &String| HostId(id(0xa, setup.hosts.iter().position(|host| host == name).expect("a host")));
        let devices = setup.switches.iter().map(|(name, host, level)| device(name, id_of(host), *level));
        let settings = ClusterSettings {
            schema: 1,
            version: 1,
            cluster: ClusterId(id(0xc, 0)),
            name: "sim".to_owned(),
            timing: setup.timing,
            members: members.collect(),
            datastores: datastores.collect(),
            vms: VmDefaults::default(),
            power: PowerSettings { fence_at: setup.fence_at, devices: devices.collect() },
            foreign_migration: setup.foreign_migration,
            guests: Default::default(),
            rules: super::rules::read(&setup.rules),
            maintenance: Vec::new(),
            disarmed: None,
        };
        let stores = settings.datastores.iter().map(|d| (d.id, Datastore::new(&settings, d.id, setup.locks)));
        let mut world = Self {
            now: 0,
            second: (0, 0),
            events: 0,
            changes: 0,
            lives: 0,
            random: setup.seed,
            jitter: setup.seed != 0,
            agenda: Agenda::default(),
            hosts: Vec::new(),
            links: Links::default(),
            stores: stores.collect(),
            vms: BTreeMap::new(),
            settings: settings.clone(),
            waiters: BTreeMap::new(),
            open: BTreeSet::new(),
            story: Vec::new(),
            judge: Judge::default(),
            switches: BTreeMap::new(),
            fence_fails: false,
            migrations_fail: false,
            answers_lost: false,
            starts_fail: BTreeMap::new(),
            deaf: BTreeSet::new(),
            stops_fail: false,
            linger: Duration::ZERO,
            copied: None,
            sick: vec![Sick::default(); setup.hosts.len()],
            weather: Weather::default(),
            told: 0,
            trace: false,
            verdicts: false,
            tapes: None,
            files: BTreeMap::new(),
            edits: BTreeMap::new(),
            policies: BTreeMap::new(),
            places: BTreeMap::new(),
            short: Short::default(),
        };
        for (n, member) in settings.members.iter().enumerate() {
            // Clocks of different hosts have nothing to do with each other; where they have time to go apart, they are as
            // wrong as rho allows.
            let worst = Duration::from_secs(15) <= setup.timing.lease;
            let rate = match if world.jitter { world.dice(4) } else { 4 } {
                0 => -1000,
                1 => 1000,
                2 if worst => -1000,
                3 if worst => 1000,
                2 | 3 => world.dice(2001) as i64 - 1000,
                _ => 0,
            };
            let own = setup.clocks.iter().find(|(host, _)| *host == member.name).map(|(_, rate)| *rate);
            let rate = own.unwrap_or(rate);
            let memory = setup.memory.get(&member.name).copied().unwrap_or(MEMORY_KIB);
            world.hosts.push(Host::new(n, member.clone(), settings.clone(), rate, memory));
            world.equip(setup, n, &member.name);
        }
        for (n, (name, _, store)) in setup.vms.iter().enumerate() {
            let spec = world.spec(setup, n, name, store);
            world.vms.insert(spec.id, spec);
        }
        for (n, (name, of)) in setup.clones.iter().enumerate() {
            let mut spec = world.spec(setup, setup.vms.len() + n, name, &setup.datastores[0]);
            let original = world.vms[&world.vm(of).expect("a VM of the world")].clone();
            spec.record.disks = original.record.disks;
            spec.disks_of = original.id;
            world.vms.insert(spec.id, spec);
        }
        world
    }

    fn spec(&self, setup: &Setup, n: usize, name: &str, store: &str) -> Spec {
        let vm = VmId(id(0xf, n));
        let home = self.settings.datastores.iter().find(|d| d.name == store).expect("a datastore of the world").id;
        let disk = DiskNeed {
            path: format!("/srv/{store}/{name}.img"),
            datastore: Some(home),
            writable: true,
            optional: false,
            shareable: false,
        };
        let record = VmRecord {
            vm,
            name: name.to_owned(),
            home,
            xml: name.to_owned(),
            memory_kib: setup.memory.get(name).copied().unwrap_or(1 << 20),
            vcpus: 1,
            disks: vec![disk],
            needs: super::means::needs(&setup.needs, name),
            gaps: Vec::new(),
            on_doubt: setup.on_doubt,
        };
        Spec { id: vm, name: name.to_owned(), record, disks_of: vm }
    }

    // ---- time ---------------------------------------------------------------------------------------------------

    /// Lets something happen after a while.
    pub fn after(&mut self, gate: Gate, delay: Duration, work: impl FnOnce(&mut Self) + 'static) {
        let at = self.now + nanos(delay);
        self.at(gate, at, work);
    }

    /// Lets something happen at a time.
    pub fn at(&mut self, gate: Gate, at: u64, work: impl FnOnce(&mut Self) + 'static) {
        self.agenda.put(Item { at: at.max(self.now), gate, work: Box::new(work) });
    }

    /// Nobody may spin: in one simulated second not more happens than the largest cluster has reason for.
    fn count_event(&mut self) {
        let second = self.now / nanos(Duration::from_secs(1));
        self.second = if self.second.0 == second { (second, self.second.1 + 1) } else { (second, 1) };
        if self.second.1 == EVENTS_MAX {
            self.violated(&format!("{EVENTS_MAX} things happen within a second: somebody spins"));
        }
    }

    /// Lets everything up to a time happen, or up to the first violation of an invariant.
    pub fn run_until(&mut self, until: u64) {
        while self.judge.verdict.is_none() {
            let Some(item) = self.agenda.next(until) else { break };
            self.now = self.now.max(item.at);
            self.count_event();
            self.happen(item);
        }
        self.now = self.now.max(until);
    }

    fn happen(&mut self, item: Item) {
        if !self.lives(item.gate) {
            return;
        }
        let Some(item) = self.held(item) else { return };
        let host = item.gate.host();
        self.events += 1;
        (item.work)(self);
        self.look(host);
    }

    /// What was held back happens now, in order, and before all else that this instant brings.
    pub fn release(&mut self, backlog: Vec<Item>) {
        backlog.into_iter().for_each(|item| self.happen(item));
    }

    /// Whether the process of a gate still lives.
    pub fn lives(&self, gate: Gate) -> bool {
        match gate {
            Gate::World => true,
            Gate::Kernel(h, life) => self.hosts[h].life == Some(life),
            Gate::Agent(h, life) => self.hosts[h].agent.as_ref().is_some_and(|agent| agent.life == life),
            Gate::Guard(h, life) => self.hosts[h].guard.as_ref().is_some_and(|guard| guard.life == life),
            Gate::Libvirt(h, life) => self.hosts[h].libvirtd == Some(life),
        }
    }

    /// A number that no process, boot or question had before.
    pub fn new_life(&mut self) -> u64 {
        self.lives += 1;
        self.lives
    }

    /// What a host's CLOCK_BOOTTIME shows.
    pub fn local(&self, h: H) -> Time {
        self.hosts[h].clock.at(self.now)
    }

    /// A latency; in random worlds it varies up to threefold.
    pub fn latency(&mut self, micros: u64) -> Duration {
        let extra = if self.jitter { self.dice(2 * micros) } else { 0 };
        Duration::from_micros(micros + extra)
    }

    /// A random number below a limit (splitmix64).
    pub fn dice(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.random) % below.max(1)
    }

    /// The same, for what happens seldom: it leaves the dice as they lie, so that stories without it stay as they were.
    pub fn chance(&self, below: u64) -> u64 {
        mixed(self.random ^ self.now.rotate_left(32)) % below.max(1)
    }

    // ---- story --------------------------------------------------------------------------------------------------

    /// One line of the story: time, who, what.
    pub fn tell(&mut self, who: &str, what: &str) {
        let millis = self.now as i64 / 1_000_000 - SETTLING.as_millis() as i64;
        let mut line = String::new();
        let sign = if millis < 0 { "-" } else { "" };
        let at = format!("{sign}{}.{:03}", millis.abs() / 1000, millis.abs() % 1000);
        write!(line, "{at:>7} {who:<2} {what}").expect("strings can be written to");
        self.story.push(line);
    }

    /// Host by name.
    pub fn host(&self, name: &str) -> Option<H> {
        self.hosts.iter().position(|host| host.name == name)
    }

    /// Host by id.
    pub fn host_of(&self, id: HostId) -> Option<H> {
        self.hosts.iter().position(|host| host.id == id)
    }

    /// VM by name.
    pub fn vm(&self, name: &str) -> Option<VmId> {
        self.vms.values().find(|spec| spec.name == name).map(|spec| spec.id)
    }

    /// Name of a VM.
    pub fn vm_name(&self, vm: VmId) -> String {
        self.vms.get(&vm).map_or_else(|| vm.to_string(), |spec| spec.name.clone())
    }
}

/// A span in whole nanoseconds.
pub fn nanos(span: Duration) -> u64 {
    span.as_nanos() as u64
}
