//! The lab as a whole: made by `up`, taken away by `down`, found again by its names in between.
//!
//! ```text
//! /var/lib/mainstay-lab/   lab.json (hosts, guests, whether `up` came to its end), hosts/NAME/ (overlay, console)
//! /run/mainstay-lab/       sockets of the storage daemon, and every mount of the lab; shared/: behind the datastore, in
//!                          memory, so that the disk of this machine sets no pace
//! <cgroup2>/mainstay-lab/  every process of the lab
//! namespace mainstay-lab   every interface of the lab
//! ```
//!
//! Whatever the lab makes lies below one of these names, so `down` finds it without being told, also after a crash in
//! the middle of `up`. `up` on a complete lab only starts what is missing; on a half-made one it begins anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::cgroup::Group;
use crate::guest::{Accelerator, Guest};
use crate::host::{Host, MOST, Power};
use crate::storage::Storage;
use crate::{command, guest, mounts, network, packages, power, product, root, space};

/// What outlives a restart of the machine.
pub const STATE: &str = "/var/lib/mainstay-lab";
/// What does not.
pub const RUN: &str = "/run/mainstay-lab";
const BOOT: Duration = Duration::from_secs(120);

/// A lab that is up, or on its way.
pub struct Lab {
    state: State,
    lock: Option<Flock<fs::File>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// False while `up` is at work.
    complete: bool,
    root: PathBuf,
    hosts: u8,
    /// Mainstay on them, unless they are bare.
    product: Option<product::Wish>,
    accelerator: Accelerator,
    guests: Vec<Guest>,
}

/// A running QEMU, seen from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Qemu {
    /// Whose it is.
    pub host: String,
    /// The VM's UUID, from QEMU's command line.
    pub uuid: uuid::Uuid,
    /// In the machine's own numbering.
    pub pid: i32,
}

/// What `up` is to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// How many hosts.
    pub hosts: u8,
    /// Mainstay on them; without it they have libvirt only.
    pub product: Option<product::Wish>,
}

impl Lab {
    /// Makes a lab, or completes the one that is there.
    pub fn up(wish: Wish) -> Result<Lab> {
        if wish.hosts == 0 || MOST < wish.hosts {
            bail!("a lab has 1 to {MOST} hosts");
        }
        space::for_lab()?;
        packages::for_lab()?;
        let lock = lock()?;
        let mut lab = match read_state()? {
            Some(state) if state.complete && is_standing() => {
                if wish.hosts < state.hosts || wish.product != state.product {
                    let kind = state.product.map_or("bare".to_owned(), |wish| format!("{wish:?}"));
                    bail!("another lab is up ({} hosts, {kind}): take it down first", state.hosts);
                }
                Lab { state, lock: Some(lock) }
            }
            _ => Lab::begin(wish.product.clone(), Some(lock))?,
        };
        lab.add_hosts(wish.hosts)?;
        Ok(lab)
    }

    /// Takes it down and makes it anew: so many hosts with fresh disks, no guests.
    pub fn renew(&mut self, hosts: u8) -> Result<()> {
        let product = self.state.product.clone();
        *self = Lab::begin(product, self.lock.take())?;
        self.add_hosts(hosts)
    }

    /// Switch and storage of a new lab, still without hosts.
    fn begin(product: Option<product::Wish>, lock: Option<Flock<fs::File>>) -> Result<Lab> {
        take_down()?;
        let root = root::ensure()?;
        let accelerator = Accelerator::Tcg;
        let state = State { complete: false, root, hosts: 0, product, accelerator, guests: Vec::new() };
        let lab = Lab { state, lock };
        lab.save()?;
        fs::create_dir_all(RUN).with_context(|| format!("making {RUN}"))?;
        network::up()?;
        start_storage()?;
        start_power()?;
        Ok(lab)
    }

    /// More hosts, which join the cluster.
    pub fn grow(&mut self, hosts: u8) -> Result<()> {
        self.add_hosts(hosts.max(self.state.hosts))
    }

    fn add_hosts(&mut self, hosts: u8) -> Result<()> {
        let old = self.state.hosts;
        let initrd = guest::initrd(&self.state.root)?;
        let wish = self.state.product.clone();
        let product = (wish.is_some() && old < hosts).then(product::build).transpose()?;
        self.state.hosts = hosts;
        self.state.complete = false;
        self.save()?;
        for host in &self.hosts()[usize::from(old)..] {
            self.lay_host(host)?;
            if let Some(product) = &product {
                product.install(host)?;
            }
        }
        let off: Vec<_> = self.hosts().into_iter().filter(|host| host.power().ok() == Some(Power::Off)).collect();
        for host in &off {
            self.start(host)?;
        }
        for host in &off {
            host.wait_up(BOOT)?;
        }
        if old == 0 {
            self.state.accelerator = guest::probe(&Host::new(1), &initrd)?;
        }
        if let (Some(product), Some(wish)) = (&product, &wish)
            && old < hosts
        {
            product.form_cluster(&self.hosts(), old, wish)?;
        }
        self.state.complete = true;
        self.save()
    }

