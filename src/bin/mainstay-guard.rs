//! `mainstay-guard`: owns the leases and the right to run. Started by systemd.

use std::path::PathBuf;

use clap::Parser;
use mainstay::guard::{Paths, reload, run, stop_all};

/// Stops this host's VMs in time when their lease ends. Needs no options.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Stop every VM of the last guard, then end. systemd does this after the guard's death.
    #[arg(long)]
    stop_all: bool,
    /// Have the running guard go over to this program; no VM is stopped.
    #[arg(long, conflicts_with = "stop_all")]
    reload: bool,
    /// For tests: socket for the agent.
    #[arg(long, hide = true)]
    socket: Option<PathBuf>,
    /// For tests: state file.
    #[arg(long, hide = true)]
    state: Option<PathBuf>,
    /// For tests: folder of the kept rows.
    #[arg(long, hide = true)]
    kept: Option<PathBuf>,
    /// For tests: libvirt's folder of pid files.
    #[arg(long, hide = true)]
    libvirt: Option<PathBuf>,
    /// For tests: the host's configuration.
    #[arg(long, hide = true)]
    config: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let default = Paths::default();
    let paths = Paths {
        socket: arguments.socket.unwrap_or(default.socket),
        state: arguments.state.unwrap_or(default.state),
        kept: arguments.kept.unwrap_or(default.kept),
        libvirt: arguments.libvirt.unwrap_or(default.libvirt),
        config: arguments.config.unwrap_or(default.config),
    };
    // The journal stamps lines itself.
    tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().with_ansi(false).with_target(false).init();
    if arguments.reload {
        return reload(&paths);
    }
    if !arguments.stop_all {
        return run(paths);
    }
    let (stopped, failed) = stop_all(&paths.kept, &paths.libvirt)?;
    tracing::info!("stopped {stopped} VMs of the last guard");
    failed.iter().for_each(|line| tracing::error!("{line}"));
    anyhow::ensure!(failed.is_empty(), "{} VMs could not be stopped", failed.len());
    Ok(())
}
