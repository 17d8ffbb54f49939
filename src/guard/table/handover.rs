//! A handover claim at its two hosts (R6, `virsh migrate` by people): who may run when, seen by vCPU time.
//!
//! ```text
//!  source: Running ── Switched, or alone and vCPUs stood for 20 ms ──► switched ── vCPUs move ──► over, stopped
//!  target: Incoming ── vCPUs move ──► ran ── Expect(Adopt, g+1) + Claimed ──► Running
//!              └── over before its vCPUs ever moved ──► killed, said: never started
//! ```
//!
//! Why the target's word matters: after the switch the source's memory may go on only if the target's copy never
//! executed anything, else it would meet disks that are newer than itself. So a copy that was seen to run says
//! "exited" or "lapsed", and only one that was not says "never started". One that ran for less than a sample (10 ms)
//! and then died by itself is the remaining error; all other ends stop the copy first and sample it once more.
//!
//! Deliberately not here: reading vCPU time (`guard::handover`), and what follows from an end (the agent).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{DatastoreId, Epoch, Hold, Over, Phase, ProcessKey, Refusal, Row, Table, Tenure, Time, VmId, wrong};

/// vCPUs that stood still for this long have switched, if there is no agent to say it. Shorter than libvirt takes from
/// the switch to letting the source go on; so long may a guest that has nothing to do stand, too: with its agent gone,
/// it may be stopped for nothing.
const STILL: Duration = Duration::from_millis(20);
/// vCPU threads spend so much without executing the guest: QEMU has them read and load registers.
const NOISE: Duration = Duration::from_millis(1);
/// The same, when QEMU ends: libvirt ends the source after the switch (tried with TCG: up to 4.6 ms). With the time
/// between two samples it bounds what a source may execute that libvirt lets go on: 18 ms.
const ENDING: Duration = Duration::from_millis(8);

/// A row's part in a handover.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Part {
    /// None: its claim names one host.
    #[default]
    None,
    /// It may run here until the switch.
    Source { switched: bool },
    /// It may run here after the switch. `ran`: it did, or nobody watched.
    Target { ran: bool },
}

/// vCPU time of a row's QEMU as sampled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Watch {
    /// What is compared with; none = the next sample.
    base: Option<Duration>,
    /// When it last moved, before the switch.
    moved: Time,
}

impl Watch {
    /// Takes a sample; whether the vCPUs have moved since `base`, by more than `noise`.
    fn take(&mut self, spent: Duration, now: Time, noise: Duration) -> bool {
        match self.base {
            None => {
                (self.base, self.moved) = (Some(spent), now);
                false
            }
            Some(base) => base + noise < spent,
        }
    }
}

impl Row {
    /// It waits for an incoming QEMU that was not seen yet.
    pub(super) fn awaits(&self) -> bool {
        matches!((self.phase, self.part), (Phase::Incoming { .. }, Part::Target { .. })) && !self.seen
    }

    /// It is not known yet whether "lapsed" or "never started" is to be said.
    pub(super) fn undecided(&self) -> bool {
        self.part == Part::Target { ran: false } && self.seen
    }

    /// What its QEMU's exit means: a copy that never executed anything never started.
    pub(super) fn exited(&self, clean: bool) -> Over {
        match self.part {
            Part::Target { ran: false } => Over::NeverStarted,
            Part::Target { ran: true } | Part::Source { .. } | Part::None => Over::Exited { clean },
        }
    }
}

impl Table {
    /// The target of `virsh migrate`, before the handover claim is created. Repeated = a later deadline.
    ///
    /// # Errors
    /// When the VM is here already, this generation is over here, or the table is full. Nothing changed then.
    pub fn receive(
        &mut self,
        tenure: Tenure,
        name: String,
        home: DatastoreId,
        epoch: Epoch,
        deadline: Time,
    ) -> Result<(), Refusal> {
        match self.rows.get_mut(&tenure) {
            Some(row) if row.awaits() => {
                row.phase = Phase::Incoming { deadline };
                return Ok(());
            }
            Some(_) => return Err(wrong("this generation stands here already")),
            None => {}
        }
        self.admits(tenure)?;
        let (phase, part) = (Phase::Incoming { deadline }, Part::Target { ran: false });
        let row = Row::new(name, home, epoch, phase);
        self.insert(tenure, Row { part, foreign: true, starts: true, ..row });
        Ok(())
    }

