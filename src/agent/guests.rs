//! Joins the guests' part of the core with channels, libvirt and the other agents. Decides nothing.
//!
//! ```text
//!   channels ──┐                                  say · note · tell another agent
//!   libvirt  ──┼─► GuestEvent ─► core::guests ─►  keep what it shows · libvirt's orders · end its QEMU
//!   agents   ──┘                                  ask the core to move it, as people do
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::mpsc;

use super::executors::Executors;
use super::sleep_until;
use crate::core::Core;
use crate::core::event::{Event, Listed};
use crate::core::guests::{Case, Glimpse, GuestAct, GuestEvent, Guests, Mark, Sample, Step, Watchdog};
use crate::exec::channels::{ChannelEvent, Channels};
use crate::exec::dump::DumpAsk;
use crate::exec::evidence::{Afterwards, Outcome};
use crate::exec::libvirt::{self, Stands, xml};
use crate::exec::remembered::Memory;
use crate::exec::{clock, guest_hook, qemu};
use crate::types::control::{Denial, Mover, Reply, VmCommand};
use crate::types::failure::Class;
use crate::types::guests::{GuestWord, Remedy};
use crate::types::vm::{DomainAnswer, DomainChange, DomainOrder, DomainState};
use crate::types::{BootId, DatastoreId, HostId, Ticket, VmId};

/// Events of channels that wait; then guests are not read.
const WAITING: usize = 256;
/// libvirt's time for one step of a remedy.
const CALL: Duration = Duration::from_secs(10);
/// For answers that are on their way to guests when the agent ends.
const FLUSH: Duration = Duration::from_millis(200);
/// For a hook.
const HOOK: Duration = Duration::from_secs(60);
/// Records of failures that wait for the outcome of their remedy; there is one of each VM. The oldest go first.
const OUTCOMES: usize = 64;

/// Where others put what concerns guests.
pub(crate) type ToGuests = mpsc::UnboundedSender<FromOthers>;

/// Takes an answer for another agent.
pub(crate) type Told = Box<dyn FnOnce(Reply) + Send>;

/// What comes from elsewhere than channels; bounded by what was asked.
pub(crate) enum FromOthers {
    /// Another agent's word.
    Word(HostId, GuestWord),
    /// Failure information was looked for: what it is, and who waits for the remedy's outcome.
    Looked(Ticket, Class, Outcome),
    /// What became of a step of a remedy.
    Done(Ticket, Result<(), String>),
    /// A hook has ended.
    Ran(Ticket, Result<(), String>),
    /// What is remembered is on disk, up to this number.
    Saved(u64),
    /// Another agent, for a person: give this VM the port of Mainstay's agent.
    EnablePort(VmId, Told),
    /// What a guest does now; none: it could not be had.
    Sampled(VmId, Option<Sample>),
    /// Its guest has failed while no agent of this host was there to hear of it.
    Stands(VmId, Stands),
    /// What its screen shows now; none: it could not be had.
    Glimpsed(VmId, Option<Glimpse>),
    /// Failure information was kept, or not; for people.
    Kept(VmId, Result<String, String>),
}

/// What matters of a VM that runs here.
#[derive(Clone, Debug, Default)]
struct Running {
    name: String,
    /// Of its channel, if it has one.
    socket: Option<PathBuf>,
    /// When its kernel panics its QEMU stays, and waits.
    held: bool,
    /// What follows when its watchdog fires, if it has one.
    watchdog: Option<String>,
    /// Where all its disks lie.
    stores: Option<Vec<DatastoreId>>,
    /// Its QEMU.
    pid: Option<u32>,
}

impl Running {
    fn of(Listed { domain, record, live }: &Listed) -> Self {
        let xml = domain.live_xml.as_ref().or(domain.xml.as_ref()).and_then(|xml| xml::parse(xml).ok());
        let record = live.as_ref().or(record.as_ref()).and_then(|recorded| recorded.as_ref().ok());
        Self {
            name: domain.name.clone(),
            socket: domain.guest_socket.as_ref().map(PathBuf::from),
            held: xml.as_ref().is_some_and(|xml| xml.stays_after_crash),
            watchdog: xml.and_then(|xml| xml.watchdog),
            stores: record.and_then(|record| record.disks.iter().map(|disk| disk.datastore).collect()),
            pid: domain.pid,
        }
    }

