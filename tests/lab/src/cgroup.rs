//! One group of the v2 hierarchy per host (and one for the storage daemon): what is in it can be frozen or killed with
//! one write, QEMU processes in scopes deep below included.
//!
//! ```text
//! <cgroup2>/mainstay-lab/
//!   storage/                 the storage daemon
//!   h1/                      frozen by cgroup.freeze, killed by cgroup.kill
//!     supervisor/            systemd-nspawn
//!     payload/               the container: init.scope, system.slice, machine.slice/…
//!     exec/                  commands that the lab runs in the host
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

/// A group, whether it exists or not.
#[derive(Clone, Debug)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// The group of the whole lab.
    pub fn lab() -> Result<Group> {
        Group::in_hierarchies("cgroup2")?.pop().context("no cgroup v2 hierarchy is mounted")
    }

    /// Groups of the lab's name in the v1 hierarchies: systemd-nspawn makes some where the machine mixes both.
    pub fn shadows() -> Result<Vec<Group>> {
        Group::in_hierarchies("cgroup")
    }

    fn in_hierarchies(kind: &str) -> Result<Vec<Group>> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let points = mounts.lines().filter_map(|line| {
            let (fields, rest) = line.split_once(" - ")?;
            (rest.split(' ').next() == Some(kind)).then(|| fields.split(' ').nth(4))?
        });
        Ok(points.map(|point| Group { path: Path::new(point).join("mainstay-lab") }).collect())
    }

    /// A group below this one.
    pub fn child(&self, name: &str) -> Group {
        Group { path: self.path.join(name) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, and those above it.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.path).with_context(|| format!("making cgroup {}", self.path.display()))
    }

    /// Gives the groups below it, and below those above it, a controller: libvirt makes no scopes where it sees none.
    /// The kernel refuses while a process is directly in the group.
    pub fn pass_controller(&self) -> Result<()> {
        let chain: Vec<_> = self.path.ancestors().take_while(|path| path.join("cgroup.procs").exists()).collect();
        for group in chain.into_iter().rev() {
            let control = group.join("cgroup.subtree_control");
            fs::write(&control, "+hugetlb").with_context(|| format!("writing {}", control.display()))?;
        }
        Ok(())
    }

    /// Whether any process is in it or below it.
    pub fn is_populated(&self) -> bool {
        let events = fs::read_to_string(self.path.join("cgroup.events")).unwrap_or_default();
        events.lines().any(|line| line == "populated 1")
    }

    /// Whether everything in it stands still.
    pub fn is_frozen(&self) -> bool {
        let events = fs::read_to_string(self.path.join("cgroup.events")).unwrap_or_default();
        events.lines().any(|line| line == "frozen 1")
    }

    /// All processes in it and below it.
    pub fn pids(&self) -> Vec<Pid> {
        let mut pids = Vec::new();
        let mut groups = vec![self.path.clone()];
        while let Some(group) = groups.pop() {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            groups.extend(children(&group));
        }
        pids
    }

    /// Kills everything in it at once; waits until it is empty.
    pub fn kill(&self, patience: Duration) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        fs::write(self.path.join("cgroup.kill"), "1").with_context(|| format!("killing {}", self.path.display()))?;
        let deadline = Instant::now() + patience;
        while self.is_populated() {
            if deadline < Instant::now() {
                bail!("processes {:?} in {} do not die", self.pids(), self.path.display());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Holds everything in it; returns when it stands still.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen("1", "freezing")?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.is_frozen() {
            if deadline < Instant::now() {
                bail!("{} does not freeze within 5 s", self.path.display());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets everything in it go on.
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen("0", "thawing")
    }

    fn set_frozen(&self, value: &str, act: &str) -> Result<()> {
        fs::write(self.path.join("cgroup.freeze"), value).with_context(|| format!("{act} {}", self.path.display()))
    }

    /// Removes it with all groups below. It must be empty; a group just emptied may need a moment.
    pub fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                Err(err) if deadline < Instant::now() => {
                    return Err(err).with_context(|| format!("removing cgroup {}", self.path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

fn children(group: &Path) -> Vec<PathBuf> {
    let Ok(list) = fs::read_dir(group) else { return Vec::new() };
    list.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn remove_tree(group: &Path) -> std::io::Result<()> {
    for child in children(group) {
        remove_tree(&child)?;
    }
    fs::remove_dir(group)
}
