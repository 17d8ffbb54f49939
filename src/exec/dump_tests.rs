//! Dumps of a libvirt that does as it is told, or not.

use std::fs;
use std::sync::mpsc::{channel, sync_channel};
use std::thread;

use super::*;
use crate::types::failure::{Class, Failure, FailureKind, Family, MemoryDump};
use crate::types::guests::Remedy;

const WEB: VmId = VmId(uuid::Uuid::from_u128(1));
const LIMITS: Dumps = Dumps { mib: 1, within_s: 20 };
const LONG: Duration = Duration::from_secs(20);

fn failure() -> Failure {
    Failure {
        number: 0,
        vm: WEB,
        name: "web".to_owned(),
        host: "a".to_owned(),
        unix_ms: 1,
        class: Class { family: Family::Unknown, kind: FailureKind::Unknown, line: String::new() },
        cause: String::new(),
        system: String::new(),
        remedy: Remedy::Reset,
        outcome: String::new(),
        waited_ms: 0,
        files: Vec::new(),
        missing: Vec::new(),
        dump: MemoryDump::NotWanted,
    }
}

/// What is told, what the record says, and how many bytes there are; `libvirt` writes to a pipe that is given, and answers.
fn written(
    limits: Dumps,
    libvirt: impl Fn(&Path, DumpFormat) -> Result<(), String> + Send + Sync + 'static,
) -> (Result<(), String>, MemoryDump, Option<usize>) {
    let folder = tempfile::tempdir().unwrap();
    let failures = Failures::new(folder.path().to_owned());
    let number = failures.keep(failure(), &[]).unwrap();
    let libvirt = std::sync::Arc::new(libvirt);
    let dumper: Dumper = Box::new(move |vm, path, format, most, _| {
        assert!(vm == WEB && most <= 1 << 20);
        let (tell, told) = sync_channel(1);
        let libvirt = std::sync::Arc::clone(&libvirt);
        thread::spawn(move || tell.send(libvirt(&path, format)));
        told
    });
    let (tell, told) = channel();
    write(&failures, &dumper, WEB, number, DumpAsk::new(limits, move |result| tell.send(result).unwrap()));
    let told = told.recv_timeout(LONG).unwrap();
    let place = folder.path().join(WEB.to_string()).join(number.to_string());
    let names: Vec<_> = fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| name == "failure.json" || name == "memory.dump"), "{names:?}");
    let bytes = fs::read(place.join("memory.dump")).ok().map(|bytes| {
        assert!(bytes.iter().all(|byte| *byte == 7));
        bytes.len()
    });
    (told, failures.list(WEB).pop().unwrap().dump, bytes)
}

fn fill(path: &Path, bytes: usize) -> Result<(), String> {
    let mut file = OpenOptions::new().write(true).open(path).map_err(|error| error.to_string())?;
    file.write_all(&vec![7; bytes]).map_err(|error| error.to_string())
}

fn missing(dump: &MemoryDump) -> &str {
    match dump {
        MemoryDump::Missing { why } => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_comes_is_kept() {
    let (told, dump, bytes) = written(LIMITS, |path, format| {
        assert_eq!(format, DumpFormat::Kdump);
        fill(path, 1_000_000)
    });
    assert_eq!((told, bytes), (Ok(()), Some(1_000_000)));
    assert!(matches!(dump, MemoryDump::Kept { bytes: 1_000_000, .. }), "{dump:?}");
}

#[test]
fn a_qemu_without_kdump_writes_elf() {
    let (told, _, bytes) = written(LIMITS, |path, format| match format {
        DumpFormat::Kdump => {
            fs::remove_file(path).unwrap(); // As libvirt does.
            Err("unsupported dumpformat 'kdump-zlib'".to_owned())
        }
        DumpFormat::Elf => fill(path, 10),
    });
    assert_eq!((told, bytes), (Ok(()), Some(10)));
}

#[test]
fn what_is_too_long_or_fails_leaves_no_half() {
    let (told, dump, bytes) = written(LIMITS, |path, _| fill(path, 3 << 20));
    assert_eq!(
        (told.unwrap_err().as_str(), missing(&dump), bytes),
        ("it has more than 1 MiB", "it has more than 1 MiB", None)
    );
    let (_, dump, bytes) = written(LIMITS, |path, _| fill(path, 70_000).and(Err("QEMU has died".to_owned())));
    assert_eq!((missing(&dump), bytes), ("QEMU has died", None));
    let (_, dump, bytes) = written(LIMITS, |path, _| fill(path, 0));
    assert_eq!((missing(&dump), bytes), ("it is empty", None));
}

#[test]
fn one_that_hangs_is_given_up_and_whoever_writes_is_let_go() {
    let (tell, told) = channel();
    let (tell, begun) = (std::sync::Mutex::new(tell), clock::now());
    let (answer, dump, bytes) = written(Dumps { within_s: 1, ..LIMITS }, move |path, _| {
        let mut file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all(&[7; 10]).unwrap();
        let error = loop {
            thread::sleep(Duration::from_millis(100));
            if let Err(error) = file.write_all(&[7]) {
                break error;
            }
        };
        tell.lock().unwrap().send(error.kind()).unwrap();
        Ok(())
    });
    assert!(clock::now().since(begun) < LONG && bytes.is_none());
    assert!(missing(&dump).starts_with("it was not written in time") && answer.is_err(), "{dump:?}");
    assert_eq!(told.recv_timeout(LONG).unwrap(), io::ErrorKind::BrokenPipe);
}

#[test]
fn whoever_waits_is_told_when_there_is_no_failure() {
    let (tell, told) = channel();
    drop(DumpAsk::new(LIMITS, move |result| tell.send(result).unwrap()));
    assert_eq!(told.recv().unwrap(), Err("nothing of its failure is kept".to_owned()));
}
