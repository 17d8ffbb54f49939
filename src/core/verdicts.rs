//! What was decided, and on which evidence: of hosts, of places for VMs, of VMs that wait.
//!
//! ```text
//!   a host's verdict changes ──► host-dead, host-live, …    its beats on the network and on each datastore, the windows
//!   the master orders a start ─► vm-placed                  the proof, and why on no other host
//!   a VM begins to wait ───────► vm-waits                   its claim, its owner, who cannot take it and why
//!   and waits no more ─────────► vm-goes-on                 for what it had waited
//! ```
//!
//! A verdict is told with the action `Verdict`, once, when it is given; whoever carries that out keeps it. Words are made only when
//! something changes. Nothing here decides anything.

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::Cx;
use super::members::Verdict;
use crate::types::{Claim, Freshness, HostId, Time, VerdictId, VmId};

/// A verdict that was given.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Given {
    /// Its number: unique among those of this host, rising.
    pub id: VerdictId,
    /// What was decided.
    pub kind: Kind,
    /// The host that it is about: that was judged, or that shall run a VM.
    pub host: Option<String>,
    /// The VM that it is about.
    pub vm: Option<String>,
    /// One line.
    pub text: String,
    /// What it rests on, a line for each thing.
    pub evidence: Vec<String>,
}

/// What was decided.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// How a host is.
    Host(Verdict),
    /// Where a VM is started.
    Placed,
    /// A VM waits.
    Waits,
    /// It waits no more.
    GoesOn,
}

impl Kind {
    /// As it is called in notes and lists.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Host(verdict) => format!("host-{verdict}"),
            Self::Placed => "vm-placed".to_owned(),
            Self::Waits => "vm-waits".to_owned(),
            Self::GoesOn => "vm-goes-on".to_owned(),
        }
    }

    /// People will want to know exactly how it came about.
    #[must_use]
    pub fn matters(&self) -> bool {
        match self {
            Self::Host(verdict) => match verdict {
                Verdict::Dead | Verdict::Isolated | Verdict::Partitioned | Verdict::StorageLost(_) => true,
                Verdict::Live | Verdict::AgentFailed | Verdict::Left | Verdict::Unknown => false,
            },
            Self::Placed => true,
            Self::Waits | Self::GoesOn => false,
        }
    }
}

/// Words of a wait that change all the time come behind a colon: before it they say whether it is the same wait.
fn same_wait(one: &str, other: &str) -> bool {
    let kind = |what: &str| what.split_once(':').map_or(what.len(), |(kind, _)| kind.len());
    one[..kind(one)] == other[..kind(other)]
}

impl Core {
    /// A host is judged anew.
    pub(super) fn host_judged(&self, cx: &mut Cx, host: HostId, verdict: &Verdict, text: &str) -> VerdictId {
        let evidence = self.evidence_on(host, cx.now);
        cx.verdict(Kind::Host(verdict.clone()), Some(self.name_of(host)), None, text, evidence)
    }

    /// A VM waits for that, from now on or still.
    pub(super) fn waits_for(&mut self, cx: &mut Cx, id: VmId, what: String) -> Option<VerdictId> {
        let verdict = self.wait_given(cx, id, &what);
        self.vm(id).waits = Some(what);
        verdict
    }

    /// If these words are another wait than the one that was told last, it is a verdict.
    pub(super) fn wait_given(&mut self, cx: &mut Cx, id: VmId, what: &str) -> Option<VerdictId> {
        if self.vm(id).waited.as_ref().is_some_and(|before| same_wait(before, what)) {
            return None;
        }
        self.vm(id).waited = Some(what.to_owned());
        let name = self.vm_name(id);
        let text = format!("{name} waits for {what}");
        let evidence = self.evidence_on_vm(id, cx.now);
        Some(cx.verdict(Kind::Waits, None, Some(name), &text, evidence))
    }

    /// A VM waits for nothing now.
    pub(super) fn waits_no_more(&mut self, cx: &mut Cx, id: VmId) {
        let vm = self.vm(id);
        vm.waits = None;
        let Some(what) = vm.waited.take() else { return };
        let name = self.vm_name(id);
        let evidence = vec![format!("it had waited for {what}")];
        cx.verdict(Kind::GoesOn, None, Some(name.clone()), &format!("{name} waits no more"), evidence);
    }

