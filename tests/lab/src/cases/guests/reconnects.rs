//! The channel goes and comes: the guest boots anew, the agent of its host is restarted, the guest moves, its memory is put back.
//!
//! ```text
//!   stream of reports ───────────────────────────────────────────────────────────────────────────────► tally: all answered
//!   round:  "ask base N" ─► said, maybe answered ─► event ─► over ─ at most 2 s ─► host heard in the guest
//!                                                                      └─► base was reset for N exactly once
//! ```
//!
//! An event is over, for this case: when the guest's agent starts in its new boot; when systemd says that mainstayd is ready; when
//! `vm move` or `snapshot-revert` returns. The guest hears its host when its agent says so on the console, where it is looked for
//! every 20 ms.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{Console, HEARD, NAME, ORDER, Talker, Talkers, clear, demand, often, remedies};
use crate::agents;
use crate::cases::Ground;
use crate::guest::Talking;
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;
use crate::processes::{self, AGENT};

/// From the event's end to the host's word in the guest.
const UP: Duration = Duration::from_secs(2);
const BASE: &str = "base";
const PERMISSION: &str = "[[permission]]\ntarget = \"base\"\nby = \"talker\"\nremedy = \"reset\"\n";
const SNAPSHOT: &str = "lab-case";
const MEMORY: &str = "/var/lib/libvirt/qemu/save/lab-case.memory";

pub fn reconnect(ground: &mut Ground) -> Result<()> {
    let runs = if ground.full { 20 } else { 2 };
    let host = ground.subordinate()?;
    let other = ground.others(&[host, ground.master()?]).into_iter().next().context("three hosts")?;
    ground.watch()?;
    let mut talkers = Talkers::begin(ground, &[(NAME, &host), (BASE, &host)], Talking::default(), &often(PERMISSION))?;
    let mut case = Case { asked: 0, cut_off: 0 };
    stream(ground, &talkers.0[0])?;

    let mut took = Vec::new();
    for run in 0..runs {
        took.push(case.agent_restarts(ground, &talkers, run)?);
    }
    up_within(ground, "mainstayd restarted", took)?;
    ground.figure(format!("{} resets cut off by that", case.cut_off));

    let mut took = Vec::new();
    for run in 0..runs {
        let to = if run % 2 == 1 { host } else { other };
        took.push(case.moves(ground, &mut talkers, to)?);
    }
    up_within(ground, "moved", took)?;
    tally(ground, &talkers.0[0])?;

    let mut took = Vec::new();
    for run in 0..runs {
        took.push(case.boots(ground, &talkers, run)?);
    }
    up_within(ground, "booted", took)?;
    clear(ground)?;

    let mut took = Vec::new();
    for run in 0..runs {
        took.push(goes_back(ground, &host, run)?);
    }
    up_within(ground, "put back", took)
}

/// The slowest counts.
fn up_within(ground: &mut Ground, what: &str, mut took: Vec<Duration>) -> Result<()> {
    took.sort_unstable();
    let median = took[took.len() / 2].as_secs_f64();
    ground.figure(format!("{what} {} times, median {median:.2} s", took.len()));
    ground.within("slowest", took[took.len() - 1], UP)
}

struct Case {
    /// Requests so far; each has its number in its text.
    asked: u32,
    /// Those of which nobody knows whether they were carried out.
    cut_off: u32,
}

/// A request, and what was there before it.
struct Asked {
    number: u32,
    boots: usize,
    accepted: usize,
    reported: usize,
}

impl Case {
    /// The guest asks for a reset of the other; returns as soon as it is about to.
    fn ask(&mut self, ground: &Ground, talkers: &Talkers) -> Result<Asked> {
        let (talker, base) = (&talkers.0[0], &talkers.0[1]);
        self.asked += 1;
        let asked = Asked {
            number: self.asked,
            boots: base.console.count("up "),
            accepted: talker.console.count("accepted"),
            reported: talker.console.count("reported: "),
        };
        let marks = talker.console.count("reporting");
        talker.tell(ground, &format!("ask {BASE} request {}.", self.asked))?;
        talker.console.wait_more("reporting", marks)?;
        Ok(asked)
    }
}

impl Asked {
    /// The agent inside has it, and keeps it until it is answered.
    fn wait_accepted(self, console: &Console) -> Result<Asked> {
        console.wait_more("accepted", self.accepted)?;
        Ok(self)
    }

    /// The other was reset for it, once, and hears its host again. What comes late would come meanwhile.
    fn done_once(&self, talkers: &Talkers) -> Result<()> {
        let base = &talkers.0[1].console;
        base.wait_more("up ", self.boots).with_context(|| format!("request {}", self.number))?;
        base.wait_more_after("up ", HEARD)?;
        let boots = base.count("up ") - self.boots;
        demand(boots == 1, &format!("request {}: {boots} resets", self.number))
    }

    /// The guest was told so; where what asked is still there to hear it.
    fn is_told(&self, console: &Console, reported: usize) -> Result<()> {
        let line = self.answer(console, reported)?;
        demand(line.contains("done: reset"), &format!("request {}: {line}", self.number))
    }

