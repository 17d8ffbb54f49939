//! The judges: they watch the lab from outside and say what went wrong, without asking the product.
//!
//! ```text
//!  /proc of the machine ──► presence   which copy of which VM executes when      ┐
//!                           (20 ms)    two at once, gains after a thaw, pauses   ├──► Judges::verdict ──► JSON
//!  disks of the guests ───► disks      who wrote when                            │
//!                           (10 ms)    writer, downtime                          │
//!  the lab's word ────────► marks      faults with their reach, thaws, wishes    ┘
//!                           end_state, blame
//! ```
//!
//! All times are nanoseconds on CLOCK_BOOTTIME, which goes on while a host is frozen.

mod blame;
mod copy;
mod disks;
mod downtime;
mod end_state;
mod presence;
mod process;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::{Serialize, Serializer};
use uuid::Uuid;

pub use blame::{Excuse, Reach, Window};
pub use copy::Copy;
pub use disks::Write;
pub use end_state::Wish;
pub use presence::{Gain, Start};

use crate::guest_disk::Fault;
use disks::Disks;
use presence::Presence;

/// A moment, in nanoseconds on CLOCK_BOOTTIME.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Moment(pub u64);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("the clock is always there");
        Moment(time.tv_sec().unsigned_abs() * 1_000_000_000 + time.tv_nsec().unsigned_abs())
    }

    /// The time from `earlier` to here; zero if it is later.
    pub fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This moment and `time` more.
    pub fn plus(self, time: Duration) -> Self {
        Moment(self.0 + time.as_nanos() as u64)
    }

    /// This moment and `time` less.
    pub fn minus(self, time: Duration) -> Self {
        Moment(self.0.saturating_sub(time.as_nanos() as u64))
    }
}

/// A VM that the judges know by name, with the disk that its guest writes to.
#[derive(Clone, Debug)]
pub struct Vm {
    /// For people.
    pub name: String,
    /// As in QEMU's `-uuid`.
    pub id: Uuid,
    /// The raw disk, in the backing folder.
    pub disk: PathBuf,
}

/// Something that happened, as the lab says.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// When.
    pub at: Moment,
    /// What.
    pub what: String,
}

/// All judges of one run of the lab.
pub struct Judges {
    since: Moment,
    presence: Presence,
    disks: Disks,
    said: Mutex<Said>,
}

/// What the lab told the judges.
#[derive(Default)]
struct Said {
    vms: BTreeMap<Uuid, Vm>,
    /// What was wrong with their disks already.
    before: BTreeMap<Uuid, Vec<Fault>>,
    wishes: BTreeMap<Uuid, Wish>,
    marks: Vec<Mark>,
    windows: Vec<Window>,
    late: Vec<Late>,
}

/// A host whose writes came late.
struct Late {
    host: String,
    from: Moment,
    to: Moment,
}

/// What the judges found.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Empty if all is well.
    pub violations: Vec<String>,
    /// The lab's words.
    pub marks: Vec<Mark>,
    /// Per VM that was watched or seen.
    pub vms: Vec<VmReport>,
    /// What copies gained after thaws of their hosts.
    pub thaws: Vec<Gain>,
    /// What the sampling of processes costs.
    pub presence_cpu_percent: f64,
    /// What the reading of disks costs.
    pub disks_cpu_percent: f64,
}

/// One VM in a verdict.
#[derive(Clone, Debug, Serialize)]
pub struct VmReport {
    /// Its name, or its id if it was never watched.
    pub vm: String,
    /// Copies that executed, in order.
    pub copies: Vec<Copy>,
    /// Boots of its guest seen on its disk.
    pub boots: usize,
    /// Longest time between two writes of one boot.
    #[serde(serialize_with = "as_ms", rename = "longest_gap_ms")]
    pub longest_gap: Duration,
}

