//! The guard's table: every (v, g) it can say something about, and every QEMU it may have to stop. Pure: it is told what
//! happened and the time, and says what to do (`flow`) and what to tell (`show`).
//!
//! ```text
//!  Expect                        Claimed, QEMU seen
//! ────────► Expected ───────────────────────────────► Running ──┐ exit seen, lapse, kill
//!              │ deadline, Abandon, lapse, exit                 ▼
//!              └────────────────────────────────────────────► Over   (for ever; only Forget removes it)
//!  Incoming                      lapse, deadline, exit          ▲
//! ────────► Incoming ───────────────────────────────────────────┘
//!              └── Expect(Adopt, g+1) + Claimed: the row of g goes, g+1 is Running
//!  Receive: as Incoming, under a handover claim; its source's row is Running with a part in it (`handover`)
//! ```
//!
//! Rule: a QEMU may run only while some row of its VM is Running, Incoming, or Expected for adoption. Whatever ends one
//! right to run of a VM (lapse, missed deadline) ends all of them: two rows never vouch for each other.
//!
//! Deliberately not here: leases (`state`), processes and their signals (`process`, `enforce`), files.

mod drain;
mod flow;
mod handover;
mod show;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::types::guard::{Purpose, Refusal};
use crate::types::{DatastoreId, Epoch, Generation, HostId, MAX_VMS_PER_HOST, Over, Tenure, Time, VmId, VmState};

pub use flow::Act;
pub use handover::Part;
pub use show::KeptRow;

/// How many rows fit. When full, the oldest row that is over and has no QEMU makes room; else the order is refused.
pub const MAX_ROWS: usize = 2 * MAX_VMS_PER_HOST;

/// One process, for certain: pids are reused, a pid with its start time is not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ProcessKey {
    /// Its pid.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
    pub started: u64,
}

/// A row that shall be expected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expected {
    /// (v, g+1).
    pub tenure: Tenure,
    /// v's name: the name of its pid file.
    pub name: String,
    /// Where its claims live.
    pub home: DatastoreId,
    /// Present epoch of that home's lease.
    pub epoch: Epoch,
    /// Until then the claim must be confirmed.
    pub deadline: Time,
    /// What it is for.
    pub purpose: Purpose,
    /// Where else it writes.
    pub writes: Vec<DatastoreId>,
}

/// What a row is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Phase {
    Expected {
        purpose: Purpose,
        deadline: Time,
        confirmed: bool,
    },
    Incoming {
        deadline: Time,
    },
    Running {
        to: Option<HostId>,
    },
    /// `unsaid`: what is shown until its QEMU stands.
    Over {
        why: Over,
        unsaid: Option<VmState>,
        order: u64,
    },
}

/// One (v, g).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Row {
    name: String,
    home: DatastoreId,
    epoch: Epoch,
    /// Where its QEMU writes, besides its home.
    writes: BTreeSet<DatastoreId>,
    phase: Phase,
    /// A QEMU was seen under this row.
    seen: bool,
    /// It was Running once: its claim was confirmed.
    ran: bool,
    /// It came by `Incoming`: the tenure is another host's.
    foreign: bool,
    /// Its QEMU did not exist before the row: one that comes up after the row is over never ran and may die.
    starts: bool,
    /// In a handover claim.
    part: Part,
    watch: handover::Watch,
}

impl Row {
    fn new(name: String, home: DatastoreId, epoch: Epoch, phase: Phase) -> Self {
        let (seen, ran, foreign, starts) = (false, false, false, false);
        let (part, watch) = (Part::None, handover::Watch::default());
        let writes = BTreeSet::new();
        Self { name, home, epoch, writes, phase, seen, ran, foreign, starts, part, watch }
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over { .. })
    }

    fn state(&self) -> VmState {
        match self.phase {
            Phase::Expected { .. } => VmState::Expected,
            Phase::Incoming { .. } => VmState::Incoming,
            Phase::Running { .. } => VmState::Running,
            Phase::Over { why, .. } => VmState::Over(why),
        }
    }
}

/// How a QEMU is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Hold {
    Free,
    /// The stop is under way.
    Stopping,
    /// Every thread was seen standing.
    Stopped,
}

/// One QEMU of one VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Qemu {
    key: ProcessKey,
    hold: Hold,
    /// It must die; why.
    doomed: Option<String>,
    /// SIGKILL was sent.
    killed: bool,
}

