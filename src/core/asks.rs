//! What other agents and people ask. A person's wish goes to whoever can carry it out: the VM's host, or the master.

use std::time::Duration;

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending, Timer};
use super::event::AskId;
use super::note::Note;
use crate::types::control::{Denial, HostReport, Reply, Request, VmCommand, VmReport};
use crate::types::settings::{
    ClusterSettings, DatastoreSettings, ForeignMigration, Maintenance, MemberSettings, SettingsChange,
};
use crate::types::store::{ClaimsOf, StoreAnswer, StoreOrder};
use crate::types::vm::{DomainAnswer, DomainOrder};
use crate::types::{
    ClaimReason, Holder, HostId, MAX_DATASTORES, MAX_HOSTS, Proof, Roster, RosterEntry, Time, VmId, Wanted,
};

/// An answer that was passed on.
const FORWARD: Duration = Duration::from_secs(60);
/// The guest's time to shut down before `vm stop` says that it did not.
const CALL: Duration = Duration::from_secs(20);
/// A datastore's time to show the newest claim of a VM that a person wants something of.
const LOOK: Duration = Duration::from_secs(3);
/// Reports without a change.
const REPORT: Duration = Duration::from_secs(30);

impl Core {
    pub(super) fn asked(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, request: Request) {
        match (request, from) {
            (Request::Report(report), Some(from)) => {
                self.reported(cx, from, *report);
                cx.answer(ask, Reply::Done);
            }
            (Request::Settings(newer), Some(_)) => {
                self.take_settings(cx, *newer);
                cx.answer(ask, Reply::Done);
            }
            (Request::FetchSettings, _) => cx.answer(ask, Reply::Settings(Box::new(self.settings.clone()))),
            (Request::Change(change), from) => self.change(cx, ask, from, *change),
            (Request::Run(_), Some(from)) if self.is_behind(from) => {
                cx.answer(ask, Reply::Denied(Denial::Unable("the settings here are newer than the master's".into())));
            }
            (Request::Run(order), Some(_)) => self.run_ordered(cx, ask, *order),
            (Request::Vm(command), None) => self.look_first(cx, ask, command),
            (Request::Vm(command), from) => self.command(cx, ask, from, command),
            (Request::Incoming(order), Some(from)) => self.incoming(cx, ask, from, *order),
            (Request::Handed { tenure }, Some(from)) => self.handed(cx, ask, from, tenure),
            (Request::Dropped { tenure }, Some(from)) => self.dropped(cx, ask, from, tenure),
            (Request::PoweredOff { host, boot }, Some(_)) => self.told_off(cx, ask, host, boot),
            (Request::Twins { vm, disks, takes }, Some(from)) => {
                self.asked_for_twins(cx, ask, (from, vm), &disks, takes)
            }
            (Request::WhatIf { hosts }, _) if self.is_master() => self.what_if_asked(cx, ask, &hosts),
            (Request::WhatIf { hosts }, from) => {
                let master = self.master();
                self.forward(cx, ask, from, master, Request::WhatIf { hosts });
            }
            (Request::Handover(order), Some(from)) => self.handover_asked(cx, ask, from, *order),
            (Request::Spent { tenure }, Some(_)) => self.spent(cx, ask, tenure),
            (Request::View, from) => self.view_asked(cx, ask, from),
            (Request::Notes { .. } | Request::Join(_) | Request::Guest(_), _) => {
                cx.answer(ask, Reply::Denied(Denial::NotAllowed("not for the core".into())));
            }
            (
                Request::Report(_)
                | Request::Settings(_)
                | Request::Run(_)
                | Request::Incoming(_)
                | Request::Handed { .. }
                | Request::Dropped { .. }
                | Request::PoweredOff { .. }
                | Request::Twins { .. }
                | Request::Handover(_)
                | Request::Spent { .. },
                None,
            ) => cx.answer(ask, Reply::Denied(Denial::NotAllowed("only agents ask this of each other".into()))),
        }
    }

    pub(super) fn forwarded(&mut self, cx: &mut Cx, ask: AskId, reply: Result<Reply, String>) {
        let reply =
            reply.unwrap_or_else(|why| Reply::Denied(Denial::Unable(format!("the other host does not answer: {why}"))));
        cx.answer(ask, reply);
    }

