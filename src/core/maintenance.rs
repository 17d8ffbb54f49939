//! Hosts that people work on: the master moves their VMs away, all placed together, a few at a time; and back afterwards.
//!
//! ```text
//!   enter h ─► document: h, and who runs there ─► nothing is started on h ─► plan for all ─► some at a time ─► h is empty
//!                                                                                 │ refused, no place: told, later again
//!   leave h ─► document: it ends ─► those who ran there are moved back, as far as they still run elsewhere ─► forgotten
//! ```
//!
//! The document outlives power cycles and masters. A host that dies in maintenance is judged as ever: what still ran there is
//! restarted elsewhere, and what was moved away is not touched.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::note::Note;
use super::placement::search::plan;
use super::placement::{Bars, WhyNot};
use crate::types::control::{Denial, Mover, Reply, Request, VmCommand};
use crate::types::needs::Lack;
use crate::types::settings::{ClusterSettings, HostChange, Maintenance, SettingsChange};
use crate::types::view::MaintenanceView;
use crate::types::vm::DomainState;
use crate::types::{HostId, Ticket, Time, VmId, Wanted};

/// One that was not moved is tried again after this.
const AGAIN: Duration = Duration::from_secs(30);
/// The longest move, and its answer.
const MOVE_TIME: Duration = Duration::from_secs(660);

/// The master has told its host to move it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Evacuation {
    from: HostId,
    to: HostId,
    ticket: Ticket,
}

impl Core {
    pub(super) fn in_maintenance(&self, host: HostId) -> bool {
        self.settings.maintenance.iter().any(|one| one.host == host && !one.ends)
    }

    /// Whether this changes anything.
    pub(super) fn changes_host(&self, change: &HostChange) -> bool {
        match change {
            HostChange::EnterMaintenance { host } => !self.in_maintenance(*host),
            HostChange::LeaveMaintenance { host, .. } => self.in_maintenance(*host),
            HostChange::EndMaintenance { host } => {
                self.settings.maintenance.iter().any(|one| one.host == *host && one.ends)
            }
            // Every host keeps its own count, of the master too: another may have quarantined it.
            HostChange::Release { .. } => true,
        }
    }

    pub(super) fn change_host(&self, cx: &mut Cx, settings: &mut ClusterSettings, change: HostChange) {
        match change {
            HostChange::EnterMaintenance { host } => {
                let vms = self.running_on(host);
                let text = format!("{} is in maintenance now: {} VM(s) are moved away", self.name_of(host), vms.len());
                cx.note(Note::info("maintenance", text));
                settings.maintenance.retain(|one| one.host != host);
                settings.maintenance.push(Maintenance { host, vms, ends: false });
            }
            HostChange::LeaveMaintenance { host, back } => {
                cx.note(Note::info("maintenance", format!("maintenance of {} ends", self.name_of(host))));
                for one in settings.maintenance.iter_mut().filter(|one| one.host == host) {
                    one.ends = true;
                    if !back {
                        one.vms.clear();
                    }
                }
            }
            HostChange::EndMaintenance { host } => {
                cx.note(Note::info("maintenance", format!("maintenance of {} is over", self.name_of(host))));
                settings.maintenance.retain(|one| one.host != host);
            }
            HostChange::Release { host } => {
                for member in settings.members.iter_mut().filter(|member| member.host == host) {
                    member.released += 1;
                }
            }
        }
    }

    /// Who runs on a host, as far as it says so, and is protected.
    pub(super) fn running_on(&self, host: HostId) -> Vec<VmId> {
        let runs =
            |id: VmId| matches!(self.state_on(host, id), Some(DomainState::Running | DomainState::Paused { .. }));
        let here = |vm: &super::vms::Vm| {
            let claim = vm.claim.as_ref().filter(|claim| claim.wanted == Wanted::Running);
            claim.and_then(crate::types::Claim::owner).is_some_and(|owner| owner.host == host)
        };
        self.vms.iter().filter(|(id, vm)| here(vm) && runs(**id)).map(|(id, _)| *id).collect()
    }

