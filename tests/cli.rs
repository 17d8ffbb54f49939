//! The command line as people and scripts see it: golden texts at 80 columns, JSON, exit codes, errors with a next step.

mod bus;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};

use bus::{FakeAgent, PrivateBus, example, example_notes, mainstay, reachable_copy};

fn ended(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn say(bus: &PrivateBus, words: &str) -> (i32, String, String) {
    ended(mainstay(bus).args(words.split_whitespace()))
}

#[test]
fn probe() {
    let bus = PrivateBus::started();
    let _agent = FakeAgent::on(&bus);
    for words in [
        "status",
        "host list",
        "host show c",
        "vm list",
        "vm show db",
        "vm explain db",
        "events --since 2026-11-01",
        "doctor",
        "datastore list",
        "vm start web",
        "vm start db",
        "vm start wbe",
        "vm move web --to x",
        "cluster set profile=fast",
        "cluster set a=b",
        "events --since x",
        "--help",
        "datastore add x /nowhere",
        "datastore add x /usr",
        "datastore add x /dev/shm",
        "datastore add x /dev/shm --fence foo",
        "config check",
        "cluster join x",
        "vm stop mute",
    ] {
        let (code, out, err) = say(&bus, words);
        println!("$ mainstay {words}\n{out}{err}[{code}]\n");
    }
}
