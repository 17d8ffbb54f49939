//! How each fault is made and healed.
//!
//! ```text
//!  begin ──► Trouble (whom it reaches) ──► fault made ──► … lasts … ──► heal ──► aftermath ends the trouble later
//!     └─ not possible now ──► passed over        fenced meanwhile? ──► power cycle, as an administrator would
//! ```

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::plan::{Deed, Fault, How, Program, Step};
use super::round::Round;
use super::trouble::Trouble;
use super::{people, story};
use crate::guest::Guest;
use crate::host::{Host, Power};
use crate::judge::{Moment, Reach};
use crate::storage::Fault as StorageFault;
use crate::{network, processes};

/// After a fault was healed: leases, elections, restarts.
const AFTERMATH: Duration = Duration::from_secs(20);
/// After a host was switched on.
const BOOT: Duration = Duration::from_secs(45);
/// After an operator's deed was begun and its time is over: it may still wait for its answer.
const DEED: Duration = Duration::from_secs(60);

/// What came of a step.
pub enum Begun {
    /// It is to be healed.
    Yes,
    /// It could not be done now.
    PassedOver(&'static str),
}

impl Round<'_> {
    /// Makes a fault.
    pub(super) fn begin(&mut self, number: usize, step: &Step) -> Result<Begun> {
        let of_host = |host: &Host| Reach::Host(host.name());
        match &step.fault {
            Fault::Kill { host } => {
                if host.power()? == Power::Off {
                    return Ok(Begun::PassedOver("it is off"));
                }
                self.trouble(number, of_host(host), true);
                self.ground.judges()?.kill(&host.name());
                self.ground.lab().kill(host)?;
            }
            Fault::Freeze { host } => {
                if host.power()? != Power::On {
                    return Ok(Begun::PassedOver("it is not on"));
                }
                self.trouble(number, of_host(host), true);
                host.freeze()?;
            }
            Fault::Cut { host } => {
                self.trouble(number, of_host(host), false);
                network::cut_host(host)?;
            }
            Fault::CutOneWay { from, to } | Fault::CutBoth { from, to } => {
                self.trouble(number, of_host(from), false);
                self.trouble(number, of_host(to), false);
                network::cut_one_way(from, to)?;
                if matches!(step.fault, Fault::CutBoth { .. }) {
                    network::cut_one_way(to, from)?;
                }
            }
            Fault::Storage { host, how } => return self.begin_storage(number, *host, *how, step.lasts),
            Fault::Program { host, program, how } => return self.begin_program(number, host, *program, *how),
            Fault::Qemu { vm, how } => return self.begin_qemu(number, vm, *how),
            Fault::Operator { vm, deed, host, .. } => return self.begin_deed(number, vm, *deed, *host),
        }
        Ok(Begun::Yes)
    }

    fn begin_storage(
        &mut self,
        number: usize,
        host: Option<Host>,
        how: StorageFault,
        lasts: Duration,
    ) -> Result<Begun> {
        let hosts = host.map_or_else(|| self.ground.hosts(), |host| vec![host]);
        let on: Vec<Host> = hosts.into_iter().filter(|host| host.power().is_ok_and(|p| p != Power::Off)).collect();
        if on.is_empty() {
            return Ok(Begun::PassedOver("it is off"));
        }
        match host {
            Some(host) => self.trouble(number, Reach::Host(host.name()), true),
            None => self.trouble(number, Reach::All, true),
        }
        let storage = self.ground.lab().storage()?;
        for host in &on {
            if let StorageFault::Late(time) = how {
                self.ground.judges()?.late(&host.name(), Moment::now(), Moment::now().plus(lasts + 2 * time));
            }
            storage.fault(&host.name(), how)?;
        }
        Ok(Begun::Yes)
    }

    fn begin_program(&mut self, number: usize, host: &Host, program: Program, how: How) -> Result<Begun> {
        if host.power()? != Power::On {
            return Ok(Begun::PassedOver("its host is not on"));
        }
        let found = match program {
            Program::Agent => processes::named(host, processes::AGENT)?.first().copied(),
            Program::Libvirtd => processes::named(host, processes::LIBVIRTD)?.first().copied(),
            Program::GuardParent => processes::guard(host).ok().map(|guard| guard.parent),
            Program::GuardChild => processes::guard(host).ok().map(|guard| guard.child),
        };
        let Some(pid) = found else { return Ok(Begun::PassedOver("it does not run")) };
        let touches = matches!(program, Program::GuardParent | Program::GuardChild);
        self.trouble(number, Reach::Host(host.name()), touches);
        self.strike(number, pid, how)?;
        Ok(Begun::Yes)
    }

    fn begin_qemu(&mut self, number: usize, vm: &str, how: How) -> Result<Begun> {
        let id = self.ground.id(vm);
        let running = self.ground.judges()?.running(id).first().map(|start| start.pid);
        let all = self.ground.lab().qemu_processes()?;
        let Some(pid) = running.or_else(|| all.iter().find(|qemu| qemu.uuid == id).map(|qemu| qemu.pid)) else {
            return Ok(Begun::PassedOver("it runs nowhere"));
        };
        self.trouble(number, Reach::Vm(id), true);
        self.strike(number, pid, how)?;
        Ok(Begun::Yes)
    }

