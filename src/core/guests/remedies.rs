//! Remedies for VMs of this host, whoever asks: within limits, one at a time, each answered.
//!
//! ```text
//!   asked ── it does not run here ─────────────────────► denied
//!         ── another one is under way ─────────────────► shares its outcome
//!         ── as many within the hour as are allowed ───► denied; "needs attention", once
//!         ── too soon after the last ── waits ─────────► delayed, then as below
//!         └─ now: step by step (`steps`) ──────────────► done, or denied with what failed
//! ```
//!
//! The first remedy is not held up; before the n-th of an hour lie `backoff` × 2^(n−2) since the one before it, and `backoff` ×
//! 2^(n−1) after the n-th that failed in a row, at most ×32. A move counts as well: it costs the host more than a reset.
//!
//! A dump does not count, and is denied within `DUMPS_APART` of the last. What is wanted while it is written waits for its end: it has
//! not mended anything.

use std::time::Duration;

use mainstay_guest::message::{ReportId, Verdict};

use super::steps::{Ended, Underway};
use super::{FoundBy, GuestAct, Guests};
use crate::core::note::Note;
use crate::types::guests::{Answer, GuestWord, Limits, Remedy};
use crate::types::{Time, VmId};

/// The window of the limit.
const HOUR: Duration = Duration::from_secs(3600);
/// Reports and orders that wait for one remedy; further ones are denied.
pub(super) const MAX_CAUSES: usize = 64;

/// What libvirt tells of a VM in this time after a remedy was begun may be its effect.
const JUST_NOW: Duration = Duration::from_secs(10);
/// Between two dumps of one VM: it stands meanwhile, and the disk has room for a few.
const DUMPS_APART: Duration = Duration::from_secs(600);
/// After more failures in a row the wait gets no longer.
const MAX_DOUBLINGS: u32 = 5;

/// Who is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// A report of the VM itself.
    Report(ReportId),
    /// An order of the master.
    Order(ReportId),
    /// What was seen of it; nobody waits for an answer.
    Monitor,
}

impl Cause {
    /// Of the report or order; what was seen has none.
    fn id(self) -> Option<ReportId> {
        match self {
            Self::Report(id) | Self::Order(id) => Some(id),
            Self::Monitor => None,
        }
    }

    fn found_by(self) -> FoundBy {
        match self {
            Self::Report(_) | Self::Order(_) => FoundBy::Message,
            Self::Monitor => FoundBy::Monitoring,
        }
    }
}

/// What is to be done, and for whom.
#[derive(Debug)]
struct Wanted {
    remedy: Remedy,
    causes: Vec<Cause>,
    /// Not before; none = it is being carried out.
    from: Option<Time>,
    why: String,
}

/// What was done to one VM.
#[derive(Debug, Default)]
pub(super) struct History {
    /// When it was started anew or moved by a remedy, within the hour.
    anew: Vec<Time>,
    wanted: Option<Wanted>,
    /// People were told that it needs attention.
    told: bool,
    /// When its memory was last written, or that was begun.
    dumped: Option<Time>,
    /// What is wanted when its memory is written.
    afterwards: Vec<(Remedy, Cause, String)>,
    /// When the last one failed, and how many have in a row; the last was not.
    failed: Option<(Time, u32)>,
}

/// Whether a remedy may be carried out now.
enum May {
    Now,
    From(Time),
    Never,
}

impl History {
    pub(super) fn due(&self) -> Option<Time> {
        self.wanted.as_ref()?.from
    }

    /// Who waits for the remedy that is wanted.
    pub(super) fn causes(&self) -> usize {
        self.wanted.as_ref().map_or(0, |wanted| wanted.causes.len() + self.afterwards.len())
    }

    /// Whether its memory may be written now; then that is taken for done.
    pub(super) fn may_dump(&mut self, now: Time) -> bool {
        let may = self.dumped.is_none_or(|at| DUMPS_APART <= now.since(at));
        self.dumped = if may { Some(now) } else { self.dumped };
        may
    }

    /// Something is done to it, or was moments ago.
    pub(super) fn acts(&self, now: Time) -> bool {
        let lately = |at: &Time| now.since(*at) < JUST_NOW;
        self.wanted.as_ref().is_some_and(|wanted| wanted.from.is_none()) || self.anew.last().is_some_and(lately)
    }

    /// When it had remedies that count within the hour, the newest of them.
    pub(super) fn lately(&self, now: Time, most: usize) -> Vec<Time> {
        let times: Vec<Time> = self.anew.iter().copied().filter(|at| now.since(*at) < HOUR).collect();
        times[times.len().saturating_sub(most)..].to_vec()
    }

    /// What an earlier agent has counted.
    pub(super) fn recall(&mut self, times: Vec<Time>) {
        self.anew = times;
        self.anew.sort_unstable();
    }

    /// How many count within the hour.
    #[cfg(test)]
    pub(super) fn counted(&self) -> usize {
        self.anew.len()
    }

