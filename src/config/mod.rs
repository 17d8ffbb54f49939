//! `/etc/mainstay/mainstay.toml`: what is the host's own. What belongs to the cluster is in `types/settings.rs`.
//!
//! ```text
//! text ── read.rs ──► Config (types, ranges, no contradictions) ── here.rs ──► Here (this host's names and addresses)
//!            └──────► findings: line, key, what is wrong, what to write instead
//! ```
//!
//! A file that is missing means: every default. A file with one mistake is refused as a whole, and all its mistakes
//! are told at once. Not here: anything that must be the same on two hosts.

mod duration;
mod here;
mod read;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

pub use duration::{BadDuration, duration};
pub use here::{Here, NotHere};
pub(crate) use read::is_host_name;

/// Where the file lies unless a command line says otherwise.
pub const PATH: &str = "/etc/mainstay/mainstay.toml";
/// A longer file is refused unread, in bytes.
const MAX_BYTES: u64 = 64 * 1024;

/// The file, with defaults for what it does not say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// `[host]`
    pub host: Host,
    /// `[beat]`
    pub beat: Beat,
    /// `[control]`
    pub control: Control,
    /// `[libvirt]`
    pub libvirt: Libvirt,
    /// `[guard]`
    pub guard: Guard,
    /// `[log]`
    pub log: Log,
    /// `[paths]`
    pub paths: Paths,
}

/// Who this host is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Host {
    /// Its name in the cluster; none = the kernel's host name.
    pub name: Option<String>,
    /// Its own address for orders and migrations; none = the first of the first beat interface.
    pub address: Option<IpAddr>,
}

/// How beats travel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Beat {
    /// Interfaces that carry them; none = the one of the default route.
    pub interfaces: Vec<String>,
    /// Multicast group.
    pub group: IpAddr,
    /// UDP port.
    pub port: u16,
    /// Hops, 1 to 255.
    pub ttl: u8,
    /// Multicast, or unicast only.
    pub transport: Transport,
    /// Hosts that get each beat by unicast, too.
    pub peers: Vec<SocketAddr>,
    /// Who is asked whether this host's own link works, when it hears no other host. None: only the others count.
    pub isolation_addresses: Vec<IsolationAddress>,
}

/// Somebody in the network of the beats who is no host of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IsolationAddress {
    /// The router of the default route, as it is then.
    Gateway,
    /// This one.
    Address(IpAddr),
}

impl Default for Beat {
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            group: IpAddr::V4(Ipv4Addr::new(239, 77, 83, 1)),
            port: 7783,
            ttl: 1,
            transport: Transport::Multicast,
            peers: Vec::new(),
            isolation_addresses: vec![IsolationAddress::Gateway],
        }
    }
}

/// How beats reach the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// By the group, and to the peers if there are any.
    Multicast,
    /// To the peers only.
    Unicast,
}

/// Where this agent listens for orders.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Control {
    /// TCP port.
    pub port: u16,
}

impl Default for Control {
    fn default() -> Self {
        Self { port: 7784 }
    }
}

/// How libvirt is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Libvirt {
    /// The daemon of this host.
    pub uri: String,
    /// What others use to migrate to this host; `{address}` and `{name}` are filled in.
    pub migration_uri: String,
}

impl Default for Libvirt {
    fn default() -> Self {
        Self { uri: "qemu:///system".into(), migration_uri: "qemu+tcp://{address}/system".into() }
    }
}

/// What only the guard uses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Guard {
    /// Hardware watchdog; none = without.
    pub watchdog: Option<PathBuf>,
}

/// What is logged.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Log {
    /// Least important level that is still logged.
    pub level: Level,
}

/// A log level, as `tracing` knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Level {
    /// What failed.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happened.
    #[default]
    Info,
    /// And how.
    Debug,
    /// And everything.
    Trace,
}

impl Level {
    /// All of them, by their names in the file.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("error", Self::Error),
        ("warn", Self::Warn),
        ("info", Self::Info),
        ("debug", Self::Debug),
        ("trace", Self::Trace),
    ];

    /// Its name in the file, which `tracing` understands, too.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, level)| *level == self).map_or("info", |(name, _)| name)
    }
}

/// Where this host's files lie. Only tests have a reason to change these.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Paths {
    /// What must survive a boot: membership, keys, host id.
    pub state: PathBuf,
    /// What must not: sockets, the guard's list.
    pub run: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self { state: "/var/lib/mainstay".into(), run: "/run/mainstay".into() }
    }
}

/// One mistake in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Line, from 1; 0 = the file as a whole.
    pub line: usize,
    /// `section.key`, or empty if the text is no TOML.
    pub key: String,
    /// What is wrong and what to write instead.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if 0 < self.line {
            write!(f, "line {}: ", self.line)?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.text)
    }
}

/// Why there is no configuration. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file exists but cannot be read.
    #[error("{path}: cannot be read: {cause}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// It says something wrong.
    #[error("{}", lines(.path, .findings))]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Every mistake, by line.
        findings: Vec<Finding>,
    },
}

fn lines(path: &Path, findings: &[Finding]) -> String {
    findings.iter().map(|finding| format!("{}: {finding}", path.display())).collect::<Vec<_>>().join("\n")
}

/// Reads the file; one that is missing means every default.
///
/// # Errors
/// When it cannot be read, or has a mistake; the error tells all mistakes.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let unreadable = |cause| ConfigError::Unreadable { path: path.into(), cause };
    let text = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Config::default()),
        Err(error) => return Err(unreadable(error)),
        Ok(data) if MAX_BYTES < data.len() => {
            return Err(unreadable(std::io::Error::other(format!("longer than {MAX_BYTES} bytes"))));
        }
        Ok(_) => std::fs::read_to_string(path).map_err(unreadable)?,
    };
    parse(&text).map_err(|findings| ConfigError::Wrong { path: path.into(), findings })
}

/// Every mistake in this text; none = it can be used.
#[must_use]
pub fn check(text: &str) -> Vec<Finding> {
    parse(text).err().unwrap_or_default()
}

/// The text as a configuration.
///
/// # Errors
/// Every mistake in it, by line.
pub fn parse(text: &str) -> Result<Config, Vec<Finding>> {
    read::config(text)
}

#[cfg(test)]
mod tests;
