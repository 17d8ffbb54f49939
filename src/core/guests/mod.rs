//! What is done about what guests say. A value of its own beside [`super::Core`]: nothing here touches claims or leases, and what
//! it orders is carried out by the same ways as a person's orders.
//!
//! ```text
//!   guest ── report ──► the host where it runs: `reports`   which rule fits, what follows
//!                           │ own VM                │ another VM
//!                           ▼                       ▼
//!                       `remedies` ◄── Ordered ── the master: `ballots`   permission, votes, once
//!                       limits, back-off; then `steps`: failure information, the remedy
//!                           │
//!   guest ◄── answer ───────┘ accepted, done, denied, delayed, and why; the same one whenever it is said again
//! ```
//!
//! Bounds: `MAX_ANSWERS` answers are remembered for each VM, `MAX_BALLOTS` requests at the master; the oldest go first.
//!
//! Whether a silent guest has failed is judged by `monitor`; what its screen says of it, by `screen`.
//!
//! Deliberately not here: channels and bytes (`exec::channels`).

mod ballots;
mod bounds;
pub mod classify;
mod memory;
#[cfg(test)]
mod memory_tests;
mod monitor;
#[cfg(test)]
mod monitor_tests;
mod notes;
mod programs;
mod recent;
mod remedies;
mod reports;
mod screen;
#[cfg(test)]
mod screen_tests;
mod signs;
mod steps;
#[cfg(test)]
mod steps_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use mainstay_guest::message::{FromGuest, HostHello, ReportId, ToGuest};

use self::ballots::Ballots;
pub use self::monitor::Sample;
use self::monitor::Watch;
use self::notes::Notes;
use self::programs::Program;
pub use self::programs::Said;
use self::recent::Recent;
pub use self::recent::{Case, FoundBy, PATIENCE_MESSAGE, PATIENCE_MONITORING};
use self::remedies::History;
use self::reports::Counts;
use self::screen::Screen;
pub use self::screen::{ConsoleEnd, Glimpse, Mark, Shows};
use self::signs::Signs;
pub use self::signs::Watchdog;
pub use self::steps::Step;
use crate::core::note::Note;
use crate::types::failure::Class;
use crate::types::guests::{Answer, GuestMemory, GuestRequest, GuestSettings, GuestWord, Inside, Remedy, Remembered};
use crate::types::{DatastoreId, HostId, Ticket, Time, VmId};

/// Answers that are remembered for each VM.
const MAX_ANSWERS: usize = 256;

