//! How much a guest may make people read. It is hostile by assumption: whatever it says, and whatever that leads to, costs a
//! bounded number of lines.
//!
//! ```text
//!   about it ── credit left, nothing kept back ──► told
//!            └─ else ──► counted ── a minute's credit comes ──► one line: how many, and the last of them
//! ```

use std::time::Duration;

use crate::core::note::{Level, Note};
use crate::types::Time;

/// Lines that come at once.
const BURST: u32 = 10;
/// One more comes in this time.
const REFILL: Duration = Duration::from_secs(60);

/// The lines about one VM.
#[derive(Debug)]
pub(super) struct Notes {
    credit: u32,
    /// From when on the next line's time counts.
    counted: Time,
    /// What was not told, and the last of it.
    kept_back: Option<(u32, Note)>,
}

impl Default for Notes {
    fn default() -> Self {
        Self { credit: BURST, counted: Time::ZERO, kept_back: None }
    }
}

impl Notes {
    /// The note, if there is credit for it.
    pub(super) fn tell(&mut self, now: Time, note: Note) -> Option<Note> {
        self.refill(now);
        match self.kept_back.take() {
            None if 0 < self.credit => {
                self.credit -= 1;
                Some(note)
            }
            before => {
                // The worst of them stands for all.
                let (count, worst) = before.map_or((0, None), |(count, note)| (count, Some(note)));
                let shown = worst.filter(|worst| note.level < worst.level).unwrap_or(note);
                self.kept_back = Some((count.saturating_add(1), shown));
                None
            }
        }
    }

    /// When `summary` has something to say.
    pub(super) fn due(&self) -> Option<Time> {
        self.kept_back.as_ref().map(|_| self.counted + REFILL)
    }

    /// One line for all that was kept back.
    pub(super) fn summary(&mut self, now: Time) -> Option<Note> {
        self.refill(now);
        let (count, note) = self.kept_back.take_if(|_| 0 < self.credit)?;
        self.credit -= 1;
        let text = format!("{} (one of {count} that were not told since there are too many of this VM)", note.text);
        Some(Note { level: note.level.max(Level::Warning), text, ..note })
    }

    fn refill(&mut self, now: Time) {
        let more = u32::try_from(now.since(self.counted).as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        self.credit = self.credit.saturating_add(more).min(BURST);
        self.counted = if self.credit == BURST { now } else { self.counted + REFILL * more };
    }
}
