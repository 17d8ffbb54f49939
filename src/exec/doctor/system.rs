//! Reads what the checks need from the system. Everything below one root folder, so that tests can give another; only
//! `systemctl` is asked as a child process, with a deadline. No datastore is touched: a hung mount must not hang this.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::mounts::{self, Mount};
use crate::exec::reading;
use crate::types::DatastoreId;
use crate::types::guard::Standing;

/// Where libvirt looks for our hook.
pub const HOOK_PATH: &str = "/etc/libvirt/hooks/qemu.d/50-mainstay";
/// Where the guard says how the hardware watchdog stands.
const WATCHDOG_PATH: &str = "/run/mainstay/guard/watchdog.json";
/// How long `systemctl show` may take.
const SYSTEMCTL_TIME: Duration = Duration::from_secs(3);
/// How often it is looked whether it has ended.
const SYSTEMCTL_POLL: Duration = Duration::from_millis(10);
/// Longest file that is read; /proc/mountinfo of a host with 10,000 mounts is about 2 MiB.
const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;

/// What was read; the default is "could not be read".
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SystemFacts {
    /// Where the hook should lie.
    pub hook_path: String,
    /// What lies there.
    pub hook: HookState,
    /// The libvirt daemon that serves QEMU.
    pub daemon: Option<Daemon>,
    /// `lock_manager` of qemu.conf.
    pub lock_manager: Option<String>,
    /// libvirt-guests.
    pub guests: Guests,
    /// What this host is.
    pub machine: Machine,
    /// The kernel's clock is disciplined.
    pub clock_synchronised: Option<bool>,
    /// All mounts.
    pub mounts: Vec<Mount>,
    /// Of the NFS client module; none = not loaded.
    pub recover_lost_locks: Option<bool>,
    /// Lease of the server in seconds by mount point, NFSv4 only.
    pub nfs_lease_s: BTreeMap<String, u64>,
    /// The hardware watchdog, as the guard sees it; none = no guard has said.
    pub watchdog: Option<Standing>,
    /// The programs asked for.
    pub programs: BTreeMap<String, ProgramState>,
    /// There is a program that reads text on pictures of guests' screens.
    pub reads_pictures: bool,
}

/// The hook's file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HookState {
    /// Could not be looked at.
    #[default]
    Unknown,
    /// No such file.
    Missing,
    /// There, but libvirt cannot call it.
    NotExecutable,
    /// There since this clock-of-day time in seconds (the inode's change time: packages set the other one back).
    Present {
        /// Seconds since 1970.
        changed_unix_s: u64,
    },
}

/// A libvirt daemon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Daemon {
    /// `libvirtd` or `virtqemud`.
    pub name: String,
    /// Clock of day in seconds.
    pub started_unix_s: u64,
}

/// libvirt-guests.service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Guests {
    /// Not installed or not active.
    Inactive,
    /// Active.
    Active {
        /// So it stops before mainstayd does.
        after_mainstayd: bool,
    },
    /// Cannot be told; why.
    Unknown(String),
}

impl Default for Guests {
    fn default() -> Self {
        Self::Unknown("systemd was not asked".to_owned())
    }
}

/// What runs below this kernel.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Machine {
    /// Could not be read.
    #[default]
    Unknown,
    /// No sign of a hypervisor.
    Metal,
    /// A hypervisor; its name if known.
    Vm(String),
    /// A container; its kind.
    Container(String),
}

/// A program that the settings name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProgramState {
    /// A file that root can execute.
    Executable,
    /// A file without that bit.
    NotExecutable,
    /// Nothing there.
    Missing,
}

