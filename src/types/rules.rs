//! What an administrator wants of VMs beyond running, one part of the cluster's settings: which come first, which wait for others, which
//! belong together, and what has to stay free for a failure.
//!
//! ```text
//!  priority     highest ─► high ─► medium ─► low ─► lowest          never: is not restarted
//!  dependency   app waits for db until it is ready, at most so long
//!  affinity     together | apart, must | should           between VMs
//!  placement    only | not, must | should                 between VMs and hosts
//!  health       tell | quarantine | evacuate              by what a host finds wrong with itself
//!  isolation    what a host that is cut off does: leave | shut down | power off
//!  admission    what a start must leave free          floor: and how much CPU
//!  failback     the hosts that VMs belong to
//!  room         who makes room for those of higher priority
//!  shutdown     of a host: its VMs are released | evacuated
//!  limits       starts at once, vCPUs for each CPU
//! ```
//!
//! VMs are named by patterns: they come and go, and a rule stays. What a rule means for the VMs of now is in `core/placement/rules.rs`.

mod moves;

use serde::{Deserialize, Serialize};

use super::finding::{HealthAction, Source};
use super::guests::Glob;
pub use moves::{AtShutdown, FailbackRule, RoomRules, ShutdownRules};

/// A document holds at most so many rules of each kind.
pub const MAX_RULES: usize = 256;
/// Longest time that one VM waits for another, in seconds.
pub const MAX_WAIT_S: u32 = 3600;

/// Who comes first when not all can be started at once, or at all.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Priority {
    /// Before all others.
    Highest,
    /// Before most.
    High,
    /// If nothing is said.
    #[default]
    Medium,
    /// After most.
    Low,
    /// After all others; may be stopped to make room for them, where that is allowed.
    Lowest,
    /// Is not restarted.
    Never,
}

impl Priority {
    /// All, the first first.
    pub const ALL: [Self; 6] = [Self::Highest, Self::High, Self::Medium, Self::Low, Self::Lowest, Self::Never];

    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Highest => "highest",
            Self::High => "high",
            Self::Medium => "medium",
            Self::Low => "low",
            Self::Lowest => "lowest",
            Self::Never => "never",
        }
    }
}

/// Whether a rule may be broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Force {
    /// A VM rather waits.
    Must,
    /// It is broken before a VM waits.
    #[default]
    Should,
}

/// What a rule between VMs wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tie {
    /// On one host.
    Together,
    /// On a host each.
    Apart,
}

/// What a rule between VMs and hosts wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Where {
    /// On these hosts.
    Only,
    /// On others.
    Not,
}

/// When a VM that others wait for is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ready {
    /// It was started.
    #[default]
    Started,
    /// The agent inside was heard.
    Agent,
    /// An application inside has said that it is ready.
    Application,
}

/// Who comes first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorityRule {
    /// Which VMs; of several rules the first that fits one counts.
    pub vms: Vec<Glob>,
    /// Their priority.
    pub priority: Priority,
}

/// Some VMs wait for others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DependencyRule {
    /// Who waits.
    pub vms: Vec<Glob>,
    /// For all of these.
    pub after: Vec<Glob>,
    /// Until when.
    #[serde(default)]
    pub ready: Ready,
    /// And so many seconds more.
    #[serde(default)]
    pub delay_s: u32,
    /// At most so many seconds, from when nothing else keeps it from starting; then it starts, and that is said.
    #[serde(default = "within_s")]
    pub within_s: u32,
}

fn within_s() -> u32 {
    600
}

/// A rule between VMs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AffinityRule {
    /// Which VMs.
    pub vms: Vec<Glob>,
    /// How.
    pub tie: Tie,
    /// How strictly.
    #[serde(default)]
    pub force: Force,
}

/// A rule between VMs and hosts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostRule {
    /// Which VMs.
    pub vms: Vec<Glob>,
    /// Which hosts.
    pub hosts: Vec<Glob>,
    /// How.
    pub place: Where,
    /// How strictly.
    #[serde(default)]
    pub force: Force,
}

/// What an isolated host does with a VM that runs there, while another is seen alive on the VM's datastore.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// It runs on.
    #[default]
    Leave,
    /// Its guest is asked to shut down; after so many seconds it is powered off.
    Shutdown {
        /// 1 to `MAX_WAIT_S`.
        within_s: u32,
    },
    /// It is powered off at once.
    PowerOff,
}

