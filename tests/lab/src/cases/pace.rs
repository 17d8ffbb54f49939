//! How fast this machine is at what no product can hasten: libvirt and QEMU start guests.
//!
//! ```text
//!  a start came late ─► as many guests that nobody protects, by virsh, on the same hosts at once ─► longer than USUAL by …
//! ```
//!
//! Limits of failovers stand for the product. Where QEMU alone needs a second more than on the machines on which the limits were set,
//! a limit would say nothing about it. Only looked at when a limit was missed, when all guests are up and the lab is at rest; what a
//! limit was exceeded by is told with both figures. libvirt asks Mainstay's hook for these guests, too: a hook that got slow would hide
//! in the comparison, by MOST at most.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::agents;
use crate::guest::{Accelerator, Guest};
use crate::host::Host;

/// Three guests at once on two hosts, where the limits were set (two cores, guests by TCG).
const USUAL: Duration = Duration::from_millis(600);

/// No limit gets longer by more: where QEMU alone needs that long, failovers cannot be measured.
const MOST: Duration = Duration::from_millis(1500);

/// For one call of virsh.
const CALL: Duration = Duration::from_secs(60);

/// By how much longer guests need to start here, one on each of these hosts (which may be there more than once); at most 1.5 s.
///
/// # Errors
/// One does not start.
pub fn behind(hosts: &[Host], accelerator: Accelerator) -> Result<Duration> {
    let start = |(n, host): (usize, &Host)| -> Result<Duration> {
        let guest = Guest::new(&format!("alone-{n}"))?;
        let file = guest.write_diskless(host, accelerator)?;
        let began = Instant::now();
        agents::ask(host, CALL, &["virsh", "-q", "create", &file])?;
        let took = began.elapsed();
        agents::ask(host, CALL, &["virsh", "-q", "destroy", guest.name()])?;
        Ok(took)
    };
    let all: Vec<Result<Duration>> = std::thread::scope(|scope| {
        let running: Vec<_> = hosts.iter().enumerate().map(|of| scope.spawn(move || start(of))).collect();
        running.into_iter().map(|one| one.join().expect("it does not panic")).collect()
    });
    let all = all.into_iter().collect::<Result<Vec<Duration>>>().context("starting guests that nobody protects")?;
    Ok(all.into_iter().max().unwrap_or_default().saturating_sub(USUAL).min(MOST))
}
