//! Where VMs can run: hosts that are there, reach their storage, answer with libvirt, and may have them by the cluster's rules; and
//! have the room. The answer names for every other host why not.
//!
//! ```text
//!   one that moves ────────────► place ──┐
//!   those that must run again ─► restart ┴─► site + asks ─► search::plan ─► where, or for each host why not
//!                                            hosts, who is barred there and why
//! ```

mod board;
pub mod foresight;
mod free;
pub mod order;
pub mod rules;
pub mod search;
pub mod site;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Core;
use super::tries::Tries;
use crate::types::control::Takes;
use crate::types::needs::{Lack, Needs};
use crate::types::rules::VmRules;
use crate::types::{DatastoreId, HostId, Time, VmId, VmRecord};
use rules::Meaning;
use search::plan;
use site::{Ask, Size};

/// Why a host cannot take a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WhyNot {
    /// Not heard.
    Silent,
    /// Going down.
    Leaving,
    /// It hears nobody, and others are alive.
    Isolated,
    /// People work on it.
    Maintenance,
    /// No valid lease on a datastore that it needs.
    NoDatastore(String),
    /// libvirt does not answer there.
    NoLibvirt,
    /// Too little memory.
    NoMemory { short_mib: u64 },
    /// It came and went too often.
    Quarantine,
    /// It has not what the VM needs.
    Lacks(Lack),
    /// It has found something wrong with itself; `lately`: that has gone.
    Unwell { what: String, lately: bool },
    /// It has this network, and what connects it with others is lost.
    UplinkLost(String),
    /// Devices of that host are passed through to it.
    Bound { to: String },
    /// Too few large pages.
    NoHugepages { short_mib: u64 },
    /// More vCPUs than it may have.
    NoVcpus { short: u64 },
    /// Late writes of that host cannot be excluded: it alone may run it.
    Tied { to: String },
    /// Others come first, and need what is free there.
    Kept,
    /// A placement rule, by its number.
    Rule { number: usize },
    /// These must be on one host, and are on another.
    NotTogether { with: Vec<VmId> },
    /// One of these is there, and they must be on a host each.
    NotApart { from: Vec<VmId> },
    /// It failed there just now.
    Failed(String),
    /// None of the hosts that it belongs to.
    Strange,
    /// One of them, but not well for long enough.
    Unsteady,
}

impl std::fmt::Display for WhyNot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent => f.write_str("not heard"),
            Self::Leaving => f.write_str("is leaving"),
            Self::Isolated => f.write_str("is isolated"),
            Self::Maintenance => f.write_str("is in maintenance"),
            Self::NoDatastore(name) => write!(f, "has no lease on {name}"),
            Self::NoLibvirt => f.write_str("libvirt does not answer there"),
            Self::NoMemory { short_mib } => write!(f, "{short_mib} MiB of memory short"),
            Self::Quarantine => f.write_str("is quarantined: it came and went too often"),
            Self::Lacks(lack) => lack.fmt(f),
            Self::Unwell { what, lately: false } => write!(f, "is unwell: {what}"),
            Self::Unwell { what, lately: true } => write!(f, "was unwell lately: {what}"),
            Self::UplinkLost(name) => write!(f, "has lost the uplink of '{name}'"),
            Self::Bound { to } => write!(f, "devices of {to} are passed through to it"),
            Self::NoHugepages { short_mib } => write!(f, "{short_mib} MiB of large pages short"),
            Self::NoVcpus { short } => write!(f, "{short} vCPUs more than it may have"),
            Self::Tied { to } => write!(f, "late writes tie it to {to}"),
            Self::Kept => f.write_str("what is free there is kept for others"),
            Self::Rule { number } => write!(f, "placement rule {number} forbids it"),
            Self::NotTogether { .. } => f.write_str("others that it must be with are elsewhere"),
            Self::NotApart { .. } => f.write_str("another that it must not be with is there"),
            Self::Failed(why) => write!(f, "failed there: {why}"),
            Self::Strange => f.write_str("is none of the hosts that it belongs to"),
            Self::Unsteady => f.write_str("has not been well for long enough"),
        }
    }
}

