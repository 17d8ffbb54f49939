//! libvirtd and QEMU of a host: domains, starts through the hook, events, hung calls (how they end: `ends`).
//!
//! ```text
//!  hook prepare ─ allowed ─► lock the image ─► QEMU (vCPUs stand) ─► started ─► vCPUs run
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use mainstay::core::event::{AskId, Event, HookWish, Outcome};
use mainstay::guard::table::ProcessKey;
use mainstay::types::vm::{DomainAnswer, DomainChange, DomainFailure, DomainOrder, DomainState, OffReason};
use mainstay::types::{DatastoreId, Generation, Ticket, VmId};

use super::host::Path;
use super::images::Image;
use super::people::Waiter;
use super::world::{Gate, H, World};

/// The hook's patience with the agent.
const HOOK: Duration = Duration::from_secs(3);

/// One QEMU.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// Its process.
    pub key: ProcessKey,
    /// Its vCPUs may run, as far as QEMU is concerned.
    pub cpus: bool,
    /// A pause is under way: the vCPUs stand, libvirt does not know it yet.
    pub pausing: bool,
    /// Stopped by signal and freezer: it executes nothing.
    pub halted: bool,
    /// The stop is under way: not all its threads stand yet.
    pub halting: bool,
    /// Killed; it cannot exit while its storage hangs.
    pub dying: bool,
    /// libvirt has not started it fully.
    pub rising: bool,
    /// Waits for memory from another host.
    pub incoming: bool,
    /// The server has dropped the state of its client: nothing that it writes lands any more.
    pub stale: bool,
    /// When its memory was made, if it came from elsewhere; the end of time: it is what it was when it last stood.
    pub memory: Option<u64>,
    /// Nanoseconds that its vCPUs have executed.
    pub spent: u64,
    /// When libvirt let it go on after a migration's switch.
    pub let_go: Option<u64>,
    /// Where the disks lie that it has open.
    pub disk: DatastoreId,
    /// Which change of its definition it was started with.
    pub edit: u32,
    /// The generation that it is marked with.
    pub mark: Option<Generation>,
}

impl Qemu {
    /// The guard sees that no thread of it moves.
    pub const fn stands(&self) -> bool {
        self.halted && !self.halting
    }
}

/// One domain of libvirt.
#[derive(Clone, Debug)]
pub struct Domain {
    /// Has a definition on disk.
    pub defined: bool,
    /// Which change of it.
    pub edit: u32,
    /// Started at boot.
    pub autostart: bool,
    /// Its memory, as libvirt keeps it.
    pub saved: Option<Image>,
    /// Its process.
    pub qemu: Option<Qemu>,
    /// A start is under way in libvirt.
    pub starting: bool,
    /// Why it stopped last.
    pub off: OffReason,
    /// Calls of people that wait for its QEMU.
    pub busy: u32,
}

/// Takes the hook's answer.
pub type Told = Box<dyn FnOnce(&mut World, Result<(), String>)>;

impl Domain {
    fn new() -> Self {
        Self {
            defined: false,
            edit: 0,
            autostart: false,
            saved: None,
            qemu: None,
            starting: false,
            off: OffReason::Unknown,
            busy: 0,
        }
    }
    /// The host's power went.
    pub fn lose_power(&mut self) {
        self.qemu = None;
        self.starting = false;
        self.busy = 0;
        self.off = OffReason::Unknown;
    }
    /// As libvirt lists it.
    pub fn state(&self) -> DomainState {
        match &self.qemu {
            Some(qemu) if qemu.cpus || qemu.pausing => DomainState::Running,
            Some(_) => DomainState::Paused { by_io_error: false },
            None => DomainState::Off(self.off),
        }
    }
}

/// Takes how a start, or another order to libvirt, ended.
pub type Then = Box<dyn FnOnce(&mut World, Result<(), DomainFailure>)>;

impl World {
    // ---- libvirtd -----------------------------------------------------------------------------------------------

