//! Live migrations by `virsh migrate`, as people do them, and hosts and daemons that die in the middle of one.
//!
//! ```text
//!  hook at the target ─► claim "source to target" ─► pre-copy ─► switch ─► libvirt lets the target run ─► its claim
//!        │ policy: refused, names vm move     │ target or source dies, libvirtd of the target dies at any time
//!        ▼                                    ▼
//!      as it was                   one copy runs, whichever; its claim names that host
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::ground::seconds;
use crate::agents;
use crate::host::Host;
use crate::judge::{Moment, Wish};
use crate::lab::wait;

/// For CI; `--full` migrates ten times.
const MIGRATIONS: usize = 3;
const MIGRATIONS_FULL: usize = 10;
const GAP: Duration = Duration::from_secs(1);
/// After a migration: time for writes that show the end of the gap.
const AFTER: Duration = Duration::from_millis(1500);
const ORDER: Duration = Duration::from_secs(60);
/// From the death of a host or daemon to one copy that runs under a claim of its own host.
const SETTLES: Duration = Duration::from_secs(60);
/// When the target's libvirtd is killed, after its QEMU was seen: before the switch, around it, after it.
const MOMENTS_MS: [u64; 5] = [100, 350, 500, 650, 900];

/// What a person types.
fn migrate(guest: &str, from: &Host, to: &Host) -> Result<String> {
    let (daemon, stream) = (format!("qemu+tcp://{}/system", to.address()), format!("tcp://{}", to.address()));
    agents::ask(from, ORDER, &["virsh", "-q", "migrate", "--live", "--unsafe", guest, &daemon, &stream])
}

/// Waits until it runs on one host, whose own claim says so.
fn settled(ground: &Ground, guest: &str, patience: Duration) -> Result<String> {
    let id = ground.id(guest);
    let what = format!("{guest} to run once, under the claim of its host");
    wait(patience, &what, || {
        std::thread::sleep(Duration::from_millis(150));
        let running = ground.judges()?.running(id);
        let [one] = running.as_slice() else { return Ok(None) };
        let view = ground.view()?;
        let vm = view.vm(guest).context("it is known")?;
        let handed = vm.explain.iter().any(|line| line.contains("handed from"));
        let same = vm.host.as_deref() == Some(one.host.as_str()) && vm.state == "running" && !handed;
        Ok(same.then(|| one.host.clone()))
    })
}

pub fn back_and_forth(ground: &mut Ground) -> Result<()> {
    let guest = super::GUESTS[0].to_owned();
    let count = if ground.full { MIGRATIONS_FULL } else { MIGRATIONS };
    ground.watch()?;
    ground.expect(&guest, Wish::Running { starts: 1 + count })?;
    let since = ground.fault(&format!("{count} virsh migrations of {guest}"), std::slice::from_ref(&guest))?;
    let (id, mut longest) = (ground.id(&guest), Duration::ZERO);
    for _ in 0..count {
        let from = ground.host_of(&guest)?;
        let to = ground.emptiest(&[from])?;
        let begun = ground.judges()?.mark(&format!("virsh migrate {guest} from {} to {}", from.name(), to.name()));
        migrate(&guest, &from, &to)?;
        let done = Moment::now();
        let on = settled(ground, &guest, Duration::from_secs(15))?;
        if on != to.name() {
            bail!("{guest} runs on {on} after its migration to {}", to.name());
        }
        std::thread::sleep(AFTER.saturating_sub(Moment::now().since(done)));
        longest = longest.max(ground.judges()?.longest_gap(id, begun, Moment::now()));
        ground.figure(format!("migration {}", seconds(done.since(begun))));
    }
    if ground.judges()?.boots(id, since) != 1 {
        bail!("{guest} was booted anew instead of migrated");
    }
    ground.within("longest gap", longest, GAP)
}

/// Begins a migration; returns when the target's QEMU receives.
fn begin(ground: &Ground, guest: &str, from: &Host, to: &Host) -> Result<std::thread::JoinHandle<Result<String>>> {
    let (id, to_name) = (ground.id(guest), to.name());
    let (guest_name, from, to) = (guest.to_owned(), *from, *to);
    let order = std::thread::spawn(move || migrate(&guest_name, &from, &to));
    wait(Duration::from_secs(15), &format!("a QEMU of {guest} on {to_name}"), || {
        if order.is_finished() {
            bail!("the migration ended before it was seen");
        }
        let there = ground.lab().qemu_processes()?.into_iter().any(|qemu| qemu.uuid == id && qemu.host == to_name);
        Ok(there.then_some(()))
    })?;
    Ok(order)
}

