//! A private bus with the policy file that is installed, and an agent that answers from a fixed view.

#![allow(dead_code)] // Each test binary uses its own part.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mainstay::api::dbus::{self, Ask, AskMessage, AskReply, Bus};
use mainstay::exec::doctor::{Finding, Level};
use mainstay::types::control::Denial;
use mainstay::types::failure::{
    Class, Failure, FailureAsk, FailureFile, FailureKind, FailureList, Family, KeptFile, MemoryDump, MissingFile, Piece,
};
use mainstay::types::guests::Remedy;
use mainstay::types::verdict::{VerdictAsk, VerdictView};
use mainstay::types::view::{
    ClusterView, DatastoreView, EvacuationView, FenceDeviceView, HostView, NoteView, VIEW_SCHEMA, VmView, WhatIfCpu,
    WhatIfView, WhatIfVm,
};
use tokio::sync::{broadcast, mpsc};

pub mod say;

/// No test waits longer for anything.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A dbus-daemon of its own; ends with the value.
pub struct PrivateBus {
    pub folder: tempfile::TempDir,
    daemon: Option<Child>,
}

impl PrivateBus {
    /// Writes the configuration; `start` starts the daemon.
    pub fn prepared() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Another user must reach the socket.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let policy = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/org.mainstay.Agent1.conf");
        // Without root the policy's rules for root would fit nobody.
        let me = nix::unistd::geteuid();
        let mine = if me.is_root() {
            String::new()
        } else {
            format!("<policy user=\"{me}\"><allow own=\"*\"/><allow send_destination=\"*\"/></policy>")
        };
        let socket = folder.path().join("bus");
        let config = format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
                "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
            <busconfig>
              <type>system</type>
              <listen>unix:path={}</listen>
              <auth>EXTERNAL</auth>
              <policy context="default">
                <allow user="*"/>
                <deny own="*"/>
                <deny send_type="method_call"/>
                <allow send_type="signal"/>
                <allow send_requested_reply="true" send_type="method_return"/>
                <allow send_requested_reply="true" send_type="error"/>
                <allow receive_type="method_call"/>
                <allow receive_type="method_return"/>
                <allow receive_type="error"/>
                <allow receive_type="signal"/>
                <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
              </policy>
              {mine}
              <include>{policy}</include>
            </busconfig>"#,
            socket.display()
        );
        fs::write(folder.path().join("bus.conf"), config).unwrap();
        Self { folder, daemon: None }
    }

    pub fn started() -> Self {
        let mut bus = Self::prepared();
        bus.start();
        bus
    }

    pub fn start(&mut self) {
        let mut daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", self.folder.path().join("bus.conf").display()))
            .args(["--nofork", "--nopidfile", "--nosyslog", "--print-address=1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null()) // It complains of limits that it cannot raise in a container.
            .spawn()
            .expect("dbus-daemon is installed (apt install dbus)");
        // It prints its address once it listens.
        let mut line = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("unix:"), "{line}");
        self.daemon = Some(daemon);
    }

    pub fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
        let _ = fs::remove_file(self.folder.path().join("bus"));
    }

    pub fn address(&self) -> String {
        format!("unix:path={}", self.folder.path().join("bus").display())
    }

    pub fn bus(&self) -> Bus {
        Bus::Address(self.address())
    }
}

impl Drop for PrivateBus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// An agent in this process.
pub struct FakeAgent {
    /// Everything asked except `View`.
    pub asked: Arc<Mutex<Vec<Ask>>>,
    /// What it shows.
    pub view: Arc<Mutex<ClusterView>>,
    /// What it signals.
    pub notes: broadcast::Sender<NoteView>,
    _runtime: tokio::runtime::Runtime,
}

