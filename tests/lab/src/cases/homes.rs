//! Homes: people copy the disk of a running guest to another datastore, and its claims follow.
//!
//! ```text
//!  virsh blockcopy --pivot ─► home is the other datastore ─► its host dies ─► starts elsewhere, from there
//!      ─► stopped, defined as it was, started ─► home is the first datastore again
//! ```
//!
//! The other datastore is a folder of the lab's, with claims, beats and leases of its own. The judges look at a disk by the
//! guest's name: behind the datastore that name is given to the copy.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::guest::Guest;
use crate::judge::{Moment, Wish};
use crate::lab::wait;

const ORDER: Duration = Duration::from_secs(60);
const DEFAULT: Duration = Duration::from_secs(8);
const OTHER: &str = "other";

pub fn follows_blockcopy(ground: &mut Ground) -> Result<()> {
    ground.spoiled = true; // A datastore cannot be removed again.
    let victim = ground.subordinate()?;
    let name = ground.gather(&victim, 1)?.first().context("one guest was gathered")?.clone();
    let guest = Guest::new(&name)?;
    let (here, store) = (format!("/srv/shared/{OTHER}"), ground.lab().store());
    fs::create_dir_all(store.join(OTHER))?;
    let fence = ground.view()?.datastores.first().context("the lab's datastore")?.fence.clone();
    let add = ["mainstay", "datastore", "add", OTHER, &here, "--fence", &fence];
    agents::ask(&victim, ORDER, &add)?;
    let hosts = ground.hosts_on().len();
    ground.wait_view("leases on the other datastore", ORDER, |view| {
        let other = view.datastores.iter().find(|datastore| datastore.name == OTHER);
        other.is_some_and(|other| other.lease == "valid" && other.reached_by.len() == hosts)
    })?;

    let image = format!("{here}/{}", guest.disk());
    let copy = ["virsh", "-q", "blockcopy", &name, "vda", &image, "--format", "raw", "--wait", "--pivot"];
    agents::ask(&victim, ORDER, &[&copy[..], &["--transient-job"]].concat()).context("copying its disk")?;
    let copied = Moment::now();
    home_is(ground, &name, OTHER)?;
    ground.figure(format!("home followed {}", seconds(Moment::now().since(copied))));
    let old = store.join(guest.disk());
    fs::remove_file(&old)?;
    fs::hard_link(store.join(OTHER).join(guest.disk()), &old)?;

    ground.watch()?;
    let (killed, guests) = ground.kill(&victim)?;
    ground.demand_started(&guests, killed, &victim, DEFAULT)?;
    let host = ground.host_of(&name)?;
    let xml = agents::ask(&host, ORDER, &["virsh", "dumpxml", &name])?;
    if !xml.contains(&image) {
        bail!("{name} runs on {} with another disk than {image}", host.name());
    }
    home_is(ground, &name, OTHER)?;

    ground.expect(&name, Wish::Running { starts: 3 })?;
    // Back, by a start from another definition.
    agents::ask(&host, ORDER, &["virsh", "-q", "destroy", &name])?;
    wait(ORDER, &format!("{name} to be wanted stopped"), || {
        let view = ground.view()?;
        Ok(view.vm(&name).is_some_and(|vm| vm.wanted.as_deref() == Some("stopped")).then_some(()))
    })?;
    guest.define(&host, ground.lab().accelerator())?;
    guest.start(&host)?;
    home_is(ground, &name, "shared")?;
    ground.figure("and back by a start".to_owned());
    Ok(())
}

fn home_is(ground: &Ground, name: &str, store: &str) -> Result<()> {
    let there = |vm: &agents::VmView| vm.home.as_deref() == Some(store) && vm.state == "running" && vm.protected;
    ground
        .wait_view(&format!("the home of {name} to be {store}"), ORDER, |view| view.vm(name).is_some_and(there))
        .map(drop)
}
