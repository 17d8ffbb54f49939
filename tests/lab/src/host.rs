//! A host: a container with its own systemd, libvirtd and QEMU guests.
//!
//! ```text
//!            start                              kill = storage marks it dead, then cgroup.kill
//!   off ───────────────► booting ──► up ──────────────────────────────────────────────────────► off
//!                                    │ ▲
//!                             freeze │ │ thaw      cgroup.freeze: all its processes, QEMU too, stand still
//!                                    ▼ │
//!                                  frozen
//! ```
//!
//! Its files: an overlay over the cached root; the upper folder lives from `up` to `down`, so that a killed host comes
//! back with what it had on its disk. Each boot has a boot id of its own (systemd-nspawn sees to it), the machine id
//! stays. Its datastore is bound to /srv/shared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;

use crate::cgroup::Group;
use crate::lab::{RUN, STATE, wait};
use crate::{command, guest, mounts, network, root};

/// Most hosts of one lab.
pub const MOST: u8 = 32;

/// One host, named by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Host {
    number: u8,
}

/// What a host is doing, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// No process of it.
    Off,
    /// It has processes.
    On,
    /// All its processes stand still.
    Frozen,
}

impl Host {
    /// The host with a number from 1 to `MOST`.
    pub fn new(number: u8) -> Host {
        assert!((1..=MOST).contains(&number), "hosts are numbered from 1 to {MOST}");
        Host { number }
    }

    /// `h1`, `h2`, …
    pub fn name(&self) -> String {
        format!("h{}", self.number)
    }

