//! What a host can say to a guest: bytes on the port, through frames and messages, to what the agent makes of answers, orders and
//! greetings. A host is trusted more than a guest, but the port gives whatever the other side sends.
//!
//! ```text
//!   story: junk, right frames around any body, cut ones, time, reports of applications, answers to them
//!     └─► ear ─► answers ─► queue ─► reports that are sent (again)
//!   after each: nothing is kept beyond its bound, and after junk the next message is found
//! ```

use std::time::{Duration, Instant};

use mainstay_guest::frame::{HEADER, MAX_BROKEN, MAX_CHUNK, encode};
use mainstay_guest::message::{HostHello, MAX_TEXT, Report, ReportId, Severity, ToGuest, Verdict, Wish, one_line};
use mainstay_guest::{MAX_MESSAGE, MAX_PER_SECOND};

use crate::input::Input;
use ear::Ear;
use queue::{MAX_RATE, MAX_WAITING, Queue};

#[path = "../../guest-agent/src/agent/ear.rs"]
mod ear;
#[path = "../../guest-agent/src/agent/queue.rs"]
mod queue;

/// Plays one story.
pub fn play(data: &[u8]) {
    let mut guest = Guest::new();
    let mut story = Input(data);
    while guest.next(&mut story).is_some() {}
    guest.comes_back_into_step();
}

/// One agent, as far as it is pure.
struct Guest {
    now: Instant,
    ear: Ear,
    queue: Queue,
    /// Sent in this second.
    sent: (Instant, u32),
    added: u64,
}

impl Guest {
    fn new() -> Self {
        let now = Instant::now(); // Only differences count.
        Self { now, ear: Ear::default(), queue: Queue::new(now, Vec::new()), sent: (now, 0), added: 0 }
    }

    /// The next turn of the story.
    fn next(&mut self, story: &mut Input) -> Option<()> {
        match story.byte()? % 8 {
            0 => self.hears(story.piece()?),
            1 | 2 => self.hears(&story.sealed()?),
            3 => {
                let (frame, at) = (story.sealed()?, usize::from(story.word()?));
                self.hears(&frame[..at.min(frame.len())]);
            }
            4 => self.now += Duration::from_millis(100) * u32::from(story.word()?),
            5 => {
                let (times, how) = (story.byte()? % 64, story.byte()?); // Few, so that many stories are played.
                (0..times).for_each(|_| self.reports(how));
            }
            6 => self.answers(usize::from(story.byte()?), story.byte()?),
            _ => self.ear = Ear::default(), // The host was away.
        }
        self.sends();
        Some(())
    }

    fn hears(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(MAX_CHUNK) {
            let (said, _) = self.ear.hear(piece);
            said.into_iter().for_each(|message| self.heard(message));
        }
    }

    /// As the agent's loop does.
    fn heard(&mut self, message: ToGuest) {
        match message {
            ToGuest::Hello(hello) => {
                assert!(one_line(&hello.vm).len() <= MAX_TEXT, "a line of the log");
                self.queue.unsent();
            }
            ToGuest::Answer { id, verdict, .. } => {
                let waits = |queue: &Queue| queue.reports().any(|report| report.id == id);
                let waited = waits(&self.queue);
                assert_eq!(self.queue.answered(self.now, id, verdict).is_some(), waited);
                assert_eq!(waits(&self.queue), waited && !verdict.is_last(), "kept until its last answer");
            }
            ToGuest::Ask { .. } => {} // To a bounded channel, as it is.
        }
    }

    fn reports(&mut self, how: u8) {
        let sequence = self.queue.next_sequence();
        let mut id = [0; 16];
        id[..8].copy_from_slice(&sequence.to_le_bytes());
        let severity = [Severity::Info, Severity::Warning, Severity::Critical][usize::from(how) % 3];
        let (kind, message) = ("app/x".to_owned(), "m".to_owned());
        let report = Report { id: ReportId(id), sequence, boot: [0; 16], severity, kind, message, wish: Wish::None };
        self.added += 1;
        let least = self.queue.reports().map(|report| report.severity).min();
        let changes = self.queue.changes();
        let gone = self.queue.add(report);
        assert!(changes < self.queue.changes(), "it is kept on disk");
        if let Some(gone) = gone {
            assert_eq!(Some(gone.severity), least.map(|least| least.min(severity)), "the least severe goes");
        }
        assert!(self.queue.reports().count() <= MAX_WAITING);
    }

    /// One that waits is answered, with right bytes.
    fn answers(&mut self, which: usize, how: u8) {
        let waiting = self.queue.reports().count().max(1);
        let Some(id) = self.queue.reports().nth(which % waiting).map(|report| report.id) else { return };
        let verdict = [Verdict::Delayed, Verdict::Done, Verdict::Denied, Verdict::Accepted][usize::from(how) % 4];
        let answer = ToGuest::Answer { id, verdict, why: "w".repeat(usize::from(how)) };
        self.hears(&encode(&answer).expect("short"));
    }

    fn sends(&mut self) {
        if Duration::from_secs(1) <= self.now - self.sent.0 {
            self.sent = (self.now, 0);
        }
        while self.queue.send(self.now).is_some() {
            self.sent.1 += 1;
            assert!(self.sent.1 <= 2 * MAX_RATE && 2 * MAX_RATE <= MAX_PER_SECOND, "less than the host takes");
        }
        let gone = u64::from(self.queue.dropped());
        assert!(self.queue.reports().count() as u64 + gone <= self.added, "nothing comes from nowhere");
    }

    /// Whatever was said: once the host has said enough that is right, it is heard.
    fn comes_back_into_step(&mut self) {
        let hello = encode(&ToGuest::Hello(HostHello { protocol: 1, vm: "web".to_owned() })).expect("short");
        // Bodies that broke off may reach so far; each of them may be found only at its end.
        let most = (MAX_BROKEN as usize + 2) * (HEADER + MAX_MESSAGE) / hello.len();
        for _ in 0..most {
            if !self.ear.hear(&hello).0.is_empty() {
                return;
            }
        }
        panic!("the host is not heard any more");
    }
}
