//! Channels to the agents inside guests: the sockets that QEMU opens for the virtio-serial port of each VM.
//!
//! ```text
//!   follow(vm ► socket) ─► one task per VM:  connect ─► say Hello ─► read, at most RATE and MESSAGES ─► events
//!                                              ▲                          │ junk, end, error
//!                                              └──── pause ◄──────────────┘
//!   say(vm, message) ─► its queue (QUEUE) ─► written within WRITE, or the connection ends
//! ```
//!
//! The guest is hostile by assumption. A task reads no faster than `RATE` bytes a second, so a flood costs the guest, not the
//! host: what it writes stays in its own queue. Beyond `MESSAGES` a second messages are dropped and counted. Each task holds at
//! most one message and what was read with it. What was wrong is told once a minute, in one line.
//!
//! Deliberately not here: what messages mean (`core::guests`), which VM has which socket (`libvirt::xml`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use mainstay_guest::MAX_PER_SECOND;
use mainstay_guest::frame::{Decoder, encode};
use mainstay_guest::message::{FromGuest, ToGuest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::core::guests::GuestEvent;
use crate::core::note::Note;
use crate::exec::clock;
use crate::types::{Time, VmId};

/// Bytes that are read of one guest in a second. Beats and reports need a hundredth of it.
const RATE: u32 = 256 * 1024;
/// Read at once.
const CHUNK: usize = 16 * 1024;
/// Messages to one guest that wait to be written; one more ends the connection: it does not read.
const QUEUE: usize = 256;
/// To write one message.
const WRITE: Duration = Duration::from_secs(5);
/// Between two tries to connect: QEMU opens the socket before the guest starts.
const AGAIN: Duration = Duration::from_millis(200);
/// After junk.
const REST: Duration = Duration::from_secs(1);
/// At most one line about one guest in this time.
const QUIET: Duration = Duration::from_secs(60);

/// All channels of this host. When it is dropped, they are closed.
pub struct Channels {
    events: mpsc::Sender<ChannelEvent>,
    open: BTreeMap<VmId, Channel>,
}

/// What comes from channels.
#[derive(Debug)]
pub enum ChannelEvent {
    /// For the core.
    Guest(GuestEvent),
    /// For people.
    Note(Note),
}

struct Channel {
    socket: PathBuf,
    queue: mpsc::Sender<ToGuest>,
    task: JoinHandle<()>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Channels {
    /// None yet. Events are awaited: who does not take them holds up all guests.
    #[must_use]
    pub fn new(events: mpsc::Sender<ChannelEvent>) -> Self {
        Self { events, open: BTreeMap::new() }
    }

    /// These VMs have a channel here, by name and socket; others are closed.
    pub fn follow(&mut self, wanted: &BTreeMap<VmId, (String, PathBuf)>) {
        self.open.retain(|vm, channel| wanted.get(vm).is_some_and(|(_, socket)| *socket == channel.socket));
        for (vm, (name, socket)) in wanted {
            self.open.entry(*vm).or_insert_with(|| {
                let (queue, orders) = mpsc::channel(QUEUE);
                let line = Line { vm: *vm, name: name.clone(), events: self.events.clone(), told: None, trouble: 0 };
                Channel { socket: socket.clone(), queue, task: tokio::spawn(line.live(socket.clone(), orders)) }
            });
        }
    }

    /// Tells a guest something. One that has no channel, or does not read, does not hear it: it says again what it waits for.
    pub fn say(&self, vm: VmId, message: ToGuest) {
        if let Some(channel) = self.open.get(&vm) {
            let _ = channel.queue.try_send(message);
        }
    }

    /// Waits until all that was said is on its way, at most so long.
    pub async fn flush(&self, within: Duration) {
        const LOOK: Duration = Duration::from_millis(1);
        let said = async {
            while self.open.values().any(|channel| channel.queue.capacity() < QUEUE) {
                sleep(LOOK).await;
            }
        };
        let _ = timeout(within, said).await; // Who does not read hears it no later than it would anyway: it says again what waits.
    }
}

/// One guest's task.
struct Line {
    vm: VmId,
    name: String,
    events: mpsc::Sender<ChannelEvent>,
    /// When people were told last.
    told: Option<Time>,
    /// What was wrong since then: connections that ended in junk, messages beyond the limit.
    trouble: u64,
}

impl Line {
    async fn live(mut self, socket: PathBuf, mut orders: mpsc::Receiver<ToGuest>) {
        loop {
            let Ok(stream) = UnixStream::connect(&socket).await else {
                sleep(AGAIN).await;
                continue;
            };
            while orders.try_recv().is_ok() {} // For an earlier connection.
            if self.events.send(ChannelEvent::Guest(GuestEvent::Connected(self.vm))).await.is_err() {
                return;
            }
            let why = self.talk(stream, &mut orders).await;
            if self.events.send(ChannelEvent::Guest(GuestEvent::Disconnected(self.vm))).await.is_err() {
                return;
            }
            let pause = if why.is_some() { REST } else { AGAIN };
            if let Some(why) = why {
                self.wrong(1, &why).await;
            }
            sleep(pause).await;
        }
    }

    /// Until the connection ends. What was wrong, if it was the guest's fault.
    async fn talk(&mut self, stream: UnixStream, orders: &mut mpsc::Receiver<ToGuest>) -> Option<String> {
        let (mut reader, mut writer) = stream.into_split();
        let mut decoder = Decoder::default();
        let mut chunk = vec![0; CHUNK];
        let mut second = clock::now();
        let mut count = 0;
        let mut read_from = clock::now();
        loop {
            tokio::select! {
                order = orders.recv() => {
                    let frame = encode(&order?).ok()?;
                    match timeout(WRITE, writer.write_all(&frame)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) | Err(_) => return None,
                    }
                }
                read = async { sleep(read_from.since(clock::now())).await; reader.read(&mut chunk).await } => {
                    let length = match read {
                        Ok(0) | Err(_) => return None,
                        Ok(length) => length,
                    };
                    read_from = clock::now() + Duration::from_secs(1) * u32::try_from(length).unwrap_or(RATE) / RATE;
                    decoder.push(&chunk[..length]);
                    loop {
                        let said: FromGuest = match decoder.take() {
                            Ok(Some(said)) => said,
                            Ok(None) => break,
                            Err(why) => return Some(why.to_string()),
                        };
                        if Duration::from_secs(1) <= clock::now().since(second) {
                            (second, count) = (clock::now(), 0);
                        }
                        count += 1;
                        if MAX_PER_SECOND < count {
                            self.wrong(1, "more messages than are taken in a second").await;
                            continue;
                        }
                        let said = ChannelEvent::Guest(GuestEvent::Said(self.vm, Box::new(said)));
                        self.events.send(said).await.ok()?;
                    }
                }
            }
        }
    }

    /// Counts, and tells people once in a while.
    async fn wrong(&mut self, more: u64, why: &str) {
        self.trouble += more;
        if self.told.is_some_and(|at| clock::now().since(at) < QUIET) {
            return;
        }
        self.told = Some(clock::now());
        let count = std::mem::take(&mut self.trouble);
        let text = format!("{}: its guest's channel: {why} ({count} times since the last such line)", self.name);
        let note = Note::warning("guest-channel", text).of(&self.name);
        let _ = self.events.send(ChannelEvent::Note(note)).await;
    }
}

#[cfg(test)]
mod tests {
    use mainstay_guest::message::{GuestHello, HostHello, System};
    use tokio::net::UnixListener;

    use super::*;

    const VM: VmId = VmId(uuid::Uuid::from_u128(1));
    const LONG: Duration = Duration::from_secs(20);

    fn hello() -> FromGuest {
        let (agent, system) = (String::new(), System::default());
        FromGuest::Hello(GuestHello { protocol: 1, agent, boot: [1; 16], system })
    }

    async fn next(events: &mut mpsc::Receiver<ChannelEvent>) -> String {
        match timeout(LONG, events.recv()).await.unwrap().unwrap() {
            ChannelEvent::Guest(GuestEvent::Connected(_)) => "connected".to_owned(),
            ChannelEvent::Guest(GuestEvent::Disconnected(_)) => "disconnected".to_owned(),
            ChannelEvent::Guest(GuestEvent::Said(_, said)) if *said == hello() => "hello".to_owned(),
            ChannelEvent::Guest(other) => format!("{other:?}"),
            ChannelEvent::Note(note) => note.text,
        }
    }

    /// QEMU's side of a socket, and the host's.
    fn guest(folder: &std::path::Path) -> (UnixListener, Channels, mpsc::Receiver<ChannelEvent>) {
        let path = folder.join("org.mainstay.guest.0");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, events) = mpsc::channel(64);
        let mut channels = Channels::new(sender);
        channels.follow(&BTreeMap::from([(VM, ("web".to_owned(), path))]));
        (listener, channels, events)
    }

    #[tokio::test]
    async fn both_sides_are_heard_and_a_connection_comes_again() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, channels, mut events) = guest(folder.path());
        for _ in 0..2 {
            let (mut stream, _) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
            assert_eq!(next(&mut events).await, "connected");
            let welcome = ToGuest::Hello(HostHello { protocol: 1, vm: "web".to_owned() });
            channels.say(VM, welcome.clone());
            let mut heard = vec![0; encode(&welcome).unwrap().len()];
            timeout(LONG, stream.read_exact(&mut heard)).await.unwrap().unwrap();
            assert_eq!(heard, encode(&welcome).unwrap());
            stream.write_all(&encode(&hello()).unwrap()).await.unwrap();
            assert_eq!(next(&mut events).await, "hello");
            drop(stream);
            assert_eq!(next(&mut events).await, "disconnected");
        }
    }

    #[tokio::test]
    async fn junk_ends_a_connection_and_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, _channels, mut events) = guest(folder.path());
        for round in 0..2 {
            let (mut stream, _) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
            assert_eq!(next(&mut events).await, "connected");
            stream.write_all(&encode(&hello()).unwrap()).await.unwrap();
            assert_eq!(next(&mut events).await, "hello");
            stream.write_all(b"junk, and more of it than a header has").await.unwrap();
            assert_eq!(next(&mut events).await, "disconnected");
            if round == 0 {
                assert!(
                    next(&mut events).await.starts_with("web: its guest's channel: bytes between two messages (1 ")
                );
            }
            let ended = timeout(LONG, stream.read(&mut [0; 1])).await.unwrap();
            assert!(matches!(ended, Ok(0) | Err(_)));
        }
        let (_stream, _) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
        assert_eq!(next(&mut events).await, "connected", "nothing was told of the second");
    }

    #[tokio::test]
    async fn a_flood_is_not_read_faster_than_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, _channels, mut events) = guest(folder.path());
        let (mut stream, _) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
        assert_eq!(next(&mut events).await, "connected");
        let flood = tokio::spawn(async move {
            let frame = encode(&hello()).unwrap();
            while stream.write_all(&frame).await.is_ok() {}
        });
        let (began, mut heard) = (clock::now(), 0);
        while heard < 250 {
            heard += u32::from(next(&mut events).await == "hello");
        }
        assert!(
            Duration::from_millis(1900) <= clock::now().since(began),
            "100 a second: {:?}",
            clock::now().since(began)
        );
        flood.abort();
    }
}
