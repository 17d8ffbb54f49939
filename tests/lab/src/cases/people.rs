//! What people do: with virsh, inside guests, and with a host's power button.
//!
//! ```text
//!  virsh start     runs elsewhere ──► refused, names the owner        runs nowhere ──► claimed, started
//!  virsh shutdown, poweroff inside, virsh destroy ──► wanted stopped ──► host dies ──► stays down
//!  poweroff of a host ──► its guests are shut down, by the host ──► wanted running ──► run elsewhere
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::guest::Guest;
use crate::host::{Host, Power};
use crate::judge::{Moment, Wish};
use crate::lab::wait;

const ORDER: Duration = Duration::from_secs(30);
/// A guest powers off in about two seconds.
const GOES_DOWN: Duration = Duration::from_secs(30);
/// After a VM that should be restarted was: time for one that should not be.
const AFTERWARDS: Duration = Duration::from_secs(5);

pub fn virsh_start(ground: &mut Ground) -> Result<()> {
    let name = super::GUESTS[1].to_owned();
    let (guest, owner) = (Guest::new(&name)?, ground.host_of(&name)?);
    let other = ground.emptiest(&[owner])?;
    ground.watch()?;
    ground.fault("virsh start of a VM that runs elsewhere", &[])?;
    let refused = start_refused(ground, &guest, &other)
        .with_context(|| format!("virsh start of {name} on {}, which runs on {}", other.name(), owner.name()))?;
    if !refused.contains(&owner.name()) {
        bail!("the refusal does not name {}: {refused}", owner.name());
    }
    ground.figure(format!("refused, names {}", owner.name()));

    ground.fault(&format!("virsh destroy of {name}"), std::slice::from_ref(&name))?;
    ground.expect(&name, Wish::Running { starts: 2 })?;
    agents::ask(&owner, ORDER, &["virsh", "-q", "destroy", &name])?;
    let down = ground.wait_view(&format!("{name} to be wanted stopped"), GOES_DOWN, |view| {
        view.vm(&name).is_some_and(|vm| vm.wanted.as_deref() == Some("stopped") && vm.state == "off")
    })?;
    let before = down.vm(&name).and_then(|vm| vm.generation).unwrap_or_default();
    agents::ask(&owner, ORDER, &["virsh", "-q", "start", &name]).context("virsh start of a VM that runs nowhere")?;
    let up = ground.wait_view(&format!("{name} to run with a claim"), ORDER, |view| {
        view.vm(&name).is_some_and(|vm| vm.state == "running" && vm.protected && vm.host == Some(owner.name()))
    })?;
    let after = up.vm(&name).and_then(|vm| vm.generation).unwrap_or_default();
    if after <= before {
        bail!("virsh start made no claim: generation {before} before, {after} after");
    }
    ground.figure(format!("generation {before} to {after}"));
    Ok(())
}

/// The text with which virsh refuses.
fn start_refused(ground: &Ground, guest: &Guest, host: &Host) -> Result<String> {
    guest.define_otherwise(host, ground.lab().accelerator())?;
    let started = agents::ask(host, ORDER, &["virsh", "start", guest.name()]);
    agents::ask(host, ORDER, &["virsh", "-q", "undefine", guest.name()])?;
    match started {
        Ok(_) => bail!("it was not refused"),
        Err(why) => Ok(format!("{why:#}")),
    }
}

pub fn stays_down(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    let guests = ground.gather(&victim, 4)?;
    let [by_person, by_itself, by_force, canary] = guests.as_slice() else { bail!("four guests were asked for") };
    let down = [by_person, by_itself, by_force];
    ground.watch()?;
    ground.fault("three VMs are stopped", &[by_person.clone(), by_itself.clone(), by_force.clone()])?;
    for guest in down {
        ground.expect(guest, Wish::Stopped)?;
    }
    agents::ask(&victim, ORDER, &["virsh", "-q", "shutdown", by_person])?;
    Guest::new(by_itself)?.tell(&ground.lab().store(), "poweroff")?;
    agents::ask(&victim, ORDER, &["virsh", "-q", "destroy", by_force])?;
    ground.wait_view("three VMs to be wanted stopped", GOES_DOWN, |view| {
        down.iter().all(|guest| view.vm(guest).is_some_and(|vm| vm.wanted.as_deref() == Some("stopped")))
    })?;
    let reach: Vec<String> = guests.clone();
    let killed = ground.fault(&format!("kill {}", victim.name()), &reach)?;
    ground.expect(canary, Wish::Running { starts: 2 })?;
    ground.lab().kill(&victim)?;
    // Once the one that should run does, the others had the same chance.
    let starts = ground.wait_started(std::slice::from_ref(canary), killed, Duration::from_secs(40))?;
    ground.figure(format!("{canary} started {}", seconds(starts[0].ran.since(killed))));
    std::thread::sleep(AFTERWARDS);
    for guest in down {
        if ground.judges()?.started(ground.id(guest), killed).is_some() || ground.host_of(guest).is_ok() {
            bail!("{guest} was stopped on purpose and runs again");
        }
    }
    Ok(())
}

pub fn host_poweroff(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    let guests = ground.gather(&victim, 2)?;
    ground.watch()?;
    for guest in &guests {
        ground.expect(guest, Wish::Running { starts: 2 })?;
    }
    let off = ground.fault(&format!("poweroff of {}", victim.name()), &guests)?;
    // Its answer may be cut off by what it asks for.
    let _ = agents::ask(&victim, Duration::from_secs(5), &["systemctl", "--no-block", "poweroff"]);
    let starts = ground.wait_started(&guests, off, Duration::from_secs(150))?;
    if starts.iter().any(|start| start.host == victim.name()) {
        bail!("a guest was started on the host that goes down");
    }
    let last = starts.iter().map(|start| start.ran.since(off)).max().unwrap_or_default();
    ground.figure(format!("run elsewhere {}", seconds(last)));
    wait(Duration::from_secs(120), &format!("{} to be off", victim.name()), || {
        Ok((victim.power()? == Power::Off).then_some(()))
    })?;
    ground.figure(format!("host off {}", seconds(Moment::now().since(off))));
    ground.wait_view("the VMs to be wanted running", ORDER, |view| {
        guests.iter().all(|guest| view.vm(guest).is_some_and(|vm| vm.wanted.as_deref() == Some("running")))
    })?;
    Ok(())
}
