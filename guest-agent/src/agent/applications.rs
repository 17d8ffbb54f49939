//! What applications of this guest want, and what they are told.
//!
//! ```text
//!   report ──► queue ──► kept on disk, or answered by the host ──► "accepted" ──► (with "wait") the host's answers
//! ```

use std::time::Instant;

use super::Agent;
use super::socket::ClientId;
use super::words::{Heartbeat, Reply, Request, Status, Wanted};

impl Agent {
    pub(super) fn wanted(&mut self, now: Instant, client: ClientId, request: Request) {
        let reply = match request {
            Request::Report(wanted) => return self.reported(client, wanted),
            Request::Heartbeat(heartbeat) => {
                match heartbeat {
                    Heartbeat::Enable => self.active = Some(now),
                    Heartbeat::MarkActive => self.active = self.active.map(|_| now),
                    Heartbeat::Disable => self.active = None,
                }
                let was = std::mem::take(&mut self.silent);
                if was {
                    self.send_beat();
                }
                match (heartbeat, self.active) {
                    (Heartbeat::MarkActive, None) => {
                        Reply::Error("the heartbeat is not enabled: enable it first".into())
                    }
                    _ => Reply::Ok,
                }
            }
            Request::Ready(ready) => {
                if std::mem::replace(&mut self.ready, ready) != ready {
                    self.send_beat();
                }
                Reply::Ok
            }
            Request::Status => Reply::Status(self.status()),
        };
        self.reply(client, &reply);
    }

    fn reported(&mut self, client: ClientId, wanted: Wanted) {
        let Wanted { severity, kind, message, ask, wait } = wanted;
        let report = self.report(severity, &kind, &message, ask);
        if let Err(why) = report.check() {
            return self.reply(client, &Reply::Error(why.to_string()));
        }
        let sequence = report.sequence;
        if wait {
            self.waits.insert(sequence, client);
        }
        self.push(report);
        self.unkept.push((self.queue.changes(), sequence, client));
    }

    pub(super) fn accepted(&mut self, client: ClientId, sequence: u64) {
        self.reply(client, &Reply::Accepted { sequence });
    }

    pub(super) fn reply(&mut self, client: ClientId, reply: &Reply) {
        if let Some(socket) = &mut self.socket {
            socket.reply(client, reply);
        }
    }

    fn status(&self) -> Status {
        let name = |(place, why): (&usize, &String)| (self.config.checks[*place].name.clone(), why.clone());
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.port.host_is_there(),
            vm: self.vm.clone(),
            trouble: self.port.trouble().map(str::to_owned),
            waiting: self.queue.reports().count(),
            dropped: self.queue.dropped(),
            application: self.application(),
            ready: self.ready,
            frozen: self.frozen,
            failed_units: self.failed_units.iter().cloned().collect(),
            failing_checks: self.failing.iter().map(name).collect(),
            configuration: self.misconfigured.clone(),
        }
    }
}
