//! Mounts of the lab: all of them lie below its runtime folder, so that they can be found again after a crash.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mount points at or below a folder, the innermost first.
pub fn below(folder: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut points: Vec<_> = points.filter(|point| point.starts_with(folder)).collect();
    points.reverse();
    points
}

/// Whether something is mounted exactly there.
pub fn is_mounted(point: &Path) -> bool {
    below(point).iter().any(|found| found == point)
}

/// Takes a mount away from the tree, even when a dead server is behind it.
pub fn detach(point: &Path) -> Result<()> {
    umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        .with_context(|| format!("unmounting {}", point.display()))
}

/// A writable view on `lower`: what is written goes to `folder/upper`.
pub fn overlay(lower: &Path, folder: &Path, point: &Path) -> Result<()> {
    let (upper, work) = (folder.join("upper"), folder.join("work"));
    for each in [&upper, &work, &point.to_path_buf()] {
        fs::create_dir_all(each)?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount(Some("overlay"), point, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("mounting an overlay at {}", point.display()))
}

/// A folder in memory.
pub fn memory(point: &Path) -> Result<()> {
    fs::create_dir_all(point)?;
    mount(Some("mainstay-lab"), point, Some("tmpfs"), MsFlags::empty(), Some("size=2g,mode=755"))
        .with_context(|| format!("mounting a folder in memory at {}", point.display()))
}

/// The same folder at a second place.
pub fn bind(from: &Path, point: &Path) -> Result<()> {
    fs::create_dir_all(point)?;
    mount(Some(from), point, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("binding {} to {}", from.display(), point.display()))
}
