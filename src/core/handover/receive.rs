//! The target's side of the hook's question: may a person's migration come in?
//!
//! ```text
//!   Reading claim g ─► Expecting: row (v, g+1) ─► Asking the source ─► allowed
//!        │ no               │ no                     │ no: row withdrawn     │ nobody: said over
//!        └──────────────────┴────────► refused ◄─────┴───────────────────────┘
//! ```
//!
//! What was said to be over stays so: a row that was abandoned is never used again, the source makes a claim between.

use serde::{Deserialize, Serialize};

use super::*;
use crate::core::event::Outcome;
use crate::types::Ticket;
use crate::types::store::{ClaimsOf, StoreAnswer, StoreOrder};

/// Until the guard bars the row of a QEMU that libvirt was allowed to start.
const APPEARS: Duration = Duration::from_secs(20);
/// The hook's time, as for a start.
const HOOK_LIMIT: Duration = Duration::from_millis(2500);

/// The question under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Receiving {
    ask: AskId,
    stage: Stage,
    ticket: Ticket,
    /// The generation that this host's guard was asked to hold a row of.
    tenure: Option<Tenure>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Stage {
    Reading,
    Expecting,
    Asking,
}

impl Core {
    /// The hook asks whether a person's migration may come in.
    pub(in crate::core) fn receive(&mut self, cx: &mut Cx, ask: AskId, id: VmId, home: DatastoreId) {
        let order = StoreOrder::ReadClaims(ClaimsOf::Vms(vec![id]));
        let ticket = cx.store(home, order, HOOK_LIMIT, Pending::Receive(id));
        let receiving = Receiving { ask, stage: Stage::Reading, ticket, tenure: None };
        self.vm(id).handover = Handover { receiving: Some(receiving), ..Handover::default() };
        cx.set(Timer::Receive(id), cx.now + HOOK_LIMIT);
    }

    pub(in crate::core) fn receive_done(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, outcome: Outcome) {
        let Some(receiving) = self.vms.get(&id).and_then(|vm| vm.handover.receiving.clone()) else { return };
        if receiving.ticket != ticket {
            return;
        }
        match (receiving.stage, outcome) {
            (Stage::Reading, Outcome::Store(StoreAnswer::Claims { ended, claims, bad, .. })) => {
                claims.into_iter().for_each(|claim| self.learn(cx, claim, ended));
                match bad.into_iter().next() {
                    Some((_, why)) => self.refuse(cx, id, &format!("its newest claim cannot be read: {why}")),
                    None => self.receive_claim(cx, id),
                }
            }
            (Stage::Reading, Outcome::Store(StoreAnswer::Failed(why))) => {
                self.refuse(cx, id, &format!("its claims cannot be read: {why}"));
            }
            (Stage::Expecting, Outcome::Guard(Ok(()))) => self.ask_source(cx, id),
            (Stage::Expecting, Outcome::Guard(Err(why))) => self.refuse(cx, id, &format!("the guard refuses: {why}")),
            (Stage::Asking, Outcome::Reply(reply)) => self.source_answered(cx, id, &receiving, reply),
            _ => {}
        }
    }

    fn receive_claim(&mut self, cx: &mut Cx, id: VmId) {
        let Some(claim) = self.vm(id).claim.clone() else { return self.allow(cx, id) }; // Not protected.
        let name = self.vm_name(id);
        if self.settings.foreign_migration == ForeignMigration::Refuse {
            let why = format!(
                "this cluster refuses 'virsh migrate' of protected VMs (foreign-migration=refuse); use \
                 'mainstay vm move {name} --to {}'",
                self.name_of(self.me.host)
            );
            return self.refuse(cx, id, &why);
        }
        let owner = match self.may_come(&claim) {
            Ok(owner) => owner,
            Err(why) => return self.refuse(cx, id, &why),
        };
        let tenure = Tenure { vm: id, generation: claim.tenure.generation.next() };
        if matches!(self.guard.rows.get(&tenure).map(|row| row.state), Some(VmState::Over(_))) {
            // What was said to be over stays so: the source makes a claim in between.
            cx.send(owner.host, Request::Spent { tenure }, HOOK_LIMIT, Pending::Nothing);
            return self.refuse(cx, id, "an earlier try is being cleared away; try again in a moment");
        }
        let deadline = cx.now + APPEARS;
        let ticket = cx.guard(GuardOrder::Receive { tenure, name, home: claim.home, deadline }, Pending::Receive(id));
        self.receive_stage(id, Stage::Expecting, ticket, Some(tenure));
    }

    /// From whom it may come, by its newest claim.
    fn may_come(&self, claim: &Claim) -> Result<Owner, String> {
        if self.going_down {
            return Err("this host goes down".into());
        }
        match claim.holder {
            Holder::Host(owner) if owner.host == self.me.host => Err("its newest claim names this very host".into()),
            Holder::Host(owner) => Ok(owner),
            Holder::Handover { .. } => Err("another migration of it is not over yet; try again in a moment".into()),
            Holder::None => {
                Err("it belongs to no host of the cluster: stop it where it runs, and start it here".into())
            }
            Holder::Moved { .. } => Err("its home is being moved to another datastore; try again in a moment".into()),
            Holder::Deleted => Err("it was deleted".into()),
        }
    }

