//! Twins: the same VM, or another one with the same disks, elsewhere. Asked before a person's start makes a claim (R7).
//!
//! ```text
//!   person starts v here ─► every host that is heard: have you v, or a VM that writes to v's disks?  ─┬─ all say no ─► on
//!                         └► records of VMs whose owner is silent, or that wait for a host: the same ─┘  one says yes: refused
//! ```
//!
//! Claims keep two hosts from running v; but v may run somewhere without a claim, and a clone has a claim of its own.
//! *Has* means: it runs there, is being started, or is owned. A definition that stands is no twin yet: it will be asked about
//! when somebody starts it. Disks that are declared shareable, or only read, may be used by many.
//!
//! The master answers for admission control, too (`foresee`).
//!
//! Hosts that do not answer say nothing (R7): their VMs are known by their claims and records.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Core;
use super::attempt::{Kind, Stage};
use super::cx::{Cx, Pending};
use super::event::{AskId, Outcome};
use super::note::Note;
use crate::types::control::{Denial, Reply, Request, Takes};
use crate::types::store::{StoreAnswer, StoreOrder};
use crate::types::vm::DomainState;
use crate::types::{Claim, HostId, Ticket, VmId, VmRecord, VmState, Wanted};

/// An answer's time; the hook waits 3 s in all.
const ANSWER: Duration = Duration::from_millis(1000);
/// Records of VMs without a living owner that are read before one start. Beyond it they are not looked at: a start must not
/// wait for the failover of a large host, and the image locks are still there.
const MAX_SILENT: usize = 256;
/// A new agent hears from libvirt and its guard within this; until then it does not know what runs here.
const YOUNG: Duration = Duration::from_secs(10);

