//! People at the keyboard, and everybody else who waits for an agent's answer.

use mainstay::core::event::{AskId, Event};
use mainstay::types::control::{Reply, Request, VmCommand};
use mainstay::types::vm::OffReason;
use mainstay::types::{Ticket, VmId};

use super::world::{Gate, H, World};

/// Who waits.
pub enum Waiter {
    /// Another agent.
    Agent { at: H, from: H, life: u64, ticket: Ticket },
    /// The unit that empties this host before it goes down, until then.
    Unit { at: H, until: u64 },
    /// A person at this host.
    Person { at: H, what: String },
    /// libvirt's hook.
    Hook { at: H, then: super::hypervisor::Told },
}

impl World {
    /// An agent has answered a question.
    pub fn answered(&mut self, h: H, ask: AskId, reply: Reply) {
        match self.waiters.remove(&ask.0) {
            None => {}
            Some(Waiter::Agent { from, life, ticket, .. }) => self.reply(h, from, life, ticket, reply),
            Some(Waiter::Unit { at, until }) => self.evacuated(at, until, &reply),
            Some(Waiter::Person { what, .. }) => {
                let text = match reply {
                    Reply::Done => "done".to_owned(),
                    Reply::AlreadySo => "it was so already".to_owned(),
                    Reply::Ran { generation } => format!("runs under generation {generation}"),
                    Reply::Denied(denial) => format!("denied: {denial}"),
                    other => format!("{other:?}"),
                };
                let name = self.hosts[h].name.clone();
                self.tell(&name, &format!("$ {what}: {text}"));
            }
            Some(Waiter::Hook { .. }) => panic!("a hook got the answer of a question"),
        }
    }

    /// An agent has answered the hook.
    pub fn hook_answered(&mut self, h: H, ask: AskId, result: Result<(), String>) {
        if let Some(Waiter::Hook { then, .. }) = self.waiters.remove(&ask.0) {
            let gate = self.hosts[h].kernel();
            self.after(gate, std::time::Duration::from_millis(1), move |world| then(world, result));
        }
    }

    /// `mainstay vm …` on a host.
    pub fn command(&mut self, h: H, what: &str, command: VmCommand) {
        let name = self.hosts[h].name.clone();
        if self.hosts[h].agent.is_none() {
            return self.tell(&name, &format!("$ {what}: mainstayd does not run"));
        }
        let ask = self.wait(Waiter::Person { at: h, what: what.to_owned() });
        self.agent_event(h, Event::Asked { ask, from: None, request: Box::new(Request::Vm(command)) });
    }

    /// `virsh define` (if it is not defined there) and `virsh start`.
    pub fn virsh_start(&mut self, h: H, vm: VmId) {
        self.domain(h, vm).defined = true;
        let what = format!("virsh start {}", self.vm_name(vm));
        let (image, then) = (self.domain(h, vm).saved.clone(), self.tells(h, what));
        self.start_from(h, vm, image, true, then);
    }

    /// `virsh resume`.
    pub fn virsh_resume(&mut self, h: H, vm: VmId) {
        let name = self.vm_name(vm);
        self.domain(h, vm).busy += 1;
        self.resume(
            h,
            vm,
            Box::new(move |world, result| {
                let busy = &mut world.domain(h, vm).busy;
                *busy = busy.saturating_sub(1);
                let text = result.map_or_else(|why| format!("{why:?}"), |()| "resumed".to_owned());
                let host = world.hosts[h].name.clone();
                world.tell(&host, &format!("$ virsh resume {name}: {text}"));
            }),
        );
    }

    /// `virsh destroy`.
    pub fn virsh_destroy(&mut self, h: H, vm: VmId) {
        if self.hosts[h].libvirtd.is_some() {
            self.destroy(h, vm, Box::new(|_, _| {}));
        }
    }

    /// QEMU dies by itself.
    pub fn crash(&mut self, h: H, vm: VmId) {
        if let Some(key) = self.qemu(h, vm).map(|qemu| qemu.key) {
            self.exit(h, vm, key, OffReason::Failed);
        }
    }

    /// A machine with a copy of this host's disk, and thus with its id, beats on every datastore for so long.
    pub fn twin_beats(&mut self, h: H, left: u64) {
        const PERIOD: u64 = 1_000_000_000;
        let (id, now) = (self.hosts[h].id, self.now);
        for store in self.stores.values_mut() {
            if let (_, Some(mut beat)) = store.own(id) {
                beat.boot = mainstay::types::BootId(super::world::id(0x7, 0));
                beat.counter = beat.counter.next();
                store.write_beat(id, Some((beat.counter.0 % 8) as usize), beat, now);
                store.lied = true; // Its guards have a reason to doubt it.
            }
        }
        if PERIOD <= left {
            self.after(Gate::World, std::time::Duration::from_nanos(PERIOD), move |world| {
                world.twin_beats(h, left - PERIOD);
            });
        }
    }

    /// The host on which a copy of a VM is, running or not.
    pub fn place_of(&self, vm: VmId) -> Option<H> {
        let copies: Vec<(H, bool)> =
            self.qemus().filter(|(_, of, _)| *of == vm).map(|(h, _, qemu)| (h, qemu.cpus)).collect();
        copies.iter().find(|(_, cpus)| *cpus).or(copies.first()).map(|(h, _)| *h)
    }

    /// A gate for people who outlive hosts.
    pub fn outside() -> Gate {
        Gate::World
    }
}
