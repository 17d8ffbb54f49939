//! Failure information: what a failed guest shows is collected before its remedy, and kept after it.
//!
//! ```text
//!   take ──► thread:  look (libvirt's lane "look") ─┬─ all is there, or patience ends ──► go: the remedy
//!                     tail of the console's file ───┘                                      │
//!            the part under way, statistics, console: until LATE ◄─────────────────────────┘
//!            a picture without a text screen: its text is read
//!            classify ──► exec::failures ──► kept ──► … its memory, if that is wanted first (`dump`)
//!                                                     … the remedy's outcome is written into the record
//! ```
//!
//! Whatever hangs or fails is recorded as missing with its reason, and holds up the remedy for the case's patience at most. A part
//! that was under way when the remedy went still counts: libvirt does one thing after the other with a domain. What would be begun
//! later shows the guest after its remedy, and is not taken; statistics and the console go on over a reset.
//!
//! Bounds: `MAX_AT_ONCE` failures are kept at once, one of a VM in `APART`; more remedies go without.
//!
//! Deliberately not here: what the remedy is, how long it may wait, what the text means (`core::guests`), the disk (`failures`).

pub mod picture;
pub mod screen;
mod sight;

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use super::clock;
use super::console::Consoles;
use super::dump::{self, DumpAsk, Dumper};
use super::failures::Failures;
use super::libvirt::Part;
use super::reading::Reader;
use crate::core::guests::Case;
use crate::types::failure::{Class, Failure, FailureFile, FailureKind, Family, MemoryDump};
use crate::types::guests::Remedy;
use crate::types::{Time, VmId};

use FailureFile as F;
use sight::{Booted, Sight};

/// Failures that are being kept at the same time.
const MAX_AT_ONCE: usize = 16;
/// Between two failures of a VM that are both kept: a guest that asks again and again shows nothing new.
const APART: Duration = Duration::from_secs(10);
/// What has not come in this time does not come.
const LATE: Duration = Duration::from_secs(2);
/// The remedy has its own deadline, which is shorter.
const OUTCOME: Duration = Duration::from_secs(30);

/// Looks at a running domain, like `Libvirt::look`.
type Look = Box<dyn Fn(VmId, Duration) -> Receiver<Part> + Send + Sync>;
/// Takes what comes after the look.
pub type Outcome = SyncSender<Afterwards>;

/// What comes after the look.
pub enum Afterwards {
    /// Its memory is wanted before its remedy.
    Dump(DumpAsk),
    /// What became of the remedy.
    Ended(Result<(), String>),
}

/// Collects and keeps failure information on this host; cheap to clone.
#[derive(Clone)]
pub struct Evidence(Arc<Inner>);

struct Inner {
    host: String,
    look: Look,
    dumper: Dumper,
    failures: Arc<Failures>,
    reader: Arc<Reader>,
    busy: Mutex<Busy>,
    consoles: Consoles,
}

/// What is under way.
#[derive(Default)]
struct Busy {
    count: usize,
    /// When a failure was last taken, and what it was, as far as that is known.
    last: BTreeMap<VmId, (Time, Option<Class>)>,
    /// Of VMs that a remedy has started anew here: where the console of this boot begins.
    booted: BTreeMap<VmId, Booted>,
}

/// Why nothing is kept.
enum Not {
    /// One of this VM has just been, and was this.
    JustNow(Option<Class>),
    /// This many are being kept.
    TooMany,
}

impl Evidence {
    /// For this host, by its name.
    #[must_use]
    pub fn new(
        host: &str,
        failures: Arc<Failures>,
        reader: Arc<Reader>,
        look: impl Fn(VmId, Duration) -> Receiver<Part> + Send + Sync + 'static,
        dumper: Dumper,
    ) -> Self {
        let (busy, consoles) = (Mutex::default(), Consoles::default());
        Self(Arc::new(Inner { host: host.to_owned(), look: Box::new(look), dumper, failures, reader, busy, consoles }))
    }

