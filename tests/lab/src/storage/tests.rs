//! The storage layer is tested as the hosts use it: through real mounts, served by a daemon of its own.
//!
//! ```text
//!  test ──► Rig: temporary folder, daemon (this binary again, as one ignored test), control connection
//!            └─► mounts h1, h2 ──► plain file calls; what may hang runs on a thread
//! ```
//!
//! They need root and /dev/fuse, and fail without.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};

use super::{Fault, LockMode, Storage};

const DEADLINE: Duration = Duration::from_secs(20);
const DIR: &str = "MAINSTAY_LAB_TEST_DIR";

struct Rig {
    folder: tempfile::TempDir,
    daemon: Child,
    storage: Storage,
}

impl Rig {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("backing")).unwrap();
        let daemon = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "storage::tests::daemon_of_the_other_tests", "--nocapture"])
            .env(DIR, folder.path())
            .stdout(Stdio::null())
            .stderr(File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let run = folder.path().join("run");
        let mut connected = Storage::connect(&run);
        until("the daemon listens", || {
            connected = Storage::connect(&run);
            connected.is_ok()
        });
        let rig = Rig { folder, daemon, storage: connected.unwrap() };
        rig.storage.mount("h1").unwrap();
        rig.storage.mount("h2").unwrap();
        rig
    }

    fn with_lease(lease: Duration) -> Self {
        let rig = Rig::start();
        rig.storage.locks(LockMode::Server { lease }).unwrap();
        rig
    }

    fn path(&self, host: &str, name: &str) -> PathBuf {
        self.folder.path().join("run/mounts").join(host).join(name)
    }

    fn backing(&self, name: &str) -> PathBuf {
        self.folder.path().join("backing").join(name)
    }

    /// Opens a file for reading and writing, as a new one if need be.
    fn open(&self, host: &str, name: &str) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.path(host, name)).unwrap()
    }

    fn count(&self, host: &str, what: &str) -> u64 {
        self.storage.status().unwrap()["hosts"][host][what].as_u64().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.storage.stop().is_err() {
            let _ = self.daemon.kill();
        }
        let _ = self.daemon.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default());
        }
    }
}

#[test]
fn daemon_of_the_other_tests() {
    let Some(folder) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    super::run_daemon(&folder.join("backing"), &folder.join("run")).unwrap();
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

/// Locks bytes as QEMU does, for the open file and not for the process.
fn lock(file: &File, kind: i32, start: i64, length: i64) -> bool {
    let range =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&range)).is_ok()
}

fn write_lock(file: &File) -> bool {
    lock(file, libc::F_WRLCK, 100, 1)
}

fn write_on_thread(file: &File, bytes: &'static [u8], offset: u64) -> JoinHandle<std::io::Result<()>> {
    let file = file.try_clone().unwrap();
    std::thread::spawn(move || file.write_all_at(bytes, offset))
}

#[test]
fn plain_file_calls_work_and_hosts_see_each_other() {
    let rig = Rig::start();
    let (one, two) = (rig.path("h1", "a"), rig.path("h2", "a"));
    let new = |path| OpenOptions::new().write(true).create_new(true).open(path);
    let file = new(&one).unwrap();
    assert_eq!(new(&two).unwrap_err().kind(), ErrorKind::AlreadyExists);
    file.write_all_at(b"hello", 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(std::fs::read(&two).unwrap(), b"hello");
    assert_eq!(std::fs::metadata(&one).unwrap().ino(), std::fs::metadata(&two).unwrap().ino());
    assert_eq!(std::fs::metadata(&one).unwrap().ino(), std::fs::metadata(rig.backing("a")).unwrap().ino());

    file.set_len(8192).unwrap();
    assert_eq!(std::fs::metadata(&two).unwrap().len(), 8192);
    fallocate(&file, FallocateFlags::empty(), 0, 16384).unwrap();
    assert_eq!(std::fs::metadata(&two).unwrap().len(), 16384);

    std::fs::create_dir(rig.path("h1", "folder")).unwrap();
    std::fs::hard_link(&one, rig.path("h1", "folder/b")).unwrap();
    assert_eq!(std::fs::hard_link(&two, rig.path("h2", "folder/b")).unwrap_err().kind(), ErrorKind::AlreadyExists);
    std::fs::rename(rig.path("h2", "folder/b"), rig.path("h2", "folder/c")).unwrap();
    std::os::unix::fs::symlink("c", rig.path("h2", "folder/to-c")).unwrap();
    assert_eq!(std::fs::read(rig.path("h1", "folder/to-c")).unwrap().len(), 16384);
    let names = std::fs::read_dir(rig.path("h1", "folder")).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, ["c", "to-c"]);
    for name in ["folder/c", "folder/to-c", "a"] {
        std::fs::remove_file(rig.path("h1", name)).unwrap();
    }
    std::fs::remove_dir(rig.path("h2", "folder")).unwrap();
    assert_eq!(std::fs::read_dir(rig.backing("")).unwrap().count(), 0);
    assert!(0 < nix::sys::statvfs::statvfs(&rig.path("h1", "")).unwrap().blocks());
    file.write_all_at(b"nameless", 0).unwrap();
}

