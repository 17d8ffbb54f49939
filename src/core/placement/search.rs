//! The search for places: many VMs at once, as many as there is room for, the more important first.
//!
//! ```text
//!  construct ─► squeeze ─► all placed? ── yes ──────────────────────────────► improve ─► plan
//!      ▲           (who has no place: others make way)    │ no                   ▲
//!      └── the next way: tighter, rarest first, … ◄───────┤ no way left          │
//!                                                         └─► few VMs: branch and bound
//! ```
//!
//! *Construct* is best fit with look-ahead: first evenly, since that is how VMs should lie; if then somebody is left over, tightly. A VM
//! that must be with others goes where all of them fit. *Squeeze* is an ejection chain of at most two links (Glover, 1991). *Branch and
//! bound* looks for more VMs of a higher priority, whatever lower ones lose. *Improve* moves single VMs to better hosts.
//!
//! Nothing here looks at a clock: work is bounded by the number of pairs looked at, so that the same question has the same answer.

use std::collections::BTreeMap;

use super::WhyNot;
use super::board::{A, Badness, Board, R};
use super::site::{Ask, Site, Size};
use crate::types::rules::Priority;
use crate::types::{HostId, VmId};

/// Pairs of VM and host that one search looks at beyond its first look at all: some tens of milliseconds.
const STEPS: u64 = 60_000;
/// The same for branch and bound.
const BRANCHED: u64 = 30_000;
/// With more VMs there is no hope that branch and bound comes to an end.
const FEW: usize = 40;
/// How often all VMs are looked at for a better host.
const PASSES: usize = 3;

/// VMs placed, by priority.
type Score = [usize; Priority::ALL.len()];

/// How a host is chosen.
#[derive(Clone, Copy)]
enum Choose {
    /// The least bad.
    Even,
    /// The fullest, but rules that should hold come first.
    Tight,
    /// The fullest.
    Packed,
}

/// Who comes first within a priority.
#[derive(Clone, Copy)]
enum First {
    Large,
    Small,
    /// Whoever the fewest hosts can have.
    Rare,
}

const WAYS: [(Choose, First); 5] = [
    (Choose::Even, First::Large),
    (Choose::Tight, First::Rare),
    (Choose::Packed, First::Large),
    (Choose::Packed, First::Small),
    (Choose::Even, First::Small),
];

/// Where everybody is, and why.
pub struct Plan<'a> {
    board: Board<'a>,
}

/// Why a VM was not put on another host than its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Instead {
    /// It cannot be there.
    Cannot(WhyNot),
    /// More rules that should hold would be broken.
    Breaks { more: u32 },
    /// There are more VMs of the same lost host.
    Crowded { more: u32 },
    /// It would be fuller, by so many millionths; or as full.
    Fuller { by: u64 },
}

impl std::fmt::Display for Instead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cannot(why) => why.fmt(f),
            Self::Breaks { more } => write!(f, "{more} more rules that should hold would be broken"),
            Self::Crowded { more } => write!(f, "{more} more VMs of the same lost host are there"),
            Self::Fuller { by: 0 } => f.write_str("as good"),
            Self::Fuller { by } => write!(f, "would be fuller by {} %", by.div_ceil(10_000)),
        }
    }
}

/// Finds a place for as many VMs as possible: of the highest priority as many as there can be, then of the next, …; rules that must hold
/// hold. Bounded by `STEPS`.
#[must_use]
pub fn plan<'a>(site: &'a Site, asks: &'a [Ask]) -> Plan<'a> {
    let all_pairs = (site.rooms.len() * asks.len()) as u64;
    let mut board = Board::new(site, asks);
    let by_vm: BTreeMap<VmId, A> = asks.iter().enumerate().map(|(a, ask)| (ask.vm, a)).collect();
    let hopeful = hopeful(&board);
    let mut best: Option<(Score, Vec<Option<R>>)> = None;
    for (choose, first) in WAYS {
        board.clear();
        let order = order(&board, first);
        board.construct(&order, choose, &by_vm);
        board.steps.set(STEPS + all_pairs);
        board.squeeze_in(&order);
        let score = board.score();
        if best.as_ref().is_none_or(|(most, _)| *most < score) {
            best = Some((score, board.at.clone()));
        }
        if score == hopeful {
            break;
        }
    }
    let (score, at) = best.expect("there are ways");
    board.set(&at);
    if score != hopeful && asks.len() <= FEW {
        board.steps.set(BRANCHED);
        branch(&mut board, score);
    }
    let order = order(&board, First::Large);
    board.construct(&order, Choose::Even, &by_vm);
    board.improve(&order);
    board.construct(&order, Choose::Even, &by_vm); // Better places of some may have left room for others.
    Plan { board }
}

