//! What administrators plan: maintenance, and rules for the order and the places of VMs.
//!
//! ```text
//!  maintenance  enter ─► all move live ─► power off and on: nothing happens ─► leave ─► all move back
//!  order        rules ─► hosts killed ─► starts, seen from outside: in order, none where it must not be
//!                                    └─► one has no place: says why ─► a host is back ─► started
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;

const MOVED: usize = 4;
const GAP: Duration = Duration::from_secs(1);
/// For the moves of all.
const MOVES: Duration = Duration::from_secs(120);
const BOOT: Duration = Duration::from_secs(90);

pub fn maintenance(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    let guests = ground.gather(&host, MOVED)?;
    let other = ground.others(&[host])[0];
    ground.watch()?;
    for guest in &guests {
        ground.expect(guest, Wish::Running { starts: 3 })?; // Here, there, here again.
    }
    let since = ground.fault(&format!("maintenance of {}", host.name()), &guests)?;
    order_host(&other, "enter", &host)?;
    ground.figure(format!("empty after {}", seconds(Moment::now().since(since))));
    let left = ground.guests_on(&host)?;
    if !left.is_empty() {
        bail!("{} still runs {}", host.name(), left.join(", "));
    }
    demand_moved(ground, &guests, since)?;

    let off = ground.judges()?.mark(&format!("kill {}", host.name()));
    ground.lab().kill(&host)?;
    ground.wait_note(off, "the host's death", Duration::from_secs(30), |note| {
        note.kind == "host-dead" && note.text.contains(&host.name())
    })?;
    ground.lab().start(&host)?;
    host.wait_up(BOOT)?;
    ground.wait_cluster()?;
    let view = agents::view(&other)?;
    if view.host(&host.name()).is_none_or(|host| host.maintenance.is_none()) {
        bail!("its maintenance has ended with its power");
    }

    let since = ground.judges()?.mark(&format!("maintenance of {} ends", host.name()));
    order_host(&other, "leave", &host)?;
    ground.figure(format!("back after {}", seconds(Moment::now().since(since))));
    if let Some(away) = guests.iter().find(|guest| ground.host_of(guest).ok() != Some(host)) {
        bail!("{away} is not back on {}", host.name());
    }
    demand_moved(ground, &guests, since)
}

fn order_host(at: &Host, what: &str, host: &Host) -> Result<()> {
    agents::ask(at, MOVES, &["mainstay", "host", "maintenance", what, &host.name()]).map(drop)
}

/// Live, each with a short gap.
fn demand_moved(ground: &mut Ground, guests: &[String], since: Moment) -> Result<()> {
    let (judges, hosts, mut longest) = (ground.judges()?, ground.hosts(), Duration::ZERO);
    for guest in guests {
        let id = ground.id(guest);
        if judges.boots(id, since) != 1 {
            bail!("{guest} was booted anew instead of moved");
        }
        longest = longest.max(judges.longest_gap(id, since, Moment::now()));
    }
    ground.within_for("longest gap", longest, GAP, &hosts[..1])
}

/// `web` starts so long after `db`.
const DELAY: Duration = Duration::from_secs(2);
/// From a host's return to the start of who waited for it.
const RETURN: Duration = Duration::from_secs(3);
const STARTS: Duration = Duration::from_secs(60);

/// Guests by host, those of the hosts that are killed first; who must be apart; who finds no place, the first of them first.
struct Plan {
    on: &'static [&'static [&'static str]],
    killed: usize,
    apart: &'static [&'static str],
    wait: &'static [&'static str],
}

const PLAN: Plan = Plan {
    on: &[&["db", "web", "mail"], &["wiki", "shop"], &["chat"]],
    killed: 1,
    apart: &["mail", "wiki", "chat"],
    wait: &["mail"],
};
const PLAN_FULL: Plan = Plan {
    on: &[&["db", "web", "mail"], &["dns1", "app1", "log1"], &["wiki", "shop", "app2"], &["chat", "log2"], &["dns2"]],
    killed: 2,
    apart: &["mail", "wiki", "chat", "dns1", "dns2"],
    wait: &["dns1", "mail"],
};

const RULES: &str = r#"
[[priority]]
vms = ["db"]
priority = "highest"
[[priority]]
vms = ["mail"]
priority = "low"
[[dependency]]
vms = ["web"]
after = ["db"]
delay_s = 2
[[dependency]]
vms = ["app*"]
after = ["web"]
"#;

