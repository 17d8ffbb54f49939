//! Notes: one line for people, saying what happened, where and why. The same text in log, D-Bus signal and event list.

/// How much a note matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
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
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Note {
    /// How much it matters.
    pub level: Level,
    /// Machine-readable kind, for example `host-dead`.
    pub kind: &'static str,
    /// Name of the VM concerned.
    pub vm: Option<String>,
    /// One line: what, where, why; lower case, no full stop.
    pub text: String,
}

impl Note {
    /// Good to know.
    #[must_use]
    pub fn info(kind: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Info, kind, vm: None, text: text.into() }
    }
    /// Not as it should be.
    #[must_use]
    pub fn warning(kind: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Warning, kind, vm: None, text: text.into() }
    }
    /// An operator must look.
    #[must_use]
    pub fn alarm(kind: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Alarm, kind, vm: None, text: text.into() }
    }
    /// About this VM.
    #[must_use]
    pub fn of(mut self, vm: &str) -> Self {
        self.vm = Some(vm.to_owned());
        self
    }
}