    /// A new daemon finds the QEMUs that are there.
    pub fn start_libvirtd(&mut self, h: H) {
        if self.hosts[h].libvirtd.is_some() || self.hosts[h].life.is_none() {
            return;
        }
        let life = self.new_life();
        self.hosts[h].libvirtd = Some(life);
        let gate = Gate::Libvirt(h, life);
        self.after(gate, Duration::from_millis(50), move |world| world.connect_libvirt(h));
        self.after(gate, Duration::from_millis(60), move |world| world.end_half_started(h));
        self.after(gate, Duration::from_millis(100), move |world| world.autostart(h));
    }

    /// The daemon ends and another begins; QEMUs go on.
    pub fn restart_libvirtd(&mut self, h: H) {
        if self.hosts[h].libvirtd.take().is_none() {
            return;
        }
        self.excuse(h);
        (self.hosts[h].libvirt_held, self.hosts[h].libvirt_lost) = (false, false);
        self.hosts[h].libvirt_backlog.clear();
        for domain in self.hosts[h].domains.values_mut() {
            domain.starting = false;
        }
        if let Some(agent) = &self.hosts[h].agent {
            let gate = Gate::Agent(h, agent.life);
            self.after(gate, Duration::from_millis(1), move |world| {
                world.agent_event(h, Event::LibvirtDown("connection reset".to_owned()));
            });
        }
        let gate = self.hosts[h].kernel();
        self.after(gate, Duration::from_millis(1000), move |world| world.start_libvirtd(h));
    }

    /// The agent connects: first the events, then the list.
    pub fn connect_libvirt(&mut self, h: H) {
        if self.hosts[h].libvirtd.is_some() && self.hosts[h].agent.is_some() {
            self.agent_event(h, Event::LibvirtUp);
            let listed = self.list(h);
            self.agent_event(h, listed);
        }
    }

    /// libvirt tells the agent what happened to a domain.
    pub fn domain_event(&mut self, h: H, vm: VmId, change: DomainChange) {
        let host = &self.hosts[h];
        let (Some(_), Some(agent)) = (host.libvirtd, &host.agent) else { return };
        let name = self.vm_name(vm);
        let gate = Gate::Agent(h, agent.life);
        let ends = matches!(
            change,
            DomainChange::Stopped(_) | DomainChange::ShuttingDown { .. } | DomainChange::Suspended { .. }
        );
        let delay = self.latency(1000);
        self.after(gate, delay, move |world| {
            if ends && world.hosts[h].going_down {
                world.agent_event(h, Event::GoingDown);
            }
            world.agent_event(h, Event::Changed { vm, name, change });
        });
    }

    /// The domain, made if it is not there.
    pub fn domain(&mut self, h: H, vm: VmId) -> &mut Domain {
        self.changes += 1;
        self.hosts[h].domains.entry(vm).or_insert_with(Domain::new)
    }

    /// Its QEMU.
    pub fn qemu(&mut self, h: H, vm: VmId) -> Option<&mut Qemu> {
        self.changes += 1;
        self.hosts[h].domains.get_mut(&vm)?.qemu.as_mut()
    }

    // ---- orders of the agent ------------------------------------------------------------------------------------

