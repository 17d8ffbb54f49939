//! What may become of one operation on a datastore, or of one datagram; processes that are held; everything heals.
//!
//! ```text
//!   operation ──► slow ──► flaky: refused, nothing done │ done, but the answer is lost │ (a write) done later,
//!                                                         even after its process has died, unless its host was expired
//! ```

use std::time::Duration;

use mainstay::core::event::{Event, Outcome};
use mainstay::core::health::Loss;
use mainstay::guard::table::ProcessKey;
use mainstay::types::vm::{DomainAnswer, DomainFailure};
use mainstay::types::{DatastoreId, Incarnation, Ticket, VmId};

use super::host::Path;
use super::world::{Gate, H, Item, World, nanos};

/// The agent's keepalive gives a libvirtd up that has not answered for so long (two messages, two seconds apart).
const KEEPALIVE: Duration = Duration::from_secs(5);

/// How the storage path of a host is sick, beside being cut.
#[derive(Clone, Copy, Default, Debug)]
pub struct Sick {
    /// Every operation takes up to so much longer.
    pub slow: Duration,
    /// Half of all operations fail, in one of the three ways.
    pub flaky: bool,
    /// Files of other hosts cannot be read.
    pub unreadable: bool,
    /// Folders are seen as they were so long ago (attribute caches).
    pub stale: Duration,
    /// Errors say that the storage is gone, or that what was there is another.
    pub loss: Option<Loss>,
}

/// How the network is sick, for everybody.
#[derive(Clone, Copy, Default, Debug)]
pub struct Weather {
    /// Percent of datagrams that are lost.
    pub loss: u64,
    /// Datagrams and messages are late by up to so much: they overtake one another.
    pub late: Duration,
    /// Datagrams come twice.
    pub doubled: bool,
}

/// What an operation does there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deed {
    /// Looks.
    Read,
    /// Looks at files of other hosts.
    ReadOthers,
    /// Changes something: its outcome may be unknown.
    Write,
}

/// What becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// As usual.
    Done,
    /// An error, nothing was done.
    Refused,
    /// Done, but told as an error.
    Unheard,
    /// Told as an error, and done after this.
    Late(Duration),
}

/// A write with unknown outcome has landed after this, or never does.
const LATEST: u64 = 45_000;

impl World {
    /// What becomes of an operation of this host.
    pub fn fate(&mut self, h: H, deed: Deed) -> Fate {
        let sick = self.sick[h];
        if sick.unreadable && deed == Deed::ReadOthers {
            return Fate::Refused;
        }
        if !sick.flaky || self.dice(2) == 0 {
            return Fate::Done;
        }
        match (deed, self.dice(3)) {
            (Deed::Read | Deed::ReadOthers, _) | (Deed::Write, 0) => Fate::Refused,
            (Deed::Write, 1) => Fate::Unheard,
            (Deed::Write, _) => Fate::Late(Duration::from_millis(1 + self.dice(LATEST))),
        }
    }

    /// How much longer an operation of this host takes.
    pub fn slowness(&mut self, h: H) -> Duration {
        let slow = self.sick[h].slow.as_micros() as u64;
        if slow == 0 { Duration::ZERO } else { Duration::from_micros(self.dice(slow)) }
    }

    /// How late a datagram or a message is.
    pub fn lateness(&mut self) -> Duration {
        let late = self.weather.late.as_micros() as u64;
        if late == 0 { Duration::ZERO } else { Duration::from_micros(self.dice(late)) }
    }

    /// What waits because its process is held: true if it was put there.
    pub fn held(&mut self, item: Item) -> Option<Item> {
        let Some(h) = item.gate.host() else { return Some(item) };
        let host = &mut self.hosts[h];
        let backlog = match item.gate {
            _ if host.frozen => &mut host.backlog,
            Gate::Agent(..) if host.agent_held || host.agent_waking => &mut host.agent_backlog,
            Gate::Libvirt(..) if host.libvirt_held => &mut host.libvirt_backlog,
            _ => return Some(item),
        };
        backlog.push(item);
        None
    }

