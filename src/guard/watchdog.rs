//! The hardware watchdog: resets the host when parent and child are gone, or when a VM cannot be stopped, and nobody else
//! did anything about it.
//!
//! ```text
//! [guard] watchdog = "/dev/watchdog" ──► open: it runs ──► time-out asked for, and read back ──► petted four times in it,
//!                                                            while all is within lease or stopped
//!   planned stop, and all that was registered stands ──► 'V', close: it stands still
//!   any other end of the parent ──► it runs on: the next parent opens it in time, or the host is reset
//! ```
//!
//! Safe is a time-out of at most L − renew: then a host whose guard died is reset before its leases end for others. A
//! device that takes only a longer one is petted all the same, since a late reset is better than none, but it is said
//! that nothing can rely on it. Without a device everything works; what is lacking is the case in which even systemd hangs.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::types::Time;
use crate::types::guard::Standing;
use crate::types::settings::Timing;

/// Sets a time-out in seconds and gives what the device made of it; zero only asks.
pub type Ask = fn(&File, u32) -> io::Result<u32>;

/// See the module.
pub struct Watchdog {
    file: File,
    path: PathBuf,
    every: Duration,
    petted: Time,
    ask: Ask,
}

/// The longest time-out that is safe, in whole seconds; at least one, since devices know no less.
fn safe(timing: &Timing) -> u32 {
    let span = timing.lease.saturating_sub(timing.renew).as_secs();
    u32::try_from(span).unwrap_or(u32::MAX).max(1)
}

impl Watchdog {
    /// Opens it; it runs from now on.
    ///
    /// # Errors
    /// Of the system.
    pub fn open(path: &Path, ask: Ask) -> io::Result<Self> {
        let file = File::options().write(true).open(path)?;
        Ok(Self { file, path: path.to_owned(), every: Duration::ZERO, petted: Time::ZERO, ask })
    }

    /// The one that the program had open that was executed in this process before.
    #[must_use]
    pub fn handed(fd: OwnedFd, path: &Path, ask: Ask) -> Self {
        Self { file: fd.into(), path: path.to_owned(), every: Duration::ZERO, petted: Time::ZERO, ask }
    }

    /// To hand it on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Asks for the time-out that fits, and judges what the device made of it.
    pub fn set(&mut self, timing: &Timing) -> Standing {
        let (path, wanted) = (self.path.display().to_string(), safe(timing));
        // A device whose time-out cannot be set still tells it.
        let got = (self.ask)(&self.file, wanted).or_else(|_| (self.ask)(&self.file, 0));
        self.every = Duration::from_secs(u64::from(*got.as_ref().unwrap_or(&wanted).min(&wanted)).max(1)) / 4;
        match got {
            Ok(0) => Standing::Late(format!("{path}: says that its time-out is zero; not relied on")),
            Ok(seconds) if wanted < seconds => Standing::Late(format!(
                "{path}: takes no time-out under {seconds} s, and {wanted} s is what the lease needs; it resets this host, \
                 but perhaps after others took its VMs; use a longer lease (profile patient) or another device"
            )),
            Ok(seconds) => Standing::Safe(format!("{path}: resets this host {seconds} s after its guard died")),
            Err(error) => Standing::Late(format!("{path}: does not tell its time-out ({error}); not relied on")),
        }
    }

    /// When it wants to be petted next.
    #[must_use]
    pub fn next(&self) -> Time {
        self.petted + self.every
    }

    /// Tells it that all is well, if it is time.
    pub fn pet(&mut self, now: Time) {
        if self.next() <= now {
            self.petted = now;
            drop(self.file.write_all(b"\0")); // Refused = it will bite, which is its answer.
        }
    }

    /// Stops it: all that was registered stands.
    pub fn close(mut self) {
        drop(self.file.write_all(b"V")); // A driver that cannot be stopped says so in the kernel's log.
    }
}

/// The real device.
///
/// # Errors
/// Of the system: no watchdog, or one without this.
pub fn ask_device(file: &File, seconds: u32) -> io::Result<u32> {
    let mut value = libc::c_int::try_from(seconds).map_err(io::Error::other)?;
    // SAFETY: both calls read and write one integer, which lives through them.
    unsafe {
        if 0 < seconds {
            set_timeout(file.as_raw_fd(), &raw mut value)?;
        }
        // What was set is not always what is kept: read back.
        get_timeout(file.as_raw_fd(), &raw mut value)?;
    }
    u32::try_from(value).map_err(io::Error::other)
}

nix::ioctl_readwrite!(set_timeout, b'W', 6, libc::c_int);
nix::ioctl_read!(get_timeout, b'W', 7, libc::c_int);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    type Right = fn(&Standing) -> bool;

    #[test]
    fn a_time_out_is_asked_for_read_back_and_judged() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let table: [(Timing, Ask, Right); 7] = [
            (Timing::DEFAULT, |_, seconds| Ok(seconds), |s| matches!(s, Standing::Safe(text) if text.contains("4 s"))),
            (Timing::FAST, |_, seconds| Ok(seconds), |s| matches!(s, Standing::Safe(text) if text.contains("1 s"))),
            (Timing::PATIENT, |_, _| Ok(10), |s| matches!(s, Standing::Safe(text) if text.contains("10 s"))),
            (Timing::DEFAULT, |_, _| Ok(60), |s| matches!(s, Standing::Late(text) if text.contains("60 s"))),
            (Timing::DEFAULT, |_, _| Ok(0), |s| matches!(s, Standing::Late(_))),
            (
                Timing::DEFAULT,
                |_, seconds| if seconds == 0 { Ok(3) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) },
                |s| matches!(s, Standing::Safe(text) if text.contains("3 s")),
            ),
            (Timing::DEFAULT, ask_device, |s| matches!(s, Standing::Late(text) if text.contains("does not tell"))),
        ];
        for (n, (timing, ask, expected)) in table.into_iter().enumerate() {
            let mut watchdog = Watchdog::open(file.path(), ask).unwrap();
            let standing = watchdog.set(&timing);
            assert!(expected(&standing), "{n}: {standing:?}");
            assert!(watchdog.every <= timing.lease / 4, "{n}");
        }
        assert!(Watchdog::open(Path::new("/nonexistent/watchdog"), ask_device).is_err());
    }

    #[test]
    fn it_is_petted_in_time_and_closed_by_a_word_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let read = || {
            let mut bytes = [0; 64];
            let read = io::Read::read(&mut &reader, &mut bytes).unwrap_or(0);
            bytes[..read].to_vec()
        };
        let mut watchdog = Watchdog::open(&path, |_, _| Ok(4)).unwrap();
        watchdog.set(&Timing::DEFAULT);
        let mut now = Time(1_000_000_000_000);
        watchdog.pet(now);
        watchdog.pet(now + Duration::from_millis(900));
        assert_eq!(read(), b"\0");
        now = watchdog.next();
        watchdog.pet(now);
        assert_eq!(read(), b"\0");
        drop(watchdog);
        assert_eq!(read(), b"", "it runs on");
        let mut watchdog = Watchdog::open(&path, |_, _| Ok(4)).unwrap();
        watchdog.set(&Timing::DEFAULT);
        watchdog.close();
        assert_eq!(read(), b"V");
    }
}
