//! Guests that show everything, something, or nothing.

use std::sync::mpsc::Sender;
use std::sync::mpsc::channel;

use super::*;
use crate::core::guests::FoundBy;
use crate::exec::console::{MAX_READERS, TAIL};

const WEB: VmId = VmId(uuid::Uuid::from_u128(1));
const LONG: Duration = Duration::from_secs(20);

fn case(by: FoundBy) -> Case {
    let (name, why) = ("web".to_owned(), "app/db: no answer".to_owned());
    let said = vec![(clock::now(), "critical app/db: no answer".to_owned())];
    Case { name, why, by, panicked: None, sign: None, system: None, beat: None, said }
}

/// A text screen with one line.
fn memory(line: &str) -> Vec<u8> {
    let mut memory = [b' ', 7].repeat(0x4000);
    for (at, letter) in line.bytes().enumerate() {
        memory[2 * at] = letter;
    }
    memory
}

fn picture() -> Vec<u8> {
    b"P6 1 1 255\nrgb".to_vec()
}

/// Evidence whose guest shows these parts; one that hangs shows nothing more, and never ends.
struct Bench {
    evidence: Evidence,
    failures: Arc<Failures>,
    _folder: tempfile::TempDir,
}

/// One that is never asked.
fn no_dump() -> Dumper {
    Box::new(|_, _, _, _, _| panic!("nobody wants its memory"))
}

fn bench(look: impl Fn(&SyncSender<Part>) + Send + Sync + 'static, hangs: bool) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let failures = Arc::new(Failures::new(folder.path().join("failures")));
    let kept = Mutex::new(Vec::new());
    let reader = Arc::new(Reader::new(&[]));
    let evidence = Evidence::new(
        "a",
        Arc::clone(&failures),
        reader,
        move |_, _| {
            let (tell, told) = sync_channel(16);
            look(&tell);
            if hangs {
                kept.lock().unwrap().push(tell);
            }
            told
        },
        no_dump(),
    );
    Bench { evidence, failures, _folder: folder }
}

impl Bench {
    /// What went, after which time; what was told when it was kept, and what is on the disk.
    fn take(&self, by: FoundBy, result: Result<(), String>) -> (Class, Duration, Failure) {
        let begun = clock::now();
        let (tell, told) = channel();
        let went = tell.clone();
        self.evidence.take(
            WEB,
            Remedy::Reset,
            case(by),
            move |class, outcome| {
                outcome.send(Afterwards::Ended(result)).unwrap();
                went.send(Ok((class.clone(), clock::now().since(begun)))).unwrap();
            },
            move |kept| tell.send(Err(kept)).unwrap(),
        );
        let (class, waited) = told.recv_timeout(LONG).unwrap().expect("the remedy goes first");
        let kept = told.recv_timeout(LONG).unwrap().unwrap_err().unwrap();
        assert!(kept.starts_with("web has failed (") && kept.contains("--show 1"), "{kept}");
        let until = clock::now() + LONG;
        loop {
            let failure = self.failures.list(WEB).pop().unwrap();
            if !failure.outcome.is_empty() {
                return (class, waited, failure);
            }
            assert!(clock::now() < until, "the outcome is written into the record");
            std::thread::yield_now();
        }
    }
}

fn names(failure: &Failure) -> (Vec<&'static str>, Vec<&'static str>) {
    let files = failure.files.iter().map(|kept| kept.file.name()).collect();
    (files, failure.missing.iter().map(|missing| missing.file.name()).collect())
}