    /// Its disk is new, and its clock of day is anywhere: the incarnation begins with that, in microseconds. So not with
    /// one that this host had lately.
    pub fn lose_state(&mut self, h: H) {
        let begins = 1 + self.dice(5000);
        let had =
            |of: u64| self.judge.given.get(&h).is_some_and(|all| all.iter().any(|g| g.incarnation.0.abs_diff(of) < 20));
        self.hosts[h].incarnation = Incarnation((begins..).step_by(64).find(|of| !had(*of)).expect("they do not end"));
    }

    /// SIGSTOP, or no CPU for it.
    pub fn hold_agent(&mut self, h: H) {
        self.excuse(h);
        self.hosts[h].agent_held = self.hosts[h].agent.is_some();
    }

    /// SIGCONT.
    pub fn let_agent_go(&mut self, h: H) {
        self.excuse(h);
        self.hosts[h].agent_held = false;
        self.release_agent(h);
    }

    /// What waits for an agent reaches it, if it moves.
    pub fn release_agent(&mut self, h: H) {
        let host = &mut self.hosts[h];
        if !host.agent_held && !host.agent_waking {
            let backlog = std::mem::take(&mut host.agent_backlog);
            self.release(backlog);
        }
    }

    /// SIGSTOP of libvirtd. The agent's keepalive notices it after a while.
    pub fn hold_libvirtd(&mut self, h: H) {
        self.excuse(h);
        let Some(daemon) = self.hosts[h].libvirtd else { return };
        self.hosts[h].libvirt_held = true;
        let Some(agent) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let since = self.now;
        self.hosts[h].libvirt_since = since;
        self.after(Gate::Agent(h, agent), KEEPALIVE, move |world| {
            let host = &world.hosts[h];
            if host.libvirt_held && host.libvirtd == Some(daemon) && host.libvirt_since == since {
                world.hang_up_libvirt(h, agent);
            }
        });
    }

    /// SIGCONT. It goes on with what it was told, whether anybody still waits for that or not.
    pub fn let_libvirtd_go(&mut self, h: H) {
        self.hosts[h].libvirt_held = false;
        let backlog = std::mem::take(&mut self.hosts[h].libvirt_backlog);
        self.release(backlog);
        if std::mem::take(&mut self.hosts[h].libvirt_lost)
            && let Some(daemon) = self.hosts[h].libvirtd
        {
            let gate = Gate::Libvirt(h, daemon);
            self.after(gate, Duration::from_millis(50), move |world| world.connect_libvirt(h));
        }
    }

    /// As of when a host sees folders. A boot begins with empty caches.
    pub fn cached_since(&self, h: H) -> u64 {
        self.now.saturating_sub(nanos(self.sick[h].stale)).max(self.hosts[h].booted.min(self.now))
    }

    /// Remembers a call of the agent, for `hang_up_libvirt`.
    pub fn calls_libvirt(&mut self, h: H, agent: u64, ticket: Ticket) {
        let open = &self.open;
        let calls = &mut self.hosts[h].calls;
        calls.retain(|ticket| open.contains(&(h, agent, ticket.0)));
        calls.push(ticket);
    }

    /// On a busy host much of a start comes after its QEMU is there.
    pub fn busy_start(&mut self) -> Duration {
        if self.jitter { Duration::from_millis(self.dice(600)) } else { Duration::ZERO }
    }

    /// The agent's connections are given up: every call under way has failed, though it may be carried out all the same.
    fn hang_up_libvirt(&mut self, h: H, agent: u64) {
        const WHY: &str = "connection closed due to keepalive timeout";
        self.hosts[h].libvirt_lost = true;
        for ticket in std::mem::take(&mut self.hosts[h].calls) {
            let answer = DomainAnswer::Failed(DomainFailure::NoDaemon(WHY.to_owned()));
            self.done(h, agent, ticket, Outcome::Domain(answer));
        }
        self.agent_event(h, Event::LibvirtDown(WHY.to_owned()));
    }