impl Plan<'_> {
    /// Where the n-th of those who asked is.
    #[must_use]
    pub fn host(&self, n: usize) -> Option<HostId> {
        self.board.at[n].map(|r| self.board.site.rooms[r].host)
    }

    /// Why the n-th, who has no place, is on none of the hosts.
    #[must_use]
    pub fn why_nowhere(&self, n: usize) -> Vec<(HostId, WhyNot)> {
        self.board.rooms().map(|r| (self.board.site.rooms[r].host, self.board.why_not(n, r))).collect()
    }

    /// Why the n-th, who has a place, is on none of the other hosts.
    #[must_use]
    pub fn why_there(&mut self, n: usize) -> Vec<(HostId, Instead)> {
        let Some(here) = self.board.at[n] else { return Vec::new() };
        self.board.take(n);
        let of = self.board.badness(n, here);
        let others = self.board.rooms().filter(|r| *r != here);
        let why = others.map(|r| (self.board.site.rooms[r].host, self.board.instead(n, r, of))).collect();
        self.board.put(n, here);
        why
    }

    /// How many rules that should hold are broken by those who asked.
    #[must_use]
    pub fn broken(&mut self) -> u32 {
        self.board.broken_in_all()
    }
}

/// What can be hoped for: VMs that one host at least could take, were it alone.
fn hopeful(board: &Board<'_>) -> Score {
    let mut score = Score::default();
    for a in 0..board.asks.len() {
        if board.rooms().any(|r| board.can(a, r)) {
            score[board.asks[a].priority as usize] += 1;
        }
    }
    score
}

/// All VMs, in the order in which they are placed.
fn order(board: &Board<'_>, first: First) -> Vec<A> {
    let all = board.site.rooms.iter().fold(Size::default(), |all, room| all.plus(room.total));
    let share = |a: A| board.asks[a].size.share_of(all);
    let hosts = |a: A| board.rooms().filter(|r| board.may(a, *r)).count() as u64;
    let key = |a: &A| {
        let of = match first {
            First::Large => (u64::MAX - share(*a), 0),
            First::Small => (share(*a), 0),
            First::Rare => (hosts(*a), u64::MAX - share(*a)),
        };
        (board.asks[*a].priority, of, board.asks[*a].vm)
    };
    let mut order: Vec<A> = (0..board.asks.len()).collect();
    order.sort_by_cached_key(key);
    order
}