    /// What libvirt on a host says of it, as far as that is known here.
    pub(super) fn state_on(&self, host: HostId, id: VmId) -> Option<DomainState> {
        if host == self.me.host {
            return self.libvirt.domains.get(&id).map(|domain| domain.state);
        }
        self.report_of(host, id).and_then(|report| report.domain)
    }

    /// For people; the master knows who stays.
    pub(super) fn maintenance_view(&self, host: HostId) -> Option<MaintenanceView> {
        let one = self.settings.maintenance.iter().find(|one| one.host == host)?;
        let left = if one.ends {
            let away = |id: &&VmId| {
                let owner = self.vms.get(id).and_then(|vm| vm.claim.as_ref()?.owner());
                owner.is_some_and(|owner| owner.host != host)
            };
            one.vms.iter().filter(away).copied().collect()
        } else {
            self.running_on(host)
        };
        let why = |id: &VmId| Some((self.vm_name(*id), self.vms.get(id)?.stays.as_ref()?.1.clone()));
        let stay = left.iter().filter_map(why).collect();
        Some(MaintenanceView { ends: one.ends, left: u32::try_from(left.len()).unwrap_or(u32::MAX), stay })
    }

    /// The master: moves that the document wants.
    pub(super) fn planned_moves(&mut self, cx: &mut Cx) {
        for Maintenance { host, vms, ends } in self.settings.maintenance.clone() {
            if !self.is_heard(host, cx.now) {
                continue;
            }
            if ends {
                self.bring_back(cx, host, &vms);
            } else {
                let all = self.running_on(host);
                self.move_away(cx, host, all);
            }
        }
        self.evacuate(cx);
        if self.disarmed().is_none() {
            self.fail_back(cx);
        }
    }

    /// Planned moves that each host takes part in, as far as this master has ordered them.
    pub(super) fn moves_under_way(&self, now: Time) -> BTreeMap<HostId, u32> {
        let mut all: BTreeMap<HostId, u32> = BTreeMap::new();
        for vm in self.vms.values() {
            let ordered = vm.evacuation.filter(|one| self.is_heard(one.from, now)).map(|one| [one.from, one.to]);
            let own = || vm.moving.as_ref().map(|moving| [self.me.host, moving.to]);
            for host in ordered.or_else(own).into_iter().flatten() {
                *all.entry(host).or_default() += 1;
            }
        }
        all
    }

    /// Moves some of these VMs of a host to others, as many at once as may be; which.
    pub(super) fn move_away(&mut self, cx: &mut Cx, host: HostId, all: Vec<VmId>) -> Vec<VmId> {
        let mut begun = Vec::new();
        let idle: Vec<VmId> = all.iter().copied().filter(|id| self.may_be_moved(cx, *id, host)).collect();
        let most = self.settings.rules.limits.moves_per_host as usize;
        let mut slots = most.saturating_sub(all.len() - idle.len() - self.stay(cx, &all, host));
        if idle.is_empty() || slots == 0 {
            return begun;
        }
        let meaning = self.meaning();
        let site = self.site(&meaning, &idle.iter().copied().collect::<BTreeSet<VmId>>());
        let mut bars = Bars::of_planned(self, &meaning, cx.now);
        let asks: Vec<_> = idle.iter().map(|id| bars.ask(*id, &self.need_of(*id), Some(host), None)).collect();
        let plan = plan(&site, &asks);
        for (n, id) in idle.into_iter().enumerate() {
            let Some(to) = plan.host(n) else {
                let why = plan.why_nowhere(n).into_iter().filter(|(other, _)| *other != host);
                let why: Vec<String> = why.map(|(other, why)| format!("{} {why}", self.name_of(other))).collect();
                self.stays(cx, id, format!("no place: {}", why.join("; ")));
                continue;
            };
            if 0 < slots {
                slots -= 1;
                begun.push(id);
                self.move_there(cx, id, host, to);
            }
        }
        begun
    }

