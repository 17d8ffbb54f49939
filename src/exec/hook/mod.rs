//! The hook's two ends: the program that libvirtd runs (client.rs) and the agent's socket that answers it (here).
//!
//! ```text
//!   libvirtd ──runs──► mainstay-hook ──question──► hook.sock: accept ─► reader (≤ 32) ──HookAsk──► agent
//!                            ▲                                                                       │
//!                            └────────────────── verdict ◄── HookAnswer: allow, refuse, dropped ◄────┘
//! ```
//!
//! The verdict is written by whoever holds the `HookAnswer`; no thread waits for it. The program waits 3 s in all, so
//! an answer may come too late: then `allow` says so. A peer that is not root is not heard.
//!
//! Not here: who may start. Never D-Bus, never libvirt: libvirtd waits for us.

pub mod client;
pub mod message;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

pub use message::HookOperation;
use message::{HOOK_PROTOCOL, HOOK_WAIT, HOOK_XML_MAX, HookQuestion, HookVerdict};

use crate::types::VmId;
use crate::wire::frame;

/// Questions that are read at the same time. Further ones are told to try again.
const READERS_MAX: usize = 32;
/// The pause after the kernel gave no connection (no descriptors left).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// libvirtd runs hooks as root.
const ROOT: u32 = 0;

/// A question of the hook program. libvirtd waits, and holds the domain.
#[derive(Debug)]
pub struct HookAsk {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// What is about to happen.
    pub operation: HookOperation,
    /// Its definition.
    pub xml: String,
    /// How to answer.
    pub answer: HookAnswer,
}

/// Answers one question, once. Dropped without an answer it refuses.
#[derive(Debug)]
pub struct HookAnswer {
    stream: Option<UnixStream>,
}

impl HookAnswer {
    /// libvirtd may go on. False: the program has given up already, so libvirtd has refused. (True is no proof that
    /// it goes on: the program may give up at this very moment.)
    pub fn allow(mut self) -> bool {
        self.send(&HookVerdict::Allow)
    }

    /// libvirtd must not go on; `why` is shown to whoever asked for the start: cause and cure. False as in `allow`.
    pub fn refuse(mut self, why: String) -> bool {
        self.send(&HookVerdict::Refuse(why))
    }

    fn send(&mut self, verdict: &HookVerdict) -> bool {
        let Some(mut stream) = self.stream.take() else { return false };
        // A verdict fits into the socket's buffer: this does not block.
        frame::write(&mut stream, verdict).and_then(|()| Ok(stream.flush()?)).is_ok()
    }
}

impl Drop for HookAnswer {
    fn drop(&mut self) {
        self.send(&HookVerdict::Refuse("the agent gave no answer; see 'journalctl -u mainstayd'".into()));
    }
}

/// The socket, until dropped.
#[derive(Debug)]
pub struct HookServer {
    path: PathBuf,
    /// Closed when the server is dropped, which ends the accepting thread.
    _stop: UnixStream,
}

impl HookServer {
    /// Listens at `path`, in place of a socket that an earlier agent left there. `ask` is called on a reader's thread
    /// and should not block.
    ///
    /// # Errors
    /// When the socket cannot be created there.
    pub fn spawn(path: &Path, ask: impl Fn(HookAsk) + Send + Sync + 'static) -> io::Result<Self> {
        Self::spawn_for(path, ROOT, ask)
    }

    /// The same for another user than root.
    fn spawn_for(path: &Path, uid: u32, ask: impl Fn(HookAsk) + Send + Sync + 'static) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?; // One who hangs up between poll and accept must not hold us.
        let (stop, stopped) = UnixStream::pair()?;
        std::thread::Builder::new()
            .name("hook-accept".into())
            .spawn(move || accept(&listener, &stopped, uid, &Arc::new(ask)))?;
        Ok(Self { path: path.to_owned(), _stop: stop })
    }
}

impl Drop for HookServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept(
    listener: &UnixListener,
    stopped: &UnixStream,
    uid: u32,
    ask: &Arc<impl Fn(HookAsk) + Send + Sync + 'static>,
) {
    let readers = Arc::new(AtomicUsize::new(0));
    loop {
        let mut ready =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        // Interrupted: looked at again. Nothing else can fail on two descriptors of ours.
        let _ = poll(&mut ready, PollTimeout::NONE);
        if ready[1].any() == Some(true) {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => receive(stream, uid, &readers, ask),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => std::thread::sleep(ACCEPT_AGAIN),
        }
    }
}

