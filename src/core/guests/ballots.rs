//! At the master: what guests ask to be done to other VMs. Permission, votes, and once, whoever asks how often.
//!
//! ```text
//!   requested ── no permission names the asker and the remedy ──► denied
//!             ── fewer different VMs than the votes it needs ───► delayed: "2 of 3"
//!             ── the VM runs nowhere ───────────────────────────► denied
//!             ── asked longer ago than the window ──────────────► denied, when it is repeated
//!             └─ enough ──► ordered from its host ──► its word ─► everybody who asked is told
//! ```
//!
//! Nobody is told of a window's end who does not ask again: this host may not be the master any more. An order that nobody asks
//! about for a window is forgotten.
//!
//! A new master knows no votes. Askers repeat what is not answered for good, so votes within the window come again; the host of the
//! VM remembers the orders that it has carried out, by the report that completed them.

use std::collections::BTreeMap;
use std::time::Duration;

use mainstay_guest::message::{ReportId, Verdict};

use super::{GuestAct, Guests};
use crate::types::guests::{Answer, GuestRequest, GuestWord, Permission, Remedy};
use crate::types::{HostId, Time, VmId};

/// VMs for which something is asked; requests for further ones are denied.
pub(super) const MAX_BALLOTS: usize = 1024;
/// Requests of one VM for the same; further ones are denied.
pub(super) const MAX_VOTES: usize = 64;

/// One who asks.
#[derive(Debug)]
struct Voter {
    id: ReportId,
    by: String,
    host: HostId,
    /// The end of its window.
    until: Time,
}

/// What is asked to be done to one VM.
#[derive(Debug)]
struct Ballot {
    voters: Vec<Voter>,
    /// The order that was given.
    ordered: Option<ReportId>,
    /// By which it was asked for last, and when that is over.
    permission: Permission,
    until: Time,
}

impl Ballot {
    fn votes_of(&self, by: &str) -> usize {
        self.voters.iter().filter(|voter| voter.by == by).count()
    }

    /// When something of it ends.
    fn due(&self) -> Option<Time> {
        match self.ordered {
            Some(_) => Some(self.until),
            None => self.voters.iter().map(|voter| voter.until).min(),
        }
    }

    /// Takes out those who have asked too long ago, unless the order is given; with what they are told.
    fn late(&mut self, now: Time) -> Vec<(Voter, Answer)> {
        let Permission { votes, within_s, .. } = self.permission;
        let text = format!("fewer than {votes} VMs have asked for it within {within_s} s");
        let open = self.ordered.is_none();
        let late = self.voters.extract_if(.., |voter| open && voter.until <= now);
        late.map(|voter| (voter, Answer::new(Verdict::Denied, text.clone()))).collect()
    }

    fn is_over(&self, now: Time) -> bool {
        self.voters.is_empty() || self.ordered.is_some() && self.until <= now
    }
}

/// All requests.
#[derive(Debug, Default)]
pub(super) struct Ballots {
    open: BTreeMap<(String, Remedy), Ballot>,
    /// The newest decisions.
    decided: super::Answers,
}

impl Ballots {
    /// How many are open.
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    /// How often each voter asks for the same.
    pub(super) fn votes(&self) -> impl Iterator<Item = usize> {
        self.open.values().flat_map(|ballot| ballot.voters.iter().map(|voter| ballot.votes_of(&voter.by)))
    }

    /// When something of one ends.
    pub(super) fn due(&self) -> Option<Time> {
        self.open.values().filter_map(Ballot::due).min()
    }

    /// How many decisions are remembered.
    pub(super) fn decided(&self) -> usize {
        self.decided.0.len()
    }
}