/// Source and target for a guest, chosen so that `victim` says which of the two dies.
fn kill(ground: &mut Ground, victim_is_source: bool) -> Result<()> {
    let victim = ground.subordinate()?;
    let on_victim = ground.gather(&victim, 1)?;
    let other = ground.others(&[victim])[0];
    let (source, target) = if victim_is_source { (victim, other) } else { (other, victim) };
    let guest = ground.guests_on(&source)?.remove(0);
    let mut reach = on_victim.clone();
    if !reach.contains(&guest) {
        reach.push(guest.clone());
    }
    ground.watch()?;
    for one in &reach {
        ground.expect(one, Wish::Running { starts: 3 })?;
    }
    ground.fault(&format!("virsh migrate {guest} to {}", target.name()), &reach)?;
    let order = begin(ground, &guest, &source, &target)?;
    let killed = ground.judges()?.mark(&format!("kill {}", victim.name()));
    ground.lab().kill(&victim)?;
    let on = settled(ground, &guest, SETTLES)?;
    let (id, judges) = (ground.id(&guest), ground.judges()?);
    wait(Duration::from_secs(60), &format!("{guest} to write again"), || {
        Ok(judges.writes_since(id, killed).get(20).map(drop))
    })?;
    ground.figure(format!("runs on {on}, settled {}", seconds(Moment::now().since(killed))));
    drop(order); // Its answer is not the question; it ends by itself.
    Ok(())
}

pub fn target_killed(ground: &mut Ground) -> Result<()> {
    kill(ground, false)
}

pub fn source_killed(ground: &mut Ground) -> Result<()> {
    kill(ground, true)
}

pub fn libvirtd_killed(ground: &mut Ground) -> Result<()> {
    let guest = super::GUESTS[0].to_owned();
    ground.watch()?;
    ground.expect(&guest, Wish::Running { starts: 1 + 2 * MOMENTS_MS.len() })?;
    ground.fault("libvirtd of a migration's target is killed", std::slice::from_ref(&guest))?;
    for moment in MOMENTS_MS {
        let source = ground.host_of(&guest)?;
        let target = ground.emptiest(&[source])?;
        let order = begin(ground, &guest, &source, &target)?;
        // The moment is what is tried here.
        std::thread::sleep(Duration::from_millis(moment));
        let killed = ground.judges()?.mark(&format!("kill libvirtd on {} after {moment} ms", target.name()));
        let kill = ["systemctl", "kill", "--kill-who=main", "--signal=KILL", "libvirtd.service"];
        agents::ask(&target, ORDER, &kill)?;
        let told = order.join().map_err(|_| anyhow::anyhow!("the order panicked"))?;
        agents::ask(&target, ORDER, &["systemctl", "start", "libvirtd.service"])?;
        let on = settled(ground, &guest, SETTLES)?;
        let said = if told.is_ok() { "done" } else { "failed" };
        ground.figure(format!("{moment} ms: {said}, on {on} {}", seconds(Moment::now().since(killed))));
        ground.wait_cluster()?;
        // A leftover of the other side must be gone before the next round.
        wait(Duration::from_secs(60), &format!("one QEMU of {guest}"), || Ok(ground.host_of(&guest).ok()))?;
    }
    Ok(())
}

pub fn refused(ground: &mut Ground) -> Result<()> {
    let guest = super::GUESTS[0].to_owned();
    ground.watch()?;
    ground.fault("virsh migrate where the policy refuses it", &[])?;
    set_policy(ground, "refuse")?;
    let from = ground.host_of(&guest)?;
    let to = ground.emptiest(&[from])?;
    let tried = migrate(&guest, &from, &to);
    set_policy(ground, "allow")?;
    match tried {
        Ok(_) => bail!("it was not refused"),
        Err(why) if format!("{why:#}").contains("mainstay vm move") => {}
        Err(why) => return Err(why).context("it was refused, but the text does not name 'mainstay vm move'"),
    }
    if ground.host_of(&guest)? != from {
        bail!("{guest} is not where it was");
    }
    ground.figure("refused, names vm move".to_owned());
    Ok(())
}

/// On every host: the target's hook goes by its own copy of the settings.
fn set_policy(ground: &Ground, policy: &str) -> Result<()> {
    let host = ground.hosts_on().first().copied().context("no host is on")?;
    agents::ask(&host, ORDER, &["mainstay", "cluster", "set", &format!("foreign-migration={policy}")])?;
    let version = agents::view(&host)?.settings_version;
    wait(Duration::from_secs(20), "all hosts to have the settings", || {
        std::thread::sleep(Duration::from_millis(150));
        Ok(ground.views()?.iter().all(|(_, view)| view.settings_version == version).then_some(()))
    })
}
