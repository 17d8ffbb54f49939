//! The threads of one datastore, and the deadlines of what they do.
//!
//! ```text
//!   ask ─► lane reads   ─ 1 thread ─┐            each lane has a queue of its own, so that a hung claim
//!       ─► lane claims  ─ 3 ────────┤ answer     never holds up the reading of beats
//!       ─► lane records ─ 1 ────────┤
//!       ─► lane probes  ─ 1 ────────┘
//!                 timekeeper: at the deadline answers Timeout and lets the late result drop
//!                 chores: 1 thread, nobody waits
//! ```
//!
//! A call into a hung mount cannot be taken back: it costs its thread until the storage answers. A lane whose threads all
//! sit in calls past their deadline answers [`StoreFailure::Hung`] at once, also what waits in its queue, and works again
//! as soon as one of them returns. At most 8 threads per datastore; a lane starts its threads with its first order.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::orders::{Chore, Orders};
use crate::exec::clock;
use crate::types::Time;
use crate::types::store::{StoreAnswer, StoreFailure, StoreOrder};

/// Orders that may wait in one lane; one more is refused.
const MAX_WAITING: usize = 4096;
/// Chores that may wait; one more is forgotten, and comes again with the next order of its kind.
const MAX_CHORES: usize = 4096;
/// Stack of each thread, in bytes.
const STACK: usize = 256 * 1024;

/// Takes the answer; called exactly once, on some thread, with no lock held.
pub type Answer = Box<dyn FnOnce(StoreAnswer) + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    Reads,
    Claims,
    Records,
    Probes,
}

const LANES: usize = 4;

impl Lane {
    fn of(order: &StoreOrder) -> Self {
        match order {
            StoreOrder::ReadAll => Self::Reads,
            StoreOrder::ReadClaims(_) | StoreOrder::CreateClaim { .. } => Self::Claims,
            StoreOrder::WriteRecord(_)
            | StoreOrder::ReadRecord { .. }
            | StoreOrder::WriteRoster(_)
            | StoreOrder::Prepare(_) => Self::Records,
            StoreOrder::Probe { .. } => Self::Probes,
        }
    }

    fn threads(self) -> usize {
        match self {
            Self::Claims => 3,
            Self::Reads | Self::Records | Self::Probes => 1,
        }
    }
}

/// An order that nobody was told the outcome of yet.
struct Asked {
    deadline: Time,
    within: Duration,
    answer: Answer,
}

#[derive(Default)]
struct State {
    last: u64,
    asked: BTreeMap<u64, Asked>,
    waiting: [VecDeque<(u64, StoreOrder)>; LANES],
    /// What each lane's threads are in.
    running: [Vec<u64>; LANES],
    started: [bool; LANES],
    serving: bool,
    chores: VecDeque<Chore>,
    closed: bool,
}

impl State {
    /// Every thread of the lane sits in a call whose deadline has passed.
    fn hangs(&self, lane: Lane) -> bool {
        let running = &self.running[lane as usize];
        lane.threads() <= running.len() && running.iter().all(|id| !self.asked.contains_key(id))
    }

    /// Takes out everything that is due; then everything that waits behind hung threads.
    fn expire(&mut self, now: Time) -> Vec<(Answer, StoreFailure)> {
        let due = self.asked.extract_if(.., |_, asked| asked.deadline <= now);
        let mut over: Vec<_> = due.map(|(_, asked)| (asked.answer, StoreFailure::Timeout(asked.within))).collect();
        for lane in [Lane::Reads, Lane::Claims, Lane::Records, Lane::Probes] {
            self.waiting[lane as usize].retain(|(id, _)| self.asked.contains_key(id));
            if self.hangs(lane) {
                let stuck = self.waiting[lane as usize].drain(..).filter_map(|(id, _)| self.asked.remove(&id));
                over.extend(stuck.map(|asked| (asked.answer, StoreFailure::Hung)));
            }
        }
        over
    }
}

