//! The command line as people and scripts see it: golden texts at 80 columns, JSON, exit codes, errors with a next step.

mod bus;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use bus::say::{ended, fails, say, shows};
use bus::{FakeAgent, PrivateBus, example, example_notes, mainstay, reachable_copy};
use mainstay::api::dbus::Ask;
use mainstay::types::failure::FailureFile;
use mainstay::types::power::{FenceAt, Secret};
use mainstay::types::settings::SettingsChange;
use mainstay::types::view::{ClusterView, NoteView};
use serde_json::Value;

#[test]
fn status() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    shows(
        &bus,
        "status",
        "
Cluster  prod, settings 7, seen by b
Master   a, term 3
VMs      4: 3 running, 3 protected

HOST  ROLE         VERDICT  BEAT   LIBVIRT  VMS  FREE
a     master       live     0.4 s  up       2    47 GiB
b     subordinate  live     0.0 s  up       2    47 GiB
c     unknown      dead     -      -        2    -

DATASTORE  FENCE  LEASE  WRITE   REACHED BY  PATH
nfs1       lock   valid  1.8 ms  a b         /srv/nfs1

VM       STATE    HOST  PROTECTED  WHY
db       waiting  c     yes        image lock of c on nfs1 is still held; ends
                                   in about 7 s
scratch  running  b     no         disk /var/lib/libvirt/images/scratch.qcow2 is
                                   on no datastore
",
    );
    *agent.view.lock().unwrap() = ClusterView { cluster: None, ..example() };
    shows(
        &bus,
        "status",
        "
b is no member of a cluster.
Make one with `mainstay cluster init`, or `mainstay cluster join TOKEN`.
",
    );
    let alone = ClusterView { master: None, datastores: Vec::new(), vms: Vec::new(), ..example() };
    *agent.view.lock().unwrap() = alone;
    let (_, out, _) = say(&bus, "status");
    assert!(out.contains("none yet: nothing is restarted until one is elected"), "{out}");
    assert!(out.replace('\n', " ").contains("mainstay datastore add NAME PATH"), "{out}");
}

#[test]
fn lists_and_details() {
    let bus = PrivateBus::started();
    let _agent = FakeAgent::on(&bus);
    shows(
        &bus,
        "vm list",
        "
VM       STATE    HOST  PROTECTED  WHY
web      running  a     yes
db       waiting  c     yes        image lock of c on nfs1 is still held; ends
                                   in about 7 s
mute     running  b     yes
scratch  running  b     no         disk /var/lib/libvirt/images/scratch.qcow2 is
                                   on no datastore
",
    );
    shows(
        &bus,
        "vm explain db",
        "
VM          db
UUID        00000000-0000-0000-0000-0000beef0005
State       waiting
Wanted      running
Host        c
Generation  5
Protected   yes
Home        nfs1
On doubt    pause (default)
Why         image lock of c on nfs1 is still held; ends in about 7 s

- owned by c under generation 5, which is over only when c says so, boots again,
  or lapses
- image lock: the server drops it 10 s after its client is dead
",
    );
    shows(
        &bus,
        "vm show 00000000-0000-0000-0000-0000BEEF0001",
        "
VM          web
UUID        00000000-0000-0000-0000-0000beef0001
State       running
Wanted      running
Host        a
Generation  1
Protected   yes
Home        nfs1
On doubt    pause (default)
",
    );
    shows(
        &bus,
        "host show c",
        "
Host       c
Id         00000000-0000-0000-0000-000000000003
Address    192.0.2.13:7784
Role       unknown
Verdict    dead
Evidence   network beats None ms old, datastore nfs1 written by it in the last
           two seconds or so
Last beat  never heard
libvirt    -
VMs        2
Free       -
",
    );
    shows(
        &bus,
        "datastore list",
        "
DATASTORE  FENCE  LEASE  WRITE   REACHED BY  PATH
nfs1       lock   valid  1.8 ms  a b         /srv/nfs1
",
    );
}

