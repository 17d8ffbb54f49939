//! The master: which VMs must run again, where, and what those wait for that cannot yet.
//!
//! ```text
//!   wanted running, newest claim over by a proof ──► placed (`restarts`) ──► ordered (Run) ──► runs
//!          │ no proof yet, late writes not excluded     │ no room       │ denied
//!          ▼                                            ▼               ▼
//!        waits, says for what  ◄────────────────────────┴── other host, later again
//! ```
//!
//! Orders carry claim and proof; the host that runs the VM creates exactly g+1. Whoever is master can be wrong: the
//! claims decide.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending, Timer};
use super::note::Note;
use super::proofs::LateWrite;
use super::tries::Tries;
use super::verdicts::Kind as Ruled;
use crate::mutants::{Mutant, planted};
use crate::types::control::{Denial, Reply, Request, RunOrder};
use crate::types::vm::DomainState;
use crate::types::{
    Against, Claim, ClaimReason, Debt, Holder, HostId, Over, Owner, Proof, Tenure, Ticket, Time, VmId, Wanted,
};

/// An order under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Placing {
    /// Who shall run it.
    pub host: HostId,
    ticket: Ticket,
    since: Time,
}

impl Placing {
    pub(super) fn new(host: HostId, ticket: Ticket, since: Time) -> Self {
        Self { host, ticket, since }
    }
}

/// A VM that needs a place.
pub(super) struct Candidate {
    pub(super) id: VmId,
    /// Its newest claim.
    pub(super) claim: Claim,
    /// What proves that to be over, and the only host that may run it, if there is one; none: it is not over yet, but its owner is not
    /// heard, and room is kept for it.
    pub(super) over: Option<(Proof, Option<HostId>)>,
}

/// Nothing is under way here about this VM, and its owner is known.
fn is_idle(vm: &super::vms::Vm) -> bool {
    vm.attempt.is_none() && vm.moving.is_none() && vm.incoming.is_none() && vm.bad.is_none()
}

/// A host that lives is left to mend its own VMs for this long.
const OWNER_TIME: Duration = Duration::from_secs(10);
/// A VM that nobody can take is looked at again after this.
const RETRY: Duration = Duration::from_secs(2);
/// An order's answer: starting may take a while, a lock may be waited for.
pub(super) const ORDER_TIME: Duration = Duration::from_secs(120);

impl Core {
    /// Looks at every VM that should run and does not.
    pub(super) fn fail_over(&mut self, cx: &mut Cx) {
        let wanted: Vec<VmId> = self
            .vms
            .iter()
            .filter(|(_, vm)| vm.wanted() == Some(Wanted::Running) && is_idle(vm))
            .map(|(id, _)| *id)
            .collect();
        if let Some(disarmed) = self.disarmed() {
            let what = format!("'mainstay cluster arm': {}", super::disarm::text(disarmed));
            let unowned: Vec<VmId> = wanted.into_iter().filter(|id| self.is_lost(*id, cx.now)).collect();
            for id in unowned {
                self.waits_for(cx, id, what.clone());
            }
            return;
        }
        let candidates = wanted.into_iter().filter_map(|id| self.candidate(cx, id));
        let (stop, run): (Vec<Candidate>, Vec<Candidate>) =
            candidates.collect::<Vec<_>>().into_iter().partition(|one| self.shall_stop(one.claim.tenure, cx.now));
        for candidate in stop {
            if let Some((proof, _)) = candidate.over {
                self.order_stop(cx, &candidate, proof);
            }
        }
        self.restart(cx, &run);
    }

    /// Nobody who is heard owns it.
    fn is_lost(&self, id: VmId, now: Time) -> bool {
        let claim = self.vms.get(&id).and_then(|vm| vm.claim.as_ref());
        claim.is_some_and(|claim| claim.owners().iter().all(|owner| !self.is_heard(owner.host, now)))
    }

