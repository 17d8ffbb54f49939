//! What the file leaves open, answered by the host itself: its name, its beat interfaces, its address.
//!
//! Asked once at start and on reload. An interface without an address yet is an error here; the unit starts after the
//! network, and systemd tries again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use super::read::is_host_name;
use super::{Config, IsolationAddress, Transport};
use crate::types::guard::BeatInterface;

/// This host as the others see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Here {
    /// Its name in the cluster.
    pub name: String,
    /// Where it listens for orders.
    pub control: SocketAddr,
    /// What others use to migrate to it.
    pub migration_uri: String,
    /// Interfaces that carry beats; for unicast only, those (or `""` = any) on which they are received.
    pub interfaces: Vec<BeatInterface>,
    /// Hosts that get each beat by unicast.
    pub peers: Vec<SocketAddr>,
    /// Who tells whether its own link works.
    pub isolation_addresses: Vec<IsolationAddress>,
}

impl Here {
    /// Those that can be asked now.
    #[must_use]
    pub fn to_ask(&self) -> Vec<IpAddr> {
        let addresses = self.isolation_addresses.iter().flat_map(|one| match one {
            IsolationAddress::Gateway => gateways(&self.interfaces),
            IsolationAddress::Address(address) => vec![*address],
        });
        addresses.collect()
    }
}

