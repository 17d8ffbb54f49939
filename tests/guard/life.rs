//! The guard's own life: deaths of parent and child, restarts, reloads, and what goes on over them.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use mainstay::core::timing;
use mainstay::exec::clock;
use mainstay::exec::datastore::BeatFile;
use mainstay::types::guard::{GuardOrder, Purpose};
use mainstay::types::settings::Timing;
use mainstay::types::{BeatBlock, Epoch, Incarnation, Over, VmState};
use nix::sys::signal::Signal;

use crate::host::{CLUSTER, Host, LONG, ME, SOON, greet_as_nobody, signal, tenure};
use crate::qemu::Qemu;
use crate::{over, until};

fn newest(host: &Host) -> BeatBlock {
    BeatFile::open(&host.store(), CLUSTER, ME).unwrap().own().unwrap().newest.unwrap()
}

/// Running under its first claim, in the epoch of before.
fn goes_on(host: &mut Host, vm: &Qemu, epoch: Epoch) {
    vm.until_runs();
    host.until("the row", |host| host.state(vm, 1) == Some(VmState::Running));
    host.until("the lease", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
    assert_eq!(host.epoch(), epoch, "the lease never lapsed");
}

#[test]
fn a_dead_child_leaves_nothing_running() {
    let mut host = Host::new();
    let vms = [host.running("web"), host.running("db")];
    let killed = clock::now();
    signal(host.child(), Signal::SIGKILL);
    vms.iter().for_each(Qemu::until_stands);
    let late = vms.iter().map(|vm| vm.last_turn().since(killed)).max().unwrap();
    println!("the last executed {late:?} after the child was killed");
    assert!(late < timing::reserve(Timing::FAST.lease), "{late:?}");
    assert!(!host.guard_ended(), "systemd must start another");
}

#[test]
fn a_dead_parent_leaves_nothing_running() {
    let mut host = Host::new();
    let vm = host.running("web");
    let child = host.child();
    let killed = clock::now();
    host.kill_guard();
    vm.until_stands();
    println!("executed {:?} after the parent was killed", vm.last_turn().since(killed));
    until("end of the child", || !std::path::Path::new(&format!("/proc/{child}")).exists());
}

#[test]
fn a_child_that_was_stopped_is_noticed_before_its_leases_end() {
    let mut host = Host::new();
    let vm = host.running("web");
    let child = host.child();
    signal(child, Signal::SIGSTOP);
    let stopped = clock::now();
    vm.until_stands();
    let last = vm.last_turn();
    println!("executed {:?} after the child was stopped", last.since(stopped));
    // The last beat that counted was begun before that, at the latest.
    assert!(last < stopped + Timing::FAST.lease);
    assert!(!host.guard_ended());
    until("end of the child", || !std::path::Path::new(&format!("/proc/{child}")).exists());
    let log = host.log();
    assert!(log.contains("late for its promise"), "{log}");
}

#[test]
fn a_stopped_child_of_a_dead_parent_is_killed_before_anything_else() {
    let mut host = Host::new();
    let vm = host.running("web");
    let child = host.child();
    signal(child, Signal::SIGSTOP);
    host.kill_guard();
    host.stop_all();
    vm.until_stands();
    until("end of the child", || !std::path::Path::new(&format!("/proc/{child}")).exists());
}

#[test]
fn restarts_go_on_under_the_same_claims() {
    let mut host = Host::supervised(LONG);
    let vms = [host.running("web"), host.running("db")];
    let epoch = host.epoch();
    let mut last = newest(&host);
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        let before = clock::now();
        host.restart_planned();
        vms.iter().for_each(Qemu::until_runs);
        longest = longest.max(clock::now().since(before));
        vms.iter().for_each(|vm| goes_on(&mut host, vm, epoch));
        let counter = last.counter;
        until("a newer beat", || counter < newest(&host).counter);
        last = newest(&host);
        assert_eq!(last.incarnation, epoch.incarnation, "counters rise in one incarnation, so none was used twice");
    }
    println!("longest restart {longest:?}, longest pause {:?}", vms[0].longest_pause());
    assert!(last.resting.count_ones() <= 3, "a planned restart uses up no slot: {:08b}", last.resting);
}

#[test]
fn a_crash_of_both_goes_on_under_the_same_claim_if_the_lease_stands() {
    let mut host = Host::supervised(LONG);
    let (vm, mut late) = (host.running("web"), host.vm("late"));
    let epoch = host.epoch();
    host.expect(&late, 1, Purpose::Start, SOON).unwrap();
    host.claimed(&late, 1, epoch).unwrap();
    host.expect(&host.vm("none"), 1, Purpose::Start, SOON).unwrap();
    let child = host.child();
    host.kill_guard();
    until("end of the child", || !std::path::Path::new(&format!("/proc/{child}")).exists());
    late.start(); // It comes up while nobody watches.
    host.stop_all();
    vm.until_stands();
    late.until_stands();
    host.restart_guard();
    goes_on(&mut host, &vm, epoch);
    goes_on(&mut host, &late, epoch);
}

