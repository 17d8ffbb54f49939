//! What hosts find wrong with themselves, and what follows.
//!
//! ```text
//!   executors: what stands now ─► conditions of this host ─► its report ─► the master
//!      stands ─► has gone ─ QUARANTINE ─► forgotten           │ quarantine: hosts are the last resort
//!         │        └─ comes again: stands                     │ evacuate: planned moves, a few at a time
//!         └─ an operator's release: VMs may be placed there   └ uplink: the bridge counts as missing there
//! ```
//!
//! A bridge whose uplink is lost is no place for a planned move, and the last resort of a restart: a VM without network is better than
//! none. Nobody is moved before a finding has stood for `LASTING`. A VM that was moved for one is not moved again within `AGAIN`, and
//! never back by itself: findings that come and go, here and there, move each VM once in that time at most.
//!
//! The host itself remembers what has gone, so that a new master knows it, too. Not here: how things are found (`exec::health`), and for
//! how long before it is told.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::Cx;
use super::note::Note;
use super::placement::WhyNot;
use crate::types::finding::{Condition, Finding, HealthAction, MAX_FINDINGS, Source};
use crate::types::needs::Needs;
use crate::types::{HostId, Time, VmId};

/// A quarantine ends so long after its finding has gone.
const QUARANTINE: Duration = Duration::from_secs(1800);
/// A VM that was moved for a finding is not moved for one again before.
const AGAIN: Duration = Duration::from_secs(600);
/// Nobody is moved before a finding has stood for so long: what strikes several hosts is found by each at its own moment, and a VM must
/// not use its one move to come from one of them to another.
const LASTING: Duration = Duration::from_secs(5);

/// A finding of this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    condition: Condition,
    /// When it came.
    since: Time,
    /// When it went, if it has.
    gone: Option<Time>,
}

impl Core {
    /// All that stands on this host now.
    pub(super) fn found(&mut self, cx: &mut Cx, mut all: Vec<Finding>) {
        all.truncate(MAX_FINDINGS);
        for finding in &all {
            let known = self.findings.iter().position(|found| is_about(&found.condition.finding, finding));
            let before = known.map(|n| self.findings.remove(n)).filter(|before| before.condition.stands);
            let since = before.as_ref().map_or(cx.now, |before| before.since);
            let lasting = before.as_ref().is_some_and(|before| before.condition.lasting);
            // What comes again may be worse than what was released; and so are more errors of memory.
            let same = |before: &Found| finding.source != Source::Memory || before.condition.finding == *finding;
            let released = before.as_ref().is_some_and(|before| before.condition.released && same(before));
            if before.is_none() {
                self.tell_found(cx, finding);
            }
            let condition = Condition { finding: finding.clone(), stands: true, lasting, released };
            self.findings.push(Found { condition, since, gone: None });
        }
        let gone =
            |found: &Found| found.gone.is_none() && !all.iter().any(|one| is_about(&found.condition.finding, one));
        for n in (0..self.findings.len()).filter(|n| gone(&self.findings[*n])).collect::<Vec<_>>() {
            let found = &mut self.findings[n];
            (found.condition.stands, found.condition.lasting, found.gone) = (false, false, Some(cx.now));
            let condition = found.condition.clone();
            if self.matters(&condition.finding) {
                let minutes = QUARANTINE.as_secs() / 60;
                let later = format!("; VMs are placed here again in {minutes} minutes");
                let later = if self.quarantines(&condition) { later } else { String::new() };
                cx.note(Note::info("host-well", format!("no longer so: {}{later}", condition.finding.text)));
            }
        }
        self.forget_gone(cx.now);
        self.tell = true;
        self.look = true;
    }

    fn tell_found(&self, cx: &mut Cx, finding: &Finding) {
        if !self.matters(finding) {
            return;
        }
        let what = match (self.action(finding.source), finding.source) {
            (HealthAction::Tell, _) => String::new(),
            (HealthAction::Quarantine, Source::Uplink) => {
                "; no VM that uses it is placed here while another host can have it".into()
            }
            (HealthAction::Evacuate, Source::Uplink) => {
                "; VMs that use it are moved to hosts whose uplink works".into()
            }
            (HealthAction::Quarantine, _) => {
                let name = self.name_of(self.me.host);
                format!(
                    "; nothing is placed here while another host can have it, until {} minutes after that has gone \
                     (mainstay host release {name} ends that)",
                    QUARANTINE.as_secs() / 60
                )
            }
            (HealthAction::Evacuate, _) => "; all VMs of this host are moved to others".into(),
        };
        cx.note(Note::warning("host-unwell", format!("{}{what}", finding.text)));
    }

    /// With every beat: what lasts, and what has gone long ago.
    pub(super) fn follow_findings(&mut self, cx: &mut Cx) {
        let mut changed = false;
        let ripens = |found: &&mut Found| found.condition.stands && !found.condition.lasting;
        for found in self.findings.iter_mut().filter(ripens).filter(|found| LASTING <= cx.now.since(found.since)) {
            found.condition.lasting = true;
            changed = true;
        }
        let before = self.findings.len();
        self.forget_gone(cx.now);
        if changed || self.findings.len() < before {
            self.tell = true;
            self.look = true;
        }
    }

    fn forget_gone(&mut self, now: Time) {
        let keeps = |found: &Found| found.gone.is_none_or(|at| now.since(at) < QUARANTINE && !found.condition.released);
        self.findings.retain(keeps);
        // Those that stand are bounded by themselves.
        while 2 * MAX_FINDINGS < self.findings.len() {
            let oldest = (0..self.findings.len())
                .filter(|n| self.findings[*n].gone.is_some())
                .min_by_key(|n| self.findings[*n].gone);
            let Some(oldest) = oldest else { return };
            self.findings.remove(oldest);
        }
    }

