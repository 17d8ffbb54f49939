//! The hook program: libvirtd runs it before, while and after it does something to a domain.
//!
//! ```text
//!   operation ──not one of three──► 0, at once
//!       └─ prepare, migrate, restore ─► XML from stdin ─► agent ── allow ──► 0
//!                                            │               └─── refuse ──► 1, the agent's words on stderr
//!                                            └─ no answer in 3 s, no agent ─► what the host's files say
//! ```
//!
//! A refused `restore` is told at the `prepare` that follows it: if `restore` itself fails, libvirt (11.3, tried) says
//! that the VM was started and deletes its saved image. So the refusal waits in a file, which is kept for the very
//! daemon that is restoring; only if that file cannot be written does `restore` fail.
//!
//! Without the agent nobody can say whether the VM runs elsewhere. So it is refused, unless this host is in no
//! cluster, the agent has listed the VM as unprotected, or a person has named it in the override file.
//!
//! It writes to stderr only (on `migrate` and `restore` stdout would replace the domain's XML), never calls libvirt
//! (libvirtd waits for us and holds the domain), and starts no process.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use super::message::{HOOK_PROTOCOL, HOOK_WAIT, HOOK_XML_MAX, HookOperation, HookQuestion, HookVerdict, vm_of};
use crate::exec::clock;
use crate::types::VmId;
use crate::wire::frame;

/// Longest file of the host that is read.
const FILE_MAX: u64 = 1 << 20;

/// Where things are on the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HookPlaces {
    /// The agent's socket.
    pub socket: PathBuf,
    /// Lists of VMs that Mainstay does not protect, one UUID per line: this boot's, and the one that outlives it.
    pub unprotected: [PathBuf; 2],
    /// The cluster's settings: without them this host is in no cluster.
    pub settings: PathBuf,
    /// Folder of the refusals that wait for their `prepare`; made by the program.
    pub refusals: PathBuf,
    /// Names or UUIDs that a person lets start without the agent, one per line, or `all`.
    pub override_file: PathBuf,
}

impl HookPlaces {
    /// The installed ones, below `root` (`/`, but in tests).
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self {
            socket: root.join("run/mainstay/hook.sock"),
            unprotected: [root.join("run/mainstay/unprotected"), root.join("var/lib/mainstay/unprotected")],
            settings: root.join("var/lib/mainstay/settings.json"),
            refusals: root.join("run/mainstay-hook"),
            override_file: root.join("etc/mainstay/hook-override"),
        }
    }
}

/// What came of asking the agent.
enum Heard {
    /// The XML was read, and this is the domain's UUID.
    Vm(Option<VmId>),
    Verdict(HookVerdict),
    /// There is no verdict, and why.
    Nothing(String),
}

/// Runs the hook with libvirt's arguments (after the program's name) and gives its exit code: 0 or 1.
pub fn run(arguments: &[OsString], places: &HookPlaces) -> u8 {
    let text =
        |at: usize| arguments.get(at).map(|argument| argument.to_string_lossy().into_owned()).unwrap_or_default();
    let Some(operation) = HookOperation::named(&text(1)) else { return 0 };
    let name = text(0);
    let waiting = places.refusals.join(format!("restore-{name}"));
    let decided = match operation {
        HookOperation::Prepare => take_refusal(&waiting).and_then(|()| decide(operation, &name, places)),
        HookOperation::Migrate => decide(operation, &name, places),
        HookOperation::Restore => decide(operation, &name, places).or_else(|why| keep_refusal(&waiting, &why)),
    };
    match decided {
        Ok(()) => 0,
        Err(why) => {
            // If nobody reads it, the exit code still says it.
            let _ = writeln!(std::io::stderr(), "mainstay: {why}");
            1
        }
    }
}

/// Keeps a refused `restore` for the `prepare` that the same daemon asks next.
fn keep_refusal(waiting: &Path, why: &str) -> Result<(), String> {
    let text = format!("{}\n{why}\n", std::os::unix::process::parent_id());
    let folder = waiting.parent().unwrap_or(waiting);
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(waiting, text))
        .map_err(|error| format!("{why} (nor can this be kept in {}: {error})", waiting.display()))
}

/// Refuses if a `restore` of this domain was, by the daemon that asks now; that refusal is then used up. One of an
/// earlier daemon, whose restore ended with it, is thrown away.
fn take_refusal(waiting: &Path) -> Result<(), String> {
    let mut text = Vec::new();
    match std::fs::File::open(waiting).and_then(|file| file.take(FILE_MAX).read_to_end(&mut text)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Ok(_) | Err(_) => {} // One that cannot be read refuses as well: that it is there says enough.
    }
    let _ = std::fs::remove_file(waiting);
    let text = String::from_utf8_lossy(&text);
    match text.split_once('\n') {
        Some((daemon, _)) if daemon.parse().is_ok_and(|pid: u32| pid != std::os::unix::process::parent_id()) => Ok(()),
        Some((_, why)) => Err(why.trim().to_owned()),
        None => Err("restoring it was refused; its saved image was kept".into()),
    }
}