    /// An order of the agent, on a worker thread with a deadline.
    pub fn domain_order(&mut self, h: H, ticket: Ticket, order: DomainOrder, within: Duration) {
        let Some(life) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else { return };
        let gate = Gate::Agent(h, life);
        let told = move |world: &mut Self, answer: DomainAnswer| {
            world.after(gate, Duration::from_micros(300), move |world| {
                world.done(h, life, ticket, Outcome::Domain(answer));
            });
        };
        if let DomainOrder::Suspend { .. } = order {
            self.open.insert((h, life, ticket.0)); // Once begun, it is answered when it ends, and not before.
        } else {
            self.due(gate, within, ticket, Outcome::Domain(DomainAnswer::Failed(DomainFailure::Timeout)));
        }
        let Some(daemon) = self.hosts[h].libvirtd else {
            return told(self, DomainAnswer::Failed(DomainFailure::NoDaemon("connection refused".to_owned())));
        };
        self.calls_libvirt(h, life, ticket);
        let then: Then = Box::new(move |world, result| {
            told(world, result.map_or_else(DomainAnswer::Failed, |()| DomainAnswer::Done));
        });
        let gate = Gate::Libvirt(h, daemon);
        let delay = self.latency(2000);
        match order {
            DomainOrder::List => self.after(gate, delay, move |world| {
                let listed = world.list(h);
                world.after(Gate::Agent(h, life), Duration::from_micros(300), move |world| {
                    world.agent_event(h, listed);
                    world.done(h, life, ticket, Outcome::Domain(DomainAnswer::Listed(Vec::new())));
                });
            }),
            DomainOrder::Define { xml } => self.after(gate, delay, move |world| {
                world.define(h, &xml);
                then(world, Ok(()));
            }),
            DomainOrder::Undefine { vm } => self.after(gate, delay, move |world| {
                world.domain(h, vm).defined = false;
                world.domain_event(h, vm, DomainChange::Undefined);
                then(world, Ok(()));
            }),
            DomainOrder::StartPaused { vm } => self.start_domain(h, vm, false, None, then),
            DomainOrder::RestorePaused { vm } => {
                let image = self.domain(h, vm).saved.clone();
                self.start_from(h, vm, image, false, then);
            }
            DomainOrder::Mark { vm, generation } => self.after(gate, delay, move |world| match world.qemu(h, vm) {
                Some(qemu) => {
                    qemu.mark = Some(generation);
                    then(world, Ok(()));
                }
                None => then(world, Err(DomainFailure::NoDomain)),
            }),
            DomainOrder::SetOnDoubt { vm, on_doubt } => self.after(gate, delay, move |world| {
                world.edit(h, vm, Some(on_doubt));
                then(world, Ok(()));
            }),
            DomainOrder::Resume { vm } => self.after(gate, delay, move |world| world.resume(h, vm, then)),
            DomainOrder::Suspend { vm } => self.after(gate, delay, move |world| world.suspend(h, vm, then)),
            DomainOrder::Shutdown { vm } => self.after(gate, delay, move |world| {
                world.blame_isolation(h, vm);
                world.shut_down(h, vm, false);
                then(world, Ok(()));
            }),
            DomainOrder::Destroy { vm } => self.after(gate, delay, move |world| {
                world.blame_isolation(h, vm);
                world.destroy(h, vm, then);
            }),
            DomainOrder::Reset { .. } => self.after(gate, delay, move |world| then(world, Ok(()))),
            DomainOrder::Migrate { vm, uri, .. } => {
                self.touch(vm); // By a person, or for the maintenance of its host.
                self.migrate(h, vm, &uri, then);
            }
            DomainOrder::AbortJob { vm } => self.after(gate, delay, move |world| {
                world.abort_migration(h, vm);
                then(world, Ok(()));
            }),
        }
    }

    // ---- start --------------------------------------------------------------------------------------------------

    /// `virsh start`, or the agent's start with vCPUs standing.
    pub fn start_domain(&mut self, h: H, vm: VmId, run: bool, image: Option<Image>, then: Then) {
        let Some(daemon) = self.hosts[h].libvirtd else {
            return then(self, Err(DomainFailure::NoDaemon("connection refused".to_owned())));
        };
        let domain = self.domain(h, vm);
        if !domain.defined {
            return then(self, Err(DomainFailure::NoDomain));
        }
        if domain.qemu.is_some() || domain.starting {
            return then(self, Err(DomainFailure::Busy("domain is already running".to_owned())));
        }
        domain.starting = true;
        self.hook(
            h,
            vm,
            HookWish::Prepare,
            Box::new(move |world, allowed| {
                if world.hosts[h].libvirtd != Some(daemon) {
                    return then(world, Err(DomainFailure::NoDaemon("connection reset".to_owned())));
                }
                match allowed {
                    Err(why) => {
                        world.domain(h, vm).starting = false;
                        then(world, Err(DomainFailure::Refused(why)));
                    }
                    Ok(()) => {
                        let delay = world.latency(80_000);
                        world
                            .after(Gate::Libvirt(h, daemon), delay, move |world| world.launch(h, vm, run, image, then));
                    }
                }
            }),
        );
    }

