//! The listening side: accepts, finds out who it is, hands requests over, sends answers back.
//!
//! ```text
//! accept ── place free? ── TLS, 5 s ──┬─ certificate ──► requests until the connection ends
//!           members and strangers     └─ none ─────────► one `Join`, one answer, closed
//!           have places of their own
//! ```
//!
//! A place is held until the peer has shown a certificate, so junk and slow strangers use up strangers' places only.
//! A member has at most two connections; its oldest goes when it makes a third.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::answers::{Answers, Asking, Line};
use super::{Answer, Asked, MAX_WAITING, Peers, tune};
use crate::exec::cluster::{frames, host_of};
use crate::types::control::{CONTROL_PROTOCOL, Denial, Envelope, Reply, ReplyEnvelope, Request};
use crate::types::{Digest, HostId, MAX_HOSTS, Ticket};
use crate::wire::frame::{self, MAX_FRAME};

/// Connections from members' addresses that have not shown a certificate yet.
const MEMBER_PLACES: usize = 2 * MAX_HOSTS;
/// The same from anywhere else.
const STRANGER_PLACES: usize = 16;
/// Longest TLS handshake.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Longest wait for a stranger's one request.
const JOIN_WITHIN: Duration = Duration::from_secs(5);
/// Longest wait for the agent's answer to it.
const ADMIT_WITHIN: Duration = Duration::from_secs(60);
/// Longest request of a stranger, in bytes.
const MAX_JOIN: usize = 16 * 1024;
/// Joins per second; more are told to come again.
const JOINS_PER_SECOND: u32 = 4;
/// Longest write of one answer.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
const CONNECTIONS_PER_MEMBER: usize = 2;
/// Hosts with a valid certificate that are remembered; those of a full cluster, twice.
const MAX_CALLERS: usize = 2 * MAX_HOSTS;

type Stream = TlsStream<TcpStream>;

pub(super) struct Server {
    tls: TlsAcceptor,
    asked: Box<dyn Fn(Asked) + Send + Sync>,
    peers: Arc<Peers>,
    callers: Mutex<BTreeMap<HostId, Caller>>,
    joins: Mutex<Joins>,
    member_places: Arc<Semaphore>,
    stranger_places: Arc<Semaphore>,
}

#[derive(Default)]
struct Caller {
    answers: Arc<Answers>,
    connections: VecDeque<AbortHandle>,
}

struct Joins {
    second: Instant,
    count: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub fn new(tls: TlsAcceptor, asked: Box<dyn Fn(Asked) + Send + Sync>, peers: Arc<Peers>) -> Self {
        Self {
            tls,
            asked,
            peers,
            callers: Mutex::default(),
            joins: Mutex::new(Joins { second: Instant::now(), count: 0 }),
            member_places: Arc::new(Semaphore::new(MEMBER_PLACES)),
            stranger_places: Arc::new(Semaphore::new(STRANGER_PLACES)),
        }
    }

