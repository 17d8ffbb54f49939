//! A person gives a guest the port of Mainstay's agent: by the host that has it. Decides nothing.
//!
//! ```text
//!   person ── EnableGuest ──► the host that has the VM, which may be this one ── libvirt ──► definition, running VM
//! ```

use tokio::sync::oneshot;

use super::executors::Executors;
use crate::api::dbus::AskReply;
use crate::core::Core;
use crate::exec::clock;
use crate::exec::libvirt::{Port, text_of};
use crate::types::control::{Denial, Reply};
use crate::types::vm::DomainFailure;
use crate::types::{HostId, VmId};

/// Asks the host that has the VM.
pub(crate) fn enable(vm: VmId, told: oneshot::Sender<AskReply>, core: &Core, executors: &Executors) {
    let host = match host_of(vm, core) {
        Ok(host) => host,
        Err(denial) => {
            let _ = told.send(AskReply::Denied(denial));
            return;
        }
    };
    executors.enable_port(host, vm, move |reply| {
        let _ = told.send(match reply {
            Ok(Reply::Done) => {
                AskReply::Done("has the port of Mainstay's agent; now install mainstay-guest in it".into())
            }
            Ok(Reply::AlreadySo) => AskReply::Done("it was so already".into()),
            Ok(Reply::Denied(Denial::Unable(why))) | Err(why) => AskReply::Failed(why),
            Ok(Reply::Denied(denial)) => AskReply::Denied(denial),
            Ok(other) => AskReply::Failed(format!("an answer of the wrong kind: {other:?}")),
        });
    });
}

fn host_of(vm: VmId, core: &Core) -> Result<HostId, Denial> {
    let view = core.view(clock::now());
    let found = view.vms.into_iter().find(|one| one.id == vm).ok_or(Denial::UnknownVm)?;
    let name = found.host.ok_or_else(|| Denial::Unable("no host has it; start it first".into()))?;
    let member = core.settings().members.iter().find(|member| member.name == name);
    member.map(|member| member.host).ok_or_else(|| Denial::Unable(format!("its host {name} is no member")))
}

/// In the words of agents.
pub(crate) fn reply_of(result: Result<Port, DomainFailure>) -> Reply {
    match result {
        Ok(Port::Added) => Reply::Done,
        Ok(Port::AlreadySo) => Reply::AlreadySo,
        Ok(Port::AtNextStart(why)) => Reply::Denied(Denial::Unable(format!(
            "its definition has the port now, but the VM that runs could not be given it ({why}): it has it when it was shut \
             down and started again"
        ))),
        Err(why) => Reply::Denied(Denial::Unable(format!("libvirt: {}", text_of(&why)))),
    }
}
