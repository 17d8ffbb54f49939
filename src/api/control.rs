//! The control channel: orders, reports and lists between agents, over TLS with the cluster's certificates.
//!
//! ```text
//!  send(to, ticket, request) ─► link.rs ══ TLS 1.3, frames ══► serve.rs ─► answers.rs ─► asked(Asked)
//!  answer(Ok | Err) ◄────────── one per peer                   one task    first answer     │
//!                               resends, deadlines             per peer    of a ticket ◄── Answer::send
//! ```
//!
//! Rules:
//! - Every `send` is answered exactly once, at its deadline at the latest.
//! - One connection per peer carries many requests; a slow one holds up no other. A lost connection is made anew after
//!   50 ms, then twice as long each time, at most 2 s; what waits is asked again.
//! - Asking twice gives the first answer, also while that is still being worked out.
//! - Who shows no certificate may only ask to join, a few times per second.
//! - A TCP error says nothing about a host's life. Beats do.
//!
//! Not here: what a request means (the agent), who is master, retries beyond a deadline (core).

mod answers;
mod link;
mod serve;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::exec::clock;
use crate::exec::cluster::{BadCertificate, Cluster, tls};
use crate::types::control::{CONTROL_PROTOCOL, Denial, Envelope, Reply, Request};
use crate::types::settings::ClusterSettings;
use crate::types::{HostId, Ticket};
use crate::wire::frame::{self, BadFrame};
use link::{Ask, Peer};
use serve::Server;

/// Requests to one peer that may wait for their answers; more are refused at once.
pub const MAX_WAITING: usize = 256;
/// Unacknowledged data for this long means that the connection is lost.
const LOST_AFTER: Duration = Duration::from_secs(3);

/// Handle of the control channel; cheap to clone. When the last one is dropped, everything stops.
#[derive(Clone)]
pub struct Control {
    inner: Arc<Inner>,
}

struct Inner {
    address: SocketAddr,
    /// Added to every ticket, so that tickets of two runs of this agent never meet in a peer's memory.
    base: u64,
    connector: TlsConnector,
    peers: Arc<Peers>,
    runtime: Handle,
    accepting: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A request as it arrived.
#[derive(Debug)]
pub struct Asked {
    /// Whose certificate it was; `None` = none was shown, and the request is `Join`.
    pub from: Option<HostId>,
    /// Unique per sender, also over its restarts.
    pub ticket: Ticket,
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub answer: Answer,
}

/// Takes one reply. May be kept while the request is worked out; dropped without a reply it denies.
pub struct Answer(Option<Box<dyn FnOnce(Reply) + Send>>);

impl Answer {
    /// An answer that goes to `to`; for requests that come another way, for example from people on this host.
    pub fn new(to: impl FnOnce(Reply) + Send + 'static) -> Self {
        Self(Some(Box::new(to)))
    }

