//! What goes wrong with storage: paths that hang or fail, storage that hangs for all, clients that fall silent; and what
//! a server and its administrator do about that.

use std::time::Duration;

use mainstay::core::event::Outcome;
use mainstay::types::{DatastoreId, HostId, Ticket, VmId};

use super::datastore::Parked;
use super::host::Path;
use super::world::{Gate, H, World};

impl World {
    /// A host's path to every datastore changes. What hung there goes on, or fails.
    pub fn set_path(&mut self, h: H, path: Path) {
        let homes: Vec<DatastoreId> = self.stores.keys().copied().collect();
        for home in &homes {
            self.hosts[h].paths.insert(*home, path);
        }
        if path == Path::Well {
            self.reconnect_storage(h);
            homes.into_iter().for_each(|home| self.unpark(home));
        } else {
            self.silence_storage(h);
        }
    }

    /// Storage hangs for everybody, or answers again.
    pub fn set_hung(&mut self, hung: bool) {
        let homes: Vec<DatastoreId> = self.stores.keys().copied().collect();
        for home in homes {
            self.stores.get_mut(&home).expect("its own key").hung = hung;
            if !hung {
                self.unpark(home);
            }
        }
    }

    fn unpark(&mut self, home: DatastoreId) {
        let Some(store) = self.stores.get_mut(&home) else { return };
        for (n, parked) in (1_u64..).zip(std::mem::take(&mut store.parked)) {
            let Parked { host, boot, sent, work } = parked;
            self.after(Gate::World, Duration::from_micros(200 * n), move |world| {
                let alive = world.hosts[host].life == Some(boot);
                let hung = alive && world.hosts[host].path(home) == Path::Hung;
                let Some(store) = world.stores.get_mut(&home) else { return };
                if store.hung || hung {
                    store.parked.push(Parked { host, boot, sent, work });
                } else if alive || sent {
                    work(world, true);
                }
            });
        }
    }

    /// The server hears no more of this client; after a while it drops its state.
    pub fn silence_storage(&mut self, h: H) {
        let Some(boot) = self.hosts[h].life else { return };
        let now = self.now;
        let homes: Vec<(DatastoreId, Option<Duration>)> = self.stores.iter().map(|(id, s)| (*id, s.keeps)).collect();
        for (home, keeps) in homes {
            let store = self.stores.get_mut(&home).expect("its own key");
            store.silent.entry((h, boot)).or_insert(now);
            let Some(keeps) = keeps else { continue };
            self.after(Gate::World, keeps, move |world| {
                let still = world.stores[&home].silent.get(&(h, boot)) == Some(&now);
                if still {
                    world.expire(home, h, Some(boot));
                }
            });
        }
    }

    /// The client is back. If it has booted, the server knows that its old self is gone.
    pub fn reconnect_storage(&mut self, h: H) {
        let Some(boot) = self.hosts[h].life else { return };
        if self.hosts[h].frozen {
            return;
        }
        let homes: Vec<DatastoreId> = self.stores.keys().copied().collect();
        for home in homes {
            self.expire_old(home, h, boot); // A boot ends whatever the kernel before it had under way.
            if self.hosts[h].path(home) != Path::Well {
                continue;
            }
            let host = &self.hosts[h];
            let store = self.stores.get_mut(&home).expect("its own key");
            store.silent.remove(&(h, boot));
            // What a QEMU that has exited meanwhile had under way has landed now; its locks are closed.
            let lives = |vm: &VmId| host.domains.get(vm).is_some_and(|domain| domain.qemu.is_some());
            store.locks.retain(|vm, holder| *holder != (h, boot) || lives(vm));
            for (vm, writers) in &mut store.writers {
                if !lives(vm) {
                    writers.remove(&(h, boot));
                }
            }
        }
    }

    fn expire_old(&mut self, home: DatastoreId, h: H, boot: u64) {
        let store = self.stores.get_mut(&home).expect("its own key");
        store.locks.retain(|_, holder| holder.0 != h || holder.1 == boot);
        store.writers.values_mut().for_each(|writers| writers.retain(|writer| writer.0 != h || writer.1 == boot));
    }

    /// The server drops a client's state: its locks, and all that it had under way.
    fn expire(&mut self, home: DatastoreId, h: H, boot: Option<u64>) {
        let hit = |holder: &(H, u64)| holder.0 == h && boot.is_none_or(|boot| boot == holder.1);
        let store = self.stores.get_mut(&home).expect("its own key");
        store.locks.retain(|_, holder| !hit(holder));
        store.writers.values_mut().for_each(|writers| writers.retain(|writer| !hit(writer)));
        if self.hosts[h].life.is_some_and(|life| boot.is_none_or(|boot| boot == life)) {
            self.hosts[h].domains.values_mut().filter_map(|d| d.qemu.as_mut()).for_each(|qemu| qemu.stale = true);
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
    pub fn fence(&mut self, h: H, ticket: Ticket, host: HostId, within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        self.open.insert((h, life, ticket.0));
        let gate = Gate::Agent(h, life);
        self.after(gate, within, move |world| {
            world.done(h, life, ticket, Outcome::Fenced(Err("no answer in time".to_owned())));
        });
        let delay = self.latency(50_000);
        self.after(gate, delay, move |world| {
            let result = if world.fence_fails { Err("exit status 1".to_owned()) } else { Ok(()) };
            if result.is_ok()
                && let Some(victim) = world.host_of(host)
            {
                world.fenced(victim);
                let homes: Vec<DatastoreId> = world.stores.keys().copied().collect();
                homes.into_iter().for_each(|home| world.expire(home, victim, None));
            }
            world.done(h, life, ticket, Outcome::Fenced(result));
        });
    }

    /// Who holds the locks of these images?
    pub fn probe_locks(&mut self, h: H, ticket: Ticket, paths: &[String], within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        self.open.insert((h, life, ticket.0));
        let gate = Gate::Agent(h, life);
        self.after(gate, within, move |world| {
            world.done(h, life, ticket, Outcome::Locks(Err("no answer in time".to_owned())));
        });
        let on = |spec: &&super::world::Spec| spec.record.disks.iter().any(|disk| paths.contains(&disk.path));
        let Some((vm, home)) = self.vms.values().find(on).map(|spec| (spec.id, spec.record.home)) else { return };
        let look =
            move |world: &mut Self| world.stores[&home].holder(vm).map(|holder| world.hosts[holder].name.clone());
        self.io(h, home, gate, 2000, look, move |world, result| {
            world.done(h, life, ticket, Outcome::Locks(result));
        });
    }
}
