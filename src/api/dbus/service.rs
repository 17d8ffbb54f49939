//! The interface `org.mainstay.Agent1`: parses arguments, asks the agent, answers. Structured answers are JSON text, the
//! same as the CLI's `--json`.
//!
//! ```text
//! caller gone, agent busy, no answer in time ──► org.mainstay.Error.Failed
//! the agent says no                          ──► org.mainstay.Error.Denied
//! argument that cannot be understood         ──► org.mainstay.Error.Usage
//! ```
//!
//! A call that ran out of time may still take effect; its error says so.

#![allow(clippy::too_many_arguments)] // Those of the signal are written out flat by zbus.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use zbus::object_server::SignalEmitter;

use super::{Ask, AskMessage, AskReply, resolve};
use crate::types::control::{Mover, VmCommand};
use crate::types::failure::{FailureAsk, FailureFile};
use crate::types::settings::OnDoubt;
use crate::types::verdict::VerdictAsk;
use crate::types::view::ClusterView;
use crate::types::{HostId, VmId};

/// Questions that the agent answers from memory.
const ASK_TIME: Duration = Duration::from_secs(10);
/// The doctor waits for slow storage itself.
const DOCTOR_TIME: Duration = Duration::from_secs(45);
/// Starting or stopping a VM, or a change of the settings: waits for locks, fences and guests.
const CHANGE_TIME: Duration = Duration::from_secs(300);
/// libvirt, perhaps on another host, changes a definition and plugs a device in.
const PORT_TIME: Duration = Duration::from_secs(40);
/// A live migration copies all memory.
const MOVE_TIME: Duration = Duration::from_secs(4 * 3600);

/// Errors by their D-Bus names.
#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.mainstay.Error")]
pub enum Failure {
    /// From D-Bus itself.
    #[zbus(error)]
    ZBus(zbus::Error),
    /// The agent says no; nothing was changed.
    Denied(String),
    /// No answer; it may still take effect.
    Failed(String),
    /// The argument cannot be understood; nothing was changed.
    Usage(String),
}

/// The object.
#[derive(Debug)]
pub struct Agent1 {
    pub(super) asks: mpsc::Sender<AskMessage>,
}

#[zbus::interface(name = "org.mainstay.Agent1")]
impl Agent1 {
    /// The cluster as this agent sees it: JSON of `ClusterView`.
    async fn view(&self) -> Result<String, Failure> {
        json(&self.cluster().await?)
    }

    /// Notes since a clock-of-day time in milliseconds, of a VM and a host or (empty) of all: JSON array.
    async fn notes(&self, since_unix_ms: u64, vm: String, host: String) -> Result<String, Failure> {
        match self.ask(Ask::Notes { since_unix_ms, vm: some(vm), host: some(host) }, ASK_TIME).await? {
            AskReply::Notes(notes) => json(&notes),
            other => Err(unexpected(other)),
        }
    }

    /// The newest verdicts about a VM and a host or (empty) about all, without evidence: JSON array.
    async fn verdicts(&self, vm: String, host: String) -> Result<String, Failure> {
        let ask = VerdictAsk::List { vm: some(vm), host: some(host) };
        match self.ask(Ask::Verdicts(ask), ASK_TIME).await? {
            AskReply::Verdicts(verdicts) => json(&verdicts),
            other => Err(unexpected(other)),
        }
    }

    /// The verdict of this id with its evidence: JSON array of it, empty if no host that answers keeps it.
    async fn verdict(&self, id: String) -> Result<String, Failure> {
        match self.ask(Ask::Verdicts(VerdictAsk::One { id }), ASK_TIME).await? {
            AskReply::Verdicts(verdicts) => json(&verdicts),
            other => Err(unexpected(other)),
        }
    }

    /// All checks: JSON array of findings.
    async fn doctor(&self) -> Result<String, Failure> {
        match self.ask(Ask::Doctor, DOCTOR_TIME).await? {
            AskReply::Findings(findings) => json(&findings),
            other => Err(unexpected(other)),
        }
    }

