//! The VMs of this host: what guard and libvirt say, and what follows from it.
//!
//! ```text
//!   row          claim        libvirt      what follows
//!   running      ours         runs         nothing
//!   lapsed       ours         stopped      Reclaim, as soon as the lease is valid
//!   over, no pid ours         off          judge the end: Release (a person, the guest, the host goes down)
//!                                          or Run in place (a crash)
//!   any          handover     -            see `handover`
//!   any          another's    -            the guard kills; the row is forgotten
//!   none         none         runs         Adopt: protect it (generation 1)
//!   none         another's    runs         alarm, nothing is stopped
//!   none         another's    defined      the stale definition is removed (`definitions`)
//! ```
//!
//! Events are hints; `reconcile` looks at the whole state whenever something changed and once per beat.

use std::time::Duration;

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending, Timer};
use super::event::Listed;
use super::homes::Lies;
use super::note::Note;
use crate::mutants::{Mutant, planted};
use crate::types::guard::{GuardOrder, RowView};
use crate::types::vm::{DomainChange, DomainOrder, DomainState, Underway};
use crate::types::{Claim, ClaimReason, Generation, Holder, Incarnation, Over, Tenure, VmId, VmState, Wanted};

/// libvirt's time for a list.
const LIST: Duration = Duration::from_secs(10);
/// Until an order whose effect shows in rows or domains is given again.
const PATIENCE: Duration = Duration::from_millis(500);
/// One that found no space is tried less often: making room is people's work.
const SPACE_RETRY: Duration = Duration::from_secs(10);
/// What was said of a VM that another host has taken is said for so long.
const WORD_KEPT: Duration = Duration::from_secs(60);
/// A VM that QEMU paused for an error of its disk is resumed this often, while its datastore takes our own writes.
const IO_RETRY: Duration = Duration::from_secs(2);

impl Core {
    // ---- guard --------------------------------------------------------------------------------------------------

    pub(super) fn guard_connected(&mut self, cx: &mut Cx) {
        self.guard.connected = true;
        cx.act(super::action::Action::Apply(Box::new(self.settings.clone())));
        self.tell_beat(cx);
    }

    pub(super) fn guard_hello(&mut self, cx: &mut Cx, incarnation: Incarnation) {
        if self.guard.incarnation.is_some_and(|before| before != incarnation) {
            cx.note(Note::warning("guard-restarted", "the guard was restarted; its VMs are re-claimed"));
        }
        self.guard.incarnation = Some(incarnation);
        self.guard.rows.clear();
        self.guard.leases.clear();
        self.guard.since = cx.now;
        self.guard.settled = false;
        // Orders are answered in their order, after the rows that follow the hello.
        self.tell_beat_to(cx, Pending::Settled);
    }

    pub(super) fn guard_settled(&mut self, cx: &mut Cx) {
        self.guard.settled = true;
        self.check = true;
        self.bar_again(cx);
        cx.set_earlier(Timer::Beat, cx.now);
    }

    pub(super) fn guard_lost(&mut self, cx: &mut Cx, why: &str) {
        if std::mem::take(&mut self.guard.connected) {
            cx.note(Note::warning("guard-lost", format!("the guard does not answer: {why}")));
        }
        self.guard.leases.clear();
        self.guard.settled = false;
        self.guard_answers_no_more(cx);
        self.moves_lost_guard(cx);
    }

    pub(super) fn row_changed(&mut self, cx: &mut Cx, row: RowView) {
        let (tenure, state) = (row.tenure, row.state);
        let before = self.guard.rows.insert(tenure, row.clone());
        let name = row.name;
        if before.as_ref().map(|row| row.state) != Some(state) {
            if self.vm(tenure.vm).name.is_empty() {
                self.named(tenure.vm, &name);
            }
            let tried = before.as_ref().is_some_and(|row| row.state == VmState::Expected);
            if state == VmState::Over(Over::Lapsed) && !tried {
                let home = self.store_name(self.lapsed_home(tenure.vm, row.home));
                let text = format!(
                    "{name} is stopped by the guard: its lease on {home} lapsed (generation {} is over)",
                    tenure.generation
                );
                cx.note(Note::warning("vm-stopped-by-guard", text).of(&name));
            }
            self.adoption(cx, tenure.vm);
            self.barring(cx, tenure.vm);
            self.handed_over(cx, tenure, state);
        }
        self.check = true;
        self.look = true;
        self.tell = true;
    }

    pub(super) fn row_forgotten(&mut self, tenure: Tenure) {
        self.guard.rows.remove(&tenure);
        self.check = true;
    }

