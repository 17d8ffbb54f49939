//! libvirt: carries out orders, and tells what happens to domains.
//!
//! ```text
//!   agent ── ask ──► control (4 + 4) ┐                          ┌─ lifecycle, reboot, watchdog, I/O error
//!                    pause   (3)     ├─ sessions ─► libvirtd ───┤
//!                    long    (2)     │              ▲           ▼
//!                    look    (2 + 1) │              │
//!                    help    (2)     ┘              │
//!         ◄─ events ── watcher ── connection for events, closed ones opened anew
//! ```
//!
//! libvirt's calls block and cannot be cancelled. So every order runs on a worker thread with a connection of its own,
//! and is answered once, at its deadline at the latest. A pause of a VM on hung storage hangs with it, a migration
//! takes long, a look at a guest or a word to it hangs with its QEMU: each has a lane of its own, so they never delay starts. All
//! lanes together can keep 18 of libvirtd's 20 workers busy. Events are hints; after every (re)connection a full list follows them, and the list is the truth.
//!
//! Not here: what to do about anything; the guard's side (pidfds, scopes); statistics.

mod demands;
mod events;
mod failure;
mod help;
mod lane;
mod look;
mod means;
mod needs;
mod session;
mod state;
mod values;
mod watch;
pub mod xml;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use crate::types::VmId;
use crate::types::vm::{DomainAnswer, DomainChange, DomainFailure, DomainInfo, DomainOrder, HostCapacity, PagesLeft};
use help::Help;
pub use help::{DumpFormat, Port};
use lane::{Lane, Shape, Work};
use look::Look;
pub use look::{Part, Stands, What, sample, stands};
pub use means::Models;
use session::{Places, carry_out};
pub use watch::text_of;
use watch::{Heard, Watcher};

/// Define, start, resume, end, list and the like: four VMs start at once, four hung calls are made up for.
const CONTROL: Shape = Shape { name: "control", workers: 4, spare: 4, patient: false };
/// Pauses: hung ones hold up other pauses, nothing else. What becomes of one that was begun must be known: it would have to
/// be lifted.
const PAUSE: Shape = Shape { name: "pause", workers: 3, spare: 0, patient: true };
/// Migrations.
const LONG: Shape = Shape { name: "long", workers: 2, spare: 0, patient: false };
/// Looks at failed guests: one whose QEMU hangs holds up other looks only, and those go without it at their deadlines.
const LOOK: Shape = Shape { name: "look", workers: 2, spare: 1, patient: false };
/// What is done for guests beside the core's orders.
const HELP: Shape = Shape { name: "help", workers: 2, spare: 0, patient: false };
/// Parts of one look; more never come.
const PARTS: usize = 16;
/// Where libvirt's QEMU driver writes pid files.
const PIDS: &str = "/run/libvirt/qemu";
/// Where the kernel counts large pages.
const PAGES: &str = "/sys/kernel/mm/hugepages";

/// What the watcher tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LibvirtEvent {
    /// Connected, events come. `Listed` follows.
    Up,
    /// Not connected, and why. Told once per reason; attempts go on.
    Down(String),
    /// Something happened to a domain.
    Changed { vm: VmId, name: String, change: DomainChange },
    /// All domains: after each `Up`, when asked for by `relist`, and when events were lost. Never older than a
    /// `Changed` told before.
    Listed(Vec<DomainInfo>),
}

/// A handle, cheap to clone. When the last one is dropped the connections are closed and the threads end (those in a
/// hung call when it returns).
#[derive(Clone)]
pub struct Libvirt {
    inner: Arc<Inner>,
}

struct Inner {
    control: Arc<Lane>,
    pause: Lane,
    long: Lane,
    look: Lane<Look>,
    help: Lane<Help>,
    watcher: SyncSender<Heard>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // If it does not fit the watcher is drowned in events; it ends with the process.
        let _ = self.watcher.try_send(Heard::Stop);
    }
}

impl Libvirt {
    /// Starts the driver for `uri`. `event` is called on the watcher's thread and should not block.
    ///
    /// # Panics
    /// When the process cannot have threads, or libvirt's event loop cannot be set up: nothing works without.
    pub fn spawn(uri: &str, event: impl Fn(LibvirtEvent) + Send + Sync + 'static) -> Self {
        Self::spawn_with(uri, PIDS.into(), event)
    }