#[test]
fn events() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    shows(
        &bus,
        "events --since 2026-11-25T17:00:01Z",
        "
2026-11-25 17:00:05.040  a  c is dead: no network beat for 5.2 s, nothing new on
                            nfs1 [a-28512345]
2026-11-25 17:00:05.900  b  db: started here under generation 6; was c's, proof:
                            lapsed
",
    );
    let (_, by_name, _) = say(&bus, "events --since 2026-11-25 --vm db");
    let (_, by_id, _) = say(&bus, "events --since 2026-11-25 --vm 00000000-0000-0000-0000-0000beef0005");
    assert_eq!(by_name, by_id);
    assert_eq!(by_name.lines().count(), 2, "{by_name}");
    fails(&bus, "events --since soon", 2, "not listed", "--since soon is neither", "10m");

    // Followed: what was, then what comes, each once.
    let mut child = mainstay(&bus)
        .args(["events", "--follow", "--json", "--since", "2026-11-25T17:00"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<NoteView>(&lines.next().unwrap().unwrap()).unwrap();
    for note in example_notes() {
        assert_eq!(next(), note);
    }
    let new = NoteView { unix_ms: 1_795_626_009_000, text: "c is back".into(), ..example_notes()[0].clone() };
    agent.notes.send(example_notes()[2].clone()).unwrap();
    agent.notes.send(new.clone()).unwrap();
    assert_eq!(next(), new);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn every_listing_has_json() {
    let bus = PrivateBus::started();
    let _agent = FakeAgent::on(&bus);
    for (words, part, count) in [
        ("status", "hosts", 3),
        ("host list", "hosts", 3),
        ("vm list", "vms", 4),
        ("datastore list", "datastores", 1),
        ("host fence-device list", "fence_devices", 2),
        ("events --since 2026-11-25", "notes", 3),
        ("doctor", "findings", 3),
        ("config check /dev/null", "mistakes", 0),
    ] {
        let (_, out, _) = say(&bus, &format!("{words} --json"));
        let json: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(json["schema"], 1, "{words}");
        assert_eq!(json[part].as_array().map(Vec::len), Some(count), "{words}");
    }
    for (words, part) in
        [("host show a", "host"), ("vm show web", "vm"), ("vm explain web", "vm"), ("vm start web", "done")]
    {
        let (code, out, _) = say(&bus, &format!("{words} --json"));
        let json: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((code, json[part].is_null()), (0, false), "{words}");
    }
    let (_, out, _) = say(&bus, "status --json");
    assert_eq!(serde_json::from_str::<ClusterView>(&out).unwrap(), example());
}

#[test]
fn doctor() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    let (code, out, err) = say(&bus, "doctor");
    let expected = "\
error    libvirt (libvirt): does not answer: refused
         → systemctl start libvirtd
warning  nfs1 (fence): no fence: VMs of a dead host wait until it was powered
         off or has booted again
         → give it a fence: mainstay datastore set NAME --fence
           lock|command:/path
ok       this host (clock): its clock is synchronised

Errors: 1, warnings: 1, ok: 1
";
    assert_eq!((code, out.as_str(), err.as_str()), (1, expected, ""));
    // Without an agent it looks at the system itself, and says that there is no agent.
    drop(agent);
    let (code, out, _) = say(&bus, "doctor");
    assert_eq!(code, 1);
    assert!(out.contains("mainstayd (agent): mainstayd is not running") && out.contains("(machine)"), "{out}");
}

#[test]
fn wishes() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    shows(&bus, "vm start web", "web: done: Start { vm: VmId(0\n");
    shows(&bus, "vm enable-guest web", "web: it was so already\n");
    shows(&bus, "vm stop web --force", "web: done: Stop { vm: VmId(00\n");
    shows(&bus, "vm move web --to b", "web: done: Move { vm: VmId(00\n");
    shows(&bus, "vm set web --on-doubt run-until-stop", "web: done: SetOnDoubt { vm: V\n");
    shows(&bus, "cluster set profile=fast", "profile=fast: settings 8 are in force on 3 hosts\n");
    shows(&bus, "datastore set nfs1 --fence command:/usr/sbin/expire", "nfs1: settings 8 are in force on 3 hosts\n");
    assert_eq!(agent.asked.lock().unwrap().len(), 7);
    let (code, out, _) = say(&bus, "datastore add shm /dev/shm");
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("tmpfs is a local file system") && out.contains("Fence: none."), "{out}");
    assert_eq!(agent.asked.lock().unwrap().len(), 8);
    agent.view.lock().unwrap().datastores[0].rolled_back = true;
    shows(&bus, "datastore accept nfs1", "nfs1: settings 8 are in force on 3 hosts\n");
}

