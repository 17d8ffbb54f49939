//! The gate that every operation of one host passes.
//!
//! ```text
//!              ┌─ pass ─► executed at once, on the session's thread
//!  operation ──┼─ hold ─► `held`  ──heal──► `queue` (due now, in order) ─► worker
//!              ├─ delay ► `queue` (due later) ────────────────────────────► worker ─► asks the gate again
//!              └─ refused: EIO, ENOSPC, ESTALE
//!
//!  late write: refused with EIO, its data ► `queue` (due later) ─► worker ─► lands, if no fence came meanwhile
//! ```
//!
//! `held` and `queue` are bounded by what the kernel lets a mount have under way: its background limit and one request
//! per waiting thread of the host. Late writes are bounded by the time for which the fault is set.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use fuser::Errno;
use serde_json::{Value, json};

use super::Fault;
use super::tree::Handle;

/// Kinds of operations, as far as faults and counts tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Reads data.
    Read,
    /// Writes, allocates or cuts data.
    Write,
    /// Makes data durable.
    Sync,
    /// Opens a file that is there.
    Open,
    /// Asks for names or attributes.
    Look,
    /// Makes or changes names or attributes.
    Change,
    /// Removes names.
    Remove,
    /// Asks for or sets a lock.
    Lock,
    /// Gives a handle back.
    Close,
}

const CLASSES: [(Class, &str); 9] = [
    (Class::Read, "read"),
    (Class::Write, "write"),
    (Class::Sync, "sync"),
    (Class::Open, "open"),
    (Class::Look, "look"),
    (Class::Change, "change"),
    (Class::Remove, "remove"),
    (Class::Lock, "lock"),
    (Class::Close, "close"),
];

impl Class {
    fn changes_storage(self) -> bool {
        match self {
            Class::Write | Class::Change | Class::Remove => true,
            Class::Read | Class::Sync | Class::Open | Class::Look | Class::Lock | Class::Close => false,
        }
    }
}

/// How an operation that comes through the gate is to be executed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// As asked.
    Go,
    /// A write: first half only, then EIO. All else: as asked.
    Torn,
    /// A write: EIO now, put down later. All else: as asked.
    Late(Duration),
    /// Without syncing.
    SkipSync,
    /// Not at all.
    Refuse(Errno),
}

enum Gate {
    Pass(Verdict),
    Hold,
    Delay(Duration),
}

type Act = Box<dyn FnOnce(Verdict) + Send>;

struct Request {
    class: Class,
    handle: Option<Arc<Handle>>,
    act: Act,
}

enum Task {
    Request(Request),
    LateWrite { handle: Arc<Handle>, land: Box<dyn FnOnce() + Send> },
}

struct State {
    fault: Fault,
    dead: bool,
    fenced: bool,
    /// Rises with every fence and boot; a handle of an earlier one can write no more.
    epoch: u64,
    last_operation: Instant,
    held: VecDeque<Request>,
    queue: BTreeMap<(Instant, u64), Task>,
    queued: u64,
}

/// One host as the storage sees it; outlives its mounts.
pub struct Host {
    name: String,
    state: Mutex<State>,
    wake: Condvar,
    /// Shared by each change of the storage under way, exclusive for a fence: nothing lands once a fence is set.
    landing: RwLock<()>,
    ours: Counts,
    others: Counts,
}

#[derive(Default)]
struct Counts([AtomicU64; CLASSES.len()]);

