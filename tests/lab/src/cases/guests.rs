//! Guests that speak: a guest's agent says that it or another guest is broken, or says nothing any more; and what follows.
//!
//! ```text
//!  lab ─► command sector ─► guest: "reporting" on its console ─► mainstay-guest report --ask reset
//!                                    │ the lab's clock                    │ channel
//!                                    └──────── measured ────────► note "guest-remedy", at once followed by the reset
//! ```
//!
//! The same from "crashing", "spinning", "hanging" for guests that say nothing.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::Ground;
use crate::agents;
use crate::guest::{CONSOLES, Guest};
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;
use crate::storage::Fault;

const ORDER: Duration = Duration::from_secs(60);
/// From the mark on the guest's console to the reset's note, median.
const LIMIT: Duration = Duration::from_millis(250);
const NAME: &str = "talker";
/// To the reset of another guest, on the same host and on another.
const NEAR: Duration = Duration::from_secs(1);
const FAR: Duration = Duration::from_millis(1500);
/// To the reset of one whose kernel has told that it panicked.
const PANIC: Duration = Duration::from_secs(1);
/// Without beats and I/O, by the policy of these cases; and how much later the reset may come.
const SILENCE: Duration = Duration::from_secs(4);
const LATER: Duration = Duration::from_secs(2);
/// The guest's agent has heard its host; said in each boot.
const HEARD: &str = "mainstay-guest: the host listens";
/// What a cluster has by itself.
const USUAL: &str = "[[rule]]\nseverity = \"critical\"\nthen = \"as-asked\"\n";
/// Other limits than a cluster's: each run ends in a reset.
const OFTEN: &str = "[limits]\nresets_per_hour = 1000\nbackoff_s = 0\n";
/// Times that a case can wait for.
const SOON: &str = "[[monitor]]\nsilence_s = 4\nio_s = 4\nuptime_s = 1\n";

/// What one guest's console shows.
struct Console(PathBuf);

impl Console {
    fn of(host: &Host, name: &str) -> Result<Console> {
        Ok(Console(host.root_inside()?.join(CONSOLES).join(format!("{name}.log"))))
    }

    /// Lines that begin so.
    fn count(&self, word: &str) -> usize {
        let text = fs::read(&self.0).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().filter(|line| line.trim_start_matches('\r').starts_with(word)).count()
    }

    /// Waits for a line that begins so after the last one that begins with `after`.
    fn wait_more_after(&self, after: &str, word: &str) -> Result<()> {
        wait(ORDER, &format!("\"{word}\" after \"{after}\" on {}", self.0.display()), || {
            let text = String::from_utf8_lossy(&fs::read(&self.0).unwrap_or_default()).replace('\r', "");
            let since = text.rsplit_once(&format!("\n{after}")).map_or("", |(_, rest)| rest);
            Ok(since.lines().any(|line| line.starts_with(word)).then_some(()))
        })
    }

    /// Somewhere.
    fn has(&self, text: &str) -> bool {
        String::from_utf8_lossy(&fs::read(&self.0).unwrap_or_default()).contains(text)
    }

    /// Waits for one more of them; when the console was written to last, in milliseconds since 1970. The kernel stamps files
    /// by its tick, so that is up to 4 ms early, never late.
    fn wait_more(&self, word: &str, than: usize) -> Result<u64> {
        wait(ORDER, &format!("\"{word}\" on {}", self.0.display()), || {
            if self.count(word) <= than {
                return Ok(None);
            }
            let written = fs::metadata(&self.0)?.modified()?.duration_since(UNIX_EPOCH).context("the clock of day")?;
            Ok(Some(u64::try_from(written.as_millis())?))
        })
    }
}

/// Guests with an agent, for one case.
struct Talkers(Vec<(Guest, Host, Console)>);

impl Talkers {
    /// All of them up, and their agents heard. The policy is theirs, with limits that a case does not reach.
    fn begin(ground: &Ground, names: &[(&str, &Host)], panics: bool, policy: &str) -> Result<Talkers> {
        let mut all = Vec::new();
        for (name, host) in names {
            set_policy(host, &format!("{USUAL}{OFTEN}{policy}"))?;
            let guest = Guest::new(name)?;
            guest.make_disk(&ground.lab().store())?;
            guest.define_talking(host, ground.lab().accelerator(), panics)?;
            guest.start(host)?; // Its console begins anew.
            all.push((guest, **host, Console::of(host, name)?));
        }
        for (_, _, console) in &all {
            console.wait_more(HEARD, 0)?;
        }
        Ok(Talkers(all))
    }

