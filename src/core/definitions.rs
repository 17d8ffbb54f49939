//! Definitions on this host: a change reaches the protection record, and one that was left behind goes.
//!
//! ```text
//!   defined here anew ─► 1 s without another change ─┬─ runs here under our claim ─► Change: record, then claim g+1
//!                                                    └─ stands, stopped here last ──► Change: record, then claim g+1
//!   defined here, claim names another ─► 1 s, claims read anew ─► its record was written once ─► undefined
//!                                                                 └ never ─► kept, a person is told   (nothing is lost)
//! ```
//!
//! A record is named by its digest, and the claim carries it: so a changed record needs a claim. The VM runs on
//! meanwhile: its row g vouches for it until the guard has row g+1 with a claim (R5), and if anything fails it goes on
//! under g, and the change is tried again.
//!
//! Of a VM that stands, only the host whose claim says that it is stopped looks at its definition; and only one that was
//! never recorded is a change, for an older record may have come here with an earlier owner.
//!
//! Deliberately not here: how a claim is made (`attempt`), what a definition says (`exec/libvirt`).

use std::time::Duration;

use super::Core;
use super::attempt::Kind;
use super::cx::{Cx, Pending, Timer};
use super::note::Note;
use crate::types::store::{StoreAnswer, StoreFailure, StoreOrder};
use crate::types::vm::{DomainAnswer, DomainInfo, DomainOrder, DomainState};
use crate::types::{Claim, ClaimReason, Digest, Holder, Time, VmId, VmRecord, Wanted};
use crate::wire::record::{digest, encode_record};

/// Several changes in a row make one claim: it waits until none came for so long.
pub(super) const SETTLED: Duration = Duration::from_secs(1);
/// A change that could not be recorded is tried again after this.
const CHANGE_RETRY: Duration = Duration::from_secs(5);
/// A stale definition that libvirt would not remove is left alone for so long.
const STALE_RETRY: Duration = Duration::from_secs(60);
/// libvirt's time to remove a definition.
const UNDEFINE: Duration = Duration::from_secs(10);

impl Core {
    /// What the definition here says now.
    pub(super) fn define_record(&mut self, now: Time, id: VmId, record: Result<VmRecord, String>) {
        let vm = self.vm(id);
        if vm.record.as_ref() == Some(&record) {
            return;
        }
        vm.digest = record.as_ref().ok().and_then(|record| encode_record(record).ok()).map(|bytes| digest(&bytes));
        vm.record = Some(record);
        vm.defined = now;
    }

    /// It runs here under our claim: does that claim carry what is defined here?
    pub(super) fn changed_while_it_runs(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) {
        let Some(domain) = self.libvirt.domains.get(&id) else { return };
        // Paused it may be on its way into a file, and that image must not outlive its generation.
        let runs = domain.state == DomainState::Running && domain.persistent;
        if runs && self.vm(id).digest.is_some_and(|digest| digest != claim.record) {
            self.record_change(cx, id, claim);
        }
    }

    /// It stands here, and nobody owns it. If this host stopped it, a change that was never recorded is people's.
    pub(super) fn changed_while_it_stands(&mut self, cx: &mut Cx, id: VmId, domain: &DomainInfo, claim: &Claim) {
        let saved = claim.reason == ClaimReason::Saved; // Another claim would make its image useless.
        let ours = claim.maker == self.me.host && claim.holder == Holder::None && claim.wanted == Wanted::Stopped;
        let off = matches!(domain.state, DomainState::Off(_)) && domain.persistent;
        let Some(here) = self.vm(id).digest.filter(|digest| *digest != claim.record) else { return };
        if ours && off && !saved && self.was_recorded(cx, id, here, claim) == Some(false) {
            self.record_change(cx, id, claim);
        }
    }

    /// Begins the claim that carries the record of what is defined here, as soon as it may be made.
    pub(super) fn record_change(&mut self, cx: &mut Cx, id: VmId, claim: &Claim) {
        let writable = self.guard.leases.get(&claim.home).is_some_and(|lease| lease.until.is_some() && lease.own_path);
        let known = matches!(self.vm(id).record, Some(Ok(_)));
        // While it is handed over, or its home moves, others make the next claim.
        let may = match claim.holder {
            Holder::None => true,
            Holder::Host(owner) => owner.host == self.me.host,
            Holder::Handover { .. } | Holder::Moved { .. } | Holder::Deleted => false,
        };
        if !may || self.going_down || self.underway.contains_key(&id) || !known || !writable {
            return;
        }
        let at = self.vm(id).change_retry.max(self.vm(id).defined + SETTLED);
        if cx.now < at {
            return cx.set(Timer::Judge(id), at);
        }
        self.begin(cx, id, Kind::Change, claim.home, Vec::new());
    }

