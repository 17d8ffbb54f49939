//! One VM's attempt on this host: from the ground on which it may be claimed to the VM that runs. Rules R2, R5, R6.
//!
//! ```text
//!  Hook ─► Reading ─► Recording ┐
//!  Adopt ──────────► Recording ─┤
//!  Change, Leave ──► Recording ─┤
//!  Run ─► FetchingRecord ───────┼─► Expecting ─► Claiming ─► Confirming ─┬─► (Reclaim, Adopt, Change, Leave) done
//!  Reclaim, Arrive, HandOver, Settle ┘ guard's row   claim g+1   epoch same  ├─► (Hook) allowed ─► Adopting ─► done
//!                                       │             │            │       ├─► (Arrive) Defining ─► Resuming ─► done
//!                                       │             │            │       └─► (Run) Fencing ─► Locks ─► Defining ─►
//!                                       ▼             ▼            ▼                Starting ─► Adopting ─► Resuming
//!                                    nothing       Abandon     Barring, then Release: g+2 "none, wanted as before"
//!
//!  Release ─► Claiming ("none") ─► done: the rows are forgotten
//! ```
//!
//! A claim on another datastore than the one before (R7) begins with LookingBack: that one must still stand there.
//!
//! The guard has its row before any claim that names this host exists; the claim is made in the present lease epoch,
//! and the guard refuses the confirmation if that epoch has ended. Nothing starts without the confirmation.
//! A failure after the claim is followed by g+2 "none, wanted running", so that no claim names a host that does nothing:
//! but only when the guard has barred the row, or a QEMU that has come up all the same has ended.

mod claim;
mod crossing;
mod debts;
mod ends;
mod locks;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::event::{AskId, Outcome};
use super::note::Note;
use super::proofs::LateWrite;
use crate::types::control::{Denial, Mover, Reply};
use crate::types::guard::{GuardOrder, Purpose, Refusal};
use crate::types::store::{After, ClaimsOf, StoreAnswer, StoreOrder};
use crate::types::vm::{DomainAnswer, DomainFailure, DomainOrder, DomainState, Underway};
use crate::types::{
    Claim, ClaimReason, DatastoreId, Debt, Digest, Epoch, Generation, Holder, HostId, MAX_DEBTS, Nonce, ObjectKind,
    Over, Owner, Proof, Tenure, Ticket, Time, VmId, VmRecord, VmState, Wanted,
};

/// What an attempt is for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// libvirt's hook waits: a person starts it.
    Hook { ask: AskId },
    /// Start it here.
    Run { proof: Proof, reason: ClaimReason },
    /// It runs here without a claim in this incarnation.
    Adopt,
    /// The guard stopped it after a lapse; it goes on under a new claim.
    Reclaim { old: Tenure },
    /// Its definition here changed, while it runs here or while nobody owns it: a claim for the new record.
    Change,
    /// It runs here, and its disks lie on another datastore now: the claim on its old home that says so (R7).
    Leave { to: DatastoreId },
    /// It came by migration; the source said over.
    Arrive,
    /// A person migrates it away: it runs here until the switch, and there after it.
    HandOver { to: Owner },
    /// It runs here under a claim that says less than that (R6), and is claimed for this host.
    Settle,
    /// It ended here: nobody owns it any more.
    Release { wanted: Wanted, reason: ClaimReason },
}

/// How far it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Stage {
    /// The newest claim is read, on every datastore.
    Reading,
    /// The claim that it follows, which moves the home here, is read again where it lies.
    LookingBack,
    /// Other hosts are asked for the same VM, or one with its disks.
    Twins,
    /// The record is written.
    Recording,
    /// The record is read.
    FetchingRecord,
    /// The guard makes a row.
    Expecting,
    /// The claim is created.
    Claiming,
    /// The guard confirms the epoch.
    Confirming,
    /// A complete read of this debt's datastore, begun when the claim stood, is waited for.
    Sighting(Debt),
    /// A storage fence runs, for this debt.
    Fencing(Debt),
    /// Image locks are probed, since then.
    Locks { since: Time },
    /// The fence program makes the server drop the locks of a host that is off.
    Freeing { since: Time },
    /// The definition is written.
    Defining,
    /// libvirt starts it.
    Starting,
    /// The guard must see its QEMU.
    Adopting,
    /// Its vCPUs are let go.
    Resuming,
    /// It was given up after its claim; the guard bars its row, or ends the QEMU that is there already. Then nobody owns it.
    Barring { wanted: Wanted },
    /// Waits for a retry of the former stage.
    Waiting,
}