#[test]
fn fence_devices() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    shows(
        &bus,
        "host fence-device list",
        "
DEVICE  HOST  AGENT          LEVEL  AT       TROUBLE
ipmi-a  a     fence_ipmilan  1      suspect
pdu-c   c     fence_apc      2      lapse    not used: it said that c was off,
                                             which then beat
",
    );
    shows(&bus, "host fence-device test ipmi-a", "ipmi-a: answers: its host is on (0.42 s)\n");
    shows(&bus, "host fence-device trust pdu-c", "pdu-c: settings 8 are in force on 3 hosts\n");
    shows(&bus, "host fence-device remove pdu-c", "pdu-c: settings 8 are in force on 3 hosts\n");
    shows(&bus, "cluster set fence-at=suspect", "fence-at=suspect: settings 8 are in force on 3 hosts\n");
    fails(&bus, "host fence-device test pdu-c", 1, "\"pdu-c\" does not answer", "exit status: 1", "mainstay events");
    let add = "host fence-device add ipmi-b b fence_ipmilan ip=10.0.9.2";
    fails(&bus, &format!("{add} password=x"), 2, "was not added", "with --secrets FILE", "--help");
    fails(&bus, "host fence-device add d b reboot", 2, "was not added", "is no fence agent", "--help");
    fails(&bus, "host fence-device add d b fence_x ip", 2, "was not added", "not KEY=VALUE", "KEY=VALUE");
    fails(&bus, &format!("{add} --secrets /no/such"), 1, "was not added", "/no/such", "");
    let mut child = mainstay(&bus)
        .args(format!("{add} --level 2 --fence-at lapse --secrets -").split_whitespace())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"# of the BMC\npassword = s3cret\n").unwrap();
    let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    assert!(out.starts_with("ipmi-b: settings 8") && out.contains("Next: mainstay host fence-device test"), "{out}");
    let asked = agent.asked.lock().unwrap();
    let Some(Ask::Change(change)) = asked.iter().rev().find(|ask| matches!(ask, Ask::Change(_))) else { panic!() };
    let SettingsChange::AddFenceDevice(device) = &**change else { panic!("{change:?}") };
    assert_eq!((device.level, device.fence_at), (2, Some(FenceAt::Lapse)));
    assert_eq!(device.secrets["password"], Secret("s3cret".into()));
    assert!(!format!("{asked:?}").contains("s3cret"), "secrets are never shown");
}

