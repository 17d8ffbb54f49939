//! R7: the home of a VM moves from one datastore to the other by two claims; a moves it, b may take it.
//!
//! ```text
//!  home D1, lease on D1 ─► g+1 on D1 "moved to D2" ─► row of g+2: both leases ─► g+2 on D2 ─► home D2, lease on D2  (and back)
//!                              b: newest is "moved to D2", a silent on D1: g+2 on D2 ┘ only one can be created
//! ```
//!
//! As the code does it: the lease on D2 counts from the row of g+2 on, not before (nothing there names a yet), and a copy that
//! stands after its lapse on D1 is claimed on D2 by the lease there alone, as anybody else with that proof could.
//!
//! As in `claims`, a lapse on a datastore is a fact against every claim that a holds there.
//!
//! Deliberately not here: first claims, deleted VMs (a last claim like any other), storage that one of them cannot reach
//! (who cannot read both reads nothing: an error proves nothing).

use crate::explore::{Happens, Model, Step};
use crate::rules::{Rule, Rules};

pub struct Homes {
    pub rules: Rules,
    pub generations: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Kind {
    None,
    OfA,
    OfB,
    Moved,
}

/// The highest claim on one datastore.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Top {
    generation: u8,
    kind: Kind,
    over: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Try {
    None,
    Given { fresh: bool },
    Created { fresh: bool },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Copy {
    Runs,
    Stands,
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    tops: [Top; 2],
    up: bool,
    leases: [bool; 2],
    copy: Copy,
    /// Where a's newest known claim lies, its generation, and whether that says "moved".
    home: usize,
    known: u8,
    moved: bool,
    /// a is about to create a claim here, of this kind.
    attempt: Try,
    at: usize,
    makes: Kind,
    b_runs: bool,
}

type Steps = Vec<(Step, State)>;

impl Homes {
    fn keeps(&self, rule: Rule) -> bool {
        self.rules.keep(rule)
    }

    /// Whether the lapse on this datastore stops a's copy.
    fn enforces(&self, s: &State, d: usize) -> bool {
        let row = s.attempt != Try::None && s.at == d;
        if d == s.home {
            row || s.copy == Copy::Runs && (!s.moved || self.keeps(Rule::OldLease))
        } else {
            row && self.keeps(Rule::NewLease)
        }
    }

    fn begin(s: &mut State, at: usize, makes: Kind) {
        (s.attempt, s.at, s.makes) = (Try::Given { fresh: true }, at, makes);
    }

    fn owner(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("a", what), next));
        };
        if !s.up {
            return;
        }
        go("crashes", &|s| {
            s.tops.iter_mut().filter(|top| top.kind != Kind::OfB).for_each(|top| top.over = true);
            (s.up, s.leases, s.copy, s.attempt) = (false, [false; 2], Copy::Gone, Try::None);
        });
        for d in 0..2 {
            let (lapses, back) = [
                ("its lease on D1 lapses", "its lease on D1 is valid again"),
                ("its lease on D2 lapses", "its lease on D2 is valid again"),
            ][d];
            if !s.leases[d] {
                go(back, &|s| s.leases[d] = true);
                continue;
            }
            go(lapses, &|s| {
                s.leases[d] = false;
                s.tops[d].over |= s.tops[d].kind != Kind::OfB;
                if !self.enforces(s, d) {
                    return;
                }
                if let Try::Given { fresh } | Try::Created { fresh } = &mut s.attempt {
                    *fresh = false;
                }
                if s.copy == Copy::Runs {
                    s.copy = Copy::Stands;
                }
            });
        }
        let (home, other) = (s.home, 1 - s.home);
        let free = s.attempt == Try::None && s.known < self.generations;
        if free && s.copy == Copy::Runs && !s.moved && s.leases == [true; 2] {
            go("begins to move its home: a claim \"moved\" on the old one", &|s| Self::begin(s, home, Kind::Moved));
        }
        if free && s.copy != Copy::Gone && s.moved && s.leases[other] {
            go("begins to create the next claim on the new home", &|s| Self::begin(s, other, Kind::OfA));
        }
        if free && s.copy == Copy::Stands && !s.moved && s.leases[home] {
            go("its copy stands: the next claim for itself", &|s| Self::begin(s, home, Kind::OfA));
        }
        if let Try::Created { fresh } = s.attempt {
            go("knows of its claim", &|s| {
                let valid = s.leases[s.at];
                (s.known, s.home, s.moved) = (s.known + 1, s.at, s.makes == Kind::Moved);
                s.attempt = Try::None;
                if s.copy == Copy::Stands && fresh && valid && s.makes == Kind::OfA {
                    s.copy = Copy::Runs;
                }
            });
        }
    }

    fn storage(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("D", what), next));
        };
        let Try::Given { fresh } = s.attempt else { return };
        let next = s.known + 1;
        if s.tops[s.at].generation < next {
            go("a's claim is created", &|s| {
                // A lapse since it was begun is a proof against it, too.
                let over = !fresh || !s.leases[s.at];
                s.tops[s.at] = Top { generation: next, kind: s.makes, over };
                s.attempt = Try::Created { fresh };
            });
        } else {
            go("a's claim fails: a kills its copy", &|s| (s.attempt, s.copy) = (Try::None, Copy::Gone));
        }
    }

    fn taker(&self, s: &State, to: &mut Steps) {
        if s.b_runs {
            return;
        }
        for d in 0..2 {
            let (top, other) = (s.tops[d], s.tops[1 - d]);
            if !top.over || top.generation < other.generation || top.kind == Kind::None {
                continue;
            }
            let at = if top.kind == Kind::Moved && self.keeps(Rule::NextOnNew) { 1 - d } else { d };
            let mut next = *s;
            next.tops[at] = Top { generation: top.generation + 1, kind: Kind::OfB, over: false };
            next.b_runs = true;
            to.push((("b", ["TAKES: the next claim on D1", "TAKES: the next claim on D2"][at]), next));
        }
    }
}

impl Model for Homes {
    type State = State;

    fn start(&self) -> State {
        let none = Top { generation: 0, kind: Kind::None, over: false };
        State {
            tops: [Top { generation: 1, kind: Kind::OfA, over: false }, none],
            up: true,
            leases: [true; 2],
            copy: Copy::Runs,
            home: 0,
            known: 1,
            moved: false,
            attempt: Try::None,
            at: 0,
            makes: Kind::None,
            b_runs: false,
        }
    }

    fn steps(&self, from: &State, to: &mut Steps) {
        self.owner(from, to);
        self.storage(from, to);
        self.taker(from, to);
    }

    fn wrong(&self, s: &State) -> Option<&'static str> {
        (s.copy == Copy::Runs && s.b_runs).then_some("two copies run")
    }

    fn well(&self, s: &State) -> bool {
        s.copy == Copy::Runs || s.b_runs || self.generations <= s.known
    }

    fn happens(&self) -> Vec<Happens<State>> {
        vec![
            ("the home has moved", |s| s.home == 1 && !s.moved && s.copy == Copy::Runs),
            ("and back", |s| s.home == 0 && 3 < s.known && !s.moved && s.copy == Copy::Runs),
            ("b takes in the middle of a move", |s| s.b_runs && s.moved),
        ]
    }

    fn show(&self, s: &State) -> String {
        let top = |top: &Top| format!("{} {:?}{}", top.generation, top.kind, if top.over { " over" } else { "" });
        let b = if s.b_runs { " | b RUNS" } else { "" };
        format!("a {:?}, leases {:?} | D1 {} | D2 {}{b}", s.copy, s.leases, top(&s.tops[0]), top(&s.tops[1]))
    }
}
