//! R6: our own moves and people's `virsh migrate`, from s to t, with anybody else as c. Any step may be the last of a host.
//!
//! ```text
//!  own:      t's row ─► memory to t, paused ─► switch ─► s exited ─► s's guard: over, handed to t ─► t claims g+1, resumes
//!  people's: t's row ─► s claims g+1 "handover" ─► memory ─► switch: t runs ─► t claims g+2
//!                                                    └ s resumed by libvirt: its guard stops it
//! ```
//!
//! As in `claims`, "over" is a fact that anybody may use at any time. Two things must never be: two running copies, and a
//! copy that goes on with memory older than its disks.
//!
//! Deliberately not here: the milliseconds between libvirt's resume of the source and its guard's stop; the limited time
//! for which others leave v to t (comfort, not safety).

use crate::explore::{Happens, Model, Step};
use crate::rules::{Rule, Rules};

const MOST: usize = 5;

pub struct Moves {
    pub rules: Rules,
    /// People's, else our own.
    pub foreign: bool,
    /// How many claims there can be; at most `MOST`.
    pub generations: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Holder {
    S,
    T,
    C,
    /// s may run until the switch, t after it.
    Handover,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Claim {
    holder: Holder,
    /// s's, t's part of it is over.
    over_s: bool,
    over_t: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Copy {
    None,
    /// The target's QEMU receives memory.
    Coming,
    /// Target: has all memory, paused. Source: libvirt has switched.
    Switched,
    Runs,
    /// Source: QEMU has ended because it was migrated.
    Exited,
    /// Stopped by the guard; what it had is over.
    Stands,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Try {
    None,
    Given { fresh: bool },
    Created { fresh: bool },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Host {
    up: bool,
    lease: bool,
    /// The guard's row for what runs or comes here.
    row: bool,
    copy: Copy,
    attempt: Try,
    /// The disks were written by another since this copy's memory was of one age with them.
    stale: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    count: u8,
    claims: [Claim; MOST],
    s: Host,
    t: Host,
    /// The move has begun, under the newest claim of then.
    moving: bool,
    /// s's guard said: over, handed to t.
    word: bool,
    /// t's copy has run since the switch.
    ran_there: bool,
    c_runs: bool,
}

type Steps = Vec<(Step, State)>;

impl State {
    fn newest(&self) -> Claim {
        self.claims[usize::from(self.count) - 1]
    }

    fn newest_mut(&mut self) -> &mut Claim {
        &mut self.claims[usize::from(self.count) - 1]
    }

    fn create(&mut self, holder: Holder, fresh: bool) {
        let over = |mine| mine && !fresh;
        let claim = Claim { holder, over_s: over(holder == Holder::S), over_t: over(holder == Holder::T) };
        self.claims[usize::from(self.count)] = claim;
        self.count += 1;
    }

    fn end_s(&mut self) {
        self.claims[..usize::from(self.count)].iter_mut().for_each(|claim| claim.over_s = true);
    }

    fn end_t(&mut self) {
        self.claims[..usize::from(self.count)].iter_mut().for_each(|claim| claim.over_t = true);
    }

    /// s writes to the disks.
    fn s_runs(&mut self) {
        self.s.copy = Copy::Runs;
        self.t.stale |= self.t.copy == Copy::Switched;
    }

    fn t_runs(&mut self) {
        (self.t.copy, self.ran_there) = (Copy::Runs, true);
        self.s.stale |= self.s.copy != Copy::None;
    }
}

impl Moves {
    fn keeps(&self, rule: Rule) -> bool {
        self.rules.keep(rule)
    }

    fn free(&self, s: &State) -> bool {
        s.count < self.generations
    }

    /// Whether the newest claim is over for everybody whom it lets run.
    fn over(&self, s: &State) -> bool {
        let Claim { holder, over_s, over_t } = s.newest();
        match holder {
            Holder::S => over_s,
            Holder::T => over_t,
            Holder::C => false,
            Holder::Handover if self.keeps(Rule::BothProofs) => over_s && over_t,
            Holder::Handover => over_s || over_t,
        }
    }

    fn lapse(host: &mut Host) {
        (host.lease, host.row) = (false, false);
        if let Try::Given { fresh } | Try::Created { fresh } = &mut host.attempt {
            *fresh = false;
        }
        host.copy = match host.copy {
            Copy::Runs | Copy::Switched | Copy::Stands => Copy::Stands,
            Copy::Exited => Copy::Exited,
            Copy::None | Copy::Coming => Copy::None,
        };
    }

    fn faults(&self, s: &State, to: &mut Steps) {
        let mut go = |who, what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((who, what), next));
        };
        let gone = Host { up: false, lease: false, row: false, copy: Copy::None, attempt: Try::None, stale: false };
        if s.s.up {
            go("s", "crashes", &|s| {
                s.end_s();
                s.s = gone;
            });
        }
        if s.t.up {
            go("t", "crashes", &|s| {
                s.end_t();
                s.t = gone;
            });
        }
        match s.s.lease {
            true => go("s", "its lease lapses", &|s| {
                s.end_s();
                Self::lapse(&mut s.s);
            }),
            false if s.s.up => go("s", "its lease is valid again", &|s| s.s.lease = true),
            false => {}
        }
        match s.t.lease {
            true => go("t", "its lease lapses", &|s| {
                s.end_t();
                // A paused copy of our own move is thrown away.
                let thrown = s.t.copy == Copy::Switched;
                Self::lapse(&mut s.t);
                if thrown && self.keeps(Rule::BarredTarget) {
                    (s.t.copy, s.t.stale) = (Copy::None, false);
                }
            }),
            false if s.t.up => go("t", "its lease is valid again", &|s| s.t.lease = true),
            false => {}
        }
        if self.over(s) && !s.c_runs {
            go("c", "TAKES: creates the next claim and starts the VM", &|s| {
                s.c_runs = true;
                if self.free(s) {
                    s.create(Holder::C, true);
                } else {
                    s.newest_mut().holder = Holder::C;
                }
            });
        }
    }

    /// What libvirt and QEMU do.
    fn migration(&self, s: &State, to: &mut Steps) {
        let mut go = |who, what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((who, what), next));
        };
        let both = s.s.up && s.t.up;
        let asked = if self.foreign && self.keeps(Rule::Handover) {
            s.newest().holder == Holder::Handover
        } else {
            s.newest().holder == Holder::S
        };
        let may_come = s.t.row || s.t.lease && !self.keeps(Rule::RowBeforeHandover);
        if both && s.s.copy == Copy::Runs && s.t.copy == Copy::None && asked && may_come {
            go("t", "its QEMU begins to receive", &|s| {
                s.moving = true;
                s.t.row = true;
                (s.t.copy, s.t.stale) = (Copy::Coming, false);
            });
        }
        if both && s.s.copy == Copy::Runs && s.t.copy == Copy::Coming {
            let runs = self.foreign || !self.keeps(Rule::TargetPaused);
            let what = if runs { "libvirt switches: t runs" } else { "libvirt switches: t has all memory, paused" };
            go("s", what, &|s| {
                (s.s.copy, s.t.copy) = (Copy::Switched, Copy::Switched);
                if runs {
                    s.t_runs();
                }
            });
            go("s", "the migration fails before the switch", &|s| (s.t.copy, s.moving) = (Copy::None, false));
        }
        if s.s.up && s.s.copy == Copy::Switched {
            if self.foreign && self.keeps(Rule::StopAfterSwitch) {
                go("s", "libvirt resumes the source: its guard stops it", &|s| s.s.copy = Copy::Stands);
            } else {
                go("s", "libvirt resumes the source", &|s| s.s_runs());
            }
            go("s", "its QEMU exits: migrated", &|s| s.s.copy = Copy::Exited);
        }
        if s.t.up && matches!(s.t.copy, Copy::Coming | Copy::Switched) && !s.word {
            go("t", "its copy is thrown away", &|s| (s.t.copy, s.t.row, s.t.stale) = (Copy::None, false, false));
        }
    }

    fn own_words(&self, s: &State, to: &mut Steps) {
        let mut go = |who, what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((who, what), next));
        };
        if self.foreign {
            return;
        }
        if s.s.copy == Copy::Runs && s.t.copy == Copy::None && s.t.up && s.t.lease && !s.t.row {
            go("t", "its guard has a row: incoming", &|s| s.t.row = true);
        }
        let mine = s.newest().holder == Holder::S && !s.newest().over_s;
        let exited = s.s.copy == Copy::Exited || s.s.copy == Copy::Switched && !self.keeps(Rule::ExitFirst);
        if s.s.up && exited && mine && s.s.row {
            go("s", "its guard says: over, handed to t", &|s| {
                (s.word, s.newest_mut().over_s) = (true, true);
            });
        }
        let t_ready = s.t.up && s.t.copy == Copy::Switched && s.t.attempt == Try::None;
        if t_ready && s.word && !self.keeps(Rule::ClaimToResume) {
            go("t", "has the word: resumes", &|s| s.t_runs());
        }
        let ground = s.word
            || !self.keeps(Rule::HandedOver)
            || !self.keeps(Rule::Discard) && s.newest().holder == Holder::S && s.newest().over_s;
        let row = s.t.row || !self.keeps(Rule::BarredTarget);
        let of_source = s.newest().holder == Holder::S;
        if t_ready && ground && row && s.t.lease && of_source && self.free(s) {
            go("t", "begins to create the next claim for itself", &|s| s.t.attempt = Try::Given { fresh: true });
        }
    }

    fn foreign_words(&self, s: &State, to: &mut Steps) {
        let mut go = |who, what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((who, what), next));
        };
        if !self.foreign {
            return;
        }
        let idle = s.s.copy == Copy::Runs && s.t.copy == Copy::None && s.newest().holder == Holder::S && s.s.row;
        let row_first = self.keeps(Rule::RowBeforeHandover);
        if idle && s.t.up && s.t.lease && !s.t.row && row_first {
            go("t", "its guard has a row: incoming under the handover", &|s| s.t.row = true);
        }
        if idle
            && s.s.attempt == Try::None
            && s.s.lease
            && self.free(s)
            && (s.t.row || !row_first)
            && self.keeps(Rule::Handover)
        {
            go("s", "creates the claim: handover s to t", &|s| s.create(Holder::Handover, true));
        }
        let handed = s.newest().holder == Holder::Handover;
        let none = s.t.attempt == Try::None && s.t.lease && self.free(s);
        if handed && none && s.t.copy == Copy::Runs && s.t.row {
            go("t", "runs: begins to create the next claim for itself", &|s| s.t.attempt = Try::Given { fresh: true });
        }
        let back = matches!(s.s.copy, Copy::Runs | Copy::Stands) && s.s.attempt == Try::None && s.s.lease && s.s.row;
        let memory = s.s.copy == Copy::Runs || !s.ran_there || !self.keeps(Rule::NeverRanThere);
        if handed && back && memory && s.newest().over_t && self.free(s) {
            go("s", "t's part is over: the next claim for itself", &|s| s.s.attempt = Try::Given { fresh: true });
        }
        if handed && s.t.up && s.t.copy == Copy::None && s.t.row {
            go("t", "its guard says: over, never ran here", &|s| {
                s.t.row = false;
                s.newest_mut().over_t = true;
            });
        }
    }

    fn claiming(&self, s: &State, to: &mut Steps) {
        let mut go = |who, what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((who, what), next));
        };
        // After a lapse: whose claim is the newest may claim again.
        let again = |host: &Host| host.copy == Copy::Stands && host.lease && !host.row && host.attempt == Try::None;
        if again(&s.s) && s.newest().holder == Holder::S && self.free(s) {
            go("s", "its copy stands: the next claim for itself", &|s| s.s.attempt = Try::Given { fresh: true });
        }
        if again(&s.t) && s.newest().holder == Holder::T && self.free(s) {
            go("t", "its copy stands: the next claim for itself", &|s| s.t.attempt = Try::Given { fresh: true });
        }
        let (begun, mine) = (s.s.attempt, matches!(s.newest().holder, Holder::S | Holder::Handover));
        if let Try::Given { fresh } = begun {
            if mine && self.free(s) {
                go("s", "its claim is created", &|s| {
                    s.create(Holder::S, fresh);
                    s.s.attempt = Try::Created { fresh };
                });
            } else {
                go("s", "its claim fails: kills its copy", &|s| (s.s.attempt, s.s.copy) = (Try::None, Copy::None));
            }
        }
        if let Try::Created { fresh } = begun {
            go("s", "knows of its claim", &|s| {
                s.s.attempt = Try::None;
                if fresh && s.s.lease {
                    s.s.row = true;
                    if s.s.copy == Copy::Stands {
                        s.s_runs();
                    }
                }
            });
        }
        if let Try::Given { fresh } = s.t.attempt {
            if s.newest().holder != Holder::C && self.free(s) {
                go("t", "its claim is created", &|s| {
                    s.create(Holder::T, fresh);
                    s.t.attempt = Try::Created { fresh };
                });
            } else {
                go("t", "its claim fails: kills its copy", &|s| (s.t.attempt, s.t.copy) = (Try::None, Copy::None));
            }
        }
        if let Try::Created { fresh } = s.t.attempt {
            go("t", "knows of its claim", &|s| {
                s.t.attempt = Try::None;
                if fresh && s.t.lease && matches!(s.t.copy, Copy::Switched | Copy::Stands) {
                    s.t.row = true;
                    s.t_runs();
                }
            });
        }
    }
}

