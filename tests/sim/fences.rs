//! Storage fences and image locks of the simulated datastore, and writes that outlive their QEMU.
//!
//! ```text
//!   QEMU ends on a path that does not work ─► its writes wait in the host's kernel, its locks at the server
//!     ├─ the path is well again ─┬─ after less than L: they land at once
//!     │                          └─ after more: they land later, at any time
//!     └─ storage fence, the host boots: never
//! ```
//!
//! That a short break brings back everything at once is what a guard's word "exited, clean" rests on.

use super::datastore::Parked;
use super::faults::Deed;
use super::host::Path;
use super::world::{Gate, H, World};
use mainstay::core::event::*;
use mainstay::types::vm::DomainFailure;
use mainstay::types::*;
use std::time::Duration;

/// Writes that outlived a longer break land within so many milliseconds after it.
const LINGER: u64 = 30_000;

impl World {
    pub(super) fn expire_old(&mut self, home: DatastoreId, h: H, boot: u64) {
        let store = self.stores.get_mut(&home).expect("its own key");
        store.locks.retain(|_, holder| holder.0 != h || holder.1 == boot);
        store.writers.values_mut().for_each(|writers| writers.retain(|writer| writer.0 != h || writer.1 == boot));
    }

    /// A path is well again after so long: what QEMUs had under way that have exited meanwhile lands, sooner or later.
    pub(super) fn bring_back_writes(&mut self, home: DatastoreId, h: H, boot: u64, away: Duration) {
        let linger = if away < self.settings.timing.lease {
            Duration::ZERO
        } else if self.jitter {
            Duration::from_millis(self.chance(LINGER))
        } else {
            self.linger
        };
        if linger.is_zero() {
            return self.writes_land(home, h, boot);
        }
        self.after(Gate::World, linger, move |world| {
            let alive = world.hosts[h].life == Some(boot) && !world.hosts[h].frozen;
            if alive && world.hosts[h].path(home) == Path::Well {
                world.writes_land(home, h, boot);
            }
        });
    }

    /// Writes of copies that are gone have landed; their locks are closed. Those of a copy that runs there now come after
    /// them: one kernel keeps its order.
    fn writes_land(&mut self, home: DatastoreId, h: H, boot: u64) {
        let host = &self.hosts[h];
        let lives = |vm: &VmId| host.domains.get(vm).is_some_and(|domain| domain.qemu.is_some());
        let store = self.stores.get_mut(&home).expect("its own key");
        store.locks.retain(|vm, holder| *holder != (h, boot) || lives(vm));
        for (vm, writers) in &mut store.writers {
            if !lives(vm) {
                writers.remove(&(h, boot));
            }
        }
    }

    /// The server drops a client's state: its locks, and all that it had under way.
    pub(super) fn expire(&mut self, home: DatastoreId, h: H, boot: Option<u64>) {
        let hit = |holder: &(H, u64)| holder.0 == h && boot.is_none_or(|boot| boot == holder.1);
        let now = self.now;
        let store = self.stores.get_mut(&home).expect("its own key");
        store.locks.retain(|_, holder| !hit(holder));
        for boot in boot.into_iter().chain(self.hosts[h].life).chain(self.hosts[h].last_life) {
            store.expired.insert((h, boot), now);
        }
        store.writers.values_mut().for_each(|writers| writers.retain(|writer| !hit(writer)));
        if self.hosts[h].life.is_some_and(|life| boot.is_none_or(|boot| boot == life)) {
            let open = self.hosts[h].domains.values_mut().filter_map(|d| d.qemu.as_mut());
            open.filter(|qemu| qemu.disk == home).for_each(|qemu| qemu.stale = true);
        }
        let store = self.stores.get_mut(&home).expect("its own key");
        let (gone, kept) = std::mem::take(&mut store.parked)
            .into_iter()
            .partition(|parked| hit(&(parked.host, parked.boot)) && parked.sent);
        store.parked = kept;
        let gone: Vec<Parked> = gone;
        for parked in gone {
            (parked.work)(self, false);
        }
    }

    /// The administrator's program against a host.
    pub fn fence(&mut self, h: H, ticket: Ticket, program: String, host: HostId, within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let gate = Gate::Agent(h, life);
        self.due(gate, within, ticket, Outcome::Fenced(Err("no answer in time".to_owned())));
        let delay = self.latency(50_000);
        self.after(gate, delay, move |world| {
            let result = if world.fence_fails { Err("exit status 1".to_owned()) } else { Ok(()) };
            if result.is_ok()
                && let Some(victim) = world.host_of(host)
            {
                let its = |d: &&mainstay::types::settings::DatastoreSettings| {
                    d.fence == StorageFence::Command { program: program.clone() }
                };
                let homes: Vec<DatastoreId> = world.settings.datastores.iter().filter(its).map(|d| d.id).collect();
                world.fenced(victim, &homes);
                homes.into_iter().for_each(|home| world.expire(home, victim, None));
            }
            world.done(h, life, ticket, Outcome::Fenced(result));
        });
    }

    /// Who holds the locks of these images?
    pub fn probe_locks(&mut self, h: H, ticket: Ticket, paths: &[String], within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let gate = Gate::Agent(h, life);
        self.due(gate, within, ticket, Outcome::Locks(Err("no answer in time".to_owned())));
        let Some((vm, home)) = self.image(paths) else { return };
        let look =
            move |world: &mut Self| world.stores[&home].holder(vm).map(|holder| world.hosts[holder].name.clone());
        self.io(h, home, gate, Deed::Read, 2000, look, move |world, result| {
            world.done(h, life, ticket, Outcome::Locks(result));
        });
    }

    /// Can these disks be read?
    pub fn probe_access(&mut self, h: H, ticket: Ticket, paths: &[String], within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let gate = Gate::Agent(h, life);
        self.due(gate, within, ticket, Outcome::Access(Err("no answer in time".to_owned())));
        let Some((_, home)) = self.image(paths) else { return };
        let denied = matches!(self.starts_fail.get(&h), Some(DomainFailure::Storage(_)));
        self.io(
            h,
            home,
            gate,
            Deed::Read,
            2000,
            |_| (),
            move |world, result| {
                let result = if denied { Err("permission denied".to_owned()) } else { result };
                world.done(h, life, ticket, Outcome::Access(result));
            },
        );
    }

    /// Its router answers at once, or nobody does.
    pub fn ask_network(&mut self, h: H, ticket: Ticket, within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let answers = self.hosts[h].router;
        let delay = if answers { Duration::from_millis(1) } else { within };
        self.due(Gate::Agent(h, life), delay, ticket, Outcome::Network(answers));
    }
}