#[test]
fn errors_say_what_why_and_what_next() {
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    fails(&bus, "vm start wbe", 1, "VM \"wbe\" was not started", "did you mean \"web\"?", "mainstay vm list");
    fails(&bus, "vm show nothing-like-it", 1, "not shown", "no VM \"nothing-like-it\"", "mainstay vm list");
    fails(&bus, "vm move web --to d", 1, "VM \"web\" was not moved", "no host \"d\"", "mainstay host list");
    fails(&bus, "vm start db", 4, "VM \"db\" was not started", "no host has 64 GiB free", "nothing was changed");
    fails(&bus, "vm enable-guest db", 1, "VM \"db\" was not given a port", "no PCI slot is free", "journalctl");
    fails(&bus, "vm stop mute", 1, "VM \"mute\" was not stopped", "may still take effect", "mainstay events");
    fails(&bus, "cluster set speed=9", 2, "speed=9 was not set", "no such setting", "profile=fast");
    fails(&bus, "datastore set nsf1 --fence none", 1, "was not changed", "did you mean \"nfs1\"?", "datastore list");
    fails(&bus, "datastore accept nfs1", 1, "was not accepted", "all that it ever acknowledged", "datastore list");
    fails(&bus, "datastore add a/b /dev/shm", 2, "was not added", "name", "letters");
    fails(&bus, "datastore add d /dev/shm --fence x", 2, "was not added", "--fence x", "absolute path");
    fails(&bus, "datastore add d dev/shm", 1, "was not added", "not absolute", "from / on");
    fails(&bus, "datastore add d /no/such", 1, "was not added", "/no/such", "mount");
    fails(&bus, "datastore add d /etc/passwd", 1, "was not added", "no folder", "mounted folder");
    fails(&bus, "datastore add d /proc/self", 1, "was not added", "", "");
    fails(&bus, "config check /no/such", 1, "was not checked", "no such file", "path");
    assert_eq!(agent.asked.lock().unwrap().len(), 3, "only three of these reached the agent");
    drop(agent);
    fails(&bus, "status", 3, "the status is not known", "mainstayd is not running", "systemctl status mainstayd");
    fails(&bus, "vm start web", 3, "VM \"web\" was not started", "not running", "doctor");
    let words = "status nonsense";
    assert_eq!(say(&bus, words).0, 2, "clap's usage errors");
    assert_eq!(say(&bus, "").0, 2, "no command");
}

#[test]
fn only_root_may_change() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not checked: becoming another user needs root");
        return;
    }
    let bus = PrivateBus::started();
    let agent = FakeAgent::on(&bus);
    let copy = reachable_copy(&bus);
    let nobody = |words: &str| {
        let mut command = Command::new(&copy);
        command.env_clear().env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()).current_dir("/").uid(65534).gid(65534);
        ended(command.args(words.split_whitespace()))
    };
    for words in ["status", "vm list", "vm explain db", "events", "host show a", "datastore list"] {
        assert_eq!(nobody(words).0, 0, "{words}");
    }
    let before = agent.asked.lock().unwrap().len();
    for words in
        ["vm start web", "vm stop web", "vm move web", "cluster set profile=fast", "datastore set nfs1 --fence none"]
    {
        let (code, out, err) = nobody(words);
        assert_eq!((code, out.as_str()), (4, ""), "{words}: {err}");
        assert!(err.contains("only root may do that") && err.contains("nothing was changed"), "{words}: {err}");
    }
    for words in ["cluster init", "cluster join mst1-x", "cluster token"] {
        let (code, _, err) = nobody(words);
        assert_eq!(code, 4, "{words}");
        assert!(err.contains("as root"), "{words}: {err}");
    }
    assert_eq!(agent.asked.lock().unwrap().len(), before);
}

/// `mainstay … | head -1` and a reader that is gone at once.
#[test]
fn a_closed_pipe_is_quiet() {
    let bus = PrivateBus::started();
    let _agent = FakeAgent::on(&bus);
    for words in ["--help", "status", "vm list --json", "status --watch", "events --since 2026-11-25", "doctor"] {
        let mut child = mainstay(&bus)
            .args(words.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "", "{words}");
        assert_eq!(ended.status.code(), Some(0), "{words}");
    }
}

#[test]
fn configuration_is_checked() {
    let bus = PrivateBus::prepared();
    let file = bus.folder.path().join("mainstay.toml");
    let words = format!("config check {}", file.display());
    std::fs::write(&file, "[beat]\nport = 7000\n").unwrap();
    let (code, out, _) = say(&bus, &words);
    assert_eq!((code, out.contains("no mistakes")), (0, true), "{out}");
    std::fs::write(&file, "[beat]\nprot = 7000\nttl = 0\n").unwrap();
    let (code, out, _) = say(&bus, &words);
    assert_eq!((code, out.lines().count()), (1, 2), "{out}");
    assert!(out.contains("line 2") && out.contains("port"), "{out}");
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/mainstay.toml");
    assert_eq!(say(&bus, &format!("config check {shipped}")).0, 0, "the shipped file");
}