    /// Runs until it is aborted; its connections end with it.
    pub async fn accept(self, listener: TcpListener) {
        let server = Arc::new(self);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, address)) => {
                        if let Some(place) = server.place(address) {
                            let start = Arc::clone(&server);
                            let (tell, told) = oneshot::channel();
                            let handle = connections.spawn(async move {
                                if let Ok(own) = told.await {
                                    start.connection(stream, place, own).await;
                                }
                            });
                            let _ = tell.send(handle);
                        }
                    }
                    // Out of descriptors, for example: that passes.
                    Err(_) => sleep(Duration::from_millis(100)).await,
                },
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
            }
        }
    }

    fn place(&self, address: SocketAddr) -> Option<OwnedSemaphorePermit> {
        let member = self.peers.is_member_at(address.ip().to_canonical());
        let places = if member { &self.member_places } else { &self.stranger_places };
        Arc::clone(places).try_acquire_owned().ok()
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, place: OwnedSemaphorePermit, own: AbortHandle) {
        if tune(&stream).is_err() {
            return;
        }
        let Ok(Ok(stream)) = timeout(HANDSHAKE_WITHIN, self.tls.accept(stream)).await else { return };
        let Some(certificate) = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()) else {
            self.stranger(stream).await;
            return;
        };
        let Ok(host) = host_of(certificate) else { return };
        drop(place);
        let Some(answers) = self.caller(host, own) else { return };
        self.peers.is_there(host);
        let (from, to) = tokio::io::split(stream);
        let (line, frames) = mpsc::channel(MAX_WAITING);
        tokio::select! {
            () = self.requests(host, from, &answers, &line) => {}
            () = write(to, frames) => {}
        }
    }

    /// Remembers the connection, and ends the oldest if there are too many; `None` = too many callers.
    fn caller(&self, host: HostId, own: AbortHandle) -> Option<Arc<Answers>> {
        let mut callers = lock(&self.callers);
        if !callers.contains_key(&host) && MAX_CALLERS <= callers.len() {
            return None;
        }
        let caller = callers.entry(host).or_default();
        caller.connections.retain(|connection| !connection.is_finished());
        caller.connections.push_back(own);
        if CONNECTIONS_PER_MEMBER < caller.connections.len()
            && let Some(oldest) = caller.connections.pop_front()
        {
            oldest.abort();
        }
        Some(Arc::clone(&caller.answers))
    }

    /// Takes requests until the connection ends or brings something that is none.
    async fn requests(&self, host: HostId, mut from: ReadHalf<Stream>, answers: &Arc<Answers>, line: &Line) {
        while let Ok(Some(body)) = frames::read(&mut from, MAX_FRAME).await {
            let Ok(((protocol, ticket), _)) = postcard::take_from_bytes::<(u16, Ticket)>(&body) else { return };
            let now = match frame::decode::<Envelope>(&body) {
                Ok(envelope) => self.request(host, envelope, digest_of(&body), answers, line),
                Err(bad) => {
                    let why = format!("control protocol {protocol} is asked, {CONTROL_PROTOCOL} is spoken here: {bad}");
                    Some(denial(ticket, Denial::NotAllowed(why)))
                }
            };
            // Waits while the peer does not read what it asked for; that holds up itself only.
            if let Some(frame) = now
                && line.send(frame).await.is_err()
            {
                return;
            }
        }
    }

    /// Hands a new question over; what can be answered at once is returned.
    fn request(
        &self,
        host: HostId,
        envelope: Envelope,
        question: Digest,
        answers: &Arc<Answers>,
        line: &Line,
    ) -> Option<Arc<[u8]>> {
        let Envelope { ticket, request, .. } = envelope;
        match answers.ask(ticket, question, line) {
            Asking::Again => None,
            Asking::Answered(frame) => Some(frame),
            Asking::Reused => {
                let why = "this ticket was used for another question".into();
                Some(denial(ticket, Denial::NotAllowed(why)))
            }
            Asking::Full => {
                let why = format!("{MAX_WAITING} questions of that host are open already");
                Some(denial(ticket, Denial::Unable(why)))
            }
            Asking::New => {
                let answers = Arc::clone(answers);
                let answer = Answer::new(move |reply| answers.answer(ticket, encoded(ticket, reply)));
                (self.asked)(Asked { from: Some(host), ticket, request, answer });
                None
            }
        }
    }

    /// One request without a certificate.
    async fn stranger(&self, stream: Stream) {
        let (mut from, mut to) = tokio::io::split(stream);
        let Ok(Ok(Some(body))) = timeout(JOIN_WITHIN, frames::read(&mut from, MAX_JOIN)).await else { return };
        let Ok(Envelope { ticket, request, .. }) = frame::decode(&body) else { return };
        let reply = if !matches!(request, Request::Join(_)) {
            Reply::Denied(Denial::NotAllowed("only a member may ask this; its certificate is missing".into()))
        } else if !self.may_join_now() {
            Reply::Denied(Denial::Unable("too many hosts join at once; try again".into()))
        } else {
            let (tell, told) = oneshot::channel();
            let answer = Answer::new(move |reply| drop(tell.send(reply)));
            (self.asked)(Asked { from: None, ticket, request, answer });
            match timeout(ADMIT_WITHIN, told).await {
                Ok(Ok(reply)) => reply,
                _ => return,
            }
        };
        let _ = timeout(WRITE_WITHIN, async {
            frames::write(&mut to, &encoded(ticket, reply)).await?;
            tokio::io::AsyncWriteExt::shutdown(&mut to).await
        })
        .await; // A joiner that is gone asks again.
    }

    fn may_join_now(&self) -> bool {
        let mut joins = lock(&self.joins);
        let now = Instant::now();
        if Duration::from_secs(1) <= now - joins.second {
            *joins = Joins { second: now, count: 0 };
        }
        joins.count = joins.count.saturating_add(1);
        joins.count <= JOINS_PER_SECOND
    }
}

async fn write(mut to: WriteHalf<Stream>, mut frames_to_send: mpsc::Receiver<Arc<[u8]>>) {
    while let Some(frame) = frames_to_send.recv().await {
        let Ok(Ok(())) = timeout(WRITE_WITHIN, frames::write(&mut to, &frame)).await else { return };
    }
}

fn encoded(ticket: Ticket, reply: Reply) -> Arc<[u8]> {
    let envelope = ReplyEnvelope { protocol: CONTROL_PROTOCOL, ticket, reply };
    match frame::encode(&envelope) {
        Ok(frame) => frame.into(),
        Err(bad) => denial(ticket, Denial::Unable(format!("the answer cannot be sent: {bad}"))),
    }
}

fn denial(ticket: Ticket, why: Denial) -> Arc<[u8]> {
    let envelope = ReplyEnvelope { protocol: CONTROL_PROTOCOL, ticket, reply: Reply::Denied(why) };
    frame::encode(&envelope).expect("a denial is short plain data").into()
}

fn digest_of(body: &[u8]) -> Digest {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, body).as_ref());
    Digest(bytes)
}
