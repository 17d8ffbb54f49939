//! What VMs need of a host beside its memory, CPUs and storage, and what hosts have of it.
//!
//! ```text
//!   definition ─► Needs (in the VM's record, in reports)     host ─► HostMeans (in its reports)
//!                        └────────────── placement compares them ───────────┘
//! ```
//!
//! What a host does not tell it counts as having: a start that fails goes elsewhere, a VM that is kept from a host which could run it
//! waits for nothing.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Names of one kind in one report; a host with more does not tell which.
pub const NAMES_MAX: usize = 512;

/// The memory that a guest has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// Ordinary.
    #[default]
    Ordinary,
    /// Large pages of the size that is usual on its host.
    Usual,
    /// Pages of 2 MiB.
    Of2Mib,
    /// Pages of 1 GiB.
    Of1Gib,
    /// Pages of another size: nobody counts them.
    Other,
}

/// What a VM needs.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Needs {
    /// Of bridges, libvirt networks and network devices: `bridge:br0`, `network:default`, `device:eth1`.
    pub networks: Vec<String>,
    /// The named CPU model that its host must be able to give it.
    pub cpu_model: Option<String>,
    /// Its machine type, with the architecture: `x86_64/pc-q35-7.2`.
    pub machine: Option<String>,
    /// Its memory.
    pub pages: Pages,
    /// Devices of its host are passed through: another host has others, or none.
    pub devices: bool,
}

/// What a host has. None: it does not know.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostMeans {
    /// Bridges and other network devices, but for those that VMs and containers bring.
    pub interfaces: Option<BTreeSet<String>>,
    /// libvirt networks that are active.
    pub networks: Option<BTreeSet<String>>,
    /// CPU models that it can give to guests.
    pub cpu_models: Option<BTreeSet<String>>,
    /// Machine types of its own architecture.
    pub machines: Option<BTreeSet<String>>,
}

/// Something that a host lacks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lack {
    /// A bridge, libvirt network or network device of this name.
    Network(String),
    /// A CPU model.
    CpuModel(String),
    /// A machine type.
    Machine(String),
}

impl HostMeans {
    /// The first thing that a VM needs and this host has not.
    #[must_use]
    pub fn lacks(&self, needs: &Needs) -> Option<Lack> {
        let without =
            |known: &Option<BTreeSet<String>>, name: &str| known.as_ref().is_some_and(|all| !all.contains(name));
        let network = needs.networks.iter().find_map(|need| {
            let (kind, name) = need.split_once(':')?;
            let known = if kind == "network" { &self.networks } else { &self.interfaces };
            // A path is no network device, but a device of another kind.
            (without(known, name) && !name.contains('/')).then(|| Lack::Network(name.to_owned()))
        });
        let model = || needs.cpu_model.clone().filter(|name| without(&self.cpu_models, name)).map(Lack::CpuModel);
        let machine = || needs.machine.clone().filter(|name| without(&self.machines, name)).map(Lack::Machine);
        network.or_else(model).or_else(machine)
    }

    /// Without lists that are too long to be told.
    #[must_use]
    pub fn bounded(self) -> Self {
        let short = |all: Option<BTreeSet<String>>| all.filter(|all| all.len() <= NAMES_MAX);
        Self {
            interfaces: short(self.interfaces),
            networks: short(self.networks),
            cpu_models: short(self.cpu_models),
            machines: short(self.machines),
        }
    }
}

impl std::fmt::Display for Lack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(name) => write!(f, "has no network '{name}'"),
            Self::CpuModel(name) => write!(f, "cannot give it the CPU '{name}'"),
            Self::Machine(name) => write!(f, "has no machine type '{name}'"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_and_what_is_not_told_is_there() {
        let set = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<String>>());
        let told = HostMeans {
            interfaces: set(&["br0", "eth1"]),
            networks: set(&["default"]),
            cpu_models: set(&["Haswell"]),
            machines: set(&["x86_64/q35"]),
        };
        let networks = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let model = |name: &str| Needs { cpu_model: Some(name.to_owned()), ..Needs::default() };
        let machine = |name: &str| Needs { machine: Some(name.to_owned()), ..Needs::default() };
        let network = |names: &[&str]| Needs { networks: networks(names), ..Needs::default() };
        let table = [
            (Needs::default(), ""),
            (network(&["bridge:br0", "network:default", "device:eth1"]), ""),
            (network(&["bridge:br0", "bridge:br-dmz"]), "has no network 'br-dmz'"),
            (network(&["network:br0"]), "has no network 'br0'"),
            (network(&["device:/dev/vhost-vdpa-0"]), ""),
            (model("Haswell"), ""),
            (model("Denverton"), "cannot give it the CPU 'Denverton'"),
            (machine("x86_64/q35"), ""),
            (machine("x86_64/pc-q35-99.0"), "has no machine type 'x86_64/pc-q35-99.0'"),
        ];
        for (needs, expected) in table {
            let lack = |means: &HostMeans| means.lacks(&needs).map(|lack| lack.to_string()).unwrap_or_default();
            assert_eq!(lack(&told), expected, "{needs:?}");
            assert_eq!(lack(&HostMeans::default()), "", "{needs:?}");
        }
    }

    #[test]
    fn long_lists_are_not_told() {
        let many: BTreeSet<String> = (0..=NAMES_MAX).map(|n| n.to_string()).collect();
        let means = HostMeans {
            interfaces: Some(many.clone()),
            networks: Some(["a".to_owned()].into()),
            ..HostMeans::default()
        };
        let told = means.bounded();
        assert_eq!((told.interfaces, told.networks.map(|all| all.len())), (None, Some(1)));
    }
}
