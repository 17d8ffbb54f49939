//! The guard and its neighbours are killed, stopped, reloaded and restarted: VMs never run without a right to.
//!
//! ```text
//!  process struck ─► storage hangs ── HANGS ──► network cut, too ─► taken elsewhere       margin: last vCPU time of the
//!                     attested, or stopped       lease gone for sure                      old copy to the first of the new
//!
//!  reload of the guard, restart of agent and libvirtd, in every order and overlapping     no VM is touched
//!  restart of the guard                                                                  stopped at most a second, none over
//! ```

use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::Ground;
use super::ground::seconds;
use super::restarts::{generations, systemctl, untouched};
use crate::agents;
use crate::guest_disk::PERIOD_MS;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;
use crate::network;
use crate::processes::{self, AGENT, LIBVIRTD, signal};
use crate::storage::Fault;

/// Longer than a lease, so that one that nobody attests has lapsed.
const HANGS: Duration = Duration::from_secs(7);
const TAKEN: Duration = Duration::from_secs(40);
const ROUNDS: usize = 3;
const ROUNDS_FULL: usize = 20;
const STOPPED: Duration = Duration::from_secs(1);
/// Guests of the victim.
const VMS: usize = 2;
/// Starts of a guest that is moved to the victim each time, and taken from it.
const STARTS: usize = 1 + 3 * WAYS.len();

/// What is done to the host before its storage hangs.
struct Way {
    what: &'static str,
    strike: fn(&Host) -> Result<()>,
}

const WAYS: [Way; 5] = [
    Way { what: "guard's child killed", strike: |host| signal(processes::guard(host)?.child, Signal::SIGKILL) },
    Way { what: "guard's parent killed", strike: |host| signal(processes::guard(host)?.parent, Signal::SIGKILL) },
    Way { what: "agent stopped", strike: |host| all(host, AGENT, Signal::SIGSTOP) },
    Way {
        what: "agent and guard's child killed",
        strike: |host| {
            let child = processes::guard(host)?.child;
            all(host, AGENT, Signal::SIGKILL)?;
            signal(child, Signal::SIGKILL)
        },
    },
    Way { what: "libvirtd stopped", strike: |host| all(host, LIBVIRTD, Signal::SIGSTOP) },
];

fn all(host: &Host, name: &str, what: Signal) -> Result<()> {
    let pids = processes::named(host, name)?;
    if pids.is_empty() {
        bail!("{} runs no {name}", host.name());
    }
    pids.into_iter().try_for_each(|pid| signal(pid, what))
}

pub fn killed(ground: &mut Ground) -> Result<()> {
    ground.watch()?;
    let guests: Vec<String> = ground.lab().guests().iter().map(|guest| guest.name().to_owned()).collect();
    for guest in &guests {
        ground.expect(guest, Wish::Running { starts: STARTS })?;
    }
    for way in &WAYS {
        let victim = ground.subordinate()?;
        ground.fault(&format!("guests are moved to {}", victim.name()), &guests)?;
        ground.gather(&victim, VMS)?;
        strike(ground, way, &victim).with_context(|| format!("{} on {}", way.what, victim.name()))?;
        // Its storage was fenced from it: it boots anew.
        if victim.power()? != crate::host::Power::Off {
            ground.judges()?.kill(&victim.name());
            ground.lab().kill(&victim)?;
        }
        network::heal()?;
        ground.hosts_up()?;
        ground.wait_cluster()?;
    }
    Ok(())
}