    /// Its address on the switch.
    pub fn address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }

    /// The hardware address of its eth0.
    pub fn mac(&self) -> String {
        format!("52:54:00:4d:53:{:02x}", self.number)
    }

    /// All its processes.
    pub fn group(&self) -> Result<Group> {
        Ok(Group::lab()?.child(&self.name()))
    }

    /// Its root as seen from outside, mounted from `up` to `down`.
    pub fn root(&self) -> PathBuf {
        Path::new(RUN).join("hosts").join(self.name()).join("root")
    }

    /// Where its console goes.
    pub fn console(&self) -> PathBuf {
        self.state().join("console.log")
    }

    fn state(&self) -> PathBuf {
        Path::new(STATE).join("hosts").join(self.name())
    }

    /// Off, on or frozen.
    pub fn power(&self) -> Result<Power> {
        let group = self.group()?;
        Ok(match (group.is_populated(), group.is_frozen()) {
            (false, _) => Power::Off,
            (true, false) => Power::On,
            (true, true) => Power::Frozen,
        })
    }

    /// Lays its files: overlay, names, addresses, device nodes, what guests boot. Done once per lab.
    pub fn lay_files(&self, lower: &Path, initrd: &Path, others: &[Host]) -> Result<()> {
        let state = self.state();
        if !mounts::is_mounted(&self.root()) {
            mounts::overlay(lower, &state, &self.root())?;
        }
        let files = self.root();
        let id = uuid::Uuid::new_v4().simple().to_string();
        root::put(&files, "etc/machine-id", 0o444, &format!("{id}\n"))?;
        root::put(&files, "etc/hostname", 0o644, &format!("{}\n", self.name()))?;
        root::put(&files, "etc/mainstay-lab-address", 0o644, &format!("{}/24\n", self.address()))?;
        let names = others.iter().map(|host| format!("{} {}\n", host.address(), host.name())).collect::<String>();
        root::put(&files, "etc/hosts", 0o644, &format!("127.0.0.1 localhost\n{names}"))?;
        fs::create_dir_all(files.join("srv/shared"))?;
        fs::create_dir_all(files.join(guest::CONSOLES))?;
        fs::create_dir_all(files.join("var/log/journal"))?; // What was logged before a power loss is still wanted.
        self.lay_initrd(initrd)?;
        fs::copy(std::env::current_exe()?, files.join("usr/lib/mainstay-lab/lab")).context("copying the lab")?;
        let expire = "#!/bin/sh\nexec /usr/lib/mainstay-lab/lab expire-from-inside \"$@\"\n";
        root::put(&files, "usr/local/sbin/lab-expire", 0o755, expire)?;
        let fence = "#!/bin/sh\nexec /usr/lib/mainstay-lab/lab fence-from-inside\n";
        root::put(&files, "usr/local/sbin/fence_lab", 0o755, fence)?;
        make_nodes(&state.join("dev"))
    }

    /// Lays what guests boot from now on.
    pub fn lay_initrd(&self, initrd: &Path) -> Result<()> {
        let to = self.root().join(root::GUEST_FILES).join("initrd");
        fs::copy(initrd, to).map(drop).context("copying the guests' initramfs")
    }

    /// Switches it on; returns when its init runs and its cable is in, long before it is up (`wait_up`).
    pub fn start(&self, shared: &Path) -> Result<()> {
        if self.power()? != Power::Off {
            bail!("{} is already on", self.name());
        }
        let group = self.group()?;
        group.remove()?;
        group.create()?;
        self.launch(&group, shared)?;
        let init = wait(Duration::from_secs(20), &format!("the init of {}", self.name()), || {
            if group.is_populated() { self.init() } else { bail!("its launcher ended: {}", self.last_words()) }
        })?;
        // As soon as nspawn has moved itself and the container into groups of their own.
        wait(Duration::from_secs(10), "room for controllers", || group.pass_controller().map(Some))?;
        group.child("exec").create()?;
        network::plug(self, init)
    }

    fn launch(&self, group: &Group, shared: &Path) -> Result<()> {
        let dev = self.state().join("dev");
        let mut nspawn = command::detached_in(group);
        nspawn.args(["systemd-nspawn", "--quiet", "--boot", "--settings=no", "--register=no", "--keep-unit"]);
        nspawn.args(["--private-network", "--capability=all", "--link-journal=no", "--resolv-conf=off"]);
        nspawn.args(["--timezone=off", "--console=read-only"]);
        nspawn.arg(format!("--machine=mainstay-lab-{}", self.name()));
        nspawn.arg(format!("--hostname={}", self.name()));
        nspawn.arg(format!("--directory={}", self.root().display()));
        for (name, ..) in NODES {
            let node = dev.join(name);
            if node.exists() {
                nspawn.arg(format!("--bind={}:/dev/{name}", node.display()));
            }
        }
        nspawn.arg(format!("--bind={}:/srv/shared", shared.display()));
        let expire = Path::new(RUN).join("expire.sock");
        if expire.exists() {
            nspawn.arg(format!("--bind={}:{}", expire.display(), crate::EXPIRE_INSIDE));
        }
        let power = Path::new(RUN).join(crate::power::SOCKET);
        if power.exists() {
            nspawn.arg(format!("--bind={}:{}", power.display(), crate::power::SOCKET_INSIDE));
        }
        nspawn.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        nspawn.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1").env("SYSTEMD_NSPAWN_LOCK", "0");
        command::start_detached(&mut nspawn, &self.console())
    }

    /// The container's process 1, if it runs.
    pub fn init(&self) -> Result<Option<Pid>> {
        for pid in self.group()?.pids() {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let inside = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            if inside.is_some_and(|ids| ids.split_whitespace().skip(1).eq(["1"])) {
                return Ok(Some(pid));
            }
        }
        Ok(None)
    }

    /// Waits until libvirt answers in it.
    pub fn wait_up(&self, patience: Duration) -> Result<()> {
        let what = format!("{}'s libvirt", self.name());
        wait(patience, &what, || {
            if self.power()? == Power::Off {
                bail!("it went off: {}", self.last_words());
            }
            if !self.root_inside()?.join("run/libvirt/libvirt-sock-ro").exists() {
                return Ok(None);
            }
            let output = self.exec(&["virsh", "-q", "list", "--name"])?;
            Ok(output.status.success().then_some(()))
        })?;
        // systemd goes on without one of the units of a ring: which one changes from boot to boot, and so goes unnoticed.
        let said = fs::read(self.console()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        match said.lines().find(|line| line.contains("ordering cycle")) {
            Some(line) => bail!("the units of {} wait for each other: {line}", self.name()),
            None => Ok(()),
        }
    }

    /// Its root as its own processes see it, with what is mounted inside.
    pub fn root_inside(&self) -> Result<PathBuf> {
        let init = self.init()?.with_context(|| format!("{} is off", self.name()))?;
        Ok(Path::new("/proc").join(init.to_string()).join("root"))
    }

    /// Power loss: every process of it is gone at once. The storage must have marked it dead before.
    pub fn kill(&self) -> Result<()> {
        self.group()?.kill(Duration::from_secs(20))
    }

    /// Holds all its processes.
    pub fn freeze(&self) -> Result<()> {
        self.must_be_on()?;
        self.group()?.freeze()
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<()> {
        self.must_be_on()?;
        self.group()?.thaw()
    }

    /// Runs a command in it as root, to its end.
    pub fn exec<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Output> {
        command::output(self.inside()?.args(args))
    }

    /// Like `exec`; a command that fails is an error that quotes it.
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<String> {
        command::check(self.inside()?.args(args)).with_context(|| format!("on {}", self.name()))
    }

    /// A command to which program and arguments that run in the host are still to be added.
    pub fn inside(&self) -> Result<Command> {
        let init = self.init()?.with_context(|| format!("{} is off", self.name()))?;
        let mut command = command::in_group(&self.group()?.child("exec"));
        command.args(["nsenter", "--target", &init.to_string()]);
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "--"]);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", "/root").env("USER", "root").env("LANG", "C.UTF-8");
        command.env("TERM", std::env::var("TERM").unwrap_or_else(|_| "dumb".into()));
        Ok(command)
    }

    fn must_be_on(&self) -> Result<()> {
        if self.power()? == Power::Off {
            bail!("{} is off", self.name());
        }
        Ok(())
    }

    /// The end of its console, for error texts.
    fn last_words(&self) -> String {
        const LINES: usize = 5;
        let text = fs::read_to_string(self.console()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join(" / ")
    }
}

/// Device nodes of a host: name, major, minor. Copies, since the container changes owners and modes.
const NODES: &[(&str, u64, u64)] = &[("kvm", 10, 232), ("net/tun", 10, 200), ("fuse", 10, 229)];

fn make_nodes(folder: &Path) -> Result<()> {
    for (name, major, minor) in NODES {
        let node = folder.join(name);
        if !Path::new("/dev").join(name).exists() || node.exists() {
            continue;
        }
        fs::create_dir_all(node.parent().unwrap_or(folder))?;
        mknod(&node, SFlag::S_IFCHR, Mode::from_bits_truncate(0o660), makedev(*major, *minor))
            .with_context(|| format!("making {}", node.display()))?;
    }
    Ok(())
}
