//! Needless stops: no VM stops on a host that nothing happened to, unless something was done to the VM. A cut network,
//! or one that loses datagrams, is nothing.

use mainstay::types::rules::Response;
use std::time::Duration;

use mainstay::types::VmId;

use super::host::{Agent, Path};
use super::world::{H, SETTLING, World, nanos};

/// What was done to a VM explains its stops for so long.
const TOUCHED: Duration = Duration::from_secs(150);
/// What happened to a host explains stops on it for so long, and two leases more.
const EXCUSED: Duration = Duration::from_secs(60);

impl World {
    /// Something happened to a host that explains stops on it.
    pub fn excuse(&mut self, h: H) {
        self.hosts[h].excused = self.now;
    }

    /// Something was done to a VM.
    pub fn touch(&mut self, vm: VmId) {
        let now = self.now;
        self.judge.touched.insert(vm, now);
    }

    /// An agent ends a VM: that is its isolation response, where there is one and the host's router does not answer; or it makes room,
    /// where it may.
    pub fn blame_isolation(&mut self, h: H, vm: VmId) {
        // What was ordered just before it answered again is under way.
        let host = &self.hosts[h];
        let made_room = |agent: &Agent| {
            let rules = &agent.core.settings().rules;
            rules.room.stopped.iter().any(|glob| glob.fits(&self.vms[&vm].record.name))
        };
        if host.agent.as_ref().is_some_and(made_room) {
            return self.touch(vm);
        }
        let alone = !host.router || 0 < host.routed && self.now - host.routed < 3_000_000_000;
        let Some(agent) = host.agent.as_ref().filter(|_| alone) else { return };
        let name = &self.vms[&vm].record.name;
        let rules = &agent.core.settings().rules.isolations;
        let rule = rules.iter().find(|rule| rule.vms.iter().any(|glob| glob.fits(name)));
        if rule.is_some_and(|rule| rule.response != Response::Leave) {
            self.touch(vm);
        }
    }

    /// The storage hangs for everybody, or goes on.
    pub fn stalled(&mut self) {
        self.judge.stall = Some(self.now);
    }

    /// Whether something is wrong with a host, or was lately.
    pub fn troubled(&self, h: H) -> bool {
        let host = &self.hosts[h];
        let sick = &self.sick[h];
        let lately = nanos(EXCUSED + self.settings.timing.lease * 2);
        host.life.is_none()
            || host.frozen
            || host.agent_held
            || host.libvirt_held
            || host.going_down
            || host.agent.is_none()
            || host.libvirtd.is_none()
            || host.guard.is_none()
            || host.paths.values().any(|path| *path != Path::Well)
            || sick.flaky
            || sick.unreadable
            || sick.slow != Duration::ZERO
            || self.starts_fail.contains_key(&h)
            || self.now < host.excused + lately
    }

    /// A VM has stopped running on this host.
    pub fn check_blame(&mut self, vm: VmId, h: H) {
        let lately = nanos(EXCUSED + self.settings.timing.lease * 2);
        let hung = self.stores.values().any(|store| store.hung);
        let stalled = hung || self.judge.stall.is_some_and(|at| self.now < at + lately);
        let touched = self.judge.touched.get(&vm).is_some_and(|at| self.now < at + nanos(TOUCHED));
        if touched || stalled || self.now < nanos(SETTLING) || self.troubled(h) {
            return;
        }
        let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
        self.violated(&format!("{name} stops on {host} although nothing has happened to either"));
    }
}
