//! The agent: one per host. See `mainstay::agent`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use mainstay::config;

/// Mainstay's agent on this host: keeps its VMs protected and restarts those of hosts that die.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// What is this host's own
    #[arg(long, value_name = "FILE", default_value = config::PATH)]
    config: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let config = config::load(&arguments.config).context("the configuration cannot be used")?;
    log_to(config.log.level.name());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(mainstay::agent::run(config));
    // Threads in hung calls (storage, libvirt) must not keep the process.
    runtime.shutdown_background();
    result
}

/// To the journal when systemd started us, else to stderr.
fn log_to(level: &str) {
    let filter = EnvFilter::try_new(format!("{level},zbus=warn,sled=warn")).unwrap_or_else(|_| EnvFilter::new("info"));
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    let registry = tracing_subscriber::registry().with(filter);
    match journal {
        Some(journal) => registry.with(journal.with_field_prefix(Some("MAINSTAY".into()))).init(),
        None => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
}
