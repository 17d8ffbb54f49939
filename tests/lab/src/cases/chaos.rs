//! A minute of chaos, always the same: a short form of `cargo lab chaos`.

use std::time::Duration;

use anyhow::{Result, bail};

use super::ground::seconds;
use super::{GUESTS, Ground};
use crate::chaos::{Dice, plan, play};

const SEED: u64 = 3;
const LENGTH: Duration = Duration::from_secs(60);
/// `--full` takes five.
const LENGTH_FULL: Duration = Duration::from_secs(300);

pub fn short(ground: &mut Ground) -> Result<()> {
    let length = if ground.full { LENGTH_FULL } else { LENGTH };
    let names = GUESTS.map(str::to_owned);
    let steps = plan(&mut Dice::new(SEED, 1), &ground.hosts(), &names, length);
    let outcome = play(ground, &steps)?;
    ground.figure(format!("{} faults and deeds, settled {}", outcome.done, seconds(outcome.settled)));
    let (down, whose) = &outcome.longest;
    ground.figure(format!("longest unexplained downtime {} of {whose}", seconds(*down)));
    if !outcome.violations.is_empty() {
        bail!("{}\n{}", outcome.violations.join("\n"), outcome.story.told());
    }
    Ok(())
}