impl Guests {
    pub(super) fn requested(&mut self, now: Time, from: HostId, request: GuestRequest, at: Option<(VmId, HostId)>) {
        let id = request.id;
        self.end_ballots(now);
        if let Some(answer) = self.ballots.decided.of(id).cloned() {
            return self.say_decided(from, id, answer);
        }
        let allows = |rule: &&Permission| {
            rule.remedy == request.remedy && rule.target.fits(&request.target) && rule.by.fits(&request.by)
        };
        // The one that demands the fewest votes of this asker.
        let Some(permission) = self.settings.permissions.iter().filter(allows).min_by_key(|rule| rule.votes).cloned()
        else {
            let text = format!("{} lets {} ask for no {}", request.target, request.by, request.remedy);
            return self.decide(from, id, Answer::new(Verdict::Denied, text));
        };
        let Some((vm, host)) = at else {
            let text = format!("{} runs nowhere", request.target);
            return self.decide(from, id, Answer::new(Verdict::Denied, text));
        };
        let key = (request.target.clone(), request.remedy);
        if MAX_BALLOTS <= self.ballots.open.len() && !self.ballots.open.contains_key(&key) {
            return self.say_decided(from, id, Answer::new(Verdict::Denied, "too many requests are open"));
        }
        let until = now + Duration::from_secs(permission.within_s.into());
        let new = || Ballot { voters: Vec::new(), ordered: None, permission: permission.clone(), until };
        let ballot = self.ballots.open.entry(key).or_insert_with(new);
        (ballot.permission, ballot.until) = (permission.clone(), until);
        let known = ballot.voters.iter_mut().find(|voter| voter.id == id);
        let known = known.map(|voter| voter.host = from).is_some();
        if !known && MAX_VOTES <= ballot.votes_of(&request.by) {
            return self.say_decided(from, id, Answer::new(Verdict::Denied, "too many requests of this VM are open"));
        }
        if !known {
            ballot.voters.push(Voter { id, by: request.by.clone(), host: from, until });
        }
        let mut names: Vec<&str> = ballot.voters.iter().map(|voter| voter.by.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let have = names.len();
        if have < permission.votes as usize {
            let text = format!("{have} of {} VMs ask for it", permission.votes);
            return self.say_decided(from, id, Answer::new(Verdict::Delayed, text));
        }
        let order = *ballot.ordered.get_or_insert(id);
        let why = format!("{} asks ({have} of {}): {}", request.by, permission.votes, request.why);
        self.act(GuestAct::Tell(host, GuestWord::Ordered { id: order, vm, remedy: request.remedy, why }));
    }

    /// Votes end with their window: whoever repeats them hears so.
    pub(super) fn end_ballots(&mut self, now: Time) {
        let late: Vec<(Voter, Answer)> = self.ballots.open.values_mut().flat_map(|ballot| ballot.late(now)).collect();
        self.ballots.open.retain(|_, ballot| !ballot.is_over(now));
        late.into_iter().for_each(|(voter, answer)| self.ballots.decided.keep(voter.id, answer));
    }

    /// The word of the host that had the order.
    pub(super) fn obeyed(&mut self, id: ReportId, answer: &Answer) {
        let of = |ballot: &Ballot| ballot.ordered == Some(id);
        let Some(key) = self.ballots.open.iter().find(|(_, ballot)| of(ballot)).map(|(key, _)| key.clone()) else {
            return;
        };
        if answer.verdict.is_last() {
            let voters = self.ballots.open.remove(&key).map_or_else(Vec::new, |ballot| ballot.voters);
            voters.into_iter().for_each(|voter| self.decide(voter.host, voter.id, answer.clone()));
        } else if let Some(ballot) = self.ballots.open.get(&key) {
            let told: Vec<(HostId, ReportId)> = ballot.voters.iter().map(|voter| (voter.host, voter.id)).collect();
            told.into_iter().for_each(|(host, id)| self.say_decided(host, id, answer.clone()));
        }
    }

    fn decide(&mut self, to: HostId, id: ReportId, answer: Answer) {
        self.ballots.decided.keep(id, answer.clone());
        self.say_decided(to, id, answer);
    }

    fn say_decided(&mut self, to: HostId, id: ReportId, answer: Answer) {
        self.act(GuestAct::Tell(to, GuestWord::Decided { id, answer }));
    }
}