/// What happened.
#[derive(Debug)]
pub enum GuestEvent {
    /// Another document.
    Settings(GuestSettings),
    /// This VM runs here.
    Runs {
        /// Which.
        vm: VmId,
        /// Its name.
        name: String,
        /// Where all its disks lie; none = some of them on no datastore, or it is not known.
        stores: Option<Vec<DatastoreId>>,
    },
    /// This VM does not run here any more.
    Ended(VmId),
    /// Its channel is open.
    Connected(VmId),
    /// Its channel is closed.
    Disconnected(VmId),
    /// It has booted anew by itself.
    Rebooted(VmId),
    /// Its panic device has fired. `held`: its QEMU is kept, and waits (`on_crash = preserve`).
    Panicked {
        /// Which.
        vm: VmId,
        /// Its QEMU waits.
        held: bool,
    },
    /// Its watchdog device has fired, and this follows by itself.
    WatchdogFired(VmId, Watchdog),
    /// The sample that was asked for.
    Sampled {
        /// Of which VM.
        vm: VmId,
        /// None = libvirt did not give it.
        sample: Option<Sample>,
        /// Datastores that are not well for this host now.
        unwell: Vec<DatastoreId>,
    },
    /// The look at its screen that was asked for.
    Glimpsed {
        /// Of which VM.
        vm: VmId,
        /// None = it could not be had.
        glimpse: Option<Glimpse>,
        /// Datastores that are not well for this host now.
        unwell: Vec<DatastoreId>,
    },
    /// Its guest said something.
    Said(VmId, Box<FromGuest>),
    /// Failure information of this VM was kept, or not: a line for people.
    Kept(VmId, Result<String, String>),
    /// What its guest shows was kept, or had its time: what kind of failure that is.
    Looked(Ticket, Class),
    /// A step was done, or failed.
    Done(Ticket, Result<(), String>),
    /// At the master: a guest of that host asks for something. Where the VM that is meant runs now, if anywhere.
    Requested {
        /// The host where it was said.
        from: HostId,
        /// What is asked.
        request: GuestRequest,
        /// Where it would be done.
        at: Option<(VmId, HostId)>,
    },
    /// What an earlier agent of this host has saved.
    Recalled(GuestMemory),
    /// A program of the administrator has ended, or could not be run.
    Ran(Ticket, Result<(), String>),
    /// What was saved under this number is on disk, or cannot be.
    Saved(u64),
    /// Another agent, or this one, about an order or a decision; a request comes as `Requested`.
    Told(GuestWord),
    /// The agent is about to end. What is asked from now on is asked again, of the next one.
    Leaves,
    /// Something that was put off is due.
    Due,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuestAct {
    /// Tell a guest.
    Say(VmId, ToGuest),
    /// Keep what this VM's guest shows, before this is done to it.
    Keep {
        /// Comes back in `Looked`.
        ticket: Ticket,
        /// Of whom.
        vm: VmId,
        /// What will be done.
        remedy: Remedy,
        /// What is known of the failure.
        case: Box<Case>,
    },
    /// Do this to a VM.
    Order {
        /// Comes back in `Done`.
        ticket: Ticket,
        /// To whom.
        vm: VmId,
        /// What.
        step: Step,
    },
    /// What became of the remedy before which something was kept under this ticket.
    Outcome(Ticket, Result<(), String>),
    /// Look at what it does: `Sampled` comes back.
    Sample(VmId),
    /// Look at its screen: `Glimpsed` comes back.
    Glance {
        /// Of which.
        vm: VmId,
        /// A picture is read if it is this one.
        read: Option<Mark>,
    },
    /// How far a VM of this host is inside has changed.
    Inside(VmId, Inside),
    /// Tell a host, which may be this one.
    Tell(HostId, GuestWord),
    /// Tell the master, which may be this host.
    TellMaster(GuestWord),
    /// Tell all other hosts.
    TellOthers(GuestWord),
    /// Run a program of the administrator.
    Run {
        /// Comes back in `Ran`.
        ticket: Ticket,
        /// For which VM.
        vm: VmId,
        /// Its absolute path.
        program: String,
        /// What it is told.
        said: Box<Said>,
    },
    /// Make this durable in the place of what was saved before: `Saved` comes back.
    Save(u64, GuestMemory),
    /// Tell people.
    Note(Note),
}

/// One VM of this host.
#[derive(Debug, Default)]
struct Guest {
    name: String,
    /// Where all its disks lie, if that is known.
    stores: Option<Vec<DatastoreId>>,
    /// Of its kernel, as it says.
    boot: Option<[u8; 16]>,
    /// It was greeted, and has not answered yet: its next `Hello` is that answer, and needs none.
    greeted: bool,
    counts: Counts,
    history: History,
    watch: Watch,
    /// What the core was told of it.
    inside: Inside,
    screen: Screen,
    signs: Signs,
    program: Option<Program>,
    notes: Notes,
    recent: Recent,
    answers: Answers,
    /// Requests of it on which the master has not decided for good, and when each is asked again.
    asked: Vec<(GuestRequest, Time)>,
}

impl Guest {
    /// None of the datastores on which its disks lie is among these; of all, as long as nobody knows which they are.
    fn storage_well(&self, unwell: &[DatastoreId]) -> bool {
        match &self.stores {
            Some(stores) => stores.iter().all(|store| !unwell.contains(store)),
            None => unwell.is_empty(),
        }
    }

    fn due(&self) -> Option<Time> {
        self.history.due().into_iter().chain(self.notes.due()).chain(self.asked.iter().map(|(_, again)| *again)).min()
    }
}

/// The newest answers, by report.
#[derive(Debug, Default)]
struct Answers(VecDeque<(ReportId, Answer)>);

impl Answers {
    fn of(&self, id: ReportId) -> Option<&Answer> {
        self.0.iter().rev().find(|(of, _)| *of == id).map(|(_, answer)| answer)
    }

