//! Starts whose outcome is unknown: libvirt was told to start a VM, and has not said what became of that. It may still do so,
//! minutes later (a daemon that was stopped, or hung), when the VM runs elsewhere.
//!
//! ```text
//!   told to start ── no answer, given up ──► late: rows that never ran stay at the guard, which ends what comes up under them
//!                                              │ libvirt answers, and lists it as off and idle
//!                                              ▼ LISTED later
//!                                            not late: its rows may be forgotten
//! ```
//!
//! A row of the guard is all that stands between such a QEMU and a second copy: nothing else on this host knows of it in time.

use std::time::Duration;

use super::Core;
use super::cx::{Cx, Pending};
use crate::types::guard::GuardOrder;
use crate::types::vm::{DomainState, Underway};
use crate::types::{Tenure, Time, VmId, VmState};

/// A start that libvirt has taken out of its queue shows by then.
const LISTED: Duration = Duration::from_secs(10);

impl Core {
    /// libvirt was told to start it, and nobody knows whether it will.
    pub(super) fn start_is_late(&mut self, id: VmId) {
        self.vm(id).late = Some(Time(u64::MAX));
    }

    /// libvirt has listed its domains: starts that are over show as off and idle.
    pub(super) fn look_for_late(&mut self, cx: &mut Cx) {
        let now = cx.now;
        let mut over = Vec::new();
        for (id, vm) in &mut self.vms {
            let Some(until) = vm.late else { continue };
            let idle = self
                .libvirt
                .domains
                .get(id)
                .is_none_or(|domain| matches!(domain.state, DomainState::Off(_)) && !domain.busy);
            vm.late = match idle {
                false => Some(Time(u64::MAX)),
                true if until <= now => None,
                true => Some(until.min(now + LISTED)),
            };
            if vm.late.is_none() && vm.attempt.is_none() && self.underway.get(id) == Some(&Underway::Start) {
                over.push(*id);
            }
        }
        over.into_iter().for_each(|id| self.set_underway(cx, id, None));
    }

    /// libvirt has gone: what it was told may come about when it is back.
    pub(super) fn late_starts_stay(&mut self) {
        self.vms.values_mut().filter_map(|vm| vm.late.as_mut()).for_each(|until| *until = Time(u64::MAX));
    }

    /// Nobody needs the row's word any more; but one that bars a late start stays.
    pub(super) fn forget(&mut self, cx: &mut Cx, tenure: Tenure) {
        let late = self.vms.get(&tenure.vm).is_some_and(|vm| vm.late.is_some());
        let bars = self.guard.rows.get(&tenure).is_some_and(|row| matches!(row.state, VmState::Over(_)) && !row.ran);
        if !(late && bars) {
            cx.guard(GuardOrder::Forget { tenure }, Pending::Nothing);
        }
    }
}
