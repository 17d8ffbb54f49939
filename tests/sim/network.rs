//! Who hears whom: beats (one way), and questions of agents (both ways, with a deadline).

use std::collections::BTreeSet;
use std::time::Duration;

use mainstay::core::event::{AskId, Event, Outcome};
use mainstay::types::control::{Reply, Request};
use mainstay::types::{HostId, NetBeat, Ticket};

use super::people::Waiter;
use super::world::{Gate, H, World};

/// Links that are cut, from → to.
#[derive(Default)]
pub struct Links {
    cut: BTreeSet<(H, H)>,
}

impl Links {
    /// One direction.
    pub fn cut(&mut self, from: H, to: H) {
        self.cut.insert((from, to));
    }
    /// Everything goes through again.
    pub fn heal(&mut self) {
        self.cut.clear();
    }
    /// What one host sends and hears.
    pub fn heal_host(&mut self, host: H) {
        self.cut.retain(|(from, to)| *from != host && *to != host);
    }
    /// Whether a datagram gets through.
    pub fn passes(&self, from: H, to: H) -> bool {
        !self.cut.contains(&(from, to))
    }
    /// Whether a connection works.
    pub fn both(&self, a: H, b: H) -> bool {
        self.passes(a, b) && self.passes(b, a)
    }
}

/// Datagrams that a frozen host's sockets hold; further ones are lost.
const SOCKET_BUFFER: usize = 64;

impl World {
    /// A host's guard sends a beat to everybody.
    pub fn multicast(&mut self, from: H, beat: &NetBeat) {
        for to in 0..self.hosts.len() {
            let loss = self.weather.loss.max(u64::from(self.jitter));
            let lost = 0 < loss && self.dice(100) < loss;
            if to == from || lost || !self.links.passes(from, to) {
                continue;
            }
            let Some(life) = self.hosts[to].agent.as_ref().map(|agent| agent.life) else { continue };
            let host = &self.hosts[to];
            if SOCKET_BUFFER <= host.backlog.len().max(host.agent_backlog.len()) {
                continue;
            }
            for _ in 0..1 + u32::from(self.weather.doubled) {
                let beat = Box::new(beat.clone());
                let delay = self.latency(200) + self.lateness();
                self.after(Gate::Agent(to, life), delay, move |world| world.agent_event(to, Event::Heard(beat)));
            }
        }
    }

    /// An agent asks another one.
    pub fn send(&mut self, from: H, ticket: Ticket, to: HostId, request: Request, within: Duration) {
        let Some(life) = self.hosts[from].agent.as_ref().map(|agent| agent.life) else { return };
        let gate = Gate::Agent(from, life);
        self.open.insert((from, life, ticket.0));
        self.after(gate, within, move |world| {
            world.replied(from, life, ticket, Err("no answer in time".to_owned()));
        });
        let Some(to) = self.host_of(to) else { return };
        let delay = self.latency(500) + self.lateness();
        self.after(Gate::World, delay, move |world| world.arrive(from, life, ticket, to, request));
    }

    fn arrive(&mut self, from: H, life: u64, ticket: Ticket, to: H, request: Request) {
        if !self.links.both(from, to) || self.hosts[to].life.is_none() {
            return; // Nobody answers: the deadline does.
        }
        let Some(peer) = self.hosts[to].agent.as_ref().map(|agent| agent.life) else {
            return self.after(Gate::Agent(from, life), Duration::from_millis(1), move |world| {
                world.replied(from, life, ticket, Err("connection refused".to_owned()));
            });
        };
        let asker = self.hosts[from].id;
        self.after(Gate::Agent(to, peer), Duration::ZERO, move |world| {
            let ask = world.wait(Waiter::Agent { at: to, from, life, ticket });
            world.agent_event(to, Event::Asked { ask, from: Some(asker), request: Box::new(request) });
        });
    }

    /// The other agent's answer goes back.
    pub fn reply(&mut self, from: H, to: H, life: u64, ticket: Ticket, reply: Reply) {
        let delay = self.latency(500) + self.lateness();
        self.after(Gate::World, delay, move |world| {
            if world.links.both(from, to) {
                world.after(Gate::Agent(to, life), Duration::ZERO, move |world| {
                    world.replied(to, life, ticket, Ok(reply));
                });
            }
        });
    }

    fn replied(&mut self, at: H, life: u64, ticket: Ticket, reply: Result<Reply, String>) {
        if self.open.remove(&(at, life, ticket.0)) {
            self.agent_event(at, Event::Done(ticket, Outcome::Reply(reply)));
        }
    }

    /// An agent has died: whoever waits for it is told by the broken connection, if there is one.
    pub fn hang_up(&mut self, h: H) {
        let gone: Vec<u64> = self
            .waiters
            .iter()
            .filter(|(_, waiter)| matches!(waiter, Waiter::Agent { at, .. } if *at == h))
            .map(|(ask, _)| *ask)
            .collect();
        for ask in gone {
            let Some(Waiter::Agent { from, life, ticket, .. }) = self.waiters.remove(&ask) else { continue };
            if self.hosts[h].life.is_some() && self.links.both(h, from) {
                self.after(Gate::Agent(from, life), Duration::from_millis(1), move |world| {
                    world.replied(from, life, ticket, Err("the connection ended".to_owned()));
                });
            }
        }
    }

    /// Remembers who waits for an answer.
    pub fn wait(&mut self, waiter: Waiter) -> AskId {
        let ask = self.new_life();
        self.waiters.insert(ask, waiter);
        AskId(ask)
    }
}
