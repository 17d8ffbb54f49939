//! One connection to libvirtd, and each order as the calls that it takes. Blocking; runs on worker threads only.
//!
//! A connection is opened by the worker that uses it, is never shared or cloned, and is closed once. With keepalive a
//! daemon that hangs costs a call 4 to 6 s; opening has no such limit, so it must be done where it may hang.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use virt::connect::Connect;
use virt::domain::{Domain, MigrateParameters};
use virt::error::{Error, ErrorNumber};
use virt_sys as sys;

use super::events::{abort_job, checkpoints, is_busy};
use super::failure::{failure, not_running};
use super::state::state_of;
use super::xml::{MARK, POLICY, guest_channel};
use crate::exec::clock;
use crate::types::settings::OnDoubt;
use crate::types::vm::{DomainAnswer, DomainFailure, DomainInfo, DomainOrder};
use crate::types::{Generation, VmId};

/// Seconds between keepalive messages, and how many may stay unanswered.
const KEEPALIVE: (i32, u32) = (2, 2);
/// How often a running migration looks whether its target is still there.
const MIGRATION_LOOK: Duration = Duration::from_millis(500);
/// Longest pid file that is read.
const PID_FILE_MAX: usize = 32;

/// An open connection.
pub(super) struct Session {
    connect: Connect,
}

impl Session {
    /// Opens a connection; may hang as long as the daemon is frozen.
    pub(super) fn open(uri: &str) -> Result<Self, DomainFailure> {
        if uri.contains('\0') {
            return Err(DomainFailure::NoDaemon("the connection's URI contains a NUL".into()));
        }
        let connect = Connect::open(Some(uri)).map_err(|error| {
            // Whatever went wrong: there is no daemon to talk to.
            DomainFailure::NoDaemon(format!("cannot connect to {uri}: {}", error.message().trim()))
        })?;
        // Local drivers (test:///) have no keepalive and say so; nothing depends on it there.
        let _ = connect.set_keep_alive(KEEPALIVE.0, KEEPALIVE.1);
        Ok(Self { connect })
    }

    pub(super) fn connect(&self) -> &Connect {
        &self.connect
    }

    /// Whether calls have a chance. Asks nobody.
    pub(super) fn alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    pub(super) fn domain(&self, vm: VmId) -> Result<Domain, Error> {
        Domain::lookup_by_uuid(&self.connect, vm.0)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.connect.close(); // An error says that others still hold it; nothing of ours does.
    }
}

/// Where things are that libvirt's API does not tell.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// libvirt's URI.
    pub uri: String,
    /// Folder of libvirt's pid files.
    pub pids: PathBuf,
}

/// Carries out one order on `session`, opening it when there is none that works.
pub(super) fn carry_out(
    places: &Places,
    session: &mut Option<Session>,
    order: &DomainOrder,
    within: Duration,
) -> DomainAnswer {
    in_session(&places.uri, session, within, |open, within| obey(places, open, order, within))
}

/// Does something with an open connection, which is opened when there is none that works, in what is left of the time.
pub(super) fn in_session(
    uri: &str,
    session: &mut Option<Session>,
    within: Duration,
    work: impl FnOnce(&Session, Duration) -> Result<DomainAnswer, DomainFailure>,
) -> DomainAnswer {
    let deadline = clock::now() + within;
    if !session.as_ref().is_some_and(Session::alive) {
        drop(session.take()); // Closed first, so that a worker never has two.
        match Session::open(uri) {
            Ok(opened) => *session = Some(opened),
            Err(failure) => return DomainAnswer::Failed(failure),
        }
        if deadline <= clock::now() {
            return DomainAnswer::Failed(DomainFailure::Timeout); // The daemon hung until now: too late to begin.
        }
    }
    let within = deadline.since(clock::now());
    let open = session.as_ref().expect("it was opened above");
    match work(open, within) {
        Ok(answer) => answer,
        Err(failure) => {
            if matches!(failure, DomainFailure::NoDaemon(_)) {
                drop(session.take());
            }
            DomainAnswer::Failed(failure)
        }
    }
}

