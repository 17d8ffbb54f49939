//! Runs every story of `tests/scenarios`; `UPDATE=1` writes down what came out, `ONLY=name` runs some, `TRACE=1` tells
//! every step.

mod sim;

use mainstay::exec::recorder::{Recording, file, replay};

#[test]
fn every_story_goes_as_written() {
    let paths = paths();
    let failed: Vec<String> = paths.iter().filter_map(|path| sim::scenario::check(path).err()).collect();
    assert!(failed.is_empty(), "{} of {} stories differ\n{}", failed.len(), paths.len(), failed.join("\n"));
}

/// With cores that are written down and read again in the middle of it; and what was recorded of them is replayed.
#[test]
fn every_story_can_be_recorded_and_replayed() {
    let (mut events, mut files) = (0, 0);
    for path in paths() {
        let text = std::fs::read_to_string(&path).unwrap();
        let (story, expected) = text.split_once("----\n").unwrap();
        let (told, recordings) = sim::scenario::Scenario::parse(story).run_recorded();
        assert!(told == expected, "{} goes otherwise when it is recorded:\n{told}", path.display());
        files += recordings.len();
        for recording in recordings {
            let same = replay::replay(&read_again(&recording, &path), |_, _| {});
            events += same.unwrap_or_else(|differs| panic!("{} of {}: {differs}", recording.id, path.display())).events;
        }
    }
    println!("{events} events of {files} recordings are answered the same");
}

/// As a file, and from it. Nobody's secrets are in it.
fn read_again(recording: &Recording, path: &std::path::Path) -> Recording {
    for segment in &recording.segments {
        let secret = sim::power::SECRET;
        let has = |bytes: &[u8]| bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!has(&segment.core) && !has(&segment.steps), "{secret} in {} of {}", recording.id, path.display());
    }
    file::decode(&file::encode(recording).unwrap(), false).unwrap()
}

fn paths() -> Vec<std::path::PathBuf> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "txt"));
    paths.retain(|path| path.to_string_lossy().contains(&only));
    paths.sort();
    assert!(!paths.is_empty(), "there are stories");
    paths
}
