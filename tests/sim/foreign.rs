//! `virsh migrate` by a person: libvirt starts the target by itself at the switch, and lets the source go on when the
//! target's last answer does not come.
//!
//! ```text
//!  hook migrate, prepare ─► target's QEMU ─ 700 ms of memory ─► switch: source stands, its images are let go
//!        │ refused             │ a side is gone: the source goes on     │ 50 ms
//!        ▼                     ▼                                        ▼
//!      failed                failed                   target runs ─ answer ─► source ends
//!                                                          └─ lost ─► libvirt lets the source go on
//! ```
//!
//! The locks of images keep such a source from going on, where they reach other hosts. A libvirtd that is restarted
//! throws away what was coming in, goes on with what was going out, and leaves a source that stands after the switch.

use std::time::Duration;

use mainstay::core::event::HookWish;
use mainstay::guard::table::ProcessKey;
use mainstay::types::VmId;
use mainstay::types::vm::{DomainChange, DomainFailure, OffReason};

use super::host::Path;
use super::invariants::SAMPLED;
use super::world::{Gate, H, World};

/// How often a migration looks whether it can go on.
const STEP: Duration = Duration::from_millis(100);
/// Steps that the memory takes.
const MEMORY_STEPS: u32 = 7;
/// A target whose source has gone without a word learns it from its own keepalive (libvirtd's 5 × 5 s, and one more).
const SERVER_KEEPALIVE: Duration = Duration::from_secs(30);
/// libvirt's keepalive notices a dead peer after this many steps.
const KEEPALIVE_STEPS: u32 = 50;
/// From the target's first instruction to the source's libvirtd.
const ANSWER: Duration = Duration::from_millis(5);

/// A migration under way.
#[derive(Clone, Copy)]
struct Run {
    from: H,
    to: H,
    vm: VmId,
    source: ProcessKey,
    target: ProcessKey,
    boots: (u64, u64),
    daemons: (Option<u64>, Option<u64>),
    copied: u32,
    silent: u32,
}

impl World {
    /// `virsh migrate --live`, by a person at the source.
    pub fn virsh_migrate(&mut self, from: H, vm: VmId, to: H) {
        let what = format!("virsh migrate {} to {}", self.vm_name(vm), self.hosts[to].name);
        let Some(source) = self.qemu(from, vm).map(|qemu| qemu.key) else { return };
        if from == to || self.hosts[from].libvirtd.is_none() || self.hosts[to].libvirtd.is_none() {
            return;
        }
        if !self.links.both(from, to) || self.domain(to, vm).qemu.is_some() || self.domain(to, vm).starting {
            return self.migrate_told(from, &what, "no connection, or it is there already");
        }
        self.domain(to, vm).starting = true;
        self.hook(
            to,
            vm,
            HookWish::Migrate,
            Box::new(move |world, allowed| match allowed {
                Err(why) => world.migrate_refused(from, to, vm, &what, &why),
                Ok(()) => world.hook(
                    to,
                    vm,
                    HookWish::Prepare,
                    Box::new(move |world, allowed| match allowed {
                        Err(why) => world.migrate_refused(from, to, vm, &what, &why),
                        Ok(()) => world.receive(from, to, vm, source),
                    }),
                ),
            }),
        );
    }

    /// `virsh migrate` to a host that is no member: nobody is asked.
    pub fn virsh_migrate_away(&mut self, from: H, vm: VmId) {
        if let Some(key) = self.qemu(from, vm).map(|qemu| qemu.key) {
            self.set_cpus(from, vm, false);
            self.domain_event(from, vm, DomainChange::Suspended { migrated: true, by_io_error: false });
            self.exit(from, vm, key, OffReason::Migrated);
        }
    }

    fn migrate_told(&mut self, h: H, what: &str, result: &str) {
        let name = self.hosts[h].name.clone();
        self.tell(&name, &format!("$ {what}: {result}"));
    }

