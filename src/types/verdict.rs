//! Verdicts as people see them, and how they ask for them; also the JSON of `mainstay verdict --json`.

use serde::{Deserialize, Serialize};

/// One verdict with its evidence.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerdictView {
    /// Name of the host that gave it, and its number there: `a-28512345`.
    pub id: String,
    /// Clock of day, milliseconds since 1970.
    pub unix_ms: u64,
    /// The host that gave it.
    pub by: String,
    /// host-dead, host-live, …; vm-placed, vm-waits, vm-goes-on.
    pub kind: String,
    /// The host that it is about: that was judged, or that shall run a VM.
    pub host: Option<String>,
    /// The VM that it is about, by name.
    pub vm: Option<String>,
    /// One line.
    pub text: String,
    /// What it rests on; empty in lists.
    pub evidence: Vec<String>,
    /// File on the host that gave it with what led to it; written half a minute later.
    pub recording: Option<String>,
}

/// Which verdicts are asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum VerdictAsk {
    /// The newest, about this VM and this host (by name), or all.
    List { vm: Option<String>, host: Option<String> },
    /// The one of this id, whole.
    One { id: String },
}

impl VerdictAsk {
    /// Whether a verdict is asked for.
    #[must_use]
    pub fn is_for(&self, verdict: &VerdictView) -> bool {
        match self {
            Self::List { vm, host } => (vm.is_none() || *vm == verdict.vm) && (host.is_none() || *host == verdict.host),
            Self::One { id } => *id == verdict.id,
        }
    }
}