fn decide(operation: HookOperation, name: &str, places: &HookPlaces) -> Result<(), String> {
    let (tell, heard) = channel();
    let (asked, socket) = (name.to_owned(), places.socket.clone());
    // Reading, connecting and waiting can all hang; whatever hangs ends with the process.
    let spawned = std::thread::Builder::new().name("ask".into()).spawn(move || {
        let said = ask(operation, asked, &socket, &tell).unwrap_or_else(Heard::Nothing);
        let _ = tell.send(said);
    });
    let deadline = clock::now() + HOOK_WAIT;
    let mut vm = None;
    let mut why = "it does not answer".to_owned();
    if let Err(error) = spawned {
        why = format!("no thread to ask it: {error}");
    } else {
        loop {
            match heard.recv_timeout(deadline.since(clock::now())) {
                Ok(Heard::Vm(found)) => vm = found,
                Ok(Heard::Verdict(HookVerdict::Allow)) => return Ok(()),
                Ok(Heard::Verdict(HookVerdict::Refuse(text))) => return Err(text),
                Ok(Heard::Nothing(text)) => {
                    why = text;
                    break;
                }
                Err(_) => break, // Out of time, or the thread panicked.
            }
        }
    }
    without_agent(operation, name, vm, &why, places)
}

/// Reads the definition and asks. The UUID is told first, for the case that no answer comes.
fn ask(operation: HookOperation, name: String, socket: &Path, tell: &Sender<Heard>) -> Result<Heard, String> {
    let mut bytes = Vec::new();
    let limit = HOOK_XML_MAX as u64 + 1;
    std::io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(|e| format!("libvirt's definition: {e}"))?;
    let xml = String::from_utf8(bytes).map_err(|_| "libvirt's definition is no text".to_owned())?;
    let vm = vm_of(&xml);
    let _ = tell.send(Heard::Vm(vm));
    let vm = vm.ok_or("libvirt's definition has no UUID")?;
    if HOOK_XML_MAX < xml.len() {
        return Err(format!("libvirt's definition is longer than {HOOK_XML_MAX} bytes"));
    }
    let mut stream = UnixStream::connect(socket).map_err(|error| format!("{}: {error}", socket.display()))?;
    let question = HookQuestion { protocol: HOOK_PROTOCOL, operation, vm, name, xml };
    frame::write(&mut stream, &question).map_err(|error| format!("asking it failed: {error}"))?;
    match frame::read(&mut stream) {
        Ok(Some(verdict)) => Ok(Heard::Verdict(verdict)),
        Ok(None) => Err("it closed the connection without an answer".into()),
        Err(error) => Err(format!("its answer failed: {error}")),
    }
}

/// What holds when the agent cannot be asked.
fn without_agent(
    operation: HookOperation,
    name: &str,
    vm: Option<VmId>,
    why: &str,
    places: &HookPlaces,
) -> Result<(), String> {
    // Only a file that is certainly not there means "no cluster"; one that cannot be read does not.
    if std::fs::symlink_metadata(&places.settings).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        return Ok(());
    }
    let uuid = vm.map(|vm| vm.to_string());
    let is_uuid = |line: &str| uuid.as_deref() == Some(line);
    if places.unprotected.iter().any(|path| any_line(path, is_uuid)) {
        return Ok(());
    }
    if any_line(&places.override_file, |line| line == "all" || line == name || is_uuid(line)) {
        return Ok(());
    }
    if operation == HookOperation::Migrate {
        return Err(format!(
            "refused to {} {name}: the agent, which would have its claim handed over, cannot be asked ({why}); \
             'systemctl start mainstayd', then try again",
            operation.verb(),
        ));
    }
    Err(format!(
        "refused to {} {name}: it may run on another host, and the agent cannot be asked ({why}); \
         'systemctl start mainstayd', then try again. Only in an emergency, and when {name} certainly runs nowhere: \
         'echo {name} >>{}', and remove that line afterwards",
        operation.verb(),
        places.override_file.display(),
    ))
}

/// Whether a line of the file, without blanks around it, is one of these. A file that cannot be read has none.
fn any_line(path: &Path, is: impl Fn(&str) -> bool) -> bool {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut text));
    read.is_ok() && String::from_utf8_lossy(&text).lines().any(|line| is(line.trim()))
}