    /// libvirt says that the memory has gone.
    ///
    /// # Errors
    /// When this row hands nothing over.
    pub fn switched(&mut self, tenure: Tenure) -> Result<(), Refusal> {
        let row = self.rows.get_mut(&tenure).ok_or_else(|| wrong("unknown"))?;
        match row.part {
            Part::Source { switched: true } => {}
            Part::Source { switched: false } => self.switch(tenure),
            Part::Target { .. } | Part::None => return Err(wrong("it hands nothing over")),
        }
        Ok(())
    }

    /// The copy here is worth nothing any more.
    ///
    /// # Errors
    /// When the row has no part in a handover, and its QEMU was not started under it.
    pub fn discard(&mut self, tenure: Tenure) -> Result<(), Refusal> {
        let row = self.rows.get(&tenure).ok_or_else(|| wrong("unknown"))?;
        match row.part {
            Part::None if row.starts && matches!(row.phase, Phase::Running { .. }) => {
                self.doom(tenure.vm, "its start was given up"); // Its exit will say how it ended.
                return Ok(());
            }
            Part::None => return Err(wrong("it has no part in a handover, and was not started here")),
            Part::Target { ran: false } => {} // Its exit will say that it never started; "lapsed" would say less.
            Part::Target { ran: true } | Part::Source { .. } => self.end_all(tenure.vm),
        }
        self.doom(tenure.vm, "its memory is not the newest: it was being handed over");
        Ok(())
    }

    /// QEMUs whose vCPU time must be sampled.
    pub fn watched(&self) -> impl Iterator<Item = (VmId, ProcessKey)> {
        self.qemus
            .iter()
            .filter(|(vm, qemu)| !qemu.killed && self.watched_row(**vm).is_some())
            .map(|(vm, q)| (*vm, q.key))
    }

    /// All vCPUs of this QEMU together have spent so much by now. `alone`: no agent tells of the switch.
    pub fn sampled(&mut self, vm: VmId, key: ProcessKey, spent: Duration, now: Time, alone: bool) {
        let Some(qemu) = self.qemus.get(&vm).filter(|qemu| qemu.key == key) else { return };
        let (stands, free) = (qemu.hold == Hold::Stopped, qemu.hold == Hold::Free);
        let Some(tenure) = self.watched_row(vm) else { return };
        let row = self.row(tenure);
        let first = row.watch.base.is_none();
        let noise = if row.part == (Part::Source { switched: true }) { ENDING } else { NOISE };
        let moved = row.watch.take(spent, now, noise);
        match row.part {
            Part::Source { switched: false } if moved => (row.watch.base, row.watch.moved) = (Some(spent), now),
            Part::Source { switched: false } if alone && STILL <= now.since(row.watch.moved) => self.switch(tenure),
            Part::Source { switched: true } if moved => {
                let text = format!(
                    "VM {}: its vCPUs moved here after a migration's switch; it is stopped, since it may run at the target",
                    row.name
                );
                self.alarms.push(text);
                self.end_all(vm);
            }
            // Whether it ran before it was stopped nobody knows.
            Part::Target { ran: false } if moved || first && !free => {
                row.part = Part::Target { ran: true };
                self.changed(tenure);
                if stands {
                    self.say_all(vm);
                }
            }
            // It stands for good, and this sample shows that it never moved.
            Part::Target { ran: false } if stands && row.is_over() => {
                self.doom(vm, "it came in, but its right to run ended before it ran");
            }
            Part::Source { .. } | Part::Target { .. } | Part::None => {}
        }
    }

    fn switch(&mut self, tenure: Tenure) {
        let row = self.row(tenure);
        row.part = Part::Source { switched: true };
        row.watch.base = None; // The vCPUs stand by now: the next sample is what they must not exceed.
        self.changed(tenure);
    }

    /// The row of this VM whose vCPUs matter.
    fn watched_row(&self, vm: VmId) -> Option<Tenure> {
        let matters = |row: &Row| match row.part {
            Part::Source { .. } => !row.is_over(),
            Part::Target { ran } => !ran,
            Part::None => false,
        };
        self.rows_of(vm).filter(|(_, row)| matters(row)).map(|(at, _)| at).next_back()
    }
}
