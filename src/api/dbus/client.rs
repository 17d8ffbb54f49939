//! The caller's side: what the CLI uses. Every call has a deadline a little longer than the agent's own.
//!
//! Deliberately not here: trying again. A person sees the error and decides.

use std::pin::Pin;
use std::time::Duration;

use futures_core::Stream;
use serde::de::DeserializeOwned;

use super::Bus;
use crate::exec::doctor::Finding;
use crate::types::failure::{Failure, FailureFile, FailureList};
use crate::types::settings::{OnDoubt, SettingsChange};
use crate::types::verdict::VerdictView;
use crate::types::view::{ClusterView, EvacuationView, NoteView, VmView, WhatIfView};

/// Connecting and questions that the agent answers from memory.
const QUESTION_TIME: Duration = Duration::from_secs(15);
const DOCTOR_TIME: Duration = Duration::from_secs(60);
const CHANGE_TIME: Duration = Duration::from_secs(310);
const MOVE_TIME: Duration = Duration::from_secs(4 * 3600 + 10);

/// Longer than any file of a failure, in bytes.
const MAX_FILE: usize = 64 * 1024 * 1024;

/// Why the agent did not do what was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AgentError {
    /// No bus, or no agent on it.
    #[error("{0}")]
    Unreachable(String),
    /// The bus does not let this user ask for it.
    #[error("only root may do that: the D-Bus policy org.mainstay.Agent1.conf refused the call")]
    NotRoot,
    /// The agent refused; nothing was changed.
    #[error("{0}")]
    Denied(String),
    /// The argument means nothing to the agent; nothing was changed.
    #[error("{0}")]
    Usage(String),
    /// Anything else, in its own words.
    #[error("{0}")]
    Failed(String),
}

#[zbus::proxy(
    interface = "org.mainstay.Agent1",
    default_service = "org.mainstay.Agent1",
    default_path = "/org/mainstay/Agent1"
)]
trait Agent1 {
    async fn view(&self) -> zbus::Result<String>;
    async fn notes(&self, since_unix_ms: u64, vm: &str, host: &str) -> zbus::Result<String>;
    async fn verdicts(&self, vm: &str, host: &str) -> zbus::Result<String>;
    async fn verdict(&self, id: &str) -> zbus::Result<String>;
    async fn doctor(&self) -> zbus::Result<String>;
    async fn explain(&self, vm: &str) -> zbus::Result<String>;
    async fn what_if(&self, hosts: &[&str]) -> zbus::Result<String>;
    async fn failures(&self, vm: &str) -> zbus::Result<String>;
    async fn failure_piece(
        &self,
        host: &str,
        vm: &str,
        number: u32,
        file: &str,
        from: u64,
    ) -> zbus::Result<(Vec<u8>, u64)>;
    async fn vm_start(&self, vm: &str) -> zbus::Result<String>;
    async fn vm_retry(&self, vm: &str) -> zbus::Result<String>;
    async fn vm_stop(&self, vm: &str, force: bool) -> zbus::Result<String>;
    async fn vm_set_on_doubt(&self, vm: &str, on_doubt: &str) -> zbus::Result<String>;
    async fn vm_enable_guest(&self, vm: &str) -> zbus::Result<String>;
    async fn vm_move(&self, vm: &str, to: &str) -> zbus::Result<String>;
    async fn evacuate(&self, for_shutdown: bool) -> zbus::Result<String>;
    async fn change(&self, change: &str) -> zbus::Result<String>;
    async fn test_fence_device(&self, name: &str) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;
    #[zbus(signal)]
    fn note(
        &self,
        kind: &str,
        level: &str,
        host: &str,
        vm: &str,
        text: &str,
        unix_ms: u64,
        verdict: &str,
    ) -> zbus::Result<()>;
}

/// The local agent.
#[derive(Debug)]
pub struct Agent {
    proxy: Agent1Proxy<'static>,
}

impl Agent {
    /// Connects to the bus. That there is an agent shows only when it is asked.
    ///
    /// # Errors
    /// `Unreachable` when there is no bus.
    pub async fn connect(bus: &Bus) -> Result<Self, AgentError> {
        let proxy = async {
            let connection = bus.builder().build().await?;
            let builder = Agent1Proxy::builder(&connection).cache_properties(zbus::proxy::CacheProperties::No);
            builder.build().await
        };
        match tokio::time::timeout(QUESTION_TIME, proxy).await {
            Ok(Ok(proxy)) => Ok(Self { proxy }),
            Ok(Err(error)) => Err(AgentError::Unreachable(format!("no connection to D-Bus: {error}"))),
            Err(_) => Err(AgentError::Unreachable("D-Bus does not answer".to_owned())),
        }
    }