    /// Replies.
    pub fn send(mut self, reply: Reply) {
        if let Some(to) = self.0.take() {
            to(reply);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(to) = self.0.take() {
            to(Reply::Denied(Denial::Unable("the agent gave the request up, it may be stopping".into())));
        }
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answer")
    }
}

/// Why there is no reply.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ControlError {
    /// `set_peers` named no such host. Nothing was sent.
    #[error("host {0} is no member of the cluster")]
    Unknown(HostId),
    /// Nothing was sent.
    #[error("the request cannot be sent: {0}")]
    Unsendable(BadFrame),
    /// `MAX_WAITING` reached. Nothing was sent.
    #[error("{MAX_WAITING} requests to host {0} wait already")]
    Busy(HostId),
    /// There was no connection before the deadline. Nothing was sent.
    #[error("host cannot be reached within {within:?}{}", .why.as_ref().map(|w| format!(": {w}")).unwrap_or_default())]
    Unreached {
        /// What the caller allowed.
        within: Duration,
        /// What the last attempt said.
        why: Option<String>,
    },
    /// The request was sent and may still take effect.
    #[error("no answer within {within:?}; the request may still take effect")]
    NoAnswer {
        /// What the caller allowed.
        within: Duration,
    },
    /// It was answered by something that this version cannot read. It may have taken effect.
    #[error("the answer cannot be read, a newer version may run there: {0}")]
    Unreadable(String),
    /// The peer was removed, or this agent stops. The request may have taken effect.
    #[error("given up: the host left the cluster, or this agent stops")]
    GivenUp,
}

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be used.
    #[error("cannot listen at {address}: {cause}; is another mainstayd running, or the port taken? see control.port")]
    Listen {
        /// What was asked for.
        address: SocketAddr,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The host's certificate or key.
    #[error(transparent)]
    Certificate(#[from] BadCertificate),
}

impl Control {
    /// Listens, and connects to the members that `cluster` names (see `set_peers`). `asked` is called for each new
    /// request; it must not block. An address that this host does not have yet is fine. Call within a tokio runtime.
    ///
    /// # Errors
    /// When the port is taken, or the certificates do not fit together.
    pub async fn serve(
        cluster: &Cluster,
        listen: SocketAddr,
        asked: impl Fn(Asked) + Send + Sync + 'static,
    ) -> Result<Self, ServeError> {
        let failed = |cause| ServeError::Listen { address: listen, cause };
        let listener = listener(listen).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let peers = Arc::new(Peers::default());
        let acceptor = TlsAcceptor::from(tls::server(cluster)?);
        let server = Server::new(acceptor, Box::new(asked), Arc::clone(&peers));
        let inner = Inner {
            address,
            base: u64::from_le_bytes(clock::random()),
            connector: TlsConnector::from(tls::client(cluster)?),
            peers,
            runtime: Handle::current(),
            accepting: tokio::spawn(server.accept(listener)).abort_handle(),
        };
        let control = Self { inner: Arc::new(inner) };
        control.set_peers(&cluster.settings);
        Ok(control)
    }

    /// Where it listens; tells the port if 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// Asks a member. `answer` is called once, from another task, within `within` (and a little). A ticket names a
    /// question: asked again, the same ticket gets the first answer.
    pub fn send(
        &self,
        to: HostId,
        ticket: Ticket,
        request: Request,
        within: Duration,
        answer: impl FnOnce(Result<Reply, ControlError>) + Send + 'static,
    ) {
        let ticket = Ticket(self.inner.base.wrapping_add(ticket.0));
        let envelope = Envelope { protocol: CONTROL_PROTOCOL, ticket, request };
        let ask = |frame| Ask::new(ticket, frame, Instant::now() + within, within, answer);
        let asks = self.inner.peers.lock().get(&to).map(|peer| peer.asks.clone());
        let (ask, refused) = match (frame::encode(&envelope), asks) {
            (Err(bad), _) => (ask(Vec::new()), ControlError::Unsendable(bad)),
            (Ok(_), None) => (ask(Vec::new()), ControlError::Unknown(to)),
            (Ok(frame), Some(asks)) => match asks.try_send(ask(frame)) {
                Ok(()) => return,
                Err(full) => (full.into_inner(), ControlError::Busy(to)),
            },
        };
        self.inner.runtime.spawn(async move { ask.refuse(refused) });
    }

    /// Takes the members and their addresses from a newer document. What waits for a host that is gone is given up.
    pub fn set_peers(&self, settings: &ClusterSettings) {
        let mut peers = self.inner.peers.lock();
        peers.retain(|host, _| settings.member(*host).is_some());
        for member in &settings.members {
            match peers.get(&member.host) {
                Some(peer) => peer.moved_to(member.control),
                None => {
                    let connector = self.inner.connector.clone();
                    let peer = Peer::start(&self.inner.runtime, member.host, member.control, connector);
                    peers.insert(member.host, peer);
                }
            }
        }
    }
}

/// The members, shared between both sides. Held for a few instructions only.
#[derive(Default)]
struct Peers(Mutex<BTreeMap<HostId, Peer>>);

impl Peers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostId, Peer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A member's address; others must not use up what members need.
    fn is_member_at(&self, ip: IpAddr) -> bool {
        self.lock().values().any(|peer| peer.address().ip() == ip)
    }

    /// The host is there: connect at once if something waits.
    fn is_there(&self, host: HostId) {
        if let Some(peer) = self.lock().get(&host) {
            peer.try_now();
        }
    }
}

fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    // The address may come later than this agent, from DHCP for example.
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

/// Small messages go at once, a dead peer is noticed, an idle connection costs a packet per minute.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(LOST_AFTER))?;
    let minute = Duration::from_secs(60);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(minute).with_interval(LOST_AFTER).with_retries(3))
}

#[cfg(test)]
mod tests;