impl FakeAgent {
    /// Serves on the bus; comes back when it answers.
    pub fn on(bus: &PrivateBus) -> Self {
        let agent = Self::begun(bus);
        agent._runtime.block_on(async {
            let start = Instant::now();
            loop {
                if let Ok(client) = dbus::client::Agent::connect(&bus.bus()).await
                    && client.view().await.is_ok()
                {
                    return;
                }
                assert!(start.elapsed() < PATIENCE, "the agent answers");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        agent
    }

    /// Begins to serve; the bus may not be there yet.
    pub fn begun(bus: &PrivateBus) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (asks, mut asking) = mpsc::channel::<AskMessage>(dbus::ASKS_WAITING);
        let (notes, heard) = broadcast::channel(64);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let view = Arc::new(Mutex::new(example()));
        runtime.spawn(dbus::serve(bus.bus(), asks, heard));
        let (log, shown) = (asked.clone(), view.clone());
        runtime.spawn(async move {
            while let Some(message) = asking.recv().await {
                let reply = answer(&message.ask, &shown.lock().unwrap());
                if message.ask != Ask::View {
                    log.lock().unwrap().push(message.ask);
                }
                if let Some(reply) = reply {
                    let _ = message.answer.send(reply);
                }
            }
        });
        Self { asked, view, notes, _runtime: runtime }
    }
}

fn answer(ask: &Ask, view: &ClusterView) -> Option<AskReply> {
    let name = |id| view.vms.iter().find(|vm| vm.id == id).map(|vm| vm.name.clone()).unwrap_or_default();
    Some(match ask {
        Ask::View => AskReply::View(Box::new(view.clone())),
        Ask::Notes { since_unix_ms, vm, host } => {
            let fits = |note: &NoteView| {
                *since_unix_ms <= note.unix_ms
                    && vm.as_ref().is_none_or(|vm| note.vm.as_ref() == Some(vm))
                    && host.as_ref().is_none_or(|host| note.host == *host)
            };
            AskReply::Notes(example_notes().into_iter().filter(fits).collect())
        }
        Ask::Verdicts(ask) => {
            let mut found: Vec<VerdictView> = example_verdicts().into_iter().filter(|one| ask.is_for(one)).collect();
            if let VerdictAsk::List { .. } = ask {
                found.iter_mut().for_each(|verdict| verdict.evidence.clear());
            }
            AskReply::Verdicts(found)
        }
        Ask::Doctor => AskReply::Findings(findings()),
        Ask::Vm(command) => match name(command.vm()).as_str() {
            "web" => AskReply::Done(format!("done: {command:?}").chars().take(24).collect()),
            "db" => AskReply::Denied(Denial::Capacity("no host has 64 GiB free".into())),
            "mute" => return None,
            _ => AskReply::Denied(Denial::UnknownVm),
        },
        Ask::EnableGuest { vm } if name(*vm) == "web" => AskReply::Done("it was so already".into()),
        Ask::EnableGuest { .. } => AskReply::Failed("libvirt: no PCI slot is free".into()),
        Ask::TestFenceDevice { name } if name == "ipmi-a" => AskReply::Done("answers: its host is on (0.42 s)".into()),
        Ask::TestFenceDevice { .. } => AskReply::Failed("fence_ipmilan status failed (exit status: 1)".into()),
        Ask::Change(_) => AskReply::Done("settings 8 are in force on 3 hosts".into()),
        Ask::Failures { vm } if name(*vm) == "web" => AskReply::Failures(example_failures()),
        Ask::Failures { .. } => AskReply::Failures(FailureList::default()),
        Ask::FailurePiece { ask: FailureAsk::Piece { file: FailureFile::Statistics, .. }, .. } => {
            AskReply::Failed("cannot read statistics.txt: No such file or directory".into())
        }
        Ask::FailurePiece { ask: FailureAsk::Piece { file, from, .. }, .. } => {
            let whole = example_file(*file);
            let from = usize::try_from(*from).unwrap().min(whole.len());
            // In small pieces, so that there are several.
            let bytes = whole[from..whole.len().min(from + 20)].to_vec();
            AskReply::Piece(Piece { bytes, total: whole.len() as u64 })
        }
        Ask::FailurePiece { ask: FailureAsk::List { .. }, .. } => return None,
        Ask::WhatIf { hosts } if hosts == &["a"] => AskReply::WhatIf(Box::new(example_what_if())),
        Ask::WhatIf { hosts } => {
            AskReply::Denied(Denial::Contradiction(format!("no host is named {}", hosts.join(", "))))
        }
        // What it would answer stands where maintenance of its host is shown.
        Ask::Evacuate { .. } => {
            let seen = view.hosts[0].maintenance.clone();
            AskReply::Evacuating(Box::new(EvacuationView {
                wanted: seen.as_ref().is_none_or(|seen| !seen.ends),
                left: seen.as_ref().map_or(0, |seen| seen.left),
                stay: seen.map(|seen| seen.stay).unwrap_or_default(),
                within_s: 300,
            }))
        }
        Ask::Explain { vm } => match view.vms.iter().find(|one| one.id == *vm) {
            Some(vm) => AskReply::Explain(Box::new(vm.clone())),
            None => AskReply::Denied(Denial::UnknownVm),
        },
    })
}

/// Of the failure of a.
pub fn example_what_if() -> WhatIfView {
    let vm = |name: &str, to: Option<&str>, runs_s, after: &[&str], why: Option<&str>| WhatIfVm {
        name: name.into(),
        priority: "medium".into(),
        from: "a".into(),
        to: to.map(Into::into),
        runs_s,
        after: after.iter().map(|name| (*name).to_owned()).collect(),
        instead: Vec::new(),
        why: why.map(Into::into),
    };
    WhatIfView {
        schema: VIEW_SCHEMA,
        hosts: vec!["a".into()],
        over_s: 5.2,
        start_s: 0.8,
        measured: true,
        vms: vec![
            vm("db", Some("b"), Some(6.0), &[], None),
            vm("web", Some("c"), Some(6.8), &["db"], None),
            vm("big", None, None, &[], Some("b 4096 MiB of memory short; c is in maintenance")),
        ],
        cpus: vec![
            WhatIfCpu { host: "b".into(), cpus: 8, vcpus: 12, loss_percent: 34 },
            WhatIfCpu { host: "c".into(), cpus: 8, vcpus: 4, loss_percent: 0 },
        ],
        floor_percent: Some(25),
    }
}

/// A file of each of them.
pub fn example_file(file: FailureFile) -> Vec<u8> {
    match file {
        FailureFile::Console => {
            b"[    1.52] sysrq\r\n\x1b[2J[    1.53] Kernel panic - not syncing: sysrq triggered crash\n".to_vec()
        }
        FailureFile::Picture => b"\x89PNG\r\n".to_vec(),
        _ => format!("{}\n", file.name()).into_bytes(),
    }
}

/// Of web.
pub fn example_failures() -> FailureList {
    let failure = |number: u32, host: &str, family, kind, line: &str, outcome: &str| Failure {
        number,
        vm: mainstay::types::VmId(uuid::Uuid::from_u128(0xbeef_0001)),
        name: "web".into(),
        host: host.into(),
        unix_ms: 1_795_626_000_000 + u64::from(number) * 1000,
        class: Class { family, kind, line: line.into() },
        cause: "app/db: no answer".into(),
        system: "debian 12 6.1.0-28-amd64".into(),
        remedy: Remedy::Reset,
        outcome: outcome.into(),
        waited_ms: 41,
        files: [FailureFile::Console, FailureFile::Messages, FailureFile::Picture]
            .map(|file| KeptFile { file, bytes: example_file(file).len() as u64 })
            .to_vec(),
        missing: vec![MissingFile { file: FailureFile::Screen, why: "the screen is in a graphics mode".into() }],
        dump: MemoryDump::NotWanted,
    };
    let panic = "Kernel panic - not syncing: sysrq triggered crash";
    let hangs = "not done: libvirt does not answer";
    let mut without = failure(4, "a", Family::Unknown, FailureKind::Reported, "", hangs);
    without.files.push(KeptFile { file: FailureFile::Statistics, bytes: 7 });
    let mut with_memory = failure(3, "a", Family::Linux, FailureKind::Panic, panic, "done");
    let path = "/var/lib/mainstay/failures/x/3/memory.dump".to_owned();
    with_memory.dump = MemoryDump::Kept { path, bytes: 300 << 20 };
    FailureList {
        failures: vec![
            failure(1, "a", Family::Linux, FailureKind::Panic, panic, "done"),
            failure(1, "b", Family::Boot, FailureKind::NoBootDevice, "No bootable device.", "done"),
            with_memory,
            without,
        ],
        silent: vec!["c: not heard".into()],
    }
}

/// Three hosts, one of them dead.
pub fn example() -> ClusterView {
    let id = |number: u128| uuid::Uuid::from_u128(number);
    let host = |number: u128, name: &str, role: &str, verdict: &str, age| HostView {
        id: mainstay::types::HostId(id(number)),
        name: name.into(),
        role: role.into(),
        verdict: verdict.into(),
        evidence: format!("network beats {age:?} ms old, datastore nfs1 written by it in the last two seconds or so"),
        beat_age_ms: age,
        window_ms: None,
        libvirt: age.map(|_| true),
        vms: 2,
        free_mib: age.map(|_| 48_200),
        maintenance: None,
        quarantined: false,
        findings: Vec::new(),
        address: format!("192.0.2.1{number}:7784"),
    };
    let vm = |number: u128, name: &str, state: &str, host: Option<&str>, why: Option<&str>| VmView {
        id: mainstay::types::VmId(id(0xbeef_0000 + number)),
        name: name.into(),
        state: state.into(),
        host: host.map(str::to_owned),
        generation: u64::try_from(number).ok(),
        wanted: Some("running".into()),
        protected: name != "scratch",
        home: Some("nfs1".into()),
        on_doubt: "pause (default)".into(),
        why: why.map(str::to_owned),
        explain: vec![
            "owned by c under generation 5, which is over only when c says so, boots again, or lapses".into(),
            "image lock: the server drops it 10 s after its client is dead".into(),
        ],
    };
    ClusterView {
        schema: VIEW_SCHEMA,
        cluster: Some("prod".into()),
        seen_by: "b".into(),
        master: Some("a".into()),
        term: 3,
        settings_version: 7,
        hosts: vec![
            host(1, "a", "master", "live", Some(412)),
            host(2, "b", "subordinate", "live", Some(0)),
            host(3, "c", "unknown", "dead", None),
        ],
        rule_problems: Vec::new(),
        disarmed: None,
        fence_devices: vec![
            FenceDeviceView {
                name: "ipmi-a".into(),
                host: "a".into(),
                agent: "fence_ipmilan".into(),
                level: 1,
                fence_at: "suspect".into(),
                parameters: [("ip".into(), "10.0.9.1".into())].into(),
                secrets: vec!["password".into()],
                trouble: None,
                trusted: true,
            },
            FenceDeviceView {
                name: "pdu-c".into(),
                host: "c".into(),
                agent: "fence_apc".into(),
                level: 2,
                fence_at: "lapse".into(),
                parameters: Default::default(),
                secrets: Vec::new(),
                trouble: Some("it said that c was off, which then beat".into()),
                trusted: false,
            },
        ],
        vms: vec![
            vm(1, "web", "running", Some("a"), None),
            vm(5, "db", "waiting", Some("c"), Some("image lock of c on nfs1 is still held; ends in about 7 s")),
            vm(2, "mute", "running", Some("b"), None),
            vm(
                3,
                "scratch",
                "running",
                Some("b"),
                Some("disk /var/lib/libvirt/images/scratch.qcow2 is on no datastore"),
            ),
        ],
        datastores: vec![DatastoreView {
            health: "well".into(),
            id: mainstay::types::DatastoreId(id(9)),
            name: "nfs1".into(),
            path: "/srv/nfs1".into(),
            fence: "lock".into(),
            late_writes: "exclude".into(),
            lease: "valid".into(),
            latency_ms: Some(1.8),
            rolled_back: false,
            trouble: None,
            reached_by: vec!["a".into(), "b".into()],
        }],
    }
}

/// From 2026-11-25 17:00:00 UTC on.
pub fn example_notes() -> Vec<NoteView> {
    let note = |ms: u64, host: &str, level: &str, kind: &str, vm: Option<&str>, text: &str| NoteView {
        unix_ms: 1_795_626_000_000 + ms,
        host: host.into(),
        level: level.into(),
        kind: kind.into(),
        vm: vm.map(str::to_owned),
        text: text.into(),
        verdict: (kind == "host-dead").then(|| "a-28512345".to_owned()),
    };
    vec![
        note(120, "a", "warning", "host-suspected", None, "c is silent on the network for 3.0 s"),
        note(5_040, "a", "alarm", "host-dead", None, "c is dead: no network beat for 5.2 s, nothing new on nfs1"),
        note(5_900, "b", "info", "vm-started", Some("db"), "started here under generation 6; was c's, proof: lapsed"),
    ]
}

/// On c, and on a VM of it.
pub fn example_verdicts() -> Vec<VerdictView> {
    let verdict = |n: u64, kind: &str, vm: Option<&str>, text: &str, evidence: &[&str]| VerdictView {
        id: format!("a-{}", 28_512_345 + n),
        unix_ms: 1_795_626_005_040 + n,
        by: "a".into(),
        kind: kind.into(),
        host: Some(if vm.is_some() { "b" } else { "c" }.into()),
        vm: vm.map(str::to_owned),
        text: text.into(),
        evidence: evidence.iter().map(|line| (*line).to_owned()).collect(),
        recording: Some("/var/lib/mainstay/verdicts/a-28512345.verdict".into()),
    };
    let network = "network: its newest beat came 5.2 s ago, and it last heard this host 5.2 s ago";
    let stale = "nfs1: stale: newest beat 5.0 s ago (counter 812, incarnation 4, flags none); read here 0.2 s ago";
    vec![
        verdict(0, "host-dead", None, "host c is dead: network beat 5.2 s ago", &[network, stale]),
        verdict(1, "vm-placed", Some("db"), "db is to run on b: generation 5 is over", &["not on a: as good"]),
    ]
}

pub fn findings() -> Vec<Finding> {
    let finding = |id: &'static str, level, object: &str, what: &str, cure: &str| Finding {
        id: id.into(),
        level,
        object: object.into(),
        what: what.into(),
        cure: cure.into(),
    };
    vec![
        finding("libvirt", Level::Error, "libvirt", "does not answer: refused", "systemctl start libvirtd"),
        finding(
            "fence",
            Level::Warning,
            "nfs1",
            "no fence: VMs of a dead host wait until it was powered off or has booted again",
            "give it a fence: mainstay datastore set NAME --fence lock|command:/path",
        ),
        finding("clock", Level::Ok, "this host", "its clock is synchronised", ""),
    ]
}

/// The command, on this bus, as a script sees it.
pub fn mainstay(bus: &PrivateBus) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    command.env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()).env("TZ", "UTC").env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

/// A copy of the command that other users can reach.
pub fn reachable_copy(bus: &PrivateBus) -> PathBuf {
    let copy = bus.folder.path().join("mainstay");
    fs::copy(env!("CARGO_BIN_EXE_mainstay"), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}
