//! How a remedy is carried out, step by step, after it was allowed (`remedies`).
//!
//! ```text
//!   Looking ── it would not help ────────────────────────────────────► refused
//!      │ it helps, and that it is begun is on disk, or had its time (`memory`)
//!      ├─ what monitoring found, and its memory is wanted ── Dump, whatever comes of it, then as below
//!      ├─ dump ────────────► Dump ───────────────────────────────────► done
//!      ├─ reset ───────────► Reset ── its CPUs stand ──► Resume ─────► done
//!      ├─ suspend ─────────► Suspend ────────────────────────────────► done
//!      ├─ reboot ──────────► its agent is asked, or Reboot ─► Boots ─► done
//!      │                       └─ it cannot, or not within REBOOT ──► Reset, as above
//!      ├─ power-cycle ─────► End ─► Returns ─────────────────────────► done
//!      ├─ restart-elsewhere► End ─► Returns ─► Move ─────────────────► done
//!      └─ migrate ─────────► Move ── denied: again each second ──────► done
//!   a step that fails, or what does not come in time ────────────────► failed
//! ```
//!
//! A VM whose QEMU is ended is to the core one that crashed: it is started again in place, and never counts as wanted stopped
//! meanwhile. So whatever dies in the middle of it, it comes up again; that is why a restart elsewhere begins on this host.
//!
//! Rule in numbers: `LOOK` for the look, `ANSWER` for each step, whatever hangs; `REBOOT` for an orderly reboot, `RETURN` for a VM
//! to come back, `TRIES` for a move to begin.

use std::time::Duration;

use mainstay_guest::message::{Order, ToGuest};

use super::memory::PATIENCE;
use super::{FoundBy, GuestAct, Guests};
use crate::types::failure::Class;
use crate::types::guests::{Dumps, Remedy};
use crate::types::{Ticket, Time, VmId};

/// A look has a shorter time of its own; then the remedy is carried out without.
const LOOK: Duration = Duration::from_secs(5);
/// Whatever carries out a step answers earlier: libvirt after 10 s, a move after 10 min.
const ANSWER: Duration = Duration::from_secs(900);
/// For a guest to end its services and to boot: systemd gives each of them 90 s.
const REBOOT: Duration = Duration::from_secs(120);
/// For a VM whose QEMU was ended to run again: the core proves its end, claims it and starts it.
const RETURN: Duration = Duration::from_secs(60);
/// A move is denied while something else is done with the VM: it is tried again, so long and at this pace.
const TRIES: Duration = Duration::from_secs(30);
const PACE: Duration = Duration::from_secs(1);
/// A guest that has said something within this time can be asked to reboot.
const HEARD: Duration = Duration::from_secs(5);

/// One thing that is done to a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Reset the machine.
    Reset,
    /// Let its CPUs go.
    Resume,
    /// Let its CPUs stand.
    Suspend,
    /// Have its guest reboot, by libvirt.
    Reboot,
    /// End its QEMU, as a fault would: it is restarted.
    End,
    /// Move it to another host while it runs.
    Move,
    /// Write its memory to what is kept of its failure.
    Dump {
        /// Of the look by which that is kept.
        failure: Ticket,
        /// How much, and how long.
        limits: Dumps,
    },
}

/// How far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// What its guest shows is being kept.
    Looking,
    /// It waits for its memory to be on disk.
    Saving,
    /// Ordered; `Done` comes.
    Doing(Step),
    /// It was asked to reboot.
    Boots,
    /// Its QEMU was ended.
    Returns,
    /// A move was denied, and is tried again.
    Denied,
}

/// A remedy that is being carried out.
#[derive(Debug)]
pub(super) struct Underway {
    pub vm: VmId,
    pub remedy: Remedy,
    by: FoundBy,
    /// What has to be on disk before its first step, and how long that is waited for.
    save: Option<u64>,
    saving: Time,
    /// Of the look: the record of the failure waits for the outcome by it.
    look: Ticket,
    stage: Stage,
    /// When the present wait is over.
    until: Time,
    /// Until then a move that is denied is tried again.
    tries: Time,
    /// It does not run here any more.
    ended: bool,
    /// It runs again, but its guest's state is gone.
    lost: bool,
}

