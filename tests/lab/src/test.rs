//! `cargo lab test`: everything that CI runs; `cargo lab case`: named cases on the lab that is there.
//!
//! ```text
//!  fmt ─► clippy ─► cargo test ─► guest package ─► simulator ─► lab anew ─► case, … ─► lab away ─► "N passed, M failed"
//!  └───────────── unless --skip-build-checks ──────────────┘                └ prepare ─► run ─► judges
//!                                                                                         └─ failed ─► target/lab-logs/CASE.txt
//! ```
//!
//! Before it begins it looks whether there is room (`space`). What does not come to its end has failed, and so have a case whose lab could not be made healthy and a test that is
//! ignored: nothing is skipped in silence.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::cases::{self, Case, Ground, report};
use crate::command;
use crate::lab::{Lab, Wish};
use crate::{bench, package, packages, product, sim, space};

const HOSTS: u8 = 3;
/// Stories that the simulator plays: some four minutes on two cores.
const SEEDS: u32 = 20_000;
/// How long the agent for guests is looked at.
const REST_SECONDS: u64 = 20;
const NAME_COLUMNS: usize = 24;

/// What to run.
#[derive(Debug, Default)]
pub struct Selection {
    /// Cases with this in their name.
    pub only: Option<String>,
    /// Without fmt, clippy and `cargo test`.
    pub skip_build_checks: bool,
    /// Times of full length.
    pub full: bool,
    /// Leave the lab as it is in the end.
    pub keep: bool,
}

/// Counts, and the lines that people see.
struct Score {
    passed: usize,
    failed: usize,
    begun: Instant,
}

impl Score {
    fn new() -> Score {
        Score { passed: 0, failed: 0, begun: Instant::now() }
    }

