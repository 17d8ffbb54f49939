//! From the ground for a claim to the confirmed claim: record, the guard's row, claim g+1, the epoch's confirmation.
//!
//! ```text
//!   Reading ─► Recording / FetchingRecord ─► Expecting ─► Claiming ─► Confirming
//! ```

use super::*;
use crate::mutants::{Mutant, planted};

impl Core {
    /// Claims of one VM may lie on several datastores: its home moved, or it was deleted and made anew elsewhere. The
    /// highest generation of all is the truth.
    pub(in crate::core) fn read_everywhere(&mut self, cx: &mut Cx, id: VmId) {
        let homes: Vec<DatastoreId> = self.settings.datastores.iter().map(|datastore| datastore.id).collect();
        let mut asked = BTreeMap::new();
        for home in homes {
            let order = StoreOrder::ReadClaims(ClaimsOf::Vms(vec![id]));
            asked.insert(cx.store(home, order, LOOK, Pending::Attempt(id)), self.store_name(home));
        }
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.asked = asked;
        }
        self.stage_of(id, Stage::Reading);
    }

    pub(in crate::core) fn hook_read(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, answer: StoreAnswer) {
        let Some(attempt) = &mut self.vm(id).attempt else { return };
        let Some(store) = attempt.asked.remove(&ticket) else { return };
        let done = attempt.asked.is_empty();
        match answer {
            StoreAnswer::Claims { ended, claims, bad, .. } => {
                for claim in claims {
                    self.learn(cx, claim, ended);
                }
                if let Some((_, why)) = bad.into_iter().next() {
                    return self.fail(cx, id, Denial::Unable(format!("its newest claim cannot be read: {why}")));
                }
            }
            StoreAnswer::Failed(why) => {
                let Some(attempt) = &mut self.vm(id).attempt else { return };
                attempt.unread.insert(store, why.to_string());
            }
            _ => return,
        }
        if done {
            self.all_read(cx, id);
        }
    }

    /// A datastore that does not answer must not hold up VMs of others: where the newest claim was read, any later one
    /// would be. Only a VM without a claim, and one whose home is silent, cannot be started.
    fn all_read(&mut self, cx: &mut Cx, id: VmId) {
        let newest = self.vm(id).claim.clone();
        let homes = newest.as_ref().map(|claim| [claim.home, claim.next_home()].map(|home| self.store_name(home)));
        let unread = self.vm(id).attempt.as_ref().map(|attempt| attempt.unread.clone()).unwrap_or_default();
        let missing = unread.into_iter().find(|(store, _)| homes.as_ref().is_none_or(|homes| homes.contains(store)));
        if let Some((store, why)) = missing {
            let cure = self.left_behind(id).unwrap_or_default();
            let why = format!("its claims cannot be read on datastore {store}: {why}{cure}");
            return self.fail(cx, id, Denial::Unable(why));
        }
        let generation = newest.as_ref().map(|claim| claim.tenure.generation);
        let Some(attempt) = &mut self.vm(id).attempt else { return };
        if attempt.follows.is_some() && attempt.follows != generation {
            let why = "it was claimed anew since this memory was saved; restoring it would destroy its disks";
            return self.fail(cx, id, Denial::Contradiction(why.into()));
        }
        if let Some(newest) = &newest {
            attempt.home = newest.next_home();
        }
        attempt.before = newest;
        match self.may_start_here(id, cx.now) {
            Ok(()) => self.ask_for_twins(cx, id),
            Err(denial) => self.fail(cx, id, denial),
        }
    }

    pub(in crate::core) fn write_record(&mut self, cx: &mut Cx, id: VmId) {
        let Some(record) = self.vm(id).attempt.as_ref().and_then(|attempt| attempt.record.clone()) else {
            return self.fail(cx, id, Denial::Unable("its definition is not known".into()));
        };
        self.ask_store(cx, id, Stage::Recording, StoreOrder::WriteRecord(Box::new(record)));
    }

    pub(in crate::core) fn recorded(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Recorded(digest) => {
                let Some(attempt) = &mut self.vm(id).attempt else { return };
                attempt.digest = digest;
                if attempt.kind == Kind::Change && attempt.is_unowned() {
                    return self.create(cx, id); // It names no host, so no guard has to know it first.
                }
                self.expect(cx, id);
            }
            StoreAnswer::Failed(why) => {
                self.fail(cx, id, Denial::Unable(format!("its record cannot be written: {why}")))
            }
            _ => {}
        }
    }

    pub(in crate::core) fn record_fetched(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Record(record) => {
                let Some(attempt) = &mut self.vm(id).attempt else { return };
                attempt.record = Some(*record);
                match attempt.kind {
                    Kind::Run { reason: ClaimReason::StartedByPerson, .. } => self.ask_for_twins(cx, id),
                    Kind::Settle => self.define(cx, id),
                    _ => self.expect(cx, id),
                }
            }
            // It runs and is claimed; the definition can be written later.
            StoreAnswer::Failed(_) if self.vm(id).attempt.as_ref().is_some_and(|a| a.kind == Kind::Settle) => {
                self.finish(cx, id);
            }
            StoreAnswer::Failed(why) => self.fail(cx, id, Denial::Unable(format!("its record cannot be read: {why}"))),
            _ => {}
        }
    }

    pub(in crate::core) fn expect(&mut self, cx: &mut Cx, id: VmId) {
        let name = self.vm_name(id);
        let Some(attempt) = self.vm(id).attempt.clone() else { return };
        let Some(lease) = self.guard.leases.get(&attempt.home).filter(|lease| lease.until.is_some()) else {
            let store = self.store_name(attempt.home);
            return self.fail(cx, id, Denial::Unable(format!("no valid lease on datastore {store}")));
        };
        let epoch = lease.epoch;
        let tenure = self.next_tenure(id, attempt.home, attempt.before.as_ref());
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
                Kind::Adopt | Kind::Arrive | Kind::Change | Kind::Leave { .. } | Kind::Settle => Purpose::Adopt,
                Kind::HandOver { .. } => Purpose::HandOver,
                Kind::Reclaim { .. } => Purpose::Reclaim,
                Kind::Release { .. } => return,
            },
            writes: self.written_by(id, &attempt),
        };
        let ticket = cx.guard(order, Pending::Attempt(id));
        self.stage(id, Stage::Expecting, ticket);
        if let Some(attempt) = &mut self.vm(id).attempt {
            (attempt.epoch, attempt.expects) = (epoch, Some(tenure));
        }
        if planted(Mutant::ClaimBeforeRow) {
            self.create(cx, id);
        }
    }

    /// Where its QEMU writes, besides its home: as far as its record is known here; the guard adds what it knows.
    fn written_by(&self, id: VmId, attempt: &Attempt) -> Vec<DatastoreId> {
        let listed = self.vms.get(&id).and_then(|vm| vm.record.as_ref()?.as_ref().ok());
        let record = attempt.record.as_ref().or(listed);
        record.iter().flat_map(|record| record.written()).filter(|store| *store != attempt.home).collect()
    }

    /// The next generation is over already: it is that of a try of ours whose claim did not come about, or is still on
    /// its way. A claim that lets nobody run takes its place; then the generation after it is free. Unless another claim
    /// has been read since this attempt began: it has taken that place, and what it says must not be released.
    pub(in crate::core) fn use_up(&mut self, cx: &mut Cx, id: VmId, attempt: &Attempt) {
        let wanted = match (&attempt.kind, &attempt.before) {
            // It runs without a claim: nobody else may start it.
            (Kind::Adopt, _) | (_, None) => Wanted::Stopped,
            (_, Some(before)) => before.wanted,
        };
        self.fail(cx, id, Denial::Unable("an earlier try is being cleared away; try again in a moment".into()));
        let mark = |claim: &Claim| (claim.tenure, claim.nonce);
        let superseded = self.vm(id).claim.as_ref().map(mark) != attempt.before.as_ref().map(mark);
        if superseded || attempt.may_wait() {
            return; // Of one that may wait: it runs, and no claim that lets others have it may be made.
        }
        let kind = Kind::Release { wanted, reason: ClaimReason::StartFailed };
        self.begin(cx, id, kind, attempt.home, Vec::new());
    }

    pub(in crate::core) fn expected(&mut self, cx: &mut Cx, id: VmId, result: Result<(), Refusal>) {
        match result {
            Ok(()) => self.create(cx, id),
            Err(refusal) => self.fail(cx, id, Denial::Unable(format!("the guard refuses: {refusal}"))),
        }
    }

    pub(in crate::core) fn create(&mut self, cx: &mut Cx, id: VmId) {
        let Some(attempt) = self.vm(id).attempt.clone() else { return };
        let claim = self.next_claim(id, &attempt);
        if let Some(expects) = attempt.expects.filter(|expects| *expects != claim.tenure) {
            self.abandon(cx, expects, &attempt.kind);
            let what = "its datastore was accepted anew in this moment; try again";
            return self.fail(cx, id, Denial::Unable(what.into()));
        }
        if MAX_DEBTS < claim.debts.len() {
            self.abandon(cx, claim.tenure, &attempt.kind);
            let what = format!("late writes of {} earlier owners are not excluded yet", claim.debts.len());
            return self.fail(cx, id, Denial::Unable(format!("{what}; they are after new boots of those hosts")));
        }
        if let Some(what) = self.waits_for_trust(attempt.home) {
            self.abandon(cx, claim.tenure, &attempt.kind);
            return self.fail(cx, id, Denial::Unable(format!("it waits for {what}")));
        }
        let after = attempt.after();
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.claim = Some(claim.clone());
        }
        self.ask_store(cx, id, Stage::Claiming, StoreOrder::CreateClaim { claim: Box::new(claim), after });
    }

    pub(in crate::core) fn next_claim(&mut self, id: VmId, attempt: &Attempt) -> Claim {
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
            Kind::Arrive => (Holder::Host(owner), Wanted::Running, self.arrival(id)),
            Kind::HandOver { to } => {
                (Holder::Handover { from: owner, to: *to }, Wanted::Running, ClaimReason::HandedOver)
            }
            Kind::Settle if self.came_here(before) => (Holder::Host(owner), Wanted::Running, ClaimReason::Migrated),
            Kind::Settle if attempt.crosses() => (Holder::Host(owner), Wanted::Running, ClaimReason::HomeMoved),
            Kind::Settle => (Holder::Host(owner), Wanted::Running, ClaimReason::Reclaimed),
            Kind::Leave { to } => (Holder::Moved { to: *to, owner }, Wanted::Running, ClaimReason::HomeMoved),
            Kind::Change => match before {
                Some(before) if before.owner().is_none() => (before.holder, before.wanted, ClaimReason::RecordChanged),
                Some(_) | None => (Holder::Host(owner), Wanted::Running, ClaimReason::RecordChanged),
            },
            Kind::Release { wanted, reason: ClaimReason::Deleted } => (Holder::Deleted, *wanted, ClaimReason::Deleted),
            Kind::Release { wanted, reason } => (Holder::None, *wanted, *reason),
        };
        let debts = before.map(|before| self.debts_of_next(id, attempt, before)).unwrap_or_default();
        Claim {
            kind: ObjectKind::Vm,
            tenure: self.next_tenure(id, attempt.home, before),
            name,
            holder,
            home: attempt.home,
            wanted,
            reason,
            record: attempt.digest,
            nonce,
            maker: self.me.host,
            made_unix_ms: 0,
            debts,
        }
    }

    /// Who wanted it here.
    fn arrival(&self, id: VmId) -> ClaimReason {
        match self.vms.get(&id).and_then(|vm| vm.incoming.as_ref()).map(|incoming| incoming.by) {
            Some(Mover::Cluster) => ClaimReason::Planned,
            Some(Mover::Person) | None => ClaimReason::Migrated,
        }
    }

    /// Whether that claim handed the VM to this host.
    pub(in crate::core) fn came_here(&self, before: Option<&Claim>) -> bool {
        before.is_some_and(|before| matches!(before.holder, Holder::Handover { to, .. } if to.host == self.me.host))
    }

    pub(in crate::core) fn created(&mut self, cx: &mut Cx, id: VmId, answer: StoreAnswer) {
        let Some(attempt) = self.vm(id).attempt.clone() else { return };
        let claim = attempt.claim.clone().expect("set before the order was given");
        match answer {
            StoreAnswer::Created => {
                self.learn(cx, claim.clone(), cx.now);
                if let Some(attempt) = &mut self.vm(id).attempt {
                    attempt.fence_after = cx.now;
                }
                match attempt.kind {
                    Kind::Release { .. } => return self.released(cx, id),
                    Kind::Change if attempt.is_unowned() => return self.finish(cx, id),
                    _ => {}
                }
                let order =
                    GuardOrder::Claimed { tenure: claim.tenure, epoch: attempt.epoch, deadline: cx.now + ROW_DEADLINE };
                let ticket = cx.guard(order, Pending::Attempt(id));
                self.stage(id, Stage::Confirming, ticket);
            }
            // An earlier try of this attempt, by its mark. What a former agent of this host has claimed is not ours: when
            // the lease lapsed since, only the guard's row would tell, so the next generation is claimed.
            StoreAnswer::Exists(other) if is_same(&claim, &other) => {
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
                // Else the guard's word "never started" frees it, once somebody has seen that it came about.
                self.abandon(cx, claim.tenure, &attempt.kind);
                self.list_claims(cx);
                cx.set(Timer::Relist, cx.now + LANDED);
                self.fail(cx, id, Denial::Unable(format!("its claim could not be created: {why}")));
            }
            _ => {}
        }
    }

    /// Somebody else's claim stands where ours should: R2 says what that means for a stopped copy.
    pub(in crate::core) fn lost_to(&mut self, cx: &mut Cx, id: VmId, other: &Claim) {
        let owner = other.owner().map(|owner| self.name_of(owner.host));
        let newest = other.tenure.generation;
        let kind = self.vm(id).attempt.as_ref().map(|attempt| attempt.kind.clone());
        if let Some(Kind::Reclaim { old }) = kind {
            let ours = other.names(self.me.host);
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

    pub(in crate::core) fn abandon(&mut self, cx: &mut Cx, tenure: Tenure, kind: &Kind) {
        if !matches!(kind, Kind::Release { .. }) {
            cx.guard(GuardOrder::Abandon { tenure }, Pending::Nothing);
        }
    }

    pub(in crate::core) fn confirmed(&mut self, cx: &mut Cx, id: VmId, result: Result<(), Refusal>) {
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
            Kind::Leave { .. } => self.left(cx, id),
            Kind::Change | Kind::HandOver { .. } => self.finish(cx, id),
            Kind::Settle => self.settled(cx, id, &attempt),
            Kind::Adopt | Kind::Reclaim { .. } => self.lift_late_pause(cx, id),
            Kind::Arrive => self.define(cx, id),
            Kind::Run { .. } => self.pay_debts(cx, id),
            Kind::Release { .. } => {}
        }
    }

    /// It is claimed for this host. A VM that came is defined here, too; one that goes on here may stand since the switch.
    fn settled(&mut self, cx: &mut Cx, id: VmId, attempt: &Attempt) {
        let persistent = self.libvirt.domains.get(&id).is_some_and(|domain| domain.persistent);
        if !self.came_here(attempt.before.as_ref()) {
            if self.paused_by_switch(id) { self.lift_late_pause(cx, id) } else { self.finish(cx, id) }
        } else if persistent {
            self.finish(cx, id);
        } else {
            let order = StoreOrder::ReadRecord { vm: id, digest: attempt.digest };
            self.ask_store(cx, id, Stage::FetchingRecord, order);
        }
    }

    /// Rows of older generations say nothing that a newer claim does not say.
    pub(in crate::core) fn forget_older(&mut self, cx: &mut Cx, id: VmId) {
        let Some(newest) = self.vm(id).tenure() else { return };
        let older = self.guard.rows.keys().filter(|row| row.vm == id && row.generation < newest.generation);
        for tenure in older.copied().collect::<Vec<_>>() {
            self.forget(cx, tenure);
        }
    }
}

/// Whether a claim that was found is the one that was to be created. Not by its holder: that is the same in every try of this
/// host.
fn is_same(claim: &Claim, found: &Claim) -> bool {
    found.tenure == claim.tenure && found.nonce == claim.nonce
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_known_by_its_mark_alone() {
        let tenure = |generation| Tenure { vm: VmId::default(), generation: Generation(generation) };
        let ours = Claim {
            kind: ObjectKind::Vm,
            tenure: tenure(7),
            name: "web".into(),
            holder: Holder::None,
            home: DatastoreId::default(),
            wanted: Wanted::Running,
            reason: ClaimReason::Reclaimed,
            record: Digest::default(),
            nonce: Nonce(1),
            maker: crate::types::HostId::default(),
            made_unix_ms: 0,
            debts: Vec::new(),
        };
        // Of an earlier try, or of this host's former agent: all is the same but for the mark.
        assert!(!is_same(&ours, &Claim { nonce: Nonce(2), ..ours.clone() }));
        assert!(!is_same(&ours, &Claim { tenure: tenure(8), ..ours.clone() }));
        // The clock of day is the storage's business.
        assert!(is_same(&ours, &Claim { made_unix_ms: 5, ..ours.clone() }));
    }
}