fn obey(
    places: &Places,
    session: &Session,
    order: &DomainOrder,
    within: Duration,
) -> Result<DomainAnswer, DomainFailure> {
    let done = match order {
        DomainOrder::List => return list(session, &places.pids).map(DomainAnswer::Listed),
        DomainOrder::Define { xml } => define(session, xml),
        DomainOrder::Undefine { vm } => {
            let domain = session.domain(*vm).map_err(|error| failure(&error))?;
            return undefine(&domain).map(|()| DomainAnswer::Done);
        }
        DomainOrder::StartPaused { vm } => session.domain(*vm).and_then(|domain| {
            // A saved image is never loaded here: if the VM ran elsewhere since, its memory is older than its disks.
            let flags = sys::VIR_DOMAIN_START_PAUSED | sys::VIR_DOMAIN_START_FORCE_BOOT;
            domain.create_with_flags(flags).map(drop)
        }),
        DomainOrder::RestorePaused { vm } => {
            session.domain(*vm).and_then(|domain| domain.create_with_flags(sys::VIR_DOMAIN_START_PAUSED).map(drop))
        }
        DomainOrder::Mark { vm, generation } => session.domain(*vm).and_then(|domain| mark(&domain, *generation)),
        DomainOrder::SetOnDoubt { vm, on_doubt } => {
            session.domain(*vm).and_then(|domain| set_on_doubt(&domain, *on_doubt))
        }
        DomainOrder::Resume { vm } => session.domain(*vm).and_then(|domain| domain.resume().map(drop)),
        DomainOrder::Suspend { vm } => session.domain(*vm).and_then(|domain| domain.suspend().map(drop)),
        DomainOrder::Shutdown { vm } => session.domain(*vm).and_then(|domain| domain.shutdown().map(drop)),
        DomainOrder::Destroy { vm } => session.domain(*vm).and_then(|domain| match domain.destroy() {
            Err(error) if not_running(&error) => Ok(()),
            other => other,
        }),
        DomainOrder::Reset { vm } => session.domain(*vm).and_then(|domain| domain.reset().map(drop)),
        DomainOrder::Migrate { vm, uri, bandwidth_mib } => {
            return migrate(session, *vm, uri, *bandwidth_mib, within).map(|()| DomainAnswer::Done);
        }
        DomainOrder::AbortJob { vm } => session.domain(*vm).and_then(|domain| abort_job(&domain)),
    };
    done.map(|()| DomainAnswer::Done).map_err(|error| failure(&error))
}

fn list(session: &Session, pids: &Path) -> Result<Vec<DomainInfo>, DomainFailure> {
    let mut all = Vec::new();
    for domain in session.connect.list_all_domains(0).map_err(|error| failure(&error))? {
        match info(&domain, pids) {
            Ok(info) => all.push(info),
            Err(error) if error.code() == ErrorNumber::NoDomain => {} // It went while we were listing.
            Err(error) => return Err(failure(&error)),
        }
    }
    all.sort_by(|a, b| (&a.name, a.vm).cmp(&(&b.name, b.vm)));
    Ok(all)
}

fn info(domain: &Domain, pids: &Path) -> Result<DomainInfo, Error> {
    let (state, reason) = domain.get_state()?;
    let active = domain.is_active()?;
    let persistent = domain.is_persistent()?;
    let live = sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_MIGRATABLE;
    let flags = if persistent { live | sys::VIR_DOMAIN_XML_INACTIVE } else { live };
    let name = domain.get_name()?;
    let busy = active && is_busy(domain);
    Ok(DomainInfo {
        vm: VmId(domain.get_uuid()?),
        state: state_of(state, reason, active),
        persistent,
        // Asked of a domain that has no definition on disk, these two are errors.
        autostart: persistent && domain.get_autostart()?,
        managed_save: persistent && domain.has_managed_save(0)?,
        busy,
        // It waits for a call that is under way, for as long as that hangs. Should one begin just now, the list is given up.
        xml: if busy { None } else { Some(domain.get_xml_desc(flags)?) },
        live_xml: if active && persistent && !busy { Some(domain.get_xml_desc(live)?) } else { None },
        guest_socket: if active && !busy { guest_socket(domain)? } else { None },
        pid: if active { pid(pids, &name) } else { None },
        name,
    })
}

