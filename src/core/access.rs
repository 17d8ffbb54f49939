//! Whether this host reaches the disks of VMs that it could not start for want of them. It looks, and the master is told: a VM that
//! waits for its storage starts a moment after access returns, and no host is hammered with starts meanwhile.
//!
//! ```text
//!   a start failed on its storage ─► unreachable: in each report ── a timed direct read of each disk, every `LOOK` ── well ─► reported
//!                                            └── after `LATEST`: forgotten, the master tries whatever is said here
//! ```
//!
//! What cannot be read as a file (network disks of QEMU's own) is forgotten after `BLIND`.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::cx::{Cx, Pending};
use crate::types::{HostId, Ticket, Time, VmId};

/// Between two looks; and for one to answer.
const LOOK: Duration = Duration::from_secs(2);
/// Beyond this nothing is looked at any more.
const LATEST: Duration = Duration::from_secs(600);
/// The same where there is nothing to look at.
const BLIND: Duration = Duration::from_secs(60);

/// A VM whose disks this host could not open.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unreachable {
    paths: Vec<String>,
    since: Time,
    /// The look under way.
    asked: Option<Ticket>,
    /// Not looked at again before.
    again: Time,
}

impl Core {
    /// Its start here has failed on its storage.
    pub(super) fn watch_access(&mut self, now: Time, id: VmId) {
        let record = self.vms.get(&id).and_then(|vm| vm.attempt.as_ref()?.record.as_ref());
        let disks = record.iter().flat_map(|record| &record.disks);
        let paths: BTreeSet<String> =
            disks.filter(|disk| !disk.optional && disk.path.starts_with('/')).map(|disk| disk.path.clone()).collect();
        let paths = paths.into_iter().collect();
        self.vm(id).unreachable = Some(Unreachable { paths, since: now, asked: None, again: now + LOOK });
    }

    /// Once per beat.
    pub(super) fn look_for_access(&mut self, cx: &mut Cx) {
        for (id, vm) in &mut self.vms {
            let Some(disks) = &mut vm.unreachable else { continue };
            let most = if disks.paths.is_empty() { BLIND } else { LATEST };
            if most <= cx.now.since(disks.since) {
                vm.unreachable = None;
                (self.tell, self.look) = (true, true);
            } else if disks.asked.is_none() && disks.again <= cx.now && !disks.paths.is_empty() {
                disks.asked = Some(cx.probe_access(disks.paths.clone(), LOOK, Pending::Access(*id)));
            }
        }
    }

    pub(super) fn access_looked(&mut self, cx: &mut Cx, id: VmId, ticket: Ticket, result: &Result<(), String>) {
        let Some(disks) = self.vms.get_mut(&id).and_then(|vm| vm.unreachable.as_mut()) else { return };
        if disks.asked != Some(ticket) {
            return;
        }
        (disks.asked, disks.again) = (None, cx.now + LOOK);
        if result.is_ok() {
            self.vm(id).unreachable = None;
            (self.tell, self.look) = (true, true);
        }
    }

    /// VMs whose disks this host could not open, and has not read since.
    pub(super) fn unreachable_here(&self) -> Vec<VmId> {
        self.vms.iter().filter(|(_, vm)| vm.unreachable.is_some()).map(|(id, _)| *id).collect()
    }

    /// Whether a host, which could not open the disks of a VM, says nothing of that any more.
    pub(super) fn reaches_disks(&self, host: HostId, id: VmId) -> bool {
        if host == self.me.host {
            return self.vms.get(&id).is_none_or(|vm| vm.unreachable.is_none());
        }
        let report = self.peers.get(&host).and_then(|peer| peer.report.as_ref());
        report.is_some_and(|report| !report.unreachable.contains(&id))
    }
}
