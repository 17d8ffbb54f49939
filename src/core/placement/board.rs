//! VMs on hosts, as far as a search has come: what fits where, and how good it would be.
//!
//! All is by number here (the n-th VM that asks, the n-th host), since a search looks at each pair many times.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::WhyNot;
use super::site::{Affinity, Ask, Site, Size};
use crate::types::rules::{Force, Tie};
use crate::types::{HostId, VmId};

/// The n-th VM that asks.
pub(super) type A = usize;
/// The n-th host.
pub(super) type R = usize;

/// How bad a place is, most important part first: rules broken that should hold, VMs of the same lost host there, and the fullest
/// of what it has, in millionths.
pub(super) type Badness = (u32, u32, u64);

/// A rule between VMs.
struct Group<'a> {
    rule: &'a Affinity,
    /// How many of its VMs are on each host.
    on: Vec<u32>,
    /// How many are anywhere.
    all: u32,
}

/// See the module.
pub(super) struct Board<'a> {
    pub(super) site: &'a Site,
    pub(super) asks: &'a [Ask],
    /// Whether a host may have a VM at all.
    may: Vec<Vec<bool>>,
    shunned: Vec<Vec<bool>>,
    pub(super) free: Vec<Size>,
    pub(super) at: Vec<Option<R>>,
    /// Who is where, by host.
    pub(super) on: Vec<Vec<A>>,
    groups: Vec<Group<'a>>,
    /// The rules of each VM that asks.
    rules: Vec<Vec<usize>>,
    /// The lost host of each VM, by number; `usize::MAX` if there is none.
    lost: Vec<usize>,
    /// VMs of each lost host on each host.
    crowd: Vec<Vec<u32>>,
    /// Pairs that may still be looked at.
    pub(super) steps: Cell<u64>,
}

impl<'a> Board<'a> {
    /// Nobody who asks is placed.
    pub(super) fn new(site: &'a Site, asks: &'a [Ask]) -> Self {
        let number: BTreeMap<HostId, R> = site.rooms.iter().enumerate().map(|(r, room)| (room.host, r)).collect();
        let marked = |hosts: &mut dyn Iterator<Item = &HostId>, is: bool| {
            let mut row = vec![!is; site.rooms.len()];
            hosts.filter_map(|host| number.get(host)).for_each(|r| row[*r] = is);
            row
        };
        let mut losts: BTreeMap<HostId, usize> = BTreeMap::new();
        let lost = |ask: &Ask| {
            ask.from.map_or(usize::MAX, |host| {
                let next = losts.len();
                *losts.entry(host).or_insert(next)
            })
        };
        let lost: Vec<usize> = asks.iter().map(lost).collect();
        let mut of: BTreeMap<VmId, Vec<usize>> = BTreeMap::new();
        for (n, rule) in site.affinities.iter().enumerate() {
            rule.vms.iter().for_each(|vm| of.entry(*vm).or_default().push(n));
        }
        let mut groups: Vec<Group<'_>> =
            site.affinities.iter().map(|rule| Group { rule, on: vec![0; site.rooms.len()], all: 0 }).collect();
        for (r, room) in site.rooms.iter().enumerate() {
            for n in room.runs.iter().filter_map(|vm| of.get(vm)).flatten() {
                groups[*n].on[r] += 1;
                groups[*n].all += 1;
            }
        }
        Self {
            site,
            asks,
            may: asks.iter().map(|ask| marked(&mut ask.barred.keys(), false)).collect(),
            shunned: asks.iter().map(|ask| marked(&mut ask.shunned.iter(), true)).collect(),
            free: site.rooms.iter().map(|room| room.free).collect(),
            at: vec![None; asks.len()],
            on: vec![Vec::new(); site.rooms.len()],
            groups,
            rules: asks.iter().map(|ask| of.remove(&ask.vm).unwrap_or_default()).collect(),
            crowd: vec![vec![0; site.rooms.len()]; losts.len()],
            lost,
            steps: Cell::new(0),
        }
    }

    /// All hosts.
    pub(super) fn rooms(&self) -> std::ops::Range<R> {
        0..self.site.rooms.len()
    }

    /// Whether a host may have it, were there room.
    pub(super) fn may(&self, a: A, r: R) -> bool {
        self.may[a][r]
    }

