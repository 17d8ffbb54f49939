//! What happens to rows and QEMUs by themselves: they appear, end, lapse, miss deadlines; and what to do about it.

use std::collections::BTreeSet;

use super::{Hold, Part, Phase, ProcessKey, Qemu, Row, Table};
use crate::mutants::{Mutant, planted};
use crate::types::guard::Purpose;
use crate::types::{Claim, Counter, DatastoreId, HostId, Over, Tenure, Time, VmId};

/// What the enforcing thread must do to one QEMU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Act {
    /// SIGSTOP, then freeze.
    Stop(VmId, ProcessKey),
    /// See whether every thread stands; then tell `stands`.
    Check(VmId, ProcessKey),
    /// Thaw, then SIGCONT.
    Lift(VmId, ProcessKey),
    /// SIGKILL; why.
    Kill(VmId, ProcessKey, String),
}

impl Act {
    /// Which process it is about.
    #[must_use]
    pub fn key(&self) -> ProcessKey {
        match self {
            Self::Stop(_, key) | Self::Check(_, key) | Self::Lift(_, key) | Self::Kill(_, key, _) => *key,
        }
    }
}

impl Table {
    /// A QEMU of `vm` was found. Does nothing if it is known. Another process of a VM whose QEMU is alive is a second
    /// copy: true, and the caller stops it.
    #[must_use]
    pub fn appeared(&mut self, vm: VmId, key: ProcessKey, now: Time) -> bool {
        if let Some(known) = self.qemus.get(&vm) {
            return known.key != key;
        }
        let Some(newest) = self.newest(vm) else { return false };
        self.qemus.insert(vm, Qemu { key, hold: Hold::Free, doomed: None, killed: false });
        let living: Vec<Tenure> = self.rows_of(vm).filter(|(_, row)| !row.is_over()).map(|(at, _)| at).collect();
        for tenure in &living {
            self.row(*tenure).seen = true;
            self.changed(*tenure);
        }
        if living.is_empty() {
            self.uncalled(newest);
            return false;
        }
        match self.row(newest).phase {
            Phase::Expected { deadline, .. } | Phase::Incoming { deadline } if deadline <= now => self.bar(newest),
            Phase::Expected { confirmed: true, .. } => self.run(newest),
            Phase::Expected { .. } | Phase::Incoming { .. } | Phase::Running { .. } | Phase::Over { .. } => {}
        }
        // One that came up while no guard was there may stand: lifting does nothing to one that runs.
        if self.carried_on
            && self.may_run(vm)
            && let Some(qemu) = self.qemus.get_mut(&vm)
        {
            qemu.hold = Hold::Stopping;
        }
        false
    }

    /// The exit of a QEMU was seen. `last`: every beat above it is begun later. `works`: this host's own path to that
    /// datastore works.
    pub fn exited(&mut self, vm: VmId, key: ProcessKey, last: Counter, works: impl Fn(DatastoreId) -> bool) {
        if self.qemus.get(&vm).is_none_or(|qemu| qemu.key != key) {
            return;
        }
        self.qemus.remove(&vm);
        let tenures: Vec<Tenure> = self.rows_of(vm).map(|(at, _)| at).collect();
        for tenure in tenures {
            match self.row(tenure).phase {
                Phase::Running { to } => {
                    let why = self.drain(tenure, to, last, &works);
                    self.end(tenure, why);
                }
                Phase::Incoming { .. } | Phase::Expected { .. } => {
                    let why = self.drain(tenure, None, last, &works);
                    self.end(tenure, why);
                }
                // It stood; now it is gone for good, which says more.
                Phase::Over { why: Over::Lapsed, order, .. } => {
                    let why = self.drain(tenure, None, last, &works);
                    self.row(tenure).phase = Phase::Over { why, unsaid: None, order };
                    self.changed(tenure);
                }
                Phase::Over { .. } => self.changed(tenure),
            }
        }
    }

    /// The lease of `home` lapsed (R2): every VM with a living row there loses every right to run.
    pub fn lapse(&mut self, home: DatastoreId) {
        let hit: Vec<VmId> =
            self.rows.iter().filter(|(_, row)| row.home == home && !row.is_over()).map(|(at, _)| at.vm).collect();
        hit.into_iter().for_each(|vm| self.end_all(vm));
    }

    /// The claim of this VM is not there: it loses every right to run.
    pub fn lapse_vm(&mut self, vm: VmId) {
        self.end_all(vm);
    }

