//! How a datastore is for this host: by the guard's timed direct writes and this agent's timed direct reads, each on threads
//! of its own, each every `renew`.
//!
//! ```text
//!  Well ─► Stalls (a write or a read is late) ─► Down (for apd_after)      errors count like silence
//!   ▲        Full (ENOSPC)                         │
//!   │        Gone (ENODEV, ENXIO, ESHUTDOWN;       │
//!   │        ESTALE for apd_after while others     │
//!   │        reach it)                             │
//!   └───────────── both succeed again ─────────────┘
//! ```
//!
//! ESTALE comes with a server's failover and re-export, too: alone it is no more than an error.
//!
//! Per host and datastore, never per host. What follows is notes only: leases and claims decide what runs.
//!
//! Deliberately not here: what is done with a VM whose datastore is down.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::Cx;
use super::note::Note;
use super::timing;
use crate::types::store::StoreFailure;
use crate::types::{DatastoreId, HostId, Time};

/// What a datastore is for this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Health {
    /// Writes and reads succeed in time.
    #[default]
    Well,
    /// Late, or failing, for less than `apd_after`: it goes on by itself.
    Stalls,
    /// For longer: all paths of this host are down.
    Down,
    /// Writes find no space.
    Full,
    /// The storage says that it is gone for this host: nothing comes back by itself.
    Gone,
}

/// What an error says of what is to come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Loss {
    /// The storage says that it is gone.
    Gone,
    /// What was there is not there any more, though looked for anew.
    Stale,
}

impl Loss {
    /// Of a failed read; none = it may come back any moment.
    #[must_use]
    pub fn of(failure: &StoreFailure) -> Option<Self> {
        match failure {
            StoreFailure::Gone { .. } => Some(Self::Gone),
            StoreFailure::Stale { .. } => Some(Self::Stale),
            StoreFailure::Timeout(_)
            | StoreFailure::Hung
            | StoreFailure::Full { .. }
            | StoreFailure::ReadOnly { .. }
            | StoreFailure::Missing { .. }
            | StoreFailure::Bad { .. }
            | StoreFailure::Io { .. } => None,
        }
    }
}

/// What this host knows of one datastore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Signs {
    /// How long ago the last write that succeeded was begun.
    pub wrote: Duration,
    /// How long ago the last read that succeeded ended.
    pub read: Duration,
    /// The last write found no space.
    pub full: bool,
    /// What the last failed read says.
    pub loss: Option<Loss>,
    /// Another host reaches it.
    pub elsewhere: bool,
}

/// The judgement.
#[must_use]
pub fn judge(signs: Signs, suspect: Duration, apd_after: Duration) -> Health {
    let silent = signs.wrote.max(signs.read);
    let gone = match signs.loss {
        Some(Loss::Gone) => suspect <= silent,
        Some(Loss::Stale) => apd_after <= silent && signs.elsewhere,
        None => false,
    };
    if gone {
        Health::Gone
    } else if signs.full && signs.read < suspect {
        Health::Full
    } else if silent < suspect {
        Health::Well
    } else if silent < apd_after {
        Health::Stalls
    } else {
        Health::Down
    }
}

impl Core {
    fn signs_of(&self, id: DatastoreId, now: Time) -> Option<Signs> {
        let lease = self.guard.leases.get(&id)?;
        let since = |at: Time| now.since(at.max(self.awake_since).max(self.guard.since));
        let store = self.stores.get(&id)?;
        let read = store.read_at().unwrap_or(Time::ZERO);
        // Before its first beat of a boot the guard may watch for a window, and does not write.
        let watched = self.guard.since + timing::window(self.settings.timing.lease, false);
        let written = if lease.written == Time::ZERO { watched } else { lease.written };
        let elsewhere = store.loss.is_some() && self.peers.keys().any(|host| self.is_reached_by(*host, id, now));
        Some(Signs { wrote: since(written), read: since(read), full: lease.full, loss: store.loss, elsewhere })
    }

