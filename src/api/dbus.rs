//! The agent on D-Bus: name `org.mainstay.Agent1`, object `/org/mainstay/Agent1`, interface `org.mainstay.Agent1`.
//!
//! ```text
//! mainstay (CLI), Cockpit, busctl
//!        │ method calls                    ▲ signal Note
//!        ▼                                 │
//!   system bus ── policy file: root may change, everybody may read
//!        │                                 │
//!     service ── AskMessage ──► agent.rs   │ NoteView
//!        ▲ ◄──── AskReply ────────┘ └──────┘ broadcast
//!     serve: connects, takes the name, connects again when the bus was restarted
//! ```
//!
//! Rules in numbers: at most `ASKS_WAITING` questions wait for the agent (the next is answered "busy"); each has a
//! deadline of its own ([`service`]); the bus is tried again after 1 s, then up to every 8 s.
//!
//! Deliberately not here: anything that beats, proofs or starts depend on. With the bus down the cluster goes on; only
//! people cannot ask. Who may call what is the bus's policy file, not code (polkit comes later).

pub mod client;
pub mod resolve;
mod service;

use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot};
use zbus::object_server::SignalEmitter;

use crate::exec::doctor::Finding;
use crate::types::control::{Denial, VmCommand};
use crate::types::failure::{FailureAsk, FailureList, Piece};
use crate::types::settings::SettingsChange;
use crate::types::verdict::{VerdictAsk, VerdictView};
use crate::types::view::{ClusterView, EvacuationView, NoteView, VmView, WhatIfView};
use crate::types::{HostId, VmId};

/// Well-known name on the bus; also the name of the interface.
pub const BUS_NAME: &str = "org.mainstay.Agent1";
/// The one object.
pub const OBJECT_PATH: &str = "/org/mainstay/Agent1";
/// Capacity that the agent should give the channel of questions. When it is full a caller is told "busy" at once.
pub const ASKS_WAITING: usize = 64;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// Which bus.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Bus {
    /// The system's, or the one that `DBUS_SYSTEM_BUS_ADDRESS` names.
    System,
    /// One at this D-Bus address, for tests.
    Address(String),
}

impl Bus {
    fn builder(&self) -> zbus::connection::Builder<'_> {
        match self {
            Self::System => zbus::connection::Builder::system(),
            Self::Address(address) => zbus::connection::Builder::address(address.as_str()),
        }
    }
}

/// What people ask the agent. Forming and joining a cluster is not asked: the CLI does it as root, without an agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ask {
    /// The cluster as this agent sees it.
    View,
    /// Notes not older than this clock-of-day time, of all VMs and hosts or of one.
    Notes {
        /// Milliseconds since 1970; 0 = all that are kept.
        since_unix_ms: u64,
        /// Name of a VM.
        vm: Option<String>,
        /// Name of a host.
        host: Option<String>,
    },
    /// Verdicts of all hosts.
    Verdicts(VerdictAsk),
    /// All checks, with cures.
    Doctor,
    /// A wish about a VM.
    Vm(VmCommand),
    /// A change of the cluster's settings.
    Change(Box<SettingsChange>),
    /// Whether a fence device, by its name, answers this host.
    TestFenceDevice {
        /// Which.
        name: String,
    },
    /// One VM in detail.
    Explain {
        /// Which.
        vm: VmId,
    },
    /// What would become of VMs if hosts, by name, failed.
    WhatIf {
        /// Which.
        hosts: Vec<String>,
    },
    /// This host is to be emptied, for as long as this is asked again.
    Evacuate {
        /// If that is the policy before it goes down.
        for_shutdown: bool,
    },
    /// Gives a VM the port of Mainstay's agent inside.
    EnableGuest {
        /// Which.
        vm: VmId,
    },
    /// Failures of a VM that hosts have kept.
    Failures {
        /// Which.
        vm: VmId,
    },
    /// A part of a file of one.
    FailurePiece {
        /// The host that keeps it.
        host: HostId,
        /// What of it; a `Piece`.
        ask: FailureAsk,
    },
}