    /// Passes a person's wish on, once: what came from another agent is never passed further.
    pub(super) fn forward(
        &mut self,
        cx: &mut Cx,
        ask: AskId,
        from: Option<HostId>,
        to: Option<HostId>,
        request: Request,
    ) {
        match to {
            Some(to) if from.is_none() && to != self.me.host => {
                cx.send(to, request, FORWARD, Pending::Forward(ask));
            }
            _ => cx.answer(ask, Reply::Denied(Denial::NotMaster { master: self.master() })),
        }
    }

    fn view_asked(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>) {
        match self.master() {
            Some(master) if master != self.me.host && from.is_none() && self.is_heard(master, cx.now) => {
                cx.send(master, Request::View, Duration::from_secs(3), Pending::Forward(ask));
            }
            _ => {
                let view = self.view(cx.now);
                cx.answer(ask, Reply::View(Box::new(view)));
            }
        }
    }

    // ---- settings -----------------------------------------------------------------------------------------------

    fn change(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, change: SettingsChange) {
        if !self.is_master() {
            let master = self.master();
            return self.forward(cx, ask, from, master, Request::Change(Box::new(change)));
        }
        match self.checked(&change) {
            Ok(false) => cx.answer(ask, Reply::AlreadySo),
            Ok(true) => match &change {
                SettingsChange::AddDatastore(datastore) => {
                    let (id, path) = (datastore.id, datastore.path.clone());
                    let roster = Roster {
                        cluster: self.settings.cluster,
                        datastore: id,
                        generation: 1,
                        members: self.roster_entries(),
                    };
                    cx.act(super::action::Action::OpenDatastore(id, path));
                    cx.store(id, StoreOrder::Prepare(roster), CALL, Pending::Prepare(ask, Box::new(change)));
                }
                SettingsChange::AddMember(_)
                | SettingsChange::ChangeDatastore { .. }
                | SettingsChange::SetTiming(_)
                | SettingsChange::SetOnDoubt(_)
                | SettingsChange::SetApdAfter(_)
                | SettingsChange::SetForeignMigration(_)
                | SettingsChange::SetGuests(_)
                | SettingsChange::SetRules(_)
                | SettingsChange::EnterMaintenance { .. }
                | SettingsChange::LeaveMaintenance { .. }
                | SettingsChange::EndMaintenance { .. }
                | SettingsChange::ReleaseHost { .. }
                | SettingsChange::AcceptDatastore { .. }
                | SettingsChange::SetFenceAt(_)
                | SettingsChange::AddFenceDevice(_)
                | SettingsChange::RemoveFenceDevice(_)
                | SettingsChange::TrustFenceDevice { .. } => {
                    self.carry_out(cx, change);
                    cx.answer(ask, Reply::Done);
                }
            },
            Err(denial) => cx.answer(ask, Reply::Denied(denial)),
        }
    }

    fn roster_entries(&self) -> Vec<RosterEntry> {
        self.settings.members.iter().map(|member| RosterEntry { index: member.index, host: member.host }).collect()
    }