impl Judges {
    /// Starts all judges. `host_of` names the host to which a QEMU process belongs; None: it is not of this lab.
    pub fn start(host_of: impl Fn(i32) -> Option<String> + Send + 'static) -> Result<Self> {
        Ok(Judges {
            since: Moment::now(),
            presence: Presence::start(host_of)?,
            disks: Disks::start()?,
            said: Mutex::default(),
        })
    }

    /// Follows a VM's disk from now on.
    pub fn watch(&self, vm: Vm) {
        self.disks.watch(vm.id, vm.disk.clone());
        let before = writer::faults(&vm);
        let mut said = self.said();
        said.before.insert(vm.id, before);
        said.vms.insert(vm.id, vm);
    }

    /// Says what is to be true of a VM in the end. Without a word nothing is demanded of it.
    pub fn expect(&self, vm: Uuid, wish: Wish) {
        self.said().wishes.insert(vm, wish);
    }

    /// Notes what the lab does, and when: now.
    pub fn mark(&self, what: &str) -> Moment {
        let at = Moment::now();
        self.said().marks.push(Mark { at, what: what.into() });
        at
    }

    /// Notes a fault that reaches `vms`; until `settled` no other VM may be paused, stopped or moved.
    pub fn fault(&self, what: &str, vms: &[Uuid]) -> Moment {
        let from = self.mark(what);
        self.settled();
        self.said().windows.push(Window { what: what.into(), from, to: None, reach: vms.to_vec() });
        from
    }

    /// The fault is over, and so is all that follows from it.
    pub fn settled(&self) {
        let now = Moment::now();
        self.said().windows.iter_mut().filter(|w| w.to.is_none()).for_each(|w| w.to = Some(now));
    }

    /// Notes that a frozen host is about to be thawed: its old copies may gain 20 ms of vCPU time, and are looked at
    /// each millisecond for a while.
    pub fn thaw(&self, host: &str) -> Moment {
        let at = self.mark(&format!("thaw {host}"));
        self.presence.thaw(host, at);
        at
    }

    /// Notes that a host is about to lose its power; the end of its processes costs time that is not execution.
    pub fn kill(&self, host: &str) -> Moment {
        let at = self.mark(&format!("kill {host}"));
        self.presence.kill(host, at);
        at
    }

    /// Notes that writes of a host may land late for a time: a guest may then find its own older records.
    pub fn late(&self, host: &str, from: Moment, to: Moment) {
        self.said().late.push(Late { host: host.into(), from, to });
    }

    /// All copies ever seen.
    pub fn copies(&self) -> Vec<Copy> {
        self.presence.all()
    }

    /// Where many faults overlap: what happened to VMs since `from` that no excuse covers.
    pub fn unexcused(&self, excuses: &[Excuse], from: Moment) -> Vec<String> {
        let (said, copies, now) = (self.said(), self.presence.all(), Moment::now());
        let of_vm = |vm: &Vm| {
            let own: Vec<&Copy> = copies.iter().filter(|copy| copy.vm == vm.id).collect();
            blame::judge_all(&vm.name, &own, excuses, from, now)
        };
        said.vms.values().flat_map(of_vm).collect()
    }

    /// The first copy of a VM that began to execute at or after `since`.
    pub fn started(&self, vm: Uuid, since: Moment) -> Option<Start> {
        self.presence.started(vm, since)
    }

    /// The copies of a VM that executed in the last two seconds.
    pub fn running(&self, vm: Uuid) -> Vec<Start> {
        self.presence.running(vm)
    }

    /// When the guest made the first write of a boot that was new at or after `since`.
    pub fn guest_up(&self, vm: Uuid, since: Moment) -> Option<Moment> {
        downtime::guest_up(&self.disks.writes(vm), since)
    }

    /// When a copy of a VM executed anything at all for the first time after `since`.
    pub fn executed(&self, vm: Uuid, since: Moment) -> Option<Moment> {
        self.presence.all().iter().filter(|c| c.vm == vm).filter_map(|c| c.rose_after(since)).min()
    }

