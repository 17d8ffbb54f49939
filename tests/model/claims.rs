//! R2, R5 and late writes, with claims: three hosts, one VM, any of them may lapse, crash and boot at any moment.
//!
//! ```text
//!  claim over ─► guard's row ─► claim g+1 given ─► created ─► confirmed in the same epoch ─► debts fenced ─► libvirt ─► runs
//!                                   │ unknown: barred, may land later          lapse, crash, exit: over ◄──────────────┘
//! ```
//!
//! Clocks are not here: `lease` has shown that whoever has a proof of a lapse is right, and that every lapse can be
//! proven. So "(v, g) is over" is a fact, and anybody may use it at any time after.
//!
//! Deliberately not here: who is asked to start it (policy), migration (`moves`), homes (`homes`).

use crate::explore::{Happens, Model, Step};
use crate::rules::{Rule, Rules};

const HOSTS: usize = 3;
const NAMES: [&str; HOSTS] = ["a", "b", "c"];
const MOST: usize = 5;

pub struct Claims {
    pub rules: Rules,
    /// How many claims there can be; at most `MOST`.
    pub generations: u8,
    /// How many of the hosts take part.
    pub hosts: usize,
    /// Late writes, debts and fences.
    pub writes: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Claim {
    owner: u8,
    over: bool,
    /// Its guard says that it leaves nothing under way: it never started, or ended cleanly.
    clean: bool,
    /// Its copy has run, and ended while the host's path worked: what older copies of that host had under way has landed
    /// before, since one kernel keeps its order.
    ran: bool,
    /// Hosts whose late writes are not excluded, as bits.
    debts: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Try {
    None,
    Given {
        fresh: bool,
    },
    Created {
        fresh: bool,
    },
    /// The guard has confirmed it: it may be started.
    Confirmed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Copy {
    None,
    /// libvirt is starting it.
    Coming,
    Runs,
    /// Stopped by a lapse.
    Stands,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Host {
    up: bool,
    lease: bool,
    known: u8,
    /// Generation of its try or copy.
    at: u8,
    /// The guard's row for it stands.
    row: bool,
    attempt: Try,
    copy: Copy,
    /// A claim whose outcome is unknown, and may land; 0: none.
    late: u8,
    /// Its kernel holds writes of a copy that was stopped.
    writes: bool,
    fenced: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    count: u8,
    claims: [Claim; MOST],
    hosts: [Host; HOSTS],
    torn: bool,
}

type Steps = Vec<(Step, State)>;

impl State {
    fn newest(&self) -> &Claim {
        &self.claims[usize::from(self.count) - 1]
    }

    fn claim(&mut self, generation: u8) -> &mut Claim {
        &mut self.claims[usize::from(generation) - 1]
    }

    /// Everything that this host holds is over.
    fn end_all(&mut self, h: usize) {
        let count = usize::from(self.count);
        self.claims[..count]
            .iter_mut()
            .filter(|claim| usize::from(claim.owner) == h)
            .for_each(|claim| claim.over = true);
    }

    fn pay(&mut self, debtor: usize) {
        self.claims.iter_mut().for_each(|claim| claim.debts &= !(1 << debtor));
    }
}

impl Claims {
    fn keeps(&self, rule: Rule) -> bool {
        self.rules.keep(rule)
    }

    fn create(&self, s: &mut State, h: usize, generation: u8, over: bool) {
        let before = s.claims[usize::from(generation) - 2];
        let inherited = if self.keeps(Rule::DebtsCopied) { before.debts } else { 0 };
        let paid = before.ran || before.clean && !self.keeps(Rule::CopyPays);
        let debt = if paid { inherited & !(1 << before.owner) } else { inherited };
        let debt = if before.clean { debt } else { debt | 1 << before.owner };
        // Its own debt is no hindrance to its own copy, but it stays.
        let own = if self.keeps(Rule::OwnDebtStays) { 0 } else { 1 << h };
        let debts = if self.writes { debt & !own } else { 0 };
        // A claim that is over was never started, so its maker owes nothing new.
        *s.claim(generation) = Claim { owner: h as u8, over, clean: over && self.writes, ran: false, debts };
        s.count = s.count.max(generation);
    }

    fn lapse(&self, s: &mut State, h: usize) {
        s.end_all(h);
        let held = s.hosts[h].row;
        let host = &mut s.hosts[h];
        (host.lease, host.row) = (false, false);
        match &mut host.attempt {
            Try::Given { fresh } | Try::Created { fresh } => *fresh = false,
            Try::Confirmed => host.attempt = Try::None,
            Try::None => {}
        }
        // A QEMU without a row is only watched.
        if host.copy == Copy::Runs && held {
            (host.copy, host.writes) = (Copy::Stands, self.writes);
        }
    }

    fn faults(&self, s: &State, h: usize, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((NAMES[h], what), next));
        };
        let host = s.hosts[h];
        if !host.up {
            return go("boots", &|s| {
                s.pay(h);
                let host = &mut s.hosts[h];
                (host.up, host.writes, host.fenced) = (true, false, false);
            });
        }
        if host.lease {
            go("its lease lapses", &|s| self.lapse(s, h));
        } else {
            go("its lease is valid again", &|s| s.hosts[h].lease = true);
        }
        go("crashes", &|s| {
            s.end_all(h);
            let host = &mut s.hosts[h];
            if let (Try::Given { .. }, 0) = (host.attempt, host.late) {
                host.late = host.at;
            }
            host.writes |= self.writes && matches!(host.copy, Copy::Runs | Copy::Stands);
            (host.up, host.lease, host.row) = (false, false, false);
            (host.attempt, host.copy, host.at) = (Try::None, Copy::None, 0);
        });
        if host.copy == Copy::Runs && host.row && host.lease {
            go("its copy ends by itself, its path works", &|s| {
                *s.claim(host.at) = Claim { over: true, clean: self.writes, ran: self.writes, ..*s.claim(host.at) };
                let host = &mut s.hosts[h];
                (host.copy, host.row, host.at, host.writes) = (Copy::None, false, 0, false);
            });
        }
        if host.writes && !host.fenced {
            let other = |s: &State| (0..HOSTS).any(|o| o != h && s.hosts[o].up && s.hosts[o].copy == Copy::Runs);
            go("a late write of its old copy lands", &|s| (s.torn, s.hosts[h].writes) = (other(s), false));
        }
    }

    fn takes(&self, s: &State, h: usize, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((NAMES[h], what), next));
        };
        let host = s.hosts[h];
        if host.known != s.count {
            go("reads the newest claim", &|s| s.hosts[h].known = s.count);
        }
        let known = host.known;
        let over = 0 < known && s.claims[usize::from(known) - 1].over;
        let idle = host.attempt == Try::None && !host.fenced && host.lease;
        let begin = |s: &mut State| {
            let host = &mut s.hosts[h];
            (host.at, host.attempt) = (known + 1, Try::Given { fresh: true });
            host.row = self.keeps(Rule::RowFirst);
        };
        if idle && host.copy == Copy::None && over && known < self.generations {
            if self.keeps(Rule::ClaimToStart) {
                go("has a proof: a row, and the next claim for itself", &begin);
            } else {
                go("has a proof: starts it", &|s| {
                    let host = &mut s.hosts[h];
                    (host.at, host.row, host.copy) = (known, true, Copy::Coming);
                });
            }
            let debtor = usize::from(s.claims[usize::from(known) - 1].owner);
            if !self.keeps(Rule::FenceAfterClaim) && self.writes && debtor != h && !s.hosts[debtor].fenced {
                go("fences the owner before it has the next claim", &|s| {
                    (s.hosts[debtor].fenced, s.hosts[debtor].writes) = (true, false);
                });
            }
        }
        if idle && host.copy == Copy::Stands && known == s.count && known < self.generations {
            let mine = usize::from(s.newest().owner) == h;
            if mine {
                go("its copy stands: the next claim for itself", &begin);
            } else {
                go("reads that another has the next claim: kills its copy", &|s| {
                    (s.hosts[h].copy, s.hosts[h].at) = (Copy::None, 0);
                });
            }
        }
        if !self.keeps(Rule::OwnClaim) && s.count < self.generations && s.newest().over {
            let other = (h + 1) % self.hosts;
            go("has a proof: creates the next claim for its neighbour", &|s| self.create(s, other, s.count + 1, false));
        }
        // The first claim was a's own.
        let named = 1 < known && usize::from(s.newest().owner) == h && known == s.count;
        if !self.keeps(Rule::OwnClaim) && idle && host.copy == Copy::None && named && host.at < s.count {
            go("reads that the newest claim names it: goes on", &|s| {
                let host = &mut s.hosts[h];
                (host.at, host.row, host.attempt) = (s.count, true, Try::Confirmed);
            });
        }
        if !self.keeps(Rule::HookAsks) && host.copy == Copy::None && host.attempt == Try::None {
            go("a person starts it, nobody is asked", &|s| s.hosts[h].copy = Copy::Coming);
        }
    }

