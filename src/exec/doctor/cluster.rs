//! Checks between hosts: guard, beats in both directions, clocks.

use super::system::SystemFacts;
use super::{AgentFacts, Finding, GuardFact, PeerFact, names};

/// A peer is heard when its last beat is at most this old.
const HEARD_MS: u64 = 15_000;
/// Clocks of day that differ by more make logs hard to read.
const SKEW_WARNING_MS: i64 = 1_000;
/// Certificates of a new member would not be valid yet.
const SKEW_ERROR_MS: i64 = 3_600_000;

/// The guard answers and was given what it needs.
pub(super) fn guard(agent: &AgentFacts) -> Vec<Finding> {
    let object = "mainstay-guard";
    vec![match &agent.guard {
        GuardFact::Silent(why) => Finding::error(
            "guard",
            object,
            format!("does not answer: {why}"),
            "systemctl status mainstay-guard; without it no protected VM may run here",
        ),
        GuardFact::Answers { real_time: false, .. } => Finding::warning(
            "guard",
            object,
            "was refused real-time scheduling or locked memory: others wait half a lease longer before they take its VMs",
            "look for cpu.rt_runtime_us in its control group and at LimitMEMLOCK and LimitRTPRIO of its unit",
        ),
        GuardFact::Answers { late: true, .. } => Finding::warning(
            "guard",
            object,
            "was late within the last hour: others wait half a lease longer before they take its VMs",
            "look for CPU steal time, long interrupts or a host that was paused",
        ),
        GuardFact::Answers { real_time: true, late: false } => {
            Finding::ok("guard", object, "answers, with real-time scheduling, never late in the last hour")
        }
    }]
}

/// The cluster acts by itself, and rules for VMs do what they were made for.
pub(super) fn rules(agent: &AgentFacts) -> Vec<Finding> {
    let armed =
        agent.disarmed.iter().map(|text| Finding::warning("armed", "cluster", text.clone(), "mainstay cluster arm"));
    let cure = "mainstay cluster vm-rules shows the rules; edit them and give them back";
    let rules = agent.rules.iter().map(|problem| Finding::warning("vm-rules", "rules for VMs", problem.clone(), cure));
    armed.chain(rules).collect()
}

/// Nothing is protected yet.
pub(super) fn no_member() -> Finding {
    Finding::warning(
        "cluster",
        "this host",
        "is no member of a cluster",
        "mainstay cluster init on the first host, mainstay cluster join TOKEN on the others",
    )
}

/// Beats of all peers arrive, and ours arrive there.
pub(super) fn beats(agent: &AgentFacts) -> Vec<Finding> {
    let Some(cluster) = &agent.cluster else { return vec![no_member()] };
    let mut found = vec![Finding::ok("cluster", cluster.as_str(), "this host is a member")];
    if agent.peers.is_empty() {
        found.push(Finding::ok("beats", "network", "no other member: nobody to hear"));
        return found;
    }
    let heard = |peer: &&PeerFact| peer.beat_age_ms.is_some_and(|age| age <= HEARD_MS);
    let silent: Vec<&str> = agent.peers.iter().filter(|peer| !heard(peer)).map(|peer| peer.name.as_str()).collect();
    let deaf: Vec<&str> =
        agent.peers.iter().filter(|peer| heard(peer) && !peer.hears_us).map(|peer| peer.name.as_str()).collect();
    if silent.len() == agent.peers.len() {
        found.push(Finding::error(
            "beats",
            "network",
            format!("no other member is heard ({})", names(silent.iter().copied())),
            "multicast: is the right interface configured, IGMP snooping without a querier, a firewall? \
             If the network cannot do multicast: transport = \"unicast\"",
        ));
    } else if !silent.is_empty() {
        found.push(Finding::warning(
            "beats",
            names(silent.iter().copied()),
            "not heard on the network, others are",
            "is the host up? is its beat interface in the same network?",
        ));
    }
    if !deaf.is_empty() {
        found.push(Finding::error(
            "beats",
            names(deaf.iter().copied()),
            "heard, but does not hear this host: a link that works one way only",
            "look at firewall and switch for multicast in the direction from here to there",
        ));
    }
    if silent.is_empty() && deaf.is_empty() {
        found.push(Finding::ok("beats", "network", format!("heard in both directions: {}", peer_names(agent))));
    }
    found
}

/// Nothing is decided by the clock of day; people compare logs by it, and certificates need it roughly.
pub(super) fn clocks(agent: &AgentFacts) -> Vec<Finding> {
    let known = agent.peers.iter().filter_map(|peer| Some((peer.name.as_str(), peer.skew_ms?)));
    let Some((name, skew)) = known.max_by_key(|(_, skew)| skew.unsigned_abs()) else { return Vec::new() };
    let what = format!("its clock differs from this host's by {:.1} s", skew as f64 / 1000.0);
    let cure = "synchronise all hosts: apt install chrony (or systemd-timesyncd)";
    vec![if SKEW_ERROR_MS < skew.abs() {
        Finding::error("clock-skew", name, what, cure)
    } else if SKEW_WARNING_MS < skew.abs() {
        Finding::warning("clock-skew", name, what, cure)
    } else {
        Finding::ok("clock-skew", "clocks", format!("differ by at most {} ms", skew.abs()))
    }]
}

/// The kernel says whether something disciplines its clock.
pub(super) fn synchronised(system: &SystemFacts) -> Vec<Finding> {
    vec![match system.clock_synchronised {
        Some(true) => Finding::ok("clock", "this host", "its clock is synchronised"),
        Some(false) => Finding::warning(
            "clock",
            "this host",
            "its clock is not synchronised: notes and logs of different hosts are hard to compare",
            "apt install chrony (or systemd-timesyncd), then: timedatectl",
        ),
        None => Finding::warning("clock", "this host", "cannot tell whether its clock is synchronised", "timedatectl"),
    }]
}

fn peer_names(agent: &AgentFacts) -> String {
    names(agent.peers.iter().map(|peer| peer.name.as_str()))
}
