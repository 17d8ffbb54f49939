//! A host that hears nobody: is the network broken elsewhere, or its own link?
//!
//! ```text
//!   nobody heard, 3 beats beyond the suspect time ─► its isolation addresses are asked, with each beat
//!      ├─ one answers ───► the others are cut off, or gone: partitioned
//!      └─ none answers, or there is none ─► isolated: told on the datastores; it takes no VMs of others
//!            └─ somebody else beats on a VM's home ─► the VM's response: leave (default) │ shut down, power off later │ power off
//!                                                     ended ─► released, wanted running ─► others take it at once
//! ```
//!
//! A response stops a VM that could have gone on: it is for people whose VMs are of no use without this host's network. It is not
//! given while nobody else is seen alive on the datastore, who could take the VM over.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Pending};
use super::note::Note;
use crate::types::rules::Response;
use crate::types::vm::{DomainOrder, Underway};
use crate::types::{DatastoreId, Freshness, Ticket, Time, VmId, VmState};

/// Beats beyond the suspect time.
const BEATS: u32 = 3;
/// An order to libvirt.
const CALL: Duration = Duration::from_secs(20);

/// What this host knows of its own connection.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Isolation {
    /// Since when it hears nobody.
    alone: Option<Time>,
    asking: Option<Ticket>,
    /// No isolation address answered.
    isolated: bool,
}

/// A VM was told to end, because of it or to make room.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Responded {
    /// When, for the first time.
    pub(super) since: Time,
    pub(super) destroyed: bool,
}

/// A guest that was told to shut down, and does not for so long, was not impressed: if it ends later that is somebody else's wish.
const IMPRESSED: Duration = Duration::from_secs(600);

impl Core {
    /// This host is cut off from everybody, as far as it can know.
    pub(super) fn is_isolated(&self) -> bool {
        self.isolation.isolated
    }

    /// With each beat.
    pub(super) fn follow_isolation(&mut self, cx: &mut Cx) {
        let heard = self.peers.keys().any(|host| self.is_heard(*host, cx.now));
        if heard || self.peers.is_empty() {
            self.isolation.alone = None;
            return self.no_longer_isolated(cx, "other hosts are heard");
        }
        // What was not heard while it slept itself is no silence; what was known before that stands.
        if cx.now.since(self.awake_since) < self.settings.timing.suspect {
            return;
        }
        let alone = *self.isolation.alone.get_or_insert(cx.now);
        if cx.now.since(alone) < self.settings.timing.beat * BEATS {
            return;
        }
        if self.isolation.asking.is_none() {
            self.isolation.asking = Some(cx.ask_network(self.settings.timing.beat, Pending::Network));
        }
        if self.isolation.isolated && self.disarmed().is_none() {
            self.respond(cx);
        }
    }

    /// Whether an isolation address has answered.
    pub(super) fn network_answered(&mut self, cx: &mut Cx, ticket: Ticket, answered: bool) {
        if self.isolation.asking != Some(ticket) {
            return;
        }
        self.isolation.asking = None;
        if answered {
            return self.no_longer_isolated(cx, "an isolation address answers");
        }
        if self.isolation.alone.is_some() && !std::mem::replace(&mut self.isolation.isolated, true) {
            let text = "this host hears no other and reaches no isolation address: it is isolated; VMs are left running, but for those \
                        whose isolation response says otherwise";
            cx.note(Note::alarm("isolated", text));
            self.tell_beat(cx);
        }
    }

    fn no_longer_isolated(&mut self, cx: &mut Cx, why: &str) {
        if std::mem::take(&mut self.isolation.isolated) {
            cx.note(Note::info("isolated", format!("this host is not isolated any more: {why}")));
            self.vms
                .values_mut()
                .filter(|vm| vm.responded.is_some_and(|it| !it.destroyed))
                .for_each(|vm| vm.responded = None);
            self.tell_beat(cx);
            self.look = true;
        }
    }

    /// VMs that run here are ended as their responses say.
    fn respond(&mut self, cx: &mut Cx) {
        let meaning = self.meaning();
        let runs = |id: &VmId| {
            let row = |tenure| self.guard.rows.get(&tenure).map(|row| row.state);
            let tenure = self.vms.get(id).filter(|vm| self.is_mine(vm)).and_then(super::vms::Vm::tenure);
            tenure.and_then(row) == Some(VmState::Running)
        };
        let ids: Vec<VmId> = self.libvirt.domains.keys().copied().filter(runs).collect();
        for id in ids {
            let home = self.vms.get(&id).and_then(|vm| vm.claim.as_ref()).map(crate::types::Claim::next_home);
            if home.is_some_and(|home| self.others_live_on(home, cx.now)) {
                self.respond_for(cx, id, meaning.response(id));
            }
        }
    }

    fn respond_for(&mut self, cx: &mut Cx, id: VmId, response: Response) {
        let busy = !matches!(self.underway.get(&id), None | Some(Underway::End));
        let name = self.vm_name(id);
        let vm = self.vm(id);
        if busy || vm.attempt.is_some() || vm.moving.is_some() {
            return; // With the next beat.
        }
        let before = self.vm(id).responded;
        let since = before.map_or(cx.now, |before| before.since);
        let destroys = match response {
            Response::Leave => return,
            Response::PowerOff => true,
            Response::Shutdown { within_s } => Duration::from_secs(within_s.into()) <= cx.now.since(since),
        };
        if before.is_some_and(|before| before.destroyed || !destroys) {
            return;
        }
        self.vm(id).responded = Some(Responded { since, destroyed: destroys });
        let what = if destroys { "powered off" } else { "shut down" };
        let text = format!(
            "this host is isolated: {name} is {what}, as its isolation response says, so that another host can run it"
        );
        cx.note(Note::warning("isolation-response", text).of(&name));
        self.set_underway(cx, id, Some(Underway::End));
        let order = if destroys { DomainOrder::Destroy { vm: id } } else { DomainOrder::Shutdown { vm: id } };
        cx.domain(order, CALL, Pending::Nothing);
    }

    /// It runs, although this agent or the one before has told it to end.
    pub(super) fn does_not_end(&mut self, cx: &mut Cx, id: VmId) {
        let told = *self.vm(id).responded.get_or_insert(Responded { since: cx.now, destroyed: false });
        let most = if told.destroyed { CALL * 2 } else { IMPRESSED };
        if most < cx.now.since(told.since) && !self.is_isolated() {
            self.vm(id).responded = None;
            self.set_underway(cx, id, None);
        }
    }

    /// Somebody else is alive there, and could take a VM over.
    pub(super) fn others_live_on(&self, home: DatastoreId, now: Time) -> bool {
        self.peers.keys().any(|host| self.freshness(home, *host, now) == Some(Freshness::Fresh))
    }

    /// It is isolated, and others live: what is over there is theirs to take.
    pub(super) fn leaves_to_others(&self, now: Time) -> bool {
        self.is_isolated() && self.settings.datastores.iter().any(|datastore| self.others_live_on(datastore.id, now))
    }
}