/// The table.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Table {
    rows: BTreeMap<Tenure, Row>,
    qemus: BTreeMap<VmId, Qemu>,
    drains: BTreeMap<Tenure, drain::Drain>,
    /// What the agent was not told yet; after a connection it is told everything.
    #[serde(skip)]
    changed: BTreeSet<Tenure>,
    #[serde(skip)]
    forgotten: Vec<Tenure>,
    #[serde(skip)]
    alarms: Vec<String>,
    version: u64,
    ended: u64,
    /// An earlier guard began it: a QEMU that appears may have been stopped by `--stop-all`.
    #[serde(skip)]
    carried_on: bool,
}

fn wrong(why: &str) -> Refusal {
    Refusal::WrongState(why.to_owned())
}

impl Table {
    /// A row (v, g+1), before its claim is created. The caller has checked that `epoch` is valid now.
    ///
    /// # Errors
    /// When the VM's other rows or its QEMU do not fit the purpose, or the table is full. Nothing changed then.
    pub fn expect(&mut self, new: Expected) -> Result<(), Refusal> {
        let vm = new.tenure.vm;
        if let Some(row) = self.rows.get_mut(&new.tenure) {
            return repeat_expect(row, &new);
        }
        if self.newest(vm).is_some_and(|newest| new.tenure.generation < newest.generation) {
            return Err(wrong("a later generation of this VM stands here"));
        }
        let qemu = self.qemus.get(&vm);
        let living: Vec<&Row> = self.rows_of(vm).map(|(_, row)| row).filter(|row| !row.is_over()).collect();
        let vouched = living.iter().all(|row| matches!(row.phase, Phase::Running { .. } | Phase::Incoming { .. }));
        match new.purpose {
            Purpose::Start if !living.is_empty() => return Err(wrong("this VM has a row that is not over")),
            Purpose::Start if qemu.is_some() => return Err(wrong("a QEMU of this VM is alive")),
            Purpose::Adopt | Purpose::HandOver if !vouched => {
                return Err(wrong("another claim of this VM is being made"));
            }
            Purpose::HandOver if qemu.is_none_or(|qemu| qemu.hold != Hold::Free || living.is_empty()) => {
                return Err(wrong("it does not run here"));
            }
            Purpose::Adopt if qemu.is_some_and(|qemu| qemu.hold != Hold::Free || living.is_empty()) => {
                return Err(wrong("its QEMU is stopped; only a reclaim may lift that"));
            }
            Purpose::Reclaim if !living.is_empty() => return Err(wrong("this VM has a row that is not over")),
            Purpose::Reclaim if qemu.is_none() => return Err(wrong("no QEMU of this VM is alive")),
            Purpose::Reclaim if qemu.is_some_and(|qemu| qemu.doomed.is_some()) => {
                return Err(wrong("its QEMU is being killed"));
            }
            Purpose::Start | Purpose::Adopt | Purpose::Reclaim | Purpose::HandOver => {}
        }
        self.make_room()?;
        let seen = self.qemus.contains_key(&vm);
        let phase = Phase::Expected { purpose: new.purpose, deadline: new.deadline, confirmed: false };
        let Expected { tenure, name, home, epoch, purpose, writes, .. } = new;
        let mut writes: BTreeSet<DatastoreId> = writes.into_iter().collect();
        if seen {
            // The same process as before: it still has open what it had.
            writes.extend(self.rows_of(vm).flat_map(|(_, row)| row.writes.iter().copied().chain([row.home])));
        }
        let starts = purpose == Purpose::Start;
        let part = if purpose == Purpose::HandOver { Part::Source { switched: false } } else { Part::None };
        self.insert(tenure, Row { seen, starts, part, writes, ..Row::new(name, home, epoch, phase) });
        Ok(())
    }

    /// The target of a migration, under the source's generation. Repeated = a later deadline.
    ///
    /// # Errors
    /// When the VM is here already, or the table is full. Nothing changed then.
    pub fn incoming(
        &mut self,
        tenure: Tenure,
        name: String,
        home: DatastoreId,
        epoch: Epoch,
        deadline: Time,
    ) -> Result<(), Refusal> {
        match self.rows.get_mut(&tenure) {
            Some(Row { phase: Phase::Incoming { deadline: old }, .. }) => {
                *old = deadline;
                return Ok(());
            }
            // A migration that failed before: the source's generation is still the same.
            Some(row) if row.foreign && row.is_over() && !self.qemus.contains_key(&tenure.vm) => {}
            Some(_) => return Err(wrong("this host holds that very claim")),
            None => {}
        }
        self.admits(tenure)?;
        let row = Row::new(name, home, epoch, Phase::Incoming { deadline });
        self.insert(tenure, Row { foreign: true, starts: true, ..row });
        Ok(())
    }

