//! Power loss of hosts, and the death of one QEMU.
//!
//! ```text
//!  kill ─► silence ─► lease proven over ─► claim ─► late writes excluded ─► started     who excludes them:
//!                                                    ├─ command: the lab's storage server, at once
//!                                                    ├─ lock: the server, when the dead client's lease ends
//!                                                    ├─ accepted: nobody
//!                                                    └─ none: a new boot of the host
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;

const VMS: usize = 3;
/// The last host that comes back comes so late.
const LAST_BOOT: Duration = Duration::from_secs(60);
/// From then on: its boot, a lease that is proven over, six guests on two hosts.
const ALL_UP: Duration = Duration::from_secs(60);
const DEFAULT: Duration = Duration::from_secs(8);
const FAST: Duration = Duration::from_secs(3);
/// What the election of a new master may add: two beats of one second.
const TWO_BEATS: Duration = Duration::from_secs(2);
const TWO_FAST_BEATS: Duration = Duration::from_millis(500);
/// After the locks of the dead host have ended.
const AFTER_LOCKS: Duration = Duration::from_millis(1500);

pub fn subordinate(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    kill_host(ground, &victim, DEFAULT)
}

pub fn master(ground: &mut Ground) -> Result<()> {
    let victim = ground.master()?;
    kill_host(ground, &victim, DEFAULT + TWO_BEATS)
}

pub fn subordinate_fast(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    kill_host(ground, &victim, FAST)
}

pub fn master_fast(ground: &mut Ground) -> Result<()> {
    let victim = ground.master()?;
    kill_host(ground, &victim, FAST + TWO_FAST_BEATS)
}

pub fn local_accept(ground: &mut Ground) -> Result<()> {
    subordinate(ground)
}

fn kill_host(ground: &mut Ground, victim: &Host, limit: Duration) -> Result<()> {
    ground.gather(victim, VMS)?;
    ground.watch()?;
    let (killed, guests) = ground.kill(victim)?;
    ground.demand_started(&guests, killed, victim, limit)
}

pub fn comes_back(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    ground.gather(&victim, 2)?;
    ground.watch()?;
    let (killed, guests) = ground.kill(&victim)?;
    ground.demand_started(&guests, killed, &victim, DEFAULT)?;
    let back = ground.judges()?.mark(&format!("start {}", victim.name()));
    ground.lab().start(&victim)?;
    victim.wait_up(Duration::from_secs(90))?;
    ground.wait_cluster()?;
    ground.figure(format!("back {}", seconds(Moment::now().since(back))));
    wait(Duration::from_secs(30), "the stale definitions to be removed", || {
        std::thread::sleep(Duration::from_millis(200));
        let defined = agents::ask(&victim, agents::ANSWER, &["virsh", "-q", "list", "--all", "--name"])?;
        Ok(guests.iter().all(|guest| defined.lines().all(|line| line.trim() != guest)).then_some(()))
    })?;
    ground.healthy()
}

pub fn leased_locks(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    let guests = ground.gather(&victim, VMS)?;
    let view = ground.view()?;
    let explain = view.vm(&guests[0]).context("the VM is known")?.explain.join("\n");
    if !explain.contains("image lock") || !explain.contains("lease time") {
        bail!("vm explain does not say that it would wait for the image locks: {explain}");
    }
    ground.watch()?;
    let (killed, guests) = ground.kill(&victim)?;
    // The server counts from the last thing that it heard of the host.
    let silent =
        ground.lab().storage()?.status()?["hosts"][victim.name()]["silent_ms"].as_u64().context("its silence")?;
    let ended = Moment::now().minus(Duration::from_millis(silent)).plus(super::LEASE);
    let starts = ground.wait_started(&guests, killed, super::LEASE + Duration::from_secs(30))?;
    let last = starts.iter().map(|start| start.ran).max().unwrap_or_default();
    ground.figure(format!("locks end {}", seconds(ended.since(killed))));
    if starts.iter().any(|start| start.ran < ended) {
        bail!("started {} after the kill, when the locks were still held", seconds(last.since(killed)));
    }
    ground.demand_started(&guests, killed, &victim, super::LEASE + AFTER_LOCKS)?;
    ground.within_at_its_pace("after that, started", ended, &starts, AFTER_LOCKS)
}

pub fn local_exclude(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    ground.gather(&victim, VMS)?;
    ground.watch()?;
    let (killed, guests) = ground.kill(&victim)?;
    let name = victim.name();
    let says = format!("new boot of {name}");
    ground.wait_view("all to wait for a new boot, and to say so", Duration::from_secs(20), |view| {
        guests
            .iter()
            .all(|guest| view.vm(guest).is_some_and(|vm| vm.why.as_ref().is_some_and(|why| why.contains(&says))))
    })?;
    ground.figure(format!("waits after {}", seconds(Moment::now().since(killed))));
    if guests.iter().any(|guest| ground.host_of(guest).is_ok()) {
        bail!("a guest was started although nothing excludes late writes");
    }
    let back = ground.judges()?.mark(&format!("start {name}"));
    ground.lab().start(&victim)?;
    let starts = ground.wait_started(&guests, killed, Duration::from_secs(90))?;
    let first = starts.iter().map(|start| start.ran).min().unwrap_or_default();
    if first < back {
        bail!("a guest was started before the host was back");
    }
    let last = starts.iter().map(|start| start.ran.since(back)).max().unwrap_or_default();
    ground.figure(format!("started {} after its power was back", seconds(last)));
    Ok(())
}

/// A site without power: all hosts go at once, and come back one after the other; one never does.
pub fn all(ground: &mut Ground) -> Result<()> {
    let hosts = ground.hosts();
    let (gone, back) = hosts.split_last().context("there are hosts")?;
    let guests: Vec<String> = ground.lab().guests().iter().map(|guest| guest.name().to_owned()).collect();
    ground.watch()?;
    for guest in &guests {
        ground.expect(guest, Wish::Running { starts: 2 })?;
    }
    let dark = ground.fault("power loss of all hosts", &guests)?;
    for host in &hosts {
        ground.lab().kill(host)?;
    }
    let stagger = if ground.full { LAST_BOOT } else { LAST_BOOT / 4 } / u32::try_from(back.len().max(2) - 1)?;
    for (n, host) in back.iter().enumerate() {
        if 0 < n {
            std::thread::sleep(stagger); // What is tried here: hosts that come late.
        }
        ground.judges()?.mark(&format!("start {}", host.name()));
        ground.lab().start(host)?;
    }
    let last = Moment::now();
    ground.demand_started(&guests, dark, gone, LAST_BOOT + ALL_UP)?;
    ground.figure(format!("all up {} after the last host's start", seconds(Moment::now().since(last))));
    Ok(())
}

/// kill -9 of one QEMU.
pub fn qemu(ground: &mut Ground) -> Result<()> {
    let guest = super::GUESTS[0].to_owned();
    let host = ground.host_of(&guest)?;
    let pid = ground.pid_of(&guest)?;
    ground.watch()?;
    ground.expect(&guest, Wish::Running { starts: 2 })?;
    let killed = ground.fault(&format!("kill -9 of the QEMU of {guest}"), std::slice::from_ref(&guest))?;
    kill(Pid::from_raw(pid), Signal::SIGKILL).context("killing a QEMU")?;
    let starts = ground.wait_started(std::slice::from_ref(&guest), killed, Duration::from_secs(30))?;
    if starts[0].host != host.name() {
        bail!("it was restarted on {}, not in place on {}", starts[0].host, host.name());
    }
    ground.within("started", starts[0].ran.since(killed), Duration::from_secs(2))
}
