//! Files of a datastore: names, folders held open, direct reads into aligned memory, exclusive creation.
//!
//! Every order opens its folders anew (an NFS client then asks the server whether they changed) and reaches files only
//! through them, so that a mount that was swapped or lazily unmounted in the middle is an error, never an empty folder.
//!
//! Deliberately not here: what the files mean.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use crate::exec::clock;
use crate::types::store::StoreFailure;
use crate::types::{ClusterId, Digest, HostId, Nonce, VmId};
use crate::wire::record::{BLOCK, BadRecord};

/// How many entries of one folder are looked at; more is an error, not a shorter answer.
const MAX_ENTRIES: usize = 1_000_000;

/// Folders and files under `.mainstay/<cluster>/`.
pub const HOSTS: &str = "hosts";
/// Of claims, one folder per VM.
pub const CLAIMS: &str = "claims";
/// Of files that have no name of their own yet.
pub const TMP: &str = "tmp";
/// Of records, one folder per VM.
pub const VMS: &str = "vms";
/// The member block.
pub const MEMBERS: &str = "members";

/// `hosts/<this>`: slots and scratch block.
#[must_use]
pub fn beats_name(host: HostId) -> String {
    host.to_string()
}
/// `hosts/<this>`: VM lists.
#[must_use]
pub fn list_name(host: HostId) -> String {
    format!("{host}.vms")
}
/// `members.<generation>`.
#[must_use]
pub fn members_name(generation: u64) -> String {
    format!("{MEMBERS}.{generation}")
}
/// `vms/<vm>/record.<digest>`.
#[must_use]
pub fn record_name(digest: Digest) -> String {
    format!("record.{digest}")
}
/// A name in `tmp/` that nobody else uses. Its first three parts tell whose it is when it is left over.
#[must_use]
pub fn tmp_name(what: &str, host: HostId) -> String {
    format!("{}{:032x}", tmp_prefix(what, host), clock::nonce().0)
}
/// What all such names of this process begin with.
fn tmp_prefix(what: &str, host: HostId) -> String {
    static PROCESS: OnceLock<Nonce> = OnceLock::new();
    format!("{what}.{host}.{:032x}.", PROCESS.get_or_init(clock::nonce).0)
}
/// The folder of a cluster on a datastore.
#[must_use]
pub fn root_path(mount: &Path, cluster: ClusterId) -> PathBuf {
    mount.join(".mainstay").join(cluster.to_string())
}
/// The folder of one VM below `claims` or `vms`.
#[must_use]
pub fn vm_name(vm: VmId) -> String {
    vm.to_string()
}

/// An error of the system in our words.
pub fn failure(path: impl AsRef<Path>, error: &io::Error) -> StoreFailure {
    let (path, why) = (path.as_ref().display().to_string(), error.to_string());
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC | Errno::EDQUOT) => StoreFailure::Full { path },
        Some(Errno::EROFS | Errno::EACCES | Errno::EPERM) => StoreFailure::ReadOnly { path, why },
        Some(Errno::ENOENT | Errno::ENOTDIR) => {
            let why = "does not exist; is the datastore mounted, and was it added to the cluster?".to_owned();
            StoreFailure::Missing { path, why }
        }
        // ESHUTDOWN is EBLOCKLISTED: Ceph has shut this client out, and lets it in again only when it mounts anew.
        Some(Errno::ENODEV | Errno::ENXIO | Errno::ESHUTDOWN) => StoreFailure::Gone { path, why },
        Some(Errno::ESTALE) => StoreFailure::Stale { path, why },
        Some(Errno::EINVAL) => StoreFailure::Io { path, why: format!("{why} (does it allow direct I/O?)") },
        Some(_) | None => StoreFailure::Io { path, why },
    }
}

/// Content that cannot be used.
pub fn bad(path: &Path, why: &BadRecord) -> StoreFailure {
    StoreFailure::Bad { path: path.display().to_string(), why: why.to_string() }
}

/// Memory for direct I/O: begins at a multiple of 4,096.
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Zeros.
    pub fn zeroed(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        assert!(start < BLOCK, "bytes can be aligned to a block");
        Self { bytes, start, len }
    }
    /// A copy.
    pub fn of(content: &[u8]) -> Self {
        let mut buffer = Self::zeroed(content.len());
        buffer.as_mut().copy_from_slice(content);
        buffer
    }
    /// What is in it.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Reads up to `len` bytes at `offset`; fewer only where the file ends.
