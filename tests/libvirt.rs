//! The libvirt driver against libvirt's own test driver (`test:///default`): no daemon, no QEMU, the real library.
//!
//! All connections of one process see the same domains there, so the story is one test.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use mainstay::exec::libvirt::{DumpFormat, Libvirt, LibvirtEvent, Part, What, xml};
use mainstay::types::VmId;
use mainstay::types::vm::{DomainAnswer, DomainChange, DomainFailure, DomainInfo, DomainOrder, DomainState, OffReason};

const LONG: Duration = Duration::from_secs(20);
const URI: &str = "test:///default";
const WEB1: &str = "<domain type='test'><name>web1</name><uuid>11111111-2222-3333-4444-555555555555</uuid>\
    <memory unit='MiB'>64</memory><vcpu>2</vcpu><os><type>hvm</type></os>\
    <devices><disk type='file' device='disk'><source file='/vm/web1.img'/><target dev='vda'/></disk></devices></domain>";

struct Bench {
    libvirt: Libvirt,
    events: Receiver<LibvirtEvent>,
    pids: tempfile::TempDir,
}

fn bench(uri: &str) -> Bench {
    let pids = tempfile::tempdir().unwrap();
    let (tell, events) = channel();
    let tell = std::sync::Mutex::new(tell);
    let libvirt = Libvirt::spawn_with(uri, pids.path().to_owned(), move |event| {
        let tell: &Sender<LibvirtEvent> = &tell.lock().unwrap();
        let _ = tell.send(event);
    });
    Bench { libvirt, events, pids }
}

impl Bench {
    fn ask(&self, order: DomainOrder) -> DomainAnswer {
        let (tell, told) = channel();
        self.libvirt.ask(order, LONG, move |answer| tell.send(answer).unwrap());
        told.recv_timeout(LONG).expect("every order is answered")
    }
    fn list(&self) -> Vec<DomainInfo> {
        match self.ask(DomainOrder::List) {
            DomainAnswer::Listed(all) => all,
            other => panic!("{other:?}"),
        }
    }
    fn find(&self, vm: VmId) -> Option<DomainInfo> {
        self.list().into_iter().find(|domain| domain.vm == vm)
    }
    /// The next event that `wanted` takes; others are passed over.
    fn expect<T>(&self, wanted: impl Fn(LibvirtEvent) -> Option<T>) -> T {
        loop {
            let event = self.events.recv_timeout(LONG).expect("an event that is waited for comes");
            if let Some(found) = wanted(event) {
                return found;
            }
        }
    }
    fn expect_change(&self, vm: VmId, expected: DomainChange) {
        self.expect(|event| match event {
            LibvirtEvent::Changed { vm: whose, change, .. } if whose == vm && change == expected => Some(()),
            _ => None,
        });
    }
}