/// Reads everything below `root` (`/` except in tests); `programs` are fences of the settings.
#[must_use]
pub fn gather(root: &Path, programs: &[String]) -> SystemFacts {
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    let text = |path: &str| read(&at(path));
    SystemFacts {
        hook_path: HOOK_PATH.to_owned(),
        hook: hook(&at(HOOK_PATH)),
        daemon: ["libvirtd", "virtqemud"].iter().find_map(|name| daemon(root, name)),
        lock_manager: text("/etc/libvirt/qemu.conf").and_then(|conf| lock_manager(&conf)),
        guests: guests(),
        machine: machine(root),
        clock_synchronised: clock_synchronised(),
        mounts: text("/proc/self/mountinfo").map(|text| mounts::parse(&text)).unwrap_or_default(),
        recover_lost_locks: text("/sys/module/nfs/parameters/recover_lost_locks").map(|value| value.trim() == "Y"),
        nfs_lease_s: text("/proc/self/mountstats").map(|text| nfs_leases(&text)).unwrap_or_default(),
        watchdog: text(WATCHDOG_PATH).and_then(|text| serde_json::from_str(&text).ok()),
        reads_pictures: reading::PROGRAMS.iter().any(|program| at(program).exists()),
        programs: programs.iter().map(|program| (program.clone(), program_state(&at(program)))).collect(),
    }
}

/// How long the servers of these datastores keep what a silent client has locked; left out where nobody can tell.
#[must_use]
pub fn lock_leases(paths: &[(DatastoreId, String)]) -> Vec<(DatastoreId, Duration)> {
    let text = |path: &str| read(Path::new(path)).unwrap_or_default();
    let (mounts, leases) = (mounts::parse(&text("/proc/self/mountinfo")), nfs_leases(&text("/proc/self/mountstats")));
    let lease = |path: &str| leases.get(&mounts::of_path(&mounts, path)?.point).copied();
    paths.iter().filter_map(|(id, path)| Some((*id, Duration::from_secs(lease(path)?)))).collect()
}

fn read(path: &Path) -> Option<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn hook(path: &Path) -> HookState {
    match fs::metadata(path) {
        Ok(meta) if meta.permissions().mode() & 0o111 == 0 || !meta.is_file() => HookState::NotExecutable,
        Ok(meta) => HookState::Present { changed_unix_s: u64::try_from(meta.ctime()).unwrap_or(0) },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => HookState::Missing,
        Err(_) => HookState::Unknown,
    }
}

fn program_state(path: &Path) -> ProgramState {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => ProgramState::Executable,
        Ok(_) => ProgramState::NotExecutable,
        Err(_) => ProgramState::Missing,
    }
}

/// By its pid file; a stale one names a process that is not this daemon.
fn daemon(root: &Path, name: &str) -> Option<Daemon> {
    let pid: u32 = read(&root.join(format!("run/{name}.pid")))?.trim().parse().ok()?;
    let stat = read(&root.join(format!("proc/{pid}/stat")))?;
    let (before, after) = stat.rsplit_once(')')?;
    // The kernel cuts names at 15 bytes; both of ours are shorter.
    if before.split_once('(')?.1 != name {
        return None;
    }
    // `starttime` is field 22; what follows the name begins with field 3.
    let ticks: u64 = after.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let stat = read(&root.join("proc/stat"))?;
    let booted: u64 = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(Daemon { name: name.to_owned(), started_unix_s: booted + ticks / u64::try_from(per_second).ok()?.max(1) })
}

/// The last assignment that is not a comment.
fn lock_manager(conf: &str) -> Option<String> {
    let value = |line: &str| {
        let rest = line.trim().strip_prefix("lock_manager")?.trim_start().strip_prefix('=')?;
        Some(rest.trim().trim_matches('"').to_owned())
    };
    conf.lines().filter_map(value).next_back()
}

/// `lease_time=90` of each NFS mount in mountstats.
fn nfs_leases(text: &str) -> BTreeMap<String, u64> {
    let mut leases = BTreeMap::new();
    let mut point = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("device ") {
            point = rest.split_once(" mounted on ").and_then(|(_, rest)| rest.split(" with fstype ").next());
        } else if let (Some(point), Some(seconds)) = (point, line.split("lease_time=").nth(1)) {
            let digits: String = seconds.chars().take_while(char::is_ascii_digit).collect();
            if let Ok(seconds) = digits.parse() {
                leases.insert(point.to_owned(), seconds);
            }
        }
    }
    leases
}

