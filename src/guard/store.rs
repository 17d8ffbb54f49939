//! What the guard knows of one datastore: its lease, its own path to it, attestations, and doubts.
//!
//! ```text
//! Opening ──► Watching ──► Beating        Watching: something of us is there from another boot, so it must stay as it
//!    │  nothing of another boot ▲         is for one window of R3. A change starts the watch anew.
//!    └──────────────────────────┘
//! ```
//!
//! Deliberately not here: the thread and its I/O (`renew`).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::Taken;
use crate::core::lease::Lease;
use crate::core::timing;
use crate::exec::datastore::SlotsKept;
use crate::mutants::{Mutant, planted};
use crate::types::guard::{GuardDatastore, LeaseView};
use crate::types::settings::Timing;
use crate::types::{Attestation, Attested, Counter, DatastoreId, HostIndex, Incarnation, Time};

/// How far the thread of a datastore is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Stage {
    /// Its files could not be opened and read yet.
    Opening,
    /// Looks whether another host uses our name.
    Watching,
    /// Beats.
    Beating,
}

/// An attestation for another host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Heard {
    attestation: Attestation,
    since: Time,
    /// The newest that stands in a beat that counts. A newer one must not hide it before that host was told: where the
    /// beats of both come in a bad order, it would never be.
    persisted: Option<Attestation>,
}

/// See the module. A guard hands it on to the next of its boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Store {
    /// Which thread serves it: one that finds another number here has been replaced and ends.
    pub life: u64,
    /// Mount point.
    pub path: String,
    /// Its bit in a beat.
    pub position: u8,
    /// The right to run of every VM with its home here.
    pub lease: Lease,
    /// How far its thread is.
    pub stage: Stage,
    /// What makes it untrustworthy, for people. While it stands there are no beats and no claims here.
    pub doubt: Option<String>,
    /// It showed less than before, and no operator has accepted that; why, for people. Beats go on and say so, so that
    /// what is claimed there as this host holds it runs on. No claims, no attestations.
    pub rolled_back: Option<String>,
    /// Nothing renews the lease before own rows were compared with the claims there.
    pub unverified: bool,
    /// What stands there after a lapse may be older than its disks.
    pub outdates: bool,
    /// How often an operator has accepted it as it is.
    pub accepted: u32,
    /// What is wrong with the last try, for people.
    pub trouble: Option<String>,
    /// It was that there is no space.
    pub full: bool,
    /// The last own write that counted, and when that was known.
    counted: Option<(Taken, Time)>,
    /// The newest beat that it acknowledged, since own slots were last taken as they are.
    acknowledged: Option<(Incarnation, Counter)>,
    /// Which of its slots rest, and which is being written: those go on resting in the next guard.
    pub slots: Option<SlotsKept>,
    attestations: BTreeMap<HostIndex, Heard>,
}

impl Store {
    /// Not opened yet.
    #[must_use]
    pub fn new(datastore: GuardDatastore, life: u64, incarnation: Incarnation, lease: Duration) -> Self {
        Self {
            life,
            path: datastore.path,
            position: datastore.position,
            lease: Lease::new(incarnation, lease),
            stage: Stage::Opening,
            doubt: None,
            rolled_back: None,
            unverified: false,
            outdates: false,
            accepted: datastore.accepted,
            trouble: None,
            full: false,
            counted: None,
            acknowledged: None,
            slots: None,
            attestations: BTreeMap::new(),
        }
    }

    /// In a new process: its files are not open, and nothing was tried yet.
    pub fn carry_on(&mut self) {
        self.stage = Stage::Opening;
        self.trouble = None;
    }