    /// The cluster as the agent sees it.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn view(&self) -> Result<ClusterView, AgentError> {
        parse(&within(QUESTION_TIME, self.proxy.view()).await?)
    }
    /// Notes since a clock-of-day time in milliseconds, of a VM and a host by name, or of all; oldest first.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn notes(&self, since: u64, vm: Option<&str>, host: Option<&str>) -> Result<Vec<NoteView>, AgentError> {
        let notes = self.proxy.notes(since, vm.unwrap_or(""), host.unwrap_or(""));
        parse(&within(QUESTION_TIME, notes).await?)
    }
    /// The newest verdicts about a VM and a host by name, or about all, without evidence; oldest first.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn verdicts(&self, vm: Option<&str>, host: Option<&str>) -> Result<Vec<VerdictView>, AgentError> {
        let verdicts = self.proxy.verdicts(vm.unwrap_or(""), host.unwrap_or(""));
        parse(&within(QUESTION_TIME, verdicts).await?)
    }
    /// The verdict of this id with its evidence.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn verdict(&self, id: &str) -> Result<Option<VerdictView>, AgentError> {
        let found: Vec<VerdictView> = parse(&within(QUESTION_TIME, self.proxy.verdict(id)).await?)?;
        Ok(found.into_iter().next())
    }
    /// All checks.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn doctor(&self) -> Result<Vec<Finding>, AgentError> {
        parse(&within(DOCTOR_TIME, self.proxy.doctor()).await?)
    }
    /// One VM in detail.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn explain(&self, vm: &str) -> Result<VmView, AgentError> {
        parse(&within(QUESTION_TIME, self.proxy.explain(vm)).await?)
    }
    /// What would become of VMs if these hosts failed.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn what_if(&self, hosts: &[&str]) -> Result<WhatIfView, AgentError> {
        parse(&within(QUESTION_TIME, self.proxy.what_if(hosts)).await?)
    }
    /// Failures of a VM that hosts have kept.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn failures(&self, vm: &str) -> Result<FailureList, AgentError> {
        parse(&within(QUESTION_TIME, self.proxy.failures(vm)).await?)
    }
    /// A file of a failure, whole.
    ///
    /// # Errors
    /// As [`AgentError`] says; also when the failure was taken away meanwhile.
    pub async fn failure_file(&self, failure: &Failure, file: FailureFile) -> Result<Vec<u8>, AgentError> {
        let (vm, mut bytes) = (failure.vm.to_string(), Vec::new());
        loop {
            let from = bytes.len() as u64;
            let piece = self.proxy.failure_piece(&failure.host, &vm, failure.number, file.name(), from);
            let (more, total) = within(QUESTION_TIME, piece).await?;
            bytes.extend_from_slice(&more);
            if more.is_empty() || total <= bytes.len() as u64 {
                return Ok(bytes);
            }
            if MAX_FILE < bytes.len() {
                return Err(AgentError::Failed(format!("{} of {} has no end", file.name(), failure.host)));
            }
        }
    }
    /// The VM should run.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn start(&self, vm: &str) -> Result<String, AgentError> {
        within(CHANGE_TIME, self.proxy.vm_start(vm)).await
    }
    /// The VM should not run: its guest is asked to power off.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn stop(&self, vm: &str) -> Result<String, AgentError> {
        within(CHANGE_TIME, self.proxy.vm_stop(vm, false)).await
    }
    /// The VM, whose starts have failed, is tried again now.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn retry(&self, vm: &str) -> Result<String, AgentError> {
        within(CHANGE_TIME, self.proxy.vm_retry(vm)).await
    }
    /// The VM should not run and is ended at once.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn stop_by_force(&self, vm: &str) -> Result<String, AgentError> {
        within(CHANGE_TIME, self.proxy.vm_stop(vm, true)).await
    }
    /// What is done with the VM in doubt; none = the cluster's default.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn set_on_doubt(&self, vm: &str, on_doubt: Option<OnDoubt>) -> Result<String, AgentError> {
        within(CHANGE_TIME, self.proxy.vm_set_on_doubt(vm, on_doubt.map_or("", OnDoubt::name))).await
    }
    /// The VM has the port of Mainstay's agent inside.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn enable_guest(&self, vm: &str) -> Result<String, AgentError> {
        within(CHANGE_TIME, self.proxy.vm_enable_guest(vm)).await
    }
    /// Live migration to a host, or to the best.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn move_to(&self, vm: &str, to: Option<&str>) -> Result<String, AgentError> {
        within(MOVE_TIME, self.proxy.vm_move(vm, to.unwrap_or(""))).await
    }
    /// This host's VMs are moved away, for as long as this is asked again.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn evacuate(&self, for_shutdown: bool) -> Result<EvacuationView, AgentError> {
        parse(&within(QUESTION_TIME, self.proxy.evacuate(for_shutdown)).await?)
    }
    /// A change of the cluster's settings.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn change(&self, change: &SettingsChange) -> Result<String, AgentError> {
        let text = serde_json::to_string(change).map_err(|error| AgentError::Usage(error.to_string()))?;
        within(CHANGE_TIME, self.proxy.change(&text)).await
    }
    /// Whether a fence device answers this host.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn test_fence_device(&self, name: &str) -> Result<String, AgentError> {
        within(DOCTOR_TIME, self.proxy.test_fence_device(name)).await
    }
    /// The agent's version.
    ///
    /// # Errors
    /// As [`AgentError`] says.
    pub async fn version(&self) -> Result<String, AgentError> {
        within(QUESTION_TIME, self.proxy.version()).await
    }

    /// Notes as they are made, from now on.
    ///
    /// # Errors
    /// `Unreachable` when the bus is gone.
    pub async fn follow(&self) -> Result<Follow, AgentError> {
        let notes = within(QUESTION_TIME, self.proxy.receive_note()).await?;
        let owners = within(QUESTION_TIME, self.proxy.inner().receive_owner_changed()).await?;
        Ok(Follow { notes, owners })
    }
}

