//! Members: who is heard, and what a master believes of each (the verdict table of design 3).
//!
//! ```text
//!   heard ──suspect time──► silent ──► partitioned / isolated   (fresh on a datastore)
//!     ▲                       │
//!     └───────── heard ───────┴──────► dead                     (stale somewhere, fresh nowhere)
//! ```
//!
//! A peer counts as heard only when it echoes this host's present incarnation with a recent counter, so a one-way link
//! is silence. A verdict is never a proof.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Core;
use super::action::Action;
use super::cx::{Cx, Pending, Timer};
use super::note::Note;
use crate::types::needs::HostMeans;
use crate::types::settings::MemberSettings;
use crate::types::vm::HostCapacity;
use crate::types::{DatastoreId, DatastoreSet, Flags, Freshness, HostId, NetBeat, Time};

/// One other host.
#[derive(Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Its newest beat.
    pub beat: Option<NetBeat>,
    /// When a beat was last opened, whether it echoes us or not.
    pub opened: Option<Time>,
    /// When it was last heard (opened, and it hears us).
    pub heard: Option<Time>,
    /// What was last noted of it.
    pub verdict: Verdict,
    /// Since when.
    pub since: Time,
    /// What it reported to its master.
    pub report: Option<crate::types::control::HostReport>,
    /// How steady it is.
    pub steady: super::steady::Steady,
}

impl Peer {
    /// Nothing known yet.
    #[must_use]
    pub fn new(now: Time) -> Self {
        let (verdict, steady) = (Verdict::Unknown, super::steady::Steady::default());
        Self { beat: None, opened: None, heard: None, verdict, since: now, report: None, steady }
    }
    fn heard_now(&self, now: Time, suspect: std::time::Duration) -> Option<Time> {
        self.heard.filter(|at| now.since(*at) < suspect)
    }
}

/// What a master believes of a host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Verdict {
    /// Heard, nothing wrong.
    Live,
    /// Heard from the guard only.
    AgentFailed,
    /// Heard, but without these datastores.
    StorageLost(Vec<DatastoreId>),
    /// Silent, but fresh on a datastore.
    Partitioned,
    /// Silent, fresh on a datastore, and says it hears nobody.
    Isolated,
    /// Silent, stale on at least one datastore, fresh on none.
    Dead,
    /// Went down in order.
    Left,
    /// Silent, and nobody of this partition reads a datastore that it beats on.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::AgentFailed => "agent-failed",
            Self::StorageLost(_) => "storage-lost",
            Self::Partitioned => "partitioned",
            Self::Isolated => "isolated",
            Self::Dead => "dead",
            Self::Left => "left",
            Self::Unknown => "unknown",
        })
    }
}

/// What the verdict table looks at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signs {
    /// Heard within the suspect time; with these flags and lost datastores.
    pub heard: Option<(Flags, Vec<DatastoreId>)>,
    /// Newest flags that it wrote to a datastore.
    pub flags: Flags,
    /// Per datastore on which it beats.
    pub beats: Vec<Freshness>,
}

/// The verdict table.
#[must_use]
pub fn judge(signs: &Signs) -> Verdict {
    let fresh = signs.beats.contains(&Freshness::Fresh);
    let stale = signs.beats.contains(&Freshness::Stale);
    match &signs.heard {
        Some((flags, _)) if flags.leaving => Verdict::Left,
        Some((flags, _)) if flags.agent_dead => Verdict::AgentFailed,
        Some((_, lost)) if !lost.is_empty() => Verdict::StorageLost(lost.clone()),
        Some(_) => Verdict::Live,
        None if fresh && signs.flags.isolated => Verdict::Isolated,
        None if fresh && signs.flags.leaving => Verdict::Left,
        None if fresh => Verdict::Partitioned,
        None if stale => Verdict::Dead,
        None => Verdict::Unknown,
    }
}

/// How many of our own beats a peer may be behind in its echo.
const ECHO_LAG: u32 = 8;

/// Whether an echo names about the counter that was given to our last beat. It may be ahead: the peer answers a beat of
/// which our own guard has not told us yet.
fn is_recent(beaten: u32, echoed: u32, most: u32) -> bool {
    beaten.wrapping_sub(echoed).cast_signed().unsigned_abs() <= most
}