impl Host {
    /// A healthy host, with its worker thread.
    pub fn new(name: &str) -> std::io::Result<Arc<Self>> {
        let state = State {
            fault: Fault::None,
            dead: false,
            fenced: false,
            epoch: 0,
            last_operation: Instant::now(),
            held: VecDeque::new(),
            queue: BTreeMap::new(),
            queued: 0,
        };
        let host = Arc::new(Host {
            name: name.into(),
            state: Mutex::new(state),
            wake: Condvar::new(),
            landing: RwLock::new(()),
            ours: Counts::default(),
            others: Counts::default(),
        });
        let worker = host.clone();
        std::thread::Builder::new().name(format!("queue-{name}")).spawn(move || worker.work())?;
        Ok(host)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Counts an operation; `ours` is one below a folder `.mainstay`.
    pub fn count(&self, class: Class, ours: bool) {
        let counts = if ours { &self.ours } else { &self.others };
        counts.0[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Takes an operation to the gate. `act` is called exactly once: here and now, or later on another thread.
    pub fn submit(&self, class: Class, handle: Option<&Arc<Handle>>, act: impl FnOnce(Verdict) + Send + 'static) {
        let mut state = self.state();
        let request = |act| Request { class, handle: handle.cloned(), act };
        match state.gate(class, handle.map(|h| &**h)) {
            Gate::Pass(verdict) => {
                state.renew();
                drop(state);
                self.execute(class, handle.map(|h| &**h), verdict, act);
            }
            Gate::Hold => state.held.push_back(request(Box::new(act))),
            Gate::Delay(time) => {
                state.renew();
                state.enqueue(time, Task::Request(request(Box::new(act))));
                self.wake.notify_one();
            }
        }
    }

    /// Puts a late write down after `time`, unless a fence or the end of its handle's locks comes before.
    pub fn land_later(&self, time: Duration, handle: Arc<Handle>, land: impl FnOnce() + Send + 'static) {
        self.state().enqueue(time, Task::LateWrite { handle, land: Box::new(land) });
        self.wake.notify_one();
    }

    /// Sets the fault; what was held goes through the gate again, in order, unless the storage still hangs.
    pub fn set_fault(&self, fault: Fault) {
        let mut state = self.state();
        state.fault = fault;
        if fault != Fault::Hang {
            state.release_held();
            self.wake.notify_one();
        }
    }

    /// The host is about to be killed. Everything that waits is answered.
    pub fn set_dead(&self) {
        let barrier = self.landing.write().expect("no operation panics while it lands");
        let mut state = self.state();
        state.dead = true;
        let waiting = state.take_waiting();
        drop((state, barrier));
        self.answer(waiting);
    }

    /// Answers everything that waits with EIO, for the end of a mount.
    pub fn abandon_waiting(&self) {
        let waiting = self.state().take_waiting();
        self.answer(waiting);
    }

    /// The storage fence: once this returned nothing of the host lands until `set_alive`.
    pub fn set_fenced(&self) {
        let _barrier = self.landing.write().expect("no operation panics while it lands");
        let mut state = self.state();
        state.fenced = true;
        state.epoch += 1;
    }

    /// Normal service again. Says whether the host was cut off before, so that its locks of then are void.
    pub fn set_alive(&self) -> bool {
        let mut state = self.state();
        let was_cut_off = state.dead || state.fenced;
        if was_cut_off {
            state.epoch += 1;
            state.last_operation = Instant::now();
        }
        (state.dead, state.fenced, state.fault) = (false, false, Fault::None);
        state.release_held();
        self.wake.notify_one();
        was_cut_off
    }

    /// Waits for changes under way; after that no handle that was marked as lost before lands anything.
    pub fn landing_barrier(&self) {
        drop(self.landing.write().expect("no operation panics while it lands"));
    }

    /// Whether the host keeps its locks when it closes files.
    pub fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// Whether nothing came from the host for a time of `lease`.
    pub fn is_silent(&self, lease: Duration) -> bool {
        lease <= self.state().last_operation.elapsed()
    }

    /// The epoch for a handle opened now.
    pub fn epoch(&self) -> u64 {
        self.state().epoch
    }

    /// For people and tests.
    pub fn status(&self) -> Value {
        let state = self.state();
        json!({
            "fault": state.fault,
            "dead": state.dead,
            "fenced": state.fenced,
            "epoch": state.epoch,
            "silent_ms": state.last_operation.elapsed().as_millis() as u64,
            "held": state.held.len(),
            "queued": state.queue.len(),
            "operations": { "mainstay": self.ours.to_json(), "other": self.others.to_json() },
        })
    }

    fn execute(&self, class: Class, handle: Option<&Handle>, verdict: Verdict, act: impl FnOnce(Verdict)) {
        if !class.changes_storage() {
            return act(verdict);
        }
        let _landing = self.landing.read().expect("no operation panics while it lands");
        // A fence may have come between the gate and here.
        let refused = self.state().refusal(class, handle);
        act(refused.map_or(verdict, Verdict::Refuse))
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let due = state.queue.first_key_value().map(|(key, _)| *key);
            state = match due {
                None => self.wake.wait(state).expect("no holder of the state panics"),
                Some((at, _)) if now < at => {
                    self.wake.wait_timeout(state, at - now).expect("no holder of the state panics").0
                }
                Some(key) => {
                    let task = state.queue.remove(&key).expect("found just now");
                    self.run(state, task);
                    self.state()
                }
            };
        }
    }

    fn run(&self, mut state: MutexGuard<State>, task: Task) {
        match task {
            Task::Request(request) => match state.gate(request.class, request.handle.as_deref()) {
                Gate::Hold => state.held.push_back(request),
                Gate::Pass(verdict) => {
                    state.renew();
                    drop(state);
                    self.execute(request.class, request.handle.as_deref(), verdict, request.act);
                }
                Gate::Delay(_) => {
                    drop(state);
                    self.execute(request.class, request.handle.as_deref(), Verdict::Go, request.act);
                }
            },
            Task::LateWrite { handle, land } => {
                drop(state);
                let _landing = self.landing.read().expect("no operation panics while it lands");
                if !self.state().is_void(&handle) {
                    land();
                    let _ = writeln!(std::io::stderr(), "storage: a late write of {} has landed", self.name);
                }
            }
        }
    }

    fn answer(&self, waiting: Vec<Request>) {
        for request in waiting {
            match request.class {
                Class::Close => (request.act)(Verdict::Go),
                _ => (request.act)(Verdict::Refuse(Errno::EIO)),
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the state panics")
    }
}

impl State {
    fn gate(&self, class: Class, handle: Option<&Handle>) -> Gate {
        if self.fault == Fault::Hang && !self.dead {
            return Gate::Hold;
        }
        if class == Class::Close {
            return Gate::Pass(Verdict::Go);
        }
        if let Some(errno) = self.refusal(class, handle) {
            return Gate::Pass(Verdict::Refuse(errno));
        }
        match self.fault {
            Fault::None | Fault::Hang => Gate::Pass(Verdict::Go),
            Fault::Eio => Gate::Pass(Verdict::Refuse(Errno::EIO)),
            Fault::Estale => Gate::Pass(Verdict::Refuse(Errno::ESTALE)),
            Fault::Enospc if matches!(class, Class::Write | Class::Change) => {
                Gate::Pass(Verdict::Refuse(Errno::ENOSPC))
            }
            Fault::Enospc => Gate::Pass(Verdict::Go),
            Fault::Slow(time) => Gate::Delay(time),
            Fault::Torn => Gate::Pass(Verdict::Torn),
            Fault::Late(time) => Gate::Pass(Verdict::Late(time)),
            Fault::DropSync => Gate::Pass(Verdict::SkipSync),
        }
    }

    /// Why the host may not do this any more, whatever the fault.
    fn refusal(&self, class: Class, handle: Option<&Handle>) -> Option<Errno> {
        let fenced = self.fenced && (class.changes_storage() || class == Class::Lock);
        let void = matches!(class, Class::Write | Class::Lock) && handle.is_some_and(|h| self.is_void(h));
        (self.dead || fenced || void).then_some(Errno::EIO)
    }

    fn is_void(&self, handle: &Handle) -> bool {
        handle.epoch != self.epoch || handle.lost.load(Ordering::Relaxed)
    }

    fn renew(&mut self) {
        if !self.dead && !self.fenced {
            self.last_operation = Instant::now();
        }
    }

    fn enqueue(&mut self, after: Duration, task: Task) {
        self.queued += 1;
        self.queue.insert((Instant::now() + after, self.queued), task);
    }

    fn release_held(&mut self) {
        while let Some(request) = self.held.pop_front() {
            self.enqueue(Duration::ZERO, Task::Request(request));
        }
    }

    /// Requests without an answer, in order. Late writes have theirs and stay.
    fn take_waiting(&mut self) -> Vec<Request> {
        let mut waiting: Vec<Request> = self.held.drain(..).collect();
        for (key, task) in std::mem::take(&mut self.queue) {
            match task {
                Task::Request(request) => waiting.push(request),
                Task::LateWrite { .. } => drop(self.queue.insert(key, task)),
            }
        }
        waiting
    }
}

impl Counts {
    fn to_json(&self) -> Value {
        let count = |(class, name): (Class, &str)| {
            (name.to_string(), Value::from(self.0[class as usize].load(Ordering::Relaxed)))
        };
        Value::Object(CLASSES.into_iter().map(count).collect())
    }
}
