//! A guest asks for a remedy of itself or of another one.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{NAME, ORDER, Talkers, clear, demand, often, remedies, reset_after, set_policy};
use crate::agents;
use crate::cases::Ground;
use crate::guest::Talking;
use crate::host::Host;
use crate::judge::Moment;

/// From the mark on the guest's console to the reset's note, median.
const LIMIT: Duration = Duration::from_millis(250);
/// To the reset of another guest, on the same host and on another.
const NEAR: Duration = Duration::from_secs(1);
const FAR: Duration = Duration::from_millis(1500);

pub fn report(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    ground.watch()?;
    let talkers = Talkers::begin(ground, &[(NAME, &host)], Talking::default(), &often(""))?;
    let runs = if ground.full { 20 } else { 5 };
    let mut took = Vec::new();
    for _ in 0..runs {
        took.push(reset_after(ground, "report", "reporting", &talkers.0[0], &talkers.0[0])?);
    }
    took.sort_unstable();
    ground.figure(format!("{} ms to {} ms", took[0].as_millis(), took[runs - 1].as_millis()));
    ground.within("reset after the report, median", took[runs / 2], LIMIT)?;
    clear(ground)
}

pub fn ask_for_others(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    let far = ground.others(&[host]).into_iter().next().context("three hosts")?;
    ground.watch()?;
    let names = [("app1", &host), ("app2", &host), ("app3", &far), ("base", &host), ("basefar", &far)];
    let talkers = Talkers::begin(ground, &names, Talking::default(), &often(""))?;
    let [app1, app2, app3, base, far_base] = &talkers.0[..] else { unreachable!("as many as names") };

    let began = Moment::now();
    app1.tell(ground, "ask base")?;
    app1.console.wait_more("reported: ", 0)?;
    demand(
        app1.console.count("reported: ") == 1 && app1.console.has("denied: base lets app1 ask for no reset"),
        "it was to be denied",
    )?;
    ground.wait_note(began, "the denial", ORDER, |note| note.kind == "guest-request-denied")?;

    permit(&host, 1)?;
    for (what, target, limit) in [("on the same host", base, NEAR), ("on another host", far_base, FAR)] {
        let took = reset_after(ground, &format!("ask {}", target.name()), "reporting", app1, target)?;
        ground.within(&format!("reset of a guest {what}"), took, limit)?;
    }

    permit(&host, 3)?;
    let (began, boots) = (Moment::now(), base.console.count("up "));
    for app in [app1, app2] {
        let marks = app.console.count("reporting");
        app.tell(ground, "ask base")?;
        app.console.wait_more("reporting", marks)?;
    }
    let votes = |note: &agents::Note| note.kind == "guest-report" && note.text.starts_with("app2");
    ground.wait_note(began, "the second vote", ORDER, votes)?;
    let early = remedies(ground, began, "base");
    demand(early == 0, "two of three have asked, and it was reset")?;
    let took = reset_after(ground, "ask base", "reporting", app3, base)?;
    ground.within("reset after the third vote", took, FAR)?;
    app1.console.wait_more("reported: ", 3)?;
    app2.console.wait_more("reported: ", 0)?;
    demand(base.console.count("up ") == boots + 1, "it was to boot once")?;
    demand(remedies(ground, began, "base") == 1, "it was to be done once")?;
    clear(ground)
}

/// `base…` may be reset when so many of `app…` ask.
fn permit(host: &Host, votes: u32) -> Result<()> {
    let permission =
        format!("[[permission]]\ntarget = \"base*\"\nby = \"app*\"\nremedy = \"reset\"\nvotes = {votes}\n");
    set_policy(host, &often(&permission))
}
