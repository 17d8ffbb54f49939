//! Judge 1: which copy of which VM executes, seen from outside.
//!
//! ```text
//!  each 20 ms (1 ms after a thaw):  Finder ─► new QEMUs ─► Copy
//!                                   sample of every live one ─► Copy::add
//!
//!  old copy   ▁▁▁▁▁▁▁▁▁▁▁▁▁▁─────── frozen ───────▁ ✕      gained after the new one began: at most LAG (6 ms if it ended),
//!  new copy                        ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁      and 20 ms if its host was thawed meanwhile
//!                                  ▲
//!                                  first_ran
//! ```
//!
//! The rule for a double run needs no overlap in one sample: a copy that executes after another copy of its VM has
//! begun to execute is wrong, even if they take turns.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use uuid::Uuid;

use super::copy::{Copy, LAG, Sample};
use super::process::{Finder, Qemu};
use super::{Moment, as_ms, go_first, ms, thread_cpu};

const PERIOD: Duration = Duration::from_millis(20);
/// Between samples for a while after a thaw: a copy that is killed takes its last sample's age with it.
const CLOSE_PERIOD: Duration = Duration::from_millis(1);
const CLOSE_TIME: Duration = Duration::from_secs(2);
/// What an old copy may gain after a thaw, since guard and vCPU wake together.
const THAW_ALLOWANCE: Duration = Duration::from_millis(20);

/// What the vCPU threads of a QEMU spend when it ends, without executing the guest (TCG; a paused one was seen to take
/// 4.5 ms). After `virsh migrate` that happens when the target runs already.
const ENDING: Duration = Duration::from_millis(6);

/// When and where a VM began to execute.
#[derive(Clone, Debug, Serialize)]
pub struct Start {
    /// The host.
    pub host: String,
    /// The process, as seen from outside.
    pub pid: i32,
    /// When the process began.
    pub process: Moment,
    /// When it first executed.
    pub ran: Moment,
}

/// What an old copy gained after its host was thawed.
#[derive(Clone, Debug, Serialize)]
pub struct Gain {
    /// The host.
    pub host: String,
    /// The VM.
    pub vm: Uuid,
    /// The old copy.
    pub pid: i32,
    /// When the host was thawed.
    pub thawed: Moment,
    /// vCPU time after that.
    #[serde(serialize_with = "as_ms", rename = "gained_ms")]
    pub gained: Duration,
    /// When the copy had gone.
    pub gone: Option<Moment>,
}

/// The judge, with its thread.
pub struct Presence {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    close_until: AtomicU64,
    cpu_permyriad: AtomicU64,
    end: AtomicBool,
}

#[derive(Default)]
struct Seen {
    copies: Vec<Copy>,
    thaws: Vec<(String, Moment)>,
    kills: Vec<(String, Moment)>,
}

impl Presence {
    /// Starts sampling.
    pub fn start(host_of: impl Fn(i32) -> Option<String> + Send + 'static) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let run = move || of_thread.run(host_of);
        let thread =
            std::thread::Builder::new().name("judge-presence".into()).spawn(run).context("start the presence judge")?;
        Ok(Presence { shared, thread: Some(thread) })
    }

    /// A host is about to be thawed.
    pub fn thaw(&self, host: &str, at: Moment) {
        self.shared.seen().thaws.push((host.into(), at));
        self.shared.close_until.store(at.plus(CLOSE_TIME).0, Ordering::Relaxed);
    }

    /// A host is about to lose its power. What its vCPU threads spend afterwards is the kernel's work at their end.
    pub fn kill(&self, host: &str, at: Moment) {
        self.shared.seen().kills.push((host.into(), at));
    }

    /// All copies ever seen.
    pub fn all(&self) -> Vec<Copy> {
        self.shared.seen().copies.clone()
    }

    /// The copies of a VM that execute at present.
    pub fn running(&self, vm: Uuid) -> Vec<Start> {
        let now = Moment::now();
        self.shared.seen().copies.iter().filter(|c| c.vm == vm && c.runs(now)).filter_map(Start::of).collect()
    }

    /// The first start of a VM at or after `since`.
    pub fn started(&self, vm: Uuid, since: Moment) -> Option<Start> {
        let seen = self.shared.seen();
        let starts = seen.copies.iter().filter(|c| c.vm == vm).filter_map(Start::of);
        starts.filter(|s| since <= s.ran).min_by_key(|s| s.ran)
    }

    /// Double runs, in words.
    pub fn violations(&self, name: &impl Fn(&Uuid) -> String) -> Vec<String> {
        let seen = self.shared.seen();
        seen.pairs().filter_map(|(old, new, began)| seen.double_run(old, new, began, name)).collect()
    }

