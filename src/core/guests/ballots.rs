//! At the master: what guests ask to be done to other VMs. Permission, votes, and once, whoever asks how often.
//!
//! ```text
//!   requested ── no permission names the asker and the remedy ──► denied
//!             ── fewer different VMs than the votes it needs ───► delayed: "2 of 3"
//!             ── the VM runs nowhere ───────────────────────────► denied
//!             ── asked longer ago than the window ──────────────► denied, also when it is repeated
//!             └─ enough ──► ordered from its host ──► its word ─► everybody who asked is told
//! ```
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
    at: Time,
}

/// What is asked to be done to one VM.
#[derive(Debug, Default)]
struct Ballot {
    voters: Vec<Voter>,
    /// The order that was given.
    ordered: Option<ReportId>,
}

impl Ballot {
    fn votes_of(&self, by: &str) -> usize {
        self.voters.iter().filter(|voter| voter.by == by).count()
    }

    /// Takes out those who have asked too long ago, unless the order is given.
    fn late(&mut self, now: Time, window: Duration) -> Vec<Voter> {
        let open = self.ordered.is_none();
        self.voters.extract_if(.., |voter| open && window <= now.since(voter.at)).collect()
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

    /// How many decisions are remembered.
    pub(super) fn decided(&self) -> usize {
        self.decided.0.len()
    }
}

impl Guests {
    pub(super) fn requested(&mut self, now: Time, from: HostId, request: GuestRequest, at: Option<(VmId, HostId)>) {
        let id = request.id;
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
        let ballot = self.ballots.open.entry(key.clone()).or_default();
        let known = ballot.voters.iter_mut().find(|voter| voter.id == id);
        let known = known.map(|voter| voter.host = from).is_some();
        self.end_late(now, &key, &permission);
        if self.ballots.decided.of(id).is_some() {
            return; // Its own vote has ended, and its host was told so.
        }
        let ballot = self.ballots.open.entry(key).or_default();
        if !known && MAX_VOTES <= ballot.votes_of(&request.by) {
            return self.say_decided(from, id, Answer::new(Verdict::Denied, "too many requests of this VM are open"));
        }
        if !known {
            ballot.voters.push(Voter { id, by: request.by.clone(), host: from, at: now });
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

    /// Votes end with their window: their hosts repeat them until they hear so.
    fn end_late(&mut self, now: Time, key: &(String, Remedy), permission: &Permission) {
        let window = Duration::from_secs(permission.within_s.into());
        let Some(ballot) = self.ballots.open.get_mut(key) else { return };
        let late = ballot.late(now, window);
        if ballot.voters.is_empty() {
            self.ballots.open.remove(key);
        }
        let text = format!("fewer than {} VMs have asked for it within {} s", permission.votes, permission.within_s);
        late.into_iter()
            .for_each(|voter| self.decide(voter.host, voter.id, Answer::new(Verdict::Denied, text.clone())));
    }

    /// The word of the host that had the order.
    pub(super) fn obeyed(&mut self, id: ReportId, answer: &Answer) {
        let of = |ballot: &Ballot| ballot.ordered == Some(id);
        let Some(key) = self.ballots.open.iter().find(|(_, ballot)| of(ballot)).map(|(key, _)| key.clone()) else {
            return;
        };
        if answer.verdict.is_last() {
            let voters = self.ballots.open.remove(&key).unwrap_or_default().voters;
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
