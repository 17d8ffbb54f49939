//! `cargo lab sim`: random stories of whole clusters, in virtual time.
//!
//! The simulator is test code of the product (`tests/sim`) and needs its crate, while the lab builds without libvirt; so
//! this only builds and runs the product's example `sim`, whose output and exit code are its own. Its profile is the one
//! of tests and lab, so that no dependency is built twice, but with all optimisations for our own code.
//!
//! With `--mutants` it is built with the bugs that the simulator has to find (`src/mutants.rs`); nothing else is.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::{command, packages};

/// The simulator with these arguments.
fn simulator(args: &[String]) -> Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    command.args(["run", "--quiet", "--config", "profile.dev.opt-level=3", "--example", "sim"]);
    if args.iter().any(|arg| arg == "--mutants") {
        command.args(["--features", "mutants"]);
    }
    command.arg("--").args(args);
    command
}

/// Plays the first seeds; gives the figures of its last lines. Err = something was violated, or too little was tested.
pub fn play(seeds: u32) -> Result<String> {
    let output = command::check(&mut simulator(&["--seeds".to_owned(), seeds.to_string()]))?;
    let mut lines = output.lines().rev();
    let (counts, speed) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    ensure!(counts.starts_with(&format!("{seeds} seeds, 0 violations, ")), "the simulator ends with {counts:?}");
    Ok(format!("{counts}; {speed}"))
}

/// Takes the place of this process.
pub fn run(args: &[String]) -> Result<ExitCode> {
    packages::for_build()?;
    Err(simulator(args).exec()).context("cannot run cargo")
}
