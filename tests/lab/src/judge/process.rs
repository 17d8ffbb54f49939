//! QEMU processes, found and read through /proc.
//!
//! ```text
//!  a thread or process was made? (/proc/loadavg, last pid) ──no──► nothing to look for
//!       │ yes, or three seconds are over
//!       ▼
//!  new number in /proc ──► named qemu-system-*, has -uuid ──► threads `CPU n/KVM`, `…/TCG` ──► schedstat, kept open
//! ```
//!
//! A process takes its name by exec, some time after it was made: while it is young its name is read again and again.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use uuid::Uuid;

use super::Moment;
use super::copy::Sample;

const NAME: &str = "qemu-system";
/// Everything is looked at again after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// A process of this age is looked at in every round,
const VERY_YOUNG: Duration = Duration::from_millis(300);
/// and one of this age in every fifth.
const YOUNG: Duration = Duration::from_secs(5);

/// A QEMU process with a VM.
pub struct Qemu {
    /// Its number.
    pub pid: i32,
    /// Its VM.
    pub vm: Uuid,
    /// When the process began.
    pub began: Moment,
    threads: Vec<Thread>,
    looked: Moment,
}

struct Thread {
    id: i32,
    vcpu: bool,
    schedstat: File,
    ran: Duration,
    waited: Duration,
    ended: bool,
}

/// Finds QEMU processes.
#[derive(Default)]
pub struct Finder {
    known: HashMap<i32, Moment>,
    found: HashSet<i32>,
    loadavg: Option<File>,
    last_pid: String,
    last_full: Moment,
    round: u64,
    /// How often all of /proc was listed, and how often a process's files were opened: what costs.
    lists: u64,
    opened: u64,
}

impl Finder {
    /// QEMU processes that were not there in the round before.
    pub fn look(&mut self, now: Moment) -> Vec<Qemu> {
        self.round += 1;
        let full = LOOK_AGAIN <= now.since(self.last_full);
        if full {
            self.last_full = now;
        }
        if self.something_was_made() || full {
            self.list(now);
        }
        let every_fifth = self.round.is_multiple_of(5);
        let due = |seen: Moment| {
            let age = now.since(seen);
            full || age <= VERY_YOUNG || (every_fifth && age <= YOUNG)
        };
        let look_at = self.known.iter().filter(|(pid, seen)| due(**seen) && !self.found.contains(pid));
        let mut opened = 0;
        let new: Vec<Qemu> = look_at.inspect(|_| opened += 1).filter_map(|(pid, _)| Qemu::read(*pid)).collect();
        self.opened += opened;
        self.found.extend(new.iter().map(|q| q.pid));
        new
    }

    /// Forgets a process that has ended, or is not of interest until it is looked at again.
    pub fn forget(&mut self, pid: i32) {
        self.found.remove(&pid);
    }

    fn something_was_made(&mut self) -> bool {
        let mut text = [0; 64];
        let file = match &self.loadavg {
            Some(file) => file,
            None => match File::open("/proc/loadavg") {
                Ok(file) => self.loadavg.insert(file),
                Err(_) => return true,
            },
        };
        let Ok(length) = file.read_at(&mut text, 0) else { return true };
        let text = String::from_utf8_lossy(&text[..length]);
        let last = text.split_whitespace().last().unwrap_or_default();
        let changed = last != self.last_pid;
        if changed {
            self.last_pid = last.into();
        }
        changed
    }

    fn list(&mut self, now: Moment) {
        self.lists += 1;
        let Ok(entries) = std::fs::read_dir("/proc") else { return };
        let alive: HashSet<i32> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
        self.known.retain(|pid, _| alive.contains(pid));
        self.found.retain(|pid| alive.contains(pid));
        for pid in alive {
            self.known.entry(pid).or_insert(now);
        }
    }
}

impl Qemu {
    fn read(pid: i32) -> Option<Self> {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        if !name.starts_with(NAME) {
            return None;
        }
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = line.split(|b| *b == 0);
        words.find(|w| *w == b"-uuid")?;
        let vm = Uuid::try_parse_ascii(words.next()?).ok()?;
        Some(Qemu { pid, vm, began: began(pid)?, threads: Vec::new(), looked: Moment(0) })
    }

