//! What the table tells: reports for the agent, VM lists for datastores, and the rows kept for `--stop-all`.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Hold, Part, Phase, ProcessKey, Qemu, Row, Table};
use crate::mutants::{Mutant, planted};
use crate::types::guard::{GuardReport, RowView};
use crate::types::{DatastoreId, Epoch, MAX_VMS_PER_HOST, Over, Tenure, VmEntry, VmState};

/// A process as kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptProcess {
    /// Which.
    pub key: ProcessKey,
    /// Its scope's folder in the cgroup file system, if libvirt made one.
    pub scope: Option<String>,
}

/// One row as kept in `/run`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptRow {
    /// (v, g).
    pub tenure: Tenure,
    /// v's name.
    pub name: String,
    /// Where its claims live.
    pub home: DatastoreId,
    /// As last said.
    pub state: VmState,
    /// Its claim was confirmed once and it ran.
    pub ran: bool,
    /// Where its QEMU writes, besides its home.
    #[serde(default)]
    pub writes: BTreeSet<DatastoreId>,
    /// A QEMU was seen.
    pub seen: bool,
    /// The tenure is another host's.
    pub foreign: bool,
    /// In a handover claim.
    #[serde(default)]
    pub part: Part,
    /// Its QEMU, if one is known.
    pub process: Option<KeptProcess>,
}

impl Table {
    /// Rises with every change.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Reports of everything that changed since the last call.
    pub fn take_reports(&mut self) -> Vec<GuardReport> {
        let mut reports: Vec<GuardReport> =
            self.forgotten.drain(..).map(|tenure| GuardReport::Forgotten { tenure }).collect();
        let changed = std::mem::take(&mut self.changed);
        reports.extend(changed.iter().filter_map(|at| self.view(*at)).map(GuardReport::Row));
        reports.extend(self.alarms.drain(..).map(GuardReport::Alarm));
        reports
    }

    /// Every row.
    pub fn views(&self) -> impl Iterator<Item = RowView> {
        self.rows.keys().filter_map(|at| self.view(*at))
    }

    /// The VM list of one home: living rows first; if they are too many, the oldest that are over are left out.
    #[must_use]
    pub fn list(&self, home: DatastoreId) -> Vec<VmEntry> {
        let mut rows: Vec<(&Tenure, &Row)> = self.rows.iter().filter(|(_, row)| row.home == home).collect();
        if MAX_VMS_PER_HOST < rows.len() {
            rows.sort_by_key(|(_, row)| match row.phase {
                Phase::Over { order, .. } => u64::MAX - order,
                Phase::Expected { .. } | Phase::Incoming { .. } | Phase::Running { .. } => 0,
            });
            rows.truncate(MAX_VMS_PER_HOST);
            rows.sort_by_key(|(at, _)| **at);
        }
        rows.into_iter().map(|(at, row)| VmEntry { tenure: *at, state: Self::shown(row) }).collect()
    }

    /// Every row, for the file.
    pub fn kept(&self, scope: impl Fn(ProcessKey) -> Option<String>) -> Vec<KeptRow> {
        let keep = |(at, row): (&Tenure, &Row)| KeptRow {
            tenure: *at,
            name: row.name.clone(),
            home: row.home,
            state: row.state(),
            writes: row.writes.clone(),
            ran: row.ran,
            seen: row.seen,
            foreign: row.foreign,
            part: row.part,
            process: self.qemus.get(&at.vm).map(|qemu| KeptProcess { key: qemu.key, scope: scope(qemu.key) }),
        };
        self.rows.iter().map(keep).collect()
    }

    /// A row that an earlier guard of this boot held: over, whatever it was, and its QEMU stands. `process`: the one
    /// that is still alive; a row whose process is gone has exited. Nobody watched meanwhile, so nothing of it can be
    /// said to have never started, and nothing that comes up for it is killed.
    pub fn restore(&mut self, kept: KeptRow, process: Option<ProcessKey>) {
        let KeptRow { tenure, name, home, state, writes, ran, seen, foreign, part, process: had } = kept;
        let why = match state {
            VmState::Over(Over::Draining) => Over::Exited { clean: false }, // Nobody watched its paths since.
            VmState::Over(why) => why,
            VmState::Expected | VmState::Running | VmState::Incoming => Over::Lapsed,
        };
        // Its path to the home is not known, so the exit is not clean.
        let gone = had.is_some() && process.is_none() && why == Over::Lapsed;
        let why = if gone { Over::Exited { clean: false } } else { why };
        let before = if ran { VmState::Running } else { VmState::Expected };
        let unsaid = (process.is_some() && why == Over::Lapsed).then_some(before);
        self.ended += 1;
        let phase = if planted(Mutant::LapseForgotten) && ran && process.is_some() {
            Phase::Running { to: None }
        } else {
            Phase::Over { why, unsaid, order: self.ended }
        };
        let part = match part {
            Part::Target { .. } => Part::Target { ran: true },
            Part::None | Part::Source { .. } => part,
        };
        let row = Row::new(name, home, Epoch::default(), phase);
        self.insert(tenure, Row { seen, ran, foreign, part, writes, ..row });
        if let Some(key) = process {
            self.qemus.insert(tenure.vm, Qemu { key, hold: Hold::Free, doomed: None, killed: false });
        }
    }

    /// In a new process, with what another guard of this boot held. Whether each QEMU stands is not known: `--stop-all`
    /// may have stopped it or not, so that what may run is lifted and what may not is stopped again; both do nothing
    /// twice. Nobody watched meanwhile, so nothing can be said to have never started.
    pub fn carry_on(&mut self) {
        self.carried_on = true;
        self.rows.values_mut().filter(|row| !row.seen).for_each(|row| row.starts = false);
        // A target may have run unseen: were that called "never started", the source's memory would meet newer disks.
        for row in self.rows.values_mut().filter(|row| matches!(row.part, Part::Target { .. })) {
            row.part = Part::Target { ran: true };
        }
        let vms: Vec<_> = self.qemus.keys().copied().collect();
        for vm in vms {
            let may_run = self.may_run(vm);
            let Some(qemu) = self.qemus.get_mut(&vm) else { continue };
            qemu.killed = false;
            qemu.hold = match (may_run, qemu.hold) {
                (true, _) => Hold::Stopping,
                (false, Hold::Free | Hold::Stopping) => Hold::Free,
                (false, Hold::Stopped) => Hold::Stopped,
            };
        }
    }

    fn view(&self, tenure: Tenure) -> Option<RowView> {
        let row = self.rows.get(&tenure)?;
        let qemu = self.qemus.get(&tenure.vm);
        Some(RowView {
            tenure,
            name: row.name.clone(),
            home: row.home,
            state: Self::shown(row),
            pid: qemu.map(|qemu| qemu.key.pid),
            stopped: qemu.is_some_and(|qemu| qemu.hold == Hold::Stopped),
            ran: row.ran,
        })
    }

    /// Over by lapse is said only once the QEMU stands: until then the row shows what it was.
    fn shown(row: &Row) -> VmState {
        match row.phase {
            Phase::Over { unsaid: Some(before), .. } if !planted(Mutant::SaidBeforeStopped) => before,
            Phase::Over { .. } | Phase::Expected { .. } | Phase::Incoming { .. } | Phase::Running { .. } => row.state(),
        }
    }
}
