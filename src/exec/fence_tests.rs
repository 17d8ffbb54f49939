//! Fence programs that succeed, fail, hang, chatter and fork; locks as QEMU takes them.

use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc::channel;

use super::*;
use crate::exec::program::OUTPUT_MAX;

const LONG: Duration = Duration::from_secs(20);

/// A folder with a shell script in it.
fn script(body: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fence");
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = path.to_str().unwrap().to_owned();
    (folder, program)
}

fn run(body: &str, within: Duration) -> Result<(), String> {
    let (_folder, program) = script(body);
    // Another test's fork may hold the script open for writing for a moment ("text file busy").
    loop {
        match run_command(&program, "h2", HostId::default(), within) {
            Err(why) if why.contains("Text file busy") => std::thread::yield_now(),
            other => return other,
        }
    }
}

#[test]
fn programs_and_what_is_said_of_them() {
    let nil = HostId::default();
    let table: &[(&str, Result<(), &str>)] = &[
        ("exit 0", Ok(())),
        (&format!("test $# = 2 && test $1 = h2 && test $2 = {nil}"), Ok(())),
        ("cat; exit 0", Ok(())),
        ("echo no such client; echo at the server >&2; exit 3", Err("(exit status: 3): no such client; at the server")),
        ("kill -TERM $$", Err("(signal: 15 (SIGTERM))")),
        ("yes | head -c 3000000; exit 0", Ok(())),
        ("echo gone >/dev/stderr; exit 1", Err(": gone")),
    ];
    for (body, expected) in table {
        match (run(body, LONG), expected) {
            (Ok(()), Ok(())) => {}
            (Err(why), Err(part)) => assert!(why.contains(part), "{body}: {why}"),
            (outcome, _) => panic!("{body}: {outcome:?}"),
        }
    }
    let chatter = run("yes | head -c 3000000; exit 1", LONG).unwrap_err();
    assert!(chatter.len() < 2 * OUTPUT_MAX, "{} bytes", chatter.len());
    let missing = run_command("/no/such/fence", "h2", nil, LONG).unwrap_err();
    assert!(missing.contains("cannot run /no/such/fence"), "{missing}");
}

#[test]
fn a_program_that_hangs_is_killed_with_its_children() {
    let folder = tempfile::tempdir().unwrap();
    let note = folder.path().join("pid");
    // The file is there only when the child's id stands in it.
    let body = format!("echo began; sleep 1000 & echo $! >{0}.new; mv {0}.new {0}; wait", note.display());
    let hung = std::thread::spawn(move || run(&body, Duration::from_millis(300)));
    let why = hung.join().unwrap().unwrap_err();
    assert!(why.contains("did not end within 300 ms and was killed"), "{why}");
    let Ok(child) = std::fs::read_to_string(&note) else { return }; // Killed before it got that far.
    let proc = format!("/proc/{}/stat", child.trim());
    // The orphan is reaped by init in its own time; being a zombie is dead enough.
    let dead = move || std::fs::read_to_string(&proc).map_or(true, |stat| stat.contains(") Z "));
    let (tell, told) = channel();
    std::thread::spawn(move || {
        while !dead() {
            std::thread::yield_now();
        }
        let _ = tell.send(());
    });
    told.recv_timeout(LONG).expect("the program's child dies with it");
}

#[test]
fn what_a_program_leaves_running_holds_nobody_up() {
    let (tell, told) = channel();
    std::thread::spawn(move || tell.send(run("sleep 30 & exit 0", LONG)));
    assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(Ok(())));
}

#[test]
fn the_asker_has_its_answer_in_any_case() {
    let (tell, told) = channel();
    let (_folder, program) = script("exit 0");
    let (first, second) = (tell.clone(), tell);
    command(program, "h2".into(), HostId::default(), LONG, move |outcome| first.send(outcome.is_ok()).unwrap());
    told.recv_timeout(LONG).unwrap();
    let (release, hang) = channel::<()>();
    let late = Duration::from_millis(30);
    static TESTS: Places = Places::new(4);
    program::bounded(
        &TESTS,
        "test",
        late,
        move || hang.recv().is_ok(),
        |why| why.is_some(),
        move |got| second.send(got).unwrap(),
    );
    assert_eq!(told.recv_timeout(LONG), Ok(false), "late: no result, no other reason");
    drop(release);
    assert!(told.recv_timeout(LONG).is_err(), "answered once");
}

/// Takes shared locks as QEMU does, on an open file of its own.
fn hold(path: &Path, bytes: &[i64]) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    for byte in bytes {
        let lock = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: *byte,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    }
    file
}

#[test]
fn locks_as_qemu_takes_them() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("web1.qcow2");
    std::fs::write(&image, "").unwrap();
    let table: &[(&str, &[i64], bool)] = &[
        ("nobody", &[], false),
        ("a running guest", &[100, 101, 103, 201, 203], true),
        ("a guest that shares its disk", &[100, 101], true),
        ("a reader that lets nobody write", &[100, 201], true),
        ("qemu-img info -U", &[], false),
        ("a reader that lets others write", &[100], false),
    ];
    for (who, bytes, locked) in table {
        let holder = hold(&image, bytes);
        assert_eq!(image_locked(&image).unwrap().is_some(), *locked, "{who}");
        drop(holder);
        assert_eq!(image_locked(&image).unwrap(), None, "{who} is gone");
    }
    assert_eq!(image_locked(&folder.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    let (tell, told) = channel();
    let _holder = hold(&image, &[101]);
    probe(image, LONG, move |found| tell.send(found).unwrap());
    let found = told.recv_timeout(LONG).unwrap().unwrap().unwrap();
    assert!(found.contains("byte 101"), "{found}");
}
