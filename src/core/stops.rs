//! Stops that people want of VMs whose hosts are gone: written down as soon as that may be, by a host that can.
//!
//! ```text
//!   vm stop v, its owner is not heard ─► wish for claim g, kept where it was asked, told to each master with the report
//!                                           │ (v, g) is over                          │ v was claimed anew meanwhile
//!                                           ▼                                         ▼
//!              some host that reaches v's home: g+1 "none, wanted stopped"      the new owner is asked to stop it
//! ```
//!
//! A wish is for one claim: it can never stop what was started after it. The design calls this a pending write (4-storage.md); only the
//! person's word is kept, the claims say the rest.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending};
use super::event::AskId;
use super::failover::{Candidate, ORDER_TIME, Placing};
use super::note::Note;
use crate::types::control::{Denial, Reply, Request, RunOrder, VmCommand};
use crate::types::store::{ClaimsOf, StoreOrder};
use crate::types::{ClaimReason, HostId, Proof, Tenure, Time, VmId, Wanted};

/// At most so many; beyond it a stop is refused.
pub const MAX_STOPS: usize = 256;
/// One that nothing came of is forgotten after this.
const KEPT: Duration = Duration::from_secs(3600);
/// The claim is looked for again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// A person's wish.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stop {
    /// Of the claim that was the newest.
    tenure: Tenure,
    since: Time,
    looked: Time,
    /// Somebody wants it ended at once, should it run meanwhile.
    force: bool,
    asks: Vec<AskId>,
}

impl Core {
    /// Whether that can be no more than a wish: its owner is not heard.
    pub(super) fn keeps_stop(&self, command: &VmCommand, now: Time) -> bool {
        let VmCommand::Stop { vm, .. } = command else { return false };
        let owner = self.vms.get(vm).and_then(|vm| vm.claim.as_ref()?.owner());
        owner.is_some_and(|owner| owner.host != self.me.host && !self.is_heard(owner.host, now))
    }

    /// Its owner is not heard: the wish is kept.
    pub(super) fn wish_stop(&mut self, cx: &mut Cx, ask: AskId, command: &VmCommand) {
        let (id, force) = (command.vm(), matches!(command, VmCommand::Stop { force: true, .. }));
        let Some(tenure) = self.vms.get(&id).and_then(super::vms::Vm::tenure) else {
            return cx.answer(ask, Reply::Denied(Denial::UnknownVm));
        };
        if MAX_STOPS <= self.stops.len() && !self.stops.contains_key(&id) {
            return cx.answer(ask, Reply::Denied(Denial::Unable("too many stops wait already".into())));
        }
        let name = self.vm_name(id);
        let new = Stop { tenure, since: cx.now, looked: cx.now, force, asks: Vec::new() };
        let stop = self.stops.entry(id).or_insert(new);
        if stop.asks.is_empty() {
            let text = format!("{name} is to be stopped by a person: as soon as its host has let go of it");
            cx.note(Note::info("vm-stop-waits", text).of(&name));
        }
        stop.asks.push(ask);
        stop.force |= force;
        (self.look, self.tell) = (true, true);
    }

    /// A person wants it started after all.
    pub(super) fn withdraw_stop(&mut self, cx: &mut Cx, id: VmId) {
        let Some(stop) = self.stops.remove(&id) else { return };
        let name = self.vm_name(id);
        cx.note(
            Note::info("vm-stop-waits", format!("{name} is not to be stopped any more: its start is wanted")).of(&name),
        );
        let why = "it is wanted started since";
        stop.asks.into_iter().for_each(|ask| cx.answer(ask, Reply::Denied(Denial::Unable(why.into()))));
        (self.look, self.tell) = (true, true);
    }

    /// What this host keeps, for the master.
    pub(super) fn stops_kept(&self) -> Vec<Tenure> {
        self.stops.values().map(|stop| stop.tenure).collect()
    }