    /// The same, with another folder of pid files.
    ///
    /// # Panics
    /// As `spawn`.
    pub fn spawn_with(uri: &str, pids: PathBuf, event: impl Fn(LibvirtEvent) + Send + Sync + 'static) -> Self {
        events::start_loop().expect("libvirt's event loop starts before any connection");
        let places = Places { uri: uri.to_owned(), pids };
        let lane = |shape: Shape| {
            let places = places.clone();
            Lane::new(shape, move || worker(places.clone())).expect("threads can be started at this time")
        };
        let control = Arc::new(lane(CONTROL));
        let to = uri.to_owned();
        let looking = Lane::new(LOOK, move || looker(to.clone())).expect("threads can be started at this time");
        let to = uri.to_owned();
        let help = Lane::new(HELP, move || helper(to.clone())).expect("threads can be started at this time");
        let (watching, watcher) = Watcher::new(uri.to_owned(), Arc::clone(&control), event);
        std::thread::Builder::new()
            .name("virt-watch".into())
            .spawn(move || watching.run())
            .expect("threads can be started at this time");
        let (pause, long) = (lane(PAUSE), lane(LONG));
        Self { inner: Arc::new(Inner { control, pause, long, look: looking, help, watcher }) }
    }

    /// Has everything told again by `Listed`. While libvirt is down this is not needed: `Up` brings a list.
    pub fn relist(&self) {
        // If it does not fit, events are being lost, and that brings a list as well.
        let _ = self.inner.watcher.try_send(Heard::Relist);
    }

    /// Gives an order. `answer` is called exactly once, on another thread (or here, when too many wait), and should
    /// not block. At the deadline it is `Timeout`: an order that was begun may still take effect then, one that was
    /// not begun never will. A migration is cancelled at its deadline; a pause that was begun is answered when it ends.
    pub fn ask(&self, order: DomainOrder, within: Duration, answer: impl FnOnce(DomainAnswer) + Send + 'static) {
        let lane = match &order {
            DomainOrder::Suspend { .. } => &self.inner.pause,
            DomainOrder::Migrate { .. } => &self.inner.long,
            DomainOrder::List
            | DomainOrder::Define { .. }
            | DomainOrder::Undefine { .. }
            | DomainOrder::StartPaused { .. }
            | DomainOrder::RestorePaused { .. }
            | DomainOrder::Mark { .. }
            | DomainOrder::SetOnDoubt { .. }
            | DomainOrder::Resume { .. }
            | DomainOrder::Shutdown { .. }
            | DomainOrder::Destroy { .. }
            | DomainOrder::Reset { .. }
            | DomainOrder::AbortJob { .. } => &self.inner.control,
        };
        lane.ask(order, within, Box::new(answer));
    }

    /// Asks a guest to reboot, by its power button or by QEMU's own agent inside; `answer` as with `ask`. Done means that it was
    /// asked.
    pub fn reboot(&self, vm: VmId, within: Duration, answer: impl FnOnce(DomainAnswer) + Send + 'static) {
        self.inner.help.ask(Help::Reboot { vm }, within, Box::new(answer));
    }

    /// Gives a VM of this host the port of Mainstay's agent; `told` is called exactly once, as with `ask`. On success everything is
    /// told again by `Listed`: no event says so.
    ///
    /// An error may have changed the definition.
    pub fn add_port(
        &self,
        vm: VmId,
        within: Duration,
        told: impl FnOnce(Result<Port, DomainFailure>) + Send + 'static,
    ) {
        let (tell, port) = sync_channel(1);
        let this = self.clone();
        let told = move |answer| match (answer, port.try_recv()) {
            (DomainAnswer::Failed(why), _) => told(Err(why)),
            (DomainAnswer::Done | DomainAnswer::Listed(_), Ok(port)) => {
                this.relist();
                told(Ok(port));
            }
            (DomainAnswer::Done | DomainAnswer::Listed(_), Err(_)) => told(Err(DomainFailure::Timeout)),
        };
        self.inner.help.ask(Help::AddPort { vm, told: tell }, within, Box::new(told));
    }

    /// Writes a running domain's memory to this path, if it has no more bytes than that. One answer comes, at the deadline at the
    /// latest; libvirt goes on then, until nobody reads what it writes.
    #[must_use]
    pub fn dump(
        &self,
        vm: VmId,
        to: PathBuf,
        format: DumpFormat,
        most: u64,
        within: Duration,
    ) -> Receiver<Result<(), String>> {
        let (tell, told) = sync_channel(1);
        let answer = move |answer| {
            let _ = tell.send(match answer {
                DomainAnswer::Done | DomainAnswer::Listed(_) => Ok(()),
                DomainAnswer::Failed(why) => Err(text_of(&why)),
            });
        };
        self.inner.help.ask(Help::Dump { vm, to, format, most }, within, Box::new(answer));
        told
    }

