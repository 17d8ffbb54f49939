//! Hears beats: one plain thread over all sockets.

use std::io::{self, IoSliceMut, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use socket2::Socket;

use super::socket;
use crate::exec::clock;
use crate::types::guard::{BeatInterface, BeatKey};
use crate::types::{BootId, ClusterId, HostId, Incarnation, NetBeat, Time};
use crate::wire::seal::{DropCounts, Dropped, MAX_DATAGRAM, Opener, SealHeader};

/// Datagrams of one socket before the next one has its turn.
const TURN: usize = 64;
/// How often the interfaces are looked at; more often while one is missing.
const CHECK: Duration = Duration::from_secs(1);
const CHECK_MISSING: Duration = Duration::from_millis(250);

/// A beat of another host, opened, and for the first time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heard {
    /// When it was taken out of the socket.
    pub at: Time,
    /// The beat.
    pub beat: NetBeat,
    /// By which interface: its place in the list given to `spawn`.
    pub interface: usize,
    /// How long it lay in the socket, to a millisecond, by the clock of day (so a step of that clock shows here). A
    /// large one means that *we* were stalled: the silence before it is not the peer's.
    pub queued: Duration,
}

/// What came so far.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReceiveCounts {
    /// Beats of others, each counted once.
    pub opened: u64,
    /// Our own, back by another interface.
    pub own: u64,
    /// Lost because we did not read in time.
    pub overflowed: u64,
    /// Dropped, by reason.
    pub dropped: DropCounts,
    /// In the order given to `spawn`.
    pub paths: Vec<PathCounts>,
}

/// One interface's share.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PathCounts {
    /// The interface.
    pub name: String,
    /// Beats that came here first.
    pub heard: u64,
    /// Beats that had come by another interface before. Not proven by their seal: for people only.
    pub repeated: u64,
    /// When either came last.
    pub last: Option<Time>,
    /// Why it hears nothing, for people.
    pub trouble: Option<String>,
}

/// The receiving thread. Dropping this ends it, and waits until it has ended.
pub struct BeatReceiver {
    counts: Arc<Mutex<ReceiveCounts>>,
    incarnation: Arc<AtomicU64>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl BeatReceiver {
    /// Starts to hear. An interface that cannot be opened is a trouble in `counts` and is tried again. `heard` gets each
    /// beat of others once. `twice` gets beats under our own host id that are not ours: of another boot, or of a higher
    /// incarnation than `own` was told; whether it is a twin or an old recording is the caller's to judge. Both run on
    /// the receiving thread and must not wait for anything.
    ///
    /// # Errors
    /// When the boot id cannot be read, or no pipe or thread can be made.
    pub fn spawn(
        cluster: ClusterId,
        keys: Vec<BeatKey>,
        me: HostId,
        interfaces: Vec<BeatInterface>,
        unicast: bool,
        heard: impl Fn(Heard) + Send + 'static,
        twice: impl Fn(NetBeat) + Send + 'static,
    ) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let incarnation = Arc::new(AtomicU64::new(u64::MAX));
        let paths: Vec<_> = interfaces.into_iter().map(|interface| Path::new(interface, unicast)).collect();
        let counts = ReceiveCounts {
            paths: paths
                .iter()
                .map(|path| PathCounts { name: path.interface.name.clone(), ..PathCounts::default() })
                .collect(),
            ..ReceiveCounts::default()
        };
        let mut receiving = Receiving {
            me,
            boot: clock::boot_id()?,
            incarnation: incarnation.clone(),
            opener: Opener::new(&keys, cluster),
            twins: Opener::new(&keys, cluster),
            paths,
            published: Arc::new(Mutex::new(counts.clone())),
            counts,
            heard,
            twice,
        };
        receiving.check();
        receiving.publish();
        let counts = receiving.published.clone();
        let thread = std::thread::Builder::new().name("beats".into()).spawn(move || {
            let _deaf = AbortOnPanic;
            receiving.run(&stopped);
        })?;
        Ok(Self { counts, incarnation, stop: Some(stop), thread: Some(thread) })
    }

    /// The incarnation of our own guard: a higher one under our host id is somebody else. Tell it before that guard can
    /// beat; until then only other boots count as somebody else.
    pub fn own(&self, incarnation: Incarnation) {
        self.incarnation.store(incarnation.0, Ordering::SeqCst);
    }

    /// What came so far, as of the last second.
    #[must_use]
    pub fn counts(&self) -> ReceiveCounts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for BeatReceiver {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The thread cannot have panicked (`AbortOnPanic`), so there is no outcome to look at.
            let _ = thread.join();
        }
    }
}

/// A receiver that died alone would look like the silence of everybody. A restart of the agent is cheaper.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

struct Path {
    interface: BeatInterface,
    unicast: bool,
    open: Option<Open>,
}

struct Open {
    socket: Socket,
    index: u32,
    /// The kernel's count of datagrams lost on this socket.
    overflowed: u32,
}

impl Path {
    fn new(interface: BeatInterface, unicast: bool) -> Self {
        Self { interface, unicast, open: None }
    }

    /// Opens the socket, if there is none or it belongs to an interface of the past.
    fn check(&mut self) -> io::Result<()> {
        let index = socket::index_of(&self.interface).inspect_err(|_| self.open = None)?;
        if self.open.as_ref().is_some_and(|open| open.index == index) {
            return Ok(());
        }
        self.open = None;
        let socket = socket::from_interface(&self.interface, index, self.unicast)?;
        self.open = Some(Open { socket, index, overflowed: 0 });
        Ok(())
    }
}

