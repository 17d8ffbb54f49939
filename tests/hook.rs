//! The hook program as libvirtd runs it, with an agent that answers, refuses, hangs, babbles or is not there.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mainstay::exec::hook::client::HookPlaces;
use mainstay::exec::hook::message::{HookQuestion, HookVerdict};
use mainstay::exec::hook::{HookAsk, HookOperation, HookServer, write_unprotected};
use mainstay::types::VmId;
use mainstay::wire::frame;

const UUID: &str = "11111111-2222-3333-4444-555555555555";
const ASKING: [&str; 3] = ["prepare", "migrate", "restore"];
/// The rest of libvirt's operations, and some that it does not have.
const NEVER_FAILING: [&str; 9] =
    ["start", "started", "stopped", "release", "reconnect", "attach", "no-such-operation", "", "\u{fffd}"];

/// A host's files in a folder.
struct Host {
    folder: tempfile::TempDir,
    places: HookPlaces,
}

fn host() -> Host {
    let folder = tempfile::tempdir().unwrap();
    for part in ["run/mainstay", "var/lib/mainstay", "etc/mainstay"] {
        std::fs::create_dir_all(folder.path().join(part)).unwrap();
    }
    let places = HookPlaces::below(folder.path());
    Host { folder, places }
}

/// A host that is in a cluster.
fn member() -> Host {
    let host = host();
    std::fs::write(&host.places.settings, "{}").unwrap();
    host
}

fn xml() -> String {
    format!("<domain type='kvm'><name>web1</name><uuid>{UUID}</uuid><devices/></domain>")
}

