//! The recorder: what the core was told and what it answered lately, so that a verdict can be replayed on another machine.
//!
//! ```text
//!   agent.rs ── step ──►  older segment      current segment
//!                         ┌────────┬───────┐ ┌────────┬───────▶
//!                         │the core│ steps │ │the core│ steps     each step: the time, the event, the answer
//!                         └────────┴───────┘ └────────┴───────▶
//!                                                 │ a verdict that matters, AFTER later
//!                                                 ▼
//!                                              sink: a `Recording` ──► thread "verdicts" ──► shelf ──► file
//! ```
//!
//! Rules in numbers: a segment begins with the whole core and ends after `SEGMENT`, or at `SEGMENT_BYTES` of steps; two are kept, so
//! that a recording reaches back for `SEGMENT` at least unless more than that many bytes came. It is handed out `AFTER` the first
//! verdict for which it is made; further ones until then are in it, too. Alarms of one kind make one in `ALARM_AGAIN`.
//!
//! Secrets of fence devices are not in it: each is replaced by a keyed fingerprint of the same length, so that equal ones stay equal.
//! Definitions of VMs are in it as libvirt shows them, also passwords of their graphics: files are for root.
//!
//! Deliberately not here: whether a verdict is right, and guests (their rules are not the core's).

pub mod file;
pub mod replay;
mod secrets;
pub mod shelf;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::secrets::Cover;
use crate::core::Core;
use crate::core::action::{Action, Output};
use crate::core::event::Event;
use crate::core::note::Level;
use crate::types::Time;

/// Length of a segment.
const SEGMENT: Duration = Duration::from_secs(60);
/// Steps of a segment in bytes.
const SEGMENT_BYTES: usize = 16 << 20;
/// How long a recording goes on after the first verdict in it.
const AFTER: Duration = Duration::from_secs(30);
/// An alarm of one kind makes one recording within this time.
const ALARM_AGAIN: Duration = Duration::from_secs(3600);

/// The core, and what it was told since.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The whole core.
    pub core: Vec<u8>,
    /// One after the other: time, event, and the answer as bytes.
    pub steps: Vec<u8>,
    /// How many.
    pub count: u64,
}

/// Segments that follow each other without a gap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recording {
    /// Id of the first verdict for which it was made; also the name of its file.
    pub id: String,
    /// The host.
    pub host: String,
    /// A time of the core, and the clock of day then in milliseconds since 1970: for people.
    pub clocks: (Time, u64),
    /// Oldest first.
    pub segments: Vec<Arc<Segment>>,
}

/// Takes recordings that are complete. Must not wait.
pub type Sink = Box<dyn FnMut(Recording) + Send>;

/// Records one core.
pub struct Recorder {
    host: String,
    cover: Cover,
    older: Option<Arc<Segment>>,
    current: Option<Segment>,
    /// Since when.
    since: Time,
    /// Id and end of the recording that is being made.
    making: Option<(String, Time)>,
    /// When an alarm of this kind last made one. As many as there are kinds.
    alarms: BTreeMap<String, Time>,
    unix_ms: fn() -> u64,
    sink: Sink,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recorder({})", self.host)
    }
}

impl Recorder {
    /// Of the core of a host. `unix_ms` tells the clock of day.
    #[must_use]
    pub fn new(host: &str, unix_ms: fn() -> u64, sink: Sink) -> Self {
        Self {
            host: host.to_owned(),
            cover: Cover::default(),
            older: None,
            current: None,
            since: Time::ZERO,
            making: None,
            alarms: BTreeMap::new(),
            unix_ms,
            sink,
        }
    }

    /// Before a step: begins another segment when it is time. Takes as long as it takes to write the core down.
    pub fn keep_up(&mut self, core: &mut Core, now: Time) {
        let full = self.current.as_ref().is_some_and(|segment| SEGMENT_BYTES <= segment.steps.len());
        match &self.making {
            Some((_, end)) if full || *end <= now => self.hand_out(core, now),
            None if full || SEGMENT <= now.since(self.since) => self.turn(core, now),
            Some(_) | None if self.current.is_none() => self.turn(core, now),
            Some(_) | None => {}
        }
    }

    /// Has the core take a step, and records it.
    pub fn step(&mut self, core: &mut Core, now: Time, event: Event) -> Output {
        let told = self.cover.event(&event).map_or_else(|| write(&(now, &event)), |covered| write(&(now, &covered)));
        let output = core.step(now, event);
        let answered = self.cover.output(&output).map_or_else(|| write(&output), |covered| write(&covered));
        match (&mut self.current, told, answered.and_then(|bytes| write(&bytes))) {
            (Some(segment), Ok(told), Ok(answered)) => {
                segment.steps.extend(told);
                segment.steps.extend(answered);
                segment.count += 1;
            }
            // A gap: what comes after it begins anew.
            (_, Err(_), _) | (_, _, Err(_)) | (None, _, _) => (self.current, self.older) = (None, None),
        }
        self.look(&output, now);
        output
    }

    /// Id of the recording that is being made, which has the verdicts that are given now.
    #[must_use]
    pub fn making(&self) -> Option<&str> {
        self.making.as_ref().map(|(id, _)| id.as_str())
    }

    /// Hands out what there is, if a recording is being made.
    pub fn hand_out(&mut self, core: &mut Core, now: Time) {
        let Some((id, _)) = self.making.take() else { return };
        let before = self.older.take();
        self.turn(core, now);
        let segments: Vec<_> = before.into_iter().chain(self.older.clone()).collect();
        let recording = Recording { id, host: self.host.clone(), clocks: (now, (self.unix_ms)()), segments };
        if !recording.segments.is_empty() {
            (self.sink)(recording);
        }
    }

    /// Begins another segment.
    fn turn(&mut self, core: &mut Core, now: Time) {
        let settings = self.cover.settings(core.settings());
        let core = core.shown(settings, write);
        self.older = self.current.take().map(Arc::new);
        self.current = core.ok().map(|core| Segment { core, ..Segment::default() });
        self.since = now;
    }

    /// Whether something was answered for which a recording is made.
    fn look(&mut self, output: &Output, now: Time) {
        for action in &output.actions {
            let id = match action {
                Action::Verdict(given) if given.kind.matters() => format!("{}-{}", self.host, given.id),
                Action::Note(note) if note.level == Level::Alarm && note.verdict.is_none() => {
                    let again = self.alarms.get(&*note.kind).is_some_and(|at| now.since(*at) < ALARM_AGAIN);
                    if again {
                        continue;
                    }
                    self.alarms.insert(note.kind.to_string(), now);
                    format!("{}-{}-{}", self.host, note.kind, (self.unix_ms)() / 1000)
                }
                _ => continue,
            };
            if self.making.is_none() {
                self.making = Some((id, now + AFTER));
            }
        }
    }
}

fn write<T: Serialize + ?Sized>(what: &T) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_stdvec(what)
}
