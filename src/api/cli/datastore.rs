//! `mainstay datastore add|set|accept|list`.
//!
//! `add` looks at the path on this host first: mistakes are cheapest here. The agent looks again, on every host.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::json;

use super::args::{DatastoreCommand, LateWritesArgument};
use super::out::Out;
use super::status::view;
use super::trouble::{DENIED, FAILED, Trouble, USAGE, What};
use super::{agent, lists, vm};
use crate::api::dbus::resolve;
use crate::exec::clock;
use crate::exec::doctor::mounts::{self, Mount, Sharing};
use crate::types::settings::{DatastoreSettings, LateWrites, SettingsChange};
use crate::types::view::VIEW_SCHEMA;
use crate::types::{DatastoreId, StorageFence};

/// How long looking at the path may take; a hung mount would take for ever.
const LOOK_TIME: Duration = Duration::from_secs(10);
/// Names stand in tables and messages.
const NAME_LETTERS: usize = 32;

/// Runs it.
pub async fn run(out: &mut Out, json: bool, command: DatastoreCommand) -> Result<(), Trouble> {
    match command {
        DatastoreCommand::List => {
            let (_, view) = view("datastores were not listed").await?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "datastores": view.datastores }))?);
            }
            Ok(out.line(&lists::datastore_table(out, &view.datastores))?)
        }
        DatastoreCommand::Add { name, path, fence, late_writes, allow_local } => {
            let what = format!("datastore \"{name}\" was not added");
            let asked = Asked { name, path, fence, late_writes: late_writes.into(), allow_local };
            add(out, json, asked, &what).await
        }
        DatastoreCommand::Accept { name } => {
            let what = format!("datastore \"{name}\" was not accepted");
            let (agent, view) = view(&what).await?;
            let datastore = resolve::datastore(&view, &name).what(&what)?;
            if !datastore.rolled_back {
                let why = "as far as the master knows it shows all that it ever acknowledged";
                return Err(Trouble::new(FAILED, what, why, "mainstay datastore list shows what is wrong with it"));
            }
            let name = datastore.name.clone();
            let change = SettingsChange::AcceptDatastore { name: name.clone() };
            let said = out.progress("changing the settings", agent.change(&change)).await.what(&what)?;
            vm::done(out, json, &name, &said)
        }
        DatastoreCommand::Set { name, fence, late_writes } => {
            let what = format!("datastore \"{name}\" was not changed");
            let fence = fence.map(|text| parse_fence(&text, &what)).transpose()?;
            let (agent, view) = view(&what).await?;
            let name = resolve::datastore(&view, &name).what(&what)?.name.clone();
            let late_writes = late_writes.map(LateWrites::from);
            let change = SettingsChange::ChangeDatastore { name: name.clone(), fence, late_writes };
            let said = out.progress("changing the settings", agent.change(&change)).await.what(&what)?;
            vm::done(out, json, &name, &said)
        }
    }
}

struct Asked {
    name: String,
    path: PathBuf,
    fence: Option<String>,
    late_writes: LateWrites,
    allow_local: bool,
}

async fn add(out: &mut Out, json: bool, asked: Asked, what: &str) -> Result<(), Trouble> {
    let Asked { name, path, fence, late_writes, allow_local } = asked;
    let fits = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    if name.is_empty() || NAME_LETTERS < name.len() || !name.chars().all(fits) {
        let next = format!("use 1 to {NAME_LETTERS} letters, digits, '-', '_' or '.'");
        return Err(Trouble::new(USAGE, what, "the name cannot be used", next));
    }
    let fence = fence.map(|text| parse_fence(&text, what)).transpose()?;
    let seen = look(&path, allow_local).map_err(|no| Trouble::new(FAILED, what, no.why, no.next))?;
    let fence = fence.unwrap_or_else(|| match seen.mount.drops_dead_locks() {
        true => StorageFence::Lock,
        false => StorageFence::None,
    });
    let settings = DatastoreSettings {
        id: DatastoreId(uuid::Builder::from_random_bytes(clock::random()).into_uuid()),
        name: name.clone(),
        path: seen.path,
        fence: fence.clone(),
        late_writes,
        accepted: 0,
    };
    let agent = agent(what).await?;
    let change = SettingsChange::AddDatastore(settings);
    let said = out.progress("adding the datastore", agent.change(&change)).await.what(what)?;
    vm::done(out, json, &name, &said)?;
    if json {
        return Ok(());
    }
    if seen.mount.sharing() == Sharing::Local {
        let local = format!("{} is a local file system: is it the same storage on every host?", seen.mount.kind);
        out.line(&out.wrapped("Warning: ", &local))?;
    }
    out.line(&out.wrapped("Fence: ", &meaning(&fence, late_writes)))?;
    Ok(())
}