/// What a follower sees next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Followed {
    /// A note.
    Note(NoteView),
    /// Another agent took the name: the old one was restarted. Notes may have been missed; ask for them.
    NewAgent,
    /// The agent left the bus. It may come back.
    NoAgent,
    /// The bus is gone; nothing more will come.
    End,
}

/// Notes as they are made.
pub struct Follow {
    notes: NoteStream,
    owners: zbus::proxy::OwnerChangedStream<'static>,
}

impl std::fmt::Debug for Follow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Follow")
    }
}

impl Follow {
    /// Waits for the next thing.
    pub async fn next(&mut self) -> Followed {
        loop {
            tokio::select! {
                note = next(&mut self.notes) => {
                    let Some(note) = note else { return Followed::End };
                    // A signal that does not fit is not from an agent that we know.
                    if let Ok(note) = note.args() { return Followed::Note(noted(&note)) }
                }
                owner = next(&mut self.owners) => return match owner {
                    Some(Some(_)) => Followed::NewAgent,
                    Some(None) => Followed::NoAgent,
                    None => Followed::End,
                },
            }
        }
    }
}

fn noted(note: &NoteArgs<'_>) -> NoteView {
    NoteView {
        unix_ms: note.unix_ms,
        host: note.host.to_owned(),
        level: note.level.to_owned(),
        kind: note.kind.to_owned(),
        vm: Some(note.vm.to_owned()).filter(|vm| !vm.is_empty()),
        text: note.text.to_owned(),
        verdict: Some(note.verdict.to_owned()).filter(|verdict| !verdict.is_empty()),
    }
}

async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

async fn within<T>(time: Duration, call: impl Future<Output = zbus::Result<T>>) -> Result<T, AgentError> {
    match tokio::time::timeout(time, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(translate(error)),
        Err(_) => Err(AgentError::Unreachable(format!(
            "the agent gave no answer within {} s; what was asked may still take effect",
            time.as_secs()
        ))),
    }
}

fn translate(error: zbus::Error) -> AgentError {
    let (name, text) = match error {
        zbus::Error::MethodError(name, text, _) => (name.to_string(), text.unwrap_or_default()),
        zbus::Error::FDO(error) => {
            let text = error.to_string();
            match *error {
                zbus::fdo::Error::ServiceUnknown(_) | zbus::fdo::Error::NameHasNoOwner(_) => {
                    ("org.freedesktop.DBus.Error.ServiceUnknown".to_owned(), text)
                }
                zbus::fdo::Error::AccessDenied(_) => ("org.freedesktop.DBus.Error.AccessDenied".to_owned(), text),
                _ => (String::new(), text),
            }
        }
        error @ zbus::Error::InputOutput(_) => return AgentError::Unreachable(format!("lost D-Bus: {error}")),
        other => return AgentError::Failed(other.to_string()),
    };
    match name.as_str() {
        "org.mainstay.Error.Denied" => AgentError::Denied(text),
        "org.mainstay.Error.Usage" => AgentError::Usage(text),
        "org.freedesktop.DBus.Error.AccessDenied" => AgentError::NotRoot,
        "org.freedesktop.DBus.Error.ServiceUnknown" | "org.freedesktop.DBus.Error.NameHasNoOwner" => {
            AgentError::Unreachable("mainstayd is not running on this host (nobody has its D-Bus name)".to_owned())
        }
        "org.freedesktop.DBus.Error.NoReply" | "org.freedesktop.DBus.Error.Disconnected" => AgentError::Unreachable(
            "mainstayd ended before it answered; what was asked may still take effect".to_owned(),
        ),
        _ => AgentError::Failed(text),
    }
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, AgentError> {
    serde_json::from_str(text).map_err(|error| {
        AgentError::Failed(format!("the agent's answer cannot be read ({error}); is it another version?"))
    })
}
