//! `mainstay vm failures NAME [--show N | --export N FILE] [--host HOST]`.
//!
//! Everything that is shown was written by a guest that failed, or was broken into: what a terminal would obey is taken out. An
//! archive holds it as it was.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::json;

use super::events::when;
use super::out::{Out, Tone, Word};
use super::trouble::{FAILED, Trouble, USAGE, What};
use super::{agent, status};
use crate::api::dbus::client::Agent;
use crate::api::dbus::resolve;
use crate::types::VmId;
use crate::types::failure::{Failure, FailureFile, FailureKind, FailureList, MemoryDump};
use crate::types::view::VIEW_SCHEMA;

/// Runs it.
pub async fn run(
    out: &mut Out,
    json: bool,
    vm: &str,
    host: Option<&str>,
    show: Option<u32>,
    export: Option<Vec<String>>,
) -> Result<(), Trouble> {
    let what = format!("failures of VM \"{vm}\" were not shown");
    let id = id(vm, &what).await?;
    let agent = agent(&what).await?;
    let mut list = agent.failures(&id.to_string()).await.what(&what)?;
    list.failures.retain(|failure| host.is_none_or(|host| failure.host == host));
    match (show, export.as_deref()) {
        (None, None) => all(out, json, vm, &list),
        (Some(number), _) => one(out, json, &agent, find(vm, &list, number)?).await,
        (None, Some([number, file])) => {
            let what = format!("nothing was written to {file}");
            let why = || format!("\"{number}\" is no number of a failure");
            let number =
                number.parse().map_err(|_| Trouble::new(USAGE, &what, why(), "--export takes a number and a file"))?;
            archive(out, json, &agent, find(vm, &list, number)?, Path::new(file)).await
        }
        (None, Some(_)) => {
            Err(Trouble::new(USAGE, &what, "--export takes a number and a file", "mainstay vm failures --help"))
        }
    }
}

/// A VM that is gone can still be asked for by its UUID.
async fn id(vm: &str, what: &str) -> Result<VmId, Trouble> {
    if let Ok(id) = vm.parse() {
        return Ok(id);
    }
    let (_, view) = status::view(what).await?;
    Ok(resolve::vm(&view, vm).what(what)?.id)
}

/// The one with this number.
fn find<'a>(vm: &str, list: &'a FailureList, number: u32) -> Result<&'a Failure, Trouble> {
    let found: Vec<&Failure> = list.failures.iter().filter(|failure| failure.number == number).collect();
    let what = format!("failure {number} of VM \"{vm}\" was not found");
    match found.as_slice() {
        [one] => Ok(one),
        [] if list.silent.is_empty() => {
            Err(Trouble::new(FAILED, what, "no host keeps it", format!("mainstay vm failures {vm} lists all")))
        }
        [] => {
            let why = format!("no host that answers keeps it; {}", list.silent.join("; "));
            Err(Trouble::new(FAILED, what, why, format!("mainstay vm failures {vm} lists all that are found")))
        }
        several => {
            let hosts: Vec<&str> = several.iter().map(|failure| failure.host.as_str()).collect();
            let why = format!("{} have one with this number", hosts.join(" and "));
            Err(Trouble::new(USAGE, what, why, format!("say which: --host {}", hosts[0])))
        }
    }
}

fn all(out: &mut Out, json: bool, vm: &str, list: &FailureList) -> Result<(), Trouble> {
    if json {
        let FailureList { failures, silent } = list;
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "failures": failures, "silent": silent }))?);
    }
    if list.failures.is_empty() {
        out.line(&format!("No failure of {vm} is kept."))?;
    } else {
        out.line(&lines(out, &list.failures))?;
    }
    silence(out, list)
}

/// Two lines each: the reason would not fit beside the rest.
fn lines(out: &Out, failures: &[Failure]) -> String {
    let number = failures.iter().map(|failure| failure.number.to_string().len()).max().unwrap_or(1);
    let host = failures.iter().map(|failure| failure.host.chars().count()).max().unwrap_or(0).max("HOST".len());
    let when = "2026-11-25 17:00:01".len();
    let mut lines = vec![format!("{:<number$}  {:<host$}  {:<when$}  FAILURE, REMEDY, REASON", "N", "HOST", "WHEN")];
    for failure in failures {
        let second = second(failure.unix_ms);
        let first = format!("{:<number$}  {:<host$}  {second:<when$}  ", failure.number, failure.host);
        let mut head = format!("{}; {}", failure.class, remedy(failure));
        if let MemoryDump::Kept { bytes, .. } = &failure.dump {
            head.push_str(&format!("; memory kept, {}", mib(*bytes)));
        }
        lines.push(format!("{first}{}", out.paint(&head, tone(failure))));
        lines.push(out.wrapped(&" ".repeat(first.chars().count()), &reason(failure)));
    }
    lines.join("\n")
}

/// Hosts that may keep more.
fn silence(out: &mut Out, list: &FailureList) -> Result<(), Trouble> {
    for host in &list.silent {
        out.line(&out.wrapped("No answer of ", &printable(host)))?;
    }
    Ok(())
}

async fn one(out: &mut Out, json: bool, agent: &Agent, failure: &Failure) -> Result<(), Trouble> {
    let what = format!("failure {} of VM \"{}\" was not shown", failure.number, failure.name);
    let mut texts = Vec::new();
    for kept in failure.files.iter().filter(|kept| kept.file.is_text()) {
        let bytes = agent.failure_file(failure, kept.file).await.what(&what)?;
        texts.push((kept.file, String::from_utf8_lossy(&bytes).into_owned()));
    }
    if json {
        let texts: serde_json::Map<String, serde_json::Value> =
            texts.into_iter().map(|(file, text)| (file.name().to_owned(), text.into())).collect();
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "failure": failure, "texts": texts }))?);
    }
    out.line(&fields(out, failure))?;
    for (file, text) in texts {
        out.line(&format!("\n{}:", title(file)))?;
        text.lines().try_for_each(|line| out.line(&printable(line)))?;
    }
    Ok(())
}