/// A question and where its answer goes. Dropping `answer` tells the caller that the agent gave none.
#[derive(Debug)]
pub struct AskMessage {
    /// The question.
    pub ask: Ask,
    /// May be closed already: the caller waited no longer.
    pub answer: oneshot::Sender<AskReply>,
}

/// The agent's answer.
#[derive(Clone, PartialEq, Debug)]
pub enum AskReply {
    /// Of `View`.
    View(Box<ClusterView>),
    /// Of `Notes`, oldest first.
    Notes(Vec<NoteView>),
    /// Of `Verdicts`, oldest first.
    Verdicts(Vec<VerdictView>),
    /// Of `Doctor`.
    Findings(Vec<Finding>),
    /// Done, or so already; one line for people.
    Done(String),
    /// It was tried and failed; one line for people.
    Failed(String),
    /// Not done, and nothing was changed by it.
    Denied(Denial),
    /// Of `Explain`.
    Explain(Box<VmView>),
    /// Of `WhatIf`.
    WhatIf(Box<WhatIfView>),
    /// Of `Evacuate`.
    Evacuating(Box<EvacuationView>),
    /// Of `Failures`.
    Failures(FailureList),
    /// Of `FailurePiece`.
    Piece(Piece),
}

/// Why `serve` gave up.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No later try can help.
    #[error("the D-Bus address {address} cannot be used: {why}")]
    Address {
        /// As given.
        address: String,
        /// From the parser.
        why: String,
    },
}

/// Serves the agent on `bus` until the receiver of `asks` or the sender of `notes` is gone. A bus that is not up yet,
/// a lost connection and a name that somebody else holds are tried again for ever.
///
/// # Errors
/// Only when the address of the bus can never work.
pub async fn serve(
    bus: Bus,
    asks: mpsc::Sender<AskMessage>,
    mut notes: broadcast::Receiver<NoteView>,
) -> Result<(), ServeError> {
    let mut pause = FIRST_PAUSE;
    let mut said = String::new();
    loop {
        let served = service::Agent1 { asks: asks.clone() };
        match bus.builder().serve_at(OBJECT_PATH, served).name(BUS_NAME).build().await {
            Ok(connection) => {
                tracing::info!("serving {BUS_NAME} on D-Bus");
                (pause, said) = (FIRST_PAUSE, String::new());
                tokio::select! {
                    () = forward(&connection, &mut notes) => return Ok(()),
                    () = asks.closed() => return Ok(()),
                    () = connection.closed() => tracing::warn!("lost the connection to D-Bus; connecting again"),
                }
            }
            Err(zbus::Error::Address(why)) => {
                let address = format!("{bus:?}");
                return Err(ServeError::Address { address, why });
            }
            Err(error) => {
                // One line per kind of trouble, not one per try.
                let text = error.to_string();
                if text != said {
                    tracing::warn!("D-Bus cannot be served yet, trying again: {text}");
                    said = text;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = asks.closed() => return Ok(()),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Emits every note as a signal; returns when the agent is gone. A failed emission is not tried again: who needs every
/// note asks with `Notes`.
async fn forward(connection: &zbus::Connection, notes: &mut broadcast::Receiver<NoteView>) {
    let Ok(emitter) = SignalEmitter::new(connection, OBJECT_PATH) else { return };
    loop {
        match notes.recv().await {
            Ok(note) => {
                let vm = note.vm.as_deref().unwrap_or("");
                let verdict = note.verdict.as_deref().unwrap_or("");
                let (kind, level, host, text) = (&note.kind, &note.level, &note.host, &note.text);
                let sent = service::Agent1::note(&emitter, kind, level, host, vm, text, note.unix_ms, verdict);
                if let Err(error) = sent.await {
                    tracing::debug!("a note was not signalled: {error}");
                }
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::warn!("{missed} notes were not signalled on D-Bus: too many at once");
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}
