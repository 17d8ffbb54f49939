//! `mainstay events [--follow] [--since SPAN|TIME] [--vm] [--host]`.
//!
//! Following begins to listen *before* it asks for what was: nothing falls between, and what comes twice is shown once.
//! When the agent is restarted it asks again for what it may have missed.

use std::collections::VecDeque;

use jiff::Timestamp;
use jiff::civil::Time;
use jiff::tz::TimeZone;
use serde_json::json;

use super::args::EventsArguments;
use super::out::{Out, Tone};
use super::trouble::{Trouble, USAGE, What};
use super::{agent, status};
use crate::api::dbus::client::{Agent, Followed};
use crate::exec::clock;
use crate::types::view::{NoteView, VIEW_SCHEMA};

/// Notes remembered to know them again when they come twice.
const REMEMBERED: usize = 1_000;
/// Asked for again after a restart of the agent, on top of what was shown last, in milliseconds.
const OVERLAP_MS: u64 = 10_000;

/// Runs it.
pub async fn run(out: &mut Out, json: bool, filter: EventsArguments) -> Result<(), Trouble> {
    let what = "events were not listed";
    let since = since(&filter.since, clock::unix_ms()).ok_or_else(|| {
        let next = "say a span like 10m, 2h, 3d, or a time like 2026-11-25T17:00";
        Trouble::new(USAGE, what, format!("--since {} is neither a span nor a time", filter.since), next)
    })?;
    let vm = vm_name(filter.vm, what).await?;
    let (vm, host) = (vm.as_deref(), filter.host.as_deref());
    let agent = agent(what).await?;
    if !filter.follow {
        let notes = agent.notes(since, vm, host).await.what(what)?;
        if json {
            return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "notes": notes }))?);
        }
        return Ok(notes.iter().try_for_each(|note| show(out, note))?);
    }
    follow(out, json, &agent, since, vm, host).await
}

async fn follow(
    out: &mut Out,
    json: bool,
    agent: &Agent,
    since: u64,
    vm: Option<&str>,
    host: Option<&str>,
) -> Result<(), Trouble> {
    let what = "events are not followed";
    let mut coming = agent.follow().await.what(what)?;
    let mut shown = Shown { notes: VecDeque::new(), newest: since };
    let mut old = agent.notes(since, vm, host).await.what(what)?;
    loop {
        for note in old.drain(..) {
            if shown.is_new(&note) {
                if json { out.json(&note)? } else { show(out, &note)? }
            }
        }
        match coming.next().await {
            Followed::Note(note) => {
                let fits = vm.is_none_or(|vm| note.vm.as_deref() == Some(vm));
                if fits && host.is_none_or(|host| note.host == host) {
                    old.push(note);
                }
            }
            Followed::NewAgent => {
                out.error("(the agent was restarted)");
                old = agent.notes(shown.newest.saturating_sub(OVERLAP_MS), vm, host).await.unwrap_or_default();
            }
            Followed::NoAgent => out.error("(the agent is not running; waiting for it)"),
            Followed::End => {
                let why = "the connection to D-Bus ended";
                return Err(Trouble::new(super::trouble::UNREACHABLE, what, why, "say it again when D-Bus is back"));
            }
        }
    }
}

struct Shown {
    notes: VecDeque<NoteView>,
    newest: u64,
}

impl Shown {
    fn is_new(&mut self, note: &NoteView) -> bool {
        if self.notes.contains(note) {
            return false;
        }
        if self.notes.len() == REMEMBERED {
            self.notes.pop_front();
        }
        self.newest = self.newest.max(note.unix_ms);
        self.notes.push_back(note.clone());
        true
    }
}

/// Notes and verdicts carry names; a UUID is looked up. A name is taken as it is: its VM may be gone.
pub async fn vm_name(vm: Option<String>, what: &str) -> Result<Option<String>, Trouble> {
    let Some(wanted) = vm else { return Ok(None) };
    if wanted.parse::<crate::types::VmId>().is_err() {
        return Ok(Some(wanted));
    }
    let (_, view) = status::view(what).await?;
    Ok(Some(crate::api::dbus::resolve::vm(&view, &wanted).what(what)?.name.clone()))
}

fn show(out: &mut Out, note: &NoteView) -> std::io::Result<()> {
    let tone = match note.level.as_str() {
        "alarm" => Tone::Bad,
        "warning" => Tone::Doubtful,
        _ => Tone::Plain,
    };
    let first = format!("{}  {}  ", when(note.unix_ms), note.host);
    let vm = note.vm.as_deref().map(|vm| format!("{vm}: ")).unwrap_or_default();
    let verdict = note.verdict.as_deref().map(|id| format!(" [{id}]")).unwrap_or_default();
    let text = out.wrapped(&first, &format!("{vm}{}{verdict}", note.text));
    let (head, tail) = text.split_at(first.len());
    out.line(&format!("{head}{}", out.paint(tail, tone)))
}

/// The local clock of day.
pub fn when(unix_ms: u64) -> String {
    let stamp = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    let Some(stamp) = stamp else { return "(no time)".to_owned() };
    stamp.to_zoned_datetime(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S%.3f").to_string()
}

/// Milliseconds since 1970 of a span back from now, a time of today, or a date and time (local unless it says).
fn since(text: &str, now_unix_ms: u64) -> Option<u64> {
    if let Some(back) = span_ms(text) {
        return Some(now_unix_ms.saturating_sub(back));
    }
    let now = Timestamp::from_millisecond(i64::try_from(now_unix_ms).ok()?).ok()?.to_zoned_datetime(TimeZone::system());
    let stamp = text.parse::<Timestamp>().ok().or_else(|| {
        let local = text.parse::<jiff::civil::DateTime>().ok();
        let today = || text.parse::<Time>().ok().map(|time| now.date().to_datetime(time));
        Some(local.or_else(today)?.to_zoned_datetime(TimeZone::system()).ok()?.timestamp())
    })?;
    u64::try_from(stamp.as_millisecond()).ok()
}

fn span_ms(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: u64 = digits.parse().ok()?;
    let unit = match &text[digits.len()..] {
        "s" | "sec" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(unit)
}