fn fields(out: &Out, failure: &Failure) -> String {
    let kept: Vec<&str> = failure.files.iter().map(|kept| kept.file.name()).collect();
    let missing: Vec<String> =
        failure.missing.iter().map(|missing| format!("{} ({})", missing.file.name(), missing.why)).collect();
    let outcome = if failure.outcome.is_empty() { "not known yet" } else { &failure.outcome };
    out.fields(&[
        ("VM", Word::plain(&failure.name)),
        ("Failure", Word::plain(format!("{} of host {}", failure.number, failure.host))),
        ("When", Word::plain(when(failure.unix_ms))),
        ("Kind", Word::plain(failure.class.to_string())),
        ("Line", Word::plain(printable(&failure.class.line))),
        ("Cause", Word::plain(printable(&failure.cause))),
        ("System", Word::plain(printable(&failure.system))),
        ("Remedy", Word::plain(failure.remedy.name())),
        ("Outcome", Word::new(printable(outcome), tone(failure))),
        ("Waited", Word::plain(format!("{} ms for what is kept", failure.waited_ms))),
        ("Kept", Word::plain(kept.join(", "))),
        ("Missing", Word::plain(printable(&missing.join("; ")))),
        ("Memory", Word::plain(printable(&memory(failure)))),
    ])
}

/// Writes a tar archive with everything into a new file; an incomplete one is taken away.
async fn archive(out: &mut Out, json: bool, agent: &Agent, failure: &Failure, file: &Path) -> Result<(), Trouble> {
    let what = format!("failure {} of {} was not written to {}", failure.number, failure.name, file.display());
    let record = serde_json::to_vec_pretty(failure).map_err(std::io::Error::other)?;
    let mut parts = vec![("failure.json", record)];
    for kept in &failure.files {
        parts.push((kept.file.name(), agent.failure_file(failure, kept.file).await.what(&what)?));
    }
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let written = opened.and_then(|mut opened| {
        let written = tar(failure, &parts).and_then(|bytes| opened.write_all(&bytes)).and_then(|()| opened.sync_all());
        if written.is_err() {
            let _ = std::fs::remove_file(file); // Ours, and incomplete.
        }
        written
    });
    written.map_err(|error| Trouble::new(FAILED, what, error.to_string(), "name a new file where there is room"))?;
    let mut text = format!("failure {} is in {}", failure.number, file.display());
    if let MemoryDump::Kept { .. } = &failure.dump {
        text.push_str(&format!("; without its memory: {}", printable(&memory(failure))));
    }
    super::vm::done(out, json, &failure.name, &text)
}

/// What became of it; where it lies, since it is too long for an archive.
fn memory(failure: &Failure) -> String {
    match &failure.dump {
        MemoryDump::NotWanted => String::new(),
        MemoryDump::Kept { path, bytes } => format!("{} on host {}: {path}", mib(*bytes), failure.host),
        MemoryDump::Missing { why } => format!("not kept: {why}"),
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn tar(failure: &Failure, parts: &[(&str, Vec<u8>)]) -> std::io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    // Names of VMs and hosts may hold anything: the folder is named by what cannot.
    let folder = format!("failure-{}-{}", failure.vm, failure.number);
    for (name, bytes) in parts {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(failure.unix_ms / 1000);
        archive.append_data(&mut header, format!("{folder}/{name}"), bytes.as_slice())?;
    }
    archive.into_inner()
}

fn title(file: FailureFile) -> &'static str {
    match file {
        FailureFile::Screen => "Screen",
        FailureFile::Picture => "Screenshot",
        FailureFile::PictureText => "Screen text, read from the picture",
        FailureFile::Console => "Console, its end",
        FailureFile::Messages => "Messages",
        FailureFile::Statistics => "Statistics",
    }
}

/// What the guest showed; what made Mainstay act, if it showed nothing.
fn reason(failure: &Failure) -> String {
    let nothing = matches!(failure.class.kind, FailureKind::Reported | FailureKind::Unknown);
    printable(if nothing || failure.class.line.is_empty() { &failure.cause } else { &failure.class.line })
}

/// What was done, and what became of it in a word or two.
fn remedy(failure: &Failure) -> String {
    let outcome = match failure.outcome.split_once(':') {
        Some((word, _)) => word,
        None if failure.outcome.is_empty() => "under way",
        None => &failure.outcome,
    };
    format!("{} {}", failure.remedy, printable(outcome))
}

fn tone(failure: &Failure) -> Tone {
    match failure.outcome.as_str() {
        "" | "done" => Tone::Plain,
        _ => Tone::Bad,
    }
}

fn second(unix_ms: u64) -> String {
    let mut when = when(unix_ms);
    when.truncate(when.find('.').unwrap_or(when.len()));
    when
}

/// Without what a terminal would obey.
fn printable(line: &str) -> String {
    line.chars().filter(|letter| !letter.is_control() || *letter == '\t').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_give_orders_to_a_terminal() {
        for (line, expected) in
            [("\u{1b}]0;title\u{7}x", "]0;titlex"), ("\u{9b}31m", "31m"), ("a\tb\r", "a\tb"), ("größer", "größer")]
        {
            assert_eq!(printable(line), expected);
        }
    }
}
