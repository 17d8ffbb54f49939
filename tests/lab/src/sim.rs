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

use anyhow::{Context, Result};

use crate::packages;

/// The simulator with these arguments.
fn command(args: &[String]) -> Command {
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

/// Takes the place of this process.
pub fn run(args: &[String]) -> Result<ExitCode> {
    packages::for_build()?;
    Err(command(args).exec()).context("cannot run cargo")
}