/// Where, or why nowhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Placed {
    /// Here.
    On(HostId),
    /// No host, each with its reason.
    Nowhere(Vec<(HostId, WhyNot)>),
}

/// What a VM needs, as far as it is known before its record is read.
#[derive(Clone, Debug, Default)]
pub struct Need {
    /// Datastores that must be reached.
    pub datastores: Vec<DatastoreId>,
    /// What it takes of its host.
    pub takes: Takes,
}

impl Need {
    /// From a record.
    #[must_use]
    pub fn of(record: &VmRecord) -> Self {
        let mut datastores: Vec<_> = record.disks.iter().filter(|d| !d.optional).filter_map(|d| d.datastore).collect();
        datastores.push(record.home);
        datastores.sort_unstable();
        datastores.dedup();
        Self { datastores, takes: Takes::of(record) }
    }
}

/// Which hosts suit VMs of one need.
struct Fit {
    barred: Arc<BTreeMap<HostId, WhyNot>>,
    last_resort: BTreeSet<HostId>,
}

/// Who is barred where, for VMs of one failure: most need the same datastores.
pub(super) struct Bars<'a> {
    core: &'a Core,
    meaning: &'a Meaning,
    now: Time,
    hosts: BTreeMap<HostId, WhyNot>,
    /// Those who have nowhere else to run are better off there than nowhere.
    last_resort: BTreeSet<HostId>,
    by_need: BTreeMap<(Vec<DatastoreId>, Needs), Fit>,
    /// They run, and can stay.
    planned: bool,
    /// The usual large page has 1 GiB.
    usual_1g: bool,
}

impl<'a> Bars<'a> {
    /// For VMs that run, and can stay where they are.
    pub(super) fn of_planned(core: &'a Core, meaning: &'a Meaning, now: Time) -> Self {
        let members = core.settings.members.iter().map(|member| member.host);
        let hosts = members.filter_map(|host| core.away(host, now).map(|why| (host, why))).collect();
        let usual_1g = core.usual_pages_are_1g();
        let (last_resort, by_need) = (BTreeSet::new(), BTreeMap::new());
        Self { core, meaning, now, hosts, last_resort, by_need, planned: true, usual_1g }
    }

    /// For VMs that do not run, or would not. A host that is quarantined or unwell takes them when no other can.
    pub(super) fn of_lost(core: &'a Core, meaning: &'a Meaning, now: Time) -> Self {
        let mut bars = Self::of_planned(core, meaning, now);
        let is_last = |why: &WhyNot| matches!(why, WhyNot::Quarantine | WhyNot::Unwell { .. });
        bars.last_resort = bars.hosts.extract_if(.., |_, why| is_last(why)).map(|(host, _)| host).collect();
        bars.planned = false;
        bars
    }

    /// What one asks for; `tied`: the only host that may have it.
    pub(super) fn ask(&mut self, id: VmId, need: &Need, from: Option<HostId>, tied: Option<HostId>) -> Ask {
        let Fit { barred, last_resort } = self.of_need(need);
        let (mut barred, last_resort) = (Arc::clone(barred), last_resort.clone());
        let bound = self.core.bound(id, need);
        let tries = self.core.vms.get(&id).map(|vm| &vm.tries).filter(|tries| tries.barred().next().is_some());
        let by_rule = self.meaning.barred(id);
        if tries.is_some() || tied.is_some() || bound.is_some() || !by_rule.is_empty() {
            let mut own = by_rule;
            let failed = tries.into_iter().flat_map(Tries::barred);
            own.extend(failed.map(|(host, why)| (host, WhyNot::Failed(why.to_owned()))));
            let to_one = [
                bound.map(|to| (to, WhyNot::Bound { to: self.core.name_of(to) })),
                tied.map(|to| (to, WhyNot::Tied { to: self.core.name_of(to) })),
            ];
            for (to, why) in to_one.into_iter().flatten() {
                let others = self.core.settings.members.iter().map(|member| member.host).filter(|host| *host != to);
                own.extend(others.map(|host| (host, why.clone())));
            }
            own.extend(barred.iter().map(|(host, why)| (*host, why.clone()))); // What is not there has no other fault.
            barred = Arc::new(own);
        }
        let mut shunned = self.meaning.shunned(id);
        shunned.extend(&self.last_resort);
        shunned.extend(last_resort);
        Ask {
            vm: id,
            priority: self.meaning.priority(id),
            size: Size::of(&need.takes, self.usual_1g),
            from,
            barred,
            shunned: Arc::new(shunned),
        }
    }