    // ---- libvirt ------------------------------------------------------------------------------------------------

    pub(super) fn libvirt_up(&mut self, cx: &mut Cx) {
        if !std::mem::replace(&mut self.libvirt.up, true) && self.libvirt.listed {
            cx.note(Note::info("libvirt-up", "libvirt answers again"));
        }
        self.tell = true;
    }

    pub(super) fn libvirt_down(&mut self, cx: &mut Cx, why: &str) {
        self.late_starts_stay();
        if std::mem::take(&mut self.libvirt.up) {
            cx.note(Note::warning("libvirt-down", format!("libvirt does not answer: {why}; VMs go on")));
        }
        self.tell = true;
    }

    pub(super) fn listed(&mut self, cx: &mut Cx, domains: Vec<Listed>) {
        self.libvirt.listed = true;
        self.libvirt.up = true;
        self.libvirt.partly = domains.iter().any(|listed| listed.record.is_none());
        self.libvirt.domains.clear();
        let mut unprotected = Vec::new();
        for Listed { domain, record, live } in domains {
            self.named(domain.vm, &domain.name);
            self.vm(domain.vm).lies = live.map(|live| Lies::of(&live));
            if let Some(record) = record {
                self.define_record(cx.now, domain.vm, record.map(|record| *record));
            }
            if self.vm(domain.vm).record.as_ref().is_some_and(Result::is_err) {
                unprotected.push(domain.vm);
            }
            self.libvirt.domains.insert(domain.vm, domain);
        }
        for (id, vm) in &mut self.vms {
            if !self.libvirt.domains.contains_key(id) {
                (vm.record, vm.digest) = (None, None);
            }
        }
        self.note_unprotected(cx, unprotected);
        self.look_for_late(cx);
        self.note_held(cx);
        self.note_deleted(cx);
        self.check = true;
        self.look = true;
        self.tell = true;
    }

    pub(super) fn changed(&mut self, cx: &mut Cx, id: VmId, name: &str, change: DomainChange) {
        if self.vm(id).name.is_empty() {
            self.named(id, name);
        }
        let state = match change {
            DomainChange::Stopped(reason) => {
                self.vm(id).ended = Some((reason, cx.now));
                self.vm(id).against = None;
                Some(DomainState::Off(reason))
            }
            DomainChange::ShuttingDown { by_guest } => {
                self.vm(id).by_guest = Some(by_guest);
                Some(DomainState::ShuttingDown)
            }
            DomainChange::Started { .. } => {
                self.vm(id).by_guest = None;
                self.vm(id).own_end = false;
                self.vm(id).end_seen = None;
                self.vm(id).ended = None;
                None
            }
            DomainChange::Suspended { by_io_error, .. } => Some(DomainState::Paused { by_io_error }),
            DomainChange::PostCopy => Some(DomainState::Paused { by_io_error: false }),
            DomainChange::Resumed => Some(DomainState::Running),
            DomainChange::IoError { full } => {
                let what = if full { "no space is left for a disk" } else { "a disk reports an error" };
                cx.note(Note::warning("io-error", format!("{name}: {what}")).of(name));
                self.vm(id).no_space = full;
                None
            }
            DomainChange::Panicked => {
                cx.note(Note::warning("guest-panicked", format!("{name}: its kernel panicked")).of(name));
                None
            }
            DomainChange::Defined | DomainChange::Undefined => {
                let vm = self.vm(id);
                vm.undefined = change == DomainChange::Undefined && !vm.undefining;
                None
            }
            DomainChange::DisksMoved | DomainChange::Rebooted | DomainChange::WatchdogFired => None,
        };
        if let (Some(state), Some(domain)) = (state, self.libvirt.domains.get_mut(&id)) {
            domain.state = state;
            if let DomainState::Off(_) = state {
                domain.pid = None;
            }
        }
        if let DomainChange::Suspended { by_io_error: false, .. } = change {
            self.pause_shows(id);
        }
        self.move_saw(cx, id, change);
        self.handover_saw(cx, id, change);
        self.list_domains(cx);
        self.check = true;
        self.tell = true;
    }

    pub(super) fn list_domains(&mut self, cx: &mut Cx) {
        cx.domain(DomainOrder::List, LIST, Pending::List);
    }

    // ---- reconcile ----------------------------------------------------------------------------------------------

