//! systemd units that fail, told by systemd over the system's message bus. Its private socket would do without a bus, but what it
//! says there has a sender that D-Bus does not allow, and is refused.
//!
//! ```text
//!   AddMatch, Subscribe ──► ListUnitsByPatterns(failed, those that are watched) ──► Units { failed } ──► the loop tells what is new
//!                                  ▲          at most twice a second                     │
//!                                  └──────────── any signal ◄────────────────────────────┘
//! ```
//!
//! Without systemd, or a bus, nothing is watched; they are looked for again each second: early in a boot there is none yet.

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

const SOCKET: &str = "/run/dbus/system_bus_socket";
const BUS: &str = "org.freedesktop.DBus";
const RULE: &str = "type='signal',sender='org.freedesktop.systemd1',path_namespace='/org/freedesktop/systemd1'";
const SYSTEMD: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// Between two tries to reach systemd.
const RETRY: Duration = Duration::from_secs(1);
/// Between two lists.
const PAUSE: Duration = Duration::from_millis(500);

/// One unit of a list: name, description, load, active and sub state, followed unit, path, job id, type and path.
type Unit = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// Watches for ever, on a thread of its own.
pub fn run(patterns: &[String], to: &Sender) {
    loop {
        let ended = zbus::block_on(watch(patterns, to));
        let why =
            ended.err().map_or_else(|| "the message bus has ended the connection".to_owned(), |why| why.to_string());
        if !to.send(Happened::UnitsLost(why)) {
            return;
        }
        std::thread::sleep(RETRY);
    }
}

/// On two connections: one whose signals are not taken for a while does not read answers either, and in a boot there are hundreds.
async fn watch(patterns: &[String], to: &Sender) -> zbus::Result<()> {
    let asks = Builder::unix_stream(UnixStream::connect(SOCKET)?).build().await?;
    let hears = Builder::unix_stream(UnixStream::connect(SOCKET)?).build().await?;
    hears.call_method(Some(BUS), "/org/freedesktop/DBus", Some(BUS), "AddMatch", &RULE).await?;
    hears.call_method(Some(SYSTEMD), PATH, Some(MANAGER), "Subscribe", &()).await?;
    let mut messages = MessageStream::from(&hears);
    loop {
        let failed = failed(&asks, patterns).await?;
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
    let answer = connection.call_method(Some(SYSTEMD), PATH, Some(MANAGER), "ListUnitsByPatterns", &wanted).await?;
    let units: Vec<Unit> = answer.body().deserialize()?;
    Ok(units.into_iter().map(|unit| unit.0).collect())
}