    /// A slot is being written: until its answer came nobody knows what lies there.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        self.slots.is_some_and(|slots| slots.writing.is_some())
    }

    /// Its bit in a beat's set.
    #[must_use]
    pub fn bit(&self) -> u64 {
        1u64.checked_shl(u32::from(self.position)).unwrap_or(0)
    }

    /// Whether our own writes reach it: the last one counted lately, and nothing failed since.
    #[must_use]
    pub fn own_path(&self, lease: Duration, now: Time) -> bool {
        self.trouble.is_none()
            && self.counted.is_some_and(|(taken, _)| now.since(taken.at) <= timing::witness_gap(lease))
    }

    /// Whether a beat of ours should have counted by now: others are asked to attest before it is too late for that.
    #[must_use]
    pub fn is_overdue(&self, timing: &Timing, now: Time) -> bool {
        self.counted.is_none_or(|(taken, _)| timing::attest_after(timing) < now.since(taken.at))
    }

    /// Whether some attestation for others waits for our next beat. One that cannot be written is not hurried.
    #[must_use]
    pub fn owes(&self) -> bool {
        self.trouble.is_none() && self.attestations.values().any(|heard| heard.persisted != Some(heard.attestation))
    }

    /// The newest beat that it acknowledged to this guard: it must never show less.
    #[must_use]
    pub fn acknowledged(&self) -> Option<(Incarnation, Counter)> {
        self.acknowledged.filter(|_| !self.unverified)
    }

    /// Own rows were compared with the claims there: what it shows now is what it must not fall behind.
    pub fn verified(&mut self) {
        (self.unverified, self.outdates) = (false, false);
        self.acknowledged = None;
    }

    /// Why no claims may be made there now, for people.
    #[must_use]
    pub fn distrusted(&self) -> Option<&str> {
        let unverified = self.unverified.then_some("its claims are being compared with what this host holds");
        self.doubt.as_deref().or(self.rolled_back.as_deref()).or(unverified)
    }

    /// It shows less than before. Whether that is new.
    pub fn distrust(&mut self, why: String) -> bool {
        self.unverified = true;
        self.outdates |= self.rolled_back.is_none();
        self.attestations.clear();
        self.rolled_back.replace(why).is_none()
    }

    /// An operator takes it as it is. What this host remembers of it may be more than it shows.
    pub fn accept(&mut self, accepted: u32) {
        if self.accepted < accepted {
            self.accepted = accepted;
            self.outdates |= self.rolled_back.take().is_none();
            self.unverified = true;
            self.attestations.clear();
        }
    }

    /// An own beat counts; so do the attestations that stood in it.
    pub fn counted(&mut self, taken: Taken, known: Time, with: &[Attestation]) {
        self.counted = Some((taken, known));
        self.acknowledged = Some((taken.incarnation, taken.counter));
        self.trouble = None;
        self.full = false;
        for attestation in with {
            if let Some(heard) = self.attestations.get_mut(&attestation.index) {
                heard.persisted = Some(*attestation);
            }
        }
    }

    /// An attestation for another host. Only a newer one replaces what stands. None where the other host itself has to
    /// see what became of its claims.
    pub fn attest(&mut self, attestation: Attestation, now: Time) {
        if self.rolled_back.is_some() || self.unverified {
            return;
        }
        let newer = |heard: &Heard| {
            (heard.attestation.incarnation, heard.attestation.counter) < (attestation.incarnation, attestation.counter)
        };
        let known = self.attestations.get(&attestation.index);
        if known.is_none_or(newer) {
            let persisted = known.and_then(|heard| heard.persisted);
            self.attestations.insert(attestation.index, Heard { attestation, since: now, persisted });
        }
    }

    /// Those that go into a beat taken at `now`; what is too old goes.
    pub fn attestations(&mut self, own: HostIndex, now: Time) -> Vec<Attestation> {
        self.attestations.retain(|index, heard| {
            *index != own && now.since(heard.since) < timing::attestation_kept(heard.attestation.lease)
        });
        let stands =
            |heard: &&Heard| !(heard.persisted == Some(heard.attestation) && planted(Mutant::AttestationDropped));
        self.attestations.values().filter(stands).map(|heard| heard.attestation).collect()
    }

    /// Those that are persisted, for the hosts that they are about.
    pub fn attested(&self) -> impl Iterator<Item = Attested> {
        let told = |heard: &Heard| {
            if planted(Mutant::AttestedUnwritten) { Some(heard.attestation) } else { heard.persisted }
        };
        self.attestations.values().filter_map(told).map(|attestation| Attested {
            datastore: self.position,
            index: attestation.index,
            incarnation_low: attestation.incarnation.low32(),
            counter: attestation.counter,
        })
    }

    /// Whether the network may carry our beats as far as this datastore can tell. `waited`: one window has passed since
    /// the guard was configured.
    #[must_use]
    pub fn network_may(&self, waited: bool) -> bool {
        match self.stage {
            Stage::Beating => true,
            Stage::Watching => false,
            Stage::Opening => waited,
        }
    }

    /// For agent and people.
    #[must_use]
    pub fn view(&self, datastore: DatastoreId, lease: Duration, now: Time) -> LeaseView {
        let (written, known) = self.counted.map_or_else(Default::default, |(taken, known)| (taken.at, known));
        LeaseView {
            datastore,
            epoch: self.lease.epoch(),
            until: self.lease.is_valid(now).then(|| self.lease.valid_until()).flatten(),
            own_path: self.own_path(lease, now),
            written,
            latency: known.since(written),
            full: self.full,
            trouble: self.doubt.clone().or_else(|| self.rolled_back.clone()).or_else(|| self.trouble.clone()),
            rolled_back: self.distrusted().filter(|_| self.doubt.is_none()).map(str::to_owned),
        }
    }
}
