//! A lane: a few worker threads behind one queue, where every order is answered exactly once, in time.
//!
//! ```text
//!   ask ──► waiting (≤ WAITING_MAX) ──► worker 1..n ──► answer
//!               │                          │ the call hangs
//!               └───────── clock ──────────┴──► Timeout; the worker is given up, a spare takes its place
//! ```
//!
//! A blocking call cannot be cancelled. At its deadline the asker is told `Timeout`; the thread stays with the call,
//! and what the call brings later is dropped. Up to `spare` further workers replace hung ones; beyond that orders wait,
//! and time out while waiting. An order that timed out before it was begun is never begun. Workers come when needed
//! and go when idle, and their connections with them.
//!
//! Not here: what an order is (of libvirt `DomainOrder`, or a look at a domain). The lane is given a function that makes a worker (tests give it others).

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::exec::clock;
use crate::types::Time;
use crate::types::vm::{DomainAnswer, DomainFailure, DomainOrder};

/// Orders of one lane that can wait. One more is refused at once: 1,000 VMs fit.
const WAITING_MAX: usize = 1024;
/// A worker without work goes after this time.
const IDLE: Duration = Duration::from_secs(30);

/// How many threads a lane may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Name of the lane and its threads, at most 7 letters.
    pub name: &'static str,
    /// Working at the same time.
    pub workers: usize,
    /// More of them, in place of hung ones.
    pub spare: usize,
    /// An order that was begun is answered when it ends, however late: its deadline is only for its begin.
    pub patient: bool,
}

/// How an answer goes back.
pub(super) type Answer = Box<dyn FnOnce(DomainAnswer) + Send>;
/// What a worker does with an order and the time it has.
pub(super) type Work<Order = DomainOrder> = Box<dyn FnMut(&Order, Duration) -> DomainAnswer>;

struct Job<Order> {
    order: Order,
    deadline: Time,
    answer: Answer,
}

/// An order in the hands of a worker. Without an answer it is late: its worker is given up.
struct Running {
    deadline: Time,
    answer: Option<Answer>,
}

struct State<Order> {
    waiting: VecDeque<Job<Order>>,
    running: BTreeMap<u64, Running>,
    next: u64,
    /// Threads alive, hung ones included.
    alive: usize,
    /// Threads that wait for work.
    idle: usize,
    closing: bool,
}

impl<Order> State<Order> {
    fn new() -> Self {
        Self { waiting: VecDeque::new(), running: BTreeMap::new(), next: 0, alive: 0, idle: 0, closing: false }
    }
    fn hung(&self) -> usize {
        self.running.values().filter(|running| running.answer.is_none()).count()
    }
    fn next_deadline(&self, patient: bool) -> Option<Time> {
        let running = self.running.values().filter(|running| !patient && running.answer.is_some());
        let running = running.map(|running| running.deadline);
        self.waiting.iter().map(|job| job.deadline).chain(running).min()
    }
    /// Answers that are due, hung ones marked.
    fn expire(&mut self, now: Time, patient: bool) -> Vec<Answer> {
        let mut due = Vec::new();
        for job in std::mem::take(&mut self.waiting) {
            if job.deadline <= now {
                due.push(job.answer);
            } else {
                self.waiting.push_back(job);
            }
        }
        if patient {
            return due;
        }
        due.extend(self.running.values_mut().filter(|r| r.deadline <= now).filter_map(|r| r.answer.take()));
        due
    }
}

struct Shared<Order> {
    shape: Shape,
    state: Mutex<State<Order>>,
    work: Condvar,
    time: Condvar,
    make: Box<dyn Fn() -> Work<Order> + Send + Sync>,
}

/// Handle of a lane. When it is dropped, waiting orders are answered, idle workers end, and hung ones when they can.
pub(super) struct Lane<Order = DomainOrder> {
    shared: Arc<Shared<Order>>,
}

