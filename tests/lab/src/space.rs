//! Room on the disks: looked at before anything long begins, since a build that finds no room in its middle says so where nobody
//! looks.
//!
//! ```text
//! what is needed, folder by folder, less what lies there already ──► summed up by file system ──► less is free? ──► error: names
//!                                                                                               what is needed, there, and to do
//! ```
//!
//! Sizes are those of a clean clone, measured, with some room; a folder that has what it needs still wants `CHANGES`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::statvfs::statvfs;

use crate::{cache, lab};

/// The whole of `cargo lab test`: lints, tests, product, guests.
const TESTED_MIB: u64 = 3500;
/// The lab's own programs and the product.
const BUILT_MIB: u64 = 1500;
/// What the compiler keeps so that it need not begin anew after a change, in percent of the above: of no use where all is built once.
const INCREMENTAL_PERCENT: u64 = 100;
/// What is built anew, or written in the course of a run.
const CHANGES_MIB: u64 = 500;
/// The hosts' root and a guest with Debian, and as much of that as is there twice while it is made.
const CACHE_MIB: u64 = 1300;
/// Disks of three hosts, with Mainstay and their logs.
const HOSTS_MIB: u64 = 1000;
/// Packages, unpacked.
const TEMPORARY_MIB: u64 = 100;

/// Room for something in a folder.
struct Need {
    what: &'static str,
    folder: PathBuf,
    whole_mib: u64,
}

/// Makes sure that there is room for the hosts, and to build what runs on them.
///
/// # Errors
/// Where there is not; what is needed, what is free, and what to do.
pub fn for_lab() -> Result<()> {
    demand(&needs(BUILT_MIB)?)
}

/// Makes sure that there is room for everything that CI runs.
///
/// # Errors
/// As `for_lab`.
pub fn for_tests() -> Result<()> {
    demand(&needs(TESTED_MIB)?)
}

/// What to do where there is no room.
pub fn cure() -> String {
    let target = target().unwrap_or_else(|_| "target".into());
    let incremental = target.join("debug/incremental");
    format!(
        "make room: `cargo clean` in trees that are not in use; rm -r {} ({} MiB), and CARGO_INCREMENTAL=0 so that it does not come \
         again; or CARGO_TARGET_DIR=FOLDER builds elsewhere",
        incremental.display(),
        used_mib(&incremental)
    )
}

fn needs(target_mib: u64) -> Result<Vec<Need>> {
    let incremental = std::env::var_os("CARGO_INCREMENTAL").is_none_or(|value| value != "0");
    let target_mib = target_mib * (100 + if incremental { INCREMENTAL_PERCENT } else { 0 }) / 100;
    Ok(vec![
        Need { what: "programs and tests", folder: target()?, whole_mib: target_mib },
        Need { what: "what hosts and guests are made of", folder: cache::FOLDER.into(), whole_mib: CACHE_MIB },
        Need { what: "disks of the hosts", folder: lab::STATE.into(), whole_mib: HOSTS_MIB },
        Need { what: "packages", folder: std::env::temp_dir(), whole_mib: TEMPORARY_MIB },
    ])
}

/// Where cargo has built this program, and builds the rest.
fn target() -> Result<PathBuf> {
    let program = std::env::current_exe().context("this program's own path")?;
    Ok(program.ancestors().nth(2).context("this program lies in no target folder")?.to_owned())
}

fn demand(needs: &[Need]) -> Result<()> {
    let mut disks: BTreeMap<u64, Disk> = BTreeMap::new();
    for Need { what, folder, whole_mib } in needs {
        let there = folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
        let number = fs::metadata(there).with_context(|| format!("looking at {}", there.display()))?.dev();
        let room = statvfs(there).with_context(|| format!("looking at the disk of {}", there.display()))?;
        let free_mib = (room.blocks_available() * room.fragment_size()) >> 20;
        let disk = disks.entry(number).or_insert(Disk { free_mib, wanted: Vec::new() });
        disk.wanted.push((still_mib(*whole_mib, used_mib(folder)), format!("{} ({what})", folder.display())));
    }
    let short: Vec<String> = disks.values().filter_map(Disk::lack).collect();
    if short.is_empty() { Ok(()) } else { bail!("{}\n{}", short.join("\n"), cure()) }
}

/// What a folder still needs.
fn still_mib(whole_mib: u64, used_mib: u64) -> u64 {
    whole_mib.saturating_sub(used_mib).max(CHANGES_MIB.min(whole_mib))
}

/// One file system, and what is to come to lie on it.
struct Disk {
    free_mib: u64,
    wanted: Vec<(u64, String)>,
}

impl Disk {
    fn lack(&self) -> Option<String> {
        let wanted_mib: u64 = self.wanted.iter().map(|(mib, _)| mib).sum();
        let list: Vec<_> = self.wanted.iter().map(|(mib, what)| format!("  {mib:6} MiB more in {what}")).collect();
        let text =
            format!("no room: {wanted_mib} MiB are needed, {} MiB are free:\n{}", self.free_mib, list.join("\n"));
        (self.free_mib < wanted_mib).then_some(text)
    }
}

/// What lies in a folder; nothing where none is, or what others remove meanwhile.
fn used_mib(folder: &Path) -> u64 {
    let mut seen = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    let mut blocks = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                folders.push(entry.path());
            }
            // cargo links its results to where people look for them.
            if metadata.nlink() == 1 || metadata.is_dir() || seen.insert((metadata.dev(), metadata.ino())) {
                blocks += metadata.blocks();
            }
        }
    }
    blocks / 2048
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_and_what_there_is() {
        assert_eq!([still_mib(6000, 0), still_mib(6000, 5900), still_mib(200, 9000)], [6000, CHANGES_MIB, 200]);
        let disk = |free_mib| Disk { free_mib, wanted: vec![(700, "/a (b)".into()), (300, "/c (d)".into())] };
        assert_eq!(disk(1000).lack(), None);
        let lack = disk(999).lack().unwrap();
        assert_eq!(lack.lines().count(), 3, "{lack}");
        assert!(lack.contains("1000 MiB are needed, 999 MiB are free") && lack.contains("700 MiB more in /a (b)"));
    }

    #[test]
    fn links_count_once() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("deps")).unwrap();
        fs::write(folder.path().join("deps/a"), vec![1; 3 << 20]).unwrap();
        fs::hard_link(folder.path().join("deps/a"), folder.path().join("a")).unwrap();
        assert_eq!(used_mib(folder.path()), 3);
        assert_eq!(used_mib(&folder.path().join("none")), 0);
    }

    #[test]
    fn it_is_looked_at_where_nothing_is_yet() {
        let folder = tempfile::tempdir().unwrap();
        let need = |whole_mib| Need { what: "all", folder: folder.path().join("not/yet"), whole_mib };
        demand(&[need(1)]).unwrap();
        let why = demand(&[need(1 << 40)]).unwrap_err().to_string();
        assert!(why.contains("not/yet (all)") && why.contains("cargo clean"), "{why}");
    }
}
