//! `mainstay …` as a process, and what it should say: golden texts at 80 columns, errors of three lines.

use std::process::{Command, Output};

use super::{PrivateBus, mainstay};

/// Exit code, standard output, standard error.
pub fn ended(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// `mainstay WORDS`.
pub fn say(bus: &PrivateBus, words: &str) -> (i32, String, String) {
    ended(mainstay(bus).args(words.split_whitespace()))
}

/// Exactly this on standard output, nothing on the other, exit code 0, nothing wider than 80 columns.
pub fn shows(bus: &PrivateBus, words: &str, expected: &str) {
    let (code, out, err) = say(bus, words);
    assert_eq!(out, expected.trim_start_matches('\n'), "$ mainstay {words}");
    assert_eq!((code, err.as_str()), (0, ""), "$ mainstay {words}");
    for line in out.lines() {
        assert!(line.chars().count() <= 80, "wider than 80 columns: {line}");
    }
}

/// This exit code, nothing on standard output, and an error of these parts.
pub fn fails(bus: &PrivateBus, words: &str, code: i32, what: &str, why: &str, next: &str) {
    let (ended, out, err) = say(bus, words);
    assert_eq!((ended, out.as_str()), (code, ""), "$ mainstay {words}: {err}");
    let lines: Vec<&str> = err.lines().collect();
    assert_eq!(lines.len(), 3, "{err}");
    assert!(lines[0].starts_with("error: ") && lines[0].contains(what), "{err}");
    assert!(lines[1].starts_with("  why:  ") && lines[1].contains(why), "{err}");
    assert!(lines[2].starts_with("  next: ") && lines[2].contains(next), "{err}");
}
