//! From whatever a case left behind to a healthy lab, set as the next case needs it.
//!
//! ```text
//!  heal cuts, thaw, storage answers ──► hosts on (a fenced one boots anew) ──► units run ──► all see all live
//!     ──► guests of a case that failed away ──► other locks? all hosts off, mounts anew, on ──► settings ──► guests run, once, protected ──► healthy
//!     └─ not within its time, or a disk remembers a crime ──► lab made anew, once ─┘
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{GUESTS, Ground, Setting, guests};
use crate::agents::{self, View};
use crate::host::{Host, Power};
use crate::lab::wait;
use crate::storage::{Fault, LockMode};
use crate::{network, power};

const BOOT: Duration = Duration::from_secs(90);
/// From hosts that are up to one master that sees all live.
const JOIN: Duration = Duration::from_secs(60);
/// Until the guests run; ten at once boot on two processors.
const GUESTS_RUN: Duration = Duration::from_secs(90);
/// How long a guest may be without a QEMU before it is started by hand: the cluster may be about to do it.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(200);
/// After a change to a shorter lease the old one counts as long as anything on the datastore tells of it: an attestation
/// that a host asked for at its boot stays for ten leases.
const OLD_LEASE: Duration = Duration::from_secs(75);

impl Ground {
    /// Makes the lab healthy, and sets it so.
    pub fn prepare(&mut self, setting: Setting) -> Result<()> {
        self.stop_watching();
        if self.spoiled || self.lab.hosts().len() != self.usual_hosts {
            self.renew().context("making the lab anew")?;
        }
        let Err(why) = self.restore(setting) else { return Ok(()) };
        eprintln!("(the lab cannot be restored: {why:#}; it is made anew)");
        self.renew().context("making the lab anew")?;
        self.restore(setting).context("in a new lab")
    }

    fn renew(&mut self) -> Result<()> {
        self.setting = None;
        self.lab.renew(u8::try_from(self.usual_hosts)?)?;
        self.ruled = false;
        self.spoiled = false;
        Ok(())
    }

    fn restore(&mut self, setting: Setting) -> Result<()> {
        self.end_faults()?;
        self.hosts_up()?;
        self.wait_cluster()?;
        guests::clear(self)?;
        if !self.mounts_are(setting.locks)? {
            self.set(setting)?;
            self.remount(setting.locks)?;
            self.wait_cluster()?;
        }
        self.lab.storage()?.locks(setting.locks)?;
        self.end_plans()?;
        self.set(setting)?;
        self.guests_run()
    }

    /// No rules for VMs, no maintenance, no quarantine.
    fn end_plans(&mut self) -> Result<()> {
        let Some(host) = self.hosts_on().first().copied() else { bail!("no host is on") };
        for busy in agents::view(&host)?.hosts.iter().filter(|host| host.maintenance.is_some()) {
            let leave = ["mainstay", "host", "maintenance", "leave", &busy.name, "--stay", "--no-wait"];
            agents::ask(&host, agents::ANSWER, &leave)?;
        }
        // Hosts that are killed by many cases come back too often for anybody's trust.
        let names: Vec<String> = self.hosts().iter().map(Host::name).collect();
        let release = ["mainstay", "host", "release"].into_iter().chain(names.iter().map(String::as_str));
        agents::ask(&host, agents::ANSWER, &release.collect::<Vec<_>>())?;
        if self.ruled { self.set_rules("") } else { Ok(()) }
    }

    /// Rules for the order and the places of VMs.
    pub(super) fn set_rules(&mut self, text: &str) -> Result<()> {
        let Some(host) = self.hosts_on().first().copied() else { bail!("no host is on") };
        let path = host.root_inside()?.join("tmp/rules.toml");
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        self.ruled = true;
        agents::ask(&host, agents::ANSWER, &["mainstay", "cluster", "vm-rules", "/tmp/rules.toml"])?;
        self.ruled = !text.is_empty();
        Ok(())
    }

    /// More hosts, for this case alone.
    pub(super) fn grow(&mut self, hosts: u8) -> Result<()> {
        self.lab.grow(hosts)?;
        self.wait_cluster()
    }

    /// Ends cuts, freezes and faults of the storage.
    pub(crate) fn end_faults(&self) -> Result<()> {
        network::heal()?;
        let storage = self.lab.storage()?;
        for host in self.hosts() {
            if host.power()? == Power::Frozen {
                host.thaw()?;
            }
            if host.power()? != Power::Off {
                storage.fault(&host.name(), Fault::None)?;
            }
        }
        Ok(())
    }