    fn end(self) -> Result<()> {
        for (guest, host, _) in &self.0 {
            agents::ask(host, ORDER, &["virsh", "-q", "destroy", guest.name()])?;
            agents::ask(host, ORDER, &["virsh", "-q", "undefine", guest.name()])?;
        }
        set_policy(&self.0[0].1, USUAL)
    }
}

pub fn report(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    ground.watch()?;
    let talkers = Talkers::begin(ground, &[(NAME, &host)], false, "")?;
    let runs = if ground.full { 20 } else { 5 };
    let mut took = Vec::new();
    for _ in 0..runs {
        let (guest, host, console) = &talkers.0[0];
        took.push(reset_after(ground, "report", "reporting", guest, (guest, host, console), console)?);
    }
    took.sort_unstable();
    ground.figure(format!("{} ms to {} ms", took[0].as_millis(), took[runs - 1].as_millis()));
    ground.within("reset after the report, median", took[runs / 2], LIMIT)?;
    talkers.end()
}

pub fn ask_for_others(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    let far = ground.others(&[host]).into_iter().next().context("three hosts")?;
    ground.watch()?;
    let names = [("app1", &host), ("app2", &host), ("app3", &far), ("base", &host), ("basefar", &far)];
    let talkers = Talkers::begin(ground, &names, false, "")?;
    let [app1, app2, app3, base, far_base] = &talkers.0[..] else { unreachable!("as many as names") };
    let of = |one: &(Guest, Host, Console)| one.0.clone();

    let began = Moment::now();
    of(app1).tell(&ground.lab().store(), "ask base")?;
    app1.2.wait_more("reported: ", 0)?;
    demand(
        app1.2.count("reported: ") == 1 && app1.2.has("denied: base lets app1 ask for no reset"),
        "it was to be denied",
    )?;
    ground.wait_note(began, "the denial", ORDER, |note| note.kind == "guest-request-denied")?;

    permit(&host, 1)?;
    for (what, target, limit) in [("on the same host", base, NEAR), ("on another host", far_base, FAR)] {
        let order = format!("ask {}", target.0.name());
        let took = reset_after(ground, &order, "reporting", &app1.0, (&target.0, &target.1, &target.2), &app1.2)?;
        ground.within(&format!("reset of a guest {what}"), took, limit)?;
    }

    permit(&host, 3)?;
    let (began, boots) = (Moment::now(), base.2.count("up "));
    for app in [app1, app2] {
        let marks = app.2.count("reporting");
        of(app).tell(&ground.lab().store(), "ask base")?;
        app.2.wait_more("reporting", marks)?;
    }
    let votes = |note: &agents::Note| note.kind == "guest-report" && note.text.starts_with("app2");
    ground.wait_note(began, "the second vote", ORDER, votes)?;
    let early = remedies(ground, began, "base");
    demand(early == 0, "two of three have asked, and it was reset")?;
    let took = reset_after(ground, "ask base", "reporting", &app3.0, (&base.0, &base.1, &base.2), &app3.2)?;
    ground.within("reset after the third vote", took, FAR)?;
    app1.2.wait_more("reported: ", 3)?;
    app2.2.wait_more("reported: ", 0)?;
    demand(base.2.count("up ") == boots + 1, "it was to boot once")?;
    demand(remedies(ground, began, "base") == 1, "it was to be done once")?;
    talkers.end()
}

pub fn fail(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    ground.watch()?;
    let talkers = Talkers::begin(ground, &[(NAME, &host)], true, SOON)?;
    let mut took = fails(ground, &talkers, "crash", "crashing")?;
    ground.within("reset after a panic that was told", took, PANIC)?;
    for (order, mark) in [("spin", "spinning"), ("hang", "hanging")] {
        took = fails(ground, &talkers, order, mark)?;
        ground.within(&format!("reset of one that is {mark}"), took, SILENCE + LATER)?;
    }
    mute(ground, &talkers)?;
    stall(ground, &talkers)?;
    talkers.end()?;

    let talkers = Talkers::begin(ground, &[(NAME, &host)], false, SOON)?;
    took = fails(ground, &talkers, "crash", "crashing")?;
    ground.within("reset after a panic that nobody tells", took, SILENCE + LATER)?;
    talkers.end()
}

