//! A host for the guard's tests: the real binary, a real folder as datastore, processes that look like QEMU.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use mainstay::exec::guard_client::{GuardClient, GuardEvent};
use mainstay::exec::{clock, datastore};
use mainstay::types::guard::{
    BeatKey, GUARD_PROTOCOL, GuardConfig, GuardDatastore, GuardMessage, GuardOrder, GuardReport, LeaseView, Purpose,
    Refusal, RowView,
};
use mainstay::types::settings::Timing;
use mainstay::types::{
    BootId, Claim, ClaimReason, ClusterId, DatastoreId, Digest, Epoch, Generation, Holder, HostId, HostIndex,
    Incarnation, Nonce, ObjectKind, Owner, Roster, RosterEntry, Tenure, Ticket, VmId, VmState, Wanted,
};
use mainstay::wire::record;
use uuid::Uuid;

use crate::qemu::Qemu;
use crate::systemd::Systemd;

/// Longest wait for anything.
pub const SOON: Duration = Duration::from_secs(20);
/// A lease that outlasts a restart on a machine that is busy with other things.
pub const LONG: Timing = Timing { lease: Duration::from_secs(10), ..Timing::FAST };
pub const CLUSTER: ClusterId = ClusterId(Uuid::from_u128(0xc1));
pub const DATASTORE: DatastoreId = DatastoreId(Uuid::from_u128(0xd1));
pub const ME: HostId = HostId(Uuid::from_u128(0xa1));
pub const OTHER: HostId = HostId(Uuid::from_u128(0xa2));

pub struct Host {
    dir: tempfile::TempDir,
    guard: Child,
    pub systemd: Option<Systemd>,
    client: GuardClient,
    events: Receiver<GuardEvent>,
    tickets: u64,
    pub lease: Option<LeaseView>,
    pub rows: Vec<RowView>,
    pub alarms: Vec<String>,
    answers: Vec<(Ticket, Result<(), Refusal>)>,
}

pub fn tenure(vm: VmId, generation: u64) -> Tenure {
    Tenure { vm, generation: Generation(generation) }
}

impl Host {
    /// A host with one prepared datastore, its guard started and configured, its lease valid.
    pub fn new() -> Self {
        let mut host = Self::unconfigured();
        host.configure(Timing::FAST);
        host
    }

    /// The same, under something that plays systemd: it keeps the guard's memory.
    pub fn supervised(timing: Timing) -> Self {
        let mut host = Self::start(prepared(), true);
        host.configure(timing);
        host
    }

    /// With this as the host's configuration.
    pub fn with_config(text: &str) -> Self {
        let dir = prepared();
        fs::write(dir.path().join("mainstay.toml"), text).unwrap();
        let mut host = Self::start(dir, true);
        host.configure(LONG);
        host
    }

