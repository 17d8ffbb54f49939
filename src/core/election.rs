//! Election of one master per partition (design 3). For liveness only; safety never depends on it.
//!
//! ```text
//!              hears a master                     2 beats, best score heard
//!   Follower ◄──────────────── Candidate ─────────────────────────────────► Master
//!      │  no master for the suspect time ▲                                    │
//!      └─────────────────────────────────┘◄──── hears a better master ────────┘
//! ```

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::Cx;
use super::note::Note;
use crate::types::{HostId, HostIndex, NetBeat, Role, Term, Time};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum State {
    /// Follows this master, or waits for one since then.
    Follower { master: Option<HostId>, since: Time },
    /// Offers itself since then.
    Candidate { since: Time },
    /// Decides.
    Master,
}

/// Where this agent stands.
#[derive(Debug, Serialize, Deserialize)]
pub struct Election {
    state: State,
    term: Term,
    index: Option<HostIndex>,
}

impl Election {
    /// Follows nobody yet.
    #[must_use]
    pub fn new(now: Time) -> Self {
        Self { state: State::Follower { master: None, since: now }, term: Term(0), index: None }
    }
    /// For the beat.
    #[must_use]
    pub fn role(&self) -> Role {
        match self.state {
            State::Follower { .. } => Role::Subordinate { master: self.index },
            State::Candidate { .. } => Role::Candidate,
            State::Master => Role::Master,
        }
    }
    /// Highest term known.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    fn follow(&mut self, master: &NetBeat, now: Time) {
        self.state = State::Follower { master: Some(master.host), since: now };
        self.index = Some(master.index);
        self.term = self.term.max(master.agent.term);
    }
    fn stand(&mut self, now: Time) {
        self.state = State::Candidate { since: now };
        self.index = None;
    }
    fn lead(&mut self) {
        assert!(matches!(self.state, State::Candidate { .. }), "only a candidate leads");
        self.state = State::Master;
        self.term = self.term.next();
        self.index = None;
    }
}

impl Core {
    pub(super) fn is_master(&self) -> bool {
        matches!(self.election.state, State::Master)
    }

    /// The master that this agent follows or is.
    #[must_use]
    pub fn master(&self) -> Option<HostId> {
        match self.election.state {
            State::Follower { master, .. } => master,
            State::Candidate { .. } => None,
            State::Master => Some(self.me.host),
        }
    }

    /// Looks at everybody who is heard and takes the arrow that follows.
    pub(super) fn elect(&mut self, cx: &mut Cx) {
        let timing = self.settings.timing;
        let best = self.best_master(cx.now);
        match (self.election.state, best) {
            (State::Master, Some(other)) if self.yields_to(&other, cx.now) => {
                let name = self.name_of(other.host);
                self.election.follow(&other, cx.now);
                cx.note(Note::info(
                    "master",
                    format!("{name} is master (term {}); this host steps back", other.agent.term),
                ));
                self.followed(cx);
            }
            (State::Master, _) => {}
            // Of two masters the lesser yields by itself; until then nobody changes sides.
            (State::Follower { master: Some(master), .. }, Some(other))
                if master != other.host && self.hears_master(master, cx.now) => {}
            (State::Follower { master, .. }, Some(other)) => {
                let new = master != Some(other.host);
                self.election.follow(&other, cx.now);
                if new {
                    let name = self.name_of(other.host);
                    cx.note(Note::info("master", format!("{name} is master (term {})", other.agent.term)));
                    self.followed(cx);
                }
            }
            (State::Candidate { .. }, Some(other)) => {
                let name = self.name_of(other.host);
                self.election.follow(&other, cx.now);
                cx.note(Note::info("master", format!("{name} is master (term {})", other.agent.term)));
                self.followed(cx);
            }
            (State::Follower { master, since }, None) => {
                // A master that was followed and is not heard now has been silent for the suspect time already, or is none
                // any more. A host
                // that does not beat itself cannot be heard, so it has not waited yet.
                let waited = self.guard.beating.is_some_and(|from| timing.suspect <= cx.now.since(from.max(since)));
                if master.is_some() || waited || self.alone() {
                    self.election.stand(cx.now);
                    self.tell_beat(cx);
                    self.lead_if_best(cx);
                }
            }
            (State::Candidate { .. }, None) => self.lead_if_best(cx),
        }
    }

    fn lead_if_best(&mut self, cx: &mut Cx) {
        let State::Candidate { since } = self.election.state else { return };
        let waited = self.settings.timing.beat * 2 <= cx.now.since(since);
        let mine = self.score(cx.now);
        let better = self.heard_beats(cx.now).any(|beat| beat.agent.role == Role::Candidate && mine < beat.agent.score);
        if self.alone() || (waited && !better) {
            let heard = self.heard_beats(cx.now).map(|beat| beat.agent.term).max().unwrap_or_default();
            self.election.term = self.election.term.max(heard);
            self.election.lead();
            let term = self.election.term;
            let hosts = self.live_members(cx.now).count();
            cx.note(Note::info("master", format!("this host is master (term {term}) of {hosts} host(s)")));
            self.tell_beat(cx);
            self.became_master(cx);
        }
    }

    fn hears_master(&self, host: HostId, now: Time) -> bool {
        self.heard_beats(now).any(|beat| beat.host == host && beat.agent.role == Role::Master)
    }

    /// When this candidate may lead at the earliest.
    pub(super) fn may_lead_at(&self) -> Option<Time> {
        match self.election.state {
            State::Candidate { since } => Some(since + self.settings.timing.beat * 2),
            State::Follower { .. } | State::Master => None,
        }
    }

    fn alone(&self) -> bool {
        self.settings.members.len() == 1
    }

    fn followed(&mut self, cx: &mut Cx) {
        self.drop_placings(cx);
        self.tell_beat(cx);
        self.tell = true;
    }

    fn became_master(&mut self, cx: &mut Cx) {
        self.master_since = cx.now;
        self.list_claims(cx);
        self.read_stores_soon(cx);
        self.look = true;
    }

    fn heard_beats(&self, now: Time) -> impl Iterator<Item = &NetBeat> {
        self.peers.iter().filter(move |(host, _)| self.is_heard(**host, now)).filter_map(|(_, peer)| peer.beat.as_ref())
    }

    fn best_master(&self, now: Time) -> Option<NetBeat> {
        let masters = self.heard_beats(now).filter(|beat| beat.agent.role == Role::Master);
        masters.max_by_key(|beat| (beat.agent.echoes.len(), beat.agent.score)).cloned()
    }

    /// Two masters that hear each other: fewer hosts heard, then the lower score, steps back.
    fn yields_to(&self, other: &NetBeat, now: Time) -> bool {
        let mine = (self.heard_beats(now).count(), self.score(now));
        mine < (other.agent.echoes.len(), other.agent.score)
    }
}