    /// An operator has released this host.
    pub(super) fn release_findings(&mut self, now: Time) {
        self.findings.iter_mut().for_each(|found| found.condition.released = true);
        self.forget_gone(now);
        self.tell = true;
        self.look = true;
    }

    /// As this host tells them.
    pub(super) fn own_conditions(&self) -> Vec<Condition> {
        self.findings.iter().map(|found| found.condition.clone()).collect()
    }

    /// As a host has told them.
    fn conditions(&self, host: HostId) -> Box<dyn Iterator<Item = &Condition> + '_> {
        if host == self.me.host {
            return Box::new(self.findings.iter().map(|found| &found.condition));
        }
        // Hosts report to their master only: what another one once heard is old.
        let report = self.peers.get(&host).and_then(|peer| peer.report.as_ref()).filter(|_| self.is_master());
        Box::new(report.into_iter().flat_map(|report| &report.conditions))
    }

    fn action(&self, source: Source) -> HealthAction {
        self.settings.rules.action(source)
    }

    /// Whether its host is to take nobody; of an uplink only VMs that use it are kept away.
    fn quarantines(&self, one: &Condition) -> bool {
        let Finding { source, .. } = one.finding;
        self.action(source) != HealthAction::Tell && source != Source::Uplink && !one.released
    }

    /// Of an uplink that no VM uses nobody needs to hear.
    fn matters(&self, finding: &Finding) -> bool {
        finding.source != Source::Uplink || self.vms.values().any(|vm| vm.uses_network(&finding.object))
    }

    /// Why a host is to take nobody.
    pub(super) fn unwell(&self, host: HostId) -> Option<WhyNot> {
        let worst = self.conditions(host).filter(|one| self.quarantines(one)).max_by_key(|one| one.stands)?;
        Some(WhyNot::Unwell { what: worst.finding.text.clone(), lately: !worst.stands })
    }

    /// The first uplink that a VM needs and a host has lost, whatever is done about it otherwise.
    pub(super) fn uplink_lost(&self, host: HostId, needs: &Needs) -> Option<WhyNot> {
        let lost = |one: &&Condition| one.stands && one.finding.source == Source::Uplink;
        let lost = self.conditions(host).filter(lost).find(|one| needs.networks.contains(&one.finding.object))?;
        Some(WhyNot::UplinkLost(lost.finding.object.split_once(':').map_or("", |(_, name)| name).to_owned()))
    }

    /// The master: VMs that are to leave a host for what was found there.
    pub(super) fn flee(&mut self, cx: &mut Cx) {
        if self.disarmed().is_some() {
            return;
        }
        let hosts: Vec<HostId> = self.settings.members.iter().map(|member| member.host).collect();
        let mut any = !self.settings.maintenance.is_empty() || !self.evacuations.is_empty();
        for host in hosts {
            if !self.is_heard(host, cx.now) || self.in_maintenance(host) {
                continue; // A host in maintenance is emptied anyhow.
            }
            let endangered = self.endangered(host);
            any |= !endangered.is_empty();
            // One that is still where it fled from is on its way, or was not moved.
            let fled = |id: &VmId| self.vms.get(id).and_then(|vm| vm.fled).filter(|(_, from)| *from != host);
            let lately = |id: &VmId| fled(id).is_some_and(|(at, _)| cx.now.since(at) < AGAIN);
            let (held, free): (Vec<VmId>, Vec<VmId>) = endangered.into_iter().partition(lately);
            for id in held {
                if self.may_be_moved(cx, id, host) {
                    let minutes = AGAIN.as_secs() / 60;
                    self.stays(cx, id, format!("it was moved for a finding less than {minutes} minutes ago"));
                }
            }
            for id in self.move_away(cx, host, free) {
                self.vm(id).fled = Some((cx.now, host));
            }
        }
        if !any {
            self.vms.values_mut().for_each(|vm| vm.stays = None); // Nobody is to be moved any more.
        }
    }

    fn endangered(&self, host: HostId) -> Vec<VmId> {
        let flees = |one: &&Condition| {
            one.lasting && self.action(one.finding.source) == HealthAction::Evacuate && !one.released
        };
        let found: Vec<&Condition> = self.conditions(host).filter(flees).collect();
        if found.is_empty() {
            return Vec::new();
        }
        let all = found.iter().any(|one| one.finding.source != Source::Uplink);
        let lost: BTreeSet<&str> = found.iter().map(|one| one.finding.object.as_str()).collect();
        let uses = |id: &VmId| self.vms.get(id).is_some_and(|vm| lost.iter().any(|name| vm.uses_network(name)));
        self.running_on(host).into_iter().filter(|id| all || uses(id)).collect()
    }

    /// For people: what a host has found, and what is done about it.
    pub(super) fn findings_of(&self, host: HostId) -> Vec<String> {
        let shown = self.conditions(host).filter(|one| self.matters(&one.finding));
        let text = |one: &Condition| {
            let action = self.action(one.finding.source);
            match (one.stands, one.released) {
                (true, true) => Some(format!("{} (released by an operator)", one.finding.text)),
                (true, false) => Some(format!("{} ({})", one.finding.text, action.name())),
                (false, false) if self.quarantines(one) => {
                    Some(format!("{} (has gone, quarantined for a while)", one.finding.text))
                }
                (false, _) => None,
            }
        };
        shown.filter_map(text).collect()
    }

    /// What this host has found, for `doctor`.
    #[must_use]
    pub fn own_findings(&self) -> Vec<String> {
        self.findings_of(self.me.host)
    }
}

/// The same thing, whatever its words.
fn is_about(one: &Finding, other: &Finding) -> bool {
    one.source == other.source && one.object == other.object
}
