//! When the cluster moves or stops VMs that run well: back to the hosts that they belong to, to make room for others, before their host
//! goes down.

use serde::{Deserialize, Serialize};

use super::super::guests::Glob;
use super::{BadRules, MAX_WAIT_S};

/// A host has been well for at most so long before VMs are brought back to it, in seconds: a day.
pub const MAX_WELL_S: u32 = 24 * 3600;

/// Some VMs belong to some hosts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailbackRule {
    /// Which VMs; of several rules the first that fits one counts.
    pub vms: Vec<Glob>,
    /// Any of these is as good as another.
    pub hosts: Vec<Glob>,
    /// They are brought back to one that has been well for so many seconds.
    #[serde(default = "after_s")]
    pub after_s: u32,
}

fn after_s() -> u32 {
    600
}

/// VMs of the priority `lowest` make room for those of higher ones that have no place.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoomRules {
    /// These may be moved to another host.
    #[serde(rename = "move")]
    pub moved: Vec<Glob>,
    /// These may be stopped, if they have no other place.
    #[serde(rename = "stop")]
    pub stopped: Vec<Glob>,
    /// The guest's time to shut down; then it is powered off.
    pub within_s: u32,
}

impl Default for RoomRules {
    fn default() -> Self {
        Self { moved: Vec::new(), stopped: Vec::new(), within_s: 60 }
    }
}

impl RoomRules {
    /// Nobody makes room.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.moved.is_empty() && self.stopped.is_empty()
    }
}

/// What becomes of VMs whose host goes down in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtShutdown {
    /// They end with it, and are started on other hosts.
    #[default]
    Release,
    /// They are moved to other hosts first, as far as there is time and room.
    Evacuate,
}

/// Before a host goes down.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownRules {
    /// What becomes of its VMs.
    pub vms: AtShutdown,
    /// It waits at most so many seconds for their moves.
    pub within_s: u32,
}

impl Default for ShutdownRules {
    fn default() -> Self {
        Self { vms: AtShutdown::default(), within_s: 300 }
    }
}

/// Whether they make sense.
pub(super) fn check(failbacks: &[FailbackRule], room: &RoomRules, shutdown: &ShutdownRules) -> Result<(), BadRules> {
    if let Some(n) = failbacks.iter().position(|rule| MAX_WELL_S < rule.after_s) {
        return Err(BadRules::Well { number: n + 1 });
    }
    for (what, within_s) in [("room", room.within_s), ("shutdown", shutdown.within_s)] {
        if !(1..=MAX_WAIT_S).contains(&within_s) {
            return Err(BadRules::Within { what });
        }
    }
    Ok(())
}
