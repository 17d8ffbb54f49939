//! A host that goes down in order: the master moves its VMs away, as in maintenance, but nothing of it outlives the request.
//!
//! ```text
//!   the host asks, every `AGAIN` or so ─► nothing is placed there, its VMs are moved ─► answered: how many are left, who stays and why
//!        └── asks no more: it is down, or was not after all ─► `LEAVES` later it is a host like others
//! ```
//!
//! It asks again so that a new master knows, too. What is left when the host does not wait any longer ends with it, and is started on
//! other hosts: the guests shut down in order (`ends`), or their leases lapse.

use std::time::Duration;

use super::Core;
use super::cx::Cx;
use super::event::AskId;
use super::note::Note;
use crate::types::control::{Denial, Reply, Request};
use crate::types::rules::AtShutdown;
use crate::types::view::EvacuationView;
use crate::types::{HostId, Time};

/// A host that has not asked for so long is a host like others.
const LEAVES: Duration = Duration::from_secs(15);

impl Core {
    /// This host (`host`), or another one, is to be emptied; `for_shutdown`: only if that is the policy.
    pub(super) fn evacuate_asked(
        &mut self,
        cx: &mut Cx,
        ask: AskId,
        from: Option<HostId>,
        (host, for_shutdown): (Option<HostId>, bool),
    ) {
        let host = host.or(from).unwrap_or(self.me.host);
        let rules = &self.settings.rules.shutdown;
        let within_s = rules.within_s;
        if for_shutdown && rules.vms == AtShutdown::Release {
            let view = EvacuationView { wanted: false, within_s, ..EvacuationView::default() };
            return cx.answer(ask, Reply::Evacuating(Box::new(view)));
        }
        if !self.is_master() {
            let master = self.master();
            return self.forward(cx, ask, from, master, Request::Evacuate { host: Some(host), for_shutdown });
        }
        if host != self.me.host && self.peers.get(&host).is_none_or(|peer| peer.report.is_none()) {
            let why = "its host has not told this master yet what runs there; ask again".to_owned();
            return cx.answer(ask, Reply::Denied(Denial::Unable(why)));
        }
        let left = self.running_on(host);
        let new = self.evacuations.insert(host, cx.now + LEAVES).is_none_or(|until| until <= cx.now);
        if new {
            for id in &left {
                self.vm(*id).stays = None; // What was so before may not be so now.
            }
            let text = format!("{} is evacuated: {} VM(s) are moved away", self.name_of(host), left.len());
            cx.note(Note::info("evacuation", text));
        }
        self.look = true;
        let why = |id| Some((self.vm_name(id), self.vms.get(&id)?.stays.as_ref()?.1.clone()));
        let stay = left.iter().filter_map(|id| why(*id)).collect();
        let left = u32::try_from(left.len()).unwrap_or(u32::MAX);
        cx.answer(ask, Reply::Evacuating(Box::new(EvacuationView { wanted: true, left, stay, within_s })));
    }

    /// It is being emptied.
    pub(super) fn is_evacuated(&self, host: HostId, now: Time) -> bool {
        self.evacuations.get(&host).is_some_and(|until| now < *until)
    }

    /// The master: hosts that are being emptied.
    pub(super) fn evacuate(&mut self, cx: &mut Cx) {
        self.evacuations.retain(|_, until| cx.now < *until);
        let hosts: Vec<HostId> = self.evacuations.keys().copied().collect();
        for host in hosts {
            if self.is_heard(host, cx.now) && !self.in_maintenance(host) {
                let all = self.running_on(host);
                self.move_away(cx, host, all);
            }
        }
    }
}
