//! Power switches by fence agents (the programs of the package fence-agents, or any that speaks like them).
//!
//! ```text
//!   own thread ──► fence_… ◄── standard input: action=off, then one key=value per line; secrets go no other way
//!                     ├─ off, monitor: 0 = done           status: 0 = on, 2 = off (its answer is its exit code only)
//!                     └─ anything else, or the deadline: failed, with the beginning of what it wrote, secrets taken out
//! ```
//!
//! A program that hangs is killed with its group; one that hangs in the kernel keeps its thread, of at most 32.
//!
//! Not here: when a host is switched off, what an answer proves (core).

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use super::program::{self, AFTERWARDS, Ended, Places, Stop};
use crate::types::power::{FenceDevice, PowerAnswer, PowerOrder};

/// Where packages put fence agents.
const FOLDERS: [&str; 6] = ["/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin", "/sbin", "/bin"];
/// Agents at the same time, hung ones included.
static AGENTS: Places = Places::new(32);
/// Exit code of `status` (and of `monitor`, where an agent takes it for that) when the host is off.
const IS_OFF: i32 = 2;

/// Runs `run` on a thread of its own and answers exactly once, soon after `within` at the latest, or after `stop` says so.
pub fn ask(
    device: FenceDevice,
    order: PowerOrder,
    within: Duration,
    stop: Arc<Stop>,
    answer: impl FnOnce(Result<PowerAnswer, String>) + Send + 'static,
) {
    let late = format!("{} did not end within {} ms", device.agent, within.as_millis());
    let work = move || run(&device, order, within, &stop);
    let failed = move |why: Option<String>| Err(why.unwrap_or(late));
    // Killing takes a moment, and the program's own words are worth it.
    program::bounded(&AGENTS, "fence-agent", within + 3 * AFTERWARDS, work, failed, answer);
}

/// Asks a device and waits for its answer.
///
/// # Errors
/// When the agent is not there, fails, does not end in time, or is stopped. Whether the host was switched off all the same nobody
/// knows.
pub fn run(device: &FenceDevice, order: PowerOrder, within: Duration, stop: &Stop) -> Result<PowerAnswer, String> {
    let agent = device.agent.as_str();
    let path = find(agent)?;
    let mut command = Command::new(&path);
    command.env_clear().env("PATH", FOLDERS.join(":")).env("HOME", "/root").env("LC_ALL", "C.UTF-8");
    let (ended, said) = program::run(command, input(device, order).as_bytes(), within, stop)
        .map_err(|error| format!("cannot run {}: {error}", path.display()))?;
    let said = if said.is_empty() { String::new() } else { format!(": {}", without_secrets(device, said)) };
    match ended {
        Ended::Itself(status) => match (order, status.code()) {
            (PowerOrder::Off | PowerOrder::Monitor, Some(0)) => Ok(PowerAnswer::Done),
            (PowerOrder::Monitor, Some(IS_OFF)) => Ok(PowerAnswer::Done),
            (PowerOrder::Status, Some(0)) => Ok(PowerAnswer::On),
            (PowerOrder::Status, Some(IS_OFF)) => Ok(PowerAnswer::Off),
            (PowerOrder::Off | PowerOrder::Status | PowerOrder::Monitor, _) => {
                Err(format!("{agent} {} failed ({status}){said}", order.action()))
            }
        },
        Ended::Stopped => Err(format!("{agent} was killed before it had ended{said}")),
        Ended::Killed => Err(format!("{agent} did not end within {} ms and was killed{said}", within.as_millis())),
        Ended::NotEven => Err(format!("{agent} did not end within {} ms, nor when killed{said}", within.as_millis())),
        Ended::Unknown(error) => Err(format!("cannot wait for {agent}: {error}{said}")),
    }
}

/// Where an agent lies on this host.
///
/// # Errors
/// When it is not there or cannot be executed, with the cure.
pub fn find(agent: &str) -> Result<PathBuf, String> {
    let runs = |path: &Path| path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    if agent.starts_with('/') {
        let path = PathBuf::from(agent);
        return if runs(&path) { Ok(path) } else { Err(format!("{agent} is no executable file on this host")) };
    }
    let found = FOLDERS.iter().map(|folder| Path::new(folder).join(agent)).find(|path| runs(path));
    found.ok_or_else(|| format!("{agent} is not installed on this host: install the package fence-agents (or its own)"))
}

/// What the agent reads. Keys and values were checked when the device was added: none holds a line break.
fn input(device: &FenceDevice, order: PowerOrder) -> Zeroizing<String> {
    let mut text = Zeroizing::new(format!("action={}\n", order.action()));
    let secrets = device.secrets.iter().map(|(key, value)| (key, &value.0));
    for (key, value) in device.parameters.iter().chain(secrets) {
        for part in [key.as_str(), "=", value.as_str(), "\n"] {
            text.push_str(part);
        }
    }
    text
}

