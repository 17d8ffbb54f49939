//! R1, R2 and R3 with clocks: host a runs the VM and renews its lease, b reads and may take it, c attests for a.
//!
//! ```text
//!  a: t_c read ─► beat given ─► lands ─► answered: lease from t_c ──► ends at t_c + L ─► copy stopped within a tick
//!       └► network ─► c: attestation given ─► lands ─► answered ─► a is told
//!  b: claim read, read begun (s) ─► a's slots ─► c's attestations ─► read ended (r) … nothing changed: (v, g) is over
//!       └► claim g+1 and start            a again: claim g+1 and the copy goes on, if the epoch is unbroken
//! ```
//!
//! Time is relative: a beat *is* its age on a's clock, and ages from L on are equal, so runs are unbounded. Any operation
//! may take for ever; a write whose outcome is unknown may land at any later time, and more than once. a's clock may stand
//! still for `Bounds::slow` ticks. b takes in one step, because only the moment in which g+1 appears matters.
//!
//! Deliberately not here: b's own lease (it is a's, mirrored: see `claims`), R4 (`stall`), said, rebooted and power off
//! (they are facts; `claims` uses them), the milliseconds in which a thawed host's guard and vCPUs wake together.

use crate::explore::{Model, Step, TICK};
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

    /// a's guard learns that the beat is persisted.
    fn count(&self, s: &mut State, age: Age) {
        match s.a.lease {
            Some(newest) => s.a.lease = Some(newest.min(age)),
            None if age < self.bounds.lease => {
                s.a.lease = Some(age);
                if !self.keeps(Rule::ClaimAgain) && s.a.copy == Copy::Stands {
                    s.a.copy = Copy::Runs;
                }
            }
            None => {}
        }
    }

    fn lapse(&self, a: &mut Owner, stopped: Copy) {
        a.lease = None;
        match &mut a.attempt {
            Try::Given { fresh } | Try::Created { fresh } => *fresh = false,
            Try::None => {}
        }
        match &mut a.early {
            Early::Flying { fresh } | Early::Landed { fresh } => *fresh = false,
            Early::None => {}
        }
        match a.copy {
            Copy::Runs if self.keeps(Rule::StopInTime) => a.copy = stopped,
            Copy::Held => a.copy = Copy::Stands,
            Copy::Runs | Copy::Stopping | Copy::Stands | Copy::Gone => {}
        }
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

    // ---- a ------------------------------------------------------------------------------------------------------

    fn owner(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("a", what), next));
        };
        if s.a.frozen {
            return go("host thaws; its guard looks at the time first", &|s| {
                s.a.frozen = false;
                if s.a.copy == Copy::Stopping {
                    s.a.copy = Copy::Stands;
                }
                if s.a.guard && self.ended(&s.a) {
                    self.lapse(&mut s.a, Copy::Stands);
                }
            });
        }
        if self.bounds.trouble {
            go("host freezes", &|s| s.a.frozen = true);
        }
        if !s.a.guard {
            return self.guard_starts(s, to);
        }
        if self.bounds.way != Way::Attested && s.a.write == Write::None && s.names_a {
            go("reads t_c and gives a beat to the disk", &|s| s.a.write = Write::Given(0));
        }
        if let Write::Landed(age) = s.a.write {
            let age = if self.keeps(Rule::TimeFirst) { age } else { 0 };
            go("knows that its beat is persisted", &|s| {
                s.a.write = Write::None;
                if s.names_a {
                    self.count(s, age);
                }
            });
        }
        if self.bounds.way != Way::Own {
            go("reads t_c and beats on the network, c hears it", &|s| {
                s.c.under_way = Some(0);
                if !self.keeps(Rule::AttestAfterWrite) {
                    s.a.told = Some(0);
                }
            });
        }
        if let Some(age) = s.a.told {
            go("hears that its beat is attested", &|s| {
                s.a.told = None;
                self.count(s, age);
            });
        }
        self.owner_claims(s, to);
        if self.bounds.trouble {
            self.owner_troubles(s, to);
        }
    }

    fn owner_claims(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut Owner)| {
            let mut next = *s;
            change(&mut next.a);
            to.push((("a", what), next));
        };
        let free = s.a.copy == Copy::Stands && s.a.attempt == Try::None;
        if free && s.a.lease.is_some() && s.a.known < self.bounds.generations {
            go("begins to create the next claim for itself", &|a| a.attempt = Try::Given { fresh: true });
        }
        match s.a.attempt {
            Try::None | Try::Given { .. } => {}
            Try::Created { fresh } => {
                let counts = (fresh || !self.keeps(Rule::SameEpoch)) && s.a.lease.is_some();
                let what = if counts { "has its claim: the copy goes on" } else { "has its claim, but it is over" };
                go(what, &|a| {
                    a.known += 1;
                    (a.attempt, a.early) = (Try::None, Early::None);
                    if counts && matches!(a.copy, Copy::Stands) {
                        a.copy = Copy::Runs;
                    }
                });
            }
        }
    }

    fn owner_troubles(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("a", what), next));
        };
        if let Write::Given(age) | Write::Landed(age) = s.a.write {
            // Where it lands later it only disturbs b, who may as well have begun later.
            go("its beat has an unknown outcome", &|s| {
                s.a.write = Write::None;
                if !self.keeps(Rule::KnownPersisted) {
                    self.count(s, age);
                }
            });
        }
        if let Try::Given { fresh } = s.a.attempt
            && s.a.early == Early::None
        {
            go("its claim has an unknown outcome", &|s| {
                (s.a.attempt, s.a.early) = (Try::None, Early::Flying { fresh });
            });
        }
        go("guard dies, its copy is stopped", &|s| {
            (s.a.guard, s.a.write) = (false, Write::None);
            match s.a.copy {
                Copy::Runs => s.a.copy = Copy::Held,
                Copy::Stopping => s.a.copy = Copy::Stands,
                Copy::Held | Copy::Stands | Copy::Gone => {}
            }
        });
    }

    fn guard_starts(&self, s: &State, to: &mut Steps) {
        let mut next = *s;
        next.a.guard = true;
        if !self.ended(&s.a) || !self.keeps(Rule::CarryOnInTime) {
            if next.a.copy == Copy::Held {
                next.a.copy = Copy::Runs;
            }
            to.push((("a", "guard carries on, the copy goes on"), next));
        }
        next = *s;
        next.a.guard = true;
        self.lapse(&mut next.a, Copy::Stands);
        to.push((("a", "guard begins anew: everything is over"), next));
    }

    // ---- storage ------------------------------------------------------------------------------------------------

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

    // ---- c ------------------------------------------------------------------------------------------------------

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

    // ---- b ------------------------------------------------------------------------------------------------------

    fn taker(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("b", what), next));
        };
        if s.b.runs != 0 {
            return;
        }
        if s.b.known != s.claims {
            go("reads the newest claim", &|s| s.b.known = s.claims);
        }
        if s.b.proof != 0 && s.b.proof == s.b.known && (s.claims == s.b.known || !self.keeps(Rule::Exclusive)) {
            go("TAKES: creates the next claim and starts the VM", &|s| {
                s.b.runs = s.b.known + 1;
                s.claims = s.claims.max(s.b.runs);
                s.b.read = IDLE;
                (s.b.window, s.b.proof) = (None, 0);
                (s.b.roster_moved, s.b.own_moved, s.b.attested_moved) = (false, false, false);
            });
        }
        match s.b.read.at {
            At::Idle => go("begins a read: roster", &|s| {
                let (span, known) = (s.b.window.unwrap_or(0), s.b.known);
                let (names_a, names_c, anew) = (s.names_a, s.names_c, s.b.roster_moved);
                s.b.read = Read { at: At::Begun, span, known, names_a, names_c, anew, ..IDLE };
                s.b.roster_moved = false;
            }),
            At::Begun if self.bounds.way != Way::Attested => {
                let c = self.bounds.way != Way::Own;
                go("reads a's slots", &|s| {
                    let own = s.b.own_moved && s.b.read.names_a;
                    s.b.read = Read { at: if c { At::Own } else { At::All }, own, ..s.b.read };
                    s.b.own_moved &= !s.b.read.names_a;
                });
                if !self.keeps(Rule::ErrorIsNotSilence) {
                    go("cannot read a's slots, takes it for silence", &|s| {
                        s.b.read.at = if c { At::Own } else { At::All };
                    });
                }
            }
            At::Begun | At::Own => {
                go("reads c's slots", &|s| {
                    let shown = s.b.attested_moved && s.b.read.names_c && self.keeps(Rule::Attestations);
                    s.b.read = Read { at: At::All, attested: shown, ..s.b.read };
                    s.b.attested_moved &= !s.b.read.names_c;
                    if let Some(repeat) = &mut s.c.repeat {
                        repeat.seen = repeat.lies;
                    }
                });
                if !self.keeps(Rule::Complete) {
                    go("leaves out c's slots", &|s| s.b.read.at = At::All);
                }
            }
            At::All => {}
        }
        if s.b.read.at != At::Idle && self.bounds.trouble {
            go("its read fails", &|s| {
                s.b.roster_moved |= s.b.read.anew;
                s.b.own_moved |= s.b.read.own;
                s.b.attested_moved |= s.b.read.attested;
                s.b.read = IDLE;
            });
        }
        if s.b.read.at == At::All {
            self.read_ends(s, to);
        }
    }

    fn read_ends(&self, s: &State, to: &mut Steps) {
        let mut next = *s;
        let (b, read) = (&mut next.b, s.b.read);
        b.read = IDLE;
        let missing = !read.names_a && self.keeps(Rule::OwnerNamed);
        let changed = read.own || read.attested || read.anew && self.keeps(Rule::RosterAnew);
        let span = if self.keeps(Rule::ToBegin) { read.span } else { b.window.unwrap_or(0) };
        let what = if missing {
            b.window = None;
            "ends the read: a is not in the roster"
        } else if b.window.is_none() || changed {
            b.window = Some(if self.keeps(Rule::FromEnd) { 0 } else { read.age });
            "ends the read: a window begins"
        } else if span < self.window() {
            "ends the read: nothing changed"
        } else {
            b.proof = if self.keeps(Rule::ClaimFirst) { read.known } else { b.known };
            "ends the read: silent for long enough"
        };
        to.push((("b", what), next));
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