impl<Order: Send + 'static> Lane<Order> {
    /// Starts the lane's clock; workers come with the first orders.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub(super) fn new(shape: Shape, make: impl Fn() -> Work<Order> + Send + Sync + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            shape,
            state: Mutex::new(State::new()),
            work: Condvar::new(),
            time: Condvar::new(),
            make: Box::new(make),
        });
        let clock = Arc::clone(&shared);
        std::thread::Builder::new().name(format!("virt-{}-clk", shape.name)).spawn(move || clock.keep_time())?;
        Ok(Self { shared })
    }

    /// Queues an order. `answer` is called once: by a worker, by the lane's clock, or at once when the queue is full.
    pub(super) fn ask(&self, order: Order, within: Duration, answer: Answer) {
        let deadline = clock::now() + within;
        let mut state = self.shared.lock();
        if WAITING_MAX <= state.waiting.len() {
            drop(state);
            let text = format!("{WAITING_MAX} orders wait for libvirt already");
            return answer(DomainAnswer::Failed(DomainFailure::NoDaemon(text)));
        }
        state.waiting.push_back(Job { order, deadline, answer });
        self.shared.staff(&mut state);
        self.shared.work.notify_one();
        self.shared.time.notify_one();
    }
}

impl<Order> Drop for Lane<Order> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        let left: Vec<Job<Order>> = state.waiting.drain(..).collect();
        self.shared.work.notify_all();
        self.shared.time.notify_all();
        drop(state);
        for job in left {
            call(job.answer, DomainAnswer::Failed(DomainFailure::NoDaemon("the agent is going down".into())));
        }
    }
}