#[test]
fn direct_and_synchronous_writes_work() {
    #[repr(align(4096))]
    struct Block([u8; 8192]);
    let rig = Rig::start();
    rig.open("h1", "a");
    let flags = libc::O_DIRECT | libc::O_DSYNC;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(rig.path("h1", "a")).unwrap();
    let written = Block([7; 8192]);
    file.write_all_at(&written.0, 4096).unwrap();
    let mut read = Block([0; 8192]);
    let other = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(rig.path("h2", "a")).unwrap();
    other.read_exact_at(&mut read.0, 4096).unwrap();
    assert_eq!(written.0, read.0);
}

#[test]
fn a_race_of_links_has_one_winner() {
    let rig = Rig::start();
    for host in ["h1", "h2"] {
        std::fs::write(rig.path(host, host), host).unwrap();
    }
    for round in 0..200 {
        let name = format!("claim-{round}");
        let start = std::sync::Barrier::new(2);
        let claim = |host: &'static str| {
            start.wait();
            std::fs::hard_link(rig.path(host, host), rig.path(host, &name)).is_ok()
        };
        let won = std::thread::scope(|scope| {
            let (one, two) = (scope.spawn(|| claim("h1")), scope.spawn(|| claim("h2")));
            (one.join().unwrap(), two.join().unwrap())
        });
        assert!(won.0 != won.1, "round {round}: {won:?}");
        let winner = if won.0 { "h1" } else { "h2" };
        assert_eq!(std::fs::read_to_string(rig.path("h1", &name)).unwrap(), winner);
        assert_eq!(std::fs::read_to_string(rig.path("h2", &name)).unwrap(), winner);
    }
}

#[test]
fn locks_of_mode_server_reach_other_hosts() {
    let rig = Rig::start();
    let (one, two) = (rig.open("h1", "disk"), rig.open("h2", "disk"));
    assert!(lock(&one, libc::F_WRLCK, 100, 10));
    assert!(!lock(&two, libc::F_WRLCK, 105, 1));
    assert!(!lock(&two, libc::F_RDLCK, 100, 1));
    assert!(lock(&two, libc::F_WRLCK, 110, 1));
    // A hole in the middle is free, its edges are not.
    assert!(lock(&one, libc::F_UNLCK, 104, 2));
    assert!(lock(&two, libc::F_WRLCK, 104, 2));
    assert!(!lock(&two, libc::F_WRLCK, 103, 1));
    assert!(!lock(&two, libc::F_WRLCK, 106, 1));
    // Readers share.
    assert!(lock(&one, libc::F_RDLCK, 200, 1) && lock(&two, libc::F_RDLCK, 200, 1));
    assert!(!lock(&two, libc::F_WRLCK, 200, 1));
    // Closing gives them back.
    drop(one);
    until("the locks of the closed file are gone", || lock(&two, libc::F_WRLCK, 100, 200));
    let whole = |host| nix::fcntl::Flock::lock(rig.open(host, "f"), nix::fcntl::FlockArg::LockExclusiveNonblock);
    let held = whole("h1").unwrap();
    assert!(whole("h2").is_err());
    drop(held);
    until("flock is free", || whole("h2").is_ok());
}

#[test]
fn who_waits_for_a_lock_gets_it() {
    let rig = Rig::start();
    let (one, two) = (rig.open("h1", "disk"), rig.open("h2", "disk"));
    assert!(write_lock(&one));
    let waiter = std::thread::spawn(move || {
        let range = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 100, l_len: 1, l_pid: 0 };
        fcntl(&two, FcntlArg::F_OFD_SETLKW(&range)).is_ok()
    });
    until("it waits", || rig.storage.status().unwrap()["locks"]["waiting"] == 1);
    assert_eq!(std::fs::read_dir(rig.path("h2", "")).unwrap().count(), 1, "its host goes on");
    drop(one);
    assert!(waiter.join().unwrap());
}

#[test]
fn locks_of_mode_local_do_not() {
    let rig = Rig::start();
    rig.storage.locks(LockMode::Local).unwrap();
    let (three, four) = (rig.storage.mount("h3").unwrap(), rig.storage.mount("h4").unwrap());
    let open = |folder: PathBuf| OpenOptions::new().write(true).create(true).truncate(false).open(folder.join("disk"));
    let (three, again, four) = (open(three.clone()).unwrap(), open(three).unwrap(), open(four).unwrap());
    assert!(write_lock(&three));
    assert!(!write_lock(&again), "within a host they hold");
    assert!(write_lock(&four));
}

