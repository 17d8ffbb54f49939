//! What is done about guests beside a reset, and how a guest is given a voice.
//!
//! ```text
//!  enable-guest  a guest without the port ─► mainstay vm enable-guest ─► the port is in its definition, and in what runs
//!  power-cycle   a report ─► its QEMU ends ─► another one on the same host, never wanted stopped
//!  reboot        a report ─► its agent is asked, and cannot ─► reset
//!  migrate       a report ─► it runs elsewhere, in the same boot; said again there, it is not moved again
//!  restart       a report ─► another QEMU ─► which moves elsewhere
//! ```

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use super::guests::{HEARD, USUAL, set_policy};
use crate::agents;
use crate::guest::{CONSOLES, Guest, Talking};
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;

const ORDER: Duration = Duration::from_secs(60);
/// For something that would be done a second time.
const AFTERWARDS: Duration = Duration::from_secs(5);
const PORT: &str = "org.mainstay.guest.0";
/// What hosts remember over restarts of their agents.
const MEMORY: &str = "/var/lib/mainstay/guests.json";

/// A guest of this case, and where it was put.
struct One {
    guest: Guest,
    host: Host,
}

impl One {
    fn begin(ground: &Ground, name: &str, host: &Host, talks: bool) -> Result<One> {
        let guest = Guest::new(name)?;
        guest.make_disk(&ground.lab().store())?;
        match talks {
            true => guest.define_talking(host, ground.lab().accelerator(), Talking::default())?,
            false => guest.define(host, ground.lab().accelerator())?,
        }
        guest.start(host)?;
        ground.wait_view(&format!("{name} to be protected"), ORDER, |view| {
            view.vm(name).is_some_and(|vm| vm.protected && vm.state == "running")
        })?;
        guest.wait_up(host, ORDER)?;
        Ok(One { guest, host: *host })
    }

    /// Lines of its console, on a host, that begin so.
    fn count(&self, host: &Host, word: &str) -> Result<usize> {
        let path = host.root_inside()?.join(CONSOLES).join(format!("{}.log", self.guest.name()));
        let text = fs::read(path).unwrap_or_default();
        Ok(String::from_utf8_lossy(&text)
            .lines()
            .filter(|line| line.trim_start_matches('\r').starts_with(word))
            .count())
    }

    /// Its guest reports; the remedy is noted once, and nothing fails. When that was.
    fn reports(&self, ground: &Ground) -> Result<Moment> {
        wait(ORDER, "its agent to be heard", || Ok((0 < self.count(&self.host, HEARD)?).then_some(())))?;
        let began = Moment::now();
        self.guest.tell(&ground.lab().store(), "report")?;
        let name = self.guest.name();
        ground.wait_note(began, "the remedy", ORDER, |note| {
            note.kind == "guest-remedy" && note.vm.as_deref() == Some(name)
        })?;
        Ok(began)
    }

    /// It runs, protected, where this says; which generation it has.
    fn wait_runs(&self, ground: &Ground, since: u64, on: impl Fn(&str) -> bool) -> Result<u64> {
        let name = self.guest.name();
        let view = ground.wait_view(&format!("{name} to run where it should"), ORDER, |view| {
            view.vm(name).is_some_and(|vm| {
                let newer = vm.generation.is_some_and(|generation| since < generation);
                newer && vm.state == "running" && vm.host.as_deref().is_some_and(&on)
            })
        })?;
        view.vm(name).and_then(|vm| vm.generation).context("a generation")
    }

    fn generation(&self, ground: &Ground) -> Result<u64> {
        ground.view()?.vm(self.guest.name()).and_then(|vm| vm.generation).context("a generation")
    }

    fn end(self, ground: &Ground) -> Result<()> {
        let name = self.guest.name();
        let qemu = ground.lab().qemu_processes()?.into_iter().find(|qemu| qemu.uuid == self.guest.uuid());
        let host = ground.lab().host(&qemu.context("it has no QEMU")?.host)?;
        agents::ask(&host, ORDER, &["virsh", "-q", "destroy", name])?;
        agents::ask(&host, ORDER, &["virsh", "-q", "undefine", name]).map(drop)
    }
}

pub fn all(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    ground.watch()?;
    port(ground, &host)?;
    power_cycle(ground, &host)?;
    reboot(ground, &host)?;
    leave(ground, &host)?;
    set_policy(&host, USUAL)
}