    /// Runs one step; its name is shown first, its outcome when it is known.
    fn step(&mut self, name: &str, run: impl FnOnce() -> Result<Done>) {
        let minutes = self.begun.elapsed().as_secs();
        print!("{:3}:{:02}  {name:NAME_COLUMNS$} ", minutes / 60, minutes % 60);
        let _ = std::io::stdout().flush();
        let begun = Instant::now();
        let outcome = run();
        let took = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(done) => {
                self.passed += done.passed;
                println!("ok     {took:6.1} s  {}", done.text);
            }
            Err(why) => {
                self.failed += 1;
                println!("FAILED {took:6.1} s");
                let mut text = format!("{why:#}");
                if text.contains("No space left on device") {
                    text = format!("{text}\n{}", space::cure());
                }
                text.lines().for_each(|line| println!("           {line}"));
            }
        }
        let _ = std::io::stdout().flush();
    }

    fn end(self) -> ExitCode {
        let seconds = self.begun.elapsed().as_secs();
        println!("{}:{:02} min", seconds / 60, seconds % 60);
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 && 0 < self.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// A step that went well.
struct Done {
    passed: usize,
    text: String,
}

impl Done {
    fn one(text: String) -> Done {
        Done { passed: 1, text }
    }
}

/// Names all cases.
pub fn list() {
    for case in cases::ALL {
        println!("{:NAME_COLUMNS$} {}", case.name, case.shows);
    }
}

/// Runs everything, or what was selected.
pub fn run(selection: &Selection) -> Result<ExitCode> {
    let chosen = cases::matching(selection.only.as_deref());
    if chosen.is_empty() {
        bail!("no case has {:?} in its name; `cargo lab test --list` names all", selection.only);
    }
    if selection.skip_build_checks || selection.only.is_some() {
        space::for_lab()?
    } else {
        space::for_tests()?
    }
    packages::for_tests()?;
    let mut score = Score::new();
    if !selection.skip_build_checks && selection.only.is_none() {
        score.step("fmt", || cargo(&["fmt", "--all", "--check"]).map(|_| Done::one(String::new())));
        let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        score.step("clippy", || cargo(&clippy).map(|_| Done::one(String::new())));
        score.step("cargo test", || count(&cargo(&["test", "--workspace", "--no-fail-fast"])?));
        score.step("guest package", || guest_package().map(Done::one));
        score.step("simulator", || Ok(Done::one(sim::play(SEEDS)?)));
    }
    let mut made = None;
    score.step("lab", || {
        Lab::down()?;
        let lab = Lab::up(Wish { hosts: HOSTS, product: Some(product::Wish::default()) })?;
        made = Some(Ground::new(lab, selection.full));
        Ok(Done::one(format!("{HOSTS} hosts")))
    });
    match &mut made {
        Some(ground) => run_cases(&mut score, ground, &chosen),
        None => score.failed += chosen.len(), // Not run is not passed.
    }
    drop(made);
    if !selection.keep {
        score.step("lab away", || Lab::down().map(|()| Done::one(String::new())));
    }
    Ok(score.end())
}

/// Runs named cases on the lab that is there; it stays.
pub fn run_named(names: &[String], full: bool) -> Result<ExitCode> {
    let find = |name: &String| {
        let found = cases::ALL.iter().find(|case| case.name == name);
        found.with_context(|| format!("there is no case {name}; `cargo lab test --list` names all"))
    };
    let chosen: Vec<&Case> = names.iter().map(find).collect::<Result<_>>()?;
    let lab = Lab::up(Wish { hosts: HOSTS, product: Some(product::Wish::default()) })?;
    lab.upgrade()?;
    let mut ground = Ground::new(lab, full);
    let mut score = Score::new();
    run_cases(&mut score, &mut ground, &chosen);
    Ok(score.end())
}

fn run_cases(score: &mut Score, ground: &mut Ground, chosen: &[&Case]) {
    for case in chosen {
        score.step(case.name, || run_case(ground, case));
    }
}

fn run_case(ground: &mut Ground, case: &Case) -> Result<Done> {
    let begun = Instant::now();
    let ready = ground.prepare(case.setting).context("not run: the lab was not healthy before it");
    let preparing = begun.elapsed();
    let outcome = ready.and_then(|()| (case.run)(ground));
    // Without judges there is nothing to be said by them: it failed before it began.
    let verdict = ground.judges().is_ok().then(|| ground.finish());
    let (verdict, unsettled) = match verdict {
        Some(Ok(verdict)) => (Some(verdict), None),
        Some(Err(why)) => (None, Some(why)),
        None => (None, None),
    };
    let mut wrong: Vec<String> = outcome.err().iter().map(|why| format!("{why:#}")).collect();
    wrong.extend(unsettled.map(|why| format!("{why:#}")));
    wrong.extend(verdict.iter().flat_map(|verdict| verdict.violations.clone()));
    let judged = verdict.is_some() || !wrong.is_empty();
    if !judged {
        wrong.push("it called no judges".to_owned());
    }
    let figures = ground.take_figures().join("; ");
    if wrong.is_empty() {
        ground.stop_watching();
        return Ok(Done::one(format!("{figures} (ready after {:.0} s)", preparing.as_secs_f64())));
    }
    let why = wrong.join("\n");
    let path =
        report::write(ground, case.name, &format!("{why}\nfigures: {figures}"), verdict.as_ref(), begun.elapsed());
    ground.stop_watching();
    match path {
        Ok(path) => bail!("{why}\nfigures: {figures}\nmore in {}", path.display()),
        Err(err) => bail!("{why}\nfigures: {figures}\nno report: {err:#}"),
    }
}

/// Packages of the agent for guests, and a short look at what their program costs.
fn guest_package() -> Result<String> {
    let folder = tempfile::tempdir()?;
    let made = package::guest(folder.path())?;
    let said = package::check(&made)?;
    let rest = bench::at_rest(&package::unpacked(&made.tar, folder.path())?, REST_SECONDS)?;
    rest.check()?;
    Ok(format!("{said}; at rest {:.3} % of a processor, {} KiB", rest.cpu_percent, rest.peak_kib))
}

/// Runs cargo on this source tree; gives what it printed.
fn cargo(args: &[&str]) -> Result<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    command::check(Command::new(cargo).args(args).current_dir(tree))
}

/// The number of tests that `cargo test` says have passed.
fn count(output: &str) -> Result<Done> {
    let (mut passed, mut ignored) = (0, 0);
    for line in output.lines().filter_map(|line| line.strip_prefix("test result: ok. ")) {
        let number = |what: &str| {
            let part = line.split("; ").find_map(|part| part.trim().strip_suffix(what));
            part.and_then(|number| number.trim().parse::<usize>().ok()).unwrap_or_default()
        };
        passed += number("passed");
        ignored += number("ignored");
    }
    if 0 < ignored {
        bail!("{ignored} tests are ignored: what is not run is not passed");
    }
    if passed == 0 {
        bail!("no test was run");
    }
    Ok(Done { passed, text: format!("{passed} tests") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted() {
        let output = "running 3 tests\n\ntest result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; \
                      finished in 0.10s\n\ntest result: ok. 12 passed; 0 failed; 0 ignored; 0 measured\n";
        assert_eq!(count(output).unwrap().passed, 15);
        assert!(count("").is_err());
        assert!(count("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured").is_err());
    }
}
