//! A host that stands still and goes on: nothing in it knows that time has passed.
//!
//! ```text
//!  VMs there   ▁▁▁▁▁▁▁▁ frozen ─────────────────── thaw ▁ ✕      gains at most 20 ms, then killed; writes get EIO
//!  elsewhere                    taken ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁
//! ```

use std::time::Duration;

use anyhow::Result;

use super::Ground;
use crate::judge::Wish;
use crate::lab::wait;

const VMS: usize = 3;
/// For CI; `--full` takes the whole minute.
const FROZEN: Duration = Duration::from_secs(20);
const FROZEN_FULL: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(8);
const KILLED_WITHIN: Duration = Duration::from_secs(15);

pub fn freeze(ground: &mut Ground) -> Result<()> {
    let time = if ground.full { FROZEN_FULL } else { FROZEN };
    for_time(ground, time)
}

/// Freezes a host for a time, within which its guests are taken; old copies are gone when it returns.
pub fn for_time(ground: &mut Ground, time: Duration) -> Result<()> {
    let victim = ground.subordinate()?;
    let guests = ground.gather(&victim, VMS)?;
    ground.watch()?;
    for guest in &guests {
        ground.expect(guest, Wish::Running { starts: 2 })?;
    }
    let old: Vec<i32> = guests.iter().map(|guest| ground.pid_of(guest)).collect::<Result<_>>()?;
    // One that never rests is the harder one to stop.
    ground.make_busy(&guests[0])?;
    let frozen = ground.fault(&format!("freeze {}", victim.name()), &guests)?;
    victim.freeze()?;
    ground.demand_started(&guests, frozen, &victim, LIMIT)?;
    // The length of the freeze is what is tried here.
    std::thread::sleep(time.saturating_sub(crate::judge::Moment::now().since(frozen)));
    let thawed = ground.judges()?.thaw(&victim.name());
    victim.thaw()?;
    wait(KILLED_WITHIN, "the old copies to be killed", || {
        let left = ground.lab().qemu_processes()?;
        Ok(left.iter().all(|qemu| !old.contains(&qemu.pid)).then_some(()))
    })?;
    let gone = crate::judge::Moment::now().since(thawed);
    ground.figure(format!("old copies gone {}", super::seconds(gone)));
    Ok(())
}
