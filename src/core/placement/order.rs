//! Who starts before whom: priorities first, then who waits for whom, then the larger.
//!
//! A ring of VMs that wait for each other would never start: the rule that closes one does not count, and is told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::types::VmId;
use crate::types::rules::Ready;

/// One VM waits for another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dependency {
    /// Who waits.
    pub vm: VmId,
    /// For whom.
    pub after: VmId,
    /// Until when.
    pub ready: Ready,
    /// And so much longer.
    pub delay: Duration,
    /// At most so long, from the moment in which only this keeps it from starting.
    pub within: Duration,
}

/// VMs that wait for each other, the first once more at the end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ring(pub Vec<VmId>);

/// Who waits for whom.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Order {
    after: BTreeMap<VmId, Vec<Dependency>>,
}

impl Order {
    /// One more waits.
    ///
    /// # Errors
    /// It would close a ring: nothing has changed.
    pub fn add(&mut self, dependency: Dependency) -> Result<(), Ring> {
        if let Some(mut ring) = self.path(dependency.after, dependency.vm) {
            ring.push(dependency.after);
            return Err(Ring(ring));
        }
        self.after.entry(dependency.vm).or_default().push(dependency);
        Ok(())
    }

    /// For whom one waits.
    #[must_use]
    pub fn waits_for(&self, vm: VmId) -> &[Dependency] {
        self.after.get(&vm).map_or(&[], Vec::as_slice)
    }

    /// All for whom others wait.
    #[must_use]
    pub fn awaited(&self) -> BTreeSet<VmId> {
        self.after.values().flatten().map(|dependency| dependency.after).collect()
    }

    /// How many have to start one after the other until it is its turn.
    #[must_use]
    pub fn depth(&self, vm: VmId) -> usize {
        let (mut depth, mut level) = (0, BTreeSet::from([vm]));
        loop {
            level = level.iter().flat_map(|vm| self.waits_for(*vm)).map(|dependency| dependency.after).collect();
            if level.is_empty() {
                return depth;
            }
            depth += 1;
        }
    }

    /// One that waits for another that waits for …, from one to another; shortest first.
    fn path(&self, from: VmId, to: VmId) -> Option<Vec<VmId>> {
        let mut before: BTreeMap<VmId, VmId> = BTreeMap::new();
        let mut next = VecDeque::from([from]);
        while let Some(vm) = next.pop_front() {
            if vm == to {
                let mut path: Vec<VmId> = std::iter::successors(Some(to), |vm| before.get(vm).copied()).collect();
                path.reverse();
                return Some(path);
            }
            for dependency in self.waits_for(vm) {
                if dependency.after != from && !before.contains_key(&dependency.after) {
                    before.insert(dependency.after, vm);
                    next.push_back(dependency.after);
                }
            }
        }
        None
    }
}