    /// Its vCPU times now; None once all its vCPUs have ended.
    pub fn sample(&mut self, now: Moment) -> Option<Sample> {
        let pause = if now.since(self.began) < YOUNG { VERY_YOUNG } else { LOOK_AGAIN };
        if self.threads.iter().all(|t| !t.vcpu) || pause <= now.since(self.looked) {
            self.looked = now;
            self.find_threads();
        }
        self.threads.iter_mut().for_each(Thread::update);
        let at = Moment::now();
        let vcpus = || self.threads.iter().filter(|t| t.vcpu);
        let ended = vcpus().all(|t| t.ended);
        if ended && (vcpus().count() != 0 || !std::fs::exists(format!("/proc/{}", self.pid)).unwrap_or(true)) {
            return None;
        }
        // A vCPU that waits for its disk waits for the main thread, which may lack a CPU, too.
        let waited = self.threads.iter().map(|t| t.waited).sum();
        Some(Sample { at, ran: vcpus().map(|t| t.ran).sum(), waited })
    }

    fn find_threads(&mut self) {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else { return };
        for id in entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()) {
            if self.threads.iter().all(|t| t.id != id)
                && let Ok(Some(thread)) = Thread::open(self.pid, id)
            {
                self.threads.push(thread);
            }
        }
    }
}

impl Thread {
    /// Opens a thread if it is a vCPU or the main one.
    fn open(pid: i32, id: i32) -> io::Result<Option<Self>> {
        let folder = format!("/proc/{pid}/task/{id}");
        let name = std::fs::read_to_string(format!("{folder}/comm"))?;
        let name = name.trim();
        let vcpu = name.ends_with("/TCG") || name.ends_with("/KVM");
        if !vcpu && id != pid {
            return Ok(None);
        }
        let schedstat = File::open(format!("{folder}/schedstat"))?;
        Ok(Some(Thread { id, vcpu, schedstat, ran: Duration::ZERO, waited: Duration::ZERO, ended: false }))
    }

    /// Reads its times; those of a thread that has ended stay.
    fn update(&mut self) {
        let mut text = [0; 96];
        let Ok(length @ 1..) = self.schedstat.read_at(&mut text, 0) else {
            self.ended = true;
            return;
        };
        let text = String::from_utf8_lossy(&text[..length]);
        let mut numbers = text.split_whitespace().map_while(|n| n.parse().ok()).map(Duration::from_nanos);
        if let (Some(ran), Some(waited)) = (numbers.next(), numbers.next()) {
            (self.ran, self.waited) = (ran, waited);
        }
    }
}

/// When a process began: ticks of 10 ms since boot.
fn began(pid: i32) -> Option<Moment> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks: u64 = text.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    Some(Moment(ticks * 10_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between two rounds of the judge.
    const PERIOD: Duration = Duration::from_millis(20);
    /// Half a minute.
    const ROUNDS: u64 = 1_500;

    /// What judging costs is what it reads: everything now and then, else one file. Counted, not measured, and in time that is
    /// made up: on a busy machine a measured share of the CPU says nothing.
    #[test]
    fn judging_is_cheap() {
        // Processes that others make meanwhile are the machine's, not the judge's: it is told of none.
        let nothing_new = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(nothing_new.path(), "0.00 0.00 0.00 1/100 42\n").expect("it can be written");
        let mut finder =
            Finder { loadavg: Some(File::open(nothing_new.path()).expect("just made")), ..Finder::default() };
        let mut now = Moment::now();
        drop(finder.look(now));
        let processes = finder.known.len() as u64;
        for _ in 0..ROUNDS {
            now = now.plus(PERIOD);
            drop(finder.look(now));
        }
        let full = PERIOD.as_millis() as u64 * ROUNDS / LOOK_AGAIN.as_millis() as u64 + 1;
        assert!(finder.lists <= full + 1, "{} lists of /proc", finder.lists);
        // While very young in every round, while young in every fifth, later with every full look. The machine may double them.
        let rounds = |age: Duration| age.as_millis() as u64 / PERIOD.as_millis() as u64 + 1;
        let looks = rounds(VERY_YOUNG) + rounds(YOUNG) / 5 + full + 1;
        assert!(finder.opened <= 2 * processes * looks, "{} of {processes} opened", finder.opened);
    }
}
