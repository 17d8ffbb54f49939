//! Memory of simulated hosts, as their agents see it.

use std::time::Duration;

use mainstay::core::event::Event;
use mainstay::types::vm::HostCapacity;

use super::world::{Gate, H, World, nanos};

impl World {
    /// Memory as the agent sees it, if it changed.
    pub fn tell_capacity(&mut self, h: H) {
        let host = &mut self.hosts[h];
        let running = host.domains.iter().filter(|(_, domain)| domain.qemu.is_some());
        let used: u64 = running.map(|(vm, _)| self.vms[vm].record.memory_kib).sum();
        let total_kib = host.memory_kib;
        let free_kib = total_kib.saturating_sub(used);
        let Some(agent) = &host.agent else { return };
        if host.told_kib == free_kib {
            return;
        }
        host.told_kib = free_kib;
        let capacity = HostCapacity { free_kib, total_kib, cpus: 8, resident_kib: used };
        let gate = Gate::Agent(h, agent.life);
        // It looks every few seconds.
        let delay = Duration::from_nanos(5_000_000_000 - self.now % 5_000_000_000).min(Duration::from_secs(5));
        let delay = if self.now < nanos(super::world::SETTLING) { Duration::ZERO } else { delay };
        self.after(gate, delay, move |world| world.agent_event(h, Event::Capacity(capacity)));
    }
}
