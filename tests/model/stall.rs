//! R4: a stall of the storage itself makes nobody take anything. One owner a that lives and beats, one taker b.
//!
//! ```text
//!  a, b: a beat each tick ──► lands at once, or when the stall ends      b: read begun ─► shown ─► ended ─► window
//! ```
//!
//! Nothing else goes wrong here, so any taking is needless (promise 2). Whatever the storage has held back arrives within
//! the tick in which the stall ends, in any order, and before the next stall. (A storage that opens again and again just
//! long enough for b's beat and never for a's is not excluded by R4: then b takes, safely, an owner that has lapsed.)
//!
//! Deliberately not here: whether taking would be safe; it is, with or without R4 (`lease`).

use crate::explore::{Happens, Model, Step, TICK};
use crate::rules::{Rule, Rules};

pub struct Stall {
    pub rules: Rules,
    /// L in ticks.
    pub lease: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Beat {
    Due,
    /// Since it was begun.
    UnderWay(u8),
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Read {
    Idle,
    /// s − r, and whether b's own beats were at normal pace at s; then whether something of a had changed.
    Begun {
        span: u8,
        paced: bool,
    },
    Shown {
        span: u8,
        paced: bool,
        changed: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    stalled: bool,
    a: Beat,
    b: Beat,
    /// Since b's newest persisted beat was begun.
    last: u8,
    window: Option<u8>,
    moved: bool,
    read: Read,
    took: bool,
}

impl Stall {
    fn window(&self) -> u8 {
        self.lease + 2
    }

    fn tick(&self, s: &State) -> State {
        let older = |beat| match beat {
            Beat::UnderWay(age) => Beat::UnderWay((age + 1).min(self.lease)),
            Beat::Due | Beat::Done => Beat::Due,
        };
        State {
            a: older(s.a),
            b: older(s.b),
            last: (s.last + 1).min(self.lease),
            window: s.window.map(|age| (age + 1).min(self.window())),
            ..*s
        }
    }

    fn beats(&self, s: &State, to: &mut Vec<(Step, State)>) {
        match s.a {
            Beat::Due => to.push((("a", "begins a beat"), State { a: Beat::UnderWay(0), ..*s })),
            Beat::UnderWay(_) if !s.stalled => {
                to.push((("a", "its beat lands"), State { a: Beat::Done, moved: true, ..*s }))
            }
            Beat::UnderWay(_) | Beat::Done => {}
        }
        match s.b {
            Beat::Due => to.push((("b", "begins a beat"), State { b: Beat::UnderWay(0), ..*s })),
            Beat::UnderWay(age) if !s.stalled => {
                let gap = self.lease / 2 < s.last && self.rules.keep(Rule::Witness);
                let next = State { b: Beat::Done, last: age, ..*s };
                let next = if gap { State { window: None, ..next } } else { next };
                let what = if gap { "its beat lands after a gap: no window" } else { "its beat lands" };
                to.push((("b", what), next));
            }
            Beat::UnderWay(_) | Beat::Done => {}
        }
    }
}

impl Model for Stall {
    type State = State;

    fn start(&self) -> State {
        State {
            stalled: false,
            a: Beat::Due,
            b: Beat::Due,
            last: 0,
            window: None,
            moved: false,
            read: Read::Idle,
            took: false,
        }
    }

    fn steps(&self, s: &State, to: &mut Vec<(Step, State)>) {
        if s.stalled || s.a == Beat::Done && s.b == Beat::Done {
            to.push((TICK, self.tick(s)));
        }
        if s.stalled {
            to.push((("D", "stall ends"), State { stalled: false, ..*s }));
        } else if s.a == Beat::Done && s.b == Beat::Done {
            to.push((("D", "stalls for everybody"), State { stalled: true, ..*s }));
        }
        self.beats(s, to);
        match s.read {
            Read::Idle => {
                let paced = s.last <= self.lease / 2 || !self.rules.keep(Rule::Witness);
                let read = Read::Begun { span: s.window.unwrap_or(0), paced };
                to.push((("b", "begins a read"), State { read, ..*s }));
            }
            Read::Begun { span, paced } if !s.stalled => {
                let read = Read::Shown { span, paced, changed: s.moved };
                to.push((("b", "reads a's slots"), State { read, moved: false, ..*s }));
            }
            Read::Begun { .. } => {}
            Read::Shown { span, paced, changed } => {
                let opens = s.window.is_none() || changed;
                let took = !opens && paced && self.window() <= span;
                let window = if opens { Some(0) } else { s.window };
                let what = if took { "ends the read: TAKES" } else { "ends the read" };
                to.push((("b", what), State { read: Read::Idle, window, took, ..*s }));
            }
        }
    }

    fn wrong(&self, s: &State) -> Option<&'static str> {
        s.took.then_some("a VM is taken because the storage stalled")
    }

    fn well(&self, s: &State) -> bool {
        !s.stalled && s.window.is_some()
    }

    fn happens(&self) -> Vec<Happens<State>> {
        vec![
            ("b looks at a stalled storage for long", |s| s.stalled && s.last == 4 && s.window.is_some()),
            ("b begins a read after the stall", |s| !s.stalled && s.last == 4 && s.read != Read::Idle),
        ]
    }

    fn show(&self, s: &State) -> String {
        let window = s.window.map_or("-".to_owned(), |age| age.to_string());
        format!("{}b's last beat {} ago, window {window}", if s.stalled { "stalled, " } else { "" }, s.last)
    }
}
