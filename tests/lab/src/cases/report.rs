//! What is kept of a case that failed: everything that is needed to understand it, in one file.
//!
//! ```text
//!  target/lab-logs/CASE.txt    why ── verdict ── notes of all agents ── journals of agents, guards, libvirt ── QEMUs
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Ground;
use crate::agents;
use crate::command;
use crate::host::Host;
use crate::judge::Verdict;

/// Lines of a journal kept per host.
const LINES: &str = "3000";

/// Writes the file; says where.
pub fn write(ground: &Ground, case: &str, why: &str, verdict: Option<&Verdict>, took: Duration) -> Result<PathBuf> {
    let folder = folder();
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join(format!("{case}.txt"));
    // A little of what came before, too.
    let back = took + Duration::from_secs(15);
    let mut text = format!("case {case}, {:.1} s\n\n{why}\n", took.as_secs_f64());
    if let Some(verdict) = verdict {
        text.push_str("\n==== judges\n");
        text.push_str(&serde_json::to_string_pretty(verdict)?);
    }
    text.push_str("\n\n==== processes now\n");
    for qemu in ground.lab().qemu_processes()? {
        text.push_str(&format!("{} {} {}\n", qemu.host, qemu.uuid, qemu.pid));
    }
    text.push_str(&format!("\n==== storage now\n{}\n", ground.lab().storage()?.status()?));
    text.push_str("\n==== notes\n");
    for note in agents::all_notes(&ground.hosts(), back) {
        let vm = note.vm.map(|vm| format!(" [{vm}]")).unwrap_or_default();
        text.push_str(&format!(
            "{} {} {:7} {}{vm}: {}\n",
            clock(note.unix_ms),
            note.host,
            note.level,
            note.kind,
            note.text
        ));
    }
    for host in ground.hosts() {
        text.push_str(&format!("\n==== status of {}\n{}\n", host.name(), status(&host)));
        text.push_str(&format!("\n==== journal of {}\n{}\n", host.name(), journal(&host, back)));
    }
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// Beside what cargo builds.
fn folder() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let tree = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    target.unwrap_or_else(tree).join("lab-logs")
}

fn status(host: &Host) -> String {
    match agents::ask(host, agents::ANSWER, &["mainstay", "--json", "status"]) {
        Ok(text) => text,
        Err(err) => format!("{err:#}"),
    }
}

/// Read from outside, so that it is there for a host that is off, too.
fn journal(host: &Host, back: Duration) -> String {
    let folder = host.root().join("var/log/journal");
    let since = format!("@{}", (agents::clock_of_day_ms() / 1000).saturating_sub(back.as_secs()));
    let units = ["mainstayd", "mainstay-guard", "libvirtd", "libvirt-guests"].map(|unit| format!("--unit={unit}"));
    let mut args = vec!["--quiet".to_owned(), "--output=short-precise".into(), "--since".into(), since];
    args.extend(["--lines".into(), LINES.into(), "--directory".into(), folder.display().to_string()]);
    args.extend(units);
    command::run("journalctl", &args).unwrap_or_else(|err| format!("{err:#}"))
}

/// Time of day in UTC, to the millisecond.
fn clock(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
