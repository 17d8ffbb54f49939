//! Operators: what they do to VMs, what they were told, and what is therefore to be true in the end.
//!
//! ```text
//!  destroyed, saved; done on a whole host ──► stopped          started; done ──► running
//!  the same on a host in trouble, refused, unanswered ──► open: what the claim says then, never two
//! ```
//!
//! A deed takes a while and may hang with its host; each has a thread and a deadline.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use super::plan::Deed;
use super::story::Story;
use super::trouble::Trouble;
use crate::agents;
use crate::guest::{Accelerator, Guest};
use crate::host::Host;
use crate::judge::Moment;

const SHORT: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(60);
/// A fault of the host so soon after a deed may have come before its meaning was persisted.
const UNSURE: Duration = Duration::from_secs(8);

/// What is to be true of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// It runs.
    Running,
    /// It does not run.
    Stopped,
    /// Nobody can say from outside.
    Open,
}

/// One deed, and how it went.
#[derive(Clone, Debug)]
struct Done {
    vm: String,
    deed: Deed,
    host: Host,
    from: Moment,
    /// None: it is under way.
    to: Option<(Moment, bool)>,
}

/// All deeds of a round.
#[derive(Default)]
pub struct People {
    deeds: Arc<Mutex<Vec<Done>>>,
    threads: Vec<JoinHandle<()>>,
}

/// What a deed is done with.
pub struct Tools {
    /// The VM.
    pub guest: Guest,
    /// Where it runs, if it does.
    pub at: Option<Host>,
    /// The host of the plan.
    pub host: Host,
    /// For definitions.
    pub accelerator: Accelerator,
}

impl People {
    /// Begins a deed.
    pub fn act(&mut self, deed: Deed, tools: Tools, story: Arc<Story>) -> Result<()> {
        let host = match deed {
            Deed::Destroy | Deed::Save | Deed::Resume | Deed::VirshMigrate => tools.at.context("it runs nowhere")?,
            Deed::VirshStart | Deed::Start | Deed::Move => tools.host,
        };
        let vm = tools.guest.name().to_owned();
        let mut deeds = lock(&self.deeds);
        let number = deeds.len();
        deeds.push(Done { vm: vm.clone(), deed, host, from: Moment::now(), to: None });
        let shared = self.deeds.clone();
        self.threads.push(std::thread::spawn(move || {
            let outcome = carry_out(deed, &tools, host);
            lock(&shared)[number].to = Some((Moment::now(), outcome.is_ok()));
            let text = outcome.map_or_else(|why| format!("{:#}", why).replace('\n', " / "), |()| "done".to_owned());
            story.tell(&format!("    {}: {text}", deed.told(&vm, &tools.host)));
        }));
        Ok(())
    }

    /// Waits for the answers to all deeds.
    pub fn wait(&mut self) {
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }

    /// What is to be true of a VM after all that was done to it.
    pub fn wanted(&self, vm: &str, troubles: &[Trouble]) -> Wanted {
        self.history(vm, troubles).last().map_or(Wanted::Running, |(_, wanted)| *wanted)
    }

    /// Times in which a VM need not run.
    pub fn rests(&self, vm: &str, troubles: &[Trouble]) -> Vec<(Moment, Option<Moment>)> {
        let mut rests: Vec<(Moment, Option<Moment>)> = Vec::new();
        for (at, wanted) in self.history(vm, troubles) {
            let open = rests.last_mut().filter(|(_, to)| to.is_none());
            match (wanted, open) {
                (Wanted::Running, Some(rest)) => rest.1 = Some(at),
                (Wanted::Stopped | Wanted::Open, None) => rests.push((at, None)),
                (Wanted::Running, None) | (Wanted::Stopped | Wanted::Open, Some(_)) => {}
            }
        }
        rests
    }

