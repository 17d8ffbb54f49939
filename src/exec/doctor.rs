//! `mainstay doctor`: everything on a host that can be wrong, with its cure.
//!
//! ```text
//!  agent.rs ── AgentFacts ──┐
//!                           ├──► DoctorInput ── checks (pure) ──► findings, worst first
//!  system::gather ──────────┘
//!  (files below /proc, /sys, /etc and one child process, in one thread with a deadline)
//! ```
//!
//! Rules in numbers: gathering takes at most `GATHER_TIME`; a gatherer that hangs costs one thread in all, not one per
//! question. Every check gives at least one finding, also when all is well, so that a reader sees what was looked at.
//!
//! Deliberately not here: mending, and anything that decides about VMs. A finding never stops the cluster.

pub mod cluster;
pub mod host;
pub mod mounts;
mod power;
pub mod storage;
pub mod system;

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::StorageFence;
use crate::types::settings::LateWrites;
use system::SystemFacts;

/// How long reading the system may take.
pub const GATHER_TIME: Duration = Duration::from_secs(15);
/// Names listed in one finding; the rest is counted.
const NAMES_SHOWN: usize = 5;

/// How bad it is. The order is that of the listing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Something does not work, or would not when it is needed.
    Error,
    /// Works, with a risk or a delay that one should know.
    Warning,
    /// Looked at, well.
    Ok,
}

/// What one check found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// Which check; stable, for scripts.
    pub id: Cow<'static, str>,
    /// How bad.
    pub level: Level,
    /// The datastore, host or file concerned.
    pub object: String,
    /// What is so, for people.
    pub what: String,
    /// What to do; empty when nothing need be done.
    pub cure: String,
}

impl Finding {
    fn ok(id: &'static str, object: impl Into<String>, what: impl Into<String>) -> Self {
        Self { id: Cow::Borrowed(id), level: Level::Ok, object: object.into(), what: what.into(), cure: String::new() }
    }
    fn warning(id: &'static str, object: impl Into<String>, what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { level: Level::Warning, cure: cure.into(), ..Self::ok(id, object, what) }
    }
    fn error(id: &'static str, object: impl Into<String>, what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { level: Level::Error, cure: cure.into(), ..Self::ok(id, object, what) }
    }
}

/// What only the agent knows.
#[derive(Clone, PartialEq, Debug)]
pub struct AgentFacts {
    /// Name of the cluster; none = this host is no member yet.
    pub cluster: Option<String>,
    /// libvirt answers: its version, if known. Or what is wrong, as a sentence about libvirt.
    pub libvirt: Result<String, String>,
    /// The hook has asked since the libvirt daemon in use was started.
    pub hook_seen: bool,
    /// The guard.
    pub guard: GuardFact,
    /// Every other member.
    pub peers: Vec<PeerFact>,
    /// Every datastore of the settings.
    pub datastores: Vec<DatastoreFact>,
    /// Protected VMs that libvirt starts at boot, by name.
    pub autostart: Vec<String>,
    /// Every fence device of the settings.
    pub devices: Vec<DeviceFact>,
    /// Hosts without one, by name.
    pub without_device: Vec<String>,
    /// Nothing is done by itself: until when, and why.
    pub disarmed: Option<String>,
    /// What is wrong with the rules for VMs; only the master knows.
    pub rules: Vec<String>,
    /// What this host finds wrong with itself, and what is done about it.
    pub findings: Vec<String>,
}

/// A power switch as it answers this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceFact {
    /// Its name.
    pub name: String,
    /// The host that it switches.
    pub host: String,
    /// Why it is not used.
    pub distrusted: Option<String>,
    /// Whether it answers, or why not.
    pub answers: Result<(), String>,
}

/// The guard as the agent hears it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuardFact {
    /// It does not answer; why.
    Silent(String),
    /// It answers.
    Answers {
        /// Its enforcing thread has SCHED_FIFO and locked memory.
        real_time: bool,
        /// It was late by more than half of `reserve` in the last hour.
        late: bool,
    },
}

/// Another member as this host hears it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerFact {
    /// Its name.
    pub name: String,
    /// Milliseconds since its last network beat; none = never heard.
    pub beat_age_ms: Option<u64>,
    /// Its beats echo ours.
    pub hears_us: bool,
    /// Its clock of day minus ours, in milliseconds.
    pub skew_ms: Option<i64>,
}

/// A datastore as this host uses it.
#[derive(Clone, PartialEq, Debug)]
pub struct DatastoreFact {
    /// Its name.
    pub name: String,
    /// Its mount point.
    pub path: String,
    /// How late writes are excluded.
    pub fence: StorageFence,
    /// What happens when they are not.
    pub late_writes: LateWrites,
    /// Milliseconds that the last beat took to be written and read back; none = not done.
    pub round_trip_ms: Option<f64>,
    /// Trouble, in words.
    pub trouble: Option<String>,
    /// Other members whose beats were read there lately: proves that it is shared.
    pub peers_seen: usize,
}

