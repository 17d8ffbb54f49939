//! Homes follow disks (R7): when a VM that runs here has all its disks on another datastore (`virsh blockcopy --pivot`, or
//! a start from a definition that was changed so), its claims go there, too.
//!
//! ```text
//!   disks and definition on D2, home D1, both leases valid ─► record on D2 ─► Leave: row and claim g+1 on D1, "moves to D2"
//!                                                                                 │ owner lets go of it: whoever proves that
//!                                                                                 ▼ creates g+2 on D2, and nowhere else
//!                       home D2, lease on D1 forgotten ◄─ Settle: row and claim g+2 on D2
//! ```
//!
//! | cut after | what runs | who goes on |
//! |---|---|---|
//! | the record | under g, by D1 | this host, or a taker on D1 |
//! | claim g+1 | under g+1 (or g), by D1 | this host: Settle on D2; a taker, with a proof by D1 alone: g+2 on D2 |
//! | row g+2 | under g+1, by D1 *and* D2: the guard ends both rows when either lease lapses | the same |
//! | claim g+2 | until it is known: by D1 and D2 | this host; a taker, with a proof by D2: g+3 on D2 |
//!
//! The claim on D2 is created exclusively, so of the two only one gets it; whoever creates it first reads that g+1 is still
//! the newest on D1 (`attempt`, LookingBack). Every step is begun anew from what rows and claims show, so that an agent
//! that dies between any two loses nothing.
//!
//! A VM that stands keeps its home: it starts under it, which needs that datastore, and its home follows a moment later.
//!
//! Deliberately not here: how a claim is made (`attempt`), where the disks lie (`exec/libvirt`).

use serde::{Deserialize, Serialize};

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Timer};
use super::definitions::SETTLED;
use super::event::Recorded;
use super::note::Note;
use crate::types::vm::DomainState;
use crate::types::{Claim, DatastoreId, Holder, VmId};

/// Where the disks lie that a VM runs with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Lies {
    /// Everything that a start needs, on this datastore.
    On(DatastoreId),
    /// On several, or some of it on none.
    Apart(Vec<DatastoreId>),
    /// On no datastore; why nothing more is known.
    Outside(String),
}

impl Lies {
    /// Of what is known of a running VM.
    #[must_use]
    pub fn of(live: &Recorded) -> Self {
        match live {
            Err(why) => Self::Outside(why.clone()),
            Ok(record) => record.place().map_or_else(
                || {
                    let needed = record.disks.iter().filter(|disk| !disk.optional);
                    let mut all: Vec<DatastoreId> = needed.filter_map(|disk| disk.datastore).collect();
                    all.sort_unstable();
                    all.dedup();
                    Self::Apart(all)
                },
                Self::On,
            ),
        }
    }
}

impl Core {
    /// The newest claim, of this host, says that the home moves: the next one is made there, before any other.
    pub(super) fn home_moves(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) -> bool {
        let Holder::Moved { to, .. } = claim.holder else { return false };
        // A lease that becomes valid brings us here again.
        if self.holds(to) {
            self.begin(cx, id, Kind::Settle, to, Vec::new());
        }
        true
    }

