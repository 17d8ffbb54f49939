//! The network beat: what a host tells everybody, once per period, in one datagram.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{BootId, ClusterId, Counter, DatastoreId, Digest, HostId, HostIndex, Incarnation, Sequence, Term};

/// Set of datastores: bit n is the n-th datastore of the settings document whose version the beat names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DatastoreSet(pub u64);

/// What an agent is in its partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Role {
    /// Follows the named master, or nobody yet.
    Subordinate { master: Option<HostIndex> },
    /// Heard no master for the suspect time, offers itself.
    Candidate,
    /// Decides for its partition.
    Master,
}

/// Who should be master: the greatest wins. Field order is the rule (design 3, Election).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Score {
    /// Datastores reached.
    pub datastores: u8,
    /// Neither in maintenance nor quarantined.
    pub available: bool,
    /// As configured; higher is preferred.
    pub priority: u8,
    /// log2 of the uptime in minutes, so that nearly equal uptimes do not decide.
    pub uptime_bucket: u8,
    /// Breaks ties.
    pub host: HostId,
}

/// One bit facts about the sender.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Flags {
    /// Hears nobody and reaches no isolation address.
    pub isolated: bool,
    /// Going down in order.
    pub leaving: bool,
    /// In maintenance.
    pub maintenance: bool,
    /// The guard beats, the agent does not answer it.
    pub agent_dead: bool,
    /// The guard was refused real-time scheduling or was late: takers use margin = L/2.
    pub unpunctual: bool,
    /// Some datastore showed less than was acknowledged.
    pub distrusts: bool,
}

impl std::fmt::Display for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { isolated, leaving, maintenance, agent_dead, unpunctual, distrusts } = *self;
        let names = [
            (isolated, "isolated"),
            (leaving, "leaving"),
            (maintenance, "maintenance"),
            (agent_dead, "agent dead"),
            (unpunctual, "unpunctual"),
            (distrusts, "distrusts a datastore"),
        ];
        let set: Vec<&str> = names.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect();
        f.write_str(&if set.is_empty() { "none".to_owned() } else { set.join(" and ") })
    }
}

/// Name of a VM list: a list that does not match its beat says nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ListName {
    /// Rises with every change.
    pub sequence: Sequence,
    /// Of the list's encoded entries.
    pub digest: Digest,
}

/// "I heard you": the last beat heard of one peer. 1 + 6 bytes on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Echo {
    /// The peer.
    pub index: HostIndex,
    /// Low 16 bits of the peer's incarnation.
    pub incarnation_low: u16,
    /// Low 32 bits of the peer's counter.
    pub counter_low: u32,
}

/// "The newest beat of `host` that I heard and persisted on `datastore` is `counter`": an attestation's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attested {
    /// Position of the datastore in the settings document.
    pub datastore: u8,
    /// For whom.
    pub index: HostIndex,
    /// Low 32 bits of its incarnation: the counter of an earlier guard says nothing about a later one.
    pub incarnation_low: u32,
    /// Its counter, full, since a lease hangs on it.
    pub counter: Counter,
}

/// The part of a beat that the agent knows; the guard adds the rest and sends it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AgentBeat {
    /// What this agent is.
    pub role: Role,
    /// Of the master that it follows or is.
    pub term: Term,
    /// For the next election.
    pub score: Score,
    /// Without `agent_dead` and `unpunctual`, which the guard sets.
    pub flags: Flags,
    /// Datastores that this host cannot use.
    pub storage_lost: DatastoreSet,
    /// Version of the settings document that this agent uses.
    pub settings_version: u64,
    /// Peers heard lately, at most one each.
    pub echoes: Vec<Echo>,
}

/// A beat as sent: at most 1,200 bytes sealed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NetBeat {
    /// Ours, or the datagram is dropped.
    pub cluster: ClusterId,
    /// The sender.
    pub host: HostId,
    /// Its place in the roster.
    pub index: HostIndex,
    /// Of its kernel.
    pub boot: BootId,
    /// Of its guard.
    pub incarnation: Incarnation,
    /// Rises with every beat; also the nonce of the seal.
    pub counter: Counter,
    /// Its L, in whole milliseconds on the wire.
    pub lease: Duration,
    /// Its newest VM list.
    pub list: ListName,
    /// Datastores on which its lease is valid.
    pub reaches: DatastoreSet,
    /// Datastores on which it asks others to attest its counter.
    pub attest_me: DatastoreSet,
    /// Datastores that showed it less than before.
    pub distrusts: DatastoreSet,
    /// What it attested for others; at most 6.
    pub attested: Vec<Attested>,
    /// Software version (major, minor, patch) of the sender.
    pub software: (u8, u8, u8),
    /// From the agent.
    pub agent: AgentBeat,
}

/// What a beat proves about one datastore: used by verdicts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Freshness {
    /// A beat newer than the suspect time was read.
    Fresh,
    /// Complete reads under R4 show nothing new.
    Stale,
    /// Nobody of this partition reads it.
    Unknown,
}

/// One host's beats on one datastore, for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BeatAge {
    /// Where.
    pub datastore: DatastoreId,
    /// How old the newest is.
    pub age: Duration,
}