    /// Whether it needs a place, or will when there is a proof.
    fn candidate(&mut self, cx: &mut Cx, id: VmId) -> Option<Candidate> {
        let (claim, known) = self.vms.get(&id).and_then(|vm| vm.claim.clone().map(|claim| (claim, vm.known)))?;
        if let Some(placing) = self.vms.get(&id).and_then(|vm| vm.placing.clone()) {
            // The host that was asked is gone, or its claim has come and gone: the order is void.
            if self.is_heard(placing.host, cx.now) {
                return None;
            }
            self.vm(id).placing = None;
        }
        let passed = self.proof_passed(&claim).is_some();
        let unread =
            |home| self.stores.get(&home).and_then(|store| store.listed).is_none_or(|at| at < self.master_since);
        if !passed && (unread(claim.home) || unread(claim.next_home())) {
            return None; // What happened before this host became master is not read yet.
        }
        let Some(proof) = self.proof_of(&claim, known, cx.now) else {
            let Some(owner) = claim.owners().into_iter().find(|owner| !self.is_heard(owner.host, cx.now)) else {
                self.waits_no_more(cx, id); // Its owner lives and says nothing else.
                return None;
            };
            self.wait_for_proof(cx, id, &claim, owner.host);
            return Some(Candidate { id, claim, over: None });
        };
        if self.left_to_owner(cx, id, &claim, proof) {
            return None;
        }
        let lost = claim.owners().into_iter().find(|owner| !self.is_heard(owner.host, cx.now));
        if lost.is_some_and(|owner| self.holds_back(cx, owner.host)) {
            self.waits_for(cx, id, "a moment: too many hosts were lost at once".to_owned());
            return Some(Candidate { id, claim, over: None });
        }
        if cx.now < self.vm(id).retry {
            let at = self.vm(id).retry;
            cx.set(Timer::Place(id), at);
            return None;
        }
        let tied = self.tied_to(&claim, proof, cx.now);
        // What is only put down writes nothing.
        let stops = self.shall_stop(claim.tenure, cx.now);
        let open = || if stops { None } else { self.late_writes_open(&claim, proof, tied) };
        if let Some(what) = self.homes_wait_for_trust(&claim).or_else(open) {
            self.waits(cx, id, what);
            return None;
        }
        Some(Candidate { id, claim, over: Some((proof, tied)) })
    }

    /// A living owner mends its own VMs: a crash, a lapse, a stop. Only when it does not, the master does.
    fn left_to_owner(&mut self, cx: &mut Cx, id: VmId, claim: &Claim, proof: Proof) -> bool {
        // Of a handover, only a copy that is still there can be mended: what a source says, and a lapse. A target to which
        // nothing has come, and whose guard cannot say so any more, mends nothing.
        let mending: Vec<(Owner, Over)> = match proof {
            Proof::Said(over) => claim.owner().map(|owner| (owner, over)).into_iter().collect(),
            Proof::Both { from, to } => {
                let halves = claim.owners().into_iter().zip([from, to]);
                let said = halves.filter_map(|(owner, half)| match half {
                    Against::Said(over) => Some((owner, over)),
                    Against::Rebooted | Against::Lapsed | Against::PowerOff => None,
                });
                said.filter(|(owner, over)| {
                    claim.maker == owner.host || *over == Over::Lapsed && self.may_have_copy(owner.host, id)
                })
                .collect()
            }
            Proof::Unowned | Proof::Rebooted { .. } | Proof::Lapsed { .. } | Proof::PowerOff => Vec::new(),
        };
        let heard = mending.iter().any(|(owner, _)| self.is_heard(owner.host, cx.now));
        // Not heard, but it beats on a datastore: it lives, and claims anew as soon as it can.
        let lives = heard || mending.iter().any(|(owner, _)| self.beats_somewhere(owner.host, cx.now));
        let lapsed = |(owner, over): &(Owner, Over)| *over == Over::Lapsed && self.is_heard(owner.host, cx.now);
        let waits = mending.iter().any(lapsed);
        if !lives {
            self.vm(id).over_since = None;
            return false;
        }
        let since = *self.vm(id).over_since.get_or_insert(cx.now);
        let stands = cx.now.since(since) < OWNER_TIME || waits;
        if stands {
            cx.set(Timer::Place(id), cx.now + RETRY);
        }
        stands
    }

    /// Whether libvirt there may have a copy, running or not: what was not heard yet is no sign of none.
    fn may_have_copy(&self, host: HostId, id: VmId) -> bool {
        let state = if host == self.me.host {
            if !self.libvirt.up {
                return true;
            }
            self.libvirt.domains.get(&id).map(|domain| domain.state)
        } else {
            let Some(report) = self.peers.get(&host).and_then(|peer| peer.report.as_ref()) else { return true };
            report.vms.iter().find(|vm| vm.vm == id).and_then(|vm| vm.domain)
        };
        !matches!(state, None | Some(DomainState::Off(_)))
    }

    /// Whether late writes of other hosts than `here` cannot be excluded; says what would.
    pub(super) fn late_writes_open(&self, claim: &Claim, proof: Proof, here: Option<HostId>) -> Option<String> {
        let debts = self.debts_after_home(claim, proof);
        let open = debts.iter().find(|debt| Some(debt.host) != here && self.late_write(debt) == LateWrite::Open)?;
        let (host, store) = (self.name_of(open.host), self.store_name(open.datastore));
        Some(format!(
            "a new boot of {host}, or proof that it is off: datastore {store} has no fence for its late writes \
             (mainstay datastore set {store} --fence … or --late-writes accept)"
        ))
    }

