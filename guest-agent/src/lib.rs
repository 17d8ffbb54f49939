//! Messages between the host's agent and the agent inside a guest, over the virtio-serial port [`PORT`].
//!
//! ```text
//!   guest: mainstay-guest ── Beat, Report ──►  host: mainstayd
//!                         ◄── Answer, Ask ───
//! ```
//!
//! **Only the words so far.** Framing, limits in force, the agent's program and the host's side of the channel are not
//! built yet; nothing of this crate runs in a guest today.
//!
//! Rules in numbers: at most [`MAX_MESSAGE`] bytes a message, [`MAX_PER_SECOND`] messages a second. The host trusts
//! nothing that comes from here.

use serde::{Deserialize, Serialize};

/// Name of the port; inside the guest `/dev/virtio-ports/org.mainstay.guest.0`.
pub const PORT: &str = "org.mainstay.guest.0";
/// Version of the messages.
pub const PROTOCOL: u16 = 1;
/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// More than this many messages a second are dropped and counted.
pub const MAX_PER_SECOND: u32 = 100;

/// From the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromGuest {
    /// Once a second.
    Beat(Beat),
    /// Something is wrong inside; answered by its sequence number.
    Report(Report),
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
    /// systemd units that have failed; 0 without systemd.
    pub failed_units: u32,
}

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Not as it should be.
    Warning,
    /// The guest cannot do its work.
    Critical,
}

/// What the guest asks for. The host's policy decides.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Wish {
    /// Nothing.
    None,
    /// Reset this VM.
    Reset,
    /// Reset another VM, by name.
    ResetVm(String),
    /// Restart this VM on another host.
    RestartElsewhere,
}

/// An error message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Rises by one; answers name it.
    pub sequence: u64,
    /// How bad.
    pub severity: Severity,
    /// What kind, for example `app/db`.
    pub kind: String,
    /// One line for people.
    pub message: String,
    /// What is asked.
    pub wish: Wish,
}

/// From the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToGuest {
    /// What became of a report.
    Answer {
        /// Of the report.
        sequence: u64,
        /// What was decided.
        verdict: Verdict,
        /// Why, for people.
        why: String,
    },
}

/// What became of a report.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Verdict {
    /// Taken in.
    Accepted,
    /// Carried out.
    Done,
    /// Not allowed.
    Denied,
    /// Later.
    Delayed,
}
