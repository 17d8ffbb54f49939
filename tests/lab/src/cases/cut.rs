//! Cables: a host that nobody hears, with and without its storage.
//!
//! ```text
//!  cut from all hosts              beats on disk go on ──► partitioned; nothing is touched; healed: one master
//!  cut from everything             the same ──► isolated; nothing is touched, but what has another isolation response
//!  network cut, storage hangs      its guard stops its VMs before L ──► lease proven over ──► taken elsewhere
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;
use crate::network;
use crate::storage::Fault;

/// Of the profile `default`.
const LEASE: Duration = Duration::from_secs(5);
const SUSPECT: Duration = Duration::from_secs(3);
/// Long enough that every rule about silence has had its chance: three leases.
const CUT: Duration = Duration::from_secs(15);
const TWO_BEATS: Duration = Duration::from_secs(2);
/// Three hosts are asked by command line, at the same time.
const ASKING: Duration = Duration::from_millis(500);
const VMS: usize = 3;
/// From the response to the VM's start elsewhere.
const RESPONSE: Duration = Duration::from_secs(6);

pub fn subordinate(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    cut(ground, &victim, "isolated", network::cut_host)
}

pub fn master(ground: &mut Ground) -> Result<()> {
    let victim = ground.master()?;
    cut(ground, &victim, "partitioned", network::cut_from_hosts)
}

fn cut(ground: &mut Ground, victim: &Host, becomes: &str, cut_it: fn(&Host) -> Result<()>) -> Result<()> {
    let name = victim.name();
    let Some(other) = ground.others(&[*victim]).first().copied() else { bail!("there is only one host") };
    ground.watch()?;
    let from = ground.fault(&format!("cut {name}"), &[])?;
    cut_it(victim)?;
    ground.wait_view_of(&other, &format!("{name} to be {becomes}"), SUSPECT + Duration::from_secs(15), |view| {
        view.host(&name).is_some_and(|host| host.verdict == becomes)
    })?;
    ground.figure(format!("{becomes} {}", seconds(Moment::now().since(from))));
    // How long it lasts is what is tried here; what may not happen meanwhile, the judges see.
    while Moment::now().since(from) < CUT {
        let view = crate::agents::view(&other)?;
        let verdict = &view.host(&name).context("the host is known")?.verdict;
        if verdict != becomes {
            bail!("{name} became {verdict} after {}", seconds(Moment::now().since(from)));
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    let healed = ground.judges()?.mark("heal");
    network::heal()?;
    let at = wait(Duration::from_secs(20), "one master for all", || {
        std::thread::sleep(Duration::from_millis(50));
        let asked = Moment::now();
        let views = ground.views()?;
        let master = views.first().and_then(|(_, view)| view.master.clone());
        let same = views.iter().all(|(_, view)| master.is_some() && view.master == master);
        Ok(same.then_some(asked))
    })?;
    ground.within("one master", at.since(healed), TWO_BEATS + ASKING)?;
    ground.wait_cluster()
}

/// What is of no use without this host's network is ended there, and runs elsewhere.
pub fn isolated(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    let guests = ground.gather(&victim, VMS)?;
    let [off, down, stays] = guests.as_slice() else { bail!("three guests were asked for") };
    ground.set_rules(&format!(
        "[[isolation]]\nvms = [{off:?}]\nresponse = \"power-off\"\n\
         [[isolation]]\nvms = [{down:?}]\nresponse = {{ shutdown = {{ within_s = 30 }} }}\n"
    ))?;
    ground.watch()?;
    let moved = [off.clone(), down.clone()];
    for guest in &moved {
        ground.expect(guest, Wish::Running { starts: 2 })?;
    }
    let from = ground.fault(&format!("cut {}", victim.name()), &moved)?;
    network::cut_host(&victim)?;
    let note = ground.wait_note(from, "the response", Duration::from_secs(30), |note| {
        note.kind == "isolation-response" && note.vm.as_ref() == Some(off)
    })?;
    ground.figure(format!("response after {}", seconds(note.at().since(from))));
    ground.demand_started(&moved[..1], note.at(), &victim, RESPONSE)?;
    let starts = ground.wait_started(&moved[1..], note.at(), Duration::from_secs(40))?;
    ground.figure(format!("the one that was shut down started {}", seconds(starts[0].ran.since(note.at()))));
    if starts[0].host == victim.name() || ground.host_of(stays)? != victim {
        bail!("{down} was to run elsewhere, and {stays} to stay");
    }
    ground.judges()?.mark("heal");
    network::heal()?;
    ground.wait_cluster()?;
    ground.set_rules("")
}

/// No network and no storage: the host must stop its VMs by its own clock.
pub fn and_hang(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    let guests = ground.gather(&victim, VMS)?;
    ground.watch()?;
    for guest in &guests {
        ground.expect(guest, Wish::Running { starts: 2 })?;
    }
    let name = victim.name();
    let old: Vec<i32> = guests.iter().map(|guest| ground.pid_of(guest)).collect::<Result<_>>()?;
    // One that never rests is the harder one to stop.
    ground.make_busy(&guests[0])?;
    let from = ground.fault(&format!("cut {name} and hang its storage"), &guests)?;
    network::cut_host(&victim)?;
    ground.lab().storage()?.fault(&name, Fault::Hang)?;
    let last_chance = Moment::now();
    ground.demand_started(&guests, from, &victim, Duration::from_secs(8))?;
    let judges = ground.judges()?;
    for guest in &guests {
        let gained = judges.gained_since(ground.id(guest), &name, last_chance.plus(LEASE)).unwrap_or_default();
        if Duration::ZERO < gained {
            bail!("{guest} executed for {} on {name} after L had passed", seconds(gained));
        }
    }
    let healed = ground.judges()?.mark("heal");
    ground.lab().storage()?.fault(&name, Fault::None)?;
    network::heal()?;
    wait(Duration::from_secs(20), "the old copies to be killed", || {
        let left = ground.lab().qemu_processes()?;
        Ok(left.iter().all(|qemu| !old.contains(&qemu.pid)).then_some(()))
    })?;
    ground.figure(format!("old copies gone {}", seconds(Moment::now().since(healed))));
    Ok(())
}
