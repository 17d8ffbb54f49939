//! Programs of the machine, run to their end: what they print, or an error that shows it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

use crate::cgroup::Group;

/// Runs a program to its end and returns what it printed. Its failure is an error that quotes it.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<String> {
    check(Command::new(program).args(args))
}

/// Like `run`, for a command that needs more than arguments.
pub fn check(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        bail!("{}: {}\n{}", line(command), output.status, tail(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end, whatever that is.
pub fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", line(command)))
}

/// A command that runs as a member of a group; program and arguments are still to be added.
pub fn in_group(group: &Group) -> Command {
    let mut command = Command::new("sh");
    enter(&mut command, group);
    command
}

/// Like `in_group`, for `start_detached`.
pub fn detached_in(group: &Group) -> Command {
    let mut command = Command::new("setsid");
    enter(command.arg("sh"), group);
    command
}

fn enter(command: &mut Command, group: &Group) {
    command.args(["-c", "echo 0 > \"$0\" && exec \"$@\""]).arg(group.path().join("cgroup.procs"));
}

/// Starts what `detached_in` made; it outlives this command of the lab and is found again by its group.
pub fn start_detached(command: &mut Command, log: &Path) -> Result<()> {
    let log = File::create(log).with_context(|| format!("making {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    // The leader of a process group: setsid then forks and its parent returns at once.
    let status = command.process_group(0).status().with_context(|| format!("cannot run {}", line(command)))?;
    if !status.success() {
        bail!("{}: {status}", line(command));
    }
    Ok(())
}

/// The last lines of what a command printed, errors last; before them what failed in a run of `cargo test`.
fn tail(output: &Output) -> String {
    const LINES: usize = 20;
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let (front, back) = lines.split_at(lines.len().saturating_sub(LINES));
    let mut kept = failures(front);
    kept.extend(back);
    kept.join("\n")
}

/// The tests that failed, each with the first lines of what it printed.
fn failures<'a>(lines: &[&'a str]) -> Vec<&'a str> {
    const LINES: usize = 6;
    let begins = |line: &&str| line.starts_with("---- ") && line.ends_with(" stdout ----");
    let failed = lines.iter().enumerate().filter(|(_, line)| begins(line));
    failed.flat_map(|(at, _)| lines[at..].iter().take(LINES).copied()).collect()
}

/// The command for people: of one that enters a group or a host first, only what is run there.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    let from = words.iter().position(|word| word == "--").map_or(0, |at| at + 1);
    words[from..].join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_failed_are_named_however_much_follows() {
        let script = "echo 'test a::b ... FAILED'; echo '---- a::b stdout ----'; echo 'assertion failed: x'; \
                      for n in $(seq 30); do echo line $n; done; exit 1";
        let why = run("sh", ["-c", script]).unwrap_err().to_string();
        assert!(why.contains("---- a::b stdout ----\nassertion failed: x") && why.ends_with("line 30"), "{why}");
        assert!(!why.contains("line 9\n"), "{why}");
    }
}