    /// Whether it can be put there now.
    pub(super) fn can(&self, a: A, r: R) -> bool {
        self.steps.set(self.steps.get().saturating_sub(1));
        self.may[a][r] && self.asks[a].size.fits(self.free[r]) && self.tied(a, r).is_none()
    }

    /// The rule between VMs that keeps it from a host. It is not placed anywhere.
    pub(super) fn tied(&self, a: A, r: R) -> Option<&'a Affinity> {
        let groups = self.rules[a].iter().map(|n| &self.groups[*n]);
        groups.filter(|group| group.rule.force == Force::Must && group.breaks(r)).map(|group| group.rule).next()
    }

    /// How many of its rules that should hold would not.
    pub(super) fn broken(&self, a: A, r: R) -> u32 {
        let groups = self.rules[a].iter().map(|n| &self.groups[*n]);
        let ties = groups.filter(|group| group.rule.force == Force::Should && group.breaks(r)).count() as u32;
        ties + u32::from(self.shunned[a][r])
    }

    /// How bad a host would be for it.
    pub(super) fn badness(&self, a: A, r: R) -> Badness {
        let crowd = self.crowd.get(self.lost[a]).map_or(0, |row| row[r]);
        (self.broken(a, r), crowd, self.load(a, r))
    }

    /// The fullest part of a host with it, in millionths.
    fn load(&self, a: A, r: R) -> u64 {
        let room = &self.site.rooms[r];
        room.total.minus(self.free[r]).plus(self.asks[a].size).share_of(room.total)
    }

    /// Takes its place.
    pub(super) fn put(&mut self, a: A, r: R) {
        assert!(self.at[a].is_none(), "a VM has one place");
        self.at[a] = Some(r);
        self.on[r].push(a);
        self.free[r] = self.free[r].minus(self.asks[a].size);
        for n in &self.rules[a] {
            self.groups[*n].on[r] += 1;
            self.groups[*n].all += 1;
        }
        if let Some(row) = self.crowd.get_mut(self.lost[a]) {
            row[r] += 1;
        }
    }

    /// Gives its place up; which it was.
    pub(super) fn take(&mut self, a: A) -> R {
        let r = self.at[a].take().expect("only what is placed is taken away");
        self.on[r].retain(|other| *other != a);
        self.free[r] = self.free[r].plus(self.asks[a].size);
        for n in &self.rules[a] {
            self.groups[*n].on[r] -= 1;
            self.groups[*n].all -= 1;
        }
        if let Some(row) = self.crowd.get_mut(self.lost[a]) {
            row[r] -= 1;
        }
        r
    }

    /// Those that are tied to be with it, and itself.
    pub(super) fn bundle(&self, a: A, by_vm: &BTreeMap<VmId, A>) -> Vec<A> {
        let mut all = vec![a];
        let mut next = 0;
        while next < all.len() {
            for n in &self.rules[all[next]] {
                let rule = self.groups[*n].rule;
                if rule.tie == Tie::Together && rule.force == Force::Must {
                    let more = rule.vms.iter().filter_map(|vm| by_vm.get(vm).copied());
                    for other in more.collect::<Vec<_>>() {
                        if !all.contains(&other) {
                            all.push(other);
                        }
                    }
                }
            }
            next += 1;
        }
        all
    }

    /// Why a host does not have it, as things stand.
    pub(super) fn why_not(&self, a: A, r: R) -> WhyNot {
        let ask = &self.asks[a];
        if let Some(why) = ask.barred.get(&self.site.rooms[r].host) {
            return why.clone();
        }
        if let Some(rule) = self.tied(a, r) {
            let others = rule.vms.iter().copied().filter(|vm| *vm != ask.vm).collect();
            return match rule.tie {
                Tie::Together => WhyNot::NotTogether { with: others },
                Tie::Apart => WhyNot::NotApart { from: others },
            };
        }
        match ask.size.short_of(self.free[r]) {
            Some(WhyNot::NoMemory { short_mib }) => {
                WhyNot::NoMemory { short_mib: short_mib + self.site.rooms[r].owed_kib.div_ceil(1024) }
            }
            Some(why) => why,
            None => WhyNot::Kept,
        }
    }
}

impl Group<'_> {
    /// Whether one more of its VMs on a host would break the rule.
    fn breaks(&self, r: R) -> bool {
        match self.rule.tie {
            Tie::Together => 0 < self.all && self.on[r] == 0,
            Tie::Apart => 0 < self.on[r],
        }
    }
}