#[test]
fn a_lease_that_ended_meanwhile_has_lapsed() {
    let mut host = Host::supervised(Timing::FAST);
    let vm = host.running("web");
    let before = host.epoch();
    host.kill_guard();
    host.stop_all();
    std::thread::sleep(Timing::FAST.lease);
    host.restart_guard();
    host.until("over", |host| host.state(&vm, 1) == over(Over::Lapsed));
    host.until("a lease", |host| host.lease.as_ref().is_some_and(|lease| lease.until.is_some()));
    assert_eq!(host.epoch(), Epoch { lapses: before.lapses + 1, ..before }, "the same guard, another epoch");
    assert!(vm.stands());
    host.expect(&vm, 2, Purpose::Reclaim, SOON).unwrap();
    host.claimed(&vm, 2, host.epoch()).unwrap();
    vm.until_runs();
}

#[test]
fn what_was_over_stays_over_and_what_has_gone_has_exited() {
    let mut host = Host::supervised(LONG);
    let (mut gone, barred) = (host.running("gone"), host.vm("barred"));
    host.expect(&barred, 1, Purpose::Start, SOON).unwrap();
    host.order(GuardOrder::Abandon { tenure: tenure(barred.vm, 1) }).unwrap();
    let child = host.child();
    host.kill_guard();
    until("end of the child", || !std::path::Path::new(&format!("/proc/{child}")).exists());
    gone.kill();
    gone.reap();
    host.restart_guard();
    host.until("rows", |host| host.rows.len() == 2);
    assert_eq!(host.state(&barred, 1), over(Over::NeverStarted));
    // Its exit is seen by the new guard, which says so when the beats that it had begun are on the datastores.
    host.until("exit", |host| matches!(host.state(&gone, 1), Some(VmState::Over(Over::Exited { .. }))));
}

#[test]
fn reloads_stop_nothing() {
    let mut host = Host::supervised(LONG);
    let vms = [host.running("web"), host.running("db")];
    let (epoch, parent) = (host.epoch(), host.parent());
    let lines = |host: &Host| host.log().lines().filter(|line| line.contains("stands")).count();
    let (mut child, stops) = (host.child(), lines(&host));
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        let before = clock::now();
        host.reload();
        longest = longest.max(clock::now().since(before));
        assert_ne!(std::mem::replace(&mut child, host.child()), host.child());
        vms.iter().for_each(|vm| goes_on(&mut host, vm, epoch));
    }
    assert!(host.guard_is_alive());
    assert_eq!((host.parent(), lines(&host)), (parent, stops), "the same process, and no VM was stopped");
    println!("longest reload {longest:?}, longest pause {:?}", vms.iter().map(Qemu::longest_pause).max().unwrap());
    let resting = newest(&host).resting;
    assert!(resting.count_ones() <= 3, "{resting:08b}");
    // It still does its work.
    host.configure(Timing::FAST);
    host.cut_store();
    vms.iter().for_each(Qemu::until_stands);
}

#[test]
fn without_its_memory_a_guard_begins_anew() {
    let mut host = Host::supervised(LONG);
    let vm = host.running("web");
    let mut before = host.epoch();
    let spoil: [fn(&mut Host); 2] = [
        |host| host.systemd.as_mut().unwrap().forget(),
        |host| {
            // As a program of another layout would leave it.
            for (_, fd) in host.systemd.as_mut().unwrap().stored() {
                let file = fs::File::from(fd.try_clone().unwrap());
                let len = file.metadata().unwrap().len();
                for at in [4096, 4096 + (len - 4096) / 2] {
                    file.write_all_at(&99u64.to_le_bytes(), at + 8).unwrap();
                }
            }
        },
    ];
    for (n, spoil) in (2..).zip(spoil) {
        host.kill_guard();
        host.stop_all();
        spoil(&mut host);
        host.restart_guard();
        host.until("over", |host| host.state(&vm, n - 1) == over(Over::Lapsed));
        host.configure(LONG);
        assert!(before.incarnation < host.epoch().incarnation);
        before = host.epoch();
        assert!(vm.stands());
        host.expect(&vm, n, Purpose::Reclaim, SOON).unwrap();
        host.claimed(&vm, n, before).unwrap();
        vm.until_runs();
    }
    assert_eq!(host.systemd.as_mut().unwrap().stored().len(), 1, "one memory is kept, the new one");
}