impl Core {
    pub(super) fn heard(&mut self, cx: &mut Cx, beat: NetBeat) {
        let me = self.me.host;
        if beat.host == me || self.settings.member(beat.host).is_none_or(|member| member.index != beat.index) {
            return; // A stranger, or a place that the settings give to another host: counted by the receiver.
        }
        self.saw_boot(beat.host, beat.incarnation, beat.boot);
        self.shows_life(cx, beat.host, beat.boot, cx.now);
        self.answer_attestations(cx, &beat);
        let echoes_me = self.echoes_me(&beat);
        let suspect = self.settings.timing.suspect;
        let Some(peer) = self.peers.get_mut(&beat.host) else { return };
        let host = beat.host;
        let newer = self.settings.version < beat.agent.settings_version;
        let older = beat.agent.settings_version < self.settings.version;
        let was_opened = peer.opened.is_some_and(|at| cx.now.since(at) < suspect);
        peer.opened = Some(cx.now);
        let was_heard = peer.heard.is_some_and(|at| cx.now.since(at) < suspect);
        if echoes_me {
            peer.heard = Some(cx.now);
            cx.set(Timer::Silent(host), cx.now + suspect);
        }
        let changed_reach = peer.beat.as_ref().is_none_or(|old| old.reaches != beat.reaches);
        let changed_flags = peer.beat.as_ref().is_none_or(|old| old.agent.flags != beat.agent.flags);
        let changed_list = peer.beat.as_ref().is_none_or(|old| old.list != beat.list);
        let changed_role = peer.beat.as_ref().is_none_or(|old| old.agent.role != beat.agent.role);
        let caught_up =
            !older && peer.beat.as_ref().is_some_and(|old| old.agent.settings_version < beat.agent.settings_version);
        peer.beat = Some(beat);
        if !was_opened {
            self.tell_beat(cx); // Our guard's very next beat answers: both sides hear each other within two beats.
        }
        if (echoes_me && !was_heard) || changed_flags {
            self.judge_peer(cx, host);
        }
        if changed_flags {
            self.follow_trust_everywhere(cx);
        }
        self.look |= changed_reach; // Perhaps somebody waits for a host that reaches its disks.
        if caught_up {
            self.list_claims(cx); // What it reported before was not believed.
        }
        if changed_list {
            self.read_stores_soon(cx);
        }
        if newer {
            cx.send(host, crate::types::control::Request::FetchSettings, suspect, Pending::Settings);
        } else if older && self.is_master() {
            let newest = Box::new(self.settings.clone());
            cx.send(host, crate::types::control::Request::Settings(newest), suspect, Pending::Nothing);
        }
        if changed_role || !was_heard {
            self.elect(cx);
        }
    }

    fn echoes_me(&self, beat: &NetBeat) -> bool {
        let Some(incarnation) = self.guard.incarnation else { return false };
        beat.agent.echoes.iter().any(|echo| {
            echo.index == self.index
                && echo.incarnation_low == low16(incarnation.0)
                && is_recent(low32(self.guard.beaten.0), echo.counter_low, ECHO_LAG * self.echo_slack())
        })
    }

    /// Disk and network beats share one counter: several counters pass per network beat.
    fn echo_slack(&self) -> u32 {
        u32::try_from(self.settings.datastores.len()).unwrap_or(u32::MAX).saturating_add(2)
    }

    pub(super) fn heard_twice(&mut self, cx: &mut Cx, beat: &NetBeat) {
        cx.note(Note::alarm(
            "host-id-twice",
            format!(
                "host id {} is in use twice (another machine beats with boot {}); give the copy an id of its own: \
                 stop mainstayd and mainstay-guard there, remove /var/lib/mainstay, join again",
                beat.host, beat.boot
            ),
        ));
    }

    /// A peer's silence has lasted for the suspect time.
    pub(super) fn silent(&mut self, cx: &mut Cx, host: HostId) {
        self.judge_peer(cx, host);
        self.read_stores_soon(cx);
        self.list_claims(cx);
        self.incoming_from_silent(cx, host);
        self.elect(cx);
        self.look = true;
    }

    /// Whether a host is heard at this moment; this host always is.
    pub(super) fn is_heard(&self, host: HostId, now: Time) -> bool {
        host == self.me.host
            || self
                .peers
                .get(&host)
                .is_some_and(|peer| peer.heard.is_some_and(|at| now.since(at) < self.settings.timing.suspect))
    }

