//! Which licences the crates of the tree have, and which crates are there twice. Works without a network once the tree
//! was built.
//!
//! ```text
//! cargo metadata (locked, this platform) ──► licence expression of each crate ──► allowed?
//!                                       └──► names with two versions ──► in the list?
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Fit for an Apache-2.0 program that is linked statically.
const ALLOWED: [&str; 12] = [
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Unicode-3.0",
    "Zlib",
    "CC0-1.0",
    "Unlicense",
    "OpenSSL",
];

/// Crates with another licence, each with its reason.
const EXCEPTIONS: [(&str, &str, &str); 2] = [
    ("virt", "LGPL-2.1", "libvirt's own binding; only mainstayd links it, and it comes with its source"),
    ("virt-sys", "LGPL-2.1", "the same"),
];

/// Crates that are there in two versions, each with its reason.
const TWICE: [(&str, &str); 7] = [
    ("bit-vec", "0.9 in yasna below rcgen, 0.10 in proptest (tests only)"),
    ("embedded-io", "optional in postcard, in two versions; neither is compiled"),
    ("getrandom", "0.2 is optional in rustls and rcgen (ring) and not compiled"),
    ("parking_lot", "sled 0.34 is the last of its line"),
    ("parking_lot_core", "the same"),
    ("syn", "macros of two generations; at build time only"),
    ("untrusted", "0.7 in aws-lc-rs, 0.9 in rustls-webpki"),
];

fn metadata() -> Value {
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let text = String::from_utf8(rustc.stdout).unwrap();
    let host = text.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc says its host");
    let ask = |extra: &[&str]| {
        Command::new(env!("CARGO"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["metadata", "--locked", "--format-version", "1", "--filter-platform", host])
            .args(extra)
            .output()
            .expect("cargo runs")
    };
    let mut answer = ask(&["--offline"]);
    if !answer.status.success() {
        // A crate that only some feature needs may not have been fetched by the build.
        answer = ask(&[]);
    }
    let why = String::from_utf8_lossy(&answer.stderr);
    assert!(answer.status.success(), "cargo metadata failed; `cargo fetch --locked` once with a network helps:\n{why}");
    serde_json::from_slice(&answer.stdout).unwrap()
}

/// (name, version, licence) of every crate that is not ours.
fn crates(metadata: &Value) -> Vec<(String, String, String)> {
    let text = |package: &Value, key: &str| package[key].as_str().unwrap_or("").to_owned();
    let foreign = metadata["packages"].as_array().unwrap().iter().filter(|package| !package["source"].is_null());
    foreign.map(|package| (text(package, "name"), text(package, "version"), text(package, "license"))).collect()
}

/// Whether an SPDX expression can be satisfied with what is allowed. `/` is an old way to write OR.
fn satisfied(expression: &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let good = any(&tokens, &mut at, allowed);
    good && at == tokens.len()
}

fn any(tokens: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut good = all(tokens, at, allowed);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        good |= all(tokens, at, allowed);
    }
    good
}

fn all(tokens: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut good = one(tokens, at, allowed);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        good &= one(tokens, at, allowed);
    }
    good
}

fn one(tokens: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let Some(first) = tokens.get(*at) else { return false };
    *at += 1;
    if *first == "(" {
        let good = any(tokens, at, allowed);
        let closed = tokens.get(*at) == Some(&")");
        *at += 1;
        return good && closed;
    }
    if tokens.get(*at) == Some(&"WITH") {
        let exception = tokens.get(*at + 1).copied().unwrap_or("");
        *at += 2;
        return allowed(&format!("{first} WITH {exception}"));
    }
    allowed(first)
}

#[test]
fn every_licence_fits() {
    let mut broken = Vec::new();
    for (name, version, licence) in crates(&metadata()) {
        let allowed = |one: &str| {
            ALLOWED.contains(&one) || EXCEPTIONS.iter().any(|(known, licence, _)| *known == name && *licence == one)
        };
        if !satisfied(&licence, &allowed) {
            let cure = "use another crate, or add it to tests/licences.rs with its reason";
            broken.push(format!("{name} {version}: licence {licence:?} is not among those allowed; {cure}"));
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn no_crate_is_there_twice_without_a_reason() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, version, _) in crates(&metadata()) {
        versions.entry(name).or_default().insert(version);
    }
    versions.retain(|_, versions| 1 < versions.len());
    let mut broken = Vec::new();
    for (name, versions) in &versions {
        if !TWICE.iter().any(|(known, _)| known == name) {
            let cure = "`cargo tree -d -i` shows who wants which; make them agree, or add it to tests/licences.rs with its reason";
            broken.push(format!("{name} is there as {versions:?}; {cure}"));
        }
    }
    for (known, _) in TWICE.iter().filter(|(known, _)| !versions.contains_key(*known)) {
        broken.push(format!("{known} is there once only; take it off the list in tests/licences.rs"));
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn our_own_licence_is_there() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/LICENSE")).expect("LICENSE is there");
    assert!(text.contains("Apache License") && text.contains("Version 2.0, January 2004"));
    assert!(text.contains("END OF TERMS AND CONDITIONS"), "LICENSE is cut off");
    for package in metadata()["packages"].as_array().unwrap().iter().filter(|package| package["source"].is_null()) {
        assert_eq!(package["license"], "Apache-2.0", "{}: license.workspace = true", package["name"]);
    }
}

#[test]
fn expressions_are_read() {
    let allowed = |one: &str| ["MIT", "ISC", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].contains(&one);
    let cases = [
        ("MIT", true),
        ("GPL-3.0", false),
        ("MIT/GPL-3.0", true),
        ("GPL-3.0 / MIT", true),
        ("MIT AND GPL-3.0", false),
        ("MIT OR GPL-3.0 AND ISC", true),
        ("(MIT OR GPL-3.0) AND ISC", true),
        ("(MIT OR Apache-2.0) AND GPL-3.0", false),
        ("ISC AND (Apache-2.0 OR ISC) AND MIT", true),
        ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true),
        ("Apache-2.0 WITH other-exception", false),
        ("", false),
        ("(MIT", false),
        ("MIT MIT", false),
    ];
    for (expression, good) in cases {
        assert_eq!(satisfied(expression, &allowed), good, "{expression}");
    }
}