    fn migrate_refused(&mut self, from: H, to: H, vm: VmId, what: &str, why: &str) {
        self.domain(to, vm).starting = false;
        self.migrate_told(from, what, &format!("refused: {why}"));
    }

    fn receive(&mut self, from: H, to: H, vm: VmId, source: ProcessKey) {
        let (Some(a), Some(b)) = (self.hosts[from].life, self.hosts[to].life) else { return };
        if self.domain(to, vm).qemu.is_some() {
            return;
        }
        self.spawn(to, vm, true);
        let target = self.qemu(to, vm).expect("just made").key;
        self.domain_event(to, vm, DomainChange::Started { by_migration: true });
        let daemons = (self.hosts[from].libvirtd, self.hosts[to].libvirtd);
        let run = Run { from, to, vm, source, target, boots: (a, b), daemons, copied: 0, silent: 0 };
        self.after(Gate::World, STEP, move |world| world.copy_on(run));
    }

    fn failed(&mut self, run: Run, why: &str) {
        let what = format!("virsh migrate {} to {}", self.vm_name(run.vm), self.hosts[run.to].name);
        self.migrate_told(run.from, &what, why);
    }

    /// The target's half ends: its libvirtd sees the connection end, or is told.
    fn drop_target(&mut self, run: Run) {
        let told = self.hosts[run.from].life != Some(run.boots.0) || self.links.both(run.from, run.to);
        if told {
            return self.lose_target(run);
        }
        let gate = Gate::Kernel(run.to, run.boots.1);
        self.after(gate, SERVER_KEEPALIVE, move |world| world.lose_target(run));
    }

    fn lose_target(&mut self, run: Run) {
        let there = self.hosts[run.to].life == Some(run.boots.1);
        if there && self.qemu(run.to, run.vm).is_some_and(|qemu| qemu.key == run.target && qemu.incoming) {
            self.exit(run.to, run.vm, run.target, OffReason::Failed);
        }
    }

    fn source_is_there(&mut self, run: Run) -> bool {
        self.hosts[run.from].life == Some(run.boots.0)
            && self.qemu(run.from, run.vm).is_some_and(|qemu| qemu.key == run.source)
    }

    fn copy_on(&mut self, mut run: Run) {
        let (from, to, vm) = (run.from, run.to, run.vm);
        if !self.source_is_there(run) || self.hosts[from].libvirtd != run.daemons.0 {
            return self.drop_target(run); // A libvirtd that comes back cancels what was going out.
        }
        let there = self.qemu(to, vm).is_some_and(|qemu| qemu.key == run.target);
        if !there || self.hosts[to].libvirtd != run.daemons.1 {
            self.drop_target(run);
            return self.failed(run, "failed: the other side is gone");
        }
        if self.migrations_fail && 3 < run.copied {
            self.drop_target(run);
            return self.failed(run, "failed: migration broke");
        }
        let home = self.disk_of(from, vm);
        let drains = self.hosts[from].path(home) == Path::Well && !self.stores[&home].hung;
        let halted = [(from, run.source), (to, run.target)]
            .into_iter()
            .any(|(h, key)| self.qemu(h, vm).is_some_and(|qemu| qemu.key == key && qemu.halted));
        let moves = self.links.both(from, to) && !self.hosts[to].frozen && !self.hosts[from].frozen && !halted;
        let last = MEMORY_STEPS <= run.copied + 1;
        if !moves || last && !drains {
            run.silent += 1;
            if KEEPALIVE_STEPS <= run.silent {
                self.drop_target(run);
                return self.failed(run, "failed: keepalive: no answer");
            }
            return self.after(Gate::World, STEP, move |world| world.copy_on(run));
        }
        run.copied += 1;
        if !last {
            return self.after(Gate::World, STEP, move |world| world.copy_on(run));
        }
        let ran = self.qemu(from, vm).is_some_and(|qemu| qemu.cpus);
        self.set_cpus(from, vm, false);
        let now = self.now;
        if let Some(target) = self.qemu(to, vm) {
            target.memory = Some(now);
        }
        self.stores.get_mut(&home).expect("its home").release(vm, from, run.boots.0);
        self.domain_event(from, vm, DomainChange::Suspended { migrated: true, by_io_error: false });
        if ran {
            self.after(Gate::World, STEP / 2, move |world| world.target_goes(run));
        }
    }