    /// A host that lives, and owes late writes of this VM which nothing can exclude without hitting its other VMs, or
    /// nothing at all: the VM can start there, whose kernel keeps its own order, and nowhere else.
    fn tied_to(&self, claim: &Claim, proof: Proof, now: Time) -> Option<HostId> {
        let over = |host| proof.ends_host() && claim.owners().iter().any(|owner| owner.host == host);
        let ties = |debt: &Debt| match self.late_write(debt) {
            LateWrite::Command { .. } => {
                self.runs_vms_on(debt.datastore, debt.host, claim.tenure.vm, over(debt.host), now)
            }
            LateWrite::Open => debt.host == self.me.host || self.is_heard(debt.host, now),
            LateWrite::Lock | LateWrite::Accepted => false,
        };
        self.debts_after_home(claim, proof).iter().find(|debt| ties(debt)).map(|debt| debt.host)
    }

    /// Debts of the next claim. The record names every datastore that is written; the home is always one of them.
    fn debts_after_home(&self, claim: &Claim, proof: Proof) -> Vec<Debt> {
        self.debts_after(claim, Some(proof), &[claim.next_home()].into())
    }

    fn wait_for_proof(&mut self, cx: &mut Cx, id: VmId, claim: &Claim, owner: HostId) {
        let store = self.stores.get(&claim.home);
        let host = self.name_of(owner);
        let what = match store.and_then(|store| store.window_ends(owner)) {
            Some(at) if cx.now < at => format!("the lease of {host} to lapse"),
            _ => format!("a proof that {host} has let go of it"),
        };
        let what = self.waits_for_trust(claim.home).unwrap_or(what);
        self.waits_for(cx, id, what);
    }

    pub(super) fn waits(&mut self, cx: &mut Cx, id: VmId, what: String) {
        let name = self.vm_name(id);
        if self.vm(id).waits.as_ref() != Some(&what) {
            let verdict = self.waits_for(cx, id, what.clone());
            cx.note(Note::warning("vm-waits", format!("{name} waits for {what}")).of(&name).by(verdict));
        }
        self.vm(id).retry = cx.now + RETRY;
        cx.set(Timer::Place(id), cx.now + RETRY);
    }

    /// It shall run there, and for these reasons not on the other hosts.
    pub(super) fn order(
        &mut self,
        cx: &mut Cx,
        id: VmId,
        claim: Claim,
        proof: Proof,
        host: HostId,
        instead: Vec<String>,
    ) {
        let reason = if matches!(claim.holder, Holder::None) && claim.reason == ClaimReason::StartedByPerson {
            ClaimReason::StartedByPerson
        } else {
            ClaimReason::Failover
        };
        let (name, target) = (self.vm_name(id), self.name_of(host));
        let generation = claim.tenure.generation;
        let text = format!(
            "{name} is to run on {target}: generation {generation} is over ({})",
            self.proof_text(&claim, proof)
        );
        let mut evidence = vec![self.claim_line(&claim)];
        self.vm(id).waits = None;
        evidence.extend(self.vm(id).waited.take().map(|what| format!("it had waited for {what}")));
        evidence.extend(instead);
        let verdict = cx.verdict(Ruled::Placed, Some(target), Some(name.clone()), &text, evidence);
        cx.note(Note::warning("vm-restart", text).of(&name).by(Some(verdict)));
        if host == self.me.host {
            return self.begin(cx, id, Kind::Run { proof, reason }, claim.next_home(), Vec::new());
        }
        let order = RunOrder { claim, proof, reason };
        let ticket = cx.send(host, Request::Run(Box::new(order)), ORDER_TIME, Pending::Placed(id, host));
        self.vm(id).placing = Some(Placing::new(host, ticket, cx.now));
    }

    pub(super) fn proof_text(&self, claim: &Claim, proof: Proof) -> String {
        let owner = claim.owner().map_or_else(|| "its owner".to_owned(), |owner| self.name_of(owner.host));
        match proof {
            Proof::Said(over) => self.said_text(&owner, over),
            Proof::Both { from, to } => {
                let halves = claim.owners().into_iter().zip([from, to]);
                let text = |(owner, half): (Owner, Against)| {
                    let owner = self.name_of(owner.host);
                    match half {
                        Against::Said(over) => self.said_text(&owner, over),
                        Against::Rebooted => format!("{owner} has rebooted"),
                        Against::Lapsed => format!("{owner}'s lease lapsed"),
                        Against::PowerOff => format!("{owner} is off"),
                    }
                };
                halves.map(text).collect::<Vec<_>>().join(", ")
            }
            Proof::Unowned => "nobody owns it".to_owned(),
            Proof::Rebooted { .. } => format!("{owner} has rebooted"),
            Proof::Lapsed { window } => format!("{owner}'s lease lapsed: silent for {:.2} s", window.as_secs_f64()),
            Proof::PowerOff => format!("{owner} is off"),
        }
    }