    /// Lays the files of a host, also of one beyond the lab's own: a stranger that is not in the cluster.
    pub fn lay_host(&self, host: &Host) -> Result<()> {
        let all: Vec<_> = (1..=MOST).map(Host::new).collect();
        host.lay_files(&self.state.root, &guest::initrd(&self.state.root)?, &all)
    }

    /// Builds Mainstay anew and puts it on all hosts, as an upgrade of its package would, and into guests that boot from now on;
    /// names the hosts that changed.
    pub fn upgrade(&self) -> Result<Vec<Host>> {
        if self.state.product.is_none() {
            bail!("this lab is bare: there is no Mainstay to upgrade");
        }
        let (product, initrd) = (product::build()?, guest::initrd(&self.state.root)?);
        let mut changed = Vec::new();
        for host in self.hosts() {
            host.lay_initrd(&initrd)?;
            if product.upgrade(&host)? {
                changed.push(host);
            }
        }
        Ok(changed)
    }

    /// The lab that is up; nobody else changes it meanwhile.
    pub fn open() -> Result<Lab> {
        let lock = lock()?;
        Ok(Lab { lock: Some(lock), ..Lab::look()? })
    }

    /// The lab that is up, for looking at it or for work in one host.
    pub fn look() -> Result<Lab> {
        match read_state()? {
            Some(state) if is_standing() => Ok(Lab { state, lock: None }),
            _ => bail!("no lab is up: `cargo lab up` makes one"),
        }
    }

    /// Takes everything away that a lab has made. Nothing to do is no error.
    pub fn down() -> Result<()> {
        let _lock = lock()?;
        take_down()
    }

    /// All hosts, on or off.
    pub fn hosts(&self) -> Vec<Host> {
        (1..=self.state.hosts).map(Host::new).collect()
    }

    /// The host with that name.
    pub fn host(&self, name: &str) -> Result<Host> {
        let found = self.hosts().into_iter().find(|host| host.name() == name);
        found.with_context(|| {
            let names: Vec<_> = self.hosts().iter().map(Host::name).collect();
            format!("there is no host {name}; hosts are {}", names.join(", "))
        })
    }

    /// Guests that were added, in that order.
    pub fn guests(&self) -> &[Guest] {
        &self.state.guests
    }

    /// How guests run here.
    pub fn accelerator(&self) -> Accelerator {
        self.state.accelerator
    }

    /// Whether `up` came to its end.
    pub fn is_complete(&self) -> bool {
        self.state.complete
    }

    /// The file system that all hosts share.
    pub fn root(&self) -> &Path {
        &self.state.root
    }

    /// The storage daemon.
    pub fn storage(&self) -> Result<Storage> {
        Storage::connect(Path::new(RUN))
    }

    /// The folder behind the datastore, for judges: no fault reaches it.
    pub fn store(&self) -> PathBuf {
        Path::new(RUN).join("shared")
    }

    /// Switches a host on; returns long before it is up.
    pub fn start(&self, host: &Host) -> Result<()> {
        let storage = self.storage()?;
        let shared = storage.mount(&host.name())?;
        storage.alive(&host.name())?;
        host.start(&shared)
    }

    /// Power loss: first its storage is cut, so that nothing of it lands any more, then everything in it dies at once.
    pub fn kill(&self, host: &Host) -> Result<()> {
        if host.power()? == Power::Off {
            bail!("{} is off", host.name());
        }
        self.storage()?.dead(&host.name())?;
        host.kill()
    }

    /// Makes a guest and starts it on a host.
    pub fn add_guest(&mut self, name: &str, host: &Host) -> Result<Guest> {
        let guest = Guest::new(name)?;
        if !self.state.guests.contains(&guest) {
            self.state.guests.push(guest.clone());
            self.save()?;
        }
        guest.make_disk(&self.store())?;
        guest.define(host, self.state.accelerator)?;
        guest.start(host)?;
        Ok(guest)
    }

    /// Every QEMU of every host, found from outside: a host's own word is not asked for.
    pub fn qemu_processes(&self) -> Result<Vec<Qemu>> {
        let mut found = Vec::new();
        for host in self.hosts() {
            for pid in host.group()?.pids() {
                if let Some(uuid) = qemu_uuid(pid) {
                    found.push(Qemu { host: host.name(), uuid, pid: pid.as_raw() });
                }
            }
        }
        Ok(found)
    }

    fn save(&self) -> Result<()> {
        let path = Path::new(STATE).join("lab.json");
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_vec_pretty(&self.state)?)?;
        fs::rename(&part, &path).with_context(|| format!("writing {}", path.display()))
    }
}