/// The attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attempt {
    /// What for.
    pub kind: Kind,
    /// How far.
    pub stage: Stage,
    /// Begun.
    pub since: Time,
    /// The claim that it follows.
    pub before: Option<Claim>,
    /// Where the claim is made.
    pub home: DatastoreId,
    /// The claim that it makes, once created.
    pub claim: Option<Claim>,
    /// What it starts.
    pub record: Option<VmRecord>,
    /// A fence needs a complete read that began then, or later: when the claim stood, or the last try had failed.
    fence_after: Time,
    /// Debts that a fence of this attempt has paid.
    fenced: Vec<Debt>,
    /// The fence program was asked to free its locks.
    freed: bool,
    /// Questions to several that are not answered, and who is asked.
    pub asked: BTreeMap<Ticket, String>,
    /// Datastores whose claims could not be read, and why.
    unread: BTreeMap<String, String>,
    /// The claim that it must follow, since memory is restored that was saved just before that.
    follows: Option<Generation>,
    /// libvirt was told to restore its saved image.
    restores: bool,
    digest: Digest,
    epoch: Epoch,
    /// The row that the guard was asked for: what is claimed is this, or nothing.
    expects: Option<Tenure>,
    ticket: Ticket,
    /// Who waits.
    pub asks: Vec<AskId>,
    /// What it waits for, for people.
    pub waits: Option<String>,
}

/// How long a row stands without its QEMU before the guard bars it; renewed while a fence or a lock is waited for.
const ROW_DEADLINE: Duration = Duration::from_secs(30);
/// The hook must answer within 3 s; after this it is refused.
const HOOK_LIMIT: Duration = Duration::from_millis(2500);
/// A datastore's time to show the newest claim, while the hook waits.
const LOOK: Duration = Duration::from_millis(1200);
/// libvirt's time for one call.
const CALL: Duration = Duration::from_secs(20);
/// The guard sees a QEMU within milliseconds of its pid file.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);
/// The guard's time to say whether it was.
const LOOKS: Duration = Duration::from_secs(5);
/// Attempts that cannot claim are tried again after this.
const RETRY: Duration = Duration::from_millis(500);
/// A claim with an unknown outcome has landed after this, as far as anybody can tell.
const LANDED: Duration = Duration::from_secs(60);

impl Attempt {
    /// Whether it will take memory here that it does not have yet.
    #[must_use]
    pub fn starts(&self) -> bool {
        matches!(self.kind, Kind::Run { .. } | Kind::Hook { .. } | Kind::Arrive)
    }

    /// Whether its ground ends all that this host ran under the claim before.
    fn ends(&self, host: HostId) -> bool {
        let owned = self.before.iter().flat_map(Claim::owners).any(|owner| owner.host == host);
        owned && matches!(self.kind, Kind::Run { proof, .. } if proof.ends_host())
    }

    /// Whether a QEMU is here already.
    fn has_copy(&self) -> bool {
        match self.kind {
            Kind::Reclaim { .. }
            | Kind::Adopt
            | Kind::Leave { .. }
            | Kind::Arrive
            | Kind::HandOver { .. }
            | Kind::Settle => true,
            Kind::Change => !self.is_unowned(),
            Kind::Hook { .. } | Kind::Run { .. } | Kind::Release { .. } => false,
        }
    }

    /// The VM runs on whatever becomes of it, and it is tried again.
    fn may_wait(&self) -> bool {
        matches!(self.kind, Kind::Change | Kind::Leave { .. })
    }

    /// The claim that it follows lies on another datastore.
    fn crosses(&self) -> bool {
        self.before.as_ref().is_some_and(|before| before.home != self.home)
    }