impl Underway {
    pub(super) fn new(now: Time, vm: VmId, remedy: Remedy, by: FoundBy, look: Ticket, save: Option<u64>) -> Self {
        let (stage, until, saving, tries) = (Stage::Looking, now + LOOK, now + PATIENCE, Time::ZERO);
        Self { vm, remedy, by, save, saving, look, stage, until, tries, ended: false, lost: false }
    }

    /// When something is to be done without a word from outside.
    pub(super) fn due(&self) -> Time {
        self.until
    }

    /// Its guest has lost its state, whatever came of the remedy.
    pub(super) fn has_lost_state(&self) -> bool {
        self.ended || self.lost
    }

    /// It is over in a moment, unless something hangs. A boot, a return, a move and a dump take longer.
    fn is_short(&self) -> bool {
        match self.stage {
            Stage::Looking | Stage::Saving => !matches!(self.remedy, Remedy::Migrate | Remedy::Dump),
            Stage::Doing(Step::Move | Step::Dump { .. }) | Stage::Boots | Stage::Returns | Stage::Denied => false,
            Stage::Doing(Step::Reset | Step::Resume | Step::Suspend | Step::Reboot | Step::End) => true,
        }
    }

    fn waits(&mut self, stage: Stage, until: Time) {
        (self.stage, self.until) = (stage, until);
    }
}

/// How a remedy has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    Done,
    /// It would not have helped; nothing was done, and nothing else is to be done.
    Refused(String),
    /// It was tried, and failed.
    Failed(String),
}

impl Guests {
    /// An orderly end of the agent would cut off a step that is over in a moment, or what is remembered of one.
    #[must_use]
    pub fn would_be_cut_off(&self) -> bool {
        self.saved < self.saves || self.underway.values().any(Underway::is_short)
    }

    /// What its guest shows was kept, or had its time.
    pub(super) fn looked(&mut self, now: Time, ticket: Ticket, class: &Class) {
        let Some(underway) = self.underway.get_mut(&ticket) else { return };
        if underway.stage != Stage::Looking {
            return;
        }
        match underway.by.helps(class) {
            Ok(()) if underway.save.is_some_and(|save| self.saved < save) && now < underway.saving => {
                underway.waits(Stage::Saving, underway.saving);
            }
            Ok(()) => self.begin(now, ticket),
            Err(why) => self.end(now, ticket, Ended::Refused(why)),
        }
    }

    /// What was to be saved is on disk, up to this.
    pub(super) fn saved(&mut self, now: Time, number: u64) {
        self.saved = self.saved.max(number);
        let ready = |one: &Underway| one.stage == Stage::Saving && one.save.is_none_or(|save| save <= number);
        let all: Vec<Ticket> = self.underway.iter().filter(|(_, one)| ready(one)).map(|(ticket, _)| *ticket).collect();
        all.into_iter().for_each(|ticket| self.begin(now, ticket));
    }

    fn begin(&mut self, now: Time, ticket: Ticket) {
        let Underway { vm, remedy, by, look, ended, .. } = self.underway[&ticket];
        let guest = self.vms.get_mut(&vm);
        let wanted = |name: &str| self.settings.watchfulness(name).is_some_and(|watched| watched.dump);
        if !ended
            && by == FoundBy::Monitoring
            && remedy.starts_anew()
            && guest.is_some_and(|guest| wanted(&guest.name) && guest.history.may_dump(now))
        {
            return self.order(now, ticket, Step::Dump { failure: look, limits: self.settings.dumps });
        }
        self.begin_remedy(now, ticket);
    }

