//! What a beat says of this guest: a few small files of /proc, which no disk can hold up.

use std::fs;

use mainstay_guest::message::System;

/// Load, memory, root file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Seconds since the boot.
    pub uptime_s: u64,
    /// One-minute load, in hundredths.
    pub load_centi: u32,
    /// Available memory in KiB.
    pub available_kib: u64,
    /// The root file system can be written.
    pub root_writable: bool,
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// As they are now; what cannot be read is 0, and a root that cannot be seen counts as writable.
#[must_use]
pub fn facts() -> Facts {
    Facts {
        uptime_s: whole(&read("/proc/uptime")),
        load_centi: hundredths(&read("/proc/loadavg")),
        available_kib: available(&read("/proc/meminfo")),
        root_writable: root_writable(&read("/proc/self/mounts")),
    }
}

/// Id of this boot: 16 bytes.
#[must_use]
pub fn boot() -> [u8; 16] {
    let mut boot = [0; 16];
    let digits: Vec<u8> =
        read("/proc/sys/kernel/random/boot_id").chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    for (byte, pair) in boot.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    boot
}

/// What runs here, by os-release.
#[must_use]
pub fn system() -> System {
    let release = [read("/etc/os-release"), read("/usr/lib/os-release")].concat();
    let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
    System { id: field(&release, "ID"), version: field(&release, "VERSION_ID"), kernel }
}

fn field(release: &str, name: &str) -> String {
    let value = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_default().trim_matches(['"', '\'']).chars().take(64).collect()
}

fn whole(text: &str) -> u64 {
    text.split(['.', ' ']).next().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn hundredths(text: &str) -> u32 {
    let load: f64 = text.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
    (load * 100.0).round() as u32
}

fn available(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The last mount on `/` is the one that is seen.
fn root_writable(mounts: &str) -> bool {
    let mut options = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, _, options) = (fields.next()?, fields.next()?, fields.next()?);
        (at == "/").then_some(options)
    });
    options.next_back().is_none_or(|options| options.split(',').all(|option| option != "ro"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc() {
        assert_eq!((whole("4711.25 9000.00\n"), whole("")), (4711, 0));
        assert_eq!((hundredths("1.25 0.50 0.10 1/99 5\n"), hundredths("")), (125, 0));
        assert_eq!(available("MemTotal: 100 kB\nMemAvailable:   4242 kB\n"), 4242);
        let mounts = "rootfs / rootfs rw 0 0\n/dev/vda1 / ext4 ro,relatime 0 0\n/dev/vda2 /var ext4 rw 0 0\n";
        assert!(!root_writable(mounts));
        assert!(root_writable("/dev/vda1 / ext4 rw,errors=remount-ro 0 0\n"));
        assert!(root_writable(""));
        let release = "NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n";
        assert_eq!((field(release, "ID"), field(release, "VERSION_ID")), ("debian".to_owned(), "12".to_owned()));
        assert_eq!(field("", "ID"), "");
    }
}
