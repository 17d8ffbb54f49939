//! The text of the file ──► `Config`, or every mistake in it.
//!
//! ```text
//! TOML ── unknown sections and keys ── values: type, unit, range ── contradictions between values
//! ```
//!
//! Reads the parser's own tree instead of deriving, because a derived reader stops at the first mistake and cannot say
//! in which line a value of the wrong range stands.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Config, Finding, IsolationAddress, Level, Transport};

/// Every key there is. `systemd/mainstay.toml` shows each with its default; a test compares the two.
pub(super) const KEYS: [(&str, &[&str]); 7] = [
    ("host", &["name", "address"]),
    ("beat", &["interfaces", "group", "port", "ttl", "transport", "peers", "isolation_addresses"]),
    ("control", &["port"]),
    ("libvirt", &["uri", "migration_uri"]),
    ("guard", &["watchdog"]),
    ("log", &["level"]),
    ("paths", &["state", "run"]),
];
/// Interfaces that carry beats, at most.
const MAX_INTERFACES: usize = 8;
/// Unicast peers, at most: the other hosts of the largest cluster.
const MAX_PEERS: usize = crate::types::MAX_HOSTS - 1;

pub(super) fn config(text: &str) -> Result<Config, Vec<Finding>> {
    let table = match DeTable::parse(text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            let line = error.span().map_or(0, |span| line_of(text, span.start));
            return Err(vec![Finding { line, key: String::new(), text: error.message().into() }]);
        }
    };
    let mut reader = Reader { text, table: &table, findings: Vec::new() };
    reader.unknown_keys();
    let config = reader.values();
    reader.contradictions(&config);
    let mut findings = reader.findings;
    findings.sort_by_key(|finding| finding.line);
    if findings.is_empty() { Ok(config) } else { Err(findings) }
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// A name that may stand for a host: what DNS allows in a label or a dotted name.
pub(crate) fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 63 && name.split('.').all(label)
}

struct Reader<'t> {
    text: &'t str,
    table: &'t DeTable<'t>,
    findings: Vec<Finding>,
}

impl<'t> Reader<'t> {
    fn unknown_keys(&mut self) {
        for (section, value) in self.table {
            let name = section.get_ref();
            let Some((_, known)) = KEYS.iter().find(|(known, _)| known == name) else {
                let cure = nearest(name, KEYS.iter().map(|(known, _)| *known));
                self.find(section.span().start, name, format!("no such section; {cure}"));
                continue;
            };
            let DeValue::Table(table) = value.get_ref() else {
                self.find(section.span().start, name, format!("is a section; write [{name}] on a line of its own"));
                continue;
            };
            for key in table.keys().filter(|key| !known.contains(&key.get_ref().as_ref())) {
                let elsewhere = KEYS.iter().find(|(_, keys)| keys.contains(&key.get_ref().as_ref()));
                let cure = match elsewhere {
                    Some((section, _)) => format!("it belongs into [{section}]"),
                    None => nearest(key.get_ref(), known.iter().copied()),
                };
                self.find(key.span().start, &format!("{name}.{}", key.get_ref()), format!("no such key; {cure}"));
            }
        }
    }

    fn values(&mut self) -> Config {
        let mut config = Config::default();
        let name_ok = |name: &str| {
            let why = "is no host name; use letters, digits, '-' and '.', at most 63 of them";
            if is_host_name(name) { Ok(name.to_owned()) } else { Err(format!("{name:?} {why}")) }
        };
        config.host.name = self.parsed("host", "name", "a host name", name_ok);
        config.host.address = self.parsed("host", "address", "an address", own_address);
        self.beat(&mut config);
        if let Some(port) = self.number("control", "port", 1..=65535, "a TCP port") {
            config.control.port = port;
        }
        if let Some(uri) = self.parsed("libvirt", "uri", "a libvirt URI", uri) {
            config.libvirt.uri = uri;
        }
        if let Some(uri) = self.parsed("libvirt", "migration_uri", "a libvirt URI", migration_uri) {
            config.libvirt.migration_uri = uri;
        }
        config.guard.watchdog = self.parsed("guard", "watchdog", "a path", absolute);
        let level = |name: &str| choice(name, &Level::NAMES);
        if let Some(level) = self.parsed("log", "level", "a level", level) {
            config.log.level = level;
        }
        if let Some(path) = self.parsed("paths", "state", "a path", absolute) {
            config.paths.state = path;
        }
        if let Some(path) = self.parsed("paths", "run", "a path", absolute) {
            config.paths.run = path;
        }
        config
    }

