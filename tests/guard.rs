//! The guard as a process: leases on a real folder, stops of real processes, its own death. Needs root.

#[path = "guard/host.rs"]
mod host;
#[path = "guard/life.rs"]
mod life;
#[path = "guard/qemu.rs"]
mod qemu;
#[path = "guard/systemd.rs"]
mod systemd;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use host::{CLUSTER, DATASTORE, Host, ME, OTHER, SOON, tenure};
use mainstay::core::timing;
use mainstay::exec::clock;
use mainstay::exec::datastore::BeatFile;
use mainstay::types::guard::{GuardOrder, Purpose, Refusal};
use mainstay::types::settings::Timing;
use mainstay::types::{
    BeatBlock, BootId, Claim, ClaimReason, Counter, Digest, Flags, Holder, HostIndex, Incarnation, ListName, Nonce,
    ObjectKind, Over, Owner, VmList, VmState, Wanted,
};
use mainstay::wire::record;

/// The VM list that the newest beat of this host names.
fn list_on_disk(host: &Host) -> Option<VmList> {
    let file = BeatFile::open(&host.store(), CLUSTER, ME).unwrap();
    let beat = file.own().unwrap().newest?;
    let bytes = fs::read(host.root().join("hosts").join(format!("{ME}.vms"))).unwrap();
    let mut lists = bytes.chunks(record::LIST_AREA).filter_map(|area| {
        let total = record::total(area).ok()?;
        record::decode_list(&area[..total]).ok()
    });
    lists.find(|list| list.sequence == beat.list.sequence && record::list_digest(list) == beat.list.digest)
}