    fn claiming(&self, s: &State, h: usize, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((NAMES[h], what), next));
        };
        let host = s.hosts[h];
        if host.late != 0 {
            let created = s.count + 1 == host.late;
            let what = if created { "its late claim is created" } else { "its late claim fails" };
            go(what, &|s| {
                if created {
                    self.create(s, h, host.late, true);
                }
                s.hosts[h].late = 0;
            });
        }
        let stands = host.copy == Copy::Stands;
        match host.attempt {
            Try::Given { fresh } => {
                if s.count + 1 == host.at || !self.keeps(Rule::Exclusive) && host.at <= s.count {
                    go("its claim is created", &|s| {
                        // A lapse since then made it over before it was there.
                        self.create(s, h, host.at, false);
                        s.claim(host.at).over = !fresh;
                        s.hosts[h].attempt = Try::Created { fresh };
                    });
                } else {
                    go("its claim fails: the generation exists", &|s| {
                        let host = &mut s.hosts[h];
                        (host.attempt, host.row) = (Try::None, false);
                    });
                }
                if host.late == 0 && !stands {
                    go("its claim has an unknown outcome: it is barred", &|s| {
                        let host = &mut s.hosts[h];
                        (host.late, host.attempt, host.row) = (host.at, Try::None, false);
                    });
                }
            }
            Try::Created { fresh } => {
                let counts = host.lease && (fresh || !self.keeps(Rule::SameEpoch));
                let what = if counts { "knows of its claim" } else { "knows of its claim, but it is over" };
                go(what, &|s| {
                    s.claim(host.at).clean |= !counts && !stands && self.writes;
                    let host = &mut s.hosts[h];
                    host.known = host.known.max(host.at);
                    host.attempt = if counts && !stands { Try::Confirmed } else { Try::None };
                    host.row = counts && self.keeps(Rule::RowFirst);
                    if counts && stands {
                        (host.copy, host.writes) = (Copy::Runs, false);
                    }
                });
            }
            Try::None | Try::Confirmed => {}
        }
    }

    fn starts(&self, s: &State, h: usize, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push(((NAMES[h], what), next));
        };
        let host = s.hosts[h];
        if host.attempt == Try::Confirmed {
            let debts = s.claims[usize::from(host.at) - 1].debts;
            let owes = |d: &usize| *d != h && debts & (1 << d) != 0 && !s.hosts[*d].fenced;
            let open = (0..self.hosts).find(owes);
            match open {
                Some(debtor) if self.keeps(Rule::FenceFirst) => go("fences a debtor", &|s| {
                    (s.hosts[debtor].fenced, s.hosts[debtor].writes) = (true, false);
                }),
                Some(_) | None => go("tells libvirt to start it", &|s| {
                    (s.hosts[h].copy, s.hosts[h].attempt) = (Copy::Coming, Try::None);
                }),
            }
            go("gives up: nobody runs it, never started", &|s| {
                *s.claim(host.at) = Claim { over: true, clean: self.writes, ..*s.claim(host.at) };
                (s.hosts[h].attempt, s.hosts[h].row) = (Try::None, false);
            });
        }
        if host.copy == Copy::Coming {
            let unasked = !self.keeps(Rule::RowFirst) || !self.keeps(Rule::HookAsks);
            if host.row || unasked {
                go("its QEMU appears and runs", &|s| s.hosts[h].copy = Copy::Runs);
            } else {
                go("its QEMU appears without a right: it is killed", &|s| s.hosts[h].copy = Copy::None);
            }
        }
    }
}