impl Board<'_> {
    /// Nobody has a place.
    fn clear(&mut self) {
        self.set(&vec![None; self.asks.len()]);
    }

    /// Everybody is there.
    fn set(&mut self, at: &[Option<R>]) {
        for a in 0..self.asks.len() {
            if self.at[a].is_some() {
                self.take(a);
            }
        }
        for (a, r) in at.iter().enumerate() {
            if let Some(r) = r {
                self.put(a, *r);
            }
        }
    }

    fn score(&self) -> Score {
        let mut score = Score::default();
        let placed = (0..self.asks.len()).filter(|a| self.at[*a].is_some());
        placed.for_each(|a| score[self.asks[a].priority as usize] += 1);
        score
    }

    /// Each who has no place gets the best that is left.
    fn construct(&mut self, order: &[A], choose: Choose, by_vm: &BTreeMap<VmId, A>) {
        for a in order {
            if self.at[*a].is_some() {
                continue;
            }
            let bundle: Vec<A> = self.bundle(*a, by_vm).into_iter().filter(|b| self.at[*b].is_none()).collect();
            let all = bundle.iter().fold(Size::default(), |all, b| all.plus(self.asks[*b].size));
            let mut best: Option<((usize, bool, Badness), R)> = None;
            for r in self.rooms() {
                if !self.can(*a, r) {
                    continue;
                }
                // Those that must be with it find place there as well, if anywhere.
                let strange = bundle.iter().filter(|b| !self.may(**b, r)).count();
                let key = (strange, !all.fits(self.free[r]), self.wanted(*a, r, choose));
                if best.is_none_or(|(least, _)| key < least) {
                    best = Some((key, r));
                }
            }
            if let Some((_, r)) = best {
                self.put(*a, r);
            }
        }
    }

    fn wanted(&self, a: A, r: R, choose: Choose) -> Badness {
        let (broken, crowd, load) = self.badness(a, r);
        match choose {
            Choose::Even => (broken, crowd, load),
            Choose::Tight => (broken, 0, u64::MAX - load),
            Choose::Packed => (0, 0, u64::MAX - load),
        }
    }

    /// Who has no place gets one, if others who have asked can make way.
    fn squeeze_in(&mut self, order: &[A]) {
        for a in order {
            if self.at[*a].is_none() {
                self.squeeze(*a, 2, None);
            }
        }
    }

    /// Finds a place for one; true = it has one now, and so have all who had one before. False = nothing has changed.
    fn squeeze(&mut self, a: A, links: u32, not: Option<R>) -> bool {
        let rooms: Vec<R> = self.rooms().filter(|r| self.may(a, *r) && Some(*r) != not).collect();
        let tightest =
            rooms.iter().copied().filter(|r| self.can(a, *r)).min_by_key(|r| self.wanted(a, *r, Choose::Tight));
        if let Some(r) = tightest {
            self.put(a, r);
            return true;
        }
        if links == 0 {
            return false;
        }
        rooms.into_iter().any(|r| self.one_makes_way(a, r, links) || self.two_make_way(a, r))
    }

    fn one_makes_way(&mut self, a: A, r: R, links: u32) -> bool {
        for v in self.on[r].clone() {
            if self.steps.get() == 0 {
                return false;
            }
            self.take(v);
            if self.can(a, r) {
                self.put(a, r);
                if self.squeeze(v, links - 1, Some(r)) {
                    return true;
                }
                self.take(a);
            }
            self.put(v, r);
        }
        false
    }

    fn two_make_way(&mut self, a: A, r: R) -> bool {
        let here = self.on[r].clone();
        for (n, v) in here.iter().enumerate() {
            for w in &here[n + 1..] {
                if self.steps.get() == 0 {
                    return false;
                }
                self.take(*v);
                self.take(*w);
                if self.can(a, r) {
                    self.put(a, r);
                    if self.squeeze(*v, 0, Some(r)) {
                        if self.squeeze(*w, 0, Some(r)) {
                            return true;
                        }
                        self.take(*v);
                    }
                    self.take(a);
                }
                self.put(*v, r);
                self.put(*w, r);
            }
        }
        false
    }

    /// Single VMs go where it is better.
    fn improve(&mut self, order: &[A]) {
        for _ in 0..PASSES {
            let mut moved = false;
            for a in order {
                let Some(here) = self.at[*a] else { continue };
                self.take(*a);
                let now = self.badness(*a, here);
                let better = self.rooms().filter(|r| *r != here && self.may(*a, *r) && self.badness(*a, *r) < now);
                let better = better.filter(|r| self.can(*a, *r)).min_by_key(|r| self.badness(*a, *r));
                moved |= better.is_some();
                self.put(*a, better.unwrap_or(here));
            }
            if !moved {
                return;
            }
        }
    }

    fn instead(&self, a: A, r: R, here: Badness) -> Instead {
        if !self.may(a, r) || self.tied(a, r).is_some() || !self.asks[a].size.fits(self.free[r]) {
            return Instead::Cannot(self.why_not(a, r));
        }
        let (broken, crowd, load) = self.badness(a, r);
        if here.0 < broken {
            return Instead::Breaks { more: broken - here.0 };
        }
        if here.1 < crowd {
            return Instead::Crowded { more: crowd - here.1 };
        }
        Instead::Fuller { by: load.saturating_sub(here.2) }
    }

    fn broken_in_all(&mut self) -> u32 {
        let mut all = 0;
        for a in 0..self.asks.len() {
            if let Some(r) = self.at[a] {
                self.take(a);
                all += self.broken(a, r);
                self.put(a, r);
            }
        }
        all
    }
}

/// Looks for a better score than one that is known, until its steps are used up; the board has the best.
fn branch(board: &mut Board<'_>, score: Score) {
    let mut search = Branch { order: order(board, First::Large), best: score, at: board.at.clone() };
    board.clear();
    search.descend(board, 0);
    board.clear();
    board.set(&search.at);
}

struct Branch {
    order: Vec<A>,
    best: Score,
    at: Vec<Option<R>>,
}

impl Branch {
    fn descend(&mut self, board: &mut Board<'_>, depth: usize) {
        if board.steps.get() == 0 || self.hope(board, depth) <= self.best {
            return;
        }
        let Some(a) = self.order.get(depth).copied() else {
            self.best = board.score();
            self.at = board.at.clone();
            return;
        };
        let mut rooms: Vec<R> = board.rooms().filter(|r| board.can(a, *r)).collect();
        rooms.sort_by_cached_key(|r| board.wanted(a, *r, Choose::Packed));
        for r in rooms {
            board.put(a, r);
            self.descend(board, depth + 1);
            board.take(a);
        }
        self.descend(board, depth + 1);
    }

    /// More than this cannot come of it: of each priority the smallest that are left, as if all that is free lay on one host.
    fn hope(&self, board: &Board<'_>, depth: usize) -> Score {
        let mut score = board.score();
        let free = board.free.iter().fold(Size::default(), |all, free| all.plus(*free));
        let mut left = self.order[depth..].iter().copied().peekable();
        while let Some(first) = left.peek().copied() {
            let priority = board.asks[first].priority;
            let mut sizes: Vec<Size> = Vec::new();
            while let Some(a) = left.next_if(|a| board.asks[*a].priority == priority) {
                if board.rooms().any(|r| board.may(a, r) && board.asks[a].size.fits(board.free[r])) {
                    sizes.push(board.asks[a].size);
                }
            }
            score[priority as usize] += Size::most_that_fit(&sizes, free);
        }
        score
    }
}