    pub(super) fn reconcile(&mut self, cx: &mut Cx) {
        if !self.guard.settled || !self.libvirt.listed {
            return;
        }
        let mut ids: std::collections::BTreeSet<VmId> = self.guard.rows.keys().map(|row| row.vm).collect();
        ids.extend(self.libvirt.domains.keys());
        ids.extend(self.vms.iter().filter(|(_, vm)| self.is_mine(vm)).map(|(id, _)| *id));
        for id in ids {
            let vm = self.vm(id);
            let busy = vm.attempt.is_some() || vm.moving.is_some() || vm.incoming.is_some() || vm.handover.receives();
            if !busy && vm.pause <= cx.now {
                self.check_vm(cx, id);
            }
        }
    }

    fn check_vm(&mut self, cx: &mut Cx, id: VmId) {
        let newest = self.guard.rows.range(tenure_from(id)..).take_while(|(row, _)| row.vm == id).last();
        let row = newest.map(|(_, row)| row.clone());
        let claim = self.vm(id).claim.clone();
        if claim.as_ref().is_some_and(|claim| self.check_handover(cx, id, claim)) {
            return;
        }
        match (row, claim) {
            (Some(row), _) if row.state == VmState::Incoming => self.stray_copy(cx, id, &row),
            (Some(row), Some(claim)) if row.tenure == claim.tenure && self.is_ours(&claim) => {
                self.row_is_ours(cx, id, &row, &claim);
            }
            // A row of the same generation is that of a try of ours which another's claim has beaten.
            (Some(row), Some(claim)) if row.tenure.generation <= claim.tenure.generation => {
                self.row_is_past(cx, &row, &claim);
            }
            (Some(row), claim) => self.row_is_ahead(cx, id, &row, claim.as_ref()),
            (None, claim) => self.no_row(cx, id, claim.as_ref()),
        }
    }

    /// The newest claim is later than our row, or another's of the same generation: nothing may be concluded from the
    /// row about that claim.
    fn row_is_past(&mut self, cx: &mut Cx, row: &RowView, claim: &Claim) {
        let ours = claim.names(self.me.host);
        if row.pid.is_none() {
            if cx.now.since(self.vm(row.tenure.vm).known) < WORD_KEPT && !ours {
                return; // Whoever took it may wait for this host's word that its copy has ended.
            }
            let vm = row.tenure.vm;
            for tenure in self.guard.rows.keys().filter(|tenure| tenure.vm == vm).copied().collect::<Vec<_>>() {
                self.forget(cx, tenure);
            }
        } else if self.is_leaving(cx, row, claim) {
            // libvirt ends it; until then it stands.
        } else if !(ours || self.is_free_for(row, claim)) {
            // The oldest row: `seen` must be later than what it ends.
            let oldest = self.guard.rows.range(tenure_from(row.tenure.vm)..).next().map(|(tenure, _)| *tenure);
            let tenure = oldest.unwrap_or(row.tenure);
            cx.guard(GuardOrder::Kill { tenure, seen: claim.tenure.generation }, Pending::Nothing);
        } else if matches!(row.state, VmState::Over(_)) {
            // Ours or nobody's, from a try whose claim landed late: the next generation is claimed.
            self.reclaim(cx, row);
        } else if ours && row.state == VmState::Running {
            // The row of a claim that landed late was given up, and its older one runs on: the next generation gets both.
            if !self.home_moves(cx, row.tenure.vm, claim) {
                self.record_change(cx, row.tenure.vm, claim);
            }
        }
    }

    /// Whether a copy that stands here may go on under the claim after this one, which names nobody (R2): only if nobody can
    /// have run the VM since, else its memory is older than the disks. Between the generation under which it ran and that
    /// of the claim there may be tries of this host, as its rows show; but another's claim may have taken the place of
    /// such a try, and then one more of another's making says "nobody".
    fn is_free_for(&self, row: &RowView, claim: &Claim) -> bool {
        let near = |generation: Generation| claim.tenure.generation <= generation.next();
        let mut rows = self.guard.rows.range(tenure_from(row.tenure.vm)..=row.tenure).rev();
        let ran = rows.find(|(_, row)| row.ran).map(|(tenure, _)| tenure.generation);
        !planted(Mutant::KilledUnclaimed)
            && near(row.tenure.generation)
            && (claim.maker == self.me.host || ran.is_none_or(near))
            && claim.holder == Holder::None
            && claim.wanted == Wanted::Running
    }

