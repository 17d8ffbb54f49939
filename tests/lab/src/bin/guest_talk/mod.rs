//! What a lab guest says over the port of Mainstay's agent: as an application by way of the agent, or as a hostile guest without
//! it.
//!
//! ```text
//!   ask, report ─► mainstay-guest report --wait ─► "reporting", maybe "accepted", "reported: …"
//!   stream ─► the agent's socket, a report each 100 ms ─► tally: "tally: written, accepted, answered, …"
//!   flood KIND ─► agent killed ─► the port itself, as fast as it takes it
//!   kept ─► what the agent's spool holds, carried over a reboot by way of the disk: the rest of this guest lies in memory
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{AGENT, say};

const NAME: &str = "org.mainstay.guest.0";
const SOCKET: &str = "/run/mainstay-guest.sock";
/// The agent's state folder, and its spool there.
pub const STATE: &str = "/run/state";
const SPOOL: &str = "/run/state/reports";
const HEADER: usize = 20;

/// Has the agent ask for something. The line before is the moment from which the host's answer is counted.
pub fn report(message: &str, ask: &[&str]) {
    report_and(message, ask, || {});
}

/// The same; and what is to be done when the agent has accepted it.
fn report_and(message: &str, ask: &[&str], accepted: impl Fn()) {
    say("reporting");
    let report = ["report", "--kind", "app/lab", "--message", message, "--wait", "20", "--ask"];
    let mut said = String::new();
    let heard = Command::new(AGENT).args(report).args(ask).stdout(Stdio::piped()).spawn().and_then(|mut child| {
        for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
            let line = line?;
            if line.ends_with("is kept until the host has answered it") {
                accepted();
            }
            said.push_str(&format!("{line}; "));
        }
        child.wait()
    });
    match heard {
        Ok(_) => say(&format!("reported: {said}")),
        Err(why) => say(&format!("reported: {why}")),
    }
}

/// For another VM, named first. What follows is the message; with one it is said, too, when the agent has accepted it.
pub fn ask(words: &str) {
    match words.split_once(' ') {
        Some((name, message)) => report_and(message, &["reset-vm", name], || say("accepted")),
        None => report("asked by the lab", &["reset-vm", words]),
    }
}

// ---- stream -----------------------------------------------------------------------------------------------------------

/// What became of the stream's reports, in this boot.
#[derive(Clone, Copy, Default)]
struct Tally {
    written: u64,
    accepted: u64,
    answered: u64,
    refused: u64,
    /// The number of the last that was accepted.
    last: u64,
    /// A number came that did not follow the one before.
    jumps: u64,
}

static TALLY: Mutex<Tally> = Mutex::new(Tally { written: 0, accepted: 0, answered: 0, refused: 0, last: 0, jumps: 0 });
static STREAMS: AtomicBool = AtomicBool::new(false);

fn tally(change: impl FnOnce(&mut Tally)) -> Tally {
    let mut tally = TALLY.lock().expect("nobody panics with it");
    change(&mut tally);
    *tally
}

/// A report each 100 ms, from now on.
pub fn stream() {
    let Ok(mut socket) = UnixStream::connect(SOCKET) else { return say("streaming without an agent") };
    let Ok(answers) = socket.try_clone() else { return say("streaming without descriptors") };
    std::thread::spawn(move || listen(answers));
    STREAMS.store(true, Ordering::Relaxed);
    say("streaming");
    while STREAMS.load(Ordering::Relaxed) {
        let text = r#"{"report":{"severity":"info","kind":"app/stream","message":"one of many","wait":true}}"#;
        if socket.write_all(format!("{text}\n").as_bytes()).is_err() {
            return;
        }
        tally(|tally| tally.written += 1);
        std::thread::sleep(Duration::from_millis(100));
    }
    // Its answers come as long as the socket is open.
    std::thread::sleep(Duration::from_secs(600));
}

fn listen(answers: UnixStream) {
    for line in BufReader::new(answers).lines().map_while(Result::ok) {
        let number = line.split("\"sequence\":").nth(1).and_then(|rest| rest.split([',', '}']).next()?.parse().ok());
        tally(|tally| match number {
            Some(number) if line.contains("\"accepted\":{") => {
                tally.accepted += 1;
                tally.jumps += u64::from(number <= tally.last);
                tally.last = number;
            }
            Some(_) if line.contains("\"answer\"") => tally.answered += u64::from(!line.contains("\"delayed\"")),
            _ => tally.refused += 1,
        });
    }
}

/// Ends the stream; says what became of it when all are answered, or after a while.
pub fn end_stream() {
    STREAMS.store(false, Ordering::Relaxed);
    let deadline = Instant::now() + Duration::from_secs(30);
    let open = |t: Tally| t.answered < t.written;
    while open(tally(|_| {})) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    say_tally("tally");
}