    /// The host's last word.
    fn answer(&self, console: &Console, reported: usize) -> Result<String> {
        console.wait_more("reported: ", reported)?;
        console.last("reported: ")
    }

    /// What an agent's end cut off in the middle may not have been done, and the guest knows. Whether that was so.
    fn done_once_or_cut_off(&self, talkers: &Talkers) -> Result<bool> {
        let line = self.answer(&talkers.0[0].console, self.reported)?;
        if !line.contains("a reset was begun") {
            self.is_told(&talkers.0[0].console, self.reported)?;
            return self.done_once(talkers).map(|()| false);
        }
        std::thread::sleep(UP); // For what would still come.
        let base = &talkers.0[1].console;
        let boots = base.count("up ") - self.boots;
        demand(boots <= 1, &format!("request {}: {boots} resets", self.number))?;
        if boots == 1 {
            base.wait_more_after("up ", HEARD)?;
        }
        Ok(true)
    }
}

impl Case {
    /// The agent of the host is restarted, in every second run killed, a little later each time after the request.
    fn agent_restarts(&mut self, ground: &Ground, talkers: &Talkers, run: u32) -> Result<Duration> {
        let talker = &talkers.0[0];
        let (host, heard) = (talker.host, talker.console.count(HEARD));
        let pid = *processes::named(&host, AGENT)?.first().context("there is no agent")?;
        let asked = self.ask(ground, talkers)?;
        std::thread::sleep(Duration::from_millis(15) * (run / 2));
        if run % 2 == 1 {
            processes::signal(pid, Signal::SIGKILL)?;
            wait(ORDER, "a new agent", || {
                let state = agents::ask(&host, ORDER, &["systemctl", "show", "-PActiveState", "mainstayd"])?;
                let new = processes::named(&host, AGENT)?.iter().any(|new| *new != pid);
                Ok((new && state.trim() == "active").then_some(()))
            })?;
        } else {
            agents::ask(&host, ORDER, &["systemctl", "restart", "mainstayd.service"])?;
        }
        let took = heard_since(Instant::now(), &talker.console, heard)?;
        let cut_off = asked.done_once_or_cut_off(talkers)?;
        demand(run % 2 == 1 || !cut_off, &format!("request {}: an orderly restart has cut it off", asked.number))?;
        self.cut_off += u32::from(cut_off);
        Ok(took)
    }

    /// The guest moves, and asks meanwhile.
    fn moves(&mut self, ground: &Ground, talkers: &mut Talkers, to: Host) -> Result<Duration> {
        ground.wait_view("the guest to be protected", ORDER, |view| {
            view.vm(NAME).is_some_and(|vm| vm.protected && vm.state == "running")
        })?;
        let asked = self.ask(ground, talkers)?;
        ground.move_guest(NAME, &to)?;
        let over = Instant::now();
        let before = std::mem::replace(&mut talkers.0[0].console, Console::of(&to, NAME)?);
        talkers.0[0].host = to;
        let took = heard_since(over, &talkers.0[0].console, 0)?;
        // Before it moved, or after.
        if before.count("reported: ") <= asked.reported {
            asked.is_told(&talkers.0[0].console, 0)?;
        }
        asked.done_once(talkers)?;
        Ok(took)
    }

    /// The guest boots anew. In every second run its host's agent stands still from the request on, until after that.
    fn boots(&mut self, ground: &Ground, talkers: &Talkers, run: u32) -> Result<Duration> {
        let talker = &talkers.0[0];
        stream(ground, talker)?;
        std::thread::sleep(Duration::from_secs(1));
        let agent = *processes::named(&talker.host, AGENT)?.first().context("there is no agent")?;
        let stands = run % 2 == 1;
        if stands {
            processes::signal(agent, Signal::SIGSTOP)?;
        }
        let asked = self.ask(ground, talkers).and_then(|asked| asked.wait_accepted(&talker.console));
        let (kept, starts) = (talker.console.count("kept: "), talker.console.count("agent starts"));
        let told = talker.tell(ground, "reboot").and_then(|()| talker.console.wait_more("kept: ", kept));
        processes::signal(agent, Signal::SIGCONT)?;
        let asked = asked?;
        told?;
        talker.console.wait_more("agent starts", starts)?;
        let over = Instant::now();
        talker.console.wait_more_after("agent starts", HEARD)?;
        let took = over.elapsed();
        kept_all(talker)?;
        answered(ground, talker)?;
        asked.done_once(talkers)?;
        Ok(took)
    }
}

