//! `mainstay verdict list [--host] [--vm]`, `mainstay verdict show ID`: what was decided, and why. `mainstay verdict replay FILE`:
//! decided again, without an agent.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;
use serde_json::json;

use super::agent;
use super::events::{vm_name, when};
use super::out::{Out, Tone, Word};
use super::trouble::{FAILED, Trouble, What};
use crate::core::action::{Action, Output};
use crate::exec::recorder::Recording;
use crate::exec::recorder::file::{self, BadFile};
use crate::exec::recorder::replay::replay;
use crate::types::Time;
use crate::types::verdict::VerdictView;
use crate::types::view::VIEW_SCHEMA;

/// `mainstay verdict …`
#[derive(Subcommand, Debug)]
pub enum VerdictCommand {
    /// The newest verdicts of all hosts that answer, oldest first: how hosts are, where VMs are started, what they wait for.
    List {
        /// Only those about this host, by its name: that was judged, or that shall run a VM.
        #[arg(long)]
        host: Option<String>,
        /// Only those about this VM (name or UUID).
        #[arg(long)]
        vm: Option<String>,
    },
    /// One verdict with all that it rests on.
    ///
    /// Each host judges for itself, and keeps what it has decided until its agent is restarted.
    Show {
        /// As in `verdict list`, or in brackets in `events`.
        id: String,
    },
    /// Replay what led to a verdict: the core is told again what it was told then, and has to decide the same.
    ///
    /// FILE lies in /var/lib/mainstay/verdicts on the host that gave the verdict, as `verdict show` says; it is written half a minute
    /// after the verdict. It may be replayed on any machine, without an agent, with the version that recorded it. Exit code 1 when
    /// something is decided differently.
    ///
    /// It holds what the agent was told in the minute before: beats, claims, definitions of VMs (with passwords of their graphics), but
    /// no keys, and no secrets of fence devices.
    Replay {
        /// The file.
        file: PathBuf,
        /// Try it although another version of mainstay has recorded it.
        #[arg(long)]
        force: bool,
    },
}

/// Runs it.
pub async fn run(out: &mut Out, json: bool, command: VerdictCommand) -> Result<(), Trouble> {
    match command {
        VerdictCommand::List { host, vm } => list(out, json, vm, host.as_deref()).await,
        VerdictCommand::Show { id } => show(out, json, &id).await,
        VerdictCommand::Replay { file, force } => replayed(out, json, &file, force),
    }
}

async fn list(out: &mut Out, json: bool, vm: Option<String>, host: Option<&str>) -> Result<(), Trouble> {
    let what = "verdicts were not listed";
    let vm = vm_name(vm, what).await?;
    let verdicts = agent(what).await?.verdicts(vm.as_deref(), host).await.what(what)?;
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "verdicts": verdicts }))?);
    }
    for verdict in &verdicts {
        let first = format!("{}  {}  ", when(verdict.unix_ms), verdict.id);
        let text = out.wrapped(&first, &format!("{}: {}", verdict.kind, verdict.text));
        let (head, tail) = text.split_at(first.len());
        out.line(&format!("{head}{}", out.paint(tail, tone(&verdict.kind))))?;
    }
    Ok(())
}

async fn show(out: &mut Out, json: bool, id: &str) -> Result<(), Trouble> {
    let what = format!("verdict {id} was not shown");
    let Some(verdict) = agent(&what).await?.verdict(id).await.what(&what)? else {
        let why = "no host that answers keeps a verdict of this id";
        return Err(Trouble::new(FAILED, what, why, "mainstay verdict list shows those that are kept"));
    };
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "verdict": verdict }))?);
    }
    let VerdictView { id, unix_ms, by, kind, host, vm, text, evidence, recording } = &verdict;
    let mut fields = vec![
        ("Verdict", Word::plain(id)),
        ("When", Word::plain(when(*unix_ms))),
        ("Given by", Word::name(by)),
        ("Kind", Word::new(kind, tone(kind))),
    ];
    fields.extend(vm.as_deref().map(|vm| ("VM", Word::name(vm))));
    fields.extend(host.as_deref().map(|host| ("Host", Word::name(host))));
    fields.push(("Decided", Word::plain(text)));
    fields.extend(recording.as_deref().map(|path| ("Recording", Word::plain(format!("{path} on {by}")))));
    out.line(&out.fields(&fields))?;
    out.line("")?;
    Ok(evidence.iter().try_for_each(|line| out.line(&out.wrapped("- ", line)))?)
}