    fn said_text(&self, owner: &str, over: Over) -> String {
        match over {
            Over::Exited { .. } | Over::Draining => format!("{owner} said it ended"),
            Over::NeverStarted => format!("{owner} said it never started"),
            Over::Lapsed => format!("{owner} said its lease lapsed"),
            Over::HandedTo(to) => format!("{owner} handed it to {}", self.name_of(to)),
        }
    }

    pub(super) fn placed_done(
        &mut self,
        cx: &mut Cx,
        id: VmId,
        host: HostId,
        ticket: Ticket,
        reply: Result<Reply, String>,
    ) {
        let stale = self.vms.get(&id).and_then(|vm| vm.placing.as_ref()).is_none_or(|placing| placing.ticket != ticket);
        if stale {
            return;
        }
        let (name, target) = (self.vm_name(id), self.name_of(host));
        let vm = self.vm(id);
        let began = vm.placing.take().map(|placing| placing.since);
        let why = match reply {
            Ok(Reply::Ran { generation }) => {
                vm.tries = Tries::default();
                self.waits_no_more(cx, id);
                self.start_took = began.map(|began| cx.now.since(began));
                cx.note(
                    Note::info("vm-restarted", format!("{name} runs on {target} (generation {generation})")).of(&name),
                );
                self.look = true;
                return;
            }
            Ok(Reply::Denied(Denial::OwnedBy { .. } | Denial::Superseded { .. })) => {
                // No fault of that host: the claims have moved on.
                self.list_claims(cx);
                self.look = true;
                return;
            }
            Ok(Reply::Done) => return, // It was put down; the claim says so.
            Ok(Reply::Denied(denial)) => {
                self.start_failed_on(cx.now, id, host, &denial);
                denial.to_string()
            }
            Ok(_) => {
                let why = "an answer of the wrong kind".to_owned();
                self.start_failed_on(cx.now, id, host, &Denial::Unable(why.clone()));
                why
            }
            Err(why) => {
                self.silent_about_start(cx.now, id, host, why.clone());
                why
            }
        };
        cx.note(Note::warning("vm-start-failed", format!("{name} does not start on {target}: {why}")).of(&name));
        self.list_claims(cx);
        self.look = true;
    }

    /// No longer master: orders under way go on where they are, their answers are nobody's business.
    pub(super) fn drop_placings(&mut self, cx: &mut Cx) {
        self.room = None;
        self.evacuations.clear();
        for (id, vm) in &mut self.vms {
            vm.placing = None;
            (vm.tries, vm.room_again) = (Tries::default(), None);
            cx.unset(Timer::Place(*id));
        }
    }

    /// The master's order has arrived at the host that shall run the VM.
    pub(super) fn run_ordered(&mut self, cx: &mut Cx, ask: super::event::AskId, order: RunOrder) {
        let (id, home) = (order.claim.tenure.vm, order.claim.next_home());
        if let Err(denial) = self.may_follow(cx, &order) {
            return cx.answer(ask, Reply::Denied(denial));
        }
        if self.vm(id).incoming.is_some() {
            self.drop_incoming(cx, id);
            return cx
                .answer(ask, Reply::Denied(Denial::Unable("a half-finished move of it is thrown away first".into())));
        }
        if self.going_down {
            return cx.answer(ask, Reply::Denied(Denial::Unable("this host goes down".into())));
        }
        self.begin(cx, id, Kind::Run { proof: order.proof, reason: order.reason }, home, vec![ask]);
    }

    /// Whether the claim after the one that an order names may be made here: nothing is under way, that one is the newest, and what is
    /// known here does not gainsay its proof.
    pub(super) fn may_follow(&mut self, cx: &mut Cx, order: &RunOrder) -> Result<(), Denial> {
        let Tenure { vm: id, generation } = order.claim.tenure;
        let owner = order.claim.owner();
        self.learn(cx, order.claim.clone(), cx.now);
        let vm = self.vm(id);
        let newest = vm.tenure().map(|tenure| tenure.generation).unwrap_or_default();
        if vm.attempt.is_some() || vm.moving.is_some() {
            return Err(Denial::Unable("it is being worked on here".into()));
        }
        if newest != generation && !planted(Mutant::ProofOfOlder) {
            return Err(Denial::Superseded { newest });
        }
        match (order.proof, owner) {
            (Proof::PowerOff, Some(owner)) => self.ordered_off(&owner, cx.now),
            _ => Ok(()),
        }
    }
}