pub fn read_at(file: &File, path: &Path, offset: u64, len: usize) -> Result<Buffer, StoreFailure> {
    let mut buffer = Buffer::zeroed(len);
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let read = match file.read_at(&mut buffer.as_mut()[done..], at) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failure(path, &error)),
        };
        done += read;
        // A direct read that stops inside a block stopped at the end of the file.
        if read == 0 || !done.is_multiple_of(BLOCK) {
            break;
        }
    }
    buffer.len = done;
    Ok(buffer)
}

/// Writes whole blocks at `offset` in one call, so that a slot is never half ours without an error.
pub fn write_at(file: &File, path: &Path, offset: u64, content: &[u8]) -> Result<(), StoreFailure> {
    let buffer = Buffer::of(content);
    let written = file.write_at(buffer.as_slice(), offset).map_err(|error| failure(path, &error))?;
    if written != content.len() {
        let why = format!("only {written} of {} bytes were written", content.len());
        return Err(StoreFailure::Io { path: path.display().to_string(), why });
    }
    Ok(())
}

/// Which file it is, whatever its name.
pub type Identity = (u64, u64);

/// A file as its folder shows it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Which file.
    pub identity: Identity,
    /// Its last write by the server's clock: seconds and nanoseconds since 1970.
    pub written_at: (i64, i64),
}

/// Of an open file.
pub fn identity(file: &File, path: &Path) -> Result<Identity, StoreFailure> {
    file.metadata().map(|meta| (meta.dev(), meta.ino())).map_err(|error| failure(path, &error))
}

