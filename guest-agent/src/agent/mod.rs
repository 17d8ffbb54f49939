//! The agent inside a guest: one loop, one thread for each thing that may hang.
//!
//! ```text
//!   kernel log ─┐                                       ┌─► queue ──► port ──► host
//!   units ──────┤                                       │     ▲ │
//!   checks ─────┼──► report ──► throttle (per kind) ────┘     │ └──► spool (disk)
//!   socket ─────┘                                             │
//!   host: Answer ─────────────────────────────────────────────┘──► the application that waits
//!   host: Ask ──► orders (freeze, thaw, shutdown) ──► Outcome
//!   each second: Beat
//! ```
//!
//! The loop itself touches no disk: what is broken in this guest must not keep it from saying so.

mod applications;
pub mod checks;
pub mod config;
mod ear;
mod facts;
mod kernel;
mod orders;
mod port;
mod queue;
pub mod socket;
mod spool;
mod throttle;
mod units;
mod wake;
pub mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mainstay_guest::PROTOCOL;
use mainstay_guest::message::{
    Application, Beat, FromGuest, GuestHello, Order, Report, ReportId, Severity, System, ToGuest, Verdict, Wish,
    one_line,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use checks::{Series, Tried, Turn};
use config::Config;
use kernel::KernelLog;
use orders::Orders;
use port::{Heard, Port};
use queue::Queue;
use socket::{ClientId, Socket};
use spool::Spool;
use throttle::Throttle;
use wake::{Wake, wake};
use words::Reply;

/// Between two beats.
const BEAT: Duration = Duration::from_secs(1);
/// The loop looks at a port whose host is away so often.
const LOOK: Duration = Duration::from_millis(250);

/// What threads tell the loop.
#[derive(Clone, PartialEq, Debug)]
pub enum Happened {
    /// A try of a check has ended.
    Tried(Tried),
    /// The watched units that have failed.
    Units(BTreeSet<String>),
    /// systemd is not heard.
    UnitsLost(String),
    /// An order of the host is done, or not.
    Ordered {
        /// Of the order.
        ask: u64,
        /// Why not.
        result: Result<(), String>,
    },
    /// File systems stand still, or go on.
    Frozen(bool),
    /// The queue as it was at this change lies on disk.
    Spooled(u64),
    /// It cannot be kept on disk.
    SpoolFails(String),
}

/// Where the agent keeps things.
#[derive(Clone, Debug)]
pub struct Places {
    /// On disk: reports that wait.
    pub state: PathBuf,
    /// In memory: how far the kernel's log was read.
    pub run: PathBuf,
}

/// See the module.
pub struct Agent {
    config: Config,
    /// Why the file was not used.
    misconfigured: Option<String>,
    boot: [u8; 16],
    system: System,
    port: Port,
    vm: String,
    queue: Queue,
    throttle: Throttle,
    spool: Spool,
    socket: Option<Socket>,
    kernel: Option<KernelLog>,
    orders: Orders,
    happened: Wake,
    series: Vec<Series>,
    failing: BTreeMap<usize, String>,
    failed_units: BTreeSet<String>,
    told_units: Option<String>,
    /// When the application was active last; none: it is not watched.
    active: Option<Instant>,
    silent: bool,
    ready: bool,
    frozen: bool,
    /// Applications that wait for their report to be kept, and those that wait for its answers.
    unkept: Vec<(u64, u64, ClientId)>,
    waits: BTreeMap<u64, ClientId>,
    beat: Instant,
    /// When this program started.
    started: Instant,
}

impl Agent {
    /// Starts everything.
    ///
    /// # Errors
    /// No thread or descriptor is left. Whatever else is missing (the port, a log, a disk) is told, and done without.
    pub fn start(config: Config, misconfigured: Option<String>, places: &Places) -> io::Result<Self> {
        let now = Instant::now();
        let (sender, happened) = wake()?;
        let kept = spool::read(&places.state).unwrap_or_else(|why| {
            log(&why);
            Vec::new()
        });
        let kernel = config.kernel_log.then(|| KernelLog::open(places.run.join("mainstay-guest.kmsg")));
        let kernel = kernel.and_then(|open| open.inspect_err(|why| log(&format!("/dev/kmsg: {why}"))).ok());
        let socket = Socket::open(&config.socket).inspect_err(|why| log(why)).ok();
        if !config.units.is_empty() {
            let (patterns, to) = (config.units.clone(), sender.clone());
            thread("units", move || units::run(&patterns, &to))?;
        }
        for (place, check) in config.checks.iter().enumerate() {
            let (check, probe, to) = (check.clone(), check.probe().map_err(io::Error::other)?, sender.clone());
            thread(&format!("check-{}", check.name), move || checks::run(place, &check, &probe, &to))?;
        }
        let mut agent = Self {
            boot: facts::boot(),
            system: facts::system(),
            port: Port::new(&config.port),
            vm: String::new(),
            queue: Queue::new(now, kept),
            throttle: Throttle::default(),
            spool: Spool::start(&places.state, sender.clone())?,
            socket,
            kernel,
            orders: Orders::start(&config, sender)?,
            happened,
            series: config.checks.iter().map(|check| Series::new(check, now)).collect(),
            failing: BTreeMap::new(),
            failed_units: BTreeSet::new(),
            told_units: None,
            active: None,
            silent: false,
            ready: !config.ready_by_hand,
            frozen: false,
            unkept: Vec::new(),
            waits: BTreeMap::new(),
            beat: now,
            started: now,
            misconfigured,
            config,
        };
        if let Some(why) = agent.misconfigured.clone() {
            agent.tell(now, Severity::Warning, "agent/configuration", &why, Wish::None);
        }
        Ok(agent)
    }

    /// Runs until a byte comes on `ends` (a signal).
    pub fn run(&mut self, ends: &UnixStream) {
        let mut told = None;
        loop {
            if self.wait(ends) {
                self.port.send(&FromGuest::Leaves);
                self.port.turn();
                return;
            }
            self.turn(Instant::now());
            if self.port.trouble().map(str::to_owned) != told {
                told = self.port.trouble().map(str::to_owned);
                log(told.as_deref().unwrap_or("the port is open"));
            }
        }
    }

    /// Waits until something is to be done; true: the end.
    fn wait(&self, ends: &UnixStream) -> bool {
        let now = Instant::now();
        let mut until = self.beat.saturating_duration_since(now);
        let port = self.port.polled();
        if port.is_none() {
            until = until.min(LOOK);
        }
        let mut polled = vec![PollFd::new(ends, PollFlags::IN), PollFd::new(&self.happened, PollFlags::IN)];
        polled.extend(self.kernel.as_ref().map(|log| PollFd::new(log, PollFlags::IN)));
        polled.extend(port.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        let socket = self.socket.iter().flat_map(Socket::polled);
        polled.extend(socket.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        let limit = Timespec { tv_sec: until.as_secs().cast_signed(), tv_nsec: i64::from(until.subsec_nanos()) };
        let _ = poll(&mut polled, Some(&limit)); // Interrupted: the turn finds nothing, and the next wait follows.
        polled[0].revents().contains(PollFlags::IN)
    }

    fn turn(&mut self, now: Instant) {
        for what in self.happened.take() {
            self.happened(now, what);
        }
        self.read_kernel(now);
        let wants = self.socket.as_mut().map(Socket::turn).unwrap_or_default();
        for (client, request) in wants {
            self.wanted(now, client, request);
        }
        for heard in self.port.turn() {
            self.heard(now, heard);
        }
        if self.beat <= now {
            // Without a burst after a freeze.
            self.beat = (self.beat + BEAT).max(now);
            self.each_second(now);
        }
        if self.port.host_is_there() {
            while let Some(report) = self.queue.send(now) {
                self.port.send(&FromGuest::Report(report));
            }
            self.port.turn().into_iter().for_each(|heard| self.heard(now, heard));
        }
        self.spool.keep(self.queue.changes(), self.queue.reports());
    }

    fn each_second(&mut self, now: Instant) {
        for place in 0..self.series.len() {
            let turn = self.series[place].due(now);
            self.check_turns(now, place, turn);
        }
        let limit = Duration::from_secs(self.config.heartbeat_s);
        self.silent = self.active.is_some_and(|active| limit < now.duration_since(active));
        for (severity, kind, text) in self.throttle.due(now) {
            self.add(severity, &kind, &text, Wish::None);
        }
        if let Some(log) = &mut self.kernel {
            log.mark();
        }
        self.send_beat();
    }

    fn send_beat(&mut self) {
        let facts = facts::facts();
        let beat = Beat {
            boot: self.boot,
            uptime_s: facts.uptime_s,
            load_centi: facts.load_centi,
            available_kib: facts.available_kib,
            root_writable: facts.root_writable,
            failed_units: u32::try_from(self.failed_units.len()).unwrap_or(u32::MAX),
            application: self.application(),
            ready: self.ready,
            frozen: self.frozen,
            dropped: self.queue.dropped(),
        };
        self.port.send(&FromGuest::Beat(beat));
    }

    fn application(&self) -> Application {
        match (self.active, self.silent) {
            (None, _) => Application::Unwatched,
            (Some(_), false) => Application::Active,
            (Some(_), true) => Application::Silent,
        }
    }

    // ---- sources ------------------------------------------------------------------------------------------------

    fn read_kernel(&mut self, now: Instant) {
        let Some(log) = &mut self.kernel else { return };
        let (found, _) = log.read(); // Should there be more, the next turn comes at once.
        for (class, line) in found {
            self.tell(now, class.severity, class.kind, &line, Wish::None);
        }
    }

    fn happened(&mut self, now: Instant, what: Happened) {
        match what {
            Happened::Tried(Tried { check, failed }) => {
                let turn = self.series.get_mut(check).and_then(|series| series.tried(now, failed));
                self.check_turns(now, check, turn);
            }
            Happened::Units(failed) => {
                self.told_units = None;
                let new: Vec<String> = failed.difference(&self.failed_units).cloned().collect();
                self.failed_units = failed;
                for unit in new {
                    self.tell(now, Severity::Critical, "unit/failed", &format!("{unit} has failed"), Wish::None);
                }
            }
            Happened::UnitsLost(why) => {
                if self.told_units.as_ref() != Some(&why) {
                    log(&format!("units are not watched: {why}"));
                }
                self.told_units = Some(why);
            }
            Happened::Ordered { ask, result } => self.port.send(&FromGuest::Outcome { ask, result }),
            Happened::Frozen(frozen) => {
                if std::mem::replace(&mut self.frozen, frozen) != frozen {
                    self.send_beat();
                }
            }
            Happened::Spooled(changes) => {
                let (kept, left) = std::mem::take(&mut self.unkept).into_iter().partition(|(at, ..)| *at <= changes);
                self.unkept = left;
                let kept: Vec<(u64, u64, ClientId)> = kept;
                kept.into_iter().for_each(|(_, sequence, client)| self.accepted(client, sequence));
            }
            Happened::SpoolFails(why) => log(&format!("reports cannot be kept over a reboot: {why}")),
        }
    }

    fn check_turns(&mut self, now: Instant, place: usize, turn: Option<Turn>) {
        let Some(turn) = turn else { return };
        let check = self.config.checks[place].clone();
        let kind = format!("check/{}", check.name);
        match turn {
            Turn::Fails(why) => {
                self.failing.insert(place, why.clone());
                let text = format!("check {} failed {} times: {why}", check.name, check.threshold);
                self.tell(now, check.severity, &kind, &text, check.ask);
            }
            Turn::Well => {
                self.failing.remove(&place);
                self.tell(now, Severity::Info, &kind, &format!("check {} is well again", check.name), Wish::None);
            }
        }
    }

    // ---- reports ------------------------------------------------------------------------------------------------

    /// One of the agent's own sources: the same kind is told at once, and then not more than every ten seconds.
    fn tell(&mut self, now: Instant, severity: Severity, kind: &str, text: &str, wish: Wish) {
        if let Some(text) = self.throttle.take(now, severity, kind, text) {
            self.add(severity, kind, &text, wish);
        }
    }

    fn add(&mut self, severity: Severity, kind: &str, text: &str, wish: Wish) {
        let report = self.report(severity, kind, &one_line(text), wish);
        log(&format!("{kind}: {}", report.message));
        if report.check().is_ok() {
            self.push(report);
        }
    }

    fn report(&mut self, severity: Severity, kind: &str, message: &str, wish: Wish) -> Report {
        let mut random = [0; 16];
        // Early in a boot it may have to wait for randomness: then the clocks are random enough to name a report.
        if rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::NONBLOCK).is_err() {
            let day = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            random = (day.as_nanos() ^ u128::from_le_bytes(self.boot)).to_le_bytes();
        }
        let id = name(random, self.started.elapsed());
        Report {
            id,
            sequence: self.queue.next_sequence(),
            boot: self.boot,
            severity,
            kind: kind.to_owned(),
            message: message.to_owned(),
            wish,
        }
    }

    fn push(&mut self, report: Report) {
        let Some(gone) = self.queue.add(report) else { return };
        let why = "dropped: too many reports wait for the host".to_owned();
        if let Some(client) = self.waits.remove(&gone.sequence) {
            self.reply(client, &Reply::Error(why.clone()));
        }
        let (dropped, left) = std::mem::take(&mut self.unkept).into_iter().partition(|(_, at, _)| *at == gone.sequence);
        self.unkept = left;
        let dropped: Vec<(u64, u64, ClientId)> = dropped;
        dropped.into_iter().for_each(|(_, _, client)| self.reply(client, &Reply::Error(why.clone())));
    }

    // ---- host ---------------------------------------------------------------------------------------------------

    fn heard(&mut self, now: Instant, heard: Heard) {
        match heard {
            Heard::HostCame => self.greet(),
            Heard::HostWent => log("the host does not listen"),
            Heard::Junk(why) => log(&format!("the host is not understood: {why}")),
            Heard::Said(ToGuest::Hello(hello)) => {
                log(&format!("the host listens; this VM is {}", one_line(&hello.vm)));
                self.vm = hello.vm;
                self.greet();
            }
            Heard::Said(ToGuest::Answer { id, verdict, why }) => self.answered(now, id, verdict, why),
            Heard::Said(ToGuest::Ask { ask, order }) => self.asked(ask, order),
        }
    }

    fn greet(&mut self) {
        let hello = GuestHello {
            protocol: PROTOCOL,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            boot: self.boot,
            system: self.system.clone(),
        };
        self.port.send(&FromGuest::Hello(hello));
        self.send_beat();
        self.queue.unsent();
    }

    fn answered(&mut self, now: Instant, id: ReportId, verdict: Verdict, why: String) {
        let Some(sequence) = self.queue.answered(now, id, verdict) else { return };
        // What the host has is kept.
        if let Some(at) = self.unkept.iter().position(|(_, kept, _)| *kept == sequence) {
            let (.., client) = self.unkept.remove(at);
            self.accepted(client, sequence);
        }
        let waits = if verdict.is_last() { self.waits.remove(&sequence) } else { self.waits.get(&sequence).copied() };
        if let Some(client) = waits {
            self.reply(client, &Reply::Answer { sequence, verdict, why });
        }
    }

    fn asked(&mut self, ask: u64, order: Order) {
        log(&format!("the host asks: {order:?}"));
        if !self.orders.give(ask, order) {
            let result = Err("busy with an earlier order".to_owned());
            self.port.send(&FromGuest::Outcome { ask, result });
        }
    }
}

/// The name of a report that is made now. A guest that was put back to a snapshot finds the same randomness in its memory once
/// more: the moment makes a difference, to the nanosecond.
fn name(random: [u8; 16], since_start: Duration) -> ReportId {
    ReportId((u128::from_le_bytes(random) ^ since_start.as_nanos()).to_le_bytes())
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(256 * 1024).spawn(work).map(drop)
}

/// For the journal, or whatever reads standard error.
pub fn log(line: &str) {
    eprintln!("mainstay-guest: {line}");
}

/// The state folder that is used unless another is given.
pub const STATE: &str = "/var/lib/mainstay-guest";

/// Where things are kept by default.
#[must_use]
pub fn places() -> Places {
    Places { state: STATE.into(), run: Path::new("/run").to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_randomness_at_another_time_is_another_name() {
        let at = Duration::from_secs(100);
        assert_eq!(name([7; 16], at), name([7; 16], at));
        assert_ne!(name([7; 16], at), name([7; 16], at + Duration::from_nanos(1)));
        assert_ne!(name([7; 16], at), name([8; 16], at));
    }
}