/// What an isolated host does with some VMs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IsolationRule {
    /// Which VMs; of several rules the first that fits one counts.
    pub vms: Vec<Glob>,
    /// What is done.
    pub response: Response,
}

/// What is done about what hosts find wrong with themselves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthRule {
    /// What finds it; of several rules for one source the first counts.
    pub source: Source,
    /// What is done.
    pub action: HealthAction,
}

/// What a start must leave possible.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Admission {
    /// Nothing.
    #[default]
    Off,
    /// Any so many hosts may fail, and all VMs find a place on the others.
    HostFailures(u32),
    /// So many percent of memory and CPUs of all hosts stay free.
    Percent(u32),
    /// These hosts run nothing until another fails.
    Dedicated(Vec<Glob>),
}

/// How much slower VMs may become by the failures that admission control foresees.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Floor {
    /// A VM has one CPU for each of its vCPUs, less at most so many percent, were all of them busy.
    pub cpu_loss_percent: u32,
}

/// How much at once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Starts at once on one host.
    pub starts_per_host: u32,
    /// Starts at once from one datastore.
    pub starts_per_datastore: u32,
    /// Planned moves at once away from one host, or back to it. Two share a wire, and each takes longer to come to its switch.
    pub moves_per_host: u32,
    /// vCPUs of VMs for each logical CPU of a host; none = any number.
    pub vcpus_per_cpu: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { starts_per_host: 4, starts_per_datastore: 16, moves_per_host: 1, vcpus_per_cpu: None }
    }
}

/// The document.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmRules {
    /// Who comes first.
    #[serde(rename = "priority")]
    pub priorities: Vec<PriorityRule>,
    /// Who waits for whom.
    #[serde(rename = "dependency")]
    pub dependencies: Vec<DependencyRule>,
    /// VMs and VMs.
    #[serde(rename = "affinity")]
    pub affinities: Vec<AffinityRule>,
    /// VMs and hosts.
    #[serde(rename = "placement")]
    pub placements: Vec<HostRule>,
    /// What an isolated host does.
    #[serde(rename = "isolation")]
    pub isolations: Vec<IsolationRule>,
    /// What is done about what hosts find wrong with themselves.
    pub health: Vec<HealthRule>,
    /// What a start must leave possible.
    pub admission: Admission,
    /// And how much CPU.
    pub floor: Option<Floor>,
    /// The hosts that VMs belong to.
    #[serde(rename = "failback")]
    pub failbacks: Vec<FailbackRule>,
    /// Who makes room.
    pub room: RoomRules,
    /// Before a host goes down.
    pub shutdown: ShutdownRules,
    /// How much at once.
    pub limits: Limits,
}

/// Why a document is refused, whatever VMs there are.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadRules {
    /// Too many.
    #[error("at most {MAX_RULES} rules of a kind, not {count} of {kind}")]
    Many {
        /// `priority`, `dependency`, `affinity` or `placement`.
        kind: &'static str,
        /// How many.
        count: usize,
    },
    /// A rule about nothing.
    #[error("{kind} rule {number} names no {what}")]
    Empty {
        /// Which kind of rule.
        kind: &'static str,
        /// From one.
        number: usize,
        /// What is missing.
        what: &'static str,
    },
    /// A VM would wait too long, or not at all.
    #[error("dependency rule {number}: within_s and delay_s are 1 to {MAX_WAIT_S} and 0 to {MAX_WAIT_S} seconds")]
    Wait {
        /// From one.
        number: usize,
    },
    /// A guest would have no time, or too much.
    #[error("isolation rule {number}: within_s is 1 to {MAX_WAIT_S} seconds")]
    Shutdown {
        /// From one.
        number: usize,
    },
    /// No start at all.
    #[error("{what} has to be 1 or more")]
    Nothing {
        /// Which limit.
        what: &'static str,
    },
    /// Not a share.
    #[error("admission: percent is 1 to 99, not {0}")]
    Percent(u32),
    /// No share, or of nothing.
    #[error("floor: cpu_loss_percent is 0 to 99, and needs admission = {{ host-failures = N }}")]
    Floor,
    /// VMs would never be brought back.
    #[error("failback rule {number}: after_s is 0 to {MAX_WELL_S} seconds", MAX_WELL_S = moves::MAX_WELL_S)]
    Well {
        /// From one.
        number: usize,
    },
    /// A guest, or a host, would have no time, or too much.
    #[error("{what}: within_s is 1 to {MAX_WAIT_S} seconds")]
    Within {
        /// `room` or `shutdown`.
        what: &'static str,
    },
}

