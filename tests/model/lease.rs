//! R1, R2 and R3 with clocks: host a runs the VM and renews its lease, b reads and may take it, c attests for a.
//!
//! ```text
//!  a: t_c read ─► beat given ─► lands ─► answered: lease from t_c ──► ends at t_c + L ─► copy stopped within a tick
//!       └► network ─► c: attestation given ─► lands ─► answered ─► a is told
//!  b: claim read, read begun (s) ─► a's slots ─► c's attestations ─► read ended (r) … nothing changed: (v, g) is over
//!       └► claim g+1 and start            a again: claim g+1 and the copy goes on, if the epoch is unbroken
//! ```
//!
//! Time is relative: a beat *is* its age on a's clock, and ages from L on are equal, so runs are unbounded. What lies on the
//! disk is only "differs from what b saw last". Any operation may take for ever. With an unknown outcome, claims (and c's
//! beats, where that matters) may land at any later time; a's own beats then vanish, since a late one only disturbs b.
//! a's clock may stand still for `Bounds::slow` ticks. b takes in one step: only the moment in which g+1 appears matters.
//!
//! Deliberately not here: b's own lease (it is a's, mirrored: see `claims`), R4 (`stall`), said, rebooted and power off
//! (they are facts; `claims` uses them), the milliseconds in which a thawed host's guard and vCPUs wake together.

#[path = "lease_owner.rs"]
mod owner;
#[path = "lease_taker.rs"]
mod taker;

use crate::explore::{Happens, Model, Step, TICK};
use crate::rules::{Rule, Rules};

/// How late the last thread may stop, in ticks.
const STOPPING: u8 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// a's own path to the datastore works.
    Own,
    /// It is lost: beats go through c only.
    Attested,
    /// Both work.
    Both,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Roster {
    Fixed,
    /// a may be taken off it when its claims are over, and put on again.
    OwnerLeaves,
    /// c may be taken off it and put on again.
    AttestorLeaves,
}

#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// L in ticks.
    pub lease: u8,
    /// Claims that there can be.
    pub generations: u8,
    /// How often a's clock may stand still for a tick; rho allows the same number.
    pub slow: u8,
    pub way: Way,
    pub roster: Roster,
    /// a's host may freeze, its guard may die, writes may have an unknown outcome.
    pub trouble: bool,
}

pub struct Lease {
    pub rules: Rules,
    pub bounds: Bounds,
}

/// The age of a beat on a's clock: how long ago its t_c was read.
type Age = u8;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Copy {
    Runs,
    /// Stopped by the guard, some thread may still execute.
    Stopping,
    /// Stopped, and its (v, g) is over.
    Stands,
    /// Stopped because the guard died; over only if the next guard finds it so.
    Held,
    /// Killed.
    Gone,
}

/// A beat given to the disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Write {
    None,
    Given(Age),
    Landed(Age),
}

/// a's creation of the claim after the one that it knows. `fresh`: no lapse since it began.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Try {
    None,
    Given { fresh: bool },
    Created { fresh: bool },
}

/// An earlier creation of the same claim, with an unknown outcome.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Early {
    None,
    Flying { fresh: bool },
    Landed { fresh: bool },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Owner {
    /// Age of the newest beat known to be persisted; none: lapsed.
    lease: Option<Age>,
    write: Write,
    /// c's word that this beat is persisted, on its way.
    told: Option<Age>,
    copy: Copy,
    attempt: Try,
    early: Early,
    /// Newest claim that a knows.
    known: u8,
    frozen: bool,
    guard: bool,
}