    /// Collects what can be had, calls `go` within the case's patience, once and in any case, and keeps the rest. `go` gives the
    /// remedy's outcome to its sender, or drops it. `kept` is told what was kept, or why not; not at all if this VM's last failure
    /// was kept moments ago. Both are called on another thread, or here when there is none.
    pub fn take(
        &self,
        vm: VmId,
        remedy: Remedy,
        case: Case,
        go: impl FnOnce(&Class, Outcome) + Send + 'static,
        kept: impl FnOnce(Result<String, String>) + Send + 'static,
    ) {
        let (outcome, told) = sync_channel(2); // Both, so that the loop never waits.
        let (inner, name) = (Arc::clone(&self.0), case.name.clone());
        let mut class = None;
        let why = match inner.begin(vm) {
            Ok(()) => match worker() {
                Ok(give) => {
                    let _ = give.send(Box::new(move || {
                        let under_way = UnderWay(inner);
                        under_way.0.collect(vm, remedy, case, |class| go(class, outcome), kept, &told);
                    }));
                    return;
                }
                Err(error) => {
                    inner.end();
                    Some(format!("no thread: {error}"))
                }
            },
            Err(Not::JustNow(last)) => {
                class = last;
                None
            }
            Err(Not::TooMany) => Some(format!("that of {MAX_AT_ONCE} guests is being kept already")),
        };
        let unknown = Class { family: Family::Unknown, kind: FailureKind::Unknown, line: String::new() };
        go(&class.unwrap_or(unknown), outcome);
        if let Some(why) = why {
            kept(Err(format!("{name}: failure information is not kept: {why}")));
        }
    }
}

/// A thread that does what it is given. It is asked for first: what one that cannot be started was given is lost.
fn worker() -> io::Result<SyncSender<Box<dyn FnOnce() + Send>>> {
    let (give, work) = sync_channel::<Box<dyn FnOnce() + Send>>(1);
    let run = move || {
        if let Ok(work) = work.recv() {
            work();
        }
    };
    std::thread::Builder::new().name("evidence".into()).spawn(run).map(|_| give)
}