    /// Switches on what is off, boots anew what is fenced, and starts units that do not run.
    pub(crate) fn hosts_up(&self) -> Result<()> {
        let status = self.lab.storage()?.status()?;
        let mut started = Vec::new();
        for host in self.hosts() {
            // What was fenced stays so until its next boot, by the rules of the cluster.
            if status["hosts"][host.name()]["fenced"] == true && host.power()? == Power::On {
                self.lab.kill(&host)?;
            }
            if host.power()? == Power::Off {
                self.lab.start(&host)?;
                started.push(host);
            }
        }
        for host in &started {
            host.wait_up(BOOT)?;
        }
        for host in self.hosts() {
            let units = ["libvirtd.service", "mainstay-guard.service", "mainstayd.service"];
            agents::ask(&host, BOOT, &[&["systemctl", "start"], &units[..]].concat())?;
        }
        Ok(())
    }

    /// Waits until every host sees every host live, and all the same master.
    pub(crate) fn wait_cluster(&self) -> Result<()> {
        wait(JOIN, "the cluster to be whole", || {
            std::thread::sleep(PAUSE);
            let views = self.views()?;
            whole(&views).map(Some)
        })
    }

    /// The views of all hosts, taken at the same time.
    pub fn views(&self) -> Result<Vec<(Host, View)>> {
        let ask = |host: Host| std::thread::spawn(move || agents::view(&host));
        let asked: Vec<_> = self.hosts_on().into_iter().map(|host| (host, ask(host))).collect();
        let answer = |(host, thread): (Host, std::thread::JoinHandle<Result<View>>)| {
            Ok((host, thread.join().map_err(|_| anyhow::anyhow!("a question to {} panicked", host.name()))??))
        };
        asked.into_iter().map(answer).collect()
    }

    fn mounts_are(&self, locks: LockMode) -> Result<bool> {
        let kind = match locks {
            LockMode::Local => "local",
            LockMode::Server { .. } => "server",
        };
        let status = self.lab.storage()?.status()?;
        Ok(self.hosts().iter().all(|host| status["hosts"][host.name()]["mounted"] == kind))
    }

    /// Another kind of locks needs other mounts: all hosts lose their power, and come back.
    fn remount(&self, locks: LockMode) -> Result<()> {
        let storage = self.lab.storage()?;
        for host in self.hosts() {
            self.lab.kill(&host)?;
            storage.unmount(&host.name())?;
        }
        storage.locks(locks)?;
        self.hosts_up()
    }

    /// Changes what is not so already, and waits until all hosts know it.
    fn set(&mut self, setting: Setting) -> Result<()> {
        let Some(host) = self.hosts_on().first().copied() else { bail!("no host is on") };
        let same_profile = self.setting.is_some_and(|old| old.profile == setting.profile);
        if !same_profile {
            agents::ask(
                &host,
                agents::ANSWER,
                &["mainstay", "cluster", "set", &format!("profile={}", setting.profile)],
            )?;
        }
        let view = agents::view(&host)?;
        let shared = view.datastores.iter().find(|datastore| datastore.name == "shared").context("no datastore")?;
        if (shared.fence.as_str(), shared.late_writes.as_str()) != (setting.fence, setting.late_writes) {
            let set = ["mainstay", "datastore", "set", "shared", "--fence", setting.fence];
            agents::ask(&host, agents::ANSWER, &[&set[..], &["--late-writes", setting.late_writes]].concat())?;
        }
        self.set_power(&host, setting)?;
        let version = agents::view(&host)?.settings_version;
        wait(JOIN, "all hosts to have the settings", || {
            std::thread::sleep(PAUSE);
            Ok(self.views()?.iter().all(|(_, view)| view.settings_version == version).then_some(()))
        })?;
        if !same_profile {
            // A host whose guard was late once counts L/2 longer: that is let pass.
            let most = if setting.profile == "fast" { 2600 } else { 8000 };
            wait(OLD_LEASE, "the lease of the profile to count", || {
                std::thread::sleep(PAUSE);
                let view = agents::view(&host)?;
                Ok(view.hosts.iter().all(|host| host.window_ms.is_none_or(|window| window <= most)).then_some(()))
            })?;
        }
        self.setting = Some(setting);
        Ok(())
    }

    /// Gives every host a fence device, or takes them all away.
    fn set_power(&self, host: &Host, setting: Setting) -> Result<()> {
        power::set(power::Behaviour::Works)?;
        let had = if self.setting.is_some_and(|old| old.power == setting.power) {
            return Ok(());
        } else {
            agents::ask(host, agents::ANSWER, &["mainstay", "--json", "host", "fence-device", "list"])?
        };
        let had: serde_json::Value = serde_json::from_str(&had).context("reading the fence devices")?;
        for device in had["fence_devices"].as_array().into_iter().flatten() {
            let name = device["name"].as_str().context("a fence device has a name")?;
            agents::ask(host, agents::ANSWER, &["mainstay", "host", "fence-device", "remove", name])?;
        }
        let Some(at) = setting.power else { return Ok(()) };
        for of in self.hosts() {
            let (name, plug) = (format!("switch-{}", of.name()), format!("plug={}", of.name()));
            let add = ["mainstay", "host", "fence-device", "add", &name, &of.name(), "fence_lab", &plug];
            agents::ask(host, agents::ANSWER, &add)?;
        }
        agents::ask(host, agents::ANSWER, &["mainstay", "cluster", "set", &format!("fence-at={at}")])?;
        Ok(())
    }

