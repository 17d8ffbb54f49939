//! One VM's attempt on this host: from the ground on which it may be claimed to the VM that runs. Rules R2, R5, R6.
//!
//! ```text
//!  Hook ─► Reading ─► Recording ┐
//!  Adopt ──────────► Recording ─┤
//!  Run ─► FetchingRecord ───────┼─► Expecting ─► Claiming ─► Confirming ─┬─► (Reclaim, Adopt) done
//!  Reclaim, Arrive ─────────────┘    guard's row   claim g+1   epoch same  ├─► (Hook) allowed ─► Adopting ─► done
//!                                       │             │            │       ├─► (Arrive) Defining ─► Resuming ─► done
//!                                       │             │            │       └─► (Run) Fencing ─► Locks ─► Defining ─►
//!                                       ▼             ▼            ▼                Starting ─► Adopting ─► Resuming
//!                                    nothing       Abandon     Abandon, then Release: g+2 "none, wanted as before"
//!
//!  Release ─► Claiming ("none") ─► done: the rows are forgotten
//! ```
//!
//! The guard has its row before any claim that names this host exists; the claim is made in the present lease epoch,
//! and the guard refuses the confirmation if that epoch has ended. Nothing starts without the confirmation.
//! A failure after the claim is followed by g+2 "none, wanted running", so that no claim names a host that does nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::event::{AskId, Outcome};
use super::note::Note;
use super::proofs::LateWrite;
use crate::types::control::{Denial, Reply};
use crate::types::guard::{GuardOrder, Purpose, Refusal};
use crate::types::store::{ClaimsOf, StoreAnswer, StoreOrder};
use crate::types::vm::{DomainAnswer, DomainFailure, DomainOrder, DomainState, Underway};
use crate::types::{
    Claim, ClaimReason, DatastoreId, Debt, Digest, Epoch, Generation, Holder, Nonce, ObjectKind, Owner, Proof, Tenure,
    Ticket, Time, VmId, VmRecord, VmState, Wanted,
};

/// What an attempt is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// libvirt's hook waits: a person starts it.
    Hook { ask: AskId },
    /// Start it here.
    Run { proof: Proof, reason: ClaimReason },
    /// It runs here without a claim in this incarnation.
    Adopt,
    /// The guard stopped it after a lapse; it goes on under a new claim.
    Reclaim { old: Tenure },
    /// It came by migration; the source said over.
    Arrive,
    /// It ended here: nobody owns it any more.
    Release { wanted: Wanted, reason: ClaimReason },
}

/// How far it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The newest claim is read.
    Reading,
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
    /// A storage fence runs, for this debt.
    Fencing(Debt),
    /// Image locks are probed, since then.
    Locks { since: Time },
    /// The definition is written.
    Defining,
    /// libvirt starts it.
    Starting,
    /// The guard must see its QEMU.
    Adopting,
    /// Its vCPUs are let go.
    Resuming,
    /// Waits for a retry of the former stage.
    Waiting,
}

/// The attempt.
#[derive(Clone, Debug)]
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
    /// Debts that a fence of this attempt has paid.
    fenced: Vec<Debt>,
    digest: Digest,
    epoch: Epoch,
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
/// libvirt's time for one call.
const CALL: Duration = Duration::from_secs(20);
/// The guard sees a QEMU within milliseconds of its pid file.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);
/// Attempts that cannot claim are tried again after this.
const RETRY: Duration = Duration::from_millis(500);

impl Attempt {
    /// Whether it will take memory here that it does not have yet.
    #[must_use]
    pub fn starts(&self) -> bool {
        matches!(self.kind, Kind::Run { .. } | Kind::Hook { .. } | Kind::Arrive)
    }

    /// Whether a QEMU is here already.
    fn has_copy(&self) -> bool {
        matches!(self.kind, Kind::Reclaim { .. } | Kind::Adopt | Kind::Arrive)
    }
}

