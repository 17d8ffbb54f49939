//! QEMU's image locks: they outlive a dead host until its storage server drops them, and the start waits for that.
//!
//! ```text
//!   Locks ── free ─► start
//!     │ held: looked at again, every 0.5 s around the time at which the lease of the dead client ends (or for 2 min, if
//!     │       that is not known), every 5 s before and after, after 2 min every 30 s
//!     └ held, the owner was switched off, the datastore has a fence program ─► Freeing ─► Locks
//! ```
//!
//! A held lock is a timed retry, never a verdict that the old copy lives.

use super::*;
use crate::core::proofs::LateWrite;
use crate::types::VmRecord;

/// Around the time at which the locks should end, and as long as nobody knows that time.
const OFTEN: Duration = RETRY;
/// Before and after.
const SELDOM: Duration = Duration::from_secs(5);
/// When they should have ended long ago.
const RARELY: Duration = Duration::from_secs(30);
/// How long before and after the expected time they are looked at often.
const AROUND: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(10));
/// How long is long.
const LONG: Duration = Duration::from_secs(120);

/// When locks that are still held at `now` are looked at again. `expected` = when the server should drop them.
fn next_look(now: Time, since: Time, expected: Option<Time>) -> Duration {
    let waited = now.since(since);
    match expected {
        Some(end) if now + AROUND.0 < end => SELDOM.min((end - AROUND.0).since(now)),
        Some(end) if now < end + AROUND.1 => OFTEN,
        None if waited < LONG => OFTEN,
        Some(_) if waited < LONG => SELDOM,
        Some(_) | None => RARELY,
    }
}

impl Core {
    pub(in crate::core) fn probe_locks(&mut self, cx: &mut Cx, id: VmId, since: Time) {
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

    pub(in crate::core) fn locks_probed(
        &mut self,
        cx: &mut Cx,
        id: VmId,
        since: Time,
        result: Result<Option<String>, String>,
    ) {
        match result {
            Ok(None) => {
                let debts = self.vm(id).claim.as_ref().map(|claim| claim.debts.clone()).unwrap_or_default();
                let by_lock: Vec<Debt> =
                    debts.into_iter().filter(|debt| self.late_write(debt) == LateWrite::Lock).collect();
                // Nothing owed: it was QEMU that found a lock, or the old host was switched off.
                if by_lock.is_empty() { self.define(cx, id) } else { self.paid(cx, id, &by_lock) }
            }
            Ok(Some(_)) if self.frees_locks(cx, id, since) => {}
            Ok(Some(holder)) => {
                let expected = self.locks_end(id);
                let pause = next_look(cx.now, since, expected);
                let what = self.lock_text(id, &holder, cx.now.since(since));
                self.wait_in(cx, id, Stage::Locks { since }, pause, what);
            }
            Err(why) => {
                let what = format!("its image locks, which cannot be probed: {why}");
                self.wait_in(cx, id, Stage::Locks { since }, RETRY * 2, what);
            }
        }
    }

    /// What a start waits for whose image is locked.
    pub(in crate::core) fn lock_text(&self, id: VmId, holder: &str, waited: Duration) -> String {
        let lease =
            self.vms.get(&id).and_then(|vm| vm.claim.as_ref()).and_then(|claim| self.lock_lease(claim.next_home()));
        match lease {
            Some(lease) => format!(
                "the image lock of its old copy ({holder}), held at the storage server until its client's lease of {} s ends",
                lease.as_secs()
            ),
            None if waited < LONG => format!(
                "the image lock of its old copy ({holder}), held at the storage server until its client's lease ends"
            ),
            None => format!(
                "the image lock of its old copy ({holder}), which is held for more than {} s, and no lease is known that ends \
                 it: it goes when that host is back, or when the storage server is told to drop it \
                 (mainstay datastore set NAME --fence command:/PATH)",
                LONG.as_secs()
            ),
        }
    }

    /// How long the server of a datastore keeps locks of a silent client, if this host can tell.
    pub(in crate::core) fn lock_lease(&self, datastore: DatastoreId) -> Option<Duration> {
        self.lock_leases.get(&datastore).copied()
    }

    /// When the server should have dropped the locks of the hosts that this attempt waits for: their leases count from
    /// their last beats, which were no earlier than this host saw them.
    fn locks_end(&self, id: VmId) -> Option<Time> {
        let vm = self.vms.get(&id)?;
        let claim = vm.claim.as_ref()?;
        let owner = vm.attempt.as_ref()?.before.as_ref().and_then(Claim::owner).map(|owner| (owner.host, claim.home));
        let debtors = claim.debts.iter().map(|debt| (debt.host, debt.datastore)).chain(owner);
        let ends =
            |(host, datastore)| Some(self.stores.get(&datastore)?.changed_at(host)? + self.lock_lease(datastore)?);
        debtors.filter_map(ends).max()
    }

    /// A host that was switched off owes no late writes, but its server may keep its locks: they are looked at before the
    /// start, which else would fail on them.
    pub(in crate::core) fn may_be_locked(&self, id: VmId) -> bool {
        let attempt = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref());
        attempt.is_some_and(|attempt| is_off(attempt) && attempt.record.is_some())
    }