/// A beat of c that only repeats what lies there, with an unknown outcome; kept only where the removed rule lets it do
/// harm. Whether that is still what lies there, and what b saw last.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Repeat {
    lies: bool,
    seen: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Attestor {
    /// A beat of a that it heard and that is on its way to the disk in a beat of its own.
    under_way: Option<Age>,
    repeat: Option<Repeat>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum At {
    Idle,
    Begun,
    Own,
    All,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Read {
    at: At,
    /// s − r of the window that it may close.
    span: u8,
    /// Newest claim known at s.
    known: u8,
    /// Since s; kept only where a removed rule uses it.
    age: u8,
    names_a: bool,
    names_c: bool,
    /// The roster is another than in the read before.
    anew: bool,
    /// a's slots, c's attestation of a: differ from what the window shows.
    own: bool,
    attested: bool,
}

const IDLE: Read = Read {
    at: At::Idle,
    span: 0,
    known: 0,
    age: 0,
    names_a: false,
    names_c: false,
    anew: false,
    own: false,
    attested: false,
};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Taker {
    read: Read,
    /// Since r.
    window: Option<u8>,
    /// What lies there differs from what was read last.
    own_moved: bool,
    attested_moved: bool,
    roster_moved: bool,
    known: u8,
    /// The generation that is proven over; 0: none.
    proof: u8,
    /// Under which it runs; 0: it does not.
    runs: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct State {
    claims: u8,
    names_a: bool,
    names_c: bool,
    /// A roster without a was given to the storage.
    removing: bool,
    slow: u8,
    a: Owner,
    b: Taker,
    c: Attestor,
}

impl Taker {
    /// Whether a change can matter to it; else all states of before its first look are one.
    fn looks(&self) -> bool {
        self.runs == 0 && (self.window.is_some() || self.read.at != At::Idle)
    }
}

type Steps = Vec<(Step, State)>;

impl Lease {
    fn keeps(&self, rule: Rule) -> bool {
        self.rules.keep(rule)
    }

    /// R3's window in ticks: (L + margin)(1 + rho).
    fn window(&self) -> u8 {
        let margin = if self.keeps(Rule::Margin) { STOPPING } else { 0 };
        let rho = if self.keeps(Rule::Rho) { self.bounds.slow } else { 0 };
        self.bounds.lease + margin + rho
    }

    fn ended(&self, a: &Owner) -> bool {
        a.lease.is_some_and(|age| self.bounds.lease <= age)
    }

    fn clock(&self, s: &mut State) {
        let limit = self.bounds.lease;
        let older = |age: &mut Age| *age = (*age + 1).min(limit);
        [&mut s.a.lease, &mut s.a.told, &mut s.c.under_way].into_iter().flatten().for_each(older);
        if let Write::Given(age) | Write::Landed(age) = &mut s.a.write {
            older(age);
        }
        if s.a.frozen || !s.a.guard {
            return;
        }
        if s.a.copy == Copy::Stopping {
            s.a.copy = Copy::Stands;
        }
        if self.ended(&s.a) {
            self.lapse(&mut s.a, Copy::Stopping);
        }
    }

    fn time(&self, s: &State, to: &mut Steps) {
        let mut next = *s;
        let limit = self.window();
        next.b.window = s.b.window.map(|age| (age + 1).min(limit));
        if s.b.read.at != At::Idle && !self.keeps(Rule::FromEnd) {
            next.b.read.age = (s.b.read.age + 1).min(limit);
        }
        if 0 < s.slow {
            let step = ("", "a tick passes, but not on a's clock");
            to.push((step, State { slow: s.slow - 1, ..next }));
        }
        self.clock(&mut next);
        to.push((TICK, next));
    }

    fn storage(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("D", what), next));
        };
        if let Write::Given(age) = s.a.write {
            go("a's beat lands", &|s| {
                s.a.write = Write::Landed(age);
                s.b.own_moved = s.b.looks();
            });
        }
        if let Some(age) = s.c.under_way {
            go("c's beat with it lands, c tells a", &|s| {
                s.c.under_way = None;
                s.b.attested_moved = s.b.looks();
                if let Some(repeat) = &mut s.c.repeat {
                    repeat.lies = false;
                }
                // c reads the roster after its write.
                if s.names_c || !self.keeps(Rule::WriterNamed) {
                    s.a.told = Some(age);
                }
            });
        }
        if let Some(repeat) = s.c.repeat {
            go("c's late beat lands over the newer one", &|s| {
                s.c.repeat = None;
                s.b.attested_moved = s.b.looks() && !repeat.seen;
            });
        }
        if let Try::Given { fresh } = s.a.attempt {
            let wins = s.claims == s.a.known || !self.keeps(Rule::Exclusive);
            let early = match s.a.early {
                Early::Landed { fresh: early } => Some(early || !self.keeps(Rule::EarlierTry)),
                Early::None | Early::Flying { .. } => None,
            };
            match early {
                Some(early) => go("a's claim is there already, from an earlier try", &|s| {
                    s.a.attempt = Try::Created { fresh: fresh && early };
                }),
                None if wins => go("a's claim is created", &|s| {
                    s.claims = s.claims.max(s.a.known + 1);
                    s.a.attempt = Try::Created { fresh };
                }),
                None => go("a's claim fails: b has that generation; a kills its copy", &|s| {
                    (s.a.attempt, s.a.copy) = (Try::None, Copy::Gone);
                }),
            }
        }
        if let Early::Flying { fresh } = s.a.early {
            if s.claims == s.a.known {
                go("a's late claim is created", &|s| {
                    s.claims += 1;
                    s.a.early = Early::Landed { fresh };
                });
            } else {
                go("a's late claim fails", &|s| s.a.early = Early::None);
            }
        }
        self.roster(s, to);
    }

    fn roster(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("D", what), next));
        };
        // Its claims are over, as far as anybody knows; the write may be slow.
        let over =
            matches!(s.a.copy, Copy::Stands | Copy::Gone) && s.a.attempt == Try::None && s.a.early == Early::None;
        match self.bounds.roster {
            Roster::Fixed => {}
            Roster::OwnerLeaves if !s.names_a => go("the roster names a again", &|s| {
                (s.names_a, s.b.roster_moved) = (true, true);
            }),
            Roster::OwnerLeaves if s.removing => go("the roster does not name a any more", &|s| {
                (s.names_a, s.removing, s.b.roster_moved) = (false, false, true);
            }),
            Roster::OwnerLeaves if over => go("a roster without a is given to the disk", &|s| s.removing = true),
            Roster::OwnerLeaves => {}
            Roster::AttestorLeaves => {
                let what = if s.names_c { "the roster does not name c any more" } else { "the roster names c again" };
                go(what, &|s| (s.names_c, s.b.roster_moved) = (!s.names_c, true));
            }
        }
    }

    fn attestor(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("c", what), next));
        };
        if self.bounds.trouble && s.c.under_way.is_some() {
            go("its beat with it has an unknown outcome", &|s| s.c.under_way = None);
        }
        if !self.keeps(Rule::AttestationStays) {
            // Its next beat says nothing of a; what nobody has seen is as if it had never been.
            go("guard restarts and forgets what it attested", &|s| {
                s.c.under_way = None;
                s.b.attested_moved = false;
            });
        }
        if !self.keeps(Rule::SlotRests) && s.c.repeat.is_none() {
            go("its beat without news has an unknown outcome", &|s| {
                s.c.repeat = Some(Repeat { lies: true, seen: !s.b.attested_moved });
            });
        }
    }
}

