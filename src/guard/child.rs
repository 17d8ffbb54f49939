//! The child: does the guard's work, from what an earlier guard of this boot handed on, or anew.
//!
//! ```text
//! memory whole, of this boot, of the incarnation in the state file? ──yes──► goes on: leases, rows, counter
//!   └──no──► next incarnation; rows of the last guard come up as over
//! ```
//!
//! Deliberately not here: what happens when it dies (`parent`).

use std::io::PipeReader;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;

use super::memory::Memory;
use super::process::Process;
use super::shared::{Identity, Paths, Shared};
use super::state::{Carried, State};
use super::table::Table;
use super::{enforce, kept, network, notify, orders, privileges, socket, spawn, watch};
use crate::exec::clock;
use crate::exec::state::{HostState, Read, StateFile};
use crate::mutants::{Mutant, planted};
use crate::types::{BootId, Incarnation};

/// Works until it dies; never returns but with an error.
///
/// # Errors
/// When it cannot begin: state file, kept rows, socket, threads.
pub fn run(paths: Paths, memory: Memory, news: OwnedFd, parent: PipeReader, warnings: &[String]) -> anyhow::Result<()> {
    abort_on_panic();
    let refused = privileges::claim();
    let boot = clock::boot_id().context("boot id")?;
    let (mut state, identity) = begin(&paths, &memory, boot)?;
    refused.into_iter().for_each(|text| state.say(text));
    warnings.iter().for_each(|text| state.warn(text.clone()));
    let incarnation = state.incarnation;
    let shared = Arc::new(Shared::new(paths, state, memory, news, identity)?);
    shared.with(|_, _| ()); // The memory holds what will be told from now on.
    shared.keep().with_context(|| shared.paths.kept.display().to_string())?;
    let listener = socket::listen(&shared).with_context(|| shared.paths.socket.display().to_string())?;
    let start = |name: &str, body: fn(&Shared)| {
        let shared = Arc::clone(&shared);
        spawn(name, move || body(&shared))
    };
    let enforcing = Arc::clone(&shared);
    spawn("enforce", move || enforce::run(&enforcing, parent))?;
    start("watch", watch::run)?;
    orders::begin(&shared, |_| true).map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
    start("network", network::run)?;
    notify::ready();
    tracing::info!("incarnation {incarnation} of boot {boot}");
    socket::serve(&shared, &listener);
    anyhow::bail!("the socket for the agent ended")
}

/// Goes on with what was handed on, or begins anew.
fn begin(paths: &Paths, memory: &Memory, boot: BootId) -> anyhow::Result<(State, Identity)> {
    let (mut file, known) = open_identity(&paths.state)?;
    let carried = memory.read().and_then(|bytes| Carried::decode(&bytes).ok());
    // Another guard may have run since without this memory: then it has used a higher incarnation.
    let same =
        |carried: &Carried| carried.boot == boot && Some(carried.incarnation) == known.map(|known| known.incarnation);
    if let (Some(carried), Some(known)) = (carried.filter(same), known) {
        return Ok((go_on(carried)?, (file, known)));
    }
    // If nothing is known: the clock of day in microseconds, which every datastore is asked to confirm before the first
    // beat there.
    let first = HostState { host: None, incarnation: Incarnation(clock::unix_ms() * 1000) };
    let identity = known.map_or(first, |known| HostState { incarnation: risen(known.incarnation), ..known });
    file.write(&identity)?;
    let mut table = Table::default();
    let processes = kept::restore(&paths.kept, &mut table)
        .with_context(|| format!("{}: rows of the last guard", paths.kept.display()))?;
    let mut state = State::new(boot, identity.incarnation, table);
    state.processes.extend(processes.into_iter().map(|process| (process.key(), Arc::new(process))));
    Ok((state, (file, identity)))
}

/// The incarnation of a guard that begins after one of incarnation `known` and cannot go on with its work.
#[must_use]
pub fn risen(known: Incarnation) -> Incarnation {
    if planted(Mutant::CounterReused) { known } else { known.next() }
}

/// The incarnation of a guard that a datastore has shown `shown`, which is not below its own. Its host has lost what it
/// knew, and may have used others since `shown`, which lie nowhere: a counter of them would be given, and a beat sealed
/// under it, a second time. So `random` chooses one of the 2³¹ next.
#[must_use]
pub fn risen_above(shown: Incarnation, random: u32) -> Incarnation {
    Incarnation(shown.next().0.saturating_add(u64::from(random >> 1)))
}

fn go_on(carried: Carried) -> anyhow::Result<State> {
    let mut state = State::carry_on(carried);
    let known: Vec<_> = state.table.processes().collect();
    let now = clock::now();
    state.lapse_if_due(now);
    for (vm, key) in known {
        match Process::open(key).with_context(|| format!("QEMU {}", key.pid))? {
            Some(process) => drop(state.processes.insert(key, Arc::new(process))),
            None => state.exited(vm, key, now),
        }
    }
    state.say("goes on with what the last guard handed on".to_owned());
    Ok(state)
}

/// A guard that lost a thread is no guard: systemd starts another.
fn abort_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tell(info);
        std::process::abort();
    }));
}

/// Opens the state file; what it says, if anything.
fn open_identity(path: &Path) -> anyhow::Result<(StateFile<HostState>, Option<HostState>)> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let file = StateFile::<HostState>::open(path)?;
    match file.read()? {
        Read::Known(known) => Ok((file, Some(known))),
        Read::Unknown { why } => {
            tracing::warn!("{why}; the incarnation begins with the clock of day");
            Ok((file, None))
        }
    }
}
