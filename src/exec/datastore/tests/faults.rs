//! Datastores that are full, read-only, missing or hung.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs a test with a small file system of its own, in a mount namespace that ends with the thread.
fn on_small_tmpfs(test: impl FnOnce(&Path) + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests run as root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = Scratch::new();
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=2m")).unwrap();
        prepare(dir.path(), &roster(1, 3), host(10)).unwrap();
        test(dir.path());
        nix::mount::umount2(dir.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    };
    std::thread::spawn(run).join().unwrap();
}

fn fill(dir: &Path) {
    let file = std::fs::File::create(dir.join("ballast")).unwrap();
    let mut at = 0;
    while file.write_all_at(&[1; BLOCK], at).is_ok() {
        at += BLOCK as u64;
    }
}

#[test]
fn errors_that_say_what_is_to_come_are_told_apart() {
    use super::super::files::failure;
    let of = |errno| failure("/srv", &std::io::Error::from_raw_os_error(errno));
    for errno in [nix::libc::ENODEV, nix::libc::ENXIO, nix::libc::ESHUTDOWN] {
        assert!(matches!(of(errno), StoreFailure::Gone { .. }), "{errno}");
    }
    assert!(matches!(of(nix::libc::ESTALE), StoreFailure::Stale { .. }));
    assert!(matches!(of(nix::libc::EIO), StoreFailure::Io { .. }));
    assert!(matches!(of(nix::libc::EDQUOT), StoreFailure::Full { .. }));
}

#[test]
fn a_full_datastore_stops_neither_beats_nor_reclaims() {
    on_small_tmpfs(|dir| {
        let store = agent(dir, 10);
        let first = claim(1, 10);
        assert_eq!(ask(&store, create(&first, None)), StoreAnswer::Created);
        let tmp = root(dir).join("tmp");
        until("files are prepared", || std::fs::read_dir(&tmp).unwrap().count() == 16);
        let mut writer = guard(dir, 0);
        fill(dir);
        writer.write(&beat(0, 1, 1), clock::now()).unwrap();
        let list = VmList { host: host(10), sequence: Sequence(1), ..VmList::default() };
        writer.write_list(&list).unwrap();
        let mut before = first;
        for generation in 2..=17 {
            let next = claim(generation, 10);
            assert_eq!(ask(&store, create(&next, Some(&before))), StoreAnswer::Created, "{generation}");
            before = next;
        }
        let failure = failed(ask(&store, create(&claim(18, 10), Some(&before))));
        assert!(matches!(failure, StoreFailure::Full { .. }), "{failure:?}");
        assert!(failure.to_string().contains("make room"), "{failure}");
        std::fs::remove_file(dir.join("ballast")).unwrap();
        assert_eq!(ask(&store, create(&claim(18, 10), Some(&before))), StoreAnswer::Created);
    });
}

#[test]
fn a_read_only_datastore_is_read_and_refuses_writes() {
    on_small_tmpfs(|dir| {
        let store = agent(dir, 10);
        let mut writer = guard(dir, 0);
        writer.write(&beat(0, 1, 1), clock::now()).unwrap();
        drop(writer);
        let none: Option<&str> = None;
        // Prepared files stay open for writing, which would keep it from becoming read-only.
        mount(none, dir, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_BIND, none).unwrap();
        assert_eq!(read_all(&store).members[0].beat.as_ref().unwrap().counter, Counter(1));
        let failure = failed(ask(&store, create(&claim(1, 10), None)));
        assert!(matches!(failure, StoreFailure::ReadOnly { .. }), "{failure:?}");
        let failure = BeatFile::open(dir, CLUSTER, host(10)).err().unwrap();
        assert!(failure.to_string().contains("read-write"), "{failure}");
    });
}