/// Where libvirt put it by itself only the plain live XML says.
fn guest_socket(domain: &Domain) -> Result<Option<String>, Error> {
    let text = domain.get_xml_desc(0)?;
    Ok(if text.contains(mainstay_guest::PORT) { guest_channel(&text) } else { None })
}

/// QEMU's process by libvirt's own pid file. None when there is none or it holds no pid.
fn pid(pids: &Path, name: &str) -> Option<u32> {
    if name.contains('/') {
        return None;
    }
    let text = std::fs::read(pids.join(format!("{name}.pid"))).ok()?;
    std::str::from_utf8(text.get(..text.len().min(PID_FILE_MAX))?).ok()?.trim().parse().ok().filter(|pid| 0 < *pid)
}

/// Writes the generation into the running domain only: its definition stays as people wrote it.
fn mark(domain: &Domain, generation: Generation) -> Result<(), Error> {
    let text = format!("<claim generation='{generation}'/>");
    let kind = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;
    domain.set_metadata(kind, Some(&text), Some("mainstay"), Some(MARK), sys::VIR_DOMAIN_AFFECT_LIVE).map(drop)
}

/// Into the definition only: what runs is judged by it, too. Nothing else stands in that element.
fn set_on_doubt(domain: &Domain, on_doubt: Option<OnDoubt>) -> Result<(), Error> {
    let text = on_doubt.map(|on_doubt| format!("<policy on-doubt='{}'/>", on_doubt.name()));
    let kind = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;
    let flags = sys::VIR_DOMAIN_AFFECT_CONFIG;
    match domain.set_metadata(kind, text.as_deref(), Some("mainstay"), Some(POLICY), flags) {
        Err(error) if on_doubt.is_none() && error.code() == ErrorNumber::NoDomainMetadata => Ok(()),
        other => other.map(drop),
    }
}

fn define(session: &Session, xml: &str) -> Result<(), Error> {
    // The crate turns the text into a C string and panics at a NUL; libvirt would refuse such XML as well.
    let xml = if xml.contains('\0') { "" } else { xml };
    Domain::define_xml(&session.connect, xml).map(drop)
}

/// Removes the definition and nothing else. A domain with a saved image, snapshots or checkpoints in libvirt's care is
/// refused, since these would be lost.
fn undefine(domain: &Domain) -> Result<(), DomainFailure> {
    let error = |error: Error| failure(&error);
    // libvirt's own check takes the flags below for a filter of the checkpoints that it counts, and then sees none.
    if let count @ 1.. = checkpoints(domain) {
        return Err(DomainFailure::Host(format!("cannot undefine a domain with {count} checkpoints")));
    }
    let xml = domain.get_xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).map_err(error)?;
    let mut keep = 0;
    if ["<nvram", "<loader", "firmware="].iter().any(|part| xml.contains(part)) {
        keep |= sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM;
    }
    if xml.contains("<tpm") {
        keep |= sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM; // Before 8.9 unknown, and then refused: the state would go.
    }
    domain.undefine_flags(keep).map_err(error)
}

/// Live migration, led from here: no peer-to-peer, since then nobody but the daemon could see that its target died.
///
/// The target stays paused and has no definition, the source keeps its own. While the call runs, a second thread looks
/// after it: if the target's daemon is gone or the time is over, the migration is cancelled, and the VM goes on here.
fn migrate(
    session: &Session,
    vm: VmId,
    uri: &str,
    bandwidth_mib: Option<u64>,
    within: Duration,
) -> Result<(), DomainFailure> {
    let (daemon, stream) = destination(uri);
    let domain = session.domain(vm).map_err(|error| failure(&error))?;
    let target = Session::open(&daemon).map_err(|failure| match failure {
        // Ours is well: what failed is the target, and this connection must not be taken for dead.
        DomainFailure::NoDaemon(text) => DomainFailure::Host(text),
        other => other,
    })?;
    let parameters = MigrateParameters { bandwidth: bandwidth_mib, uri: stream, ..MigrateParameters::default() };
    // UNSAFE: libvirt knows few shared folders by name; ours are datastores, proven shared by their beats.
    let flags =
        sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PAUSED | sys::VIR_MIGRATE_ABORT_ON_ERROR | sys::VIR_MIGRATE_UNSAFE;
    let (over, watch) = channel::<()>();
    let moved = std::thread::scope(|scope| {
        let (domain, target) = (&domain, &target);
        std::thread::Builder::new()
            .name("virt-move-watch".into())
            .spawn_scoped(scope, move || look_after(domain, target, within, &watch))
            .map_err(|error| DomainFailure::Host(format!("cannot start a thread: {error}")))?;
        let _over = over; // Dropped when the call returns or panics, and with it the watch ends.
        domain.migrate3(target.connect(), parameters, flags).map_err(|error| failure(&error))
    });
    moved.map(drop).map_err(|failure| match failure {
        DomainFailure::NoDaemon(text) if session.alive() => DomainFailure::Host(text),
        other => other,
    })
}

