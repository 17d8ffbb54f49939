//! Who waits for an answer, and what they are told: other agents, people on D-Bus, libvirt's hook, hosts that join.
//!
//! A question takes an `AskId`, its waiter lies here, and the core's answer finds it back. The list is bounded: the
//! channels behind it are (D-Bus 64, control 256 per peer, hook threads).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::executors::Executors;
use super::guests::{FromOthers, ToGuests};
use crate::api::control::Answer;
use crate::api::dbus::{Ask, AskMessage, AskReply};
use crate::core::Core;
use crate::core::event::{AskId, Event};
use crate::exec::cluster::{self, Cluster};
use crate::exec::failures::Failures;
use crate::exec::hook::HookAnswer;
use crate::exec::notes::{self, NoteBook};
use crate::exec::verdicts::{self, VerdictBook};
use crate::exec::{clock, doctor};
use crate::types::control::{Denial, Reply, Request};
use crate::types::guests::GuestWord;
use crate::types::settings::{ClusterSettings, MemberSettings, SettingsChange};
use crate::types::verdict::{VerdictAsk, VerdictView};
use crate::types::view::{ClusterView, NoteView};
use crate::types::{HostId, Ticket};

/// Somebody who waits.
enum Waiter {
    Agent(Answer),
    Person(oneshot::Sender<AskReply>, Wish),
    Hook(HookAnswer),
    /// A remedy of a guest.
    Guest(Ticket),
    Join {
        answer: Answer,
        member: MemberSettings,
        certificate_pem: String,
    },
}

/// What a person asked for, as far as it shapes the answer.
enum Wish {
    View,
    Act(&'static str),
}

struct Inner {
    next: u64,
    guests: ToGuests,
    failures: Arc<Failures>,
    waiters: BTreeMap<AskId, Waiter>,
    cluster: Cluster,
    notes: NoteBook,
    verdicts: VerdictBook,
}

/// A handle; the threads of hook and control channel have one, too. The lock is held for moments only.
#[derive(Clone)]
pub(crate) struct Answers(Arc<Mutex<Inner>>);

impl Answers {
    pub(crate) fn new(cluster: Cluster, notes: NoteBook, guests: ToGuests, state: &Path) -> Self {
        let verdicts = VerdictBook::default();
        let (waiters, failures) = (BTreeMap::new(), Arc::new(Failures::open(state.join("failures"))));
        Self(Arc::new(Mutex::new(Inner { next: 0, guests, failures, waiters, cluster, notes, verdicts })))
    }

    /// Failures of guests that are kept on this host.
    pub(crate) fn failures(&self) -> Arc<Failures> {
        Arc::clone(&self.lock().failures)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, waiter: Waiter) -> AskId {
        let mut inner = self.lock();
        inner.next += 1;
        let ask = AskId(inner.next);
        inner.waiters.insert(ask, waiter);
        ask
    }

    pub(crate) fn settings(&self, settings: &ClusterSettings) {
        self.lock().cluster.settings = settings.clone();
    }

    pub(crate) fn settings_now(&self) -> ClusterSettings {
        self.lock().cluster.settings.clone()
    }

    pub(crate) fn note(&self, note: NoteView) {
        self.lock().notes.add(note);
    }

    pub(crate) fn verdict(&self, verdict: VerdictView) {
        self.lock().verdicts.add(verdict);
    }

    pub(crate) fn poll_notes(&self) -> Vec<String> {
        self.lock().notes.poll()
    }

    /// The answer goes to the guests' part, under this ticket.
    pub(crate) fn guest_waits(&self, ticket: Ticket) -> AskId {
        self.wait(Waiter::Guest(ticket))
    }

    pub(crate) fn hook_waits(&self, answer: HookAnswer) -> AskId {
        self.wait(Waiter::Hook(answer))
    }

