//! `--reload`, for systemd's ExecReload: asks the running guard to go over to the program that lies there now, and waits
//! until it has.
//!
//! It is the new program that asks: one that cannot even be executed fails here, and the guard stays as it is.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::Context;

use super::kept::read_pair;
use super::process::Process;
use super::shared::Paths;
use crate::exec::clock;

/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks, and waits.
///
/// # Errors
/// When no guard runs here, or it did not go over in time: the log of the guard says why.
pub fn reload(paths: &Paths) -> anyhow::Result<()> {
    let no_guard = || format!("{}: no guard runs here", paths.kept.display());
    let before = read_pair(&paths.kept).with_context(no_guard)?;
    let socket = || fs::metadata(&paths.socket).map(|socket| (socket.ino(), socket.ctime(), socket.ctime_nsec())).ok();
    let old = socket();
    let parent = Process::open(before.parent)?.with_context(no_guard)?;
    parent.hang_up().context("SIGHUP")?;
    let begun = clock::now();
    while clock::now().since(begun) < PATIENCE && !parent.has_exited() {
        let other = read_pair(&paths.kept).is_some_and(|pair| pair.child != before.child);
        // The new child listens last of all.
        if other && socket().is_some_and(|new| Some(new) != old) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    anyhow::bail!("the guard did not go over to another program within {PATIENCE:?}; see its log")
}