/// The guest's memory is put back to what it was before a request; it makes that anew. In every second run another request was
/// waiting then, which was answered meanwhile: it says that again. On a disk of its own: libvirt lays a new one over the old one.
fn goes_back(ground: &Ground, host: &Host, run: u32) -> Result<Duration> {
    let talkers = Talkers::begin(ground, &[(NAME, host), (BASE, host)], Talking::default(), &often(PERMISSION))?;
    let (began, talker, mut case) = (Moment::now(), &talkers.0[0], Case { asked: 0, cut_off: 0 });
    let agent = *processes::named(host, AGENT)?.first().context("there is no agent")?;
    let memory = format!("{MEMORY},snapshot=external");
    let create = ["virsh", "-q", "snapshot-create-as", NAME, SNAPSHOT, "--memspec", &memory];
    let create = [&create[..], &["--diskspec", "vda,snapshot=no"]].concat();
    let waits = run % 2 == 1;
    if waits {
        processes::signal(agent, Signal::SIGSTOP)?;
        let asked = case.ask(ground, &talkers).and_then(|asked| asked.wait_accepted(&talker.console));
        let made = later(ground, talker).and_then(|()| agents::ask(host, ORDER, &create)); // libvirt asks nobody who stands still.
        processes::signal(agent, Signal::SIGCONT)?;
        made?;
        asked?.is_told(&talker.console, 0)?;
    } else {
        later(ground, talker).and_then(|()| agents::ask(host, ORDER, &create))?;
    }
    talker.console.wait_more("reported: ", usize::from(waits))?;
    let resets = 1 + usize::from(waits);
    were_reset(ground, began, resets)?;

    // Of one that runs libvirt would end it and start it at once, before the claim is back: that is refused.
    agents::ask(host, ORDER, &["virsh", "-q", "destroy", NAME])?;
    ground.wait_view("the guest to be off", ORDER, |view| {
        view.vm(NAME).is_some_and(|vm| vm.wanted.as_deref() == Some("stopped") && vm.state == "off")
    })?;
    agents::ask(host, ORDER, &["virsh", "-q", "snapshot-revert", NAME, SNAPSHOT])?;
    let took = heard_since(Instant::now(), &talker.console, 0)?;
    talker.console.wait_more("reported: ", usize::from(waits))?;
    were_reset(ground, began, resets + 1)?;
    // What comes late would come meanwhile.
    let base = &talkers.0[1].console;
    base.wait_more("up ", base.count("up "))?;
    base.wait_more_after("up ", HEARD)?;
    let more = remedies(ground, began, BASE) - resets;
    demand(
        more == 1,
        &format!("{more} resets after it was put back: the new request is done once, the old one not again"),
    )?;
    clear(ground)?;
    for entry in std::fs::read_dir(ground.lab().store())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{NAME}.")) && !name.ends_with(".raw") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(took)
}

/// The other guest, so often. Not counted by its boots: on a busy machine a reset may come in the middle of one.
fn were_reset(ground: &Ground, since: Moment, times: usize) -> Result<()> {
    wait(ORDER, "the other guest's resets", || Ok((times <= remedies(ground, since, BASE)).then_some(())))
}

/// The guest will ask in a few seconds of its own time.
fn later(ground: &Ground, talker: &Talker) -> Result<()> {
    let marks = talker.console.count("later");
    talker.tell(ground, &format!("later {BASE} request later."))?;
    talker.console.wait_more("later", marks).map(drop)
}

fn heard_since(over: Instant, console: &Console, than: usize) -> Result<Duration> {
    console.wait_more(HEARD, than)?;
    Ok(over.elapsed())
}

fn stream(ground: &Ground, talker: &Talker) -> Result<()> {
    let streams = talker.console.count("streaming");
    talker.tell(ground, "stream")?;
    talker.console.wait_more("streaming", streams).map(drop)
}

/// All that the stream said, and the agent inside has accepted, was answered.
fn tally(ground: &mut Ground, talker: &Talker) -> Result<()> {
    let tallies = talker.console.count("tally: ");
    talker.tell(ground, "tally")?;
    talker.console.wait_more("tally: ", tallies)?;
    let [written, accepted, answered, refused, jumps] = talker.console.numbers("tally: ")?[..] else {
        bail!("a tally of five numbers")
    };
    ground.figure(format!("{answered} of {written} reports of the stream answered"));
    let all = written == accepted && accepted == answered && refused == 0 && jumps == 0;
    demand(
        all,
        &format!("{written} written, {accepted} accepted, {answered} answered, {refused} refused, {jumps} jumps"),
    )
}

/// What was accepted before a reboot was answered before it, or was kept.
fn kept_all(talker: &Talker) -> Result<()> {
    let [_, accepted, answered, ..] = talker.console.numbers("tally at its end: ")?[..] else { bail!("five numbers") };
    let [kept] = talker.console.numbers("kept: ")?[..] else { bail!("one number") };
    demand(accepted <= answered + kept, &format!("{accepted} accepted, {answered} answered, {kept} kept"))
}

/// Nothing waits for the host any more.
fn answered(ground: &Ground, talker: &Talker) -> Result<()> {
    wait(ORDER, "all reports to be answered", || {
        let said = talker.console.count("status: ");
        talker.tell(ground, "status")?;
        talker.console.wait_more("status: ", said)?;
        let numbers = talker.console.numbers("status: ")?;
        if numbers == [0, 0] { Ok(Some(())) } else { bail!("{numbers:?} wait and were dropped") }
    })
}