    /// The memory of copies that stand after a lapse may be older than their disks, whether or not they are being claimed anew; and so
    /// may that of a copy which has come under another host's claim and waits for its word: a later claim, by which others ran the VM,
    /// may be gone.
    pub fn outdate(&mut self, home: DatastoreId) {
        let waits = |row: &Row| row.home == home && row.foreign && !row.is_over();
        // Its newest tenure under which it ran: one that runs by another home since has its disks there.
        let stands = |vm: &VmId| {
            let ran = self.rows_of(*vm).map(|(_, row)| row).rfind(|row| row.ran);
            ran.is_some_and(|row| row.home == home && matches!(row.phase, Phase::Over { why: Over::Lapsed, .. }))
        };
        let waiting = self.rows.iter().filter(|(_, row)| waits(row)).map(|(at, _)| at.vm);
        let standing = self.qemus.keys().copied().filter(stands);
        let lapsed = self.lapsed_on(home).into_iter().map(|at| at.vm);
        let old: BTreeSet<VmId> = waiting.chain(standing).chain(lapsed).collect();
        for vm in old {
            self.doom(
                vm,
                "its datastore went back in time, and another host may have run it since its memory was current",
            );
        }
    }

    /// VMs of that home with some right to run here.
    #[must_use]
    pub fn living(&self, home: DatastoreId) -> Vec<VmId> {
        let living = self.rows.iter().filter(|(_, row)| row.home == home && !row.is_over());
        living.map(|(at, _)| at.vm).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Whether this claim, the highest of its VM, is one that a living row stands for.
    #[must_use]
    pub fn vouches(&self, claim: &Claim, me: HostId) -> bool {
        self.rows.get(&claim.tenure).is_some_and(|row| !row.is_over() && (row.foreign || claim.names(me)))
    }

    /// The newest generation of a VM that runs, or ran, here under a claim of its own on that home and is not over.
    #[must_use]
    pub fn held(&self, vm: VmId, home: DatastoreId) -> Option<Tenure> {
        let holds = |row: &Row| row.ran && row.home == home && !row.is_over();
        self.rows_of(vm).filter(|(_, row)| holds(row)).map(|(at, _)| at).next_back()
    }

    /// Every right to run is gone: the guard takes another incarnation.
    pub fn lapse_everything(&mut self) {
        let hit: Vec<VmId> = self.rows.iter().filter(|(_, row)| !row.is_over()).map(|(at, _)| at.vm).collect();
        hit.into_iter().for_each(|vm| self.end_all(vm));
    }

    /// Bars every row whose deadline has passed.
    pub fn deadlines(&mut self, now: Time) {
        let due: Vec<Tenure> =
            self.deadlines_set().filter(|(_, deadline)| *deadline <= now).map(|(tenure, _)| tenure).collect();
        due.into_iter().for_each(|tenure| self.bar(tenure));
    }

    /// The next deadline of a row.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.deadlines_set().map(|(_, deadline)| deadline).min()
    }

    /// A fresh look found no QEMU of `vm`: rows that never had one, and are barred, never started.
    pub fn absent(&mut self, vm: VmId) {
        if self.qemus.contains_key(&vm) {
            return;
        }
        let barred: Vec<Tenure> =
            self.rows_of(vm).filter(|(_, row)| row.is_barred_unseen()).map(|(at, _)| at).collect();
        for tenure in barred {
            if let Phase::Over { why, .. } = &mut self.row(tenure).phase {
                *why = Over::NeverStarted;
            }
            self.changed(tenure);
        }
    }

    /// VMs whose QEMU must be looked for now (`true`: often), with their names.
    pub fn wanted(&self) -> impl Iterator<Item = (VmId, &str, bool)> {
        self.rows.iter().filter(|(at, _)| !self.qemus.contains_key(&at.vm)).map(|(at, row)| {
            let soon = match row.phase {
                Phase::Expected { .. } | Phase::Incoming { .. } => true,
                Phase::Running { .. } | Phase::Over { .. } => row.is_barred_unseen(),
            };
            (at.vm, row.name.as_str(), soon)
        })
    }