#[test]
fn a_missing_datastore_is_not_made() {
    let dir = Scratch::new();
    let store = agent(dir.path(), 10);
    for order in [StoreOrder::ReadAll, StoreOrder::ReadClaims(ClaimsOf::All), create(&claim(1, 10), None)] {
        let failure = failed(ask(&store, order));
        assert!(matches!(failure, StoreFailure::Missing { .. }), "{failure:?}");
    }
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    // Claims under a folder that is there, but not whole, are unknown: not none.
    let dir = prepared();
    std::fs::remove_dir_all(root(dir.path()).join("claims")).unwrap();
    let failure = failed(ask(&agent(dir.path(), 10), StoreOrder::ReadClaims(ClaimsOf::Vms(vec![VM]))));
    assert!(matches!(failure, StoreFailure::Missing { .. }), "{failure:?}");
    assert!(highest_claim(dir.path(), CLUSTER, VM).is_err());
}

#[test]
fn an_unreadable_member_fails_the_whole_read() {
    let dir = prepared();
    let path = root(dir.path()).join("hosts").join(host(11).to_string());
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let failure = failed(ask(&agent(dir.path(), 10), StoreOrder::ReadAll));
    assert!(failure.to_string().contains(&path.display().to_string()), "{failure}");
}

#[test]
fn a_probe_names_what_cannot_be_read() {
    let dir = prepared();
    let disk = dir.path().join("disk.img");
    std::fs::write(&disk, vec![1; BLOCK]).unwrap();
    let paths = [disk, dir.path().join("gone"), dir.path().to_owned()].map(|path| path.display().to_string());
    let answer = ask(&agent(dir.path(), 10), StoreOrder::Probe { paths: paths.to_vec() });
    let StoreAnswer::Probed { failed, .. } = answer else { panic!("{answer:?}") };
    assert_eq!(failed.iter().map(|(path, _)| path).collect::<Vec<_>>(), [&paths[1], &paths[2]]);
}

/// A file that nobody answers for: opening a pipe waits for its other end.
struct Hang(PathBuf);

impl Hang {
    fn at(path: PathBuf) -> Self {
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        Self(path)
    }
    fn heal(&self) {
        // Both ends, so that this itself never waits; whoever waits for one gets it.
        drop(std::fs::File::options().read(true).write(true).open(&self.0).unwrap());
    }
}

#[test]
fn a_hung_datastore_times_out_then_says_hung_and_costs_nobody_else() {
    let (sick, well) = (prepared(), prepared());
    let (store, other) = (agent(sick.path(), 10), agent(well.path(), 10));
    let block = root(sick.path()).join("members");
    let kept = std::fs::read(&block).unwrap();
    assert_eq!(highest(&store), (vec![], vec![]));
    std::fs::remove_file(&block).unwrap();
    let hang = Hang::at(block.clone());
    // Two at once: one is in the call, the other waits behind it; both are told.
    let (send, answers) = mpsc::channel();
    for within in [Duration::from_secs(2), SOON] {
        let send = send.clone();
        store.ask(StoreOrder::ReadAll, within, move |answer| send.send(failed(answer)).unwrap());
    }
    assert_eq!(answers.recv_timeout(SOON).unwrap(), StoreFailure::Timeout(Duration::from_secs(2)));
    assert_eq!(answers.recv_timeout(SOON).unwrap(), StoreFailure::Hung);
    assert_eq!(failed(ask(&store, StoreOrder::ReadAll)), StoreFailure::Hung);
    // Another lane of the same datastore goes on, and so does another datastore.
    assert_eq!(ask(&store, create(&claim(1, 10), None)), StoreAnswer::Created);
    assert_eq!(read_all(&other).roster, roster(1, 3));
    std::fs::rename(&block, block.with_file_name("pipe")).unwrap();
    std::fs::write(&block, &kept).unwrap();
    Hang(block.with_file_name("pipe")).heal();
    drop(hang);
    until("it works again", || matches!(ask(&store, StoreOrder::ReadAll), StoreAnswer::Read(_)));
}