    /// Another process than before: it has ended meanwhile.
    fn is_another(&self, before: &Self) -> bool {
        self.pid.is_some() && before.pid.is_some() && self.pid != before.pid
    }
}

/// All that the loop needs for guests.
pub(crate) struct GuestSide {
    guests: Guests,
    channels: Channels,
    /// VMs that run here, as last listed.
    running: BTreeMap<VmId, Running>,
    said: mpsc::Receiver<ChannelEvent>,
    others: mpsc::UnboundedReceiver<FromOthers>,
    to_self: ToGuests,
    outcomes: BTreeMap<Ticket, Outcome>,
    memory: Memory,
    /// An agent that begins has missed what happened before.
    has_listed: bool,
    /// Version of the document in use.
    settings: u64,
}

/// Something to be stepped with.
pub(crate) enum Next {
    Said(ChannelEvent),
    Others(FromOthers),
    Due,
}

impl GuestSide {
    /// With where others put what concerns guests. `state`: this host's own folder; `boot`: of its kernel.
    pub(crate) fn new(state: &Path, boot: BootId) -> std::io::Result<(Self, ToGuests)> {
        let (to_self, others) = mpsc::unbounded_channel();
        let (sender, said) = mpsc::channel(WAITING);
        let saved = to_self.clone();
        let (memory, recalled) = Memory::open(state, boot, move |number| {
            let _ = saved.send(FromOthers::Saved(number));
        })?;
        let mut guests = Guests::default();
        guests.step(clock::now(), GuestEvent::Recalled(recalled));
        let (running, outcomes) = (BTreeMap::new(), BTreeMap::new());
        let (channels, to_guests) = (Channels::new(sender), to_self.clone());
        let side =
            Self { guests, channels, running, said, others, to_self, outcomes, memory, has_listed: false, settings: 0 };
        Ok((side, to_guests))
    }