/// What the host does not tell, and what to write into the file instead.
#[derive(Debug, thiserror::Error)]
pub enum NotHere {
    /// The kernel's host name cannot be used.
    #[error("the host name {0:?} cannot be used; set host.name")]
    Name(String),
    /// No default route, and not exactly one interface.
    #[error("no default route, and the interfaces to choose from are: {found}; set beat.interfaces", found = list(.0))]
    Interface(Vec<String>),
    /// A named interface does not exist.
    #[error("beat.interfaces: there is no interface {name:?}; there are: {found}", found = list(.found))]
    NoInterface {
        /// As the file names it.
        name: String,
        /// Those that exist.
        found: Vec<String>,
    },
    /// The interface has no address that others could reach.
    #[error("interface {0:?} has no address yet; give it one, or set host.address")]
    NoAddress(String),
    /// The kernel did not answer.
    #[error("cannot list network interfaces: {0}")]
    Kernel(#[from] nix::errno::Errno),
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

impl Config {
    /// Asks the host for what the file leaves open.
    ///
    /// # Errors
    /// When the host's answer is missing or not unique; the error names the key to set.
    pub fn here(&self) -> Result<Here, NotHere> {
        let name = match &self.host.name {
            Some(name) => name.clone(),
            None => kernel_name()?,
        };
        let found = Interfaces::read()?;
        let names = match self.beat.interfaces.as_slice() {
            // With its address and peers given, a unicast host needs no interface.
            [] if self.beat.transport == Transport::Unicast && self.host.address.is_some() => Vec::new(),
            [] => vec![found.usual()?],
            named => found.all_exist(named)?,
        };
        let address = match (self.host.address, names.first()) {
            (Some(address), _) => address,
            (None, Some(first)) => found.address(first)?,
            (None, None) => found.address(&found.usual()?)?,
        };
        let bracketed = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let group = match (self.beat.transport, address) {
            (Transport::Multicast, _) => self.beat.group,
            // Unicast: where beats are received; the sender sends to the peers only.
            (Transport::Unicast, IpAddr::V4(_)) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
            (Transport::Unicast, IpAddr::V6(_)) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        };
        let group = SocketAddr::new(group, self.beat.port);
        let interface = |name| BeatInterface { name, group, ttl: self.beat.ttl };
        let any = (self.beat.transport == Transport::Unicast && names.is_empty()).then(String::new);
        Ok(Here {
            control: SocketAddr::new(address, self.control.port),
            migration_uri: self.libvirt.migration_uri.replace("{address}", &bracketed).replace("{name}", &name),
            name,
            interfaces: names.into_iter().chain(any).map(interface).collect(),
            peers: self.beat.peers.clone(),
            isolation_addresses: self.beat.isolation_addresses.clone(),
        })
    }
}

fn kernel_name() -> Result<String, NotHere> {
    let name = nix::unistd::gethostname()?.to_string_lossy().into_owned();
    if is_host_name(&name) && name != "localhost" { Ok(name) } else { Err(NotHere::Name(name)) }
}

/// Interfaces that are up and not loopback, each with its addresses in the kernel's order.
struct Interfaces(Vec<(String, Vec<IpAddr>)>);

impl Interfaces {
    fn read() -> Result<Self, NotHere> {
        let mut found: Vec<(String, Vec<IpAddr>)> = Vec::new();
        for entry in getifaddrs()? {
            if entry.flags.contains(InterfaceFlags::IFF_LOOPBACK) {
                continue;
            }
            if !found.iter().any(|(name, _)| *name == entry.interface_name) {
                found.push((entry.interface_name.clone(), Vec::new()));
            }
            let address = entry.address.as_ref().and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
            });
            if let (Some(address), Some((_, addresses))) =
                (address, found.iter_mut().find(|(name, _)| *name == entry.interface_name))
            {
                addresses.push(address);
            }
        }
        Ok(Self(found))
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    /// The interface of the default route, else the only one.
    fn usual(&self) -> Result<String, NotHere> {
        let file = |path| std::fs::read_to_string(path).unwrap_or_default();
        let routed =
            default_route_v4(&file("/proc/net/route")).or_else(|| default_route_v6(&file("/proc/net/ipv6_route")));
        match (routed, self.0.as_slice()) {
            (Some(name), _) => Ok(name),
            (None, [(only, _)]) => Ok(only.clone()),
            (None, _) => Err(NotHere::Interface(self.names())),
        }
    }

    fn all_exist(&self, named: &[String]) -> Result<Vec<String>, NotHere> {
        match named.iter().find(|name| !self.0.iter().any(|(found, _)| found == *name)) {
            Some(missing) => Err(NotHere::NoInterface { name: missing.clone(), found: self.names() }),
            None => Ok(named.to_vec()),
        }
    }

    /// Its first address; IPv4 before IPv6, and nothing that only means something on one link.
    fn address(&self, name: &str) -> Result<IpAddr, NotHere> {
        let addresses = self.0.iter().find(|(found, _)| found == name).map_or(&[][..], |(_, addresses)| addresses);
        let usable = |address: &&IpAddr| match address {
            IpAddr::V4(v4) => !v4.is_link_local(),
            IpAddr::V6(v6) => !is_link_local(*v6),
        };
        let first = addresses.iter().filter(usable).min_by_key(|address| address.is_ipv6());
        first.copied().ok_or_else(|| NotHere::NoAddress(name.into()))
    }
}

fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// Routers of default routes over these interfaces; over any, if none is named. IPv4 only where there is any.
#[must_use]
pub fn gateways(interfaces: &[BeatInterface]) -> Vec<IpAddr> {
    let file = |path| std::fs::read_to_string(path).unwrap_or_default();
    let mut all = gateways_v4(&file("/proc/net/route"));
    if all.is_empty() {
        all = gateways_v6(&file("/proc/net/ipv6_route"));
    }
    let named =
        |name: &str| interfaces.iter().all(|one| one.name.is_empty()) || interfaces.iter().any(|one| one.name == name);
    all.into_iter().filter(|(name, _)| named(name)).map(|(_, address)| address).collect()
}

fn gateways_v4(text: &str) -> Vec<(String, IpAddr)> {
    let routes = text.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        // In the byte order of the machine.
        let address = Ipv4Addr::from(u32::from_str_radix(fields.get(2)?, 16).ok()?.to_ne_bytes());
        (is_default && !address.is_unspecified()).then(|| (fields[0].to_owned(), IpAddr::V4(address)))
    });
    routes.collect()
}