#[test]
fn a_memory_of_before_another_guard_is_not_believed() {
    let mut host = Host::supervised(LONG);
    let vm = host.running("web");
    let before = host.epoch();
    host.kill_guard();
    // One that was started by hand knows nothing of the memory, and takes another incarnation.
    let systemd = host.systemd.take();
    host.restart_guard();
    host.until("over", |host| host.state(&vm, 1) == over(Over::Lapsed));
    host.kill_guard();
    host.stop_all();
    host.systemd = systemd;
    host.restart_guard();
    host.configure(LONG);
    assert_eq!(host.epoch().incarnation, Incarnation(before.incarnation.0 + 2));
    assert_eq!(host.state(&vm, 1), over(Over::Lapsed));
    assert!(vm.stands());
}

#[test]
fn a_second_guard_ends_the_first() {
    let mut host = Host::new();
    let vm = host.running("web");
    let (first, child) = (host.parent(), host.child());
    host.start_another();
    until("end of the first", || !std::path::Path::new(&format!("/proc/{child}")).exists());
    assert_ne!(host.parent(), first);
    host.until("over", |host| host.state(&vm, 1) == over(Over::Lapsed));
    assert!(vm.stands());
}

#[test]
fn the_watchdog_is_petted_and_stopped_by_a_planned_stop_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("watchdog");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let device = fs::File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&path).unwrap();
    let heard = || {
        let mut bytes = [0; 4096];
        let read = (&device).read(&mut bytes).unwrap_or(0);
        bytes[..read].to_vec()
    };
    let mut host = Host::with_config(&format!("[guard]\nwatchdog = \"{}\"\n", path.display()));
    let vm = host.running("web");
    // A pipe knows no time-out: it is petted all the same, and the operator hears that nothing relies on it.
    host.until("a warning", |host| host.alarms.iter().any(|text| text.contains("does not tell its time-out")));
    until("a pet", || heard().contains(&0));
    host.reload();
    heard();
    until("a pet", || heard().contains(&0));
    signal(host.child(), Signal::SIGKILL);
    assert!(!host.guard_ended());
    assert!(!heard().contains(&b'V'), "the next guard takes it over in time, or the host is reset");
    host.stop_all();
    host.restart_guard();
    vm.until_runs();
    until("a pet", || heard().contains(&0));
    signal(host.parent(), Signal::SIGTERM);
    assert!(host.guard_ended());
    vm.until_stands();
    assert!(heard().contains(&b'V'), "all stands, and it was a person's wish");
}

#[test]
fn a_watchdog_that_cannot_be_opened_is_told_and_nothing_else() {
    let mut host = Host::with_config("[guard]\nwatchdog = \"/nonexistent/watchdog\"\n");
    host.until("a warning", |host| host.alarms.iter().any(|text| text.contains("/nonexistent/watchdog")));
    host.running("web");
    let mut host = Host::with_config("[guard]\nwatchdgo = 1\n");
    host.until("a warning", |host| host.alarms.iter().any(|text| text.contains("guard.watchdgo")));
}

#[test]
fn only_root_may_order() {
    let mut host = Host::new();
    let vm = host.running("web");
    assert_eq!(greet_as_nobody(&host), 0, "no answer at all");
    assert!(host.order(GuardOrder::Found { tenure: tenure(vm.vm, 1), pid: vm.pid() }).is_ok(), "the agent stays");
    vm.until_runs();
}

/// Proportional set size in KiB, and the time on a CPU, of a process.
fn cost(pid: u32) -> (u64, Duration) {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let time = |thread: fs::DirEntry| {
        let text = fs::read_to_string(thread.path().join("schedstat")).unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    };
    (pss.trim().trim_end_matches(" kB").parse().unwrap(), threads.map(time).sum())
}

#[test]
fn at_rest_it_costs_little() {
    let mut host = Host::supervised(Timing::DEFAULT);
    let vms: Vec<Qemu> = (0..3).map(|n| host.running(&format!("vm{n}"))).collect();
    // Else the processes that play QEMU are all that runs here.
    vms.iter().for_each(|vm| signal(vm.pid(), Signal::SIGSTOP));
    let span = Duration::from_secs(5);
    let costs = |host: &Host| [host.parent(), host.child()].map(cost);
    let before = costs(&host);
    std::thread::sleep(span);
    let after = costs(&host);
    for (name, before, after) in [("parent", before[0], after[0]), ("child", before[1], after[1])] {
        let share = (after.1 - before.1).as_secs_f64() / span.as_secs_f64();
        println!("{name}: {} KiB PSS, {:.3} % of a core", after.0, 100.0 * share);
        // An unoptimised build beside other tests; what is measured in earnest is `bench idle` in the lab.
        assert!(after.0 < 15 * 1024 && share < 0.02, "{name}: {} KiB, {share}", after.0);
    }
    vms.iter().for_each(|vm| signal(vm.pid(), Signal::SIGCONT));
}