impl Model for Moves {
    type State = State;

    fn start(&self) -> State {
        let idle = Host { up: true, lease: true, row: false, copy: Copy::None, attempt: Try::None, stale: false };
        let claim = Claim { holder: Holder::S, over_s: false, over_t: false };
        State {
            count: 1,
            claims: [claim; MOST],
            s: Host { row: true, copy: Copy::Runs, ..idle },
            t: idle,
            moving: false,
            word: false,
            ran_there: false,
            c_runs: false,
        }
    }

    fn steps(&self, from: &State, to: &mut Steps) {
        self.faults(from, to);
        self.migration(from, to);
        self.own_words(from, to);
        self.foreign_words(from, to);
        self.claiming(from, to);
    }

    fn wrong(&self, s: &State) -> Option<&'static str> {
        let running = [s.s.copy == Copy::Runs, s.t.copy == Copy::Runs, s.c_runs];
        if 1 < running.iter().filter(|runs| **runs).count() {
            return Some("two copies run");
        }
        let old = |host: &Host| host.copy == Copy::Runs && host.stale;
        (old(&s.s) || old(&s.t)).then_some("a copy goes on with memory older than its disks")
    }

    fn well(&self, s: &State) -> bool {
        s.c_runs || s.s.copy == Copy::Runs || s.t.copy == Copy::Runs || !self.free(s)
    }

    fn happens(&self) -> Vec<Happens<State>> {
        let mut all: Vec<Happens<State>> = vec![
            ("t runs under its own claim", |s| s.t.copy == Copy::Runs && s.newest().holder == Holder::T),
            ("another takes it", |s| s.c_runs),
            ("t's copy is thrown away", |s| s.s.copy == Copy::Switched && s.t.copy == Copy::None),
        ];
        if self.foreign {
            let back: Happens<State> = ("s goes on under its own claim after a failure", |s| {
                s.s.copy == Copy::Runs && s.newest().holder == Holder::S && 2 < s.count
            });
            all.extend([
                back,
                ("s is stopped after the switch", |s| s.s.copy == Copy::Stands && s.t.copy == Copy::Runs),
            ]);
        } else {
            all.push(("t's memory is older than the disks", |s| s.t.copy == Copy::Switched && s.t.stale));
        }
        all
    }

    fn show(&self, s: &State) -> String {
        let host = |host: &Host| match (host.up, host.lease) {
            (false, _) => "down".to_owned(),
            (true, true) => format!("{:?}", host.copy),
            (true, false) => format!("{:?} (lapsed)", host.copy),
        };
        let claims = s.claims[..usize::from(s.count)].iter().map(|claim| {
            let (s, t) = (if claim.over_s { " over at s" } else { "" }, if claim.over_t { " over at t" } else { "" });
            format!("{:?}{s}{t}", claim.holder)
        });
        let claims = claims.collect::<Vec<_>>().join(", ");
        format!("s {} | t {} | claims {claims}{}", host(&s.s), host(&s.t), if s.c_runs { " | c RUNS" } else { "" })
    }
}