    fn begin_remedy(&mut self, now: Time, ticket: Ticket) {
        let Underway { remedy, look, ended, .. } = self.underway[&ticket];
        if ended {
            return self.is_gone(now, ticket);
        }
        match remedy {
            Remedy::Reset => self.order(now, ticket, Step::Reset),
            Remedy::Suspend => self.order(now, ticket, Step::Suspend),
            Remedy::Reboot => self.ask_to_reboot(now, ticket),
            Remedy::PowerCycle | Remedy::RestartElsewhere => self.order(now, ticket, Step::End),
            Remedy::Migrate => self.move_away(now, ticket),
            Remedy::Dump => self.order(now, ticket, Step::Dump { failure: look, limits: self.settings.dumps }),
        }
    }

    /// A step was done, or failed.
    pub(super) fn step_done(&mut self, now: Time, ticket: Ticket, result: Result<(), String>) {
        let Some(underway) = self.underway.get_mut(&ticket) else { return };
        let Stage::Doing(step) = underway.stage else { return };
        match (step, result) {
            (Step::Reset, Ok(())) => match self.vms.get(&underway.vm).is_some_and(|guest| guest.recent.stands()) {
                true => self.order(now, ticket, Step::Resume), // They stand also after a reset.
                false => self.end(now, ticket, Ended::Done),
            },
            (Step::Dump { .. }, Ok(())) if underway.remedy == Remedy::Dump => self.end(now, ticket, Ended::Done),
            (Step::Dump { .. }, Err(why)) if underway.remedy == Remedy::Dump => {
                self.end(now, ticket, Ended::Failed(why));
            }
            // Its failure's record says what became of it; the remedy is worth more.
            (Step::Dump { .. }, _) => self.begin_remedy(now, ticket),
            (Step::Resume | Step::Suspend | Step::Move, Ok(())) => self.end(now, ticket, Ended::Done),
            (Step::Reboot, Ok(())) => underway.waits(Stage::Boots, now + REBOOT),
            (Step::Reboot, Err(_)) => self.order(now, ticket, Step::Reset),
            (Step::End, Ok(())) => underway.waits(Stage::Returns, now + RETURN),
            (Step::Move, Err(_)) if now < underway.tries => underway.waits(Stage::Denied, now + PACE),
            (Step::Move, Err(why)) if underway.remedy.starts_anew() => {
                self.end(now, ticket, Ended::Failed(format!("it was restarted, but not moved: {why}")));
            }
            (Step::Reset | Step::Resume | Step::Suspend | Step::End | Step::Move, Err(why)) => {
                self.end(now, ticket, Ended::Failed(why));
            }
        }
    }

    /// The guest's word on what it was asked.
    pub(super) fn guest_answered(&mut self, now: Time, vm: VmId, ask: u64, result: &Result<(), String>) {
        let asked = self.underway.get(&Ticket(ask)).is_some_and(|one| one.vm == vm && one.stage == Stage::Boots);
        if asked && result.is_err() {
            self.order(now, Ticket(ask), Step::Reset);
        }
    }

    /// It has booted anew by itself.
    pub(super) fn booted(&mut self, now: Time, vm: VmId) {
        if let Some(ticket) = self.underway_of(vm, |one| one.stage == Stage::Boots) {
            self.end(now, ticket, Ended::Done);
        }
    }

    /// It runs here.
    pub(super) fn runs_again(&mut self, now: Time, vm: VmId) {
        let Some(ticket) = self.underway_of(vm, |one| one.stage == Stage::Returns && one.ended) else { return };
        let underway = self.underway.get_mut(&ticket).expect("it was just found");
        (underway.ended, underway.lost) = (false, true);
        match underway.remedy {
            Remedy::RestartElsewhere => self.move_away(now, ticket),
            Remedy::Reset | Remedy::Reboot | Remedy::PowerCycle | Remedy::Migrate | Remedy::Suspend | Remedy::Dump => {
                self.end(now, ticket, Ended::Done);
            }
        }
    }

