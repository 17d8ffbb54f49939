//! Datastores that go back in time: a copy is taken, and later it is what lies there. Guards that find out compare their
//! rows with the claims, as `guard::renew::verify` does.

use std::collections::BTreeMap;

use mainstay::core::event::Event;
use mainstay::core::trust::LIFT;
use mainstay::types::control::Request;
use mainstay::types::settings::SettingsChange;
use mainstay::types::{BeatBlock, Claim, DatastoreId, Digest, Generation, HostId, Tenure, VmId, VmRecord};

use super::datastore::{Claims, Datastore};
use super::faults::Deed;
use super::files::Files;
use super::people::Waiter;
use super::world::{H, World};

/// What lay there once.
#[derive(Clone)]
pub struct Copy {
    slots: BTreeMap<HostId, Files>,
    claims: BTreeMap<VmId, Claims>,
    records: BTreeMap<(VmId, Digest), VmRecord>,
}

impl Datastore {
    /// Remembers what lies there.
    pub fn keep_copy(&mut self) {
        let (slots, claims, records) = (self.slots.clone(), self.claims.clone(), self.records.clone());
        self.copy = Some(Copy { slots, claims, records });
    }

    /// What was remembered lies there again. VMs that had a claim here.
    pub fn roll_back(&mut self) -> Vec<VmId> {
        let Some(copy) = self.copy.clone() else { return Vec::new() };
        let vms: Vec<VmId> = self.claims.keys().copied().collect();
        (self.slots, self.claims, self.records, self.lied) = (copy.slots, copy.claims, copy.records, true);
        vms
    }

    /// The newest claim of a VM is gone.
    pub fn lose_claim(&mut self, vm: VmId) {
        self.claims.get_mut(&vm).and_then(BTreeMap::pop_last);
        self.lied = true;
    }
}

/// A claim with this generation may be the first after an acceptance.
pub fn leaps(to: Generation) -> bool {
    to.0 != 0 && to.0.is_multiple_of(LIFT)
}

impl World {
    /// Copies of all datastores are made, disks and all.
    pub fn snapshot_storage(&mut self) {
        self.copied = Some(self.writes());
        self.stores.values_mut().for_each(|store| store.keep_copy());
    }

    /// The last copies take the place of what lies there.
    pub fn roll_back_storage(&mut self) {
        let Some(wrote) = self.copied.clone() else { return };
        self.disks_went_back(wrote);
        for home in self.homes() {
            let lost = self.stores.get_mut(&home).expect("its own key").roll_back();
            for vm in lost {
                self.touch(vm);
                self.find_home(vm);
            }
        }
    }

    /// A claim is deleted, by hand or by a file system check.
    pub fn lose_claim(&mut self, vm: VmId) {
        let home = self.home_of(vm);
        self.touch(vm);
        self.stores.get_mut(&home).expect("its home").lose_claim(vm);
        self.find_home(vm);
    }

    /// `mainstay datastore accept NAME` on a host.
    pub fn accept_datastore(&mut self, h: H, name: &str) {
        let what = format!("datastore accept {name}");
        self.change(h, &what, SettingsChange::AcceptDatastore { name: name.to_owned() });
    }

    /// A person changes the settings, through this host.
    pub fn change(&mut self, h: H, what: &str, change: SettingsChange) {
        if self.hosts[h].agent.is_none() {
            return;
        }
        let what = what.to_owned();
        let ask = self.wait(Waiter::Person { at: h, what });
        let request = Box::new(Request::Change(Box::new(change)));
        self.agent_event(h, Event::Asked { ask, from: None, request });
    }

    /// Own slots anew, then the claims of every VM that lives here.
    pub(super) fn verify_there(&mut self, h: H, home: DatastoreId) {
        let (me, index, boot) = (self.hosts[h].id, self.hosts[h].index, self.hosts[h].boot());
        let gate = self.guard_gate(h);
        let read = move |world: &mut World| {
            let now = world.local(h);
            let guard = world.hosts[h].guard.as_ref();
            let state = guard.map(|guard| &guard.state);
            let kept = state.and_then(|state| state.stores.get(&home)?.slots.as_ref());
            let living = state.map(|state| state.table.living(home)).unwrap_or_default();
            let store = &world.stores[&home];
            let claims: Vec<(VmId, Option<Claim>)> =
                living.into_iter().map(|vm| (vm, store.highest(vm).and_then(Result::ok))).collect();
            (store.own(me), store.attestations_of(index, me), store.book(me, boot, kept, now), claims)
        };
        self.io(h, home, gate, Deed::Read, 4000, read, move |world, result| match result {
            Err(why) => world.turned(h, home, Some(why)),
            Ok((own, attested, book, claims)) => {
                world.with_guard(h, |state, now| state.verified(home, &claims, now));
                world.opened(h, home, own, attested, book);
            }
        });
    }

    /// What was opened shows less than was acknowledged, or an earlier guard's flag.
    pub(super) fn shows_less(&mut self, h: H, home: DatastoreId, newest: Option<&BeatBlock>) -> Option<String> {
        let store = self.hosts[h].guard.as_ref()?.state.stores.get(&home)?;
        let stamp = newest.map(|beat| (beat.incarnation, beat.counter));
        if stamp < store.acknowledged() {
            return Some("shows less than was acknowledged".to_owned());
        }
        let flag = newest.filter(|beat| beat.flags.distrusts && store.accepted <= beat.accepted);
        (flag.is_some() && store.rolled_back.is_none()).then(|| "an earlier guard found that it went back".to_owned())
    }

    /// Whether the claim of the next VM that runs here is there. A missing one is looked for twice.
    pub(super) fn look_for_held(&mut self, h: H, home: DatastoreId) -> Option<String> {
        if !self.stores[&home].lied {
            return None;
        }
        let renew = self.renew(h, home)?;
        renew.held_from = renew.held_from.wrapping_add(1);
        let (from, missed) = (renew.held_from, renew.missed.take());
        let table = &self.hosts[h].guard.as_ref()?.state.table;
        let living = table.living(home);
        let next = living.get(from.checked_rem(living.len())?).copied()?;
        let held: Tenure = table.held(missed.map_or(next, |missed: Tenure| missed.vm), home)?;
        if held.generation <= self.stores[&home].generation(held.vm) {
            return None;
        }
        if missed != Some(held) {
            self.renew(h, home)?.missed = Some(held);
            return None;
        }
        let name = self.vm_name(held.vm);
        Some(format!("claim {} of {name}, which this host holds, is gone", held.generation))
    }
}
