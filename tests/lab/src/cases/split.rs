//! Network and storage that part differently, so that who decides and who can act are not the same.
//!
//! ```text
//!  storage-split   the master's path hangs, a host dies     another host proves the lapse, and starts what the master orders
//!                  a person stops one of the dead host's    another host writes that down
//!  delegate-dies   the master's path hangs, a host dies,    the next host does it
//!                  and then the one that is to start its VM
//!  split-both      h1 without network and storage,          its VM may run nowhere else: it waits, says so, and goes on there when all
//!                  h2 without storage                       is healed; h2's VMs go on by attestation
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;
use crate::network;
use crate::storage::Fault;

/// As without a split, and half a second for the way through another host.
const STARTED: Duration = Duration::from_millis(8500);
/// The same by the second host that is ordered to: another lease, and another fence, on a lab of four hosts.
const STARTED_BY_NEXT: Duration = Duration::from_secs(10);
/// From when a datastore answers again.
const HEALS: Duration = Duration::from_secs(3);
/// Longer than the lease, and what follows from its end.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn storage_of_the_master(ground: &mut Ground) -> Result<()> {
    let (master, owner, other) = roles(ground)?;
    ground.gather(&owner, 3)?;
    hang_storage(ground, &master, &other)?;
    let (killed, guests) = ground.kill(&owner)?;
    let stopped = guests.last().context("it has guests")?.clone();
    ground.expect(&stopped, Wish::Stopped)?;
    // It is answered when it is written down.
    agents::ask(&master, PATIENCE, &["mainstay", "vm", "stop", &stopped])?;
    ground.figure(format!("the stop of {stopped} written down {}", seconds(Moment::now().since(killed))));
    ground.demand_started(&guests[..guests.len() - 1], killed, &owner, STARTED)?;
    ground.wait_view_of(&other, &format!("{stopped} to be wanted stopped"), PATIENCE, |view| {
        view.vm(&stopped).is_some_and(|vm| vm.wanted.as_deref() == Some("stopped") && vm.state == "off")
    })?;
    ground.judges()?.mark("heal");
    ground.lab().storage()?.fault(&master.name(), Fault::None)
}

pub fn delegate_dies(ground: &mut Ground) -> Result<()> {
    ground.grow(4)?;
    let (master, owner, other) = roles(ground)?;
    let guest = ground.gather(&owner, 1)?.remove(0);
    hang_storage(ground, &master, &other)?;
    let (killed, _) = ground.kill(&owner)?;
    let to = format!("{guest} is to run on ");
    let note = ground.wait_note(killed, "an order to start it", PATIENCE, |note| note.text.starts_with(&to))?;
    let delegate = note.text[to.len()..].split(':').next().context("a host is named")?.to_owned();
    let delegate = ground.lab().host(&delegate)?;
    let (again, mut guests) = ground.kill(&delegate)?;
    guests.retain(|other| *other != guest);
    guests.push(guest.clone());
    ground.expect(&guest, Wish::Running { starts: 3 })?; // It may have begun there.
    ground.figure(format!("{} killed {} after the order", delegate.name(), seconds(again.since(note.at()))));
    ground.demand_started(&guests, again, &delegate, STARTED_BY_NEXT)?;
    ground.judges()?.mark("heal");
    ground.lab().storage()?.fault(&master.name(), Fault::None)
}

pub fn both_differently(ground: &mut Ground) -> Result<()> {
    let (other, alone, blind) = roles(ground)?;
    let guests = ground.gather(&alone, 1)?; // One that was taken would have this host fenced until its next boot.
    let bound = &guests[0];
    let name = alone.name();
    ground.set_rules(&format!(
        "[[placement]]\nvms = [{bound:?}]\nhosts = [{name:?}]\nplace = \"only\"\nforce = \"must\"\n"
    ))?;
    let of_blind = ground.guests_on(&blind)?;
    ground.watch()?;
    let mut reach = guests.clone();
    reach.extend(of_blind);
    ground.fault(&format!("cut {name}, its storage and that of {} hang", blind.name()), &reach)?;
    network::cut_host(&alone)?;
    let storage = ground.lab().storage()?;
    storage.fault(&name, Fault::Hang)?;
    storage.fault(&blind.name(), Fault::Hang)?;
    let view = ground.wait_view_of(&other, &format!("{bound} to wait, and to say so"), PATIENCE, |view| {
        view.vm(bound).and_then(|vm| vm.why.as_ref()).is_some_and(|why| why.contains("placement rule 1"))
    })?;
    ground.figure(view.vm(bound).and_then(|vm| vm.why.clone()).unwrap_or_default());
    let healed = ground.judges()?.mark("heal");
    for host in [&name, &blind.name()] {
        ground.lab().storage()?.fault(host, Fault::None)?;
    }
    network::heal()?;
    let what = format!("{bound} to go on");
    let on = wait(PATIENCE, &what, || Ok(ground.judges()?.executed(ground.id(bound), healed)))?;
    if ground.host_of(bound)? != alone {
        bail!("{bound} may only run on {name}");
    }
    ground.within(&format!("{bound} goes on"), on.since(healed), HEALS)?;
    ground.wait_cluster()?;
    ground.set_rules("")
}

/// The judges watch, and the master loses its path; its guests are on the other one before, since they could read nothing from their disks.
fn hang_storage(ground: &mut Ground, master: &Host, other: &Host) -> Result<()> {
    while let Some(guest) = ground.guests_on(master)?.pop() {
        ground.bring(&guest, other)?;
    }
    ground.watch()?;
    ground.fault(&format!("the storage of {}, the master, hangs", master.name()), &[])?;
    ground.lab().storage()?.fault(&master.name(), Fault::Hang)?;
    ground.wait_view_of(master, "the master to say that it has no storage", PATIENCE, |view| {
        view.datastores.iter().any(|store| store.trouble.is_some())
    })?;
    Ok(())
}

/// The master, and two others.
fn roles(ground: &Ground) -> Result<(Host, Host, Host)> {
    let master = ground.master()?;
    match ground.others(&[master])[..] {
        [first, second, ..] => Ok((master, first, second)),
        _ => bail!("three hosts are needed"),
    }
}
