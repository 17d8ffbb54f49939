//! Own checks: a command, a TCP port, a page, a process, the age of a file.
//!
//! ```text
//!   one thread a check:  try ──► Tried { check, why? } ──► the loop ──► Series ── THRESHOLD failures in a row ──► report
//!                        ▲         interval                                   └── well again ──► report (info)
//!                        └─────────────┘
//! ```
//!
//! A try that hangs (a file on a dead disk, a command that does not end) costs its own thread: the loop counts it as failed
//! when its time is over, and as failed again with every interval. A command gets SIGKILL, with all its children; a new
//! one is not begun before it has gone.

use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::Happened;
use super::config::{CheckConfig, Probe};
use super::wake::Sender;

/// How one try ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tried {
    /// Which check, by its place in the configuration.
    pub check: usize,
    /// Why it failed.
    pub failed: Option<String>,
}

/// Runs a check for ever, on a thread of its own.
pub fn run(check: usize, config: &CheckConfig, probe: &Probe, to: &Sender) {
    let (interval, limit) = (Duration::from_secs(config.interval_s), Duration::from_secs(config.timeout_s));
    loop {
        let began = Instant::now();
        let failed = tried(probe, limit).err();
        if !to.send(Happened::Tried(Tried { check, failed })) {
            return;
        }
        std::thread::sleep(interval.saturating_sub(began.elapsed()));
    }
}

fn tried(probe: &Probe, limit: Duration) -> Result<(), String> {
    match probe {
        Probe::Command(words) => command(words, limit),
        Probe::Tcp(address) => tcp(address, limit),
        Probe::Http(url) => http(url, limit),
        Probe::Process(name) => process(name),
        Probe::File(path, age) => {
            let changed = std::fs::metadata(path).and_then(|data| data.modified());
            let changed = changed.map_err(|why| format!("{}: {why}", path.display()))?;
            let old = SystemTime::now().duration_since(changed).unwrap_or_default();
            if old <= *age {
                return Ok(());
            }
            Err(format!(
                "{} was changed {} s ago, at most {} s are allowed",
                path.display(),
                old.as_secs(),
                age.as_secs()
            ))
        }
    }
}

/// Runs a program to its end, or to its SIGKILL.
///
/// # Errors
/// It cannot be run, does not end in time, or does not end well.
pub fn command(words: &[String], limit: Duration) -> Result<(), String> {
    let (program, arguments) = words.split_first().ok_or("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let mut child = command.spawn().map_err(|why| format!("cannot run {program}: {why}"))?;
    match ends(&child, limit) {
        Ok(true) => {}
        Ok(false) => {
            kill(&child);
            let _ = child.wait(); // One in uninterruptible sleep holds up this thread, and nothing else.
            return Err(format!("{program} did not end within {} s", limit.as_secs()));
        }
        Err(why) => {
            kill(&child);
            let _ = child.wait();
            return Err(format!("cannot wait for {program}: {why}"));
        }
    }
    let status = child.wait().map_err(|why| format!("cannot wait for {program}: {why}"))?;
    if status.success() { Ok(()) } else { Err(format!("{program} ended with {status}")) }
}

/// Whether a child ends in time.
fn ends(child: &Child, limit: Duration) -> rustix::io::Result<bool> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: i64::from(limit.subsec_nanos()) };
    poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).map(|ended| 0 < ended)
}

/// SIGKILL to it and to what it has started.
fn kill(child: &Child) {
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
}

fn tcp(address: &str, limit: Duration) -> Result<(), String> {
    let addresses = address.to_socket_addrs().map_err(|why| format!("{address}: {why}"))?;
    let mut last = format!("{address}: no such address");
    for one in addresses {
        match TcpStream::connect_timeout(&one, limit) {
            Ok(_) => return Ok(()),
            Err(why) => last = format!("{one}: {why}"),
        }
    }
    Err(last)
}

fn http(url: &str, limit: Duration) -> Result<(), String> {
    let request = minreq::get(url).with_timeout(limit.as_secs()).with_max_redirects(0);
    let answer = request.send().map_err(|why| format!("{url}: {why}"))?;
    if (200..400).contains(&answer.status_code) { Ok(()) } else { Err(format!("{url} answers {}", answer.status_code)) }
}