    /// Whether a change changes anything, or why it contradicts what is.
    fn checked(&self, change: &SettingsChange) -> Result<bool, Denial> {
        let settings = &self.settings;
        let no = |why: String| Err(Denial::Contradiction(why));
        match change {
            SettingsChange::AddMember(new) => {
                if settings.members.contains(new) {
                    return Ok(false);
                }
                if settings.members.iter().any(|member| member.host == new.host || member.index == new.index) {
                    return no(format!("host id {} (or its index) is a member already", new.host));
                }
                if let Some(other) = settings.members.iter().find(|member| member.name == new.name) {
                    return no(format!("a host named {} is a member already ({})", new.name, other.host));
                }
                if settings.members.iter().any(|member| member.control == new.control) {
                    return no(format!("address {} is a member's already", new.control));
                }
                if MAX_HOSTS <= settings.members.len() {
                    return no(format!("the cluster has {MAX_HOSTS} hosts, which is the limit"));
                }
                Ok(true)
            }
            SettingsChange::AddDatastore(new) => {
                if settings.datastores.contains(new) {
                    return Ok(false);
                }
                if settings.datastores.iter().any(|datastore| datastore.name == new.name) {
                    return no(format!("a datastore named {} exists already", new.name));
                }
                if settings.datastores.iter().any(|datastore| datastore.path == new.path) {
                    return no(format!("{} is a datastore already", new.path));
                }
                if MAX_DATASTORES <= settings.datastores.len() {
                    return no(format!("the cluster has {MAX_DATASTORES} datastores, which is the limit"));
                }
                Ok(true)
            }
            SettingsChange::ChangeDatastore { name, .. } => self.datastore_named(name).map(|_| true),
            SettingsChange::AcceptDatastore { name } => {
                self.datastore_named(name).map(|datastore| self.distrusted(datastore.id).is_some())
            }
            SettingsChange::SetTiming(timing) => {
                super::timing::check(timing).map_err(|why| Denial::Contradiction(why.to_string()))?;
                Ok(settings.timing != *timing)
            }
            SettingsChange::SetOnDoubt(on_doubt) => Ok(settings.vms.on_doubt != *on_doubt),
            SettingsChange::SetApdAfter(span) if *span <= settings.timing.suspect => no(format!(
                "apd-after must be longer than the suspect time, {} ms",
                settings.timing.suspect.as_millis()
            )),
            SettingsChange::SetApdAfter(span) => Ok(settings.vms.apd_after != *span),
            SettingsChange::SetFenceAt(at) => Ok(settings.power.fence_at != *at),
            SettingsChange::AddFenceDevice(new) => self.checked_device(new),
            SettingsChange::RemoveFenceDevice(name) => self.checked_name(name, |_| true),
            SettingsChange::TrustFenceDevice { name, distrusted } => {
                self.checked_name(name, |device| device.distrusted != *distrusted)
            }
            SettingsChange::SetForeignMigration(policy) => Ok(settings.foreign_migration != *policy),
            SettingsChange::SetGuests(guests) => {
                guests.check().map_err(Denial::Contradiction)?;
                Ok(settings.guests != **guests)
            }
            SettingsChange::SetRules(rules) => {
                rules.check().map_err(|why| Denial::Contradiction(why.to_string()))?;
                Ok(settings.rules != **rules)
            }
            SettingsChange::EnterMaintenance { host } => Ok(!self.in_maintenance(*host)),
            SettingsChange::LeaveMaintenance { host, .. } => Ok(self.in_maintenance(*host)),
            SettingsChange::ReleaseHost { host } => {
                Ok(self.peers.get(host).is_some_and(|peer| peer.steady.is_quarantined()))
            }
            SettingsChange::EndMaintenance { host } => {
                Ok(settings.maintenance.iter().any(|one| one.host == *host && one.ends))
            }
        }
    }

    fn datastore_named(&self, name: &str) -> Result<&DatastoreSettings, Denial> {
        let found = self.settings.datastores.iter().find(|datastore| datastore.name == name);
        found.ok_or_else(|| {
            Denial::Contradiction(format!("no datastore is named {name}; 'mainstay datastore list' shows them"))
        })
    }

