//! Guests that speak: a guest's agent says that it is broken, and its host answers.
//!
//! ```text
//!  lab ─► command sector ─► guest: "reporting" on its console ─► mainstay-guest report --ask reset
//!                                    │ the lab's clock                    │ channel
//!                                    └──────── measured ────────► note "guest-remedy", at once followed by the reset
//! ```

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::Ground;
use crate::agents;
use crate::guest::{CONSOLES, Guest};
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;

const ORDER: Duration = Duration::from_secs(60);
/// From the mark on the guest's console to the reset's note, median.
const LIMIT: Duration = Duration::from_millis(250);
const NAME: &str = "talker";
/// The guest's agent has heard its host; said in each boot.
const HEARD: &str = "mainstay-guest: the host listens";
/// Other limits than a cluster's: each run ends in a reset.
const POLICY: &str = "[[rule]]\nseverity = \"critical\"\nthen = \"as-asked\"\n\n\
                      [limits]\nresets_per_hour = 1000\nbackoff_s = 0\n";
const NO_POLICY: &str = "[[rule]]\nseverity = \"critical\"\nthen = \"as-asked\"\n";

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

    /// Waits for one more of them; when the console was written to last, in milliseconds since 1970. The kernel stamps files
    /// by its tick, so that is up to 4 ms early, never late.
    fn wait_more(&self, word: &str, than: usize) -> Result<u64> {
        wait(ORDER, &format!("\"{word}\" on the console of {NAME}"), || {
            if self.count(word) <= than {
                return Ok(None);
            }
            let written = fs::metadata(&self.0)?.modified()?.duration_since(UNIX_EPOCH).context("the clock of day")?;
            Ok(Some(u64::try_from(written.as_millis())?))
        })
    }
}

pub fn report(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    let (guest, store) = (Guest::new(NAME)?, ground.lab().store());
    set_policy(&host, POLICY)?;
    guest.make_disk(&store)?;
    guest.define_talking(&host, ground.lab().accelerator())?;
    ground.watch()?;
    guest.start(&host)?;
    let console = Console::of(&host, NAME)?;
    console.wait_more("up ", 0)?;
    let runs = if ground.full { 20 } else { 5 };
    let (mut took, mut heard) = (Vec::new(), 0);
    for _ in 0..runs {
        console.wait_more(HEARD, heard)?;
        heard = console.count(HEARD);
        took.push(once(ground, &host, &guest, &console)?);
    }
    took.sort_unstable();
    ground.figure(format!("{} ms to {} ms", took[0], took[runs - 1]));
    ground.within("reset after the report, median", Duration::from_millis(took[runs / 2]), LIMIT)?;
    agents::ask(&host, ORDER, &["virsh", "-q", "destroy", NAME])?;
    agents::ask(&host, ORDER, &["virsh", "-q", "undefine", NAME])?;
    set_policy(&host, NO_POLICY)
}

/// One report, until the guest is up again. Milliseconds from the guest's mark to the reset.
fn once(ground: &Ground, host: &Host, guest: &Guest, console: &Console) -> Result<u64> {
    let (boots, marks, began) = (console.count("up "), console.count("reporting"), Moment::now());
    guest.tell(&ground.lab().store(), "report")?;
    let marked = console.wait_more("reporting", marks)?;
    console.wait_more("up ", boots)?;
    let note =
        ground.wait_note(began, "the reset", ORDER, |note| note.kind == "guest-remedy" && note.host == host.name())?;
    // Clocks of one machine; nothing else is written to the console between the mark and the reset.
    note.unix_ms.checked_sub(marked).context("the reset came before the report")
}

fn set_policy(host: &Host, text: &str) -> Result<()> {
    let path = host.root_inside()?.join("tmp/guests.toml");
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    agents::ask(host, ORDER, &["mainstay", "cluster", "guest-policy", "/tmp/guests.toml"]).map(drop)
}
