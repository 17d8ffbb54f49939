//! A host for the guard's tests: the real binary, a real folder as datastore, processes that look like QEMU.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use mainstay::exec::guard_client::{GuardClient, GuardEvent};
use mainstay::exec::{clock, datastore};
use mainstay::types::guard::{
    BeatKey, GuardConfig, GuardDatastore, GuardOrder, GuardReport, LeaseView, Purpose, Refusal, RowView,
};
use mainstay::types::settings::Timing;
use mainstay::types::{
    ClusterId, DatastoreId, Epoch, Generation, HostId, HostIndex, Roster, RosterEntry, Tenure, Ticket, Time, VmId,
    VmState,
};
use uuid::Uuid;

/// Longest wait for anything.
pub const SOON: Duration = Duration::from_secs(20);
pub const CLUSTER: ClusterId = ClusterId(Uuid::from_u128(0xc1));
pub const DATASTORE: DatastoreId = DatastoreId(Uuid::from_u128(0xd1));
pub const ME: HostId = HostId(Uuid::from_u128(0xa1));
pub const OTHER: HostId = HostId(Uuid::from_u128(0xa2));

pub struct Host {
    dir: tempfile::TempDir,
    guard: Child,
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
        host.order(GuardOrder::Configure(Box::new(host.config(Timing::FAST)))).unwrap();
        host.until("a lease", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
        host
    }

    pub fn unconfigured() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["store", "libvirt", "kept"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let members =
            vec![RosterEntry { index: HostIndex(0), host: ME }, RosterEntry { index: HostIndex(1), host: OTHER }];
        let roster = Roster { cluster: CLUSTER, datastore: DATASTORE, generation: 1, members };
        datastore::prepare(&dir.path().join("store"), &roster, ME).unwrap();
        Self::start(dir)
    }

    fn start(dir: tempfile::TempDir) -> Self {
        let guard = spawn_guard(dir.path());
        let (to, events) = channel();
        let client = GuardClient::spawn(dir.path().join("guard.sock"), move |event| drop(to.send(event)));
        let mut host = Self {
            dir,
            guard,
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
            datastores: vec![GuardDatastore { id: DATASTORE, position: 0, path }],
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
        let deadline = clock::now() + SOON;
        self.order(GuardOrder::Claimed { tenure: tenure(vm.vm, generation), epoch, deadline })
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
        self.guard = spawn_guard(self.dir.path());
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

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.guard.kill());
        drop(self.guard.wait());
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay-guard"));
    for (option, name) in
        [("--socket", "guard.sock"), ("--state", "state/host.state"), ("--kept", "kept"), ("--libvirt", "libvirt")]
    {
        command.arg(option).arg(dir.join(name));
    }
    command
}

fn spawn_guard(dir: &Path) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap();
    command(dir).stderr(log).spawn().unwrap()
}

/// Names the file of stamps to a process that plays QEMU.
const STAMPS: &str = "MAINSTAY_TEST_STAMPS";

/// Plays a vCPU for ever, if the environment says so.
pub fn vcpu() {
    let Some(path) = std::env::var_os(STAMPS) else { return };
    let file = fs::File::create(path).unwrap();
    loop {
        file.write_all_at(&clock::now().0.to_ne_bytes(), 0).unwrap();
    }
}

/// A process whose command line is that of a QEMU, with the pid file that libvirt would write.
pub struct Qemu {
    pub vm: VmId,
    pub name: String,
    pid_file: PathBuf,
    child: Option<Child>,
}

impl Qemu {
    fn new(dir: &Path, name: &str) -> Self {
        let pid_file = dir.join("libvirt").join(format!("{name}.pid"));
        Self { vm: VmId(Uuid::new_v4()), name: name.to_owned(), pid_file, child: None }
    }

    /// A process that works without pause and stamps each turn, as a guest in the lab does.
    pub fn start(&mut self) {
        self.start_in(|_| {});
    }

    /// The same; `place` puts the pid into a cgroup before libvirt's pid file tells of it.
    pub fn start_in(&mut self, place: impl Fn(u32)) {
        let stamps = self.pid_file.with_extension("stamps");
        let mut command = Command::new(std::env::current_exe().unwrap());
        // What follows the two dashes are names of tests that do not exist.
        command.args(["--exact", "vcpu", "--", "-name", &self.name, "-uuid", &self.vm.to_string()]);
        let child = command.env(STAMPS, &stamps).stdout(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + SOON;
        while fs::metadata(&stamps).map_or(0, |file| file.len()) == 0 {
            assert!(Instant::now() < deadline, "{} does not come up", self.name);
            std::thread::sleep(Duration::from_millis(1));
        }
        place(child.id());
        fs::write(&self.pid_file, child.id().to_string()).unwrap();
        self.child = Some(child);
    }

    /// When it last executed something.
    pub fn last_turn(&self) -> Time {
        let bytes = fs::read(self.pid_file.with_extension("stamps")).unwrap();
        Time(u64::from_ne_bytes(bytes.try_into().unwrap()))
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// State letters of all threads; `Z` alone when it has exited.
    pub fn threads(&self) -> String {
        let state = |stat: PathBuf| {
            let text = fs::read_to_string(stat).ok()?;
            text.rsplit_once(')')?.1.trim_start().chars().next()
        };
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        tasks.flatten().filter_map(|task| state(task.path().join("stat"))).collect()
    }

    pub fn stands(&self) -> bool {
        self.threads().chars().all(|state| state == 'T')
    }

    pub fn until_stands(&self) {
        self.until("stands", Self::stands);
    }

    /// It executes something after this call.
    pub fn until_runs(&self) {
        let now = clock::now();
        self.until("runs", |vm| now < vm.last_turn());
    }

    pub fn until_exited(&self) {
        self.until("exited", |vm| vm.threads() == "Z");
    }

    fn until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + SOON;
        while !so(self) {
            assert!(Instant::now() < deadline, "{} never {what}: threads {}", self.name, self.threads());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn kill(&mut self) {
        self.child.as_mut().unwrap().kill().unwrap();
        fs::remove_file(&self.pid_file).unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}
