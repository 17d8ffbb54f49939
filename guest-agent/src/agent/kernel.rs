//! The kernel's log: what in it is an error that the host should know of.
//!
//! ```text
//!   /dev/kmsg ──► one record a read: "priority,sequence,time,flags;text" ──► of the kernel itself? ──► known line? ──► report
//! ```
//!
//! Programs can write to this log, too, with a facility of their own: those records are passed over. The number of the last
//! record is kept in /run, so that a restart of this agent tells nothing twice and misses nothing.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use mainstay_guest::message::Severity;

/// A record that is longer is cut off by the kernel.
const RECORD: usize = 8192;
/// Records read in one go, so that a flood does not keep the loop from its beats.
const AT_ONCE: usize = 256;

/// A line that is an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Class {
    /// Kind of the report.
    pub kind: &'static str,
    /// How bad.
    pub severity: Severity,
}

/// What stands in a line, all of it; the first that fits counts.
const CLASSES: [(&[&str], &str, Severity); 17] = [
    (&["Kernel panic - not syncing"], "kernel/panic", Severity::Critical),
    (&["watchdog: BUG: soft lockup"], "kernel/soft-lockup", Severity::Critical),
    (&["BUG: soft lockup"], "kernel/soft-lockup", Severity::Critical),
    (&["watchdog: Watchdog detected hard LOCKUP"], "kernel/hard-lockup", Severity::Critical),
    (&["rcu: INFO:", "detected stall"], "kernel/rcu-stall", Severity::Critical),
    (&["kernel BUG at "], "kernel/bug", Severity::Critical),
    (&["BUG: "], "kernel/bug", Severity::Critical),
    (&["Oops: "], "kernel/oops", Severity::Critical),
    (&["general protection fault"], "kernel/oops", Severity::Critical),
    (&["INFO: task ", " blocked for more than "], "kernel/hung-task", Severity::Warning),
    (&["emounting filesystem read-only"], "kernel/remount-read-only", Severity::Critical),
    (&["EXT4-fs error"], "kernel/filesystem", Severity::Warning),
    (&["XFS (", "orruption"], "kernel/filesystem", Severity::Critical),
    (&["Out of memory: Killed process"], "kernel/out-of-memory", Severity::Warning),
    (&["[Hardware Error]"], "kernel/machine-check", Severity::Critical),
    (&["I/O error, dev "], "kernel/io-error", Severity::Warning),
    (&["Buffer I/O error on dev"], "kernel/io-error", Severity::Warning),
];

/// What a line of the kernel says.
#[must_use]
pub fn classify(line: &str) -> Option<Class> {
    let fits = |words: &[&str]| words.iter().all(|word| line.contains(word));
    let (_, kind, severity) = CLASSES.iter().find(|(words, ..)| fits(words))?;
    Some(Class { kind, severity: *severity })
}

/// Number and text of a record of the kernel itself.
fn parse(record: &str) -> Option<(u64, &str)> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let sequence: u64 = fields.next()?.parse().ok()?;
    let line = text.lines().next().unwrap_or_default(); // Further lines are properties of the device.
    (priority >> 3 == 0).then_some((sequence, line))
}

/// The open log.
pub struct KernelLog {
    log: File,
    mark: PathBuf,
    /// Everything up to here was told.
    last: Option<u64>,
    unmarked: bool,
}

impl KernelLog {
    /// From where the last agent of this boot stopped, or from the begin of the boot. `mark`: a file in /run.
    ///
    /// # Errors
    /// There is no such log, or it may not be read.
    pub fn open(mark: PathBuf) -> io::Result<Self> {
        let log = File::options().read(true).custom_flags(libc_nonblock()).open("/dev/kmsg")?;
        let last = std::fs::read_to_string(&mark).ok().and_then(|text| text.trim().parse().ok());
        Ok(Self { log, mark, last, unmarked: false })
    }

    /// What has been written since, as far as it is an error; the flag: there is more.
    pub fn read(&mut self) -> (Vec<(Class, String)>, bool) {
        let mut found = Vec::new();
        let mut buffer = [0; RECORD];
        for _ in 0..AT_ONCE {
            let length = match self.log.read(&mut buffer) {
                Ok(0) => return (found, false),
                Ok(length) => length,
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => return (found, false),
                // EPIPE: records were overwritten before they were read. The next read goes on behind them.
                Err(_) => continue,
            };
            let text = String::from_utf8_lossy(&buffer[..length]);
            let Some((sequence, line)) = parse(&text) else { continue };
            if self.last.is_some_and(|last| sequence <= last) {
                continue;
            }
            self.last = Some(sequence);
            self.unmarked = true;
            if let Some(class) = classify(line) {
                found.push((class, line.to_owned()));
            }
        }
        (found, true)
    }

    /// Remembers how far it was read. A file in memory; what is lost with it is told twice.
    pub fn mark(&mut self) {
        if let (true, Some(last)) = (std::mem::take(&mut self.unmarked), self.last) {
            let _ = std::fs::write(&self.mark, last.to_string());
        }
    }
}

impl AsFd for KernelLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.log.as_fd()
    }
}

fn libc_nonblock() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits().cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_kernels() {
        for (line, expected) in [
            ("Kernel panic - not syncing: sysrq triggered crash", Some("kernel/panic")),
            ("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [stress:331]", Some("kernel/soft-lockup")),
            ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", Some("kernel/rcu-stall")),
            ("kernel BUG at mm/slub.c:448!", Some("kernel/bug")),
            ("BUG: kernel NULL pointer dereference, address: 0000000000000000", Some("kernel/bug")),
            ("Oops: 0002 [#1] PREEMPT SMP NOPTI", Some("kernel/oops")),
            ("general protection fault, probably for non-canonical address 0xdead", Some("kernel/oops")),
            ("INFO: task jbd2/vda1-8:180 blocked for more than 120 seconds.", Some("kernel/hung-task")),
            ("EXT4-fs (vda1): Remounting filesystem read-only", Some("kernel/remount-read-only")),
            ("EXT4-fs error (device vda1): ext4_journal_check_start:83", Some("kernel/filesystem")),
            ("Out of memory: Killed process 412 (java) total-vm:9000kB", Some("kernel/out-of-memory")),
            ("mce: [Hardware Error]: Machine check events logged", Some("kernel/machine-check")),
            ("blk_update_request: I/O error, dev vda, sector 2048 op 0x1:(WRITE)", Some("kernel/io-error")),
            ("Buffer I/O error on dev vda1, logical block 9, lost async page write", Some("kernel/io-error")),
            ("EXT4-fs (vda1): mounted filesystem with ordered data mode", None),
            ("systemd[1]: Started cron.service", None),
        ] {
            assert_eq!(classify(line).map(|class| class.kind), expected, "{line}");
        }
    }

    #[test]
    fn records_of_programs_are_passed_over() {
        assert_eq!(parse("3,120,8899,-;Oops: 0002\n SUBSYSTEM=x\n"), Some((120, "Oops: 0002")));
        assert_eq!(parse("11,121,8899,-;Oops: a program says so"), None, "facility 1 is a program");
        for junk in ["", "x", "1,2", "a,b;c", "3,;x", ";"] {
            assert_eq!(parse(junk), None, "{junk:?}");
        }
    }
}
