//! Guests that speak: a guest's agent says that it or another guest is broken, or says nothing any more; and what follows.
//!
//! ```text
//!  lab ─► command sector ─► guest: "reporting" on its console ─► mainstay-guest report --ask reset
//!                                    │ the lab's clock                    │ channel
//!                                    └──────── measured ────────► note "guest-remedy", at once followed by the reset
//! ```
//!
//! The same from "crashing", "spinning", "hanging" for guests that say nothing.

mod asks;
mod debian;
mod fails;
mod floods;
mod reconnects;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

pub use self::asks::{ask_for_others, report};
pub use self::debian::debian;
pub use self::fails::{fail, panics_always};
pub use self::floods::flood;
pub use self::reconnects::reconnect;
use super::Ground;
use crate::agents;
use crate::guest::{CONSOLES, Guest, Talking};
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;

const ORDER: Duration = Duration::from_secs(60);
const NAME: &str = "talker";
/// The guest's agent has heard its host; said in each boot.
pub(super) const HEARD: &str = "mainstay-guest: the host listens";
/// What a cluster has by itself.
pub(super) const USUAL: &str = "[[rule]]\nseverity = \"critical\"\nthen = \"as-asked\"\n";
/// Other limits than a cluster's: each run ends in a reset.
const OFTEN: &str = "[limits]\nresets_per_hour = 1000\nbackoff_s = 0\n";

/// What one guest's console shows.
struct Console(PathBuf);

impl Console {
    fn of(host: &Host, name: &str) -> Result<Console> {
        Ok(Console(host.root_inside()?.join(CONSOLES).join(format!("{name}.log"))))
    }

    /// All of it, in whole lines.
    fn text(&self) -> String {
        let mut text = String::from_utf8_lossy(&fs::read(&self.0).unwrap_or_default()).replace('\r', "");
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        text
    }

    /// Lines that begin so.
    fn count(&self, word: &str) -> usize {
        self.text().lines().filter(|line| line.starts_with(word)).count()
    }

    /// Waits for a line that begins so after the last one that begins with `after`.
    fn wait_more_after(&self, after: &str, word: &str) -> Result<()> {
        wait(ORDER, &format!("\"{word}\" after \"{after}\" on {}", self.0.display()), || {
            let text = self.text();
            let since = text.rsplit_once(&format!("\n{after}")).map_or("", |(_, rest)| rest);
            Ok(since.lines().any(|line| line.starts_with(word)).then_some(()))
        })
    }

    /// The last line that begins so.
    fn last(&self, word: &str) -> Result<String> {
        let text = self.text();
        let line = text.lines().rev().find(|line| line.starts_with(word)).with_context(|| format!("no \"{word}\""))?;
        Ok(line.to_owned())
    }

    /// The numbers in the last line that begins so.
    fn numbers(&self, word: &str) -> Result<Vec<u64>> {
        let line = self.last(word)?;
        Ok(line.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect())
    }

    /// Somewhere.
    fn has(&self, text: &str) -> bool {
        self.text().contains(text)
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

/// One guest with an agent.
struct Talker {
    guest: Guest,
    host: Host,
    console: Console,
}

impl Talker {
    /// Tells it something through its disk.
    fn tell(&self, ground: &Ground, word: &str) -> Result<()> {
        self.guest.tell(&ground.lab().store(), word)
    }

    fn name(&self) -> &str {
        self.guest.name()
    }
}

/// Guests with an agent, for one case.
struct Talkers(Vec<Talker>);

impl Talkers {
    /// All of them up, and their agents heard.
    fn begin(ground: &Ground, names: &[(&str, &Host)], talking: Talking, policy: &str) -> Result<Talkers> {
        set_policy(names[0].1, policy)?;
        let mut all = Vec::new();
        for (name, host) in names {
            let guest = Guest::new(name)?;
            guest.make_new_disk(&ground.lab().store())?; // An old one may hold an order.
            guest.define_talking(host, ground.lab().accelerator(), talking)?;
            guest.start(host)?; // Its console begins anew.
            all.push(Talker { guest, host: **host, console: Console::of(host, name)? });
        }
        for talker in &all {
            talker.console.wait_more(HEARD, 0)?;
        }
        Ok(Talkers(all))
    }
}

/// Takes away guests that the lab does not know, which are a case's own, and their policy. Whatever state a case has left them in.
pub(super) fn clear(ground: &Ground) -> Result<()> {
    let mut found = false;
    for host in ground.hosts_on() {
        let all = agents::ask(&host, ORDER, &["virsh", "-q", "list", "--all", "--name"])?;
        for name in
            all.split_whitespace().filter(|name| ground.lab().guests().iter().all(|known| known.name() != *name))
        {
            found = true;
            let _ = agents::ask(&host, ORDER, &["virsh", "-q", "destroy", name]); // One that is off is no less well.
            let undefine = ["virsh", "-q", "undefine", "--managed-save", "--snapshots-metadata", name];
            agents::ask(&host, ORDER, &undefine)?;
        }
    }
    match ground.hosts_on().first() {
        Some(host) if found => set_policy(host, USUAL),
        Some(_) | None => Ok(()),
    }
}

/// The usual policy with limits that a case does not reach, and more.
fn often(more: &str) -> String {
    format!("{USUAL}{OFTEN}{more}")
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
fn reset_after(ground: &Ground, order: &str, mark: &str, guest: &Talker, target: &Talker) -> Result<Duration> {
    reset_after_a_look(ground, (order, mark), guest, target, || Ok(()))
}

/// The same; the guest that was told is looked at as soon as its mark is there.
fn reset_after_a_look(
    ground: &Ground,
    (order, mark): (&str, &str),
    guest: &Talker,
    target: &Talker,
    look: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    let (boots, marks, began) = (target.console.count("up "), guest.console.count(mark), Moment::now());
    guest.tell(ground, order)?;
    let marked = guest.console.wait_more(mark, marks)?;
    look()?;
    let is = |note: &agents::Note| {
        note.kind == "guest-remedy" && note.host == target.host.name() && note.vm.as_deref() == Some(target.name())
    };
    let note = ground.wait_note(began, "the reset", ORDER, is)?;
    // Heard in the new boot: its first words may come twice.
    target.console.wait_more("up ", boots)?;
    target.console.wait_more_after("up ", HEARD)?;
    // Clocks of one machine; nothing else is written to the console between the mark and the reset.
    let ms = note.unix_ms.checked_sub(marked).context("the reset came before the report")?;
    Ok(Duration::from_millis(ms))
}

pub(super) fn set_policy(host: &Host, text: &str) -> Result<()> {
    let path = host.root_inside()?.join("tmp/guests.toml");
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    agents::ask(host, ORDER, &["mainstay", "cluster", "guest-policy", "/tmp/guests.toml"]).map(drop)
}
