//! What this host knows of each VM: the newest claim, and what is under way about it.
//!
//! Claims only rise: whatever is learned of an older generation changes nothing.

use serde::{Deserialize, Serialize};

use super::Core;
use super::access::Unreachable;
use super::attempt::Attempt;
use super::cx::Cx;
use super::depends::Far;
use super::doubt::PauseCall;
use super::event::AskId;
use super::failback::{Away, by_person};
use super::failover::Placing;
use super::handover::Handover;
use super::homes::Lies;
use super::isolation::Responded;
use super::maintenance::Evacuation;
use super::moving::{Incoming, Moving};
use super::note::Note;
use super::tries::{Tries, ends_tries};
use crate::types::control::{Takes, VmReport};
use crate::types::guests::Inside;
use crate::types::needs::Pages;
use crate::types::vm::OffReason;
use crate::types::{Claim, Digest, Generation, Holder, HostId, Nonce, Proof, Tenure, Time, VmId, VmRecord, Wanted};

/// One VM.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Vm {
    /// Its name, as last heard.
    pub name: String,
    /// Newest claim known.
    pub claim: Option<Claim>,
    /// When that was learned: a proof by lapse needs a complete read that began later.
    pub known: Time,
    /// Another host's proof that the claim of this nonce is over.
    pub passed: Option<(Nonce, Proof)>,
    /// Why its highest claim cannot be read: its owner is unknown.
    pub bad: Option<String>,
    /// What its definition on this host says; or why it cannot be protected.
    pub record: Option<Result<VmRecord, String>>,
    /// Of that record, if there is one.
    pub digest: Option<Digest>,
    /// Where the disks lie that it runs with here.
    pub lies: Option<Lies>,
    /// What people were told of its home.
    pub home_told: Option<String>,
    /// When its definition on this host was last seen to change.
    pub defined: Time,
    /// A record of this digest, that of its definition here, was looked for on its home: whether it is there.
    pub recorded: Option<(Digest, bool)>,
    /// A changed definition is not recorded again before.
    pub change_retry: Time,
    /// The generation that its running domain is marked with.
    pub marked: Option<Generation>,
    /// libvirt is told to mark it with this one.
    pub marking: Option<Generation>,
    /// Not marked again before.
    pub mark_retry: Time,
    /// A restore was allowed because this was its newest claim, then.
    pub restoring: Option<(Generation, Time)>,
    /// A person removed its definition here.
    pub undefined: bool,
    /// What this host does with it now.
    pub attempt: Option<Attempt>,
    /// As master: where it is being started.
    pub placing: Option<Placing>,
    /// As master: where it could not be started, why, and when it is tried again.
    pub tries: Tries,
    /// This host could not open its disks.
    pub unreachable: Option<Unreachable>,
    /// As master: since when its living owner says that it is over.
    pub over_since: Option<Time>,
    /// As master: not tried again before.
    pub retry: Time,
    /// On this host: not looked at again before.
    pub pause: Time,
    /// This host moves it away.
    pub moving: Option<Moving>,
    /// It comes here by migration.
    pub incoming: Option<Incoming>,
    /// A person migrates it.
    pub handover: Handover,
    /// libvirt's reason of its last end here.
    pub ended: Option<(OffReason, Time)>,
    /// When its end was first seen without a reason.
    pub end_seen: Option<Time>,
    /// This agent ended it itself: no person wanted that.
    pub own_end: bool,
    /// Who asked for the shutdown under way: its guest or a person (true), or a signal to its QEMU (false).
    pub by_guest: Option<bool>,
    /// Of which generation's end people were told.
    pub end_told: Option<crate::types::Generation>,
    /// Restarts in place within the last hour.
    pub restarts: Vec<Time>,
    /// People who wait for its stop.
    pub stopping: Vec<AskId>,
    /// What it waits for, for people.
    pub waits: Option<String>,
    /// Why a stale definition of it is kept here.
    pub kept_stale: Option<String>,
    /// The wait that was the last verdict on it: an attempt that fails and is made again is one wait.
    pub waited: Option<String>,
    /// libvirt may still start it here, although that was given up: until its rows may be forgotten.
    pub late: Option<Time>,
    /// It runs here against its claim, which names this host; people were told.
    pub against: Option<HostId>,
    /// An error of its disk paused it, and it was not seen to run for a while since. QEMU tells such errors once a second at
    /// most, and libvirt takes a pause without one for a person's: meanwhile each pause is by error.
    pub io_error: bool,
    /// What it takes, as its host last reported it.
    pub reported: Takes,
    /// As master: its record was asked for its size, and has answered.
    pub sized: Option<bool>,
    /// How far it is inside, while it runs here.
    pub inside: Inside,
    /// As master: since when it has come so far, in this generation.
    pub far: Option<(Generation, Far)>,
    /// As master: its host was told to move it.
    pub evacuation: Option<Evacuation>,
    /// As master: why it was not moved although it should be, and when that is tried again.
    pub stays: Option<(Time, String)>,
    /// A person has put it where it is, as far as this host has read its claims.
    pub by_person: bool,
    /// As master: why it is not brought back to where it belongs.
    pub back: Option<Away>,
    /// As master: nobody is asked again to make room for it before.
    pub room_again: Option<Time>,
    /// As master: when it was moved away from this host, for what was found there.
    pub fled: Option<(Time, HostId)>,
    /// It was told to end: its isolation response, or to make room.
    pub responded: Option<Responded>,
    /// As master: since when only those that it waits for keep it from its start.
    pub held_up: Option<Time>,
    /// Its stale definition is being removed.
    pub undefining: bool,
    /// libvirt's hook asked `migrate`: the `prepare` that follows belongs to that migration, and no other does.
    pub prepare_due: bool,
    /// libvirt is being asked to pause it because of doubt, or to let it go on.
    pub pause_call: Option<PauseCall>,
    /// When a pause because of doubt can no longer show; none = not known yet.
    pub pause_over: Option<Time>,
    /// Its last I/O error was that there is no space.
    pub no_space: bool,
    /// QEMU paused it for an I/O error: not resumed again before.
    pub io_retry: Time,
    /// Of which generation people were told that the guard holds it against a resume.
    pub held: Option<crate::types::Generation>,
}

