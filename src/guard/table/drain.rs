//! What a QEMU that has exited may still have under way in this host's kernel.
//!
//! ```text
//!  exit ─► Draining ──► Exited { clean: true }, or HandedTo    every datastore it wrote to took a beat begun after it
//!      │       └──────► Exited { clean: false }                a path failed, or was not proven for L/2, before that
//!      └──────────────► Exited { clean: false }                some path did not work at the exit
//! ```
//!
//! That a path worked a while before the exit says nothing about the last writes: it may have broken in between. "Over" is
//! said at once all the same: nothing runs, and whoever starts it where it was need not wait.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Table;
use super::{Phase, Row};
use crate::types::{Counter, DatastoreId, HostId, Over, Tenure};

/// An exit whose writes are not yet known to have landed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Drain {
    /// Beats above it were begun after the exit.
    after: Counter,
    /// Where no such beat has counted yet.
    left: BTreeSet<DatastoreId>,
    /// Who got its memory.
    pub(super) to: Option<HostId>,
}

impl Table {
    /// An own beat counts on a datastore.
    pub fn landed(&mut self, store: DatastoreId, counter: Counter) {
        for drain in self.drains.values_mut().filter(|drain| drain.after < counter) {
            drain.left.remove(&store);
        }
        self.end_drains(
            |drain| drain.left.is_empty(),
            |drain| drain.to.map_or(Over::Exited { clean: true }, Over::HandedTo),
        );
    }

    /// Paths that do not work end the wait: nobody can tell any more what landed.
    pub fn lost(&mut self, works: impl Fn(DatastoreId) -> bool) {
        let lost = |drain: &Drain| !drain.left.iter().all(|store| works(*store));
        self.end_drains(lost, |_| Over::Exited { clean: false });
    }

    /// Whether an exit waits for a beat on this datastore.
    #[must_use]
    pub fn drains_on(&self, store: DatastoreId) -> bool {
        self.drains.values().any(|drain| drain.left.contains(&store))
    }

    /// What is said of a row whose QEMU has just exited.
    pub(super) fn drain(
        &mut self,
        tenure: Tenure,
        to: Option<HostId>,
        last: Counter,
        works: &impl Fn(DatastoreId) -> bool,
    ) -> Over {
        let row = self.row(tenure);
        let left: BTreeSet<DatastoreId> = row.writes.iter().copied().chain([row.home]).collect();
        let said = row.exited(left.iter().all(|store| works(*store)));
        if said != (Over::Exited { clean: true }) {
            return said; // Some path does not work, or it never executed anything.
        }
        self.drains.insert(tenure, Drain { after: last, left, to });
        Over::Draining
    }

    fn end_drains(&mut self, ended: impl Fn(&Drain) -> bool, say: impl Fn(&Drain) -> Over) {
        while let Some((tenure, drain)) = self.drains.iter().find(|(_, drain)| ended(drain)) {
            let (tenure, said) = (*tenure, say(drain));
            self.drains.remove(&tenure);
            if let Some(Row { phase: Phase::Over { why: why @ Over::Draining, .. }, .. }) = self.rows.get_mut(&tenure) {
                *why = said;
                self.changed(tenure);
            }
        }
    }
}
