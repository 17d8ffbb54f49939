//! The whole program against a host that the test plays: a pseudo terminal takes the place of the virtio-serial port.
//!
//! ```text
//!   test (host side: master) ◄── frames ──► mainstay-guest run (slave)  ◄── socket ── mainstay-guest report …
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mainstay_guest::frame::{Decoder, encode};
use mainstay_guest::message::{Application, FromGuest, HostHello, Order, Report, Severity, ToGuest, Verdict, Wish};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

const PROGRAM: &str = env!("CARGO_BIN_EXE_mainstay-guest");
const PATIENCE: Duration = Duration::from_secs(30);

/// A running agent, and the host's end of its port.
struct Guest {
    agent: Child,
    host: File,
    decoder: Decoder,
    heard: Vec<FromGuest>,
    folder: tempfile::TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn terminal() -> (OwnedFd, PathBuf) {
    let host = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&host).unwrap();
    unlockpt(&host).unwrap();
    let name = ptsname(&host, Vec::new()).unwrap();
    let mut mode = tcgetattr(&host).unwrap();
    mode.make_raw();
    tcsetattr(&host, OptionalActions::Now, &mode).unwrap();
    (host, PathBuf::from(name.into_string().unwrap()))
}

impl Guest {
    fn start(more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (host, port) = terminal();
        let config = folder.path().join("guest.toml");
        let socket = folder.path().join("socket");
        let text = format!("port = {port:?}\nkernel_log = false\n{more}\n[socket]\npath = {socket:?}\n");
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--config"]).arg(&config).arg("--state").arg(folder.path().join("state"));
        let agent = command.stderr(Stdio::null()).spawn().unwrap();
        Self { agent, host: File::from(host), decoder: Decoder::default(), heard: Vec::new(), folder }
    }

    fn say(&mut self, message: &ToGuest) {
        self.host.write_all(&encode(message).unwrap()).unwrap();
    }

