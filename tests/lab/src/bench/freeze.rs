//! `cargo lab bench freeze`: what old copies gain when a frozen host goes on, over many runs.
//!
//! ```text
//!  N/2 runs  locks at a server  ┐ each: healthy ─► freeze ─► taken elsewhere ─► thaw ─► old copies killed
//!  N/2 runs  local locks        ┘       vCPU time of each old copy after the thaw; writers judged each time
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cases::{Ground, Setting, freeze_for};
use crate::lab::{Lab, Wish};
use crate::product;

/// What `bench freeze` is asked.
#[derive(Clone, Copy, Debug)]
pub struct Freeze {
    /// How often; half of them with local locks.
    pub runs: usize,
    /// How long each freeze lasts.
    pub time: Duration,
}

/// Freezes hosts, and prints what their old copies gained.
pub fn freeze(asked: Freeze, as_json: bool) -> Result<()> {
    if asked.runs == 0 {
        bail!("at least one run");
    }
    let lab = Lab::up(Wish { hosts: super::HOSTS, product: Some(product::Wish::default()) })?;
    lab.upgrade()?;
    let mut ground = Ground::new(lab, true);
    let (mut gains, mut violations) = (Vec::new(), Vec::new());
    for number in 1..=asked.runs {
        let setting = if number <= asked.runs.div_ceil(2) { Setting::SERVER } else { Setting::LOCAL_FENCED };
        let (of_run, wrong) = one_run(&mut ground, setting, asked.time).with_context(|| format!("run {number}"))?;
        let told: Vec<String> = of_run.iter().map(|ms| format!("{ms:.1}")).collect();
        eprintln!("run {number} of {}: gained {} ms, {} violations", asked.runs, told.join(", "), wrong.len());
        wrong.iter().for_each(|what| eprintln!("  {what}"));
        gains.extend(of_run);
        violations.extend(wrong);
    }
    gains.sort_by(f64::total_cmp);
    if gains.is_empty() {
        bail!("no old copy was seen after a thaw");
    }
    let at = |share: f64| gains[((gains.len() - 1) as f64 * share).round() as usize];
    let (median, ninety, most) = (at(0.5), at(0.9), at(1.0));
    if as_json {
        let (runs, seconds) = (asked.runs, asked.time.as_secs());
        println!(
            "{}",
            json!({ "runs": runs, "seconds": seconds, "gained_ms": gains, "median": median, "p90": ninety, "max": most,
                    "violations": violations })
        );
    } else {
        println!("{} old copies gained (ms): median {median:.1}, 90 % {ninety:.1}, most {most:.1}", gains.len());
        for (from, to) in [(0.0, 1.0), (1.0, 2.0), (2.0, 5.0), (5.0, 10.0), (10.0, 20.0), (20.0, f64::INFINITY)] {
            let count = gains.iter().filter(|gain| from <= **gain && **gain < to).count();
            println!("  {from:4.0} to {to:3.0} ms {count:5}");
        }
        println!("{} violations", violations.len());
    }
    if violations.is_empty() { Ok(()) } else { bail!("{}", violations.join("\n")) }
}

/// Milliseconds that each old copy gained, and what the judges object to.
fn one_run(ground: &mut Ground, setting: Setting, time: Duration) -> Result<(Vec<f64>, Vec<String>)> {
    ground.prepare(setting)?;
    freeze_for(ground, time)?;
    let verdict = ground.finish()?;
    ground.take_figures();
    let ms = verdict.thaws.iter().map(|gain| gain.gained.as_secs_f64() * 1000.0).collect();
    Ok((ms, verdict.violations))
}
