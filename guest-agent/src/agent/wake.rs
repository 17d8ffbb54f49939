//! How threads tell the loop what happened: a bounded channel, and a descriptor that wakes its poll.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rustix::event::{EventfdFlags, eventfd};

use super::Happened;

/// A thread waits when so many are not taken.
const WAITING: usize = 128;

/// A thread's end.
#[derive(Clone)]
pub struct Sender {
    to: SyncSender<Happened>,
    wake: Arc<OwnedFd>,
}

impl Sender {
    /// False when the loop has ended.
    pub fn send(&self, what: Happened) -> bool {
        let sent = self.to.send(what).is_ok();
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        sent
    }
}

/// The loop's end.
pub struct Wake {
    from: Receiver<Happened>,
    wake: Arc<OwnedFd>,
}

impl Wake {
    /// Everything that has happened.
    pub fn take(&self) -> Vec<Happened> {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        self.from.try_iter().collect()
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Both ends.
///
/// # Errors
/// The kernel has no descriptor left.
pub fn wake() -> std::io::Result<(Sender, Wake)> {
    let fd = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let (to, from) = sync_channel(WAITING);
    Ok((Sender { to, wake: fd.clone() }, Wake { from, wake: fd }))
}
