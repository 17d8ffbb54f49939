//! Findings of other programs: one file each in `/run/mainstay/health`. Its name is the source, its first line says what is wrong.
//!
//! `mainstay host health report` writes such a file, `clear` removes it; a program may do so itself. Whoever writes must write beside it
//! and rename, or be quick: a file counts that stands for some seconds. Names that begin with a dot are not read.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::names;
use crate::types::finding::{Finding, MAX_TEXT, Source};

/// Files that are read; further ones are not.
const FILES_MAX: usize = 32;
/// Longest name.
const NAME_MAX: usize = 64;

/// Where they are.
#[must_use]
pub fn folder(run: &Path) -> PathBuf {
    run.join("health")
}

/// Whether a file may be called so.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let letter = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    !name.is_empty() && name.len() <= NAME_MAX && !name.starts_with('.') && name.chars().all(letter)
}

/// Reads all.
pub(super) fn read(folder: &Path) -> Vec<Finding> {
    let of = |name: String| {
        let mut text = Vec::new();
        let path = folder.join(&name);
        // Whatever is there: a pipe would keep this waiting.
        std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
        File::open(path).ok()?.take(MAX_TEXT as u64).read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().next().map(str::trim).filter(|line| !line.is_empty()).unwrap_or("something is wrong");
        Some(Finding::new(Source::Vendor, &name, &format!("{name}: {line}")))
    };
    names(folder).into_iter().filter(|name| is_name(name)).filter_map(of).take(FILES_MAX).collect()
}

/// Says that something is wrong.
///
/// # Errors
/// When the file cannot be written.
pub fn report(folder: &Path, source: &str, text: &str) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::with_prefix_in(".", folder)?;
    writeln!(file, "{text}")?;
    file.persist(folder.join(source)).map(drop).map_err(|error| error.error)
}

/// Says that it is well again; true = it was not.
///
/// # Errors
/// When the file cannot be removed.
pub fn clear(folder: &Path, source: &str) -> io::Result<bool> {
    match std::fs::remove_file(folder.join(source)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reported_is_read_until_it_is_cleared() {
        let run = tempfile::tempdir().unwrap();
        let folder = folder(run.path());
        assert!(read(&folder).is_empty());
        report(&folder, "ipmi", "fan 3 failed").unwrap();
        report(&folder, "raid", "a first word").unwrap();
        report(&folder, "raid", "array md0 is degraded\nmore").unwrap();
        std::fs::write(folder.join(".hidden"), "x").unwrap();
        std::fs::write(folder.join("empty"), "").unwrap();
        std::fs::create_dir(folder.join("folder")).unwrap();
        let texts: Vec<String> = read(&folder).into_iter().map(|finding| finding.text).collect();
        assert_eq!(texts, ["empty: something is wrong", "ipmi: fan 3 failed", "raid: array md0 is degraded"]);
        assert!(clear(&folder, "ipmi").unwrap());
        assert!(!clear(&folder, "ipmi").unwrap());
        assert_eq!(read(&folder).len(), 2);
    }

    #[test]
    fn names_are_plain() {
        for (name, expected) in
            [("ipmi", true), ("dell-omsa.1", true), ("", false), (".x", false), ("a/b", false), ("ü", false)]
        {
            assert_eq!(is_name(name), expected, "{name}");
        }
    }
}
