//! One QEMU process: found by pid, held by pidfd, stopped by signal and freezer.
//!
//! ```text
//! stop:  SIGSTOP to the pidfd ──► 1 to cgroup.freeze of its scope ──► every thread seen in T (or D: the stop is pending)
//! lift:  0 to cgroup.freeze ──► SIGCONT
//! ```
//!
//! The freezer also holds helpers (swtpm, virtiofsd) and outlasts a stray SIGCONT. It is used only on a scope that
//! libvirt made (`machine-qemu….scope`): anything else could hold processes that are not the VM's.
//!
//! Everything that a stop needs is opened when the process is found: stopping it opens, allocates and waits for nothing.
//!
//! Deliberately not here: when to stop whom.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::table::ProcessKey;
use crate::types::VmId;

/// A process that runs one VM.
pub struct Process {
    key: ProcessKey,
    pidfd: OwnedFd,
    scope: Option<Scope>,
}

/// What libvirt made around a QEMU.
struct Scope {
    folder: PathBuf,
    /// `cgroup.freeze` and `cgroup.events`.
    freezer: File,
    events: File,
}

impl Scope {
    fn open(folder: PathBuf) -> io::Result<Self> {
        let freezer = File::options().write(true).open(folder.join("cgroup.freeze"))?;
        let events = File::open(folder.join("cgroup.events"))?;
        Ok(Self { folder, freezer, events })
    }
}

impl Process {
    /// The process `pid`, if it is a QEMU of `vm`. None: it is not, or not yet (libvirt writes the pid file before QEMU
    /// is executed).
    ///
    /// # Errors
    /// When the kernel refuses a pidfd although the process is there.
    pub fn of_vm(pid: u32, vm: VmId) -> io::Result<Option<Self>> {
        Self::if_named(pid, |named| named == vm.to_string())
    }

    /// The process `pid`, if it is a QEMU of any VM.
    ///
    /// # Errors
    /// When the kernel refuses a pidfd although the process is there.
    pub fn of_any_vm(pid: u32) -> io::Result<Option<Self>> {
        Self::if_named(pid, |_| true)
    }

    fn if_named(pid: u32, right: impl Fn(&str) -> bool) -> io::Result<Option<Self>> {
        let Some(started) = started(pid) else { return Ok(None) };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if !vm_named(&line).is_some_and(right) {
            return Ok(None);
        }
        Self::open(ProcessKey { pid, started })
    }

    /// The very process with this key. None: it is gone.
    ///
    /// # Errors
    /// When the kernel refuses a pidfd although the process is there.
    pub fn open(key: ProcessKey) -> io::Result<Option<Self>> {
        let pidfd = match pidfd_open(key.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Only now is it certain that the pid cannot be reused between look and open.
        if started(key.pid) != Some(key.started) {
            return Ok(None);
        }
        let scope = fs::read_to_string(format!("/proc/{}/cgroup", key.pid)).ok().and_then(|text| {
            let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
            scope_of(&text, &mounts)
        });
        // A scope that is gone already, or a kernel without freezer: the signal alone holds.
        let scope = scope.and_then(|folder| Scope::open(folder).ok());
        Ok(Some(Self { key, pidfd, scope }))
    }

    /// Which it is.
    #[must_use]
    pub fn key(&self) -> ProcessKey {
        self.key
    }

    /// Its scope's folder, if libvirt made one.
    #[must_use]
    pub fn scope(&self) -> Option<&Path> {
        self.scope.as_ref().map(|scope| scope.folder.as_path())
    }

    /// Whether it has exited; a zombie has.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| 0 < ready)
    }

    /// Readable when it has exited.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Begins to stop it. Never waits.
    ///
    /// # Errors
    /// ESRCH = it has exited.
    pub fn halt(&self) -> io::Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// The second half of a stop: holds its helpers, and itself against a stray SIGCONT.
    ///
    /// # Errors
    /// When the freezer refused; the signal stands all the same.
    pub fn freeze(&self) -> io::Result<()> {
        self.freezer(true)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When the freezer or the signal was refused; it may still stand.
    pub fn lift(&self) -> io::Result<()> {
        self.freezer(false)?;
        self.signal(Signal::SIGCONT)
    }

    /// Ends it; works on a stopped and frozen one, too.
    ///
    /// # Errors
    /// ESRCH = it has exited.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::SIGKILL)
    }

    /// SIGHUP: a guard goes over to another program.
    ///
    /// # Errors
    /// ESRCH = it has exited.
    pub fn hang_up(&self) -> io::Result<()> {
        self.signal(Signal::SIGHUP)
    }

    /// Thaws what is left in its scope after its exit.
    pub fn thaw(&self) {
        drop(self.freezer(false)); // A scope that is gone holds nothing.
    }

    /// Whether every thread stands: T, or D with the stop pending (a thread in D returns to the stop, not to the guest),
    /// or gone, or held by the freezer.
    #[must_use]
    pub fn stands(&self) -> bool {
        self.is_frozen() || threads_stand(self.key)
    }

