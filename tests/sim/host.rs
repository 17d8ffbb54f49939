//! One host: its boots, its agent (a real `Core`), and what its death, freeze and orderly end do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mainstay::core::action::{Action, Output};
use mainstay::core::event::{Event, Outcome};
use mainstay::core::{Core, Me};
use mainstay::guard::table::KeptRow;
use mainstay::types::guard::BeatKey;
use mainstay::types::guard::{GuardConfig, GuardDatastore, GuardOrder};
use mainstay::types::settings::{ClusterSettings, MemberSettings};
use mainstay::types::vm::Underway;
use mainstay::types::{BootId, DatastoreId, HostId, HostIndex, Incarnation, Ticket, Time, VmId};
use uuid::Uuid;

use super::guard::Guard;
use super::hypervisor::Domain;
use super::recorded::Tape;
use super::world::{Gate, H, Item, World};

/// Memory of every host.
pub const MEMORY_KIB: u64 = 16 << 20;

/// A clock that counts from its own beginning, at its own rate.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    offset: u64,
    /// Parts per million by which it is fast.
    rate: i64,
}

impl Clock {
    /// What it shows: it never goes back.
    pub fn at(self, world: u64) -> Time {
        Time(self.offset + (world as i64 + world as i64 * self.rate / 1_000_000) as u64)
    }
    /// The first moment, or the one after it, at which it shows this or later.
    pub fn when(self, local: Time) -> u64 {
        let shown = local.0.saturating_sub(self.offset);
        if self.rate == 0 {
            return shown;
        }
        let mut world = (u128::from(shown) * 1_000_000 / (1_000_000 + self.rate) as u128) as u64;
        while self.at(world) < local {
            world += 1;
        }
        world
    }
}

/// A path to a datastore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// Works.
    Well,
    /// Nothing comes back.
    Hung,
    /// Everything fails at once.
    Broken,
}

/// A running agent.
pub struct Agent {
    /// Which.
    pub life: u64,
    /// The real one.
    pub core: Core,
    /// Records it.
    pub tape: Option<Tape>,
    /// When it is woken next.
    due: u64,
}

/// One host.
pub struct Host {
    /// Its place in the world.
    pub n: H,
    /// Its id.
    pub id: HostId,
    /// Its name.
    pub name: String,
    /// Its place in the roster.
    pub index: HostIndex,
    /// Its clock.
    pub clock: Clock,
    /// Its boot; none = off.
    pub life: Option<u64>,
    /// When that began.
    pub booted: u64,
    /// The boot before.
    pub last_life: Option<u64>,
    /// Nothing in it moves.
    pub frozen: bool,
    /// When it was thawed.
    pub thawed: Option<u64>,
    /// What waits for the thaw.
    pub backlog: Vec<Item>,
    /// Its agent does not move, or not yet after a thaw, and what waits for it.
    pub agent_held: bool,
    pub agent_waking: bool,
    pub agent_backlog: Vec<Item>,
    /// Its libvirtd does not move, and what waits for it.
    pub libvirt_held: bool,
    pub libvirt_backlog: Vec<Item>,
    /// Since when it does not move.
    pub libvirt_since: u64,
    /// The agent has given up its connections to it.
    pub libvirt_lost: bool,
    /// The agent's calls to it that may still be under way.
    pub calls: Vec<Ticket>,
    /// systemd is shutting down.
    pub going_down: bool,
    /// Its agent.
    pub agent: Option<Agent>,
    /// Its guard.
    pub guard: Option<Guard>,
    /// libvirtd has started what it starts at boot.
    pub autostarted: bool,
    /// libvirtd's life.
    pub libvirtd: Option<u64>,
    /// Definitions, and QEMUs.
    pub domains: BTreeMap<VmId, Domain>,
    /// Disk: settings document.
    pub settings: ClusterSettings,
    /// Disk: incarnation.
    pub incarnation: Incarnation,
    /// /run: rows of the guard.
    pub kept: Vec<KeptRow>,
    /// systemd's descriptor store: what the last guard handed on.
    pub memory: Option<Vec<u8>>,
    /// /run: VMs that the hook lets start without an agent.
    pub unprotected: BTreeSet<VmId>,
    /// /run: what the agent has begun.
    pub underway: Vec<(VmId, Underway)>,
    /// Paths to datastores; missing = well.
    pub paths: BTreeMap<DatastoreId, Path>,
    /// When something last happened to it that explains stops of its VMs.
    pub excused: u64,
    /// Free memory as its agent was told last, ordinary and in large pages; and all of it.
    pub told_kib: (u64, u64),
    pub memory_kib: u64,
    pub pages_kib: u64,
    /// Its agent knows of something wrong.
    pub found: bool,
    /// It reaches its router.
    pub router: bool,
    /// Since when again.
    pub routed: u64,
}

