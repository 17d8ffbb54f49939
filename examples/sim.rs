//! Plays random stories of whole clusters, by seed: `cargo lab sim` runs it. No lab, no root, no libvirt at run time.
//!
//! The last line counts: `N seeds, V violations, C claims, T takeovers, P lapses`; with `--mutants` (and the feature of
//! that name): `M of M found`. The exit code is 0 only if that is good.

use std::process::ExitCode;

use clap::Parser;
use mainstay::mutants::Mutant;

#[path = "../tests/sim/mod.rs"]
mod sim;

use sim::chance::{Wish, story};
use sim::runs::{Plan, Tally, explain, play_all};

/// Plays random stories of whole clusters in virtual time
#[derive(Parser)]
#[command(name = "cargo lab sim", max_term_width = 100)]
struct Cli {
    /// Number of seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Play one seed, and tell what happens
    #[arg(long, conflicts_with_all = ["seeds", "from", "mutants"])]
    seed: Option<u64>,
    /// Every step of every agent, of one seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Play one file of tests/scenarios, or one that a seed has left, and tell what happens
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seeds", "from", "seed", "mutants"])]
    story: Option<std::path::PathBuf>,
    /// Number of hosts, instead of 1 to 9
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    hosts: Option<u8>,
    /// Number of VMs
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    vms: Option<u8>,
    /// Number of faults, instead of 3 to 14
    #[arg(long)]
    faults: Option<u64>,
    /// Only faults that begin with this ("kill", "hang storage", "slow")
    #[arg(long, value_name = "WORDS")]
    only: Option<String>,
    /// Stories at the same time, instead of one per core
    #[arg(long)]
    jobs: Option<usize>,
    /// End after so many minutes, with the seeds that were played by then
    #[arg(long)]
    minutes: Option<u64>,
    /// Plant one bug after another, and see whether it is found within the number of seeds
    #[arg(long)]
    mutants: bool,
    /// Only the planted bugs with this in their name; with --story or --seed: the one that is planted
    #[arg(long)]
    mutant: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.seed.is_none() {
        std::panic::set_hook(Box::new(|_| {})); // A panic is a find, and told as one.
    }
    let wish = Wish {
        hosts: cli.hosts.map(usize::from),
        vms: cli.vms.map(usize::from),
        faults: cli.faults,
        only: cli.only.clone(),
    };
    let mut plan = Plan { from: cli.from, seeds: cli.seeds, wish, loud: true, ..Plan::default() };
    plan.jobs = cli.jobs.unwrap_or(plan.jobs);
    plan.within = cli.minutes.map(|minutes| std::time::Duration::from_secs(60 * minutes));
    let named = cli.mutant.as_deref();
    if let Some(named) = named.filter(|_| !cli.mutants)
        && (cli.seed.is_none() && cli.story.is_none() || !plants(named))
    {
        eprintln!(
            "no bug is planted: --mutant {named} needs --mutants, --seed or --story, a bug of that name, and a program built with them"
        );
        return ExitCode::FAILURE;
    }
    if let Some(path) = &cli.story {
        return told(path);
    }
    match cli.seed {
        Some(seed) => one(seed, &plan.wish, cli.trace),
        None if cli.mutants => mutants(&plan, named.unwrap_or_default()),
        None => many(&plan),
    }
}

/// Tells what happens in a file.
fn told(path: &std::path::Path) -> ExitCode {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            print!("{}", sim::scenario::Scenario::parse(&text).run());
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{}: {why}", path.display());
            ExitCode::FAILURE
        }
    }
}

/// Tells one seed, as it is or as small as it still fails.
fn one(seed: u64, wish: &Wish, trace: bool) -> ExitCode {
    let mut scenario = story(seed, wish);
    scenario.trace = trace;
    let world = scenario.play();
    let wrong = scenario.verdict(&world);
    if wrong.is_none() || trace {
        println!("{scenario}----");
        world.story[world.told..].iter().for_each(|line| println!("{line}"));
        world.facts().iter().for_each(|fact| println!("= {fact}"));
    } else {
        println!("{}", explain(seed, wish));
    }
    println!("seed {seed}: {}", wrong.as_deref().unwrap_or("well"));
    if wrong.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn many(plan: &Plan) -> ExitCode {
    let tally = play_all(plan, || {});
    for (seed, wrong) in &tally.failed {
        println!("seed {seed}: {wrong}");
    }
    if let Some(seed) = tally.failed.keys().next() {
        println!("\n{}\n", explain(*seed, &plan.wish));
    }
    let Tally { seeds, claims, takeovers, lapses, ref failed, .. } = tally;
    let hours = tally.host_seconds / 3600.0;
    let cores = tally.core_seconds.max(1e-9);
    println!(
        "{hours:.0} simulated host-hours in {cores:.0} s of processor time: {:.1} per second and core, {:.2} million events",
        hours / cores,
        tally.events as f64 / 1e6
    );
    let nothing = [("claim", claims), ("takeover", takeovers), ("lapse", lapses)].map(|(what, n)| (what, n == 0));
    for (what, _) in nothing.iter().filter(|(_, none)| *none) {
        println!("nothing was tested: there was no {what} in any seed");
    }
    println!("{seeds} seeds, {} violations, {claims} claims, {takeovers} takeovers, {lapses} lapses", failed.len());
    let tested = nothing.iter().all(|(_, none)| !none);
    if failed.is_empty() && tested { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Planted bugs with this in their name.
#[cfg(feature = "mutants")]
fn chosen(named: &str) -> Vec<Mutant> {
    let fits = |mutant: &Mutant| format!("{mutant:?}").to_lowercase().contains(&named.to_lowercase());
    Mutant::ALL.into_iter().filter(fits).collect()
}

/// Plants the bug of this name; false if there is none.
#[cfg(feature = "mutants")]
fn plants(named: &str) -> bool {
    let mutant = chosen(named).first().copied();
    mainstay::mutants::plant(mutant);
    mutant.is_some()
}

#[cfg(not(feature = "mutants"))]
fn plants(_: &str) -> bool {
    false
}

#[cfg(feature = "mutants")]
fn mutants(plan: &Plan, named: &str) -> ExitCode {
    let chosen = chosen(named);
    let mut found = 0;
    for mutant in &chosen {
        let began = std::time::Instant::now();
        let result = sim::runs::hunt(plan, *mutant);
        let (name, took) = (format!("{mutant:?}"), began.elapsed().as_secs_f64());
        match result {
            Ok((seeds, seed, wrong)) => {
                found += 1;
                println!("{name:<20} found after {seeds:>5} seeds, {took:>4.0} s: seed {seed}: {wrong}");
            }
            Err(seeds) => println!("{name:<20} NOT FOUND in {seeds} seeds, {took:.0} s"),
        }
    }
    println!("{found} of {} found", chosen.len());
    if found == chosen.len() && 0 < found { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(not(feature = "mutants"))]
fn mutants(_: &Plan, _: &str) -> ExitCode {
    let all = Mutant::ALL.len();
    println!("this program was built without its {all} planted bugs: `cargo lab sim --mutants` builds it with them");
    ExitCode::FAILURE
}