struct Shared {
    orders: Orders,
    state: Mutex<State>,
    /// Of each lane.
    work: [Condvar; LANES],
    chores: Condvar,
    /// An earlier deadline, or the end.
    due: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic happens under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes orders for one datastore. When it is dropped, what was asked is still answered.
pub struct Lanes {
    shared: Arc<Shared>,
}

impl Lanes {
    /// No thread runs yet.
    pub fn new(orders: Orders) -> Self {
        let shared = Shared {
            orders,
            state: Mutex::default(),
            work: Default::default(),
            chores: Condvar::new(),
            due: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Answers within `within`, once.
    pub fn ask(&self, order: StoreOrder, within: Duration, answer: Answer) {
        let lane = Lane::of(&order);
        let mut state = self.shared.state();
        let refused = if state.hangs(lane) {
            Some(StoreFailure::Hung)
        } else if MAX_WAITING <= state.waiting[lane as usize].len() {
            Some(not_taken(format!("{MAX_WAITING} orders wait already; try later")))
        } else {
            self.start(&mut state, lane).err().map(|error| not_taken(format!("no thread can be started: {error}")))
        };
        if let Some(refused) = refused {
            drop(state);
            return answer(StoreAnswer::Failed(refused));
        }
        state.last += 1;
        let id = state.last;
        state.asked.insert(id, Asked { deadline: clock::now() + within, within, answer });
        state.waiting[lane as usize].push_back((id, order));
        self.shared.work[lane as usize].notify_one();
        self.shared.due.notify_one();
    }

    /// Starts the threads that this lane needs and that do not run yet.
    fn start(&self, state: &mut State, lane: Lane) -> std::io::Result<()> {
        if !state.serving {
            self.spawn("store-due", timekeeper)?;
            self.spawn("store-chores", chores)?;
            state.serving = true;
        }
        if !state.started[lane as usize] {
            // Whatever number of them can be started is enough to work, but only all of them can tell that it hangs.
            for _ in 0..lane.threads() {
                self.spawn("store", move |shared| work(shared, lane))?;
            }
            state.started[lane as usize] = true;
        }
        Ok(())
    }

    fn spawn(&self, name: &str, body: impl FnOnce(&Shared) + Send + 'static) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let run = move || {
            // Impossible state of ours: a restart is cheaper than a datastore that nobody serves.
            if catch_unwind(AssertUnwindSafe(|| body(&shared))).is_err() {
                std::process::abort();
            }
        };
        thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(run).map(|_| ())
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.work.iter().for_each(Condvar::notify_all);
        self.shared.chores.notify_all();
        self.shared.due.notify_all();
    }
}

fn not_taken(why: String) -> StoreFailure {
    StoreFailure::Io { path: "order not taken".to_owned(), why }
}

/// Body of a lane's thread.
fn work(shared: &Shared, lane: Lane) {
    let mut state = shared.state();
    loop {
        let Some((id, order)) = state.waiting[lane as usize].pop_front() else {
            if state.closed {
                return;
            }
            state = shared.work[lane as usize].wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let Some((deadline, within)) = state.asked.get(&id).map(|asked| (asked.deadline, asked.within)) else {
            continue;
        };
        state.running[lane as usize].push(id);
        drop(state);
        let mut made = Vec::new();
        let answer = shared.orders.run(&order, deadline, within, &mut made);
        state = shared.state();
        state.running[lane as usize].retain(|running| *running != id);
        let room = MAX_CHORES.saturating_sub(state.chores.len());
        state.chores.extend(made.into_iter().take(room));
        let asked = state.asked.remove(&id);
        if state.closed {
            shared.due.notify_one();
        }
        drop(state);
        shared.chores.notify_one();
        if let Some(asked) = asked {
            (asked.answer)(answer);
        }
        state = shared.state();
    }
}

/// Body of the thread that does what nobody waits for.
fn chores(shared: &Shared) {
    let mut state = shared.state();
    loop {
        if let Some(chore) = state.chores.pop_front() {
            drop(state);
            if let Err(failure) = shared.orders.chore(&chore) {
                tracing::debug!(%failure, ?chore, "left for later");
            }
            state = shared.state();
        } else if state.closed {
            return;
        } else {
            state = shared.chores.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Body of the thread that keeps deadlines.
fn timekeeper(shared: &Shared) {
    let mut state = shared.state();
    loop {
        let now = clock::now();
        let over = state.expire(now);
        if !over.is_empty() {
            drop(state);
            over.into_iter().for_each(|(answer, failure)| answer(StoreAnswer::Failed(failure)));
            state = shared.state();
            continue;
        }
        let next = state.asked.values().map(|asked| asked.deadline).min();
        state = match next {
            Some(next) => {
                let wait = next.since(now);
                shared.due.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
            }
            None if state.closed => return,
            None => shared.due.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
    }
}