#[test]
fn everything_is_kept_and_the_remedy_goes_as_soon_as_it_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("console");
    std::fs::write(&log, [&vec![b'x'; 100_000][..], b"\n[ 1.5] Kernel panic - not syncing: sysrq"].concat()).unwrap();
    let path = log.to_str().unwrap().to_owned();
    let bench = bench(
        move |tell| {
            tell.send(Part::System(Some("http://debian.org/\u{1b}debian/12".to_owned()))).unwrap();
            tell.send(Part::Console(Ok(Some(path.clone())))).unwrap();
            tell.send(Part::Memory(Ok(memory("GNU GRUB  version 2.06")))).unwrap();
            tell.send(Part::Picture(Ok(picture()))).unwrap();
            tell.send(Part::Statistics(Ok(vec![("cpu.time".to_owned(), "7".to_owned())]))).unwrap();
        },
        true,
    );
    let (class, waited, failure) = bench.take(FoundBy::Monitoring, Ok(()));
    assert!(waited < Case::patience(&case(FoundBy::Monitoring)), "nothing more was to come: {waited:?}");
    assert_eq!(class.to_string(), "Linux panic");
    assert_eq!(failure.system, "http://debian.org/debian/12 (by its definition)");
    assert_eq!((failure.outcome.as_str(), failure.class.line.as_str()), ("done", "Kernel panic - not syncing: sysrq"));
    let all = vec!["screen.txt", "screen.png", "console.log", "statistics.txt", "messages.txt"];
    assert_eq!(names(&failure), (all, vec![]));
    let read = |file| String::from_utf8_lossy(&bench.failures.piece(WEB, 1, file, 0).unwrap().bytes).into_owned();
    assert_eq!(read(F::Console).len(), TAIL as usize);
    assert_eq!((read(F::Screen).trim_end(), read(F::Statistics).as_str()), ("GNU GRUB  version 2.06", "cpu.time=7\n"));
    let messages = read(F::Messages);
    assert!(messages.starts_with("system   not known: no agent has spoken\nmessage  20"), "{messages}");
    assert!(messages.ends_with("Z: critical app/db: no answer\n"), "{messages}");
}

#[test]
fn a_monitor_that_hangs_holds_up_the_remedy_for_its_patience_only() {
    for (by, patience) in [(FoundBy::Message, 100), (FoundBy::Monitoring, 500)] {
        let bench = bench(|tell| tell.send(Part::Console(Ok(None))).unwrap(), true);
        let (class, waited, failure) = bench.take(by, Err("libvirt does not answer".to_owned()));
        let patience = Duration::from_millis(patience);
        assert!(patience <= waited && waited < patience + Duration::from_millis(400), "{waited:?}");
        let kind = if by == FoundBy::Message { FailureKind::Reported } else { FailureKind::Unknown };
        assert_eq!((class.kind, failure.outcome.as_str()), (kind, "not done: libvirt does not answer"));
        let missing = vec!["screen.txt", "screen.png", "console.log", "statistics.txt"];
        assert_eq!(names(&failure), (vec!["messages.txt"], missing));
        let why = |at: usize| failure.missing[at].why.as_str();
        assert!(why(0).starts_with("not shown within 1") || why(0).starts_with("not shown within 5"), "{}", why(0));
        assert!(why(2).starts_with("its definition logs no serial console"), "{}", why(2));
    }
}

/// The part that was under way when the remedy went shows the guest before it; the next one does not.
#[test]
fn what_comes_too_late_is_not_taken_for_the_failure() {
    let late = Mutex::new(None);
    let bench = bench(
        move |tell| {
            let tell = tell.clone();
            let sending = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(250));
                tell.send(Part::Memory(Ok(memory("Kernel panic - not syncing: x")))).unwrap();
                tell.send(Part::Picture(Ok(picture()))).unwrap();
                tell.send(Part::Statistics(Ok(Vec::new()))).unwrap();
            });
            late.lock().unwrap().replace(sending);
        },
        false,
    );
    let (class, waited, failure) = bench.take(FoundBy::Message, Ok(()));
    assert_eq!((class.kind, waited < Duration::from_millis(240)), (FailureKind::Reported, true), "{waited:?}");
    assert_eq!(failure.class.kind, FailureKind::Panic);
    assert_eq!(names(&failure).0, ["screen.txt", "statistics.txt", "messages.txt"]);
}

#[test]
fn a_guest_that_asks_again_and_again_is_kept_once() {
    let bench = bench(|_| (), false);
    bench.take(FoundBy::Message, Ok(()));
    let (tell, told) = channel::<&str>();
    let kept: Sender<&str> = tell.clone();
    let go = move |class: &Class, _: Outcome| {
        assert_eq!(class.kind, FailureKind::Reported, "as it was found to be the first time");
        tell.send("went").unwrap();
    };
    bench.evidence.take(WEB, Remedy::Reset, case(FoundBy::Message), go, move |_| kept.send("kept").unwrap());
    assert_eq!(told.recv_timeout(LONG), Ok("went"));
    assert!(told.recv_timeout(LONG).is_err(), "the rest is dropped");
    assert_eq!(bench.failures.list(WEB).len(), 1);
}

