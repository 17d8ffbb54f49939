//! Power switches of simulated hosts: they work, hang, fail, say one thing and show another, or lie.

use std::time::Duration;

use mainstay::core::event::Outcome;
use mainstay::types::power::{FenceDevice, PowerAnswer, PowerOrder, Secret};
use mainstay::types::{DatastoreId, HostId, Ticket};

use super::world::{Gate, H, World, nanos};

/// How a switch behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Switch {
    /// It switches its host off and says so.
    Works,
    /// The same, so long after it was asked; unless its program is killed before.
    Takes(Duration),
    /// No answer ever comes.
    Hangs,
    /// It says that it failed.
    Fails,
    /// It says that it is done, does nothing, and its status is true.
    Idles,
    /// It does nothing, and says that the host is off.
    Lies,
    /// Its program is not installed.
    Missing,
}

impl Switch {
    /// By its word in a scenario.
    pub fn named(word: &str) -> Option<Self> {
        Some(match word {
            "works" => Self::Works,
            "hangs" => Self::Hangs,
            "fails" => Self::Fails,
            "idles" => Self::Idles,
            "lies" => Self::Lies,
            "missing" => Self::Missing,
            _ => return None,
        })
    }
}

/// What each device is opened with: never written down.
pub const SECRET: &str = "correct horse battery staple";

/// A device of a setup.
pub fn device(name: &str, host: HostId, level: u8) -> FenceDevice {
    FenceDevice {
        name: name.to_owned(),
        host,
        agent: "fence_sim".to_owned(),
        level,
        parameters: Default::default(),
        secrets: [("password".to_owned(), Secret(SECRET.to_owned()))].into(),
        fence_at: None,
        distrusted: None,
    }
}

impl World {
    /// An agent asks a power switch.
    pub fn power_order(&mut self, h: H, ticket: Ticket, device: &FenceDevice, order: PowerOrder, within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        self.open.insert((h, life, ticket.0));
        let gate = Gate::Agent(h, life);
        self.after(gate, within, move |world| {
            world.done(h, life, ticket, Outcome::Power(Err("it did not end in time and was killed".to_owned())));
        });
        let (name, Some(victim)) = (device.name.clone(), self.host_of(device.host)) else { return };
        let there = match self.switches.get(&name) {
            Some(Switch::Takes(span)) if order == PowerOrder::Off => *span,
            _ => self.latency(20_000),
        };
        // What is asked reaches the switch whether the asker lives or not.
        self.after(Gate::World, there, move |world| {
            let switch = world.switches.get(&name).copied().unwrap_or(Switch::Works);
            if matches!(switch, Switch::Takes(_)) && !world.open.contains(&(h, life, ticket.0)) {
                return; // Its program was killed.
            }
            let on = world.hosts[victim].life.is_some();
            let answer = match (switch, order) {
                (Switch::Hangs, _) => return,
                (Switch::Fails, _) => Err("exit status: 1".to_owned()),
                (Switch::Missing, _) => Err("fence_sim is not installed on this host".to_owned()),
                (_, PowerOrder::Monitor) | (Switch::Idles | Switch::Lies, PowerOrder::Off) => Ok(PowerAnswer::Done),
                (Switch::Lies, PowerOrder::Status) => Ok(PowerAnswer::Off),
                (Switch::Works | Switch::Takes(_) | Switch::Idles, PowerOrder::Status) => {
                    Ok(if on { PowerAnswer::On } else { PowerAnswer::Off })
                }
                (Switch::Works | Switch::Takes(_), PowerOrder::Off) => {
                    world.switch_off(victim, &name);
                    Ok(PowerAnswer::Done)
                }
            };
            if matches!(switch, Switch::Works | Switch::Takes(_) | Switch::Idles) && world.hosts[victim].life.is_none()
            {
                let ended = world.hosts[victim].last_boot();
                world.judge.off.extend(ended);
                // Nothing that its kernel held can land any more; its locks are the server's business.
                for store in world.stores.values_mut() {
                    store.writers.values_mut().for_each(|writers| writers.retain(|writer| writer.0 != victim));
                }
            }
            let back = world.latency(20_000);
            world.after(gate, back, move |world| world.done(h, life, ticket, Outcome::Power(answer)));
        });
    }

    /// An agent has the program killed that asks a power switch, and is told so.
    pub fn call_off_power(&mut self, h: H, ticket: Ticket) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let killed = "fence_sim was killed before it had ended".to_owned();
        let takes = self.latency(1_000);
        self.after(Gate::Agent(h, life), takes, move |world| {
            world.done(h, life, ticket, Outcome::Power(Err(killed)));
        });
    }

    fn switch_off(&mut self, victim: H, by: &str) {
        let name = self.hosts[victim].name.clone();
        let on = self.hosts[victim].life.is_some();
        self.tell("", &format!("switch {by} turns {name} off{}", if on { "" } else { ", which is off" }));
        self.check_switched_off(victim);
        if on {
            self.kill(victim);
        }
    }

    /// Nobody may be switched off who beats on storage: its beats of the time that must have been silent, but for the last
    /// read and what a switch takes, are none.
    fn check_switched_off(&mut self, victim: H) {
        let timing = self.settings.timing;
        let (silent, slack) = (nanos(timing.suspect), nanos(timing.renew) + 500_000_000);
        let (from, to) = (self.now.saturating_sub(silent) + 250_000_000, self.now.saturating_sub(slack));
        let host = self.hosts[victim].id;
        let homes: Vec<DatastoreId> = self.stores.keys().copied().collect();
        let beat = homes.iter().any(|home| self.stores[home].landed(host).any(|at| from <= at && at < to));
        if beat && self.hosts[victim].life.is_some() {
            let name = self.hosts[victim].name.clone();
            self.violated(&format!("{name} is switched off although it beats on storage"));
        }
    }
}
