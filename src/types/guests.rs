//! What the cluster does about what guests say: rules, permissions and limits, one part of the cluster's settings.
//!
//! Patterns are checked when they are read: a document with a bad one is refused as a whole.

use std::fmt;

use mainstay_guest::message::{ReportId, Severity, Verdict};
use regex_lite::Regex;
use serde::{Deserialize, Serialize};

use super::VmId;
use super::failure::FailureAsk;

/// A document holds at most so many rules, and so many permissions.
pub const MAX_RULES: usize = 256;
/// Longest pattern in bytes. Matching takes time linear in pattern times text.
pub const MAX_PATTERN: usize = 256;

/// A name or kind with `*` for any letters; nothing else is special.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Glob {
    text: String,
    /// The same as a regular expression for the whole name.
    whole: Regex,
}

impl Glob {
    /// By its text.
    ///
    /// # Errors
    /// Empty or longer than `MAX_PATTERN`.
    pub fn new(text: &str) -> Result<Self, BadPattern> {
        if text.is_empty() || MAX_PATTERN < text.len() {
            return Err(BadPattern::Length);
        }
        let parts: Vec<String> = text.split('*').map(regex_lite::escape).collect();
        let whole = Regex::new(&format!("^(?s:{})$", parts.join(".*")));
        Ok(Self { text: text.to_owned(), whole: whole.map_err(|why| BadPattern::Expression(why.to_string()))? })
    }

    /// Fits everything.
    #[must_use]
    pub fn any() -> Self {
        Self::new("*").expect("short, and an expression")
    }

    /// Whether the whole name fits.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        self.whole.is_match(name)
    }
}

impl PartialEq for Glob {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Glob {}

impl TryFrom<String> for Glob {
    type Error = BadPattern;
    fn try_from(text: String) -> Result<Self, BadPattern> {
        Self::new(&text)
    }
}

impl From<Glob> for String {
    fn from(glob: Glob) -> Self {
        glob.text
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A regular expression that is searched for in a message.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(Regex);

impl Pattern {
    /// By its text.
    ///
    /// # Errors
    /// Too long, or no regular expression.
    pub fn new(text: &str) -> Result<Self, BadPattern> {
        if text.is_empty() || MAX_PATTERN < text.len() {
            return Err(BadPattern::Length);
        }
        Regex::new(text).map(Self).map_err(|why| BadPattern::Expression(why.to_string()))
    }

    /// Whether it is found in the text.
    #[must_use]
    pub fn is_in(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

impl TryFrom<String> for Pattern {
    type Error = BadPattern;
    fn try_from(text: String) -> Result<Self, BadPattern> {
        Self::new(&text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.0.as_str().to_owned()
    }
}

/// Why a pattern is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadPattern {
    /// Empty or too long.
    #[error("a pattern is 1 to {MAX_PATTERN} bytes")]
    Length,
    /// Not one.
    #[error("no regular expression: {0}")]
    Expression(String),
}

/// What is done to a VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remedy {
    /// libvirt's reset: the same QEMU starts its firmware again.
    Reset,
    /// The guest is asked to reboot; after its time-out a reset.
    Reboot,
    /// QEMU ends and is started again, on the same host.
    PowerCycle,
    /// QEMU ends and is started on another host.
    RestartElsewhere,
    /// A live migration to another host.
    Migrate,
    /// Paused, for people to look at.
    Suspend,
}

impl Remedy {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Reset, Self::Reboot, Self::PowerCycle, Self::RestartElsewhere, Self::Migrate, Self::Suspend];

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
        }
    }

    /// Whether the guest loses its state: it counts against the limit of resets.
    #[must_use]
    pub fn starts_anew(self) -> bool {
        match self {
            Self::Reset | Self::Reboot | Self::PowerCycle | Self::RestartElsewhere => true,
            Self::Migrate | Self::Suspend => false,
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
}

impl GuestSettings {
    /// What cannot be used, for people.
    ///
    /// # Errors
    /// More rules or permissions than fit; one that could never apply.
    pub fn check(&self) -> Result<(), String> {
        if MAX_RULES < self.rules.len() || MAX_RULES < self.permissions.len() {
            return Err(format!("at most {MAX_RULES} rules and as many permissions"));
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
        Self { rules: vec![rule], permissions: Vec::new(), limits: Limits::default() }
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
    fn a_glob_fits_whole_names() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*", "web1", true),
            ("web*", "web1", true),
            ("web*", "aweb", false),
            ("*/db", "app/db", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-c-d", false),
            ("web", "web1", false),
            ("a.c", "abc", false),
            ("**", "x", true),
            ("*a*a*a*b", &"a".repeat(4096), false),
        ] {
            assert_eq!(Glob::new(pattern).unwrap().fits(name), expected, "{pattern} {name:.20}");
        }
        assert_eq!(Glob::new(""), Err(BadPattern::Length));
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
