//! `/etc/mainstay/guest.toml`: what is watched in this guest. Every line may be missing, and so may the file.
//!
//! A file with an error is told with its place, and the agent goes on with what is built in: a guest whose file has a
//! typing error still beats.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use mainstay_guest::message::{MAX_KIND, Severity, Wish};

/// Where it lies.
pub const FILE: &str = "/etc/mainstay/guest.toml";
/// More checks than these are refused: each has a thread of its own.
const MAX_CHECKS: usize = 64;

/// What is watched.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the virtio-serial port.
    pub port: String,
    /// Socket for applications.
    pub socket: SocketConfig,
    /// The kernel's log is read.
    pub kernel_log: bool,
    /// systemd units whose failure is reported; `*` and `?` stand for letters.
    pub units: Vec<String>,
    /// An application that has enabled its heartbeat may be silent for so long.
    pub heartbeat_s: u64,
    /// Until somebody says "ready", others that wait for this guest go on waiting. Without this it is always ready.
    pub ready_by_hand: bool,
    /// Freezing of file systems.
    pub freeze: FreezeConfig,
    /// Run for an orderly shutdown, instead of systemd's or busybox's own.
    pub shutdown: Vec<String>,
    /// Run for an orderly reboot, instead of systemd's or busybox's own.
    pub reboot: Vec<String>,
    /// Own checks.
    #[serde(rename = "check")]
    pub checks: Vec<CheckConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            port: mainstay_guest::PORT.to_owned(),
            socket: SocketConfig::default(),
            kernel_log: true,
            units: Vec::new(),
            heartbeat_s: 30,
            ready_by_hand: false,
            freeze: FreezeConfig::default(),
            shutdown: Vec::new(),
            reboot: Vec::new(),
            checks: Vec::new(),
        }
    }
}

/// Who may speak on the socket.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SocketConfig {
    /// Its path.
    pub path: PathBuf,
    /// A group whose members may report beside root.
    pub group: Option<String>,
}

impl Default for SocketConfig {
    fn default() -> Self {
        Self { path: PathBuf::from("/run/mainstay-guest.sock"), group: None }
    }
}

/// Freezing of file systems.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FreezeConfig {
    /// Programs here are run with `freeze` before and with `thaw` after, in the order of their names.
    pub hooks: PathBuf,
    /// Mount points that are never frozen.
    pub except: BTreeSet<PathBuf>,
}

impl Default for FreezeConfig {
    fn default() -> Self {
        Self { hooks: PathBuf::from("/etc/mainstay/freeze.d"), except: BTreeSet::new() }
    }
}

/// One check, as it is written.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckConfig {
    /// Its name; reports have the kind `check/NAME`.
    pub name: String,
    #[serde(flatten)]
    shape: Shape,
    /// From the begin of one try to the next.
    #[serde(default = "ten")]
    pub interval_s: u64,
    /// A try that takes longer has failed.
    #[serde(default = "five")]
    pub timeout_s: u64,
    /// So many tries in a row have to fail.
    #[serde(default = "three")]
    pub threshold: u32,
    /// How bad that is.
    #[serde(default = "critical")]
    pub severity: Severity,
    /// What is asked then.
    #[serde(default)]
    pub ask: Wish,
}

/// Exactly one of these stands there. (serde refuses unknown fields only beside them.)
#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
struct Shape {
    command: Option<Vec<String>>,
    tcp: Option<String>,
    http: Option<String>,
    process: Option<String>,
    file: Option<PathBuf>,
    max_age_s: Option<u64>,
}

fn ten() -> u64 {
    10
}
fn five() -> u64 {
    5
}
fn three() -> u32 {
    3
}
fn critical() -> Severity {
    Severity::Critical
}

/// How one try is made.
#[derive(Clone, PartialEq, Debug)]
pub enum Probe {
    /// It exits with 0.
    Command(Vec<String>),
    /// It takes connections.
    Tcp(String),
    /// It answers GET with 2xx or 3xx.
    Http(String),
    /// One of that name runs.
    Process(String),
    /// It was changed within this time.
    File(PathBuf, Duration),
}

