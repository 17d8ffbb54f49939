//! Memory of simulated hosts, as their agents see it.

use std::time::Duration;

use mainstay::core::event::Event;
use mainstay::types::needs::Pages;
use mainstay::types::vm::{HostCapacity, PagesLeft};

use super::world::{Gate, H, World, nanos};

impl World {
    /// Memory as the agent sees it, if it changed.
    pub fn tell_capacity(&mut self, h: H) {
        let ((free_kib, used), pages_2m) = (self.ordinary(h), self.pages(h));
        let host = &mut self.hosts[h];
        let total_kib = host.memory_kib;
        let Some(agent) = &host.agent else { return };
        if host.told_kib == (free_kib, pages_2m.free_kib) {
            return;
        }
        host.told_kib = (free_kib, pages_2m.free_kib);
        let capacity =
            HostCapacity { free_kib, total_kib, cpus: 8, resident_kib: used, pages_2m, ..HostCapacity::default() };
        let gate = Gate::Agent(h, agent.life);
        // It looks every few seconds.
        let delay = Duration::from_nanos(5_000_000_000 - self.now % 5_000_000_000).min(Duration::from_secs(5));
        let delay = if self.now < nanos(super::world::SETTLING) { Duration::ZERO } else { delay };
        self.after(gate, delay, move |world| world.agent_event(h, Event::Capacity(capacity)));
    }

    /// Free, and used by QEMUs.
    fn ordinary(&self, h: H) -> (u64, u64) {
        let host = &self.hosts[h];
        let used = self.used(h, true);
        (host.memory_kib.saturating_sub(host.pages_kib + used), used)
    }

    /// Large pages.
    pub fn pages(&self, h: H) -> PagesLeft {
        let total_kib = self.hosts[h].pages_kib;
        PagesLeft { free_kib: total_kib.saturating_sub(self.used(h, false)), total_kib }
    }

    fn used(&self, h: H, ordinary: bool) -> u64 {
        let running = self.hosts[h].domains.iter().filter(|(_, domain)| domain.qemu.is_some());
        let records = running.map(|(vm, _)| &self.vms[vm].record);
        records
            .filter(|record| (record.needs.pages == Pages::Ordinary) == ordinary)
            .map(|record| record.memory_kib)
            .sum()
    }
}
