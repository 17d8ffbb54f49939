//! Random stories by seed, a few of those that `cargo lab sim` plays: whatever happens, the invariants hold after every
//! event, and after the heal every wanted VM runs exactly once and nothing waits. A failing seed prints its story.
//!
//! `SEED=7` plays one; `SEEDS=1000` that many, however long it takes; `FROM=5000` begins there.

mod sim;

use std::time::Duration;

use sim::chance::{Wish, story};
use sim::runs::{Plan, explain, play_all};

/// Seeds of an ordinary test run; it ends earlier when `ENOUGH` has passed.
const SEEDS: u64 = 200;
const ENOUGH: Duration = Duration::from_secs(25);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn clusters_survive_random_trouble() {
    let wish = Wish::default();
    let from = number("SEED").or_else(|| number("FROM")).unwrap_or(1);
    let seeds = if number("SEED").is_some() { Some(1) } else { number("SEEDS") };
    let within = if seeds.is_none() { Some(ENOUGH) } else { None };
    let plan = Plan { from, seeds: seeds.unwrap_or(SEEDS), within, ..Plan::default() };
    let tally = play_all(&plan, || {});
    println!("{} seeds, {:.0} s of processor time", tally.seeds, tally.core_seconds);
    let list: Vec<String> = tally.failed.iter().map(|(seed, wrong)| format!("seed {seed}: {wrong}")).collect();
    let first = tally.failed.keys().next().map(|seed| explain(*seed, &wish)).unwrap_or_default();
    assert!(tally.failed.is_empty(), "{} of {} seeds fail:\n{}\n{first}", list.len(), tally.seeds, list.join("\n"));
    assert!(0 < tally.seeds, "some seed was played");
}

/// The same seed is the same run, to the last line; and so is the story in words.
#[test]
fn a_seed_is_a_run() {
    let told = |seed| story(seed, &Wish::default()).play().story;
    assert_eq!(told(5), told(5));
    let scenario = story(5, &Wish::default());
    let again = sim::scenario::Scenario::parse(&scenario.to_string());
    assert_eq!(again.to_string(), scenario.to_string());
    assert_eq!(again.play().story, told(5));
}
