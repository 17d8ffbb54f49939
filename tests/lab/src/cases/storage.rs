//! Storage that does not answer, or is full: promise 2, a stall costs a pause and never a VM.
//!
//! ```text
//!  hangs for all     every lease lapses, nobody may take; with the first answer owners re-claim and go on
//!  hangs for one     the others attest its counter: its lease stands, its VMs only wait for their disks
//!  full              beats fail, guests get ENOSPC and are paused; room again: they go on
//!                    a person resumes one meanwhile: the guard's stop stands, and the agent says why
//! ```

use std::time::Duration;

use anyhow::{Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;
use crate::storage::Fault;

const HANG: Duration = Duration::from_secs(20);
/// With `--full`.
const HANG_FULL: Duration = Duration::from_secs(60);
const FULL: Duration = Duration::from_secs(12);
const GOES_ON: Duration = Duration::from_secs(2);
/// Writes in a row after which a guest surely runs: the first may be one that was held.
const WRITES: usize = 3;

pub fn hangs_for_all(ground: &mut Ground) -> Result<()> {
    let hosts = ground.hosts();
    let time = if ground.full { HANG_FULL } else { HANG };
    strike(ground, &hosts, Fault::Hang, time, |_| Ok(()))
}

pub fn hangs_for_one(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    let name = victim.name();
    let from = Moment::now();
    strike(ground, &[victim], Fault::Hang, HANG, |ground| {
        let other = ground.others(&[victim])[0];
        let what = format!("{name} to be seen without storage");
        let seen = ground.wait_view_of(&other, &what, Duration::from_secs(15), |view| {
            view.host(&name).is_some_and(|host| host.verdict == "storage-lost")
        });
        seen.map(drop)
    })?;
    let notes = agents::all_notes(&ground.hosts_on(), Moment::now().since(from));
    let touched =
        |note: &&agents::Note| from <= note.at() && ["vm-doubt", "vm-stopped-by-guard"].contains(&&*note.kind);
    if let Some(note) = notes.iter().find(touched) {
        bail!("its lease stands by the others' word, and still: {}", note.text);
    }
    Ok(())
}

pub fn resume_held(ground: &mut Ground) -> Result<()> {
    let guest = super::GUESTS[0].to_owned();
    let (id, host) = (ground.id(&guest), ground.host_of(&guest)?);
    let hosts = ground.hosts();
    strike(ground, &hosts, Fault::Enospc, FULL, |ground| {
        let what = format!("{guest} to be stopped by the guard, with the reason");
        ground.wait_view_of(&host, &what, Duration::from_secs(10), |view| {
            let vm = view.vm(&guest).filter(|vm| vm.state == "stopped-by-guard");
            vm.is_some_and(|vm| vm.why.as_ref().is_some_and(|why| why.contains("virsh resume")))
        })?;
        let asked = ground.judges()?.mark(&format!("virsh resume {guest}"));
        // It waits for a process that stands: its answer does not come.
        drop(agents::ask(&host, Duration::from_secs(1), &["virsh", "-q", "resume", &guest]));
        let held = |note: &agents::Note| note.kind == "vm-resume-held" && note.vm.as_deref() == Some(&*guest);
        let note = ground.wait_note(asked, "the resume in vain", Duration::from_secs(5), held)?;
        ground.figure(format!("told {} later", seconds(note.at().since(asked))));
        if ground.judges()?.executed(id, asked).is_some() {
            bail!("{guest} executed after its lease had lapsed");
        }
        Ok(())
    })
}

pub fn full(ground: &mut Ground) -> Result<()> {
    let hosts = ground.hosts();
    strike(ground, &hosts, Fault::Enospc, FULL, |ground| {
        let seen = ground.wait_view("the trouble to be named", Duration::from_secs(10), |view| {
            view.datastores.iter().any(|store| store.trouble.as_ref().is_some_and(|why| why.contains("space")))
        });
        seen.map(drop)
    })
}

/// The fault for these hosts, `time` long; `meanwhile` says what must be seen. All guests go on with the same QEMU.
fn strike(
    ground: &mut Ground,
    hosts: &[Host],
    fault: Fault,
    time: Duration,
    meanwhile: impl FnOnce(&mut Ground) -> Result<()>,
) -> Result<()> {
    let placed = ground.placement()?;
    let reach: Vec<String> =
        placed.iter().filter(|(_, host)| hosts.contains(host)).map(|(guest, _)| guest.clone()).collect();
    let pids: Vec<i32> = reach.iter().map(|guest| ground.pid_of(guest)).collect::<Result<_>>()?;
    ground.watch()?;
    let from = ground.fault(&format!("storage: {fault:?}"), &reach)?;
    let storage = ground.lab().storage()?;
    for host in hosts {
        storage.fault(&host.name(), fault)?;
    }
    let seen = meanwhile(ground);
    // The length of the fault is what is tried here.
    std::thread::sleep(time.saturating_sub(Moment::now().since(from)));
    let healed = ground.judges()?.mark("the storage answers");
    for host in hosts {
        storage.fault(&host.name(), Fault::None)?;
    }
    seen?;
    let judges = ground.judges()?;
    let mut last = Moment::default();
    for guest in &reach {
        let id = ground.id(guest);
        let ran =
            wait(Duration::from_secs(40), &format!("{guest} to execute again"), || Ok(judges.executed(id, healed)))?;
        last = last.max(ran);
        wait(Duration::from_secs(20), &format!("{guest} to write again"), || {
            Ok(judges.writes_since(id, healed).get(WRITES).map(drop))
        })?;
    }
    ground.within("run again", last.since(healed), GOES_ON)?;
    for (guest, pid) in reach.iter().zip(pids) {
        if ground.pid_of(guest)? != pid {
            bail!("{guest} has another QEMU than before, {} after the fault began", seconds(Moment::now().since(from)));
        }
    }
    Ok(())
}
