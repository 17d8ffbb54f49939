//! What only the agent knows, for `mainstay doctor`.

use crate::core::Core;
use crate::exec::clock;
use crate::exec::doctor::{AgentFacts, DatastoreFact, GuardFact, PeerFact};

/// The facts of this moment.
pub(crate) fn of(core: &Core) -> AgentFacts {
    let now = clock::now();
    let view = core.view(now);
    let settings = core.settings();
    let me = view.seen_by.clone();
    let libvirt_up = view.hosts.iter().find(|host| host.name == me).and_then(|host| host.libvirt) == Some(true);
    let datastores = view.datastores.iter().zip(&settings.datastores).map(|(seen, set)| DatastoreFact {
        name: seen.name.clone(),
        path: seen.path.clone(),
        fence: set.fence.clone(),
        late_writes: set.late_writes,
        round_trip_ms: seen.latency_ms.filter(|_| seen.lease == "valid"),
        trouble: seen.trouble.clone(),
        peers_seen: core.peers_on(set.id, now),
    });
    AgentFacts {
        cluster: view.cluster.clone(),
        libvirt: if libvirt_up { Ok("it answers".into()) } else { Err("it does not answer".into()) },
        hook_seen: core.hook_seen(),
        guard: match core.guard_punctual() {
            Some(punctual) => GuardFact::Answers { real_time: punctual, late: !punctual },
            None => GuardFact::Silent("no connection to /run/mainstay/guard.sock".into()),
        },
        peers: core
            .peers_heard(now)
            .into_iter()
            .map(|(name, beat_age_ms, hears_us)| PeerFact { name, beat_age_ms, hears_us, skew_ms: None })
            .collect(),
        datastores: datastores.collect(),
        autostart: core.autostart(),
    }
}