    /// One VM, by name or UUID, in detail: JSON of `VmView`.
    async fn explain(&self, vm: String) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        match self.ask(Ask::Explain { vm }, ASK_TIME).await? {
            AskReply::Explain(vm) => json(&*vm),
            other => Err(unexpected(other)),
        }
    }

    /// What would become of VMs if hosts of these names failed: JSON of `WhatIfView`.
    async fn what_if(&self, hosts: Vec<String>) -> Result<String, Failure> {
        match self.ask(Ask::WhatIf { hosts }, ASK_TIME).await? {
            AskReply::WhatIf(view) => json(&*view),
            other => Err(unexpected(other)),
        }
    }

    /// Failures of a VM, by name or UUID, that hosts have kept: JSON of `FailureList`.
    async fn failures(&self, vm: String) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        match self.ask(Ask::Failures { vm }, ASK_TIME).await? {
            AskReply::Failures(list) => json(&list),
            other => Err(unexpected(other)),
        }
    }

    /// A part of a file of a failure, by its host, VM, number, the file's name and the first byte wanted: bytes, none at the
    /// end, and the whole length.
    async fn failure_piece(
        &self,
        host: String,
        vm: String,
        number: u32,
        file: String,
        from: u64,
    ) -> Result<(Vec<u8>, u64), Failure> {
        let unknown = || Failure::Usage(format!("{file} is no file of a failure"));
        let file = FailureFile::named(&file).ok_or_else(unknown)?;
        let (host, vm) = (self.host(&host).await?, self.vm(&vm).await?);
        let ask = FailureAsk::Piece { vm, number, file, from };
        match self.ask(Ask::FailurePiece { host, ask }, ASK_TIME).await? {
            AskReply::Piece(piece) => Ok((piece.bytes, piece.total)),
            AskReply::Failed(why) => Err(Failure::Failed(why)),
            other => Err(unexpected(other)),
        }
    }

    /// The VM, by name or UUID, should run.
    async fn vm_start(&self, vm: String) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        self.done(Ask::Vm(VmCommand::Start { vm }), CHANGE_TIME).await
    }

    /// Starts of the VM, by name or UUID, have failed: it is tried again now.
    async fn vm_retry(&self, vm: String) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        self.done(Ask::Vm(VmCommand::Retry { vm }), CHANGE_TIME).await
    }

    /// The VM should not run; `force` ends it at once.
    async fn vm_stop(&self, vm: String, force: bool) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        self.done(Ask::Vm(VmCommand::Stop { vm, force }), CHANGE_TIME).await
    }

    /// What is done with the VM while its lease is in doubt: pause, run-until-stop; empty = the cluster's default.
    async fn vm_set_on_doubt(&self, vm: String, on_doubt: String) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        let on_doubt = match some(on_doubt) {
            None => None,
            Some(name) => {
                let unknown = || Failure::Usage(format!("{name} is neither pause nor run-until-stop"));
                Some(OnDoubt::named(&name).ok_or_else(unknown)?)
            }
        };
        self.done(Ask::Vm(VmCommand::SetOnDoubt { vm, on_doubt }), CHANGE_TIME).await
    }

    /// The VM is given the port of Mainstay's agent inside: in its definition, and plugged in if it runs.
    async fn vm_enable_guest(&self, vm: String) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        self.done(Ask::EnableGuest { vm }, PORT_TIME).await
    }

    /// Live migration to a host, by name or id; empty = the best one.
    async fn vm_move(&self, vm: String, to: String) -> Result<String, Failure> {
        let vm = self.vm(&vm).await?;
        let to = match some(to) {
            None => None,
            Some(name) => Some(self.host(&name).await?),
        };
        self.done(Ask::Vm(VmCommand::Move { vm, to, by: Mover::Person }), MOVE_TIME).await
    }

    /// This host's VMs are moved away, for as long as this is asked again; `for_shutdown`: if that is the policy before it goes down. JSON
    /// of `EvacuationView`.
    async fn evacuate(&self, for_shutdown: bool) -> Result<String, Failure> {
        match self.ask(Ask::Evacuate { for_shutdown }, ASK_TIME).await? {
            AskReply::Evacuating(view) => json(&*view),
            other => Err(unexpected(other)),
        }
    }

    /// A change of the cluster's settings: JSON of `SettingsChange`.
    async fn change(&self, change: String) -> Result<String, Failure> {
        let change = serde_json::from_str(&change).map_err(|error| Failure::Usage(format!("not a change: {error}")))?;
        self.done(Ask::Change(Box::new(change)), CHANGE_TIME).await
    }

    /// Whether a fence device, by its name, answers this host: its status, one line. Switches nothing.
    async fn test_fence_device(&self, name: String) -> Result<String, Failure> {
        self.done(Ask::TestFenceDevice { name }, DOCTOR_TIME).await
    }

    /// Version of the agent.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    /// Something happened; `vm` is empty when no VM is concerned, `verdict` when it tells none.
    #[zbus(signal)]
    pub(super) async fn note(
        emitter: &SignalEmitter<'_>,
        kind: &str,
        level: &str,
        host: &str,
        vm: &str,
        text: &str,
        unix_ms: u64,
        verdict: &str,
    ) -> zbus::Result<()>;
}