    /// It runs here under our claim: its home follows its disks. True: it is about to, and no other claim is made meanwhile.
    pub(super) fn follow_disks(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) -> bool {
        let Some(lies) = self.vm(id).lies.clone() else { return false };
        let home = claim.home;
        let to = match lies {
            Lies::On(to) if to != home => to,
            Lies::On(_) => return self.home_is_told(cx, id, None),
            Lies::Apart(places) if places.contains(&home) => return self.home_is_told(cx, id, None),
            Lies::Apart(places) => {
                let names: Vec<String> = places.into_iter().map(|place| self.store_name(place)).collect();
                let text = format!(
                    "its disks do not lie on one datastore ({}), so its claims stay on {}, on which it runs and stops \
                     although no disk is left there; put them on one, and the home follows",
                    names.join(", "),
                    self.store_name(home)
                );
                return self.home_is_told(cx, id, Some(Note::warning("home-apart", text)));
            }
            Lies::Outside(why) => {
                let text = format!(
                    "it runs with disks that no other host can be sure to reach ({why}): it is not protected where they \
                     are; copy them to a datastore of the cluster"
                );
                return self.home_is_told(cx, id, Some(Note::alarm("home-outside", text)));
            }
        };
        let defined = self.vm(id).record.as_ref().and_then(|record| record.as_ref().ok()?.place());
        if defined != Some(to) {
            let text = format!(
                "it runs with its disks on datastore {}, but its definition says otherwise, and that is what another host \
                 would start; define it as it runs, and its home follows",
                self.store_name(to)
            );
            return self.home_is_told(cx, id, Some(Note::warning("home-defined-elsewhere", text)));
        }
        // Paused it may be on its way into a file, and that image must not outlive its generation.
        let runs = self.libvirt.domains.get(&id).is_some_and(|domain| domain.state == DomainState::Running);
        let trusted = self.distrusted(home).is_none() && self.distrusted(to).is_none();
        // What lies there of older claims must be known: the next generation counts on from the highest anywhere.
        let known = self.vm(id).bad.is_none() && [home, to].iter().all(|store| self.is_listed(*store));
        if !runs || !trusted || !known || !self.holds(home) || !self.holds(to) {
            return false;
        }
        if self.going_down || self.underway.contains_key(&id) {
            return false;
        }
        let at = self.vm(id).change_retry.max(self.vm(id).defined + SETTLED);
        if cx.now < at {
            cx.set(Timer::Judge(id), at);
        } else {
            self.begin(cx, id, Kind::Leave { to }, home, Vec::new());
        }
        true
    }

    /// Operators' trust in both homes of a claim; the same one, but while it moves.
    pub(super) fn homes_wait_for_trust(&self, claim: &Claim) -> Option<String> {
        self.waits_for_trust(claim.home).or_else(|| self.waits_for_trust(claim.next_home()))
    }

    /// For a start whose claims cannot be read although its disks lie elsewhere: why that matters.
    pub(super) fn left_behind(&self, id: VmId) -> Option<String> {
        let vm = self.vms.get(&id)?;
        let home = vm.claim.as_ref()?.home;
        let place = vm.record.as_ref()?.as_ref().ok()?.place().filter(|place| *place != home)?;
        Some(format!(
            "; its disks lie on {} now, but its claims on {}, where another host could hold it: make that readable here, \
             and start it again; its home follows then",
            self.store_name(place),
            self.store_name(home)
        ))
    }

    /// The home whose lease ended the right of a VM to run: while its home moves that may be either.
    pub(super) fn lapsed_home(&self, id: VmId, of_row: DatastoreId) -> DatastoreId {
        let homes = self.guard.rows.values().filter(|row| row.tenure.vm == id).map(|row| row.home);
        let lapsed = |home: &DatastoreId| self.guard.leases.get(home).is_some_and(|lease| lease.until.is_none());
        std::iter::once(of_row).chain(homes).find(lapsed).unwrap_or(of_row)
    }

    /// Whether this host has a lease there, and its own path works.
    fn holds(&self, home: DatastoreId) -> bool {
        self.guard.leases.get(&home).is_some_and(|lease| lease.until.is_some() && lease.own_path)
    }

    fn is_listed(&self, home: DatastoreId) -> bool {
        self.stores.get(&home).is_some_and(|store| store.listed.is_some())
    }

    /// Says once what hinders a home; none = nothing does. Never the begin of a claim.
    fn home_is_told(&mut self, cx: &mut Cx, id: VmId, note: Option<Note>) -> bool {
        let name = self.vm_name(id);
        let text = note.as_ref().map(|note| note.text.clone());
        if std::mem::replace(&mut self.vm(id).home_told, text.clone()) != text
            && let Some(note) = note
        {
            let text = format!("{name}: {}", note.text);
            cx.note(Note { text, ..note }.of(&name));
        }
        false
    }
}
