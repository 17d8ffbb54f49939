//! Who waits for whom: a VM that must start after others is held up until they are ready.
//!
//! ```text
//!   the others' hosts report: runs · its agent was heard · an application says that it is ready ─► since when, by generation
//!                                                                                                     │ + the rule's delay
//!   next in the list, has a place ── all ready? ── no ─► waits, says for whom ── the rule's limit ──► ▼ goes on, and that is said
//! ```
//!
//! A VM that people have stopped, or that is nowhere, holds up nobody: it would do so for ever. What had come so far before this host
//! became master counts as ready since ever.

use super::Core;
use super::cx::{Cx, Timer};
use super::note::Note;
use super::placement::order::{Dependency, Order};
use crate::types::guests::Inside;
use crate::types::rules::Ready;
use crate::types::vm::DomainState;
use crate::types::{HostId, Time, VmId, Wanted};

/// Since when a VM runs, its agent was heard, it is ready.
pub type Far = [Option<Time>; 3];

impl Core {
    /// A guest of this host has come to life, or is ready.
    pub(super) fn inside(&mut self, vm: VmId, inside: Inside) {
        self.vm(vm).inside = inside;
        self.tell = true;
        self.look = true;
    }

    /// Looks how far those are that others wait for.
    pub(super) fn follow_dependencies(&mut self, order: &Order, now: Time) {
        let fresh = now.since(self.master_since) < self.settings.timing.suspect;
        let since = if fresh { Time::ZERO } else { now };
        for id in order.awaited() {
            let Some(vm) = self.vms.get(&id) else { continue };
            let generation = vm.tenure().map(|tenure| tenure.generation);
            let owner = vm.claim.as_ref().and_then(|claim| claim.owners().last().map(|owner| owner.host));
            let has = owner.filter(|owner| self.is_heard(*owner, now)).map(|owner| self.has_come(owner, id));
            let has = has.unwrap_or_default();
            let known = vm.far.filter(|(of, _)| Some(*of) == generation).map(|(_, far)| far).unwrap_or_default();
            let far: Far = std::array::from_fn(|n| has[n].then(|| known[n].unwrap_or(since)));
            self.vm(id).far = generation.map(|generation| (generation, far));
        }
    }

    /// How far it has come on a host, as that says.
    fn has_come(&self, host: HostId, id: VmId) -> [bool; 3] {
        let (domain, inside) = if host == self.me.host {
            let inside = self.vms.get(&id).map(|vm| vm.inside).unwrap_or_default();
            (self.libvirt.domains.get(&id).map(|domain| domain.state), inside)
        } else {
            let report = self.report_of(host, id);
            (report.and_then(|report| report.domain), report.map(|report| report.inside).unwrap_or_default())
        };
        let runs = domain == Some(DomainState::Running);
        [runs, runs && Inside::Heard <= inside, runs && Inside::Ready <= inside]
    }

    /// What one that has a place still waits for, if it does. Its own limit ends that.
    pub(super) fn held_up(&mut self, cx: &mut Cx, id: VmId, order: &Order) -> Option<String> {
        let open: Vec<(Option<Time>, &Dependency)> = order
            .waits_for(id)
            .iter()
            .filter_map(|dependency| Some((self.open(cx.now, dependency)?, dependency)))
            .collect();
        if open.is_empty() {
            self.vm(id).held_up = None;
            return None;
        }
        let since = *self.vm(id).held_up.get_or_insert(cx.now);
        let (late, in_time): (Vec<_>, Vec<_>) =
            open.into_iter().partition(|(_, dependency)| since + dependency.within <= cx.now);
        let name = self.vm_name(id);
        if in_time.is_empty() {
            let text = late.iter().map(|(_, one)| format!("{} {}", self.vm_name(one.after), not_yet(one.ready)));
            let text = format!("{name} starts although {}: its limit is over", text.collect::<Vec<_>>().join(", "));
            cx.note(Note::warning("vm-dependency-late", text).of(&name));
            self.vm(id).held_up = None;
            return None;
        }
        let again = in_time.iter().map(|(due, one)| due.unwrap_or(since + one.within).min(since + one.within)).min();
        cx.set(Timer::Place(id), again.expect("there is one"));
        let text = in_time.iter().map(|(due, one)| {
            let what = if due.is_some() { "the delay after it" } else { until(one.ready) };
            format!("{} ({what})", self.vm_name(one.after))
        });
        Some(text.collect::<Vec<_>>().join(", "))
    }

    /// Whether it is not ready yet; if only the delay is to pass, until when.
    fn open(&self, now: Time, dependency: &Dependency) -> Option<Option<Time>> {
        let after = self.vms.get(&dependency.after).filter(|after| after.wanted() == Some(Wanted::Running))?;
        let n = match dependency.ready {
            Ready::Started => 0,
            Ready::Agent => 1,
            Ready::Application => 2,
        };
        let since = after.far.filter(|(of, _)| after.tenure().map(|tenure| tenure.generation) == Some(*of));
        match since.and_then(|(_, far)| far[n]) {
            None => Some(None),
            Some(at) => (now < at + dependency.delay).then_some(Some(at + dependency.delay)),
        }
    }
}

pub(super) fn until(ready: Ready) -> &'static str {
    match ready {
        Ready::Started => "until it runs",
        Ready::Agent => "until its agent is heard",
        Ready::Application => "until it says that it is ready",
    }
}

fn not_yet(ready: Ready) -> &'static str {
    match ready {
        Ready::Started => "does not run",
        Ready::Agent => "has no agent that is heard",
        Ready::Application => "has not said that it is ready",
    }
}