/// Agents quote their parameters when they fail.
fn without_secrets(device: &FenceDevice, said: String) -> String {
    let secrets = device.secrets.values().filter(|secret| !secret.0.is_empty());
    secrets.fold(said, |said, secret| said.replace(&secret.0, "(secret)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::HostId;
    use crate::types::power::Secret;

    const LONG: Duration = Duration::from_secs(20);

    /// A device whose agent is a shell script.
    fn device(body: &str) -> (tempfile::TempDir, FenceDevice) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fence_script");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let device = FenceDevice {
            name: "d1".into(),
            host: HostId::default(),
            agent: path.to_str().unwrap().into(),
            level: 1,
            parameters: [("plug".into(), "h 2".into())].into(),
            secrets: [("password".into(), Secret("s3cret".into()))].into(),
            fence_at: None,
            distrusted: None,
        };
        (folder, device)
    }

    fn told(body: &str, order: PowerOrder, within: Duration) -> Result<PowerAnswer, String> {
        let (_folder, device) = device(body);
        // Another test's fork may hold the script open for writing for a moment ("text file busy").
        loop {
            match run(&device, order, within, &Stop::default()) {
                Err(why) if why.contains("Text file busy") => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    #[test]
    fn agents_and_what_is_said_of_them() {
        use PowerOrder::{Monitor, Off, Status};
        let table: &[(&str, PowerOrder, Result<PowerAnswer, &str>)] = &[
            ("exit 0", Off, Ok(PowerAnswer::Done)),
            ("exit 0", Monitor, Ok(PowerAnswer::Done)),
            ("exit 2", Monitor, Ok(PowerAnswer::Done)),
            ("exit 0", Status, Ok(PowerAnswer::On)),
            ("exit 2", Status, Ok(PowerAnswer::Off)),
            ("exit 2", Off, Err("off failed (exit status: 2)")),
            ("exit 1", Status, Err("status failed (exit status: 1)")),
            ("echo Status: OFF; exit 7", Status, Err("(exit status: 7): Status: OFF")),
            ("kill -9 $$", Off, Err("(signal: 9 (SIGKILL))")),
            ("read a; test \"$a\" = action=off", Off, Ok(PowerAnswer::Done)),
            (
                "cat | tr '\\n' , | grep -qx 'action=status,plug=h 2,password=s3cret,' && exit 2",
                Status,
                Ok(PowerAnswer::Off),
            ),
            ("cat >&2; exit 1", Off, Err("plug=h 2; password=(secret)")),
            ("test $# = 0 && test -z \"$SECRET\"", Off, Ok(PowerAnswer::Done)),
            ("head -c 100000 /dev/urandom; exit 1", Off, Err("off failed (exit status: 1)")),
        ];
        for (body, order, expected) in table {
            match (told(body, *order, LONG), expected) {
                (Ok(found), Ok(expected)) if found == *expected => {}
                (Err(why), Err(part)) => assert!(why.contains(part) && !why.contains("s3cret"), "{body}: {why}"),
                (found, _) => panic!("{body}: {found:?}"),
            }
        }
    }

    #[test]
    fn an_agent_that_hangs_or_is_not_there() {
        let why = told("echo begun; sleep 1000", PowerOrder::Off, Duration::from_millis(200)).unwrap_err();
        assert!(why.contains("did not end within 200 ms and was killed: begun"), "{why}");
        let (_folder, there) = device("exit 0");
        for (agent, part) in [
            ("fence_no_such_thing", "install the package fence-agents"),
            ("/no/such/fence", "no executable file"),
            ("/etc/passwd", "no executable file"),
        ] {
            let device = FenceDevice { agent: agent.into(), ..there.clone() };
            let why = run(&device, PowerOrder::Off, LONG, &Stop::default()).unwrap_err();
            assert!(why.contains(part), "{agent}: {why}");
        }
    }

    /// Waits for something that another process does.
    fn until(what: &str, mut so: impl FnMut() -> bool) {
        let end = std::time::Instant::now() + LONG;
        while !so() {
            assert!(std::time::Instant::now() < end, "{what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn an_agent_that_is_called_off_dies_with_its_children_before_they_do_anything() {
        // The child, too, would switch the host off as soon as it may.
        let body =
            "cd ${0%/*}; sh -c 'echo $$ > child; while ! test -e go; do sleep 0.01; done; echo off > off' & wait";
        let (folder, device) = device(body);
        let file = |name: &str| folder.path().join(name);
        let child = || std::fs::read_to_string(file("child")).ok().and_then(|id| id.trim().parse::<i32>().ok());
        let (stop, (tell, told)) = (Arc::new(Stop::default()), std::sync::mpsc::channel());
        loop {
            let tell = tell.clone();
            ask(device.clone(), PowerOrder::Off, LONG, Arc::clone(&stop), move |answer| tell.send(answer).unwrap());
            until("the child begins", || child().is_some() || told.try_recv().is_ok());
            if child().is_some() {
                break; // Else the script was busy: another test's fork held it open.
            }
        }
        let child = child().unwrap();
        stop.stop();
        let why = told.recv_timeout(LONG).unwrap().unwrap_err();
        assert!(why.contains("was killed before it had ended"), "{why}");
        let gone = || {
            let state = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            state.rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.trim().starts_with('Z'))
        };
        until("the child is dead", gone);
        std::fs::write(file("go"), "").unwrap();
        assert!(!file("off").exists());
        // What is called off before it was begun is not begun.
        std::fs::remove_file(file("child")).unwrap();
        let why = run(&device, PowerOrder::Off, LONG, &stop).unwrap_err();
        assert!(why.contains("was killed") && !file("child").exists(), "{why}");
    }

    #[test]
    fn an_agent_that_had_ended_before_it_was_called_off_has_done_it() {
        let stop = Stop::default();
        let (_folder, device) = device("exit 0");
        let first = loop {
            match run(&device, PowerOrder::Off, LONG, &stop) {
                Err(why) if why.contains("Text file busy") => std::thread::yield_now(),
                other => break other,
            }
        };
        stop.stop();
        assert_eq!(first, Ok(PowerAnswer::Done));
    }

    #[test]
    fn an_answer_comes_exactly_once() {
        let (_folder, device) = device("exit 0");
        let (tell, told) = std::sync::mpsc::channel();
        ask(device, PowerOrder::Off, LONG, Arc::default(), move |answer| tell.send(answer).unwrap());
        let first = told.recv_timeout(LONG).unwrap();
        assert!(first == Ok(PowerAnswer::Done) || first.unwrap_err().contains("Text file busy"));
        assert!(told.recv().is_err());
    }
}
