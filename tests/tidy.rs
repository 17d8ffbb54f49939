//! Walls of the code's shape, kept by reading the sources. Each failure says where, what and how to mend it.
//!
//! ```text
//! every source ──┬─ code without comments, texts and tests ──► words that a wall forbids there
//!                └─ as it is ──► length, opening, unfinished work, words of the workplace
//! ```
//!
//! Not here: licences and duplicate crates (`licences.rs`), formatting and lints (cargo fmt, clippy).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use source::{code, functions, lines_with, root, rust, sources};

#[path = "tidy/source.rs"]
mod source;

/// A word that may stand in some places only.
struct Wall {
    /// What is kept, for the message.
    rule: &'static str,
    /// What is forbidden. Whole words, as they stand in code.
    words: &'static [&'static str],
    /// Where it is forbidden: beginnings of paths.
    within: &'static [&'static str],
    /// Where it is allowed all the same: beginnings of paths, each with its reason.
    except: &'static [(&'static str, &'static str)],
    /// What to do instead.
    cure: &'static str,
}

const WALLS: [Wall; 7] = [
    Wall {
        rule: "core/, wire/ and types/ are pure",
        words: &[
            "Instant",
            "SystemTime",
            "std::fs",
            "File",
            "UdpSocket",
            "TcpStream",
            "TcpListener",
            "UnixStream",
            "UnixListener",
            "tokio",
            "tracing",
            "HashMap",
            "HashSet",
            "std::thread",
            "thread",
            "async",
            "await",
            "Mutex",
            "std::process",
            "std::env",
            "println!",
            "eprintln!",
            "nix",
            "libc",
            "rand",
        ],
        within: &["src/core/", "src/wire/", "src/types/"],
        except: &[],
        cure: "hand the value in as data, or let exec/ do it; use BTreeMap for an order that can be replayed",
    },
    Wall {
        rule: "only exec/clock.rs reads time or randomness",
        words: &[
            "SystemTime::now",
            "Instant::now",
            "clock_gettime",
            "getrandom",
            "thread_rng",
            "rand::fill",
            "rand::rng",
            "rand::random",
            "SystemRandom",
            "OsRng",
            "new_v4",
            "now_v7",
            "Zoned::now",
            "Timestamp::now",
            "/dev/urandom",
        ],
        within: &["src/"],
        except: &[
            ("src/exec/clock.rs", "the clock"),
            ("src/api/", "deadlines of connections, by tokio's timers; nothing is decided by them"),
        ],
        cure: "call exec::clock (add a function there if it lacks one)",
    },
    Wall {
        rule: "only exec/libvirt names virt",
        words: &["virt", "virt_sys"],
        within: &["src/", "guest-agent/"],
        except: &[("src/exec/libvirt", "the driver")],
        cure: "add an order or an answer to types/vm.rs and carry it out in exec/libvirt",
    },
    Wall {
        rule: "only exec/store.rs names sled",
        words: &["sled"],
        within: &["src/"],
        except: &[("src/exec/store", "the store of what can be rebuilt")],
        cure: "use exec::store; what safety needs has a file of its own (exec/state.rs)",
    },
    Wall {
        rule: "only api/ names zbus",
        words: &["zbus"],
        within: &["src/"],
        except: &[("src/api/", "the D-Bus service and its clients")],
        cure: "put it into src/api",
    },
    Wall {
        rule: "the guard knows no libvirt, D-Bus, TLS or async",
        words: &["virt", "zbus", "tokio", "rustls", "async", "sled"],
        within: &["src/guard/", "src/bin/mainstay-guard.rs", "src/bin/mainstay-hook.rs"],
        except: &[],
        cure: "let the agent do it and tell the guard over its socket",
    },
    Wall {
        rule: "async only in exec/, api/, agent.rs and the agent's binaries",
        words: &["async", "await"],
        within: &["src/"],
        except: &[
            ("src/exec/", "carries out"),
            ("src/api/", "answers"),
            ("src/agent", "the loop"),
            ("src/bin/mainstayd.rs", "starts the loop"),
            ("src/bin/mainstay.rs", "asks over D-Bus"),
        ],
        cure: "keep it synchronous, or move it",
    },
];

/// Files that may say `unsafe`, each with its reason. Every block still needs its `// SAFETY:`.
const UNSAFE: &[(&str, &str)] = &[
    ("src/exec/libvirt/", "domain events, which the virt crate lacks"),
    ("src/exec/doctor/", "adjtimex, which nix lacks"),
    ("src/exec/net", "socket options that nix and socket2 lack (ip_mreqn)"),
    ("src/exec/datastore/", "buffers aligned for O_DIRECT"),
    ("src/guard/", "sched_setscheduler, pidfd calls and signals that nix lacks; aligned buffers"),
    ("guest-agent/src/agent/orders.rs", "FIFREEZE and FITHAW, which rustix lacks"),
    ("tests/guard/systemd.rs", "takes descriptors that were sent to it, as systemd does"),
    ("tests/lab/", "namespaces, mounts and faults of the lab"),
];