    fn keep(&mut self, id: ReportId, answer: Answer) {
        self.0.retain(|(of, _)| *of != id);
        if MAX_ANSWERS <= self.0.len() {
            self.0.pop_front();
        }
        self.0.push_back((id, answer));
    }
}

/// All guests of this host, and, at the master, what they ask of each other.
#[derive(Debug, Default)]
pub struct Guests {
    settings: GuestSettings,
    vms: BTreeMap<VmId, Guest>,
    ballots: Ballots,
    /// Remedies under way, by what they wait for.
    underway: BTreeMap<Ticket, steps::Underway>,
    tickets: u64,
    /// For a restart of the agent; how often it was saved, and which of these is on disk.
    memory: VecDeque<Remembered>,
    saves: u64,
    saved: u64,
    /// The agent is about to end.
    leaves: bool,
    acts: Vec<GuestAct>,
}

impl Guests {
    /// Takes one event; says what to do, in this order.
    pub fn step(&mut self, now: Time, event: GuestEvent) -> Vec<GuestAct> {
        match event {
            GuestEvent::Settings(settings) => self.settings = settings,
            GuestEvent::Runs { vm, name, stores } => self.runs(now, vm, name, stores),
            GuestEvent::Ended(vm) => self.ended(now, vm),
            GuestEvent::Connected(vm) => self.connected(now, vm),
            GuestEvent::Disconnected(vm) => self.watch(vm, |watch| watch.connected(now, false)),
            GuestEvent::Rebooted(vm) => self.rebooted(now, vm),
            GuestEvent::Panicked { vm, held } => self.panicked(now, vm, held),
            GuestEvent::WatchdogFired(vm, watchdog) => self.watchdog_fired(now, vm, watchdog),
            GuestEvent::Sampled { vm, sample, unwell } => {
                self.sampled(now, vm, sample, &unwell);
                self.look_at_screens(now); // One that is known to be late now is looked at at once.
            }
            GuestEvent::Glimpsed { vm, glimpse, unwell } => self.glimpsed(now, vm, glimpse, &unwell),
            GuestEvent::Said(vm, said) => self.said(now, vm, *said),
            GuestEvent::Kept(vm, kept) => self.kept(now, vm, kept),
            GuestEvent::Looked(ticket, class) => self.looked(now, ticket, &class),
            GuestEvent::Done(ticket, result) => self.step_done(now, ticket, result),
            GuestEvent::Requested { from, request, at } => self.requested(now, from, request, at),
            GuestEvent::Recalled(memory) => self.recalled(memory),
            GuestEvent::Ran(ticket, result) => self.ran(now, ticket, result),
            GuestEvent::Saved(number) => self.saved(now, number),
            GuestEvent::Told(word) => self.told(now, word),
            GuestEvent::Leaves => self.leaves = true,
            GuestEvent::Due => self.due(now),
        }
        std::mem::take(&mut self.acts)
    }