    /// It does not run here any more.
    pub(super) fn runs_no_more(&mut self, now: Time, vm: VmId) {
        let Some(ticket) = self.underway_of(vm, |_| true) else { return };
        let underway = self.underway.get_mut(&ticket).expect("it was just found");
        underway.ended = true;
        if underway.stage == Stage::Boots {
            self.end(now, ticket, Ended::Failed("it has ended, and did not boot".to_owned()));
        }
    }

    /// What was waited for long enough.
    pub(super) fn steps_due(&mut self, now: Time) {
        let is_due = |one: &Underway| one.due() <= now;
        let due: Vec<Ticket> = self.underway.iter().filter(|(_, one)| is_due(one)).map(|(ticket, _)| *ticket).collect();
        for ticket in due {
            match self.underway[&ticket].stage {
                Stage::Looking | Stage::Saving => self.begin(now, ticket),
                Stage::Doing(Step::Dump { .. }) if self.underway[&ticket].remedy != Remedy::Dump => {
                    self.begin_remedy(now, ticket);
                }
                Stage::Doing(step) => {
                    self.end(now, ticket, Ended::Failed(format!("nobody says what became of it ({step:?})")))
                }
                Stage::Boots => self.order(now, ticket, Step::Reset),
                Stage::Returns => {
                    let why = format!("its QEMU was ended, and it has not come back within {} s", RETURN.as_secs());
                    self.end(now, ticket, Ended::Failed(why));
                }
                // The core would pass the wish on, and move it from where it runs now.
                Stage::Denied if self.underway[&ticket].ended => self.is_gone(now, ticket),
                Stage::Denied => self.order(now, ticket, Step::Move),
            }
        }
    }

    fn is_gone(&mut self, now: Time, ticket: Ticket) {
        self.end(now, ticket, Ended::Failed("it does not run here any more".to_owned()));
    }

    fn ask_to_reboot(&mut self, now: Time, ticket: Ticket) {
        let underway = self.underway.get_mut(&ticket).expect("whoever calls has found it");
        let vm = underway.vm;
        if !self.vms.get(&vm).is_some_and(|guest| guest.watch.is_heard(now, HEARD)) {
            return self.order(now, ticket, Step::Reboot);
        }
        underway.waits(Stage::Boots, now + REBOOT);
        self.act(GuestAct::Say(vm, ToGuest::Ask { ask: ticket.0, order: Order::Reboot }));
    }

    fn move_away(&mut self, now: Time, ticket: Ticket) {
        self.underway.get_mut(&ticket).expect("whoever calls has found it").tries = now + TRIES;
        self.order(now, ticket, Step::Move);
    }

    /// Under a ticket of its own: what a step that was given up says late is of no interest.
    fn order(&mut self, now: Time, ticket: Ticket, step: Step) {
        let mut underway = self.underway.remove(&ticket).expect("whoever calls has found it");
        underway.waits(Stage::Doing(step), now + ANSWER);
        let (vm, ticket) = (underway.vm, self.next_ticket());
        self.underway.insert(ticket, underway);
        self.act(GuestAct::Order { ticket, vm, step });
    }

    fn end(&mut self, now: Time, ticket: Ticket, ended: Ended) {
        let Some(underway) = self.underway.remove(&ticket) else { return };
        let outcome = match &ended {
            Ended::Done => Ok(()),
            Ended::Refused(why) | Ended::Failed(why) => Err(why.clone()),
        };
        self.act(GuestAct::Outcome(underway.look, outcome));
        self.remedy_ended(now, &underway, ended);
    }

    fn underway_of(&self, vm: VmId, fits: impl Fn(&Underway) -> bool) -> Option<Ticket> {
        self.underway.iter().find(|(_, one)| one.vm == vm && fits(one)).map(|(ticket, _)| *ticket)
    }

    pub(super) fn next_ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }
}
