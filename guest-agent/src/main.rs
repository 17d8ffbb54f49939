//! `mainstay-guest`: the agent inside a guest, and what applications and people say to it.

mod agent;

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand, ValueEnum};

use agent::config::{Config, FILE};
use agent::words::{Heartbeat, Reply, Request, Status, Wanted};
use agent::{Agent, places};
use mainstay_guest::message::{Application, Severity, Verdict, Wish};

/// The agent inside a guest of a Mainstay cluster
///
/// It beats once a second over a virtio-serial port, tells the host of errors of kernel, units, checks and applications, and
/// does what the host asks for (freeze, thaw, shutdown). The host's policy decides what follows from a report.
#[derive(Parser)]
#[command(name = "mainstay-guest", version, max_term_width = 100, after_long_help = MORE)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What no single command says.
const MORE: &str = "\
Examples:
  mainstay-guest status
      Does the host listen, and what is wrong here?
  mainstay-guest report --kind app/db --message 'no answer for 30 s' --ask reset --wait
      Ask for a reset of this VM, and wait for what the host decides
  mainstay-guest report --severity warning --kind app/disk --message 'over 90 % full'
      Only tell
  mainstay-guest report --kind app/db --message 'no connection' --ask reset-vm db1
      Ask for a reset of another VM, if its policy allows that
  mainstay-guest heartbeat enable; while work; do mainstay-guest heartbeat mark-active; done
      From 'enable' to 'disable' a silent application counts as failed

