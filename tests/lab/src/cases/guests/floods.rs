//! Four hostile guests at once, each in its own way: ever new reports, junk, messages that break off, lengths of 2 GiB.
//!
//! ```text
//!   rest ─► flood alone: what it costs the agents ─► flood, and a well-behaved guest asks for its reset ─► notes counted
//!                                                    └ its memory is looked at each second, over both ┘      ─► all reset: heard
//! ```

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{HEARD, NAME, ORDER, Talkers, clear, demand, often, reset_after};
use crate::agents;
use crate::cases::Ground;
use crate::guest::Talking;
use crate::host::Host;
use crate::judge::Moment;
use crate::processes::{self, AGENT};

const HOSTILE: [(&str, &str); 4] =
    [("hostile1", "reports"), ("hostile2", "junk"), ("hostile3", "halves"), ("hostile4", "lengths")];
/// Of one processor, while they flood.
const CPU: f64 = 5.0;
/// The most in the second half over the most in the first: what grows without bound grows by more.
const GROWS_KIB: u64 = 2048;
/// For the reset of the guest that behaves, median, as where nobody floods.
const LIMIT: Duration = Duration::from_millis(250);
/// About one guest: lines that come at once, and the time between two that sum up.
const AT_ONCE: usize = 10;
const APART: Duration = Duration::from_secs(59);

pub fn flood(ground: &mut Ground) -> Result<()> {
    let (alone, runs) = if ground.full { (Duration::from_secs(240), 20) } else { (Duration::from_secs(12), 3) };
    let (host, master) = (ground.subordinate()?, ground.master()?);
    ground.watch()?;
    let names: Vec<(&str, &Host)> =
        HOSTILE.iter().map(|(name, _)| *name).chain([NAME]).map(|name| (name, &host)).collect();
    let talkers = Talkers::begin(ground, &names, Talking::default(), &often(""))?;
    let (hostile, good) = talkers.0.split_at(HOSTILE.len());
    let mut agents = [("the agent", Load::of(&host)?), ("the master's", Load::of(&master)?)];
    std::thread::sleep(Duration::from_secs(5));
    let rest = agents[0].1.percent()?;

    let began = Moment::now();
    for (talker, (_, kind)) in hostile.iter().zip(HOSTILE) {
        talker.tell(ground, &format!("flood {kind}"))?;
        talker.console.wait_more("flooding", 0)?;
    }
    agents = [("the agent", Load::of(&host)?), ("the master's", Load::of(&master)?)];
    let memory = watch_memory(agents[0].1.pid);
    std::thread::sleep(alone);
    for (whose, load) in &agents {
        let percent = load.percent()?;
        ground.figure(format!("{whose} CPU {percent:.1} % of {CPU} % (at rest {rest:.1} %)"));
        demand(percent <= CPU, &format!("{whose} CPU: {percent:.1} % of a processor"))?;
    }
    let mut took = Vec::new();
    for _ in 0..runs {
        took.push(reset_after(ground, "report", "reporting", &good[0], &good[0])?);
    }
    took.sort_unstable();
    let kib = memory.end()?;
    let (first, second) = kib.split_at(kib.len() / 2);
    let most = |half: &[u64]| half.iter().max().copied().unwrap_or_default();
    ground.figure(format!("memory {} KiB, then {} KiB", most(first), most(second)));
    demand(most(second) <= most(first) + GROWS_KIB, "the agent's memory grows")?;
    told(ground, began)?;
    let slowest: Vec<String> = took.iter().rev().take(3).map(|took| format!("{:.2}", took.as_secs_f64())).collect();
    ground.figure(format!("slowest resets of another guest {} s", slowest.join(", ")));
    ground.within("median", took[runs / 2], LIMIT)?;
    for talker in hostile {
        let heard = talker.console.count(HEARD);
        agents::ask(&host, ORDER, &["virsh", "-q", "reset", talker.name()])?;
        talker.console.wait_more(HEARD, heard)?;
    }
    clear(ground)
}

/// How much people had to read.
fn told(ground: &mut Ground, since: Moment) -> Result<()> {
    let notes = agents::all_notes(&ground.hosts_on(), Moment::now().since(since));
    let mut lines = 0;
    for (name, _) in HOSTILE {
        let of = |note: &&agents::Note| since <= note.at() && note.vm.as_deref() == Some(name);
        let sums = |note: &&agents::Note| note.kind == "guest-channel" || note.text.contains("that were not told");
        let (sums, single): (Vec<_>, Vec<_>) = notes.iter().filter(of).partition(sums);
        lines = lines.max(sums.len() + single.len());
        // After those at once one a minute is told, and need not sum up.
        let later = Moment::now().since(since).as_secs() / APART.as_secs();
        let most = AT_ONCE + usize::try_from(later)?;
        demand(single.len() <= most, &format!("{} lines about {name}: {single:?}", single.len()))?;
        let close = sums.windows(2).find(|two| two[1].at().since(two[0].at()) < APART);
        demand(close.is_none(), &format!("two lines within a minute that sum up: {close:?}"))?;
    }
    let seconds = Moment::now().since(since).as_secs();
    ground.figure(format!("at most {lines} lines about one guest in {seconds} s"));
    Ok(())
}

/// What the agent of a host uses, from now on.
struct Load {
    pid: i32,
    begun: Instant,
    ticks: u64,
}

impl Load {
    fn of(host: &Host) -> Result<Load> {
        let pid = *processes::named(host, AGENT)?.first().context("there is no agent")?;
        Ok(Load { pid, begun: Instant::now(), ticks: ticks(pid)? })
    }

    /// Of one processor.
    fn percent(&self) -> Result<f64> {
        const PER_SECOND: f64 = 100.0; // USER_HZ, the same on all Linux systems that we know of.
        let used = (ticks(self.pid)? - self.ticks) as f64 / PER_SECOND;
        Ok(used * 100.0 / self.begun.elapsed().as_secs_f64())
    }
}

/// User and system time of a process, all threads.
fn ticks(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("the agent has ended")?;
    let fields: Vec<&str> = text.rsplit_once(')').context("its name")?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).context("its times");
    Ok(number(11)? + number(12)?)
}

/// A process's resident memory, each second.
struct Memory {
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Vec<u64>>,
}

fn watch_memory(pid: i32) -> Memory {
    let (stop, stopped) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut seen = Vec::new();
        while stopped.recv_timeout(Duration::from_secs(1)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            seen.extend(line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()));
        }
        seen
    });
    Memory { stop, thread }
}

impl Memory {
    fn end(self) -> Result<Vec<u64>> {
        drop(self.stop);
        let seen = self.thread.join().map_err(|_| anyhow::anyhow!("looking at its memory panicked"))?;
        demand(3 < seen.len(), "the agent has ended")?;
        Ok(seen)
    }
}
