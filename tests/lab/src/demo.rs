//! `cargo lab demo`: from nothing to a cluster whose master loses its power, told as it happens.
//!
//! ```text
//!  lab anew, six guests ──► protected ──► kill the master ──► timeline: what the agents say, what was seen from outside
//!                                                         ──► table: how long each guest was down ──► the lab stays up
//! ```

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::agents::{self, Note};
use crate::cases::{Ground, Setting, seconds};
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::{Lab, Wish};
use crate::product;

/// Lines are at most so long.
const COLUMNS: usize = 80;
/// Columns before the text of a line of the timeline.
const MARGIN: usize = 18;
const PATIENCE: Duration = Duration::from_secs(60);
/// After the last guest is up: notes that are still on their way.
const AFTERWARDS: Duration = Duration::from_secs(2);

/// Runs it.
pub fn run() -> Result<()> {
    say("Mainstay's demo: three hosts, six virtual machines, one power loss.");
    say("The first time it installs what is missing and builds the hosts: some minutes.\n");
    Lab::down()?;
    let lab = Lab::up(Wish { hosts: 3, product: Some(product::Wish::default()) })?;
    say("Three hosts are up, each with its own systemd, libvirt and QEMU. They are a");
    say("cluster, and /srv/shared is its datastore. Now six guests, two on each host.\n");
    let mut ground = Ground::new(lab, false);
    ground.prepare(Setting::SERVER)?;
    let master = ground.master()?;
    show_placement(&ground, &master)?;
    ground.watch()?;
    say(&format!("\nNow {} loses its power: the master itself, and what runs on it.\n", master.name()));
    let (killed, guests) = ground.kill(&master)?;
    let placed = tell(&ground, &master, &guests, killed)?;
    show_table(&ground, &master, &placed, killed)?;
    let verdict = ground.finish()?;
    ground.stop_watching();
    if verdict.violations.is_empty() {
        say("\nThe judges, who watch from outside, saw no guest run twice, no disk written by");
        say("two, and no other guest touched.\n");
    } else {
        say(&format!("\nThe judges, who watch from outside, object:\n{}\n", verdict.violations.join("\n")));
    }
    let other = ground.others(&[master])[0].name();
    say("The lab stays up. Look around:");
    let hints = [
        ("status".into(), "what is on, and where guests run".into()),
        (format!("sh {other} mainstay status"), format!("the cluster as {other} sees it")),
        (format!("sh {other} mainstay events"), "what happened, with reasons".into()),
        (format!("sh {other} mainstay vm explain {}", guests[0]), "why it is where it is".into()),
        (format!("start {}", master.name()), "power is back: it joins again".into()),
        ("down".to_owned(), "take everything away".to_owned()),
    ];
    for (command, what) in hints {
        say(&format!("  cargo lab {command:35} {what}"));
    }
    verdict.demand()
}

fn say(text: &str) {
    println!("{text}");
}

fn show_placement(ground: &Ground, master: &Host) -> Result<()> {
    for host in ground.hosts() {
        let role = if host == *master { "master" } else { "" };
        say(&format!("  {}  {role:7} runs {}", host.name(), ground.guests_on(&host)?.join(", ")));
    }
    Ok(())
}

/// Prints the timeline until all guests write again; gives where each is now, and when it was up.
fn tell(ground: &Ground, dead: &Host, guests: &[String], killed: Moment) -> Result<Vec<(String, String, Moment)>> {
    let judges = ground.judges()?;
    let deadline = killed.plus(PATIENCE);
    line(killed, killed, "lab", &format!("power of {} is cut", dead.name()));
    let (mut told, mut started, mut up) = (BTreeSet::new(), BTreeSet::new(), Vec::<(String, String, Moment)>::new());
    let mut end = None;
    while end.is_none_or(|end| Moment::now() < end) && Moment::now() < deadline {
        std::thread::sleep(Duration::from_millis(150));
        let mut lines: Vec<(Moment, String, String)> = Vec::new();
        for note in agents::all_notes(&ground.others(&[*dead]), Moment::now().since(killed)) {
            let at = note.at();
            // Its clock shows milliseconds, so it is found at slightly different moments.
            if killed <= at && told.insert((note.unix_ms, note.host.clone(), note.text.clone())) && is_told(&note) {
                lines.push((at, note.host, note.text));
            }
        }
        for guest in guests {
            let id = ground.id(guest);
            if let Some(start) = judges.started(id, killed)
                && started.insert(guest.clone())
            {
                lines.push((start.ran, "seen".into(), format!("{guest} executes on {}", start.host)));
            }
            if let (Some(at), Some(start)) = (judges.guest_up(id, killed), judges.started(id, killed))
                && up.iter().all(|(name, ..)| name != guest)
            {
                lines.push((at, "seen".into(), format!("{guest} is up: it writes to its disk")));
                up.push((guest.clone(), start.host, at));
            }
        }
        lines.sort();
        lines.iter().for_each(|(at, who, what)| line(killed, *at, who, what));
        if up.len() == guests.len() && end.is_none() {
            end = Some(Moment::now().plus(AFTERWARDS));
        }
    }
    up.sort();
    Ok(up)
}

/// Notes of what matters to somebody who sees it for the first time.
fn is_told(note: &Note) -> bool {
    note.level != "info" || matches!(note.kind.as_str(), "master" | "vm-started" | "vm-restarted" | "host-live")
}

fn line(zero: Moment, at: Moment, who: &str, what: &str) {
    let first = format!("{:8.2} s  {who:5} ", at.since(zero).as_secs_f64());
    let mut rest = what;
    let mut lead = format!("{first:MARGIN$}");
    loop {
        let (now, later) = split(rest, COLUMNS - MARGIN);
        println!("{lead}{now}");
        if later.is_empty() {
            return;
        }
        rest = later;
        lead = " ".repeat(MARGIN);
    }
}

/// The first part of a text, cut between words where it can be, and the rest.
fn split(text: &str, most: usize) -> (&str, &str) {
    let Some((limit, _)) = text.char_indices().nth(most) else { return (text, "") };
    match text[..limit].rfind(' ') {
        Some(at) if 0 < at => (&text[..at], text[at..].trim_start()),
        _ => text.split_at(limit),
    }
}

fn show_table(ground: &Ground, dead: &Host, up: &[(String, String, Moment)], killed: Moment) -> Result<()> {
    say("\n  guest   was on   is on   executes after   up after   down for");
    for (guest, host, at) in up {
        let start = ground.judges()?.started(ground.id(guest), killed).context("it was started")?;
        let last = ground.judges()?.last_write_before(ground.id(guest), killed).unwrap_or(killed);
        let [executes, up, down] = [start.ran.since(killed), at.since(killed), at.since(last)].map(seconds);
        say(&format!("  {guest:7} {:8} {host:7} {executes:>14}   {up:>8}   {down:>8}", dead.name()));
    }
    for guest in ground.lab().guests().iter().filter(|guest| up.iter().all(|(name, ..)| name != guest.name())) {
        if let Ok(host) = ground.host_of(guest.name()) {
            let name = guest.name();
            say(&format!("  {name:7} {:8} {:7} {:>14}   {:>8}   {:>8}", host.name(), host.name(), "-", "-", "0 s"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_words() {
        let cases = [
            ("short", 10, ("short", "")),
            ("two words", 5, ("two", "words")),
            ("unbroken", 3, ("unb", "roken")),
            ("", 3, ("", "")),
        ];
        for (text, most, expected) in cases {
            assert_eq!(split(text, most), expected, "{text}");
        }
    }
}
