//! systemd's watchdog, pinged without ever waiting: a systemd that does not read must not hold the enforcing thread up.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::types::Time;

/// The socket to systemd, if the watchdog is on.
pub struct Notify {
    socket: Option<UnixDatagram>,
    every: Duration,
    last: Time,
}

impl Notify {
    /// From `NOTIFY_SOCKET` and `WATCHDOG_USEC`.
    #[must_use]
    pub fn from_environment() -> Self {
        let every = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok()).map(Duration::from_micros);
        let socket = every.and_then(|_| connect());
        Self { socket, every: every.unwrap_or_default() / 4, last: Time::ZERO }
    }

    /// Four times per period; a ping that the socket does not take at once is left out.
    pub fn ping(&mut self, now: Time) {
        let Some(socket) = &self.socket else { return };
        if self.every <= now.since(self.last) {
            self.last = now;
            drop(socket.send(b"WATCHDOG=1"));
        }
    }
}

fn connect() -> Option<UnixDatagram> {
    let path = std::env::var("NOTIFY_SOCKET").ok()?;
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect_addr(&address.ok()?).ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}
