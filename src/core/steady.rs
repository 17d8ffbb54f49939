//! Hosts that come and go, and hosts that go all at once.
//!
//! ```text
//!   silent ─► live again, the RETURNSth time within an hour ─► quarantined: it beats and runs what it has, and nothing is placed on it
//!                                                                 └─ stable for STABLE, or an operator's word ─► as before
//!   more than half of the hosts fall silent within a suspect time ─► nothing is taken and nobody is switched off for one more L
//! ```
//!
//! Every host keeps count by what it hears itself, so that a new master knows, too. Both only delay: what is safe is decided elsewhere.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Timer};
use super::members::Verdict;
use super::note::Note;
use crate::types::{HostId, Time};

/// So many returns within `WITHIN`.
const RETURNS: usize = 3;
const WITHIN: Duration = Duration::from_secs(3600);
/// A quarantine ends when nothing has happened for so long.
const STABLE: Duration = Duration::from_secs(1800);

/// How steady one host is.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Steady {
    /// When it came back, lately.
    returns: Vec<Time>,
    /// It is quarantined until then.
    quarantined: Option<Time>,
    /// When it was lost, if it is.
    lost: Option<Time>,
    /// So many were lost with it that it was this host that was cut off: no fault of that one.
    ours: bool,
}

/// Too many hosts were lost at once.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Storm {
    until: Time,
    lost: usize,
    told: bool,
}

impl Core {
    /// A verdict on a host has changed.
    pub(super) fn follow_steadiness(&mut self, cx: &mut Cx, host: HostId, before: &Verdict) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        let gone = |verdict: &Verdict| matches!(verdict, Verdict::Dead | Verdict::Partitioned | Verdict::Isolated);
        let steady = &mut peer.steady;
        if gone(&peer.verdict) || peer.verdict == Verdict::Unknown {
            // Whom it has never heard it has not lost.
            if matches!(before, Verdict::Live | Verdict::AgentFailed | Verdict::StorageLost(_)) {
                steady.lost = Some(cx.now);
                self.count_lost(cx);
            }
            return;
        }
        steady.lost = None;
        if peer.verdict != Verdict::Live || !gone(before) || std::mem::take(&mut steady.ours) {
            return;
        }
        steady.returns.retain(|at| cx.now.since(*at) < WITHIN);
        steady.returns.push(cx.now);
        if steady.returns.len() < RETURNS {
            return;
        }
        let first = steady.quarantined.replace(cx.now + STABLE).is_none();
        if first {
            let name = self.name_of(host);
            let text = format!(
                "host {name} has come back {RETURNS} times within an hour: nothing is placed on it until it was stable for {} minutes \
                 (mainstay host release {name} ends that)",
                STABLE.as_secs() / 60
            );
            cx.note(Note::warning("host-quarantined", text));
        }
    }

    /// Nothing is placed on it now.
    pub(super) fn is_quarantined(&self, host: HostId, now: Time) -> bool {
        let until = self.peers.get(&host).and_then(|peer| peer.steady.quarantined);
        until.is_some_and(|until| now < until)
    }

    /// With every beat: who has been stable.
    pub(super) fn end_quarantines(&mut self, cx: &mut Cx) {
        let over = |peer: &super::members::Peer| peer.steady.quarantined.is_some_and(|until| until <= cx.now);
        let stable: Vec<HostId> = self.peers.iter().filter(|(_, peer)| over(peer)).map(|(host, _)| *host).collect();
        for host in stable {
            let text = format!("host {} was stable for {} minutes", self.name_of(host), STABLE.as_secs() / 60);
            self.end_quarantine(cx, host, text);
        }
    }

    /// VMs may be placed on it again.
    pub(super) fn end_quarantine(&mut self, cx: &mut Cx, host: HostId, why: String) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        peer.steady.returns.clear();
        if peer.steady.quarantined.take().is_some() {
            cx.note(Note::info("host-released", format!("{why}: VMs may be placed on it again")));
            self.look = true;
        }
    }

    fn count_lost(&mut self, cx: &mut Cx) {
        let at_once = self.settings.timing.suspect;
        let lately = |peer: &&super::members::Peer| peer.steady.lost.is_some_and(|at| cx.now.since(at) < at_once);
        let (lost, all) = (self.peers.values().filter(lately).count(), self.settings.members.len());
        if all < lost * 2 {
            self.peers.values_mut().filter(|peer| peer.steady.lost.is_some()).for_each(|peer| peer.steady.ours = true);
        }
        if all < lost * 2 && self.storm.is_none_or(|storm| storm.until <= cx.now) {
            self.storm = Some(Storm { until: cx.now + self.settings.timing.lease, lost, told: false });
        }
    }

    /// Whether nothing is done now about a host that was lost; said when it matters for the first time.
    pub(super) fn holds_back(&mut self, cx: &mut Cx, host: HostId) -> bool {
        let Some(storm) = self.storm.as_mut().filter(|storm| cx.now < storm.until) else { return false };
        let (until, lost, told) = (storm.until, storm.lost, std::mem::replace(&mut storm.told, true));
        cx.set_earlier(Timer::Power(host), until); // To look again.
        if !told {
            let (all, seconds) = (self.settings.members.len(), until.since(cx.now).as_secs_f64());
            let text = format!(
                "{lost} of {all} hosts were lost at once: nothing is taken over and nobody is switched off for {seconds:.1} s; if they \
                 run, it is the network of this host that is broken"
            );
            cx.note(Note::alarm("hosts-lost-at-once", text));
        }
        true
    }
}
