//! Programs of the administrator that rules run for a message ("hook").
//!
//! ```text
//!   report ── one of this VM runs, or was begun less than `APART` ago ──► accepted: noted
//!          └─ else ──► Run ── it ends well ──► done
//!                         └─ it fails, or not within its time ──► denied; told
//! ```
//!
//! Which program is run says the rule alone; what the guest says reaches it as text in its environment. An agent that is restarted
//! does not run it again for the same report.

use std::time::Duration;

use mainstay_guest::message::{Report, ReportId, Verdict};

use super::reports::severity;
use super::{GuestAct, Guests};
use crate::core::note::Note;
use crate::types::guests::Answer;
use crate::types::{Ticket, Time, VmId};

/// Between two programs of one VM: a guest can send messages without end.
const APART: Duration = Duration::from_secs(10);

/// What a program is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Said {
    /// Of the VM.
    pub name: String,
    /// Of the message.
    pub kind: String,
    /// In a word.
    pub severity: &'static str,
    /// Its text: one line.
    pub message: String,
}

/// The program of one VM that was begun last.
#[derive(Debug)]
pub(super) struct Program {
    begun: Time,
    /// While it runs.
    runs: Option<(Ticket, ReportId)>,
}

impl Guests {
    /// A rule runs this program for a message.
    pub(super) fn run_program(&mut self, now: Time, vm: VmId, report: &Report, program: String) {
        let Some(guest) = self.vms.get(&vm) else { return };
        let busy = |last: &Program| last.runs.is_some() || now.since(last.begun) < APART;
        if guest.program.as_ref().is_some_and(busy) {
            let why = "noted; its hook runs, or was run a moment ago";
            return self.answer(vm, report.id, Answer::new(Verdict::Accepted, why));
        }
        let said = Said {
            name: guest.name.clone(),
            kind: report.kind.clone(),
            severity: severity(report),
            message: report.message.clone(),
        };
        self.note(now, vm, Note::info("guest-hook", format!("{}: {program} is run for {}", said.name, said.kind)));
        self.remember(now, vm, &[report.id], &Answer::new(Verdict::Accepted, "its hook was begun"));
        let ticket = self.next_ticket();
        if let Some(guest) = self.vms.get_mut(&vm) {
            guest.program = Some(Program { begun: now, runs: Some((ticket, report.id)) });
        }
        self.answer(vm, report.id, Answer::new(Verdict::Delayed, "its hook runs"));
        self.act(GuestAct::Run { ticket, vm, program, said: Box::new(said) });
    }

    /// A program has ended, or could not be run.
    pub(super) fn ran(&mut self, now: Time, ticket: Ticket, result: Result<(), String>) {
        let is = |program: &Program| program.runs.is_some_and(|(of, _)| of == ticket);
        let found = self.vms.iter_mut().find(|(_, guest)| guest.program.as_ref().is_some_and(is));
        let Some((vm, guest)) = found else { return };
        let (vm, name) = (*vm, guest.name.clone());
        let Some((_, id)) = guest.program.as_mut().and_then(|program| program.runs.take()) else { return };
        let answer = match result {
            Ok(()) => Answer::new(Verdict::Done, "hook"),
            Err(why) => {
                self.note(now, vm, Note::warning("guest-hook-failed", format!("{name}: its hook failed: {why}")));
                Answer::new(Verdict::Denied, format!("the hook failed: {why}"))
            }
        };
        self.remember(now, vm, &[id], &answer);
        self.answer(vm, id, answer);
    }
}