/// A folder, held open.
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens it anew.
    pub fn open(path: &Path) -> Result<Self, StoreFailure> {
        let fd = nix::fcntl::open(path, folder_flags(), Mode::empty()).map_err(|errno| failure(path, &errno.into()))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// A folder in it.
    pub fn sub(&self, name: &str) -> Result<Self, StoreFailure> {
        let path = self.path(name);
        let fd = openat(&self.fd, name, folder_flags(), Mode::empty()).map_err(|e| failure(&path, &e.into()))?;
        Ok(Self { fd, path })
    }

    /// A folder in it, `None` if this folder is there and that one is not.
    pub fn sub_if_there(&self, name: &str) -> Result<Option<Self>, StoreFailure> {
        let path = self.path(name);
        match openat(&self.fd, name, folder_flags(), Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(failure(&path, &errno.into())),
        }
    }

    /// A folder in it, made if it is not there; durable.
    pub fn make_sub(&self, name: &str) -> Result<Self, StoreFailure> {
        match mkdirat(&self.fd, name, Mode::S_IRWXU) {
            Ok(()) => self.sync()?,
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failure(self.path(name), &errno.into())),
        }
        self.sub(name)
    }

    /// Where something of this name would be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a file for direct I/O, `None` if there is none.
    pub fn file(&self, name: &str, flags: OFlag) -> Result<Option<File>, StoreFailure> {
        let flags = flags | OFlag::O_DIRECT | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(failure(self.path(name), &errno.into())),
        }
    }

    /// A new file for direct and durable writes; fails if the name is taken.
    pub fn create(&self, name: &str) -> Result<File, StoreFailure> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
        openat(&self.fd, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map(File::from)
            .map_err(|errno| failure(self.path(name), &errno.into()))
    }

    /// Reads a whole file of whole blocks through a descriptor opened anew; `None` if there is none.
    pub fn read(&self, name: &str, max: usize) -> Result<Option<Buffer>, StoreFailure> {
        let Some(file) = self.file(name, OFlag::O_RDONLY)? else { return Ok(None) };
        let path = self.path(name);
        // Not beyond it: most are as large as they may be, and another read would cost another round trip.
        let buffer = read_at(&file, &path, 0, max)?;
        if buffer.as_slice().len() == max {
            let len = file.metadata().map_err(|error| failure(&path, &error))?.len();
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if max < len {
                return Err(bad(&path, &BadRecord::TooLarge { len, max }));
            }
        }
        Ok(Some(buffer))
    }

    /// Names in it, in no order.
    pub fn names(&self) -> Result<Vec<String>, StoreFailure> {
        let fail = |errno: Errno| failure(&self.path, &errno.into());
        let again = openat(&self.fd, ".", folder_flags(), Mode::empty()).map_err(fail)?;
        let mut listing = dir::Dir::from_fd(again).map_err(fail)?;
        let mut names = Vec::new();
        for entry in listing.iter() {
            let entry = entry.map_err(fail)?;
            // Names of ours are ASCII; others are not ours.
            if let Ok(name) = entry.file_name().to_str()
                && !name.starts_with('.')
            {
                names.push(name.to_owned());
            }
            if MAX_ENTRIES < names.len() {
                let why = format!("more than {MAX_ENTRIES} entries; remove what does not belong there");
                return Err(StoreFailure::Bad { path: self.path.display().to_string(), why });
            }
        }
        Ok(names)
    }

    /// Which folder this is.
    pub fn identity(&self) -> Result<Identity, StoreFailure> {
        fstat(&self.fd).map(|stat| (stat.st_dev, stat.st_ino)).map_err(|errno| failure(&self.path, &errno.into()))
    }

    /// What lies under this name.
    pub fn look(&self, name: &str) -> Result<Option<Seen>, StoreFailure> {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let written_at = (stat.st_mtime, stat.st_mtime_nsec);
                Ok(Some(Seen { identity: (stat.st_dev, stat.st_ino), written_at }))
            }
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(failure(self.path(name), &errno.into())),
        }
    }

    /// Gives `from`'s file a second name; never replaces. `Err` is the bare system error: its kinds matter.
    pub fn link(&self, from: &str, to: &Self, name: &str) -> Result<(), Errno> {
        linkat(&self.fd, from, &to.fd, name, AtFlags::empty())
    }

    /// Moves a file; replaces.
    pub fn rename(&self, from: &str, to: &Self, name: &str) -> Result<(), StoreFailure> {
        renameat(&self.fd, from, &to.fd, name).map_err(|errno| failure(to.path(name), &errno.into()))
    }

    /// Removes a file; already gone is fine.
    pub fn remove(&self, name: &str) -> Result<(), StoreFailure> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(failure(self.path(name), &errno.into())),
        }
    }

    /// Makes names in it durable.
    pub fn sync(&self) -> Result<(), StoreFailure> {
        match nix::unistd::fsync(self.fd.as_fd()) {
            // Some network file systems have nothing to do here, and say so.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOTSUP) => Ok(()),
            Err(errno) => Err(failure(&self.path, &errno.into())),
        }
    }

    /// Creates `name` here with this content, whole or not at all; `false` if the name was taken. Written under a name
    /// in `tmp` first, so that nobody ever sees or overwrites half of it.
    pub fn create_whole(&self, tmp: &Self, tmp_name: &str, name: &str, content: &[u8]) -> Result<bool, StoreFailure> {
        let file = tmp.create(tmp_name)?;
        let path = tmp.path(tmp_name);
        let linked = write_at(&file, &path, 0, content)
            .and_then(|()| file.sync_all().map_err(|error| failure(&path, &error)))
            .and_then(|()| match tmp.link(tmp_name, self, name) {
                Ok(()) => self.sync().map(|()| true),
                // Also then: whoever took it may have died before it was durable.
                Err(Errno::EEXIST) => self.sync().map(|()| false),
                Err(errno) => Err(failure(self.path(name), &errno.into())),
            });
        // A name that stays behind is removed when the process starts next.
        let _ = tmp.remove(tmp_name);
        linked
    }
}

/// Removes what earlier processes of this host left in `tmp` under this first part of a name. They are never used
/// again: one of them may be a claim by now, or become one when a lost order to the server lands.
pub fn sweep(tmp: &Folder, what: &str, host: HostId) -> Result<(), StoreFailure> {
    let (all, mine) = (format!("{what}.{host}."), tmp_prefix(what, host));
    for name in tmp.names()?.iter().filter(|name| name.starts_with(&all) && !name.starts_with(&mine)) {
        tmp.remove(name)?;
    }
    Ok(())
}

fn folder_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC
}
