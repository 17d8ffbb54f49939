//! What a case stands on: a healthy lab, its guests, the judges, and the words in which cases are told.
//!
//! ```text
//!  restore ──► healthy ──► case: arrange (gather) ──► watch ──► fault ──► conditions ──► finish: the judges' verdict
//!                                                       └── judges of this case only, every guest watched ──┘
//! ```
//!
//! A case must call `watch` after it has arranged its guests and before its fault: what came before is not judged. It
//! waits for conditions with deadlines; a limit is always compared with what the judges saw.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use super::{Setting, pace};
use crate::agents::{self, View};
use crate::guest::Guest;
use crate::host::{Host, Power};
use crate::judge::{Judges, Moment, Start, Verdict, Vm, Wish};
use crate::lab::{Lab, wait};

/// The guests of cases and demo, two on each of three hosts.
pub const GUESTS: [&str; 6] = ["web", "db", "mail", "wiki", "shop", "chat"];
/// Between two questions to agents: they are to be watched, not to be kept busy.
const PAUSE: Duration = Duration::from_millis(150);
/// How long the judges wait for the end state after a case.
const SETTLE: Duration = Duration::from_secs(30);
/// Writes in a row after which a guest is surely up: the first that is seen may be of its last boot.
const WRITES: usize = 3;
/// A move of a lab guest takes about a second.
const MOVE: Duration = Duration::from_secs(30);

/// The lab, with the case under way.
pub struct Ground {
    pub(super) lab: Lab,
    pub(super) setting: Option<Setting>,
    /// The lab is to be made anew before the next case.
    pub(super) spoiled: bool,
    /// So many hosts; a case may have more for itself.
    pub(super) usual_hosts: usize,
    /// There may be rules for VMs.
    pub(super) ruled: bool,
    judges: Option<Judges>,
    wishes: BTreeMap<String, Wish>,
    figures: Vec<String>,
    /// Times of full length instead of those for CI.
    pub full: bool,
}

