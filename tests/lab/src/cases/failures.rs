//! What `mainstay vm failures` says, for the cases that look at it.

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::agents;
use crate::host::Host;

/// One failure.
#[derive(Debug, Deserialize)]
pub struct Failure {
    pub class: Class,
    pub outcome: String,
    pub files: Vec<File>,
    pub system: String,
    pub number: u32,
    /// `{"kept": {"path": …, "bytes": …}}`, or a word, or why there is none.
    pub dump: serde_json::Value,
}

/// What it was.
#[derive(Debug, Deserialize)]
pub struct Class {
    pub family: String,
    pub kind: String,
    pub line: String,
}

/// A file that is kept of it.
#[derive(Debug, Deserialize)]
pub struct File {
    pub file: String,
    pub bytes: u64,
}

/// Those of one VM, the newest last.
pub fn of(host: &Host, vm: &str) -> Result<Vec<Failure>> {
    #[derive(Deserialize)]
    struct Answer {
        failures: Vec<Failure>,
    }
    let text = agents::ask(host, agents::ANSWER, &["mainstay", "--json", "vm", "failures", vm])?;
    let answer: Answer = serde_json::from_str(&text).with_context(|| format!("reading {text}"))?;
    Ok(answer.failures)
}
