//! Reports: which rule fits, and what follows.
//!
//! ```text
//!   report ── broken ──────────────────────────────► denied
//!          ── said before ─────────────────────────► the same answer
//!          ── no rule, too few yet, "note" ────────► accepted
//!          ── something for this VM ── older boot ─► accepted: what it asks for is done by that
//!          │                        └─ this boot ──► `remedies`
//!          ── a program of the administrator ──────► `programs`
//!          └─ something for another VM ────────────► the master (`ballots`)
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use mainstay_guest::message::{Report, ReportId, Verdict, Wish};

use super::remedies::Cause;
use super::{GuestAct, Guests};
use crate::core::note::Note;
use crate::types::guests::{Answer, Consequence, GuestRequest, GuestWord, Remedy, Rule};
use crate::types::{Time, VmId};

/// Messages that fitted rules with a count: the rule's place, and when. As many as the host takes from a VM in a minute would
/// be more than any count: older ones are let go.
#[derive(Debug, Default)]
pub(super) struct Counts(VecDeque<(usize, Time)>);

pub(super) const MAX_COUNTED: usize = 1024;
/// Requests of one VM on which the master has not decided; another one is denied.
pub(super) const MAX_ASKED: usize = 64;
/// Between two tries to get a decision: the master may have changed, or not know yet where the VM runs.
const AGAIN: Duration = Duration::from_secs(1);

impl Counts {
    /// One more for this rule; whether there are enough within its window.
    fn enough(&mut self, at: usize, rule: &Rule, now: Time) -> bool {
        if MAX_COUNTED <= self.0.len() {
            self.0.pop_front();
        }
        self.0.push_back((at, now));
        let lately = self
            .0
            .iter()
            .filter(|(of, when)| *of == at && now.since(*when) < Duration::from_secs(rule.within_s.into()));
        rule.count as usize <= lately.count()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Guests {
    pub(super) fn reported(&mut self, now: Time, vm: VmId, report: &Report) {
        let Some(guest) = self.vms.get(&vm) else { return };
        if let Some(answer) = guest.answers.of(report.id).cloned() {
            return self.answer(vm, report.id, answer);
        }
        if let Err(why) = report.check() {
            return self.answer(vm, report.id, Answer::new(Verdict::Denied, why.to_string()));
        }
        let (name, before) = (guest.name.clone(), guest.boot.is_some_and(|boot| boot != report.boot));
        let text = format!("{name} says {}: {}: {}", severity(report), report.kind, report.message);
        self.note(now, vm, Note::info("guest-report", text));
        match self.consequence(now, vm, report) {
            Consequence::Note | Consequence::AsAsked => {
                self.answer(vm, report.id, Answer::new(Verdict::Accepted, "noted"))
            }
            Consequence::Own(_) if before => {
                let why = "it was said before this boot, which has come since";
                self.answer(vm, report.id, Answer::new(Verdict::Accepted, why));
            }
            Consequence::Own(remedy) => {
                let why = format!("{}: {}", report.kind, report.message);
                self.remedy(now, vm, remedy, Cause::Report(report.id), &why);
            }
            Consequence::Hook(program) => self.run_program(now, vm, report, program),
            Consequence::Other { vm: target, remedy } => self.ask(now, vm, report, target, remedy),
        }
    }

    /// What follows, with what is asked put in.
    fn consequence(&mut self, now: Time, vm: VmId, report: &Report) -> Consequence {
        let Some(guest) = self.vms.get_mut(&vm) else { return Consequence::Note };
        let fits = |rule: &&Rule| {
            rule.severity <= report.severity
                && rule.kind.fits(&report.kind)
                && rule.vm.fits(&guest.name)
                && rule.message.as_ref().is_none_or(|pattern| pattern.is_in(&report.message))
        };
        let Some((at, rule)) = self.settings.rules.iter().enumerate().find(|(_, rule)| fits(rule)) else {
            return Consequence::Note;
        };
        if 1 < rule.count && !guest.counts.enough(at, rule, now) {
            return Consequence::Note;
        }
        match &rule.then {
            Consequence::AsAsked => match &report.wish {
                Wish::None => Consequence::Note,
                Wish::Reset => Consequence::Own(Remedy::Reset),
                Wish::RestartElsewhere => Consequence::Own(Remedy::RestartElsewhere),
                Wish::ResetVm(name) if *name == guest.name => Consequence::Own(Remedy::Reset),
                Wish::ResetVm(name) => Consequence::Other { vm: name.clone(), remedy: Remedy::Reset },
            },
            other => other.clone(),
        }
    }

    fn ask(&mut self, now: Time, vm: VmId, report: &Report, target: String, remedy: Remedy) {
        let Some(guest) = self.vms.get_mut(&vm) else { return };
        if MAX_ASKED <= guest.asked.len() {
            return self.answer(vm, report.id, Answer::new(Verdict::Denied, "too many requests of this VM are open"));
        }
        let why = format!("{}: {}", report.kind, report.message);
        let request = GuestRequest { id: report.id, by: guest.name.clone(), target, remedy, why };
        guest.asked.push((request.clone(), now + AGAIN));
        let text = format!("the master is asked for a {remedy} of {}", request.target);
        self.answer(vm, report.id, Answer::new(Verdict::Delayed, text));
        self.act(GuestAct::TellMaster(GuestWord::Requested(request)));
    }

    pub(super) fn ask_again(&mut self, now: Time) {
        let all = self.vms.values_mut().flat_map(|guest| &mut guest.asked).filter(|(_, again)| *again <= now);
        let due: Vec<GuestRequest> = all
            .map(|(request, again)| {
                *again = now + AGAIN;
                request.clone()
            })
            .collect();
        due.into_iter().for_each(|request| self.act(GuestAct::TellMaster(GuestWord::Requested(request))));
    }

    /// The master's word. A guest that has left meanwhile asks again where it runs now.
    pub(super) fn decided(&mut self, now: Time, id: ReportId, answer: &Answer) {
        let Some((vm, guest)) =
            self.vms.iter_mut().find(|(_, guest)| guest.asked.iter().any(|(request, _)| request.id == id))
        else {
            return;
        };
        let vm = *vm;
        if answer.verdict.is_last() {
            let at = guest.asked.iter().position(|(request, _)| request.id == id).expect("it was just found");
            let (GuestRequest { target, remedy, .. }, _) = guest.asked.remove(at);
            if answer.verdict == Verdict::Denied {
                let text = format!("{} asked for a {remedy} of {target}: denied: {}", guest.name, answer.why);
                self.note(now, vm, Note::warning("guest-request-denied", text));
            }
        }
        if self.vms.get(&vm).is_some_and(|guest| guest.answers.of(id) != Some(answer)) {
            self.answer(vm, id, answer.clone());
        }
    }
}

/// In a word.
pub(super) fn severity(report: &Report) -> &'static str {
    use mainstay_guest::message::Severity;
    match report.severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Critical => "critical",
    }
}
