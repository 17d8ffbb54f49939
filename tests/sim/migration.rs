//! Live migration by libvirt: target's hook, paused copy there, memory, switch, the source's end.
//!
//! ```text
//!  hook migrate, prepare ─► target's QEMU, paused ─ 700 ms of memory ─► switch: source stands ─ 50 ms ─► source exits
//!        │ refused               │ cut, dead, aborted, broken: the source goes on, the target's copy ends
//!        ▼                       ▼
//!      failed                  failed
//! ```

use std::time::Duration;

use mainstay::core::event::HookWish;
use mainstay::guard::table::ProcessKey;
use mainstay::types::VmId;
use mainstay::types::vm::{DomainChange, DomainFailure, OffReason};

use super::world::{Gate, H, World};

type Then = Box<dyn FnOnce(&mut World, Result<(), DomainFailure>)>;

/// How often a migration looks whether it can go on.
const STEP: Duration = Duration::from_millis(100);
/// Steps that the memory takes.
const MEMORY_STEPS: u32 = 7;
/// libvirt's keepalive notices a dead peer after this many steps.
const KEEPALIVE_STEPS: u32 = 50;

/// A migration under way.
struct Run {
    from: H,
    to: H,
    vm: VmId,
    source: ProcessKey,
    target: ProcessKey,
    boots: (u64, u64),
    /// The agent whose connection carries it.
    agent: u64,
    copied: u32,
    silent: u32,
    then: Then,
}

impl World {
    /// `virsh migrate --paused`, as the agent orders it at the source.
    pub fn migrate(&mut self, from: H, vm: VmId, uri: &str, then: Then) {
        let Some(to) = self.host(uri) else { return };
        let Some(source) = self.qemu(from, vm).map(|qemu| qemu.key) else {
            return then(self, Err(DomainFailure::NoDomain));
        };
        if self.hosts[to].libvirtd.is_none() || !self.links.both(from, to) {
            return then(self, Err(DomainFailure::Host(format!("no connection to {uri}"))));
        }
        if self.domain(to, vm).qemu.is_some() || self.domain(to, vm).starting {
            return then(self, Err(DomainFailure::Host("domain is already running there".to_owned())));
        }
        self.domain(to, vm).starting = true;
        self.hook(
            to,
            vm,
            HookWish::Migrate,
            Box::new(move |world, allowed| {
                if let Err(why) = allowed {
                    world.domain(to, vm).starting = false;
                    return then(world, Err(DomainFailure::Refused(why)));
                }
                world.hook(
                    to,
                    vm,
                    HookWish::Prepare,
                    Box::new(move |world, allowed| match allowed {
                        Ok(()) => world.begin_copy(from, to, vm, source, then),
                        Err(why) => {
                            world.domain(to, vm).starting = false;
                            then(world, Err(DomainFailure::Refused(why)));
                        }
                    }),
                );
            }),
        );
    }

    fn begin_copy(&mut self, from: H, to: H, vm: VmId, source: ProcessKey, then: Then) {
        let (Some(a), Some(b)) = (self.hosts[from].life, self.hosts[to].life) else { return };
        self.spawn(to, vm, true);
        let target = self.qemu(to, vm).expect("just made").key;
        let agent = self.hosts[from].agent.as_ref().map_or(0, |agent| agent.life);
        let run = Run { from, to, vm, source, target, boots: (a, b), agent, copied: 0, silent: 0, then };
        self.after(Gate::World, STEP, move |world| world.copy(run));
    }

    fn copy(&mut self, mut run: Run) {
        let (from, to, vm) = (run.from, run.to, run.vm);
        let there = self.qemu(to, vm).is_some_and(|qemu| qemu.key == run.target);
        let here = self.qemu(from, vm).filter(|qemu| qemu.key == run.source).map(|qemu| (qemu.cpus, qemu.halted));
        let up = self.hosts[from].life == Some(run.boots.0);
        if !up {
            return self.end_target(&run, !self.links.both(from, to)); // Nobody is left to be told.
        }
        if !self.lives(Gate::Agent(from, run.agent)) {
            return self.end_target(&run, false); // libvirt ends both halves when the client's connection goes.
        }
        let Some((cpus, halted)) = here.filter(|_| there) else {
            self.end_target(&run, false);
            return (run.then)(self, Err(DomainFailure::Host("the other side is gone".to_owned())));
        };
        if self.migrations_fail && 3 < run.copied {
            self.end_target(&run, false);
            return (run.then)(self, Err(DomainFailure::Host("migration broke".to_owned())));
        }
        let moves = self.links.both(from, to) && !self.hosts[to].frozen && !self.hosts[from].frozen && !halted;
        if !moves {
            run.silent += 1;
            if KEEPALIVE_STEPS <= run.silent {
                return (run.then)(self, Err(DomainFailure::Host("keepalive: no answer".to_owned())));
            }
            return self.after(Gate::World, STEP, move |world| world.copy(run));
        }
        run.copied += 1;
        if run.copied < MEMORY_STEPS || !cpus {
            return self.after(Gate::World, STEP, move |world| world.copy(run));
        }
        self.set_cpus(from, vm, false);
        self.domain_event(from, vm, DomainChange::Suspended { migrated: true, by_io_error: false });
        let now = self.now;
        if let Some(target) = self.qemu(to, vm) {
            target.memory = Some(now);
        }
        self.after(Gate::World, STEP / 2, move |world| world.switched(run));
    }

    fn switched(&mut self, run: Run) {
        let (from, to, vm) = (run.from, run.to, run.vm);
        let there = self.qemu(to, vm).is_some_and(|qemu| qemu.key == run.target);
        if self.hosts[from].life != Some(run.boots.0) {
            return;
        }
        if !self.lives(Gate::Agent(from, run.agent)) {
            return self.end_target(&run, false); // The source stands: libvirt does not know how far the target came.
        }
        if !there || !self.links.both(from, to) {
            // The target is gone before it had everything: the source goes on.
            self.end_target(&run, !self.links.both(from, to));
            self.set_cpus(from, vm, true);
            return (run.then)(self, Err(DomainFailure::Host("the other side is gone".to_owned())));
        }
        self.domain_event(to, vm, DomainChange::Started { by_migration: true });
        self.domain_event(to, vm, DomainChange::Suspended { migrated: false, by_io_error: false });
        self.exit(from, vm, run.source, OffReason::Migrated);
        (run.then)(self, Ok(()));
    }

    /// The target's half of a broken migration ends, unless nobody tells it.
    fn end_target(&mut self, run: &Run, cut: bool) {
        if !cut && self.hosts[run.to].life == Some(run.boots.1) {
            self.exit(run.to, run.vm, run.target, OffReason::Failed);
        }
    }

    /// `virsh domjobabort`: the next step finds the target gone.
    pub fn abort_migration(&mut self, from: H, vm: VmId) {
        let targets: Vec<(H, ProcessKey)> = self
            .qemus()
            .filter(|(h, of, qemu)| *h != from && *of == vm && qemu.incoming)
            .map(|(h, _, qemu)| (h, qemu.key))
            .collect();
        for (to, key) in targets {
            if self.links.both(from, to) {
                self.exit(to, vm, key, OffReason::Failed);
            }
        }
        self.abort_silent(from, vm);
    }

    fn abort_silent(&mut self, _from: H, _vm: VmId) {} // The keepalive ends what cannot be told.
}
