//! Reports that the host has not given its last answer to. Pure: it is told the time.
//!
//! ```text
//!   add ──► waiting ── send ──► sent ── answer ──► over
//!              ▲                  │ no answer for RESEND, or the other side is new
//!              └──────────────────┘
//! ```
//!
//! At most [`MAX_WAITING`] wait: then the oldest of the least severe goes, and is counted. At most [`MAX_RATE`] a second
//! are sent, so that the host's own limit is never met.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mainstay_guest::message::{Report, ReportId, Severity, Verdict};

/// More are not kept.
pub const MAX_WAITING: usize = 256;
/// Reports a second.
pub const MAX_RATE: u32 = 50;
/// Said again if there was no answer.
const RESEND: Duration = Duration::from_secs(10);
/// Said again if the last answer was "delayed".
const RESEND_DELAYED: Duration = Duration::from_secs(60);

struct Waiting {
    report: Report,
    /// When it is sent (again).
    due: Option<Instant>,
    delayed: bool,
}

/// See the module.
pub struct Queue {
    waiting: VecDeque<Waiting>,
    sequence: u64,
    dropped: u32,
    /// The present second and how many were sent in it.
    second: (Instant, u32),
    changes: u64,
}

impl Queue {
    /// With what an earlier program has left.
    pub fn new(now: Instant, kept: Vec<Report>) -> Self {
        let sequence = kept.iter().map(|report| report.sequence).max().unwrap_or(0);
        let waiting = kept.into_iter().map(|report| Waiting { report, due: None, delayed: false }).collect();
        Self { waiting, sequence, dropped: 0, second: (now, 0), changes: 0 }
    }

    /// The number of the next report.
    pub fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// One more. Names the report that had to go for it: perhaps this one.
    pub fn add(&mut self, report: Report) -> Option<Report> {
        self.changes += 1;
        self.waiting.push_back(Waiting { report, due: None, delayed: false });
        if self.waiting.len() <= MAX_WAITING {
            return None;
        }
        self.dropped = self.dropped.saturating_add(1);
        let least: Severity = self.waiting.iter().map(|waiting| waiting.report.severity).min()?;
        let at = self.waiting.iter().position(|waiting| waiting.report.severity == least)?;
        self.waiting.remove(at).map(|waiting| waiting.report)
    }

    /// The next to be sent now. The most severe first, of those the oldest.
    pub fn send(&mut self, now: Instant) -> Option<Report> {
        if Duration::from_secs(1) <= now - self.second.0 {
            self.second = (now, 0);
        }
        if MAX_RATE <= self.second.1 {
            return None;
        }
        let due = self.waiting.iter_mut().filter(|waiting| waiting.due.is_none_or(|due| due <= now));
        let next = due.max_by_key(|waiting| (waiting.report.severity, std::cmp::Reverse(waiting.report.sequence)))?;
        next.due = Some(now + if next.delayed { RESEND_DELAYED } else { RESEND });
        self.second.1 += 1;
        Some(next.report.clone())
    }

    /// The other side is new: it is told everything.
    pub fn unsent(&mut self) {
        self.waiting.iter_mut().for_each(|waiting| waiting.due = None);
    }

    /// An answer. Its number, if it was waited for.
    pub fn answered(&mut self, now: Instant, id: ReportId, verdict: Verdict) -> Option<u64> {
        let at = self.waiting.iter().position(|waiting| waiting.report.id == id)?;
        let sequence = self.waiting[at].report.sequence;
        if verdict.is_last() {
            self.waiting.remove(at);
            self.changes += 1;
        } else {
            self.waiting[at].delayed = true;
            self.waiting[at].due = Some(now + RESEND_DELAYED);
        }
        Some(sequence)
    }

    /// What waits.
    pub fn reports(&self) -> impl Iterator<Item = &Report> {
        self.waiting.iter().map(|waiting| &waiting.report)
    }

    /// How many were dropped.
    pub fn dropped(&self) -> u32 {
        self.dropped
    }