    /// Whether a copy of this VM may come in.
    fn admits(&mut self, tenure: Tenure) -> Result<(), Refusal> {
        if self.rows_of(tenure.vm).any(|(at, row)| !row.is_over() || tenure.generation < at.generation) {
            return Err(wrong("this VM has a row that is not over, or a later one"));
        }
        if self.qemus.contains_key(&tenure.vm) {
            return Err(wrong("a QEMU of this VM is alive"));
        }
        self.make_room()
    }

    /// The claim exists. The caller has checked that the home's lease is valid in `epoch`. A row confirmed twice
    /// answers the same.
    ///
    /// # Errors
    /// When the row is over, of another epoch, or its deadline has passed (then it is barred).
    pub fn claimed(&mut self, tenure: Tenure, epoch: Epoch, until: Time, now: Time) -> Result<(), Refusal> {
        let row = self.rows.get_mut(&tenure).ok_or_else(|| wrong("it was never expected"))?;
        if row.epoch != epoch {
            return Err(Refusal::EpochChanged { now: epoch });
        }
        match &mut row.phase {
            Phase::Running { .. } => Ok(()),
            Phase::Over { .. } => Err(wrong("it is over")),
            Phase::Incoming { .. } => Err(wrong("it is the source's generation")),
            Phase::Expected { deadline, .. } if *deadline <= now => {
                self.bar(tenure);
                Err(wrong("its deadline has passed"))
            }
            Phase::Expected { deadline, confirmed, .. } => {
                *confirmed = true;
                *deadline = until;
                self.changed(tenure);
                if self.qemus.contains_key(&tenure.vm) {
                    self.run(tenure);
                }
                Ok(())
            }
        }
    }

    /// The claim was surely not created, or the start failed and QEMU is gone.
    ///
    /// # Errors
    /// When the row ran already. One that is over, or unknown, is abandoned already.
    pub fn abandon(&mut self, tenure: Tenure) -> Result<(), Refusal> {
        let Some(row) = self.rows.get(&tenure) else { return Ok(()) };
        let (purpose, confirmed) = match row.phase {
            Phase::Over { .. } => return Ok(()),
            Phase::Running { .. } => return Err(wrong("it runs")),
            Phase::Incoming { .. } => (Purpose::Start, false),
            Phase::Expected { purpose, confirmed, .. } => (purpose, confirmed),
        };
        match (self.qemus.get_mut(&tenure.vm), purpose) {
            (Some(_), Purpose::Adopt | Purpose::HandOver) if confirmed => self.bar(tenure),
            (_, Purpose::Adopt | Purpose::HandOver) => {
                // There is no claim and never was one: it was not ours to hold, and it is not ours to stop. A row that
                // is over would do that as soon as its QEMU is seen.
                self.remove(tenure);
                if self.newest(tenure.vm).is_none() {
                    self.qemus.remove(&tenure.vm);
                }
            }
            (None, _) => self.end(tenure, Over::NeverStarted),
            (Some(_), Purpose::Reclaim) => self.end(tenure, Over::Lapsed),
            (Some(qemu), Purpose::Start) => {
                qemu.doomed = Some("its start was given up".to_owned());
                self.end(tenure, Over::Lapsed);
            }
        }
        Ok(())
    }

    /// Nobody needs the row's word any more. One that is gone is forgotten already.
    ///
    /// # Errors
    /// While it is not over, or while its QEMU is alive.
    pub fn forget(&mut self, tenure: Tenure) -> Result<(), Refusal> {
        let Some(row) = self.rows.get(&tenure) else { return Ok(()) };
        // A row that waits for an incoming QEMU goes without a word: its claim was surely not made.
        if !row.is_over() && !row.awaits() {
            return Err(wrong("it is not over"));
        }
        if self.newest(tenure.vm) == Some(tenure) && self.qemus.contains_key(&tenure.vm) {
            return Err(wrong("its QEMU is alive"));
        }
        self.remove(tenure);
        Ok(())
    }

    /// The memory went to `to`: once the exit is seen and its writes have landed, that is what is said.
    ///
    /// # Errors
    /// When the row neither runs nor ended by an exit, or its writes may still be under way.
    pub fn hand_over(&mut self, tenure: Tenure, receiver: HostId) -> Result<(), Refusal> {
        let row = self.rows.get_mut(&tenure).ok_or_else(|| wrong("unknown"))?;
        match &mut row.phase {
            Phase::Running { to } => *to = Some(receiver),
            Phase::Over { why: why @ Over::Exited { clean: true }, .. } if row.ran => *why = Over::HandedTo(receiver),
            Phase::Over { why: Over::Draining, .. } if row.ran => {
                if let Some(drain) = self.drains.get_mut(&tenure) {
                    drain.to = Some(receiver);
                }
            }
            Phase::Over { why: Over::Exited { clean: false }, .. } => {
                return Err(wrong("what it had under way when it ended may still land"));
            }
            Phase::Over { why: Over::HandedTo(to), .. } if *to == receiver => {}
            Phase::Over { .. } | Phase::Expected { .. } | Phase::Incoming { .. } => {
                return Err(wrong("it does not run"));
            }
        }
        self.changed(tenure);
        Ok(())
    }