    fn is_frozen(&self) -> bool {
        let Some(scope) = &self.scope else { return false };
        let mut text = [0; 256];
        let read = scope.events.read_at(&mut text, 0).unwrap_or(0); // A scope that is gone holds nothing.
        text[..read].split(|byte| *byte == b'\n').any(|line| line == b"frozen 1")
    }

    fn freezer(&self, on: bool) -> io::Result<()> {
        let Some(scope) = &self.scope else { return Ok(()) };
        scope.freezer.write_at(if on { b"1" } else { b"0" }, 0).map(drop)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        // SAFETY: the descriptor is a pidfd that lives as long as self; no pointer is passed but a null one.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Reads the pid that libvirt wrote for the VM `name`.
#[must_use]
pub fn pid_of(folder: &Path, name: &str) -> Option<u32> {
    if name.is_empty() || name.contains(['/', '\0']) {
        return None;
    }
    fs::read_to_string(folder.join(format!("{name}.pid"))).ok()?.trim().parse().ok()
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Field 22 of `/proc/PID/stat`; none if the process is gone. A zombie is not gone: a thread of it may still write.
pub fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    after_name(&stat)?.split_whitespace().nth(19)?.parse().ok()
}

/// What follows the name, which may itself contain spaces and brackets: state first (field 3).
fn after_name(stat: &str) -> Option<&str> {
    stat.rsplit_once(')').map(|(_, rest)| rest)
}

fn threads_stand(key: ProcessKey) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{}/task", key.pid)) else { return true };
    threads.flatten().all(|thread| {
        let Ok(stat) = fs::read_to_string(thread.path().join("stat")) else { return true };
        let state = after_name(&stat).and_then(|rest| rest.split_whitespace().next());
        matches!(state, Some("T" | "t" | "D" | "Z" | "X") | None)
    })
}

/// The VM that a command line names with `-uuid`, as libvirt writes it.
fn vm_named(cmdline: &[u8]) -> Option<&str> {
    let mut arguments = cmdline.split(|byte| *byte == 0);
    arguments.find(|argument| *argument == b"-uuid")?;
    std::str::from_utf8(arguments.next()?).ok()
}

/// The folder of the scope that libvirt made for a process, out of `/proc/PID/cgroup` and `/proc/self/mountinfo`.
fn scope_of(cgroup: &str, mountinfo: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut scope = PathBuf::new();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        if part == ".." {
            return None; // Outside our own cgroup namespace: not to be reached.
        }
        scope.push(part);
        if part.contains("machine-qemu") && part.ends_with(".scope") {
            return cgroup2_mount(mountinfo).map(|mount| mount.join(scope));
        }
    }
    None
}

fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        (root == "/" && system.starts_with("cgroup2 ")).then(|| PathBuf::from(at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                          41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";

    #[test]
    fn only_a_scope_of_libvirt_is_ever_frozen() {
        let unified = "/sys/fs/cgroup/unified";
        let table = [
            (
                "0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope",
                Some("machine.slice/machine-qemu\\x2d1\\x2dweb.scope"),
            ),
            (
                "4:memory:/x\n0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator\n",
                Some("machine.slice/machine-qemu\\x2d1\\x2dweb.scope"),
            ),
            ("0::/", None),
            ("0::/system.slice/libvirtd.service", None),
            ("0::/machine.slice/machine-lxc\\x2d1.scope", None),
            ("0::/../machine.slice/machine-qemu\\x2d1\\x2dweb.scope", None),
            ("1:name=systemd:/machine.slice/machine-qemu\\x2d1.scope", None),
            ("", None),
        ];
        for (cgroup, expected) in table {
            assert_eq!(scope_of(cgroup, MOUNTS), expected.map(|path| Path::new(unified).join(path)), "{cgroup}");
        }
        assert_eq!(scope_of("0::/machine-qemu.scope", "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw"), None);
    }

    #[test]
    fn a_command_line_names_its_vm() {
        let vm: VmId = "11111111-2222-3333-4444-555555555555".parse().unwrap();
        let line = |parts: &[&str]| parts.join("\0").into_bytes();
        let id = vm.to_string();
        assert_eq!(vm_named(&line(&["qemu", "-S", "-uuid", &id, "-m", "64"])), Some(id.as_str()));
        assert_eq!(vm_named(&line(&["qemu", "-uuid", "other", "-uuid", &id])), Some("other"));
        for other in [vec!["qemu", id.as_str()], vec!["qemu", "-uuid"], vec![]] {
            assert_eq!(vm_named(&line(&other)), None, "{other:?}");
        }
    }

    #[test]
    fn names_with_brackets_and_spaces_do_not_confuse() {
        assert_eq!(after_name("12 (a) b) (c) S 1 2"), Some(" S 1 2"));
        let me = std::process::id();
        assert!(started(me).is_some());
        assert!(Process::open(ProcessKey { pid: me, started: 1 }).unwrap().is_none(), "another process had this pid");
        assert_eq!(pid_of(Path::new("/proc"), "../etc/passwd"), None);
    }
}
