//! What the cluster's rules mean for the VMs and hosts that there are.
//!
//! ```text
//!  patterns + names ─► by id: priority, who waits for whom, who is tied to whom, barred and shunned hosts
//!                  └─► problems: a name that nobody has, a ring, rules that contradict each other; told, and nobody else suffers
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::WhyNot;
use super::order::{Dependency, Order, Ring};
use super::site::Affinity;
use crate::types::guests::Glob;
use crate::types::rules::{DependencyRule, Force, Priority, Response, Tie, VmRules, Where};
use crate::types::{HostId, VmId};

/// A rule that cannot do what it was made for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Problem {
    /// No VM has such a name.
    NoVm { kind: &'static str, number: usize, name: String },
    /// No host has such a name.
    NoHost { kind: &'static str, number: usize, name: String },
    /// A dependency would close a ring: it does not count.
    Ring { number: usize, names: Vec<String> },
    /// These must be together and must be apart: they wait until one of the rules goes.
    Contradiction { names: [String; 2] },
    /// No host is left for a VM by its rules.
    NoHostLeft { name: String },
    /// It must not be on any host that it belongs to.
    NoWayBack { name: String },
    /// Only VMs of the lowest priority make room.
    NoRoomMaker { name: String },
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoVm { kind, number, name } => write!(f, "{kind} rule {number}: no VM is called {name}"),
            Self::NoHost { kind, number, name } => write!(f, "{kind} rule {number}: no host is called {name}"),
            Self::Ring { number, names } => {
                write!(f, "dependency rule {number} does not count: {} wait for each other", names.join(", "))
            }
            Self::Contradiction { names: [one, other] } => {
                write!(f, "{one} and {other} must be on one host, and must be on a host each")
            }
            Self::NoHostLeft { name } => write!(f, "by its placement rules no host may run {name}"),
            Self::NoWayBack { name } => {
                write!(
                    f,
                    "{name} belongs to hosts that must not run it, by its placement rules: it is never brought back"
                )
            }
            Self::NoRoomMaker { name } => {
                write!(f, "room: {name} is not of the priority lowest, so it makes no room")
            }
        }
    }
}

/// The hosts that a VM belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Belongs {
    /// Any of these.
    pub hosts: BTreeSet<HostId>,
    /// It is brought back to one that has been well for so long.
    pub after: Duration,
}

/// What may be done with a VM to make room for others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MakesRoom {
    /// It may be moved.
    pub moved: bool,
    /// It may be stopped.
    pub stopped: bool,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Meaning {
    priorities: BTreeMap<VmId, Priority>,
    responses: BTreeMap<VmId, Response>,
    /// Who waits for whom.
    pub order: Order,
    /// Who is tied to whom.
    pub affinities: Vec<Affinity>,
    barred: BTreeMap<VmId, BTreeMap<HostId, WhyNot>>,
    shunned: BTreeMap<VmId, BTreeSet<HostId>>,
    belongs: BTreeMap<VmId, Belongs>,
    makes_room: BTreeMap<VmId, MakesRoom>,
    /// Rules that cannot do what they were made for.
    pub problems: BTreeSet<Problem>,
}

impl Meaning {
    /// Of rules, for those who are there.
    #[must_use]
    pub fn of(rules: &VmRules, vms: &BTreeMap<VmId, String>, hosts: &BTreeMap<HostId, String>) -> Self {
        let mut meaning = Self::default();
        for (n, rule) in rules.priorities.iter().enumerate() {
            for vm in meaning.vms("priority", n, &rule.vms, vms) {
                meaning.priorities.entry(vm).or_insert(rule.priority);
            }
        }
        for (n, rule) in rules.isolations.iter().enumerate() {
            for vm in meaning.vms("isolation", n, &rule.vms, vms) {
                meaning.responses.entry(vm).or_insert(rule.response);
            }
        }
        for (n, rule) in rules.affinities.iter().enumerate() {
            let tied = meaning.vms("affinity", n, &rule.vms, vms);
            if 1 < tied.len() {
                meaning.affinities.push(Affinity { vms: tied, tie: rule.tie, force: rule.force });
            }
        }
        for (n, rule) in rules.dependencies.iter().enumerate() {
            meaning.wait(n, rule, vms);
        }
        meaning.place(rules, vms, hosts);
        meaning.belong(rules, vms, hosts);
        meaning.make_room(rules, vms);
        meaning.contradictions(vms);
        meaning
    }

