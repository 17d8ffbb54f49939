//! Processes of a host that are ours or libvirt's, found from outside by name and parentage.
//!
//! ```text
//!  mainstay-guard (parent) ── mainstay-guard (child)     a guard of one process is its own parent and child
//! ```
//!
//! Numbers are those of the machine. A name can be read a moment before its process ends: a signal to one that has gone is
//! no error.

use std::fs;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Host;

/// The agent, as the kernel names it.
pub const AGENT: &str = "mainstayd";
/// The guard's processes.
pub const GUARD: &str = "mainstay-guard";
/// libvirt's daemon.
pub const LIBVIRTD: &str = "libvirtd";

/// The guard of a host; both the same if it has one process only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The process that systemd knows.
    pub parent: i32,
    /// The one that the first watches.
    pub child: i32,
}

/// All processes of a host with that name, in rising order.
pub fn named(host: &Host, name: &str) -> Result<Vec<i32>> {
    let mut found: Vec<i32> = host.group()?.pids().into_iter().map(Pid::as_raw).collect();
    found.retain(|pid| is_named(*pid, name));
    found.sort_unstable();
    Ok(found)
}

/// Whether a process has that name.
pub fn is_named(pid: i32, name: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
}

/// The guard that runs on a host.
pub fn guard(host: &Host) -> Result<Guard> {
    let all = named(host, GUARD)?;
    let parents: Vec<(i32, i32)> = all.iter().filter_map(|pid| Some((*pid, parent(*pid)?))).collect();
    pair(&parents).with_context(|| format!("{} runs no guard", host.name()))
}

/// Out of processes with their parents. One that stops everything at the end of a guard (`--stop-all`) has no child, and
/// is older than none that has.
fn pair(processes: &[(i32, i32)]) -> Option<Guard> {
    let is_guard = |pid: i32| processes.iter().any(|(other, _)| *other == pid);
    let with_child = processes.iter().find(|(_, parent)| is_guard(*parent));
    with_child
        .map(|(child, parent)| Guard { parent: *parent, child: *child })
        .or_else(|| processes.first().map(|(pid, _)| Guard { parent: *pid, child: *pid }))
}

fn parent(pid: i32) -> Option<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Sends a signal; a process that has gone is no error.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => bail!("{signal} to process {pid}: {errno}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pair_is_found_by_parentage() {
        type Processes = &'static [(i32, i32)];
        let cases: [(Processes, Option<Guard>); 4] = [
            (&[], None),
            (&[(20, 1)], Some(Guard { parent: 20, child: 20 })),
            (&[(20, 1), (21, 20)], Some(Guard { parent: 20, child: 21 })),
            (&[(5, 1), (20, 1), (21, 20)], Some(Guard { parent: 20, child: 21 })),
        ];
        for (processes, expected) in cases {
            assert_eq!(pair(processes), expected, "{processes:?}");
        }
    }

    #[test]
    fn a_signal_to_nobody_is_no_error() {
        assert!(is_named(std::process::id() as i32, fs::read_to_string("/proc/self/comm").unwrap().trim()));
        signal(i32::MAX - 1, Signal::SIGCONT).unwrap();
    }
}
