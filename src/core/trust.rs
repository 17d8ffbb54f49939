//! A datastore that shows less than it once acknowledged: a server came back from a snapshot, a write-back cache was lost
//! (design 2, Odd cases: rolled back). Claims may be gone, and with them the only sign of who runs what.
//!
//! ```text
//!            own guard · a flag in some member's beats there · a flag in a heard host's network beats
//!   trusted ─────────────────────────────────────────────────────────────────────────────────────────► distrusted
//!      ▲                                                                                                   │
//!      └─────────── 'datastore accept': settings, each guard has compared its rows with the claims ────────┘
//! ```
//!
//! While it is distrusted nobody's silence there counts (windows are void) and nothing is claimed there; what the guards
//! found claimed as they hold it runs on. A flag names the acceptance under which it was raised: a dead host's last beat
//! must not flag for ever.
//!
//! **Generations after an acceptance** begin at `accepted × LIFT`, above all that any host can remember, so that nobody
//! needs to be asked: what a host that was away still holds is below whatever was claimed meanwhile, and no generation is
//! given twice. VMs that run are lifted at once, all others with their next claim.
//!
//! Deliberately not here: how it is found (`guard::renew`), what a guard ends (`guard::state::trust`).

use super::Core;
use super::cx::{Cx, Pending};
use super::note::Note;
use crate::types::guard::GuardOrder;
use crate::types::{Claim, DatastoreId, Generation, HostId, Tenure, Time, VmId};

/// Between the first generations of two acceptances: more claims than a VM can have in between.
pub const LIFT: u64 = 1_000_000;

impl Core {
    /// Why nothing may be claimed there, and no silence counts, for people; none = it is trusted.
    pub(super) fn distrusted(&self, id: DatastoreId) -> Option<&str> {
        self.stores.get(&id)?.distrusted.as_deref()
    }

    /// The same, as what a VM waits for.
    pub(super) fn waits_for_trust(&self, id: DatastoreId) -> Option<String> {
        self.distrusted(id)?;
        let name = self.store_name(id);
        Some(format!(
            "an operator's word that datastore {name}, which shows less than before, may be used as it is (mainstay datastore \
             accept {name})"
        ))
    }

    /// Looks at every sign; tells what has changed.
    pub(super) fn follow_trust(&mut self, cx: &mut Cx, id: DatastoreId) {
        let own = self.guard.leases.get(&id).and_then(|lease| lease.rolled_back.clone());
        let others = self.flagged_by_another(id, cx.now);
        if let (None, Some(why), true) = (&own, &others, self.guard.settled) {
            // Its rows are compared with the claims there, too: it may not have beaten there since.
            cx.guard(GuardOrder::Distrust { datastore: id, why: why.clone() }, Pending::Nothing);
        }
        let name = self.store_name(id);
        let Some(store) = self.stores.get_mut(&id) else { return };
        let before = std::mem::replace(&mut store.distrusted, own.or(others));
        if store.distrusted.is_some() {
            store.silence.clear();
        }
        match (before, &store.distrusted) {
            (None, Some(why)) => cx.note(Note::alarm(
                "datastore-rolled-back",
                format!(
                    "datastore {name} shows less than before: {why}; nothing is claimed there until an operator says \
                     'mainstay datastore accept {name}'"
                ),
            )),
            (Some(_), None) => {
                self.check = true;
                self.look = true;
                cx.note(Note::info("datastore-trusted", format!("datastore {name} is trusted again")));
            }
            (None, None) | (Some(_), Some(_)) => {}
        }
    }

    pub(super) fn follow_trust_everywhere(&mut self, cx: &mut Cx) {
        let ids: Vec<DatastoreId> = self.stores.keys().copied().collect();
        ids.into_iter().for_each(|id| self.follow_trust(cx, id));
    }

    fn flagged_by_another(&self, id: DatastoreId, now: Time) -> Option<String> {
        let accepted = self.settings.datastore(id)?.accepted;
        let others = self.settings.members.iter().map(|member| member.host).filter(|host| *host != self.me.host);
        others.into_iter().find_map(|host| {
            let there = self.stores.get(&id).and_then(|store| store.newest_of(host));
            if there.is_some_and(|beat| accepted < beat.accepted) {
                return Some(format!("{} has newer settings, in which it was accepted anew", self.name_of(host)));
            }
            // Later settings of ours may hold the acceptance that ended an older flag.
            let heard = self.peers.get(&host).and_then(|peer| peer.beat.as_ref());
            let heard = heard.filter(|beat| self.settings.version <= beat.agent.settings_version);
            let heard = heard.filter(|_| self.is_heard(host, now));
            let flagged = there.is_some_and(|beat| beat.flags.distrusts && accepted <= beat.accepted)
                || heard.is_some_and(|beat| self.datastores_in(beat.distrusts).contains(&id));
            flagged.then(|| format!("{} found that it went back in time", self.name_of(host)))
        })
    }

    /// An operator has accepted it: what was remembered of it says nothing any more; its claims are read anew.
    pub(super) fn accepted_anew(&mut self, cx: &mut Cx, id: DatastoreId) {
        let name = self.store_name(id);
        cx.note(Note::warning(
            "datastore-accepted",
            format!(
                "datastore {name} is accepted as it is; generations of its claims go on above {}",
                self.floor(id).0
            ),
        ));
        if let Some(store) = self.stores.get_mut(&id) {
            store.silence.clear();
            store.listed = None;
        }
        for vm in self.vms.values_mut().filter(|vm| vm.claim.as_ref().is_some_and(|claim| claim.home == id)) {
            (vm.claim, vm.passed, vm.over_since, vm.bad) = (None, None, None, None);
            vm.known = Time::ZERO;
        }
    }

    /// The first generation that a claim there can have now.
    pub(super) fn floor(&self, home: DatastoreId) -> Generation {
        Generation(self.settings.datastore(home).map_or(0, |datastore| u64::from(datastore.accepted) * LIFT))
    }

    /// (v, g+1).
    pub(super) fn next_tenure(&self, vm: VmId, home: DatastoreId, before: Option<&Claim>) -> Tenure {
        let next = before.map_or(Generation(1), |claim| claim.tenure.generation.next());
        Tenure { vm, generation: next.max(self.floor(home)) }
    }

    /// Whether what this host remembers may be from before an acceptance that we know of.
    pub(super) fn is_behind(&self, host: HostId) -> bool {
        let beat = self.peers.get(&host).and_then(|peer| peer.beat.as_ref());
        beat.is_some_and(|beat| beat.agent.settings_version < self.settings.version)
    }
}
