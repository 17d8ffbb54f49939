//! What a guest said lately, for people who look at its failure; and what goes with a remedy, so that the failure can be kept
//! before.
//!
//! Bounds: `MAX_SAID` lines of `MAX_TEXT` bytes for each VM; the oldest go first.

use std::collections::VecDeque;
use std::time::Duration;

use mainstay_guest::message::{Beat, FromGuest, Report, ReportId, System};

use super::classify::{advice, clean, remedy_for};
use super::reports::severity;
use crate::types::Time;
use crate::types::failure::Class;

/// Reports that are remembered.
const MAX_SAID: usize = 64;
/// Bytes of each.
const MAX_TEXT: usize = 512;

/// How long a remedy that a message asks for waits for failure information: the reset is to be on its way 250 ms after the
/// message left the guest.
pub const PATIENCE_MESSAGE: Duration = Duration::from_millis(100);
/// The same for a failure that monitoring has found: it took seconds to be found.
pub const PATIENCE_MONITORING: Duration = Duration::from_millis(500);

/// Who has found the failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FoundBy {
    /// A message, of the guest or of another one.
    Message,
    /// Monitoring, without a word of the guest.
    Monitoring,
}

impl FoundBy {
    /// Whether to go on, now that one knows what it is. What a message or a rule asks for is done in any case.
    ///
    /// # Errors
    /// Why the remedy would not help, with what to do instead.
    pub(super) fn helps(self, class: &Class) -> Result<(), String> {
        match (self, remedy_for(class.kind)) {
            (Self::Message, _) | (Self::Monitoring, Some(_)) => Ok(()),
            (Self::Monitoring, None) => {
                let advice = advice(class.kind).unwrap_or("look at its console");
                Err(format!("{class} ({}): it would not help; {advice}", class.line))
            }
        }
    }
}

/// What is known of a failure when its remedy is ordered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Case {
    /// The VM's name.
    pub name: String,
    /// Why the remedy is ordered, for people.
    pub why: String,
    /// Who has found it.
    pub by: FoundBy,
    /// The panic device has fired: what the hypervisor says of it.
    pub panicked: Option<String>,
    /// What its screen showed when it was found to have failed, if that was why.
    pub sign: Option<Class>,
    /// What its agent has said of its system.
    pub system: Option<System>,
    /// Its last beat, and when.
    pub beat: Option<(Time, Beat)>,
    /// What it said lately, oldest first.
    pub said: Vec<(Time, String)>,
}

impl Case {
    /// How long its remedy may wait for what libvirt shows.
    #[must_use]
    pub fn patience(&self) -> Duration {
        match self.by {
            FoundBy::Message => PATIENCE_MESSAGE,
            FoundBy::Monitoring => PATIENCE_MONITORING,
        }
    }
}

/// Of one VM.
#[derive(Debug, Default)]
pub(super) struct Recent {
    system: Option<System>,
    beat: Option<(Time, Beat)>,
    said: VecDeque<(Time, ReportId, String)>,
    panicked: Option<String>,
    sign: Option<Class>,
    /// Its CPUs stand because of that, until they are let go.
    stands: bool,
}

impl Recent {
    /// Its panic device has fired, and its QEMU waits.
    pub(super) fn panics(&mut self) {
        self.panicked = Some("the panic device has fired".to_owned());
        self.stands = true;
    }

    /// Its watchdog has fired, and its CPUs stand.
    pub(super) fn stopped(&mut self) {
        self.stands = true;
    }

    /// Its screen shows that it has failed.
    pub(super) fn shows(&mut self, class: &Class) {
        self.sign = Some(class.clone());
    }

    /// It was started anew.
    pub(super) fn boots(&mut self) {
        (self.panicked, self.sign, self.stands) = (None, None, false);
    }

    /// Whether its CPUs have to be let go, also after a reset.
    pub(super) fn stands(&self) -> bool {
        self.stands
    }

    pub(super) fn heard(&mut self, now: Time, said: &FromGuest) {
        match said {
            FromGuest::Hello(hello) => {
                let System { id, version, kernel } = &hello.system;
                self.system = Some(System { id: clean(id), version: clean(version), kernel: clean(kernel) });
            }
            FromGuest::Beat(beat) => (self.beat, self.sign) = (Some((now, beat.clone())), None),
            FromGuest::Report(report) => self.report(now, report),
            FromGuest::Outcome { .. } | FromGuest::Leaves => {}
        }
    }

    /// A broken one is denied, and its text not fit to be shown. Each is said again until it is answered.
    fn report(&mut self, now: Time, report: &Report) {
        if report.check().is_err() || self.said.iter().any(|(_, id, _)| *id == report.id) {
            return;
        }
        let mut text = format!("{} {}: {}", severity(report), report.kind, report.message);
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        if MAX_SAID <= self.said.len() {
            self.said.pop_front();
        }
        self.said.push_back((now, report.id, text));
    }

    pub(super) fn case(&self, name: &str, why: &str, by: FoundBy) -> Case {
        Case {
            name: name.to_owned(),
            why: why.to_owned(),
            by,
            panicked: self.panicked.clone(),
            sign: self.sign.clone(),
            system: self.system.clone(),
            beat: self.beat.clone(),
            said: self.said.iter().map(|(at, _, text)| (*at, text.clone())).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use mainstay_guest::message::{GuestHello, Severity, Wish};

    use super::*;
    use crate::types::failure::{FailureKind, Family};

    #[test]
    fn the_newest_are_kept_once_and_cut() {
        let mut recent = Recent::default();
        for n in 0..200_u8 {
            let message = "ä".repeat(usize::from(n) + 200);
            let (id, kind) = (ReportId([n; 16]), "app/db".to_owned());
            let (severity, wish) = (Severity::Critical, Wish::None);
            let report = Report { id, sequence: 1, boot: [1; 16], severity, kind, message, wish };
            for _ in 0..2 {
                recent.heard(Time(u64::from(n)), &FromGuest::Report(report.clone()));
            }
            let broken = Report { id: ReportId([255; 16]), message: "two\nlines".to_owned(), ..report };
            recent.heard(Time(0), &FromGuest::Report(broken));
        }
        let system = System { id: "deb\u{1b}[2Jian".to_owned(), ..System::default() };
        let hello = GuestHello { protocol: 1, agent: String::new(), boot: [1; 16], system };
        recent.heard(Time(0), &FromGuest::Hello(hello));
        let case = recent.case("web", "why", FoundBy::Message);
        assert_eq!((case.said.len(), case.said[0].0, case.said[63].0), (MAX_SAID, Time(136), Time(199)));
        assert!(case.said.iter().all(|(_, text)| text.starts_with("critical app/db: ää") && text.len() <= MAX_TEXT));
        assert_eq!(case.system.unwrap().id, "debian");
    }

    #[test]
    fn monitoring_does_not_reset_what_a_reset_cannot_help() {
        let class = |kind| Class { family: Family::Boot, kind, line: "No bootable device.".to_owned() };
        assert_eq!(FoundBy::Message.helps(&class(FailureKind::NoBootDevice)), Ok(()), "what is asked for is done");
        assert_eq!(FoundBy::Monitoring.helps(&class(FailureKind::Unknown)), Ok(()));
        let why = FoundBy::Monitoring.helps(&class(FailureKind::NoBootDevice)).unwrap_err();
        assert!(
            why.starts_with("no bootable device (No bootable device.): it would not help; look at its disks"),
            "{why}"
        );
    }
}
