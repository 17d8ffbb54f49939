//! Failures of guests lie on the hosts that saw them: every member is asked past the core, by people. Decides nothing.
//!
//! ```text
//!   person ── Failures ──► this host's, and those of all members that are heard ──► one list, and who did not answer
//!          └─ FailurePiece ──► the host that keeps it
//! ```

use std::sync::Arc;

use tokio::sync::oneshot;

use super::executors::Executors;
use crate::api::dbus::AskReply;
use crate::core::Core;
use crate::exec::clock;
use crate::exec::failures::Failures;
use crate::types::control::{Denial, Reply};
use crate::types::failure::{FailureAsk, FailureList};
use crate::types::{HostId, VmId};

/// Answers a question about what is kept here, on a thread: the disk may be slow.
pub(crate) fn answer(failures: Arc<Failures>, ask: FailureAsk, answer: impl FnOnce(Reply) + Send + 'static) {
    let read = move || {
        answer(match ask {
            FailureAsk::List { vm } => Reply::Failures(failures.list(vm)),
            FailureAsk::Piece { vm, number, file, from } => match failures.piece(vm, number, file, from) {
                Ok(piece) => Reply::Piece(piece),
                Err(why) => Reply::Denied(Denial::Unable(why.to_string())),
            },
        });
    };
    // Without a thread the question is dropped, and whoever asked hears of that.
    if let Err(error) = std::thread::Builder::new().name("failures".into()).spawn(read) {
        tracing::warn!("failures of guests cannot be read: no thread: {error}");
    }
}

/// Those of all members that answer in time.
pub(crate) fn gather(vm: VmId, told: oneshot::Sender<AskReply>, core: &Core, executors: &Executors) {
    let (me, heard) = (executors.me(), core.heard_hosts(clock::now()));
    let mut list = FailureList::default();
    let mut waiting = Vec::new();
    for member in &core.settings().members {
        if member.host == me || heard.contains(&member.host) {
            waiting.push((member.name.clone(), ask(member.host, FailureAsk::List { vm }, executors)));
        } else {
            list.silent.push(format!("{}: not heard", member.name));
        }
    }
    tokio::spawn(async move {
        for (name, reply) in waiting {
            match reply.await {
                Ok(Ok(Reply::Failures(failures))) => list.failures.extend(failures),
                Ok(Ok(Reply::Denied(why))) => list.silent.push(format!("{name}: {why}")),
                Ok(Ok(other)) => list.silent.push(format!("{name}: an answer of the wrong kind: {other:?}")),
                Ok(Err(why)) => list.silent.push(format!("{name}: {why}")),
                Err(_) => list.silent.push(format!("{name}: no answer")),
            }
        }
        list.failures.sort_by(|a, b| (a.unix_ms, &a.host, a.number).cmp(&(b.unix_ms, &b.host, b.number)));
        let _ = told.send(AskReply::Failures(list));
    });
}

/// A part of a file, from the host that keeps it.
pub(crate) fn piece(host: HostId, question: FailureAsk, told: oneshot::Sender<AskReply>, executors: &Executors) {
    let reply = ask(host, question, executors);
    tokio::spawn(async move {
        let _ = told.send(match reply.await {
            Ok(Ok(Reply::Piece(piece))) => AskReply::Piece(piece),
            Ok(Ok(Reply::Denied(why))) => AskReply::Failed(why.to_string()),
            Ok(Ok(other)) => AskReply::Failed(format!("an answer of the wrong kind: {other:?}")),
            Ok(Err(why)) => AskReply::Failed(why),
            Err(_) => AskReply::Failed("no answer".to_owned()),
        });
    });
}

fn ask(host: HostId, ask: FailureAsk, executors: &Executors) -> oneshot::Receiver<Result<Reply, String>> {
    let (sender, receiver) = oneshot::channel();
    let told = move |reply| {
        let _ = sender.send(reply);
    };
    if host == executors.me() {
        answer(executors.failures(), ask, |reply| told(Ok(reply)));
    } else {
        executors.ask_about_failures(host, ask, told);
    }
    receiver
}
