//! Datastores of kind `dir`: any shared mount. Records of the cluster lie in a folder of its own on each.
//!
//! ```text
//!   <mount>/.mainstay/<cluster id>/
//!     members, members.<generation>      roster                        members.rs
//!     hosts/<host id>, <host id>.vms     slots of beats; VM lists      beats.rs, slots.rs (the guard writes)
//!     claims/<vm>/<generation>           claims                        claims.rs, prepared.rs
//!     vms/<vm>/record.<digest>           records                       records.rs
//!     tmp/                               files without a name yet
//!
//!   agent ─ ask ─► Datastore ─► lanes.rs (threads, deadlines) ─► orders.rs ─► files.rs
//!   guard ───────► BeatFile  ────────────────────────────────────────────────► files.rs   (one thread of its own)
//! ```
//!
//! All reads that safety rests on are direct, through folders opened anew. An error is never silence, and never an
//! answer about a claim.
//!
//! Deliberately not here: what anything means for a VM (core), kind `rados` (later).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::types::store::{StoreAnswer, StoreOrder};
use crate::types::{ClusterId, DatastoreId, HostId};

pub mod beats;
mod claims;
pub(super) mod files;
mod lanes;
mod members;
mod orders;
mod prepared;
mod records;
pub mod slots; // Pure: the simulator runs it, too.
#[cfg(test)]
mod tests;

pub use beats::{BeatFile, OwnSlots, WriteFailed, Written, highest_claim};
pub use members::prepare;
pub use slots::{Doubt, SlotsKept, Stamp};

/// One datastore, for the agent of one host. One handle per process and datastore; cheap to clone.
#[derive(Clone)]
pub struct Datastore {
    lanes: Arc<lanes::Lanes>,
}

impl Datastore {
    /// Touches nothing and starts nothing before the first order.
    #[must_use]
    pub fn open(cluster: ClusterId, id: DatastoreId, me: HostId, path: PathBuf) -> Self {
        Self { lanes: Arc::new(lanes::Lanes::new(orders::Orders::new(cluster, id, me, path))) }
    }

    /// Carries out an order and answers exactly once, at the deadline at the latest: with `Timeout` (a late result is
    /// dropped, its claim may exist; the nonce finds it later), or at once with `Hung` if every thread for such orders
    /// is lost in calls past their deadline. `answer` runs on a thread of this datastore or of the caller: it should
    /// only pass the answer on.
    pub fn ask(&self, order: StoreOrder, within: Duration, answer: impl FnOnce(StoreAnswer) + Send + 'static) {
        self.lanes.ask(order, within, Box::new(answer));
    }
}