#[test]
fn the_life_of_a_domain() {
    let bench = bench(URI);
    let vm: VmId = "11111111-2222-3333-4444-555555555555".parse().unwrap();
    assert_eq!(bench.events.recv_timeout(LONG), Ok(LibvirtEvent::Up));
    let first = bench.expect(|event| match event {
        LibvirtEvent::Listed(all) => Some(all),
        _ => None,
    });
    assert!(first.iter().any(|domain| domain.name == "test" && domain.state == DomainState::Running), "{first:?}");

    assert_eq!(bench.ask(DomainOrder::Define { xml: WEB1.into() }), DomainAnswer::Done);
    bench.expect_change(vm, DomainChange::Defined);
    let defined = bench.find(vm).unwrap();
    assert!(defined.persistent && !defined.autostart && !defined.managed_save && defined.pid.is_none());
    assert!(matches!(defined.state, DomainState::Off(_)), "{:?}", defined.state);
    let read = xml::parse(defined.xml.as_deref().unwrap()).unwrap();
    assert_eq!((read.vm, read.name.as_str(), read.memory_kib, read.vcpus), (vm, "web1", 65_536, 2));
    assert_eq!(read.disks[0].path, "/vm/web1.img");

    // This driver cannot start a domain with its vCPUs standing. Then it must not be started in any other way.
    let refused = bench.ask(DomainOrder::StartPaused { vm });
    assert!(matches!(refused, DomainAnswer::Failed(DomainFailure::Definition(_))), "{refused:?}");
    assert!(matches!(bench.find(vm).unwrap().state, DomainState::Off(_)));

    assert_eq!(bench.ask(DomainOrder::Destroy { vm }), DomainAnswer::Done, "what is off is as good as ended");
    assert_eq!(bench.ask(DomainOrder::Undefine { vm }), DomainAnswer::Done);
    bench.expect_change(vm, DomainChange::Undefined);
    assert_eq!(bench.find(vm), None);
    for order in [
        DomainOrder::Undefine { vm },
        DomainOrder::StartPaused { vm },
        DomainOrder::RestorePaused { vm },
        DomainOrder::Mark { vm, generation: mainstay::types::Generation(7) },
        DomainOrder::Resume { vm },
        DomainOrder::Suspend { vm },
        DomainOrder::Shutdown { vm },
        DomainOrder::Destroy { vm },
        DomainOrder::Reset { vm },
        DomainOrder::AbortJob { vm },
        DomainOrder::Migrate { vm, uri: URI.into(), bandwidth_mib: None },
    ] {
        assert_eq!(bench.ask(order.clone()), DomainAnswer::Failed(DomainFailure::NoDomain), "{order:?}");
    }
    for junk in ["", "<domain", "<network/>", "a\0b"] {
        let failed = bench.ask(DomainOrder::Define { xml: junk.into() });
        assert!(matches!(failed, DomainAnswer::Failed(DomainFailure::Definition(_))), "{junk:?}: {failed:?}");
    }
    bench.libvirt.relist();
    let again = bench.expect(|event| match event {
        LibvirtEvent::Listed(all) => Some(all),
        _ => None,
    });
    assert!(again.iter().all(|domain| domain.vm != vm), "{again:?}");
    the_running_one(&bench, &first.iter().find(|domain| domain.name == "test").unwrap().clone());
}

/// The driver brings one running domain along.
fn the_running_one(bench: &Bench, test: &DomainInfo) {
    let vm = test.vm;
    let state = || bench.find(vm).unwrap().state;
    std::fs::write(bench.pids.path().join("test.pid"), "4242\n").unwrap();
    assert_eq!(bench.find(vm).unwrap().pid, Some(4242));
    what_it_shows(bench, vm);
    its_memory(bench, vm);

    assert_eq!(bench.ask(DomainOrder::Suspend { vm }), DomainAnswer::Done);
    assert_eq!(state(), DomainState::Paused { by_io_error: false });
    bench.expect_change(vm, DomainChange::Suspended { migrated: false, by_io_error: false });
    assert_eq!(bench.ask(DomainOrder::Resume { vm }), DomainAnswer::Done);
    assert_eq!(state(), DomainState::Running);
    bench.expect_change(vm, DomainChange::Resumed);

    let unable = bench.ask(DomainOrder::Migrate { vm, uri: URI.into(), bandwidth_mib: Some(100) });
    assert!(matches!(unable, DomainAnswer::Failed(DomainFailure::Host(_))), "{unable:?}");
    assert_eq!(state(), DomainState::Running, "a migration that fails leaves the VM here");

    assert_eq!(bench.ask(DomainOrder::Destroy { vm }), DomainAnswer::Done);
    bench.expect_change(vm, DomainChange::Stopped(OffReason::Destroyed));
    let off = bench.find(vm).unwrap();
    assert_eq!((off.state, off.pid), (DomainState::Off(OffReason::Destroyed), None), "an old pid file says nothing");
    assert_eq!(bench.ask(DomainOrder::Destroy { vm }), DomainAnswer::Done);
}

/// This driver has a picture, counts in its memory, and has no console.
fn what_it_shows(bench: &Bench, vm: VmId) {
    let parts: Vec<Part> = bench.libvirt.look(vm, What::Everything, LONG).into_iter().collect();
    let [
        Part::System(None),
        Part::Console(console),
        Part::Memory(Ok(memory)),
        Part::Picture(picture),
        Part::Statistics(Ok(statistics)),
    ] = parts.as_slice()
    else {
        panic!("not five parts in their order"); // They are long.
    };
    assert_eq!(*console, Ok(None));
    assert!(
        memory.len() == 0x8000 && memory.iter().zip((0..=255_u8).cycle()).all(|(byte, expected)| *byte == expected)
    );
    assert!(statistics.contains(&("state.state".to_owned(), "1".to_owned())), "{statistics:?}");
    match picture {
        Ok(picture) => assert!(picture.starts_with(b"\x89PNG"), "{:?}", &picture[..8]),
        // It is a file that comes with the daemon.
        Err(why) => assert!(why.contains("test-screenshot.png"), "{why}"),
    }
    let unknown: Vec<Part> = bench.libvirt.look(VmId::default(), What::Everything, LONG).into_iter().collect();
    let expected = "libvirt shows nothing of it: NoDomain".to_owned();
    assert!(unknown.len() == 4 && unknown.contains(&Part::Memory(Err(expected))));
}

