//! On a VM's host: it is ended, since the master needs its room for another one. No person wants it stopped.
//!
//! ```text
//!   the master asks ─► its guest is asked to shut down ── the rules' time is over, its paths work ──► powered off
//!                                └──────────────── ended ◄──────────────────────────────────────────────┘
//!                                                    ▼
//!                            released, wanted running: it waits for a place, as any other does
//! ```
//!
//! One whose path to a datastore does not work is not ended: what it wrote last might still be under way then, and would tie it to this
//! host, whose room it gave. It is remembered beyond this agent (`Underway::Yield`), like every other order whose end somebody waits for.

use std::time::Duration;

use super::Core;
use super::cx::Cx;
use super::event::AskId;
use super::isolation::Responded;
use super::note::Note;
use crate::types::control::{Denial, Reply};
use crate::types::vm::{DomainOrder, Underway};
use crate::types::{Holder, Time, VmId, VmState};

/// An order to libvirt.
const CALL: Duration = Duration::from_secs(20);

impl Core {
    /// The master asks for it.
    pub(super) fn yield_asked(&mut self, cx: &mut Cx, ask: AskId, id: VmId, whom: &str) {
        let reply = match self.begin_yield(cx, id, whom) {
            Ok(()) => Reply::Done,
            Err(denial) => Reply::Denied(denial),
        };
        cx.answer(ask, reply);
    }

    /// Its end begins.
    ///
    /// # Errors
    /// It is not here, or something else is under way: nothing has changed.
    pub(super) fn begin_yield(&mut self, cx: &mut Cx, id: VmId, whom: &str) -> Result<(), Denial> {
        let vm = self.vms.get(&id).ok_or(Denial::UnknownVm)?;
        let claim = vm.claim.clone().filter(|claim| matches!(claim.holder, Holder::Host(_))).ok_or(Denial::NotHere)?;
        let row = self.guard.rows.get(&claim.tenure).map(|row| row.state);
        if !self.is_ours(&claim) || row != Some(VmState::Running) {
            return Err(Denial::NotHere);
        }
        if vm.attempt.is_some() || vm.moving.is_some() || self.underway.contains_key(&id) {
            return Err(Denial::Unable("it is being worked on".into()));
        }
        if let Some(store) = self.lost_path(id, cx.now) {
            return Err(Denial::Unable(format!("the path to its datastore {store} does not work")));
        }
        let name = self.vm_name(id);
        let within_s = self.settings.rules.room.within_s;
        let text = format!("{name} is shut down to make room for {whom}; it is powered off after {within_s} s");
        cx.note(Note::warning("vm-makes-room", text).of(&name));
        self.vm(id).responded = Some(Responded { since: cx.now, destroyed: false });
        self.set_underway(cx, id, Some(Underway::Yield));
        cx.domain(DomainOrder::Shutdown { vm: id }, CALL, super::cx::Pending::Nothing);
        self.tell = true;
        Ok(())
    }

    /// It runs, although this agent or the one before has told it to end.
    pub(super) fn still_yields(&mut self, cx: &mut Cx, id: VmId) {
        let within = Duration::from_secs(self.settings.rules.room.within_s.into());
        let name = self.vm_name(id);
        let told = *self.vm(id).responded.get_or_insert(Responded { since: cx.now, destroyed: false });
        let passed = cx.now.since(told.since);
        let path = self.lost_path(id, cx.now);
        if (told.destroyed || path.is_some()) && within + CALL * 2 <= passed {
            self.vm(id).responded = None;
            self.set_underway(cx, id, None);
            cx.note(Note::warning("vm-makes-room", format!("{name} does not end, and keeps its room")).of(&name));
        } else if !told.destroyed && path.is_none() && within <= passed {
            self.vm(id).responded = Some(Responded { destroyed: true, ..told });
            cx.note(Note::warning("vm-makes-room", format!("{name} has not shut down: it is powered off")).of(&name));
            cx.domain(DomainOrder::Destroy { vm: id }, CALL, super::cx::Pending::Nothing);
        }
    }

    /// A datastore of it that this host does not reach.
    fn lost_path(&self, id: VmId, now: Time) -> Option<String> {
        let lost = self.need_of(id).datastores.into_iter().find(|store| !self.reaches(self.me.host, *store, now));
        lost.map(|store| self.store_name(store))
    }
}
