//! Disarmed: people work on what everything hangs on, and nothing shall be done by itself until they are done.
//!
//! ```text
//!   disarm for T ─► document: until when ─► nobody restarts, switches off, ends or resets anything ─► arm, or T is over ─► all that
//!                                           (leases, and what goes on after a lapse, are as ever)       was put off is looked at
//! ```
//!
//! The end is a time of day, since it must hold across boots and masters; every host looks at its own clock. Safety is not touched:
//! whose lease lapses is stopped, and only a claim lets anybody run a VM.

use super::Core;
use super::cx::Cx;
use super::note::Note;
use crate::types::settings::{ClusterSettings, Disarmed, SettingsChange};

impl Core {
    /// Nothing is done by itself now; until when, and why.
    pub(super) fn disarmed(&self) -> Option<&Disarmed> {
        self.settings.disarmed.as_ref().filter(|disarmed| self.unix_ms < disarmed.until_unix_ms)
    }

    /// The time of day, every few seconds.
    pub(super) fn day(&mut self, cx: &mut Cx, unix_ms: u64) {
        let before = self.disarmed().is_some();
        self.unix_ms = unix_ms;
        if before && self.disarmed().is_none() {
            cx.note(Note::warning(
                "armed",
                "the time for which the cluster was disarmed is over: it acts by itself again",
            ));
            self.check = true;
            self.look = true;
        }
        if self.settings.disarmed.is_some() && self.disarmed().is_none() && self.is_master() {
            self.carry_out(cx, SettingsChange::Disarm(None));
        }
    }
}

/// For people.
pub(super) fn text(disarmed: &Disarmed) -> String {
    let until = jiff::Timestamp::from_millisecond(disarmed.until_unix_ms.try_into().unwrap_or(i64::MAX))
        .unwrap_or(jiff::Timestamp::MAX);
    let why = if disarmed.why.is_empty() { String::new() } else { format!(" ({})", disarmed.why) };
    format!("the cluster is disarmed until {until:.0}{why}: nothing is restarted, switched off or reset by itself")
}

pub(super) fn change(cx: &mut Cx, settings: &mut ClusterSettings, disarmed: Option<Disarmed>) {
    cx.note(match &disarmed {
        Some(disarmed) => Note::alarm("disarmed", text(disarmed)),
        None => Note::info("armed", "the cluster acts by itself"),
    });
    settings.disarmed = disarmed;
}