/// Cancels a migration whose target is gone or whose time is over; ends with it.
fn look_after(domain: &Domain, target: &Session, within: Duration, watch: &Receiver<()>) {
    let mut left = within;
    loop {
        let step = MIGRATION_LOOK.min(left);
        match watch.recv_timeout(step) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => left = left.saturating_sub(step),
        }
        if left.is_zero() || !target.alive() {
            // Tried again each round until the call returns: the job may not have begun when it was first cancelled.
            let _ = abort_job(domain);
            left = left.max(MIGRATION_LOOK);
        }
    }
}

/// The target's daemon and, if it has a host part, where QEMU's own stream goes: the address that we were given is
/// known to be reachable, the name that the target has for itself may not be.
fn destination(uri: &str) -> (String, Option<String>) {
    let Some((_, rest)) = uri.split_once("://") else {
        return (format!("qemu+tcp://{}/system", bracketed(uri)), Some(format!("tcp://{}", bracketed(uri))));
    };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match host_port.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        Some((inner, _)) => inner,
        None => host_port.split(':').next().unwrap_or_default(),
    };
    let stream = (!host.is_empty()).then(|| format!("tcp://{}", bracketed(host)));
    (uri.to_owned(), stream)
}

/// A bare IPv6 address needs brackets in a URI.
fn bracketed(host: &str) -> String {
    if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_migration_goes() {
        let table = [
            ("qemu+tcp://10.0.0.2/system", "qemu+tcp://10.0.0.2/system", Some("tcp://10.0.0.2")),
            ("qemu+tcp://h2:16509/system?x=y", "qemu+tcp://h2:16509/system?x=y", Some("tcp://h2")),
            ("qemu+ssh://root@h2/system", "qemu+ssh://root@h2/system", Some("tcp://h2")),
            ("qemu+tcp://[fd00::2]:1/system", "qemu+tcp://[fd00::2]:1/system", Some("tcp://[fd00::2]")),
            ("10.0.0.2", "qemu+tcp://10.0.0.2/system", Some("tcp://10.0.0.2")),
            ("fd00::2", "qemu+tcp://[fd00::2]/system", Some("tcp://[fd00::2]")),
            ("h2", "qemu+tcp://h2/system", Some("tcp://h2")),
            ("test:///default", "test:///default", None),
        ];
        for (uri, daemon, stream) in table {
            assert_eq!(destination(uri), (daemon.to_owned(), stream.map(str::to_owned)), "{uri}");
        }
    }

    #[test]
    fn pid_files_are_read_with_care() {
        let folder = tempfile::tempdir().unwrap();
        let table: &[(&str, &[u8], Option<u32>)] = &[
            ("web1", b"1234\n", Some(1234)),
            ("web2", b"1234", Some(1234)),
            ("zero", b"0\n", None),
            ("junk", b"\xff\xfe", None),
            ("empty", b"", None),
            ("long", &[b'1'; 100], None),
        ];
        for (name, content, expected) in table {
            std::fs::write(folder.path().join(format!("{name}.pid")), content).unwrap();
            assert_eq!(pid(folder.path(), name), *expected, "{name}");
        }
        assert_eq!(pid(folder.path(), "none"), None);
        assert_eq!(pid(folder.path(), "../web1"), None);
    }
}