impl Core {
    /// Begins an attempt; one VM has at most one.
    pub(super) fn begin(&mut self, cx: &mut Cx, id: VmId, kind: Kind, home: DatastoreId, asks: Vec<AskId>) {
        let vm = self.vm(id);
        assert!(vm.attempt.is_none(), "one attempt per VM");
        let before = vm.claim.clone();
        let record = match &kind {
            Kind::Hook { .. } | Kind::Adopt => vm.record.clone().and_then(Result::ok),
            Kind::Arrive => vm.incoming.as_ref().map(|incoming| incoming.record.clone()),
            Kind::Run { .. } | Kind::Reclaim { .. } | Kind::Release { .. } => None,
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
            fenced: Vec::new(),
            digest,
            epoch: Epoch::default(),
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
        match attempt.kind {
            Kind::Hook { .. } => {
                cx.set(Timer::Attempt(id), cx.now + HOOK_LIMIT);
                self.ask_store(cx, id, Stage::Reading, StoreOrder::ReadClaims(ClaimsOf::Vms(vec![id])));
            }
            Kind::Adopt => self.write_record(cx, id),
            Kind::Run { .. } => {
                let order = StoreOrder::ReadRecord { vm: id, digest: attempt.digest };
                self.ask_store(cx, id, Stage::FetchingRecord, order);
            }
            Kind::Reclaim { .. } | Kind::Arrive => self.expect(cx, id),
            Kind::Release { .. } => self.create(cx, id),
        }
    }

    /// The answer to an attempt's question; dropped if the attempt asks something else by now.
    pub(super) fn attempt_done(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, outcome: Outcome) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()) else { return };
        if attempt.ticket != ticket {
            return;
        }
        match (attempt.stage.clone(), outcome) {
            (Stage::Reading, Outcome::Store(answer)) => self.hook_read(cx, id, answer),
            (Stage::Recording, Outcome::Store(answer)) => self.recorded(cx, id, answer),
            (Stage::FetchingRecord, Outcome::Store(answer)) => self.record_fetched(cx, id, answer),
            (Stage::Expecting, Outcome::Guard(result)) => self.expected(cx, id, result),
            (Stage::Claiming, Outcome::Store(answer)) => self.created(cx, id, answer),
            (Stage::Confirming, Outcome::Guard(result)) => self.confirmed(cx, id, result),
            (Stage::Fencing(debt), Outcome::Fenced(result)) => self.fenced(cx, id, debt, result),
            (Stage::Locks { since }, Outcome::Locks(result)) => self.locks_probed(cx, id, since, result),
            (Stage::Defining, Outcome::Domain(answer)) => self.defined(cx, id, answer),
            (Stage::Starting, Outcome::Domain(answer)) => self.started_paused(cx, id, answer),
            (Stage::Resuming, Outcome::Domain(answer)) => self.resumed(cx, id, answer),
            _ => {}
        }
    }

    // ---- record -------------------------------------------------------------------------------------------------

    fn hook_read(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Claims { ended, claims, bad, .. } => {
                for claim in claims {
                    self.learn(cx, claim, ended);
                }
                if let Some((_, why)) = bad.into_iter().next() {
                    return self.fail(cx, id, Denial::Unable(format!("its newest claim cannot be read: {why}")));
                }
                match self.may_start_here(id, cx.now) {
                    Ok(()) => {
                        let newest = self.vm(id).claim.clone();
                        if let Some(attempt) = &mut self.vm(id).attempt {
                            attempt.before = newest;
                        }
                        self.write_record(cx, id);
                    }
                    Err(denial) => self.fail(cx, id, denial),
                }
            }
            StoreAnswer::Failed(why) => self.fail(cx, id, Denial::Unable(format!("its claims cannot be read: {why}"))),
            _ => {}
        }
    }

    fn write_record(&mut self, cx: &mut Cx, id: VmId) {
        let Some(record) = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone()) else {
            return self.fail(cx, id, Denial::Unable("its definition is not known".into()));
        };
        self.ask_store(cx, id, Stage::Recording, StoreOrder::WriteRecord(Box::new(record)));
    }

    fn recorded(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Recorded(digest) => {
                if let Some(attempt) = &mut self.vm(id).attempt {
                    attempt.digest = digest;
                }
                self.expect(cx, id);
            }
            StoreAnswer::Failed(why) => {
                self.fail(cx, id, Denial::Unable(format!("its record cannot be written: {why}")))
            }
            _ => {}
        }
    }

    fn record_fetched(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Record(record) => {
                if let Some(attempt) = &mut self.vm(id).attempt {
                    attempt.record = Some(*record);
                }
                self.expect(cx, id);
            }
            StoreAnswer::Failed(why) => self.fail(cx, id, Denial::Host(format!("its record cannot be read: {why}"))),
            _ => {}
        }
    }

    // ---- row, claim, confirmation -------------------------------------------------------------------------------

    fn expect(&mut self, cx: &mut Cx, id: VmId) {
        let name = self.vm_name(id);
        let Some(attempt) = self.vm(id).attempt.clone() else { return };
        let Some(lease) = self.guard.leases.get(&attempt.home).filter(|lease| lease.until.is_some()) else {
            let store = self.store_name(attempt.home);
            return self.fail(cx, id, Denial::Unable(format!("no valid lease on datastore {store}")));
        };
        let epoch = lease.epoch;
        let tenure = next_tenure(id, attempt.before.as_ref());
        if matches!(self.guard.rows.get(&tenure).map(|row| row.state), Some(VmState::Over(_))) {
            return self.use_up(cx, id, &attempt);
        }
        let order = GuardOrder::Expect {
            tenure,
            name,
            home: attempt.home,
            epoch,
            deadline: cx.now + ROW_DEADLINE,
            purpose: match attempt.kind {
                Kind::Hook { .. } | Kind::Run { .. } => Purpose::Start,
                Kind::Adopt | Kind::Arrive => Purpose::Adopt,
                Kind::Reclaim { .. } => Purpose::Reclaim,
                Kind::Release { .. } => return,
            },
        };
        let ticket = cx.guard(order, Pending::Attempt(id));
        self.stage(id, Stage::Expecting, ticket);
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.epoch = epoch;
        }
    }

    /// The next generation is over already: it is that of a try of ours whose claim did not come about, or is still on
    /// its way. A claim that lets nobody run takes its place; then the generation after it is free.
    fn use_up(&mut self, cx: &mut Cx, id: VmId, attempt: &Attempt) {
        let wanted = match (&attempt.kind, &attempt.before) {
            // It runs without a claim: nobody else may start it.
            (Kind::Adopt, _) | (_, None) => Wanted::Stopped,
            (_, Some(before)) => before.wanted,
        };
        self.fail(cx, id, Denial::Unable("an earlier try is being cleared away; try again in a moment".into()));
        let kind = Kind::Release { wanted, reason: ClaimReason::StartFailed };
        self.begin(cx, id, kind, attempt.home, Vec::new());
    }

    fn expected(&mut self, cx: &mut Cx, id: VmId, result: Result<(), Refusal>) {
        match result {
            Ok(()) => self.create(cx, id),
            Err(refusal) => self.fail(cx, id, Denial::Unable(format!("the guard refuses: {refusal}"))),
        }
    }

    fn create(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vm(id).attempt.clone() else { return };
        let claim = self.next_claim(id, &attempt);
        let after = attempt.before.as_ref().map(|before| (before.tenure.generation, before.nonce));
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.claim = Some(claim.clone());
        }
        self.ask_store(cx, id, Stage::Claiming, StoreOrder::CreateClaim { claim: Box::new(claim), after });
    }

    fn next_claim(&mut self, id: VmId, attempt: &Attempt) -> Claim {
        self.nonces = self.nonces.wrapping_add(1);
        let nonce = Nonce(self.nonces);
        let name = self.vm_name(id);
        let incarnation = self.guard.incarnation.unwrap_or_default();
        let owner = Owner { host: self.me.host, boot: self.me.boot, incarnation };
        let before = attempt.before.as_ref();
        let (holder, wanted, reason) = match &attempt.kind {
            Kind::Hook { .. } => (Holder::Host(owner), Wanted::Running, ClaimReason::StartedByPerson),
            Kind::Run { reason, .. } => (Holder::Host(owner), Wanted::Running, *reason),
            Kind::Adopt => (Holder::Host(owner), Wanted::Running, ClaimReason::Adopted),
            Kind::Reclaim { .. } => (Holder::Host(owner), Wanted::Running, ClaimReason::Reclaimed),
            Kind::Arrive => (Holder::Host(owner), Wanted::Running, ClaimReason::Migrated),
            Kind::Release { wanted, reason } => (Holder::None, *wanted, *reason),
        };
        let mut debts = match (&attempt.kind, before, &attempt.record) {
            (Kind::Run { proof, .. }, Some(before), Some(record)) => self.debts_after(before, *proof, record),
            (Kind::Hook { .. }, Some(before), Some(record)) => {
                let known = self.vm(id).known;
                let proof = self.proof_of(before, known, known).unwrap_or(Proof::Unowned);
                self.debts_after(before, proof, record)
            }
            (_, Some(before), _) => before.debts.iter().copied().filter(|debt| !self.is_paid(debt)).collect(),
            (_, None, _) => Vec::new(),
        };
        if let Kind::Release { .. } = attempt.kind {
            debts.extend(self.own_debts(id, attempt.home));
        }
        Claim {
            kind: ObjectKind::Vm,
            tenure: next_tenure(id, before),
            name,
            holder,
            home: attempt.home,
            wanted,
            reason,
            record: attempt.digest,
            nonce,
            maker: self.me.host,
            made_unix_ms: 0,
            debts: debts.into_iter().filter(|debt| !attempt.fenced.contains(debt)).take(16).collect(),
        }
    }

    fn created(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        let Some(attempt) = self.vm(id).attempt.clone() else { return };
        let claim = attempt.claim.clone().expect("set before the order was given");
        match answer {
            StoreAnswer::Created => {
                self.learn(cx, claim.clone(), cx.now);
                if let Kind::Release { .. } = attempt.kind {
                    return self.released(cx, id);
                }
                let order =
                    GuardOrder::Claimed { tenure: claim.tenure, epoch: attempt.epoch, deadline: cx.now + ROW_DEADLINE };
                let ticket = cx.guard(order, Pending::Attempt(id));
                self.stage(id, Stage::Confirming, ticket);
            }
            // An earlier try of ours, or of this host's former agent, had an unknown outcome. The row stands, in the same
            // incarnation, and was never over: the guard has confirmed its expectation.
            StoreAnswer::Exists(other)
                if !matches!(attempt.kind, Kind::Release { .. })
                    && other.tenure == claim.tenure
                    && other.holder == claim.holder =>
            {
                if let Some(attempt) = &mut self.vm(id).attempt {
                    attempt.claim = Some((*other).clone());
                }
                self.created(cx, id, StoreAnswer::Created);
            }
            StoreAnswer::Exists(other) => {
                self.abandon(cx, claim.tenure, &attempt.kind);
                self.learn(cx, (*other).clone(), cx.now);
                self.lost_to(cx, id, &other);
            }
            StoreAnswer::GaveWay => {
                self.abandon(cx, claim.tenure, &attempt.kind);
                self.list_claims(cx);
                self.fail(cx, id, Denial::Unable("its claims changed meanwhile".into()));
            }
            StoreAnswer::Failed(why) => {
                // It may exist or still land. A copy that is alive keeps its row, and the same claim is tried again: the
                // guard must never say of it that it never started, and a generation that is over is used up.
                if attempt.has_copy() {
                    if let Some(attempt) = &mut self.vm(id).attempt {
                        attempt.waits = Some(format!("its claim, which could not be created: {why}"));
                        attempt.ticket = Ticket(0);
                    }
                    return cx.set(Timer::Attempt(id), cx.now + RETRY);
                }
                // Else the guard's word "never started" frees it.
                self.abandon(cx, claim.tenure, &attempt.kind);
                self.list_claims(cx);
                self.fail(cx, id, Denial::Unable(format!("its claim could not be created: {why}")));
            }
            _ => {}
        }
    }

    /// Somebody else's claim stands where ours should: R2 says what that means for a stopped copy.
    fn lost_to(&mut self, cx: &mut Cx, id: VmId, other: &Claim) {
        let owner = other.owner().map(|owner| self.name_of(owner.host));
        let newest = other.tenure.generation;
        let kind = self.vm(id).attempt.as_ref().map(|attempt| attempt.kind.clone());
        if let Some(Kind::Reclaim { old }) = kind {
            let ours = other.owner().is_some_and(|owner| owner.host == self.me.host);
            let free = matches!(other.holder, Holder::None) && other.wanted == Wanted::Running;
            if !ours && !free {
                cx.guard(GuardOrder::Kill { tenure: old, seen: newest }, Pending::Nothing);
            }
        }
        self.fail(
            cx,
            id,
            match owner {
                Some(owner) => Denial::OwnedBy { owner, generation: newest },
                None => Denial::Superseded { newest },
            },
        );
    }

    fn abandon(&mut self, cx: &mut Cx, tenure: Tenure, kind: &Kind) {
        if !matches!(kind, Kind::Release { .. }) {
            cx.guard(GuardOrder::Abandon { tenure }, Pending::Nothing);
        }
    }

    fn confirmed(&mut self, cx: &mut Cx, id: VmId, result: Result<(), Refusal>) {
        if let Err(refusal) = result {
            return self.give_up(cx, id, Denial::Unable(format!("the guard refuses: {refusal}")));
        }
        self.forget_older(cx, id);
        let Some(attempt) = self.vm(id).attempt.clone() else { return };
        match attempt.kind {
            Kind::Hook { ask } => {
                cx.hook_answer(ask, Ok(()));
                self.await_adoption(cx, id);
            }
            Kind::Adopt => self.finish(cx, id),
            Kind::Reclaim { .. } => self.lift_late_pause(cx, id),
            Kind::Arrive => self.define(cx, id),
            Kind::Run { .. } => self.pay_debts(cx, id),
            Kind::Release { .. } => {}
        }
    }

    /// Rows of older generations say nothing that a newer claim does not say.
    fn forget_older(&mut self, cx: &mut Cx, id: VmId) {
        let Some(newest) = self.vm(id).tenure() else { return };
        let older = self.guard.rows.keys().filter(|row| row.vm == id && row.generation < newest.generation);
        for tenure in older.copied().collect::<Vec<_>>() {
            cx.guard(GuardOrder::Forget { tenure }, Pending::Nothing);
        }
    }

    // ---- late writes --------------------------------------------------------------------------------------------

    /// Fences what the debts of our new claim say, one after another; then the locks, then the start.
    fn pay_debts(&mut self, cx: &mut Cx, id: VmId) {
        let Some(claim) = self.vm(id).claim.clone() else { return };
        let fenced = self.vm(id).attempt.as_ref().map(|attempt| attempt.fenced.clone()).unwrap_or_default();
        let mut lock = false;
        for debt in claim.debts.iter().filter(|debt| !self.is_paid(debt) && !fenced.contains(debt)) {
            match self.late_write(debt) {
                _ if self.ended_cleanly(id, debt, cx.now) => return self.paid(cx, id, &[*debt]),
                LateWrite::Command { .. } if self.runs_vms_on(debt.datastore, debt.host, cx.now) => {
                    let host = self.name_of(debt.host);
                    let what = format!("a storage fence against {host}, which would hit the VMs that run there");
                    return self.wait(cx, id, RETRY * 2, what);
                }
                LateWrite::Command { program } => {
                    let name = self.name_of(debt.host);
                    let ticket = cx.fence(program, debt.host, name, CALL, Pending::Attempt(id));
                    return self.stage(id, Stage::Fencing(*debt), ticket);
                }
                LateWrite::Lock => lock = true,
                LateWrite::Accepted => {}
                LateWrite::Open => {
                    let host = self.name_of(debt.host);
                    return self.wait(
                        cx,
                        id,
                        RETRY * 4,
                        format!("a new boot of {host}, or proof that it is off: nothing else excludes its late writes"),
                    );
                }
            }
        }
        if lock {
            self.probe_locks(cx, id, cx.now);
        } else if claim.debts.iter().any(|debt| fenced.contains(debt)) {
            self.claim_paid(cx, id);
        } else {
            self.define(cx, id);
        }
    }

    fn paid(&mut self, cx: &mut Cx, id: VmId, debts: &[Debt]) {
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.fenced.extend(debts);
        }
        self.pay_debts(cx, id);
    }

    /// A claim without the debts that are paid: whoever takes the VM next need not fence again, which by then could hit
    /// a host that is well. Ours was never started, so the guard says so, and the next generation follows.
    fn claim_paid(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = &mut self.vm(id).attempt else { return };
        let Some(claim) = attempt.claim.take() else { return };
        let tenure = claim.tenure;
        attempt.before = Some(claim);
        attempt.waits = None;
        if let Kind::Run { proof, .. } = &mut attempt.kind {
            *proof = Proof::Said(crate::types::Over::NeverStarted);
        }
        cx.guard(GuardOrder::Abandon { tenure }, Pending::Nothing);
        self.expect(cx, id);
    }

    /// Writes of a copy on this host that nobody has seen to be done: it is alive, or ended on a path that did not work.
    fn own_debts(&self, id: VmId, home: DatastoreId) -> Vec<Debt> {
        use crate::types::Over;
        let open = |row: &crate::types::guard::RowView| {
            row.pid.is_some() || matches!(row.state, VmState::Over(Over::Exited { clean: false } | Over::Lapsed))
        };
        if !self.guard.rows.iter().any(|(tenure, row)| tenure.vm == id && open(row)) {
            return Vec::new();
        }
        let record = self.vms.get(&id).and_then(|vm| vm.record.as_ref()?.as_ref().ok());
        let written: BTreeSet<DatastoreId> = record.iter().flat_map(|record| record.written()).chain([home]).collect();
        let debt = |datastore| Debt { host: self.me.host, boot: self.me.boot, datastore };
        written.into_iter().map(debt).collect()
    }

    fn fenced(&mut self, cx: &mut Cx, id: VmId, debt: Debt, result: Result<(), String>) {
        let host = self.name_of(debt.host);
        match result {
            Ok(()) => self.paid(cx, id, &[debt]),
            Err(why) => {
                self.wait(
                    cx,
                    id,
                    RETRY * 2,
                    format!("the storage fence against {host}, which failed and is tried again: {why}"),
                );
            }
        }
    }

    fn probe_locks(&mut self, cx: &mut Cx, id: VmId, since: Time) {
        let record = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone());
        let paths: BTreeSet<String> = record
            .iter()
            .flat_map(|record| record.disks.iter())
            .filter(|disk| disk.writable && disk.datastore.is_some())
            .map(|disk| disk.path.clone())
            .collect();
        let ticket = cx.probe_locks(paths.into_iter().collect(), CALL, Pending::Attempt(id));
        self.stage(id, Stage::Locks { since }, ticket);
    }

    fn locks_probed(&mut self, cx: &mut Cx, id: VmId, since: Time, result: Result<Option<String>, String>) {
        match result {
            Ok(None) => {
                let debts = self.vm(id).claim.as_ref().map(|claim| claim.debts.clone()).unwrap_or_default();
                let by_lock: Vec<Debt> =
                    debts.into_iter().filter(|debt| self.late_write(debt) == LateWrite::Lock).collect();
                // Nothing owed: it was QEMU that found a lock.
                if by_lock.is_empty() { self.define(cx, id) } else { self.paid(cx, id, &by_lock) }
            }
            Ok(Some(holder)) => {
                let waited = cx.now.since(since);
                let pause = if waited < Duration::from_secs(120) { RETRY } else { Duration::from_secs(30) };
                if let Some(attempt) = &mut self.vm(id).attempt {
                    attempt.stage = Stage::Locks { since };
                }
                self.wait_in(cx, id, Stage::Locks { since }, pause, format!("the image lock of its old copy ({holder}), held at the storage server until its client's lease ends"));
            }
            Err(why) => self.wait_in(
                cx,
                id,
                Stage::Locks { since },
                RETRY * 2,
                format!("its image locks, which cannot be probed: {why}"),
            ),
        }
    }

    fn wait(&mut self, cx: &mut Cx, id: VmId, pause: Duration, what: String) {
        self.wait_in(cx, id, Stage::Waiting, pause, what);
    }

    /// Keeps claim and row while something outside is waited for.
    fn wait_in(&mut self, cx: &mut Cx, id: VmId, stage: Stage, pause: Duration, what: String) {
        let name = self.vm_name(id);
        let Some(attempt) = &mut self.vm(id).attempt else { return };
        let new = attempt.waits.as_ref() != Some(&what);
        attempt.waits = Some(what.clone());
        attempt.stage = stage;
        attempt.ticket = Ticket(0);
        let (claim, epoch) = (attempt.claim.clone(), attempt.epoch);
        if let Some(claim) = claim {
            let order = GuardOrder::Claimed { tenure: claim.tenure, epoch, deadline: cx.now + ROW_DEADLINE };
            cx.guard(order, Pending::Nothing);
        }
        if new {
            cx.note(Note::warning("vm-waits", format!("{name} waits for {what}")).of(&name));
            self.tell = true;
        }
        cx.set(Timer::Attempt(id), cx.now + pause);
    }

    // ---- start --------------------------------------------------------------------------------------------------

    fn define(&mut self, cx: &mut Cx, id: VmId) {
        let Some(record) = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone()) else {
            return self.give_up(cx, id, Denial::Unable("its record is not known".into()));
        };
        let ticket = cx.domain(DomainOrder::Define { xml: record.xml }, CALL, Pending::Attempt(id));
        self.stage(id, Stage::Defining, ticket);
    }

    fn defined(&mut self, cx: &mut Cx, id: VmId, answer: DomainAnswer) {
        let arrives = self.vm(id).attempt.as_ref().is_some_and(|attempt| attempt.kind == Kind::Arrive);
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) if arrives => self.resume(cx, id),
            DomainAnswer::Done | DomainAnswer::Listed(_) => {
                let name = self.vm_name(id);
                cx.note(Note::info("vm-starting", format!("{name}: libvirt is told to start it")).of(&name));
                self.set_underway(cx, id, Some(Underway::Start));
                let ticket = cx.domain(DomainOrder::StartPaused { vm: id }, CALL, Pending::Attempt(id));
                self.stage(id, Stage::Starting, ticket);
            }
            DomainAnswer::Failed(_) if arrives => self.resume(cx, id), // It runs; the definition is written later.
            DomainAnswer::Failed(why) => self.start_failed(cx, id, why),
        }
    }

    fn started_paused(&mut self, cx: &mut Cx, id: VmId, answer: DomainAnswer) {
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => self.await_adoption(cx, id),
            DomainAnswer::Failed(why) => self.start_failed(cx, id, why),
        }
    }

    fn start_failed(&mut self, cx: &mut Cx, id: VmId, why: DomainFailure) {
        match why {
            DomainFailure::ImageLocked(holder) => {
                let what = format!(
                    "the image lock of its old copy ({holder}), held at the storage server until its client's lease ends"
                );
                self.wait_in(cx, id, Stage::Locks { since: cx.now }, RETRY, what);
            }
            DomainFailure::NoDaemon(why) => {
                self.give_up(cx, id, Denial::Unable(format!("libvirt does not answer: {why}")))
            }
            DomainFailure::NoDomain => self.give_up(cx, id, Denial::Unable("its definition vanished".into())),
            DomainFailure::Host(why) => self.give_up(cx, id, Denial::Host(why)),
            DomainFailure::Capacity(why) => self.give_up(cx, id, Denial::Capacity(why)),
            DomainFailure::Refused(why) | DomainFailure::Definition(why) => {
                self.give_up(cx, id, Denial::Definition(why))
            }
            DomainFailure::Timeout => {
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Unable("libvirt did not answer in time".into()));
            }
        }
    }

    fn await_adoption(&mut self, cx: &mut Cx, id: VmId) {
        self.stage(id, Stage::Adopting, Ticket(0));
        cx.set(Timer::Attempt(id), cx.now + ADOPT_LIMIT);
        self.adoption(cx, id);
    }

    /// Called whenever the row changed: goes on as soon as the guard has the QEMU.
    pub(super) fn adoption(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.clone()) else { return };
        if attempt.stage != Stage::Adopting {
            return;
        }
        let Some(claim) = &attempt.claim else { return };
        let state = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        match (state, &attempt.kind) {
            (Some(VmState::Running), Kind::Hook { .. }) => self.finish(cx, id),
            (Some(VmState::Running), _) => self.resume(cx, id),
            (Some(VmState::Over(_)), _) => {
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Unable("it ended, or its lease lapsed, during the start".into()));
            }
            (Some(VmState::Expected | VmState::Incoming) | None, _) => {}
        }
    }

    fn resume(&mut self, cx: &mut Cx, id: VmId) {
        let ticket = cx.domain(DomainOrder::Resume { vm: id }, CALL, Pending::Attempt(id));
        self.stage(id, Stage::Resuming, ticket);
    }

    fn lift_late_pause(&mut self, cx: &mut Cx, id: VmId) {
        let paused = self
            .libvirt
            .domains
            .get(&id)
            .is_some_and(|domain| domain.state == DomainState::Paused { by_io_error: false });
        if paused { self.resume(cx, id) } else { self.finish(cx, id) }
    }

    fn resumed(&mut self, cx: &mut Cx, id: VmId, answer: DomainAnswer) {
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => self.finish(cx, id),
            DomainAnswer::Failed(why) => {
                let reclaim =
                    self.vm(id).attempt.as_ref().is_some_and(|attempt| matches!(attempt.kind, Kind::Reclaim { .. }));
                if reclaim {
                    return self.finish(cx, id); // It runs under its claim; reconcile looks at the pause again.
                }
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Definition(format!("it could not be resumed: {why:?}")));
            }
        }
    }

    // ---- ends ---------------------------------------------------------------------------------------------------

    fn finish(&mut self, cx: &mut Cx, id: VmId) {
        cx.unset(Timer::Attempt(id));
        self.set_underway(cx, id, None);
        let name = self.vm_name(id);
        let vm = self.vm(id);
        let Some(attempt) = vm.attempt.take() else { return };
        vm.waits = None;
        vm.ended = None;
        vm.incoming = None;
        let generation = attempt.claim.as_ref().map(|claim| claim.tenure.generation).unwrap_or_default();
        let took = cx.now.since(attempt.since).as_secs_f64();
        let text = match &attempt.kind {
            Kind::Hook { .. } => format!("{name} was started by a person (generation {generation})"),
            Kind::Run { reason, .. } => {
                format!("{name} runs here: {} (generation {generation}, {took:.2} s)", super::vms::reason_text(*reason))
            }
            Kind::Adopt => format!("{name} is protected (generation {generation})"),
            Kind::Reclaim { .. } => format!("{name} goes on after its lease had lapsed (generation {generation})"),
            Kind::Arrive => format!("{name} runs here: moved (generation {generation})"),
            Kind::Release { .. } => String::new(),
        };
        let kind = match &attempt.kind {
            Kind::Hook { .. } | Kind::Run { .. } => "vm-started",
            Kind::Adopt => "vm-protected",
            Kind::Reclaim { .. } => "vm-reclaimed",
            Kind::Arrive => "vm-arrived",
            Kind::Release { .. } => "vm-released",
        };
        if !text.is_empty() {
            cx.note(Note::info(kind, text).of(&name));
        }
        for ask in attempt.asks {
            cx.answer(ask, Reply::Ran { generation });
        }
        self.check = true;
        self.look = true;
        self.tell = true;
    }

    fn released(&mut self, cx: &mut Cx, id: VmId) {
        let name = self.vm_name(id);
        let Some(claim) = self.vm(id).claim.clone() else { return };
        let rows: Vec<Tenure> = self.guard.rows.keys().filter(|row| row.vm == id).copied().collect();
        for tenure in rows {
            cx.guard(GuardOrder::Forget { tenure }, Pending::Nothing);
        }
        let stopping = std::mem::take(&mut self.vm(id).stopping);
        for ask in stopping {
            cx.answer(ask, Reply::Done);
        }
        let text = format!("{name} is released (generation {}): {}", claim.tenure.generation, self.holder_text(&claim));
        cx.note(Note::info("vm-released", text).of(&name));
        let denial = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.waits.clone());
        let asks = self.vm(id).attempt.as_ref().map(|attempt| attempt.asks.clone()).unwrap_or_default();
        for ask in asks {
            cx.answer(ask, denial.clone().map_or(Reply::Done, |why| Reply::Denied(Denial::Host(why))));
        }
        self.vm(id).attempt = None;
        self.check = true;
        self.look = true;
        self.tell = true;
    }

    /// Nothing was claimed: answer and end. What should go on is begun again by `reconcile` or by the master.
    pub(super) fn fail(&mut self, cx: &mut Cx, id: VmId, denial: Denial) {
        cx.unset(Timer::Attempt(id));
        let me = self.me.host;
        let name = self.vm_name(id);
        let vm = self.vm(id);
        let Some(attempt) = vm.attempt.take() else { return };
        vm.waits = Some(denial.to_string());
        vm.pause = cx.now + RETRY;
        let beaten = matches!(denial, Denial::OwnedBy { .. } | Denial::Superseded { .. });
        if let (Kind::Run { .. }, false) = (&attempt.kind, beaten) {
            vm.failed.insert(me, (cx.now, denial.to_string()));
        }
        match &attempt.kind {
            Kind::Hook { ask } => cx.hook_answer(*ask, Err(refusal_text(&name, &denial))),
            Kind::Release { .. } | Kind::Reclaim { .. } | Kind::Adopt => {
                // The retry is a matter of milliseconds after a heal; the beat's reconcile is the fallback.
                cx.set(Timer::Judge(id), cx.now + RETRY);
            }
            Kind::Run { .. } => {}
            Kind::Arrive => {
                self.set_underway(cx, id, None);
                self.drop_incoming(cx, id);
            }
        }
        for ask in attempt.asks {
            cx.answer(ask, Reply::Denied(denial.clone()));
        }
        self.look = true;
        self.tell = true;
    }

    /// Something failed after the claim was created: bar the row, then g+2 "none, wanted as before".
    fn give_up(&mut self, cx: &mut Cx, id: VmId, denial: Denial) {
        cx.unset(Timer::Attempt(id));
        self.set_underway(cx, id, None);
        let name = self.vm_name(id);
        let Some(attempt) = self.vm(id).attempt.take() else { return };
        let claim = attempt.claim.clone().expect("given up only after a claim");
        cx.note(Note::warning("vm-start-failed", format!("{name}: not started here: {denial}")).of(&name));
        if let Kind::Hook { ask } = &attempt.kind {
            cx.hook_answer(*ask, Err(refusal_text(&name, &denial)));
        }
        for ask in &attempt.asks {
            cx.answer(*ask, Reply::Denied(denial.clone()));
        }
        if matches!(attempt.kind, Kind::Reclaim { .. } | Kind::Adopt | Kind::Arrive) {
            // The copy is alive and stopped by the guard: the next try claims the next generation.
            let vm = self.vm(id);
            vm.waits = Some(denial.to_string());
            vm.incoming = None;
            cx.set(Timer::Judge(id), cx.now + RETRY);
            self.check = true;
            return;
        }
        if let Kind::Run { .. } = &attempt.kind {
            let me = self.me.host;
            self.vm(id).failed.insert(me, (cx.now, denial.to_string()));
        }
        cx.guard(GuardOrder::Abandon { tenure: claim.tenure }, Pending::Nothing);
        if self.vm(id).tenure() != Some(claim.tenure) {
            return; // Somebody has claimed it since: nothing of ours is left to be released.
        }
        let wanted = match &attempt.kind {
            Kind::Hook { .. } => attempt.before.as_ref().map_or(Wanted::Stopped, |before| before.wanted),
            _ => Wanted::Running,
        };
        let kind = Kind::Release { wanted, reason: ClaimReason::StartFailed };
        self.begin(cx, id, kind, attempt.home, Vec::new());
    }

    /// The guard is gone: what it was asked will not be answered.
    pub(super) fn guard_answers_no_more(&mut self, cx: &mut Cx) {
        let asked = |vm: &super::vms::Vm| {
            vm.attempt
                .as_ref()
                .map(|attempt| attempt.stage.clone())
                .filter(|stage| matches!(stage, Stage::Expecting | Stage::Confirming))
        };
        let stuck: Vec<(VmId, Stage)> =
            self.vms.iter().filter_map(|(id, vm)| asked(vm).map(|stage| (*id, stage))).collect();
        for (id, stage) in stuck {
            let denial = Denial::Unable("the guard was restarted meanwhile".into());
            if stage == Stage::Expecting { self.fail(cx, id, denial) } else { self.give_up(cx, id, denial) }
        }
    }

    /// The attempt's timer: a retry, or the end of patience.
    pub(super) fn attempt_due(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.clone()) else { return };
        if matches!(attempt.stage, Stage::Waiting | Stage::Locks { .. }) && !self.stands(&attempt) {
            return self.give_up(cx, id, Denial::Unable("its lease lapsed, or it was claimed anew, while it waited".into()));
        }
        match attempt.stage {
            Stage::Waiting => self.pay_debts(cx, id),
            Stage::Locks { since } => self.probe_locks(cx, id, since),
            Stage::Adopting => {
                self.destroy(cx, id);
                self.give_up(cx, id, Denial::Unable("its QEMU did not appear in time".into()));
            }
            Stage::Confirming | Stage::Fencing(_) | Stage::Defining | Stage::Starting | Stage::Resuming => {}
            Stage::Claiming if attempt.has_copy() => self.claim_again(cx, id, &attempt),
            Stage::Reading | Stage::Recording | Stage::FetchingRecord | Stage::Expecting | Stage::Claiming => {
                // The hook's patience ends; a claim that lands later is freed by the guard's word.
                if let Some(claim) = &attempt.claim {
                    self.abandon(cx, claim.tenure, &attempt.kind);
                }
                self.fail(cx, id, Denial::Unable("the datastore does not answer in time".into()));
            }
        }
    }

    /// Whether the guard still expects what this attempt has claimed.
    fn stands(&self, attempt: &Attempt) -> bool {
        let Some(claim) = &attempt.claim else { return true };
        let newest = self.vms.get(&claim.tenure.vm).and_then(super::vms::Vm::tenure);
        let state = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        newest == Some(claim.tenure) && state == Some(VmState::Expected)
    }

    /// The same claim, with the same nonce, as long as its row stands.
    fn claim_again(&mut self, cx: &mut Cx, id: VmId, attempt: &Attempt) {
        let Some(claim) = &attempt.claim else { return };
        let state = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        if state != Some(VmState::Expected) {
            self.list_claims(cx);
            return self.fail(cx, id, Denial::Unable("its lease lapsed before its claim could be created".into()));
        }
        let after = attempt.before.as_ref().map(|before| (before.tenure.generation, before.nonce));
        self.ask_store(cx, id, Stage::Claiming, StoreOrder::CreateClaim { claim: Box::new(claim.clone()), after });
    }

    /// Our own end of a half-started copy: not a person's.
    pub(super) fn destroy(&mut self, cx: &mut Cx, id: VmId) {
        self.vm(id).own_end = true;
        cx.domain(DomainOrder::Destroy { vm: id }, CALL, Pending::Nothing);
    }

    // ---- small things -------------------------------------------------------------------------------------------

    /// Remembers, beyond a restart of this agent, what libvirt is told to do with a VM.
    pub(super) fn set_underway(&mut self, cx: &mut Cx, id: VmId, what: Option<Underway>) {
        let before = match what {
            Some(what) => self.underway.insert(id, what),
            None => self.underway.remove(&id),
        };
        if before != what {
            cx.act(super::action::Action::Underway(self.underway.iter().map(|(id, what)| (*id, *what)).collect()));
        }
    }

    fn ask_store(&mut self, cx: &mut Cx, id: VmId, stage: Stage, order: StoreOrder) {
        let within = self.settings.timing.lease;
        let Some(home) = self.vm(id).attempt.as_ref().map(|attempt| attempt.home) else { return };
        let ticket = cx.store(home, order, within, Pending::Attempt(id));
        self.stage(id, stage, ticket);
    }

    fn stage(&mut self, id: VmId, stage: Stage, ticket: Ticket) {
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.stage = stage;
            attempt.ticket = ticket;
        }
    }
}

fn next_tenure(vm: VmId, before: Option<&Claim>) -> Tenure {
    let generation = before.map_or(Generation(1), |claim| claim.tenure.generation.next());
    Tenure { vm, generation }
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
