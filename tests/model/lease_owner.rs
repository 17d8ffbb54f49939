//! The owner a of `lease`: its guard, its claims, what goes wrong with it.
//!
//! ```text
//!  Runs ── lapse ──► Stopping ──► Stands ── own claim in one epoch ──► Runs      (another's claim: Gone)
//!    └── guard dies ──► Held ── carries on in time ──► Runs, else Stands
//! ```

use super::{Age, Copy, Early, Lease, Owner, Rule, State, Steps, Try, Way, Write};

impl Lease {
    /// a's guard learns that the beat is persisted.
    pub(super) fn count(&self, s: &mut State, age: Age) {
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

    pub(super) fn lapse(&self, a: &mut Owner, stopped: Copy) {
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

    pub(super) fn owner(&self, s: &State, to: &mut Steps) {
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

    pub(super) fn owner_claims(&self, s: &State, to: &mut Steps) {
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

    pub(super) fn owner_troubles(&self, s: &State, to: &mut Steps) {
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

    pub(super) fn guard_starts(&self, s: &State, to: &mut Steps) {
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
}