#[test]
fn too_many_at_once_go_without() {
    let bench = bench(|_| (), true);
    let (tell, told) = channel();
    for n in 0..MAX_AT_ONCE as u128 + 1 {
        let kept = tell.clone();
        let vm = VmId(uuid::Uuid::from_u128(n));
        bench.evidence.take(vm, Remedy::Reset, case(FoundBy::Message), |_, _| (), move |why| kept.send(why).unwrap());
    }
    let why = told.recv_timeout(LONG).unwrap().unwrap_err();
    assert_eq!(why, "web: failure information is not kept: that of 16 guests is being kept already");
    for _ in 0..MAX_READERS {
        assert!(told.recv_timeout(LONG).unwrap().is_ok());
    }
}

#[test]
fn a_panic_before_the_last_remedy_is_not_this_failure() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("console");
    std::fs::write(&log, "Kernel panic - not syncing: old\n").unwrap();
    let path = log.to_str().unwrap().to_owned();
    let look = move |tell: &SyncSender<Part>| {
        tell.send(Part::Console(Ok(Some(path.clone())))).unwrap();
        for part in [Part::Memory(Err("none".to_owned())), Part::Picture(Err("none".to_owned()))] {
            tell.send(part).unwrap();
        }
        tell.send(Part::Statistics(Ok(Vec::new()))).unwrap();
    };
    let bench = bench(look, false);
    let (class, ..) = bench.take(FoundBy::Monitoring, Ok(()));
    assert_eq!(class.kind, FailureKind::Panic);
    std::fs::write(&log, "Kernel panic - not syncing: old\nup 1\n").unwrap();
    let inner = &bench.evidence.0;
    inner.busy.lock().unwrap().last.clear(); // Enough time has passed.
    let (tell, told) = channel();
    bench.evidence.take(
        WEB,
        Remedy::Reset,
        case(FoundBy::Monitoring),
        move |class, _| tell.send(class.clone()).unwrap(),
        drop,
    );
    assert_eq!(told.recv_timeout(LONG).unwrap().kind, FailureKind::Unknown);
}

/// Evidence of a guest with a picture and no text screen; the program that reads it is this script.
fn pictured(script: &str) -> Bench {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("tesseract");
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    for path in [folder.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let failures = Arc::new(Failures::new(folder.path().join("failures")));
    let reader = Arc::new(Reader::new(&[program.to_str().unwrap()]));
    let evidence = Evidence::new(
        "a",
        Arc::clone(&failures),
        reader,
        |_, _| {
            let (tell, told) = sync_channel(16);
            tell.send(Part::Console(Ok(None))).unwrap();
            tell.send(Part::Memory(Ok(vec![0xff; 0x8000]))).unwrap();
            tell.send(Part::Picture(Ok(b"P6 2 1 255\nrgbRGB".to_vec()))).unwrap();
            tell.send(Part::Statistics(Ok(Vec::new()))).unwrap();
            told
        },
        no_dump(),
    );
    Bench { evidence, failures, _folder: folder }
}

#[test]
fn a_picture_is_read_in_the_wait_of_monitoring_or_after_the_remedy() {
    let (quick, slow) = ("echo 'Stop code: X'", "sleep 1; echo 'Stop code: X'");
    for (by, script, first) in [
        (FoundBy::Monitoring, quick, FailureKind::StopScreen),
        (FoundBy::Monitoring, slow, FailureKind::Unknown),
        (FoundBy::Message, quick, FailureKind::Reported),
    ] {
        let bench = pictured(script);
        let (class, waited, failure) = bench.take(by, Ok(()));
        assert_eq!((class.kind, failure.class.kind), (first, FailureKind::StopScreen), "{script}");
        if by == FoundBy::Message {
            assert!(waited < Duration::from_millis(90), "a message's remedy waits for no program: {waited:?}");
        }
        assert_eq!(names(&failure).0, ["screen.png", "statistics.txt", "screen-read.txt", "messages.txt"]);
        let read = bench.failures.piece(WEB, 1, F::PictureText, 0).unwrap().bytes;
        assert_eq!(read, b"Stop code: X\n");
    }
    let (_, _, failure) = pictured("exit 1").take(FoundBy::Monitoring, Ok(()));
    let missing = failure.missing.iter().find(|missing| missing.file == F::PictureText).unwrap();
    assert_eq!(missing.why, "the picture was not read: tesseract: exit status: 1");
}