/// By the name that the kernel knows (15 letters), or that of its program.
fn process(name: &str) -> Result<(), String> {
    let short: String = name.chars().take(15).collect();
    for entry in std::fs::read_dir("/proc").map_err(|why| format!("/proc: {why}"))?.flatten() {
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        if read("comm").trim_ascii_end() == short.as_bytes() {
            return Ok(());
        }
        let line = read("cmdline");
        let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
        if program.rsplit(|byte| *byte == b'/').next() == Some(name.as_bytes()) {
            return Ok(());
        }
    }
    Err(format!("no process {name} runs"))
}

/// What the tries of one check amount to.
pub struct Series {
    interval: Duration,
    limit: Duration,
    threshold: u32,
    failures: u32,
    /// The last try, or the last time that one was missed.
    heard: Instant,
}

/// What is to be told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Turn {
    /// It has failed so often as may not be.
    Fails(String),
    /// It is well again after that.
    Well,
}

impl Series {
    /// Nothing was tried yet.
    pub fn new(config: &CheckConfig, now: Instant) -> Self {
        Self {
            interval: Duration::from_secs(config.interval_s),
            limit: Duration::from_secs(config.timeout_s),
            threshold: config.threshold,
            failures: 0,
            heard: now,
        }
    }

    /// A try has ended.
    pub fn tried(&mut self, now: Instant, failed: Option<String>) -> Option<Turn> {
        self.heard = now;
        let Some(why) = failed else {
            let was = std::mem::take(&mut self.failures);
            return (self.threshold <= was).then_some(Turn::Well);
        };
        self.failures = self.failures.saturating_add(1);
        (self.failures == self.threshold).then_some(Turn::Fails(why))
    }

    /// Time has passed: a try that has not ended counts as one that failed.
    pub fn due(&mut self, now: Instant) -> Option<Turn> {
        // A second more than the thread's own limit, which says more.
        let late = self.interval.max(self.limit) + Duration::from_secs(1);
        if now.duration_since(self.heard) <= late {
            return None;
        }
        self.tried(now, Some("a try hangs".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_is_told_once_and_so_is_its_end() {
        let text = "name = 'x'\ntcp = 'a:1'\ninterval_s = 10\ntimeout_s = 5\nthreshold = 3";
        let config: CheckConfig = toml::from_str(text).unwrap();
        let now = Instant::now();
        let mut series = Series::new(&config, now);
        let at = |s: u64| now + Duration::from_secs(s);
        let fails = || Some("no".to_owned());
        assert_eq!(series.tried(at(1), fails()), None);
        assert_eq!(series.tried(at(11), fails()), None);
        assert_eq!(series.tried(at(12), None), None, "well before the third");
        assert_eq!(series.tried(at(13), fails()), None);
        assert_eq!(series.due(at(24)), None);
        assert_eq!(series.due(at(25)), None, "the second, by its silence");
        assert_eq!(series.due(at(26)), None);
        assert_eq!(series.due(at(37)), Some(Turn::Fails("a try hangs".to_owned())));
        assert_eq!(series.tried(at(40), fails()), None, "told already");
        assert_eq!(series.tried(at(50), None), Some(Turn::Well));
        assert_eq!(series.tried(at(60), None), None);
    }

    #[test]
    fn probes_of_this_machine() {
        let limit = Duration::from_secs(5);
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(command(&words(&["true"]), limit), Ok(()));
        assert!(command(&words(&["false"]), limit).unwrap_err().contains("exit status: 1"));
        assert!(command(&words(&["/nonexistent/x"]), limit).unwrap_err().contains("cannot run"));
        let hangs = command(&words(&["sh", "-c", "sleep 1000 & wait"]), Duration::from_millis(50));
        assert!(hangs.unwrap_err().contains("did not end"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        assert_eq!(tcp(&address, limit), Ok(()));
        drop(listener);
        assert!(tcp(&address, limit).is_err());
        let me = std::env::current_exe().unwrap();
        assert_eq!(process(me.file_name().unwrap().to_str().unwrap()), Ok(()));
        assert!(process("no-such-process-anywhere").is_err());
        assert!(tried(&Probe::File(me.clone(), Duration::from_secs(0)), limit).is_err());
        assert_eq!(tried(&Probe::File(me, Duration::from_secs(1 << 40)), limit), Ok(()));
    }

    #[test]
    fn pages() {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/health", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            for status in ["200 OK", "503 Service Unavailable"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).unwrap();
                write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
            }
        });
        assert_eq!(http(&url, Duration::from_secs(5)), Ok(()));
        assert!(http(&url, Duration::from_secs(5)).unwrap_err().contains("503"));
        server.join().unwrap();
    }
}