fn port(ground: &mut Ground, host: &Host) -> Result<()> {
    let one = One::begin(ground, "mute", host, false)?;
    let has = |inactive: bool| -> Result<bool> {
        let mut words = vec!["virsh", "dumpxml", "mute"];
        words.extend(inactive.then_some("--inactive"));
        Ok(agents::ask(host, ORDER, &words)?.contains(PORT))
    };
    demand(!has(false)? && !has(true)?, "it was to have no port at first")?;
    let pid = ground.pid_of("mute")?;
    // Asked of another host, which passes it on.
    let other = ground.others(&[*host]).into_iter().next().context("three hosts")?;
    let said = agents::ask(&other, ORDER, &["mainstay", "vm", "enable-guest", "mute"])?;
    demand(said.contains("has the port"), &said)?;
    demand(has(false)? && has(true)?, "what runs and what is defined were to have the port")?;
    let said = agents::ask(host, ORDER, &["mainstay", "vm", "enable-guest", "mute"])?;
    demand(said.contains("so already"), &said)?;
    demand(ground.pid_of("mute")? == pid, "it was to run on")?;
    wait(ORDER, "the agent to follow the new channel", || {
        let sockets = agents::ask(host, ORDER, &["ss", "-xH", "state", "connected"])?;
        Ok(sockets.lines().any(|line| line.contains(PORT)).then_some(()))
    })?;
    ground.figure("port plugged in, followed".to_owned());
    one.end(ground)
}

fn power_cycle(ground: &mut Ground, host: &Host) -> Result<()> {
    rule(host, "{ own = \"power-cycle\" }")?;
    let one = One::begin(ground, "cycled", host, true)?;
    let (pid, before) = (ground.pid_of("cycled")?, one.generation(ground)?);
    let began = one.reports(ground)?;
    one.wait_runs(ground, before, |on| on == host.name())?;
    ground.figure(format!("power cycle {:.1} s", Moment::now().since(began).as_secs_f64()));
    demand(ground.pid_of("cycled")? != pid, "it was to be another QEMU")?;
    one.guest.wait_up(host, ORDER)?;
    none_failed(ground, began)?;
    let memory = agents::ask(host, ORDER, &["cat", MEMORY])?;
    demand(memory.contains(r#"{"verdict":"done","why":"power-cycle"}"#), &memory)?;
    one.end(ground)
}

fn reboot(ground: &mut Ground, host: &Host) -> Result<()> {
    rule(host, "{ own = \"reboot\" }")?;
    let one = One::begin(ground, "rebooted", host, true)?;
    let (pid, boots) = (ground.pid_of("rebooted")?, one.count(host, "up ")?);
    let began = one.reports(ground)?;
    wait(ORDER, "its next boot", || Ok((boots < one.count(host, "up ")?).then_some(())))?;
    demand(ground.pid_of("rebooted")? == pid, "it was to be the same QEMU")?;
    none_failed(ground, began)?;
    one.end(ground)
}

fn leave(ground: &mut Ground, host: &Host) -> Result<()> {
    for (remedy, name) in [("migrate", "mover"), ("restart-elsewhere", "leaver")] {
        rule(host, &format!("{{ own = \"{remedy}\" }}"))?;
        let one = One::begin(ground, name, host, true)?;
        let before = one.generation(ground)?;
        let began = one.reports(ground)?;
        one.wait_runs(ground, before, |on| on != host.name())?;
        ground.figure(format!("{remedy} {:.1} s", Moment::now().since(began).as_secs_f64()));
        std::thread::sleep(AFTERWARDS);
        let notes = agents::all_notes(&ground.hosts_on(), Moment::now().since(began));
        let remedies = notes.iter().filter(|note| note.kind == "guest-remedy" && note.vm.as_deref() == Some(name));
        demand(remedies.count() == 1, "it was to be done once")?;
        for other in ground.others(&[*host]) {
            let begun = agents::ask(&other, ORDER, &["cat", MEMORY])?.contains(&format!("a {remedy} was begun"));
            demand(begun, &format!("{} was to remember that it was begun", other.name()))?;
        }
        none_failed(ground, began)?;
        one.end(ground)?;
    }
    Ok(())
}

fn none_failed(ground: &Ground, since: Moment) -> Result<()> {
    let notes = agents::all_notes(&ground.hosts_on(), Moment::now().since(since));
    match notes.iter().find(|note| note.kind == "guest-remedy-failed") {
        Some(note) => bail!("{}", note.text),
        None => Ok(()),
    }
}

fn rule(host: &Host, then: &str) -> Result<()> {
    set_policy(host, &format!("[[rule]]\nseverity = \"critical\"\nthen = {then}\n"))
}

fn demand(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { bail!("{what}") }
}
