//! The command `mainstay`: asks the local agent over D-Bus, and forms or joins a cluster itself, as root.
//!
//! ```text
//!  args (clap) ── run ──┬── client of D-Bus ──► view, notes, wishes ──┐
//!                       ├── cluster: init, join, token (no agent)     ├──► show: tables, text, --json ──► out
//!                       └── doctor, config check (agent or not)       │
//!                                                trouble: exit code, what was not done, why, what next
//! ```
//!
//! Exit codes: 0 done, 1 failed, 2 usage, 3 agent not reachable, 4 denied. Tables fit 80 columns; colour and progress
//! only on a terminal; a reader that goes away (`| head`) ends the command quietly.
//!
//! Deliberately not here: decisions. What a command means is decided by the agent.

mod args;
mod cluster;
mod datastore;
mod doctor;
mod evacuate;
mod events;
mod failures;
mod fence_device;
mod health;
mod lists;
mod maintenance;
mod member;
mod out;
mod status;
mod trouble;
mod verdict;
mod vm;
mod what_if;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use super::dbus::Bus;
use super::dbus::client::Agent;
use args::{Arguments, Command};
use out::Out;
use trouble::{Trouble, What};

/// Runs one command line (with the program's name first) and says how it ended.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help that nobody reads to its end is no failure.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { trouble::USAGE } else { 0 });
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: mainstay cannot start: {error}");
            return ExitCode::from(trouble::FAILED);
        }
    };
    let mut out = Out::new(arguments.no_colour);
    match runtime.block_on(run(arguments, &mut out)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            trouble.print(&out);
            ExitCode::from(trouble.code())
        }
    }
}

async fn run(arguments: Arguments, out: &mut Out) -> Result<(), Trouble> {
    let json = arguments.json;
    match arguments.command {
        Command::Status { watch } => status::run(out, json, watch).await,
        Command::Host(command) => lists::hosts(out, json, command).await,
        Command::Vm(command) => vm::run(out, json, command).await,
        Command::WhatIf { hosts } => what_if::run(out, json, &hosts).await,
        Command::Events(filter) => events::run(out, json, filter).await,
        Command::Verdict(command) => verdict::run(out, json, command).await,
        Command::Doctor => doctor::run(out, json).await,
        Command::Cluster(command) => cluster::run(out, json, command).await,
        Command::Datastore(command) => datastore::run(out, json, command).await,
        Command::Config(command) => cluster::config(out, json, command),
    }
}

/// Connects to the local agent's bus, for a command that did nothing yet.
async fn agent(what: &str) -> Result<Agent, Trouble> {
    Agent::connect(&Bus::System).await.what(what)
}