impl Host {
    fn start(&self, arguments: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_mainstay-hook"))
            .args(arguments)
            .env("MAINSTAY_HOOK_ROOT", self.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
    /// Runs the hook for web1; whatever it does, it writes nothing to stdout.
    fn run(&self, operation: &str, stdin: &str) -> Output {
        let mut child = self.start(&["web1", operation, "begin", "-"]);
        // One that does not read is gone before this is written.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        assert!(output.stdout.is_empty(), "stdout would replace the domain's XML");
        output
    }
    fn allows(&self, operation: &str) {
        let output = self.run(operation, &xml());
        assert!(output.status.success(), "{operation}: {}", String::from_utf8_lossy(&output.stderr));
    }
    /// What it says when it refuses.
    fn refuses(&self, operation: &str, stdin: &str) -> String {
        let output = self.run(operation, stdin);
        assert_eq!(output.status.code(), Some(1), "{operation}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with("mainstay: ") && said.lines().count() == 1, "{said}");
        said
    }
    /// A refused restore passes, and the `prepare` that follows it is refused in its place.
    fn refuses_restore(&self, stdin: &str) -> String {
        assert!(self.run("restore", stdin).status.success(), "a failing restore costs the saved image");
        self.refuses("prepare", stdin)
    }
    /// Refuses, in whichever of the two ways.
    fn refuses_any(&self, operation: &str, stdin: &str) -> String {
        if operation == "restore" { self.refuses_restore(stdin) } else { self.refuses(operation, stdin) }
    }
    fn agent(&self, ask: impl Fn(HookAsk) + Send + Sync + 'static) -> HookServer {
        HookServer::spawn(&self.places.socket, ask).unwrap()
    }
    /// An agent of another making: `talk` gets each connection.
    fn strange_agent(&self, talk: impl Fn(UnixStream) + Send + 'static) {
        let listener = UnixListener::bind(&self.places.socket).unwrap();
        std::thread::spawn(move || listener.incoming().for_each(|stream| talk(stream.unwrap())));
    }
}

#[test]
fn the_agents_word_counts() {
    let host = member();
    let _agent = host.agent(|ask| {
        assert_eq!((ask.name.as_str(), ask.vm.to_string().as_str(), ask.xml), ("web1", UUID, xml()));
        match ask.operation {
            HookOperation::Prepare => ask.answer.allow(),
            HookOperation::Migrate => ask.answer.refuse("web1 runs on h2 (generation 4)".into()),
            HookOperation::Restore => {
                drop(ask.answer);
                true
            }
        };
    });
    host.allows("prepare");
    assert_eq!(host.refuses("migrate", &xml()), "mainstay: web1 runs on h2 (generation 4)\n");
    // The agent allows `prepare`, but not after a restore that it refused.
    assert!(host.refuses_restore(&xml()).contains("no answer"));
    host.allows("prepare");
    // The agent has spoken: no file overrules it.
    write_unprotected(&host.places.unprotected[0], &[UUID.parse().unwrap()]).unwrap();
    std::fs::write(&host.places.override_file, "all\n").unwrap();
    host.refuses("migrate", &xml());
}

#[test]
fn without_an_agent_the_files_of_the_host_count() {
    let host = member();
    for operation in ASKING {
        let said = host.refuses_any(operation, &xml());
        for part in ["web1", "systemctl start mainstayd"] {
            assert!(said.contains(part), "{said}");
        }
        // Nobody is told to migrate what no agent has handed over.
        assert_eq!(said.contains("hook-override"), operation != "migrate", "{said}");
    }
    let other = VmId::default();
    let vm: VmId = UUID.parse().unwrap();
    for list in &host.places.unprotected {
        write_unprotected(list, &[other]).unwrap();
        host.refuses("prepare", &xml());
        write_unprotected(list, &[other, vm]).unwrap();
        ASKING.iter().for_each(|operation| host.allows(operation));
        std::fs::remove_file(list).unwrap();
        host.refuses("prepare", &xml());
    }
    for (line, allowed) in [("web2", false), ("", false), ("web", false), (" web1 ", true), (UUID, true), ("all", true)]
    {
        std::fs::write(&host.places.override_file, format!("# for tonight\n{line}\n")).unwrap();
        assert_eq!(host.run("prepare", &xml()).status.success(), allowed, "{line:?}");
    }
}

#[test]
fn a_host_in_no_cluster_starts_everything() {
    let host = host();
    ASKING.iter().for_each(|operation| host.allows(operation));
    assert!(host.run("prepare", "junk").status.success());
    // A settings file that cannot be read is not the same as none.
    std::os::unix::fs::symlink("/no/such", &host.places.settings).unwrap();
    host.refuses("prepare", &xml());
}

#[test]
fn everything_else_succeeds_whatever_happens() {
    let silent = member();
    silent.strange_agent(std::mem::forget);
    let down = member();
    for operation in NEVER_FAILING {
        for host in [&silent, &down] {
            for stdin in [xml().as_str(), "junk", ""] {
                let began = Instant::now();
                assert!(host.run(operation, stdin).status.success(), "{operation:?}");
                assert!(began.elapsed() < Duration::from_millis(1500), "{operation:?} waited");
            }
        }
    }
    for arguments in [&[][..], &["web1"], &["web1", "stopped"], &["", "", "", "", "", ""]] {
        let mut child = down.start(arguments);
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success(), "{arguments:?}");
    }
}

#[test]
fn an_agent_that_hangs_refuses_after_three_seconds() {
    let host = member();
    let (ask, _kept) = std::sync::mpsc::channel();
    let _agent = host.agent(move |question| ask.send(question).unwrap());
    let began = Instant::now();
    let said = host.refuses("prepare", &xml());
    let took = began.elapsed();
    assert!(said.contains("does not answer"), "{said}");
    assert!(Duration::from_millis(2900) <= took && took < Duration::from_secs(6), "{took:?}");
    // It knows whom it is about all the same.
    write_unprotected(&host.places.unprotected[1], &[UUID.parse().unwrap()]).unwrap();
    host.allows("prepare");
}

#[test]
fn a_definition_that_never_ends_is_not_waited_for() {
    let host = member();
    let _agent = host.agent(|_| panic!("nothing can be asked"));
    let mut child = host.start(&["web1", "prepare", "begin", "-"]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"<domain>").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    drop(stdin);
}

#[test]
fn junk_from_either_side_refuses() {
    let host = member();
    let _agent = host.agent(|ask| assert!(ask.answer.allow()));
    let long = format!("{}{}", xml(), " ".repeat(600_000));
    for stdin in ["", "junk", "<domain/>", "<network><uuid>x</uuid></network>", &long] {
        host.refuses("prepare", stdin);
    }
    let talks: [fn(UnixStream); 3] = [
        |stream| drop(stream),
        |mut stream| {
            let _ = frame::read::<HookQuestion>(&mut stream);
            let _ = stream.write_all(&[0xff; 64]);
        },
        |mut stream| {
            let _ = frame::read::<HookQuestion>(&mut stream);
            let _ = stream.write_all(&frame::encode(&HookVerdict::Allow).unwrap()[..5]);
        },
    ];
    for talk in talks {
        let host = member();
        host.strange_agent(talk);
        let said = host.refuses("prepare", &xml());
        assert!(said.contains("the agent cannot be asked"), "{said}");
    }
}

#[test]
fn a_refused_restore_waits_for_its_own_daemon_only() {
    let host = member();
    let waiting = host.places.refusals.join("restore-web1");
    host.run("restore", &xml());
    assert!(waiting.exists());
    std::fs::remove_file(&host.places.settings).unwrap(); // Nothing else refuses from here on.
    let other = host.start(&["web2", "prepare", "begin", "-"]).wait_with_output().unwrap();
    assert!(other.status.success(), "another domain");
    assert!(host.refuses("prepare", &xml()).contains("refused to restore web1"));
    assert!(!waiting.exists());
    host.allows("prepare");
    // What a daemon left that is gone, and what cannot be read.
    std::fs::write(&waiting, "1\nold\n").unwrap();
    host.allows("prepare");
    assert!(!waiting.exists());
    for junk in ["", "junk", "junk\nof some kind\n"] {
        std::fs::write(&waiting, junk).unwrap();
        host.refuses("prepare", &xml());
        host.allows("prepare");
    }
    // It cannot be kept: then nothing is left but to fail.
    std::fs::write(&host.places.settings, "{}").unwrap();
    std::fs::remove_dir_all(&host.places.refusals).unwrap();
    std::fs::write(&host.places.refusals, "in the way").unwrap();
    host.refuses("restore", &xml());
}

/// libvirtd has 20 workers: it must not be the program that takes long to load. The guard must not link libvirt at
/// all; the hook should not either, since some of libvirt's libraries start threads.
#[test]
fn the_program_needs_no_libvirt() {
    let mut bytes = Vec::new();
    std::fs::File::open(Path::new(env!("CARGO_BIN_EXE_mainstay-hook"))).unwrap().read_to_end(&mut bytes).unwrap();
    let names = |needle: &[u8]| bytes.windows(needle.len()).any(|part| part == needle);
    assert!(!names(b"libvirt.so") && !names(b"libvirt-qemu.so"));
}