    /// As the storage is told what its claim follows.
    fn after(&self) -> Option<After> {
        let before = self.before.as_ref()?;
        let generation = before.tenure.generation;
        Some(if self.crosses() { After::Elsewhere(generation) } else { After::Here(generation, before.nonce) })
    }

    /// The claim that it follows names nobody.
    fn is_unowned(&self) -> bool {
        self.before.as_ref().and_then(Claim::owner).is_none()
    }
}

impl Core {
    /// Begins an attempt; one VM has at most one.
    pub(super) fn begin(&mut self, cx: &mut Cx, id: VmId, kind: Kind, home: DatastoreId, asks: Vec<AskId>) {
        let persistent = self.libvirt.domains.get(&id).is_some_and(|domain| domain.persistent);
        let follows = if let Kind::Hook { .. } = kind { self.take_restoring(id, cx.now) } else { None };
        let vm = self.vm(id);
        assert!(vm.attempt.is_none(), "one attempt per VM");
        let before = vm.claim.clone();
        let record = match &kind {
            Kind::Hook { .. } | Kind::Adopt | Kind::Change | Kind::Leave { .. } => {
                vm.record.clone().and_then(Result::ok)
            }
            // It ran here until just now: what is defined here is the newest.
            Kind::Run { reason: ClaimReason::Crashed, .. } if persistent => vm.record.clone().and_then(Result::ok),
            Kind::Arrive => vm.incoming.as_ref().map(|incoming| incoming.record.clone()),
            Kind::Run { .. } | Kind::Reclaim { .. } | Kind::Release { .. } | Kind::HandOver { .. } | Kind::Settle => {
                None
            }
        };
        let digest = before.as_ref().map(|claim| claim.record).unwrap_or_default();
        vm.waits = None;
        vm.attempt = Some(Attempt {
            stage: Stage::Waiting,
            since: cx.now,
            before,
            home,
            claim: None,
            record,
            fence_after: cx.now,
            fenced: Vec::new(),
            freed: false,
            asked: BTreeMap::new(),
            unread: BTreeMap::new(),
            follows,
            restores: false,
            digest,
            epoch: Epoch::default(),
            expects: None,
            ticket: Ticket(0),
            asks,
            waits: None,
            kind,
        });
        self.tell = true;
        self.first_stage(cx, id);
    }

