//! What the cluster does about what guests say: rules, permissions and limits, one part of the cluster's settings.
//!
//! Patterns are checked when they are read: a document with a bad one is refused as a whole.

mod monitors;
mod patterns;

use std::fmt;

use mainstay_guest::message::{ReportId, Severity, Verdict};
use serde::{Deserialize, Serialize};

use self::monitors::all_watched;
pub use self::monitors::{Monitor, Preset, Watchfulness};
pub use self::patterns::{BadPattern, Glob, MAX_PATTERN, Pattern};
use super::failure::FailureAsk;
use super::{Time, VmId};

/// A document holds at most so many rules, and so many permissions.
pub const MAX_RULES: usize = 256;
/// Longest time for a dump, in seconds.
pub const MAX_DUMP_S: u32 = 600;

/// What is done to a VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remedy {
    /// libvirt's reset: the same QEMU starts its firmware again.
    Reset,
    /// The guest is asked to reboot; after its time-out a reset.
    Reboot,
    /// QEMU ends and is started again, on the same host if that can.
    PowerCycle,
    /// The same, and then it moves to another host.
    RestartElsewhere,
    /// A live migration to another host.
    Migrate,
    /// Paused, for people to look at.
    Suspend,
    /// Its memory is written to disk, for people to look at; it stands meanwhile, and goes on.
    Dump,
}

impl Remedy {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Reset, Self::Reboot, Self::PowerCycle, Self::RestartElsewhere, Self::Migrate, Self::Suspend, Self::Dump];

    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Reboot => "reboot",
            Self::PowerCycle => "power-cycle",
            Self::RestartElsewhere => "restart-elsewhere",
            Self::Migrate => "migrate",
            Self::Suspend => "suspend",
            Self::Dump => "dump",
        }
    }

    /// Whether the guest loses its state.
    #[must_use]
    pub fn starts_anew(self) -> bool {
        match self {
            Self::Reset | Self::Reboot | Self::PowerCycle | Self::RestartElsewhere => true,
            Self::Migrate | Self::Suspend | Self::Dump => false,
        }
    }

    /// Whether it counts against the limit: what can be done again and again without end. A guest that stands asks for nothing, and
    /// dumps have a pace of their own.
    #[must_use]
    pub fn counts(self) -> bool {
        match self {
            Self::Reset | Self::Reboot | Self::PowerCycle | Self::RestartElsewhere | Self::Migrate => true,
            Self::Suspend | Self::Dump => false,
        }
    }

    /// Whether the VM runs on another host afterwards.
    #[must_use]
    pub fn leaves(self) -> bool {
        match self {
            Self::RestartElsewhere | Self::Migrate => true,
            Self::Reset | Self::Reboot | Self::PowerCycle | Self::Suspend | Self::Dump => false,
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What follows from a message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consequence {
    /// It is noted.
    Note,
    /// What the message asks for; noted if it asks for nothing.
    AsAsked,
    /// Something is done to the VM that sent it.
    Own(Remedy),
    /// Something is done to another VM, by its name.
    Other {
        /// Its name.
        vm: String,
        /// What.
        remedy: Remedy,
    },
    /// A program of the administrator is run on the host of the VM that sent it: an absolute path there.
    Hook(String),
}

/// One rule. The first that fits decides.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The message's kind.
    #[serde(default = "Glob::any")]
    pub kind: Glob,
    /// The sender's name.
    #[serde(default = "Glob::any")]
    pub vm: Glob,
    /// At least this bad.
    #[serde(default = "least")]
    pub severity: Severity,
    /// Found in its text.
    #[serde(default)]
    pub message: Option<Pattern>,
    /// So many messages that fit it, of this VM, within the window: only then.
    #[serde(default = "one")]
    pub count: u32,
    /// The window, in seconds.
    #[serde(default = "minute")]
    pub within_s: u32,
    /// What follows.
    pub then: Consequence,
}

/// Lets other VMs ask for something that is done to a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Permission {
    /// The VM to which it is done.
    pub target: Glob,
    /// Those who may ask.
    pub by: Glob,
    /// For what.
    pub remedy: Remedy,
    /// So many different VMs have to ask within the window.
    #[serde(default = "one")]
    pub votes: u32,
    /// The window, in seconds.
    #[serde(default = "minute")]
    pub within_s: u32,
}

