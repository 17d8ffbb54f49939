//! What the host may ask for: file systems stand still and go on, shutdown, reboot. On a thread of its own, since each of
//! them may hang.
//!
//! ```text
//!   Freeze: hooks "freeze" ──► FIFREEZE, the deepest mount first ──► Outcome      after its time, or by Thaw:
//!           one fails ──► what stands is thawed, hooks "thaw" ──► why              FITHAW in the other order, hooks "thaw"
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use mainstay_guest::message::Order;
use rustix::fs::OFlags;

use super::Happened;
use super::checks::command;
use super::config::Config;
use super::wake::Sender;

/// A hook that takes longer has failed.
const HOOK: Duration = Duration::from_secs(10);
/// A shutdown's program answers by then; the shutdown itself goes on.
const SHUT_DOWN: Duration = Duration::from_secs(20);
/// Longer than this nothing stands still, whatever is asked.
const LONGEST: Duration = Duration::from_secs(60);
/// Orders that wait; more are refused.
const WAITING: usize = 4;

/// Where orders go.
pub struct Orders {
    to: SyncSender<(u64, Order)>,
}

impl Orders {
    /// Starts the thread.
    ///
    /// # Errors
    /// There is none left.
    pub fn start(config: &Config, tell: Sender) -> std::io::Result<Self> {
        let (to, from) = sync_channel(WAITING);
        let config = config.clone();
        std::thread::Builder::new().name("orders".into()).spawn(move || Worker::new(config).run(&from, &tell))?;
        Ok(Self { to })
    }

    /// Carries one out; false: too many wait.
    pub fn give(&self, ask: u64, order: Order) -> bool {
        self.to.try_send((ask, order)).is_ok()
    }
}

struct Worker {
    config: Config,
    /// What stands still, in the order in which it was frozen, and until when.
    frozen: Vec<PathBuf>,
    until: Option<Instant>,
}

impl Worker {
    fn new(config: Config) -> Self {
        Self { config, frozen: Vec::new(), until: None }
    }

    fn run(mut self, from: &Receiver<(u64, Order)>, tell: &Sender) {
        loop {
            let next = match self.until {
                Some(until) => match from.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(next) => next,
                    Err(RecvTimeoutError::Timeout) => {
                        self.thaw();
                        tell.send(Happened::Frozen(false));
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return self.thaw(),
                },
                None => match from.recv() {
                    Ok(next) => next,
                    Err(_) => return,
                },
            };
            let (ask, order) = next;
            let result = self.carry_out(order);
            tell.send(Happened::Frozen(self.until.is_some()));
            tell.send(Happened::Ordered { ask, result });
        }
    }

    fn carry_out(&mut self, order: Order) -> Result<(), String> {
        match order {
            Order::Freeze { within_s } => self.freeze(Duration::from_secs(within_s.into()).min(LONGEST)),
            Order::Thaw if self.until.is_none() => Err("nothing stands still".to_owned()),
            Order::Thaw => {
                self.thaw();
                Ok(())
            }
            Order::ShutDown => self.end(&self.config.shutdown, "poweroff"),
            Order::Reboot => self.end(&self.config.reboot, "reboot"),
        }
    }

    fn freeze(&mut self, within: Duration) -> Result<(), String> {
        if self.until.is_some() {
            return Err("file systems stand still already".to_owned());
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|why| format!("mountinfo: {why}"))?;
        let points: Vec<PathBuf> =
            freezable(&mounts).into_iter().filter(|point| !self.config.freeze.except.contains(point)).collect();
        self.hooks("freeze").inspect_err(|_| drop(self.hooks("thaw")))?;
        for point in points {
            if let Err(why) = ioctl(&point, FIFREEZE) {
                self.thaw();
                return Err(format!("{}: {why}", point.display()));
            }
            self.frozen.push(point);
        }
        self.until = Some(Instant::now() + within);
        Ok(())
    }

    fn thaw(&mut self) {
        self.until = None;
        for point in std::mem::take(&mut self.frozen).iter().rev() {
            let _ = ioctl(point, FITHAW); // Somebody else may have done it.
        }
        let _ = self.hooks("thaw");
    }

    /// Programs beside applications: a database flushes, for example.
    fn hooks(&self, word: &str) -> Result<(), String> {
        let Ok(entries) = std::fs::read_dir(&self.config.freeze.hooks) else { return Ok(()) };
        let mut programs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        programs.sort();
        programs.iter().try_for_each(|program| run(program, &[word.to_owned()], HOOK))
    }

    fn end(&self, own: &[String], word: &str) -> Result<(), String> {
        if let Some((program, arguments)) = own.split_first() {
            return run(Path::new(program), arguments, SHUT_DOWN);
        }
        if Path::new("/run/systemd/system").exists() {
            return run(Path::new("systemctl"), &["--no-block".to_owned(), word.to_owned()], SHUT_DOWN);
        }
        run(Path::new(word), &[], SHUT_DOWN)
    }
}

fn run(program: &Path, arguments: &[String], limit: Duration) -> Result<(), String> {
    let words: Vec<String> = std::iter::once(program.display().to_string()).chain(arguments.iter().cloned()).collect();
    command(&words, limit)
}

/// Mount points of disks, each file system once, the deepest first: so that none stands below one that must still be
/// written to.
fn freezable(mountinfo: &str) -> Vec<PathBuf> {
    const KINDS: [&str; 7] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs"];
    let mut seen = std::collections::BTreeSet::new();
    let mut points = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (mut left, mut right) = (left.split(' ').skip(2), right.split(' '));
        let (Some(device), Some(_), Some(point)) = (left.next(), left.next(), left.next()) else { continue };
        let (Some(kind), Some(source), options) = (right.next(), right.next(), right.next()) else { continue };
        let read_only = options.is_some_and(|options| options.split(',').any(|option| option == "ro"));
        if KINDS.contains(&kind) && source.starts_with('/') && !read_only && seen.insert(device.to_owned()) {
            points.push(PathBuf::from(point.replace("\\040", " ")));
        }
    }
    points.sort_by_key(|point: &PathBuf| std::cmp::Reverse(point.components().count()));
    points
}

const FIFREEZE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<i32>(b'X', 119);
const FITHAW: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<i32>(b'X', 120);

fn ioctl(point: &Path, code: rustix::ioctl::Opcode) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let folder = File::options().read(true).custom_flags(OFlags::DIRECTORY.bits().cast_signed()).open(point)?;
    let done = match code {
        // SAFETY: both calls take an int that the kernel does not look at.
        FIFREEZE => unsafe { rustix::ioctl::ioctl(&folder, rustix::ioctl::IntegerSetter::<FIFREEZE>::new_usize(0)) },
        _ => unsafe { rustix::ioctl::ioctl(&folder, rustix::ioctl::IntegerSetter::<FITHAW>::new_usize(0)) },
    };
    done.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_frozen_the_deepest_first_and_once() {
        let mounts = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
23 22 0:21 / /proc rw - proc proc rw\n\
24 22 254:2 / /var/lib rw - xfs /dev/vda2 rw,attr2\n\
25 22 254:1 /srv /mnt/bound rw - ext4 /dev/vda1 rw\n\
26 22 254:3 / /cd ro - ext4 /dev/vdb ro\n\
27 22 0:40 / /net rw - nfs4 server:/x rw\n\
28 24 254:4 / /var/lib/my\\040data rw - ext4 /dev/vdc rw\n\
junk\n";
        let points = freezable(mounts);
        assert_eq!(points, ["/var/lib/my data", "/var/lib", "/"].map(PathBuf::from));
    }
}