    pub(super) fn prepared(&mut self, cx: &mut Cx, ask: AskId, change: SettingsChange, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Done if self.is_master() && self.checked(&change) == Ok(true) => {
                self.carry_out(cx, change);
                cx.answer(ask, Reply::Done);
            }
            StoreAnswer::Failed(why) => {
                cx.answer(ask, Reply::Denied(Denial::Unable(format!("the datastore cannot be prepared: {why}"))));
            }
            _ => cx.answer(ask, Reply::Denied(Denial::NotMaster { master: self.master() })),
        }
    }

    pub(super) fn carry_out(&mut self, cx: &mut Cx, change: SettingsChange) {
        let mut settings = self.settings.clone();
        settings.version += 1;
        match change {
            SettingsChange::AddMember(new) => {
                cx.note(Note::info("host-joined", format!("host {} joined ({})", new.name, new.control)));
                settings.members.push(new);
                settings.members.sort_by_key(|member| member.index);
            }
            SettingsChange::AddDatastore(new) => {
                cx.note(Note::info("datastore-added", format!("datastore {} at {} was added", new.name, new.path)));
                settings.datastores.push(new);
            }
            SettingsChange::ChangeDatastore { name, fence, late_writes } => {
                cx.note(Note::info("datastore-changed", format!("datastore {name} was changed")));
                for datastore in settings.datastores.iter_mut().filter(|datastore| datastore.name == name) {
                    if let Some(fence) = &fence {
                        datastore.fence = fence.clone();
                    }
                    if let Some(late_writes) = late_writes {
                        datastore.late_writes = late_writes;
                    }
                }
            }
            SettingsChange::SetTiming(timing) => {
                cx.note(Note::info("timing", format!("timing was changed: L is {} ms now", timing.lease.as_millis())));
                settings.timing = timing;
            }
            SettingsChange::SetOnDoubt(on_doubt) => {
                cx.note(Note::info("vm-defaults", format!("what VMs do in doubt was changed: {on_doubt:?}")));
                settings.vms.on_doubt = on_doubt;
            }
            SettingsChange::SetApdAfter(span) => {
                let text = format!("a datastore that is silent for {} ms counts as down now", span.as_millis());
                cx.note(Note::info("apd-after", text));
                settings.vms.apd_after = span;
            }
            SettingsChange::SetForeignMigration(policy) => {
                let what = if policy == ForeignMigration::Allow { "allowed" } else { "refused" };
                cx.note(Note::info("foreign-migration", format!("'virsh migrate' of protected VMs is {what} now")));
                settings.foreign_migration = policy;
            }
            SettingsChange::SetGuests(guests) => {
                let (rules, permissions) = (guests.rules.len(), guests.permissions.len());
                let text = format!("guests have {rules} rule(s) and {permissions} permission(s) now");
                cx.note(Note::info("guest-policy", text));
                settings.guests = *guests;
            }
            SettingsChange::SetRules(rules) => {
                cx.note(Note::info("vm-rules", "the rules for order and places of VMs were changed"));
                settings.rules = *rules;
            }
            SettingsChange::EnterMaintenance { host } => {
                let vms = self.running_on(host);
                let text = format!("{} is in maintenance now: {} VM(s) are moved away", self.name_of(host), vms.len());
                cx.note(Note::info("maintenance", text));
                settings.maintenance.retain(|one| one.host != host);
                settings.maintenance.push(Maintenance { host, vms, ends: false });
            }
            SettingsChange::LeaveMaintenance { host, back } => {
                let name = self.name_of(host);
                cx.note(Note::info("maintenance", format!("maintenance of {name} ends")));
                for one in settings.maintenance.iter_mut().filter(|one| one.host == host) {
                    one.ends = true;
                    if !back {
                        one.vms.clear();
                    }
                }
            }
            SettingsChange::ReleaseHost { host } => {
                for member in settings.members.iter_mut().filter(|member| member.host == host) {
                    member.released += 1;
                }
            }
            SettingsChange::EndMaintenance { host } => {
                cx.note(Note::info("maintenance", format!("maintenance of {} is over", self.name_of(host))));
                settings.maintenance.retain(|one| one.host != host);
            }
            SettingsChange::AcceptDatastore { name } => {
                // Above that of each other, too: generations of a VM whose home moved here have counted on from there.
                let highest = settings.datastores.iter().map(|datastore| datastore.accepted).max().unwrap_or_default();
                for datastore in settings.datastores.iter_mut().filter(|datastore| datastore.name == name) {
                    datastore.accepted = highest + 1;
                }
            }
            other => super::power::devices::change(&mut settings, other).into_iter().for_each(|note| cx.note(note)),
        }
        self.use_settings(cx, settings);
        let others: Vec<HostId> = self.peers.keys().copied().collect();
        for host in others {
            cx.send(host, Request::Settings(Box::new(self.settings.clone())), FORWARD / 6, Pending::Nothing);
        }
    }

    /// Another host has a newer document of the same cluster.
    pub(super) fn take_settings(&mut self, cx: &mut Cx, newer: ClusterSettings) {
        if newer.cluster != self.settings.cluster || newer.version <= self.settings.version {
            return;
        }
        if newer.member(self.me.host).is_none_or(|member| member.index != self.index) {
            return cx.note(Note::alarm("settings", "a settings document that does not name this host was refused"));
        }
        self.use_settings(cx, newer);
    }

    fn use_settings(&mut self, cx: &mut Cx, settings: ClusterSettings) {
        let before = std::mem::replace(&mut self.settings, settings);
        self.follow_settings(cx.now);
        let risen = |datastore: &&DatastoreSettings| {
            before.datastore(datastore.id).is_some_and(|old| old.accepted < datastore.accepted)
        };
        let accepted: Vec<_> = self.settings.datastores.iter().filter(risen).map(|datastore| datastore.id).collect();
        accepted.into_iter().for_each(|id| self.accepted_anew(cx, id));
        let rose = |member: &&MemberSettings| {
            before.member(member.host).is_some_and(|before| before.released < member.released)
        };
        let released: Vec<HostId> = self.settings.members.iter().filter(rose).map(|member| member.host).collect();
        for host in released {
            let text = format!("an operator ends the quarantine of {}", self.name_of(host));
            self.end_quarantine(cx, host, text);
        }
        cx.save(&self.settings);
        self.list_domains(cx); // What lies on a datastore may have changed.
        self.list_claims(cx);
        self.read_stores_soon(cx);
        self.tell_beat(cx);
    }

    // ---- VMs ----------------------------------------------------------------------------------------------------

    /// Claims reach other hosts only when something happens: before a person's wish is carried out or passed on, the
    /// newest claim is read, as far as the datastores answer.
    fn look_first(&mut self, cx: &mut Cx, ask: AskId, command: VmCommand) {
        let homes: Vec<_> = self.settings.datastores.iter().map(|datastore| datastore.id).collect();
        if homes.is_empty() {
            return self.command(cx, ask, None, command);
        }
        for home in &homes {
            let order = StoreOrder::ReadClaims(ClaimsOf::Vms(vec![command.vm()]));
            cx.store(*home, order, LOOK, Pending::Wish(ask));
        }
        self.wishes.insert(ask, (command, homes.len()));
    }

    pub(super) fn looked(&mut self, cx: &mut Cx, ask: AskId, answer: StoreAnswer) {
        if let StoreAnswer::Claims { ended, claims, .. } = answer {
            claims.into_iter().for_each(|claim| self.learn(cx, claim, ended));
        }
        let Some((_, left)) = self.wishes.get_mut(&ask) else { return };
        *left -= 1;
        if *left == 0
            && let Some((command, _)) = self.wishes.remove(&ask)
        {
            self.command(cx, ask, None, command);
        }
    }

    fn command(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, command: VmCommand) {
        let id = command.vm();
        let here = self.libvirt.domains.contains_key(&id);
        let Some(vm) = self.vms.get(&id) else {
            return cx.answer(ask, Reply::Denied(Denial::UnknownVm));
        };
        let owner = vm.claim.as_ref().and_then(crate::types::Claim::owner).map(|owner| owner.host);
        // Only the host that saved its memory can restore it.
        let saver = vm.claim.as_ref().filter(|claim| claim.reason == ClaimReason::Saved).map(|claim| claim.maker);
        if let (VmCommand::Start { .. }, Some(saver), None) = (&command, saver, from)
            && self.is_heard(saver, cx.now)
        {
            return self.forward(cx, ask, from, Some(saver), Request::Vm(command));
        }
        match owner {
            Some(owner) if owner != self.me.host => self.forward(cx, ask, from, Some(owner), Request::Vm(command)),
            Some(_) => self.command_here(cx, ask, from, command),
            None if here || vm.claim.is_some() => self.command_here(cx, ask, from, command),
            None => {
                let holder = self.peers.keys().copied().find(|host| self.report_of(*host, id).is_some());
                match holder {
                    Some(host) => self.forward(cx, ask, from, Some(host), Request::Vm(command)),
                    None => cx.answer(ask, Reply::Denied(Denial::UnknownVm)),
                }
            }
        }
    }

    fn command_here(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, command: VmCommand) {
        match command {
            VmCommand::SetOnDoubt { vm, on_doubt } => self.set_on_doubt(cx, ask, from, vm, on_doubt),
            VmCommand::Move { vm, to } => self.begin_move(cx, vec![ask], vm, to),
            VmCommand::Stop { vm, force } => self.stop(cx, ask, vm, force),
            VmCommand::Start { vm } => self.start_here(cx, ask, vm),
        }
    }

    fn stop(&mut self, cx: &mut Cx, ask: AskId, id: VmId, force: bool) {
        let vm = self.vm(id);
        let busy = vm.attempt.is_some() || vm.moving.is_some();
        let Some(claim) = vm.claim.clone() else {
            return cx.answer(ask, Reply::Denied(Denial::Unable("it is not protected; use virsh".into())));
        };
        if busy {
            return cx
                .answer(ask, Reply::Denied(Denial::Unable("it is being worked on; try again in a moment".into())));
        }
        if let Holder::Handover { .. } = claim.holder {
            return cx.answer(ask, Reply::Denied(Denial::Unable("a person migrates it; try again in a moment".into())));
        }
        if claim.owner().is_none() {
            if claim.wanted == Wanted::Stopped {
                return cx.answer(ask, Reply::AlreadySo);
            }
            let kind = Kind::Release { wanted: Wanted::Stopped, reason: ClaimReason::StoppedByPerson };
            return self.begin(cx, id, kind, claim.home, vec![ask]);
        }
        let order = if force { DomainOrder::Destroy { vm: id } } else { DomainOrder::Shutdown { vm: id } };
        cx.domain(order, CALL, Pending::Stop(id, ask));
    }

    pub(super) fn stop_done(&mut self, cx: &mut Cx, id: VmId, ask: AskId, answer: DomainAnswer) {
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => self.vm(id).stopping.push(ask), // Answered at its release.
            DomainAnswer::Failed(why) => {
                cx.answer(ask, Reply::Denied(Denial::Unable(format!("libvirt does not stop it: {why:?}"))));
            }
        }
    }

    fn start_here(&mut self, cx: &mut Cx, ask: AskId, id: VmId) {
        if let Err(denial) = self.may_start_here(id, cx.now) {
            return cx.answer(ask, Reply::Denied(denial));
        }
        let vm = self.vm(id);
        if vm.attempt.is_some() || vm.moving.is_some() || vm.incoming.is_some() {
            return cx
                .answer(ask, Reply::Denied(Denial::Unable("it is being worked on; try again in a moment".into())));
        }
        let Some(claim) = vm.claim.clone() else {
            return cx
                .answer(ask, Reply::Denied(Denial::Unable("it has no claim yet; start it once with virsh".into())));
        };
        if claim.holder == Holder::Deleted {
            let why = "it was deleted; define it again and start it with virsh";
            return cx.answer(ask, Reply::Denied(Denial::Unable(why.into())));
        }
        let proof = self.proof_of(&claim, cx.now, cx.now).unwrap_or(Proof::Unowned);
        let kind = Kind::Run { proof, reason: ClaimReason::StartedByPerson };
        self.begin(cx, id, kind, claim.next_home(), vec![ask]);
    }

    // ---- reports ------------------------------------------------------------------------------------------------

    pub(super) fn report(&mut self, cx: &mut Cx) {
        cx.set(Timer::Report, cx.now + REPORT);
        let Some(master) = self.master() else { return };
        if master != self.me.host {
            let report = self.host_report(cx.now);
            cx.send(master, Request::Report(Box::new(report)), self.settings.timing.suspect, Pending::Nothing);
        }
    }

    /// What this host says of itself.
    pub(super) fn host_report(&self, now: Time) -> HostReport {
        let mut vms: Vec<VmReport> = Vec::new();
        for (id, vm) in &self.vms {
            let domain = self.libvirt.domains.get(id);
            let mine = vm.claim.as_ref().is_some_and(|claim| claim.names(self.me.host) || claim.maker == self.me.host);
            if domain.is_none() && !mine {
                continue;
            }
            let row = vm.tenure().and_then(|tenure| self.guard.rows.get(&tenure));
            vms.push(VmReport {
                vm: *id,
                name: vm.name.clone(),
                claim: if mine { vm.claim.clone() } else { None },
                domain: domain.map(|domain| domain.state),
                stopped: row.is_some_and(|row| row.stopped),
                memory_kib: vm.memory_kib(),
                vcpus: vm.vcpus(),
                inside: vm.inside,
                doing: self.doing(vm),
                unprotected: vm.record.as_ref().and_then(|record| record.as_ref().err().cloned()),
                on_doubt: vm.own_on_doubt().flatten(),
            });
        }
        HostReport {
            host: self.me.host,
            capacity: self.own_capacity(),
            libvirt: self.libvirt.up,
            vms,
            over: self.over_for_master(now),
        }
    }
}