    /// What must be done now so that every QEMU does just what its rows allow. The table takes it for done, except that
    /// a stop is checked again until `stands` was told.
    pub fn reconcile(&mut self) -> Vec<Act> {
        let mut acts = Vec::new();
        let vms: Vec<VmId> = self.qemus.keys().copied().collect();
        for vm in vms {
            let may_run = self.may_run(vm);
            let Some(qemu) = self.qemus.get_mut(&vm) else { continue };
            let key = qemu.key;
            match (may_run, qemu.hold) {
                (true, Hold::Free) | (false, Hold::Stopped) => {}
                (true, Hold::Stopping | Hold::Stopped) => {
                    qemu.hold = Hold::Free;
                    acts.push(Act::Lift(vm, key));
                    self.changed_vm(vm);
                }
                (false, Hold::Free) => {
                    qemu.hold = Hold::Stopping;
                    acts.push(Act::Stop(vm, key));
                }
                (false, Hold::Stopping) => acts.push(Act::Check(vm, key)),
            }
            let Some(qemu) = self.qemus.get_mut(&vm) else { continue };
            if let (Some(why), false) = (&qemu.doomed, qemu.killed) {
                qemu.killed = true;
                acts.push(Act::Kill(vm, key, why.clone()));
            }
        }
        acts
    }

    /// Every thread of this QEMU was seen standing.
    pub fn stands(&mut self, vm: VmId, key: ProcessKey) {
        match self.qemus.get_mut(&vm) {
            Some(qemu) if qemu.key == key && qemu.hold == Hold::Stopping => qemu.hold = Hold::Stopped,
            Some(_) | None => return,
        }
        self.say_all(vm);
    }

    /// Stopped VMs of this home that lapsed here and that nobody re-claims now: whose claims are worth reading.
    #[must_use]
    pub fn lapsed_on(&self, home: DatastoreId) -> Vec<Tenure> {
        let newest = self.qemus.iter().filter(|(_, qemu)| qemu.doomed.is_none()).filter_map(|(vm, _)| self.newest(*vm));
        newest.filter(|at| self.rows.get(at).is_some_and(|row| row.home == home && row.is_over())).collect()
    }

    /// Every QEMU that may run, once for each home on whose lease that stands.
    pub fn runs(&self) -> impl Iterator<Item = (DatastoreId, ProcessKey)> {
        let running = self.qemus.iter().filter(|(vm, _)| self.may_run(**vm));
        running.flat_map(|(vm, qemu)| {
            self.rows_of(*vm).filter(|(_, row)| !row.is_over()).map(|(_, row)| (row.home, qemu.key))
        })
    }

    /// This process was stopped before the table was asked: what may run all the same is lifted again.
    pub fn struck(&mut self, key: ProcessKey) {
        let known = self.qemus.values_mut().find(|qemu| qemu.key == key && qemu.hold == Hold::Free);
        if let Some(qemu) = known {
            qemu.hold = Hold::Stopping;
        }
    }

    /// The process of `vm`, if one is known.
    #[must_use]
    pub fn process(&self, vm: VmId) -> Option<ProcessKey> {
        self.qemus.get(&vm).map(|qemu| qemu.key)
    }

    /// Every known process.
    pub fn processes(&self) -> impl Iterator<Item = (VmId, ProcessKey)> {
        self.qemus.iter().map(|(vm, qemu)| (*vm, qemu.key))
    }

    /// The claim is confirmed and QEMU is here: it may run. Older rows that still lived are superseded by it.
    pub(super) fn run(&mut self, tenure: Tenure) {
        let older: Vec<Tenure> =
            self.rows_of(tenure.vm).filter(|(at, row)| *at < tenure && !row.is_over()).map(|(at, _)| at).collect();
        older.into_iter().for_each(|at| self.remove(at));
        self.say_all(tenure.vm);
        let row = self.row(tenure);
        assert!(matches!(row.phase, Phase::Expected { confirmed: true, .. }), "only a confirmed claim lets run");
        row.phase = Phase::Running { to: None };
        row.ran = true;
        row.seen = true;
        self.changed(tenure);
    }

    /// The row will not be confirmed in time: no row of this VM vouches for its QEMU any more. Except that one which runs
    /// under an older claim of this host, by the lease of the same home, runs on: the new claim, should it exist, names
    /// this host as well, and nothing may be said of it while that copy lives, so its row goes without a word.
    pub(super) fn bar(&mut self, tenure: Tenure) {
        let (home, phase) = {
            let row = self.row(tenure);
            (row.home, row.phase)
        };
        let runs =
            |(at, row): (Tenure, &Row)| at < tenure && row.home == home && matches!(row.phase, Phase::Running { .. });
        let adopts = matches!(phase, Phase::Expected { purpose: Purpose::Adopt, .. });
        if adopts && self.rows_of(tenure.vm).any(runs) {
            return self.remove(tenure);
        }
        let starting = match phase {
            Phase::Expected { purpose: Purpose::Start, .. } | Phase::Incoming { .. } => true,
            Phase::Expected { purpose: Purpose::Adopt | Purpose::Reclaim | Purpose::HandOver, .. } => false,
            Phase::Running { .. } | Phase::Over { .. } => return,
        };
        self.end_all(tenure.vm);
        if let (true, Some(qemu)) = (starting, self.qemus.get_mut(&tenure.vm)) {
            qemu.doomed.get_or_insert_with(|| "it came up, but its claim was not confirmed in time".to_owned());
        }
    }

