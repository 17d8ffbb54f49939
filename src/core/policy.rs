//! The policy of one VM. It stands in its definition (libvirt's metadata, so that `virsh edit` and others keep it), and so in
//! its record: whoever takes the VM over knows it.
//!
//! ```text
//!   vm set ──► the host that has its definition ──► libvirt ──► listed anew ──► record and claim (`definitions`)
//! ```
//!
//! Deliberately not here: what follows from it (`doubt`).

use std::time::Duration;

use super::Core;
use super::cx::{Cx, Pending};
use super::event::AskId;
use super::vms::Vm;
use crate::types::control::{Denial, Reply, Request, VmCommand};
use crate::types::settings::OnDoubt;
use crate::types::vm::{DomainAnswer, DomainOrder};
use crate::types::{HostId, VmId};

/// libvirt's time for the change.
const CALL: Duration = Duration::from_secs(20);

impl Core {
    /// A person says what is done with this VM in doubt; none = what the cluster's default says.
    pub(super) fn set_on_doubt(
        &mut self,
        cx: &mut Cx,
        ask: AskId,
        from: Option<HostId>,
        id: VmId,
        on_doubt: Option<OnDoubt>,
    ) {
        let Some(domain) = self.libvirt.domains.get(&id) else {
            let defined = |host: &HostId| self.report_of(*host, id).is_some_and(|report| report.domain.is_some());
            let Some(host) = self.peers.keys().copied().find(defined) else {
                let why = "no host that is heard has its definition; start it first".to_owned();
                return cx.answer(ask, Reply::Denied(Denial::Unable(why)));
            };
            return self.forward(cx, ask, from, Some(host), Request::Vm(VmCommand::SetOnDoubt { vm: id, on_doubt }));
        };
        if !domain.persistent {
            let why = "it has no definition that could keep it; define it first".to_owned();
            return cx.answer(ask, Reply::Denied(Denial::Unable(why)));
        }
        if self.vm(id).own_on_doubt() == Some(on_doubt) {
            return cx.answer(ask, Reply::AlreadySo);
        }
        cx.domain(DomainOrder::SetOnDoubt { vm: id, on_doubt }, CALL, Pending::Policy(ask));
    }

    pub(super) fn policy_set(&mut self, cx: &mut Cx, ask: AskId, answer: &DomainAnswer) {
        self.list_domains(cx); // Its definition has changed: it is recorded.
        match answer {
            DomainAnswer::Done | DomainAnswer::Listed(_) => cx.answer(ask, Reply::Done),
            DomainAnswer::Failed(why) => {
                let why = format!("libvirt does not change its definition: {why:?}");
                cx.answer(ask, Reply::Denied(Denial::Unable(why)));
            }
        }
    }

    /// What is done with it in doubt, for people. `own`: what its definition says.
    pub(super) fn on_doubt_text(&self, own: Option<OnDoubt>) -> String {
        match own {
            Some(own) => own.name().to_owned(),
            None => format!("{} (default)", self.settings.vms.on_doubt.name()),
        }
    }
}

impl Vm {
    /// What its definition here says; none = it is not known here.
    pub(super) fn own_on_doubt(&self) -> Option<Option<OnDoubt>> {
        self.record.as_ref().and_then(|record| record.as_ref().ok()).map(|record| record.on_doubt)
    }
}