    /// Another agent's request: an event for the core, or answered here.
    pub(crate) fn agent(&self, from: Option<HostId>, request: Request, answer: Answer) -> Option<Event> {
        match request {
            Request::Notes { since_unix_ms } => {
                let notes = self.lock().notes.since(since_unix_ms, None, None);
                answer.send(Reply::Notes(notes));
                None
            }
            Request::Verdicts(ask) => {
                answer.send(Reply::Verdicts(self.lock().verdicts.asked(&ask)));
                None
            }
            Request::Guest(word) => {
                match (*word, from) {
                    (GuestWord::Failures(ask), _) => {
                        super::failures::answer(self.failures(), ask, |reply| answer.send(reply));
                        return None;
                    }
                    (GuestWord::EnablePort { vm }, Some(_)) => {
                        let told = Box::new(|reply| answer.send(reply));
                        drop(self.lock().guests.send(FromOthers::EnablePort(vm, told)));
                        return None;
                    }
                    (word, Some(from)) => drop(self.lock().guests.send(FromOthers::Word(from, word))),
                    (_, None) => {}
                }
                answer.send(Reply::Done);
                None
            }
            Request::Join(asked) => {
                let admitted = cluster::admit(&self.lock().cluster, &asked);
                match admitted {
                    Ok((member, certificate_pem)) => {
                        let change = SettingsChange::AddMember(member.clone());
                        let ask = self.wait(Waiter::Join { answer, member, certificate_pem });
                        let request = Box::new(Request::Change(Box::new(change)));
                        Some(Event::Asked { ask, from: None, request })
                    }
                    Err(denial) => {
                        answer.send(Reply::Denied(denial));
                        None
                    }
                }
            }
            request => {
                let ask = self.wait(Waiter::Agent(answer));
                Some(Event::Asked { ask, from, request: Box::new(request) })
            }
        }
    }

    /// A person's question: an event for the core, or answered from here.
    pub(crate) fn person(&self, message: AskMessage, core: &Core, executors: &Executors) -> Option<Event> {
        let AskMessage { ask, answer } = message;
        let (request, wish) = match ask {
            Ask::View => (Request::View, Wish::View),
            Ask::Explain { vm } => (Request::Explain { vm }, Wish::View),
            Ask::WhatIf { hosts } => (Request::WhatIf { hosts }, Wish::View),
            Ask::Evacuate { for_shutdown } => (Request::Evacuate { host: None, for_shutdown }, Wish::View),
            Ask::Vm(command) => (Request::Vm(command), Wish::Act("done")),
            Ask::Change(change) => (Request::Change(change), Wish::Act("changed")),
            Ask::Notes { since_unix_ms, vm, host } => {
                self.gather_notes(answer, core, executors, since_unix_ms, vm, host);
                return None;
            }
            Ask::Verdicts(ask) => {
                self.gather_verdicts(answer, core, executors, ask);
                return None;
            }
            Ask::Failures { vm } => {
                super::failures::gather(vm, answer, core, executors);
                return None;
            }
            Ask::FailurePiece { host, ask } => {
                super::failures::piece(host, ask, answer, executors);
                return None;
            }
            Ask::EnableGuest { vm } => {
                super::ports::enable(vm, answer, core, executors);
                return None;
            }
            Ask::TestFenceDevice { name } => {
                let devices = &core.settings().power.devices;
                super::devices::test(&name, devices.iter().find(|device| device.name == name).cloned(), answer);
                return None;
            }
            Ask::Doctor => {
                let mut facts = super::facts::of(core);
                let devices = core.settings().power.devices.clone();
                tokio::spawn(async move {
                    super::devices::monitor(&mut facts.devices, devices).await;
                    let _ = answer.send(AskReply::Findings(doctor::examine(Ok(facts)).await));
                });
                return None;
            }
        };
        let ask = self.wait(Waiter::Person(answer, wish));
        Some(Event::Asked { ask, from: None, request: Box::new(request) })
    }

    /// Notes of all hosts that answer in time, merged.
    fn gather_notes(
        &self,
        answer: oneshot::Sender<AskReply>,
        core: &Core,
        executors: &Executors,
        since: u64,
        vm: Option<String>,
        host: Option<String>,
    ) {
        let mine = self.lock().notes.since(since, vm.as_deref(), host.as_deref());
        let others = core.heard_hosts(clock::now());
        let seed = clock::nonce().0;
        let waiting: Vec<_> = others
            .into_iter()
            .zip(0_u64..)
            .map(|(host, n)| executors.notes_of(host, since, Ticket((seed as u64).wrapping_add(n))))
            .collect();
        tokio::spawn(async move {
            let mut lists = vec![mine];
            for receiver in waiting {
                if let Ok(notes) = receiver.await {
                    let fits = |note: &NoteView| {
                        vm.as_ref().is_none_or(|vm| note.vm.as_ref() == Some(vm))
                            && host.as_ref().is_none_or(|host| note.host == *host)
                    };
                    lists.push(notes.into_iter().filter(fits).collect());
                }
            }
            let _ = answer.send(AskReply::Notes(notes::merge(lists)));
        });
    }