    /// Another host does something that counts.
    pub(super) fn begun_elsewhere(&mut self, now: Time) {
        self.anew.retain(|at| now.since(*at) < HOUR);
        if self.anew.len() < MAX_CAUSES {
            self.anew.push(now);
        }
    }

    /// It does not run here any more: what waits is void.
    pub(super) fn ended(&mut self) {
        self.wanted = self.wanted.take().filter(|wanted| wanted.from.is_none());
    }

    fn may(&mut self, now: Time, remedy: Remedy, limits: Limits) -> May {
        self.anew.retain(|at| now.since(*at) < HOUR);
        if !remedy.counts() {
            return May::Now;
        }
        let count = self.anew.len();
        if limits.resets_per_hour as usize <= count {
            return May::Never;
        }
        let backoff = Duration::from_secs(limits.backoff_s.into());
        let doubled = |times: u32| backoff * 2_u32.pow(times.saturating_sub(1).min(MAX_DOUBLINGS));
        let again = self.failed.map(|(at, times)| at + doubled(times)).filter(|again| now < *again);
        let Some(last) = self.anew.last() else {
            self.told = false;
            return again.map_or(May::Now, May::From);
        };
        let from =
            again.unwrap_or_default().max(*last + backoff * 2_u32.pow(u32::try_from(count - 1).unwrap_or(16).min(16)));
        if from <= now { May::Now } else { May::From(from) }
    }
}

impl Guests {
    /// Something is wanted for a VM.
    pub(super) fn remedy(&mut self, now: Time, vm: VmId, remedy: Remedy, cause: Cause, why: &str) {
        let limits = self.settings.limits;
        let Some(guest) = self.vms.get_mut(&vm) else {
            return self.tell(vm, &[cause], &Answer::new(Verdict::Denied, "it does not run on this host"));
        };
        if let Some(wanted) = &mut guest.history.wanted {
            if MAX_CAUSES <= wanted.causes.len() + guest.history.afterwards.len() {
                return self.tell(vm, &[cause], &Answer::new(Verdict::Denied, "too many wait for the same already"));
            }
            if wanted.remedy == Remedy::Dump && remedy != Remedy::Dump {
                guest.history.afterwards.push((remedy, cause, why.to_owned()));
                return self.tell(vm, &[cause], &Answer::new(Verdict::Delayed, "its memory is being written first"));
            }
            wanted.causes.push(cause);
            let text = format!("a {} is on its way", wanted.remedy);
            return self.tell(vm, &[cause], &Answer::new(Verdict::Delayed, text));
        }
        if remedy == Remedy::Dump && !guest.history.may_dump(now) {
            let why = format!("its memory was written less than {} s ago", DUMPS_APART.as_secs());
            return self.tell(vm, &[cause], &Answer::new(Verdict::Denied, why));
        }
        match guest.history.may(now, remedy, limits) {
            May::Never => {
                let name = guest.name.clone();
                let text =
                    format!("it was started anew {} times within an hour; it needs attention", limits.resets_per_hour);
                if !std::mem::replace(&mut guest.history.told, true) {
                    let text = format!("{name} needs attention: {text}; the last reason: {why}");
                    self.act(GuestAct::Note(Note::alarm("guest-needs-attention", text).of(&name)));
                }
                self.tell(vm, &[cause], &Answer::new(Verdict::Denied, text));
            }
            May::From(from) => {
                let wanted = Wanted { remedy, causes: vec![cause], from: Some(from), why: why.to_owned() };
                guest.history.wanted = Some(wanted);
                let text = format!(
                    "a {remedy} follows in {} s, since the last was not long ago",
                    from.since(now).as_secs() + 1
                );
                self.tell(vm, &[cause], &Answer::new(Verdict::Delayed, text));
            }
            May::Now => {
                let wanted = Wanted { remedy, causes: vec![cause], from: None, why: why.to_owned() };
                guest.history.wanted = Some(wanted);
                self.carry_out(now, vm);
            }
        }
    }

