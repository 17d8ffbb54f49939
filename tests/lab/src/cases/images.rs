//! Copies that people make of a VM: its memory in a file, its definition under another name, and a definition that changes.
//!
//! ```text
//!  virsh save ─► virsh restore: goes on          virsh save ─► started elsewhere ─► virsh restore: refused, image kept
//!  a clone with the same UUID, or with its disk ─► refused, names the owner
//!  virsh define while it runs ─► next generation ─► its host dies ─► runs elsewhere as it was changed
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::guest::Guest;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;

const ORDER: Duration = Duration::from_secs(30);
/// Where the image goes: libvirt's own folder, which its profile lets it write.
const IMAGE: &str = "/var/lib/libvirt/qemu/save/lab-case.save";
const DEFAULT: Duration = Duration::from_secs(8);

pub fn restore_after_run_elsewhere(ground: &mut Ground) -> Result<()> {
    let name = super::GUESTS[0].to_owned();
    let (guest, owner) = (Guest::new(&name)?, ground.host_of(&name)?);
    let other = ground.emptiest(&[owner])?;
    ground.watch()?;
    ground.fault(&format!("{name} is saved, restored, saved and started elsewhere"), std::slice::from_ref(&name))?;
    ground.expect(&name, Wish::Running { starts: 3 })?;

    save(ground, &name, &owner)?;
    agents::ask(&owner, ORDER, &["virsh", "-q", "restore", IMAGE]).context("restoring what ran nowhere since")?;
    let up = runs_on(ground, &name, &owner)?;
    ground.figure(format!("restored, generation {up}"));

    save(ground, &name, &owner)?;
    guest.define(&other, ground.lab().accelerator())?;
    agents::ask(&other, ORDER, &["virsh", "-q", "start", &name])?;
    runs_on(ground, &name, &other)?;
    let refused = match agents::ask(&owner, ORDER, &["virsh", "restore", IMAGE]) {
        Ok(_) => bail!("memory older than its disks was restored"),
        Err(why) => format!("{why:#}"),
    };
    if !refused.contains("saved under generation") || !refused.contains(&other.name()) {
        bail!("the refusal does not say why, or where it runs: {refused}");
    }
    agents::ask(&owner, ORDER, &["rm", IMAGE]).context("the refused image is gone")?;
    ground.figure(format!("refused, names {}", other.name()));
    Ok(())
}

/// Saves a guest's memory once its running domain says its generation, and waits until it is wanted stopped.
fn save(ground: &Ground, name: &str, host: &Host) -> Result<()> {
    let generation = ground.view()?.vm(name).and_then(|vm| vm.generation).context("its generation")?;
    wait(ORDER, "the running domain to say its generation", || {
        std::thread::sleep(Duration::from_millis(100));
        let said = agents::ask(host, ORDER, &["virsh", "-q", "metadata", name, "urn:mainstay:claim:1"]);
        let mark = format!("generation=\"{generation}\"");
        Ok(said.is_ok_and(|said| said.replace('\'', "\"").contains(&mark)).then_some(()))
    })?;
    agents::ask(host, ORDER, &["virsh", "-q", "save", name, IMAGE])?;
    ground
        .wait_view(&format!("{name} to be wanted stopped"), ORDER, |view| {
            view.vm(name).is_some_and(|vm| vm.wanted.as_deref() == Some("stopped") && vm.state == "off")
        })
        .map(drop)
}

/// Waits until it runs there with a claim; its generation.
fn runs_on(ground: &Ground, name: &str, host: &Host) -> Result<u64> {
    let view = ground.wait_view(&format!("{name} to run on {}", host.name()), ORDER, |view| {
        let vm = view.vm(name);
        vm.is_some_and(|vm| vm.state == "running" && vm.protected && vm.host.as_deref() == Some(&host.name()))
    })?;
    Ok(view.vm(name).and_then(|vm| vm.generation).unwrap_or_default())
}

pub fn clones(ground: &mut Ground) -> Result<()> {
    let name = super::GUESTS[1].to_owned();
    let (guest, owner) = (Guest::new(&name)?, ground.host_of(&name)?);
    let other = ground.emptiest(&[owner])?;
    ground.watch()?;
    ground.fault(&format!("clones of {name} are started"), &[])?;
    let same_id = format!("{name}-clone");
    guest.define_clone(&other, ground.lab().accelerator(), &same_id, guest.uuid())?;
    let refused = refused(&other, &same_id)?;
    if !refused.contains(&owner.name()) {
        bail!("the refusal of the same UUID does not name {}: {refused}", owner.name());
    }
    let same_disk = format!("{name}-copy");
    guest.define_clone(&other, ground.lab().accelerator(), &same_disk, Guest::new(&same_disk)?.uuid())?;
    let refused = self::refused(&other, &same_disk)?;
    if !refused.contains(&owner.name()) || !refused.contains(&guest.disk()) {
        bail!("the refusal of the same disk does not name {} and {}: {refused}", owner.name(), guest.disk());
    }
    ground.figure(format!("both refused, name {}", owner.name()));
    Ok(())
}

/// The text with which virsh refuses; the definition then goes.
fn refused(host: &Host, name: &str) -> Result<String> {
    let started = agents::ask(host, ORDER, &["virsh", "start", name]);
    agents::ask(host, ORDER, &["virsh", "-q", "undefine", name])?;
    match started {
        Ok(_) => bail!("the clone {name} was not refused"),
        Err(why) => Ok(format!("{why:#}")),
    }
}

pub fn edit_while_running(ground: &mut Ground) -> Result<()> {
    const TITLE: &str = "changed while it ran";
    let victim = ground.subordinate()?;
    let guests = ground.gather(&victim, 1)?;
    let name = guests.first().context("one guest was gathered")?.clone();
    let guest = Guest::new(&name)?;
    let before = ground.view()?.vm(&name).and_then(|vm| vm.generation).unwrap_or_default();
    ground.watch()?;
    let changed = Moment::now();
    guest.define_titled(&victim, ground.lab().accelerator(), TITLE)?;
    ground.wait_view("the change to be recorded", ORDER, |view| {
        view.vm(&name).is_some_and(|vm| vm.generation.is_some_and(|generation| before < generation))
    })?;
    ground.figure(format!("recorded {}", seconds(Moment::now().since(changed))));
    let (killed, guests) = ground.kill(&victim)?;
    ground.demand_started(&guests, killed, &victim, DEFAULT)?;
    let host = ground.host_of(&name)?;
    let xml = agents::ask(&host, ORDER, &["virsh", "dumpxml", "--inactive", &name])?;
    if !xml.contains(TITLE) {
        bail!("{name} runs on {} as it was before its change", host.name());
    }
    // For the cases to come.
    let now = runs_on(ground, &name, &host)?;
    guest.define(&host, ground.lab().accelerator())?;
    ground
        .wait_view("the change back to be recorded", ORDER, |view| {
            view.vm(&name).is_some_and(|vm| vm.generation.is_some_and(|generation| now < generation))
        })
        .map(drop)
}