fn until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !so() {
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Not a test: the other processes here are this program, too.
#[test]
fn vcpu() {
    host::stranger();
    qemu::vcpu();
}

fn over(why: Over) -> Option<VmState> {
    Some(VmState::Over(why))
}

#[test]
fn a_start_runs_after_its_claim_and_its_exit_is_said() {
    let mut host = Host::new();
    let mut vm = host.vm("web");
    host.expect(&vm, 1, Purpose::Start, SOON).unwrap();
    vm.start();
    vm.until_stands();
    host.until("a stopped row", |host| host.row(&vm, 1).is_some_and(|row| row.stopped));
    assert_eq!(host.state(&vm, 1), Some(VmState::Expected));
    host.claimed(&vm, 1, host.epoch()).unwrap();
    vm.until_runs();
    host.until("running", |host| host.state(&vm, 1) == Some(VmState::Running));
    until("a list with it", || {
        list_on_disk(&host).is_some_and(|list| {
            list.entries.iter().any(|entry| entry.tenure == tenure(vm.vm, 1) && entry.state == VmState::Running)
        })
    });
    assert!(host.order(GuardOrder::Forget { tenure: tenure(vm.vm, 1) }).is_err());
    vm.kill();
    host.until("an exit", |host| host.state(&vm, 1) == over(Over::Exited { clean: true }));
    until("a list that says so", || {
        list_on_disk(&host).is_some_and(|list| {
            list.entries.iter().any(|entry| Some(entry.state) == over(Over::Exited { clean: true }))
        })
    });
    host.order(GuardOrder::Forget { tenure: tenure(vm.vm, 1) }).unwrap();
    host.until("forgotten", |host| host.rows.is_empty());
}

#[test]
fn a_lapse_stops_before_the_lease_ends_and_only_a_reclaim_lifts() {
    let mut host = Host::new();
    let vm = host.running("web");
    let old_epoch = host.epoch();
    host.cut_store();
    let cut = clock::now();
    vm.until_stands();
    let lease = Timing::FAST.lease;
    // A thread that waits for a CPU shows T late; what counts is when it last executed something.
    let last = vm.last_turn();
    // The last beat that counted was begun before the cut, at the latest.
    assert!(last < cut + lease, "ran {:?} after the cut", last.since(cut));
    host.until("over", |host| host.state(&vm, 1) == over(Over::Lapsed));
    let due = host.lease.as_ref().unwrap().written + (lease - timing::reserve(lease));
    println!(
        "last executed {:?} after the stop was due, {:?} before L",
        last.since(due),
        (due + timing::reserve(lease)).since(last)
    );
    println!(
        "{}",
        host.log()
            .lines()
            .filter(|line| line.contains("lapsed") || line.contains("stands"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    assert!(last < due + timing::reserve(lease));
    assert_eq!(host.expect(&vm, 2, Purpose::Reclaim, SOON), Err(Refusal::NoLease));
    host.heal_store();
    host.until("a lease again", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
    assert!(old_epoch < host.epoch());
    assert!(vm.stands(), "the lease alone lifts nothing");
    assert!(host.claimed(&vm, 1, host.epoch()).is_err(), "over is for ever");
    host.expect(&vm, 2, Purpose::Reclaim, SOON).unwrap();
    let now = host.epoch();
    assert_eq!(host.claimed(&vm, 2, old_epoch), Err(Refusal::EpochChanged { now }));
    assert!(vm.stands());
    host.claimed(&vm, 2, now).unwrap();
    vm.until_runs();
    host.until("running", |host| host.state(&vm, 2) == Some(VmState::Running));
    assert_eq!(host.state(&vm, 1), over(Over::Lapsed), "listed until it is forgotten");
}

#[test]
fn an_exit_without_a_path_to_the_home_is_not_clean() {
    let mut host = Host::new();
    let mut vm = host.running("web");
    host.cut_store();
    vm.until_stands();
    host.until("over", |host| host.state(&vm, 1) == over(Over::Lapsed));
    vm.kill();
    host.until("an exit", |host| host.state(&vm, 1) == over(Over::Exited { clean: false }));
}

#[test]
fn the_scope_of_libvirt_is_frozen_and_thawed() {
    let mut host = Host::new();
    let mut vm = host.vm("frozen");
    let scope = Scope::make(&vm.name).expect("a cgroup2 that can be written: run this as root");
    host.expect(&vm, 1, Purpose::Start, SOON).unwrap();
    vm.start_in(|pid| fs::write(scope.0.join("cgroup.procs"), pid.to_string()).unwrap());
    let frozen = |wanted: &str| fs::read_to_string(scope.0.join("cgroup.events")).unwrap().contains(wanted);
    until("a frozen scope", || frozen("frozen 1"));
    host.until("a stopped row", |host| host.row(&vm, 1).is_some_and(|row| row.stopped));
    // systemd sends SIGCONT after any signal: the freezer holds all the same.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vm.pid() as i32), nix::sys::signal::Signal::SIGCONT).unwrap();
    let before = vm.last_turn();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.last_turn(), before);
    host.claimed(&vm, 1, host.epoch()).unwrap();
    until("a thawed scope", || frozen("frozen 0"));
    vm.until_runs();
    // A frozen one can be killed.
    host.cut_store();
    until("a frozen scope", || frozen("frozen 1"));
    vm.kill();
    vm.until_exited();
}

/// A scope as libvirt makes them, removed at the end.
struct Scope(std::path::PathBuf);

impl Scope {
    fn make(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
        let slice = std::path::Path::new(line.split(' ').nth(4)?).join("machine.slice");
        let scope = slice.join(format!("machine-qemu\\x2d1\\x2d{name}.scope"));
        fs::create_dir_all(&scope).ok()?;
        scope.join("cgroup.freeze").exists().then_some(Self(scope))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        drop(fs::write(self.0.join("cgroup.freeze"), "0"));
        let deadline = Instant::now() + SOON;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_row_of_the_lapse_cannot_be_confirmed_later() {
    let mut host = Host::new();
    let vm = host.vm("web");
    host.expect(&vm, 1, Purpose::Start, SOON).unwrap();
    let before = host.epoch();
    host.cut_store();
    host.until("a lapse", |host| host.epoch() != before);
    host.until("never started", |host| host.state(&vm, 1) == over(Over::NeverStarted));
    host.heal_store();
    host.until("a lease again", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
    let now = host.epoch();
    assert_eq!(host.claimed(&vm, 1, before), Err(Refusal::EpochChanged { now }));
    assert!(host.claimed(&vm, 1, now).is_err());
    let late = GuardOrder::Expect {
        tenure: tenure(vm.vm, 2),
        name: vm.name.clone(),
        home: DATASTORE,
        epoch: before,
        deadline: clock::now() + SOON,
        purpose: Purpose::Start,
        writes: Vec::new(),
    };
    assert_eq!(host.order(late), Err(Refusal::EpochChanged { now }));
}

#[test]
fn a_claim_of_another_kills_after_a_lapse_and_nothing_else_does() {
    let mut host = Host::new();
    let (taken, kept) = (host.running("taken"), host.running("kept"));
    host.cut_store();
    taken.until_stands();
    kept.until_stands();
    host.heal_store();
    let claim = Claim {
        kind: ObjectKind::Vm,
        tenure: tenure(taken.vm, 2),
        name: "taken".to_owned(),
        holder: Holder::Host(Owner { host: OTHER, boot: BootId::default(), incarnation: Incarnation(1) }),
        home: DATASTORE,
        wanted: Wanted::Running,
        reason: ClaimReason::Failover,
        record: Digest::default(),
        nonce: Nonce(1),
        maker: OTHER,
        made_unix_ms: 0,
        debts: Vec::new(),
    };
    let folder = host.root().join("claims").join(taken.vm.to_string());
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("new"), record::encode_claim(&claim).unwrap()).unwrap();
    fs::rename(folder.join("new"), folder.join("2")).unwrap();
    taken.until_exited();
    host.until("an exit", |host| host.state(&taken, 1) == over(Over::Exited { clean: true }));
    assert!(kept.stands(), "without a claim of another it only stands");
    host.expect(&kept, 2, Purpose::Reclaim, SOON).unwrap();
    host.claimed(&kept, 2, host.epoch()).unwrap();
    kept.until_runs();
}

#[test]
fn a_store_that_went_back_lets_run_only_what_is_claimed_there() {
    let mut host = Host::new();
    let (held, lost) = (host.running("held"), host.running("lost"));
    let slots = host.root().join("hosts").join(ME.to_string());
    let before = fs::read(&slots).unwrap();
    until("later beats", || fs::read(&slots).unwrap() != before);
    fs::remove_file(host.root().join("claims").join(lost.vm.to_string()).join("1")).unwrap();
    let went_back = |host: &Host| host.lease.as_ref().is_some_and(|lease| lease.rolled_back.is_some());
    let deadline = Instant::now() + SOON;
    while !went_back(&host) {
        assert!(Instant::now() < deadline, "it is not noticed");
        fs::write(&slots, &before).unwrap();
        host.wait(Duration::from_millis(300));
    }
    lost.until_stands();
    host.until("its end", |host| host.state(&lost, 1) == over(Over::Lapsed));
    assert!(host.expect(&lost, 2, Purpose::Reclaim, SOON).is_err(), "nothing is claimed there");
    // Well over a lease later: beats go on, so what is claimed there runs on.
    host.wait(Duration::from_secs(3));
    assert_eq!(host.state(&held, 1), Some(VmState::Running));
    assert!(!held.stands());
    let mut config = host.config(Timing::FAST);
    config.datastores[0].accepted = 1;
    host.order(GuardOrder::Configure(Box::new(config))).unwrap();
    host.until("trust", |host| !went_back(host));
    host.expect(&lost, 1_000_000, Purpose::Reclaim, SOON).unwrap();
    host.claimed(&lost, 1_000_000, host.epoch()).unwrap();
    lost.until_runs();
    assert_eq!(host.state(&held, 1), Some(VmState::Running));
}

#[test]
fn a_row_that_is_not_confirmed_in_time_is_barred() {
    let mut host = Host::new();
    let mut vm = host.vm("web");
    host.expect(&vm, 1, Purpose::Start, Duration::from_millis(300)).unwrap();
    host.until("never started", |host| host.state(&vm, 1) == over(Over::NeverStarted));
    assert!(host.claimed(&vm, 1, host.epoch()).is_err());
    vm.start();
    vm.until_exited();
    assert!(
        host.alarms.iter().any(|text| text.contains("web")) || {
            host.until("an alarm", |host| host.alarms.iter().any(|text| text.contains("never confirmed")));
            true
        }
    );
}

#[test]
fn a_guard_that_dies_leaves_nothing_running() {
    let mut host = Host::new();
    let (known, mut late) = (host.running("known"), host.vm("late"));
    host.expect(&late, 1, Purpose::Start, SOON).unwrap();
    host.claimed(&late, 1, host.epoch()).unwrap();
    host.kill_guard();
    late.start(); // It comes up while nobody watches.
    host.stop_all();
    known.until_stands(); // At once, but a thread in D shows it late.
    late.until_stands();
    let before = host.epoch();
    host.restart_guard();
    host.until("the row", |host| host.state(&known, 1) == over(Over::Lapsed));
    assert!(host.row(&known, 1).unwrap().stopped);
    host.until("the late one", |host| host.row(&late, 1).is_some_and(|row| row.stopped));
    assert_eq!(host.state(&late, 1), over(Over::Lapsed));
    host.order(GuardOrder::Configure(Box::new(host.config(Timing::FAST)))).unwrap();
    host.until("a lease", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
    assert!(before.incarnation < host.epoch().incarnation);
    host.expect(&known, 2, Purpose::Reclaim, SOON).unwrap();
    host.claimed(&known, 2, host.epoch()).unwrap();
    known.until_runs();
}

#[test]
fn an_adoption_runs_on_until_it_is_ours() {
    let mut host = Host::new();
    let mut vm = host.vm("web");
    vm.start();
    host.expect(&vm, 1, Purpose::Adopt, SOON).unwrap();
    host.until("seen", |host| host.row(&vm, 1).is_some_and(|row| row.pid == Some(vm.pid())));
    vm.until_runs();
    host.claimed(&vm, 1, host.epoch()).unwrap();
    host.until("running", |host| host.state(&vm, 1) == Some(VmState::Running));
    // An order to kill needs a later claim.
    assert!(host.order(GuardOrder::Kill { tenure: tenure(vm.vm, 1), seen: tenure(vm.vm, 1).generation }).is_err());
    vm.until_runs();
    host.order(GuardOrder::Kill { tenure: tenure(vm.vm, 1), seen: tenure(vm.vm, 2).generation }).unwrap();
    vm.until_exited();
}

#[test]
fn other_timing_costs_no_lapse() {
    let mut host = Host::new();
    let vm = host.running("web");
    let epoch = host.epoch();
    for timing in [Timing::DEFAULT, Timing::FAST, Timing::PATIENT] {
        host.order(GuardOrder::Configure(Box::new(host.config(timing)))).unwrap();
        let span = timing.lease + Duration::from_millis(500);
        let low = timing.lease - Duration::from_millis(900);
        host.until("the new L", |host| {
            host.lease
                .as_ref()
                .is_some_and(|lease| lease.until.is_some_and(|until| (low..span).contains(&until.since(lease.written))))
        });
        assert_eq!(host.epoch(), epoch, "{timing:?}");
        vm.until_runs();
    }
    let mut other = host.config(Timing::FAST);
    other.host = OTHER;
    assert!(host.order(GuardOrder::Configure(Box::new(other))).is_err());
    let mut none = host.config(Timing::FAST);
    none.datastores.clear();
    assert!(host.order(GuardOrder::Configure(Box::new(none))).is_err(), "a VM lives there");
    let mut contradiction = host.config(Timing::FAST);
    contradiction.timing.suspect = contradiction.timing.lease;
    assert!(host.order(GuardOrder::Configure(Box::new(contradiction))).is_err());
}

#[test]
fn a_new_boot_first_watches_that_nobody_uses_its_name() {
    let mut host = Host::unconfigured();
    let mut file = BeatFile::open(&host.store(), CLUSTER, ME).unwrap();
    let mut counter = 0;
    let mut twin = |file: &mut BeatFile| {
        counter += 1;
        let block = BeatBlock {
            cluster: CLUSTER,
            host: ME,
            index: HostIndex(0),
            boot: BootId::default(),
            incarnation: Incarnation(5),
            counter: Counter(counter),
            taken: clock::now(),
            lease: Timing::FAST.lease,
            flags: Flags::default(),
            accepted: 0,
            list: ListName::default(),
            resting: 0,
            roster: 1,
            attestations: Vec::new(),
        };
        file.write(&block, clock::now()).unwrap();
    };
    twin(&mut file);
    host.order(GuardOrder::Configure(Box::new(host.config(Timing::FAST)))).unwrap();
    let began = clock::now();
    while clock::now().since(began) < 2 * timing::window(Timing::FAST.lease, false) {
        std::thread::sleep(Timing::FAST.renew);
        twin(&mut file);
    }
    host.until("an alarm", |host| host.alarms.iter().any(|text| text.contains("in use twice")));
    assert!(host.lease.as_ref().is_some_and(|lease| lease.until.is_none()), "no lease beside a twin");
    let ended = clock::now();
    host.until("a lease", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
    let waited = host.lease.as_ref().unwrap().written.since(ended);
    assert!(timing::window(Timing::FAST.lease, false) - Timing::FAST.renew < waited, "{waited:?}");
    assert!(Incarnation(5) < host.epoch().incarnation);
}

#[test]
fn junk_on_the_socket_ends_that_connection_only() {
    let mut host = Host::new();
    let vm = host.running("web");
    let mut stream = UnixStream::connect(host.socket()).unwrap();
    stream.write_all(&[0xff; 4096]).unwrap();
    drop(stream);
    // The junk had taken the place of the agent's connection; the agent comes back.
    host.until("the rows anew", |host| !host.rows.is_empty() && host.lease.is_some());
    assert!(host.guard_is_alive());
    vm.until_runs();
    let deadline = Instant::now() + SOON;
    loop {
        match host.order(GuardOrder::Found { tenure: tenure(vm.vm, 9), pid: 1 }) {
            Err(Refusal::WrongState(why)) if why.contains("never expected") => return,
            refusal => assert!(Instant::now() < deadline, "{refusal:?}"), // The client is not back yet.
        }
    }
}

#[test]
fn the_guard_does_not_link_libvirt() {
    let libraries = needed(&fs::read(env!("CARGO_BIN_EXE_mainstay-guard")).unwrap());
    assert!(libraries.iter().any(|name| name.starts_with("libc.so")), "{libraries:?}");
    assert!(!libraries.iter().any(|name| name.contains("virt")), "{libraries:?}");
    assert!(libraries.len() <= 6, "the guard should need next to nothing: {libraries:?}");
}

/// DT_NEEDED of a 64-bit little-endian ELF file.
fn needed(elf: &[u8]) -> Vec<String> {
    let word = |at: usize, len: usize| {
        elf[at..at + len].iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte))
    };
    assert_eq!(&elf[..6], b"\x7fELF\x02\x01");
    let (headers, size, count) = (word(0x20, 8), word(0x36, 2), word(0x38, 2));
    // (type, offset, address, size) of each segment.
    let segments: Vec<_> = (0..count)
        .map(|n| headers + n * size)
        .map(|at| (word(at, 4), word(at + 8, 8), word(at + 16, 8), word(at + 32, 8)))
        .collect();
    let (_, offset, _, len) = *segments.iter().find(|segment| segment.0 == 2).expect("it is linked dynamically");
    let entries: Vec<_> = (offset..offset + len).step_by(16).map(|at| (word(at, 8), word(at + 8, 8))).collect();
    let strings = entries.iter().find(|entry| entry.0 == 5).unwrap().1;
    let place = segments.iter().find(|s| s.0 == 1 && (s.2..s.2 + s.3).contains(&strings)).unwrap();
    let strings = strings - place.2 + place.1;
    let text = |at: usize| {
        let end = elf[at..].iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8_lossy(&elf[at..at + end]).into_owned()
    };
    entries.iter().filter(|entry| entry.0 == 1).map(|entry| text(strings + entry.1)).collect()
}
