//! How QEMUs of a host end: by the guest, by people, by the guard, by themselves.
//!
//! ```text
//!  QEMU exits ─► the guard sees it (1 ms) ─► libvirt's event (3 ms)
//! ```

use std::time::Duration;

use mainstay::guard::table::ProcessKey;
use mainstay::types::VmId;
use mainstay::types::vm::{DomainChange, DomainFailure, OffReason};

use super::host::Path;
use super::hypervisor::{Domain, Then};
use super::world::{Gate, H, World};

/// A guest's time to shut itself down.
const SHUTDOWN: Duration = Duration::from_secs(1);

impl World {
    /// The guest is asked to shut down, or does it by itself.
    pub fn shut_down(&mut self, h: H, vm: VmId, by_guest: bool) {
        let Some(qemu) = self.qemu(h, vm) else { return };
        if !qemu.cpus || qemu.halted {
            return; // Nobody in there listens.
        }
        let key = qemu.key;
        if !by_guest && self.deaf.contains(&vm) {
            return;
        }
        // libvirt tells a guest's own power-off and `virsh shutdown` alike.
        self.domain_event(h, vm, DomainChange::ShuttingDown { by_guest: true });
        let gate = self.hosts[h].kernel();
        let takes = if by_guest { Duration::from_millis(50) } else { SHUTDOWN };
        self.after(gate, takes, move |world| world.exit(h, vm, key, OffReason::Shutdown));
    }

    /// `virsh destroy`: a stopped process takes ten seconds.
    pub fn destroy(&mut self, h: H, vm: VmId, then: Then) {
        let Some(qemu) = self.qemu(h, vm) else {
            return then(self, Err(DomainFailure::NoDomain));
        };
        let (key, takes) = (qemu.key, if qemu.halted { 10_000 } else { 20 });
        if self.stops_fail {
            return then(self, Err(DomainFailure::Host("failed to terminate process: device or resource busy".into())));
        }
        let gate = Gate::Libvirt(h, self.hosts[h].libvirtd.unwrap_or(0));
        self.after(gate, Duration::from_millis(takes), move |world| {
            world.exit(h, vm, key, OffReason::Destroyed);
            then(world, Ok(()));
        });
    }

    /// A new daemon ends every QEMU that the last one had not started fully.
    pub fn end_half_started(&mut self, h: H) {
        let half = |domain: &Domain| domain.qemu.as_ref().filter(|qemu| qemu.rising).map(|qemu| qemu.key);
        let half: Vec<(VmId, ProcessKey)> =
            self.domains(h).iter().filter_map(|(vm, domain)| Some((*vm, half(domain)?))).collect();
        half.into_iter().for_each(|(vm, key)| self.exit(h, vm, key, OffReason::Daemon));
    }

    /// SIGKILL by the guard.
    pub fn kill_qemu(&mut self, h: H, vm: VmId, key: ProcessKey) {
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(6), move |world| world.exit(h, vm, key, OffReason::Failed));
    }

    /// The process ends; on hung storage it cannot, until the storage is back, unless its waits can be killed (NFS): then
    /// what it had under way stays in the kernel.
    pub fn exit(&mut self, h: H, vm: VmId, key: ProcessKey, reason: OffReason) {
        let home = self.disk_of(h, vm);
        let hung = self.hosts[h].path(home) == Path::Hung || self.stores[&home].hung;
        let gate = self.hosts[h].kernel();
        let killable = self.jitter && !self.stores[&home].hung && self.chance(3) == 0;
        let Some(qemu) = self.qemu(h, vm).filter(|qemu| qemu.key == key) else { return };
        if hung && (qemu.dying || !killable) {
            qemu.dying = true;
            return self.after(gate, Duration::from_millis(100), move |world| world.exit(h, vm, key, reason));
        }
        let boot = self.hosts[h].life.unwrap_or(0);
        if self.hosts[h].path(home) == Path::Well {
            self.stores.get_mut(&home).expect("its home").release(vm, h, boot);
        }
        let seen = self.hosts[h].libvirtd.is_some();
        let domain = self.domain(h, vm);
        domain.qemu = None;
        domain.off = if seen { reason } else { OffReason::Daemon };
        self.tell_capacity(h);
        self.after(gate, Duration::from_millis(1), move |world| world.saw_exit(h, vm, key, reason));
        self.after(gate, Duration::from_millis(3), move |world| {
            world.domain_event(h, vm, DomainChange::Stopped(reason));
        });
    }
}
