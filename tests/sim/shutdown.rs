//! The orderly end of a host: its VMs are moved away first, if the rules say so; then guests, then our services, then the power.

use std::time::Duration;

use mainstay::core::event::Event;
use mainstay::types::VmId;
use mainstay::types::control::{Reply, Request};
use mainstay::types::rules::AtShutdown;

use super::people::Waiter;
use super::world::{H, World, nanos};

impl World {
    /// `systemctl poweroff`.
    pub fn power_off(&mut self, h: H) {
        if self.hosts[h].life.is_none() {
            return;
        }
        self.excuse(h);
        self.hosts[h].going_down = true;
        let rules = &self.hosts[h].settings.rules.shutdown;
        if rules.vms == AtShutdown::Evacuate {
            let until = self.now + nanos(Duration::from_secs(rules.within_s.into()));
            return self.evacuate(h, until);
        }
        self.shut_guests_down(h);
    }

    /// ExecStop of our unit: it asks again and again.
    fn evacuate(&mut self, h: H, until: u64) {
        if self.hosts[h].agent.is_none() || until <= self.now {
            return self.shut_guests_down(h);
        }
        let ask = self.wait(Waiter::Unit { at: h, until });
        let request = Box::new(Request::Evacuate { host: None, for_shutdown: true });
        self.agent_event(h, Event::Asked { ask, from: None, request });
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_secs(10), move |world| {
            if world.waiters.remove(&ask.0).is_some() {
                world.evacuate(h, until); // No answer.
            }
        });
    }

    /// An answer to it.
    pub fn evacuated(&mut self, h: H, until: u64, reply: &Reply) {
        let goes_on = match reply {
            Reply::Evacuating(view) => view.wanted && view.stay.len() < view.left as usize,
            _ => true,
        };
        if !goes_on {
            return self.shut_guests_down(h);
        }
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_secs(2), move |world| world.evacuate(h, until));
    }

    /// libvirt-guests, and what is stopped after it.
    fn shut_guests_down(&mut self, h: H) {
        let gate = self.hosts[h].kernel();
        let running: Vec<VmId> =
            self.hosts[h].domains.iter().filter(|(_, domain)| domain.qemu.is_some()).map(|(vm, _)| *vm).collect();
        for vm in running {
            self.shut_down(h, vm, false);
        }
        self.after(gate, Duration::from_millis(3000), move |world| world.stop_agent(h));
        self.after(gate, Duration::from_millis(3500), move |world| world.stop_guard(h));
        self.after(gate, Duration::from_millis(4000), move |world| world.kill(h));
    }
}