    /// A claim was read that ends every tenure of the VM below `seen`: its QEMU dies.
    ///
    /// # Errors
    /// When `seen` does not end `tenure`, or this host itself holds `seen` or a later one.
    pub fn kill(&mut self, tenure: Tenure, seen: Generation, why: &str) -> Result<(), Refusal> {
        if seen <= tenure.generation {
            return Err(wrong("only a later claim ends it"));
        }
        if self.rows_of(tenure.vm).any(|(at, row)| seen <= at.generation && !row.is_over()) {
            return Err(wrong("this host holds that claim or a later one"));
        }
        let lower: Vec<Tenure> = self.rows_of(tenure.vm).map(|(at, _)| at).collect();
        lower.into_iter().for_each(|tenure| self.end(tenure, Over::Lapsed));
        self.doom(tenure.vm, why);
        Ok(())
    }

    /// Whether the row stands.
    #[must_use]
    pub fn knows(&self, tenure: Tenure) -> bool {
        self.rows.contains_key(&tenure)
    }

    /// Where the claims of a row's VM live.
    #[must_use]
    pub fn home(&self, tenure: Tenure) -> Option<DatastoreId> {
        self.rows.get(&tenure).map(|row| row.home)
    }

    /// Whether some row with this home is not over.
    #[must_use]
    pub fn lives_on(&self, home: DatastoreId) -> bool {
        self.rows.values().any(|row| row.home == home && !row.is_over())
    }

    /// Takes the row back that an order just made, because it could not be kept in a file.
    pub fn take_back(&mut self, tenure: Tenure) {
        self.remove(tenure);
    }

    fn make_room(&mut self) -> Result<(), Refusal> {
        if self.rows.len() < MAX_ROWS {
            return Ok(());
        }
        let oldest =
            self.rows.iter().filter(|(at, _)| !self.qemus.contains_key(&at.vm)).filter_map(|(at, row)| {
                if let Phase::Over { order, .. } = row.phase { Some((order, *at)) } else { None }
            });
        let (_, tenure) = oldest.min().ok_or(Refusal::Full(MAX_ROWS))?;
        self.remove(tenure);
        Ok(())
    }

    fn rows_of(&self, vm: VmId) -> impl DoubleEndedIterator<Item = (Tenure, &Row)> {
        let first = Tenure { vm, generation: Generation(0) };
        let last = Tenure { vm, generation: Generation(u64::MAX) };
        self.rows.range(first..=last).map(|(at, row)| (*at, row))
    }

    fn newest(&self, vm: VmId) -> Option<Tenure> {
        self.rows_of(vm).next_back().map(|(at, _)| at)
    }

    fn insert(&mut self, tenure: Tenure, row: Row) {
        self.rows.insert(tenure, row);
        self.changed(tenure);
    }

    /// Its QEMU must die.
    fn doom(&mut self, vm: VmId, why: &str) {
        if let Some(qemu) = self.qemus.get_mut(&vm) {
            qemu.doomed.get_or_insert_with(|| why.to_owned());
            self.version += 1;
        }
    }

    fn remove(&mut self, tenure: Tenure) {
        if self.rows.remove(&tenure).is_some() {
            self.drains.remove(&tenure);
            self.changed.remove(&tenure);
            self.forgotten.push(tenure);
            self.version += 1;
        }
    }

    fn changed(&mut self, tenure: Tenure) {
        self.changed.insert(tenure);
        self.version += 1;
    }
}

/// The same order again: a later deadline, as long as the claim is not confirmed.
fn repeat_expect(row: &mut Row, new: &Expected) -> Result<(), Refusal> {
    match &mut row.phase {
        Phase::Expected { purpose, deadline, confirmed: false }
            if *purpose == new.purpose && row.home == new.home && row.epoch == new.epoch =>
        {
            *deadline = new.deadline;
            Ok(())
        }
        Phase::Expected { .. } | Phase::Incoming { .. } | Phase::Running { .. } | Phase::Over { .. } => {
            Err(wrong("the row stands already"))
        }
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_carried;
#[cfg(test)]
mod tests_handover;
#[cfg(test)]
mod tests_trust;