#[test]
fn failures_of_guests() {
    let bus = PrivateBus::started();
    let _agent = FakeAgent::on(&bus);
    shows(
        &bus,
        "vm failures web",
        "
N  HOST  WHEN                 FAILURE, REMEDY, REASON
1  a     2026-11-25 17:00:01  Linux panic; reset done
                              Kernel panic - not syncing: sysrq triggered crash
1  b     2026-11-25 17:00:01  no bootable device; reset done
                              No bootable device.
3  a     2026-11-25 17:00:03  Linux panic; reset done; memory kept, 300 MiB
                              Kernel panic - not syncing: sysrq triggered crash
4  a     2026-11-25 17:00:04  reported; reset not done
                              app/db: no answer
No answer of c: not heard
",
    );
    shows(&bus, "vm failures db", "No failure of db is kept.\n");
    shows(
        &bus,
        "vm failures web --show 3",
        "
VM       web
Failure  3 of host a
When     2026-11-25 17:00:03.000
Kind     Linux panic
Line     Kernel panic - not syncing: sysrq triggered crash
Cause    app/db: no answer
System   debian 12 6.1.0-28-amd64
Remedy   reset
Outcome  done
Waited   41 ms for what is kept
Kept     console.log, messages.txt, screen.png
Missing  screen.txt (the screen is in a graphics mode)
Memory   300 MiB on host a: /var/lib/mainstay/failures/x/3/memory.dump

Console, its end:
[    1.52] sysrq
[2J[    1.53] Kernel panic - not syncing: sysrq triggered crash

Messages:
messages.txt
",
    );
    fails(&bus, "vm failures web --show 1", 2, "failure 1 of", "a and b have one with this number", "--host a");
    fails(
        &bus,
        "vm failures web --show 2",
        1,
        "failure 2 of",
        "no host that answers keeps it; c: not heard",
        "lists all",
    );
    fails(&bus, "vm failures web --show 4", 1, "failure 4 of", "cannot read statistics.txt", "journalctl");
    fails(&bus, "vm failures web --export x y", 2, "nothing was written to y", "no number", "--export takes");
    fails(&bus, "vm failures wbe", 1, "\"wbe\"", "did you mean \"web\"?", "vm list");
    let (_, json, _) = say(&bus, "vm failures web --show 1 --host b --json");
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["failure"]["class"]["kind"], "no-boot-device");
    assert_eq!(json["texts"]["messages.txt"], "messages.txt\n");
    let (_, json, _) = say(&bus, "vm failures web --json");
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json["failures"].as_array().unwrap().len(), &json["silent"][0]), (4, &Value::from("c: not heard")));

    let file = bus.folder.path().join("failure.tar");
    let export = format!("vm failures web --export 3 {}", file.display());
    let (code, out, err) = say(&bus, &export);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("web: failure 3 is in ") && out.contains("without its memory: 300 MiB on"), "{out}");
    let names = Command::new("tar").arg("-tf").arg(&file).output().unwrap().stdout;
    let folder = "failure-00000000-0000-0000-0000-0000beef0001-3";
    let expected: Vec<String> =
        ["failure.json", "console.log", "messages.txt", "screen.png"].map(|name| format!("{folder}/{name}")).to_vec();
    assert_eq!(String::from_utf8(names).unwrap().lines().collect::<Vec<_>>(), expected);
    let console = Command::new("tar").arg("-xOf").arg(&file).arg(&expected[1]).output().unwrap().stdout;
    assert_eq!(console, bus::example_file(FailureFile::Console));
    fails(&bus, &export, 1, "was not written to", "File exists", "name a new file");
}
