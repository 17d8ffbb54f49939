//! The book of verdicts: what this agent has decided lately, each with its evidence.
//!
//! ```text
//!   agent.rs ── add ──► of hosts (KEPT_OF_HOSTS) ──┐
//!                  └──► of VMs   (KEPT_OF_VMS) ────┴─► asked: answers to people and other agents
//! ```
//!
//! Verdicts on hosts are kept apart, since the failure of one host makes many on its VMs. The oldest go first. In memory only: a
//! restarted agent begins with an empty book.
//!
//! Deliberately not here: what is decided (the core), and the books of other hosts (the agent asks them when somebody asks it).

use std::collections::VecDeque;

use crate::types::verdict::{VerdictAsk, VerdictView};

/// Verdicts on hosts that are kept.
const KEPT_OF_HOSTS: usize = 1_000;
/// Verdicts on VMs that are kept: those of some failures in a large cluster.
const KEPT_OF_VMS: usize = 10_000;
/// Verdicts in one list, without evidence, so that it fits into a frame: the newest.
const MAX_LISTED: usize = 1_000;

/// All recent verdicts of this host.
#[derive(Debug, Default)]
pub struct VerdictBook {
    of_hosts: VecDeque<VerdictView>,
    of_vms: VecDeque<VerdictView>,
}

impl VerdictBook {
    /// Adds one.
    pub fn add(&mut self, verdict: VerdictView) {
        let (shelf, kept) = match verdict.vm {
            Some(_) => (&mut self.of_vms, KEPT_OF_VMS),
            None => (&mut self.of_hosts, KEPT_OF_HOSTS),
        };
        if shelf.len() == kept {
            shelf.pop_front();
        }
        shelf.push_back(verdict);
    }

    /// Those that are asked for, oldest first.
    #[must_use]
    pub fn asked(&self, ask: &VerdictAsk) -> Vec<VerdictView> {
        let all = self.of_hosts.iter().chain(&self.of_vms).filter(|verdict| ask.is_for(verdict));
        match ask {
            VerdictAsk::One { .. } => all.cloned().collect(),
            VerdictAsk::List { .. } => {
                newest(all.map(|verdict| VerdictView { evidence: Vec::new(), ..verdict.clone() }).collect())
            }
        }
    }
}

/// One list out of those of several hosts: by time, the newest `MAX_LISTED`.
#[must_use]
pub fn newest(mut all: Vec<VerdictView>) -> Vec<VerdictView> {
    all.sort_by(|one, other| (one.unix_ms, &one.id).cmp(&(other.unix_ms, &other.id)));
    all.drain(..all.len().saturating_sub(MAX_LISTED));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(n: u64, host: Option<&str>, vm: Option<&str>) -> VerdictView {
        VerdictView {
            id: format!("a-{n}"),
            unix_ms: n,
            by: "a".into(),
            kind: "test".into(),
            host: host.map(str::to_owned),
            vm: vm.map(str::to_owned),
            text: format!("the {n}th"),
            evidence: vec!["because".into()],
            recording: None,
        }
    }

    #[test]
    fn lists_are_short_and_one_is_whole() {
        let mut book = VerdictBook::default();
        book.add(verdict(1, Some("b"), None));
        book.add(verdict(2, Some("c"), Some("web")));
        book.add(verdict(3, Some("c"), None));
        let list = |vm: Option<&str>, host: Option<&str>| {
            let ask = VerdictAsk::List { vm: vm.map(str::to_owned), host: host.map(str::to_owned) };
            let found = book.asked(&ask);
            assert!(found.iter().all(|verdict| verdict.evidence.is_empty()));
            found.iter().map(|verdict| verdict.unix_ms).collect::<Vec<_>>()
        };
        assert_eq!(list(None, None), [1, 2, 3]);
        assert_eq!(list(None, Some("c")), [2, 3]);
        assert_eq!(list(Some("web"), None), [2]);
        assert_eq!(list(Some("db"), None), [0; 0]);
        let one = |id: &str| book.asked(&VerdictAsk::One { id: id.into() });
        assert_eq!(one("a-3"), [verdict(3, Some("c"), None)]);
        assert_eq!(one("a-4"), []);
    }

    #[test]
    fn verdicts_on_vms_drive_out_none_on_hosts() {
        let mut book = VerdictBook::default();
        book.add(verdict(0, Some("b"), None));
        for n in 1..=KEPT_OF_VMS as u64 + 5 {
            book.add(verdict(n, None, Some("web")));
        }
        assert_eq!(book.of_vms.front().unwrap().unix_ms, 6);
        let all = book.asked(&VerdictAsk::List { vm: None, host: None });
        assert_eq!((all.len(), all[0].unix_ms), (MAX_LISTED, 9_006));
        assert_eq!(book.asked(&VerdictAsk::List { vm: None, host: Some("b".into()) }).len(), 1);
    }
}