impl Model for Claims {
    type State = State;

    fn start(&self) -> State {
        let idle = Host {
            up: true,
            lease: true,
            known: 0,
            at: 0,
            row: false,
            attempt: Try::None,
            copy: Copy::None,
            late: 0,
            writes: false,
            fenced: false,
        };
        let mut s = State { count: 1, claims: [Claim::default(); MOST], hosts: [idle; HOSTS], torn: false };
        s.hosts[0] = Host { known: 1, at: 1, row: true, copy: Copy::Runs, ..idle };
        s
    }

    fn steps(&self, from: &State, to: &mut Steps) {
        for h in 0..self.hosts {
            self.faults(from, h, to);
            if from.hosts[h].up {
                self.takes(from, h, to);
                self.starts(from, h, to);
            }
            if from.hosts[h].up || from.hosts[h].late != 0 {
                self.claiming(from, h, to);
            }
        }
    }

    fn wrong(&self, s: &State) -> Option<&'static str> {
        let runs = |host: &Host| host.up && host.copy == Copy::Runs;
        if 1 < s.hosts.iter().filter(|host| runs(host)).count() {
            return Some("two copies run");
        }
        if s.torn {
            return Some("a late write of an old copy lands under a new one");
        }
        s.hosts.iter().any(|host| runs(host) && host.fenced).then_some("a fence hit a running copy")
    }

    fn well(&self, s: &State) -> bool {
        s.hosts.iter().any(|host| host.copy == Copy::Runs) || self.generations <= s.count
    }

    fn happens(&self) -> Vec<Happens<State>> {
        let mut all: Vec<Happens<State>> = vec![
            ("another takes it", |s| s.hosts[1].copy == Copy::Runs),
            ("a goes on under a new claim", |s| s.hosts[0].copy == Copy::Runs && 1 < s.hosts[0].at),
            ("a late claim is created", |s| 1 < s.count && s.newest().over && s.hosts[1].late == 0),
            ("libvirt's start comes after a lapse", |s| s.hosts[1].copy == Copy::Coming && !s.hosts[1].row),
        ];
        if self.writes {
            all.push(("a debt is written", |s| s.newest().debts != 0));
            all.push(("a runs under a claim with its own debt", |s| {
                s.hosts[0].copy == Copy::Runs && s.newest().debts & 1 != 0
            }));
            all.push(("a debtor is fenced, another runs", |s| s.hosts[0].fenced && s.hosts[1].copy == Copy::Runs));
        }
        all
    }

    fn show(&self, s: &State) -> String {
        let claims = s.claims[..usize::from(s.count)].iter().map(|claim| {
            let over = if claim.over { " over" } else { "" };
            format!("{}{over}", NAMES[usize::from(claim.owner)])
        });
        let copies = s.hosts[..self.hosts].iter().enumerate().map(|(h, host)| {
            let copy = match host.copy {
                _ if !host.up => "down",
                Copy::None => "-",
                Copy::Coming => "coming",
                Copy::Runs => "RUNS",
                Copy::Stands => "stands",
            };
            format!("{} {copy}{}", NAMES[h], if host.lease || !host.up { "" } else { " (lapsed)" })
        });
        format!("{} | claims {}", copies.collect::<Vec<_>>().join(", "), claims.collect::<Vec<_>>().join(", "))
    }
}
