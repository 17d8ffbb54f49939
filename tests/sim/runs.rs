//! Many seeds on all cores: what they count, what they find, how a find is made small; and planted bugs.
//!
//! A failing seed prints the smallest story that was found to fail as it does, ready to become a file of
//! `tests/scenarios`, with what happens in it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::chance::{Wish, story};
use super::scenario::Scenario;
use super::world::SETTLING;

/// Lines of a failing story that are shown: its end.
const TOLD: usize = 120;

/// For making a story smaller.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a number of seeds came to.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Stories that were played.
    pub seeds: u64,
    /// Claims, takeovers, lapses in them.
    pub claims: u64,
    pub takeovers: u64,
    pub lapses: u64,
    /// Simulated time, summed over hosts.
    pub host_seconds: f64,
    /// Events.
    pub events: u64,
    /// Time that the cores spent on it.
    pub core_seconds: f64,
    /// What went wrong, by seed.
    pub failed: BTreeMap<u64, String>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.claims += other.claims;
        self.takeovers += other.takeovers;
        self.lapses += other.lapses;
        self.host_seconds += other.host_seconds;
        self.events += other.events;
        self.core_seconds += other.core_seconds;
        self.failed.extend(other.failed);
    }
}

/// Which seeds, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The first.
    pub from: u64,
    /// How many.
    pub seeds: u64,
    /// Not left to chance.
    pub wish: Wish,
    /// Worlds at the same time.
    pub jobs: usize,
    /// Ends when so many have failed.
    pub enough: usize,
    /// Ends after so long.
    pub within: Option<Duration>,
    /// Says on stderr how far it is.
    pub loud: bool,
}

impl Default for Plan {
    fn default() -> Self {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        Self { from: 1, seeds: 1, wish: Wish::default(), jobs, enough: 10, within: None, loud: false }
    }
}

/// Plays one story. Err = what is wrong, and all that happened.
pub fn play(scenario: &Scenario) -> (Tally, Result<(), (String, Vec<String>)>) {
    let began = cpu_time();
    let played = catch_unwind(AssertUnwindSafe(|| {
        let world = scenario.play();
        let wrong = scenario.verdict(&world);
        let tally = Tally {
            seeds: 1,
            claims: world.judge.claims,
            takeovers: world.judge.takeovers,
            lapses: world.judge.lapses,
            host_seconds: (scenario.length + SETTLING).as_secs_f64() * world.hosts.len() as f64,
            events: world.events,
            ..Tally::default()
        };
        let told = wrong.is_some().then(|| {
            let mut lines = world.story[world.told..].to_vec();
            lines.extend(world.facts().into_iter().map(|fact| format!("= {fact}")));
            lines
        });
        (tally, wrong.zip(told).map_or(Ok(()), Err))
    }));
    let (mut tally, result) = played.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
        (Tally { seeds: 1, ..Tally::default() }, Err((format!("panic: {text}"), Vec::new())))
    });
    tally.core_seconds = cpu_time() - began;
    (tally, result)
}

/// Processor time of this thread.
fn cpu_time() -> f64 {
    let at =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every thread has this clock");
    Duration::from(at).as_secs_f64()
}

/// Plays all seeds of a plan; `prepare` is called in every thread first.
pub fn play_all(plan: &Plan, prepare: impl Fn() + Sync) -> Tally {
    let next = AtomicU64::new(plan.from);
    let end = plan.from + plan.seeds;
    let (total, began) = (Mutex::new(Tally::default()), Instant::now());
    let told = Mutex::new(Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs.max(1) {
            let worker = || {
                prepare();
                loop {
                    let over = plan.within.is_some_and(|within| within <= began.elapsed());
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if end <= seed || over || plan.enough <= total.lock().unwrap().failed.len() {
                        return;
                    }
                    let (mut tally, result) = play(&story(seed, &plan.wish));
                    if let Err((wrong, _)) = result {
                        if plan.loud {
                            eprintln!("seed {seed}: {wrong}");
                        }
                        tally.failed.insert(seed, wrong);
                    }
                    let mut total = total.lock().unwrap();
                    total.add(tally);
                    let mut told = told.lock().unwrap();
                    if plan.loud && Duration::from_secs(5) < told.elapsed() {
                        *told = Instant::now();
                        eprintln!(
                            "{:>6.0} s  {} of {} seeds, {} failed",
                            began.elapsed().as_secs_f64(),
                            total.seeds,
                            plan.seeds,
                            total.failed.len()
                        );
                    }
                }
            };
            scope.spawn(worker);
        }
    });
    total.into_inner().unwrap()
}