/// How often a VM may be started anew by rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Within an hour; then it needs attention.
    pub resets_per_hour: u32,
    /// Seconds before the second one; doubled before each that follows.
    pub backoff_s: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { resets_per_hour: 3, backoff_s: 30 }
    }
}

/// How much of guests' memory is written to disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dumps {
    /// MiB that the dumps of all guests of one host may take together, the oldest go; a guest that has more memory gets none.
    pub mib: u32,
    /// Seconds after which one that is not whole is given up; its guest stands meanwhile. At most [`MAX_DUMP_S`].
    pub within_s: u32,
}

impl Default for Dumps {
    fn default() -> Self {
        Self { mib: 8192, within_s: 120 }
    }
}

/// The part of the settings.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSettings {
    /// In this order.
    #[serde(default, rename = "rule")]
    pub rules: Vec<Rule>,
    /// In any order.
    #[serde(default, rename = "permission")]
    pub permissions: Vec<Permission>,
    /// Of every VM.
    #[serde(default)]
    pub limits: Limits,
    /// Of every host.
    #[serde(default)]
    pub dumps: Dumps,
    /// In this order.
    #[serde(default = "all_watched", rename = "monitor")]
    pub monitors: Vec<Monitor>,
}

impl GuestSettings {
    /// How the guest of this name is watched, if it is.
    #[must_use]
    pub fn watchfulness(&self, name: &str) -> Option<Watchfulness> {
        self.monitors.iter().find(|monitor| monitor.vm.fits(name))?.times()
    }

    /// What cannot be used, for people.
    ///
    /// # Errors
    /// More rules or permissions than fit; one that could never apply.
    pub fn check(&self) -> Result<(), String> {
        if [self.rules.len(), self.permissions.len(), self.monitors.len()].iter().any(|count| MAX_RULES < *count) {
            return Err(format!("at most {MAX_RULES} rules, and as many permissions and monitors"));
        }
        let at_once = |monitor: &Monitor| [monitor.silence_s, monitor.io_s, monitor.screen_s].contains(&Some(0));
        if let Some(n) = self.monitors.iter().position(at_once) {
            return Err(format!("monitor {}: silence_s, io_s and screen_s are at least 1", n + 1));
        }
        if self.dumps.within_s == 0 || MAX_DUMP_S < self.dumps.within_s {
            return Err(format!("dumps: within_s is 1 to {MAX_DUMP_S}"));
        }
        let unfit = |then: &Consequence| match then {
            Consequence::Hook(path) => !path.starts_with('/') || path.chars().any(char::is_control),
            Consequence::Note | Consequence::AsAsked | Consequence::Own(_) | Consequence::Other { .. } => false,
        };
        if let Some(n) = self.rules.iter().position(|rule| unfit(&rule.then)) {
            return Err(format!("rule {}: a hook is the absolute path of a program on every host", n + 1));
        }
        let wrong = |what: &str, n: usize| Err(format!("{what} {}: counts, votes and windows are at least 1", n + 1));
        if let Some(n) = self.rules.iter().position(|rule| rule.count == 0 || rule.within_s == 0) {
            return wrong("rule", n);
        }
        match self.permissions.iter().position(|rule| rule.votes == 0 || rule.within_s == 0) {
            Some(n) => wrong("permission", n),
            None => Ok(()),
        }
    }
}

impl Default for GuestSettings {
    /// A critical message gets what it asks for; everything else is noted.
    fn default() -> Self {
        let rule = Rule {
            kind: Glob::any(),
            vm: Glob::any(),
            severity: Severity::Critical,
            message: None,
            count: one(),
            within_s: minute(),
            then: Consequence::AsAsked,
        };
        let (limits, dumps) = (Limits::default(), Dumps::default());
        Self { rules: vec![rule], permissions: Vec::new(), limits, dumps, monitors: all_watched() }
    }
}

/// A request for something that is done to another VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuestRequest {
    /// The report that asks.
    pub id: ReportId,
    /// The VM that asks.
    pub by: String,
    /// The VM that is meant.
    pub target: String,
    /// What is to be done.
    pub remedy: Remedy,
    /// Why, for people: the report's kind and text.
    pub why: String,
}

