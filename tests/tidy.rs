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
use std::path::{Path, PathBuf};

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
    ("src/exec/net", "socket options that nix and socket2 lack (ip_mreqn)"),
    ("src/exec/datastore/", "buffers aligned for O_DIRECT"),
    ("src/guard/", "sched_setscheduler, pidfd calls and signals that nix lacks; aligned buffers"),
    ("tests/lab/", "namespaces, mounts and faults of the lab"),
];

/// Files over 500 lines, each with its reason.
const LONG: &[(&str, &str)] = &[];
const MAX_LINES: usize = 500;

struct Source {
    path: String,
    text: String,
    /// Only tests compile it.
    test: bool,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below these folders that `wanted` accepts.
fn sources(folders: &[&str], wanted: impl Fn(&str) -> bool) -> Vec<Source> {
    let root = root();
    let mut left: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(path) = left.pop() {
        let Ok(data) = fs::symlink_metadata(&path) else { continue };
        if data.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let short = path.strip_prefix(&root).unwrap().to_str().expect("paths are UTF-8").to_owned();
        if data.is_file() && wanted(&short) {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
            found.push(Source { path: short, text, test: false });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "nothing found in {folders:?}");
    found
}

/// Rust sources; those that only tests compile are marked.
fn rust() -> Vec<Source> {
    let mut all = sources(&["src", "guest-agent", "tests", "benches", "fuzz"], |path| {
        path.ends_with(".rs") && !path.contains("/target/")
    });
    let modules: Vec<String> = all.iter().flat_map(test_modules).collect();
    for source in &mut all {
        let path = source.path.as_str();
        // The lab is a program; the rest of tests/ are tests.
        source.test = path.starts_with("tests/") && !path.starts_with("tests/lab/src/")
            || modules.iter().any(|module| path == format!("{module}.rs") || path.starts_with(&format!("{module}/")));
    }
    all
}

/// Modules of this file that only tests compile (`#[cfg(test)] mod name;`), as paths without `.rs`.
fn test_modules(source: &Source) -> Vec<String> {
    let path = Path::new(&source.path);
    let folder = path.parent().unwrap();
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let own = if ["mod", "lib", "main"].contains(&stem) { folder.to_path_buf() } else { folder.join(stem) };
    let lines: Vec<&str> = source.text.lines().map(str::trim).collect();
    let named = lines.iter().enumerate().filter(|(_, line)| **line == "#[cfg(test)]").filter_map(|(at, _)| {
        let after: Vec<&str> = lines[at + 1..].iter().copied().take(2).collect();
        match after.as_slice() {
            [path, _] if path.starts_with("#[path") => {
                Some(folder.join(path.split('"').nth(1)?.trim_end_matches(".rs")))
            }
            [module, ..] => Some(own.join(module.split("mod ").nth(1)?.strip_suffix(';')?)),
            [] => None,
        }
    });
    named.map(|module| module.to_str().unwrap().to_owned()).collect()
}

/// The code alone: comments and the contents of texts are blanked, and everything after `#[cfg(test)] mod` is cut.
/// Lines keep their numbers.
fn code(text: &str) -> String {
    let cut = test_module(text).unwrap_or(text.len());
    let mut out = String::new();
    let mut rest = &text[..cut];
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |at| at + 2),
            'r' | 'b' | '"' if raw_or_text(rest).is_some() => raw_or_text(rest).unwrap(),
            '\'' if rest.starts_with("'\"'") => 3,
            '\'' if rest.starts_with("'\\") => rest[2..].find('\'').map_or(1, |at| at + 3),
            _ => 0,
        };
        if len == 0 {
            // A word goes whole, so that the r of `for "x"` begins no raw text.
            let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            let len = word.max(first.len_utf8());
            out.push_str(&rest[..len]);
            rest = &rest[len..];
        } else {
            out.extend(rest[..len].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[len..];
        }
    }
    out
}

fn test_module(text: &str) -> Option<usize> {
    text.match_indices("#[cfg(test)]\n").map(|(at, _)| at).find(|at| {
        let next = text[*at..].lines().nth(1).unwrap_or("");
        next.trim_start().starts_with("mod ") && next.trim_end().ends_with('{')
    })
}

/// Length of the text that begins here (`"…"`, `b"…"`, `r#"…"#`), if one does.
fn raw_or_text(rest: &str) -> Option<usize> {
    let prefix = rest.len() - rest.trim_start_matches(['b', 'r', 'c']).len();
    if 2 < prefix {
        return None;
    }
    let raw = rest[..prefix].contains('r');
    let body = &rest[prefix..];
    let hashes = if raw { body.len() - body.trim_start_matches('#').len() } else { 0 };
    let open = prefix + hashes;
    if !rest[open..].starts_with('"') {
        return None;
    }
    if raw {
        let end = format!("\"{}", "#".repeat(hashes));
        return Some(rest[open + 1..].find(&end).map_or(rest.len(), |at| open + 1 + at + end.len()));
    }
    let mut escaped = false;
    for (at, c) in rest[open + 1..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(open + 1 + at + 1),
            _ => {}
        }
    }
    Some(rest.len())
}

/// Lines (from 1) in which `word` stands as a whole word.
fn lines_with(text: &str, word: &str) -> Vec<usize> {
    let inside = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let whole = |line: &str| {
        line.match_indices(word).any(|(at, _)| {
            let (before, after) = (line[..at].chars().next_back(), line[at + word.len()..].chars().next());
            !(inside(before) && inside(word.chars().next())) && !(inside(after) && inside(word.chars().next_back()))
        })
    };
    text.lines().enumerate().filter(|(_, line)| whole(line)).map(|(at, _)| at + 1).collect()
}

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

#[test]
fn the_reader_of_sources_reads() {
    let text = "let a = \"unsafe \\\" x\"; // unsafe\nlet b = r#\"unsafe \" x\"#; /* unsafe\n */ let c = '\"'; let d = b\"unsafe\";\n\
                for x in \"r\" { unsafe {} }\n#[cfg(test)]\nmod tests {\n unsafe\n}\n";
    let code = code(text);
    assert_eq!(lines_with(&code, "unsafe"), [4], "{code}");
    assert_eq!(lines_with("virtual virt_x x_virt\nvirt::a\nuse virt;", "virt"), [2, 3]);
    assert_eq!(lines_with("x.await?\nawaiting", "await"), [1]);
}