impl VmRules {
    /// What is done about what a source finds.
    #[must_use]
    pub fn action(&self, source: Source) -> HealthAction {
        let rule = self.health.iter().find(|rule| rule.source == source);
        rule.map_or(source.usual_action(), |rule| rule.action)
    }

    /// Whether it makes sense, whatever VMs there are.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn check(&self) -> Result<(), BadRules> {
        let names = |globs: &[Glob]| !globs.is_empty();
        let kinds = [
            ("priority", self.priorities.len()),
            ("dependency", self.dependencies.len()),
            ("affinity", self.affinities.len()),
            ("placement", self.placements.len()),
            ("isolation", self.isolations.len()),
            ("failback", self.failbacks.len()),
            ("room", self.room.moved.len().max(self.room.stopped.len())),
            ("health", self.health.len()),
        ];
        if let Some((kind, count)) = kinds.into_iter().find(|(_, count)| MAX_RULES < *count) {
            return Err(BadRules::Many { kind, count });
        }
        let priorities = self.priorities.iter().map(|rule| ("priority", "VMs", names(&rule.vms)));
        all_named(priorities)?;
        all_named(self.dependencies.iter().map(|rule| ("dependency", "VMs", names(&rule.vms))))?;
        all_named(self.dependencies.iter().map(|rule| ("dependency", "VMs to wait for", names(&rule.after))))?;
        all_named(self.affinities.iter().map(|rule| ("affinity", "VMs", names(&rule.vms))))?;
        all_named(self.placements.iter().map(|rule| ("placement", "VMs", names(&rule.vms))))?;
        all_named(self.placements.iter().map(|rule| ("placement", "hosts", names(&rule.hosts))))?;
        all_named(self.isolations.iter().map(|rule| ("isolation", "VMs", names(&rule.vms))))?;
        all_named(self.failbacks.iter().map(|rule| ("failback", "VMs", names(&rule.vms))))?;
        all_named(self.failbacks.iter().map(|rule| ("failback", "hosts", names(&rule.hosts))))?;
        moves::check(&self.failbacks, &self.room, &self.shutdown)?;
        let waits = |rule: &DependencyRule| (1..=MAX_WAIT_S).contains(&rule.within_s) && rule.delay_s <= MAX_WAIT_S;
        if let Some(n) = self.dependencies.iter().position(|rule| !waits(rule)) {
            return Err(BadRules::Wait { number: n + 1 });
        }
        let in_time = |rule: &IsolationRule| match rule.response {
            Response::Leave | Response::PowerOff => true,
            Response::Shutdown { within_s } => (1..=MAX_WAIT_S).contains(&within_s),
        };
        if let Some(n) = self.isolations.iter().position(|rule| !in_time(rule)) {
            return Err(BadRules::Shutdown { number: n + 1 });
        }
        self.check_amounts()
    }

    fn check_amounts(&self) -> Result<(), BadRules> {
        let foreseen = matches!(self.admission, Admission::HostFailures(_));
        if self.floor.is_some_and(|floor| 99 < floor.cpu_loss_percent || !foreseen) {
            return Err(BadRules::Floor);
        }
        let hosts = match &self.admission {
            Admission::Off => 1,
            Admission::HostFailures(hosts) => *hosts as usize,
            Admission::Percent(percent) if !(1..100).contains(percent) => return Err(BadRules::Percent(*percent)),
            Admission::Percent(_) => 1,
            Admission::Dedicated(hosts) => hosts.len(),
        };
        let amounts = [
            ("admission: hosts", hosts),
            ("limits: starts_per_host", self.limits.starts_per_host as usize),
            ("limits: starts_per_datastore", self.limits.starts_per_datastore as usize),
            ("limits: moves_per_host", self.limits.moves_per_host as usize),
            ("limits: vcpus_per_cpu", self.limits.vcpus_per_cpu.unwrap_or(1) as usize),
        ];
        match amounts.into_iter().find(|(_, amount)| *amount == 0) {
            Some((what, _)) => Err(BadRules::Nothing { what }),
            None => Ok(()),
        }
    }
}

fn all_named(rules: impl Iterator<Item = (&'static str, &'static str, bool)>) -> Result<(), BadRules> {
    for (n, (kind, what, named)) in rules.enumerate() {
        if !named {
            return Err(BadRules::Empty { kind, number: n + 1, what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