impl Vm {
    /// What the newest claim wants.
    #[must_use]
    pub fn wanted(&self) -> Option<Wanted> {
        self.claim.as_ref().map(|claim| claim.wanted)
    }
    /// What it takes of its host: from its definition here, else as its host reported it.
    #[must_use]
    pub fn takes(&self) -> Takes {
        self.definition().map_or_else(|| self.reported.clone(), Takes::of)
    }
    /// Guest memory in KiB, likewise.
    #[must_use]
    pub fn memory_kib(&self) -> u64 {
        self.definition().map_or(self.reported.memory_kib, |record| record.memory_kib)
    }
    /// Virtual CPUs, likewise.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        self.definition().map_or(self.reported.vcpus, |record| record.vcpus)
    }
    /// Where its memory lies, likewise.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.definition().map_or(self.reported.needs.pages, |record| record.needs.pages)
    }
    /// Whether it needs this bridge, libvirt network or network device.
    #[must_use]
    pub fn uses_network(&self, name: &str) -> bool {
        let needs = self.definition().map_or(&self.reported.needs, |record| &record.needs);
        needs.networks.iter().any(|need| need == name)
    }
    fn definition(&self) -> Option<&VmRecord> {
        self.record.as_ref().and_then(|record| record.as_ref().ok())
    }
    /// (v, g) of the newest claim.
    #[must_use]
    pub fn tenure(&self) -> Option<Tenure> {
        self.claim.as_ref().map(|claim| claim.tenure)
    }
}

impl Core {
    pub(super) fn vm(&mut self, id: VmId) -> &mut Vm {
        self.vms.entry(id).or_default()
    }

    /// It is called so.
    pub(super) fn named(&mut self, id: VmId, name: &str) {
        let vm = self.vm(id);
        if vm.name != name {
            name.clone_into(&mut vm.name);
            self.meaning.1 = true;
        }
    }

    pub(super) fn vm_name(&self, id: VmId) -> String {
        self.vms.get(&id).map(|vm| vm.name.clone()).filter(|name| !name.is_empty()).unwrap_or_else(|| id.to_string())
    }

    /// Takes in a claim that exists. An older one than known changes nothing.
    pub(super) fn learn(&mut self, cx: &mut Cx, claim: Claim, at: Time) {
        let me = self.me.host;
        let id = claim.tenure.vm;
        if self.vm(id).name.is_empty() {
            self.named(id, &claim.name);
        }
        let newest = self.vm(id).claim.as_ref().map(|known| known.tenure.generation);
        if newest.is_some_and(|known| claim.tenure.generation <= known) {
            return;
        }
        let mine = claim.names(me);
        self.named(id, &claim.name);
        let vm = self.vm(id);
        let theirs = vm.claim.as_ref().is_some_and(|known| known.names(me)) && !mine;
        vm.bad = None;
        vm.over_since = None;
        vm.known = at;
        vm.by_person = by_person(claim.reason).unwrap_or(vm.by_person);
        if ends_tries(claim.reason) {
            vm.tries = Tries::default();
        }
        if !mine {
            vm.ended = None;
        }
        let text = format!("{}: generation {} {}", claim.name, claim.tenure.generation, self.holder_text(&claim));
        self.vm(id).claim = Some(claim);
        if theirs && newest.is_some() {
            let name = self.vm_name(id);
            cx.note(Note::info("claim", text).of(&name));
        }
        self.check = true;
        self.look = true;
        self.tell = true;
    }