fn say_tally(what: &str) {
    let Tally { written, accepted, answered, refused, jumps, .. } = tally(|_| {});
    say(&format!(
        "{what}: {written} written, {accepted} accepted, {answered} answered, {refused} refused, {jumps} jumps"
    ));
}

/// How many reports wait for the host, as the agent says.
pub fn waiting() {
    let said = Command::new(AGENT).arg("status").output().map(|said| said.stdout).unwrap_or_default();
    let said = String::from_utf8_lossy(&said).into_owned();
    let line = said.lines().find(|line| line.starts_with("reports")).unwrap_or("nothing is known");
    say(&format!("status: {}", line.split_whitespace().collect::<Vec<_>>().join(" ")));
}

// ---- over a reboot ----------------------------------------------------------------------------------------------------

/// What a disk would hold of the agent's reports now; the agent is dead. Says how many, and the stream's tally.
pub fn kept() -> Vec<u8> {
    std::thread::sleep(Duration::from_millis(100)); // What the socket still holds is counted.
    say_tally("tally at its end");
    let spool = fs::read(SPOOL).unwrap_or_default();
    // A check of 4 bytes, then the number of reports, in one byte as long as they are fewer than 128.
    say(&format!("kept: {}", spool.get(4).copied().unwrap_or(0)));
    spool
}

/// Gives the agent back what an earlier boot has kept.
pub fn bring_back(spool: &[u8]) {
    if !spool.is_empty() && fs::create_dir_all(STATE).and_then(|()| fs::write(SPOOL, spool)).is_ok() {
        say("brought back what was kept");
    }
}

// ---- flood ------------------------------------------------------------------------------------------------------------

/// What a hostile guest says, as fast as its channel takes it: ever new reports, junk, messages that break off, or messages that
/// say that they are 2 GiB long. The agent is dead.
pub fn flood(kind: &str) {
    let Some(mut port) = port() else { return say("no port to flood") };
    say("flooding");
    let junk: Vec<u8> = (0..64 * 1024_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut number = 0_u64;
    loop {
        number += 1;
        let bytes = match kind {
            "reports" => (0..200).flat_map(|n| framed(&body(number * 200 + n))).collect(),
            "junk" => junk.clone(),
            "halves" => framed(&body(number))[..40].to_vec(),
            _ => too_long(),
        };
        if port.write_all(&bytes).is_err() {
            std::thread::sleep(Duration::from_millis(10)); // The host has hung up, for now.
        }
    }
}

/// A critical report with an id of its own that asks for the reset of another VM.
fn body(number: u64) -> Vec<u8> {
    let mut body = vec![2]; // A report.
    body.extend(number.to_le_bytes());
    body.extend([7; 8]);
    body.push(3); // Its number.
    body.extend([9; 16]); // Its boot.
    body.push(2); // Critical.
    for text in ["app/db", &format!("no connections left, {number}")] {
        body.push(text.len() as u8);
        body.extend(text.as_bytes());
    }
    body.push(2); // Reset another VM.
    body.push(4);
    body.extend(b"base");
    body
}

fn framed(body: &[u8]) -> Vec<u8> {
    let mut frame = b"MSGU\x01\x00\x03\x00".to_vec();
    frame.extend((body.len() as u32).to_le_bytes());
    frame.extend(crc32(body).to_le_bytes());
    frame.extend(crc32(&frame).to_le_bytes());
    frame.extend(body);
    frame
}

/// A good one, then a header that promises 2 GiB, and something of that.
fn too_long() -> Vec<u8> {
    let mut bytes = framed(&body(1));
    let mut header = bytes[..HEADER - 4].to_vec();
    header[8..12].copy_from_slice(&(1_u32 << 31).to_le_bytes());
    header.extend(crc32(&header).to_le_bytes());
    bytes.extend(header);
    bytes.extend([0x55; 4096]);
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    })
}

/// The port of Mainstay's agent, as soon as that has left it.
fn port() -> Option<File> {
    let named = |port: &fs::DirEntry| fs::read_to_string(port.path().join("name")).unwrap_or_default();
    let mut ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let port = ports.find(|port| named(port).trim() == NAME)?;
    let device = Path::new("/dev").join(port.file_name());
    (0..100).find_map(|_| {
        std::thread::sleep(Duration::from_millis(50));
        OpenOptions::new().write(true).open(&device).ok()
    })
}

/// Whether the machine has such a port.
pub fn has_port() -> bool {
    let ports = fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten();
    ports.map(|port| fs::read_to_string(port.path().join("name")).unwrap_or_default()).any(|name| name.trim() == NAME)
}
