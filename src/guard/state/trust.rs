//! A datastore that shows less than before: it was rolled back, or lost something (design 2, Odd cases).
//!
//! ```text
//!            own slots older than acknowledged, a held claim gone, or another host says so
//!   trusted ────────────────────────────────────────────────────────────────────────────────► rolled back, unverified
//!      ▲  ▲                                                                                         │ claims read
//!      │  └── claims read ── unverified ◄── accepted by an operator ── rolled back, verified ◄──────┘
//! ```
//!
//! What stood after a lapse when that was found out is killed, and what had come by a move and had no claim of its own yet: another
//! host may have run it since, and the claim that says so may be gone. Its disks are what counts.
//!
//! What runs under a claim that is there as this host holds it runs on, since beats go on. Everything else loses its right
//! to run before the lease is renewed again: somebody who sees only the datastore could take it.
//!
//! Deliberately not here: reading (`renew`), what the flag means to others (`core::trust`).

use super::State;
use crate::guard::table::Table;
use crate::types::guard::Refusal;
use crate::types::{Claim, DatastoreId, Epoch, Time, VmId};

impl State {
    /// The present epoch of a home, if its lease is valid at `now` and its storage is trusted.
    ///
    /// # Errors
    /// Why no claim can be made there.
    pub fn epoch(&self, home: DatastoreId, now: Time) -> Result<Epoch, Refusal> {
        let store = self.stores.get(&home).ok_or(Refusal::UnknownDatastore(home))?;
        if let Some(doubt) = store.distrusted() {
            return Err(Refusal::WrongState(format!("the datastore cannot be trusted: {doubt}")));
        }
        if store.lease.is_valid(now) { Ok(store.lease.epoch()) } else { Err(Refusal::NoLease) }
    }

    /// It shows less than before.
    pub fn distrust(&mut self, home: DatastoreId, why: &str, now: Time) {
        let Some(store) = self.stores.get_mut(&home) else { return };
        if store.distrust(why.to_owned()) {
            self.say(format!("datastore {home} shows less than before: {why}")); // The agent tells people.
        }
        self.touch(); // The next guard must not trust it, either.
        self.report_lease(home, now);
    }

    /// What the claims there say of the VMs that live here (`Table::living`), read after own slots were read anew. What
    /// is not held by them ends.
    pub fn verified(&mut self, home: DatastoreId, claims: &[(VmId, Option<Claim>)], now: Time) {
        let Some((_, config)) = &self.config else { return };
        let me = config.host;
        let held = |table: &Table, vm: VmId| {
            let claim = claims.iter().find(|(of, _)| *of == vm).and_then(|(_, claim)| claim.as_ref());
            claim.is_some_and(|claim| table.vouches(claim, me))
        };
        if self.stores.get(&home).is_some_and(|store| store.outdates) {
            self.table.outdate(home);
        }
        let ended: Vec<VmId> = self.table.living(home).into_iter().filter(|vm| !held(&self.table, *vm)).collect();
        for vm in ended {
            self.table.lapse_vm(vm);
            self.say(format!("VM {vm} is stopped: its claim is not on datastore {home} as this host holds it"));
        }
        if let Some(store) = self.stores.get_mut(&home) {
            store.verified();
        }
        self.touch();
        self.report_lease(home, now);
    }
}
