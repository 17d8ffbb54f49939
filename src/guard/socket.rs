//! The socket for the agent. Only root may connect; the newest connection wins.
//!
//! One thread reads orders and answers them in order, one writes reports. An agent that does not read for a while loses
//! its connection, connects again and is told everything anew.
//!
//! Deliberately not here: what orders mean (`orders`).

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};

use super::orders;
use super::shared::Shared;
use super::table::MAX_ROWS;
use crate::types::guard::{GuardMessage, GuardReport};
use crate::wire::frame;

/// How many reports wait for the agent: every row, and as much again. When full the connection ends.
const REPORTS_MAX: usize = 2 * MAX_ROWS;
/// How long the agent may not read.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes the socket.
///
/// # Errors
/// Of the system.
pub fn listen(shared: &Shared) -> io::Result<UnixListener> {
    let path = &shared.paths.socket;
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// Serves for ever.
pub fn serve(shared: &Arc<Shared>, listener: &UnixListener) {
    let mut last: Option<UnixStream> = None;
    for (id, stream) in (1u64..).zip(listener.incoming()) {
        let accepted = stream.and_then(|stream| {
            if !is_root(&stream) {
                return Err(io::Error::other("a connection that is not root's was refused"));
            }
            let old = stream.try_clone()?;
            connect(shared, id, stream)?;
            Ok(old)
        });
        match accepted {
            Ok(stream) => {
                if let Some(old) = last.replace(stream) {
                    drop(old.shutdown(Shutdown::Both)); // It may be gone already.
                }
            }
            Err(error) => {
                tracing::warn!("{}: {error}", shared.paths.socket.display());
                std::thread::sleep(Duration::from_millis(50)); // No descriptors left: do not spin.
            }
        }
    }
}

fn connect(shared: &Arc<Shared>, id: u64, stream: UnixStream) -> io::Result<()> {
    let (to, from) = sync_channel(REPORTS_MAX);
    let writer = stream.try_clone()?;
    writer.set_write_timeout(Some(PATIENCE))?;
    super::spawn(&format!("report-{id}"), move || write(writer, &from))?;
    shared.with(|state, _| state.connect(id, to));
    let shared = Arc::clone(shared);
    super::spawn(&format!("agent-{id}"), move || {
        if let Err(error) = read(&shared, id, &stream) {
            tracing::warn!("agent: {error}");
        }
        drop(stream.shutdown(Shutdown::Both)); // It may be gone already.
        shared.with(|state, _| state.disconnect(id));
    })?;
    Ok(())
}

fn read(shared: &Arc<Shared>, id: u64, stream: &UnixStream) -> Result<(), frame::FrameError> {
    let mut stream = io::BufReader::new(stream);
    while let Some(GuardMessage { ticket, order }) = frame::read(&mut stream)? {
        if !shared.with(|state, _| state.connected(id)) {
            return Ok(()); // A newer agent speaks for this host now.
        }
        let result = orders::obey(shared, order);
        shared.with(|state, _| {
            if state.connected(id) {
                state.report(GuardReport::Done { ticket, result });
            }
        });
    }
    Ok(())
}

fn write(mut stream: UnixStream, reports: &Receiver<GuardReport>) {
    while let Ok(report) = reports.recv() {
        if frame::write(&mut stream, &report).is_err() {
            break;
        }
    }
    drop(stream.shutdown(Shutdown::Both)); // The reader ends, too.
}

fn is_root(stream: &UnixStream) -> bool {
    getsockopt(stream, sockopt::PeerCredentials).is_ok_and(|peer| peer.uid() == 0)
}