    fn of_need(&mut self, need: &Need) -> &Fit {
        let Self { core, now, hosts, planned, .. } = self;
        self.by_need.entry((need.datastores.clone(), need.takes.needs.clone())).or_insert_with(|| {
            let (mut barred, mut last_resort) = (BTreeMap::new(), BTreeSet::new());
            for host in core.settings.members.iter().map(|member| member.host) {
                if let Some(why) = hosts.get(&host).cloned().or_else(|| core.lacks(host, need, *now)) {
                    barred.insert(host, why);
                } else if let Some(why) = core.uplink_lost(host, &need.takes.needs) {
                    if *planned {
                        barred.insert(host, why);
                    } else {
                        last_resort.insert(host); // Rather without network than not at all.
                    }
                }
            }
            Fit { barred: Arc::new(barred), last_resort }
        })
    }
}

impl Core {
    /// What the cluster's rules mean for those who are there.
    pub(super) fn meaning(&self) -> Arc<Meaning> {
        let (known, old) = &self.meaning;
        if !old {
            return Arc::clone(known);
        }
        if self.settings.rules == VmRules::default() {
            return Arc::default(); // The rule in large clusters, too.
        }
        let vms = self.vms.keys().map(|id| (*id, self.vm_name(*id))).collect();
        let hosts = self.settings.members.iter().map(|member| (member.host, member.name.clone())).collect();
        Arc::new(Meaning::of(&self.settings.rules, &vms, &hosts))
    }

    /// Rules that cannot do what they were made for, in words. Only the master knows all VMs.
    pub(super) fn rule_problems(&self) -> Vec<String> {
        let problems = self.is_master().then(|| self.meaning());
        problems.iter().flat_map(|meaning| &meaning.problems).map(ToString::to_string).collect()
    }

    /// Before they are used often.
    pub(super) fn read_rules(&mut self) {
        self.meaning = (self.meaning(), false);
    }

    /// A place for one VM, on another host than `avoid`.
    pub(super) fn place(&self, id: VmId, need: &Need, avoid: Option<HostId>, now: Time) -> Placed {
        let meaning = self.meaning();
        let site = self.site(&meaning, &BTreeSet::from([id]));
        let mut ask = Bars::of_planned(self, &meaning, now).ask(id, need, None, None);
        if let Some(avoid) = avoid {
            let mut barred = BTreeMap::clone(&ask.barred);
            barred.insert(avoid, WhyNot::Leaving);
            ask.barred = Arc::new(barred);
        }
        let asks = [ask];
        let plan = plan(&site, &asks);
        match plan.host(0) {
            Some(host) => Placed::On(host),
            None => Placed::Nowhere(plan.why_nowhere(0).into_iter().filter(|(host, _)| Some(*host) != avoid).collect()),
        }
    }

    /// Why a host can take nobody.
    pub(super) fn away(&self, host: HostId, now: Time) -> Option<WhyNot> {
        if !self.is_heard(host, now) {
            return Some(WhyNot::Silent);
        }
        if !self.live_members(now).any(|member| member.host == host) || (host == self.me.host && self.going_down) {
            return Some(WhyNot::Leaving);
        }
        if host == self.me.host && self.leaves_to_others(now) {
            return Some(WhyNot::Isolated);
        }
        if self.in_maintenance(host) {
            return Some(WhyNot::Maintenance);
        }
        if self.is_evacuated(host, now) {
            return Some(WhyNot::Leaving);
        }
        self.is_quarantined(host, now).then_some(WhyNot::Quarantine).or_else(|| self.unwell(host))
    }
}