    fn bring_back(&mut self, cx: &mut Cx, host: HostId, vms: &[VmId]) {
        let (mut left, most) = (0, self.settings.rules.limits.moves_per_host as usize);
        for id in vms {
            if self.is_under_way(*id, cx.now) {
                left += 1;
                continue;
            }
            let owner = self.vms.get(id).and_then(|vm| vm.claim.as_ref()?.owner()).map(|owner| owner.host);
            let Some(from) = owner.filter(|from| *from != host && self.running_on(*from).contains(id)) else {
                continue;
            };
            if self.vms.get(id).is_some_and(|vm| vm.stays.is_some()) {
                continue; // It was tried once: it is well where it is.
            }
            left += 1;
            if most < left || !self.may_be_moved(cx, *id, from) {
                continue;
            }
            match self.room_on(host, *id, &self.need_of(*id), cx.now) {
                Ok(()) => self.move_there(cx, *id, from, host),
                // Its agent is there, and its storage, libvirt or networks will be.
                Err(WhyNot::NoDatastore(_) | WhyNot::NoLibvirt | WhyNot::Silent | WhyNot::UplinkLost(_)) => {}
                Err(WhyNot::Lacks(Lack::Network(_))) => {}
                Err(why) => self.stays(cx, *id, why.to_string()),
            }
        }
        if left == 0 {
            self.carry_out(cx, SettingsChange::Host(HostChange::EndMaintenance { host }));
        }
    }

    /// It is being moved, as far as its host is there.
    pub(super) fn is_under_way(&self, id: VmId, now: Time) -> bool {
        let Some(vm) = self.vms.get(&id) else { return false };
        vm.moving.is_some() || vm.evacuation.is_some_and(|evacuation| self.is_heard(evacuation.from, now))
    }

    pub(super) fn may_be_moved(&mut self, cx: &mut Cx, id: VmId, from: HostId) -> bool {
        let heard = self.is_heard(from, cx.now);
        let Some(vm) = self.vms.get_mut(&id) else { return false };
        if vm.evacuation.is_some_and(|evacuation| evacuation.from != from) || !heard {
            vm.evacuation = None;
        }
        let waits = vm.stays.as_ref().is_some_and(|(again, _)| cx.now < *again);
        vm.evacuation.is_none() && vm.moving.is_none() && vm.attempt.is_none() && !waits
    }

    /// How many of them were not moved, and are not tried yet again.
    fn stay(&self, cx: &Cx, all: &[VmId], host: HostId) -> usize {
        let waits = |id: &&VmId| {
            let vm = self.vms.get(id);
            let stays = vm.and_then(|vm| vm.stays.as_ref()).is_some_and(|(again, _)| cx.now < *again);
            stays && vm.is_some_and(|vm| vm.moving.is_none() && vm.evacuation.is_none_or(|one| one.from != host))
        };
        all.iter().filter(waits).count()
    }

    pub(super) fn move_there(&mut self, cx: &mut Cx, id: VmId, from: HostId, to: HostId) {
        if from == self.me.host {
            return self.begin_move(cx, Vec::new(), id, Some(to), Mover::Cluster);
        }
        let request = Request::Vm(VmCommand::Move { vm: id, to: Some(to), by: Mover::Cluster });
        let ticket = cx.send(from, request, MOVE_TIME, Pending::Evacuated(id));
        self.vm(id).evacuation = Some(Evacuation { from, to, ticket });
    }

    pub(super) fn evacuated(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, reply: Result<Reply, String>) {
        if self.vms.get(&id).and_then(|vm| vm.evacuation).is_none_or(|evacuation| evacuation.ticket != ticket) {
            return;
        }
        self.vm(id).evacuation = None;
        match reply {
            Ok(Reply::Denied(Denial::NotHere | Denial::UnknownVm)) => {} // It has gone meanwhile.
            Ok(Reply::Denied(denial)) => self.stays(cx, id, denial.to_string()),
            Ok(_) => self.vm(id).stays = None,
            Err(why) => self.stays(cx, id, why),
        }
        self.look = true;
    }

    /// It was not moved: told once, and tried later again.
    pub(super) fn stays(&mut self, cx: &mut Cx, id: VmId, why: String) {
        let again = cx.now + AGAIN;
        cx.set(Timer::Place(id), again);
        let before = self.vm(id).stays.replace((again, why.clone()));
        if before.is_none_or(|(_, before)| before != why) {
            let name = self.vm_name(id);
            cx.note(Note::warning("vm-not-moved", format!("{name} is not moved: {why}")).of(&name));
        }
        self.look = true;
    }
}
