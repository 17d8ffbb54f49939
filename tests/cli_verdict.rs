//! The command line for verdicts; and recordings that it replays, made without a cluster.

mod bus;
#[allow(dead_code)] // It has more than is used here.
#[path = "../benches/cluster/mod.rs"]
mod cluster;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bus::say::{fails, say, shows};
use bus::{FakeAgent, PrivateBus};
use cluster::{HOSTS, beat, host, report};
use mainstay::core::Core;
use mainstay::core::event::{AskId, Event};
use mainstay::exec::recorder::replay::{Differs, replay};
use mainstay::exec::recorder::{Recorder, Recording, Segment, file};
use mainstay::types::control::Request;
use mainstay::types::*;
use serde_json::Value;

#[test]
fn list_and_show() {
    let bus = PrivateBus::started();
    let _agent = FakeAgent::on(&bus);
    shows(
        &bus,
        "verdict list",
        "
2026-11-25 17:00:05.040  a-28512345  host-dead: host c is dead: network beat 5.2
                                     s ago
2026-11-25 17:00:05.041  a-28512346  vm-placed: db is to run on b: generation 5
                                     is over
",
    );
    let (_, out, _) = say(&bus, "verdict list --vm db");
    assert!(out.contains("vm-placed") && !out.contains("host-dead"), "{out}");
    let (_, out, _) = say(&bus, "verdict list --host c");
    assert!(!out.contains("vm-placed") && out.contains("host-dead"), "{out}");
    shows(
        &bus,
        "verdict show a-28512345",
        "
Verdict    a-28512345
When       2026-11-25 17:00:05.040
Given by   a
Kind       host-dead
Host       c
Decided    host c is dead: network beat 5.2 s ago
Recording  /var/lib/mainstay/verdicts/a-28512345.verdict on a

- network: its newest beat came 5.2 s ago, and it last heard this host 5.2 s ago
- nfs1: stale: newest beat 5.0 s ago (counter 812, incarnation 4, flags none);
  read here 0.2 s ago
",
    );
    let (code, out, _) = say(&bus, "verdict show a-28512346 --json");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["verdict"]["evidence"][0]), (0, &Value::from("not on a: as good")));
    fails(&bus, "verdict show a-1", 1, "a-1 was not shown", "no host that answers", "mainstay verdict list");
    let (_, out, _) = say(&bus, "events --since 2026-11-25T17:00:00Z");
    assert!(out.contains("[a-28512345]"), "{out}");
}

#[test]
fn replay_of_a_file() {
    let bus = PrivateBus::started(); // Nobody answers there.
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: Vec<u8>| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let recording = recorded();
    let whole = file::encode(&recording).unwrap();
    let good = put("good", whole.clone());
    let (code, out, error) = say(&bus, &format!("verdict replay {}", good.display()));
    assert_eq!(code, 0, "{out}{error}");
    assert!(out.contains("host-id-twice: host id") && out.ends_with("2 events in 20 s, same actions\n"), "{out}");
    let (_, out, _) = say(&bus, &format!("verdict replay {} --json", good.display()));
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&json["events"], &json["told"][0]["kind"]), (&Value::from(2), &Value::from("host-id-twice")));

    let mut cut = whole.clone();
    cut.truncate(whole.len() - 5);
    let bad = put("bad", cut);
    fails(&bus, &format!("verdict replay {}", bad.display()), 1, "was not replayed", "checksum", "copy it again");
    let other = put("other", file::encode(&otherwise(&recording)).unwrap());
    let (code, out, error) = say(&bus, &format!("verdict replay {}", other.display()));
    assert!(code == 1 && error.contains("not decided again as it was"), "{code} {out}{error}");
    assert!(error.contains("event 1 is answered differently") && !out.contains("same actions"), "{out}{error}");
    fails(&bus, "verdict replay /nonexistent", 1, "was not replayed", "No such file", "is it there");
}

#[test]
fn the_first_difference_is_named() {
    let recording = recorded();
    assert_eq!(replay(&recording, |_, _| {}).unwrap().events, 2);
    match replay(&otherwise(&recording), |_, _| {}) {
        Err(Differs::Answer { event: 1, recorded, now, .. }) => {
            assert!(recorded.contains("HOST id") && now.contains("host id"), "{recorded}\n{now}");
        }
        other => panic!("{other:?}"),
    }
    let mut short = Segment::clone(&recording.segments[0]);
    short.count += 1;
    let short = Recording { segments: vec![Arc::new(short)], ..recording };
    assert!(matches!(replay(&short, |_, _| {}), Err(Differs::Unreadable { event: 3, .. })));
}

/// How much it is to write down the largest cluster's core; `--nocapture` shows it.
#[test]
fn a_core_with_10_000_vms_is_written_down() {
    let now = Time(1_000_000_000_000);
    let mut core = cluster::core(now);
    let each = 10_000_u32.div_ceil(u32::from(HOSTS));
    for index in 1..HOSTS {
        let request = Box::new(Request::Report(Box::new(report(index, each))));
        core.step(now, Event::Asked { ask: AskId(1), from: Some(host(index)), request });
    }
    let began = Instant::now();
    let settings = core.settings().clone();
    let written = core.shown(settings, postcard::to_stdvec).unwrap();
    let (wrote, began) = (began.elapsed(), Instant::now());
    let read: Core = postcard::from_bytes(&written).unwrap();
    let vms = read.view(now).vms.len();
    println!("{vms} VMs: {} KiB, written in {wrote:?}, read in {:?}", written.len() / 1024, began.elapsed());
    assert!(9_000 < vms && written.len() < 64 << 20, "{vms} VMs, {} bytes", written.len());
}

/// An alarm, and half a minute later nothing.
fn recorded() -> Recording {
    let now = Time(1_000_000_000_000);
    let mut core = cluster::core(now);
    let made = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&made);
    let mut recorder =
        Recorder::new("a", || 1_795_626_000_000, Box::new(move |recording| sink.lock().unwrap().push(recording)));
    let mut told = |after: u64, event: Event| {
        let now = now + Duration::from_secs(after);
        recorder.keep_up(&mut core, now);
        recorder.step(&mut core, now, event);
    };
    told(0, Event::HeardTwice(Box::new(beat(0, 1))));
    told(20, Event::Due);
    told(31, Event::Due); // Comes after it.
    let made = made.lock().unwrap().pop();
    made.expect("a recording")
}

/// The same, but for what was answered to the first event.
fn otherwise(recording: &Recording) -> Recording {
    let mut segment = Segment::clone(&recording.segments[0]);
    let at = segment.steps.windows(7).position(|window| window == b"host id").expect("the alarm");
    segment.steps[at..at + 4].copy_from_slice(b"HOST");
    let segments = [Arc::new(segment)].into_iter().chain(recording.segments[1..].iter().cloned()).collect();
    Recording { segments, ..recording.clone() }
}
