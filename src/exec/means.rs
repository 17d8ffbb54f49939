//! What this host has for VMs beside memory and CPUs, looked at again and again, and told when it has changed.
//!
//! ```text
//!   /sys/class/net ─────────── each LOOK ──┐
//!   libvirt's networks ─────── each LOOK ──┼─► HostMeans ── changed? ─► told
//!   CPU models, machine types ─ each MODELS┘
//! ```
//!
//! What cannot be looked at is not told, and counts as there: whoever starts a VM learns it then.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::clock;
use super::libvirt::{Libvirt, Models};
use crate::types::needs::HostMeans;

/// How often names are looked at: a network that is back lets a VM start so much later at most.
const LOOK: Duration = Duration::from_secs(3);
/// How often libvirt is asked for CPU models, when it has answered: they change with its and QEMU's packages.
const MODELS: Duration = Duration::from_secs(600);
/// How often, when it has not.
const AGAIN: Duration = Duration::from_secs(30);
/// libvirt's time to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// libvirt's time for models: it may have to ask QEMU first, which takes it seconds after an upgrade.
const MODELS_ANSWER: Duration = Duration::from_secs(20);
/// Names that libvirt and containers give to their ends of cables: they come and go with these.
const PASSING: [&str; 4] = ["vnet", "macvtap", "macvlan", "veth"];

/// libvirt networks and the bridge of each that has one, as last seen.
pub type Bridges = Arc<Mutex<BTreeMap<String, String>>>;

/// Looks for ever, on its own thread; ends when `tell` says that nobody listens. `bridges` is kept up to date.
///
/// # Errors
/// When the thread cannot be started.
pub fn spawn(
    libvirt: Libvirt,
    bridges: Bridges,
    tell: impl Fn(HostMeans) -> bool + Send + 'static,
) -> std::io::Result<()> {
    let look = move || {
        let (mut told, mut models, mut due) = (HostMeans::default(), Models::default(), clock::now());
        let mut networks = None;
        loop {
            networks = libvirt.networks(ANSWER).or(networks); // What did not answer in time has what it had.
            if due <= clock::now() {
                let answer = libvirt.models(MODELS_ANSWER);
                due = clock::now() + if answer.is_some() { MODELS } else { AGAIN };
                models = answer.unwrap_or(models);
            }
            if let Some(networks) = &networks {
                bridges.lock().unwrap_or_else(PoisonError::into_inner).clone_from(networks);
            }
            let means = HostMeans {
                interfaces: interfaces(Path::new("/sys/class/net")),
                networks: networks.as_ref().map(|all| all.keys().cloned().collect()),
                cpu_models: models.cpus.clone(),
                machines: models.machines.clone(),
            }
            .bounded();
            if means != told {
                told = means.clone();
                if !tell(means) {
                    return;
                }
            }
            std::thread::sleep(LOOK);
        }
    };
    std::thread::Builder::new().name("means".into()).spawn(look).map(drop)
}

/// Network devices that stay: bridges, Open vSwitch's too, bonds, cards.
fn interfaces(folder: &Path) -> Option<BTreeSet<String>> {
    let entries = std::fs::read_dir(folder).ok()?;
    let passing = |name: &String| name == "lo" || PASSING.iter().any(|start| name.starts_with(start));
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Some(names.filter(|name| !passing(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_listed() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["br0", "br-dmz", "bond0", "eno1", "ovsbr1", "lo", "vnet3", "macvtap0", "veth12ab", "lan0", "local"]
        {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let expected = ["bond0", "br-dmz", "br0", "eno1", "lan0", "local", "ovsbr1"];
        assert_eq!(interfaces(folder.path()).unwrap().into_iter().collect::<Vec<_>>(), expected);
        assert_eq!(interfaces(&folder.path().join("none")), None);
    }
}