/// Counts one failure off, also if its thread panics.
struct UnderWay(Arc<Inner>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Inner {
    fn begin(&self, vm: VmId) -> Result<(), Not> {
        let now = clock::now();
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.last.retain(|_, (last, _)| now.since(*last) < APART);
        if let Some((_, class)) = busy.last.get(&vm) {
            return Err(Not::JustNow(class.clone()));
        }
        if MAX_AT_ONCE <= busy.count {
            return Err(Not::TooMany);
        }
        busy.count += 1;
        busy.last.insert(vm, (now, None));
        Ok(())
    }

    /// For a remedy that follows at once.
    fn remember(&self, vm: VmId, class: &Class) {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, last)) = busy.last.get_mut(&vm) {
            *last = Some(class.clone());
        }
    }

    /// It was started anew: what its console shows so far is of the boot before, also where its kernel says nothing when it begins.
    fn boots(&self, vm: VmId, console: Option<String>) {
        let booted = console.and_then(|path| sight::booted(path, &self.consoles, LATE));
        let all = &mut self.busy.lock().unwrap_or_else(PoisonError::into_inner).booted;
        match booted {
            Some(booted) => all.insert(vm, booted),
            None => all.remove(&vm),
        };
    }

    fn end(&self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).count -= 1;
    }

    fn collect(
        &self,
        vm: VmId,
        remedy: Remedy,
        case: Case,
        go: impl FnOnce(&Class),
        kept: impl FnOnce(Result<String, String>),
        told: &Receiver<Afterwards>,
    ) {
        let (begun, unix_ms) = (clock::now(), clock::unix_ms());
        let booted = self.busy.lock().unwrap_or_else(PoisonError::into_inner).booted.get(&vm).cloned();
        let mut sight = Sight::new((self.look)(vm, LATE), self.consoles.clone(), Arc::clone(&self.reader), booted);
        sight.gather(begun + case.patience(), &case);
        let class = sight.classify(&case);
        self.remember(vm, &class);
        go(&class);
        let waited = clock::now().since(begun);
        sight.gather_late(begun + LATE, waited);
        sight.read_late();
        let late = sight.classify(&case);
        // What came late may show the guest after its remedy: it counts only where nothing was seen before.
        let class = if says_nothing(&class) { late } else { class };
        let console = sight.console_path();
        let defined = sight.defined_system();
        let (mut files, missing) = sight.into_files(waited);
        files.push((F::Messages, messages(&case, begun, unix_ms).into_bytes()));
        let failure = Failure {
            number: 0, // Filled in when it is kept.
            vm,
            name: case.name.clone(),
            host: self.host.clone(),
            unix_ms,
            class,
            cause: case.why.clone(),
            system: said_or_defined(&case, defined),
            remedy,
            outcome: String::new(),
            waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
            files: Vec::new(),
            missing,
            dump: MemoryDump::NotWanted,
        };
        let (name, class) = (case.name, failure.class.clone());
        let number = match self.failures.keep(failure, &files) {
            Ok(number) => number,
            Err(why) => return kept(Err(format!("{name}: failure information is not kept: {why}"))),
        };
        let line = if class.line.is_empty() { String::new() } else { format!(": {}", class.line) };
        kept(Ok(format!("{name} has failed ({class}{line}); more by `mainstay vm failures {name} --show {number}`")));
        let ended = loop {
            match told.recv_timeout(OUTCOME) {
                Ok(Afterwards::Dump(ask)) => dump::write(&self.failures, &self.dumper, vm, number, ask),
                Ok(Afterwards::Ended(result)) => break Some(result),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break None,
            }
        };
        let outcome = match ended {
            Some(Ok(())) => {
                if remedy.starts_anew() {
                    self.boots(vm, console);
                }
                "done".to_owned()
            }
            Some(Err(why)) => format!("not done: {why}"),
            None => "nobody knows".to_owned(),
        };
        if let Err(why) = self.failures.set_outcome(vm, number, &outcome) {
            tracing::warn!("{name}: what became of the remedy is not kept: {why}");
        }
    }
}

/// Nothing of what was seen tells what it is.
fn says_nothing(class: &Class) -> bool {
    matches!(class.kind, FailureKind::Unknown | FailureKind::Reported)
}

/// The guest's last words, with the clock of day.
fn messages(case: &Case, now: Time, unix_ms: u64) -> String {
    let clock = |at: Time| {
        let ms = unix_ms.saturating_sub(u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX));
        let stamp = i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        stamp.map_or_else(|| ms.to_string(), |stamp| format!("{stamp:.3}"))
    };
    let mut text = match system(case) {
        system if system.is_empty() => "system   not known: no agent has spoken\n".to_owned(),
        system => format!("system   {system}\n"),
    };
    if let Some((at, beat)) = &case.beat {
        let root = if beat.root_writable { "writable" } else { "not writable" };
        text.push_str(&format!(
            "beat     {}: up for {} s, load {}.{:02}, {} KiB available, root file system {root}, {} failed units, application {:?}, ready {}\n",
            clock(*at),
            beat.uptime_s,
            beat.load_centi / 100,
            beat.load_centi % 100,
            beat.available_kib,
            beat.failed_units,
            beat.application,
            beat.ready,
        ));
    }
    for (at, said) in &case.said {
        text.push_str(&format!("message  {}: {said}\n", clock(*at)));
    }
    text
}

/// As its agent says, else as its definition does.
fn said_or_defined(case: &Case, defined: Option<String>) -> String {
    match (system(case), defined) {
        (said, Some(defined)) if said.is_empty() => format!("{defined} (by its definition)"),
        (said, _) => said,
    }
}

/// In words; its parts were cleaned when they were heard.
fn system(case: &Case) -> String {
    let Some(system) = &case.system else { return String::new() };
    let parts = [system.id.as_str(), system.version.as_str(), system.kernel.as_str()];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[path = "evidence/tests.rs"]
mod tests;
