//! What one peer asked lately, and what it was answered: asking twice gives the first answer.
//!
//! ```text
//! ticket ── new ──► pending (connections to tell) ── Answer::send ──► answered (frame kept)
//!             again: told, too                         again: the same frame
//! ```
//!
//! Bounded by number and bytes. Too many pending: the newest is refused. Answers kept: the oldest go first. A ticket
//! that comes with another question is refused, since its answer would be believed to be that of the first.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::MAX_WAITING;
use crate::types::{Digest, Ticket};

/// Answers kept per peer; the peer has at most as many questions open.
const MAX_KEPT: usize = MAX_WAITING;
/// Their frames, in bytes. A longer answer (a view, notes) is not kept: such questions change nothing.
const MAX_BYTES: usize = 1 << 20;
/// Connections that wait for one answer; a peer has one, and for a moment two.
const MAX_LINES: usize = 4;

/// Where frames for one connection go. If it is full the peer does not read; it will ask again.
pub(super) type Line = mpsc::Sender<Arc<[u8]>>;

/// One peer's questions.
#[derive(Default)]
pub(super) struct Answers(Mutex<Table>);

#[derive(Default)]
struct Table {
    slots: BTreeMap<Ticket, Slot>,
    /// Answered tickets, oldest first.
    kept: VecDeque<Ticket>,
    bytes: usize,
}

struct Slot {
    question: Digest,
    state: State,
}

enum State {
    Pending(Vec<Line>),
    Answered(Arc<[u8]>),
}

/// What to do with a question.
#[derive(Debug, PartialEq)]
pub(super) enum Asking {
    /// Work it out; `answer` will be called.
    New,
    /// It is being worked out; this connection will be told.
    Again,
    /// Send this.
    Answered(Arc<[u8]>),
    /// The ticket belongs to another question.
    Reused,
    /// Too many pending.
    Full,
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn ask(&self, ticket: Ticket, question: Digest, line: &Line) -> Asking {
        let mut table = self.lock();
        let pending = table.slots.len() - table.kept.len();
        match table.slots.get_mut(&ticket) {
            Some(slot) if slot.question != question => Asking::Reused,
            Some(Slot { state: State::Answered(frame), .. }) => Asking::Answered(Arc::clone(frame)),
            Some(Slot { state: State::Pending(lines), .. }) => {
                if !lines.iter().any(|known| known.same_channel(line)) {
                    lines.push(line.clone());
                }
                if MAX_LINES < lines.len() {
                    lines.remove(0);
                }
                Asking::Again
            }
            None if MAX_WAITING <= pending => Asking::Full,
            None => {
                table.slots.insert(ticket, Slot { question, state: State::Pending(vec![line.clone()]) });
                Asking::New
            }
        }
    }

    pub fn answer(&self, ticket: Ticket, frame: Arc<[u8]>) {
        let mut table = self.lock();
        let Some(slot) = table.slots.get_mut(&ticket) else { return };
        let State::Pending(lines) = &mut slot.state else { return };
        for line in std::mem::take(lines) {
            let _ = line.try_send(Arc::clone(&frame)); // Gone or full: the peer asks again.
        }
        if MAX_BYTES / 4 < frame.len() {
            table.slots.remove(&ticket);
            return;
        }
        table.bytes += frame.len();
        slot_answered(&mut table, ticket, frame);
        while MAX_KEPT < table.kept.len() || MAX_BYTES < table.bytes {
            let Some(oldest) = table.kept.pop_front() else { break };
            if let Some(Slot { state: State::Answered(frame), .. }) = table.slots.remove(&oldest) {
                table.bytes -= frame.len();
            }
        }
    }
}

fn slot_answered(table: &mut Table, ticket: Ticket, frame: Arc<[u8]>) {
    if let Some(slot) = table.slots.get_mut(&ticket) {
        slot.state = State::Answered(frame);
        table.kept.push_back(ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(len: usize) -> Arc<[u8]> {
        vec![7; len].into()
    }

    #[test]
    fn the_first_answer_stands() {
        let (line, mut told) = mpsc::channel(8);
        let (other, mut told_too) = mpsc::channel(8);
        let (answers, q) = (Answers::default(), Digest([1; 32]));
        assert_eq!(answers.ask(Ticket(1), q, &line), Asking::New);
        assert_eq!(answers.ask(Ticket(1), q, &line), Asking::Again);
        assert_eq!(answers.ask(Ticket(1), q, &other), Asking::Again);
        assert_eq!(answers.ask(Ticket(1), Digest([2; 32]), &line), Asking::Reused);
        answers.answer(Ticket(1), frame(3));
        answers.answer(Ticket(1), frame(4));
        assert_eq!(told.try_recv(), Ok(frame(3)));
        assert!(told.try_recv().is_err(), "one connection is told once");
        assert_eq!(told_too.try_recv(), Ok(frame(3)));
        assert_eq!(answers.ask(Ticket(1), q, &line), Asking::Answered(frame(3)));
    }

    #[test]
    fn everything_is_bounded() {
        let (line, _told) = mpsc::channel(1);
        let (answers, q) = (Answers::default(), Digest([1; 32]));
        for ticket in 0..MAX_WAITING as u64 {
            assert_eq!(answers.ask(Ticket(ticket), q, &line), Asking::New);
        }
        assert_eq!(answers.ask(Ticket(9999), q, &line), Asking::Full);
        for ticket in 0..MAX_WAITING as u64 {
            answers.answer(Ticket(ticket), frame(MAX_BYTES / 8));
        }
        assert_eq!(answers.lock().kept.len(), 8);
        assert_eq!(answers.lock().slots.len(), 8);
        assert_eq!(answers.lock().bytes, MAX_BYTES);
        assert_eq!(answers.ask(Ticket(1), q, &line), Asking::New, "forgotten long ago");
        answers.answer(Ticket(1), frame(MAX_BYTES));
        assert_eq!(answers.ask(Ticket(1), q, &line), Asking::New, "long answers are not kept");
    }
}
