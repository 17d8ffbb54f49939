//! Small files that are replaced whole: written beside, fsynced, renamed, and the folder fsynced.
//!
//! A reader sees the old file or the new one. Two writers of one folder are excluded by its lock, or are one agent.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use zeroize::Zeroizing;

/// Longer files are not read, in bytes.
const MAX_BYTES: u64 = 4 << 20;

/// A file or folder that could not be used. If it was to be written, the old one still stands.
#[derive(Debug, thiserror::Error)]
#[error("{path}: cannot be {what}: {cause}", path = .path.display())]
pub struct FileError {
    path: PathBuf,
    what: &'static str,
    #[source]
    cause: io::Error,
}

/// Excludes other changes of the folder while it lives.
pub(super) type Lock = Flock<File>;

fn failed(path: &Path, what: &'static str) -> impl Fn(io::Error) -> FileError {
    let path = path.to_path_buf();
    move |cause| FileError { path: path.clone(), what, cause }
}

/// Makes the folder if need be, closes it to others, and locks it; `None` = somebody else holds the lock.
pub(super) fn lock(dir: &Path) -> Result<Option<Lock>, FileError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir, "made"))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(failed(dir, "closed to others"))?;
    let folder = File::open(dir).map_err(failed(dir, "opened"))?;
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(failed(dir, "locked")(errno.into())),
    }
}

/// The file's text; `None` = there is none.
pub(super) fn read(dir: &Path, name: &str) -> Result<Option<Zeroizing<String>>, FileError> {
    let path = dir.join(name);
    let failed = failed(&path, "read");
    match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(data) if MAX_BYTES < data.len() => return Err(failed(io::Error::other("it is too long to be ours"))),
        Ok(_) => {}
    }
    fs::read_to_string(&path).map(|text| Some(Zeroizing::new(text))).map_err(failed)
}

/// Replaces the file; durable when this returns.
pub(super) fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), FileError> {
    let path = dir.join(name);
    let beside = dir.join(format!(".{name}.new"));
    let replace = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, &path)?;
        File::open(dir)?.sync_all()
    };
    replace().map_err(failed(&path, "written"))
}
