//! The watcher: one thread that keeps a connection for events, and says when libvirt is there and when it is not.
//!
//! ```text
//!   connecting ──opened──► registered ──► Up, list asked ──► listening ──closed──► Down ──wait──► connecting
//!       │ no answer for 5 s: Down, goes on waiting              │ event ──► Changed
//!       └ refused: Down, wait 0.1 s … 2 s                       └ list, or events lost ──► Listed
//! ```
//!
//! Events are registered before the list is asked for, so nothing can happen unseen between the two. The list comes
//! through the control lane: however long it takes, events go on. If one of them overtook it the list may be the older
//! of the two: it is dropped and asked for again, so what is told never goes back in time. Opening happens on a thread
//! of its own, since a frozen daemon answers an open never; there is at most one such thread.

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
    /// By the control lane: the answer to the list of this number.
    Listed(u64, DomainAnswer),
    /// By the handle: everything is to be told again.
    Relist,
    /// By the handle, when it goes.
    Stop,
}

/// Why listening ended.
enum Ended {
    Closed(&'static str),
    Stop,
}

/// A list that was asked for.
struct Listing {
    number: u64,
    /// It is not waited for longer.
    until: Time,
    /// Something happened since.
    overtaken: bool,
}

/// The watcher's thread.
pub(super) struct Watcher<Tell> {
    pub uri: String,
    pub control: Arc<Lane>,
    pub tell: Tell,
    to: SyncSender<Heard>,
    heard: Receiver<Heard>,
    /// Number of the last list that was asked for.
    lists: u64,
    /// The last thing told was this `Down`: the same is not told again.
    down: Option<String>,
}

impl<Tell: Fn(LibvirtEvent)> Watcher<Tell> {
    /// A watcher, and the sender that stops it.
    pub(super) fn new(uri: String, control: Arc<Lane>, tell: Tell) -> (Self, SyncSender<Heard>) {
        let (to, heard) = sync_channel(HEARD_MAX);
        (Self { uri, control, tell, to: to.clone(), heard, lists: 0, down: None }, to)
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
                Ok(Heard::Changed { .. } | Heard::Closed(_) | Heard::Listed(..) | Heard::Relist) => {}
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
        sink.mark_lost(); // Whatever happened before is unknown: that brings the first list.
        let mut listing = None;
        loop {
            if sink.has_lost() && listing.as_ref().is_none_or(|list: &Listing| list.until < clock::now()) {
                sink.take_lost();
                listing = Some(self.ask_list());
            }
            match self.heard.recv_timeout(LOOK) {
                Ok(Heard::Changed { vm, name, change }) => {
                    if let Some(list) = &mut listing {
                        list.overtaken = true;
                    }
                    (self.tell)(LibvirtEvent::Changed { vm, name, change });
                }
                Ok(Heard::Listed(number, answer)) => {
                    // Others are of an earlier connection, or were given up.
                    if let Some(list) = listing.take_if(|list| list.number == number) {
                        listing = self.end_list(&sink, &list, answer);
                    }
                }
                Ok(Heard::Relist) => sink.mark_lost(),
                Ok(Heard::Closed(why)) => return Ok(Ended::Closed(why)),
                Ok(Heard::Opened(_)) => {}
                Ok(Heard::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(Ended::Stop),
                Err(RecvTimeoutError::Timeout) if !session.alive() => {
                    return Ok(Ended::Closed("the connection to libvirtd failed"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Tells a list, or has it taken again: at once if an event overtook it, a look later if it failed.
    fn end_list(&self, sink: &Sink, list: &Listing, answer: DomainAnswer) -> Option<Listing> {
        match answer {
            DomainAnswer::Listed(all) if !list.overtaken => {
                (self.tell)(LibvirtEvent::Listed(all));
                None
            }
            DomainAnswer::Listed(_) => {
                sink.mark_lost();
                None
            }
            DomainAnswer::Done | DomainAnswer::Failed(_) => {
                sink.mark_lost();
                Some(Listing { number: list.number, until: clock::now() + LOOK, overtaken: false })
            }
        }
    }

    fn ask_list(&mut self) -> Listing {
        self.lists += 1;
        let (number, to) = (self.lists, self.to.clone());
        // If it does not fit, events were lost as well, and that brings the next list.
        let answer = Box::new(move |answer| drop(to.try_send(Heard::Listed(number, answer))));
        self.control.ask(DomainOrder::List, LIST_WITHIN, answer);
        Listing { number, until: clock::now() + LIST_WITHIN, overtaken: false }
    }

    /// Waits before the next attempt. True: stop.
    fn stopped_within(&self, wait: Duration) -> bool {
        let until = clock::now() + wait;
        loop {
            let left = until.since(clock::now());
            match self.heard.recv_timeout(left) {
                Ok(Heard::Stop) | Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
                Ok(_) => {} // Left over from the last connection.
            }
        }
    }
}

/// For people.
#[must_use]
pub fn text_of(failure: &DomainFailure) -> String {
    match failure {
        DomainFailure::NoDaemon(text)
        | DomainFailure::ImageLocked(text)
        | DomainFailure::Host(text)
        | DomainFailure::Storage(text)
        | DomainFailure::Busy(text)
        | DomainFailure::Capacity(text)
        | DomainFailure::Refused(text)
        | DomainFailure::Definition(text) => text.clone(),
        DomainFailure::NoDomain => "no such domain".into(),
        DomainFailure::Timeout => "the deadline passed".into(),
    }
}