    /// SIGSTOP and freezer. Two things follow, at times of their own: the vCPUs execute nothing more, and the last thread
    /// stands, so that the guard knows. Measured (`docs/notes/simulator.md`): a vCPU runs on for 0.03 ms, up to 4.2 ms
    /// where the freezer refused; a thread that waits for a CPU among others is seen to stand up to 36 ms later, but it
    /// executes nothing of its program on the way there.
    pub fn begin_halt(&mut self, h: H, vm: VmId, key: ProcessKey) {
        if !self.jitter {
            return self.halt(h, vm);
        }
        // In the moment of a thaw the guard comes first (design 2, assumption 4).
        let waking = self.hosts[h].thawed.is_some_and(|at| self.now < at + 20_000_000);
        let (runs_on, more) = if waking {
            (self.dice(8_000), 0)
        } else if self.dice(8) == 0 {
            (self.dice(4_200), self.dice(32_000))
        } else {
            (self.dice(100), self.dice(1_400))
        };
        let gate = self.hosts[h].kernel();
        let Some(qemu) = self.qemu(h, vm).filter(|qemu| qemu.key == key) else { return };
        qemu.halting = true;
        self.after(gate, Duration::from_micros(runs_on), move |world| {
            if world.qemu(h, vm).is_some_and(|qemu| qemu.key == key && qemu.halting) {
                world.halt(h, vm);
            }
        });
        self.after(gate, Duration::from_micros(runs_on + more), move |world| {
            if let Some(qemu) = world.qemu(h, vm).filter(|qemu| qemu.key == key) {
                qemu.halting = false;
            }
        });
    }

    /// Everything is well again, except that people may have stopped VMs.
    pub fn heal_everything(&mut self) {
        self.links.heal();
        self.routers_answer();
        self.weather = Weather::default();
        self.set_hung(false);
        (self.fence_fails, self.migrations_fail, self.stops_fail) = (false, false, false);
        self.starts_fail.clear();
        self.switches.clear();
        self.answers_lost = false;
        self.short.findings.clear();
        for h in 0..self.hosts.len() {
            self.tell_findings(h);
            self.sick[h] = Sick::default();
            self.thaw(h);
            self.let_agent_go(h);
            self.let_libvirtd_go(h);
            self.set_path(h, Path::Well);
            self.boot(h);
            self.start_agent(h);
            self.start_guard(h);
            self.start_libvirtd(h);
        }
        for n in 1..=8_u32 {
            // A host that was powering off, or that was switched off while it came back, is off by now.
            self.after(Gate::World, Duration::from_secs(5) * n, |world| {
                (0..world.hosts.len()).for_each(|h| world.boot(h));
            });
        }
    }

    /// The deadline of an order of an agent: whatever answers first counts.
    pub fn due(&mut self, gate: Gate, within: Duration, ticket: Ticket, outcome: Outcome) {
        let Gate::Agent(h, life) = gate else { panic!("orders are given by agents") };
        self.open.insert((h, life, ticket.0));
        self.after(gate, within, move |world| world.done(h, life, ticket, outcome));
    }

    /// Starts fail on hosts, for want of what.
    pub fn fail_starts(&mut self, names: &[&str], what: &str) {
        let why = match what {
            "host" => DomainFailure::Host("no network 'front'".to_owned()),
            "definition" => DomainFailure::Definition("no such machine".to_owned()),
            "capacity" => DomainFailure::Capacity("cannot set up guest memory".to_owned()),
            "storage" => DomainFailure::Storage("permission denied".to_owned()),
            other => panic!("starts fail for host, definition, capacity or storage, not {other}"),
        };
        let hosts = self.hosts_named(names);
        self.starts_fail.extend(hosts.into_iter().map(|h| (h, why.clone())));
    }

    /// Every datastore.
    pub fn homes(&self) -> Vec<DatastoreId> {
        self.stores.keys().copied().collect()
    }
}