/// Waits until a condition gives something. An error of it counts as "not yet" and is shown if the time is up.
pub fn wait<T>(patience: Duration, what: &str, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    const PAUSE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + patience;
    loop {
        let last = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(err) => Some(err),
        };
        if deadline < Instant::now() {
            let seconds = patience.as_secs_f64();
            return match last {
                Some(err) => Err(err.context(format!("waited {seconds} s in vain for {what}"))),
                None => bail!("waited {seconds} s in vain for {what}"),
            };
        }
        std::thread::sleep(PAUSE);
    }
}

/// The UUID on the command line of a QEMU; of any other process, nothing.
fn qemu_uuid(pid: Pid) -> Option<uuid::Uuid> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|b| *b == 0).map(String::from_utf8_lossy);
    if !words.next()?.rsplit('/').next()?.starts_with("qemu-system-") {
        return None;
    }
    words.find(|word| word == "-uuid")?;
    words.next()?.parse().ok()
}

/// One command at a time changes the lab.
fn lock() -> Result<Flock<fs::File>> {
    fs::create_dir_all(STATE).with_context(|| format!("making {STATE}"))?;
    let file = fs::File::create(Path::new(STATE).join("lock"))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context("locking the lab")
}

fn read_state() -> Result<Option<State>> {
    let path = Path::new(STATE).join("lab.json");
    match fs::read(&path) {
        // A state that cannot be read is of another version, or half a state: the same as a lab half made.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err).with_context(|| format!("reading {}", path.display())),
    }
}

/// Whether switch and storage are there: not so after a restart of the machine.
fn is_standing() -> bool {
    network::is_up() && Storage::connect(Path::new(RUN)).is_ok()
}

fn start_storage() -> Result<()> {
    let (run, store) = (Path::new(RUN), Path::new(RUN).join("shared"));
    mounts::memory(&store)?;
    let group = Group::lab()?.child("storage");
    group.create()?;
    let mut daemon = command::detached_in(&group);
    daemon.arg(std::env::current_exe()?).arg("storage-daemon").arg(&store).arg(run);
    let log = run.join("storage.log");
    command::start_detached(&mut daemon, &log)?;
    wait(Duration::from_secs(10), "the storage daemon", || {
        let ready = Storage::connect(run).is_ok();
        if !ready && !group.is_populated() {
            bail!("it ended: {}", fs::read_to_string(&log).unwrap_or_default().trim());
        }
        Ok(ready.then_some(()))
    })
}

fn start_power() -> Result<()> {
    let group = Group::lab()?.child("power");
    group.create()?;
    let mut daemon = command::detached_in(&group);
    daemon.arg(std::env::current_exe()?).arg("power-daemon").arg(RUN);
    let log = Path::new(RUN).join("power.log");
    command::start_detached(&mut daemon, &log)?;
    wait(Duration::from_secs(10), "the power switch", || {
        let ready = power::set(power::Behaviour::Works).is_ok();
        if !ready && !group.is_populated() {
            bail!("it ended: {}", fs::read_to_string(&log).unwrap_or_default().trim());
        }
        Ok(ready.then_some(()))
    })
}

/// Takes away what the names above lead to. Goes on after a failure, so that as little as possible is left.
fn take_down() -> Result<()> {
    let mut failures = Vec::new();
    let mut note = |done: Result<()>| failures.extend(done.err().map(|err| format!("{err:#}")));
    let group = Group::lab()?;
    if let Ok(storage) = Storage::connect(Path::new(RUN)) {
        // What waits for a hung storage cannot die.
        for host in (1..=MOST).map(Host::new).filter(|host| host.power().is_ok_and(|power| power != Power::Off)) {
            let _ = storage.dead(&host.name());
        }
    }
    for host in (1..=MOST).map(Host::new) {
        // Whatever is still stuck ends with the storage daemon.
        let _ = host.group()?.kill(Duration::from_secs(3));
    }
    note(group.kill(Duration::from_secs(20)));
    for point in mounts::below(Path::new(RUN)) {
        note(mounts::detach(&point));
    }
    note(network::down());
    note(group.remove());
    for shadow in Group::shadows()? {
        note(shadow.remove());
    }
    note(remove_nspawn_files());
    for folder in [Path::new(RUN).to_owned(), Path::new(STATE).join("hosts")] {
        // Never through a mount that is still there.
        if mounts::below(&folder).is_empty() && folder.exists() {
            note(fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display())));
        }
    }
    if failures.is_empty() {
        let _ = fs::remove_file(Path::new(STATE).join("lab.json"));
        return Ok(());
    }
    bail!("the lab could not be taken down wholly:\n{}", failures.join("\n"))
}

/// systemd-nspawn leaves folders and locks behind when it is killed.
fn remove_nspawn_files() -> Result<()> {
    for folder in ["propagate", "unix-export", "locks"].map(|name| Path::new("/run/systemd/nspawn").join(name)) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if !entry.file_name().to_string_lossy().contains("mainstay-lab-h") {
                continue;
            }
            for point in mounts::below(&entry.path()) {
                mounts::detach(&point)?;
            }
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
    Ok(())
}