fn strike(ground: &mut Ground, way: &Way, victim: &Host) -> Result<()> {
    let guests = ground.guests_on(victim)?;
    let old: Vec<i32> = guests.iter().map(|guest| ground.pid_of(guest)).collect::<Result<_>>()?;
    let from = ground.fault(&format!("{} on {}, then its storage hangs", way.what, victim.name()), &guests)?;
    (way.strike)(victim)?;
    ground.lab().storage()?.fault(&victim.name(), Fault::Hang)?;
    // How long it hangs is what is tried here; whether guests go on meanwhile depends on who is left to attest.
    std::thread::sleep(HANGS);
    ground.judges()?.mark(&format!("cut {}", victim.name()));
    network::cut_host(victim)?;
    let starts = ground.wait_started(&guests, from, TAKEN)?;
    if starts.iter().any(|start| start.host == victim.name()) {
        bail!("a guest was started on the host that cannot reach its storage");
    }
    let copies = ground.judges()?.copies();
    let last = |pid: i32| copies.iter().filter(|copy| copy.pid == pid).filter_map(|copy| copy.last_executed()).max();
    let margins = old.iter().zip(&starts).filter_map(|(pid, start)| Some((last(*pid)?, start.ran)));
    let mut least = Duration::MAX;
    for (stopped, ran) in margins {
        if ran < stopped {
            bail!("an old copy executed {} after the new one had begun", seconds(stopped.since(ran)));
        }
        least = least.min(ran.since(stopped));
    }
    let taken = starts.iter().map(|start| start.ran.since(from)).max().unwrap_or_default();
    ground.figure(format!("{}: taken {}, margin {}", way.what, seconds(taken), seconds(least)));
    Ok(())
}

/// What is done to a host's daemons, each without touching a VM.
const GENTLE: [[&str; 2]; 3] =
    [["reload", "mainstay-guard.service"], ["restart", "mainstayd.service"], ["restart", "libvirtd.service"]];
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

pub fn reloaded(ground: &mut Ground) -> Result<()> {
    let rounds = if ground.full { ROUNDS_FULL } else { ROUNDS };
    untouched(ground, "reloads of the guard, restarts of agent and libvirtd", |ground| {
        let hosts = ground.hosts();
        for round in 0..rounds {
            let host = hosts[round % hosts.len()];
            let order = ORDERS[round % ORDERS.len()].map(|number| GENTLE[number]);
            // Every other time the next is begun before the last is done.
            if round % 2 == 0 {
                one_by_one(&host, order)?
            } else {
                overlapping(&host, order)?
            }
            ground.wait_cluster()?;
        }
        Ok(())
    })?;
    restarted(ground, rounds)
}

fn one_by_one(host: &Host, order: [[&str; 2]; 3]) -> Result<()> {
    order.iter().try_for_each(|what| systemctl(host, what))
}

fn overlapping(host: &Host, order: [[&'static str; 2]; 3]) -> Result<()> {
    let begin = |what: [&'static str; 2]| {
        let host = *host;
        std::thread::sleep(Duration::from_millis(50));
        std::thread::spawn(move || systemctl(&host, &what))
    };
    let threads: Vec<JoinHandle<Result<()>>> = order.into_iter().map(begin).collect();
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a restart panicked"))?)
}

/// Restarts of the guard: its VMs stand still for a moment, and go on as they were.
fn restarted(ground: &mut Ground, rounds: usize) -> Result<()> {
    let hosts = ground.hosts();
    let before = generations(ground)?;
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        let host = hosts[round % hosts.len()];
        let guests = ground.guests_on(&host)?;
        let old: Vec<i32> = guests.iter().map(|guest| ground.pid_of(guest)).collect::<Result<_>>()?;
        let from = ground.fault(&format!("restart of the guard of {}", host.name()), &guests)?;
        agents::ask(&host, TAKEN, &["systemctl", "restart", "mainstay-guard.service"])?;
        let done = Moment::now();
        for (guest, pid) in guests.iter().zip(&old) {
            let judges = ground.judges()?;
            let id = ground.id(guest);
            wait(TAKEN, &format!("{guest} to write again"), || Ok(judges.writes_since(id, done).get(3).map(drop)))?;
            longest = longest.max(judges.longest_gap(id, from, Moment::now()));
            if ground.pid_of(guest)? != *pid {
                bail!("{guest} has another QEMU than before");
            }
        }
        ground.wait_cluster()?;
    }
    let after = generations(ground)?;
    if before != after {
        bail!("a restart of the guard ended claims: generations rose from {before:?} to {after:?}");
    }
    ground.within("stopped by a restart of the guard", longest, STOPPED + Duration::from_millis(PERIOD_MS))
}