impl Ground {
    /// On a lab that is up.
    pub fn new(lab: Lab, full: bool) -> Ground {
        let (judges, wishes, figures, usual_hosts) = (None, BTreeMap::new(), Vec::new(), lab.hosts().len());
        Ground { lab, setting: None, spoiled: false, usual_hosts, ruled: true, judges, wishes, figures, full }
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// All hosts.
    pub fn hosts(&self) -> Vec<Host> {
        self.lab.hosts()
    }

    /// All hosts that are on and not frozen.
    pub fn hosts_on(&self) -> Vec<Host> {
        self.hosts().into_iter().filter(|host| host.power().is_ok_and(|power| power == Power::On)).collect()
    }

    /// All hosts but these.
    pub fn others(&self, but: &[Host]) -> Vec<Host> {
        self.hosts().into_iter().filter(|host| !but.contains(host)).collect()
    }

    /// One more guest, on the host with the fewest; `prepare` then waits for it as for all.
    pub fn also(&mut self, name: &str) -> Result<()> {
        if self.lab.guests().iter().all(|guest| guest.name() != name) {
            let host = self.emptiest(&[])?;
            self.lab.add_guest(name, &host)?;
        }
        Ok(())
    }

    /// The judges' name for a guest.
    pub fn id(&self, guest: &str) -> Uuid {
        Guest::new(guest).expect("guests of cases have good names").uuid()
    }

    /// Where guests have a QEMU, seen from outside; one with two is there twice.
    pub fn placement(&self) -> Result<Vec<(String, Host)>> {
        let mut found = Vec::new();
        for qemu in self.lab.qemu_processes()? {
            if let Some(guest) = self.lab.guests().iter().find(|guest| guest.uuid() == qemu.uuid) {
                found.push((guest.name().to_owned(), self.lab.host(&qemu.host)?));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Guests on a host.
    pub fn guests_on(&self, host: &Host) -> Result<Vec<String>> {
        let all = self.placement()?;
        Ok(all.into_iter().filter(|(_, on)| on == host).map(|(guest, _)| guest).collect())
    }

    /// The host on which a guest has its only QEMU.
    pub fn host_of(&self, guest: &str) -> Result<Host> {
        let on: Vec<Host> = self.placement()?.into_iter().filter(|(name, _)| name == guest).map(|(_, h)| h).collect();
        match on[..] {
            [host] => Ok(host),
            [] => bail!("{guest} has no QEMU"),
            _ => bail!("{guest} has {} QEMUs", on.len()),
        }
    }

    /// The process of a guest's only QEMU.
    pub fn pid_of(&self, guest: &str) -> Result<i32> {
        let id = self.id(guest);
        let found: Vec<i32> = self.lab.qemu_processes()?.iter().filter(|q| q.uuid == id).map(|q| q.pid).collect();
        match found[..] {
            [pid] => Ok(pid),
            _ => bail!("{guest} has {} QEMUs", found.len()),
        }
    }

    /// What some agent says.
    pub fn view(&self) -> Result<View> {
        let hosts = self.hosts_on();
        let host = hosts.first().context("no host is on")?;
        agents::view(host)
    }

    /// The host that decides.
    pub fn master(&self) -> Result<Host> {
        self.lab.host(&self.view()?.master.context("nobody is master")?)
    }

    /// A host that does not.
    pub fn subordinate(&self) -> Result<Host> {
        let master = self.master()?;
        self.others(&[master]).first().copied().context("there is only one host")
    }

    /// Moves guests until exactly `count` run on this host; names them.
    pub fn gather(&mut self, host: &Host, count: usize) -> Result<Vec<String>> {
        loop {
            let here = self.guests_on(host)?;
            let (guest, to) = if here.len() < count {
                let from = self.fullest(&[*host])?;
                (self.guests_on(&from)?.pop().context("too few guests")?, *host)
            } else if count < here.len() {
                (here.last().context("guests are there")?.clone(), self.emptiest(&[*host])?)
            } else {
                return Ok(here);
            };
            self.bring(&guest, &to)?;
        }
    }

    fn fullest(&self, but: &[Host]) -> Result<Host> {
        let number = |host: &Host| self.guests_on(host).map_or(0, |guests| guests.len());
        self.others(but).into_iter().max_by_key(number).context("there is only one host")
    }

    /// The host with the fewest guests.
    pub fn emptiest(&self, but: &[Host]) -> Result<Host> {
        let number = |host: &Host| self.guests_on(host).map_or(usize::MAX, |guests| guests.len());
        self.others(but).into_iter().min_by_key(number).context("there is only one host")
    }

    /// Gets a guest to a host: by a live move, else ended here and started there. How is not the question here.
    pub(super) fn bring(&mut self, guest: &str, to: &Host) -> Result<()> {
        if self.host_of(guest)? == *to {
            return Ok(());
        }
        if let Err(why) = self.move_guest(guest, to) {
            eprintln!("(arranging: {why:#}; {guest} is ended and started on {})", to.name());
            let from = self.host_of(guest)?;
            agents::ask(&from, MOVE, &["virsh", "-q", "destroy", guest])?;
            let known = Guest::new(guest)?;
            known.define(to, self.lab.accelerator())?;
            known.start(to)?;
        }
        self.wait_view(&format!("{guest} to run on {}", to.name()), MOVE, |view| {
            let vm = view.vm(guest);
            vm.is_some_and(|vm| vm.state == "running" && vm.protected && vm.host.as_deref() == Some(&to.name()))
        })
        .map(drop)
    }

    /// `mainstay vm move`.
    pub fn move_guest(&self, guest: &str, to: &Host) -> Result<()> {
        let from = self.hosts_on().first().copied().context("no host is on")?;
        agents::ask(&from, MOVE, &["mainstay", "vm", "move", guest, "--to", &to.name()]).map(drop)
    }

    /// Waits until some agent's view is as wanted; gives it.
    pub fn wait_view(&self, what: &str, patience: Duration, holds: impl Fn(&View) -> bool) -> Result<View> {
        wait(patience, what, || {
            std::thread::sleep(PAUSE);
            let view = self.view()?;
            Ok(holds(&view).then_some(view))
        })
    }

    /// Waits until the view of one host is as wanted; gives it.
    pub fn wait_view_of(
        &self,
        host: &Host,
        what: &str,
        patience: Duration,
        holds: impl Fn(&View) -> bool,
    ) -> Result<View> {
        wait(patience, what, || {
            std::thread::sleep(PAUSE);
            let view = agents::view(host)?;
            Ok(holds(&view).then_some(view))
        })
    }

    /// Waits for a note made since then, said by any host that answers.
    pub fn wait_note(
        &self,
        since: Moment,
        what: &str,
        patience: Duration,
        is: impl Fn(&agents::Note) -> bool,
    ) -> Result<agents::Note> {
        wait(patience, &format!("a note of {what}"), || {
            std::thread::sleep(PAUSE);
            let back = Moment::now().since(since);
            let notes = agents::all_notes(&self.hosts_on(), back);
            Ok(notes.into_iter().find(|note| since <= note.at().plus(Duration::from_millis(5)) && is(note)))
        })
    }

    // ---- judges -------------------------------------------------------------------------------------------------

    /// The judges begin: every guest is to run once, and nothing else is to happen to it.
    pub fn watch(&mut self) -> Result<()> {
        let judges = self.judges.insert(Judges::start(host_of_process)?);
        let guests = self.lab.guests().to_vec();
        for guest in &guests {
            let disk = self.lab.store().join(guest.disk());
            judges.watch(Vm { name: guest.name().to_owned(), id: guest.uuid(), disk });
        }
        self.wishes = guests.iter().map(|guest| (guest.name().to_owned(), Wish::Running { starts: 1 })).collect();
        let (judges, since) = (self.judges()?, Moment::now());
        for guest in &guests {
            judges.expect(guest.uuid(), Wish::Running { starts: 1 });
        }
        self.wait_as_wished().context("before the fault")?;
        for guest in &guests {
            wait(SETTLE, &format!("{} to write before the fault", guest.name()), || {
                Ok(judges.writes_since(guest.uuid(), since).get(WRITES).map(drop))
            })?;
        }
        Ok(())
    }

    /// The judges of this case.
    pub fn judges(&self) -> Result<&Judges> {
        self.judges.as_ref().context("the case did not call watch")
    }

    /// What is to be true of a guest in the end.
    pub fn expect(&mut self, guest: &str, wish: Wish) -> Result<()> {
        self.judges()?.expect(self.id(guest), wish);
        self.wishes.insert(guest.to_owned(), wish);
        Ok(())
    }

    /// A fault that reaches these guests; the others may not be touched until the end of the case.
    pub fn fault(&self, what: &str, reach: &[String]) -> Result<Moment> {
        let reach: Vec<Uuid> = reach.iter().map(|guest| self.id(guest)).collect();
        Ok(self.judges()?.fault(what, &reach))
    }

    /// Power loss of a host: its guests are to be started once more, elsewhere.
    pub fn kill(&mut self, host: &Host) -> Result<(Moment, Vec<String>)> {
        let guests = self.guests_on(host)?;
        for guest in &guests {
            self.expect(guest, Wish::Running { starts: 2 })?;
        }
        let at = self.fault(&format!("kill {}", host.name()), &guests)?;
        self.lab.kill(host)?;
        Ok((at, guests))
    }

    /// Waits until all these guests executed anew.
    pub fn wait_started(&self, guests: &[String], since: Moment, patience: Duration) -> Result<Vec<Start>> {
        let judges = self.judges()?;
        let left = |deadline: Moment| deadline.since(Moment::now()).max(Duration::from_millis(1));
        let deadline = Moment::now().plus(patience);
        let started = |guest: &String| {
            wait(left(deadline), &format!("{guest} to execute again"), || Ok(judges.started(self.id(guest), since)))
        };
        guests.iter().map(started).collect()
    }

    /// Tells a guest to keep its vCPU busy until its next boot, and waits until it does.
    pub fn make_busy(&self, guest: &str) -> Result<()> {
        const WINDOW: Duration = Duration::from_millis(500);
        let (id, host) = (self.id(guest), self.host_of(guest)?.name());
        Guest::new(guest)?.tell(&self.lab.store(), "busy")?;
        wait(Duration::from_secs(20), &format!("{guest} to be busy"), || {
            let from = Moment::now();
            std::thread::sleep(WINDOW);
            let ran = self.judges()?.gained_since(id, &host, from).unwrap_or_default();
            Ok((WINDOW / 3 < ran).then_some(()))
        })
    }

    /// Demands that these guests run anew, none of them on `not_on`, the last one within `limit` of `since`.
    pub fn demand_started(&mut self, guests: &[String], since: Moment, not_on: &Host, limit: Duration) -> Result<()> {
        let starts = self.wait_started(guests, since, limit + Duration::from_secs(30))?;
        if let Some(wrong) = starts.iter().find(|start| start.host == not_on.name()) {
            bail!("a guest was started on {}", wrong.host);
        }
        let judges = self.judges()?;
        let mut up = Moment::default();
        for guest in guests {
            let patience = Duration::from_secs(40);
            let at = wait(patience, &format!("guest {guest} to write"), || Ok(judges.guest_up(self.id(guest), since)))?;
            up = up.max(at);
        }
        self.figure(format!("guests up {}", seconds(up.since(since))));
        self.within_at_its_pace("started", since, &starts, limit)
    }

    /// A figure with its limit, from a moment to the last of these starts. On a machine where libvirt and QEMU alone take longer than
    /// usual, the limit is as much longer, and that is told. The guests are up: the lab is at rest.
    pub fn within_at_its_pace(&mut self, what: &str, since: Moment, starts: &[Start], limit: Duration) -> Result<()> {
        let last = starts.iter().map(|start| start.ran.since(since)).max().unwrap_or_default();
        let on = |start: &Start| self.hosts().into_iter().find(|host| host.name() == start.host).context("its host");
        let hosts = starts.iter().map(on).collect::<Result<Vec<Host>>>()?;
        self.within_for(what, last, limit, &hosts)
    }

    /// The same for any figure in which libvirt and QEMU of these hosts have a part.
    pub fn within_for(&mut self, what: &str, measured: Duration, limit: Duration, hosts: &[Host]) -> Result<()> {
        if measured <= limit {
            return self.within(what, measured, limit);
        }
        let behind = pace::behind(hosts, self.lab.accelerator())?;
        self.figure(format!("libvirt and QEMU alone take {} longer here than usual", seconds(behind)));
        self.within(what, measured, limit + behind)
    }

    /// A figure with its limit.
    pub fn within(&mut self, what: &str, measured: Duration, limit: Duration) -> Result<()> {
        self.figure(format!("{what} {} of {}", seconds(measured), seconds(limit)));
        if limit < measured {
            bail!("{what} after {}, limit {}", seconds(measured), seconds(limit));
        }
        Ok(())
    }

    /// A figure for people.
    pub fn figure(&mut self, text: String) {
        self.figures.push(text);
    }

    /// The figures of the case, which are then forgotten.
    pub fn take_figures(&mut self) -> Vec<String> {
        std::mem::take(&mut self.figures)
    }

    /// Ends the case: waits until all is as wished, then the judges' verdict.
    pub fn finish(&mut self) -> Result<Verdict> {
        let as_wished = self.wait_as_wished();
        let judges = self.judges()?;
        judges.settled();
        let verdict = judges.verdict();
        if verdict.violations.iter().any(|what| what.contains("two writers") || what.contains("old boot wrote")) {
            self.spoiled = true; // The disk remembers; the next case would be blamed for it.
        }
        for gain in &verdict.thaws {
            let ms = gain.gained.as_secs_f64() * 1000.0;
            self.figures.push(format!("gain {ms:.1} ms"));
        }
        if verdict.violations.is_empty() {
            as_wished.context("in the end")?; // Else the verdict says it, and more.
        }
        Ok(verdict)
    }

    /// Drops the judges.
    pub fn stop_watching(&mut self) {
        self.judges = None;
    }

    fn wait_as_wished(&self) -> Result<()> {
        let judges = self.judges()?;
        for (guest, wish) in &self.wishes {
            let count = usize::from(matches!(wish, Wish::Running { .. }));
            let id = self.id(guest);
            wait(SETTLE, &format!("{count} running copies of {guest}"), || {
                Ok((judges.running(id).len() == count).then_some(()))
            })?;
        }
        Ok(())
    }
}

/// The lab's host to which a process of this machine belongs.
pub fn host_of_process(pid: i32) -> Option<String> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.split_once("/mainstay-lab/"))?.1;
    let host = path.split('/').next()?;
    host.strip_prefix('h')?.parse::<u8>().ok()?;
    Some(host.to_owned())
}

/// For figures.
pub fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let text = format!("{seconds:.2}");
    format!("{} s", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        for (ms, text) in [(8000, "8 s"), (2504, "2.5 s"), (20, "0.02 s"), (0, "0 s"), (10_000, "10 s")] {
            assert_eq!(seconds(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn this_process_is_of_no_host() {
        assert_eq!(host_of_process(std::process::id() as i32), None);
    }
}