Without this program, an application says the same on the socket, one JSON object a line:
  {\"report\":{\"severity\":\"critical\",\"kind\":\"app/db\",\"message\":\"no answer\",\"ask\":\"reset\",\"wait\":true}}
  {\"heartbeat\":\"enable\"}   {\"ready\":true}   \"status\"

Files:
  /etc/mainstay/guest.toml      what is watched: units, checks, who may report; says of each line what it means
  /etc/mainstay/freeze.d/       programs that are run with 'freeze' and 'thaw' around a freeze
  /run/mainstay-guest.sock      where applications report
  /var/lib/mainstay-guest/      reports that wait for the host

The host's policy decides what follows: `mainstay cluster guest-policy` there. Without the virtio-serial port
org.mainstay.guest.0 (a channel in the VM's definition on the host) the agent waits until it comes.";

#[derive(Subcommand)]
enum Command {
    /// Run the agent: what the service does
    Run {
        /// Configuration; every line may be missing, and so may the file
        #[arg(long, default_value = FILE)]
        config: PathBuf,
        /// Folder for reports that wait for the host
        #[arg(long, default_value = agent::STATE)]
        state: PathBuf,
    },
    /// Tell the host that something is wrong
    ///
    /// Exit code: 0 accepted or done, 2 not taken (the reason is printed), 3 denied by the host's policy, 4 no last answer in
    /// time (the report is kept, and said again).
    Report {
        /// How bad it is
        #[arg(long, value_enum, default_value = "critical")]
        severity: HowBad,
        /// What kind, for example app/db; the host's rules match it
        #[arg(long)]
        kind: String,
        /// One line for people
        #[arg(long)]
        message: String,
        /// What you ask for: none, reset, restart-elsewhere, or reset-vm NAME
        #[arg(long, num_args = 1..=2, value_names = ["WISH", "NAME"])]
        ask: Vec<String>,
        /// Wait for the host's answers, at most so many seconds
        #[arg(long, num_args = 0..=1, default_missing_value = "60", value_name = "SECONDS")]
        wait: Option<u64>,
        #[command(flatten)]
        at: At,
    },
    /// Heartbeat of an application: enable it once, mark it active more often than every 30 s, disable it before the end
    Heartbeat {
        /// What to say
        #[arg(value_enum)]
        what: Heartbeat,
        #[command(flatten)]
        at: At,
    },
    /// Say that VMs which wait for this one may start, or that they may not
    Ready {
        /// They may not
        #[arg(long)]
        not: bool,
        #[command(flatten)]
        at: At,
    },
    /// Show what the agent knows
    Status {
        #[command(flatten)]
        at: At,
    },
    /// Read a configuration and say what is wrong with it
    CheckConfig {
        /// The file
        #[arg(default_value = FILE)]
        config: PathBuf,
    },
}

#[derive(clap::Args)]
struct At {
    /// The agent's socket
    #[arg(long, default_value = "/run/mainstay-guest.sock")]
    socket: PathBuf,
    /// Print the agent's own lines of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum HowBad {
    Info,
    Warning,
    Critical,
}

const NOT_TAKEN: u8 = 2;
const DENIED: u8 = 3;
const NO_ANSWER: u8 = 4;
/// For everything but the host's answers.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run { config, state } => run(&config, state),
        Command::Report { severity, kind, message, ask, wait, at } => {
            let ask = match wish(&ask) {
                Ok(ask) => ask,
                Err(why) => return failed(&why, NOT_TAKEN),
            };
            let severity = match severity {
                HowBad::Info => Severity::Info,
                HowBad::Warning => Severity::Warning,
                HowBad::Critical => Severity::Critical,
            };
            let wanted = Wanted { severity, kind, message, ask, wait: wait.is_some() };
            report(&at, wanted, wait.map(Duration::from_secs))
        }
        Command::Heartbeat { what, at } => simple(&at, &Request::Heartbeat(what)),
        Command::Ready { not, at } => simple(&at, &Request::Ready(!not)),
        Command::Status { at } => simple(&at, &Request::Status),
        Command::CheckConfig { config } => match Config::read(&config) {
            Ok(_) => {
                let there = if config.exists() { "well" } else { "not there, so what is built in is used" };
                say(&format!("{}: {there}", config.display()));
                ExitCode::SUCCESS
            }
            Err(why) => failed(&why, 1),
        },
    }
}

fn run(file: &std::path::Path, state: PathBuf) -> ExitCode {
    let (config, wrong) = match Config::read(file) {
        Ok(config) => (config, None),
        Err(why) => {
            agent::log(&format!("{why}\nwhat is built in is used instead"));
            (Config::default(), Some(why))
        }
    };
    let ends = UnixStream::pair().and_then(|(ends, signal)| {
        for number in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            signal_hook::low_level::pipe::register(number, signal.try_clone()?)?;
        }
        Ok(ends)
    });
    stay_in_memory();
    let places = agent::Places { state, ..places() };
    match ends.and_then(|ends| Ok((Agent::start(config, wrong, &places)?, ends))) {
        Ok((mut agent, ends)) => {
            agent.run(&ends);
            ExitCode::SUCCESS
        }
        Err(why) => failed(&format!("cannot start: {why}"), 1),
    }
}

/// Pages that are used stay in memory, and the killer of a full memory passes by: this program is to say that it is full.
fn stay_in_memory() {
    use rustix::mm::{MlockAllFlags, mlockall};
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
}

fn wish(words: &[String]) -> Result<Wish, String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [] | ["none"] => Ok(Wish::None),
        ["reset"] => Ok(Wish::Reset),
        ["restart-elsewhere"] => Ok(Wish::RestartElsewhere),
        ["reset-vm", name] => Ok(Wish::ResetVm(name.to_owned())),
        _ => Err("--ask takes none, reset, restart-elsewhere, or reset-vm NAME".to_owned()),
    }
}

/// A connection to the agent.
struct Line {
    stream: BufReader<UnixStream>,
    json: bool,
}

impl Line {
    fn open(at: &At) -> Result<Self, String> {
        let stream = UnixStream::connect(&at.socket).map_err(|why| {
            format!("cannot reach the agent at {}: {why}; does the service mainstay-guest run?", at.socket.display())
        })?;
        Ok(Self { stream: BufReader::new(stream), json: at.json })
    }

