//! Hard signs: what a guest's machine tells by itself. They count at once, without a vote and soon after a boot.
//!
//! ```text
//!   panic ──── its QEMU waits (on_crash = preserve) ──────────────────► reset
//!          └── libvirt ends it, or starts it anew by itself ──────────► counted: more than the limit in an hour need attention
//!   watchdog ─ leaves it as it is (none), or standing (pause) ────────► reset
//!          └── QEMU or libvirt do something (reset, poweroff, …) ─────► told
//!   reboot ─── `REBOOTS` within `SHORT` that were not asked for here ─► told
//! ```
//!
//! A guest that nobody watches (preset off) is told of, and nothing else is done.

use std::time::Duration;

use super::remedies::Cause;
use super::{Guest, Guests};
use crate::core::note::Note;
use crate::types::guests::Remedy;
use crate::types::{Time, VmId};

/// So many reboots in this time are told.
const REBOOTS: usize = 5;
const SHORT: Duration = Duration::from_secs(600);
/// The window of the limit for panics, as for resets.
const HOUR: Duration = Duration::from_secs(3600);
/// Longer limits are not counted for panics.
pub(super) const MAX_SIGNS: usize = 64;

/// What follows by itself when a guest's watchdog fires, as its definition says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Watchdog {
    /// Nothing: `action='none'`.
    Nothing,
    /// Its CPUs stand: `action='pause'`.
    Stands,
    /// QEMU or libvirt do something about it.
    Acts,
}

impl Watchdog {
    /// By the word of the definition; libvirt's default, where there is none, is a reset.
    #[must_use]
    pub fn named(action: Option<&str>) -> Self {
        match action {
            Some("none") => Self::Nothing,
            Some("pause") => Self::Stands,
            Some(_) | None => Self::Acts,
        }
    }
}

/// What one guest's machine has told lately.
#[derive(Debug, Default)]
pub(super) struct Signs {
    panics: Vec<Time>,
    reboots: Vec<Time>,
}

impl Signs {
    pub(super) fn len(&self) -> usize {
        self.panics.len().max(self.reboots.len())
    }
}

impl Guests {
    /// The guest's kernel has told the machine that it has panicked. `held`: QEMU is kept, and waits for a reset.
    pub(super) fn panicked(&mut self, now: Time, vm: VmId, held: bool) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        if !held {
            return self.panicked_elsewhere(now, vm);
        }
        guest.recent.panics();
        self.reset_if_watched(now, vm, "its kernel has panicked");
    }

    /// What follows is libvirt's: this host only counts.
    fn panicked_elsewhere(&mut self, now: Time, vm: VmId) {
        let limit = (self.settings.limits.resets_per_hour as usize).min(MAX_SIGNS - 1);
        let Some(Guest { name, signs, .. }) = self.vms.get_mut(&vm) else { return };
        signs.panics.retain(|at| now.since(*at) < HOUR);
        signs.panics.push(now);
        if signs.panics.len() <= limit {
            return;
        }
        let text = format!(
            "{name} needs attention: its kernel has panicked {} times within an hour; its definition (on_crash) leaves what \
             follows to libvirt, which goes on without a limit if it is restart",
            signs.panics.len()
        );
        signs.panics.clear();
        let note = Note::alarm("guest-needs-attention", text);
        self.note(now, vm, note);
    }

    /// Its watchdog device has fired: nobody inside has fed it.
    pub(super) fn watchdog_fired(&mut self, now: Time, vm: VmId, watchdog: Watchdog) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        match watchdog {
            Watchdog::Acts => {
                let text = format!("{}: its watchdog has fired; what follows is as its definition says", guest.name);
                return self.note(now, vm, Note::warning("guest-watchdog", text));
            }
            Watchdog::Stands => guest.recent.stopped(),
            Watchdog::Nothing => {}
        }
        self.reset_if_watched(now, vm, "its watchdog has fired");
    }

    fn reset_if_watched(&mut self, now: Time, vm: VmId, why: &str) {
        let Some(guest) = self.vms.get(&vm) else { return };
        if self.settings.watchfulness(&guest.name).is_some() {
            return self.remedy(now, vm, Remedy::Reset, Cause::Monitor, why);
        }
        let text = format!("{}: {why}; it is not watched, and nothing is done", guest.name);
        self.note(now, vm, Note::warning("guest-failed", text));
    }

    /// Its machine was reset: by itself, or by a remedy.
    pub(super) fn rebooted(&mut self, now: Time, vm: VmId) {
        self.watch(vm, |watch| watch.boots(now));
        self.tell_inside(vm);
        if let Some(guest) = self.vms.get_mut(&vm) {
            guest.screen.changes(now);
        }
        if let Some(Guest { name, signs, history, recent, .. }) = self.vms.get_mut(&vm)
            && !history.acts(now)
        {
            recent.boots(); // By a person, perhaps: then its CPUs are theirs, too.
            signs.reboots.retain(|at| now.since(*at) < SHORT);
            signs.reboots.push(now);
            if REBOOTS <= signs.reboots.len() {
                signs.reboots.clear();
                let minutes = SHORT.as_secs() / 60;
                let text = format!("{name} has rebooted {REBOOTS} times within {minutes} minutes, not by Mainstay");
                self.note(now, vm, Note::warning("guest-reboots", text));
            }
        }
        self.booted(now, vm);
    }
}