    /// The QEMUs of this host, as last listed.
    pub(crate) fn qemus(&self) -> impl Iterator<Item = u32> + '_ {
        self.running.values().filter_map(|running| running.pid)
    }

    /// What happens next. May be dropped at any time.
    pub(crate) async fn next(&mut self) -> Next {
        let due = self.guests.next_due();
        tokio::select! {
            Some(other) = self.others.recv() => Next::Others(other),
            Some(said) = self.said.recv() => Next::Said(said),
            () = sleep_until(due) => Next::Due,
        }
    }

    /// The agent is about to end; whether something is to be waited for, a moment only, says `would_be_cut_off`.
    pub(crate) fn leave(&mut self, core: &Core, executors: &Executors) {
        self.take(GuestEvent::Leaves, core, executors);
    }

    /// A remedy would be cut off in the middle, or its answer on its way.
    pub(crate) fn would_be_cut_off(&self) -> bool {
        self.guests.would_be_cut_off() || !self.others.is_empty()
    }

    /// Gives guests what was said to them.
    pub(crate) async fn flush(&self) {
        self.channels.flush(FLUSH).await;
    }

    pub(crate) fn step(&mut self, next: Next, core: &Core, executors: &Executors) {
        let event = match next {
            Next::Said(ChannelEvent::Note(note)) => return executors.note(note),
            Next::Said(ChannelEvent::Guest(event)) => event,
            Next::Others(FromOthers::EnablePort(vm, told)) => {
                return executors.enable_port(executors.me(), vm, |reply| {
                    told(reply.unwrap_or_else(|why| Reply::Denied(Denial::Unable(why))));
                });
            }
            Next::Others(FromOthers::Done(ticket, result)) => GuestEvent::Done(ticket, result),
            Next::Others(FromOthers::Ran(ticket, result)) => GuestEvent::Ran(ticket, result),
            Next::Others(FromOthers::Saved(number)) => GuestEvent::Saved(number),
            Next::Others(FromOthers::Looked(ticket, class, outcome)) => {
                self.outcomes.insert(ticket, outcome);
                if OUTCOMES < self.outcomes.len() {
                    self.outcomes.pop_first();
                }
                GuestEvent::Looked(ticket, class)
            }
            Next::Others(FromOthers::Sampled(vm, sample)) => {
                GuestEvent::Sampled { vm, sample, unwell: core.unwell_datastores(clock::now()) }
            }
            Next::Others(FromOthers::Glimpsed(vm, glimpse)) => {
                GuestEvent::Glimpsed { vm, glimpse, unwell: core.unwell_datastores(clock::now()) }
            }
            // As if it happened now.
            Next::Others(FromOthers::Stands(vm, Stands::Panicked)) => GuestEvent::Panicked { vm, held: true },
            Next::Others(FromOthers::Stands(vm, Stands::Watchdog)) => GuestEvent::WatchdogFired(vm, Watchdog::Stands),
            Next::Others(FromOthers::Kept(vm, kept)) => GuestEvent::Kept(vm, kept),
            Next::Others(FromOthers::Word(from, GuestWord::Requested(request))) => {
                let at = core.whereabouts(&request.target, clock::now());
                GuestEvent::Requested { from, request, at }
            }
            Next::Others(FromOthers::Word(_, word)) => GuestEvent::Told(word),
            Next::Due => GuestEvent::Due,
        };
        self.take(event, core, executors);
    }

    /// What the core is told of domains matters here, too.
    pub(crate) fn look(&mut self, event: &Event, core: &Core, executors: &Executors) {
        if self.settings != core.settings().version {
            self.settings = core.settings().version;
            self.take(GuestEvent::Settings(core.settings().guests_in_use()), core, executors);
        }
        match event {
            Event::Listed(domains) => self.listed(domains, core, executors),
            Event::Changed { vm, change: DomainChange::Rebooted, .. } => {
                self.take(GuestEvent::Rebooted(*vm), core, executors);
            }
            Event::Changed { vm, change: DomainChange::Panicked, .. } => {
                let held = self.running.get(vm).is_some_and(|running| running.held);
                self.take(GuestEvent::Panicked { vm: *vm, held }, core, executors);
            }
            Event::Changed { vm, change: DomainChange::WatchdogFired, .. } => {
                let action = self.running.get(vm).and_then(|running| running.watchdog.as_deref());
                self.take(GuestEvent::WatchdogFired(*vm, Watchdog::named(action)), core, executors);
            }
            _ => {}
        }
    }

    fn listed(&mut self, domains: &[Listed], core: &Core, executors: &Executors) {
        let mut now = BTreeMap::new();
        for listed in domains.iter().filter(|listed| !matches!(listed.domain.state, DomainState::Off(_))) {
            let domain = &listed.domain;
            // Not shown while a call is under way: as it was.
            let known = || self.running.get(&domain.vm).cloned().unwrap_or_default();
            let seen = if domain.busy { known() } else { Running::of(listed) };
            now.insert(domain.vm, Running { name: domain.name.clone(), pid: domain.pid, ..seen });
        }
        let before = std::mem::replace(&mut self.running, now.clone());
        for (vm, was) in before {
            match now.get(&vm) {
                None => self.take(GuestEvent::Ended(vm), core, executors),
                Some(is) if is.is_another(&was) => self.take(GuestEvent::Ended(vm), core, executors),
                Some(is) if was.socket.is_some() && is.socket != was.socket => {
                    self.take(GuestEvent::Disconnected(vm), core, executors);
                }
                Some(_) => {}
            }
        }
        if !std::mem::replace(&mut self.has_listed, true) {
            let paused = |listed: &&Listed| matches!(listed.domain.state, DomainState::Paused { by_io_error: false });
            domains.iter().filter(paused).for_each(|listed| self.ask_why_it_stands(listed.domain.vm, executors));
        }
        let mut sockets = BTreeMap::new();
        for (vm, Running { name, socket, stores, .. }) in now {
            self.take(GuestEvent::Runs { vm, name: name.clone(), stores }, core, executors);
            sockets.extend(socket.map(|socket| (vm, (name, socket))));
        }
        self.channels.follow(&sockets);
    }

    fn take(&mut self, event: GuestEvent, core: &Core, executors: &Executors) {
        for act in self.guests.step(clock::now(), event) {
            match act {
                GuestAct::Say(vm, message) => self.channels.say(vm, message),
                GuestAct::Keep { ticket, vm, remedy, case } => self.keep(ticket, vm, remedy, *case, executors),
                GuestAct::Order { ticket, vm, step } => self.order(ticket, vm, step, executors),
                GuestAct::Outcome(ticket, result) => {
                    if let Some(outcome) = self.outcomes.remove(&ticket) {
                        let _ = outcome.send(Afterwards::Ended(result)); // It waits for so long only.
                    }
                }
                GuestAct::Sample(vm) => self.sample(vm, executors),
                GuestAct::Glance { vm, read } => self.glance(vm, read, executors),
                GuestAct::Inside(vm, inside) => executors.inside(vm, inside),
                GuestAct::Tell(host, word) => self.tell(host, word, executors),
                GuestAct::TellMaster(word) => {
                    if let Some(master) = core.master() {
                        self.tell(master, word, executors); // Without one it is asked again.
                    }
                }
                GuestAct::TellOthers(word) => {
                    for member in core.settings().members.iter().filter(|member| member.host != executors.me()) {
                        executors.tell_of_guests(member.host, word.clone());
                    }
                }
                GuestAct::Run { ticket, vm, program, said } => {
                    let to_self = self.to_self.clone();
                    guest_hook::run(program, vm, *said, HOOK, move |result| {
                        let _ = to_self.send(FromOthers::Ran(ticket, result));
                    });
                }
                GuestAct::Save(number, memory) => self.memory.save(number, memory),
                GuestAct::Note(note) => executors.note(note),
            }
        }
    }

    fn tell(&self, host: HostId, word: GuestWord, executors: &Executors) {
        if host == executors.me() {
            let _ = self.to_self.send(FromOthers::Word(host, word));
        } else {
            executors.tell_of_guests(host, word);
        }
    }

    fn glance(&self, vm: VmId, read: Option<Mark>, executors: &Executors) {
        let to_self = self.to_self.clone();
        executors.glances().glance(vm, read, move |glimpse| {
            let _ = to_self.send(FromOthers::Glimpsed(vm, glimpse));
        });
    }

    fn sample(&self, vm: VmId, executors: &Executors) {
        let to_self = self.to_self.clone();
        executors.libvirt().activity(vm, CALL, move |statistics| {
            let sample = statistics.and_then(|all| libvirt::sample(&all));
            let _ = to_self.send(FromOthers::Sampled(vm, sample));
        });
    }

    fn ask_why_it_stands(&self, vm: VmId, executors: &Executors) {
        let to_self = self.to_self.clone();
        executors.libvirt().activity(vm, CALL, move |statistics| {
            if let Some(stands) = statistics.and_then(|all| libvirt::stands(&all)) {
                let _ = to_self.send(FromOthers::Stands(vm, stands));
            }
        });
    }

    /// Keeps failure information; the remedy goes on as soon as that is there or has had its time.
    fn keep(&self, ticket: Ticket, vm: VmId, remedy: Remedy, case: Case, executors: &Executors) {
        let (looked, kept) = (self.to_self.clone(), self.to_self.clone());
        let go = move |class: &Class, outcome: Outcome| {
            let _ = looked.send(FromOthers::Looked(ticket, class.clone(), outcome));
        };
        executors.evidence().take(vm, remedy, case, go, move |what| {
            let _ = kept.send(FromOthers::Kept(vm, what));
        });
    }

    fn order(&self, ticket: Ticket, vm: VmId, step: Step, executors: &Executors) {
        let (libvirt, to_self) = (executors.libvirt(), self.to_self.clone());
        let done = move |result| {
            let _ = to_self.send(FromOthers::Done(ticket, result));
        };
        let order = |order| libvirt.ask(order, CALL, answered(done.clone()));
        match step {
            Step::Reset => order(DomainOrder::Reset { vm }),
            Step::Resume => order(DomainOrder::Resume { vm }),
            Step::Suspend => order(DomainOrder::Suspend { vm }),
            Step::Reboot => libvirt.reboot(vm, CALL, answered(done)),
            Step::End => qemu::end(self.running.get(&vm).and_then(|running| running.pid), vm, done),
            Step::Dump { failure, limits } => {
                let ask = DumpAsk::new(limits, done);
                if let Some(outcome) = self.outcomes.get(&failure) {
                    let _ = outcome.send(Afterwards::Dump(ask)); // Dropped it answers by itself.
                }
            }
            Step::Move => executors.ask_core(ticket, VmCommand::Move { vm, to: None, by: Mover::Person }),
        }
    }
}

fn answered(done: impl FnOnce(Result<(), String>)) -> impl FnOnce(DomainAnswer) {
    move |answer| done(result_of(answer))
}

fn result_of(answer: DomainAnswer) -> Result<(), String> {
    match answer {
        DomainAnswer::Done | DomainAnswer::Listed(_) => Ok(()),
        DomainAnswer::Failed(why) => Err(libvirt::text_of(&why)),
    }
}
