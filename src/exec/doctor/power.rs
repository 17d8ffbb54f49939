//! Checks of fence devices: their programs are here, they answer, they are trusted, and every host has one if any has.

use super::{AgentFacts, DeviceFact, Finding, names};

/// All of all devices; nothing when there is none, since no cluster needs one.
pub(super) fn devices(agent: &AgentFacts) -> Vec<Finding> {
    let mut found: Vec<Finding> = agent.devices.iter().map(one).collect();
    if !agent.devices.is_empty() && !agent.without_device.is_empty() {
        found.push(Finding::warning(
            "fence-device",
            names(agent.without_device.iter().map(String::as_str)),
            "no fence device, though other hosts have one: never switched off, its VMs come back by lapsed lease",
            "mainstay host fence-device add NAME HOST AGENT KEY=VALUE…",
        ));
    }
    found
}

fn one(device: &DeviceFact) -> Finding {
    let name = device.name.as_str();
    match (&device.distrusted, &device.answers) {
        (Some(why), _) => Finding::error(
            "fence-device",
            name,
            format!("not used: {why}"),
            format!("mend it, try it, then: mainstay host fence-device trust {name}"),
        ),
        (None, Err(why)) => Finding::error(
            "fence-device",
            name,
            format!("does not answer this host: {why}"),
            format!("mainstay host fence-device test {name}; is its program installed here, its address reachable?"),
        ),
        (None, Ok(())) => Finding::ok("fence-device", name, format!("answers; switches {} off", device.host)),
    }
}