    /// QEMU opens its images and stands; while the storage hangs it hangs, too.
    fn launch(&mut self, h: H, vm: VmId, run: bool, image: Option<Image>, then: Then) {
        let home = self.disk_of(h, vm);
        let gate = Gate::Libvirt(h, self.hosts[h].libvirtd.unwrap_or(0));
        match self.hosts[h].path(home) {
            Path::Well if !self.stores[&home].hung => {}
            Path::Well | Path::Hung => {
                return self
                    .after(gate, Duration::from_millis(100), move |world| world.launch(h, vm, run, image, then));
            }
            Path::Broken => {
                self.domain(h, vm).starting = false;
                return then(self, Err(DomainFailure::Storage("disk: input/output error".to_owned())));
            }
        }
        if let Some(why) = self.starts_fail.get(&h).cloned() {
            self.domain(h, vm).starting = false;
            return then(self, Err(why));
        }
        if let Some(why) = self.cannot_start(h, vm) {
            self.domain(h, vm).starting = false;
            return then(self, Err(why));
        }
        let boot = self.hosts[h].life.unwrap_or(0);
        if let Err(holder) = self.stores.get_mut(&home).expect("its home").lock(vm, h, boot) {
            self.domain(h, vm).starting = false;
            let holder = self.hosts[holder].name.clone();
            return then(self, Err(DomainFailure::ImageLocked(holder)));
        }
        self.spawn(h, vm, false);
        self.loaded(h, vm, image.as_ref());
        let delay = self.latency(30_000) + self.busy_start();
        self.after(gate, delay, move |world| {
            if let Some(qemu) = world.qemu(h, vm) {
                qemu.rising = false;
            }
            world.domain_event(h, vm, DomainChange::Started { by_migration: false });
            if run {
                world.set_cpus(h, vm, true);
            } else {
                world.domain_event(h, vm, DomainChange::Suspended { migrated: false, by_io_error: false });
            }
            then(world, Ok(()));
        });
    }

    /// A QEMU process appears; the guard finds its pid file.
    pub fn spawn(&mut self, h: H, vm: VmId, incoming: bool) {
        let pid = self.new_life();
        let key = ProcessKey { pid: pid as u32, started: pid };
        let memory = incoming.then_some(0); // Nothing yet.
        // A target has open what its source has.
        let source = self.qemus().find(|(_, of, _)| *of == vm && incoming).map(|(_, _, qemu)| qemu.disk);
        let disk = source.unwrap_or_else(|| self.disk_of(h, vm));
        let domain = self.domain(h, vm);
        domain.starting = false;
        let edit = domain.edit;
        domain.qemu = Some(Qemu {
            key,
            cpus: false,
            pausing: false,
            halted: false,
            halting: false,
            dying: false,
            rising: !incoming,
            incoming,
            stale: false,
            memory,
            spent: 0,
            let_go: None,
            disk,
            edit,
            mark: None,
        });
        let gate = self.hosts[h].kernel();
        let delay = self.latency(5000);
        self.after(gate, delay, move |world| world.watch(h));
        self.tell_capacity(h);
    }

    /// vCPUs are let go, or stand.
    pub fn set_cpus(&mut self, h: H, vm: VmId, run: bool) {
        if let Some(qemu) = self.qemu(h, vm) {
            qemu.cpus = run;
            if run {
                self.domain_event(h, vm, DomainChange::Resumed);
            }
        }
    }

