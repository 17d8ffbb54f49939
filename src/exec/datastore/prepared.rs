//! Files kept created, allocated and open, of which claims are made: a full disk, or a server in its grace period that
//! refuses to open, must not stop a re-claim.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::files::{Folder, failure, sweep, tmp_name, write_at};
use crate::exec::clock;
use crate::types::store::StoreFailure;
use crate::types::{HostId, Time};
use crate::wire::record::BLOCK;

/// How many are kept.
const KEPT: usize = 16;
/// After a failure they are not made anew for this long.
const PAUSE: Duration = Duration::from_secs(10);
/// First parts of the names in `tmp` that an agent uses.
const KINDS: [&str; 3] = [CLAIM, "record", "roster"];
const CLAIM: &str = "claim";

/// One such file: it becomes one claim, or none.
pub struct Ready {
    /// In `tmp`.
    pub name: String,
    /// Open for direct writes.
    pub file: File,
}

impl Ready {
    /// Makes one, its block allocated on the disk.
    pub fn make(tmp: &Folder, me: HostId) -> Result<Self, StoreFailure> {
        let name = tmp_name(CLAIM, me);
        let file = tmp.create(&name)?;
        let path = tmp.path(&name);
        let allocated = write_at(&file, &path, 0, &[0; BLOCK])
            .and_then(|()| file.sync_all().map_err(|error| failure(&path, &error)));
        if let Err(failure) = allocated {
            let _ = tmp.remove(&name);
            return Err(failure);
        }
        Ok(Self { name, file })
    }
}

/// Those of one host on one datastore.
pub struct Pool {
    me: HostId,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Ready>,
    swept: bool,
    not_before: Time,
}

impl Pool {
    /// Empty.
    pub fn new(me: HostId) -> Self {
        Self { me, state: Mutex::default() }
    }

    /// Takes one, if one is there.
    pub fn take(&self) -> Option<Ready> {
        self.state().ready.pop_front()
    }

    /// Takes all.
    pub fn take_all(&self) -> VecDeque<Ready> {
        std::mem::take(&mut self.state().ready)
    }

    /// Whether it is time to fill it.
    pub fn is_low(&self) -> bool {
        let state = self.state();
        state.ready.len() < KEPT && state.not_before <= clock::now()
    }

    /// Fills it; first removes what an earlier process left.
    pub fn fill(&self, tmp: &Folder) -> Result<(), StoreFailure> {
        self.state().not_before = clock::now() + PAUSE;
        if !self.state().swept {
            KINDS.iter().try_for_each(|kind| sweep(tmp, kind, self.me))?;
            self.state().swept = true;
        }
        while self.state().ready.len() < KEPT {
            let ready = Ready::make(tmp, self.me)?;
            self.state().ready.push_back(ready);
        }
        self.state().not_before = Time::ZERO;
        Ok(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
