//! The asking side: one task per peer that owns its connection and everything that waits for it.
//!
//! ```text
//!          something waits, pause over            TLS done
//!   Down ────────────────────────────► Dialing ───────────► Up
//!    ▲   pause 50 ms … 2 s                │                  │  reader and writer are tasks of their own
//!    └────────────────────────────────────┴──────────────────┘
//!          failed, lost, address changed, or: a deadline passed and nothing was heard since it was asked
//! ```
//!
//! The pause starts at 50 ms again once an answer was heard, or when the peer itself connected to us.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{ControlError, MAX_WAITING, tune};
use crate::exec::cluster::{frames, tls};
use crate::types::control::{Reply, ReplyEnvelope};
use crate::types::{HostId, Ticket};
use crate::wire::frame::{self, MAX_FRAME};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Longest attempt to connect, TLS included.
const DIAL_WITHIN: Duration = Duration::from_secs(3);
/// Longest write of one frame.
const WRITE_WITHIN: Duration = Duration::from_secs(10);

/// Callers that may wait for the answer to one ticket.
const MAX_ASKERS: usize = 8;

/// What the rest of the agent holds of a link. When it is dropped the link ends.
pub(super) struct Peer {
    pub asks: mpsc::Sender<Ask>,
    address: watch::Sender<SocketAddr>,
    there: Arc<Notify>,
}

impl Peer {
    pub fn start(runtime: &Handle, host: HostId, address: SocketAddr, connector: TlsConnector) -> Self {
        let (asks, asked) = mpsc::channel(MAX_WAITING);
        let (address, addressed) = watch::channel(address);
        let there = Arc::new(Notify::new());
        let link = Link {
            host,
            connector,
            asked,
            address: addressed,
            there: Arc::clone(&there),
            line: Line::Down { until: Instant::now() },
            pause: FIRST_PAUSE,
            trouble: None,
            waiting: BTreeMap::new(),
            unsent: VecDeque::new(),
        };
        runtime.spawn(link.run());
        Self { asks, address, there }
    }

    pub fn address(&self) -> SocketAddr {
        *self.address.borrow()
    }

    pub fn moved_to(&self, address: SocketAddr) {
        self.address.send_if_modified(|now| std::mem::replace(now, address) != address);
    }

    pub fn try_now(&self) {
        self.there.notify_one();
    }
}

/// One request that waits to be taken by its link.
pub(super) struct Ask {
    ticket: Ticket,
    frame: Arc<[u8]>,
    asker: Asker,
}

impl Ask {
    pub fn new(
        ticket: Ticket,
        frame: Vec<u8>,
        deadline: Instant,
        within: Duration,
        answer: impl FnOnce(Result<Reply, ControlError>) + Send + 'static,
    ) -> Self {
        Self { ticket, frame: frame.into(), asker: Asker { deadline, within, answer: Some(Box::new(answer)) } }
    }

    pub fn refuse(self, why: ControlError) {
        self.asker.tell(Err(why));
    }
}

type Tell = Box<dyn FnOnce(Result<Reply, ControlError>) + Send>;

/// Who is to be told, exactly once, whatever becomes of the link.
struct Asker {
    deadline: Instant,
    within: Duration,
    answer: Option<Tell>,
}

impl Asker {
    fn tell(mut self, result: Result<Reply, ControlError>) {
        if let Some(answer) = self.answer.take() {
            answer(result);
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            answer(Err(ControlError::GivenUp));
        }
    }
}

/// A question under way. The same ticket may be asked several times; the frame is sent once per connection.
struct Waiting {
    frame: Arc<[u8]>,
    askers: Vec<Asker>,
    /// On the present connection.
    sent: Option<Instant>,
    /// On any.
    ever_sent: bool,
}

struct Link {
    host: HostId,
    connector: TlsConnector,
    asked: mpsc::Receiver<Ask>,
    address: watch::Receiver<SocketAddr>,
    there: Arc<Notify>,
    line: Line,
    pause: Duration,
    /// What the last attempt said.
    trouble: Option<String>,
    waiting: BTreeMap<Ticket, Waiting>,
    unsent: VecDeque<Ticket>,
}

enum Line {
    Down { until: Instant },
    Dialing(Dialing),
    Up(Up),
}

struct Dialing(JoinHandle<Result<TlsStream<TcpStream>, String>>);