    /// What the verdict on a host rests on, a line for each thing.
    fn evidence_on(&self, host: HostId, now: Time) -> Vec<String> {
        let ago = |at: Time| format!("{:.1} s ago", now.since(at).as_secs_f64());
        let timing = &self.settings.timing;
        let peer = self.peers.get(&host);
        let beat = peer.and_then(|peer| peer.beat.as_ref());
        let network = match peer.map(|peer| (peer.opened, peer.heard)) {
            None | Some((None, _)) => "network: no beat was heard since this agent started".to_owned(),
            Some((Some(opened), None)) => {
                format!("network: its newest beat came {}, but it has never said that it hears this host", ago(opened))
            }
            Some((Some(opened), Some(heard))) => {
                format!("network: its newest beat came {}, and it last heard this host {}", ago(opened), ago(heard))
            }
        };
        let mut lines = vec![network];
        if let Some(beat) = beat {
            let lost = self.datastores_in(beat.agent.storage_lost);
            let lost: Vec<String> = lost.into_iter().map(|id| self.store_name(id)).collect();
            let lost = if lost.is_empty() { String::new() } else { format!("; it lost {}", lost.join(", ")) };
            lines.push(format!(
                "that beat: counter {}, incarnation {}, flags {}{lost}",
                beat.counter, beat.incarnation, beat.agent.flags
            ));
        }
        lines.push(format!(
            "silence counts after {:.1} s; this host was awake to hear since {}",
            timing.suspect.as_secs_f64(),
            ago(self.awake_since)
        ));
        lines.extend(self.stores.keys().map(|id| self.evidence_by(*id, host, now)));
        lines
    }

    /// What one datastore shows of a host.
    fn evidence_by(&self, id: crate::types::DatastoreId, host: HostId, now: Time) -> String {
        let name = self.store_name(id);
        let Some(store) = self.stores.get(&id) else { return format!("{name}: not known here") };
        let read = match (store.read_at(), self.reads_well(id, now)) {
            (None, _) => "never read here".to_owned(),
            (Some(at), true) => format!("read here {:.1} s ago", now.since(at).as_secs_f64()),
            (Some(at), false) => {
                format!("last read here {:.1} s ago, which is no good witness", now.since(at).as_secs_f64())
            }
        };
        let Some(beat) = store.newest_of(host) else { return format!("{name}: it never beat there; {read}") };
        let age = store.age_of(host, now).unwrap_or_default().as_secs_f64();
        let fresh = match self.freshness(id, host, now) {
            Some(Freshness::Fresh) => "fresh",
            Some(Freshness::Stale) => "stale",
            Some(Freshness::Unknown) | None => "unknown",
        };
        let window =
            store.window_of(host).map(|window| format!("; a lapse needs {:.2} s of silence", window.as_secs_f64()));
        let quiet = store.quiet(host).map(|(_, span)| format!(", {:.2} s are shown", span.as_secs_f64()));
        format!(
            "{name}: {fresh}: newest beat {age:.1} s ago (counter {}, incarnation {}, flags {}); {read}{}{}",
            beat.counter,
            beat.incarnation,
            beat.flags,
            window.unwrap_or_default(),
            quiet.unwrap_or_default()
        )
    }

    /// What is known of a VM that waits.
    fn evidence_on_vm(&self, id: VmId, now: Time) -> Vec<String> {
        let Some(vm) = self.vms.get(&id) else { return Vec::new() };
        let Some(claim) = &vm.claim else { return vec!["no claim of it is known".to_owned()] };
        let mut lines = vec![self.claim_line(claim)];
        if let Some(owner) = claim.owner().filter(|owner| owner.host != self.me.host) {
            lines.push(format!("its owner {}: {}", self.name_of(owner.host), self.evidence(owner.host, now)));
        }
        lines.extend(
            self.proof_of(claim, vm.known, now).map(|proof| format!("over: {}", self.proof_text(claim, proof))),
        );
        lines.extend(vm.tries.barred().map(|(host, why)| format!("failed on {}: {why}", self.name_of(host))));
        lines
    }

    /// The newest claim in words.
    pub(super) fn claim_line(&self, claim: &Claim) -> String {
        let home = self.store_name(claim.home);
        format!("newest claim: generation {} on {home}, {}", claim.tenure.generation, self.holder_text(claim))
    }
}

#[cfg(test)]
mod tests {
    use super::same_wait;

    #[test]
    fn only_other_words_before_the_colon_are_another_wait() {
        for (one, other, expected) in [
            ("a place: a 5 MiB short", "a place: a 6 MiB short", true),
            ("a place: a 5 MiB short", "its turn: 4 starts at once on a", false),
            ("the lease of a to lapse", "the lease of b to lapse", false),
            ("the lease of a to lapse", "the lease of a to lapse", true),
            ("a place", "a place: of b", true),
        ] {
            assert_eq!(same_wait(one, other), expected, "{one} / {other}");
        }
    }
}
