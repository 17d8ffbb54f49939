//! What connects bridges with other hosts: their physical ports, and the bonds of these.
//!
//! ```text
//!   br0 ─┬─ eno1            a card: it has a device          vnet3, veth7: guests and containers, not looked at
//!        ├─ bond0 ─ eno2, eno3                               no physical port: no uplink, always well
//!        └─ eno4.100 ─ eno4 a VLAN: what lies below it counts
//! ```
//!
//! An uplink is lost when no physical port has a carrier. Open vSwitch's bridges do not show their ports in this way: nothing is found
//! of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{line, names};
use crate::types::finding::{Finding, Source};

/// VLANs of bonds of cards, and one more.
const DEEPEST: usize = 4;

/// Looks at all bridges below /sys/class/net. `networks`: libvirt networks and the bridge of each.
pub(super) fn read(net: &Path, networks: &BTreeMap<String, String>) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut bonds: BTreeSet<String> = BTreeSet::new();
    for bridge in names(net).into_iter().filter(|name| net.join(name).join("bridge").is_dir()) {
        let ports = names(&net.join(&bridge).join("brif"));
        let ports: Vec<String> = ports.into_iter().filter(|port| is_physical(net, port, DEEPEST)).collect();
        ports.iter().for_each(|port| add_bonds(net, port, DEEPEST, &mut bonds));
        if ports.is_empty() || ports.iter().any(|port| has_carrier(net, port)) {
            continue;
        }
        let text = format!("bridge {bridge} has lost its uplink: no carrier on {}", ports.join(", "));
        let of_networks = networks.iter().filter(|(_, on)| **on == bridge).map(|(name, _)| format!("network:{name}"));
        for object in of_networks.chain([format!("bridge:{bridge}")]) {
            found.push(Finding::new(Source::Uplink, &object, &text));
        }
    }
    for bond in bonds {
        let ports = line(&net.join(&bond).join("bonding/slaves")).unwrap_or_default();
        let (up, down): (Vec<&str>, Vec<&str>) = ports.split_whitespace().partition(|port| {
            let status = line(&net.join(port).join("bonding_slave/mii_status"));
            status.map_or_else(|| has_carrier(net, port), |status| status == "up")
        });
        if !up.is_empty() && !down.is_empty() {
            let text = format!(
                "bond {bond} has lost {} of its {} ports: {}",
                down.len(),
                up.len() + down.len(),
                down.join(", ")
            );
            found.push(Finding::new(Source::Bond, &bond, &text));
        }
    }
    found
}

fn is_bond(net: &Path, name: &str) -> bool {
    net.join(name).join("bonding").is_dir()
}

/// What a VLAN, or the like, lies on.
fn below(net: &Path, name: &str) -> Vec<String> {
    let all = names(&net.join(name)).into_iter();
    all.filter_map(|name| name.strip_prefix("lower_").map(str::to_owned)).collect()
}

fn is_physical(net: &Path, name: &str, depth: usize) -> bool {
    net.join(name).join("device").exists()
        || is_bond(net, name)
        || (0 < depth && below(net, name).iter().any(|lower| is_physical(net, lower, depth - 1)))
}

fn add_bonds(net: &Path, name: &str, depth: usize, bonds: &mut BTreeSet<String>) {
    if is_bond(net, name) {
        bonds.insert(name.to_owned());
    } else if 0 < depth {
        below(net, name).iter().for_each(|lower| add_bonds(net, lower, depth - 1, bonds));
    }
}

/// A device that is down cannot say: it has none.
fn has_carrier(net: &Path, name: &str) -> bool {
    let bond = line(&net.join(name).join("bonding/mii_status"));
    bond.map_or_else(|| line(&net.join(name).join("carrier")).as_deref() == Some("1"), |status| status == "up")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Net(tempfile::TempDir);

    impl Net {
        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        fn make(&self, path: &str) {
            std::fs::create_dir_all(self.0.path().join(path)).unwrap();
        }
        fn card(&self, name: &str, carrier: &str) {
            self.make(&format!("{name}/device"));
            self.write(&format!("{name}/carrier"), carrier);
        }
        fn bridge(&self, name: &str, ports: &[&str]) {
            self.make(&format!("{name}/bridge"));
            self.make(&format!("{name}/brif"));
            ports.iter().for_each(|port| self.make(&format!("{name}/brif/{port}")));
        }
        fn found(&self) -> Vec<String> {
            let networks = [("lan".to_owned(), "br1".to_owned()), ("nat".to_owned(), "virbr0".to_owned())].into();
            read(self.0.path(), &networks).into_iter().map(|one| format!("{}: {}", one.object, one.text)).collect()
        }
    }

    #[test]
    fn an_uplink_is_lost_when_no_physical_port_has_a_carrier() {
        let net = Net(tempfile::tempdir().unwrap());
        net.card("eno1", "1\n");
        net.card("eno2", "0\n");
        net.card("eno3", ""); // Down: the kernel gives an error there.
        net.write("vnet0/carrier", "1\n");
        net.bridge("br0", &["eno1", "eno2", "vnet0"]);
        net.bridge("br1", &["eno2", "eno3", "vnet0"]);
        net.bridge("virbr0", &["vnet0"]);
        net.bridge("br2", &["eno2.7"]);
        net.write("eno2.7/carrier", "0\n");
        net.make("eno2.7/lower_eno2");
        let lost = |name: &str, ports: &str| format!("bridge {name} has lost its uplink: no carrier on {ports}");
        assert_eq!(
            net.found(),
            [
                format!("network:lan: {}", lost("br1", "eno2, eno3")),
                format!("bridge:br1: {}", lost("br1", "eno2, eno3")),
                format!("bridge:br2: {}", lost("br2", "eno2.7")),
            ]
        );
        net.card("eno2", "1\n");
        net.write("eno2.7/carrier", "1\n");
        assert!(net.found().is_empty());
    }

    #[test]
    fn a_bond_counts_as_a_whole_and_what_it_has_lost_is_told() {
        let table = [
            ("up", "up", "up", vec![]),
            ("up", "down", "up", vec!["bond0: bond bond0 has lost 1 of its 2 ports: eno5"]),
            ("down", "down", "down", vec!["bridge:br0: bridge br0 has lost its uplink: no carrier on bond0.9"]),
        ];
        for (bond, first, second, expected) in table {
            let net = Net(tempfile::tempdir().unwrap());
            net.write("bond0/bonding/mii_status", bond);
            net.write("bond0/bonding/slaves", "eno5 eno6\n");
            net.write("eno5/bonding_slave/mii_status", first);
            net.write("eno6/bonding_slave/mii_status", second);
            net.make("bond0.9/lower_bond0");
            net.write("bond0.9/carrier", if bond == "up" { "1" } else { "0" });
            net.bridge("br0", &["bond0.9"]);
            assert_eq!(net.found(), expected, "{bond} {first} {second}");
        }
    }
}
