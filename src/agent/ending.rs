//! The orderly end: steps that are over in a moment are not cut off, since who has asked for them would not learn whether they were
//! done.
//!
//! ```text
//!   runs ── told to end ──► ends: all goes on but what is asked of guests anew ─┬─ nothing would be cut off ──► over
//!                                                                               ├─ PATIENCE ──────────────────► over
//!                                                                               └─ told again ────────────────► over
//! ```
//!
//! Rule in numbers: `PATIENCE`, well below `TimeoutStopSec` of the unit. A restart is as short as ever while nothing is under way.
//! The guard beats on meanwhile, and this agent decides on; so no lease hangs on it. A boot, a move and a hook are not waited for.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::sleep_until;
use crate::exec::clock;
use crate::types::Time;

/// For steps under way.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether the agent is to end, and until when it may wait.
pub(crate) struct Ending {
    terminate: Signal,
    interrupt: Signal,
    until: Option<Time>,
}

impl Ending {
    /// It is not to end yet.
    ///
    /// # Errors
    /// Without signals.
    pub(crate) fn new() -> io::Result<Self> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt, until: None })
    }

    /// When it is told to end, again, or its patience is over. May be dropped at any time.
    pub(crate) async fn told(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = sleep_until(self.until) => {}
        }
        if self.until.is_none() {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        }
        self.until = Some(if self.until.is_none() { clock::now() + PATIENCE } else { Time::ZERO });
    }

    /// Nothing is waited for any more. `busy`: something would be cut off.
    pub(crate) fn is_over(&self, busy: bool) -> bool {
        self.until.is_some_and(|until| !busy || until <= clock::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_waits_for_what_is_under_way_but_not_for_long_and_not_when_told_twice() {
        let mut ending = Ending::new().unwrap();
        assert!(!ending.is_over(false), "nobody has told it");
        ending.until = Some(clock::now() + PATIENCE);
        assert!(ending.is_over(false) && !ending.is_over(true));
        ending.until = Some(clock::now());
        ending.told().await;
        assert!(ending.is_over(true), "its patience is over");
    }
}