    /// The vCPUs stand at once; QEMU answers when nothing is under way on its disks. A stopped QEMU does neither before
    /// the stop is lifted.
    pub fn suspend(&mut self, h: H, vm: VmId, then: Then) {
        let home = self.disk_of(h, vm);
        let gate = self.hosts[h].kernel();
        let hung = self.hosts[h].path(home) == Path::Hung || self.stores[&home].hung;
        let Some(qemu) = self.qemu(h, vm) else { return then(self, Err(DomainFailure::NoDomain)) };
        let waits = qemu.halted || hung;
        if !qemu.halted {
            qemu.cpus = false;
            qemu.pausing = hung;
        }
        if waits {
            return self.after(gate, Duration::from_millis(50), move |world| world.suspend(h, vm, then));
        }
        self.domain_event(h, vm, DomainChange::Suspended { migrated: false, by_io_error: false });
        then(self, Ok(()));
    }

    /// `cont`, behind a pause that is under way.
    pub fn resume(&mut self, h: H, vm: VmId, then: Then) {
        match self.qemu(h, vm) {
            None => then(self, Err(DomainFailure::NoDomain)),
            Some(qemu) if qemu.halted || qemu.pausing => {
                // Its monitor does not answer; the call takes effect after the stop is lifted.
                let gate = Gate::Libvirt(h, self.hosts[h].libvirtd.unwrap_or(0));
                self.after(gate, Duration::from_millis(50), move |world| world.resume(h, vm, then));
            }
            Some(_) => {
                let home = self.disk_of(h, vm);
                let boot = self.hosts[h].life.unwrap_or(0);
                if let Err(holder) = self.stores.get_mut(&home).expect("its home").lock(vm, h, boot) {
                    let holder = self.hosts[holder].name.clone();
                    return then(self, Err(DomainFailure::ImageLocked(holder)));
                }
                if let Some(qemu) = self.qemu(h, vm) {
                    qemu.incoming = false;
                }
                self.set_cpus(h, vm, true);
                then(self, Ok(()));
            }
        }
    }

    // ---- hook ---------------------------------------------------------------------------------------------------

    /// libvirt's hook asks the agent; without one only VMs that are listed as unprotected pass.
    pub fn hook(&mut self, h: H, vm: VmId, wish: HookWish, then: Told) {
        let gate = self.hosts[h].kernel();
        let Some(agent) = self.hosts[h].agent.as_ref().map(|agent| agent.life) else {
            let free = self.hosts[h].unprotected.contains(&vm);
            let answer = if free { Ok(()) } else { Err("mainstay: mainstayd does not run".to_owned()) };
            return self.after(gate, Duration::from_millis(5), move |world| then(world, answer));
        };
        let AskId(ask) = self.wait(Waiter::Hook { at: h, then });
        let (name, record) = (self.vm_name(vm), self.definition(h, vm));
        self.after(Gate::Agent(h, agent), Duration::from_millis(5), move |world| {
            let record = Ok(Box::new(record));
            world.agent_event(h, Event::Hooked { ask: AskId(ask), vm, name, wish, record });
        });
        self.after(gate, HOOK, move |world| {
            world.hook_answered(h, AskId(ask), Err("mainstay: mainstayd does not answer".to_owned()));
        });
    }

    // ---- signals of the guard -----------------------------------------------------------------------------------

    /// It stands.
    pub fn halt(&mut self, h: H, vm: VmId) {
        if let Some(qemu) = self.qemu(h, vm) {
            qemu.halted = true;
        }
    }

    /// The reverse.
    pub fn lift(&mut self, h: H, vm: VmId, key: ProcessKey) {
        if let Some(qemu) = self.qemu(h, vm).filter(|qemu| qemu.key == key) {
            (qemu.halted, qemu.halting) = (false, false);
        }
    }

    /// Every copy of every VM that is there, by host.
    pub fn qemus(&self) -> impl Iterator<Item = (H, VmId, &Qemu)> {
        self.hosts.iter().flat_map(|host| {
            host.domains.iter().filter_map(move |(vm, domain)| Some((host.n, *vm, domain.qemu.as_ref()?)))
        })
    }

    /// Domains of a host, for the end of a story.
    pub fn domains(&self, h: H) -> &BTreeMap<VmId, Domain> {
        &self.hosts[h].domains
    }
}