fn gateways_v6(text: &str) -> Vec<(String, IpAddr)> {
    let routes = text.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00") && fields.first()?.bytes().all(|byte| byte == b'0');
        let address = Ipv6Addr::from(u128::from_str_radix(fields.get(4)?, 16).ok()?);
        // One of the link alone cannot be reached without naming the link, which an echo request does not.
        (is_default && !address.is_unspecified() && !is_link_local(address))
            .then(|| (fields.get(9).copied().unwrap_or_default().to_owned(), IpAddr::V6(address)))
    });
    routes.collect()
}

/// The interface of the default route with the lowest metric, out of `/proc/net/route`.
fn default_route_v4(text: &str) -> Option<String> {
    let routes = text.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        let metric = fields.get(6)?.parse::<u64>().ok()?;
        is_default.then(|| (metric, fields[0].to_owned()))
    });
    routes.min().map(|(_, name)| name)
}

/// The same out of `/proc/net/ipv6_route`.
fn default_route_v6(text: &str) -> Option<String> {
    let routes = text.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00") && fields.first()?.bytes().all(|byte| byte == b'0');
        let metric = u64::from_str_radix(fields.get(5)?, 16).ok()?;
        let name = *fields.get(9)?;
        (is_default && name != "lo").then(|| (metric, name.to_owned()))
    });
    routes.min().map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_routers() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                  tun0\t00000000\t00000000\t0001\t0\t0\t100\t00000000\t0\t0\t0\n\
                  eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(gateways_v4(v4), [("eth0".to_owned(), IpAddr::from([192, 168, 1, 1]))]);
        let zero = "0".repeat(32);
        let v6 = format!(
            "{zero} 00 {zero} 00 20010db8000000000000000000000001 00000400 00000001 00000000 00000003 eth2\n\
             {zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth3\n\
             {zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
        );
        assert_eq!(gateways_v6(&v6), [("eth2".to_owned(), "2001:db8::1".parse().unwrap())]);
        assert!(gateways_v4("Iface\njunk\n").is_empty() && gateways_v6("junk").is_empty());
    }

    #[test]
    fn finds_the_default_route() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
                  eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                  eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(default_route_v4(v4).as_deref(), Some("eth0"));
        assert_eq!(default_route_v4("Iface\njunk\n"), None);
        let zero = "0".repeat(32);
        let v6 = format!(
            "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth2\n\
             {zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
        );
        assert_eq!(default_route_v6(&v6).as_deref(), Some("eth2"));
        assert_eq!(default_route_v6("junk"), None);
    }

    #[test]
    fn prefers_addresses_that_others_can_reach() {
        let found = Interfaces(vec![
            ("a".into(), vec!["fe80::1".parse().unwrap(), "fd00::1".parse().unwrap(), "10.0.0.1".parse().unwrap()]),
            ("b".into(), vec!["fe80::1".parse().unwrap(), "169.254.1.1".parse().unwrap()]),
        ]);
        assert_eq!(found.address("a").unwrap().to_string(), "10.0.0.1");
        let no = found.address("b").unwrap_err().to_string();
        assert_eq!(no, "interface \"b\" has no address yet; give it one, or set host.address");
        let missing = found.all_exist(&["a".into(), "c".into()]).unwrap_err().to_string();
        assert_eq!(missing, "beat.interfaces: there is no interface \"c\"; there are: a, b");
    }

    #[test]
    fn fills_the_migration_uri_in() {
        let mut config = Config::default();
        config.host.name = Some("one".into());
        config.host.address = Some("fd00::1".parse().unwrap());
        config.beat.transport = Transport::Unicast;
        config.beat.peers = vec!["10.0.0.2:7783".parse().unwrap()];
        let here = config.here().unwrap();
        assert_eq!(here.migration_uri, "qemu+tcp://[fd00::1]/system");
        assert_eq!(here.control.to_string(), "[fd00::1]:7784");
        // Unicast: received on any interface, sent to the peers only.
        let groups: Vec<String> = here.interfaces.iter().map(|one| format!("{:?} {}", one.name, one.group)).collect();
        assert_eq!(groups, ["\"\" [::]:7783"]);
    }
}