impl Agent1 {
    async fn ask(&self, ask: Ask, time: Duration) -> Result<AskReply, Failure> {
        let (answer, reply) = oneshot::channel();
        self.asks.try_send(AskMessage { ask, answer }).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => {
                Failure::Failed("the agent is busy with other questions; nothing was changed, try again".to_owned())
            }
            mpsc::error::TrySendError::Closed(_) => {
                Failure::Failed("the agent is stopping; nothing was changed".to_owned())
            }
        })?;
        match tokio::time::timeout(time, reply).await {
            Ok(Ok(AskReply::Denied(denial))) => Err(Failure::Denied(denial.to_string())),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => {
                Err(Failure::Failed("the agent gave no answer; what was asked may still take effect".to_owned()))
            }
            Err(_) => Err(Failure::Failed(format!(
                "no answer within {} s; what was asked may still take effect",
                time.as_secs()
            ))),
        }
    }

    async fn done(&self, ask: Ask, time: Duration) -> Result<String, Failure> {
        match self.ask(ask, time).await? {
            AskReply::Done(line) => Ok(line),
            AskReply::Failed(why) => Err(Failure::Failed(why)),
            other => Err(unexpected(other)),
        }
    }

    async fn cluster(&self) -> Result<ClusterView, Failure> {
        match self.ask(Ask::View, ASK_TIME).await? {
            AskReply::View(view) => Ok(*view),
            other => Err(unexpected(other)),
        }
    }

    async fn vm(&self, wanted: &str) -> Result<VmId, Failure> {
        if let Ok(id) = wanted.parse() {
            return Ok(id);
        }
        let view = self.cluster().await?;
        resolve::vm(&view, wanted).map(|vm| vm.id).map_err(|unknown| Failure::Usage(unknown.to_string()))
    }

    async fn host(&self, wanted: &str) -> Result<HostId, Failure> {
        if let Ok(id) = wanted.parse() {
            return Ok(id);
        }
        let view = self.cluster().await?;
        resolve::host(&view, wanted).map(|host| host.id).map_err(|unknown| Failure::Usage(unknown.to_string()))
    }
}

fn some(text: String) -> Option<String> {
    if text.is_empty() { None } else { Some(text) }
}

fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|error| Failure::Failed(format!("the answer cannot be written: {error}")))
}

/// The agent answered another question than was asked: our own fault, but the caller only needs to know that nothing
/// can be concluded.
fn unexpected(reply: AskReply) -> Failure {
    Failure::Failed(match reply {
        AskReply::Denied(denial) => denial.to_string(),
        AskReply::View(_)
        | AskReply::Notes(_)
        | AskReply::Verdicts(_)
        | AskReply::Findings(_)
        | AskReply::Done(_)
        | AskReply::Failed(_)
        | AskReply::Explain(_)
        | AskReply::WhatIf(_)
        | AskReply::Evacuating(_)
        | AskReply::Failures(_)
        | AskReply::Piece(_) => "the agent answered another question".to_owned(),
    })
}