impl<Order> Shared<Order> {
    /// A panic while the lock is held would be a bug of ours, but the state is whole after every statement.
    fn lock(&self) -> MutexGuard<'_, State<Order>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Order: Send + 'static> Shared<Order> {
    /// Adds workers while there is more work than idle ones and the shape allows it.
    fn staff(self: &Arc<Self>, state: &mut State<Order>) {
        let mut wanted = state.waiting.len().saturating_sub(state.idle);
        while 0 < wanted
            && state.alive < self.shape.workers + self.shape.spare
            && state.alive - state.hung() < self.shape.workers
        {
            let shared = Arc::clone(self);
            let spawned =
                std::thread::Builder::new().name(format!("virt-{}", self.shape.name)).spawn(move || shared.labour());
            if spawned.is_err() {
                return; // No thread now: the order waits for a worker that becomes free, or times out.
            }
            state.alive += 1;
            wanted -= 1;
        }
    }

    /// A worker's life.
    fn labour(self: Arc<Self>) {
        let mut work = (self.make)();
        while let Some((number, order, within)) = self.take() {
            let answer = catch_unwind(AssertUnwindSafe(|| work(&order, within))).unwrap_or_else(|_| {
                // The virt crate panics when libvirt cannot free a handle. The worker's connection is not used again.
                work = (self.make)();
                DomainAnswer::Failed(DomainFailure::Host("a call to libvirt panicked".into()))
            });
            let mut state = self.lock();
            let running = state.running.remove(&number).expect("only its own worker removes a running order");
            let too_many = self.shape.workers < state.alive - state.hung();
            if too_many {
                state.alive -= 1; // It was given up and replaced; the others suffice.
            }
            drop(state);
            if let Some(told) = running.answer {
                call(told, answer);
            }
            if too_many {
                return;
            }
        }
    }

    /// The next order with the time left; none when the worker should end (it is then no longer counted).
    fn take(&self) -> Option<(u64, Order, Duration)> {
        let mut state = self.lock();
        loop {
            let now = clock::now();
            if state.closing {
                state.alive -= 1;
                return None;
            }
            // One whose deadline passed is left for the lane's clock, which answers it.
            if let Some(at) = state.waiting.iter().position(|job| now < job.deadline) {
                let job = state.waiting.remove(at).expect("the position was just found");
                let number = state.next;
                state.next += 1;
                state.running.insert(number, Running { deadline: job.deadline, answer: Some(job.answer) });
                return Some((number, job.order, job.deadline.since(now)));
            }
            state.idle += 1;
            let (back, waited) = self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = back;
            state.idle -= 1;
            if waited.timed_out() && state.waiting.is_empty() {
                state.alive -= 1;
                return None;
            }
        }
    }

    /// The lane's clock: answers what is due, and replaces hung workers.
    fn keep_time(self: Arc<Self>) {
        let mut state = self.lock();
        loop {
            let due = state.expire(clock::now(), self.shape.patient);
            if !due.is_empty() {
                self.staff(&mut state);
                drop(state);
                due.into_iter().for_each(|answer| call(answer, DomainAnswer::Failed(DomainFailure::Timeout)));
                state = self.lock();
                continue;
            }
            let next = state.next_deadline(self.shape.patient);
            if state.closing && next.is_none() {
                return; // Running orders were still answered in time.
            }
            state = match next {
                Some(deadline) => {
                    let left = deadline.since(clock::now()) + Duration::from_millis(1);
                    self.time.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.time.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Calls an answer; a panic in it is the asker's, and must not end a worker or the clock.
fn call(answer: Answer, with: DomainAnswer) {
    let _ = catch_unwind(AssertUnwindSafe(|| answer(with)));
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const SHAPE: Shape = Shape { name: "test", workers: 2, spare: 1, patient: false };

    /// A lane whose `Define` orders hang until the sender is used or dropped; all others are done at once.
    fn lane(shape: Shape) -> (Lane, Sender<()>, Receiver<DomainOrder>) {
        let (release, hang) = channel::<()>();
        let (begun, seen) = channel();
        let hang = Arc::new(Mutex::new(hang));
        let lane = Lane::new(shape, move || {
            let (hang, begun) = (Arc::clone(&hang), begun.clone());
            Box::new(move |order: &DomainOrder, _| {
                let _ = begun.send(order.clone());
                if matches!(order, DomainOrder::Define { .. }) {
                    // Each waits for its own word; the lock is only held by one at a time.
                    let _ = hang.lock().unwrap().recv();
                }
                DomainAnswer::Done
            })
        })
        .unwrap();
        (lane, release, seen)
    }

    fn ask(lane: &Lane, order: DomainOrder, within: Duration) -> Receiver<DomainAnswer> {
        let (tell, told) = channel();
        lane.ask(order, within, Box::new(move |answer| tell.send(answer).unwrap()));
        told
    }

    fn hanging() -> DomainOrder {
        DomainOrder::Define { xml: String::new() }
    }

    #[test]
    fn answers_what_is_done() {
        let (lane, _release, _seen) = lane(SHAPE);
        let answers: Vec<_> = (0..50).map(|_| ask(&lane, DomainOrder::List, LONG)).collect();
        for answer in answers {
            assert_eq!(answer.recv_timeout(LONG), Ok(DomainAnswer::Done));
            assert!(answer.recv().is_err(), "an order is answered once");
        }
    }

    #[test]
    fn a_hung_call_times_out_and_a_spare_takes_over() {
        let (lane, release, seen) = lane(SHAPE);
        let short = Duration::from_millis(20);
        let timeout = Ok(DomainAnswer::Failed(DomainFailure::Timeout));
        // One that nobody began within that time hangs nowhere: the next is asked.
        let hang = || loop {
            let answer = ask(&lane, hanging(), short);
            assert_eq!(answer.recv_timeout(LONG), timeout);
            if seen.recv_timeout(Duration::from_secs(1)) == Ok(hanging()) {
                return answer;
            }
        };
        // Two workers hang, then the spare; a fourth finds nobody and times out without having been begun.
        let hung = [hang(), hang()];
        assert_eq!(ask(&lane, DomainOrder::List, LONG).recv_timeout(LONG), Ok(DomainAnswer::Done));
        assert_eq!(seen.recv_timeout(LONG), Ok(DomainOrder::List));
        hang();
        assert_eq!(ask(&lane, DomainOrder::List, short).recv_timeout(LONG), timeout);
        // When the calls come back the lane works as before.
        drop(release);
        assert_eq!(ask(&lane, DomainOrder::List, LONG).recv_timeout(LONG), Ok(DomainAnswer::Done));
        hung.iter().for_each(|answer| assert!(answer.recv().is_err(), "a late result is dropped"));
    }

    #[test]
    fn an_order_that_timed_out_while_waiting_is_never_begun() {
        let (lane, release, seen) = lane(Shape { workers: 1, spare: 0, ..SHAPE });
        let first = ask(&lane, hanging(), LONG);
        assert_eq!(seen.recv_timeout(LONG), Ok(hanging()));
        let late = ask(&lane, DomainOrder::List, Duration::from_millis(20));
        assert_eq!(late.recv_timeout(LONG), Ok(DomainAnswer::Failed(DomainFailure::Timeout)));
        release.send(()).unwrap();
        assert_eq!(first.recv_timeout(LONG), Ok(DomainAnswer::Done));
        let last = DomainOrder::Undefine { vm: crate::types::VmId::default() };
        assert_eq!(ask(&lane, last.clone(), LONG).recv_timeout(LONG), Ok(DomainAnswer::Done));
        assert_eq!(seen.recv_timeout(LONG), Ok(last), "the late order was skipped");
    }

    #[test]
    fn a_patient_lane_answers_what_was_begun_when_it_ends() {
        let (lane, release, seen) = lane(Shape { workers: 1, spare: 0, patient: true, ..SHAPE });
        let short = Duration::from_millis(20);
        let begun = ask(&lane, hanging(), short);
        assert_eq!(seen.recv_timeout(LONG), Ok(hanging()));
        let late = ask(&lane, DomainOrder::List, short);
        assert_eq!(late.recv_timeout(LONG), Ok(DomainAnswer::Failed(DomainFailure::Timeout)), "it was never begun");
        assert!(begun.try_recv().is_err(), "it may still take effect");
        release.send(()).unwrap();
        assert_eq!(begun.recv_timeout(LONG), Ok(DomainAnswer::Done));
    }

    #[test]
    fn a_full_queue_and_a_closed_lane_still_answer() {
        let (lane, release, seen) = lane(Shape { workers: 1, spare: 0, ..SHAPE });
        let _busy = ask(&lane, hanging(), LONG);
        assert_eq!(seen.recv_timeout(LONG), Ok(hanging()));
        let waiting: Vec<_> = (0..WAITING_MAX).map(|_| ask(&lane, DomainOrder::List, LONG)).collect();
        let refused = ask(&lane, DomainOrder::List, LONG).recv_timeout(LONG).unwrap();
        assert!(matches!(refused, DomainAnswer::Failed(DomainFailure::NoDaemon(_))), "{refused:?}");
        drop(lane);
        for answer in waiting {
            assert!(matches!(answer.recv_timeout(LONG), Ok(DomainAnswer::Failed(DomainFailure::NoDaemon(_)))));
        }
        drop(release);
    }

    #[test]
    fn panics_cost_one_answer_only() {
        let lane = Lane::new(SHAPE, || {
            Box::new(|order: &DomainOrder, _| {
                assert!(matches!(order, DomainOrder::List), "a bad call");
                DomainAnswer::Done
            })
        })
        .unwrap();
        let failed = ask(&lane, hanging(), LONG).recv_timeout(LONG).unwrap();
        assert!(matches!(failed, DomainAnswer::Failed(DomainFailure::Host(_))), "{failed:?}");
        lane.ask(DomainOrder::List, LONG, Box::new(|_| panic!("a bad asker")));
        for _ in 0..4 {
            assert_eq!(ask(&lane, DomainOrder::List, LONG).recv_timeout(LONG), Ok(DomainAnswer::Done));
        }
    }
}
