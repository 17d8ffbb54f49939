//! Notes: one line for people, saying what happened, where and why. The same text in log, D-Bus signal and event list.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::types::VerdictId;

/// How much a note matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Level {
    /// Good to know.
    Info,
    /// Something is not as it should be.
    Warning,
    /// An operator must look.
    Alarm,
}

impl Level {
    /// Lower-case name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Alarm => "alarm",
        }
    }
}

/// One note.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Note {
    /// How much it matters.
    pub level: Level,
    /// Machine-readable kind, for example `host-dead`.
    pub kind: Cow<'static, str>,
    /// Name of the VM concerned.
    pub vm: Option<String>,
    /// One line: what, where, why; lower case, no full stop.
    pub text: String,
    /// The verdict that it tells.
    pub verdict: Option<VerdictId>,
}

impl Note {
    /// Good to know.
    #[must_use]
    pub fn info(kind: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Info, kind: Cow::Borrowed(kind), vm: None, text: text.into(), verdict: None }
    }
    /// Not as it should be.
    #[must_use]
    pub fn warning(kind: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Warning, kind: Cow::Borrowed(kind), vm: None, text: text.into(), verdict: None }
    }
    /// An operator must look.
    #[must_use]
    pub fn alarm(kind: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Alarm, kind: Cow::Borrowed(kind), vm: None, text: text.into(), verdict: None }
    }
    /// About this VM.
    #[must_use]
    pub fn of(mut self, vm: &str) -> Self {
        self.vm = Some(vm.to_owned());
        self
    }
    /// It tells this verdict.
    #[must_use]
    pub fn by(mut self, verdict: Option<VerdictId>) -> Self {
        self.verdict = verdict;
        self
    }
}