/// Functions over 70 lines, as `path:name`, each with its reason.
const LONG_FUNCTIONS: &[(&str, &str)] = &[];
const MAX_FUNCTION_LINES: usize = 70;

/// Files over 500 lines, each with its reason.
const LONG: &[(&str, &str)] = &[];
const MAX_LINES: usize = 500;

fn listed(path: &str, list: &[(&str, &str)]) -> bool {
    list.iter().any(|(start, _)| path.starts_with(start))
}

fn report(broken: &[String]) {
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn walls_stand() {
    let mut broken = Vec::new();
    for source in rust().iter().filter(|source| !source.test) {
        let code = code(&source.text);
        for wall in WALLS.iter().filter(|wall| wall.within.iter().any(|start| source.path.starts_with(start))) {
            if listed(&source.path, wall.except) {
                continue;
            }
            for word in wall.words {
                for line in lines_with(&code, word) {
                    let (path, rule, cure) = (&source.path, wall.rule, wall.cure);
                    broken.push(format!("{path}:{line}: `{word}`: {rule}; {cure}"));
                }
            }
        }
    }
    report(&broken);
}

#[test]
fn unsafe_is_rare_and_explained() {
    let mut broken = Vec::new();
    for source in rust() {
        let code = code(&source.text);
        let (lines, path): (Vec<&str>, _) = (source.text.lines().collect(), &source.path);
        for line in lines_with(&code, "unsafe") {
            if !listed(path, UNSAFE) {
                let cure = "use nix, or add the file with its reason";
                broken.push(format!("{path}:{line}: `unsafe`: not in the list of tests/tidy.rs; {cure}"));
            }
            // Types and declarations of foreign functions do nothing; blocks and impls do.
            let here = code.lines().nth(line - 1).unwrap_or("");
            let does = here.contains("unsafe {") || here.contains("unsafe impl");
            let mut above = lines[..line].iter().rev().take(12).take_while(|line| !line.trim().is_empty());
            if does && !above.any(|line| line.contains("// SAFETY:")) {
                broken.push(format!("{path}:{line}: `unsafe` without `// SAFETY:` above it; say why it is sound"));
            }
        }
    }
    report(&broken);
}

#[test]
fn files_are_short_and_open_with_what_they_are() {
    let mut broken = Vec::new();
    for source in rust() {
        let (path, lines) = (&source.path, source.text.lines().count());
        if MAX_LINES < lines && !listed(path, LONG) {
            broken.push(format!("{path}: {lines} lines, at most {MAX_LINES}; it holds two ideas: split it by meaning"));
        }
        // A file of tests belongs to the module above it, which has said what it is.
        if !source.text.starts_with("//!") && !source.test {
            broken.push(format!("{path}:1: open it with `//!`: what it is, its states, what is deliberately not here"));
        }
    }
    for (long, _) in LONG {
        let still =
            rust().iter().any(|source| source.path.starts_with(long) && MAX_LINES < source.text.lines().count());
        if !still {
            broken.push(format!("{long}: is no longer too long; take it off the list in tests/tidy.rs"));
        }
    }
    report(&broken);
}

#[test]
fn functions_are_short() {
    let mut broken = Vec::new();
    for source in rust() {
        for (line, name, length) in functions(&code(&source.text)) {
            let known = LONG_FUNCTIONS.iter().any(|(known, _)| *known == format!("{}:{name}", source.path));
            if MAX_FUNCTION_LINES < length && !known && !source.test {
                let path = &source.path;
                broken.push(format!(
                    "{path}:{line}: `{name}`: {length} lines, at most {MAX_FUNCTION_LINES}; split it by meaning"
                ));
            }
        }
    }
    report(&broken);
}

/// Planted bugs are asked for by `planted(Mutant::…)` alone, which is a constant without the feature; and no build but
/// the simulator's has the feature.
#[test]
fn planted_bugs_stay_in_the_simulator() {
    let feature = "\"mut".to_owned() + "ants\"";
    let mut broken = Vec::new();
    let shipped: Vec<_> = rust().into_iter().filter(|source| source.path.starts_with("src/")).collect();
    let home = "src/mutants.rs";
    for source in shipped.iter().filter(|source| source.path != home) {
        let code = code(&source.text);
        let lines = source.text.lines().zip(1_usize..).filter(|(line, _)| line.contains(&feature)).map(|(_, at)| at);
        for at in lines.chain(lines_with(&code, "plant")) {
            let cure = "ask `planted(Mutant::…)` in a condition, nothing else";
            broken.push(format!("{}:{at}: depends on planted bugs by itself; {cure}", source.path));
        }
    }
    let listed = shipped.iter().find(|source| source.path == home).expect("it is there");
    let variants = listed.text.lines().filter_map(|line| line.trim().strip_prefix("Self::")?.strip_suffix(','));
    for variant in variants {
        let word = format!("Mutant::{variant}");
        if !shipped.iter().any(|source| source.path != home && !lines_with(&code(&source.text), &word).is_empty()) {
            broken.push(format!("{home}: `{variant}` is planted nowhere; plant it, or take it out"));
        }
    }
    let builds = sources(&["tests/lab/src", "systemd", ".ci"], |_| true);
    for source in builds.iter().filter(|source| source.path != "tests/lab/src/sim.rs") {
        if source.text.contains("--features") || source.text.contains("--all-features") {
            broken.push(format!("{}: builds with features; what is shipped has none", source.path));
        }
    }
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    if manifest.lines().any(|line| line.trim_start().starts_with("default =")) {
        broken.push("Cargo.toml: has default features; what is shipped has none".to_owned());
    }
    report(&broken);
}

#[test]
fn nothing_is_left_unfinished() {
    // Put together here, so that this file does not find itself.
    let words = ["TO".to_owned() + "DO", "FIX".to_owned() + "ME", "XX".to_owned() + "X"];
    let macros = ["to".to_owned() + "do!", "unimple".to_owned() + "mented!", "d".to_owned() + "bg!"];
    let mut broken = Vec::new();
    for source in rust() {
        let code = code(&source.text);
        let found = words.iter().map(|word| (word, lines_with(&source.text, word)));
        let found = found.chain(macros.iter().map(|word| (word, lines_with(&code, word))));
        for (word, lines) in found {
            for line in lines {
                broken.push(format!("{}:{line}: `{word}`: finish it, or file an issue and take it out", source.path));
            }
        }
        for line in lines_with(&code, "unwrap") {
            if !source.test && !source.path.starts_with("benches/") && !source.path.starts_with("fuzz/") {
                let cure = "handle it, or `expect` with the invariant that makes it safe";
                broken.push(format!("{}:{line}: `unwrap` outside tests: {cure}", source.path));
            }
        }
    }
    report(&broken);
}

/// Text speaks of the project only, never of the machine it was written on.
#[test]
fn no_words_of_the_workplace() {
    let words = [
        "/wo".to_owned() + "rk/",
        "/ro".to_owned() + "ot/.",
        ".pye".to_owned() + "nv",
        "CARGO_TARGET_".to_owned() + "DIR=/",
    ];
    let all = sources(&["."], |path| {
        let skipped = ["target/", ".git/", "fuzz/target/", "fuzz/corpus/"];
        let kinds = ["rs", "toml", "md", "txt", "service", "conf", "xml", "rules", "sh", "json", "yml"];
        let kind = Path::new(path).extension().and_then(|kind| kind.to_str());
        !skipped.iter().any(|start| path.starts_with(start))
            && !path.contains("/target/")
            && (path.starts_with(".ci/")
                || path.starts_with("systemd/")
                || kind.is_some_and(|kind| kinds.contains(&kind)))
    });
    let mut broken = Vec::new();
    for source in all {
        for word in &words {
            for (at, _) in source.text.lines().enumerate().filter(|(_, line)| line.contains(word.as_str())) {
                broken.push(format!("{}:{}: `{word}`: a path of one machine; take it out", source.path, at + 1));
            }
        }
        // Lock files and manifests name the public registry only.
        if source.path.ends_with(".toml") || source.path.ends_with(".lock") {
            for (at, line) in source.text.lines().enumerate().filter(|(_, line)| line.contains("registry")) {
                if line.contains("://") && !line.contains("github.com/rust-lang/crates.io-index") {
                    broken.push(format!("{}:{}: another registry than crates.io", source.path, at + 1));
                }
            }
        }
    }
    report(&broken);
}

#[test]
fn scripts_can_be_executed_and_nothing_else() {
    let mut broken = Vec::new();
    for source in
        sources(&[".ci", "src", "systemd", "tests", "guest-agent", "vagrant"], |path| !path.contains("/target/"))
    {
        let script = source.text.starts_with("#!") && !source.text.starts_with("#![");
        let mode = fs::metadata(root().join(&source.path)).unwrap().permissions().mode();
        match (script, mode & 0o111 != 0) {
            (true, false) => broken.push(format!("{}: a script that cannot be executed; chmod +x", source.path)),
            (false, true) => broken.push(format!("{}: executable, but no script; chmod -x", source.path)),
            (true, true) | (false, false) => {}
        }
    }
    report(&broken);
}
