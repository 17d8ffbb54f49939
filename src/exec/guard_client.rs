//! The agent's end of the guard's socket: threads of its own, so that neither end ever waits for the other.
//!
//! ```text
//!            connect, Hello                      read ends, write fails
//!  away ───────────────────► connected (Connected) ────────────────────► away (Lost), after 50 ms … 1 s again
//! ```
//!
//! After `Connected` come Hello, every lease and every row. Before `Lost` every outstanding order is answered by a refusal
//! that says so: it may or may not have been done, and the rows that follow the next `Connected` show it.
//!
//! Numbers: 1,024 orders wait for a guard that does not read; further ones are refused.
//!
//! Deliberately not here: what to order.

use std::collections::BTreeSet;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::core::timing::RECONNECT;
use crate::types::Ticket;
use crate::types::guard::{GUARD_PROTOCOL, GuardMessage, GuardOrder, GuardReport, Refusal};
use crate::wire::frame;

/// How many orders wait. When full, further ones are refused at once.
const ORDERS_MAX: usize = 1024;
/// How long the guard may not read.
const PATIENCE: Duration = Duration::from_secs(5);
/// The ticket of our own Hello; no order has it.
const HELLO: Ticket = Ticket(u64::MAX);

/// What the guard, or its absence, tells.
#[derive(Debug)]
pub enum GuardEvent {
    /// A new connection; every lease and row follows.
    Connected,
    /// It says something.
    Report(GuardReport),
    /// The connection ended, or could not be made; why. Told once until the next `Connected`.
    Lost(String),
}

/// The connection that stands, if one does.
#[derive(Default)]
struct Line {
    orders: Option<SyncSender<GuardMessage>>,
    stream: Option<UnixStream>,
    /// Sent or waiting, not answered.
    outstanding: BTreeSet<Ticket>,
    closed: bool,
}

/// See the module. Dropping it ends the connection.
pub struct GuardClient {
    line: Arc<Mutex<Line>>,
    events: Sender<GuardEvent>,
}

impl GuardClient {
    /// Connects to the socket at `path`, again and again. `report` is called by a thread of its own, in order.
    ///
    /// # Panics
    /// When no thread can be made.
    pub fn spawn(path: PathBuf, report: impl Fn(GuardEvent) + Send + 'static) -> Self {
        let line = Arc::new(Mutex::new(Line::default()));
        let (events, told) = channel();
        thread("guard-events", move || told.into_iter().for_each(report));
        let (of_thread, to) = (Arc::clone(&line), events.clone());
        thread("guard-client", move || run(&path, &of_thread, &to));
        Self { line, events }
    }

    /// Sends an order. Its answer comes as `Report(Done)`; at once, as a refusal, if the guard is away or does not read.
    pub fn order(&self, ticket: Ticket, order: GuardOrder) {
        let mut line = lock(&self.line);
        let refusal = match &line.orders {
            None => Refusal::Unconfigured,
            Some(orders) => match orders.try_send(GuardMessage { ticket, order }) {
                Ok(()) => {
                    line.outstanding.insert(ticket);
                    return;
                }
                Err(TrySendError::Disconnected(_)) => Refusal::Unconfigured,
                Err(TrySendError::Full(_)) => Refusal::WrongState("the guard does not read its orders".to_owned()),
            },
        };
        drop(line);
        // The thread of the events lives as long as self.
        drop(self.events.send(GuardEvent::Report(GuardReport::Done { ticket, result: Err(refusal) })));
    }
}

impl Drop for GuardClient {
    fn drop(&mut self) {
        let mut line = lock(&self.line);
        line.closed = true;
        line.hang_up();
    }
}

impl Line {
    fn hang_up(&mut self) {
        self.orders = None;
        if let Some(stream) = self.stream.take() {
            drop(stream.shutdown(Shutdown::Both)); // It may be gone already.
        }
    }
}

fn run(path: &Path, line: &Mutex<Line>, events: &Sender<GuardEvent>) {
    let (first, longest) = RECONNECT;
    let mut pause = first;
    let mut told = false;
    loop {
        let lost = match UnixStream::connect(path) {
            Err(error) => format!("{}: {error}; is mainstay-guard running?", path.display()),
            Ok(stream) => match talk(stream, line, events) {
                (true, lost) => {
                    (pause, told) = (first, false);
                    lost
                }
                (false, lost) => lost,
            },
        };
        lock(line).hang_up();
        for ticket in std::mem::take(&mut lock(line).outstanding) {
            let result = Err(Refusal::WrongState("the guard is gone, and it may have been done".to_owned()));
            drop(events.send(GuardEvent::Report(GuardReport::Done { ticket, result }))); // Nobody listens: closed, below.
        }
        if lock(line).closed || (!told && events.send(GuardEvent::Lost(lost)).is_err()) {
            return;
        }
        told = true;
        std::thread::sleep(pause);
        pause = (pause * 2).min(longest);
    }
}

