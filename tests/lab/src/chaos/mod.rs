//! `cargo lab chaos`: random faults by seed against a whole cluster, with all judges, then healing and a verdict.
//!
//! ```text
//!  seed ──► plan (all faults, drawn before anything happens)
//!  round 1: setting A ──► healthy ──► faults ──► healed ──► settled? ──► judges ──┐
//!  round 2: setting B (other locks) …                                             ├──► V violations; longest … s of VM
//!  …                                                                              ┘    each violation: story and logs
//! ```
//!
//! - `plan`: which faults come when. `faults`: how each is made and healed. `people`: what operators do.
//! - `trouble`: whom a fault may touch. `round`: one round. `story`: what happened, by time.
//!
//! The same seed gives the same faults at the same times. What they meet differs from run to run: the lab is real.

mod faults;
mod people;
mod plan;
mod round;
mod story;
mod trouble;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::agents;
use crate::cases::{GUESTS, Ground, Setting, report, seconds};
use crate::judge::Gain;
use crate::lab::{Lab, Wish};
use crate::product;

pub use plan::{Dice, Step, plan};
pub use round::{Outcome, play};

/// Guests beyond those of the cases: eight in all.
const MORE: [&str; 2] = ["news", "blog"];
/// Length of a round at most; between rounds everything must have come back.
const ROUND: Duration = Duration::from_secs(150);
/// Taken in turn; which is first follows from the seed.
const SETTINGS: [Setting; 3] = [Setting::SERVER, Setting::LOCAL_FENCED, Setting::LEASED];

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Time of faults, over all rounds.
    pub minutes: u32,
    /// Which faults.
    pub seed: u64,
    /// 3 to 5.
    pub hosts: u8,
    /// Only tell which.
    pub dry_run: bool,
}

/// Runs it; gives the number of violations.
pub fn run(asked: Asked) -> Result<usize> {
    if asked.minutes == 0 || !(3..=5).contains(&asked.hosts) {
        bail!("chaos needs at least a minute, and 3 to 5 hosts");
    }
    let whole = Duration::from_secs(60) * asked.minutes;
    let rounds = whole.as_secs().div_ceil(ROUND.as_secs());
    let length = whole / rounds as u32;
    let settings = SETTINGS.iter().cycle().skip((asked.seed % SETTINGS.len() as u64) as usize);
    if asked.dry_run {
        let hosts: Vec<_> = (1..=asked.hosts).map(crate::host::Host::new).collect();
        for (round, setting) in (1..=rounds).zip(settings) {
            println!("{}", title(&asked, round, rounds, length, setting));
            plan(&mut Dice::new(asked.seed, round), &hosts, &names(), length).iter().for_each(show);
        }
        return Ok(0);
    }
    let lab = Lab::up(Wish { hosts: asked.hosts, product: Some(product::Wish::default()) })?;
    lab.upgrade()?;
    let mut ground = Ground::new(lab, true);
    let (mut violations, mut longest) = (0, (Duration::ZERO, "none".to_owned()));
    for (round, setting) in (1..=rounds).zip(settings) {
        println!("{}", title(&asked, round, rounds, length, setting));
        ready(&mut ground, *setting).with_context(|| format!("before round {round}"))?;
        let steps = plan(&mut Dice::new(asked.seed, round), &ground.hosts(), &names(), length);
        let (wrong, down) = one(&mut ground, &steps, asked.seed, round)?;
        violations += wrong;
        longest = longest.max(down);
    }
    println!("{violations} violations; longest unexplained downtime {} of {}", seconds(longest.0), longest.1);
    Ok(violations)
}

fn names() -> Vec<String> {
    GUESTS.iter().chain(&MORE).map(|name| (*name).to_owned()).collect()
}

fn title(asked: &Asked, round: u64, rounds: u64, length: Duration, setting: &Setting) -> String {
    let (seed, length) = (asked.seed, seconds(length));
    format!("seed {seed}, round {round} of {rounds}, {length}: locks {:?}, fence {}", setting.locks, setting.fence)
}

fn show(step: &Step) {
    println!("{:6.1} s  {} (for {})", step.at.as_secs_f64(), step.fault, seconds(step.lasts));
}

fn ready(ground: &mut Ground, setting: Setting) -> Result<()> {
    ground.prepare(setting)?;
    for name in MORE {
        ground.also(name)?;
    }
    ground.prepare(setting)
}

/// One round with its verdict: violations, and the longest downtime.
fn one(ground: &mut Ground, steps: &[Step], seed: u64, round: u64) -> Result<(usize, (Duration, String))> {
    let begun = Instant::now();
    let outcome = play(ground, steps).with_context(|| format!("seed {seed}, round {round}"))?;
    let verdict = ground.finish();
    let mut wrong = outcome.violations.clone();
    match &verdict {
        Ok(verdict) => wrong.extend(verdict.violations.clone()),
        Err(why) => wrong.push(format!("{why:#}")),
    }
    ground.take_figures();
    let (down, whose) = &outcome.longest;
    println!(
        "{} faults and deeds; settled {} after healing; {} violations; longest unexplained downtime {} of {whose}",
        outcome.done,
        seconds(outcome.settled),
        wrong.len(),
        seconds(*down)
    );
    if let Ok(verdict) = &verdict {
        show_gains(&verdict.thaws);
    }
    if !wrong.is_empty() {
        let notes = agents::all_notes(&ground.hosts(), begun.elapsed());
        let text = format!("seed {seed}, round {round}\n{}\n\n{}", wrong.join("\n"), outcome.story.with_notes(&notes));
        let name = format!("chaos-{seed}-{round}");
        let path = report::write(ground, &name, &text, verdict.as_ref().ok(), begun.elapsed())?;
        wrong.iter().for_each(|what| println!("VIOLATION (seed {seed}, round {round}): {what}"));
        println!("story and logs: {}", path.display());
    }
    ground.stop_watching();
    Ok((wrong.len(), outcome.longest))
}

fn show_gains(gains: &[Gain]) {
    if !gains.is_empty() {
        let ms: Vec<String> = gains.iter().map(|gain| format!("{:.1}", gain.gained.as_secs_f64() * 1000.0)).collect();
        println!("old copies gained after thaws: {} ms", ms.join(", "));
    }
}