/// All that the thread owns.
struct Receiving<H, T> {
    me: HostId,
    boot: BootId,
    incarnation: Arc<AtomicU64>,
    opener: Opener,
    /// For datagrams under our own host id.
    twins: Opener,
    paths: Vec<Path>,
    counts: ReceiveCounts,
    published: Arc<Mutex<ReceiveCounts>>,
    heard: H,
    twice: T,
}

impl<H: Fn(Heard), T: Fn(NetBeat)> Receiving<H, T> {
    fn run(&mut self, stopped: &PipeReader) {
        let mut buffer = [0; MAX_DATAGRAM + 1];
        let mut control = nix::cmsg_space!(libc::timespec, u32);
        let mut checked = clock::now();
        loop {
            let missing = self.paths.iter().any(|path| path.open.is_none());
            let due = checked + if missing { CHECK_MISSING } else { CHECK };
            let Some(ready) = self.wait(stopped, due.since(clock::now())) else { return };
            for place in ready {
                self.take_turn(place, &mut buffer, &mut control);
            }
            if due <= clock::now() {
                self.check();
                checked = clock::now();
            }
            self.publish();
        }
    }

    /// The paths that have something; none of them after the time-out; `None` = the end.
    fn wait(&self, stopped: &PipeReader, at_most: Duration) -> Option<Vec<usize>> {
        let places: Vec<_> = (0..self.paths.len()).filter(|place| self.paths[*place].open.is_some()).collect();
        let sockets = places.iter().filter_map(|place| self.paths[*place].open.as_ref());
        let mut polled = vec![PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        polled.extend(sockets.map(|open| PollFd::new(open.socket.as_fd(), PollFlags::POLLIN)));
        // A millisecond more than asked for, so that the time has come when this returns.
        let timeout = PollTimeout::try_from(at_most + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => panic!("poll of our own sockets cannot fail: {error}"),
        }
        let ready = |polled: &PollFd| polled.revents().is_some_and(|events| !events.is_empty());
        if ready(&polled[0]) {
            return None;
        }
        Some(places.into_iter().zip(&polled[1..]).filter(|(_, polled)| ready(polled)).map(|(place, _)| place).collect())
    }

    fn take_turn(&mut self, place: usize, buffer: &mut [u8], control: &mut [u8]) {
        for _ in 0..TURN {
            let Some(open) = &mut self.paths[place].open else { return };
            match receive(open, buffer, control) {
                Ok(Received { len, queued, lost }) => {
                    self.counts.overflowed += u64::from(lost);
                    self.received(place, &buffer[..len], queued);
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    let trouble = socket::describe(&self.paths[place].interface, "hears", &error.into());
                    self.counts.paths[place].trouble = Some(trouble);
                    self.paths[place].open = None; // The next check opens it anew.
                    return;
                }
            }
        }
    }

    fn received(&mut self, place: usize, datagram: &[u8], queued: Duration) {
        if SealHeader::decode(datagram).is_ok_and(|header| header.host == self.me) {
            self.received_own(datagram);
            return;
        }
        let path = &mut self.counts.paths[place];
        match self.opener.open(datagram) {
            Ok(beat) => {
                let at = clock::now();
                path.heard += 1;
                path.last = Some(at);
                (self.heard)(Heard { at, beat, interface: place, queued });
            }
            Err(Dropped::Replayed) => {
                path.repeated += 1;
                path.last = Some(clock::now());
            }
            Err(_) => {} // Counted by the opener.
        }
    }

    /// Ours came back by another interface, or somebody uses our host id.
    fn received_own(&mut self, datagram: &[u8]) {
        let Ok(beat) = self.twins.peek(datagram) else { return };
        let newest = Incarnation(self.incarnation.load(Ordering::SeqCst));
        if beat.boot == self.boot && beat.incarnation <= newest {
            self.counts.own += 1;
        } else if let Ok(beat) = self.twins.open(datagram) {
            (self.twice)(beat);
        }
    }

    fn check(&mut self) {
        for (path, counts) in self.paths.iter_mut().zip(&mut self.counts.paths) {
            counts.trouble = path.check().err().map(|error| socket::describe(&path.interface, "hears", &error));
        }
    }

    /// Never waits: while somebody reads the counts, the next turn shows them.
    fn publish(&mut self) {
        self.counts.opened = self.opener.opened();
        self.counts.dropped = self.opener.dropped().plus(self.twins.dropped());
        if let Ok(mut published) = self.published.try_lock() {
            published.clone_from(&self.counts);
        }
    }
}

struct Received {
    len: usize,
    queued: Duration,
    /// Datagrams lost since the one before.
    lost: u32,
}

fn receive(open: &mut Open, buffer: &mut [u8], control: &mut [u8]) -> Result<Received, Errno> {
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(open.socket.as_raw_fd(), &mut slices, Some(control), MsgFlags::MSG_DONTWAIT)?;
    let mut received = Received { len: message.bytes, queued: Duration::ZERO, lost: 0 };
    for note in message.cmsgs()? {
        match note {
            ControlMessageOwned::ScmTimestampns(stamp) => {
                let stamp = Duration::from(stamp);
                received.queued = Duration::from_millis(clock::unix_ms()).saturating_sub(stamp);
            }
            ControlMessageOwned::RxqOvfl(count) => {
                received.lost = count.wrapping_sub(open.overflowed);
                open.overflowed = count;
            }
            _ => {}
        }
    }
    Ok(received)
}
