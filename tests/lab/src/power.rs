//! The power switch of the lab: switches hosts off and on at the word of a fence agent, and misbehaves when told to.
//!
//! ```text
//!  in a host:  fence_lab ──► lab fence-from-inside ──┐ power.sock: `off h2`, `on h2`, `status h2`, `monitor h2`
//!  cases, cli: `set hangs` ──────────────────────────┴──► power daemon ──► storage cut, everything in the host killed
//! ```
//!
//! An agent reads `key=value` lines, as fence agents do: `action`, and `plug` for the host. It ends with 0 when done or
//! when the host is on, with 2 when it is off, with 1 otherwise.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host::{Host, MOST, Power};
use crate::lab::RUN;
use crate::storage::Storage;

/// The daemon's socket, in the lab's runtime folder.
pub const SOCKET: &str = "power.sock";
/// The same as a host sees it.
pub const SOCKET_INSIDE: &str = "/run/mainstay-lab/power.sock";
/// Longer than any fence agent is waited for.
const LONG: Duration = Duration::from_secs(600);

/// How the switch behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Behaviour {
    /// It does what it is told.
    Works,
    /// It never answers.
    Hangs,
    /// It says that it failed.
    Fails,
    /// It says "off", and does nothing.
    Lies,
}

/// Serves until it is killed.
pub fn run_daemon(run: &Path) -> Result<()> {
    let path = run.join(SOCKET);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    let behaviour = Arc::new(Mutex::new(Behaviour::Works));
    for stream in listener.incoming() {
        let (stream, behaviour) = (stream.context("accept")?, behaviour.clone());
        std::thread::spawn(move || serve(&stream, &behaviour));
    }
    Ok(())
}

fn serve(stream: &UnixStream, behaviour: &Mutex<Behaviour>) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let answer = match obey(line.trim(), behaviour) {
            Ok(answer) => format!("{answer}\n"),
            Err(error) => format!("error {error:#}\n"),
        };
        eprintln!("power: {line}: {}", answer.trim());
        let mut writer = stream;
        if writer.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn obey(line: &str, behaviour: &Mutex<Behaviour>) -> Result<&'static str> {
    let (order, of) = line.split_once(' ').context("expected ORDER HOST, or set BEHAVIOUR")?;
    if order == "set" {
        let wanted = clap::ValueEnum::from_str(of, false).map_err(|why: String| anyhow::anyhow!(why))?;
        *behaviour.lock().expect("no holder panics") = wanted;
        return Ok("done");
    }
    let host = (1..=MOST).map(Host::new).find(|host| host.name() == of).with_context(|| format!("no host {of}"))?;
    let behaves = *behaviour.lock().expect("no holder panics");
    match (behaves, order) {
        (Behaviour::Hangs, _) => {
            std::thread::sleep(LONG);
            bail!("it hung")
        }
        (Behaviour::Fails, _) => bail!("the switch is broken"),
        (Behaviour::Lies, "status") => Ok("off"),
        (Behaviour::Lies, _) | (Behaviour::Works, "monitor") => Ok("done"),
        (Behaviour::Works, "status") => Ok(if host.power()? == Power::Off { "off" } else { "on" }),
        (Behaviour::Works, "off") => {
            if host.power()? != Power::Off {
                Storage::connect(Path::new(RUN))?.dead(&host.name())?;
                host.kill()?;
            }
            Ok("done")
        }
        (Behaviour::Works, "on") => {
            if host.power()? == Power::Off {
                let storage = Storage::connect(Path::new(RUN))?;
                let shared = storage.mount(&host.name())?;
                storage.alive(&host.name())?;
                host.start(&shared)?;
            }
            Ok("done")
        }
        (Behaviour::Works, _) => bail!("{order} is none of off, on, status, monitor"),
    }
}

/// Tells the switch how to behave from now on.
pub fn set(behaviour: Behaviour) -> Result<()> {
    let value = clap::ValueEnum::to_possible_value(&behaviour).context("every behaviour has a name")?;
    match ask(&Path::new(RUN).join(SOCKET), &format!("set {}", value.get_name()))?.as_str() {
        "done" => Ok(()),
        other => bail!("the power switch: {other}"),
    }
}

fn ask(socket: &Path, line: &str) -> Result<String> {
    let stream = UnixStream::connect(socket).with_context(|| format!("reaching {}", socket.display()))?;
    stream.set_read_timeout(Some(LONG))?;
    (&stream).write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}

/// The fence agent itself, in a host.
pub fn agent() -> Result<ExitCode> {
    let mut text = String::new();
    std::io::stdin().take(1 << 16).read_to_string(&mut text)?;
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let (action, plug) = (value("action").context("no action")?, value("plug").context("no plug")?);
    match ask(Path::new(SOCKET_INSIDE), &format!("{action} {plug}"))?.as_str() {
        "done" | "on" => Ok(ExitCode::SUCCESS),
        "off" => Ok(ExitCode::from(2)),
        other => bail!("{action} of {plug}: {other}"),
    }
}