    /// Of one VM.
    #[must_use]
    pub fn priority(&self, vm: VmId) -> Priority {
        self.priorities.get(&vm).copied().unwrap_or_default()
    }

    /// What its host does with it when it is isolated.
    #[must_use]
    pub fn response(&self, vm: VmId) -> Response {
        self.responses.get(&vm).copied().unwrap_or_default()
    }

    /// Hosts that must not have it.
    #[must_use]
    pub fn barred(&self, vm: VmId) -> BTreeMap<HostId, WhyNot> {
        self.barred.get(&vm).cloned().unwrap_or_default()
    }

    /// Hosts that should not have it.
    #[must_use]
    pub fn shunned(&self, vm: VmId) -> BTreeSet<HostId> {
        self.shunned.get(&vm).cloned().unwrap_or_default()
    }

    /// Hosts that VMs belong to.
    pub fn belongs(&self) -> impl Iterator<Item = (&VmId, &Belongs)> {
        self.belongs.iter()
    }

    /// Hosts that a VM belongs to.
    #[must_use]
    pub fn belongs_to(&self, vm: VmId) -> Option<&Belongs> {
        self.belongs.get(&vm)
    }

    /// VMs that make room for others.
    pub fn room_makers(&self) -> impl Iterator<Item = (VmId, MakesRoom)> {
        self.makes_room.iter().map(|(vm, makes)| (*vm, *makes))
    }

    fn vms(&mut self, kind: &'static str, n: usize, globs: &[Glob], vms: &BTreeMap<VmId, String>) -> BTreeSet<VmId> {
        let mut all = BTreeSet::new();
        for glob in globs {
            let fit: BTreeSet<VmId> = vms.iter().filter(|(_, name)| glob.fits(name)).map(|(vm, _)| *vm).collect();
            // A pattern may wait for its first VM; a name was meant.
            if fit.is_empty() && !glob.is_pattern() {
                self.problems.insert(Problem::NoVm { kind, number: n + 1, name: glob.to_string() });
            }
            all.extend(fit);
        }
        all
    }

    fn hosts(
        &mut self,
        kind: &'static str,
        n: usize,
        globs: &[Glob],
        hosts: &BTreeMap<HostId, String>,
    ) -> BTreeSet<HostId> {
        for glob in globs.iter().filter(|glob| !glob.is_pattern()) {
            if !hosts.values().any(|name| glob.fits(name)) {
                self.problems.insert(Problem::NoHost { kind, number: n + 1, name: glob.to_string() });
            }
        }
        let fits = |name: &String| globs.iter().any(|glob| glob.fits(name));
        hosts.iter().filter(|(_, name)| fits(name)).map(|(host, _)| *host).collect()
    }

    fn belong(&mut self, rules: &VmRules, vms: &BTreeMap<VmId, String>, hosts: &BTreeMap<HostId, String>) {
        for (n, rule) in rules.failbacks.iter().enumerate() {
            let named = self.hosts("failback", n, &rule.hosts, hosts);
            let after = Duration::from_secs(rule.after_s.into());
            for vm in self.vms("failback", n, &rule.vms, vms) {
                if !named.is_empty() && !self.belongs.contains_key(&vm) {
                    // A start goes there at once, if there is a place.
                    let others = hosts.keys().filter(|host| !named.contains(host));
                    self.shunned.entry(vm).or_default().extend(others);
                    self.belongs.insert(vm, Belongs { hosts: named.clone(), after });
                }
            }
        }
        for (vm, belongs) in &self.belongs {
            let barred = |host| self.barred.get(vm).is_some_and(|barred| barred.contains_key(host));
            if belongs.hosts.iter().all(barred) {
                self.problems.insert(Problem::NoWayBack { name: vms[vm].clone() });
            }
        }
    }