    /// Rises with every change of what waits.
    pub fn changes(&self) -> u64 {
        self.changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_guest::message::Wish;

    fn report(queue: &mut Queue, severity: Severity) -> Report {
        let sequence = queue.next_sequence();
        let mut id = [0; 16];
        id[..8].copy_from_slice(&sequence.to_le_bytes());
        let (kind, message) = ("app/x".to_owned(), "m".to_owned());
        Report { id: ReportId(id), sequence, boot: [0; 16], severity, kind, message, wish: Wish::None }
    }

    fn sent(queue: &mut Queue, now: Instant) -> Vec<u64> {
        std::iter::from_fn(|| queue.send(now)).map(|report| report.sequence).collect()
    }

    #[test]
    fn the_most_severe_is_said_first_and_all_until_they_are_answered() {
        let now = Instant::now();
        let mut queue = Queue::new(now, Vec::new());
        for severity in [Severity::Info, Severity::Critical, Severity::Warning, Severity::Critical] {
            let report = report(&mut queue, severity);
            assert_eq!(queue.add(report), None);
        }
        assert_eq!(sent(&mut queue, now), [2, 4, 3, 1]);
        let id = |queue: &Queue, n: u64| queue.reports().find(|report| report.sequence == n).map(|report| report.id);
        let (two, three) = (id(&queue, 2).unwrap(), id(&queue, 3).unwrap());
        assert_eq!(queue.answered(now, two, Verdict::Done), Some(2));
        assert_eq!(queue.answered(now, two, Verdict::Done), None, "said twice");
        assert_eq!(queue.answered(now, three, Verdict::Delayed), Some(3));
        assert_eq!(sent(&mut queue, now + Duration::from_secs(9)), [0; 0]);
        assert_eq!(sent(&mut queue, now + RESEND), [4, 1]);
        queue.unsent();
        assert_eq!(sent(&mut queue, now + RESEND), [4, 3, 1]);
        assert_eq!(queue.answered(now, three, Verdict::Denied), Some(3));
        assert_eq!(queue.reports().count(), 2);
    }

    #[test]
    fn the_least_severe_goes_first() {
        let now = Instant::now();
        let mut queue = Queue::new(now, Vec::new());
        for n in 0..MAX_WAITING {
            let severity = if n % 2 == 0 { Severity::Critical } else { Severity::Info };
            let report = report(&mut queue, severity);
            assert_eq!(queue.add(report), None);
        }
        let critical = report(&mut queue, Severity::Critical);
        assert_eq!(queue.add(critical).map(|gone| gone.sequence), Some(2));
        let info = report(&mut queue, Severity::Info);
        assert_eq!(queue.add(info).map(|gone| gone.sequence), Some(4));
        assert_eq!((queue.dropped(), queue.reports().count()), (2, MAX_WAITING));
    }

    #[test]
    fn the_rate_is_bounded() {
        let now = Instant::now();
        let mut queue = Queue::new(now, Vec::new());
        for _ in 0..120 {
            let report = report(&mut queue, Severity::Info);
            queue.add(report);
        }
        let at = |tenths: u64| now + Duration::from_millis(100 * tenths);
        assert_eq!(sent(&mut queue, at(0)).len(), 50);
        assert_eq!(sent(&mut queue, at(9)).len(), 0);
        assert_eq!(sent(&mut queue, at(10)).len(), 50);
        assert_eq!(sent(&mut queue, at(20)).len(), 20);
    }

    #[test]
    fn numbers_go_on_where_an_earlier_program_ended() {
        let now = Instant::now();
        let mut first = Queue::new(now, Vec::new());
        let kept = vec![report(&mut first, Severity::Info), report(&mut first, Severity::Info)];
        let mut queue = Queue::new(now, kept);
        assert_eq!(queue.next_sequence(), 3);
        assert_eq!(sent(&mut queue, now), [1, 2]);
    }
}