    fn begin_deed(&mut self, number: usize, vm: &str, deed: Deed, host: Host) -> Result<Begun> {
        let id = self.ground.id(vm);
        self.trouble(number, Reach::Vm(id), true);
        let running = self.ground.judges()?.running(id).first().map(|start| start.host.clone());
        let at = match running {
            Some(name) => Some(self.ground.lab().host(&name)?),
            None => self.ground.placement()?.into_iter().find(|(guest, _)| guest == vm).map(|(_, host)| host),
        };
        let needs_it = !matches!(deed, Deed::VirshStart | Deed::Start | Deed::Move);
        if needs_it && at.is_none() {
            return Ok(Begun::PassedOver("it runs nowhere"));
        }
        let accelerator = self.ground.lab().accelerator();
        let tools = people::Tools { guest: Guest::new(vm)?, at, host, accelerator };
        let story: Arc<story::Story> = self.story.clone();
        self.people.act(deed, tools, story)?;
        Ok(Begun::Yes)
    }

    fn strike(&mut self, number: usize, pid: i32, how: How) -> Result<()> {
        match how {
            How::Kill => processes::signal(pid, Signal::SIGKILL),
            How::Stop => {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                self.stopped.insert(number, (pid, name.trim().to_owned()));
                processes::signal(pid, Signal::SIGSTOP)
            }
        }
    }

    fn trouble(&mut self, number: usize, reach: Reach, touches: bool) {
        self.of_step.entry(number).or_default().push(self.troubles.len());
        self.troubles.push(Trouble { reach, from: Moment::now(), to: None, touches });
    }

    /// Ends a fault; what follows from it may take a while.
    pub(super) fn heal(&mut self, number: usize, step: &Step) -> Result<()> {
        let mut aftermath = AFTERMATH;
        let healed = match &step.fault {
            Fault::Kill { host } => {
                aftermath = BOOT;
                if host.power()? == Power::Off { self.ground.lab().start(host) } else { Ok(()) }
            }
            Fault::Freeze { host } => self.thaw(host),
            Fault::Cut { host } => network::mend_host(host),
            Fault::CutOneWay { from, to } => network::mend_one_way(from, to),
            Fault::CutBoth { from, to } => {
                network::mend_one_way(from, to).and_then(|()| network::mend_one_way(to, from))
            }
            Fault::Storage { host, .. } => self.heal_storage(*host),
            Fault::Program { .. } | Fault::Qemu { .. } => self.go_on(number),
            Fault::Operator { vm, host, back, .. } => {
                aftermath = DEED;
                back.map_or(Ok(()), |deed| self.begin_deed(number, vm, deed, *host).map(drop))
            }
        };
        let end = Moment::now().plus(aftermath);
        for trouble in self.of_step.remove(&number).unwrap_or_default() {
            self.troubles[trouble].to = Some(end);
        }
        healed
    }

    fn thaw(&self, host: &Host) -> Result<()> {
        if host.power()? == Power::Frozen {
            self.ground.judges()?.thaw(&host.name());
            host.thaw()?;
        }
        Ok(())
    }

    fn heal_storage(&self, host: Option<Host>) -> Result<()> {
        let storage = self.ground.lab().storage()?;
        let hosts = host.map_or_else(|| self.ground.hosts(), |host| vec![host]);
        for host in hosts.iter().filter(|host| host.power().is_ok_and(|power| power != Power::Off)) {
            storage.fault(&host.name(), StorageFault::None)?;
        }
        Ok(())
    }

    /// Lets a process go on that was stopped by this step, if it is still there.
    fn go_on(&mut self, number: usize) -> Result<()> {
        match self.stopped.remove(&number) {
            Some((pid, name)) if processes::is_named(pid, &name) => processes::signal(pid, Signal::SIGCONT),
            Some(_) | None => Ok(()),
        }
    }

    /// A host that the cluster has fenced stays so until it boots anew: an administrator sees to it once it is well.
    /// True if there was one.
    pub(super) fn power_cycle_fenced(&mut self) -> Result<bool> {
        let mut any = false;
        let status = self.ground.lab().storage()?.status()?;
        for host in self.ground.hosts() {
            let fenced = status["hosts"][host.name()]["fenced"] == true;
            let ill = self.troubles.iter().any(|t| t.to.is_none() && t.touches && t.is_of(&host));
            if fenced && !ill && host.power()? == Power::On {
                self.story.tell(&format!("{} was fenced: switched off and on", host.name()));
                let (reach, from) = (Reach::Host(host.name()), Moment::now());
                let to = Some(from.plus(BOOT));
                self.troubles.push(Trouble { reach, from, to, touches: true });
                self.ground.judges()?.kill(&host.name());
                self.ground.lab().kill(&host)?;
                self.ground.lab().start(&host).with_context(|| format!("power cycle of {}", host.name()))?;
                any = true;
            }
        }
        Ok(any)
    }
}