    fn make_room(&mut self, rules: &VmRules, vms: &BTreeMap<VmId, String>) {
        for (n, (globs, moved)) in [(&rules.room.moved, true), (&rules.room.stopped, false)].into_iter().enumerate() {
            for vm in self.vms("room", n, globs, vms) {
                if self.priority(vm) != Priority::Lowest {
                    // Of a pattern those are meant that are.
                    if globs.iter().any(|glob| !glob.is_pattern() && glob.fits(&vms[&vm])) {
                        self.problems.insert(Problem::NoRoomMaker { name: vms[&vm].clone() });
                    }
                    continue;
                }
                let makes = self.makes_room.entry(vm).or_default();
                makes.moved |= moved;
                makes.stopped |= !moved;
            }
        }
        // One that must be with others, or that others wait for, is never the one that goes.
        let tied = self.affinities.iter().filter(|rule| rule.force == Force::Must && rule.tie == Tie::Together);
        let tied: BTreeSet<VmId> = tied.flat_map(|rule| &rule.vms).copied().chain(self.order.awaited()).collect();
        self.makes_room.retain(|vm, _| !tied.contains(vm));
    }

    fn wait(&mut self, n: usize, rule: &DependencyRule, vms: &BTreeMap<VmId, String>) {
        let waiting = self.vms("dependency", n, &rule.vms, vms);
        let after = self.vms("dependency", n, &rule.after, vms);
        for vm in &waiting {
            for after in after.iter().filter(|after| *after != vm) {
                let dependency = Dependency {
                    vm: *vm,
                    after: *after,
                    ready: rule.ready,
                    delay: Duration::from_secs(rule.delay_s.into()),
                    within: Duration::from_secs(rule.within_s.into()),
                };
                if let Err(Ring(ring)) = self.order.add(dependency) {
                    let names = ring.iter().map(|vm| vms[vm].clone()).collect();
                    self.problems.insert(Problem::Ring { number: n + 1, names });
                }
            }
        }
    }

    fn place(&mut self, rules: &VmRules, vms: &BTreeMap<VmId, String>, hosts: &BTreeMap<HostId, String>) {
        for (n, rule) in rules.placements.iter().enumerate() {
            let named = self.hosts("placement", n, &rule.hosts, hosts);
            let against: BTreeSet<HostId> = match rule.place {
                Where::Not => named,
                Where::Only => hosts.keys().filter(|host| !named.contains(host)).copied().collect(),
            };
            for vm in self.vms("placement", n, &rule.vms, vms) {
                match rule.force {
                    Force::Must => {
                        let barred = self.barred.entry(vm).or_default();
                        barred.extend(against.iter().map(|host| (*host, WhyNot::Rule { number: n + 1 })));
                    }
                    Force::Should => self.shunned.entry(vm).or_default().extend(&against),
                }
            }
        }
        for (vm, barred) in &self.barred {
            if !hosts.is_empty() && barred.len() == hosts.len() {
                self.problems.insert(Problem::NoHostLeft { name: vms[vm].clone() });
            }
        }
    }

