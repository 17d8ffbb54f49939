//! Failures of guests: what was kept of one before its remedy, and how it travels and is shown.
//!
//! ```text
//!   exec/evidence ──► exec/failures: /var/lib/mainstay/failures/VM/NUMBER/ { failure.json = Failure, FailureFile … }
//!                         │
//!   mainstay vm failures ─┴─► Failure (list), Piece (of a file)
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use super::VmId;
use super::guests::Remedy;

/// Longest piece of a file in one answer, in bytes: so long that agents do not keep the answer (`api::control`), in place of others.
pub const MAX_PIECE: usize = 512 * 1024;

/// What ran, or should have run, when the guest failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Linux.
    Linux,
    /// Windows.
    Windows,
    /// Firmware or a boot loader: before any system.
    Boot,
    /// Nobody says.
    Unknown,
}

/// How it failed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The kernel gave up.
    Panic,
    /// The kernel gave up for want of memory.
    OutOfMemory,
    /// The kernel made a mistake, and may have gone on.
    Oops,
    /// A CPU does nothing else any more.
    Lockup,
    /// A process waits for a disk for ever.
    HungTask,
    /// Windows' blue, or black, screen.
    StopScreen,
    /// The firmware found nothing to boot.
    NoBootDevice,
    /// A boot loader waits at its prompt or menu.
    BootLoader,
    /// The initramfs did not find the root file system; its shell waits.
    Initramfs,
    /// systemd's emergency or rescue shell waits.
    Emergency,
    /// Nothing of these is to be seen; the guest itself, or another one, has reported a failure.
    Reported,
    /// Nothing of these is to be seen.
    Unknown,
}

impl FailureKind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Panic,
        Self::OutOfMemory,
        Self::Oops,
        Self::Lockup,
        Self::HungTask,
        Self::StopScreen,
        Self::NoBootDevice,
        Self::BootLoader,
        Self::Initramfs,
        Self::Emergency,
        Self::Reported,
        Self::Unknown,
    ];

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Panic => "panic",
            Self::OutOfMemory => "out of memory",
            Self::Oops => "oops",
            Self::Lockup => "lockup",
            Self::HungTask => "hung task",
            Self::StopScreen => "stop screen",
            Self::NoBootDevice => "no bootable device",
            Self::BootLoader => "boot loader",
            Self::Initramfs => "initramfs shell",
            Self::Emergency => "emergency shell",
            Self::Reported => "reported",
            Self::Unknown => "unknown",
        }
    }
}

/// What kind of failure it is, and the line that says so.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Class {
    /// What ran.
    pub family: Family,
    /// How it failed.
    pub kind: FailureKind,
    /// The reason: one line without control characters, of the screen or the console; empty if none fits.
    pub line: String,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.family {
            Family::Linux => write!(f, "Linux {}", self.kind.name()),
            Family::Windows => write!(f, "Windows {}", self.kind.name()),
            Family::Boot | Family::Unknown => f.write_str(self.kind.name()),
        }
    }
}

/// One file of a failure, beside its record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureFile {
    /// The text screen.
    Screen,
    /// The screen as a picture.
    Picture,
    /// The text on that picture, as far as it could be read; only where there is no text screen.
    PictureText,
    /// The end of the serial console.
    Console,
    /// What the guest said last.
    Messages,
    /// libvirt's statistics.
    Statistics,
}

impl FailureFile {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 6] =
        [Self::Screen, Self::PictureText, Self::Console, Self::Messages, Self::Statistics, Self::Picture];

    /// Its name on disk and in archives.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Screen => "screen.txt",
            Self::Picture => "screen.png",
            Self::PictureText => "screen-read.txt",
            Self::Console => "console.log",
            Self::Messages => "messages.txt",
            Self::Statistics => "statistics.txt",
        }
    }

    /// By its name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|file| file.name() == name)
    }

    /// Whether people can read it.
    #[must_use]
    pub fn is_text(self) -> bool {
        self != Self::Picture
    }
}

/// A file that was kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptFile {
    /// Which.
    pub file: FailureFile,
    /// Its length.
    pub bytes: u64,
}

/// Something that was not kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MissingFile {
    /// Which.
    pub file: FailureFile,
    /// Why, for people.
    pub why: String,
}

/// What became of a guest's memory.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryDump {
    /// Nobody wanted it.
    #[default]
    NotWanted,
    /// It lies on the host that saw the failure: too long to be sent through agents.
    Kept {
        /// There.
        path: String,
        /// Its length.
        bytes: u64,
    },
    /// It was wanted, and is not there.
    Missing {
        /// Why, for people.
        why: String,
    },
}

/// One failure of a guest; its record on disk is this as JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Rises by one for each failure of a VM on one host.
    pub number: u32,
    /// The VM.
    pub vm: VmId,
    /// Its name then.
    pub name: String,
    /// The host that saw it.
    pub host: String,
    /// Clock of day, milliseconds since 1970.
    pub unix_ms: u64,
    /// What it was.
    pub class: Class,
    /// What made Mainstay act: a report or a signal.
    pub cause: String,
    /// The system inside as its agent has said, or its definition says, for people; empty if neither does.
    pub system: String,
    /// What was done.
    pub remedy: Remedy,
    /// What became of that: "done", "failed: …"; empty as long as nobody knows.
    pub outcome: String,
    /// Milliseconds that the remedy waited for this to be collected.
    pub waited_ms: u64,
    /// What was kept.
    pub files: Vec<KeptFile>,
    /// What was not.
    pub missing: Vec<MissingFile>,
    /// What it had in memory.
    #[serde(default)]
    pub dump: MemoryDump,
}

/// All failures of a VM that were found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FailureList {
    /// Oldest first.
    pub failures: Vec<Failure>,
    /// Hosts that did not answer, each with why: they may have more.
    pub silent: Vec<String>,
}

/// A question about failures that a host keeps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FailureAsk {
    /// Those of this VM.
    List {
        /// Which.
        vm: VmId,
    },
    /// A part of a file.
    Piece {
        /// Whose.
        vm: VmId,
        /// Of which failure.
        number: u32,
        /// Which file.
        file: FailureFile,
        /// The first byte.
        from: u64,
    },
}

/// A part of a file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Piece {
    /// At most `MAX_PIECE`; none at the end.
    pub bytes: Vec<u8>,
    /// Length of the whole.
    pub total: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_names_of_their_own() {
        for file in FailureFile::ALL {
            assert_eq!(FailureFile::named(file.name()), Some(file));
        }
        for name in ["", "failure.json", "../screen.txt", "screen.txt/"] {
            assert_eq!(FailureFile::named(name), None, "{name}");
        }
    }
}
