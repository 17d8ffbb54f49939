//! Judge 4: in the end every VM that should run runs exactly once, and no other does.
//!
//! ```text
//!  wish      copies that executed in the last 2 s
//!  Running   exactly 1
//!  Stopped   0
//! ```

use serde::Serialize;

use super::Moment;
use super::copy::Copy;

/// What is to be true of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// It runs, and began to execute at most so often since the judges started.
    Running {
        /// Most starts.
        starts: usize,
    },
    /// It does not run.
    Stopped,
}

/// What is wrong with a VM now.
pub fn judge(name: &str, wish: Wish, copies: &[Copy], now: Moment) -> Option<String> {
    let running: Vec<&Copy> = copies.iter().filter(|c| c.runs(now)).collect();
    let on: Vec<&str> = running.iter().map(|c| c.host.as_str()).collect();
    let started = copies.iter().filter(|c| c.first_ran.is_some()).count();
    match (wish, on.as_slice()) {
        (Wish::Running { starts }, [_]) if starts < started => {
            Some(format!("{name} was started {started} times, {starts} allowed"))
        }
        (Wish::Running { .. }, [_]) | (Wish::Stopped, []) => None,
        (Wish::Running { .. }, []) => Some(format!("{name} should run and does not")),
        (Wish::Running { .. }, _) => Some(format!("{name} should run once and runs on {}", on.join(", "))),
        (Wish::Stopped, _) => Some(format!("{name} should not run and runs on {}", on.join(", "))),
    }
}