/// A violation without the names and numbers of its story.
fn kind_of(why: &str, scenario: &Scenario) -> String {
    let setup = &scenario.setup;
    let named = |word: &str| setup.hosts.iter().chain(setup.vms.iter().map(|(vm, ..)| vm)).any(|name| name == word);
    let words = why.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty() && !named(word));
    words.collect::<Vec<_>>().join(" ")
}

/// Takes out of a failing story whatever it fails without.
pub fn shrink(scenario: &Scenario) -> Scenario {
    let began = Instant::now();
    let mut small = scenario.clone();
    // In the same way: of another fault the story would say nothing.
    let how = |scenario: &Scenario| play(scenario).1.err().map(|(why, _)| kind_of(&why, scenario));
    let first = how(&small);
    let fails = |scenario: &Scenario| how(scenario) == first;
    let mut at = small.acts.len();
    while 0 < at && began.elapsed() < PATIENCE {
        at -= 1;
        // What heals is no part of what went wrong, and without it nothing settles.
        if small.acts.iter().any(|act| act.1 == "heal everything" && act.0 <= small.acts[at].0) {
            continue;
        }
        let mut smaller = small.clone();
        smaller.acts.remove(at);
        if fails(&smaller) {
            small = smaller;
            at = at.min(small.acts.len());
        }
    }
    while 1 < small.setup.vms.len() && began.elapsed() < PATIENCE {
        let mut smaller = small.clone();
        let (last, ..) = smaller.setup.vms.pop().expect("more than one");
        smaller.acts.retain(|(_, what)| !what.split(' ').any(|word| word == last));
        if !fails(&smaller) {
            break;
        }
        small = smaller;
    }
    small
}

/// What a failing seed shows: its smallest story, and how to play it again.
pub fn explain(seed: u64, wish: &Wish) -> String {
    let whole = story(seed, wish);
    let Err((wrong, told)) = play(&whole).1 else { return format!("seed {seed} is well") };
    let small = shrink(&whole);
    let (wrong, told, scenario) = match play(&small).1 {
        Err((wrong, told)) => (wrong, told, &small),
        Ok(()) => (wrong, told, &whole),
    };
    let mut lines = vec![format!("# Found by seed {seed}: {wrong}.")];
    lines.extend(scenario.to_string().lines().map(str::to_owned));
    lines.push("----".to_owned());
    let left_out = told.len().saturating_sub(TOLD);
    if 0 < left_out {
        lines.push(format!("({left_out} lines before)"));
    }
    lines.extend(told.into_iter().skip(left_out));
    lines.push(format!("again: cargo lab sim --seed {seed}; every step: --trace; kept: tests/scenarios/NAME.txt"));
    lines.join("\n")
}

/// Looks for a seed that fails with this bug planted, and is well without it. Ok: seeds played, the seed, what is wrong
/// then; Err: seeds played.
#[cfg(feature = "mutants")]
pub fn hunt(plan: &Plan, mutant: mainstay::mutants::Mutant) -> Result<(u64, u64, String), u64> {
    use mainstay::mutants::plant;
    let mut played = 0;
    while played < plan.seeds {
        let (from, seeds) = (plan.from + played, plan.seeds - played);
        let part = Plan { from, seeds, enough: 1, loud: false, ..plan.clone() };
        let tally = play_all(&part, || plant(Some(mutant)));
        plant(None);
        let well = |seed: &u64| play(&story(*seed, &plan.wish)).1.is_ok();
        if let Some((seed, wrong)) = tally.failed.iter().find(|(seed, _)| well(seed)) {
            return Ok((seed + 1 - plan.from, *seed, wrong.clone()));
        }
        played += tally.seeds.max(1);
        if tally.failed.is_empty() {
            break;
        }
    }
    Err(played)
}