#[test]
fn a_claim_that_timed_out_is_found_by_its_nonce_and_hung_claims_leave_beats_alone() {
    let dir = prepared();
    let (first, second) = (claim(1, 11), claim(2, 10));
    assert_eq!(ask(&agent(dir.path(), 11), create(&first, None)), StoreAnswer::Created);
    let store = agent(dir.path(), 10);
    let kept = std::fs::read(claim_path(dir.path(), 1)).unwrap();
    std::fs::remove_file(claim_path(dir.path(), 1)).unwrap();
    let hang = Hang::at(claim_path(dir.path(), 1));
    // The link succeeds, the look at the predecessor hangs: in every thread of the lane.
    let short = Duration::from_millis(50);
    let mut timeouts = 0;
    until("every thread of the lane hangs", || {
        match failed(ask_within(&store, create(&second, Some(&first)), short)) {
            StoreFailure::Hung => return true,
            failure => assert_eq!(failure, StoreFailure::Timeout(short)),
        }
        timeouts += 1;
        false
    });
    assert!(3 <= timeouts);
    assert_eq!(read_all(&store).roster, roster(1, 3));
    assert_eq!(highest_claim(dir.path(), CLUSTER, VM), Ok(Some(second.clone())));
    let pipe = dir.path().join("pipe");
    std::fs::rename(&hang.0, &pipe).unwrap();
    std::fs::write(claim_path(dir.path(), 1), kept).unwrap();
    Hang(pipe).heal();
    until("the lost claim is ours", || ask(&store, create(&second, Some(&first))) == StoreAnswer::Created);
}

#[test]
fn nothing_is_linked_after_the_deadline() {
    let dir = prepared();
    let root = files::Folder::open(&root(dir.path())).unwrap();
    let claims = claims::Claims::new(host(10));
    let late = || Err(StoreFailure::Timeout(SOON));
    let mut used = Vec::new();
    assert_eq!(claims.create(&root, &claim(1, 10), None, &late, &mut used), Err(StoreFailure::Timeout(SOON)));
    assert!(!claim_path(dir.path(), 1).exists() && used.len() == 1);
    assert_eq!(claims.create(&root, &claim(1, 10), None, &|| Ok(()), &mut used), Ok(StoreAnswer::Created));
}

#[test]
fn the_last_handle_may_go_while_orders_wait() {
    let dir = prepared();
    let store = agent(dir.path(), 10);
    let (send, answers) = mpsc::channel();
    for _ in 0..20 {
        let send = send.clone();
        store.ask(StoreOrder::ReadAll, SOON, move |answer| send.send(answer).unwrap());
    }
    drop((store, send));
    let answers: Vec<_> = answers.iter().collect();
    assert!(answers.len() == 20 && answers.iter().all(|answer| matches!(answer, StoreAnswer::Read(_))));
}

#[test]
fn leftovers_of_a_dead_agent_are_removed_and_never_used_again() {
    let dir = prepared();
    let tmp = root(dir.path()).join("tmp");
    let left = tmp.join(format!("claim.{}.{:032x}.{:032x}", host(10), 1, 2));
    let others = tmp.join(format!("claim.{}.{:032x}.{:032x}", host(11), 1, 2));
    std::fs::write(&left, vec![5; BLOCK]).unwrap();
    std::fs::write(&others, vec![5; BLOCK]).unwrap();
    // The dead agent's last link has landed: the file is a claim as well.
    std::fs::create_dir(claim_path(dir.path(), 1).parent().unwrap()).unwrap();
    std::fs::hard_link(&left, claim_path(dir.path(), 1)).unwrap();
    let store = agent(dir.path(), 10);
    read_all(&store);
    until("swept", || !left.exists());
    assert!(others.exists());
    assert_eq!(std::fs::read(claim_path(dir.path(), 1)).unwrap(), vec![5; BLOCK]);
}