    fn is_reached_by(&self, host: HostId, id: DatastoreId, now: Time) -> bool {
        let beat = self.peers.get(&host).and_then(|peer| peer.beat.as_ref()).filter(|_| self.is_heard(host, now));
        beat.is_some_and(|beat| {
            let lost = self.datastores_in(beat.agent.storage_lost).contains(&id);
            self.datastores_in(beat.reaches).contains(&id) && !lost
        })
    }

    /// How a datastore is for this host, and for how long it has been silent.
    pub(super) fn health(&self, id: DatastoreId, now: Time) -> (Health, Duration) {
        let Some(signs) = self.signs_of(id, now) else { return (Health::default(), Duration::ZERO) };
        let health = judge(signs, self.settings.timing.suspect, self.settings.vms.apd_after);
        (health, signs.wrote.max(signs.read))
    }

    /// In words; none while it is well.
    pub(super) fn health_text(&self, id: DatastoreId, now: Time) -> Option<String> {
        let (health, silent) = self.health(id, now);
        let silent = silent.as_secs();
        match health {
            Health::Well => None,
            Health::Stalls => Some(format!("stalls for this host: nothing has succeeded for {silent} s")),
            Health::Down => Some(format!(
                "all paths of this host are down for {silent} s; look at its network to the storage, the mount, the server"
            )),
            Health::Gone => Some(format!(
                "is gone for this host for {silent} s: the storage itself says so, and nothing comes back by itself; was it \
                 deleted or exported anew, or was this host shut out? mount it again"
            )),
            Health::Full => Some("is full: VMs that write are paused until there is room".to_owned()),
        }
    }

    /// Tells what has changed; once per beat period.
    pub(super) fn look_at_datastores(&mut self, cx: &mut Cx) {
        let ids: Vec<DatastoreId> = self.stores.keys().copied().collect();
        for id in ids {
            let (health, _) = self.health(id, cx.now);
            let text = self.health_text(id, cx.now);
            let name = self.store_name(id);
            let Some(store) = self.stores.get_mut(&id) else { continue };
            let before = std::mem::replace(&mut store.health, health);
            let note = match (health, text) {
                _ if before == health => continue,
                (Health::Stalls, Some(text)) => Note::warning("datastore-stalls", format!("datastore {name} {text}")),
                (Health::Down, Some(text)) => Note::alarm("datastore-down", format!("datastore {name}: {text}")),
                (Health::Gone, Some(text)) => Note::alarm("datastore-gone", format!("datastore {name} {text}")),
                (Health::Full, Some(text)) => Note::alarm("datastore-full", format!("datastore {name} {text}")),
                (_, _) => Note::info("datastore-answers", format!("datastore {name} answers this host again")),
            };
            cx.note(note);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_has_a_name() {
        let s = Duration::from_secs;
        let table = [
            (0, 0, false, Health::Well),
            (2, 2, false, Health::Well),
            (3, 0, false, Health::Stalls),
            (0, 3, false, Health::Stalls),
            (19, 1, false, Health::Stalls),
            (20, 1, false, Health::Down),
            (1, 25, false, Health::Down),
            (9, 1, true, Health::Full),
            (25, 1, true, Health::Full),
            (9, 9, true, Health::Stalls),
            (25, 25, true, Health::Down),
        ];
        for (wrote, read, full, expected) in table {
            let signs = Signs { wrote: s(wrote), read: s(read), full, loss: None, elsewhere: true };
            assert_eq!(judge(signs, s(3), s(20)), expected, "{signs:?}");
        }
    }

    #[test]
    fn what_is_gone_is_told_from_what_is_late() {
        let s = Duration::from_secs;
        let table = [
            (Loss::Gone, 2, false, Health::Well),
            (Loss::Gone, 3, false, Health::Gone),
            (Loss::Stale, 3, true, Health::Stalls),
            (Loss::Stale, 19, true, Health::Stalls),
            (Loss::Stale, 20, true, Health::Gone),
            (Loss::Stale, 60, false, Health::Down),
        ];
        for (loss, silent, elsewhere, expected) in table {
            let signs = Signs { wrote: s(silent), read: s(silent), full: false, loss: Some(loss), elsewhere };
            assert_eq!(judge(signs, s(3), s(20)), expected, "{signs:?}");
        }
    }
}
