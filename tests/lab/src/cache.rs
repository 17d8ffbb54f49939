//! What the lab builds once and keeps: named by a kind and by what it was made of, so that working trees with different recipes live
//! beside each other.
//!
//! ```text
//! /var/cache/mainstay-lab/
//!   KIND-HASH         complete; its time is that of its last use. The newest `KEPT` of a kind stay, and what a lab has mounted
//!   KIND-HASH.part, .tmp…
//!                     being built; one that nobody has touched for an hour was left behind by somebody who was killed
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// Where it is kept.
pub const FOLDER: &str = "/var/cache/mainstay-lab";
/// Of a kind: this tree's, and another's.
const KEPT: usize = 2;
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

/// Where one lies, whether it is there or not.
pub fn path(kind: &str, hash: u64) -> PathBuf {
    Path::new(FOLDER).join(format!("{kind}-{hash:016x}"))
}

/// Whether it is there; then it counts as used now.
pub fn is_there(path: &Path) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let touch = || File::open(path)?.set_modified(SystemTime::now());
    touch().with_context(|| format!("using {}", path.display()))?;
    Ok(true)
}

/// Puts what was built in its place, and removes what is too old.
pub fn keep(part: &Path, path: &Path) -> Result<()> {
    fs::rename(part, path).with_context(|| format!("keeping {}", path.display()))?;
    is_there(path)?;
    clear(Path::new(FOLDER), &fs::read_to_string("/proc/self/mountinfo")?, SystemTime::now())
}

fn clear(folder: &Path, mounts: &str, now: SystemTime) -> Result<()> {
    let mut whole = Vec::new();
    for entry in fs::read_dir(folder)?.flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        // One that another tree removes meanwhile needs nothing more.
        let Ok(used) = entry.metadata().and_then(|metadata| metadata.modified()) else { continue };
        if name.ends_with(".part") || name.starts_with(".tmp") {
            if now.duration_since(used).is_ok_and(|age| LEFT_BEHIND < age) {
                remove(&path)?;
            }
        } else if let Some((kind, _)) = name.rsplit_once('-') {
            whole.push((kind.to_owned(), used, path));
        }
    }
    whole.sort_by(|one, other| (&one.0, other.1).cmp(&(&other.0, one.1))); // By kind, the newest first.
    let mut before: Option<(&str, usize)> = None;
    for (kind, _, path) in &whole {
        let newer = before.filter(|(before, _)| before == kind).map_or(0, |(_, count)| count + 1);
        before = Some((kind, newer));
        if KEPT <= newer && !mounts.contains(&*path.to_string_lossy()) {
            remove(path)?;
        }
    }
    Ok(())
}

/// Removes a file or a folder, if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(why) if why.kind() != std::io::ErrorKind::NotFound => {
            Err(why).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_two_of_a_kind_stay_and_what_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let made = [
            ("root-1", 900),
            ("root-2", 5000),
            ("root-3", 100),
            ("root-4", 7000),
            ("guest-1", 9000),
            ("guest-2", 8000),
            ("guest-3", 7000),
            ("root-5.part", 100),
            ("root-6.part", 4000),
            (".tmpa", 4000),
        ];
        for (name, age) in made {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(now - Duration::from_secs(age)).unwrap();
        }
        let mounted = format!("1 2 3 lowerdir={} x", folder.path().join("root-4").display());
        clear(folder.path(), &mounted, now).unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["guest-2", "guest-3", "root-1", "root-3", "root-4", "root-5.part"]);
    }
}