    /// When `step` must be called with `Due` at the latest.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        let due = |guest: &Guest| {
            let limits = self.settings.watchfulness(&guest.name);
            let screen = guest.screen.due(limits, &guest.watch);
            guest.due().into_iter().chain(guest.watch.due(limits)).chain(screen).min()
        };
        self.vms
            .values()
            .filter_map(due)
            .chain(self.underway.values().map(steps::Underway::due))
            .chain(self.ballots.due())
            .min()
    }

    fn told(&mut self, now: Time, word: GuestWord) {
        match word {
            GuestWord::Requested(_) => {} // Comes as `Requested`, with what the core knows.
            GuestWord::Failures(_) | GuestWord::EnablePort { .. } => {} // Answered beside the core.
            GuestWord::Ordered { .. } if self.leaves => {}
            GuestWord::Ordered { id, vm, remedy, why } => self.ordered(now, id, vm, remedy, &why),
            GuestWord::Begun { vm, ids, remedy } => self.begun_elsewhere(now, vm, &ids, remedy),
            GuestWord::Obeyed { id, answer } => self.obeyed(id, &answer),
            GuestWord::Decided { id, answer } => self.decided(now, id, &answer),
        }
    }

    fn due(&mut self, now: Time) {
        self.steps_due(now);
        self.end_ballots(now);
        self.carry_out_due(now);
        self.look(now);
        self.look_at_screens(now);
        self.ask_again(now);
        let summaries: Vec<Note> = self.vms.values_mut().filter_map(|guest| guest.notes.summary(now)).collect();
        summaries.into_iter().for_each(|note| self.act(GuestAct::Note(note)));
    }

    fn act(&mut self, act: GuestAct) {
        self.acts.push(act);
    }

    /// Tells people of something that a guest can bring about as often as it likes.
    fn note(&mut self, now: Time, vm: VmId, note: Note) {
        let told = self.vms.get_mut(&vm).and_then(|guest| {
            let note = note.of(&guest.name);
            guest.notes.tell(now, note)
        });
        self.acts.extend(told.map(GuestAct::Note));
    }

    fn kept(&mut self, now: Time, vm: VmId, kept: Result<String, String>) {
        self.note(
            now,
            vm,
            match kept {
                Ok(text) => Note::info("guest-failure-kept", text),
                Err(text) => Note::warning("guest-failure-not-kept", text),
            },
        );
    }

    fn watch(&mut self, vm: VmId, change: impl FnOnce(&mut Watch)) {
        if let Some(guest) = self.vms.get_mut(&vm) {
            change(&mut guest.watch);
        }
    }

    fn connected(&mut self, now: Time, vm: VmId) {
        self.watch(vm, |watch| watch.connected(now, true));
        self.greet(vm);
    }

    fn runs(&mut self, now: Time, vm: VmId, name: String, stores: Option<Vec<DatastoreId>>) {
        let guest = self.vms.entry(vm).or_default();
        (guest.name, guest.stores) = (name, stores);
        guest.screen.runs(now);
        self.runs_again(now, vm);
    }

    fn greet(&mut self, vm: VmId) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        guest.greeted = true;
        let hello = HostHello { protocol: mainstay_guest::PROTOCOL, vm: guest.name.clone() };
        self.act(GuestAct::Say(vm, ToGuest::Hello(hello)));
    }

    fn said(&mut self, now: Time, vm: VmId, said: FromGuest) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        guest.recent.heard(now, &said);
        let before = guest.boot;
        match said {
            FromGuest::Hello(hello) => {
                let new = guest.boot.replace(hello.boot) != Some(hello.boot);
                // Both sides greet whoever greets them: without an end to that they would do so for ever.
                if new || !std::mem::take(&mut guest.greeted) {
                    self.greet(vm);
                }
            }
            FromGuest::Beat(beat) => {
                guest.boot = Some(beat.boot);
                guest.watch.beats(now, &beat);
            }
            FromGuest::Report(_) if self.leaves => {}
            FromGuest::Report(report) => self.reported(now, vm, &report),
            FromGuest::Leaves => guest.watch.leaves(),
            FromGuest::Outcome { ask, result } => self.guest_answered(now, vm, ask, &result),
        }
        if before.is_some() && self.vms.get(&vm).is_some_and(|guest| guest.boot != before) {
            self.booted(now, vm);
        }
        self.tell_inside(vm);
    }

    /// Tells the core how far it is, when that has changed.
    fn tell_inside(&mut self, vm: VmId) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        let inside = guest.watch.inside;
        if std::mem::replace(&mut guest.inside, inside) != inside {
            self.act(GuestAct::Inside(vm, inside));
        }
    }

    /// What was asked of it here is void; what it has said is answered where it runs next.
    fn ended(&mut self, now: Time, vm: VmId) {
        if let Some(guest) = self.vms.get_mut(&vm) {
            (guest.boot, guest.asked) = (None, Vec::new());
            guest.history.ended();
            guest.watch.ended();
            guest.screen.ended();
            guest.recent.boots();
        }
        self.tell_inside(vm);
        self.runs_no_more(now, vm);
    }

    /// Answers a report, and remembers the answer.
    fn answer(&mut self, vm: VmId, id: ReportId, answer: Answer) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        guest.answers.keep(id, answer.clone());
        self.act(GuestAct::Say(vm, ToGuest::Answer { id, verdict: answer.verdict, why: answer.why }));
    }
}