    fn beat(&mut self, config: &mut Config) {
        let beat = &mut config.beat;
        if let Some(port) = self.number("beat", "port", 1..=65535, "a UDP port") {
            beat.port = port;
        }
        if let Some(ttl) = self.number("beat", "ttl", 1..=255, "a number of hops") {
            beat.ttl = u8::try_from(ttl).unwrap_or(u8::MAX);
        }
        let group = |text: &str| match text.parse::<IpAddr>() {
            Ok(address) if address.is_multicast() => Ok(address),
            _ => Err(format!("{text:?} is no multicast address; use one of 239.0.0.0/8 or ff00::/8")),
        };
        if let Some(group) = self.parsed("beat", "group", "a multicast address", group) {
            beat.group = group;
        }
        let kinds = [("multicast", Transport::Multicast), ("unicast", Transport::Unicast)];
        if let Some(kind) = self.parsed("beat", "transport", "a kind of transport", |name| choice(name, &kinds)) {
            beat.transport = kind;
        }
        if let Some(names) = self.list("beat", "interfaces", MAX_INTERFACES, interface) {
            beat.interfaces = names;
        }
        let port = beat.port;
        if let Some(peers) = self.list("beat", "peers", MAX_PEERS, |text| peer(text, port)) {
            beat.peers = peers;
        }
        let address = |text: &str| match (text, text.parse::<IpAddr>()) {
            ("gateway", _) => Ok(IsolationAddress::Gateway),
            (_, Ok(address)) if !address.is_multicast() && !address.is_unspecified() => {
                Ok(IsolationAddress::Address(address))
            }
            _ => Err(format!("{text:?} is neither \"gateway\" nor an IPv4 or IPv6 address")),
        };
        if let Some(addresses) = self.list("beat", "isolation_addresses", MAX_INTERFACES, address) {
            beat.isolation_addresses = addresses;
        }
    }

    fn contradictions(&mut self, config: &Config) {
        let beat = &config.beat;
        if beat.transport == Transport::Unicast && beat.peers.is_empty() && !self.wrong("beat.peers") {
            let text = "is \"unicast\", but beat.peers names nobody; list the other hosts' addresses there";
            self.find(self.place("beat", "transport"), "beat.transport", text.into());
        }
        if let Some(twice) = first_twice(&beat.interfaces) {
            self.find(self.place("beat", "interfaces"), "beat.interfaces", format!("{twice:?} stands there twice"));
        }
        if let Some(twice) = first_twice(&beat.peers) {
            self.find(self.place("beat", "peers"), "beat.peers", format!("{twice} stands there twice"));
        }
        let own = config.host.address.map(|address| SocketAddr::new(address, beat.port));
        if own.is_some_and(|own| beat.peers.contains(&own)) {
            self.find(self.place("beat", "peers"), "beat.peers", "names this host itself; list the others only".into());
        }
        if config.paths.state == config.paths.run {
            let text = "is the same as paths.state, which must survive a boot while this must not";
            self.find(self.place("paths", "run"), "paths.run", text.into());
        }
    }

    fn find(&mut self, at: usize, key: &str, text: String) {
        self.findings.push(Finding { line: line_of(self.text, at), key: key.chars().take(64).collect(), text });
    }

    fn wrong(&self, key: &str) -> bool {
        self.findings.iter().any(|finding| finding.key == key)
    }

    fn value(&self, section: &str, key: &str) -> Option<&'t Spanned<DeValue<'t>>> {
        self.table.get(section)?.get_ref().as_table()?.get(key)
    }

    /// Where the value stands; where a section that lacks it stands, else the beginning.
    fn place(&self, section: &str, key: &str) -> usize {
        let section_at = || self.table.get_key_value(section).map(|(name, _)| name.span().start);
        self.value(section, key).map(|value| value.span().start).or_else(section_at).unwrap_or(0)
    }

    fn parsed<T>(
        &mut self,
        section: &str,
        key: &str,
        what: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.value(section, key)?;
        let result = match value.get_ref().as_str() {
            Some(text) => read(text),
            None => Err(format!("is {}; write {what} in quotes", kind(value.get_ref()))),
        };
        result.map_err(|why| self.find(value.span().start, &format!("{section}.{key}"), why)).ok()
    }

