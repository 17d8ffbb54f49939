//! Runs every story of `tests/scenarios`; `UPDATE=1` writes down what came out, `ONLY=name` runs some, `TRACE=1` tells
//! every step.

mod sim;

#[test]
fn every_story_goes_as_written() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "txt"));
    paths.retain(|path| path.to_string_lossy().contains(&only));
    paths.sort();
    assert!(!paths.is_empty(), "there are stories");
    let failed: Vec<String> = paths.iter().filter_map(|path| sim::scenario::check(path).err()).collect();
    assert!(failed.is_empty(), "{} of {} stories differ\n{}", failed.len(), paths.len(), failed.join("\n"));
}
