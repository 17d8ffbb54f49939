//! A guest's memory, from libvirt into the folder of its failure.
//!
//! ```text
//!   QEMU ──► libvirt ──► pipe ──► here: at most so many bytes, so long ──► failures' folder, whole or not at all
//! ```
//!
//! The pipe is what holds the limits: libvirt cannot end such a dump once it is begun, but QEMU gives it up, and its guest goes on as
//! before, as soon as nobody reads any more: at a limit, or when this agent dies.
//!
//! QEMU lets the guest stand while it writes, also when libvirt is told `live`, and libvirt holds the domain's job lock: a reset or a
//! pause that is asked for meanwhile waits there, in vain. Nothing of what keeps a VM from running twice does: the guard stops the
//! process itself, and `destroy` is let through.
//!
//! Not here: when, and how much (`core::guests`); where it is kept, and what gives way to it (`failures`).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::clock;
use super::failures::{Failures, NewDump};
use super::libvirt::DumpFormat;
use crate::types::guests::Dumps;
use crate::types::{Time, VmId};

/// Has libvirt write a running domain's memory to this path, like `Libvirt::dump`; refused if it has more bytes than that.
pub type Dumper = Box<dyn Fn(VmId, PathBuf, DumpFormat, u64, Duration) -> Receiver<Result<(), String>> + Send + Sync>;
/// Takes what became of a dump.
type Told = Box<dyn FnOnce(Result<(), String>) + Send>;
/// Bytes that are read at once: what a pipe holds.
const CHUNK: usize = 64 * 1024;
/// libvirt's time is a little longer, so that what is told is how far it came.
const LATER: Duration = Duration::from_secs(1);
/// How often one looks whether libvirt has answered.
const LOOK_MS: u8 = 50;

/// Asks for a dump. Whoever waits is told once, also if this is dropped: there is no failure to which it could be kept.
pub struct DumpAsk {
    /// How much, and how long.
    pub limits: Dumps,
    told: Option<Told>,
}

impl DumpAsk {
    /// Within these limits; `told` when the guest need not stand any more.
    pub fn new(limits: Dumps, told: impl FnOnce(Result<(), String>) + Send + 'static) -> Self {
        Self { limits, told: Some(Box::new(told)) }
    }

    fn tell(mut self, result: Result<(), String>) {
        if let Some(told) = self.told.take() {
            told(result);
        }
    }
}

impl Drop for DumpAsk {
    fn drop(&mut self) {
        if let Some(told) = self.told.take() {
            told(Err("nothing of its failure is kept".to_owned()));
        }
    }
}

/// Writes the memory of a guest to a failure that is kept; what became of it is in the failure's record afterwards.
pub fn write(failures: &Failures, dumper: &Dumper, vm: VmId, number: u32, ask: DumpAsk) {
    let most_of_all = u64::from(ask.limits.mib) << 20;
    let within = Duration::from_secs(ask.limits.within_s.into());
    let written = failures.begin_dump(vm, number, most_of_all).map_err(|why| why.to_string()).and_then(|mut new| {
        fill(&mut new, dumper, vm, within)?;
        Ok(new)
    });
    let why = match written {
        Ok(new) => {
            ask.tell(Ok(())); // The rest is the disk's, and the guest need not wait for it.
            failures.keep_dump(&new, most_of_all).map_err(|why| why.to_string())
        }
        Err(why) => {
            ask.tell(Err(why.clone()));
            Err(why)
        }
    };
    if let Err(why) = why
        && let Err(error) = failures.set_no_dump(vm, number, &why)
    {
        tracing::warn!("that a guest's memory was not kept ({why}) is not kept either: {error}");
    }
}

fn fill(new: &mut NewDump, dumper: &Dumper, vm: VmId, within: Duration) -> Result<(), String> {
    let until = clock::now() + within;
    let mut try_with = |format: DumpFormat| -> Result<(), (u64, String)> {
        let path = new.pipe().map_err(|error| (0, format!("no pipe: {error}")))?;
        let mut pipe = open(&path).map_err(|error| (0, format!("{}: {error}", path.display())))?;
        let told = dumper(vm, path, format, new.most, until.since(clock::now()) + LATER);
        let mut bytes = 0;
        let result = drain(&mut pipe, &mut new.file, &told, new.most, until, &mut bytes);
        new.close_pipe(); // Before nobody reads it any more.
        result.map_err(|why| (bytes, why))
    };
    match try_with(DumpFormat::Kdump) {
        // A QEMU or a driver without it.
        Err((0, why)) if why.contains("format") => try_with(DumpFormat::Elf).map_err(|(_, why)| why),
        other => other.map_err(|(_, why)| why),
    }
}

/// Not blocking: whoever writes comes later, or never.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Until libvirt says that it is done, and nothing is left in the pipe.
fn drain(
    pipe: &mut File,
    file: &mut File,
    told: &Receiver<Result<(), String>>,
    most: u64,
    until: Time,
    bytes: &mut u64,
) -> Result<(), String> {
    let mut chunk = vec![0; CHUNK];
    let mut done = false;
    loop {
        if until <= clock::now() {
            return Err(format!("it was not written in time: {} MiB were, and the guest was let go", *bytes >> 20));
        }
        match told.try_recv() {
            Ok(Ok(())) => done = true,
            Ok(Err(why)) => return Err(why),
            Err(TryRecvError::Disconnected) if !done => return Err("libvirt does not say what became of it".to_owned()),
            Err(TryRecvError::Disconnected | TryRecvError::Empty) => {}
        }
        let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::from(LOOK_MS)).is_err() {
            continue; // Interrupted.
        }
        let events = ready[0].revents().unwrap_or(PollFlags::empty());
        match pipe.read(&mut chunk) {
            Ok(0) if done => return if *bytes == 0 { Err("it is empty".to_owned()) } else { Ok(()) },
            // Nobody writes yet, or any more: the pipe is ready all the time then.
            Ok(0) if events.contains(PollFlags::POLLHUP) => std::thread::sleep(Duration::from_millis(LOOK_MS.into())),
            Ok(0) => {}
            Ok(length) => {
                *bytes += length as u64;
                if most < *bytes {
                    return Err(format!("it has more than {} MiB", most >> 20));
                }
                file.write_all(&chunk[..length]).map_err(|error| format!("cannot write it: {error}"))?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(format!("cannot read it: {error}")),
        }
    }
}

#[cfg(test)]
#[path = "dump_tests.rs"]
mod tests;