    fn number(&mut self, section: &str, key: &str, range: RangeInclusive<u16>, what: &str) -> Option<u16> {
        let value = self.value(section, key)?;
        let (least, most) = (*range.start(), *range.end());
        let result = match value.get_ref().as_integer() {
            None => Err(format!("is {}; write {what} from {least} to {most}", kind(value.get_ref()))),
            Some(number) => i128::from_str_radix(number.as_str(), number.radix())
                .ok()
                .and_then(|number| u16::try_from(number).ok())
                .filter(|number| range.contains(number))
                .ok_or_else(|| format!("{number} is out of range; write {what} from {least} to {most}")),
        };
        result.map_err(|why| self.find(value.span().start, &format!("{section}.{key}"), why)).ok()
    }

    fn list<T>(
        &mut self,
        section: &str,
        key: &str,
        most: usize,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let value = self.value(section, key)?;
        let name = format!("{section}.{key}");
        let Some(array) = value.get_ref().as_array() else {
            let why = format!("is {}; write a list, for example [\"…\"]", kind(value.get_ref()));
            self.find(value.span().start, &name, why);
            return None;
        };
        if most < array.len() {
            self.find(value.span().start, &name, format!("has {} entries; at most {most} are possible", array.len()));
            return None;
        }
        let mut entries = Vec::new();
        for entry in array {
            let result = match entry.get_ref().as_str() {
                Some(text) => read(text),
                None => Err(format!("holds {}; write each entry in quotes", kind(entry.get_ref()))),
            };
            match result {
                Ok(entry) => entries.push(entry),
                Err(why) => self.find(entry.span().start, &name, why),
            }
        }
        Some(entries)
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}

fn nearest<'k>(word: &str, known: impl Iterator<Item = &'k str> + Clone) -> String {
    let near = known
        .clone()
        .map(|known| (strsim::damerau_levenshtein(word, known), known))
        .filter(|(distance, known)| *distance * 2 <= known.len())
        .min();
    match near {
        Some((_, known)) => format!("did you mean {known:?}?"),
        None => format!("known are {}", known.collect::<Vec<_>>().join(", ")),
    }
}

fn choice<T: Copy>(name: &str, choices: &[(&str, T)]) -> Result<T, String> {
    choices.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| {
        let cure = nearest(name, choices.iter().map(|(known, _)| *known));
        format!("{name:?} is no choice; {cure}")
    })
}

fn first_twice<T: PartialEq>(list: &[T]) -> Option<&T> {
    list.iter().enumerate().find(|(at, entry)| list[..*at].contains(entry)).map(|(_, entry)| entry)
}

fn own_address(text: &str) -> Result<IpAddr, String> {
    match text.parse::<IpAddr>() {
        Err(_) => Err(format!("{text:?} is no IP address; names are not looked up here")),
        Ok(address) if address.is_unspecified() || address.is_multicast() => {
            Err(format!("{address} is no host's own address; write the one that the other hosts reach"))
        }
        Ok(address) => Ok(address),
    }
}

fn interface(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.len() <= 15;
    if fits && !text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
        Ok(text.into())
    } else {
        Err(format!("{text:?} is no interface name; `ip link` shows them"))
    }
}

fn peer(text: &str, port: u16) -> Result<SocketAddr, String> {
    let peer = match text.parse::<IpAddr>() {
        Ok(address) => Some(SocketAddr::new(address, port)),
        Err(_) => text.parse::<SocketAddr>().ok(),
    };
    peer.filter(|peer| !peer.ip().is_unspecified() && !peer.ip().is_multicast() && peer.port() != 0)
        .ok_or_else(|| format!("{text:?} is no peer; write \"ADDRESS\" or \"ADDRESS:PORT\""))
}

fn uri(text: &str) -> Result<String, String> {
    match text.split_once("://") {
        Some((scheme, _)) if !scheme.is_empty() && !text.contains(char::is_whitespace) => Ok(text.into()),
        _ => Err(format!("{text:?} is no libvirt URI; write for example \"qemu:///system\"")),
    }
}

fn migration_uri(text: &str) -> Result<String, String> {
    let rest = uri(text)?.replace("{address}", "").replace("{name}", "");
    if rest.contains(['{', '}']) {
        return Err(format!("{text:?} holds an unknown field; known are {{address}} and {{name}}"));
    }
    Ok(text.into())
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("{text:?} is no absolute path")) }
}