/// What became of a report or a request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// In one word.
    pub verdict: Verdict,
    /// Why, for people.
    pub why: String,
}

impl Answer {
    /// Of both.
    #[must_use]
    pub fn new(verdict: Verdict, why: impl Into<String>) -> Self {
        Self { verdict, why: why.into() }
    }
}

/// What a host remembers over a restart of its agent: what it says when it is asked the same again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Remembered {
    /// For whom it was.
    pub vm: VmId,
    /// The report, or the order.
    pub id: ReportId,
    /// What became of it, as far as it is known.
    pub answer: Answer,
}

/// What outlives a restart of a host's agent.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct GuestMemory {
    /// Reports and orders, the oldest first.
    pub reports: Vec<Remembered>,
    /// When VMs had remedies that count, within the hour: by the clock of one boot of the host.
    pub remedies: Vec<(VmId, Vec<Time>)>,
}

/// How far a VM is inside, as its guest's agent says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub enum Inside {
    /// No agent was heard since it was booted.
    #[default]
    Silent,
    /// Its agent was heard.
    Heard,
    /// An application in it has said that it is ready.
    Ready,
}

/// What agents tell each other about guests' requests.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum GuestWord {
    /// To the master: a guest asks.
    Requested(GuestRequest),
    /// From the master: do this.
    Ordered {
        /// Of the order: that of the last report that it needed.
        id: ReportId,
        /// The VM.
        vm: VmId,
        /// What.
        remedy: Remedy,
        /// Why, for people.
        why: String,
    },
    /// To the master: what became of its order.
    Obeyed {
        /// Of the order.
        id: ReportId,
        /// What was done, or why not.
        answer: Answer,
    },
    /// From the master: what became of a request.
    Decided {
        /// Of the report.
        id: ReportId,
        /// What was decided.
        answer: Answer,
    },
    /// To any host: show failures that are kept there. Answered by `Reply::Failures` or `Reply::Piece`.
    Failures(FailureAsk),
    /// From the host of a VM that is about to leave it, to all others: what its guest asked for is being done.
    Begun {
        /// The VM.
        vm: VmId,
        /// The reports and orders.
        ids: Vec<ReportId>,
        /// What.
        remedy: Remedy,
    },
    /// To the host of a VM: a person wants it to have the port of Mainstay's agent.
    EnablePort {
        /// Which.
        vm: VmId,
    },
}

fn least() -> Severity {
    Severity::Info
}

fn one() -> u32 {
    1
}

fn minute() -> u32 {
    60
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_an_absolute_path() {
        let of =
            |rule: &str| serde_json::from_str::<GuestSettings>(&format!(r#"{{"rule":[{rule}]}}"#)).unwrap().check();
        assert_eq!(of(r#"{"then":{"hook":"/usr/local/sbin/db is broken"}}"#), Ok(()));
        for path in ["", "db", "../db", r"/a\nb"] {
            let why = of(&format!(r#"{{"then":{{"hook":"{path}"}}}}"#)).unwrap_err();
            assert!(why.starts_with("rule 1: a hook is the absolute path"), "{path}: {why}");
        }
    }

    #[test]
    fn a_bad_document_is_refused_with_its_reason() {
        let of = |rule: &str| serde_json::from_str::<GuestSettings>(&format!(r#"{{"rule":[{rule}]}}"#));
        let good = of(r#"{"kind":"app/*","message":"no space","then":{"own":"reset"}}"#).unwrap();
        assert_eq!(good.rules[0].count, 1);
        assert!(good.rules[0].message.as_ref().unwrap().is_in("there is no space left"));
        for (rule, expected) in [
            (r#"{"message":"(","then":"note"}"#, "no regular expression"),
            (r#"{"kind":"","then":"note"}"#, "1 to 256 bytes"),
            (r#"{"kind":"a"}"#, "missing field `then`"),
            (r#"{"then":{"own":"explode"}}"#, "unknown variant"),
        ] {
            let why = of(rule).unwrap_err().to_string();
            assert!(why.contains(expected), "{rule}: {why}");
        }
    }
}
