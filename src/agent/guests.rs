//! Joins the guests' part of the core with channels, libvirt and the other agents. Decides nothing.
//!
//! ```text
//!   channels ──┐
//!   libvirt  ──┼─► GuestEvent ─► core::guests ─► say · reset, … · tell another agent · note
//!   agents   ──┘
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;

use super::executors::Executors;
use super::sleep_until;
use crate::core::Core;
use crate::core::event::{Event, Listed};
use crate::core::guests::{Case, Glimpse, GuestAct, GuestEvent, Guests, Mark, Sample};
use crate::exec::channels::{ChannelEvent, Channels};
use crate::exec::clock;
use crate::exec::evidence::Outcome;
use crate::exec::libvirt::{self, xml};
use crate::types::failure::Class;
use crate::types::guests::{GuestWord, Remedy};
use crate::types::vm::{DomainAnswer, DomainChange, DomainInfo, DomainOrder, DomainState};
use crate::types::{HostId, Ticket, VmId};

/// Events of channels that wait; then guests are not read.
const WAITING: usize = 256;
/// libvirt's time for one remedy.
const CALL: Duration = Duration::from_secs(10);

/// Where others put what concerns guests.
pub(crate) type ToGuests = mpsc::UnboundedSender<FromOthers>;

/// What comes from elsewhere than channels; bounded by what was asked.
#[derive(Debug)]
pub(crate) enum FromOthers {
    /// Another agent's word.
    Word(HostId, GuestWord),
    /// What became of a remedy.
    Done(Ticket, Result<(), String>),
    /// What a guest does now; none: it could not be had.
    Sampled(VmId, Option<Sample>),
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
}

