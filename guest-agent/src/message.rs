//! What both sides say. A body is postcard; fields are only ever added at the end, and a new version of the protocol
//! reads the bodies of the old one.
//!
//! A report has a number that rises, for people, and a random [`ReportId`], by which the host knows that it has seen it:
//! after a guest was put back to a snapshot, numbers come again, ids do not.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest kind of a report, in bytes.
pub const MAX_KIND: usize = 64;
/// Longest text of a report, in bytes.
pub const MAX_TEXT: usize = 4096;
/// Longest name of a VM, in bytes.
pub const MAX_NAME: usize = 255;

/// From the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromGuest {
    /// First on a connection, and again whenever the host says `Hello`.
    Hello(GuestHello),
    /// Once a second, and at once when something in it has changed that others wait for.
    Beat(Beat),
    /// Something is wrong inside. Said again until the host has given its last answer.
    Report(Report),
    /// What became of an `Ask`.
    Outcome {
        /// Of the `Ask`.
        ask: u64,
        /// Done, or why not, for people.
        result: Result<(), String>,
    },
    /// The agent was told to end: beats that do not come from now on mean nothing.
    Leaves,
}

/// Who speaks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuestHello {
    /// The newest version of the messages that it speaks.
    pub protocol: u16,
    /// Version of the program.
    pub agent: String,
    /// Of the guest's kernel: another one after each boot.
    pub boot: [u8; 16],
    /// What runs there.
    pub system: System,
}

/// An operating system.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct System {
    /// `ID` of os-release: `debian`.
    pub id: String,
    /// `VERSION_ID` of os-release: `12`; empty where there is none.
    pub version: String,
    /// Release of the kernel.
    pub kernel: String,
}

/// The guest lives.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Beat {
    /// Of the guest's kernel.
    pub boot: [u8; 16],
    /// Seconds since it booted.
    pub uptime_s: u64,
    /// One-minute load, in hundredths.
    pub load_centi: u32,
    /// Available memory in KiB.
    pub available_kib: u64,
    /// The root file system can be written.
    pub root_writable: bool,
    /// Watched systemd units that have failed; 0 without systemd.
    pub failed_units: u32,
    /// The application's own heartbeat.
    pub application: Application,
    /// Others that wait for this guest may start.
    pub ready: bool,
    /// File systems stand still, as asked.
    pub frozen: bool,
    /// Reports that were dropped because too many waited, since the program's start.
    pub dropped: u32,
}

/// The heartbeat of an application, which it switches on itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Application {
    /// It has not asked to be watched.
    #[default]
    Unwatched,
    /// It has said that it is active, lately.
    Active,
    /// It has said nothing for longer than it may.
    Silent,
}

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Not as it should be.
    Warning,
    /// The guest cannot do its work.
    Critical,
}

/// What the guest asks for. The host's policy decides.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// Nothing.
    #[default]
    None,
    /// Reset this VM.
    Reset,
    /// Reset another VM, by name.
    ResetVm(String),
    /// Restart this VM on another host.
    RestartElsewhere,
}

/// Names one report for ever: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ReportId(pub [u8; 16]);

/// An error message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub id: ReportId,
    /// Rises by one with each report of this program; for people.
    pub sequence: u64,
    /// The boot in which it was made: a wish of an earlier boot may have been fulfilled by this one.
    pub boot: [u8; 16],
    /// How bad.
    pub severity: Severity,
    /// What kind, for example `app/db`: small letters, digits, `-`, `_`, `.` and `/`.
    pub kind: String,
    /// For people; without control characters.
    pub message: String,
    /// What is asked.
    pub wish: Wish,
}

/// Why a report is refused, by the guest's agent and by the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadReport {
    /// Empty, too long, or with other letters.
    #[error("a kind is 1 to {MAX_KIND} of a-z, 0-9, '-', '_', '.' and '/', for example app/db")]
    Kind,
    /// Empty or too long.
    #[error("a message is 1 to {MAX_TEXT} bytes")]
    TextLength,
    /// Would disturb a log or a terminal.
    #[error("a message is one line without control characters")]
    TextControl,
    /// Empty, too long, or with control characters.
    #[error("the name of a VM is 1 to {MAX_NAME} bytes without control characters")]
    Name,
}

