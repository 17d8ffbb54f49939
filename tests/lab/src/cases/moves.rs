//! Live migrations by `mainstay vm move`, and hosts that die in the middle of one.
//!
//! ```text
//!  source runs ─── pre-copy ───┬─ switch ─► source's guard says over ─► target runs       gap: at most 1 s
//!  target waits, paused ───────┘
//!        ├─ target dies here: the source goes on, same process
//!        └─ source dies here: the target's copy is thrown away, the VM is restarted once from its disk
//! ```

use std::time::Duration;

use anyhow::{Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;

/// For CI; `--full` moves ten times.
const MOVES: usize = 3;
const MOVES_FULL: usize = 10;
const GAP: Duration = Duration::from_secs(1);
/// After a move: time for writes that show the end of the gap.
const AFTER: Duration = Duration::from_millis(1500);

pub fn back_and_forth(ground: &mut Ground) -> Result<()> {
    let guest = super::GUESTS[0].to_owned();
    let count = if ground.full { MOVES_FULL } else { MOVES };
    ground.watch()?;
    ground.expect(&guest, Wish::Running { starts: 1 + count })?;
    let since = ground.fault(&format!("{count} moves of {guest}"), std::slice::from_ref(&guest))?;
    let (id, mut longest) = (ground.id(&guest), Duration::ZERO);
    for _ in 0..count {
        let from = ground.host_of(&guest)?;
        let to = ground.emptiest(&[from])?;
        let begun = ground.judges()?.mark(&format!("move {guest} from {} to {}", from.name(), to.name()));
        ground.move_guest(&guest, &to)?;
        let done = Moment::now();
        wait(Duration::from_secs(15), &format!("{guest} to run on {} only", to.name()), || {
            let there = ground.host_of(&guest)?;
            let running = ground.judges()?.running(id);
            let runs = there == to && running.len() == 1 && running[0].host == to.name();
            Ok((runs && AFTER < Moment::now().since(done)).then_some(()))
        })?;
        longest = longest.max(ground.judges()?.longest_gap(id, begun, Moment::now()));
        ground.figure(format!("move {}", seconds(done.since(begun))));
    }
    if ground.judges()?.boots(id, since) != 1 {
        bail!("{guest} was booted anew instead of moved");
    }
    ground.within("longest gap", longest, GAP)
}

/// Begins a move; returns when the target's QEMU receives.
fn begin(ground: &Ground, guest: &str, to: &Host) -> Result<std::thread::JoinHandle<Result<()>>> {
    let (id, to_name) = (ground.id(guest), to.name());
    // Asked on a host that has no part in it, which will be there for the answer.
    let from = ground.host_of(guest)?;
    let third = ground.others(&[from, *to]).first().copied().unwrap_or(from);
    let args = ["mainstay".into(), "vm".into(), "move".into(), guest.to_owned(), "--to".into(), to_name.clone()];
    let order = std::thread::spawn(move || {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        agents::ask(&third, Duration::from_secs(60), &args).map(drop)
    });
    wait(Duration::from_secs(15), &format!("a QEMU of {guest} on {to_name}"), || {
        if order.is_finished() {
            bail!("the move ended before it was seen");
        }
        let there = ground.lab().qemu_processes()?.into_iter().any(|qemu| qemu.uuid == id && qemu.host == to_name);
        Ok(there.then_some(()))
    })?;
    Ok(order)
}

pub fn target_killed(ground: &mut Ground) -> Result<()> {
    let target = ground.subordinate()?;
    let others = ground.gather(&target, 1)?;
    let source = ground.others(&[target])[0];
    let guest = ground.guests_on(&source)?.remove(0);
    let pid = ground.pid_of(&guest)?;
    ground.watch()?;
    let mut reach = others.clone();
    reach.push(guest.clone());
    ground.fault(&format!("move {guest} to {}", target.name()), &reach)?;
    let order = begin(ground, &guest, &target)?;
    for other in &others {
        ground.expect(other, Wish::Running { starts: 2 })?;
    }
    let killed = ground.judges()?.mark(&format!("kill {}", target.name()));
    ground.lab().kill(&target)?;
    ground.wait_started(&others, killed, Duration::from_secs(60))?;
    let (id, judges) = (ground.id(&guest), ground.judges()?);
    wait(Duration::from_secs(60), &format!("{guest} to go on at the source"), || {
        Ok(judges.writes_since(id, killed).len().ge(&20).then_some(()))
    })?;
    drop(order); // Its answer is not the question; it ends by itself.
    if ground.pid_of(&guest)? != pid {
        bail!("{guest} has another QEMU than before");
    }
    let gap = ground.judges()?.longest_gap(id, killed, Moment::now());
    ground.figure(format!("goes on at {}, gap {}", source.name(), seconds(gap)));
    Ok(())
}

pub fn source_killed(ground: &mut Ground) -> Result<()> {
    let source = ground.subordinate()?;
    ground.gather(&source, 1)?;
    let guest = ground.guests_on(&source)?.remove(0);
    let target = ground.emptiest(&[source])?;
    ground.watch()?;
    ground.fault(&format!("move {guest} from {}", source.name()), std::slice::from_ref(&guest))?;
    let order = begin(ground, &guest, &target)?;
    let incoming: Vec<i32> = incoming(ground, &guest, &target)?;
    ground.expect(&guest, Wish::Running { starts: 2 })?;
    let killed = ground.judges()?.mark(&format!("kill {}", source.name()));
    ground.lab().kill(&source)?;
    let starts = ground.wait_started(std::slice::from_ref(&guest), killed, Duration::from_secs(60))?;
    ground.figure(format!("restarted on {} {}", starts[0].host, seconds(starts[0].ran.since(killed))));
    if incoming.contains(&starts[0].pid) {
        bail!("{guest} goes on in the copy that was coming in: its memory may be older than its disk");
    }
    let (id, judges) = (ground.id(&guest), ground.judges()?);
    wait(Duration::from_secs(30), &format!("a new boot of {guest}"), || Ok(judges.guest_up(id, killed)))?;
    if order.is_finished() {
        ground.figure("the order was answered".to_owned());
    }
    Ok(())
}

fn incoming(ground: &Ground, guest: &str, target: &Host) -> Result<Vec<i32>> {
    let (id, name) = (ground.id(guest), target.name());
    Ok(ground.lab().qemu_processes()?.iter().filter(|q| q.uuid == id && q.host == name).map(|q| q.pid).collect())
}
