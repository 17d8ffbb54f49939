//! A process that looks like a QEMU, and stamps each of its turns as a vCPU would.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mainstay::exec::clock;
use mainstay::types::{Time, VmId};
use uuid::Uuid;

use crate::host::SOON;

/// Names the file of stamps to a process that plays QEMU.
const STAMPS: &str = "MAINSTAY_TEST_STAMPS";

/// Plays a vCPU for ever, if the environment says so.
pub fn vcpu() {
    let Some(path) = std::env::var_os(STAMPS) else { return };
    let file = fs::File::create(path).unwrap();
    let (mut last, mut longest) = (clock::now(), Duration::ZERO);
    loop {
        let now = clock::now();
        longest = longest.max(now.since(last));
        last = now;
        let words = [now.0.to_ne_bytes(), (longest.as_nanos() as u64).to_ne_bytes()];
        file.write_all_at(words.as_flattened(), 0).unwrap();
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
    pub fn new(dir: &Path, name: &str) -> Self {
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
        Time(self.stamps()[0])
    }

    /// The longest time in which it executed nothing, ever.
    pub fn longest_pause(&self) -> Duration {
        Duration::from_nanos(self.stamps()[1])
    }

    fn stamps(&self) -> [u64; 2] {
        let bytes = fs::read(self.pid_file.with_extension("stamps")).unwrap();
        [0, 8].map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap()))
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

    /// Nothing is left of it.
    pub fn reap(&mut self) {
        self.child.take().unwrap().wait().unwrap();
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