/// This driver does not write memory alone; what is too large is not even asked of it.
fn its_memory(bench: &Bench, vm: VmId) {
    let folder = tempfile::tempdir().unwrap();
    let write = |most| {
        let path = folder.path().join("memory");
        bench.libvirt.dump(vm, path, DumpFormat::Kdump, most, LONG).recv().unwrap().unwrap_err()
    };
    assert!(write(u64::MAX).contains("unsupported flags"), "{}", write(u64::MAX));
    let why = write(1 << 20);
    assert!(why.starts_with("its ") && why.contains("MiB of memory are not written"), "{why}");
    assert!(folder.path().read_dir().unwrap().next().is_none());
}

/// A daemon's address in a folder of ours.
fn daemon(folder: &tempfile::TempDir) -> (PathBuf, String) {
    let socket = folder.path().join("libvirt-sock");
    let uri = format!("qemu+unix:///system?socket={}", socket.display());
    (socket, uri)
}

fn down(event: LibvirtEvent) -> Option<String> {
    match event {
        LibvirtEvent::Down(why) => Some(why),
        _ => None,
    }
}

#[test]
fn without_a_daemon_orders_fail_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (_, uri) = daemon(&folder);
    let bench = bench(&uri);
    let why = bench.expect(down);
    assert!(why.contains("Failed to connect socket"), "{why}");
    for _ in 0..3 {
        let failed = bench.ask(DomainOrder::List);
        assert!(matches!(failed, DomainAnswer::Failed(DomainFailure::NoDaemon(_))), "{failed:?}");
    }
}

#[test]
fn a_daemon_that_hangs_costs_time_outs_and_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, uri) = daemon(&folder);
    let frozen = UnixListener::bind(&socket).unwrap(); // Connections wait in its backlog for ever.
    let bench = bench(&uri);
    let (tell, told) = channel();
    let vm = VmId::default();
    let orders = [DomainOrder::List, DomainOrder::Destroy { vm }, DomainOrder::Suspend { vm }];
    for order in orders.iter().cloned() {
        let tell = tell.clone();
        bench.libvirt.ask(order, Duration::from_millis(100), move |answer| tell.send(answer).unwrap());
    }
    drop(tell);
    let looks: Vec<_> = (0..9).map(|_| bench.libvirt.look(vm, What::Everything, Duration::from_millis(100))).collect();
    for _ in 0..2 {
        assert_eq!(told.recv_timeout(LONG), Ok(DomainAnswer::Failed(DomainFailure::Timeout)));
    }
    let why = bench.expect(down);
    assert!(why.contains("does not answer"), "{why}");
    assert!(told.try_recv().is_err(), "each is answered once, and a pause that was begun when it ends");
    // Looks show nothing. Those that nobody had begun end; two workers and the spare hang with theirs.
    let ended =
        |look: &Receiver<Part>| look.recv_timeout(Duration::from_millis(1)) == Err(RecvTimeoutError::Disconnected);
    let until = std::time::Instant::now() + LONG;
    while looks.iter().filter(|look| ended(look)).count() < 6 {
        assert!(std::time::Instant::now() < until, "looks that nobody had begun end at their deadline");
    }
    // It dies: whoever waited for it goes on, and finds nobody.
    drop(frozen);
    let paused = told.recv_timeout(LONG);
    assert!(matches!(paused, Ok(DomainAnswer::Failed(_))), "{paused:?}");
    std::fs::remove_file(&socket).unwrap();
    let why = bench.expect(down);
    assert!(why.contains("cannot connect"), "{why}");
    let failed = bench.ask(DomainOrder::List);
    assert!(matches!(failed, DomainAnswer::Failed(DomainFailure::NoDaemon(_))), "{failed:?}");
}