#[test]
fn a_dead_host_keeps_its_locks_for_the_lease() {
    let lease = Duration::from_millis(600);
    let rig = Rig::with_lease(lease);
    let (closed, open, two) = (rig.open("h1", "disk"), rig.open("h1", "disk"), rig.open("h2", "disk"));
    assert!(write_lock(&closed));
    let last = Instant::now();
    rig.storage.dead("h1").unwrap();
    drop(closed);
    assert_eq!(errno(open.write_all_at(b"x", 0)), Some(libc::EIO));
    until("the closed handle has gone", || rig.count("h1", "silent_ms") < 600 && 1 <= close_count(&rig));
    assert!(!write_lock(&two));
    until("the lease has ended", || write_lock(&two));
    assert!(lease <= last.elapsed(), "{:?}", last.elapsed());
    rig.storage.alive("h1").unwrap();
    assert!(!write_lock(&rig.open("h1", "disk")));
    assert_eq!(errno(open.write_all_at(b"x", 0)), Some(libc::EIO), "a handle of the boot before");
    rig.open("h1", "disk").write_all_at(b"x", 0).unwrap();
}

fn close_count(rig: &Rig) -> u64 {
    rig.storage.status().unwrap()["hosts"]["h1"]["operations"]["other"]["close"].as_u64().unwrap()
}

#[test]
fn a_booted_host_holds_nothing_of_before() {
    let rig = Rig::start();
    let (one, two) = (rig.open("h1", "disk"), rig.open("h2", "disk"));
    assert!(write_lock(&one));
    rig.storage.dead("h1").unwrap();
    assert!(!write_lock(&two));
    rig.storage.alive("h1").unwrap();
    assert!(write_lock(&two));
}

#[test]
fn a_silent_host_loses_its_locks_to_the_one_who_asks() {
    let lease = Duration::from_millis(300);
    let rig = Rig::with_lease(lease);
    let (locked, plain, two) = (rig.open("h1", "disk"), rig.open("h1", "beat"), rig.open("h2", "disk"));
    assert!(write_lock(&locked));
    until("the lease has ended", || 300 <= rig.count("h1", "silent_ms"));
    locked.write_all_at(b"nobody asked", 0).unwrap();
    until("the lock is lost", || write_lock(&two));
    assert_eq!(errno(locked.write_all_at(b"late", 0)), Some(libc::EIO));
    plain.write_all_at(b"a handle without locks goes on", 0).unwrap();
    assert!(!write_lock(&rig.open("h1", "disk")));
    assert_eq!(std::fs::read(rig.backing("disk")).unwrap(), b"nobody asked");
}

#[test]
fn a_fence_frees_locks_and_stops_writes() {
    let rig = Rig::start();
    let (one, two) = (rig.open("h1", "disk"), rig.open("h2", "disk"));
    assert!(write_lock(&one));
    let mut stream = UnixStream::connect(rig.folder.path().join("run/expire.sock")).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap()).lines();
    for (line, begins) in [("expire h1\n", "ok"), ("expire h9\n", "error"), ("nonsense\n", "error")] {
        stream.write_all(line.as_bytes()).unwrap();
        let answer = answers.next().unwrap().unwrap();
        assert!(answer.starts_with(begins), "{answer}");
    }
    assert!(write_lock(&two));
    let late = |file: &File| errno(file.write_all_at(b"late", 0));
    assert_eq!(late(&one), Some(libc::EIO));
    let new = OpenOptions::new().write(true).open(rig.path("h1", "disk")).unwrap();
    assert_eq!(late(&new), Some(libc::EIO));
    assert_eq!(errno(std::fs::hard_link(rig.path("h1", "disk"), rig.path("h1", "x"))), Some(libc::EIO));
    rig.storage.alive("h1").unwrap();
    assert_eq!(late(&one), Some(libc::EIO));
    assert_eq!(late(&new), Some(libc::EIO), "opened while it was fenced");
    assert_eq!(late(&rig.open("h1", "disk")), None);
}

#[test]
fn a_hang_holds_one_host_and_heals() {
    let rig = Rig::start();
    let (one, two) = (rig.open("h1", "disk"), rig.open("h2", "other"));
    one.set_len(5).unwrap(); // Writes that extend a file wait for each other in the kernel.
    rig.storage.fault("h1", Fault::Hang).unwrap();
    let first = write_on_thread(&one, b"first", 0);
    until("the first is held", || rig.count("h1", "held") == 1);
    let second = write_on_thread(&one, b"SECO", 0);
    until("the second is held", || rig.count("h1", "held") == 2);
    let start = Instant::now();
    (0..100).for_each(|i| two.write_all_at(b"free", i * 4).unwrap());
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "the other host was held up: {took:?}");
    assert!(!first.is_finished() && !second.is_finished());
    assert_eq!(std::fs::read(rig.backing("disk")).unwrap(), [0; 5]);
    rig.storage.fault("h1", Fault::None).unwrap();
    first.join().unwrap().unwrap();
    second.join().unwrap().unwrap();
    assert_eq!(std::fs::read(rig.backing("disk")).unwrap(), b"SECOt", "executed in order");
}