    /// libvirt's Finish at the target.
    fn target_goes(&mut self, run: Run) {
        let (from, to, vm) = (run.from, run.to, run.vm);
        let there = self.qemu(to, vm).is_some_and(|qemu| qemu.key == run.target && !qemu.halted);
        let reached = self.hosts[to].libvirtd == run.daemons.1 && !self.hosts[to].frozen && self.links.both(from, to);
        if !self.source_is_there(run) || self.hosts[from].libvirtd != run.daemons.0 {
            return self.drop_target(run);
        }
        if !there || !reached {
            self.drop_target(run);
            return self.source_goes_on(run);
        }
        let home = self.disk_of(to, vm);
        if self.stores.get_mut(&home).expect("its home").lock(vm, to, run.boots.1).is_err() {
            self.drop_target(run);
            return self.source_goes_on(run);
        }
        if let Some(qemu) = self.qemu(to, vm) {
            qemu.incoming = false;
        }
        self.set_cpus(to, vm, true);
        let answer = self.latency(ANSWER.as_micros() as u64);
        self.after(Gate::World, answer, move |world| world.target_answers(run));
    }

    /// Its answer, or none, reaches the source's side.
    fn target_answers(&mut self, run: Run) {
        let (from, to) = (run.from, run.to);
        if !self.source_is_there(run) || self.hosts[from].libvirtd != run.daemons.0 {
            return; // The source stands: libvirt does not know how far the target came.
        }
        let up = self.hosts[to].life == Some(run.boots.1) && self.hosts[to].libvirtd == run.daemons.1;
        if self.answers_lost || !up || !self.links.both(from, to) || self.hosts[to].frozen {
            return self.source_goes_on(run);
        }
        self.exit(from, run.vm, run.source, OffReason::Migrated);
        self.failed(run, "done");
    }

    /// libvirt's Confirm, cancelled.
    fn source_goes_on(&mut self, run: Run) {
        let now = self.now;
        if let Some(qemu) = self.qemu(run.from, run.vm) {
            qemu.let_go = Some(now);
        }
        self.look_again(SAMPLED);
        self.resume(
            run.from,
            run.vm,
            Box::new(move |world, result| {
                let now = world.now;
                if let Some(qemu) = world.qemu(run.from, run.vm) {
                    qemu.let_go = Some(now);
                }
                world.look_again(SAMPLED);
                let text = match result {
                    Ok(()) => "failed; libvirt lets the source go on".to_owned(),
                    Err(DomainFailure::ImageLocked(holder)) => format!("failed; its images are locked by {holder}"),
                    Err(why) => format!("failed; the source cannot go on: {why:?}"),
                };
                world.failed(run, &text);
            }),
        );
    }

    // ---- the guard's samples ------------------------------------------------------------------------------------

    /// The enforcing thread samples, every 10 ms, as long as something is handed over.
    pub fn sample(&mut self, h: H) {
        let watched = self.with_guard(h, |state, _| state.table.watched().collect::<Vec<_>>()).unwrap_or_default();
        self.spend();
        for (vm, key) in &watched {
            let spent = self.qemu(h, *vm).filter(|qemu| qemu.key == *key).map(|qemu| qemu.spent);
            let Some(spent) = spent else { continue };
            self.with_guard(h, |state, now| {
                let alone = state.is_alone(now);
                state.table.sampled(*vm, *key, Duration::from_nanos(spent), now, alone);
            });
        }
        let Some(guard) = &mut self.hosts[h].guard else { return };
        guard.samples = !watched.is_empty();
        if guard.samples {
            let gate = Gate::Guard(h, guard.life);
            self.after(gate, Duration::from_millis(10), move |world| world.sample(h));
        }
    }
}