/// Its guest fails; milliseconds from its mark to the reset, after which it is heard again.
fn fails(ground: &Ground, talkers: &Talkers, order: &str, mark: &str) -> Result<Duration> {
    let (guest, host, console) = &talkers.0[0];
    reset_after(ground, order, mark, guest, (guest, host, console), console)
}

/// The agent is dead, the guest works: told, and nothing else.
fn mute(ground: &mut Ground, talkers: &Talkers) -> Result<()> {
    let (guest, host, console) = &talkers.0[0];
    let (began, marks) = (Moment::now(), console.count("muted"));
    guest.tell(&ground.lab().store(), "mute")?;
    console.wait_more("muted", marks)?;
    let told = |note: &agents::Note| note.kind == "guest-agent-silent" && note.vm.as_deref() == Some(NAME);
    ground.wait_note(began, "its silence", ORDER, told)?;
    std::thread::sleep(SILENCE * 2);
    demand(remedies(ground, began, NAME) == 0, "it works, and was reset")?;
    // Only a new boot brings the agent back.
    let heard = console.count(HEARD);
    agents::ask(host, ORDER, &["virsh", "-q", "reset", NAME])?;
    console.wait_more(HEARD, heard).map(drop)
}

/// The storage of its host stalls: that is not the guest's fault.
fn stall(ground: &mut Ground, talkers: &Talkers) -> Result<()> {
    let host = &talkers.0[0].1;
    let mut reach = ground.guests_on(host)?;
    reach.push(NAME.to_owned());
    let began = ground.fault("its storage stalls", &reach)?;
    ground.lab().storage()?.fault(&host.name(), Fault::Hang)?;
    std::thread::sleep(SILENCE * 4);
    ground.lab().storage()?.fault(&host.name(), Fault::None)?;
    std::thread::sleep(SILENCE * 2);
    demand(remedies(ground, began, NAME) == 0, "its storage stalled, and it was reset")
}

fn permit(host: &Host, votes: u32) -> Result<()> {
    let permission =
        format!("[[permission]]\ntarget = \"base*\"\nby = \"app*\"\nremedy = \"reset\"\nvotes = {votes}\n");
    set_policy(host, &format!("{USUAL}{OFTEN}{permission}"))
}

fn demand(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { bail!("{what}") }
}

/// How often something was done to this guest.
fn remedies(ground: &Ground, since: Moment, name: &str) -> usize {
    let notes = agents::all_notes(&ground.hosts_on(), Moment::now().since(since));
    let is =
        |note: &&agents::Note| since <= note.at() && note.kind == "guest-remedy" && note.vm.as_deref() == Some(name);
    notes.iter().filter(is).count()
}

/// One guest is told something; from the mark on its console to the reset of the target, which is heard again afterwards.
fn reset_after(
    ground: &Ground,
    order: &str,
    mark: &str,
    guest: &Guest,
    target: (&Guest, &Host, &Console),
    console: &Console,
) -> Result<Duration> {
    let (target, host, there) = target;
    let (boots, marks, began) = (there.count("up "), console.count(mark), Moment::now());
    guest.tell(&ground.lab().store(), order)?;
    let marked = console.wait_more(mark, marks)?;
    let is = |note: &agents::Note| {
        note.kind == "guest-remedy" && note.host == host.name() && note.vm.as_deref() == Some(target.name())
    };
    let note = ground.wait_note(began, "the reset", ORDER, is)?;
    // Heard in the new boot: its first words may come twice.
    there.wait_more("up ", boots)?;
    there.wait_more_after("up ", HEARD)?;
    // Clocks of one machine; nothing else is written to the console between the mark and the reset.
    let ms = note.unix_ms.checked_sub(marked).context("the reset came before the report")?;
    Ok(Duration::from_millis(ms))
}

pub(super) fn set_policy(host: &Host, text: &str) -> Result<()> {
    let path = host.root_inside()?.join("tmp/guests.toml");
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    agents::ask(host, ORDER, &["mainstay", "cluster", "guest-policy", "/tmp/guests.toml"]).map(drop)
}