    fn row_is_ours(&mut self, cx: &mut Cx, id: VmId, row: &RowView, claim: &Claim) {
        match row.state {
            VmState::Expected => self.take_up_row(cx, id, row),
            VmState::Running if planted(Mutant::ReleasedEarly) && self.shuts_down(id) => {
                self.release(cx, id, claim, Wanted::Stopped, ClaimReason::StoppedInside);
            }
            VmState::Running => {
                self.take_up(cx, id, row);
                self.mark(cx, id, row);
                if self.home_moves(cx, id, claim) {
                    return;
                }
                if claim.tenure.generation < self.floor(claim.home) && self.distrusted(claim.home).is_none() {
                    return self.record_change(cx, id, claim); // Lifted: see `trust`.
                }
                if !self.follow_disks(cx, id, claim) {
                    self.changed_while_it_runs(cx, id, claim);
                }
            }
            VmState::Incoming => {}
            VmState::Over(Over::Lapsed) if row.pid.is_some() => self.reclaim(cx, row),
            VmState::Over(Over::HandedTo(to)) => {
                // The target claims, or the master after a while.
                if self.underway.get(&id) == Some(&Underway::Move { to }) {
                    self.take_up_move(cx, id, row.tenure, to);
                }
            }
            VmState::Over(Over::NeverStarted) => {
                self.release(cx, id, claim, Wanted::Running, ClaimReason::StartFailed);
            }
            VmState::Over(Over::Exited { .. } | Over::Draining | Over::Lapsed) => self.judge_end(cx, id, claim),
        }
    }

    fn shuts_down(&self, id: VmId) -> bool {
        self.libvirt.domains.get(&id).is_some_and(|domain| domain.state == DomainState::ShuttingDown)
    }

    /// A row of a generation above the newest claim, and nothing is under way here: a try whose claim did not come
    /// about, or may still land. The guard bars it; what runs, or should, is claimed with another generation.
    fn row_is_ahead(&mut self, cx: &mut Cx, id: VmId, row: &RowView, claim: Option<&Claim>) {
        let Some(listed) = self.stores.get(&row.home).and_then(|store| store.listed) else {
            return; // The claim is not read yet.
        };
        if self.settings.timing.lease <= cx.now.since(listed) {
            self.list_claims(cx); // It may have been read from a cache that did not know of it.
        }
        match row.state {
            // Its QEMU is alive: the same generation is tried again, under the same row.
            VmState::Expected if row.pid.is_some() && !row.stopped => self.no_row(cx, id, claim),
            VmState::Expected | VmState::Over(_) if row.pid.is_some() => self.reclaim(cx, row),
            VmState::Expected => {
                self.vm(id).pause = cx.now + PATIENCE;
                cx.guard(GuardOrder::Abandon { tenure: row.tenure }, Pending::Nothing);
            }
            VmState::Over(_) => self.no_row(cx, id, claim),
            VmState::Running | VmState::Incoming => {}
        }
    }

    /// An incoming copy that no move of ours knows: this agent was restarted. The source finds it gone and goes on.
    fn stray_copy(&mut self, cx: &mut Cx, id: VmId, row: &RowView) {
        if self.stores.get(&row.home).is_none_or(|store| store.listed.is_none()) {
            return; // A claim that lets it come may not have been read yet.
        }
        self.vm(id).pause = cx.now + PATIENCE;
        if row.pid.is_some() {
            cx.domain(DomainOrder::Destroy { vm: id }, LIST, Pending::Nothing);
        }
        cx.guard(GuardOrder::Abandon { tenure: row.tenure }, Pending::Nothing);
    }

    /// An earlier agent of this host made the row and the claim, and died before the guard knew that both stand.
    pub(super) fn take_up_row(&mut self, cx: &mut Cx, id: VmId, row: &RowView) {
        self.vm(id).pause = cx.now + PATIENCE;
        let epoch = self.guard.leases.get(&row.home).map(|lease| lease.epoch);
        match epoch {
            Some(epoch) if row.pid.is_some() => {
                let order = GuardOrder::Claimed { tenure: row.tenure, epoch, deadline: cx.now + LIST };
                cx.guard(order, Pending::Nothing);
            }
            // Nothing was started yet; should libvirt be about to, the guard ends it.
            Some(_) | None => {
                self.start_is_late(id);
                cx.guard(GuardOrder::Abandon { tenure: row.tenure }, Pending::Nothing);
            }
        }
    }