    fn contradictions(&mut self, vms: &BTreeMap<VmId, String>) {
        let must = |tie| self.affinities.iter().filter(move |rule| rule.force == Force::Must && rule.tie == tie);
        let mut found = BTreeSet::new();
        for together in must(Tie::Together) {
            for apart in must(Tie::Apart) {
                let mut both = together.vms.intersection(&apart.vms);
                if let (Some(one), Some(other)) = (both.next(), both.next()) {
                    found.insert(Problem::Contradiction { names: [vms[one].clone(), vms[other].clone()] });
                }
            }
        }
        self.problems.extend(found);
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn vms(names: &[&str]) -> BTreeMap<VmId, String> {
        names.iter().enumerate().map(|(n, name)| (VmId(Uuid::from_u128(n as u128)), (*name).to_owned())).collect()
    }

    fn hosts() -> BTreeMap<HostId, String> {
        (1..=3).map(|n| (HostId(Uuid::from_u128(n)), format!("h{n}"))).collect()
    }

    fn meaning(text: &str, names: &[&str]) -> Meaning {
        let rules: VmRules = toml::from_str(text).unwrap();
        rules.check().unwrap();
        Meaning::of(&rules, &vms(names), &hosts())
    }

    fn vm(n: u128) -> VmId {
        VmId(Uuid::from_u128(n))
    }

    #[test]
    fn the_first_priority_that_fits_counts() {
        let text =
            "[[priority]]\nvms = [\"db1\"]\npriority = \"highest\"\n[[priority]]\nvms = [\"db*\"]\npriority = \"low\"";
        let meaning = meaning(text, &["db1", "db2", "web"]);
        let priorities: Vec<Priority> = (0..3).map(|n| meaning.priority(vm(n))).collect();
        assert_eq!(priorities, [Priority::Highest, Priority::Low, Priority::Medium]);
    }

    #[test]
    fn rules_that_cannot_do_what_they_were_made_for_are_told() {
        for (text, expected) in [
            ("[[priority]]\nvms = [\"mial\"]\npriority = \"low\"", vec!["priority rule 1: no VM is called mial"]),
            ("[[priority]]\nvms = [\"mial*\"]\npriority = \"low\"", vec![]),
            (
                "[[placement]]\nvms = [\"web\"]\nhosts = [\"h9\"]\nplace = \"only\"\nforce = \"must\"",
                vec!["placement rule 1: no host is called h9", "by its placement rules no host may run web"],
            ),
            ("[[placement]]\nvms = [\"web\"]\nhosts = [\"h*\"]\nplace = \"not\"", vec![]),
            (
                "[[placement]]\nvms = [\"web\"]\nhosts = [\"h1\"]\nplace = \"not\"\nforce = \"must\"\n\
                 [[failback]]\nvms = [\"web\"]\nhosts = [\"h1\"]\n[[failback]]\nvms = [\"db\"]\nhosts = [\"h9\"]",
                vec![
                    "failback rule 2: no host is called h9",
                    "web belongs to hosts that must not run it, by its placement rules: it is never brought back",
                ],
            ),
            (
                "[[priority]]\nvms = [\"app\"]\npriority = \"lowest\"\n[room]\nstop = [\"web\", \"app\"]\nmove = [\"*\"]",
                vec!["room: web is not of the priority lowest, so it makes no room"],
            ),
            (
                "[[dependency]]\nvms = [\"web\"]\nafter = [\"app\"]\n[[dependency]]\nvms = [\"app\"]\nafter = [\"web\"]",
                vec!["dependency rule 2 does not count: web, app, web wait for each other"],
            ),
            (
                "[[affinity]]\nvms = [\"web\", \"app\"]\ntie = \"together\"\nforce = \"must\"\n\
                 [[affinity]]\nvms = [\"*\"]\ntie = \"apart\"\nforce = \"must\"",
                vec!["app and web must be on one host, and must be on a host each"],
            ),
        ] {
            let problems: Vec<String> =
                meaning(text, &["app", "db", "web"]).problems.iter().map(ToString::to_string).collect();
            assert_eq!(problems, expected, "{text}");
        }
    }

    #[test]
    fn one_waits_for_all_that_a_pattern_names_but_not_for_itself() {
        let meaning = meaning("[[dependency]]\nvms = [\"*\"]\nafter = [\"db*\"]", &["db1", "web"]);
        assert_eq!(meaning.order.waits_for(vm(1)).len(), 1);
        assert!(meaning.order.waits_for(vm(0)).is_empty());
        assert_eq!((meaning.order.depth(vm(0)), meaning.order.depth(vm(1))), (0, 1));
    }

    #[test]
    fn hosts_are_barred_by_what_must_and_shunned_by_what_should_be() {
        let text = "[[placement]]\nvms = [\"web\"]\nhosts = [\"h1\"]\nplace = \"not\"\nforce = \"must\"\n\
                    [[placement]]\nvms = [\"web\"]\nhosts = [\"h2\"]\nplace = \"only\"";
        let meaning = meaning(text, &["web"]);
        let host = |n| HostId(Uuid::from_u128(n));
        assert_eq!(meaning.barred(vm(0)).into_keys().collect::<Vec<_>>(), [host(1)]);
        assert_eq!(meaning.shunned(vm(0)).into_iter().collect::<Vec<_>>(), [host(1), host(3)]);
    }
}
