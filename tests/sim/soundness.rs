//! The judge's view of proofs: each is held against what is true in the moment in which a host has it, whether or not that
//! host makes anything of it. Two copies that run are the last of many misfortunes that must meet; this is the first.
//!
//! - "lapsed": when the read that closes the window began, no lease of the owner reached on any more, by all that lay on
//!   the datastore; or its guard had said over, or its kernel was gone. And never against a host that is well and still
//!   has its copy (R4: after a stall of the storage owners come first)
//! - "rebooted": the owner's kernel is gone
//! - "power off": the owner is off, or what it ran is over
//!
//! Deliberately not here: "said", which is judged when it is said (`ownership`).

use mainstay::core::event::{Event, Outcome};
use mainstay::types::store::StoreAnswer;
use mainstay::types::{DatastoreId, Generation, Owner, Proof, Tenure};

use super::world::{H, World, nanos};

/// What an event may prove to an agent.
#[derive(Clone, Copy)]
pub enum Shows {
    /// A complete read of this datastore that began then, in the world's time: silence there, and boots.
    Silence(DatastoreId, u64),
    /// Which boot another host is in.
    Boots,
}

impl World {
    /// Whether new proofs may come of this event. Network beats are many: they are looked at after a guard was started
    /// somewhere, which alone makes them show another incarnation.
    pub fn shows(&self, h: H, event: &Event) -> Option<Shows> {
        match event {
            Event::Done(_, Outcome::Store(StoreAnswer::Read(read))) => {
                Some(Shows::Silence(read.roster.datastore, self.hosts[h].clock.when(read.began)))
            }
            Event::Heard(_) if self.now < self.judge.reborn => Some(Shows::Boots),
            _ => None,
        }
    }

    /// A guard was started: for a while network beats may show an incarnation that nobody knows yet.
    pub fn is_reborn(&mut self) {
        let soon = nanos(self.settings.timing.lease * 3);
        self.judge.reborn = self.now + soon;
    }

    /// Every proof that this agent has now.
    pub fn check_proofs(&mut self, h: H, shows: Shows) {
        let now = self.local(h);
        let Some(agent) = &self.hosts[h].agent else { return };
        let unsound = agent.core.proven(now).find_map(|(claim, owner, proof)| {
            let (tenure, home) = (claim.tenure, claim.home);
            let sound = match (proof, shows) {
                _ if self.stores[&home].lied => true, // What it shows may be less than what was.
                (Proof::Rebooted { .. }, _) => !self.host_of(owner.host).is_some_and(|of| self.is_in(of, owner)),
                // Another datastore's silence is judged when that one is read.
                (Proof::Lapsed { .. }, Shows::Silence(read, _)) if read != home => true,
                (Proof::Lapsed { .. }, Shows::Silence(_, closed)) => {
                    let over =
                        || self.is_over(owner, tenure, home, closed) || self.has_lapsed(owner, tenure, home, closed);
                    !self.is_well_with(owner, tenure, home) && over()
                }
                (Proof::PowerOff, Shows::Silence(..)) => self.is_over(owner, tenure, home, self.now),
                (Proof::Lapsed { .. } | Proof::PowerOff, Shows::Boots) => true,
                (Proof::Said(_) | Proof::Unowned | Proof::Both { .. }, _) => true,
            };
            (!sound).then(|| (claim.name.clone(), tenure, owner, proof))
        });
        if let Some((name, tenure, owner, proof)) = unsound {
            let host = self.hosts[h].name.clone();
            let owner = self.host_of(owner.host).map_or_else(String::new, |of| self.hosts[of].name.clone());
            let generation = tenure.generation;
            self.violated(&format!(
                "{host} has a proof against {name} (generation {generation}, of {owner}) that is not right: {proof:?}"
            ));
        }
    }

    /// The owner's kernel is the one that runs now.
    fn is_in(&self, of: H, owner: Owner) -> bool {
        self.hosts[of].life.is_some() && self.hosts[of].boot() == owner.boot
    }

    /// Nothing has happened to the owner, and it has the VM, under its newest claim.
    fn is_well_with(&self, owner: Owner, tenure: Tenure, home: DatastoreId) -> bool {
        let Some(of) = self.host_of(owner.host).filter(|of| self.is_in(*of, owner)) else { return false };
        let qemu = self.hosts[of].domains.get(&tenure.vm).and_then(|domain| domain.qemu.as_ref());
        let newest = self.home_of(tenure.vm) == home && self.stores[&home].generation(tenure.vm) == tenure.generation;
        newest && qemu.is_some_and(|qemu| !qemu.dying) && !self.troubled(of)
    }

    /// The owner's lease had ended by then, after the claim was made. It may stand again: that is another.
    fn has_lapsed(&self, owner: Owner, tenure: Tenure, home: DatastoreId, at: u64) -> bool {
        let ended = self.host_of(owner.host).and_then(|of| self.judge.lapsed.get(&(of, home)).copied());
        let made = self.stores[&home].made(tenure);
        ended.zip(made).is_some_and(|(ended, made)| made < ended && ended <= at)
    }

    /// Whether (v, g) of this owner is truly over, and was so at a time, as far as that rests on its lease.
    pub(super) fn is_over(&self, owner: Owner, tenure: Tenure, home: DatastoreId, at: u64) -> bool {
        let Some(of) = self.host_of(owner.host) else { return true };
        let host = &self.hosts[of];
        // A later boot began, or a power switch has said, truly, that this one is off.
        let newest = if host.life.is_some() { Some(host.boot()) } else { host.last_boot() };
        let rebooted = newest != Some(owner.boot) || self.judge.off.contains(&owner.boot);
        let ends = [&self.judge.last, &self.judge.reach].map(|ends| ends.get(&(of, home)).copied());
        let lapsed = || ends.into_iter().flatten().all(|until| until <= host.clock.at(at));
        // A datastore that went back shows claims again that others have followed: whoever made those had a proof, or its word.
        let newest = self.judge.followed.get(&tenure.vm).filter(|_| self.stores[&home].lied);
        let said = |generation: Generation| self.judge.said.contains(&(owner.host, Tenure { generation, ..tenure }));
        let followed =
            newest.is_some_and(|(at, owners)| tenure.generation < *at && (!owners.contains(&owner.host) || said(*at)));
        rebooted || lapsed() || followed || self.judge.said.contains(&(owner.host, tenure))
    }
}
