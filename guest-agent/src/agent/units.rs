//! systemd units that fail, told by systemd itself over its private socket: no message bus is needed.
//!
//! ```text
//!   Subscribe ──► ListUnitsByPatterns(failed, those that are watched) ──► Units { failed } ──► the loop tells what is new
//!                        ▲          at most twice a second                     │
//!                        └──────────── any signal ◄────────────────────────────┘
//! ```
//!
//! Without systemd the socket is not there, and nothing is watched; it is looked for again each half minute.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::time::Duration;

use futures_core::Stream;
use zbus::connection::Builder;
use zbus::message::Type;

use zbus::{Connection, MessageStream, OwnedObjectPath};

use super::Happened;
use super::wake::Sender;

const SOCKET: &str = "/run/systemd/private";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// Between two tries to reach systemd.
const RETRY: Duration = Duration::from_secs(30);
/// Between two lists.
const PAUSE: Duration = Duration::from_millis(500);

/// One unit of a list: name, description, load, active and sub state, followed unit, path, job id, type and path.
type Unit = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// Watches for ever, on a thread of its own.
pub fn run(patterns: &[String], to: &Sender) {
    loop {
        let ended = zbus::block_on(watch(patterns, to));
        let why = ended.err().map_or_else(|| "systemd has ended the connection".to_owned(), |why| why.to_string());
        if !to.send(Happened::UnitsLost(why)) {
            return;
        }
        std::thread::sleep(RETRY);
    }
}

async fn watch(patterns: &[String], to: &Sender) -> zbus::Result<()> {
    let socket = UnixStream::connect(SOCKET)?;
    let connection = Builder::unix_stream(socket).p2p().build().await?;
    let mut messages = MessageStream::from(&connection);
    connection.call_method(None::<&str>, PATH, Some(MANAGER), "Subscribe", &()).await?;
    loop {
        let failed = failed(&connection, patterns).await?;
        if !to.send(Happened::Units(failed)) {
            return Ok(());
        }
        loop {
            let next = poll_fn(|context| Pin::new(&mut messages).poll_next(context)).await;
            let Some(message) = next.transpose()? else { return Ok(()) };
            if message.message_type() == Type::Signal {
                break;
            }
        }
        std::thread::sleep(PAUSE); // This thread does nothing else; what comes meanwhile waits.
    }
}

async fn failed(connection: &Connection, patterns: &[String]) -> zbus::Result<BTreeSet<String>> {
    let wanted = (&["failed"][..], patterns);
    let answer = connection.call_method(None::<&str>, PATH, Some(MANAGER), "ListUnitsByPatterns", &wanted).await?;
    let units: Vec<Unit> = answer.body().deserialize()?;
    Ok(units.into_iter().map(|unit| unit.0).collect())
}
