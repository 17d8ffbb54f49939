//! Replays a recording: the core as it was is told again what it was told then, and has to answer the same.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Recording, Segment, write};
use crate::core::Core;
use crate::core::action::Output;
use crate::core::event::Event;
use crate::types::Time;

/// Longest text of one thing in a difference.
const MAX_TEXT: usize = 400;

/// What came of a replay without a difference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Same {
    /// Events that the core was told.
    pub events: u64,
    /// From the first to the last.
    pub span: std::time::Duration,
}

/// Why a replay ended early.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Differs {
    /// The file has what this software cannot read.
    Unreadable { event: u64, why: String },
    /// The core of this software cannot be told that: it gave up.
    GaveUp { event: u64, told: String },
    /// It answered something else.
    Answer { event: u64, at: Time, told: String, recorded: String, now: String },
    /// All answers were the same, but the core is not as it was recorded at the begin of a later segment.
    State { event: u64 },
}

impl fmt::Display for Differs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { event, why } => write!(f, "event {event} cannot be read: {why}"),
            Self::GaveUp { event, told } => write!(f, "at event {event} the core gave up: {told}"),
            Self::Answer { event, told, recorded, now, .. } => {
                write!(
                    f,
                    "event {event} is answered differently\n  told:     {told}\n  recorded: {recorded}\n  now:      {now}"
                )
            }
            Self::State { event } => write!(f, "after event {event} the core is not as it was recorded"),
        }
    }
}

/// Replays all of it. `told` hears of each step: when, and what was answered.
///
/// # Errors
/// The first difference.
pub fn replay(recording: &Recording, mut told: impl FnMut(Time, &Output)) -> Result<Same, Differs> {
    let mut core: Option<Core> = None;
    let mut events = 0;
    let (mut first, mut last) = (None, Time::ZERO);
    for segment in &recording.segments {
        let mut this = match core.take() {
            None => read_core(segment, events)?,
            Some(mut before) => {
                let settings = before.settings().clone();
                if before.shown(settings, write).ok().as_ref() != Some(&segment.core) {
                    return Err(Differs::State { event: events });
                }
                before
            }
        };
        let mut rest: &[u8] = &segment.steps;
        for _ in 0..segment.count {
            events += 1;
            let (now, output) = step(&mut this, &mut rest, events)?;
            first.get_or_insert(now);
            last = now;
            told(now, &output);
        }
        core = Some(this);
    }
    Ok(Same { events, span: last.since(first.unwrap_or(last)) })
}

fn read_core(segment: &Segment, event: u64) -> Result<Core, Differs> {
    postcard::from_bytes(&segment.core)
        .map_err(|error| Differs::Unreadable { event, why: format!("the core before it: {error}") })
}

/// One step; moves on in `rest`.
fn step(core: &mut Core, rest: &mut &[u8], event: u64) -> Result<(Time, Output), Differs> {
    let unreadable = |error: postcard::Error| Differs::Unreadable { event, why: error.to_string() };
    let ((now, told), after): ((Time, Event), _) = postcard::take_from_bytes(rest).map_err(unreadable)?;
    let (recorded, after): (&[u8], _) = postcard::take_from_bytes(after).map_err(unreadable)?;
    *rest = after;
    let words = told.clone();
    let output = catch_unwind(AssertUnwindSafe(|| core.step(now, told)));
    let output = output.map_err(|_| Differs::GaveUp { event, told: short(&words) })?;
    let answered = write(&output).map_err(unreadable)?;
    if answered == recorded {
        return Ok((now, output));
    }
    let then: Output = postcard::from_bytes(recorded).map_err(unreadable)?;
    let (recorded, here) = first_difference(&then, &output);
    Err(Differs::Answer { event, at: now, told: short(&words), recorded, now: here })
}

fn first_difference(then: &Output, now: &Output) -> (String, String) {
    let words = |output: &Output| -> Vec<String> {
        let saved = output.save.as_ref().map(|settings| format!("save settings {}", settings.version));
        saved.into_iter().chain(output.actions.iter().map(|action| format!("{action:?}"))).collect()
    };
    let (then, now) = (words(then), words(now));
    let differs = |n: &usize| then.get(*n) != now.get(*n);
    let at = (0..then.len().max(now.len())).find(differs).unwrap_or(0);
    let word = |words: &[String]| words.get(at).map_or_else(|| "(nothing more)".to_owned(), |word| cut(word));
    (word(&then), word(&now))
}

fn short(event: &Event) -> String {
    cut(&format!("{event:?}"))
}

fn cut(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_TEXT);
    if end < text.len() { format!("{}…", &text[..end]) } else { text.to_owned() }
}
