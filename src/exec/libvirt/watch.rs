//! The watcher: one thread that keeps a connection for events, and says when libvirt is there and when it is not.
//!
//! ```text
//!   connecting ──opened──► registered ──► Up, list asked ──► listening ──closed──► Down ──wait──► connecting
//!       │ no answer for 5 s: Down, goes on waiting              │ event ──► Changed
//!       └ refused: Down, wait 0.1 s … 2 s                       └ list, or events lost ──► Listed
//! ```
//!
//! Events are registered before the list is asked for, so nothing can happen unseen between the two. The list comes
//! through the control lane: however long it takes, events go on. Opening happens on a thread of its own, since a
//! frozen daemon answers an open never; there is at most one such thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use super::LibvirtEvent;
use super::events::{Sink, subscribe};
use super::lane::Lane;
use super::session::Session;
use crate::exec::clock;
use crate::types::vm::{DomainAnswer, DomainChange, DomainFailure, DomainOrder};
use crate::types::{Time, VmId};

/// Events that can wait. More are dropped, and everything is listed instead.
const HEARD_MAX: usize = 4096;
/// First and longest wait before the next attempt to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// An open that takes longer is told as "down".
const OPEN_PATIENCE: Duration = Duration::from_secs(5);
/// How often a quiet connection is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Time for a list.
const LIST_WITHIN: Duration = Duration::from_secs(10);

/// What the watcher's thread is told.
pub(super) enum Heard {
    /// By a callback: something happened to a domain.
    Changed { vm: VmId, name: String, change: DomainChange },
    /// By a callback: the connection is gone.
    Closed(&'static str),
    /// By the opening thread.
    Opened(Result<Session, DomainFailure>),
    /// By the control lane.
    Listed(DomainAnswer),
    /// By the handle, when it goes.
    Stop,
}

/// Why listening ended.
enum Ended {
    Closed(&'static str),
    Stop,
}

/// The watcher's thread.
pub(super) struct Watcher<Tell> {
    pub uri: String,
    pub control: Arc<Lane>,
    pub tell: Tell,
    to: SyncSender<Heard>,
    heard: Receiver<Heard>,
    /// The last thing told was this `Down`: the same is not told again.
    down: Option<String>,
}

impl<Tell: Fn(LibvirtEvent)> Watcher<Tell> {
    /// A watcher, and the sender that stops it.
    pub(super) fn new(uri: String, control: Arc<Lane>, tell: Tell) -> (Self, SyncSender<Heard>) {
        let (to, heard) = sync_channel(HEARD_MAX);
        (Self { uri, control, tell, to: to.clone(), heard, down: None }, to)
    }

    /// Connects and listens until stopped.
    pub(super) fn run(mut self) {
        let mut wait = BACKOFF.0;
        loop {
            match self.open() {
                None => return,
                Some(Err(why)) => self.say_down(why),
                Some(Ok(session)) => match self.listen(&session) {
                    Ok(Ended::Stop) => return,
                    Ok(Ended::Closed(why)) => {
                        wait = BACKOFF.0;
                        self.say_down(why.into());
                    }
                    Err(why) => self.say_down(why),
                },
            }
            if self.stopped_within(wait) {
                return;
            }
            wait = BACKOFF.1.min(wait * 2);
        }
    }

    fn say_down(&mut self, why: String) {
        if self.down.as_ref() != Some(&why) {
            self.down = Some(why.clone());
            (self.tell)(LibvirtEvent::Down(why));
        }
    }

    /// Opens a connection on a thread of its own. None: stop.
    fn open(&mut self) -> Option<Result<Session, String>> {
        let (uri, to) = (self.uri.clone(), self.to.clone());
        let spawned = std::thread::Builder::new().name("virt-open".into()).spawn(move || {
            // When nobody listens any more the session comes back in the error, and is closed.
            drop(to.send(Heard::Opened(Session::open(&uri))));
        });
        if let Err(error) = spawned {
            return Some(Err(format!("cannot start a thread to connect to {}: {error}", self.uri)));
        }
        loop {
            match self.heard.recv_timeout(OPEN_PATIENCE) {
                Ok(Heard::Opened(opened)) => return Some(opened.map_err(|failure| text_of(&failure))),
                Ok(Heard::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
                // Left over from the last connection.
                Ok(Heard::Changed { .. } | Heard::Closed(_) | Heard::Listed(_)) => {}
                Err(RecvTimeoutError::Timeout) => self.say_down(format!("{} does not answer", self.uri)),
            }
        }
    }

    /// Registers, lists, and passes on what comes.
    fn listen(&mut self, session: &Session) -> Result<Ended, String> {
        let sink = Sink::new(self.to.clone());
        let _subscription = subscribe(session.connect(), &sink)
            .map_err(|error| format!("{} gives no events: {}", self.uri, error.message()))?;
        self.down = None;
        (self.tell)(LibvirtEvent::Up);
        let mut listing = Some(self.ask_list());
        loop {
            match self.heard.recv_timeout(LOOK) {
                Ok(Heard::Changed { vm, name, change }) => (self.tell)(LibvirtEvent::Changed { vm, name, change }),
                Ok(Heard::Closed(why)) => return Ok(Ended::Closed(why)),
                Ok(Heard::Listed(DomainAnswer::Listed(all))) => {
                    listing = None;
                    (self.tell)(LibvirtEvent::Listed(all));
                }
                // The list failed. It counts as asked for until its time is over, and is then asked for again.
                Ok(Heard::Listed(_)) => sink.mark_lost(),
                Ok(Heard::Opened(_)) => {}
                Ok(Heard::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(Ended::Stop),
                Err(RecvTimeoutError::Timeout) if !session.alive() => {
                    return Ok(Ended::Closed("the connection to libvirtd failed"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if listing.is_none_or(|until| until < clock::now()) && sink.take_lost() {
                listing = Some(self.ask_list());
            }
        }
    }

    /// Asks for a list; the answer is worth waiting for until the time returned.
    fn ask_list(&self) -> Time {
        let to = self.to.clone();
        // If it does not fit, events were lost as well, and that brings the next list.
        let answer = Box::new(move |answer| drop(to.try_send(Heard::Listed(answer))));
        self.control.ask(DomainOrder::List, LIST_WITHIN, answer);
        clock::now() + LIST_WITHIN
    }

    /// Waits before the next attempt. True: stop.
    fn stopped_within(&self, wait: Duration) -> bool {
        let until = clock::now() + wait;
        loop {
            let left = until.since(clock::now());
            match self.heard.recv_timeout(left) {
                Ok(Heard::Stop) | Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
                Ok(Heard::Changed { .. } | Heard::Closed(_) | Heard::Listed(_) | Heard::Opened(_)) => {}
            }
        }
    }
}

fn text_of(failure: &DomainFailure) -> String {
    match failure {
        DomainFailure::NoDaemon(text)
        | DomainFailure::ImageLocked(text)
        | DomainFailure::Host(text)
        | DomainFailure::Capacity(text)
        | DomainFailure::Refused(text)
        | DomainFailure::Definition(text) => text.clone(),
        DomainFailure::NoDomain => "no such domain".into(),
        DomainFailure::Timeout => "the deadline passed".into(),
    }
}