    /// The highest claim of a VM cannot be read: its owner is unknown, nobody takes it.
    pub(super) fn bad_claim(&mut self, cx: &mut Cx, id: VmId, why: &str) {
        let vm = self.vm(id);
        if vm.bad.as_deref() == Some(why) {
            return;
        }
        vm.bad = Some(why.to_owned());
        let name = self.vm_name(id);
        let text = format!(
            "{name}: its newest claim cannot be used ({why}); its owner is unknown, so nothing is started until an \
             operator has mended the file"
        );
        cx.note(Note::alarm("claim-unreadable", text).of(&name));
    }

    pub(super) fn holder_text(&self, claim: &Claim) -> String {
        let holder = match claim.owners()[..] {
            [owner] => match claim.holder {
                Holder::Moved { to, .. } => {
                    format!("owned by {}, its home moves to {}", self.name_of(owner.host), self.store_name(to))
                }
                _ => format!("owned by {}", self.name_of(owner.host)),
            },
            [from, to, ..] => format!("handed from {} to {}", self.name_of(from.host), self.name_of(to.host)),
            [] if claim.holder == Holder::Deleted => "owned by nobody, gone".to_owned(),
            [] => match claim.wanted {
                Wanted::Running => "owned by nobody, wanted running".to_owned(),
                Wanted::Stopped => "owned by nobody, wanted stopped".to_owned(),
            },
        };
        format!("{holder} ({})", reason_text(claim.reason))
    }

    /// Whether the newest claim gives the VM to this host in this boot.
    pub(super) fn is_mine(&self, vm: &Vm) -> bool {
        vm.claim.as_ref().is_some_and(|claim| self.is_ours(claim))
    }

    /// Whether a claim names this host in this boot.
    pub(super) fn is_ours(&self, claim: &Claim) -> bool {
        claim.owner().is_some_and(|owner| owner.host == self.me.host && owner.boot == self.me.boot)
    }

    /// Another host said what it has; its claims are true, its states are its own.
    pub(super) fn reported(&mut self, cx: &mut Cx, from: HostId, report: crate::types::control::HostReport) {
        let behind = self.is_behind(from);
        for vm in &report.vms {
            if let Some(claim) = vm.claim.as_ref().filter(|_| !behind) {
                let known = cx.now;
                self.learn(cx, claim.clone(), known);
            }
            if 0 < vm.takes.memory_kib {
                self.vm(vm.vm).reported = vm.takes.clone();
            }
        }
        for (claim, proof) in report.over.iter().filter(|_| !behind) {
            self.passed(cx, claim.clone(), *proof);
        }
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.report = Some(report);
        }
        self.look = true;
    }

    /// What a host reported of a VM.
    pub(super) fn report_of(&self, host: HostId, vm: VmId) -> Option<&VmReport> {
        self.peers.get(&host)?.report.as_ref()?.vms.iter().find(|report| report.vm == vm)
    }
}

/// A claim's reason in words.
pub(super) fn reason_text(reason: crate::types::ClaimReason) -> &'static str {
    use crate::types::ClaimReason as R;
    match reason {
        R::Adopted => "it ran when it became protected",
        R::Registered => "registered",
        R::StartedByPerson => "started by a person",
        R::Failover => "taken over",
        R::Crashed => "restarted after a crash",
        R::Reclaimed => "goes on after its lease lapsed",
        R::Migrated => "moved",
        R::StartFailed => "a start failed",
        R::StoppedByPerson => "stopped by a person",
        R::StoppedInside => "its guest shut down",
        R::HostWentDown => "its host went down",
        R::Deleted => "deleted",
        R::RecordChanged => "its definition changed",
        R::Saved => "its memory was saved",
        R::HandedOver => "migrated by a person",
        R::MigratedAway => "migrated away by a person",
        R::HomeMoved => "its home moved",
        R::Isolated => "its host was isolated",
        R::Planned => "moved by the cluster",
        R::MadeRoom => "it made room for others",
    }
}