    /// What the copies of a VM on a host executed after a moment; None: there was none.
    pub fn gained_since(&self, vm: Uuid, host: &str, moment: Moment) -> Option<Duration> {
        let copies = self.presence.all();
        copies.iter().filter(|c| c.vm == vm && c.host == host).map(|c| c.gained_since(moment)).max()
    }

    /// The guest's writes at or after `since`.
    pub fn writes_since(&self, vm: Uuid, since: Moment) -> Vec<Write> {
        let mut writes = self.disks.writes(vm);
        writes.drain(..writes.partition_point(|w| w.at < since));
        writes
    }

    /// The guest's last write before `moment`.
    pub fn last_write_before(&self, vm: Uuid, moment: Moment) -> Option<Moment> {
        let writes = self.disks.writes(vm);
        writes[..writes.partition_point(|w| w.at < moment)].last().map(|w| w.at)
    }

    /// How many boots of the guest have written at or after `since`.
    pub fn boots(&self, vm: Uuid, since: Moment) -> usize {
        writer::boots(&self.writes_since(vm, since))
    }

    /// How long the guest did not write, at the longest, from `from` to `to`.
    pub fn longest_gap(&self, vm: Uuid, from: Moment, to: Moment) -> Duration {
        downtime::longest_gap(&self.disks.writes(vm), from, to)
    }

    /// What was found up to now. Reads the disks of all VMs that are watched: half a second.
    pub fn verdict(&self) -> Verdict {
        let said = self.said();
        let now = Moment::now();
        let name = |id: &Uuid| said.vms.get(id).map_or(id.to_string(), |vm| vm.name.clone());
        let copies = self.presence.all();
        let mut violations = self.presence.violations(&name);
        let mut reports = Vec::new();
        let ids = said.vms.keys().chain(copies.iter().map(|c| &c.vm)).collect::<std::collections::BTreeSet<_>>();
        for id in ids {
            let writes = self.disks.writes(*id);
            let mut of_vm: Vec<Copy> = copies.iter().filter(|c| c.vm == *id).cloned().collect();
            if let Some(vm) = said.vms.get(id) {
                let late = said.late.iter().any(|late| late.concerns(&of_vm));
                violations.extend(writer::judge(vm, &writes, late, &said.before[id]));
            }
            if let Some(wish) = said.wishes.get(id) {
                violations.extend(end_state::judge(&name(id), *wish, &of_vm, now));
            }
            for window in &said.windows {
                violations.extend(blame::judge(&name(id), *id, &of_vm, window, now));
            }
            of_vm.retain(|c| c.first_ran.is_some());
            reports.push(VmReport {
                vm: name(id),
                copies: of_vm,
                boots: writer::boots(&writes),
                longest_gap: downtime::longest_gap(&writes, self.since, now),
            });
        }
        Verdict {
            violations,
            marks: said.marks.clone(),
            vms: reports,
            thaws: self.presence.gains(),
            presence_cpu_percent: self.presence.cpu_percent(),
            disks_cpu_percent: self.disks.cpu_percent(),
        }
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().expect("no holder panics")
    }
}

impl Late {
    fn concerns(&self, copies: &[Copy]) -> bool {
        let was_there = |copy: &Copy| copy.began <= self.to && copy.gone.is_none_or(|gone| self.from <= gone);
        copies.iter().any(|copy| copy.host == self.host && was_there(copy))
    }
}

impl Verdict {
    /// Fails with all violations, if there are any.
    pub fn demand(&self) -> Result<()> {
        if self.violations.is_empty() { Ok(()) } else { Err(anyhow!("{}", self.violations.join("\n"))) }
    }
}

/// Milliseconds since `since`, for messages.
fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}

fn as_ms<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(ms(*time))
}

/// The judges go before guests and hosts: a witness who sleeps sees nothing. A refusal costs precision only.
fn go_first() {
    // SAFETY: plain system call without pointers; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
}

/// CPU time of the calling thread.
fn thread_cpu() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("always there");
    Duration::new(time.tv_sec().unsigned_abs(), time.tv_nsec() as u32)
}