fn boot_id(life: u64) -> BootId {
    BootId(Uuid::from_u128(0xb007_0000 + u128::from(life)))
}

impl Host {
    /// Off.
    pub fn new(n: H, member: MemberSettings, settings: ClusterSettings, rate: i64, memory_kib: u64) -> Self {
        Self {
            n,
            memory_kib,
            router: true,
            routed: 0,
            id: member.host,
            name: member.name,
            index: member.index,
            clock: Clock { offset: (n as u64 + 1) * 1_000_000_000_000, rate },
            life: None,
            booted: 0,
            last_life: None,
            frozen: false,
            thawed: None,
            backlog: Vec::new(),
            agent_held: false,
            agent_waking: false,
            agent_backlog: Vec::new(),
            libvirt_held: false,
            libvirt_backlog: Vec::new(),
            libvirt_since: 0,
            libvirt_lost: false,
            calls: Vec::new(),
            going_down: false,
            agent: None,
            guard: None,
            autostarted: false,
            libvirtd: None,
            domains: BTreeMap::new(),
            settings,
            incarnation: Incarnation(1000),
            kept: Vec::new(),
            memory: None,
            unprotected: BTreeSet::new(),
            underway: Vec::new(),
            paths: BTreeMap::new(),
            excused: 0,
            told_kib: (0, 0),
            pages_kib: 0,
            found: false,
        }
    }
    /// Of its kernel.
    pub fn boot(&self) -> BootId {
        boot_id(self.life.unwrap_or(0))
    }
    /// Of the kernel before.
    pub fn last_boot(&self) -> Option<BootId> {
        self.last_life.map(boot_id)
    }
    /// Gate of the present boot.
    pub fn kernel(&self) -> Gate {
        Gate::Kernel(self.n, self.life.unwrap_or(0))
    }
    /// How a datastore is reached.
    pub fn path(&self, id: DatastoreId) -> Path {
        self.paths.get(&id).copied().unwrap_or(Path::Well)
    }
}

impl World {
    // ---- life ---------------------------------------------------------------------------------------------------

    /// Power on: guard, then libvirtd, then the agent.
    pub fn boot(&mut self, h: H) {
        if self.hosts[h].life.is_some() {
            return;
        }
        let life = self.new_life();
        self.excuse(h);
        let now = self.now;
        let host = &mut self.hosts[h];
        host.life = Some(life);
        host.booted = now;
        host.autostarted = false;
        host.kept.clear();
        host.memory = None;
        host.unprotected.clear();
        host.underway.clear();
        let gate = host.kernel();
        self.reconnect_storage(h);
        self.after(gate, Duration::from_millis(1000), move |world| world.start_guard(h));
        self.after(gate, Duration::from_millis(2000), move |world| world.start_libvirtd(h));
        self.after(gate, Duration::from_millis(2500), move |world| world.start_agent(h));
    }

    /// Power off: everything is gone at once.
    pub fn kill(&mut self, h: H) {
        self.silence_storage(h);
        self.excuse(h);
        self.changes += 1;
        self.tear_next(h);
        let host = &mut self.hosts[h];
        host.last_life = host.life.take();
        host.frozen = false;
        host.going_down = false;
        host.backlog.clear();
        (host.agent_held, host.agent_waking) = (false, false);
        (host.libvirt_held, host.libvirt_lost) = (false, false);
        host.agent_backlog.clear();
        host.libvirt_backlog.clear();
        host.agent = None;
        host.guard = None;
        host.libvirtd = None;
        for domain in host.domains.values_mut() {
            domain.lose_power();
        }
        self.hang_up(h);
    }