    /// Verdicts of all hosts that answer in time.
    fn gather_verdicts(&self, answer: oneshot::Sender<AskReply>, core: &Core, executors: &Executors, ask: VerdictAsk) {
        let mut all = self.lock().verdicts.asked(&ask);
        let others = core.heard_hosts(clock::now());
        let waiting: Vec<_> = others.into_iter().map(|host| executors.verdicts_of(host, ask.clone())).collect();
        tokio::spawn(async move {
            for receiver in waiting {
                all.extend(receiver.await.unwrap_or_default());
            }
            let _ = answer.send(AskReply::Verdicts(verdicts::newest(all)));
        });
    }

    /// The core's answer.
    pub(crate) fn reply(&self, ask: AskId, reply: Reply) {
        let mut inner = self.lock();
        let Some(waiter) = inner.waiters.remove(&ask) else { return };
        match waiter {
            Waiter::Agent(answer) => answer.send(reply),
            Waiter::Person(answer, wish) => {
                let _ = answer.send(told(reply, wish));
            }
            Waiter::Guest(ticket) => {
                let result = match told(reply, Wish::Act("done")) {
                    AskReply::Denied(why) => Err(why.to_string()),
                    _ => Ok(()),
                };
                let _ = inner.guests.send(FromOthers::Done(ticket, result));
            }
            Waiter::Join { answer, member, certificate_pem } => match reply {
                Reply::Done | Reply::AlreadySo => {
                    let settings = cluster::with_member(&inner.cluster.settings, member);
                    let joined = inner.cluster.joined(settings, certificate_pem);
                    answer.send(Reply::Joined(Box::new(joined)));
                }
                other => answer.send(other),
            },
            Waiter::Hook(answer) => {
                answer.refuse("mainstay: an answer of the wrong kind".into());
            }
        }
    }

    /// The core's answer to the hook.
    pub(crate) fn hook(&self, ask: AskId, result: Result<(), String>) {
        if let Some(Waiter::Hook(answer)) = self.lock().waiters.remove(&ask) {
            match result {
                Ok(()) => answer.allow(),
                Err(why) => answer.refuse(why),
            };
        }
    }
}

fn told(reply: Reply, wish: Wish) -> AskReply {
    match (reply, wish) {
        (Reply::View(view), Wish::View) => AskReply::View(view),
        (Reply::Explain(vm), _) => AskReply::Explain(vm),
        (Reply::WhatIf(view), _) => AskReply::WhatIf(view),
        (Reply::Evacuating(view), _) => AskReply::Evacuating(view),
        (Reply::Denied(denial), _) => AskReply::Denied(denial),
        (Reply::AlreadySo, _) => AskReply::Done("it was so already".into()),
        (Reply::Ran { generation }, _) => AskReply::Done(format!("runs under generation {generation}")),
        (Reply::Done, Wish::Act(what)) => AskReply::Done(what.into()),
        (reply, _) => AskReply::Denied(Denial::Unable(format!("an answer of the wrong kind: {reply:?}"))),
    }
}

/// What a host that is no member answers.
pub(crate) fn as_stranger(message: AskMessage, view: ClusterView) {
    let AskMessage { ask, answer } = message;
    let denied = || {
        AskReply::Denied(Denial::Unable("it is no member of a cluster; run 'mainstay cluster init' or 'join'".into()))
    };
    match ask {
        Ask::View => {
            let _ = answer.send(AskReply::View(Box::new(view)));
        }
        Ask::Notes { .. } => {
            let _ = answer.send(AskReply::Notes(Vec::new()));
        }
        Ask::Verdicts(_) => {
            let _ = answer.send(AskReply::Verdicts(Vec::new()));
        }
        Ask::Doctor => {
            tokio::spawn(async move {
                let _ = answer.send(AskReply::Findings(doctor::examine_stranger().await));
            });
        }
        Ask::Vm(_)
        | Ask::Change(_)
        | Ask::Explain { .. }
        | Ask::WhatIf { .. }
        | Ask::Evacuate { .. }
        | Ask::TestFenceDevice { .. }
        | Ask::EnableGuest { .. }
        | Ask::Failures { .. }
        | Ask::FailurePiece { .. } => {
            let _ = answer.send(denied());
        }
    }
}