impl Model for Lease {
    type State = State;

    fn start(&self) -> State {
        State {
            claims: 1,
            names_a: true,
            names_c: true,
            removing: false,
            slow: self.bounds.slow,
            a: Owner {
                lease: Some(0),
                write: Write::None,
                told: None,
                copy: Copy::Runs,
                attempt: Try::None,
                early: Early::None,
                known: 1,
                frozen: false,
                guard: true,
            },
            b: Taker {
                read: IDLE,
                window: None,
                own_moved: false,
                attested_moved: false,
                roster_moved: false,
                known: 0,
                proof: 0,
                runs: 0,
            },
            c: Attestor { under_way: None, repeat: None },
        }
    }

    fn steps(&self, from: &State, to: &mut Steps) {
        self.time(from, to);
        self.owner(from, to);
        self.storage(from, to);
        if self.bounds.way != Way::Own {
            self.attestor(from, to);
        }
        self.taker(from, to);
    }

    fn wrong(&self, s: &State) -> Option<&'static str> {
        let executes = !s.a.frozen && matches!(s.a.copy, Copy::Runs | Copy::Stopping);
        (executes && s.b.runs != 0).then_some("two copies run")
    }

    fn well(&self, s: &State) -> bool {
        s.a.copy == Copy::Runs && !s.a.frozen || s.b.runs != 0 || self.bounds.generations <= s.a.known
    }

    fn happens(&self) -> Vec<Happens<State>> {
        let mut all: Vec<Happens<State>> = vec![
            ("b takes", |s| s.b.runs != 0),
            ("b takes while a's copy stands, a learns of it", |s| s.b.runs != 0 && s.a.copy == Copy::Gone),
            ("a goes on under a new claim", |s| s.a.copy == Copy::Runs && 1 < s.a.known),
            ("b has a proof that came too late", |s| s.b.proof != 0 && s.b.proof < s.claims),
            ("a's new claim is over when it is known", |s| s.a.attempt == Try::Created { fresh: false }),
        ];
        if self.bounds.trouble {
            all.push(("the guard carries on while b waits", |s| s.a.copy == Copy::Held && s.b.window.is_some()));
            all.push(("a late claim is created", |s| matches!(s.a.early, Early::Landed { .. })));
            all.push(("a frozen host is taken", |s| s.a.frozen && s.b.runs != 0));
        }
        all
    }

    fn show(&self, s: &State) -> String {
        let age = |age: Option<u8>| age.map_or("-".to_owned(), |age| age.to_string());
        let b = &s.b;
        format!(
            "a {:?}{} lease {} | claims {} | b knows {} window {}{}",
            s.a.copy,
            if s.a.frozen { " frozen" } else { "" },
            age(s.a.lease),
            s.claims,
            b.known,
            age(b.window),
            if b.proof == 0 { String::new() } else { format!(" PROOF of {}", b.proof) },
        )
    }
}