/// Container first: inside one, the hypervisor below the host is seen, too.
fn machine(root: &Path) -> Machine {
    let text = |path: &str| read(&root.join(path)).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    if let Some(kind) = text("run/systemd/container") {
        return Machine::Container(kind);
    }
    let environment = text("proc/1/environ").unwrap_or_default();
    if let Some(kind) = environment.split('\0').find_map(|pair| pair.strip_prefix("container=")) {
        return Machine::Container(kind.to_owned());
    }
    if root.join(".dockerenv").exists() {
        return Machine::Container("docker".to_owned());
    }
    // A Xen host's own kernel (dom0) has the hypervisor below it, and yet is not paused by anybody.
    if text("proc/xen/capabilities").is_some_and(|capabilities| capabilities.contains("control_d")) {
        return Machine::Metal;
    }
    let vendor = text("sys/class/dmi/id/sys_vendor").unwrap_or_default();
    let product = text("sys/class/dmi/id/product_name").unwrap_or_default();
    let by_dmi = ["QEMU", "VMware", "innotek", "Xen", "Bochs", "Parallels", "Amazon EC2", "Google", "KVM", "Virtual"];
    let by_dmi = by_dmi.iter().any(|sign| vendor.contains(sign) || product.contains(sign));
    let by_kernel = text("sys/hypervisor/type");
    let cpus = text("proc/cpuinfo");
    let by_cpu = cpus.as_ref().is_some_and(|cpus| {
        let flags = cpus.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
        flags.is_some_and(|flags| flags.split_ascii_whitespace().any(|flag| flag == "hypervisor"))
    });
    if by_dmi || by_kernel.is_some() || by_cpu {
        let named = [format!("{vendor} {product}").trim().to_owned(), by_kernel.unwrap_or_default()];
        return Machine::Vm(named.into_iter().find(|name| !name.is_empty()).unwrap_or("unknown hypervisor".to_owned()));
    }
    if cpus.is_some() { Machine::Metal } else { Machine::Unknown }
}

/// Asks the kernel, which knows whether chrony, ntpd or timesyncd steers it. Changes nothing.
fn clock_synchronised() -> Option<bool> {
    // SAFETY: timex is plain integers, for which all zero is valid; `modes` = 0 makes the call a mere query.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` lives through the call and is of the type that the kernel writes.
    let status = unsafe { libc::adjtimex(&raw mut state) };
    if status < 0 { None } else { Some(state.status & libc::STA_UNSYNC == 0) }
}

fn guests() -> Guests {
    let asked = ["show", "libvirt-guests.service", "--property=ActiveState", "--property=After"];
    match output(Command::new("systemctl").args(asked), SYSTEMCTL_TIME) {
        Ok(text) => guests_state(&text),
        Err(why) => Guests::Unknown(why),
    }
}

fn guests_state(text: &str) -> Guests {
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap_or("");
    match value("ActiveState") {
        "active" => {
            Guests::Active { after_mainstayd: value("After").split(' ').any(|unit| unit == "mainstayd.service") }
        }
        "" => Guests::Unknown("systemd did not say".to_owned()),
        _ => Guests::Inactive,
    }
}

/// Output of a child that is killed when it takes longer. What it writes must fit into a pipe (64 KiB).
fn output(command: &mut Command, time: Duration) -> Result<String, String> {
    let program = PathBuf::from(command.get_program());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
    let mut left = time;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => break,
            Ok(Some(status)) => return Err(format!("{}: {status}", program.display())),
            Ok(None) if SYSTEMCTL_POLL <= left => {
                std::thread::sleep(SYSTEMCTL_POLL);
                left -= SYSTEMCTL_POLL;
            }
            Ok(None) => {
                // Neither can fail in a way that matters: it is our child, and it is not waited for otherwise.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{}: no answer within {} s", program.display(), time.as_secs()));
            }
            Err(error) => return Err(format!("{}: {error}", program.display())),
        }
    }
    let text = child.wait_with_output().map_err(|error| format!("{}: {error}", program.display()))?.stdout;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests;
