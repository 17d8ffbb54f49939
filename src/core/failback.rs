//! VMs that belong to some hosts are brought back to them when those have been well for long enough.
//!
//! ```text
//!   runs elsewhere, because of a failure or for the cluster's own reasons ─► one of its hosts has been well for `after_s`?
//!         │ a person has put it there: it stays, until a failure moves it         │ yes, with a place for it by all rules that must hold
//!         ▼                                                                       ▼
//!       left alone                     tried again after `AGAIN` ◄── refused ── live migration, a few at a time
//! ```
//!
//! Well: heard, live, not in maintenance, quarantined, isolated or leaving, as this host has seen it without a break. Who put a VM where it
//! is stands in its claims; a new master sees only the newest of them, and brings back what it cannot tell.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::Cx;
use super::members::Verdict;
use super::note::Note;
use super::placement::rules::{Belongs, Meaning};
use super::placement::search::plan;
use super::placement::{Bars, WhyNot};
use crate::types::vm::DomainState;
use crate::types::{Claim, ClaimReason, Holder, HostId, Time, VmId, Wanted};

/// One that was not brought back is tried again after this; and one that was brought back, and is away again.
const AGAIN: Duration = Duration::from_secs(300);

/// The same if its host was only not ready: what is missing comes with its next report.
const SOON: Duration = Duration::from_secs(10);

/// Why one is not brought back yet, and when it is tried again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Away {
    again: Time,
    why: Option<String>,
}

/// Whether a person has put a VM where this claim has it; none: the claim says nothing of that.
pub(super) fn by_person(reason: ClaimReason) -> Option<bool> {
    match reason {
        ClaimReason::Adopted | ClaimReason::StartedByPerson | ClaimReason::Migrated | ClaimReason::HandedOver => {
            Some(true)
        }
        ClaimReason::Failover | ClaimReason::Planned => Some(false),
        ClaimReason::Registered
        | ClaimReason::Crashed
        | ClaimReason::Reclaimed
        | ClaimReason::StartFailed
        | ClaimReason::StoppedByPerson
        | ClaimReason::StoppedInside
        | ClaimReason::HostWentDown
        | ClaimReason::Deleted
        | ClaimReason::RecordChanged
        | ClaimReason::Saved
        | ClaimReason::MigratedAway
        | ClaimReason::HomeMoved
        | ClaimReason::Isolated
        | ClaimReason::MadeRoom => None,
    }
}

impl Core {
    /// Once per beat: since when each host is well.
    pub(super) fn follow_wellness(&mut self, now: Time) {
        let live = |host: HostId| {
            host == self.me.host || self.peers.get(&host).is_some_and(|peer| peer.verdict == Verdict::Live)
        };
        let members = self.settings.members.iter().map(|member| member.host);
        let well: BTreeSet<HostId> = members.filter(|host| live(*host) && self.away(*host, now).is_none()).collect();
        self.well.retain(|host, _| well.contains(host));
        for host in well {
            self.well.entry(host).or_insert(now);
        }
    }

    /// Where it runs, if it is away from the hosts that it belongs to and could be moved.
    fn strays(&self, id: VmId, belongs: &Belongs, now: Time) -> Option<HostId> {
        let vm = self.vms.get(&id)?;
        let claim = vm.claim.as_ref().filter(|claim| claim.wanted == Wanted::Running)?;
        let Holder::Host(owner) = claim.holder else { return None };
        let away = !belongs.hosts.contains(&owner.host) && !vm.by_person;
        let runs = || self.state_on(owner.host, id) == Some(DomainState::Running);
        let from = owner.host;
        (away && self.is_heard(from, now) && !self.in_maintenance(from) && !self.is_evacuated(from, now) && runs())
            .then_some(from)
    }

    fn is_well_for(&self, host: HostId, span: Duration, now: Time) -> bool {
        self.well.get(&host).is_some_and(|since| span <= now.since(*since))
    }

    /// The master: VMs that are not where they belong.
    pub(super) fn fail_back(&mut self, cx: &mut Cx) {
        let (meaning, now) = (self.meaning(), cx.now);
        let well = |belongs: &Belongs, core: &Self| {
            belongs.hosts.iter().any(|host| core.is_well_for(*host, belongs.after, now))
        };
        let mut back: Vec<(VmId, HostId)> = Vec::new();
        for (id, belongs) in meaning.belongs() {
            let rests = self.vms.get(id).and_then(|vm| vm.back.as_ref()).is_some_and(|away| cx.now < away.again);
            if rests || !well(belongs, self) {
                continue;
            }
            if let Some(from) = self.strays(*id, belongs, cx.now)
                && self.may_be_moved(cx, *id, from)
            {
                back.push((*id, from));
            }
        }
        if !back.is_empty() {
            self.bring_home(cx, &meaning, &back);
        }
    }

