//! Puts what libvirt and its hook say into events, in order, each with what its definition means.
//!
//! ```text
//!   libvirt's thread ─┐                     ┌── is this host going down? (asked of systemd before a VM's end is told)
//!   hook's threads  ──┴─► queue ─► one task ┴─► Event
//! ```
//!
//! A host that shuts down is not a person who stops VMs: so whether it does is found out before the end of a VM is
//! told, with a deadline; if systemd does not answer, the host counts as staying up. A VM that is being saved stands first,
//! and its end may be listed before it is told: so a stop of its vCPUs is a reason to look as well.

use std::time::Duration;

use tokio::sync::mpsc;

use super::Events;
use super::answers::Answers;
use crate::api::systemd;
use crate::core::event::{Event, HookWish, Listed, Recorded};
use crate::exec::hook::{HookAsk, HookOperation};
use crate::exec::libvirt::{LibvirtEvent, xml};
use crate::types::settings::ClusterSettings;
use crate::types::vm::DomainChange;

/// systemd's time to say whether the host goes down.
const ANSWER: Duration = Duration::from_millis(500);

/// Where libvirt's threads put what they hear. Bounded by libvirt's own queues: one event per change of a domain.
#[derive(Clone)]
pub(crate) struct ToPump(mpsc::UnboundedSender<Item>);

enum Item {
    Libvirt(LibvirtEvent),
    Hook(HookAsk),
}

impl ToPump {
    pub(crate) fn libvirt(&self, event: LibvirtEvent) {
        let _ = self.0.send(Item::Libvirt(event));
    }
    pub(crate) fn hook(&self, ask: HookAsk) {
        let _ = self.0.send(Item::Hook(ask));
    }
}

/// Starts the task; it ends with the loop.
pub(crate) fn start(events: Events, answers: Answers) -> ToPump {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(item) = receiver.recv().await {
            let event = match item {
                Item::Hook(ask) => hooked(ask, &answers),
                Item::Libvirt(event) => {
                    if ends_a_vm(&event) && systemd::going_down(ANSWER).await {
                        let _ = events.send(Event::GoingDown);
                    }
                    translated(event, &answers.settings_now())
                }
            };
            if events.send(event).is_err() {
                return;
            }
        }
    });
    ToPump(sender)
}

fn ends_a_vm(event: &LibvirtEvent) -> bool {
    match event {
        LibvirtEvent::Changed {
            change: DomainChange::Stopped(_) | DomainChange::ShuttingDown { .. } | DomainChange::Suspended { .. },
            ..
        } => true,
        LibvirtEvent::Changed { .. } | LibvirtEvent::Up | LibvirtEvent::Down(_) | LibvirtEvent::Listed(_) => false,
    }
}

fn translated(event: LibvirtEvent, settings: &ClusterSettings) -> Event {
    match event {
        LibvirtEvent::Up => Event::LibvirtUp,
        LibvirtEvent::Down(why) => Event::LibvirtDown(why),
        LibvirtEvent::Changed { vm, name, change } => Event::Changed { vm, name, change },
        LibvirtEvent::Listed(domains) => {
            let with_records = |domain: crate::types::vm::DomainInfo| Listed {
                record: domain.xml.as_ref().map(|xml| recorded(xml, settings)),
                live: domain.live_xml.as_ref().map(|xml| recorded(xml, settings)),
                domain,
            };
            Event::Listed(domains.into_iter().map(with_records).collect())
        }
    }
}

fn hooked(ask: HookAsk, answers: &Answers) -> Event {
    let record = recorded(&ask.xml, &answers.settings_now());
    let wish = match ask.operation {
        HookOperation::Prepare => HookWish::Prepare,
        HookOperation::Migrate => HookWish::Migrate,
        HookOperation::Restore => HookWish::Restore { saved: xml::mark(&ask.xml) },
    };
    Event::Hooked { vm: ask.vm, name: ask.name, wish, record, ask: answers.hook_waits(ask.answer) }
}

fn recorded(text: &str, settings: &ClusterSettings) -> Recorded {
    xml::record(text, settings).map(Box::new).map_err(|error| error.to_string())
}
