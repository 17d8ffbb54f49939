use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::{Child, Command};

use super::*;
use crate::guard::memory::Memory;
use crate::guard::process::started;
use crate::types::DatastoreId;

/// Counts what the present thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: hands everything to the system's allocator; the count is a plain number of this thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Sleeper(Child, Arc<Process>);

impl Sleeper {
    fn new() -> Self {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let key = ProcessKey { pid: child.id(), started: started(child.id()).unwrap() };
        Self(child, Arc::new(Process::open(key).unwrap().unwrap()))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn home(n: u128) -> DatastoreId {
    DatastoreId(uuid::Uuid::from_u128(n))
}

#[test]
fn a_strike_allocates_nothing_and_stops_what_is_due() {
    let (due, other) = (Sleeper::new(), Sleeper::new());
    let lease = Duration::from_secs(5);
    let plan = Plan::of(
        &[(home(1), Time(1000), lease), (home(2), Time(2000), lease), (home(3), Time(1500), lease)],
        vec![(home(1), Arc::clone(&due.1)), (home(2), Arc::clone(&other.1))],
    );
    let board = Memory::new().unwrap().board();
    let mut struck = Vec::with_capacity(STRUCK_MAX);
    let before = ALLOCATIONS.with(Cell::get);
    strike(&plan, &board, Time(999), &mut struck);
    assert!(struck.is_empty());
    let first = board.due();
    strike(&plan, &board, Time(1000), &mut struck);
    let second = board.due();
    let after = ALLOCATIONS.with(Cell::get);
    assert_eq!(after - before, 0, "where memory is short, an allocation waits for a disk");
    assert_eq!(struck.len(), 1);
    let begun = clock::now();
    while !due.1.stands() {
        assert!(clock::now().since(begun) < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!std::fs::read_to_string(format!("/proc/{}/stat", other.0.id())).unwrap().contains(") T"));
    // Half of the reserve later the parent would act; nothing runs on the third lease, so it is no promise.
    let grace = Duration::from_millis(100);
    assert_eq!((first, second), (Time(1000) + grace, Time(2000) + grace));
    strike(&plan, &board, Time(2000), &mut struck);
    assert_eq!(board.due(), Time::NEVER);
}
