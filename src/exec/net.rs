//! Beats on the network: sockets only. What a datagram means is `wire/seal.rs`'s, what follows from it the core's.
//!
//! ```text
//!  guard:  BeatSender ── eth0 ─► group           one socket per interface, one per family for unicast peers;
//!                    ├── eth1 ─► group           never waits: a beat that the kernel does not take at once is lost
//!                    └───────► peers
//!
//!  agent:  eth0 ─┐ poll   ┌────────┐ Heard       one thread; waits for nothing but the sockets,
//!          eth1 ─┼──────► │ Opener │ ──────► core   the 1 s check of the interfaces, and its end
//!          pipe ─┘ stop   └────────┘
//! ```
//!
//! Every socket is bound to its interface (`SO_BINDTODEVICE`), takes the joined group only (`IP_MULTICAST_ALL` off),
//! sends without local loop, with the TTL set and priority 6. An interface is known by its name: when it is gone, or is
//! another one now (other index), the socket is closed and opened anew with the next beat or check.
//!
//! Unicast: an interface whose address is no multicast group (`0.0.0.0:port`, `[::]:port`) hears unicast only and sends
//! nothing; without a name it stands for all interfaces. What is sent to peers goes by the kernel's routes.
//!
//! Numbers: 64 datagrams per socket before the next one's turn; 1 MiB receive buffer per socket, which holds more than a
//! second of 128 hosts at 250 ms; what overflows is counted.
//!
//! Not here: who is alive, one-way links, which interface is healthy enough.

mod receiver;
mod sender;
mod socket;

#[cfg(test)]
mod lan;
#[cfg(test)]
mod tests;

pub use receiver::{BeatReceiver, Heard, PathCounts, ReceiveCounts};
pub use sender::BeatSender;