    /// What was wanted of a VM from when on. A deed under way leaves it open.
    fn history(&self, vm: &str, troubles: &[Trouble]) -> Vec<(Moment, Wanted)> {
        let mut history: Vec<(Moment, Wanted)> = Vec::new();
        let mut last_end = Moment::default();
        for done in lock(&self.deeds).iter().filter(|done| done.vm == vm) {
            let before = history.last().map_or(Wanted::Running, |(_, wanted)| *wanted);
            let (end, well) = done.to.unwrap_or((Moment(u64::MAX), false));
            let alone = last_end <= done.from;
            last_end = last_end.max(end);
            let sure = alone && !troubles.iter().any(|t| t.reaches(&done.host, vm, done.from, end.plus(UNSURE)));
            let after = match (done.deed, well) {
                (Deed::Destroy | Deed::Save, true) if sure => Wanted::Stopped,
                (Deed::Destroy | Deed::Save, false) if alone && before == Wanted::Stopped => Wanted::Stopped,
                (Deed::Destroy | Deed::Save, _) => Wanted::Open,
                (Deed::VirshStart | Deed::Start, true) if alone => Wanted::Running,
                (Deed::VirshStart | Deed::Start, false) if alone && before == Wanted::Running => Wanted::Running,
                (Deed::VirshStart | Deed::Start, _) => Wanted::Open,
                (Deed::Resume | Deed::VirshMigrate | Deed::Move, _) => continue,
            };
            if after != Wanted::Running {
                history.push((done.from, after));
            } else {
                history.push((end, after));
            }
        }
        history
    }
}

fn lock(deeds: &Mutex<Vec<Done>>) -> MutexGuard<'_, Vec<Done>> {
    deeds.lock().expect("no holder panics")
}

fn carry_out(deed: Deed, tools: &Tools, host: Host) -> Result<()> {
    let (name, target) = (tools.guest.name(), tools.host.name());
    match deed {
        Deed::Destroy => agents::ask(&host, LONG, &["virsh", "-q", "destroy", name]),
        Deed::Save => agents::ask(&host, LONG, &["virsh", "-q", "managedsave", name]),
        Deed::Resume => agents::ask(&host, SHORT, &["virsh", "-q", "resume", name]),
        Deed::VirshStart => {
            let definition = tools.guest.write_definition(&host, tools.accelerator)?;
            agents::ask(&host, SHORT, &["virsh", "-q", "define", &definition])?;
            agents::ask(&host, LONG, &["virsh", "-q", "start", name])
        }
        Deed::Start => agents::ask(&host, LONG, &["mainstay", "vm", "start", name]),
        Deed::VirshMigrate => {
            let to = format!("qemu+tcp://{target}/system");
            agents::ask(&host, LONG, &["virsh", "-q", "migrate", "--live", "--unsafe", name, &to])
        }
        Deed::Move => agents::ask(&host, LONG, &["mainstay", "vm", "move", name, "--to", &target]),
    }
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::Reach;

    fn deed(deed: Deed, from: u64, to: u64, well: bool) -> Done {
        let at = |seconds: u64| Moment(seconds * 1_000_000_000);
        Done { vm: "web".into(), deed, host: Host::new(1), from: at(from), to: Some((at(to), well)) }
    }

    #[test]
    fn what_is_wanted_follows_what_was_done() {
        let trouble = |from: u64, to: u64| {
            let at = |seconds: u64| Moment(seconds * 1_000_000_000);
            Trouble { reach: Reach::Host("h1".into()), from: at(from), to: Some(at(to)), touches: true }
        };
        let destroyed = deed(Deed::Destroy, 10, 11, true);
        let cases: [(Vec<Done>, Vec<Trouble>, Wanted, &str); 9] = [
            (vec![], vec![], Wanted::Running, "nothing was done"),
            (vec![destroyed.clone()], vec![], Wanted::Stopped, "destroyed"),
            (vec![destroyed.clone()], vec![trouble(0, 10)], Wanted::Open, "while its host was in trouble"),
            (vec![destroyed.clone()], vec![trouble(15, 30)], Wanted::Open, "just before"),
            (vec![destroyed.clone()], vec![trouble(25, 30)], Wanted::Stopped, "long before"),
            (vec![deed(Deed::Destroy, 10, 40, false)], vec![], Wanted::Open, "failed"),
            (vec![destroyed.clone(), deed(Deed::Start, 20, 21, true)], vec![], Wanted::Running, "started again"),
            (vec![destroyed.clone(), deed(Deed::Start, 20, 21, false)], vec![], Wanted::Open, "perhaps started again"),
            (vec![deed(Deed::Start, 9, 12, true), destroyed], vec![], Wanted::Open, "both at once"),
        ];
        for (deeds, troubles, expected, what) in cases {
            let people = People { deeds: Arc::new(Mutex::new(deeds)), threads: Vec::new() };
            assert_eq!(people.wanted("web", &troubles), expected, "{what}");
            assert_eq!(people.wanted("db", &troubles), Wanted::Running, "{what}: another");
        }
    }
}