    /// The change is not recorded; the VM goes on as it is.
    pub(super) fn change_failed(&mut self, cx: &mut Cx, id: VmId, kind: &Kind, why: &str) {
        let at = cx.now + CHANGE_RETRY;
        let name = self.vm_name(id);
        self.vm(id).change_retry = at;
        cx.set(Timer::Judge(id), at);
        let what = match kind {
            Kind::Leave { to } => {
                format!("its home has not followed its disks to datastore {} yet", self.store_name(*to))
            }
            _ => "its changed definition is not recorded yet".to_owned(),
        };
        let text = format!(
            "{name}: {what} ({why}); it goes on, but a failover would start it as it was before; tried again in {} s",
            CHANGE_RETRY.as_secs()
        );
        cx.note(Note::warning("vm-change", text).of(&name));
        self.check = true;
    }

    /// Whether a record like the definition here was ever written; none = not known yet, it is looked for.
    fn was_recorded(&mut self, cx: &mut Cx, id: VmId, here: Digest, claim: &Claim) -> Option<bool> {
        if here == claim.record {
            return Some(true);
        }
        if let Some((digest, there)) = self.vm(id).recorded
            && digest == here
        {
            return Some(there);
        }
        let within = self.settings.timing.lease;
        self.vm(id).pause = cx.now + within;
        let order = StoreOrder::ReadRecord { vm: id, digest: here };
        cx.store(claim.next_home(), order, within, Pending::Recorded(id, here));
        None
    }

    pub(super) fn record_looked_for(&mut self, id: VmId, digest: Digest, answer: &StoreAnswer) {
        let there = match answer {
            StoreAnswer::Record(_) => true,
            StoreAnswer::Failed(StoreFailure::Missing { .. }) => false,
            _ => return, // Not known; asked again after the pause.
        };
        let vm = self.vm(id);
        vm.recorded = Some((digest, there));
        vm.pause = Time::ZERO;
        self.check = true;
    }

    /// A definition left behind: removed when a record shows that nothing would be lost.
    pub(super) fn remove_stale(&mut self, cx: &mut Cx, id: VmId, domain: &DomainInfo, claim: &Claim) {
        if self.vm(id).undefining || !domain.persistent {
            return;
        }
        // What has just been defined is a person's, who may be about to start it, and knows better whether it runs elsewhere:
        // only a claim that was read since then shows that it was left behind.
        let settled = self.vm(id).defined + SETTLED;
        if self.stores.get(&claim.home).and_then(|store| store.listed).is_none_or(|listed| listed < settled) {
            if settled <= cx.now {
                self.list_claims(cx);
            }
            return;
        }
        let generation = claim.tenure.generation;
        let same = match self.vm(id).digest {
            Some(here) => self.was_recorded(cx, id, here, claim),
            None => Some(false),
        };
        let what = match same {
            None => return,
            Some(false) => format!("its definition here differs from the one that generation {generation} runs with"),
            Some(true) if domain.managed_save => {
                format!("a saved image of it lies here, older than its disks: it ran since (generation {generation})")
            }
            Some(true) => {
                self.vm(id).undefining = true;
                cx.domain(DomainOrder::Undefine { vm: id }, UNDEFINE, Pending::Undefine(id));
                return;
            }
        };
        if self.vm(id).kept_stale.as_ref() != Some(&what) {
            let name = self.vm_name(id);
            let cure = if domain.managed_save { " --managed-save" } else { "" };
            let text = format!(
                "{name}: {what}; the definition is kept; remove it with 'virsh undefine {name}{cure}' when it is not needed"
            );
            cx.note(Note::warning("stale-definition", text).of(&name));
            self.vm(id).kept_stale = Some(what);
        }
    }

    /// A person has removed the definition of a VM that was stopped here, and libvirt lists it no more: it is deleted. Its
    /// claims stay, so that a new one with its id counts on.
    pub(super) fn note_deleted(&mut self, cx: &mut Cx) {
        let mut gone = Vec::new();
        for (id, vm) in self.vms.iter().filter(|(_, vm)| vm.undefined && vm.attempt.is_none() && vm.incoming.is_none())
        {
            let ours = |claim: &&Claim| claim.maker == self.me.host && claim.holder == Holder::None;
            let stopped = vm.claim.as_ref().filter(ours).filter(|claim| claim.wanted == Wanted::Stopped);
            if let Some(claim) = stopped.filter(|_| !self.libvirt.domains.contains_key(id)) {
                gone.push((*id, claim.home));
            }
        }
        for (id, home) in gone {
            let kind = Kind::Release { wanted: Wanted::Stopped, reason: ClaimReason::Deleted };
            self.begin(cx, id, kind, home, Vec::new());
        }
    }

    pub(super) fn undefined(&mut self, cx: &mut Cx, id: VmId, answer: &DomainAnswer) {
        self.vm(id).undefining = false;
        let name = self.vm_name(id);
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => {
                cx.note(
                    Note::info("stale-definition", format!("{name}: its stale definition here was removed")).of(&name),
                );
                self.libvirt.domains.remove(&id);
                self.list_domains(cx);
            }
            DomainAnswer::Failed(_) => self.vm(id).pause = cx.now + STALE_RETRY,
        }
    }
}