    /// An earlier agent of this host died between telling libvirt to start or move the VM and its end.
    fn take_up(&mut self, cx: &mut Cx, id: VmId, row: &RowView) {
        let Some(state) = self.libvirt.domains.get(&id).map(|domain| domain.state) else { return };
        match state {
            DomainState::Paused { by_io_error } if by_io_error || self.vm(id).io_error => {
                self.vm(id).io_error = true;
                self.resume_after_error(cx, id, row);
            }
            DomainState::Running if self.vm(id).io_retry <= cx.now => self.vm(id).io_error = false,
            DomainState::Paused { .. } | DomainState::Running | DomainState::ShuttingDown | DomainState::Off(_) => {}
        }
        let Some(underway) = self.underway.get(&id).copied() else { return };
        match underway {
            Underway::Pause => return self.lift_pause(cx, id, row.home, state),
            Underway::End => return self.does_not_end(cx, id),
            Underway::Yield => return self.still_yields(cx, id),
            Underway::Start | Underway::Move { .. } => {}
        }
        match state {
            DomainState::Paused { by_io_error: false } => {
                self.vm(id).pause = cx.now + PATIENCE;
                cx.domain(DomainOrder::Resume { vm: id }, LIST, Pending::Nothing);
                self.list_domains(cx);
            }
            DomainState::Running | DomainState::ShuttingDown | DomainState::Paused { by_io_error: true } => {
                self.set_underway(cx, id, None);
                if let Underway::Move { to } = underway {
                    self.drop_move(cx, row.tenure, to);
                }
            }
            DomainState::Off(_) => {}
        }
    }

    /// An error of its disk has paused it of late, whatever libvirt says now.
    pub(super) fn fails_on_disk(&self, id: VmId) -> bool {
        self.vms.get(&id).is_some_and(|vm| vm.io_error)
    }

    /// QEMU paused it because a write failed (a full datastore): it goes on when the datastore takes writes again.
    fn resume_after_error(&mut self, cx: &mut Cx, id: VmId, row: &RowView) {
        if self.guard.leases.get(&row.home).is_none_or(|lease| lease.until.is_none() || !lease.own_path) {
            return;
        }
        let name = self.vm_name(id);
        if cx.now < self.vm(id).io_retry {
            return;
        }
        let pause = if self.vm(id).no_space { SPACE_RETRY } else { IO_RETRY };
        self.vm(id).io_retry = cx.now + pause;
        cx.note(
            Note::warning("vm-paused-by-error", format!("{name} was paused by an error of its disk; it is resumed"))
                .of(&name),
        );
        cx.domain(DomainOrder::Resume { vm: id }, LIST, Pending::Nothing);
        self.list_domains(cx);
    }

    pub(super) fn reclaim(&mut self, cx: &mut Cx, row: &RowView) {
        let id = row.tenure.vm;
        let home = self.vms.get(&id).and_then(|vm| vm.claim.as_ref()).map_or(row.home, Claim::next_home);
        if self.guard.leases.get(&home).is_some_and(|lease| lease.until.is_some()) {
            if self.may_be_fenced(cx, home, id) {
                return;
            }
            self.begin(cx, id, Kind::Reclaim { old: row.tenure }, home, Vec::new());
        }
    }

    fn no_row(&mut self, cx: &mut Cx, id: VmId, claim: Option<&Claim>) {
        let domain = self.libvirt.domains.get(&id).cloned();
        let alive = domain.as_ref().is_some_and(|domain| !matches!(domain.state, DomainState::Off(_)));
        let host_owns = claim.and_then(Claim::owner).map(|owner| owner.host);
        if alive {
            let Some(Ok(record)) = self.vm(id).record.clone() else { return };
            let home = claim.map_or(record.home, Claim::next_home);
            if self.stores.get(&home).is_none_or(|store| store.listed.is_none()) {
                return; // Whether it has a claim is not known yet.
            }
            // Of a claim that hands it over, the other host: without a row here nothing shows which of the two may run it.
            let other = claim.and_then(|claim| claim.owners().into_iter().find(|owner| owner.host != self.me.host));
            match other {
                Some(owner) => self.runs_twice(cx, id, owner.host),
                None if self.guard.leases.get(&home).is_some_and(|lease| lease.until.is_some()) => {
                    self.begin(cx, id, Kind::Adopt, home, Vec::new());
                }
                None => {}
            }
            return;
        }
        let Some(claim) = claim.cloned() else { return };
        if self.vms.get(&id).is_some_and(|vm| self.is_mine(vm)) {
            self.judge_end(cx, id, &claim);
        } else if let Some(domain) = domain {
            match host_owns {
                Some(owner) if owner != self.me.host => self.remove_stale(cx, id, &domain, &claim),
                Some(_) => {}
                None => self.changed_while_it_stands(cx, id, &domain, &claim),
            }
        }
    }
}

fn tenure_from(vm: VmId) -> Tenure {
    Tenure { vm, generation: Generation(0) }
}