#[test]
fn death_answers_what_is_held() {
    let rig = Rig::start();
    let one = rig.open("h1", "disk");
    rig.storage.fault("h1", Fault::Hang).unwrap();
    let held = write_on_thread(&one, b"never", 0);
    until("it is held", || rig.count("h1", "held") == 1);
    rig.storage.dead("h1").unwrap();
    assert_eq!(errno(held.join().unwrap()), Some(libc::EIO));
    assert_eq!(std::fs::read(rig.backing("disk")).unwrap(), b"");
}

#[test]
fn errors_of_faults() {
    let rig = Rig::start();
    let file = rig.open("h1", "disk");
    let cases = [
        (Fault::Eio, Some(libc::EIO), Some(libc::EIO)),
        (Fault::Enospc, Some(libc::ENOSPC), None),
        (Fault::Estale, Some(libc::ESTALE), Some(libc::ESTALE)),
        (Fault::DropSync, None, None),
        (Fault::None, None, None),
    ];
    for (fault, of_write, of_read) in cases {
        rig.storage.fault("h1", fault).unwrap();
        assert_eq!(errno(file.write_all_at(b"x", 0)), of_write, "{fault:?}");
        assert_eq!(errno(file.read_at(&mut [0], 0)), of_read, "{fault:?}");
    }
    rig.storage.fault("h1", Fault::Torn).unwrap();
    assert_eq!(errno(file.write_all_at(&[7; 8192], 0)), Some(libc::EIO));
    assert_eq!(std::fs::read(rig.backing("disk")).unwrap(), [7; 4096]);
    file.write_all_at(b"small", 0).unwrap();
    rig.storage.fault("h1", Fault::DropSync).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_late_write_lands_unless_fenced() {
    let rig = Rig::start();
    let late = Fault::Late(Duration::from_millis(300));
    for host in ["h1", "h2"] {
        rig.storage.fault(host, late).unwrap();
        let file = rig.open(host, host);
        assert_eq!(errno(file.write_all_at(b"late", 0)), Some(libc::EIO));
        assert_eq!(std::fs::read(rig.backing(host)).unwrap(), b"");
    }
    rig.storage.expire("h2").unwrap();
    rig.storage.dead("h1").unwrap();
    until("both are over", || rig.count("h1", "queued") + rig.count("h2", "queued") == 0);
    until("it has landed", || std::fs::read(rig.backing("h1")).unwrap() == b"late");
    rig.storage.expire("h1").unwrap(); // Also a barrier: nothing is under way after it.
    assert_eq!(std::fs::read(rig.backing("h2")).unwrap(), b"");
}

#[test]
fn slowness_delays_each_operation_by_itself() {
    let rig = Rig::start();
    let file = rig.open("h1", "disk");
    file.set_len(1).unwrap(); // Writes that extend a file wait for each other in the kernel.
    let slow = Duration::from_millis(400);
    rig.storage.fault("h1", Fault::Slow(slow)).unwrap();
    let start = Instant::now();
    let writes = [0; 16].map(|_| write_on_thread(&file, b"x", 0));
    writes.into_iter().for_each(|w| w.join().unwrap().unwrap());
    assert!(slow <= start.elapsed() && start.elapsed() < 3 * slow, "{:?}", start.elapsed());
}

#[test]
fn our_operations_are_counted_apart() {
    let rig = Rig::start();
    std::fs::create_dir(rig.path("h1", ".mainstay")).unwrap();
    rig.open("h1", ".mainstay/beat").write_all_at(b"x", 0).unwrap();
    (0..3).for_each(|_| rig.open("h1", "disk").write_all_at(b"x", 0).unwrap());
    let status = rig.storage.status().unwrap();
    let writes = |of: &str| status["hosts"]["h1"]["operations"][of]["write"].clone();
    assert_eq!((writes("mainstay"), writes("other")), (1.into(), 3.into()));
}

#[test]
fn the_end_leaves_no_mount_and_no_thread_in_wait() {
    let rig = Rig::start();
    let (folder, file) = (rig.folder.path().to_owned(), rig.open("h1", "disk"));
    rig.storage.fault("h1", Fault::Hang).unwrap();
    let held = write_on_thread(&file, b"x", 0);
    until("it is held", || rig.count("h1", "held") == 1);
    drop(rig);
    assert_eq!(errno(held.join().unwrap()), Some(libc::EIO));
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(folder.to_str().unwrap()));
}
