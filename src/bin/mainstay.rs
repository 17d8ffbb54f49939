//! The command line. Everything is in `api/cli.rs`.

fn main() -> std::process::ExitCode {
    mainstay::api::cli::main(std::env::args_os())
}
