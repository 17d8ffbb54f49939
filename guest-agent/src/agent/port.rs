//! The virtio-serial port to the host.
//!
//! ```text
//!   Missing ── found in /dev/virtio-ports or /sys/class/virtio-ports ──► Open { host away | host there }
//!      ▲                                                                     │ read or write fails
//!      └─────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! While nobody listens on the host's side, poll says "hung up" at once, every time: then the port is not polled, but looked
//! at with every turn of the loop. The same descriptor works again when the host is back.
//!
//! What waits to be written is bounded; a message that was written in part when the host went is dropped, the host finds
//! the next one by its header.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mainstay_guest::frame::encode;
use mainstay_guest::message::{FromGuest, ToGuest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::ear::Ear;

/// Bytes that may wait to be written. A host that does not read for longer gets the newest beats only.
const MAX_WAITING: usize = 256 * 1024;
const CHUNK: usize = 4096;

/// What the port says now.
#[derive(Debug)]
pub enum Heard {
    /// The host is there, after it was away.
    HostCame,
    /// The host has gone.
    HostWent,
    /// It says something.
    Said(ToGuest),
    /// It says what nobody understands; what follows is read on from the next message.
    Junk(String),
}

/// See the module.
pub struct Port {
    name: String,
    open: Option<Open>,
    told: Option<String>,
}

struct Open {
    file: File,
    host: bool,
    ear: Ear,
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Of the first message that waits.
    written: usize,
}

impl Port {
    /// Not open yet.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), open: None, told: None }
    }

    /// Whether somebody listens on the host's side.
    pub fn host_is_there(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.host)
    }

    /// What is wrong, for people; none when the port is there.
    pub fn trouble(&self) -> Option<&str> {
        self.told.as_deref()
    }

    /// To be polled, and for what; nothing while the host is away.
    pub fn polled(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let open = self.open.as_ref().filter(|open| open.host)?;
        let more = if open.waiting.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        Some((open.file.as_fd(), PollFlags::IN | more))
    }

    /// Adds a message to what waits to be written. Without a host it is lost: whatever counts is said again.
    pub fn send(&mut self, message: &FromGuest) {
        let Some(open) = self.open.as_mut().filter(|open| open.host) else { return };
        let Ok(frame) = encode(message) else { return }; // Everything that may be long was cut before.
        while MAX_WAITING < open.bytes + frame.len() && 1 < open.waiting.len() {
            // Never the one that is half written.
            let gone = open.waiting.remove(1).map_or(0, |frame| frame.len());
            open.bytes -= gone;
        }
        open.bytes += frame.len();
        open.waiting.push_back(frame);
    }

    /// Opens, reads and writes as far as that goes now.
    pub fn turn(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        if self.open.is_none() {
            match open(&self.name) {
                Ok(file) => {
                    self.told = None;
                    let (waiting, ear) = (VecDeque::new(), Ear::default());
                    self.open = Some(Open { file, host: false, ear, waiting, bytes: 0, written: 0 });
                }
                Err(why) => {
                    self.told = Some(why);
                    return heard;
                }
            }
        }
        let Some(open) = &mut self.open else { return heard };
        if let Err(why) = open.turn(&mut heard) {
            if open.host {
                heard.push(Heard::HostWent);
            }
            self.told = Some(format!("the port failed: {why}"));
            self.open = None;
        }
        heard
    }
}

impl Open {
    fn turn(&mut self, heard: &mut Vec<Heard>) -> io::Result<()> {
        let there = !hung_up(&self.file)?;
        if there != self.host {
            self.host = there;
            self.ear = Ear::default();
            self.waiting.clear();
            (self.bytes, self.written) = (0, 0);
            heard.push(if there { Heard::HostCame } else { Heard::HostWent });
        }
        if there {
            self.read(heard)?;
            self.write()?;
        }
        Ok(())
    }

    fn read(&mut self, heard: &mut Vec<Heard>) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        // Bounded: a host that never ends must not keep the loop.
        for _ in 0..64 {
            let length = match self.file.read(&mut chunk) {
                Ok(0) => return Ok(()), // It has gone: the next turn says so.
                Ok(length) => length,
                Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
                Err(why) => return Err(why),
            };
            let (said, junk) = self.ear.hear(&chunk[..length]);
            heard.extend(said.into_iter().map(Heard::Said));
            heard.extend(junk.map(Heard::Junk));
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while let Some(frame) = self.waiting.front() {
            match self.file.write(&frame[self.written..]) {
                Ok(length) => {
                    self.written += length;
                    if self.written == frame.len() {
                        self.bytes -= frame.len();
                        self.written = 0;
                        self.waiting.pop_front();
                    }
                }
                Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
                Err(why) => return Err(why),
            }
        }
        Ok(())
    }
}

fn hung_up(file: &File) -> io::Result<bool> {
    let mut polled = [PollFd::new(file, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(polled[0].revents().contains(PollFlags::HUP))
}

fn open(name: &str) -> Result<File, String> {
    let path = find(name).ok_or_else(|| {
        format!(
            "there is no virtio-serial port {name} here: on the host, add a channel of that name to this VM's definition"
        )
    })?;
    let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits().cast_signed();
    File::options().read(true).write(true).custom_flags(flags).open(&path).map_err(|why| {
        let busy = why.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error());
        let hint = if busy { " (another program, perhaps another mainstay-guest, has it open)" } else { "" };
        format!("{}: {why}{hint}", path.display())
    })
}

/// By udev's name, or, where there is no udev, by what the kernel calls it.
fn find(name: &str) -> Option<PathBuf> {
    let named = Path::new("/dev/virtio-ports").join(name);
    if named.exists() {
        return Some(named);
    }
    let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?;
    let port = ports
        .flatten()
        .find(|port| std::fs::read_to_string(port.path().join("name")).is_ok_and(|found| found.trim() == name))?;
    Some(Path::new("/dev").join(port.file_name()))
}
