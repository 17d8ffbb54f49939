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
use crate::core::guests::{Case, GuestAct, GuestEvent, Guests};
use crate::exec::channels::{ChannelEvent, Channels};
use crate::exec::clock;
use crate::exec::evidence::Outcome;
use crate::types::failure::Class;
use crate::types::guests::{GuestWord, Remedy};
use crate::types::vm::{DomainAnswer, DomainOrder, DomainState};
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
    /// Failure information was kept, or not; for people.
    Kept(VmId, Result<String, String>),
}

/// All that the loop needs for guests.
pub(crate) struct GuestSide {
    guests: Guests,
    channels: Channels,
    /// Channels of VMs that run here, as last listed.
    sockets: BTreeMap<VmId, (String, PathBuf)>,
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
        let (guests, sockets) = (Guests::default(), BTreeMap::new());
        let (channels, to_guests) = (Channels::new(sender), to_self.clone());
        (Self { guests, channels, sockets, said, others, to_self, settings: 0 }, to_guests)
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
        let Event::Listed(domains) = event else { return };
        let mut sockets = BTreeMap::new();
        for Listed { domain, .. } in domains.iter().filter(|listed| !matches!(listed.domain.state, DomainState::Off(_)))
        {
            // Not shown while a call is under way: as it was.
            let known = || self.sockets.get(&domain.vm).map(|(_, socket)| socket.clone());
            let socket = if domain.busy { known() } else { domain.guest_socket.as_ref().map(PathBuf::from) };
            if let Some(socket) = socket {
                sockets.insert(domain.vm, (domain.name.clone(), socket));
            }
        }
        let gone: Vec<VmId> = self.sockets.keys().copied().filter(|vm| !sockets.contains_key(vm)).collect();
        gone.into_iter().for_each(|vm| self.take(GuestEvent::Ended(vm), core, executors));
        for (vm, (name, _)) in &sockets {
            self.take(GuestEvent::Runs { vm: *vm, name: name.clone() }, core, executors);
        }
        self.channels.follow(&sockets);
        self.sockets = sockets;
    }

    fn take(&mut self, event: GuestEvent, core: &Core, executors: &Executors) {
        for act in self.guests.step(clock::now(), event) {
            match act {
                GuestAct::Say(vm, message) => self.channels.say(vm, message),
                GuestAct::Do { ticket, vm, remedy, case } => self.carry_out(ticket, vm, remedy, *case, executors),
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
                Ok(()) => libvirt.ask(order, CALL, move |answer| {
                    done(match answer {
                        DomainAnswer::Done | DomainAnswer::Listed(_) => Ok(()),
                        DomainAnswer::Failed(why) => Err(format!("{why:?}")),
                    });
                }),
            }
        };
        executors.evidence().take(vm, remedy, case, go, move |what| {
            let _ = kept.send(FromOthers::Kept(vm, what));
        });
    }
}