/// What a fence means when a host dies.
fn meaning(fence: &StorageFence, late_writes: LateWrites) -> String {
    match (fence, late_writes) {
        (StorageFence::Lock, _) => {
            "lock. A VM of a dead host starts elsewhere when the storage server has dropped that \
             host's image locks (its lease: 90 s on NFSv4 unless lowered; mainstay doctor shows it)."
                .to_owned()
        }
        (StorageFence::Command { program }, _) => format!(
            "command. {program} HOST_NAME HOST_ID is run before a VM of a dead host starts elsewhere; it must exclude that \
             host's writes and be installed on every host."
        ),
        (StorageFence::None, LateWrites::Accept) => {
            "none, late writes accepted. A VM of a dead host starts elsewhere at \
             once; a write that the dead host's kernel still held may reach its disk after that."
                .to_owned()
        }
        (StorageFence::None, LateWrites::Exclude) => {
            "none. A VM of a dead host waits until that host was powered off or \
             has booted again. For a faster restart: mainstay datastore set NAME --fence lock|command:/path."
                .to_owned()
        }
    }
}

fn parse_fence(text: &str, what: &str) -> Result<StorageFence, Trouble> {
    match text.split_once(':') {
        None if text == "lock" => Ok(StorageFence::Lock),
        None if text == "none" => Ok(StorageFence::None),
        Some(("command", program)) if program.starts_with('/') => {
            Ok(StorageFence::Command { program: program.to_owned() })
        }
        _ => {
            let why = format!("--fence {text} is none of lock, none, command:/PATH");
            Err(Trouble::new(USAGE, what, why, "a command needs its absolute path"))
        }
    }
}

struct Seen {
    path: String,
    mount: Mount,
}

struct No {
    why: String,
    next: String,
}

impl No {
    fn new(why: impl Into<String>, next: impl Into<String>) -> Self {
        Self { why: why.into(), next: next.into() }
    }
}

/// In a thread, so that a hung mount does not hang the command.
fn look(path: &Path, allow_local: bool) -> Result<Seen, No> {
    let (send, seen) = mpsc::channel();
    let looked = path.to_owned();
    std::thread::spawn(move || {
        // Nobody waits any longer: the thread is the mount's.
        let _ = send.send(look_at(&looked, allow_local));
    });
    seen.recv_timeout(LOOK_TIME).unwrap_or_else(|_| {
        let why = format!("{} did not answer within {} s", path.display(), LOOK_TIME.as_secs());
        Err(No::new(why, "does its server answer? is it mounted?"))
    })
}

fn look_at(path: &Path, allow_local: bool) -> Result<Seen, No> {
    let shown = path.display();
    let failed = |error: std::io::Error| No::new(format!("{shown}: {error}"), "mount the shared storage there first");
    if !path.is_absolute() {
        return Err(No::new(format!("{shown} is not absolute"), "say the path from / on"));
    }
    let path = std::fs::canonicalize(path).map_err(failed)?;
    let meta = std::fs::metadata(&path).map_err(failed)?;
    if !meta.is_dir() {
        return Err(No::new(format!("{shown} is no folder"), "a datastore is a mounted folder"));
    }
    let Some(text) = path.to_str().map(str::to_owned) else {
        return Err(No::new(format!("{shown} is not UTF-8"), "use another path"));
    };
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(failed)?;
    let mount = mounts::of_path(&mounts::parse(&table), &text).cloned().unwrap_or_default();
    let on_root = std::fs::metadata("/").is_ok_and(|root| root.dev() == meta.dev());
    if on_root && !allow_local {
        let why = format!("nothing is mounted at {text}: it lies on this host's root file system ({})", mount.kind);
        return Err(No::new(why, "mount the shared storage there; for a test on one host say --allow-local"));
    }
    if nix::unistd::geteuid().is_root()
        && let Err(error) = tempfile::Builder::new().prefix(".mainstay-").tempfile_in(&path)
    {
        return Err(No::new(format!("{text} is not writable: {error}"), "mount it read-write, without root squashing"));
    }
    Ok(Seen { path: text, mount })
}

impl From<LateWritesArgument> for LateWrites {
    fn from(argument: LateWritesArgument) -> Self {
        match argument {
            LateWritesArgument::Exclude => Self::Exclude,
            LateWritesArgument::Accept => Self::Accept,
        }
    }
}

/// Commands that work on this host's own files ask for root before they begin.
pub fn need_root(what: &str) -> Result<(), Trouble> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Trouble::new(
        DENIED,
        what,
        "it changes files that belong to root",
        "say it again as root, for example with sudo",
    ))
}