    /// Whether a person wants that, instead of another start.
    pub(super) fn shall_stop(&self, tenure: Tenure, now: Time) -> bool {
        let of_peers = || {
            let heard = self.peers.iter().filter(|(host, _)| self.is_heard(**host, now));
            heard.filter_map(|(_, peer)| peer.report.as_ref()).any(|report| report.stops.contains(&tenure))
        };
        self.stops.get(&tenure.vm).is_some_and(|stop| stop.tenure == tenure) || of_peers()
    }

    /// What has become of the wishes that are kept here.
    pub(super) fn follow_stops(&mut self, cx: &mut Cx) {
        for (id, stop) in self.stops.clone() {
            let claim = self.vms.get(&id).and_then(|vm| vm.claim.clone());
            match claim {
                Some(claim) if stop.tenure.generation < claim.tenure.generation => {
                    self.stops.remove(&id);
                    for ask in stop.asks {
                        if claim.wanted == Wanted::Stopped {
                            cx.answer(ask, Reply::Done);
                        } else {
                            self.command(cx, ask, None, VmCommand::Stop { vm: id, force: stop.force }); // Somebody else was faster.
                        }
                    }
                }
                _ if stop.since + KEPT <= cx.now => {
                    self.stops.remove(&id);
                    let why = "nobody could say that its host has let go of it";
                    stop.asks.into_iter().for_each(|ask| cx.answer(ask, Reply::Denied(Denial::Waiting(why.into()))));
                }
                _ if stop.looked + AGAIN <= cx.now => {
                    if let Some(stop) = self.stops.get_mut(&id) {
                        stop.looked = cx.now;
                    }
                    for home in self.stores.keys().copied().collect::<Vec<_>>() {
                        cx.store(home, StoreOrder::ReadClaims(ClaimsOf::Vms(vec![id])), AGAIN, Pending::Stopped(home));
                    }
                }
                _ => {}
            }
        }
    }

    /// The master: (v, g) is over, and it shall not run. Any host that reaches its home can write that.
    pub(super) fn order_stop(&mut self, cx: &mut Cx, candidate: &Candidate, proof: Proof) {
        let (id, home) = (candidate.id, candidate.claim.next_home());
        let reaches = |host: &HostId| self.is_heard(*host, cx.now) && self.reaches(*host, home, cx.now);
        let failed = |host: &HostId| self.vms.get(&id).is_some_and(|vm| vm.tries.bars(*host).is_some());
        let members = self.settings.members.iter().map(|member| member.host);
        let first = std::iter::once(self.me.host).chain(members).find(|host| reaches(host) && !failed(host));
        let Some(host) = first else {
            let store = self.store_name(home);
            return self.waits(cx, id, format!("a host that reaches {store}, where its stop is written down"));
        };
        self.waits_no_more(cx, id);
        let reason = ClaimReason::StoppedByPerson;
        if host == self.me.host {
            return self.begin(cx, id, Kind::Release { wanted: Wanted::Stopped, reason }, home, Vec::new());
        }
        let order = RunOrder { claim: candidate.claim.clone(), proof, reason };
        let ticket = cx.send(host, Request::PutDown(Box::new(order)), ORDER_TIME, Pending::Placed(id, host));
        self.vm(id).placing = Some(Placing::new(host, ticket, cx.now));
    }

    /// "Nobody owns it, and it shall not run". What its last owner may still write stays owed: only the proof's finder knows better.
    pub(super) fn put_down(&mut self, cx: &mut Cx, ask: AskId, order: RunOrder) {
        let (id, home) = (order.claim.tenure.vm, order.claim.next_home());
        let free = self.may_follow(cx, &order);
        let incoming = self.vm(id).incoming.is_some();
        match free {
            Err(denial) => cx.answer(ask, Reply::Denied(denial)),
            Ok(()) if incoming => {
                cx.answer(ask, Reply::Denied(Denial::Unable("a move of it to here is under way".into())))
            }
            Ok(()) => {
                self.begin(cx, id, Kind::Release { wanted: Wanted::Stopped, reason: order.reason }, home, vec![ask])
            }
        }
    }
}