    /// Judges one peer and notes a change of the verdict.
    pub(super) fn judge_peer(&mut self, cx: &mut Cx, host: HostId) {
        let verdict = judge(&self.signs(host, cx.now));
        let (now, suspect) = (cx.now, self.settings.timing.suspect);
        let sure = self.is_sure(host, &verdict, now);
        let Some(peer) = self.peers.get_mut(&host) else { return };
        if peer.verdict == verdict || (peer.heard_now(now, suspect).is_none() && !sure) {
            return;
        }
        let first = peer.beat.is_none();
        let before = std::mem::replace(&mut peer.verdict, verdict.clone());
        peer.since = cx.now;
        self.look = true;
        if first && verdict == Verdict::Unknown {
            return;
        }
        let text = format!("host {} is {verdict}: {}", self.name_of(host), self.evidence(host, now));
        let id = self.host_judged(cx, host, &verdict, &text);
        let note = match verdict {
            Verdict::Live => Note::info("host-live", text),
            Verdict::Left => Note::info("host-left", text),
            Verdict::AgentFailed => Note::warning("host-agent-failed", text),
            Verdict::StorageLost(_) => Note::warning("host-storage-lost", text),
            Verdict::Partitioned => Note::warning("host-partitioned", text),
            Verdict::Isolated => Note::warning("host-isolated", text),
            Verdict::Unknown => Note::warning("host-unknown", text),
            Verdict::Dead => Note::alarm("host-dead", text),
        };
        cx.note(note.by(Some(id)));
        self.follow_steadiness(cx, host, &before);
    }

    /// Whether a silent host can be judged already: it has been silent for long enough as far as *we* were awake to hear
    /// it; and beats on a datastore that it wrote before it fell silent show no partition.
    fn is_sure(&self, host: HostId, verdict: &Verdict, now: Time) -> bool {
        let timing = self.settings.timing;
        if now.since(self.awake_since) < timing.suspect {
            return false;
        }
        let Some(peer) = self.peers.get(&host) else { return true };
        if peer.heard.is_none() && now.since(self.me.started) < timing.suspect * 2 {
            return false; // It may not have heard us yet.
        }
        let alive = timing.beat + timing.renew + timing.renew / 2;
        let silent = peer.heard.unwrap_or(self.awake_since).max(self.awake_since);
        let late = |store: &super::storage::Store| store.changed_at(host).is_some_and(|at| alive <= at.since(silent));
        match verdict {
            Verdict::Partitioned | Verdict::Isolated => self.stores.values().any(late),
            Verdict::Live
            | Verdict::AgentFailed
            | Verdict::StorageLost(_)
            | Verdict::Dead
            | Verdict::Left
            | Verdict::Unknown => true,
        }
    }

    pub(super) fn judge_all(&mut self, cx: &mut Cx) {
        let hosts: Vec<HostId> = self.peers.keys().copied().collect();
        for host in hosts {
            self.judge_peer(cx, host);
        }
    }

    fn signs(&self, host: HostId, now: Time) -> Signs {
        let peer = self.peers.get(&host);
        let heard = peer
            .filter(|_| self.is_heard(host, now))
            .and_then(|peer| peer.beat.as_ref())
            .map(|beat| (beat.agent.flags, self.datastores_in(beat.agent.storage_lost)));
        let flags = self.stores.values().filter_map(|store| store.newest_of(host)).max_by_key(|beat| beat.counter);
        Signs {
            heard,
            flags: flags.map(|beat| beat.flags).unwrap_or_default(),
            beats: self.stores.keys().filter_map(|id| self.freshness(*id, host, now)).collect(),
        }
    }

    /// One line: what the verdict on a host rests on.
    pub(super) fn evidence(&self, host: HostId, now: Time) -> String {
        let mut parts = Vec::new();
        match self.peers.get(&host).and_then(|peer| peer.heard) {
            Some(at) => parts.push(format!("network beat {:.1} s ago", now.since(at).as_secs_f64())),
            None if self.peers.get(&host).is_some_and(|peer| peer.opened.is_some()) => {
                parts.push("it is heard but does not hear this host".to_owned());
            }
            None => parts.push("no network beat heard".to_owned()),
        }
        for (id, store) in &self.stores {
            let name = self.store_name(*id);
            match self.freshness(*id, host, now) {
                Some(Freshness::Unknown) => parts.push(format!("{name} unreadable here")),
                Some(Freshness::Fresh | Freshness::Stale) => {
                    let age = store.age_of(host, now).unwrap_or_default();
                    parts.push(format!("beat on {name} {:.1} s ago", age.as_secs_f64()));
                }
                None => {}
            }
        }
        parts.join(", ")
    }