    fn first_stage(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.clone()) else { return };
        if let Some(what) = self.waits_for_trust(attempt.home) {
            return self.fail(cx, id, Denial::Unable(format!("it waits for {what}")));
        }
        if let Kind::Hook { .. } = attempt.kind {
            cx.set(Timer::Attempt(id), cx.now + HOOK_LIMIT);
            return self.read_everywhere(cx, id);
        }
        if attempt.crosses() { self.look_back(cx, id) } else { self.second_stage(cx, id) }
    }

    fn second_stage(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.clone()) else { return };
        match attempt.kind {
            Kind::Hook { .. } | Kind::Adopt | Kind::Change | Kind::Leave { .. } => self.write_record(cx, id),
            Kind::Run { .. } if attempt.record.is_some() => self.write_record(cx, id),
            Kind::Run { .. } => {
                let order = StoreOrder::ReadRecord { vm: id, digest: attempt.digest };
                self.ask_store(cx, id, Stage::FetchingRecord, order);
            }
            Kind::Reclaim { .. } | Kind::Arrive | Kind::HandOver { .. } | Kind::Settle => self.expect(cx, id),
            Kind::Release { .. } => self.create(cx, id),
        }
    }

    /// The answer to an attempt's question; dropped if the attempt asks something else by now.
    pub(super) fn attempt_done(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, outcome: Outcome) {
        let waits_for = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()).map(|attempt| attempt.ticket);
        if waits_for != Some(ticket) && matches!(outcome, Outcome::Store(StoreAnswer::Created)) {
            return self.list_claims(cx); // It was given up, and has come about all the same: somebody must act on it.
        }
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()) else { return };
        if let (Stage::Reading, Outcome::Store(answer)) = (&attempt.stage, &outcome) {
            return self.hook_read(cx, id, ticket, answer.clone());
        }
        if attempt.ticket != ticket {
            return;
        }
        match (attempt.stage.clone(), outcome) {
            (Stage::LookingBack, Outcome::Store(answer)) => self.looked_back(cx, id, answer),
            (Stage::Recording, Outcome::Store(answer)) => self.recorded(cx, id, answer),
            (Stage::FetchingRecord, Outcome::Store(answer)) => self.record_fetched(cx, id, answer),
            (Stage::Expecting, Outcome::Guard(result)) => self.expected(cx, id, result),
            (Stage::Claiming, Outcome::Store(answer)) => self.created(cx, id, answer),
            (Stage::Confirming, Outcome::Guard(result)) => self.confirmed(cx, id, result),
            (Stage::Fencing(debt), Outcome::Fenced(result)) => self.fenced(cx, id, debt, result),
            (Stage::Freeing { since }, Outcome::Fenced(result)) => self.locks_freed(cx, id, since, result),
            (Stage::Locks { since }, Outcome::Locks(result)) => self.locks_probed(cx, id, since, result),
            (Stage::Defining, Outcome::Domain(answer)) => self.defined(cx, id, answer),
            (Stage::Starting, Outcome::Domain(answer)) => self.started_paused(cx, id, answer),
            (Stage::Adopting, Outcome::Guard(result)) => self.looked_for_qemu(cx, id, result),
            (Stage::Resuming, Outcome::Domain(answer)) => self.resumed(cx, id, answer),
            (Stage::Barring { wanted }, Outcome::Guard(result)) => self.barred(cx, id, wanted, result),
            _ => {}
        }
    }

    /// Remembers, beyond a restart of this agent, what libvirt is told to do with a VM.
    pub(super) fn set_underway(&mut self, cx: &mut Cx, id: VmId, what: Option<Underway>) {
        let before = match what {
            Some(what) => self.underway.insert(id, what),
            None => self.underway.remove(&id),
        };
        if before != what {
            cx.act(crate::core::action::Action::Underway(
                self.underway.iter().map(|(id, what)| (*id, *what)).collect(),
            ));
        }
    }

    /// An attempt has ended. A pause that was asked for may still show: it stays remembered until it cannot.
    fn end_underway(&mut self, cx: &mut Cx, id: VmId) {
        self.vm(id).responded = None;
        if self.underway.get(&id) != Some(&Underway::Pause) {
            self.set_underway(cx, id, None);
        }
    }

    fn ask_store(&mut self, cx: &mut Cx, id: VmId, stage: Stage, order: StoreOrder) {
        let within = self.settings.timing.lease;
        let home = match (&self.vm(id).attempt, &stage) {
            // Whoever follows the claim that moves the home looks for its record there.
            (Some(Attempt { kind: Kind::Leave { to }, .. }), Stage::Recording) => *to,
            (Some(Attempt { before: Some(before), .. }), Stage::LookingBack) => before.home,
            (Some(attempt), _) => attempt.home,
            (None, _) => return,
        };
        let ticket = cx.store(home, order, within, Pending::Attempt(id));
        self.stage(id, stage, ticket);
    }

    /// The attempt waits for answers of its own kind.
    pub(super) fn stage_of(&mut self, id: VmId, stage: Stage) {
        self.stage(id, stage, Ticket(0));
    }

    fn stage(&mut self, id: VmId, stage: Stage, ticket: Ticket) {
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.stage = stage;
            attempt.ticket = ticket;
        }
    }
}

/// What `virsh start` shows: cause and cure.
pub(super) fn refusal_text(name: &str, denial: &Denial) -> String {
    match denial {
        Denial::OwnedBy { owner, generation } => format!(
            "mainstay: {name} runs on {owner} (generation {generation}); use 'mainstay vm move {name}' to bring it here, \
             'mainstay vm explain {name}' shows why"
        ),
        other => format!("mainstay: {name} is not started: {other}; see 'mainstay vm explain {name}'"),
    }
}