pub fn order(ground: &mut Ground) -> Result<()> {
    let plan = if ground.full { &PLAN_FULL } else { &PLAN };
    ground.grow(u8::try_from(plan.on.len())?)?;
    for guest in plan.on.iter().copied().flatten() {
        ground.also(guest)?;
    }
    ground.guests_run()?;
    let mut hosts = ground.hosts();
    let master = ground.master()?;
    hosts.sort_by_key(|host| *host == master); // It decides, and is not killed.
    for (host, guests) in hosts.clone().iter().zip(plan.on) {
        for guest in *guests {
            ground.bring(guest, host)?;
        }
    }
    let apart = format!("{RULES}[[affinity]]\nvms = {:?}\ntie = \"apart\"\nforce = \"must\"\n", plan.apart);
    ground.set_rules(&apart)?;
    ground.watch()?;
    let lost: Vec<String> = plan.on[..plan.killed].iter().copied().flatten().map(|guest| (*guest).to_owned()).collect();
    let killed = ground.fault(&format!("kill {} host(s)", plan.killed), &lost)?;
    for guest in &lost {
        ground.expect(guest, Wish::Running { starts: 2 })?;
    }
    let (dead, alive) = hosts.split_at(plan.killed);
    for host in dead {
        ground.lab().kill(host)?;
    }
    let placed: Vec<String> = lost.iter().filter(|guest| !plan.wait.contains(&guest.as_str())).cloned().collect();
    let starts = ground.wait_started(&placed, killed, STARTS)?;
    let started = |name: &str| Some(starts[placed.iter().position(|guest| guest == name)?].ran.since(killed));
    let text = placed.iter().zip(&starts).map(|(guest, start)| format!("{guest} {}", seconds(start.ran.since(killed))));
    ground.figure(format!("started {}", text.collect::<Vec<_>>().join(", ")));
    let chain: Vec<Duration> = ["db", "web", "app1"].into_iter().filter_map(started).collect();
    if !chain.is_sorted() || chain[1] < chain[0] + DELAY {
        bail!("db, web after it and {} s, app1 after that: not in this order", DELAY.as_secs());
    }
    for (n, back) in dead.iter().enumerate() {
        demand_waiting(ground, alive, &plan.wait[n..])?;
        demand_return(ground, plan, back, n)?;
    }
    ground.set_rules("")
}

/// They do not run, and say why.
fn demand_waiting(ground: &Ground, alive: &[Host], waiting: &[&str]) -> Result<()> {
    for guest in waiting {
        let what = format!("{guest} to wait for a place, and to say so");
        let view = ground.wait_view_of(&alive[0], &what, STARTS, |view| {
            view.vm(guest).and_then(|vm| vm.why.as_ref()).is_some_and(|why| why.contains("a place"))
        })?;
        let why = view.vm(guest).and_then(|vm| vm.why.clone()).unwrap_or_default();
        if let Some(host) =
            alive.iter().find(|host| !why.contains(&format!("{} another that it must not be", host.name())))
        {
            bail!("{guest} does not say why not on {}: {why}", host.name());
        }
        if ground.host_of(guest).is_ok() {
            bail!("{guest} runs although it must not");
        }
    }
    Ok(())
}

/// A host is back: the first of those who wait starts there, soon.
fn demand_return(ground: &mut Ground, plan: &Plan, back: &Host, n: usize) -> Result<()> {
    let (guest, name) = (plan.wait[n].to_owned(), back.name());
    let begun = ground.judges()?.mark(&format!("start {name}"));
    let view_of = ground.master()?;
    ground.lab().start(back)?;
    ground.wait_view_of(&view_of, &format!("{name} to be back"), BOOT, |view| {
        let live = view.host(&name).is_some_and(|host| host.verdict == "live" && host.libvirt == Some(true));
        live && view.datastores.iter().all(|store| store.reached_by.contains(&name))
    })?;
    let returned = Moment::now();
    ground.figure(format!("{name} back after {}", seconds(returned.since(begun))));
    let starts = ground.wait_started(std::slice::from_ref(&guest), begun, STARTS)?;
    if starts[0].host != name {
        bail!("{guest} was started on {}, not on {name}", starts[0].host);
    }
    let up = wait(STARTS, &format!("{guest} to write"), || Ok(ground.judges()?.guest_up(ground.id(&guest), begun)));
    up.context("it runs, and is not up")?;
    ground.within_at_its_pace(&format!("{guest} started"), returned, &starts, RETURN)
}