    /// What old copies gained after thaws.
    pub fn gains(&self) -> Vec<Gain> {
        let seen = self.shared.seen();
        let mut gains = Vec::new();
        for (host, thawed) in &seen.thaws {
            for (old, _, began) in seen.pairs() {
                let meant = old.host == *host && began <= *thawed && old.gone.is_none_or(|gone| *thawed < gone);
                if meant && gains.iter().all(|g: &Gain| (g.pid, g.thawed) != (old.pid, *thawed)) {
                    let gained = old.gained_after(*thawed);
                    let (host, vm, pid) = (host.clone(), old.vm, old.pid);
                    gains.push(Gain { host, vm, pid, thawed: *thawed, gained, gone: old.gone });
                }
            }
        }
        gains
    }

    /// CPU time of the judge's thread, in percent of one CPU.
    pub fn cpu_percent(&self) -> f64 {
        self.shared.cpu_permyriad.load(Ordering::Relaxed) as f64 / 100.0
    }
}

impl Start {
    fn of(copy: &Copy) -> Option<Self> {
        Some(Start { host: copy.host.clone(), pid: copy.pid, process: copy.began, ran: copy.first_ran? })
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Seen {
    /// All pairs of copies of one VM that executed: the older, the newer, and when that began.
    fn pairs(&self) -> impl Iterator<Item = (&Copy, &Copy, Moment)> {
        self.copies.iter().flat_map(move |old| {
            self.copies.iter().filter_map(move |new| {
                let (first, second) = (old.first_ran?, new.first_ran?);
                let in_order = (first, old.pid) < (second, new.pid);
                (old.vm == new.vm && in_order).then_some((old, new, second))
            })
        })
    }

    fn double_run(&self, old: &Copy, new: &Copy, began: Moment, name: &impl Fn(&Uuid) -> String) -> Option<String> {
        let killed = self.kills.iter().find(|(host, at)| *host == old.host && began <= *at);
        let ending = killed.map_or(Duration::ZERO, |(_, at)| old.gained_after(*at));
        let gained = old.gained_since(began).saturating_sub(ending);
        let thawed = self.thaws.iter().find(|(host, at)| *host == old.host && began <= *at);
        let allowed = match thawed {
            Some((_, at)) if gained.saturating_sub(old.gained_after(*at)) <= LAG => THAW_ALLOWANCE,
            Some(_) | None if old.gone.is_some() => ENDING,
            Some(_) | None => LAG,
        };
        (allowed < gained).then(|| {
            format!(
                "{} ran twice: its copy on {} (pid {}) executed {} ms after the one on {} (pid {}) had begun, {} ms allowed; \
                 the new one began at {} ns, the old one was last seen executing at {} ns",
                name(&old.vm),
                old.host,
                old.pid,
                ms(gained),
                new.host,
                new.pid,
                ms(allowed),
                began.0,
                old.last_ran.map_or(0, |at| at.0),
            )
        })
    }
}

impl Shared {
    fn run(&self, host_of: impl Fn(i32) -> Option<String>) {
        go_first();
        let began = Instant::now();
        let since = Moment::now();
        let mut finder = Finder::default();
        let mut live: Vec<(Qemu, Option<usize>)> = Vec::new();
        while !self.end.load(Ordering::Relaxed) {
            let now = Moment::now();
            for qemu in finder.look(now) {
                live.push((qemu, None));
            }
            live.retain_mut(|(qemu, index)| self.look_at(qemu, index, now, since, &host_of, &mut finder));
            let cpu = thread_cpu().as_secs_f64() / began.elapsed().as_secs_f64();
            self.cpu_permyriad.store((cpu * 10_000.0) as u64, Ordering::Relaxed);
            let close = now.0 < self.close_until.load(Ordering::Relaxed);
            let next = now.plus(if close { CLOSE_PERIOD } else { PERIOD });
            std::thread::sleep(next.since(Moment::now()));
        }
    }

    /// Samples a process; false once it is of no interest any more.
    fn look_at(
        &self,
        qemu: &mut Qemu,
        index: &mut Option<usize>,
        now: Moment,
        since: Moment,
        host_of: &impl Fn(i32) -> Option<String>,
        finder: &mut Finder,
    ) -> bool {
        let Some(sample) = qemu.sample(now) else {
            finder.forget(qemu.pid);
            if let Some(index) = index {
                self.seen().copies[*index].gone = Some(Moment::now());
            }
            return false;
        };
        if let Some(index) = *index {
            let copy = &mut self.seen().copies[index];
            copy.add(sample);
            if qemu.began < since {
                copy.note_if_idle();
            }
            return true;
        }
        let Some(host) = host_of(qemu.pid) else {
            finder.forget(qemu.pid);
            return false;
        };
        // Of one that was there before us we know only what it gains from now on.
        let seen_from_birth = since <= qemu.began;
        let nothing = Sample { at: qemu.began, ran: Duration::ZERO, waited: Duration::ZERO };
        let start = if seen_from_birth { nothing } else { sample };
        let mut copy = Copy::new(host, qemu.vm, qemu.pid, qemu.began, start);
        copy.add(sample);
        let copies = &mut self.seen().copies;
        *index = Some(copies.len());
        copies.push(copy);
        true
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no holder panics")
    }
}
