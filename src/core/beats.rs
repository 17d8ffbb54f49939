//! What this host says of itself: the agent's part of its beats, its score, and attestations for others.
//!
//! Once per beat period, and at once when the role changes, the guard is told what to send.

use super::Core;
use super::cx::{Cx, Pending, Timer};
use super::members::{Peer, low16, low32};
use crate::mutants::{Mutant, planted};
use crate::types::guard::{GuardOrder, LeaseView};
use crate::types::{AgentBeat, Attestation, Attested, Counter, DatastoreSet, Echo, Flags, NetBeat, Score, Time};

impl Core {
    /// A network beat of ours went out.
    pub(super) fn beaten(&mut self, cx: &mut Cx, counter: Counter) {
        let gap = self.settings.timing.suspect <= cx.now.since(self.guard.beaten_at);
        if gap || self.guard.beating.is_none() {
            self.guard.beating = Some(cx.now);
        }
        self.guard.beaten = counter;
        self.guard.beaten_at = cx.now;
    }

    /// If this agent itself was held up (a frozen host, no CPU), nobody's silence meanwhile counts.
    pub(super) fn notice_own_stall(&mut self, now: Time) {
        let period = self.settings.timing.beat;
        let stalled = self.beat_at.is_some_and(|last| period * 2 < now.since(last));
        self.beat_at = Some(now);
        if stalled {
            self.awake_since = now;
        }
    }

    /// Once per beat period: tell the guard the agent's part, look at everybody, elect.
    pub(super) fn beat(&mut self, cx: &mut Cx) {
        cx.set(Timer::Beat, cx.now + self.settings.timing.beat);
        self.notice_own_stall(cx.now);
        self.judge_all(cx);
        self.follow_isolation(cx);
        self.end_quarantines(cx);
        self.follow_findings(cx);
        self.elect(cx);
        if let Some(at) = self.may_lead_at().filter(|at| cx.now < *at) {
            cx.set_earlier(Timer::Beat, at);
        }
        self.tell_beat(cx);
        self.drop_moves_again(cx);
        self.hand_again(cx);
        self.look_at_libvirt(cx);
        self.look_at_datastores(cx);
        self.look_for_access(cx);
        self.follow_wellness(cx.now);
        self.follow_trust_everywhere(cx);
        self.check = true; // Catches what no event told.
        self.look = true;
    }

    /// The agent's part of the beats, now (also at once when the role changes).
    pub(super) fn tell_beat(&mut self, cx: &mut Cx) {
        self.tell_beat_to(cx, Pending::Nothing);
    }

    pub(super) fn tell_beat_to(&mut self, cx: &mut Cx, then: Pending) {
        let beat = AgentBeat {
            role: self.election.role(),
            term: self.election.term(),
            score: self.score(cx.now),
            flags: Flags {
                leaving: self.going_down,
                isolated: self.is_isolated(),
                maintenance: self.in_maintenance(self.me.host),
                ..Flags::default()
            },
            storage_lost: self.lost_datastores(cx.now),
            settings_version: self.settings.version,
            echoes: self.echoes(cx.now),
        };
        cx.guard(GuardOrder::Beat(Box::new(beat)), then);
    }

    pub(super) fn echoes(&self, now: Time) -> Vec<Echo> {
        let recent = |peer: &&Peer| peer.opened.is_some_and(|at| now.since(at) < self.settings.timing.suspect);
        self.peers
            .values()
            .filter(recent)
            .filter_map(|peer| peer.beat.as_ref())
            .map(|beat| Echo {
                index: beat.index,
                incarnation_low: low16(beat.incarnation.0),
                counter_low: low32(beat.counter.0),
            })
            .collect()
    }

    pub(super) fn lost_datastores(&self, now: Time) -> DatastoreSet {
        let mut set = 0;
        for (n, datastore) in self.settings.datastores.iter().enumerate() {
            // A lease that the guard has not told of yet says nothing.
            let new = now.since(self.guard.since) < self.settings.timing.suspect;
            let lost = |lease: &LeaseView| !(lease.own_path || new && lease.written == Time::ZERO);
            if self.guard.leases.get(&datastore.id).is_some_and(lost) {
                set |= 1 << n;
            }
        }
        DatastoreSet(set)
    }

    pub(super) fn score(&self, now: Time) -> Score {
        let reached = self.guard.leases.values().filter(|lease| lease.until.is_some() && lease.own_path).count();
        let minutes = now.since(self.me.started).as_secs() / 60;
        Score {
            datastores: u8::try_from(reached).unwrap_or(u8::MAX),
            available: !self.going_down && !self.in_maintenance(self.me.host),
            priority: 0,
            uptime_bucket: u8::try_from(64 - minutes.leading_zeros()).unwrap_or(0),
            host: self.me.host,
        }
    }

    /// Attestation: persist for others the counters that were heard, and tell the guard what others persisted for us.
    pub(super) fn answer_attestations(&mut self, cx: &mut Cx, beat: &NetBeat) {
        for datastore in self.datastores_in(beat.attest_me) {
            if self.guard.leases.get(&datastore).is_some_and(|lease| lease.own_path) {
                let attestation = Attestation {
                    index: beat.index,
                    incarnation: beat.incarnation,
                    counter: beat.counter,
                    lease: beat.lease,
                };
                cx.guard(GuardOrder::Attest { datastore, attestations: vec![attestation] }, Pending::Nothing);
            }
        }
        let Some(incarnation) = self.guard.incarnation else { return };
        // Counters begin anew with each incarnation: an old answer would vouch for a beat that never was written.
        let ours = |attested: &&Attested| {
            attested.index == self.index
                && (attested.incarnation_low == incarnation.low32() || planted(Mutant::AttestationOfOlder))
        };
        for attested in beat.attested.iter().filter(ours) {
            let Some(datastore) = self.settings.datastores.get(usize::from(attested.datastore)) else { continue };
            let order = GuardOrder::Attested { datastore: datastore.id, incarnation, counter: attested.counter };
            cx.guard(order, Pending::Nothing);
        }
    }
}
