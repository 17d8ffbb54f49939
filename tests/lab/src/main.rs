//! The lab's command.

use mainstay_lab::storage;

use std::path::PathBuf;

use clap::Parser;

#[derive(Parser)]
enum Command {
    /// Serves the lab's shared storage in the foreground.
    StorageDaemon {
        /// Backing folder.
        dir: PathBuf,
        /// Runtime folder.
        run: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::StorageDaemon { dir, run } => storage::run_daemon(&dir, &run),
    }
}