impl Drop for Dialing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Up {
    frames: mpsc::Sender<Arc<[u8]>>,
    heard: mpsc::Receiver<Heard>,
    /// When an answer came last; at first, when the connection was made.
    heard_at: Instant,
    tasks: [AbortHandle; 2],
}

impl Drop for Up {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

enum Heard {
    Reply(Box<ReplyEnvelope>),
    Unreadable(Ticket, String),
    Lost(String),
}

enum Event {
    Dial,
    Dialed(Result<Box<TlsStream<TcpStream>>, String>),
    Heard(Heard),
    Room,
}

impl Line {
    /// Waits for what the connection does next. Nothing is lost if this is dropped.
    async fn event(&mut self, work: bool, unsent: bool) -> Event {
        match self {
            Self::Down { until } if work => {
                sleep_until(*until).await;
                Event::Dial
            }
            Self::Down { .. } => std::future::pending().await,
            Self::Dialing(dialing) => match (&mut dialing.0).await {
                Ok(dialed) => Event::Dialed(dialed.map(Box::new)),
                Err(_) => Event::Dialed(Err("given up".into())),
            },
            Self::Up(up) => tokio::select! {
                heard = up.heard.recv() => Event::Heard(heard.unwrap_or_else(|| Heard::Lost("closed".into()))),
                room = up.frames.reserve(), if unsent => match room {
                    Ok(_) => Event::Room,
                    Err(_) => Event::Heard(Heard::Lost("closed".into())),
                },
            },
        }
    }
}

impl Link {
    async fn run(mut self) {
        loop {
            let deadline = self.waiting.values().flat_map(|waiting| &waiting.askers).map(|a| a.deadline).min();
            let due = sleep_until(deadline.unwrap_or_else(Instant::now));
            tokio::select! {
                asked = self.asked.recv() => match asked {
                    Some(ask) => self.take(ask),
                    None => return,
                },
                () = due, if deadline.is_some() => self.expire(Instant::now()),
                event = self.line.event(!self.waiting.is_empty(), !self.unsent.is_empty()) => self.happened(event),
                changed = self.address.changed() => match changed {
                    Ok(()) => self.redial_now(),
                    Err(_) => return,
                },
                () = self.there.notified() => if matches!(self.line, Line::Down { .. }) {
                    self.redial_now();
                },
            }
        }
    }

    fn take(&mut self, ask: Ask) {
        let full = MAX_WAITING <= self.waiting.len();
        match self.waiting.get_mut(&ask.ticket) {
            Some(waiting) if waiting.askers.len() < MAX_ASKERS => return waiting.askers.push(ask.asker),
            Some(_) => return ask.refuse(ControlError::Busy(self.host)),
            None if full => return ask.refuse(ControlError::Busy(self.host)),
            None => {}
        }
        self.unsent.push_back(ask.ticket);
        let waiting = Waiting { frame: ask.frame, askers: vec![ask.asker], sent: None, ever_sent: false };
        self.waiting.insert(ask.ticket, waiting);
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::Dial => self.dial(),
            Event::Dialed(Ok(stream)) => self.line = Line::Up(Up::start(*stream)),
            Event::Dialed(Err(why)) | Event::Heard(Heard::Lost(why)) => self.lost(why),
            Event::Heard(Heard::Reply(envelope)) => self.heard(envelope.ticket, Ok(envelope.reply)),
            Event::Heard(Heard::Unreadable(ticket, why)) => self.heard(ticket, Err(ControlError::Unreadable(why))),
            Event::Room => self.send_next(),
        }
    }

    fn dial(&mut self) {
        let (connector, address, name) = (self.connector.clone(), *self.address.borrow(), tls::server_name(self.host));
        self.line = Line::Dialing(Dialing(tokio::spawn(async move {
            let connect = async {
                let stream = TcpStream::connect(address).await?;
                tune(&stream)?;
                connector.connect(name, stream).await
            };
            match timeout(DIAL_WITHIN, connect).await {
                Ok(connected) => connected.map_err(|error| format!("{address}: {error}")),
                Err(_) => Err(format!("{address}: no answer within {DIAL_WITHIN:?}")),
            }
        })));
    }

    fn send_next(&mut self) {
        let Line::Up(up) = &self.line else { return };
        while let Some(ticket) = self.unsent.pop_front() {
            // Its deadline may have passed.
            let Some(waiting) = self.waiting.get_mut(&ticket) else { continue };
            if up.frames.try_send(Arc::clone(&waiting.frame)).is_err() {
                self.unsent.push_front(ticket);
                return;
            }
            waiting.sent = Some(Instant::now());
            waiting.ever_sent = true;
            return;
        }
    }