    pub(super) fn datastores_in(&self, set: DatastoreSet) -> Vec<DatastoreId> {
        let is_in = |position: usize| position < 64 && set.0 & (1 << position) != 0;
        self.settings.datastores.iter().enumerate().filter(|(n, _)| is_in(*n)).map(|(_, d)| d.id).collect()
    }

    pub(super) fn going_down(&mut self, cx: &mut Cx) {
        if !self.going_down {
            self.going_down = true;
            cx.note(Note::info("host-going-down", "this host goes down: stops of VMs leave them wanted running"));
            self.tell_beat(cx);
        }
    }

    pub(super) fn live_members(&self, now: Time) -> impl Iterator<Item = &MemberSettings> {
        self.settings.members.iter().filter(move |member| {
            self.is_heard(member.host, now) && !(member.host != self.me.host && self.leaving(member.host))
        })
    }

    fn leaving(&self, host: HostId) -> bool {
        self.peers.get(&host).and_then(|peer| peer.beat.as_ref()).is_some_and(|beat| beat.agent.flags.leaving)
    }

    pub(super) fn capacity(&mut self, capacity: HostCapacity) {
        let before = self.capacity.free_kib;
        let moved = before.abs_diff(capacity.free_kib);
        let pages = |of: &HostCapacity| (of.pages_2m, of.pages_1g);
        if before == 0 || before / 10 < moved || pages(&self.capacity) != pages(&capacity) {
            self.tell = true;
        }
        self.look |= self.tell;
        self.capacity = capacity;
    }

    /// What this host has for VMs has changed: one that waits for it may start.
    pub(super) fn means(&mut self, means: HostMeans) {
        self.tell |= self.means != means;
        self.look |= self.tell;
        self.means = means;
    }

    pub(super) fn note_unprotected(&mut self, cx: &mut Cx, vms: Vec<crate::types::VmId>) {
        if self.unprotected.as_ref() != Some(&vms) {
            self.unprotected = Some(vms.clone());
            cx.act(Action::Unprotected(vms));
        }
    }
}

pub(super) fn low16(value: u64) -> u16 {
    u16::try_from(value & 0xffff).expect("masked to 16 bits")
}

pub(super) fn low32(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("masked to 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_may_be_ahead_of_what_our_guard_has_told() {
        for (beaten, echoed, expected) in [
            (100, 100, true),
            (100, 92, true),
            (100, 91, false),
            (100, 101, true),
            (100, 109, false),
            (3, u32::MAX, true),
        ] {
            assert_eq!(is_recent(beaten, echoed, 8), expected, "{beaten} {echoed}");
        }
    }

    #[test]
    fn every_row_of_the_verdict_table() {
        let lost = DatastoreId(uuid::Uuid::from_u128(1));
        let flags = |isolated, leaving, agent_dead| Flags { isolated, leaving, agent_dead, ..Flags::default() };
        let calm = Flags::default();
        use Freshness::{Fresh, Stale, Unknown};
        let rows = [
            (Some((calm, vec![])), calm, vec![Fresh], Verdict::Live),
            (Some((calm, vec![])), calm, vec![], Verdict::Live),
            (Some((calm, vec![lost])), calm, vec![Stale], Verdict::StorageLost(vec![lost])),
            (Some((flags(false, false, true), vec![])), calm, vec![Fresh], Verdict::AgentFailed),
            (Some((flags(false, true, false), vec![])), calm, vec![Fresh], Verdict::Left),
            (None, flags(true, false, false), vec![Fresh], Verdict::Isolated),
            (None, calm, vec![Fresh], Verdict::Partitioned),
            (None, calm, vec![Fresh, Stale], Verdict::Partitioned),
            (None, flags(true, false, false), vec![Fresh, Stale], Verdict::Isolated),
            (None, flags(false, true, false), vec![Fresh], Verdict::Left),
            (None, calm, vec![Stale], Verdict::Dead),
            (None, calm, vec![Stale, Unknown], Verdict::Dead),
            (None, calm, vec![Unknown], Verdict::Unknown),
            (None, calm, vec![], Verdict::Unknown),
            (None, flags(false, true, false), vec![Stale], Verdict::Dead),
        ];
        for (n, (heard, flags, beats, expected)) in rows.into_iter().enumerate() {
            assert_eq!(judge(&Signs { heard, flags, beats }), expected, "row {n}");
        }
    }
}
