//! What a guest's screen says of it, or its serial console. A panic or stop screen that stands is a failure at once; a prompt or a
//! firmware's last word is told to people.
//!
//! ```text
//!   its agent is silent ── looked at each second ──┐
//!   the policy says so ── looked at by its time ───┴─► the same as before? ── no ──► seen anew
//!                                                        │ yes, and no I/O since
//!        panic, stop screen: stands for STANDS, and the CPUs spin or stand; or for the I/O window ──► failed
//!        no boot device, boot loader, a shell that waits: stands for WAITS ─────────────────────────► told, once
//!        anything else ─────────────────────────────────────────────────────────────────────────────► nothing
//! ```
//!
//! Anybody can write "Kernel panic" on a screen, and leave it there: so a screen alone resets nothing. Whose beats come is well,
//! whatever it shows; one that does I/O is not stuck; a screen that changes is not the last word. As with silence, a guest that is
//! paused, or whose storage is in trouble, is not judged. The minimum uptime does not count: a screen is no guess.
//!
//! A console counts as a screen that shows its last line, if that is the end of a panic: a kernel says nothing after that, and whoever
//! boots nearly always does. So that an old panic is not taken for a new one where a boot says nothing there, the file must have been
//! written since the guest is known to run here, and since its last boot. Without that the screen counts.
//!
//! A picture is read by a program, which is dear: only one that has stood as above, so that it would count, and once. A desktop whose
//! clock moves, or that works, costs no more than its pictures.
//!
//! Deliberately not here: how one looks (`exec::glance`), what lines mean (`classify`).

use std::time::Duration;

use super::classify::{Shown, advice, classify};
use super::monitor::{SPINS, STILL, Sample, Watch};
use super::remedies::Cause;
use super::{GuestAct, Guests};
use crate::core::note::Note;
use crate::types::failure::{Class, FailureKind as K};
use crate::types::guests::{Remedy, Watchfulness};
use crate::types::{DatastoreId, Time, VmId};

/// Between two looks while an agent is silent.
const PACE: Duration = Duration::from_secs(1);
/// An answer that has not come by then does not come; looks further apart than this and their pace do not belong together.
const GAP: Duration = Duration::from_secs(30);
/// A panic or stop screen stays so long before it counts.
const STANDS: Duration = Duration::from_secs(3);
/// What waits for a person does so for so long before one is told: a boot passes by many prompts.
const WAITS: Duration = Duration::from_secs(10);

/// One look.
#[derive(Clone, PartialEq, Debug)]
pub struct Glimpse {
    /// The same for the same content only.
    pub mark: Mark,
    /// What it is.
    pub shows: Shows,
    /// What the guest does.
    pub sample: Sample,
    /// The end of its serial console, if that could be read.
    pub console: Option<ConsoleEnd>,
}

/// The end of a serial console.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConsoleEnd {
    /// The same as long as nothing is written.
    pub mark: Mark,
    /// Its last lines.
    pub text: String,
    /// When it was last written, if its file's clock can be believed.
    pub written: Option<Time>,
}

/// Stands for what a screen shows; compared only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark(pub u64);

/// What is on a screen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Shows {
    /// Text, in rows.
    Text(String),
    /// A picture that was not read.
    Picture,
    /// The text on a picture; empty if it cannot be read.
    Read(String),
    /// There is none, or it could not be had.
    Nothing,
}

/// The screen of one guest.
#[derive(Debug, Default)]
pub(super) struct Screen {
    /// It runs here, or has booted, since.
    runs: Option<Time>,
    /// A look is under way, since.
    asked: Option<Time>,
    looked: Time,
    standing: Option<Standing>,
    /// What was shown when a remedy was asked for because of it.
    acted: Option<Mark>,
}

/// What it shows, and since when, without I/O.
#[derive(Clone, Debug)]
struct Standing {
    mark: Mark,
    place: Place,
    since: Time,
    /// Since then its CPUs spin or stand; none = they do neither.
    stuck: Option<Time>,
    sample: Sample,
    at: Time,
    /// What that means; none = a picture that was not read.
    class: Option<Class>,
    /// Something was made of it already.
    used: bool,
}