impl Report {
    /// Whether it may be passed on.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn check(&self) -> Result<(), BadReport> {
        let allowed = |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit() || b"-_./".contains(&letter);
        if !(1..=MAX_KIND).contains(&self.kind.len()) || !self.kind.bytes().all(allowed) {
            return Err(BadReport::Kind);
        }
        if !(1..=MAX_TEXT).contains(&self.message.len()) {
            return Err(BadReport::TextLength);
        }
        if self.message.chars().any(char::is_control) {
            return Err(BadReport::TextControl);
        }
        match &self.wish {
            Wish::ResetVm(name) if !(1..=MAX_NAME).contains(&name.len()) || name.chars().any(char::is_control) => {
                Err(BadReport::Name)
            }
            Wish::None | Wish::Reset | Wish::ResetVm(_) | Wish::RestartElsewhere => Ok(()),
        }
    }
}

/// Makes a text fit for [`Report::message`]: control characters become spaces, and what is too long is cut.
#[must_use]
pub fn one_line(text: &str) -> String {
    let mut line: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let end = (0..=MAX_TEXT.min(line.len())).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
    line.truncate(end);
    line
}

/// From the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToGuest {
    /// First on a connection.
    Hello(HostHello),
    /// What became of a report.
    Answer {
        /// Of the report.
        id: ReportId,
        /// What was decided.
        verdict: Verdict,
        /// Why, for people.
        why: String,
    },
    /// Do something, and say what became of it.
    Ask {
        /// Names this question.
        ask: u64,
        /// What to do.
        order: Order,
    },
}

/// Who listens.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostHello {
    /// The newest version of the messages that it speaks.
    pub protocol: u16,
    /// This guest, as the cluster calls it.
    pub vm: String,
}

/// What a guest can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Order {
    /// File systems stand still; they go on by themselves after so many seconds.
    Freeze {
        /// Seconds.
        within_s: u16,
    },
    /// File systems go on.
    Thaw,
    /// Orderly shutdown.
    ShutDown,
    /// Orderly reboot.
    Reboot,
}

/// What became of a report.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Noted; nothing else follows.
    Accepted,
    /// Carried out.
    Done,
    /// Not allowed.
    Denied,
    /// Not yet: another answer follows.
    Delayed,
}

impl Verdict {
    /// No other answer follows.
    #[must_use]
    pub fn is_last(self) -> bool {
        match self {
            Self::Accepted | Self::Done | Self::Denied => true,
            Self::Delayed => false,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accepted => "accepted",
            Self::Done => "done",
            Self::Denied => "denied",
            Self::Delayed => "delayed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(kind: &str, message: &str, wish: Wish) -> Report {
        Report {
            id: ReportId([1; 16]),
            sequence: 1,
            boot: [2; 16],
            severity: Severity::Critical,
            kind: kind.to_owned(),
            message: message.to_owned(),
            wish,
        }
    }

    #[test]
    fn reports_are_checked() {
        let long = "x".repeat(MAX_TEXT + 1);
        let name = |name: &str| Wish::ResetVm(name.to_owned());
        for (kind, message, wish, expected) in [
            ("app/db", "is gone", Wish::Reset, Ok(())),
            ("kernel/oops-1.x_y", "größer", name("db 1"), Ok(())),
            ("", "m", Wish::None, Err(BadReport::Kind)),
            ("App", "m", Wish::None, Err(BadReport::Kind)),
            ("a\nb", "m", Wish::None, Err(BadReport::Kind)),
            (&"k".repeat(MAX_KIND + 1), "m", Wish::None, Err(BadReport::Kind)),
            ("a", "", Wish::None, Err(BadReport::TextLength)),
            ("a", &long, Wish::None, Err(BadReport::TextLength)),
            ("a", "two\nlines", Wish::None, Err(BadReport::TextControl)),
            ("a", "\u{1b}[2J", Wish::None, Err(BadReport::TextControl)),
            ("a", "m", name(""), Err(BadReport::Name)),
            ("a", "m", name("d\tb"), Err(BadReport::Name)),
        ] {
            assert_eq!(report(kind, message, wish).check(), expected, "{kind:?} {:.20?}", message);
        }
    }

    #[test]
    fn any_text_becomes_a_message() {
        for text in ["one\ntwo\r\n", "\u{7}bell", &"ä".repeat(MAX_TEXT), "  x  "] {
            let message = one_line(text);
            assert_eq!(report("a", &message, Wish::None).check(), Ok(()), "{message:.20?}");
        }
        assert_eq!(one_line("one\ntwo\n"), "one two");
    }
}
