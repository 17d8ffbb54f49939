//! The judges are judged: planted crimes must be found, and honest work must not be blamed.
//!
//! ```text
//!  test ──► Rig: judges, and guests that look like QEMU from outside: this binary again, called
//!           `qemu-system-x86_64 … -uuid ID`, with a thread `CPU 0/TCG` that runs or rests as told on stdin
//! ```

use std::collections::HashMap;
use std::io::{BufRead, Write as _};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uuid::Uuid;

use super::{Judges, Moment, Verdict, Vm, Wish, thread_cpu};
use crate::guest_disk::{DISK_BYTES, Place, Record, SECTOR, Stamp, ring_sector};

const DEADLINE: Duration = Duration::from_secs(20);
const GUEST: &str = "MAINSTAY_LAB_TEST_GUEST";

struct Rig {
    folder: tempfile::TempDir,
    hosts: Arc<Mutex<HashMap<i32, String>>>,
    judges: Judges,
}

struct Guest(Child);

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Rest,
    Run,
    Idle,
    Burn(Duration),
    End,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let hosts = Arc::new(Mutex::new(HashMap::new()));
        let of_judges = hosts.clone();
        let judges = Judges::start(move |pid| of_judges.lock().unwrap().get(&pid).cloned()).unwrap();
        std::os::unix::fs::symlink(std::env::current_exe().unwrap(), folder.path().join("qemu-system-x86_64")).unwrap();
        Rig { folder, hosts, judges }
    }

    fn guest(&self, host: &str, vm: Uuid) -> Guest {
        let child = Command::new(self.folder.path().join("qemu-system-x86_64"))
            .args(["--exact", "judge::tests::guest_of_the_other_tests", "--nocapture", "--", "-uuid", &vm.to_string()])
            .env(GUEST, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.hosts.lock().unwrap().insert(child.id() as i32, host.into());
        Guest(child)
    }

    /// Starts a guest and waits until the judge has seen it execute.
    fn running_guest(&self, host: &str, vm: Uuid) -> Guest {
        let since = Moment::now();
        let mut guest = self.guest(host, vm);
        guest.tell("run");
        until("it runs", || self.judges.started(vm, since).is_some());
        guest
    }

    fn watch(&self, name: &str) -> (Uuid, std::fs::File) {
        let (id, path) = (Uuid::new_v4(), self.folder.path().join(name));
        let disk = std::fs::File::create(&path).unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        self.judges.watch(Vm { name: name.into(), id, disk: path });
        (id, disk)
    }
}

impl Guest {
    fn tell(&mut self, what: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{what}").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn guest_of_the_other_tests() {
    if std::env::var_os(GUEST).is_none() {
        return;
    }
    let shared = Arc::new((Mutex::new(Mode::Rest), Condvar::new()));
    let of_vcpu = shared.clone();
    std::thread::Builder::new().name("CPU 0/TCG".into()).spawn(move || vcpu(&of_vcpu.0, &of_vcpu.1)).unwrap();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        *shared.0.lock().unwrap() = match line.split_once(' ') {
            Some(("burn", ms)) => Mode::Burn(Duration::from_millis(ms.parse().unwrap())),
            _ if line == "run" => Mode::Run,
            _ if line == "idle" => Mode::Idle,
            _ => Mode::Rest,
        };
        shared.1.notify_all();
    }
    *shared.0.lock().unwrap() = Mode::End;
}