/// Why there is nothing from the agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoFacts {
    /// It does not answer; why.
    Silent(String),
    /// It answers, but this host is no member of a cluster.
    NoMember,
}

/// Everything that the checks judge.
#[derive(Clone, PartialEq, Debug)]
pub struct DoctorInput {
    /// From the agent, or why there is nothing from it.
    pub agent: Result<AgentFacts, NoFacts>,
    /// Read from the system.
    pub system: SystemFacts,
}

/// Judges; worst first, otherwise in the order of the checks.
#[must_use]
pub fn checks(input: &DoctorInput) -> Vec<Finding> {
    let mut found = Vec::new();
    match &input.agent {
        Ok(agent) => {
            found.push(Finding::ok("agent", "mainstayd", "answers"));
            found.extend(host::libvirt(agent));
            found.extend(host::hook(Some(agent), &input.system));
            found.extend(host::autostart(agent));
            found.extend(cluster::guard(agent));
            found.extend(cluster::beats(agent));
            found.extend(cluster::clocks(agent));
            found.extend(storage::datastores(agent, &input.system));
            found.extend(power::devices(agent));
            found.extend(cluster::rules(agent));
            found.extend(host::health(agent));
        }
        Err(NoFacts::NoMember) => {
            found.push(Finding::ok("agent", "mainstayd", "answers"));
            found.push(cluster::no_member());
            found.extend(host::hook(None, &input.system));
        }
        Err(NoFacts::Silent(why)) => {
            found.push(Finding::error(
                "agent",
                "mainstayd",
                why.clone(),
                "systemctl status mainstayd, journalctl -u mainstayd; start it with: systemctl start mainstayd",
            ));
            found.extend(host::hook(None, &input.system));
        }
    }
    found.extend(host::lock_manager(&input.system));
    found.extend(host::libvirt_guests(&input.system));
    found.extend(host::machine(&input.system));
    found.extend(host::watchdog(&input.system));
    found.extend(host::screens(&input.system));
    found.extend(cluster::synchronised(&input.system));
    found.sort_by_key(|finding| finding.level);
    found
}

/// Set while a gathering thread has not come back.
static GATHERING: AtomicBool = AtomicBool::new(false);

/// Gathers and judges. `agent` is what the agent knows, or why it does not answer.
pub async fn examine(agent: Result<AgentFacts, String>) -> Vec<Finding> {
    gathered(agent.map_err(NoFacts::Silent)).await
}

/// The same on a host that is no member of a cluster yet: not an error.
pub async fn examine_stranger() -> Vec<Finding> {
    gathered(Err(NoFacts::NoMember)).await
}

async fn gathered(agent: Result<AgentFacts, NoFacts>) -> Vec<Finding> {
    let programs = agent.iter().flat_map(|facts| &facts.datastores).filter_map(|datastore| match &datastore.fence {
        StorageFence::Command { program } => Some(program.clone()),
        StorageFence::Lock | StorageFence::None => None,
    });
    let programs: Vec<String> = programs.collect();
    if GATHERING.swap(true, Ordering::AcqRel) {
        return hung(agent);
    }
    let (send, facts) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("doctor".to_owned()).spawn(move || {
        let facts = system::gather(std::path::Path::new("/"), &programs);
        GATHERING.store(false, Ordering::Release);
        // The asker may have stopped waiting.
        let _ = send.send(facts);
    });
    if thread.is_err() {
        GATHERING.store(false, Ordering::Release);
        return hung(agent);
    }
    match tokio::time::timeout(GATHER_TIME, facts).await {
        Ok(Ok(system)) => checks(&DoctorInput { agent, system }),
        Ok(Err(_)) | Err(_) => hung(agent),
    }
}

/// The system could not be read: says so, and judges what the agent knows.
fn hung(agent: Result<AgentFacts, NoFacts>) -> Vec<Finding> {
    let mut found = checks(&DoctorInput { agent, system: SystemFacts::default() });
    found.insert(
        0,
        Finding::error(
            "system",
            "this host",
            format!("reading its state took longer than {} s", GATHER_TIME.as_secs()),
            "look for processes in state D: ps -eo pid,stat,wchan:32,cmd | grep ' D'",
        ),
    );
    found
}

/// The first names, and how many more.
fn names<'names>(names: impl ExactSizeIterator<Item = &'names str>) -> String {
    let more = names.len().saturating_sub(NAMES_SHOWN);
    let mut text = names.take(NAMES_SHOWN).collect::<Vec<_>>().join(", ");
    if 0 < more {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests;