    /// Waits until every guest runs once and is protected; starts those that nobody starts.
    pub(super) fn guests_run(&mut self) -> Result<()> {
        self.make_guests()?;
        let view = self.view()?;
        let stopped = |name: &str| view.vm(name).is_some_and(|vm| vm.wanted.as_deref() == Some("stopped"));
        let guests: Vec<String> = self.lab.guests().iter().map(|guest| guest.name().to_owned()).collect();
        let without = self.guests_without_qemu()?;
        for guest in guests.iter().filter(|guest| stopped(guest) && without.contains(guest)) {
            self.start_by_hand(guest)?;
        }
        let healthy = |patience| {
            wait(patience, "all guests to run once, protected", || {
                std::thread::sleep(PAUSE);
                self.healthy().map(Some)
            })
        };
        if healthy(PATIENCE).is_ok() {
            return Ok(());
        }
        for guest in &guests {
            if self.guests_without_qemu()?.contains(guest) {
                self.start_by_hand(guest)?;
            } else if let Ok(host) = self.host_of(guest) {
                // Of one that runs this is refused, and nothing else.
                let _ = agents::ask(&host, agents::ANSWER, &["virsh", "-q", "resume", guest]);
            }
        }
        healthy(GUESTS_RUN)
    }

    fn make_guests(&mut self) -> Result<()> {
        let hosts = self.hosts();
        let known: Vec<String> = self.lab.guests().iter().map(|guest| guest.name().to_owned()).collect();
        for (number, name) in GUESTS.iter().enumerate().filter(|(_, name)| !known.iter().any(|known| known == *name)) {
            self.lab.add_guest(name, &hosts[number / 2 % hosts.len()])?;
        }
        Ok(())
    }

    fn guests_without_qemu(&self) -> Result<Vec<String>> {
        let running = self.placement()?;
        let guests = self.lab.guests().iter().map(|guest| guest.name().to_owned());
        Ok(guests.filter(|guest| running.iter().all(|(name, _)| name != guest)).collect())
    }

    fn start_by_hand(&self, name: &str) -> Result<()> {
        let Some(host) = self.hosts_on().first().copied() else { bail!("no host is on") };
        let ordered = agents::ask(&host, GUESTS_RUN, &["mainstay", "vm", "start", name]);
        if ordered.is_ok() {
            return Ok(());
        }
        let to = self.emptiest(&[])?;
        let guests = self.lab.guests().iter();
        let Some(guest) = guests.into_iter().find(|guest| guest.name() == name) else { bail!("no guest {name}") };
        guest.define(&to, self.lab.accelerator())?;
        guest.start(&to).with_context(|| {
            format!("mainstay vm start {name}: {:#}", ordered.err().unwrap_or_else(|| anyhow::anyhow!("done")))
        })
    }

    /// Whether all is well now; the error says what is not.
    pub(super) fn healthy(&self) -> Result<()> {
        let views = self.views()?;
        whole(&views)?;
        let Some((_, view)) = views.first() else { bail!("no host is on") };
        for guest in self.lab.guests() {
            let name = guest.name();
            let host = self.host_of(name)?.name();
            let vm = view.vm(name).with_context(|| format!("{name} is not known to the cluster"))?;
            if vm.state != "running" || !vm.protected || vm.host.as_ref() != Some(&host) {
                let (state, owner) = (&vm.state, vm.host.as_deref().unwrap_or("nobody"));
                bail!("{name} is {state}, of {owner}, runs on {host}, protected: {}", vm.protected);
            }
        }
        Ok(())
    }
}

/// Whether all hosts see all hosts live, follow one master, and hold leases.
fn whole(views: &[(Host, View)]) -> Result<()> {
    let Some((_, first)) = views.first() else { bail!("no host is on") };
    let Some(master) = &first.master else { bail!("{} knows no master", first.hosts.len()) };
    for (host, view) in views {
        let host = host.name();
        if view.master.as_ref() != Some(master) || view.settings_version != first.settings_version {
            bail!("{host} follows {:?} with settings {}", view.master, view.settings_version);
        }
        if let Some(other) = view.hosts.iter().find(|other| other.verdict != "live" || other.libvirt != Some(true)) {
            bail!("{host} sees {} as {}, its libvirt {:?}", other.name, other.verdict, other.libvirt);
        }
        if let Some(bad) = view.datastores.iter().find(|store| store.lease != "valid" || store.trouble.is_some()) {
            bail!("{host} has lease {} on {}: {:?}", bad.lease, bad.name, bad.trouble);
        }
        if view.hosts.len() != views.len() {
            bail!("{host} knows {} hosts of {}", view.hosts.len(), views.len());
        }
    }
    Ok(())
}
