//! What a host finds wrong with itself, and what is done about it.
//!
//! ```text
//!   executors ─► Finding (stands for some seconds) ─► Condition (of its host: stands, or has ended lately) ─► reports, master
//! ```

use serde::{Deserialize, Serialize};

/// Findings of one host at once; further ones are left out.
pub const MAX_FINDINGS: usize = 64;
/// Longest object and text of one, in bytes.
pub const MAX_TEXT: usize = 200;

/// What finds it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// No physical port of a bridge has a carrier. Its object is what VMs need: `bridge:br0`, `network:lan`.
    Uplink,
    /// A bond has lost some of its ports, not all.
    Bond,
    /// Memory had errors that were not corrected.
    Memory,
    /// Memory has many errors that are corrected.
    MemoryCorrected,
    /// Something is hotter than it may be.
    Temperature,
    /// A disk expects to fail.
    Disk,
    /// A vendor's program says so.
    Vendor,
}

impl Source {
    /// All.
    pub const ALL: [Self; 7] =
        [Self::Uplink, Self::Bond, Self::Memory, Self::MemoryCorrected, Self::Temperature, Self::Disk, Self::Vendor];

    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Bond => "bond",
            Self::Memory => "memory",
            Self::MemoryCorrected => "memory-corrected",
            Self::Temperature => "temperature",
            Self::Disk => "disk",
            Self::Vendor => "vendor",
        }
    }

    /// What is done if no rule says otherwise.
    #[must_use]
    pub fn usual_action(self) -> HealthAction {
        match self {
            Self::Uplink => HealthAction::Evacuate,
            Self::Memory | Self::Vendor => HealthAction::Quarantine,
            Self::Bond | Self::MemoryCorrected | Self::Temperature | Self::Disk => HealthAction::Tell,
        }
    }
}

/// What is done about a finding.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthAction {
    /// People are told.
    Tell,
    /// And nothing is placed there, unless no other host can have it.
    Quarantine,
    /// And VMs are moved away: with an uplink those that use it, else all.
    Evacuate,
}

impl HealthAction {
    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tell => "tell",
            Self::Quarantine => "quarantine",
            Self::Evacuate => "evacuate",
        }
    }
}

/// Something that is wrong with a host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// What finds it.
    pub source: Source,
    /// With what: one source finds one thing with one object.
    pub object: String,
    /// In words.
    pub text: String,
}

impl Finding {
    /// One, bounded.
    #[must_use]
    pub fn new(source: Source, object: &str, text: &str) -> Self {
        let short = |text: &str| {
            let line = text.lines().next().unwrap_or_default();
            let end = (0..=MAX_TEXT.min(line.len())).rev().find(|end| line.is_char_boundary(*end)).unwrap_or(0);
            line.get(..end).unwrap_or_default().chars().filter(|letter| !letter.is_control()).collect::<String>()
        };
        Self { source, object: short(object), text: short(text) }
    }
}

/// A finding of a host, as the host tells it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Condition {
    /// What.
    pub finding: Finding,
    /// It is there; else it has gone, but not long ago.
    pub stands: bool,
    /// It has been there for so long that other hosts have told by now if the same has struck them.
    pub lasting: bool,
    /// An operator has said that VMs may be placed there all the same.
    pub released: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_short_line() {
        let long = "ü".repeat(MAX_TEXT);
        let table = [
            ("fan 3 failed\nsecond line", "fan 3 failed"),
            ("", ""),
            ("bell\u{7}", "bell"),
            (long.as_str(), &long[..MAX_TEXT]),
        ];
        for (text, expected) in table {
            assert_eq!(Finding::new(Source::Vendor, "ipmi", text).text, expected);
        }
    }

    #[test]
    fn names_are_those_of_the_document() {
        for source in Source::ALL {
            assert_eq!(serde_json::to_string(&source).unwrap(), format!("\"{}\"", source.name()));
        }
        for action in [HealthAction::Tell, HealthAction::Quarantine, HealthAction::Evacuate] {
            assert_eq!(serde_json::to_string(&action).unwrap(), format!("\"{}\"", action.name()));
        }
    }
}
