//! Errors of the CLI: what was not done, why, what to do next; and the exit code.

use std::io::ErrorKind;

use super::out::Out;
use crate::api::dbus::client::AgentError;
use crate::api::dbus::resolve::Unresolved;

/// It failed.
pub const FAILED: u8 = 1;
/// The command line makes no sense.
pub const USAGE: u8 = 2;
/// No agent, or no D-Bus.
pub const UNREACHABLE: u8 = 3;
/// The agent, or the right to ask it, says no.
pub const DENIED: u8 = 4;

/// Why a command ends early.
#[derive(Debug)]
pub enum Trouble {
    /// Nothing more to say: the reader of our output went away.
    Quiet,
    /// What was asked has been said; only the exit code is left.
    Found,
    /// An error.
    Error {
        /// Exit code.
        code: u8,
        /// What was not done.
        what: String,
        /// Why.
        why: String,
        /// What to do next; may be empty.
        next: String,
    },
}

impl Trouble {
    /// An error with all its parts.
    pub fn new(code: u8, what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self::Error { code, what: what.into(), why: why.into(), next: next.into() }
    }

    /// The process's exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Quiet => 0,
            Self::Found => FAILED,
            Self::Error { code, .. } => *code,
        }
    }

    /// To standard error.
    pub fn print(&self, out: &Out) {
        match self {
            Self::Quiet | Self::Found => {}
            Self::Error { what, why, next, .. } => {
                out.error(&format!("error: {what}"));
                out.error(&format!("  why:  {why}"));
                if !next.is_empty() {
                    out.error(&format!("  next: {next}"));
                }
            }
        }
    }
}

/// Adds to an error what was not done because of it.
pub trait What<T> {
    /// `what` completes the line "error: …", for example "web was not moved".
    fn what(self, what: &str) -> Result<T, Trouble>;
}

impl<T> What<T> for Result<T, AgentError> {
    fn what(self, what: &str) -> Result<T, Trouble> {
        self.map_err(|error| {
            let why = error.to_string();
            let (code, next) = match error {
                AgentError::Unreachable(_) => {
                    (UNREACHABLE, "systemctl status mainstayd; VMs go on without it, mainstay doctor says more")
                }
                AgentError::NotRoot => (DENIED, "nothing was changed; say it again as root, for example with sudo"),
                AgentError::Denied(_) => (DENIED, "nothing was changed; mainstay status and mainstay events say more"),
                AgentError::Usage(_) => (USAGE, "nothing was changed; mainstay --help"),
                AgentError::Failed(_) => (FAILED, "mainstay events and journalctl -u mainstayd say more"),
            };
            Trouble::new(code, what, why, next)
        })
    }
}

impl<T> What<T> for Result<T, Unresolved> {
    fn what(self, what: &str) -> Result<T, Trouble> {
        self.map_err(|error| {
            let next = match &error {
                Unresolved::Unknown { kind, .. } => format!("mainstay {} list shows all", kind.to_lowercase()),
                Unresolved::Ambiguous { .. } => String::new(),
            };
            Trouble::new(FAILED, what, error.to_string(), next)
        })
    }
}

/// Writing the answer failed: a closed pipe is the reader's wish, anything else is told.
impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == ErrorKind::BrokenPipe {
            return Self::Quiet;
        }
        Self::new(FAILED, "the answer cannot be written", error.to_string(), "")
    }
}