impl Core {
    /// Asks everybody; the attempt goes on when all have answered.
    pub(super) fn ask_for_twins(&mut self, cx: &mut Cx, id: VmId) {
        let Some(record) = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone()) else {
            return self.twins_done(cx, id);
        };
        let disks: Vec<String> = record.exclusive().map(str::to_owned).collect();
        let takes = Takes::of(&record);
        if self.is_master()
            && let Some(denial) = self.not_admitted(self.me.host, id, &takes, cx.now)
        {
            return self.fail(cx, id, denial);
        }
        if let Some(denial) = self.twin_here(id, &disks).filter(|_| self.is_another(id, &disks)) {
            return self.fail(cx, id, denial);
        }
        let hosts: Vec<HostId> = self.peers.keys().copied().filter(|host| self.is_heard(*host, cx.now)).collect();
        let silent: Vec<Claim> =
            self.vms.iter().filter(|(vm, _)| **vm != id).filter_map(|(_, vm)| vm.claim.clone()).collect();
        let silent: Vec<Claim> = silent
            .into_iter()
            .filter(|claim| claim.wanted == Wanted::Running)
            .filter(|claim| {
                claim.owner().is_none_or(|owner| !hosts.contains(&owner.host) && owner.host != self.me.host)
            })
            .collect();
        let mut open: BTreeMap<Ticket, String> = BTreeMap::new();
        for host in hosts {
            let request = Request::Twins { vm: id, disks: disks.clone(), takes: takes.clone() };
            open.insert(cx.send(host, request, ANSWER, Pending::Twins(id)), self.name_of(host));
        }
        for claim in silent.into_iter().take(MAX_SILENT) {
            let order = StoreOrder::ReadRecord { vm: claim.tenure.vm, digest: claim.record };
            open.insert(cx.store(claim.next_home(), order, ANSWER, Pending::Twins(id)), claim.name);
        }
        let none = open.is_empty();
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.asked = open;
        }
        self.stage_of(id, Stage::Twins);
        if none {
            self.twins_done(cx, id);
        }
    }

    /// One of them has answered.
    pub(super) fn twin_answered(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, outcome: Outcome) {
        let Some(attempt) = self.vm(id).attempt.as_mut().filter(|attempt| attempt.stage == Stage::Twins) else {
            return;
        };
        let disks: Vec<String> = attempt.record.iter().flat_map(VmRecord::exclusive).map(str::to_owned).collect();
        if attempt.asked.remove(&ticket).is_none() {
            return;
        }
        let done = attempt.asked.is_empty();
        let denial = match outcome {
            Outcome::Reply(Ok(Reply::Denied(denial))) => Some(denial),
            Outcome::Store(StoreAnswer::Record(other)) => {
                other.exclusive().find(|disk| disks.iter().any(|ours| ours == disk)).map(|disk| {
                    Denial::Contradiction(format!("its disk {disk} is also {}'s, which is to run", other.name))
                })
            }
            _ => None,
        };
        match denial {
            Some(denial) => self.fail(cx, id, denial),
            None if done => self.twins_done(cx, id),
            None => {}
        }
    }

    fn twins_done(&mut self, cx: &mut Cx, id: VmId) {
        match self.vm(id).attempt.as_ref().map(|attempt| attempt.kind.clone()) {
            Some(Kind::Hook { .. }) => self.write_record(cx, id),
            Some(_) => self.expect(cx, id),
            None => {}
        }
    }

    /// Another host is about to start a VM.
    pub(super) fn asked_for_twins(
        &mut self,
        cx: &mut Cx,
        ask: AskId,
        (from, id): (HostId, VmId),
        disks: &[String],
        takes: &Takes,
    ) {
        let young = cx.now.since(self.me.started) < YOUNG;
        if young && !(self.libvirt.listed && self.guard.settled) {
            let why = format!("{} does not know its own VMs yet; try again in a moment", self.name_of(self.me.host));
            return cx.answer(ask, Reply::Denied(Denial::Unable(why)));
        }
        let admission = || if self.is_master() { self.not_admitted(from, id, takes, cx.now) } else { None };
        let reply = self.twin_here(id, disks).or_else(admission).map_or(Reply::Done, Reply::Denied);
        cx.answer(ask, reply);
    }

    /// Whether this host has the VM, or one that writes to these disks.
    fn twin_here(&self, id: VmId, disks: &[String]) -> Option<Denial> {
        let here = self.name_of(self.me.host);
        for (other, vm) in &self.vms {
            let alive =
                self.libvirt.domains.get(other).is_some_and(|domain| !matches!(domain.state, DomainState::Off(_)));
            let rows = self.guard.rows.iter().filter(|(tenure, _)| tenure.vm == *other);
            let held = rows.into_iter().any(|(_, row)| !matches!(row.state, VmState::Over(_)));
            let starts = vm.attempt.as_ref().is_some_and(super::attempt::Attempt::starts);
            let generation = vm.tenure().map(|tenure| tenure.generation).unwrap_or_default();
            if *other == id && (alive || held) {
                return Some(Denial::OwnedBy { owner: here, generation });
            }
            if *other == id || !(alive || held || starts || self.is_mine(vm)) {
                continue;
            }
            let records = vm.record.iter().filter_map(|record| record.as_ref().ok());
            let records = records.chain(vm.attempt.iter().filter_map(|attempt| attempt.record.as_ref()));
            let shared = records.flat_map(VmRecord::exclusive).find(|disk| disks.iter().any(|theirs| theirs == disk));
            if let Some(disk) = shared {
                let text = format!("its disk {disk} is also {}'s, which runs on {here}", vm.name);
                return Some(Denial::Contradiction(text));
            }
        }
        None
    }

    /// Here, the VM itself is no twin: whether it runs is known from its claim and row.
    fn is_another(&self, id: VmId, disks: &[String]) -> bool {
        matches!(self.twin_here(id, disks), Some(Denial::Contradiction(_)))
    }

    /// It runs here, and its claim names another host: told once, since neither copy may be stopped by guess.
    pub(super) fn runs_twice(&mut self, cx: &mut Cx, id: VmId, host: HostId) {
        let (name, owner) = (self.vm_name(id), self.name_of(host));
        let what = format!("it runs here, but its claim names {owner}");
        let verdict = self.waits_for(cx, id, what.clone());
        if self.vm(id).against.replace(host) != Some(host) {
            let text =
                format!("{name}: {what}; nothing is stopped; see 'mainstay vm explain {name}' and stop the wrong copy");
            cx.note(Note::alarm("runs-against-claim", text).of(&name).by(verdict));
        }
    }
}