/// One connection until it ends: whether it ever stood, and why it ended.
fn talk(stream: UnixStream, line: &Mutex<Line>, events: &Sender<GuardEvent>) -> (bool, String) {
    let (orders, waiting) = sync_channel(ORDERS_MAX);
    let begun = begin(&stream, line, orders, waiting);
    if let Err(error) = begun {
        return (false, format!("guard: {error}"));
    }
    let mut from = std::io::BufReader::new(&stream);
    let mut stood = false;
    loop {
        let report = match frame::read::<GuardReport>(&mut from) {
            Ok(Some(report)) => report,
            Ok(None) => return (stood, "the guard ended the connection".to_owned()),
            Err(error) => return (stood, format!("guard: {error}")),
        };
        match report {
            GuardReport::Done { ticket: HELLO, result: Ok(()) } => {}
            GuardReport::Done { ticket: HELLO, result: Err(refusal) } => return (false, refusal.to_string()),
            GuardReport::Hello { protocol, .. } if protocol != GUARD_PROTOCOL => {
                return (false, Refusal::Version(protocol).to_string());
            }
            other => {
                if let GuardReport::Done { ticket, .. } = &other {
                    lock(line).outstanding.remove(ticket);
                }
                let first = !stood && matches!(other, GuardReport::Hello { .. });
                if first && events.send(GuardEvent::Connected).is_err() {
                    return (stood, "nobody listens".to_owned());
                }
                stood |= first;
                if stood && events.send(GuardEvent::Report(other)).is_err() {
                    return (stood, "nobody listens".to_owned());
                }
            }
        }
    }
}

/// Sends Hello, then opens the line for orders.
fn begin(
    stream: &UnixStream,
    line: &Mutex<Line>,
    orders: SyncSender<GuardMessage>,
    waiting: Receiver<GuardMessage>,
) -> Result<(), frame::FrameError> {
    let mut to = stream.try_clone()?;
    to.set_write_timeout(Some(PATIENCE))?;
    let hello = GuardMessage { ticket: HELLO, order: GuardOrder::Hello { protocol: GUARD_PROTOCOL } };
    frame::write(&mut to, &hello)?;
    let mut line = lock(line);
    if line.closed {
        return Err(std::io::Error::other("closed").into());
    }
    line.stream = Some(stream.try_clone()?);
    line.orders = Some(orders);
    drop(line);
    thread("guard-orders", move || {
        for message in waiting {
            if frame::write(&mut to, &message).is_err() {
                drop(to.shutdown(Shutdown::Both)); // The reader notices and says so.
                return;
            }
        }
    });
    Ok(())
}

fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    // Nothing in it can be half changed.
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    let made = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    made.expect("a host that cannot make a thread cannot run an agent");
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::types::{Incarnation, Tenure};

    const SOON: Duration = Duration::from_secs(10);

    fn client(path: &Path) -> (GuardClient, Receiver<GuardEvent>) {
        let (to, from) = channel();
        let client = GuardClient::spawn(path.to_owned(), move |event| drop(to.send(event)));
        (client, from)
    }

    fn forget() -> GuardOrder {
        let tenure = Tenure { vm: Default::default(), generation: Default::default() };
        GuardOrder::Forget { tenure }
    }

    #[test]
    fn without_a_guard_orders_fail_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let (client, events) = client(&folder.path().join("guard.sock"));
        client.order(Ticket(7), forget());
        let mut answered = false;
        let mut lost = false;
        while !(answered && lost) {
            match events.recv_timeout(SOON).unwrap() {
                GuardEvent::Report(GuardReport::Done { ticket: Ticket(7), result: Err(Refusal::Unconfigured) }) => {
                    answered = true;
                }
                GuardEvent::Lost(why) => {
                    assert!(why.contains("guard.sock"), "{why}");
                    lost = true;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn greets_carries_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guard.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (client, events) = client(&path);
        for round in 1..3 {
            let (mut stream, _) = listener.accept().unwrap();
            let hello: GuardMessage = frame::read(&mut stream).unwrap().unwrap();
            assert_eq!(hello.order, GuardOrder::Hello { protocol: GUARD_PROTOCOL });
            let report = GuardReport::Hello {
                protocol: GUARD_PROTOCOL,
                incarnation: Incarnation(round),
                boot: Default::default(),
                host: None,
            };
            frame::write(&mut stream, &report).unwrap();
            frame::write(&mut stream, &GuardReport::Done { ticket: hello.ticket, result: Ok(()) }).unwrap();
            assert!(matches!(events.recv_timeout(SOON).unwrap(), GuardEvent::Connected));
            assert!(matches!(events.recv_timeout(SOON).unwrap(), GuardEvent::Report(got) if got == report));
            client.order(Ticket(round), forget());
            let order: GuardMessage = frame::read(&mut stream).unwrap().unwrap();
            assert_eq!((order.ticket, order.order), (Ticket(round), forget()));
            drop(stream);
            let unanswered = events.recv_timeout(SOON).unwrap();
            assert!(matches!(
                unanswered,
                GuardEvent::Report(GuardReport::Done { ticket, result: Err(Refusal::WrongState(_)) })
                    if ticket == Ticket(round)
            ));
            assert!(matches!(events.recv_timeout(SOON).unwrap(), GuardEvent::Lost(_)));
        }
    }

    #[test]
    fn another_protocol_is_told_and_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guard.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (_client, events) = client(&path);
        let (mut stream, _) = listener.accept().unwrap();
        let hello: GuardMessage = frame::read(&mut stream).unwrap().unwrap();
        let result = Err(Refusal::Version(GUARD_PROTOCOL + 1));
        frame::write(&mut stream, &GuardReport::Done { ticket: hello.ticket, result }).unwrap();
        let GuardEvent::Lost(why) = events.recv_timeout(SOON).unwrap() else { panic!("it was used") };
        assert!(why.contains("restart mainstay-guard"), "{why}");
    }
}