    /// Which networks are active, with the bridge of each that has one; none if libvirt does not say so in time.
    #[must_use]
    pub fn networks(&self, within: Duration) -> Option<BTreeMap<String, String>> {
        let (told, seen) = sync_channel(1);
        self.inner.help.ask(Help::Networks { told }, within, Box::new(|_| {}));
        seen.recv_timeout(within).ok()
    }

    /// What CPUs and machines guests can have, likewise.
    #[must_use]
    pub fn models(&self, within: Duration) -> Option<Models> {
        let (told, seen) = sync_channel(1);
        self.inner.help.ask(Help::Models { told }, within, Box::new(|_| {}));
        seen.recv_timeout(within).ok()
    }

    /// Looks at a running domain. Parts come as they are seen, each once. The channel closes when nothing more will come; while a
    /// call hangs it stays open, so listen with a deadline. A look that was not begun `within` this time never is.
    #[must_use]
    pub fn look(&self, vm: VmId, what: What, within: Duration) -> Receiver<Part> {
        let (parts, seen) = sync_channel(PARTS);
        self.inner.look.ask(Look { vm, what, parts }, within, Box::new(|_| {}));
        seen
    }

    /// Statistics of what a running domain does; `told` is called exactly once, as with `ask`. None: libvirt did not give them in
    /// time.
    pub fn activity(
        &self,
        vm: VmId,
        within: Duration,
        told: impl FnOnce(Option<Vec<(String, String)>>) + Send + 'static,
    ) {
        let (parts, seen) = sync_channel(1);
        let told = move |_| {
            told(match seen.try_recv() {
                Ok(Part::Statistics(Ok(all))) => Some(all),
                Ok(_) | Err(_) => None,
            });
        };
        self.inner.look.ask(Look { vm, what: What::Activity, parts }, within, Box::new(told));
    }
}

fn worker(places: Places) -> Work {
    let mut session = None;
    Box::new(move |order, within| carry_out(&places, &mut session, order, within))
}

fn looker(uri: String) -> Work<Look> {
    let mut session = None;
    Box::new(move |order, within| look::look(&uri, &mut session, order, within))
}

fn helper(uri: String) -> Work<Help> {
    let mut session = None;
    Box::new(move |order, within| help::help(&uri, &mut session, order, within))
}

/// Memory and CPUs of this host, whose QEMUs are these. What cannot be read is zero: nothing is placed on a host that does not know
/// itself.
#[must_use]
pub fn capacity(qemus: impl IntoIterator<Item = u32>) -> HostCapacity {
    let resident = |pid| kib(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default(), "VmRSS:");
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN).ok().flatten().unwrap_or(0);
    HostCapacity {
        free_kib: kib(&memory, "MemAvailable:"),
        total_kib: kib(&memory, "MemTotal:"),
        cpus: u32::try_from(cpus).unwrap_or(0),
        resident_kib: qemus.into_iter().map(resident).sum(),
        pages_2m: pages(Path::new(PAGES), 2048),
        pages_1g: pages(Path::new(PAGES), 1 << 20),
        usual_1g: kib(&memory, "Hugepagesize:") == 1 << 20,
    }
}

/// Large pages of one size: those that are promised to somebody already are not free.
fn pages(folder: &Path, size_kib: u64) -> PagesLeft {
    let folder = folder.join(format!("hugepages-{size_kib}kB"));
    let count = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    let free = count("free_hugepages").saturating_sub(count("resv_hugepages"));
    PagesLeft { free_kib: free * size_kib, total_kib: count("nr_hugepages") * size_kib }
}

fn kib(memory: &str, key: &str) -> u64 {
    let line = memory.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_is_known() {
        let capacity = capacity([std::process::id()]);
        assert!(0 < capacity.resident_kib, "{capacity:?}");
        assert!(0 < capacity.cpus && 0 < capacity.free_kib && capacity.free_kib <= capacity.total_kib, "{capacity:?}");
        let table = [("MemTotal:       2048 kB\n", 2048), ("MemTotal:", 0), ("", 0), ("MemTotal: x kB", 0)];
        for (text, expected) in table {
            assert_eq!(kib(text, "MemTotal:"), expected, "{text}");
        }
    }

    #[test]
    fn pages_that_are_promised_are_not_free() {
        let folder = tempfile::tempdir().unwrap();
        let of = folder.path().join("hugepages-2048kB");
        std::fs::create_dir(&of).unwrap();
        for (name, count) in [("nr_hugepages", 10), ("free_hugepages", 6), ("resv_hugepages", 2)] {
            std::fs::write(of.join(name), format!("{count}\n")).unwrap();
        }
        assert_eq!(pages(folder.path(), 2048), PagesLeft { free_kib: 8192, total_kib: 20480 });
        assert_eq!(pages(folder.path(), 1 << 20), PagesLeft::default());
    }
}