impl CheckConfig {
    /// What is tried.
    ///
    /// # Errors
    /// None or several things stand there, or one without what belongs to it.
    pub fn probe(&self) -> Result<Probe, String> {
        let Shape { command, tcp, http, process, file, max_age_s } = self.shape.clone();
        let file = match (file, max_age_s) {
            (Some(file), Some(age)) => Some(Probe::File(file, Duration::from_secs(age))),
            (None, None) => None,
            (Some(_), None) => return Err("'file' needs 'max_age_s'".to_owned()),
            (None, Some(_)) => return Err("'max_age_s' needs 'file'".to_owned()),
        };
        if command.as_ref().is_some_and(Vec::is_empty) {
            return Err("'command' is empty".to_owned());
        }
        let given = [
            command.map(Probe::Command),
            tcp.map(Probe::Tcp),
            http.map(Probe::Http),
            process.map(Probe::Process),
            file,
        ];
        let mut given = given.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(probe), None) => Ok(probe),
            _ => Err("give one of 'command', 'tcp', 'http', 'process' or 'file'".to_owned()),
        }
    }

    fn check(&self) -> Result<(), String> {
        self.probe()?;
        let allowed = |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit() || b"-_.".contains(&letter);
        if !(1..=MAX_KIND - "check/".len()).contains(&self.name.len()) || !self.name.bytes().all(allowed) {
            return Err("a name is made of a-z, 0-9, '-', '_' and '.'".to_owned());
        }
        if self.interval_s == 0 || self.timeout_s == 0 || self.threshold == 0 {
            return Err("'interval_s', 'timeout_s' and 'threshold' are at least 1".to_owned());
        }
        Ok(())
    }
}

impl Config {
    /// Reads a file; one that is not there says nothing.
    ///
    /// # Errors
    /// What is wrong, where, and what to do.
    pub fn read(path: &Path) -> Result<Self, String> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).map_err(|why| format!("{}: {why}", path.display())),
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(why) => Err(format!("{}: {why}", path.display())),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|why| why.to_string().trim_end().to_owned())?;
        if MAX_CHECKS < config.checks.len() {
            return Err(format!("{} checks; at most {MAX_CHECKS} are run", config.checks.len()));
        }
        let mut names = BTreeSet::new();
        for check in &config.checks {
            check.check().map_err(|why| format!("check '{}': {why}", check.name))?;
            if !names.insert(&check.name) {
                return Err(format!("two checks have the name '{}'", check.name));
            }
        }
        if config.heartbeat_s == 0 {
            return Err("'heartbeat_s' is at least 1".to_owned());
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_enough() {
        assert_eq!(Config::parse(""), Ok(Config::default()));
        assert_eq!(Config::read(Path::new("/nonexistent/guest.toml")), Ok(Config::default()));
    }

    #[test]
    fn all_kinds_of_checks() {
        let text = "
units = ['postgresql*.service']
[socket]
group = 'app'
[[check]]
name = 'web'
http = 'http://127.0.0.1/health'
ask = 'reset'
[[check]]
name = 'db'
tcp = '127.0.0.1:5432'
severity = 'warning'
ask = { reset-vm = 'db1' }
[[check]]
name = 'job'
file = '/run/job'
max_age_s = 600
interval_s = 60
[[check]]
name = 'cmd'
command = ['/bin/true', '-x']
[[check]]
name = 'ng'
process = 'nginx'
";
        let config = Config::parse(text).unwrap();
        let probes: Vec<Probe> = config.checks.iter().map(|check| check.probe().unwrap()).collect();
        assert_eq!(
            probes,
            [
                Probe::Http("http://127.0.0.1/health".to_owned()),
                Probe::Tcp("127.0.0.1:5432".to_owned()),
                Probe::File("/run/job".into(), Duration::from_secs(600)),
                Probe::Command(vec!["/bin/true".to_owned(), "-x".to_owned()]),
                Probe::Process("nginx".to_owned()),
            ]
        );
        assert_eq!(config.checks[1].ask, Wish::ResetVm("db1".to_owned()));
        assert_eq!((config.checks[2].interval_s, config.checks[2].threshold), (60, 3));
    }

    #[test]
    fn errors_say_what_to_do() {
        for (text, expected) in [
            ("prot = 'x'", "unknown field `prot`"),
            ("units = 3", "invalid type"),
            ("heartbeat_s = 0", "at least 1"),
            ("[[check]]\nname = 'x'", "give one of"),
            ("[[check]]\nname = 'x'\ntcp = 'a:1'\nprocess = 'p'", "give one of"),
            ("[[check]]\nname = 'x'\nfile = '/a'", "'max_age_s'"),
            ("[[check]]\nname = 'x'\ncommand = []", "empty"),
            ("[[check]]\nname = 'X'\ntcp = 'a:1'", "a name is made of"),
            ("[[check]]\nname = 'x'\ntcp = 'a:1'\nthreshold = 0", "at least 1"),
            ("[[check]]\nname = 'x'\ntcp = 'a:1'\nintervall_s = 1", "unknown field"),
            ("[[check]]\nname = 'x'\ntcp = 'a:1'\n[[check]]\nname = 'x'\ntcp = 'a:1'", "two checks"),
        ] {
            let why = Config::parse(text).expect_err(text);
            assert!(why.contains(expected), "{text:?}: {why}");
        }
    }
}
