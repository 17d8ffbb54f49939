//! What only the agent knows, for `mainstay doctor`.

use crate::core::Core;
use crate::exec::clock;
use crate::exec::doctor::{AgentFacts, DatastoreFact, DeviceFact, GuardFact, PeerFact};
use crate::types::power::FenceDevice;
use crate::types::view::FenceDeviceView;

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
        devices: view.fence_devices.iter().zip(&settings.power.devices).map(device).collect(),
        without_device: without_device(core),
        disarmed: view.disarmed,
        findings: core.own_findings(),
        rules: view.rule_problems.into_iter().chain(core.admission_broken(now)).collect(),
    }
}

/// Before it was asked.
fn device((seen, set): (&FenceDeviceView, &FenceDevice)) -> DeviceFact {
    let answers = Err("it was not asked".to_owned());
    DeviceFact { name: seen.name.clone(), host: seen.host.clone(), distrusted: set.distrusted.clone(), answers }
}

fn without_device(core: &Core) -> Vec<String> {
    let settings = core.settings();
    let has = |host| settings.power.devices.iter().any(|device| device.host == host);
    settings.members.iter().filter(|member| !has(member.host)).map(|member| member.name.clone()).collect()
}
