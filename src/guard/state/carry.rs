//! What one guard hands on to the next of the same boot: everything that it promised or told, so that the next keeps it.
//!
//! ```text
//! state ──► Carried ──► bytes in the memory, before anything of it is told ··· death, reload ··· bytes ──► state
//! ```
//!
//! Carried on: who it is and its counter, configuration, the agent's last part of the beats, leases with epoch and t_c,
//! slots, attestations, doubts, rows, QEMUs. A lease that ended meanwhile lapses by its time, like any other.
//!
//! Not carried on: what can be seen anew (files, descriptors, troubles of the last try) and what only the agent's present
//! connection was told.
//!
//! Why nothing is lost that others rely on: the memory is written under the state's lock, before a counter leaves, a list
//! is written or a report goes out. So what it lacks was never told to anybody.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::State;
use crate::guard::store::Store;
use crate::guard::table::{ProcessKey, Table};
use crate::types::guard::GuardConfig;
use crate::types::{AgentBeat, BootId, Counter, DatastoreId, Incarnation, ListName, Time};

/// See the module. Another field, or another order, is another `memory::LAYOUT`; a test holds the two together.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Carried<'a> {
    /// Of which kernel: the clock and every process are its.
    pub boot: BootId,
    /// Under which the next goes on.
    pub incarnation: Incarnation,
    counter: Counter,
    config: Option<(u64, Cow<'a, GuardConfig>)>,
    configured_at: Time,
    agent: Option<(Cow<'a, AgentBeat>, Time)>,
    list: ListName,
    late_until: Time,
    stores: Cow<'a, BTreeMap<DatastoreId, Store>>,
    table: Cow<'a, Table>,
}

impl Carried<'_> {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain values always encode")
    }

    /// From bytes that `encode` made, in this layout.
    ///
    /// # Errors
    /// When they are something else.
    pub fn decode(bytes: &[u8]) -> Result<Carried<'static>, postcard::Error> {
        postcard::from_bytes(bytes)
    }

    /// Every QEMU that it may have to stop.
    pub fn processes(&self) -> impl Iterator<Item = ProcessKey> {
        self.table.processes().map(|(_, key)| key)
    }

    /// The configuration that it had.
    #[must_use]
    pub fn config(&self) -> Option<&GuardConfig> {
        self.config.as_ref().map(|(_, config)| config.as_ref())
    }
}

impl State {
    /// To hand on.
    #[must_use]
    pub fn carry(&self) -> Carried<'_> {
        Carried {
            boot: self.boot,
            incarnation: self.incarnation,
            counter: self.counter,
            config: self.config.as_ref().map(|(version, config)| (*version, Cow::Borrowed(config.as_ref()))),
            configured_at: self.configured_at,
            agent: self.agent.as_ref().map(|(beat, heard)| (Cow::Borrowed(beat), *heard)),
            list: self.list,
            late_until: self.late_until,
            stores: Cow::Borrowed(&self.stores),
            table: Cow::Borrowed(&self.table),
        }
    }

    /// Goes on with what another guard of this boot handed on. The caller opens the processes, and tells those that are
    /// gone as exited.
    #[must_use]
    pub fn carry_on(carried: Carried<'_>) -> Self {
        let mut state = Self::new(carried.boot, carried.incarnation, carried.table.into_owned());
        state.counter = carried.counter;
        state.config = carried.config.map(|(version, config)| (version, Arc::new(config.into_owned())));
        state.configured_at = carried.configured_at;
        state.agent = carried.agent.map(|(beat, heard)| (beat.into_owned(), heard));
        state.list = carried.list;
        state.late_until = carried.late_until;
        state.stores = carried.stores.into_owned();
        state.stores.values_mut().for_each(Store::carry_on);
        state.table.carry_on();
        state
    }
}

#[cfg(test)]
mod tests;