/// Where it is seen.
#[derive(Clone, Copy, Debug)]
enum Place {
    Screen,
    Console,
}

enum Verdict {
    Nothing,
    Waits(Class),
    Failed(Class, Place, Duration),
}

impl Screen {
    pub(super) fn runs(&mut self, now: Time) {
        self.runs.get_or_insert(now);
    }

    /// It does not run here any more.
    pub(super) fn ended(&mut self) {
        *self = Self::default();
    }

    /// It was started anew by a remedy.
    pub(super) fn boots(&mut self, now: Time) {
        self.runs = self.runs.map(|_| now);
        (self.standing, self.acted) = (None, None);
    }

    /// It was started anew by somebody else: a remedy that is still to come is not needed.
    pub(super) fn changes(&mut self, now: Time) {
        self.runs = self.runs.map(|_| now);
        self.standing = None;
    }

    /// A remedy was asked for because of what it showed, and it shows something else by now.
    pub(super) fn has_changed(&self) -> bool {
        self.acted.is_some_and(|mark| self.standing.as_ref().is_none_or(|standing| standing.mark != mark))
    }

    /// What was to be done about it has failed: it is as before.
    pub(super) fn judge_again(&mut self) {
        if let Some(standing) = self.standing.as_mut().filter(|standing| self.acted == Some(standing.mark)) {
            standing.used = false;
        }
    }

    /// When the next look is wanted, or the answer to the last one is overdue.
    pub(super) fn due(&self, limits: Option<Watchfulness>, watch: &Watch) -> Option<Time> {
        let limits = limits.filter(|_| self.runs.is_some())?;
        if let Some(asked) = self.asked {
            return Some(asked + GAP);
        }
        let pace = watch.pace().map(|pace| pace.max(PACE)).into_iter().chain(limits.screen).min()?;
        Some(self.looked + pace)
    }

    /// The picture that has stood, and is to be read if it is still the same.
    fn unread(&self, now: Time) -> Option<Mark> {
        let standing = self.standing.as_ref().filter(|standing| standing.class.is_none())?;
        let counts = standing.is_stuck(now) || WAITS <= now.since(standing.since);
        counts.then_some(standing.mark)
    }

    fn take(&mut self, now: Time, glimpse: Option<Glimpse>, storage_well: bool, pace: Duration) {
        (self.asked, self.looked) = (None, now);
        let before = self.standing.take().filter(|standing| now.since(standing.at) <= GAP + pace);
        let Some(Glimpse { mark, shows, sample, console }) = glimpse else {
            self.standing = before; // A look that failed says nothing.
            return;
        };
        if !sample.runs || !storage_well {
            return;
        }
        let is_read = console.is_some();
        let panic = console.and_then(|console| Some((console.mark, self.panic_on(&console)?)));
        if panic.is_none() && shows == Shows::Nothing {
            // Nor does a screen that could not be had; but a console that goes on does.
            self.standing = before.filter(|standing| !is_read || matches!(standing.place, Place::Screen));
            return;
        }
        let (mark, place, said) = match panic {
            Some((mark, class)) => (mark, Place::Console, Some(class)),
            None => (mark, Place::Screen, None),
        };
        let before = before.filter(|standing| standing.mark == mark);
        let known = before.as_ref().and_then(|standing| standing.class.clone()).or(said);
        let class = match (known, shows) {
            (Some(known), _) => Some(known),
            (None, Shows::Picture | Shows::Nothing) => None,
            (None, Shows::Text(text)) => Some(classify(&Shown { screen: Some(&text), ..Shown::default() })),
            (None, Shows::Read(text)) => Some(classify(&Shown { picture: Some(&text), ..Shown::default() })),
        };
        let used = before.as_ref().is_some_and(|standing| standing.used);
        let still = before.filter(|standing| standing.sample.io == sample.io);
        let (since, stuck) = still.map_or((now, Some(now)), |standing| (standing.since, standing.stuck(now, sample)));
        self.standing = Some(Standing { mark, place, since, stuck, sample, at: now, class, used });
    }