    /// The first message that is wanted, of those that were not taken yet.
    fn hear<T>(&mut self, what: &str, wanted: impl Fn(&FromGuest) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some((at, found)) = self.heard.iter().enumerate().find_map(|(at, one)| Some((at, wanted(one)?))) {
                self.heard.drain(..=at);
                return found;
            }
            assert!(Instant::now() < until, "waited in vain for {what}");
            let mut polled = [PollFd::from_borrowed_fd(self.host.as_fd(), PollFlags::IN)];
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            if poll(&mut polled, Some(&second)).unwrap() == 0 || !polled[0].revents().contains(PollFlags::IN) {
                continue;
            }
            let mut chunk = [0; 4096];
            let length = self.host.read(&mut chunk).unwrap();
            self.decoder.push(&chunk[..length]);
            while let Some(message) = self.decoder.take().unwrap() {
                self.heard.push(message);
            }
        }
    }

    fn report(&mut self) -> Report {
        self.hear(
            "a report",
            |message| if let FromGuest::Report(report) = message { Some(report.clone()) } else { None },
        )
    }

    fn answer(&mut self, report: &Report, verdict: Verdict, why: &str) {
        self.say(&ToGuest::Answer { id: report.id, verdict, why: why.to_owned() });
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(words).arg("--socket").arg(self.folder.path().join("socket"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// The agent has opened its socket.
    fn ready(&mut self) {
        self.hear("hello", |message| matches!(message, FromGuest::Hello(_)).then_some(()));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_report_is_kept_sent_answered_and_told() {
    let mut guest = Guest::start("");
    let hello =
        guest.hear("hello", |message| if let FromGuest::Hello(hello) = message { Some(hello.clone()) } else { None });
    assert!(hello.boot != [0; 16] && !hello.system.kernel.is_empty(), "{hello:?}");
    guest.say(&ToGuest::Hello(HostHello { protocol: 1, vm: "web".to_owned() }));
    guest.hear("a second hello", |message| matches!(message, FromGuest::Hello(_)).then_some(()));

    let words = ["report", "--kind", "app/db", "--message", "no connections", "--ask", "reset-vm", "db1", "--wait"];
    let asker = guest.command(&words).spawn().unwrap();
    let report = guest.report();
    assert_eq!((report.severity, report.kind.as_str()), (Severity::Critical, "app/db"));
    assert_eq!((report.wish.clone(), report.boot), (Wish::ResetVm("db1".to_owned()), hello.boot));
    guest.answer(&report, Verdict::Delayed, "two more have to ask");
    guest.answer(&report, Verdict::Done, "db1 is reset");
    let said = asker.wait_with_output().unwrap();
    assert!(said.status.success());
    let expected = format!(
        "report {n} is kept until the host has answered it\nreport {n}: delayed: two more have to ask\n\
         report {n}: done: db1 is reset\n",
        n = report.sequence
    );
    assert_eq!(text(&said.stdout), expected);

    let asker = guest.command(&["report", "--kind", "app/db", "--message", "m", "--wait"]).spawn().unwrap();
    let report = guest.report();
    guest.answer(&report, Verdict::Denied, "db1 does not let web ask");
    assert_eq!(asker.wait_with_output().unwrap().status.code(), Some(3));
}

#[test]
fn what_was_accepted_outlives_the_agent() {
    let mut guest = Guest::start("");
    guest.ready();
    let done = guest.run(&["report", "--kind", "app/x", "--message", "kept", "--severity", "warning"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let first = guest.report();
    guest.agent.kill().unwrap(); // Power off: nothing more is written.
    guest.agent.wait().unwrap();
    let (host, port) = terminal();
    let config = guest.folder.path().join("guest.toml");
    let socket = guest.folder.path().join("socket");
    std::fs::write(&config, format!("port = {port:?}\nkernel_log = false\n[socket]\npath = {socket:?}\n")).unwrap();
    (guest.host, guest.decoder) = (File::from(host), Decoder::default());
    guest.heard.clear();
    let mut command = Command::new(PROGRAM);
    command.args(["run", "--config"]).arg(&config).arg("--state").arg(guest.folder.path().join("state"));
    guest.agent = command.stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(guest.report(), first, "the same report, with the same id");
    guest.answer(&first, Verdict::Accepted, "noted");
    let again = guest.run(&["report", "--kind", "app/x", "--message", "next"]);
    assert!(again.status.success());
    assert_eq!(guest.report().sequence, first.sequence + 1);
}

#[test]
fn applications_are_watched_and_wrong_words_refused() {
    let mut guest = Guest::start("heartbeat_s = 1\nready_by_hand = true");
    guest.ready();
    let beat = |wanted: fn(&mainstay_guest::message::Beat) -> bool| {
        move |message: &FromGuest| matches!(message, FromGuest::Beat(beat) if wanted(beat)).then_some(())
    };
    guest.hear("a beat that is not ready", beat(|beat| !beat.ready && beat.application == Application::Unwatched));
    assert_eq!(guest.run(&["heartbeat", "mark-active"]).status.code(), Some(2), "not enabled");
    assert!(guest.run(&["heartbeat", "enable"]).status.success());
    guest.hear("silence", beat(|beat| beat.application == Application::Silent));
    assert!(guest.run(&["heartbeat", "mark-active"]).status.success());
    guest.hear("activity", beat(|beat| beat.application == Application::Active));
    assert!(guest.run(&["heartbeat", "disable"]).status.success());
    assert!(guest.run(&["ready"]).status.success());
    guest.hear("readiness", beat(|beat| beat.ready && beat.application == Application::Unwatched));
    let wrong = guest.run(&["report", "--kind", "App Db", "--message", "m"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("for example app/db"), "{}", text(&wrong.stderr));
    let status = guest.run(&["status"]);
    assert!(text(&status.stdout).contains("ready        yes"), "{}", text(&status.stdout));
}

#[test]
fn orders_are_answered() {
    let mut guest = Guest::start("shutdown = ['/bin/true']\nreboot = ['/bin/false']");
    guest.ready();
    for (ask, order, expected) in [
        (1, Order::ShutDown, None),
        (2, Order::Reboot, Some("exit status: 1")),
        (3, Order::Thaw, Some("nothing stands still")),
    ] {
        guest.say(&ToGuest::Ask { ask, order });
        let result = guest.hear("an outcome", |message| match message {
            FromGuest::Outcome { ask: found, result } if *found == ask => Some(result.clone()),
            _ => None,
        });
        match expected {
            None => assert_eq!(result, Ok(()), "{order:?}"),
            Some(why) => assert!(result.as_ref().unwrap_err().contains(why), "{order:?}: {result:?}"),
        }
    }
}

#[test]
fn one_that_is_told_to_end_says_so() {
    let mut guest = Guest::start("");
    guest.ready();
    let asked = Command::new("kill").arg(guest.agent.id().to_string()).status().unwrap();
    assert!(asked.success());
    guest.hear("a farewell", |message| (*message == FromGuest::Leaves).then_some(()));
    assert!(guest.agent.wait().unwrap().success());
}

#[test]
fn a_wrong_configuration_is_told_and_done_without() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("guest.toml");
    std::fs::write(&config, "units = 3\n").unwrap();
    let checked = Command::new(PROGRAM).arg("check-config").arg(&config).output().unwrap();
    assert_eq!(checked.status.code(), Some(1));
    assert!(text(&checked.stderr).contains("guest.toml"), "{}", text(&checked.stderr));
    let none = Command::new(PROGRAM).args(["check-config", "/nonexistent/guest.toml"]).output().unwrap();
    assert!(none.status.success() && text(&none.stdout).contains("built in"));
}