    fn ask_source(&mut self, cx: &mut Cx, id: VmId) {
        let (Some(claim), Some(incarnation)) = (self.vm(id).claim.clone(), self.guard.incarnation) else { return };
        let Some(owner) = claim.owner() else { return self.withdraw(cx, id, "its claims changed meanwhile") };
        let to = Owner { host: self.me.host, boot: self.me.boot, incarnation };
        let request = Request::Handover(Box::new(HandoverOrder { claim, to }));
        let ticket = cx.send(owner.host, request, HOOK_LIMIT, Pending::Receive(id));
        let tenure = self.vm(id).handover.receiving.as_ref().and_then(|receiving| receiving.tenure);
        self.receive_stage(id, Stage::Asking, ticket, tenure);
    }

    fn source_answered(&mut self, cx: &mut Cx, id: VmId, receiving: &Receiving, reply: Result<Reply, String>) {
        match reply {
            Ok(Reply::Claimed(claim)) if Some(claim.tenure) == receiving.tenure => {
                self.learn(cx, *claim, cx.now);
                let stands = receiving.tenure.and_then(|tenure| self.guard.rows.get(&tenure)).map(|row| row.state);
                if stands == Some(VmState::Incoming) && self.comes_in(id) {
                    return self.allow(cx, id);
                }
                self.give_back(cx, id, "this host's lease lapsed meanwhile");
            }
            Ok(Reply::Denied(denial)) => self.withdraw(cx, id, &format!("its source refuses: {denial}")),
            Ok(_) => self.give_back(cx, id, "its source could not make the claim in time"),
            Err(why) => self.give_back(cx, id, &format!("its source's agent does not answer: {why}")),
        }
    }

    /// The hook's patience is over.
    pub(in crate::core) fn receive_due(&mut self, cx: &mut Cx, id: VmId) {
        match self.vms.get(&id).and_then(|vm| vm.handover.receiving.as_ref()).map(|receiving| receiving.stage) {
            Some(Stage::Reading) => self.refuse(cx, id, "its datastore does not answer in time"),
            Some(Stage::Expecting) => self.withdraw(cx, id, "this host's guard does not answer in time"),
            Some(Stage::Asking) => self.give_back(cx, id, "its source's agent does not answer in time"),
            None => {}
        }
    }

    fn receive_stage(&mut self, id: VmId, stage: Stage, ticket: Ticket, tenure: Option<Tenure>) {
        if let Some(receiving) = &mut self.vm(id).handover.receiving {
            (receiving.stage, receiving.ticket, receiving.tenure) = (stage, ticket, tenure);
        }
    }

    fn allow(&mut self, cx: &mut Cx, id: VmId) {
        cx.unset(Timer::Receive(id));
        if let Some(receiving) = self.vm(id).handover.receiving.take() {
            cx.hook_answer(receiving.ask, Ok(()));
        }
        self.check = true;
        self.tell = true;
    }

    fn refuse(&mut self, cx: &mut Cx, id: VmId, why: &str) {
        cx.unset(Timer::Receive(id));
        let name = self.vm_name(id);
        if let Some(receiving) = self.vm(id).handover.receiving.take() {
            cx.hook_answer(receiving.ask, Err(format!("mainstay: {name} is not migrated here: {why}")));
        }
        self.check = true;
    }

    /// No claim names this host, and none will: the row goes without a word, so that this generation stays usable.
    fn withdraw(&mut self, cx: &mut Cx, id: VmId, why: &str) {
        if let Some(tenure) = self.vm(id).handover.receiving.as_ref().and_then(|receiving| receiving.tenure) {
            cx.guard(GuardOrder::Forget { tenure }, Pending::Nothing);
        }
        self.refuse(cx, id, why);
    }

    /// A claim may name this host: the guard says that it never started here, and the source takes it back.
    fn give_back(&mut self, cx: &mut Cx, id: VmId, why: &str) {
        if let Some(tenure) = self.vm(id).handover.receiving.as_ref().and_then(|receiving| receiving.tenure) {
            cx.guard(GuardOrder::Abandon { tenure }, Pending::Nothing);
        }
        self.refuse(cx, id, why);
    }

    /// Whether its newest claim hands it to this host, whose guard waits for it.
    pub(in crate::core) fn comes_in(&self, id: VmId) -> bool {
        let Some(claim) = self.vms.get(&id).and_then(|vm| vm.claim.as_ref()) else { return false };
        matches!(claim.holder, Holder::Handover { to, .. } if to.host == self.me.host && to.boot == self.me.boot)
            && self.guard.rows.get(&claim.tenure).map(|row| row.state) == Some(VmState::Incoming)
    }
}
