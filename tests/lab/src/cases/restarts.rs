//! Daemons that are restarted, stopped or hang: VMs do not need them to run.
//!
//! ```text
//!  mainstayd    one host after another ──► all at once      guard beats on: agent failed, nothing is touched
//!  libvirtd     restarted, with and without mainstayd       the hook's `reconnect` may never fail
//!  libvirtd     down, hanging                               VMs go on, a note names it
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::host::Host;
use crate::judge::Moment;

const UNIT: Duration = Duration::from_secs(60);
/// For CI; `--full` takes 20 s.
const DOWN: Duration = Duration::from_secs(8);
const DOWN_FULL: Duration = Duration::from_secs(20);

/// Generations of all VMs: they rise with everything that is done to a VM.
pub(super) fn generations(ground: &Ground) -> Result<BTreeMap<String, Option<u64>>> {
    Ok(ground.view()?.vms.into_iter().map(|vm| (vm.name, vm.generation)).collect())
}

/// Runs it with judges; afterwards all is well and no generation has risen.
pub(super) fn untouched(ground: &mut Ground, what: &str, act: impl FnOnce(&mut Ground) -> Result<()>) -> Result<()> {
    let before = generations(ground)?;
    ground.watch()?;
    let from = ground.fault(what, &[])?;
    act(ground)?;
    ground.wait_cluster()?;
    crate::lab::wait(UNIT, "all guests to be as they were", || ground.healthy().map(Some))?;
    let after = generations(ground)?;
    if before != after {
        bail!("generations rose from {before:?} to {after:?}");
    }
    ground.figure(format!("all well {}", seconds(Moment::now().since(from))));
    Ok(())
}

pub(super) fn systemctl(host: &Host, args: &[&str]) -> Result<()> {
    agents::ask(host, UNIT, &[&["systemctl"], args].concat()).map(drop)
}

pub fn agents(ground: &mut Ground) -> Result<()> {
    untouched(ground, "restarts of mainstayd", |ground| {
        for host in ground.hosts() {
            systemctl(&host, &["restart", "mainstayd.service"])?;
            ground.wait_cluster()?;
        }
        let restart = |host: Host| std::thread::spawn(move || systemctl(&host, &["restart", "mainstayd.service"]));
        let all: Vec<_> = ground.hosts().into_iter().map(restart).collect();
        for thread in all {
            thread.join().map_err(|_| anyhow::anyhow!("a restart panicked"))??;
        }
        Ok(())
    })
}

pub fn libvirtd(ground: &mut Ground) -> Result<()> {
    untouched(ground, "restarts of libvirtd", |ground| {
        for host in ground.hosts() {
            systemctl(&host, &["restart", "libvirtd.service"])?;
        }
        Ok(())
    })
}

pub fn libvirtd_alone(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    ground.gather(&victim, 2)?;
    untouched(ground, "restart of libvirtd while mainstayd is stopped", |_| {
        systemctl(&victim, &["stop", "mainstayd.service"])?;
        let done = systemctl(&victim, &["restart", "libvirtd.service"]).and_then(|()| {
            agents::ask(&victim, UNIT, &["virsh", "-q", "list"]).context("libvirtd after its restart").map(drop)
        });
        systemctl(&victim, &["start", "mainstayd.service"])?;
        done
    })
}

pub fn libvirtd_hangs(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    let time = if ground.full { DOWN_FULL } else { DOWN };
    let sockets = ["libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", "libvirtd-tcp.socket"];
    untouched(ground, "libvirtd is down, then hangs", |ground| {
        let stopped = Moment::now();
        systemctl(&victim, &[&["stop", "libvirtd.service"], &sockets[..]].concat())?;
        let noted = named(ground, &victim, stopped, "down", time);
        systemctl(&victim, &[&["start"], &sockets[..], &["libvirtd.service"]].concat())?;
        noted?;
        ground.wait_cluster()?;
        let hung = Moment::now();
        systemctl(&victim, &["kill", "--kill-who=main", "--signal=STOP", "libvirtd.service"])?;
        let noted = named(ground, &victim, hung, "hanging", time);
        systemctl(&victim, &["kill", "--kill-who=main", "--signal=CONT", "libvirtd.service"])?;
        noted
    })
}

/// Waits for the note, and lets the fault last for its whole time.
fn named(ground: &mut Ground, host: &Host, since: Moment, how: &str, time: Duration) -> Result<()> {
    let name = host.name();
    let note = ground.wait_note(since, &format!("libvirt {how} on {name}"), Duration::from_secs(30), |note| {
        note.kind == "libvirt-down" && note.host == name
    })?;
    ground.figure(format!("{how}: noted {}", seconds(note.at().since(since))));
    std::thread::sleep(time.saturating_sub(Moment::now().since(since)));
    Ok(())
}