    fn heard(&mut self, ticket: Ticket, result: Result<Reply, ControlError>) {
        if let Line::Up(up) = &mut self.line {
            up.heard_at = Instant::now();
        }
        self.pause = FIRST_PAUSE;
        self.trouble = None;
        let Some(waiting) = self.waiting.remove(&ticket) else { return };
        for asker in waiting.askers {
            asker.tell(result.clone());
        }
    }

    /// What was sent on the lost connection is asked again on the next.
    fn lost(&mut self, why: String) {
        self.trouble = Some(why);
        self.line = Line::Down { until: Instant::now() + self.pause };
        self.pause = LONGEST_PAUSE.min(self.pause * 2);
        self.all_unsent();
    }

    fn redial_now(&mut self) {
        self.line = Line::Down { until: Instant::now() };
        self.pause = FIRST_PAUSE;
        self.all_unsent();
    }

    fn all_unsent(&mut self) {
        self.waiting.values_mut().for_each(|waiting| waiting.sent = None);
        self.unsent = self.waiting.keys().copied().collect();
    }

    fn expire(&mut self, now: Instant) {
        let heard_at = match &self.line {
            Line::Up(up) => Some(up.heard_at),
            Line::Down { .. } | Line::Dialing(_) => None,
        };
        let mut deaf = false;
        let trouble = &self.trouble;
        self.waiting.retain(|_, waiting| {
            let (late, kept): (Vec<_>, Vec<_>) = waiting.askers.drain(..).partition(|asker| asker.deadline <= now);
            waiting.askers = kept;
            deaf |= !late.is_empty() && heard_at.zip(waiting.sent).is_some_and(|(heard, sent)| heard <= sent);
            for asker in late {
                let within = asker.within;
                asker.tell(Err(if waiting.ever_sent {
                    ControlError::NoAnswer { within }
                } else {
                    ControlError::Unreached { within, why: trouble.clone() }
                }));
            }
            !waiting.askers.is_empty()
        });
        self.unsent.retain(|ticket| self.waiting.contains_key(ticket));
        if deaf {
            self.lost("connected, but nothing is answered".into());
        }
    }
}

impl Up {
    fn start(stream: TlsStream<TcpStream>) -> Self {
        let (from, to) = tokio::io::split(stream);
        let (frames, to_send) = mpsc::channel(16);
        let (say, heard) = mpsc::channel(16);
        let reader = tokio::spawn(read(from, say.clone()));
        let writer = tokio::spawn(write(to, to_send, say));
        Self { frames, heard, heard_at: Instant::now(), tasks: [reader.abort_handle(), writer.abort_handle()] }
    }
}

async fn read(mut from: ReadHalf<TlsStream<TcpStream>>, say: mpsc::Sender<Heard>) {
    loop {
        let heard = match frames::read(&mut from, MAX_FRAME).await {
            Ok(Some(body)) => parse(&body),
            Ok(None) => Heard::Lost("the other side closed the connection".into()),
            Err(error) => Heard::Lost(error.to_string()),
        };
        let last = matches!(heard, Heard::Lost(_));
        if say.send(heard).await.is_err() || last {
            return;
        }
    }
}

/// A reply of a newer version still names its ticket.
fn parse(body: &[u8]) -> Heard {
    match frame::decode::<ReplyEnvelope>(body) {
        Ok(envelope) => Heard::Reply(Box::new(envelope)),
        Err(bad) => match postcard::take_from_bytes::<(u16, Ticket)>(body) {
            Ok(((_, ticket), _)) => Heard::Unreadable(ticket, bad.to_string()),
            Err(_) => Heard::Lost(bad.to_string()),
        },
    }
}

async fn write(
    mut to: WriteHalf<TlsStream<TcpStream>>,
    mut frames_to_send: mpsc::Receiver<Arc<[u8]>>,
    say: mpsc::Sender<Heard>,
) {
    while let Some(frame) = frames_to_send.recv().await {
        let why = match timeout(WRITE_WITHIN, frames::write(&mut to, &frame)).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("a request could not be written within {WRITE_WITHIN:?}"),
        };
        let _ = say.send(Heard::Lost(why)).await; // The link may be gone already.
        return;
    }
}