impl Running {
    fn of(domain: &DomainInfo) -> Self {
        let xml = domain.live_xml.as_ref().or(domain.xml.as_ref());
        Self {
            name: domain.name.clone(),
            socket: domain.guest_socket.as_ref().map(PathBuf::from),
            held: xml.is_some_and(|xml| xml::stays_after_crash(xml)),
        }
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
    /// With where others put what concerns guests.
    pub(crate) fn new() -> (Self, ToGuests) {
        let (to_self, others) = mpsc::unbounded_channel();
        let (sender, said) = mpsc::channel(WAITING);
        let (guests, running) = (Guests::default(), BTreeMap::new());
        let (channels, to_guests) = (Channels::new(sender), to_self.clone());
        (Self { guests, channels, running, said, others, to_self, settings: 0 }, to_guests)
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

    pub(crate) fn step(&mut self, next: Next, core: &Core, executors: &Executors) {
        let event = match next {
            Next::Said(ChannelEvent::Note(note)) => return executors.note(note),
            Next::Said(ChannelEvent::Guest(event)) => event,
            Next::Others(FromOthers::Done(ticket, result)) => GuestEvent::Done(ticket, result),
            Next::Others(FromOthers::Sampled(vm, sample)) => GuestEvent::Sampled(vm, sample),
            Next::Others(FromOthers::Glimpsed(vm, glimpse)) => GuestEvent::Glimpsed(vm, glimpse),
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
            self.take(GuestEvent::Settings(core.settings().guests.clone()), core, executors);
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
            _ => {}
        }
    }

    fn listed(&mut self, domains: &[Listed], core: &Core, executors: &Executors) {
        let mut now = BTreeMap::new();
        for Listed { domain, .. } in domains.iter().filter(|listed| !matches!(listed.domain.state, DomainState::Off(_)))
        {
            // Not shown while a call is under way: as it was.
            let known = || self.running.get(&domain.vm).cloned().unwrap_or_default();
            let seen = if domain.busy { known() } else { Running::of(domain) };
            now.insert(domain.vm, Running { name: domain.name.clone(), ..seen });
        }
        let before = std::mem::replace(&mut self.running, now.clone());
        for (vm, was) in before {
            match now.get(&vm) {
                None => self.take(GuestEvent::Ended(vm), core, executors),
                Some(is) if was.socket.is_some() && is.socket != was.socket => {
                    self.take(GuestEvent::Disconnected(vm), core, executors);
                }
                Some(_) => {}
            }
        }
        let mut sockets = BTreeMap::new();
        for (vm, Running { name, socket, .. }) in now {
            self.take(GuestEvent::Runs { vm, name: name.clone() }, core, executors);
            sockets.extend(socket.map(|socket| (vm, (name, socket))));
        }
        self.channels.follow(&sockets);
    }

    fn take(&mut self, event: GuestEvent, core: &Core, executors: &Executors) {
        for act in self.guests.step(clock::now(), event) {
            match act {
                GuestAct::Say(vm, message) => self.channels.say(vm, message),
                GuestAct::Do { ticket, vm, remedy, case } => self.carry_out(ticket, vm, remedy, *case, executors),
                GuestAct::Sample(vm) => self.sample(vm, core, executors),
                GuestAct::Glance { vm, read } => self.glance(vm, read, core, executors),
                GuestAct::Tell(host, word) => self.tell(host, word, executors),
                GuestAct::TellMaster(word) => {
                    if let Some(master) = core.master() {
                        self.tell(master, word, executors); // Without one it is asked again.
                    }
                }
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

    fn glance(&self, vm: VmId, read: Option<Mark>, core: &Core, executors: &Executors) {
        let to_self = self.to_self.clone();
        executors.glances().glance(vm, read, storage_well(core), move |glimpse| {
            let _ = to_self.send(FromOthers::Glimpsed(vm, glimpse));
        });
    }

    fn sample(&self, vm: VmId, core: &Core, executors: &Executors) {
        let storage_well = storage_well(core);
        let to_self = self.to_self.clone();
        executors.libvirt().activity(vm, CALL, move |statistics| {
            let sample = statistics.and_then(|all| libvirt::sample(&all, storage_well));
            let _ = to_self.send(FromOthers::Sampled(vm, sample));
        });
    }

    /// Keeps failure information, and does what is ordered as soon as that is there or has had its time.
    fn carry_out(&self, ticket: Ticket, vm: VmId, remedy: Remedy, case: Case, executors: &Executors) {
        let (done, kept) = (self.to_self.clone(), self.to_self.clone());
        let order = match remedy {
            Remedy::Reset => DomainOrder::Reset { vm },
            Remedy::Suspend => DomainOrder::Suspend { vm },
            Remedy::Reboot | Remedy::PowerCycle | Remedy::RestartElsewhere | Remedy::Migrate => {
                let why = format!("this version cannot do a {remedy}");
                let _ = done.send(FromOthers::Done(ticket, Err(why)));
                return;
            }
        };
        let (libvirt, finds) = (executors.libvirt(), case.clone());
        let go = move |class: &Class, outcome: Outcome| {
            let done = move |result: Result<(), String>| {
                let _ = outcome.send(result.clone());
                let _ = done.send(FromOthers::Done(ticket, result));
            };
            match finds.helps(class) {
                Err(why) => done(Err(why)),
                // After a panic its CPUs stand, also after a reset.
                Ok(()) if finds.panicked.is_some() && order == (DomainOrder::Reset { vm }) => {
                    let again = libvirt.clone();
                    libvirt.ask(order, CALL, move |answer| match result_of(answer) {
                        Ok(()) => {
                            again.ask(DomainOrder::Resume { vm }, CALL, move |answer| done(result_of(answer)));
                        }
                        Err(why) => done(Err(why)),
                    });
                }
                Ok(()) => libvirt.ask(order, CALL, move |answer| done(result_of(answer))),
            }
        };
        executors.evidence().take(vm, remedy, case, go, move |what| {
            let _ = kept.send(FromOthers::Kept(vm, what));
        });
    }
}

fn storage_well(core: &Core) -> bool {
    core.view(clock::now()).datastores.iter().all(|store| store.health == "well")
}

fn result_of(answer: DomainAnswer) -> Result<(), String> {
    match answer {
        DomainAnswer::Done | DomainAnswer::Listed(_) => Ok(()),
        DomainAnswer::Failed(why) => Err(format!("{why:?}")),
    }
}