    fn bring_home(&mut self, cx: &mut Cx, meaning: &Meaning, back: &[(VmId, HostId)]) {
        let site = self.site(meaning, &back.iter().map(|(id, _)| *id).collect::<BTreeSet<VmId>>());
        let mut bars = Bars::of_planned(self, meaning, cx.now);
        let members: Vec<HostId> = self.settings.members.iter().map(|member| member.host).collect();
        let ask = |(id, _): &(VmId, HostId)| {
            let mut ask = bars.ask(*id, &self.need_of(*id), None, None);
            let belongs = meaning.belongs_to(*id).expect("only such are brought back");
            let mut barred = BTreeMap::clone(&ask.barred);
            for host in &members {
                let why = match belongs.hosts.contains(host) {
                    false => WhyNot::Strange,
                    true if !self.is_well_for(*host, belongs.after, cx.now) => WhyNot::Unsteady,
                    true => continue,
                };
                barred.entry(*host).or_insert(why);
            }
            ask.barred = Arc::new(barred);
            ask
        };
        let asks: Vec<_> = back.iter().map(ask).collect();
        let plan = plan(&site, &asks);
        let mut busy = self.moves_under_way(cx.now);
        let most = self.settings.rules.limits.moves_per_host;
        for (n, (id, from)) in back.iter().enumerate() {
            let name = self.vm_name(*id);
            let Some(to) = plan.host(n) else {
                let why: Vec<(HostId, WhyNot)> =
                    plan.why_nowhere(n).into_iter().filter(|(_, why)| *why != WhyNot::Strange).collect();
                let ready = |why: &WhyNot| !matches!(why, WhyNot::NoLibvirt | WhyNot::NoDatastore(_) | WhyNot::Silent);
                if !why.iter().any(|(_, why)| ready(why) && *why != WhyNot::Unsteady) {
                    self.vm(*id).back = Some(Away { again: cx.now + SOON, why: None });
                    continue;
                }
                let why: Vec<String> =
                    why.into_iter().map(|(host, why)| format!("{} {why}", self.name_of(host))).collect();
                let why = why.join("; ");
                let before = self.vm(*id).back.replace(Away { again: cx.now + AGAIN, why: Some(why.clone()) });
                if before.is_none_or(|before| before.why.is_none()) {
                    cx.note(Note::info("vm-failback", format!("{name} is not brought back yet: {why}")).of(&name));
                }
                continue;
            };
            let under_way = |host: &HostId| busy.get(host).copied().unwrap_or_default();
            if most <= under_way(&to) || most <= under_way(from) {
                continue;
            }
            *busy.entry(to).or_default() += 1;
            *busy.entry(*from).or_default() += 1;
            self.vm(*id).back = Some(Away { again: cx.now + AGAIN, why: None });
            let text = format!(
                "{name} is brought back from {} to {}, where it belongs",
                self.name_of(*from),
                self.name_of(to)
            );
            cx.note(Note::info("vm-failback", text).of(&name));
            self.move_there(cx, *id, *from, to);
        }
    }

    /// For `vm explain`: where it belongs, and what becomes of that.
    pub(super) fn belonging_text(&self, id: VmId, meaning: &Meaning, now: Time) -> Option<String> {
        let belongs = meaning.belongs_to(id)?;
        let vm = self.vms.get(&id)?;
        let owner = vm.claim.as_ref().and_then(Claim::owner)?.host;
        let hosts: Vec<String> = belongs.hosts.iter().map(|host| self.name_of(*host)).collect();
        let hosts = hosts.join(", ");
        if belongs.hosts.contains(&owner) {
            return Some(format!("it belongs to {hosts}, and is there"));
        }
        if vm.by_person {
            return Some(format!(
                "it belongs to {hosts}, but a person has put it where it is: it stays until a failure moves it"
            ));
        }
        let why = vm.back.as_ref().and_then(|away| away.why.as_deref());
        if let Some(why) = why.filter(|_| belongs.hosts.iter().any(|host| self.is_well_for(*host, belongs.after, now)))
        {
            return Some(format!("it belongs to {hosts}, and is not brought back yet: {why}"));
        }
        let left = |host: &HostId| Some(belongs.after.saturating_sub(now.since(*self.well.get(host)?)).as_secs());
        let soonest = belongs.hosts.iter().filter_map(left).min();
        let when = match soonest {
            Some(0) => "it is its turn soon".to_owned(),
            Some(seconds) => format!("{seconds} s more"),
            None => "none of them is well now".to_owned(),
        };
        let after = belongs.after.as_secs();
        Some(format!("it belongs to {hosts}, and is brought back when one of them has been well for {after} s: {when}"))
    }
}