    pub fn configure(&mut self, timing: Timing) {
        self.order(GuardOrder::Configure(Box::new(self.config(timing)))).unwrap();
        self.until("a lease", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
    }

    pub fn unconfigured() -> Self {
        Self::start(prepared(), false)
    }

    fn start(dir: tempfile::TempDir, supervised: bool) -> Self {
        let mut systemd = supervised.then(|| Systemd::new(dir.path()));
        let guard = spawn_guard(dir.path(), systemd.as_mut());
        let (to, events) = channel();
        let client = GuardClient::spawn(dir.path().join("guard.sock"), move |event| drop(to.send(event)));
        let mut host = Self {
            dir,
            guard,
            systemd,
            client,
            events,
            tickets: 0,
            lease: None,
            rows: Vec::new(),
            alarms: Vec::new(),
            answers: Vec::new(),
        };
        host.connected();
        host
    }

    fn connected(&mut self) {
        let deadline = Instant::now() + SOON;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(GuardEvent::Connected) => return,
                Ok(_) => {}
                Err(error) => panic!("no guard: {error}"),
            }
        }
    }

    pub fn config(&self, timing: Timing) -> GuardConfig {
        let path = self.store().display().to_string();
        GuardConfig {
            cluster: CLUSTER,
            host: ME,
            index: HostIndex(0),
            keys: vec![BeatKey { id: 1, secret: [7; 32] }],
            timing,
            interfaces: Vec::new(),
            peers: Vec::new(),
            datastores: vec![GuardDatastore { id: DATASTORE, position: 0, path, accepted: 0 }],
        }
    }

    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn root(&self) -> PathBuf {
        self.store().join(".mainstay").join(CLUSTER.to_string())
    }

    pub fn order(&mut self, order: GuardOrder) -> Result<(), Refusal> {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.client.order(ticket, order);
        self.until("an answer", |host| host.answers.iter().any(|(of, _)| *of == ticket));
        let at = self.answers.iter().position(|(of, _)| *of == ticket).unwrap();
        self.answers.remove(at).1
    }

    pub fn epoch(&self) -> Epoch {
        self.lease.as_ref().unwrap().epoch
    }

    pub fn expect(&mut self, vm: &Qemu, generation: u64, purpose: Purpose, within: Duration) -> Result<(), Refusal> {
        self.order(GuardOrder::Expect {
            tenure: tenure(vm.vm, generation),
            name: vm.name.clone(),
            home: DATASTORE,
            epoch: self.epoch(),
            deadline: clock::now() + within,
            purpose,
            writes: Vec::new(),
        })
    }

    pub fn claimed(&mut self, vm: &Qemu, generation: u64, epoch: Epoch) -> Result<(), Refusal> {
        self.put_claim(vm.vm, generation);
        let deadline = clock::now() + SOON;
        self.order(GuardOrder::Claimed { tenure: tenure(vm.vm, generation), epoch, deadline })
    }

    /// A claim that names this host lies there.
    fn put_claim(&self, vm: VmId, generation: u64) {
        let folder = self.root().join("claims").join(vm.to_string());
        if fs::create_dir_all(&folder).is_err() {
            return; // The storage is cut off.
        }
        let owner = Owner { host: ME, boot: BootId::default(), incarnation: Incarnation(1) };
        let claim = Claim {
            kind: ObjectKind::Vm,
            tenure: tenure(vm, generation),
            name: "web".to_owned(),
            holder: Holder::Host(owner),
            home: DATASTORE,
            wanted: Wanted::Running,
            reason: ClaimReason::StartedByPerson,
            record: Digest::default(),
            nonce: Nonce(1),
            maker: ME,
            made_unix_ms: 0,
            debts: Vec::new(),
        };
        fs::write(folder.join("new"), record::encode_claim(&claim).unwrap()).unwrap();
        fs::rename(folder.join("new"), folder.join(generation.to_string())).unwrap();
    }

    /// A QEMU that runs under claim 1.
    pub fn running(&mut self, name: &str) -> Qemu {
        let mut vm = Qemu::new(self.dir.path(), name);
        self.expect(&vm, 1, Purpose::Start, SOON).unwrap();
        self.claimed(&vm, 1, self.epoch()).unwrap();
        vm.start();
        self.until("running", |host| host.state(&vm, 1) == Some(VmState::Running));
        vm.until_runs();
        vm
    }

    pub fn vm(&self, name: &str) -> Qemu {
        Qemu::new(self.dir.path(), name)
    }

    pub fn row(&self, vm: &Qemu, generation: u64) -> Option<&RowView> {
        self.rows.iter().find(|row| row.tenure == tenure(vm.vm, generation))
    }

    pub fn state(&self, vm: &Qemu, generation: u64) -> Option<VmState> {
        self.row(vm, generation).map(|row| row.state)
    }

    /// Takes reports in until it is so.
    pub fn until(&mut self, what: &str, so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + SOON;
        while !so(self) {
            match self.events.recv_timeout(Duration::from_millis(5)) {
                Ok(event) => self.take(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "no {what}: {:?} {:?} {:?}", self.lease, self.rows, self.alarms);
        }
    }

    /// Listens for so long.
    pub fn wait(&mut self, span: Duration) {
        let end = Instant::now() + span;
        while Instant::now() < end {
            if let Ok(event) = self.events.recv_timeout(Duration::from_millis(5)) {
                self.take(event);
            }
        }
    }

    fn take(&mut self, event: GuardEvent) {
        match event {
            GuardEvent::Connected => {
                self.rows.clear();
                self.lease = None;
            }
            GuardEvent::Lost(_) => {}
            GuardEvent::Report(report) => match report {
                GuardReport::Lease(lease) => self.lease = Some(lease),
                GuardReport::Row(row) => {
                    self.rows.retain(|other| other.tenure != row.tenure);
                    self.rows.push(row);
                }
                GuardReport::Forgotten { tenure } => self.rows.retain(|row| row.tenure != tenure),
                GuardReport::Alarm(text) => self.alarms.push(text),
                GuardReport::Done { ticket, result } => self.answers.push((ticket, result)),
                GuardReport::Hello { .. } | GuardReport::Beaten { .. } => {}
            },
        }
    }

    /// The datastore goes away under the guard, and comes back.
    pub fn cut_store(&self) {
        fs::rename(self.root(), self.dir.path().join("away")).unwrap();
    }

    pub fn heal_store(&self) {
        fs::rename(self.dir.path().join("away"), self.root()).unwrap();
    }

    /// SIGKILL, as a crash would be.
    pub fn kill_guard(&mut self) {
        self.guard.kill().unwrap();
        self.guard.wait().unwrap();
    }

    /// What systemd's ExecStopPost does.
    pub fn stop_all(&self) {
        assert!(command(self.dir.path()).arg("--stop-all").status().unwrap().success());
    }

    pub fn restart_guard(&mut self) {
        self.guard = spawn_guard(self.dir.path(), self.systemd.as_mut());
        self.rows.clear();
        self.lease = None;
        self.connected();
    }

    /// The guard's child.
    pub fn child(&self) -> u32 {
        let text = fs::read_to_string(self.dir.path().join("kept/processes.json")).unwrap();
        let pair: serde_json::Value = serde_json::from_str(&text).unwrap();
        pair["child"]["pid"].as_u64().unwrap() as u32
    }

    pub fn parent(&self) -> u32 {
        self.guard.id()
    }

    /// Waits until the parent has ended by itself; whether it says that it went well.
    pub fn guard_ended(&mut self) -> bool {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.guard.try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < deadline, "the guard goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A second guard beside the first, which is only reaped.
    pub fn start_another(&mut self) {
        let mut first = std::mem::replace(&mut self.guard, spawn_guard(self.dir.path(), self.systemd.as_mut()));
        drop(first.wait());
        self.rows.clear();
        self.lease = None;
        self.connected();
    }

    /// What `systemctl restart` does.
    pub fn restart_planned(&mut self) {
        signal(self.parent(), Signal::SIGTERM);
        assert!(self.guard_ended());
        self.stop_all();
        self.restart_guard();
    }

    /// What `systemctl reload` does.
    pub fn reload(&mut self) {
        self.systemd.iter_mut().for_each(Systemd::take);
        assert!(command(self.dir.path()).arg("--reload").status().unwrap().success());
        self.rows.clear();
        self.lease = None;
        self.connected();
    }

    pub fn guard_is_alive(&mut self) -> bool {
        self.guard.try_wait().unwrap().is_none()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("guard.sock")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }
}

pub fn signal(pid: u32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.guard.kill());
        drop(self.guard.wait());
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// A folder with one prepared datastore.
fn prepared() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["store", "libvirt", "kept"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    let members = vec![RosterEntry { index: HostIndex(0), host: ME }, RosterEntry { index: HostIndex(1), host: OTHER }];
    let roster = Roster { cluster: CLUSTER, datastore: DATASTORE, generation: 1, members };
    datastore::prepare(&dir.path().join("store"), &roster, ME).unwrap();
    dir
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay-guard"));
    for (option, name) in [
        ("--socket", "guard.sock"),
        ("--state", "state/host.state"),
        ("--kept", "kept"),
        ("--libvirt", "libvirt"),
        ("--config", "mainstay.toml"),
    ] {
        command.arg(option).arg(dir.join(name));
    }
    command
}

fn spawn_guard(dir: &Path, systemd: Option<&mut Systemd>) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap();
    let mut start = match systemd {
        Some(systemd) => systemd.command(&command(dir)),
        None => command(dir),
    };
    start.stderr(log).spawn().unwrap()
}

/// Names the guard's socket to a process that is not root.
const STRANGER: &str = "MAINSTAY_TEST_STRANGER";

/// Greets the guard as nobody, and gives how many bytes came back.
pub fn greet_as_nobody(host: &Host) -> i32 {
    let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    // What the file system forbids is not what is tested.
    open(host.dir.path(), 0o755);
    open(&host.socket(), 0o666);
    let program = host.dir.path().join("stranger");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", "vcpu"]).env(STRANGER, host.socket()).uid(65534).gid(65534).stdout(Stdio::null());
    command.status().unwrap().code().unwrap()
}

/// Is that process, if the environment says so.
pub fn stranger() {
    let Some(path) = std::env::var_os(STRANGER) else { return };
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    let hello = GuardMessage { ticket: Ticket(1), order: GuardOrder::Hello { protocol: GUARD_PROTOCOL } };
    drop(mainstay::wire::frame::write(&mut stream, &hello)); // It may be refused before that.
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    std::process::exit(answer.len().min(99) as i32);
}