    fn carry_out(&mut self, now: Time, vm: VmId) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        let Some(wanted) = &mut guest.history.wanted else { return };
        wanted.from = None;
        let (remedy, name) = (wanted.remedy, guest.name.clone());
        let text = format!("{name}: {remedy}: {}", wanted.why);
        let by = wanted.causes.first().map_or(FoundBy::Message, |cause| cause.found_by());
        let case = Box::new(guest.recent.case(&name, &wanted.why, by));
        if remedy.counts() {
            guest.history.anew.push(now);
        }
        let ids: Vec<ReportId> = wanted.causes.iter().filter_map(|cause| cause.id()).collect();
        let ticket = self.next_ticket();
        let save = self.begins(now, vm, remedy, &ids);
        self.underway.insert(ticket, Underway::new(now, vm, remedy, by, ticket, save));
        let note = Note::warning("guest-remedy", text);
        if remedy.counts() {
            self.act(GuestAct::Note(note.of(&name))); // Bounded by the limit, and by the wait after one that failed.
        } else {
            self.note(now, vm, note);
        }
        self.act(GuestAct::Keep { ticket, vm, remedy, case });
    }

    /// It was done, or not.
    pub(super) fn remedy_ended(&mut self, now: Time, underway: &Underway, ended: Ended) {
        let (vm, remedy) = (underway.vm, underway.remedy);
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        let Some(wanted) = guest.history.wanted.take() else { return };
        let name = guest.name.clone();
        // What was not done does not count, unless its guest has lost its state all the same.
        if ended != Ended::Done && remedy.counts() && !(remedy.starts_anew() && underway.has_lost_state()) {
            guest.history.anew.pop();
        }
        let answer = match ended {
            Ended::Done => {
                guest.history.failed = guest.history.failed.filter(|_| !remedy.counts());
                if remedy.starts_anew() {
                    guest.watch.boots(now);
                    guest.screen.boots(now);
                    guest.recent.boots();
                }
                Answer::new(Verdict::Done, remedy.name())
            }
            Ended::Refused(why) => {
                let text = format!("{name}: no {remedy}: {why}");
                self.note(now, vm, Note::alarm("guest-remedy-refused", text));
                Answer::new(Verdict::Denied, format!("no {remedy}: {why}"))
            }
            Ended::Failed(why) => {
                if remedy.counts() {
                    let times = guest.history.failed.map_or(1, |(_, times)| times.saturating_add(1));
                    guest.history.failed = Some((now, times));
                }
                guest.watch.judge_again();
                guest.screen.judge_again();
                let text = format!("{name}: the {remedy} failed: {why}");
                self.note(now, vm, Note::alarm("guest-remedy-failed", text));
                Answer::new(Verdict::Denied, format!("the {remedy} failed: {why}"))
            }
        };
        let ids: Vec<ReportId> = wanted.causes.iter().filter_map(|cause| cause.id()).collect();
        self.tell_inside(vm);
        self.remember(now, vm, &ids, &answer);
        self.tell(vm, &wanted.causes, &answer);
        let afterwards = self.vms.get_mut(&vm).map(|guest| std::mem::take(&mut guest.history.afterwards));
        for (remedy, cause, why) in afterwards.unwrap_or_default() {
            self.remedy(now, vm, remedy, cause, &why);
        }
    }

    /// The master's order. The same one again gets the same answer.
    pub(super) fn ordered(&mut self, now: Time, id: ReportId, vm: VmId, remedy: Remedy, why: &str) {
        let known = self.vms.get(&vm).and_then(|guest| guest.answers.of(id).cloned());
        let waits = |guest: &super::Guest| {
            let (history, cause) = (&guest.history, Cause::Order(id));
            history.wanted.as_ref().is_some_and(|wanted| wanted.causes.contains(&cause))
                || history.afterwards.iter().any(|(_, of, _)| *of == cause)
        };
        match known {
            Some(answer) if answer.verdict.is_last() => {
                self.act(GuestAct::TellMaster(GuestWord::Obeyed { id, answer }))
            }
            _ if self.vms.get(&vm).is_some_and(waits) => {}
            Some(_) | None => self.remedy(now, vm, remedy, Cause::Order(id), why),
        }
    }

    pub(super) fn carry_out_due(&mut self, now: Time) {
        let due = |guest: &super::Guest| guest.history.due().is_some_and(|from| from <= now);
        let due: Vec<VmId> = self.vms.iter().filter(|(_, guest)| due(guest)).map(|(vm, _)| *vm).collect();
        due.into_iter().for_each(|vm| self.carry_out_or_drop(now, vm));
    }

    /// What waited because of what was seen of a guest that is well again, or was started anew, was not needed.
    fn carry_out_or_drop(&mut self, now: Time, vm: VmId) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        let only_seen = |wanted: &Wanted| wanted.causes.iter().all(|cause| *cause == Cause::Monitor);
        let is_mended = guest.watch.is_well(now) || guest.screen.has_changed();
        if is_mended && guest.history.wanted.as_ref().is_some_and(only_seen) {
            guest.history.wanted = None;
            let text = format!("{} is heard again, or shows something else: nothing is done any more", guest.name);
            return self.note(now, vm, Note::info("guest-heard", text));
        }
        self.carry_out(now, vm);
    }

    fn tell(&mut self, vm: VmId, causes: &[Cause], answer: &Answer) {
        for cause in causes {
            match cause {
                Cause::Monitor => {}
                Cause::Report(id) => self.answer(vm, *id, answer.clone()),
                Cause::Order(id) => {
                    if let Some(guest) = self.vms.get_mut(&vm) {
                        guest.answers.keep(*id, answer.clone());
                    }
                    self.act(GuestAct::TellMaster(GuestWord::Obeyed { id: *id, answer: answer.clone() }));
                }
            }
        }
    }
}
