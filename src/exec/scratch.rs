//! A folder for one test whose threads may still write when it ends: they end by themselves soon after what they belong to was
//! dropped, but nobody waits for that. An ordinary folder for tests gives up when something new lies in it, and stays for ever.
//!
//! ```text
//!   new ─► the first of a process removes what tests that are no more have left ─► mainstay-test-PID-…
//!   drop ─► removed, as often as something new lies in it, at most PATIENCE
//! ```

use std::path::Path;
use std::sync::Once;
use std::time::{Duration, Instant};

use tempfile::TempDir;

const PREFIX: &str = "mainstay-test-";
/// For threads to end.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(5);

/// Removed when it is dropped, or by the next tests.
pub(crate) struct Scratch(Option<TempDir>);

impl Scratch {
    /// An empty one.
    pub(crate) fn new() -> Self {
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| sweep(&std::env::temp_dir()));
        let prefix = format!("{PREFIX}{}-", std::process::id());
        Self(Some(tempfile::Builder::new().prefix(&prefix).tempdir().unwrap()))
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        self.0.as_ref().expect("it is there until it is dropped").path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(folder) = self.0.take().map(TempDir::keep) else { return };
        let until = Instant::now() + PATIENCE;
        while std::fs::remove_dir_all(&folder).is_err() && folder.exists() && Instant::now() < until {
            std::thread::sleep(AGAIN);
        }
    }
}

/// Removes what tests have left that were killed, or had a thread that made its folder anew at the very end.
fn sweep(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_still_writes_leaves_nothing_behind() {
        let scratch = Scratch::new();
        let folder = scratch.path().to_owned();
        let writes = std::thread::spawn({
            let folder = folder.clone();
            move || {
                let until = Instant::now() + Duration::from_millis(50);
                let mut number = 0;
                while Instant::now() < until {
                    number += 1;
                    let _ = std::fs::write(folder.join(format!("file {number}")), "");
                }
            }
        });
        drop(scratch);
        writes.join().unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn only_what_the_dead_have_left_is_swept() {
        let scratch = Scratch::new();
        let folder = |name: &str| {
            let folder = scratch.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            folder
        };
        let (dead, other) = (folder("mainstay-test-999999999-a"), folder("another"));
        let lives = folder(&format!("mainstay-test-{}-a", std::process::id()));
        sweep(scratch.path());
        assert!(!dead.exists() && lives.exists() && other.exists());
    }
}