    fn say(&mut self, request: &Request) -> Result<(), String> {
        let mut line = serde_json::to_vec(request).map_err(|why| why.to_string())?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|why| format!("the agent went away: {why}"))
    }

    /// The next reply; none when the time is over.
    fn hear(&mut self, within: Duration) -> Result<Option<Reply>, String> {
        let within = within.max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(within)).map_err(|why| why.to_string())?;
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err("the agent went away".to_owned()),
            Ok(_) => {
                if self.json {
                    say(line.trim_end());
                }
                serde_json::from_str(&line).map(Some).map_err(|why| format!("the agent is not understood: {why}"))
            }
            Err(why) if matches!(why.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => Ok(None),
            Err(why) => Err(format!("the agent went away: {why}")),
        }
    }
}

fn simple(at: &At, request: &Request) -> ExitCode {
    let answer = Line::open(at).and_then(|mut line| {
        line.say(request)?;
        line.hear(PATIENCE)
    });
    match answer {
        Ok(Some(Reply::Error(why))) | Err(why) => failed(&why, NOT_TAKEN),
        Ok(None) => failed("the agent does not answer", NOT_TAKEN),
        Ok(Some(Reply::Status(status))) => {
            if !at.json {
                show(&status);
            }
            ExitCode::SUCCESS
        }
        Ok(Some(Reply::Ok | Reply::Accepted { .. } | Reply::Answer { .. })) => ExitCode::SUCCESS,
    }
}

fn report(at: &At, wanted: Wanted, wait: Option<Duration>) -> ExitCode {
    let until = Instant::now() + wait.unwrap_or(PATIENCE);
    let mut line = match Line::open(at).and_then(|mut line| line.say(&Request::Report(wanted)).map(|()| line)) {
        Ok(line) => line,
        Err(why) => return failed(&why, NOT_TAKEN),
    };
    loop {
        match line.hear(until.saturating_duration_since(Instant::now())) {
            Ok(Some(Reply::Accepted { sequence })) => {
                if !at.json {
                    say(&format!("report {sequence} is kept until the host has answered it"));
                }
                if wait.is_none() {
                    return ExitCode::SUCCESS;
                }
            }
            Ok(Some(Reply::Answer { sequence, verdict, why })) => {
                if !at.json {
                    say(&format!("report {sequence}: {verdict}: {why}"));
                }
                match verdict {
                    Verdict::Accepted | Verdict::Done => return ExitCode::SUCCESS,
                    Verdict::Denied => return ExitCode::from(DENIED),
                    Verdict::Delayed => {}
                }
            }
            Ok(Some(Reply::Error(why))) | Err(why) => return failed(&why, NOT_TAKEN),
            Ok(Some(Reply::Ok | Reply::Status(_))) => return failed("the agent answers another question", NOT_TAKEN),
            Ok(None) => {
                return failed("the host has not answered in time; the report is said again until it does", NO_ANSWER);
            }
        }
    }
}

fn show(status: &Status) {
    let host = match (status.host, status.vm.as_str()) {
        (true, "") => "listens".to_owned(),
        (true, vm) => format!("listens; this VM is {vm}"),
        (false, _) => {
            format!("does not listen{}", status.trouble.as_deref().map(|why| format!(": {why}")).unwrap_or_default())
        }
    };
    let application = match status.application {
        Application::Unwatched => "not watched",
        Application::Active => "active",
        Application::Silent => "silent",
    };
    say(&format!("host         {host}"));
    say(&format!("reports      {} wait for the host, {} were dropped", status.waiting, status.dropped));
    say(&format!("application  {application}"));
    say(&format!("ready        {}", if status.ready { "yes" } else { "no" }));
    if status.frozen {
        say("file systems stand still, as the host asked");
    }
    status.failed_units.iter().for_each(|unit| say(&format!("unit         {unit} has failed")));
    status.failing_checks.iter().for_each(|(name, why)| say(&format!("check        {name} fails: {why}")));
    if let Some(why) = &status.configuration {
        say(&format!("configuration is not used: {why}"));
    }
}

/// To standard output, whether somebody still reads it or not.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn failed(why: &str, code: u8) -> ExitCode {
    let (red, plain) = if std::io::stderr().is_terminal() { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
    eprintln!("{red}error{plain}: {why}");
    ExitCode::from(code)
}