/// What was said during a replay.
#[derive(Serialize)]
struct Moment {
    unix_ms: u64,
    kind: String,
    text: String,
    verdict: Option<String>,
}

fn replayed(out: &mut Out, json: bool, file: &Path, force: bool) -> Result<(), Trouble> {
    let what = format!("{} was not replayed", file.display());
    let bytes = std::fs::read(file)
        .map_err(|error| Trouble::new(FAILED, &what, error.to_string(), "is it there, and are you root?"))?;
    let recording = file::decode(&bytes, force).map_err(|bad| {
        let next = match bad {
            BadFile::Version { .. } => "replay it with that version, or try it all the same with --force",
            BadFile::Format(_) => "replay it with the version that has recorded it",
            BadFile::NotOne | BadFile::Damaged | BadFile::Body(_) => "copy it again from the host that has recorded it",
        };
        Trouble::new(FAILED, &what, bad.to_string(), next)
    })?;
    let mut moments: Vec<Moment> = Vec::new();
    let same = replay(&recording, |at, output| moments.extend(said(&recording, at, output)));
    if !json {
        out.line(&format!("Verdict {} of host {}", recording.id, recording.host))?;
        for Moment { unix_ms, kind, text, verdict } in &moments {
            let first = format!("{}  ", when(*unix_ms));
            let verdict = verdict.as_ref().map(|id| format!(" [{id}]")).unwrap_or_default();
            out.line(&out.wrapped(&first, &format!("{kind}: {text}{verdict}")))?;
        }
    }
    let same = same.map_err(|differs| {
        let what = format!("{} was not decided again as it was", file.display());
        Trouble::new(FAILED, what, differs.to_string(), "keep the file, and report it")
    })?;
    if json {
        let Recording { id, host, .. } = &recording;
        let events = same.events;
        let told = json!({ "schema": VIEW_SCHEMA, "verdict": id, "host": host, "events": events, "same": true, "told": moments });
        return Ok(out.json(&told)?);
    }
    Ok(out.line(&format!("{} events in {:.0} s, same actions", same.events, same.span.as_secs_f64()))?)
}

/// Notes, and verdicts that no note tells.
fn said(recording: &Recording, at: Time, output: &Output) -> Vec<Moment> {
    let (then, then_unix_ms) = recording.clocks;
    let ago = u64::try_from(then.since(at).as_millis()).unwrap_or(u64::MAX);
    let unix_ms = then_unix_ms.saturating_sub(ago);
    let id = |id| Some(format!("{}-{id}", recording.host));
    let is_told =
        |verdict| output.actions.iter().any(|action| matches!(action, Action::Note(n) if n.verdict == Some(verdict)));
    let mut moments = Vec::new();
    for action in &output.actions {
        match action {
            Action::Note(note) => moments.push(Moment {
                unix_ms,
                kind: note.kind.to_string(),
                text: note.text.clone(),
                verdict: note.verdict.and_then(id),
            }),
            Action::Verdict(given) if !is_told(given.id) => moments.push(Moment {
                unix_ms,
                kind: given.kind.name(),
                text: given.text.clone(),
                verdict: id(given.id),
            }),
            _ => {}
        }
    }
    moments
}

fn tone(kind: &str) -> Tone {
    match kind {
        "host-dead" => Tone::Bad,
        "host-live" | "host-left" | "vm-goes-on" => Tone::Plain,
        _ => Tone::Doubtful,
    }
}