    /// The fence program makes a server drop the locks of a host that was switched off. It is asked once, since nothing
    /// hangs on it but time: the locks end by themselves.
    fn frees_locks(&mut self, cx: &mut Cx, id: VmId, since: Time) -> bool {
        let Some(attempt) = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()).filter(|attempt| is_off(attempt))
        else {
            return false;
        };
        let Some(owner) = attempt.before.as_ref().and_then(Claim::owner).filter(|_| !attempt.freed) else {
            return false;
        };
        let program = attempt.record.iter().flat_map(VmRecord::written).find_map(|datastore| {
            match self.late_write(&Debt { host: owner.host, boot: owner.boot, datastore }) {
                LateWrite::Command { program } if !self.runs_vms_on(datastore, owner.host, id, true, cx.now) => {
                    Some(program)
                }
                LateWrite::Command { .. } | LateWrite::Lock | LateWrite::Accepted | LateWrite::Open => None,
            }
        });
        let Some(program) = program else { return false };
        let host = self.name_of(owner.host);
        let ticket = cx.fence(program, owner.host, host, CALL, Pending::Attempt(id));
        self.stage(id, Stage::Freeing { since }, ticket);
        if let Some(attempt) = &mut self.vm(id).attempt {
            attempt.freed = true;
        }
        true
    }

    pub(in crate::core) fn locks_freed(&mut self, cx: &mut Cx, id: VmId, since: Time, result: Result<(), String>) {
        if let Err(why) = result {
            let name = self.vm_name(id);
            let text =
                format!("{name}: the fence program did not free its image locks, which end by themselves: {why}");
            cx.note(Note::warning("fence-failed", text).of(&name));
        }
        self.probe_locks(cx, id, since);
    }
}

fn is_off(attempt: &Attempt) -> bool {
    matches!(attempt.kind, Kind::Run { proof: Proof::PowerOff, .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_looked_at_often_around_their_end() {
        let at = |seconds: u64| Time::ZERO + Duration::from_secs(seconds);
        let table = [
            (10, Some(100), SELDOM),
            (97, Some(100), Duration::from_secs(1)),
            (98, Some(100), OFTEN),
            (109, Some(100), OFTEN),
            (110, Some(100), SELDOM),
            (129, Some(100), SELDOM),
            (130, Some(100), RARELY),
            (11, None, OFTEN),
            (129, None, OFTEN),
            (130, None, RARELY),
        ];
        for (now, expected, pause) in table {
            assert_eq!(next_look(at(now), at(10), expected.map(at)), pause, "at {now}, expected {expected:?}");
        }
    }
}