    /// Nothing on the host moves any more; its clock goes on.
    pub fn freeze(&mut self, h: H) {
        if self.hosts[h].life.is_some() && !self.hosts[h].frozen {
            self.hosts[h].frozen = true;
            self.changes += 1;
            self.excuse(h);
            self.silence_storage(h);
        }
    }

    /// It goes on. The guard's timer is due, and so are the vCPUs: who comes first is luck. The agent comes a little later,
    /// and hears first what it was told before: whoever tells it something before it moves stands behind that.
    pub fn thaw(&mut self, h: H) {
        if !std::mem::take(&mut self.hosts[h].frozen) {
            return;
        }
        self.hosts[h].thawed = Some(self.now);
        self.changes += 1;
        self.excuse(h);
        self.look_again(super::invariants::THAW);
        self.reconnect_storage(h);
        let host = &mut self.hosts[h];
        let all = std::mem::take(&mut host.backlog).into_iter();
        let (agent, rest): (Vec<Item>, Vec<Item>) = all.partition(|item| matches!(item.gate, Gate::Agent(..)));
        host.agent_backlog.extend(agent);
        host.agent_waking = host.agent.is_some();
        if let Some(guard) = &self.hosts[h].guard {
            let gate = Gate::Guard(h, guard.life);
            self.after(gate, Duration::from_micros(500), move |world| world.enforce(h));
        }
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(2), move |world| {
            world.hosts[h].agent_waking = false;
            world.release_agent(h);
            world.release(rest);
        });
    }

    // ---- agent --------------------------------------------------------------------------------------------------

    /// A new process.
    pub fn start_agent(&mut self, h: H) {
        if self.hosts[h].agent.is_some() || self.hosts[h].life.is_none() {
            return;
        }
        let life = self.new_life();
        let now = self.local(h);
        let host = &self.hosts[h];
        let me = Me {
            host: host.id,
            boot: host.boot(),
            started: now,
            nonce_seed: u128::from(life) << 64,
            ticket_seed: life << 32,
            underway: host.underway.clone(),
        };
        let tape = self.tapes.as_ref().map(|tapes| tapes.tape(&host.name, life));
        let mut core = Core::new(me, host.settings.clone());
        let output = core.start(now);
        self.hosts[h].agent = Some(Agent { life, core, tape, due: u64::MAX });
        self.hosts[h].told_kib = (0, 0);
        self.carry_out(h, output);
        self.arm(h);
        let gate = Gate::Agent(h, life);
        self.after(gate, Duration::from_millis(1), move |world| world.connect_guard(h));
        self.after(gate, Duration::from_millis(5), move |world| world.connect_libvirt(h));
        self.after(gate, Duration::from_millis(1), move |world| world.tell_capacity(h));
        self.after(gate, Duration::from_millis(6), move |world| world.tell_means(h));
        self.hosts[h].found = false;
        self.after(gate, Duration::from_secs(3), move |world| world.tell_findings(h));
    }

    /// SIGKILL.
    pub fn stop_agent(&mut self, h: H) {
        self.excuse(h);
        if self.hosts[h].agent.take().is_some() {
            (self.hosts[h].agent_held, self.hosts[h].agent_waking) = (false, false);
            self.hosts[h].agent_backlog.clear();
            if let Some(guard) = &mut self.hosts[h].guard {
                guard.disconnect();
            }
            self.hang_up(h);
        }
    }

    /// Another process after the death of the old one.
    pub fn restart_agent(&mut self, h: H) {
        self.stop_agent(h);
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(300), move |world| world.start_agent(h));
    }

    /// Tells the real core something.
    pub fn agent_event(&mut self, h: H, event: Event) {
        let host = &self.hosts[h];
        let Some(life) = host.agent.as_ref().map(|agent| agent.life) else { return };
        if host.frozen || host.agent_held || host.agent_waking {
            let now = self.now;
            return self.at(Gate::Agent(h, life), now, move |world| world.agent_event(h, event));
        }
        let now = self.local(h);
        let shows = self.shows(h, &event);
        let Some(agent) = &mut self.hosts[h].agent else { return };
        let told = self.trace.then(|| format!("{event:?}"));
        let output = match &mut agent.tape {
            Some(tape) => tape.step(&mut agent.core, now, event),
            None => agent.core.step(now, event),
        };
        if let Some(told) = told {
            self.trace_step(h, &told, &output);
        }
        if let Some(shows) = shows {
            self.check_proofs(h, shows);
        }
        self.carry_out(h, output);
        self.arm(h);
    }

    fn trace_step(&mut self, h: H, event: &str, output: &Output) {
        if event.starts_with("Heard") || event.starts_with("Guard(Beaten") || event.starts_with("Guard(Lease") {
            return;
        }
        let name = self.hosts[h].name.clone();
        self.tell(&name, &format!("<- {event:.400}"));
        for action in &output.actions {
            let text = format!("{action:?}");
            if !text.contains("Beat(") {
                self.tell(&name, &format!("  -> {text:.400}"));
            }
        }
    }

    fn arm(&mut self, h: H) {
        let now = self.now;
        let clock = self.hosts[h].clock;
        let Some(agent) = &mut self.hosts[h].agent else { return };
        let Some(due) = agent.core.next_due() else { return };
        let at = clock.when(due).max(now);
        if agent.due <= at {
            return;
        }
        agent.due = at;
        let life = agent.life;
        self.at(Gate::Agent(h, life), at, move |world| world.wake_agent(h, at));
    }

    fn wake_agent(&mut self, h: H, at: u64) {
        let Some(agent) = &mut self.hosts[h].agent else { return };
        if agent.due != at {
            return; // Armed anew since.
        }
        agent.due = u64::MAX;
        self.agent_event(h, Event::Due);
    }

    fn carry_out(&mut self, h: H, output: Output) {
        if let Some(settings) = output.save {
            self.hosts[h].settings = *settings;
        }
        for action in output.actions {
            self.act(h, action);
        }
    }

    fn act(&mut self, h: H, action: Action) {
        match action {
            Action::Guard(ticket, order) => self.guard_order(h, ticket, order),
            Action::Store { ticket, datastore, order, within } => self.store_order(h, ticket, datastore, order, within),
            Action::Domain { ticket, order, within } => self.domain_order(h, ticket, order, within),
            Action::Send { ticket, to, request, within } => self.send(h, ticket, to, *request, within),
            Action::Fence { ticket, program, host, within, .. } => self.fence(h, ticket, program, host, within),
            Action::Power { ticket, device, order, within } => self.power_order(h, ticket, &device, order, within),
            Action::CallOffPower(ticket) => self.call_off_power(h, ticket),
            Action::AskNetwork { ticket, within } => self.ask_network(h, ticket, within),
            Action::ProbeLocks { ticket, paths, within } => self.probe_locks(h, ticket, &paths, within),
            Action::ProbeAccess { ticket, paths, within } => self.probe_access(h, ticket, &paths, within),
            Action::Answer(ask, reply) => self.answered(h, ask, reply),
            Action::HookAnswer(ask, result) => self.hook_answered(h, ask, result),
            Action::OpenDatastore(..) => {}
            Action::Apply(settings) => self.apply(h, &settings),
            Action::Unprotected(vms) => self.hosts[h].unprotected = vms.into_iter().collect(),
            Action::Underway(list) => self.hosts[h].underway = list,
            Action::Note(note) => {
                let name = self.hosts[h].name.clone();
                self.tell(&name, &note.text);
            }
            Action::Verdict(given) => self.verdict_given(h, &given),
        }
    }

    /// The answer to an order of an agent, unless it is late.
    pub fn done(&mut self, h: H, life: u64, ticket: Ticket, outcome: Outcome) {
        if self.open.remove(&(h, life, ticket.0)) {
            self.agent_event(h, Event::Done(ticket, outcome));
        }
    }

    fn apply(&mut self, h: H, settings: &ClusterSettings) {
        let host = &self.hosts[h];
        let datastores = settings.datastores.iter().zip(0_u8..).map(|(datastore, position)| GuardDatastore {
            id: datastore.id,
            position,
            path: datastore.path.clone(),
            accepted: datastore.accepted,
        });
        let config = GuardConfig {
            cluster: settings.cluster,
            host: host.id,
            index: host.index,
            keys: vec![BeatKey { id: 1, secret: [7; 32] }],
            timing: settings.timing,
            interfaces: Vec::new(),
            peers: Vec::new(),
            datastores: datastores.collect(),
        };
        self.guard_order(h, Ticket(0), GuardOrder::Configure(Box::new(config)));
    }
}
