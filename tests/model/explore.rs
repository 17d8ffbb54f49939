//! A breadth-first explorer: every state that a small model can reach, the shortest way to a wrong one, and whether the
//! VM can run again from each.
//!
//! ```text
//!  start ─► steps ─► new? ── wrong? ──► shortest trace
//!             ▲       │ no
//!             └───────┴─ none left ──► backwards from the well states: is any state left out?
//! ```
//!
//! A state is known by a 64-bit fingerprint, so with n states the chance that one was taken for another is about
//! n² / 2⁶⁵ (one in 370,000 for ten million). Own code because the one well-kept checker for Rust (stateright 0.31)
//! brings a web server and a dozen crates that no feature turns off, and the models need 200 lines of it.
//!
//! Deliberately not here: reduction by symmetry, threads (the test harness runs several models at once), liveness beyond
//! "can still become well".

use std::collections::HashMap;
use std::fmt::Write as _;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// Who does what.
pub type Step = (&'static str, &'static str);

/// A step that lets time pass; traces count it.
pub const TICK: Step = ("", "a tick passes");

/// Something that happens in some state.
pub type Happens<S> = (&'static str, fn(&S) -> bool);

/// A finite machine.
pub trait Model {
    /// One state; equal states must hash equally.
    type State: Clone + Hash;
    /// Where it begins.
    fn start(&self) -> Self::State;
    /// Every state that can follow.
    fn steps(&self, from: &Self::State, to: &mut Vec<(Step, Self::State)>);
    /// What must never be.
    fn wrong(&self, state: &Self::State) -> Option<&'static str>;
    /// The VM runs, or the model's bound is reached: from every state one of these must be reachable.
    fn well(&self, state: &Self::State) -> bool;
    /// What must happen somewhere, or the model shows nothing.
    fn happens(&self) -> Vec<Happens<Self::State>>;
    /// What a reader of a trace wants to see.
    fn show(&self, state: &Self::State) -> String;
}

/// What was found.
pub struct Report {
    pub states: usize,
    pub transitions: usize,
    /// Steps of the longest shortest way.
    pub depth: usize,
    /// What never happened, of what must.
    pub missing: Vec<&'static str>,
    pub end: End,
}

pub enum End {
    /// Every state was seen and none is wrong.
    Holds,
    /// Why, and the shortest way there.
    Wrong { what: &'static str, steps: usize, trace: String },
}

/// More states than a model may have: its bounds are too wide, or a counter in it has none.
const MOST: usize = 60_000_000;

/// Explores all of it, or up to the first wrong state.
pub fn explore<M: Model>(model: &M) -> Report {
    let mut graph = Graph::default();
    let mut missing = model.happens();
    let (mut next, mut depth) = (Vec::new(), 0);
    let mut layer = vec![model.start()];
    graph.add(fingerprint(&layer[0]), 0, model.well(&layer[0]));
    let mut at = 0;
    while !layer.is_empty() {
        let mut coming = Vec::new();
        for state in &layer {
            model.steps(state, &mut next);
            for (_, state) in next.drain(..) {
                let print = fingerprint(&state);
                if graph.met(print) {
                    continue;
                }
                graph.add(print, at, model.well(&state));
                missing.retain(|(_, happens)| !happens(&state));
                if let Some(what) = model.wrong(&state) {
                    let (steps, trace) = trace(model, &graph.way_to(print));
                    return graph.report(depth + 1, &missing, End::Wrong { what, steps, trace });
                }
                coming.push(state);
            }
            graph.done();
            at += 1;
        }
        depth += usize::from(!coming.is_empty());
        layer = coming;
    }
    let end = match graph.stuck() {
        None => End::Holds,
        Some(print) => {
            let (steps, trace) = trace(model, &graph.way_to(print));
            End::Wrong { what: "the VM can never run again", steps, trace }
        }
    };
    graph.report(depth, &missing, end)
}

/// States by the order in which they were found, with their edges.
#[derive(Default)]
struct Graph {
    known: HashMap<u64, u32, BuildHasherDefault<AsItIs>>,
    prints: Vec<u64>,
    parents: Vec<u32>,
    well: Vec<bool>,
    /// Targets of all edges, and where those of each state end.
    edges: Vec<u32>,
    ends: Vec<usize>,
}

impl Graph {
    fn add(&mut self, print: u64, parent: u32, well: bool) {
        let index = u32::try_from(self.prints.len()).expect("the limit is lower");
        assert!(self.prints.len() < MOST, "more than {MOST} states: the bounds are too wide");
        if index != 0 {
            self.edges.push(index);
        }
        self.known.insert(print, index);
        self.prints.push(print);
        self.parents.push(parent);
        self.well.push(well);
    }

    /// Whether it is known; then only its edge is new.
    fn met(&mut self, print: u64) -> bool {
        let index = self.known.get(&print).copied();
        self.edges.extend(index);
        index.is_some()
    }

    fn done(&mut self) {
        self.ends.push(self.edges.len());
    }

    fn report<S>(&self, depth: usize, missing: &[Happens<S>], end: End) -> Report {
        let missing = missing.iter().map(|(what, _)| *what).collect();
        Report { states: self.prints.len(), transitions: self.edges.len(), depth, missing, end }
    }

    fn way_to(&self, print: u64) -> Vec<u64> {
        let mut at = self.known[&print];
        let mut way = vec![print];
        while at != 0 {
            at = self.parents[at as usize];
            way.push(self.prints[at as usize]);
        }
        way.reverse();
        way
    }

    /// The first state from which no well one can be reached.
    fn stuck(&self) -> Option<u64> {
        let count = self.prints.len();
        let mut starts = vec![0_usize; count + 1];
        self.edges.iter().for_each(|to| starts[*to as usize + 1] += 1);
        (0..count).for_each(|n| starts[n + 1] += starts[n]);
        let (mut fill, mut from) = (starts.clone(), vec![0_u32; self.edges.len()]);
        let mut begin = 0;
        for (state, end) in self.ends.iter().enumerate() {
            for to in &self.edges[begin..*end] {
                from[fill[*to as usize]] = u32::try_from(state).expect("the limit is lower");
                fill[*to as usize] += 1;
            }
            begin = *end;
        }
        let mut good = self.well.clone();
        let mut left: Vec<usize> = (0..count).filter(|state| good[*state]).collect();
        while let Some(state) = left.pop() {
            for before in &from[starts[state]..starts[state + 1]] {
                if !std::mem::replace(&mut good[*before as usize], true) {
                    left.push(*before as usize);
                }
            }
        }
        good.iter().position(|good| !good).map(|at| self.prints[at])
    }
}

/// Goes the way once more and writes it down.
fn trace<M: Model>(model: &M, way: &[u64]) -> (usize, String) {
    let mut state = model.start();
    let (mut next, mut ticks) = (Vec::new(), 0);
    let mut text = format!("  {:>4}  {:<2} {:<52} {}\n", "tick", "", "(start)", model.show(&state));
    for print in &way[1..] {
        model.steps(&state, &mut next);
        let found = next.drain(..).find(|(_, state)| fingerprint(state) == *print);
        let (step, after) = found.expect("the way was gone before");
        ticks += usize::from(step.1.starts_with(TICK.1));
        state = after;
        let _ = writeln!(text, "  {ticks:>4}  {:<2} {:<52} {}", step.0, step.1, model.show(&state));
    }
    (way.len() - 1, text)
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut print = Fingerprint(0x9e37_79b9_7f4a_7c15);
    state.hash(&mut print);
    print.finish()
}

/// Folded multiplication: every bit of the input reaches every bit of the print.
struct Fingerprint(u64);

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * u128::from(0xd6e8_feb8_6659_fd93_u64);
        self.0 = (product as u64) ^ (product >> 64) as u64 ^ 0x2545_f491_4f6c_dd1d;
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(number as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A fingerprint is a hash already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only fingerprints are keys");
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