    /// The end of a panic, if that is the last that was written, in this boot.
    fn panic_on(&self, console: &ConsoleEnd) -> Option<Class> {
        let (runs, written) = (self.runs?, console.written?);
        let last = console.text.lines().rev().find(|line| !line.trim().is_empty())?;
        let class = classify(&Shown { console: Some(last), ..Shown::default() });
        (runs < written && matches!(class.kind, K::Panic | K::OutOfMemory)).then_some(class)
    }

    fn verdict(&mut self, limits: Watchfulness) -> Verdict {
        let Some(standing) = self.standing.as_mut().filter(|standing| !standing.used) else { return Verdict::Nothing };
        let Some(class) = &standing.class else { return Verdict::Nothing };
        // As far as it was looked at.
        let stood = standing.at.since(standing.since);
        let verdict = match class.kind {
            K::Panic | K::OutOfMemory | K::StopScreen => {
                if !standing.is_stuck(standing.at) && stood < limits.io {
                    return Verdict::Nothing;
                }
                self.acted = Some(standing.mark);
                Verdict::Failed(class.clone(), standing.place, stood)
            }
            K::NoBootDevice | K::BootLoader | K::Initramfs | K::Emergency if WAITS <= stood => {
                Verdict::Waits(class.clone())
            }
            K::NoBootDevice | K::BootLoader | K::Initramfs | K::Emergency => return Verdict::Nothing,
            // These a guest may survive: whether it has is seen by its beats.
            K::Oops | K::Lockup | K::HungTask | K::Reported | K::Unknown => return Verdict::Nothing,
        };
        standing.used = true;
        verdict
    }
}

impl Standing {
    /// For so long that it counts.
    fn is_stuck(&self, now: Time) -> bool {
        self.stuck.is_some_and(|since| STANDS <= now.since(since))
    }

    /// Since when no CPU has moved, or one of them always has.
    fn stuck(&self, now: Time, sample: Sample) -> Option<Time> {
        let used = sample.cpu.saturating_sub(self.sample.cpu).as_secs_f64();
        let part = used / now.since(self.at).as_secs_f64().max(f64::MIN_POSITIVE);
        if (STILL..SPINS).contains(&part) { None } else { self.stuck.or(Some(self.at)) }
    }
}

impl Guests {
    /// Looks at the screens for which it is time.
    pub(super) fn look_at_screens(&mut self, now: Time) {
        let settings = &self.settings;
        let due = |(vm, guest): (&VmId, &mut super::Guest)| {
            guest.screen.due(settings.watchfulness(&guest.name), &guest.watch).filter(|due| *due <= now)?;
            if guest.watch.is_well(now) {
                (guest.screen.looked, guest.screen.asked) = (now, None);
                return None;
            }
            guest.screen.asked = Some(now);
            Some((*vm, guest.screen.unread(now)))
        };
        let due: Vec<(VmId, Option<Mark>)> = self.vms.iter_mut().filter_map(due).collect();
        due.into_iter().for_each(|(vm, read)| self.act(GuestAct::Glance { vm, read }));
    }

    /// A look at its screen; none = it could not be had. `unwell`: datastores that are not well for this host.
    pub(super) fn glimpsed(&mut self, now: Time, vm: VmId, glimpse: Option<Glimpse>, unwell: &[DatastoreId]) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        let Some(limits) = self.settings.watchfulness(&guest.name) else { return };
        let storage_well = guest.storage_well(unwell);
        guest.screen.take(now, glimpse, storage_well, limits.screen.unwrap_or(PACE));
        if guest.watch.is_well(now) {
            return;
        }
        match guest.screen.verdict(limits) {
            Verdict::Nothing => {}
            Verdict::Waits(class) => {
                let advice = advice(class.kind).unwrap_or("look at its console");
                let text = format!("{} shows: {class} ({}); nothing is done: {advice}", guest.name, class.line);
                self.note(now, vm, Note::warning("guest-screen", text));
            }
            Verdict::Failed(class, place, stood) => {
                guest.recent.shows(&class);
                let seen = match place {
                    Place::Screen => "its screen has shown",
                    Place::Console => "its serial console has ended",
                };
                let why = format!("{seen} for {} s: {class} ({})", stood.as_secs(), class.line);
                self.remedy(now, vm, Remedy::Reset, Cause::Monitor, &why);
            }
        }
    }
}
