//! `mainstay-lab`, or `cargo lab`: see `cli.rs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mainstay_lab::cli::run()
}
