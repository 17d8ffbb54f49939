//! What other agents and people ask. A person's wish goes to whoever can carry it out: the VM's host, or the master.

use std::time::Duration;

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending, Timer};
use super::event::AskId;
use crate::types::control::{Denial, HostReport, Reply, Request, VmCommand, VmReport};
use crate::types::store::{ClaimsOf, StoreAnswer, StoreOrder};
use crate::types::vm::{DomainAnswer, DomainOrder};
use crate::types::{ClaimReason, Holder, HostId, Proof, Time, VmId, Wanted};

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
            (Request::Run(_) | Request::PutDown(_), Some(from)) if self.is_behind(from) => {
                cx.answer(ask, Reply::Denied(Denial::Unable("the settings here are newer than the master's".into())));
            }
            (Request::Run(order), Some(_)) => self.run_ordered(cx, ask, *order),
            (Request::PutDown(order), Some(_)) => self.put_down(cx, ask, *order),
            (Request::Vm(command), None) => self.look_first(cx, ask, command),
            (Request::Vm(command), from) => self.command(cx, ask, from, command),
            (Request::Incoming(order), Some(from)) => self.incoming(cx, ask, from, *order),
            (Request::Handed { tenure }, Some(from)) => self.handed(cx, ask, from, tenure),
            (Request::Dropped { tenure }, Some(from)) => self.dropped(cx, ask, from, tenure),
            (Request::Yield { vm, whom }, Some(_)) => self.yield_asked(cx, ask, vm, &whom),
            (Request::PoweredOff { host, boot }, Some(_)) => self.told_off(cx, ask, host, boot),
            (Request::Twins { vm, disks, takes }, Some(from)) => {
                self.asked_for_twins(cx, ask, (from, vm), &disks, &takes)
            }
            (Request::WhatIf { hosts }, _) if self.is_master() => self.what_if_asked(cx, ask, &hosts),
            (Request::WhatIf { hosts }, from) => {
                let master = self.master();
                self.forward(cx, ask, from, master, Request::WhatIf { hosts });
            }
            (Request::Evacuate { host, for_shutdown }, from) => {
                self.evacuate_asked(cx, ask, from, (host, for_shutdown));
            }
            (Request::Handover(order), Some(from)) => self.handover_asked(cx, ask, from, *order),
            (Request::Spent { tenure }, Some(_)) => self.spent(cx, ask, tenure),
            (request @ (Request::View | Request::Explain { .. }), from) => self.view_asked(cx, ask, from, request),
            (Request::Notes { .. } | Request::Verdicts(_) | Request::Join(_) | Request::Guest(_), _) => {
                cx.answer(ask, Reply::Denied(Denial::NotAllowed("not for the core".into())));
            }
            (
                Request::Report(_)
                | Request::Settings(_)
                | Request::Run(_)
                | Request::PutDown(_)
                | Request::Incoming(_)
                | Request::Handed { .. }
                | Request::Dropped { .. }
                | Request::PoweredOff { .. }
                | Request::Yield { .. }
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

    fn view_asked(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, request: Request) {
        match self.master() {
            Some(master) if master != self.me.host && from.is_none() && self.is_heard(master, cx.now) => {
                cx.send(master, request, Duration::from_secs(3), Pending::Forward(ask));
            }
            _ => {
                let reply = match request {
                    Request::Explain { vm } => match self.explained(vm, cx.now) {
                        Some(view) => Reply::Explain(Box::new(view)),
                        None => Reply::Denied(Denial::UnknownVm),
                    },
                    _ => Reply::View(Box::new(self.view(cx.now))),
                };
                cx.answer(ask, reply);
            }
        }
    }

    // ---- VMs ----------------------------------------------------------------------------------------------------

    /// Claims reach other hosts only when something happens: before a person's wish is carried out or passed on, the
    /// newest claim is read, as far as the datastores answer.
    fn look_first(&mut self, cx: &mut Cx, ask: AskId, command: VmCommand) {
        if self.keeps_stop(&command, cx.now) {
            return self.wish_stop(cx, ask, &command); // Not a moment later: its restart may be near.
        }
        if let VmCommand::Start { vm } = command {
            self.withdraw_stop(cx, vm);
        }
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

    pub(super) fn command(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, command: VmCommand) {
        if let VmCommand::Retry { vm } = command {
            return self.retry(cx, ask, from, vm);
        }
        let id = command.vm();
        let here = self.libvirt.domains.contains_key(&id);
        if self.keeps_stop(&command, cx.now) && (from.is_none() || self.is_master()) {
            return self.wish_stop(cx, ask, &command);
        }
        let Some(vm) = self.vms.get(&id) else {
            return match self.master() {
                Some(master) if from.is_none() && master != self.me.host => {
                    self.forward(cx, ask, from, Some(master), Request::Vm(command));
                }
                _ => cx.answer(ask, Reply::Denied(Denial::UnknownVm)),
            };
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
            VmCommand::Move { vm, to, by } => self.begin_move(cx, vec![ask], vm, to, by),
            VmCommand::Stop { vm, force } => self.stop(cx, ask, vm, force),
            VmCommand::Start { vm } => self.start_here(cx, ask, vm),
            VmCommand::Retry { vm } => self.retry(cx, ask, from, vm),
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
                takes: vm.takes(),
                inside: vm.inside,
                doing: self.doing(vm),
                unprotected: vm.record.as_ref().and_then(|record| record.as_ref().err().cloned()),
                on_doubt: vm.own_on_doubt().flatten(),
            });
        }
        HostReport {
            host: self.me.host,
            capacity: self.own_capacity(),
            means: self.means.clone(),
            conditions: self.own_conditions(),
            libvirt: self.libvirt.up,
            vms,
            over: self.over_for_master(now),
            stops: self.stops_kept(),
            unreachable: self.unreachable_here(),
        }
    }
}