    /// The row is over, unless it is so already.
    pub(super) fn end(&mut self, tenure: Tenure, why: Over) {
        self.ended += 1;
        let order = self.ended;
        let free = self.qemus.get(&tenure.vm).is_some_and(|qemu| qemu.hold != Hold::Stopped);
        let row = self.row(tenure);
        if row.is_over() {
            return;
        }
        let unsaid = (free && why == Over::Lapsed).then(|| row.state());
        row.phase = Phase::Over { why, unsaid, order };
        self.changed(tenure);
    }

    pub(super) fn changed_vm(&mut self, vm: VmId) {
        let tenures: Vec<Tenure> = self.rows_of(vm).map(|(at, _)| at).collect();
        tenures.into_iter().for_each(|tenure| self.changed(tenure));
    }

    /// What is over may be said now: no QEMU runs under it, and none ever will.
    pub(super) fn say_all(&mut self, vm: VmId) {
        let tenures: Vec<Tenure> = self.rows_of(vm).map(|(at, _)| at).collect();
        for tenure in tenures {
            let undecided = self.row(tenure).undecided();
            if let (Phase::Over { unsaid, .. }, false) = (&mut self.row(tenure).phase, undecided) {
                *unsaid = None;
            }
            self.changed(tenure);
        }
    }

    /// Lapsed, until a fresh look shows that no QEMU ever came (`absent`).
    pub(super) fn end_all(&mut self, vm: VmId) {
        let tenures: Vec<Tenure> = self.rows_of(vm).map(|(at, _)| at).collect();
        tenures.into_iter().for_each(|tenure| self.end(tenure, Over::Lapsed));
    }

    /// A QEMU came up although every row of its VM is over: it will be stopped; if none ever ran, it dies.
    fn uncalled(&mut self, newest: Tenure) {
        let row = self.row(newest);
        let name = row.name.clone();
        let barred = row.starts && !row.ran;
        row.seen = true;
        self.changed(newest);
        self.alarms.push(format!(
            "VM {name}: a QEMU appeared although generation {} is over here; it is {}",
            newest.generation,
            if barred { "killed, since its claim was never confirmed" } else { "stopped until its agent claims it" }
        ));
        if let (true, Some(qemu)) = (barred, self.qemus.get_mut(&newest.vm)) {
            qemu.doomed = Some("its row was barred before it came up".to_owned());
        }
    }

    pub(super) fn may_run(&self, vm: VmId) -> bool {
        self.qemus.get(&vm).is_some_and(|qemu| qemu.doomed.is_none())
            && self.rows_of(vm).any(|(_, row)| match row.phase {
                Phase::Running { .. } | Phase::Incoming { .. } => true,
                Phase::Expected { purpose: Purpose::Adopt | Purpose::HandOver, .. } => true,
                Phase::Expected { purpose: Purpose::Reclaim, .. } => planted(Mutant::ResumedUnclaimed),
                Phase::Expected { purpose: Purpose::Start, .. } | Phase::Over { .. } => false,
            })
    }

    /// Rows with a deadline that counts. That of an incoming one ends when its own claim is being made.
    fn deadlines_set(&self) -> impl Iterator<Item = (Tenure, Time)> {
        self.rows.iter().filter_map(|(at, row)| match row.phase {
            Phase::Expected { deadline, .. } => Some((*at, deadline)),
            // How long a person's migration takes is not ours to say.
            Phase::Incoming { .. } if row.seen && row.part != Part::None => None,
            Phase::Incoming { deadline } if self.rows_of(at.vm).all(|(other, row)| other <= *at || row.is_over()) => {
                Some((*at, deadline))
            }
            Phase::Incoming { .. } | Phase::Running { .. } | Phase::Over { .. } => None,
        })
    }

    pub(super) fn row(&mut self, tenure: Tenure) -> &mut Row {
        self.rows.get_mut(&tenure).expect("the tenure was just taken from the table")
    }
}

impl Row {
    fn is_barred_unseen(&self) -> bool {
        self.starts && !self.seen && matches!(self.phase, Phase::Over { why: Over::Lapsed, .. })
    }
}
