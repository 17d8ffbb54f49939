//! Messages between the host's agent and the agent inside a guest, over the virtio-serial port [`PORT`].
//!
//! ```text
//!   guest: mainstay-guest ── Hello, Beat, Report, Outcome ──►  host: mainstayd
//!                         ◄── Hello, Answer, Ask ────────────
//! ```
//!
//! Words ([`message`]) in frames ([`frame`]). Whoever finds the other side new, by a connection or by its `Hello`, says
//! `Hello` and everything that is not answered yet.
//!
//! The host trusts nothing that comes from here: [`message::Report::check`] and the limits of this page are its part.
//!
//! Not here: who may ask for what (the host's policy), and the agent's program (`agent/`, feature `program`).

pub mod frame;
pub mod message;

/// Name of the port; inside the guest `/dev/virtio-ports/org.mainstay.guest.0`.
pub const PORT: &str = "org.mainstay.guest.0";
/// Version of the messages. A side that hears a kind of message that it does not know skips it.
pub const PROTOCOL: u16 = 1;
/// Largest body of a message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// More than this many messages a second are dropped by the host, and counted.
pub const MAX_PER_SECOND: u32 = 100;
