//! Reads the tree's sources for the walls: finds them, tells code from comments, texts and tests.

use std::fs;
use std::path::{Path, PathBuf};

/// One file.
pub struct Source {
    /// Below the root.
    pub path: String,
    /// As it lies there.
    pub text: String,
    /// Only tests compile it.
    pub test: bool,
}

/// The repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below these folders that `wanted` accepts.
pub fn sources(folders: &[&str], wanted: impl Fn(&str) -> bool) -> Vec<Source> {
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
pub fn rust() -> Vec<Source> {
    let mut all = sources(&["src", "guest-agent", "tests", "benches", "fuzz"], |path| {
        path.ends_with(".rs") && !path.contains("/target/")
    });
    let modules: Vec<String> = all.iter().flat_map(test_modules).collect();
    for source in &mut all {
        let path = source.path.as_str();
        // The lab is a program; the rest of tests/ are tests.
        source.test = (path.starts_with("tests/") || path.starts_with("guest-agent/tests/"))
            && !path.starts_with("tests/lab/src/")
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
pub fn code(text: &str) -> String {
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
pub fn lines_with(text: &str, word: &str) -> Vec<usize> {
    let inside = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let whole = |line: &str| {
        line.match_indices(word).any(|(at, _)| {
            let (before, after) = (line[..at].chars().next_back(), line[at + word.len()..].chars().next());
            let longer = inside(before) && inside(word.chars().next());
            !(longer || inside(after) && inside(word.chars().next_back()))
        })
    };
    text.lines().enumerate().filter(|(_, line)| whole(line)).map(|(at, _)| at + 1).collect()
}

/// (first line, name, number of lines) of every function. Relies on rustfmt: the closing brace stands where `fn` began.
pub fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let begins = line.split("fn ").next().unwrap_or("").split_whitespace();
        let modifiers = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"C\""];
        if !line.contains("fn ") || !begins.into_iter().all(|word| modifiers.contains(&word)) {
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        let end = format!("{indent}}}");
        let name = line.split("fn ").nth(1).unwrap_or("").split(['(', '<']).next().unwrap_or("").to_owned();
        if line.trim_end().ends_with(['}', ';']) {
            found.push((at + 1, name, 1));
            continue;
        }
        // A declaration without a body ends before anything closes.
        let body = lines[at..].iter().position(|line| {
            let as_deep = line.len() - line.trim_start().len() == indent.len();
            *line == end || as_deep && line.ends_with(';')
        });
        if let Some(length) = body {
            found.push((at + 1, name, length + 1));
        }
    }
    found
}

#[test]
fn the_reader_of_sources_reads() {
    let text = "let a = \"unsafe \\\" x\"; // unsafe\nlet b = r#\"unsafe \" x\"#; /* unsafe\n */ let c = '\"'; let d = b\"unsafe\";\n\
                for x in \"r\" { unsafe {} }\n#[cfg(test)]\nmod tests {\n unsafe\n}\n";
    let code = code(text);
    assert_eq!(lines_with(&code, "unsafe"), [4], "{code}");
    assert_eq!(lines_with("virtual virt_x x_virt\nvirt::a\nuse virt;", "virt"), [2, 3]);
    let text =
        "impl A {\n    pub const fn a(\n    ) {\n        x();\n    }\n    fn b();\n}\nfn c() {}\nasync fn d() {\n}\n";
    let names: Vec<_> =
        functions(text).into_iter().map(|(line, name, length)| format!("{name}@{line}+{length}")).collect();
    assert_eq!(names, ["a@2+4", "b@6+1", "c@8+1", "d@9+2"]);
    assert_eq!(lines_with("x.await?\nawaiting", "await"), [1]);
}