/// Starts a reader for a connection, if its peer may ask and there is room.
fn receive(
    stream: UnixStream,
    uid: u32,
    readers: &Arc<AtomicUsize>,
    ask: &Arc<impl Fn(HookAsk) + Send + Sync + 'static>,
) {
    if getsockopt(&stream, sockopt::PeerCredentials).map(|peer| peer.uid()) != Ok(uid) {
        return; // Closed without a word.
    }
    let mut answer = HookAnswer { stream: Some(stream) };
    if READERS_MAX <= readers.fetch_add(1, Ordering::AcqRel) {
        readers.fetch_sub(1, Ordering::AcqRel);
        answer.send(&HookVerdict::Refuse("too many VMs start at once; try again".into()));
        return;
    }
    let (ask, left) = (Arc::clone(ask), Reader(Arc::clone(readers)));
    // If no thread can be had, everything above is dropped with the closure: the answer refuses.
    let _ = std::thread::Builder::new().name("hook-reader".into()).spawn(move || {
        let _left = left;
        if let Some(question) = read(&answer) {
            let HookQuestion { protocol: _, operation, vm, name, xml } = question;
            ask(HookAsk { vm, name, operation, xml, answer });
        } else {
            drop(answer.stream.take()); // Not a question of ours: closed without a word.
        }
    });
}

/// Counts a reader while it lives.
struct Reader(Arc<AtomicUsize>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn read(answer: &HookAnswer) -> Option<HookQuestion> {
    let mut stream = answer.stream.as_ref()?;
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(HOOK_WAIT)).ok()?;
    stream.set_write_timeout(Some(HOOK_WAIT)).ok()?;
    let question: HookQuestion = frame::read(&mut stream).ok()??;
    (question.protocol == HOOK_PROTOCOL && question.xml.len() <= HOOK_XML_MAX).then_some(question)
}

/// Writes the list of VMs that may start without the agent: whole or not at all.
///
/// # Errors
/// When it could not be made durable; the old list then stands.
pub fn write_unprotected(path: &Path, vms: &[VmId]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    let text: String = vms.iter().map(|vm| format!("{vm}\n")).collect();
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    std::fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn question(protocol: u16) -> HookQuestion {
        HookQuestion {
            protocol,
            operation: HookOperation::Prepare,
            vm: VmId::default(),
            name: "web1".into(),
            xml: "<domain/>".into(),
        }
    }

    fn connect(path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    fn put(path: &Path, question: &HookQuestion) -> Option<HookVerdict> {
        let mut stream = connect(path);
        let _ = frame::write(&mut stream, question); // A peer that is not heard may be cut off while it writes.
        frame::read(&mut stream).unwrap_or(None)
    }

    #[test]
    fn each_question_gets_its_verdict() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hook.sock");
        std::fs::write(&path, "left over").unwrap();
        let server = HookServer::spawn(&path, |ask| match ask.name.as_str() {
            "web1" => assert!(ask.answer.allow()),
            "web2" => assert!(ask.answer.refuse("runs on h2".into())),
            "web3" => drop(ask),
            _ => panic!("a bad agent"),
        })
        .unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let named = |name: &str| HookQuestion { name: name.into(), ..question(HOOK_PROTOCOL) };
        assert_eq!(put(&path, &named("web1")), Some(HookVerdict::Allow));
        assert_eq!(put(&path, &named("web2")), Some(HookVerdict::Refuse("runs on h2".into())));
        for refused in ["web3", "web4"] {
            assert!(matches!(put(&path, &named(refused)), Some(HookVerdict::Refuse(_))), "{refused}");
        }
        assert_eq!(put(&path, &question(HOOK_PROTOCOL + 1)), None, "another protocol");
        let mut junk = connect(&path);
        junk.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(matches!(frame::read::<HookVerdict>(&mut junk), Ok(None) | Err(_)));
        assert_eq!(put(&path, &named("web1")), Some(HookVerdict::Allow), "it goes on after all that");
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn a_program_that_gave_up_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hook.sock");
        let (tell, asked) = channel();
        let _server = HookServer::spawn(&path, move |ask| tell.send(ask).unwrap()).unwrap();
        let mut stream = connect(&path);
        frame::write(&mut stream, &question(HOOK_PROTOCOL)).unwrap();
        let ask: HookAsk = asked.recv_timeout(LONG).unwrap();
        // Not by a drop: another test's fork may hold the descriptor for a moment.
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(!ask.answer.allow());
    }

    #[test]
    fn only_the_user_it_is_meant_for_is_heard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hook.sock");
        let uid = nix::unistd::getuid().as_raw();
        let _server = HookServer::spawn_for(&path, uid + 1, |_| panic!("nobody may ask")).unwrap();
        assert_eq!(put(&path, &question(HOOK_PROTOCOL)), None);
    }

    #[test]
    fn too_many_readers_are_told_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hook.sock");
        let _server = HookServer::spawn(&path, |ask| assert!(ask.answer.allow())).unwrap();
        let silent: Vec<_> = (0..READERS_MAX).map(|_| connect(&path)).collect();
        let verdict = put(&path, &question(HOOK_PROTOCOL));
        assert!(matches!(verdict, Some(HookVerdict::Refuse(_))), "{verdict:?}");
        drop(silent);
    }

    #[test]
    fn the_list_of_unprotected_vms_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("unprotected");
        let vm: VmId = "11111111-2222-3333-4444-555555555555".parse().unwrap();
        write_unprotected(&path, &[vm, VmId::default()]).unwrap();
        let expected = format!("{vm}\n{}\n", VmId::default());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        write_unprotected(&path, &[]).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        assert!(write_unprotected(&folder.path().join("no/such"), &[vm]).is_err());
    }
}