fn vcpu(mode: &Mutex<Mode>, changed: &Condvar) {
    let burn = |time: Duration| {
        let start = thread_cpu();
        while thread_cpu() - start < time {}
    };
    loop {
        let now = *changed.wait_while(mode.lock().unwrap(), |m| *m == Mode::Rest).unwrap();
        match now {
            Mode::Rest => {}
            Mode::Run => burn(Duration::from_millis(1)),
            Mode::Idle => {
                burn(Duration::from_millis(1));
                std::thread::sleep(Duration::from_millis(100));
            }
            Mode::Burn(time) => {
                burn(time);
                *mode.lock().unwrap() = Mode::Rest;
            }
            Mode::End => return,
        }
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn says(verdict: &Verdict, what: &str) -> bool {
    verdict.violations.iter().any(|v| v.contains(what))
}

/// Waits until a guest that was told to rest does so for the judge, too.
fn until_it_rests(rig: &Rig, vm: Uuid) {
    until("it rests", || rig.judges.running(vm).is_empty());
}

#[test]
fn a_planted_double_run_is_caught() {
    let (rig, vm) = (Rig::new(), Uuid::new_v4());
    let _one = rig.running_guest("h1", vm);
    assert_eq!(rig.judges.verdict().violations, [""; 0]);
    let _two = rig.running_guest("h2", vm);
    until("it is caught", || says(&rig.judges.verdict(), &format!("{vm} ran twice: its copy on h1")));
    until("both count as running", || rig.judges.running(vm).len() == 2);
    assert!(rig.judges.verdict().demand().is_err());
}

#[test]
fn a_handover_is_no_double_run_but_a_return_is() {
    let (rig, vm) = (Rig::new(), Uuid::new_v4());
    let mut one = rig.running_guest("h1", vm);
    let since = Moment::now();
    let mut two = rig.guest("h2", vm);
    one.tell("rest");
    until_it_rests(&rig, vm);
    assert!(rig.judges.started(vm, since).is_none(), "one that waits does not run");
    two.tell("run");
    until("the new one runs", || rig.judges.started(vm, since).is_some_and(|s| s.host == "h2"));
    assert_eq!(rig.judges.verdict().violations, [""; 0]);
    two.tell("rest");
    one.tell("burn 12");
    until("the return is caught", || says(&rig.judges.verdict(), "ran twice"));
}

#[test]
fn an_old_copy_may_gain_little_after_a_thaw() {
    let rig = Rig::new();
    for (burn, allowed) in [("burn 8", true), ("burn 60", false)] {
        let vm = Uuid::new_v4();
        let host = format!("h-{allowed}");
        let mut old = rig.running_guest(&host, vm);
        old.tell("rest");
        until_it_rests(&rig, vm);
        let mut new = rig.running_guest("h2", vm);
        new.tell("rest");
        rig.judges.thaw(&host);
        old.tell(burn);
        let gained = || rig.judges.verdict().thaws.iter().find(|g| g.vm == vm).map_or(Duration::ZERO, |g| g.gained);
        until("the gain is seen", || Duration::from_millis(4) < gained());
        if allowed {
            drop(old);
            until("it has gone", || rig.judges.verdict().thaws.iter().any(|g| g.vm == vm && g.gone.is_some()));
            assert!(gained() < Duration::from_millis(20), "{:?}", gained());
            assert!(!says(&rig.judges.verdict(), &vm.to_string()), "{:?}", rig.judges.verdict().violations);
        } else {
            until("it is caught", || says(&rig.judges.verdict(), &format!("{vm} ran twice")));
        }
    }
}

#[test]
fn the_end_state_is_what_was_wished() {
    let rig = Rig::new();
    let (runs, rests, wrong) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let mut idle = rig.running_guest("h1", runs);
    idle.tell("idle");
    let _wrong = rig.running_guest("h1", wrong);
    rig.judges.expect(runs, Wish::Running { starts: 1 });
    rig.judges.expect(wrong, Wish::Stopped);
    let names = |id: Uuid| Vm { name: id.to_string(), id, disk: rig.folder.path().join("none") };
    let said = |what: String| says(&rig.judges.verdict(), &what);
    until("the wrong one is told", || said(format!("{wrong} should not run and runs on h1")));
    until("the idle guest counts as running", || {
        rig.judges.running(runs).len() == 1 && !said(format!("{runs} should"))
    });
    rig.judges.watch(names(rests));
    rig.judges.expect(rests, Wish::Running { starts: 1 });
    assert!(said(format!("{rests} should run and does not")));
    drop(idle);
    let _again = rig.running_guest("h2", runs);
    until("two starts are told", || said(format!("{runs} was started 2 times, 1 allowed")));
}

#[test]
fn a_pause_outside_the_reach_is_blamed() {
    let (rig, vm, reached) = (Rig::new(), Uuid::new_v4(), Uuid::new_v4());
    let mut guests = [rig.running_guest("h1", vm), rig.running_guest("h1", reached)];
    guests.iter_mut().for_each(|g| g.tell("idle"));
    rig.judges.fault("nothing much", &[reached]);
    guests.iter().for_each(|g| g.signal(Signal::SIGSTOP));
    std::thread::sleep(Duration::from_millis(600)); // The pause itself.
    guests.iter().for_each(|g| g.signal(Signal::SIGCONT));
    until("it is blamed", || says(&rig.judges.verdict(), &format!("{vm} on h1 was paused")));
    assert!(!says(&rig.judges.verdict(), &reached.to_string()));
    rig.judges.fault("an end", &[reached]);
    drop(guests);
    until("the end is blamed", || says(&rig.judges.verdict(), &format!("{vm} on h1 was stopped or moved by: an end")));
}

/// Writes as a guest does.
fn write(disk: &std::fs::File, boot: u8, counter: u64, previous: Stamp) -> Stamp {
    let stamp = Stamp { boot: [boot; 16], counter, uptime_ns: counter };
    let record = Record { stamp, previous, conflicts: 0 };
    disk.write_all_at(&record.to_bytes(Place::Ring), ring_sector(counter) * SECTOR as u64).unwrap();
    disk.write_all_at(&record.to_bytes(Place::Head), 0).unwrap();
    stamp
}

#[test]
fn an_interleaved_write_is_caught() {
    let rig = Rig::new();
    let (_, disk) = rig.watch("web");
    let mut last = Stamp::default();
    for (counter, boot) in [(1, 1), (2, 1), (3, 2), (4, 2)] {
        last = write(&disk, boot, counter, last);
    }
    assert_eq!(rig.judges.verdict().violations, [""; 0]);
    // A late write of the old boot, over what the new one wrote.
    write(&disk, 1, 3, Stamp { boot: [1; 16], counter: 2, uptime_ns: 2 });
    assert!(says(&rig.judges.verdict(), "web: two writers on its disk"), "{:?}", rig.judges.verdict().violations);
}

#[test]
fn a_boot_that_returns_is_caught_by_the_head_alone() {
    let rig = Rig::new();
    let (id, disk) = rig.watch("web");
    for (count, boot) in [1, 2, 1].into_iter().enumerate() {
        let stamp = Stamp { boot: [boot; 16], counter: count as u64 + 1, uptime_ns: 1 };
        disk.write_all_at(&Record { stamp, ..Record::default() }.to_bytes(Place::Head), 0).unwrap();
        until("the write is seen", || rig.judges.disks.writes(id).len() == count + 1);
    }
    assert!(says(&rig.judges.verdict(), "web: an old boot wrote again"));
}

#[test]
fn downtime_ends_with_the_first_write_of_a_new_boot() {
    let rig = Rig::new();
    let (id, disk) = rig.watch("web");
    let seen = |count| until("the write is seen", || rig.judges.disks.writes(id).len() == count);
    let first = write(&disk, 1, 1, Stamp::default());
    seen(1);
    let fault = rig.judges.mark("kill h1");
    let second = write(&disk, 1, 2, first);
    seen(2);
    assert_eq!(rig.judges.guest_up(id, fault), None, "the old boot still writes");
    let before = Moment::now();
    write(&disk, 2, 3, second);
    seen(3);
    let up = rig.judges.guest_up(id, fault).unwrap();
    assert!(before <= up && up <= Moment::now());
    let writes = rig.judges.disks.writes(id);
    assert_eq!(super::downtime::longest_gap(&writes, Moment(0), up), writes[1].at.since(writes[0].at));
    assert_eq!(rig.judges.verdict().vms[0].boots, 2);
}
