//! Inodes and open files of the backing folder, and the system calls on them.
//!
//! ```text
//!  kernel's inode number ──► Node { O_PATH descriptor } ──► /proc/self/fd/N ──► open, truncate, chmod, link, …
//!  kernel's file handle  ──► Handle { descriptor, epoch, lost } ──► pread, pwrite, fsync, …
//! ```
//!
//! An inode's number is that of the backing file, so it is the same on all hosts; the descriptor keeps the number from
//! being used again while the kernel knows it. Only the root has the number 1, as FUSE demands.

use std::collections::HashMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

/// The folder of our own files in a datastore; operations below it are counted apart.
const OURS: &str = ".mainstay";

/// A file or folder that the kernel knows.
pub struct Node {
    descriptor: File,
    number: u64,
    /// Whether it is `.mainstay` or lies below it.
    pub ours: bool,
}

/// An open file.
pub struct Handle {
    /// The backing file.
    pub file: File,
    /// What it is a handle of.
    pub node: Arc<Node>,
    /// Of the host when it was opened.
    pub epoch: u64,
    /// A lock held through it was taken away.
    pub lost: Arc<AtomicBool>,
}

/// One name in a folder.
pub struct Entry {
    /// The number of what it names.
    pub number: u64,
    /// Its kind.
    pub kind: FileType,
    /// The name.
    pub name: OsString,
}

/// The inodes that one mount's kernel knows, each with its count of lookups.
pub struct Nodes {
    root: Arc<Node>,
    known: Mutex<HashMap<u64, (Arc<Node>, u64)>>,
}

impl Nodes {
    /// Of the folder `root`.
    pub fn new(root: &File) -> io::Result<Self> {
        let descriptor = open_path(root, OsStr::new("."))?;
        let root = Arc::new(Node { descriptor, number: INodeNo::ROOT.0, ours: false });
        Ok(Nodes { root, known: Mutex::new(HashMap::new()) })
    }

    /// The inode that the kernel means; None if it was forgotten.
    pub fn find(&self, number: INodeNo) -> Option<Arc<Node>> {
        if number == INodeNo::ROOT {
            return Some(self.root.clone());
        }
        self.known.lock().expect("no holder panics").get(&number.0).map(|(node, _)| node.clone())
    }

    /// Looks a name up; the kernel knows the inode from now on.
    pub fn look_up(&self, parent: &Node, name: &OsStr) -> io::Result<(Arc<Node>, FileAttr)> {
        self.intern(parent, name, open_path(&parent.descriptor, name)?)
    }

    /// As `look_up`, for a file that was just created and may have lost its name again.
    pub fn adopt(&self, parent: &Node, name: &OsStr, file: &File) -> io::Result<(Arc<Node>, FileAttr)> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let descriptor = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
        self.intern(parent, name, descriptor)
    }

    fn intern(&self, parent: &Node, name: &OsStr, descriptor: File) -> io::Result<(Arc<Node>, FileAttr)> {
        let attributes = attributes_of(&descriptor.metadata()?);
        let number = attributes.ino.0;
        let ours = parent.ours || name == OURS;
        let mut known = self.known.lock().expect("no holder panics");
        let (node, lookups) = known.entry(number).or_insert_with(|| (Arc::new(Node { descriptor, number, ours }), 0));
        *lookups += 1;
        Ok((node.clone(), attributes))
    }

    /// The kernel forgets as many lookups.
    pub fn forget(&self, number: INodeNo, lookups: u64) {
        let mut known = self.known.lock().expect("no holder panics");
        let Some((_, left)) = known.get_mut(&number.0) else { return };
        *left = left.saturating_sub(lookups);
        if *left == 0 {
            known.remove(&number.0);
        }
    }
}

impl Node {
    /// The kernel's number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Attributes as they are now.
    pub fn attributes(&self) -> io::Result<FileAttr> {
        let mut attributes = attributes_of(&self.descriptor.metadata()?);
        attributes.ino = INodeNo(self.number);
        Ok(attributes)
    }

    /// Opens it. Direct and synchronous I/O are not asked of the backing file: the hosts share its page cache, and the
    /// mount syncs by itself, so that a fault can leave that out.
    pub fn open(&self, flags: i32) -> io::Result<File> {
        let not_for_backing = libc::O_DIRECT
            | libc::O_SYNC
            | libc::O_DSYNC
            | libc::O_APPEND
            | libc::O_NOFOLLOW
            | libc::O_EXCL
            | libc::O_CREAT;
        let path = CString::new(self.path().into_os_string().as_bytes()).expect("no zero in it");
        let fd = nix::fcntl::open(path.as_c_str(), OFlag::from_bits_retain(flags & !not_for_backing), Mode::empty())?;
        Ok(File::from(fd))
    }

    /// Creates a file in this folder; who may be its owner.
    pub fn create(&self, name: &OsStr, mode: u32, flags: i32, owner: (u32, u32)) -> io::Result<File> {
        let flags = flags & (libc::O_ACCMODE | libc::O_EXCL | libc::O_TRUNC) | libc::O_CREAT | libc::O_CLOEXEC;
        let fd = openat(&self.descriptor, name, OFlag::from_bits_retain(flags), Mode::from_bits_truncate(mode))?;
        let file = File::from(fd);
        if owner != (0, 0) {
            std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
        }
        Ok(file)
    }

    /// Makes a folder in this one.
    pub fn make_folder(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        Ok(nix::sys::stat::mkdirat(&self.descriptor, name, Mode::from_bits_truncate(mode))?)
    }

    /// Makes a plain file, socket or pipe in this folder.
    pub fn make_node(&self, name: &OsStr, mode: u32, device: u32) -> io::Result<()> {
        let kind = nix::sys::stat::SFlag::from_bits_truncate(mode & libc::S_IFMT);
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        Ok(nix::sys::stat::mknodat(&self.descriptor, name, kind, mode, device.into())?)
    }

    /// Makes a symbolic link in this folder.
    pub fn make_symlink(&self, name: &OsStr, target: &OsStr) -> io::Result<()> {
        Ok(nix::unistd::symlinkat(target, &self.descriptor, name)?)
    }

    /// Where this symbolic link points to.
    pub fn read_link(&self) -> io::Result<OsString> {
        Ok(nix::fcntl::readlinkat(&self.descriptor, "")?)
    }

    /// Gives this file another name; fails if that is there. Atomic over all hosts, since the backing system is.
    pub fn link(&self, parent: &Node, name: &OsStr) -> io::Result<()> {
        Ok(nix::unistd::linkat(
            nix::fcntl::AT_FDCWD,
            &self.path(),
            &parent.descriptor,
            name,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?)
    }

    /// Renames a name of this folder.
    pub fn rename(&self, name: &OsStr, to: &Node, new_name: &OsStr, flags: u32) -> io::Result<()> {
        let flags = nix::fcntl::RenameFlags::from_bits_truncate(flags);
        Ok(nix::fcntl::renameat2(&self.descriptor, name, &to.descriptor, new_name, flags)?)
    }

    /// Removes a file's name from this folder.
    pub fn unlink(&self, name: &OsStr) -> io::Result<()> {
        Ok(nix::unistd::unlinkat(&self.descriptor, name, nix::unistd::UnlinkatFlags::NoRemoveDir)?)
    }

    /// Removes an empty folder from this one.
    pub fn remove_folder(&self, name: &OsStr) -> io::Result<()> {
        Ok(nix::unistd::unlinkat(&self.descriptor, name, nix::unistd::UnlinkatFlags::RemoveDir)?)
    }

    /// All names in this folder, with `.` and `..`.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let dot = |name: &str| Entry { number: self.number, kind: FileType::Directory, name: name.into() };
        let mut entries = vec![dot("."), dot("..")];
        for entry in std::fs::read_dir(self.path())? {
            let entry = entry?;
            entries.push(Entry { number: entry.ino(), kind: kind_of(entry.file_type()?), name: entry.file_name() });
        }
        Ok(entries)
    }

    /// Makes the names in this folder durable.
    pub fn sync_folder(&self) -> io::Result<()> {
        self.open(libc::O_RDONLY | libc::O_DIRECTORY)?.sync_all()
    }

    /// Cuts or extends the file.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        self.open(libc::O_WRONLY)?.set_len(size)
    }

    /// Changes its mode.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        std::fs::set_permissions(self.path(), Permissions::from_mode(mode & 0o7777))
    }

    /// Changes its owner.
    pub fn set_owner(&self, user: Option<u32>, group: Option<u32>) -> io::Result<()> {
        let (user, group) = (user.map(nix::unistd::Uid::from_raw), group.map(nix::unistd::Gid::from_raw));
        Ok(nix::unistd::fchownat(&self.descriptor, "", user, group, AtFlags::AT_EMPTY_PATH)?)
    }

    /// Changes its times.
    pub fn set_times(&self, accessed: Option<TimeOrNow>, modified: Option<TimeOrNow>) -> io::Result<()> {
        let (accessed, modified) = (time_spec(accessed), time_spec(modified));
        Ok(utimensat(nix::fcntl::AT_FDCWD, &self.path(), &accessed, &modified, UtimensatFlags::FollowSymlink)?)
    }

    /// Size and room of the backing file system.
    pub fn room(&self) -> io::Result<nix::sys::statvfs::Statvfs> {
        Ok(nix::sys::statvfs::fstatvfs(self.descriptor.as_fd())?)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.descriptor.as_raw_fd()))
    }
}

impl Handle {
    /// Reads up to `size` bytes; less only at the end of the file.
    pub fn read(&self, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; size as usize];
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    /// Writes all bytes, and makes them durable if the writer asked for it.
    pub fn write(&self, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        if durable { self.file.sync_data() } else { Ok(()) }
    }

    /// Allocates or frees room.
    pub fn allocate(&self, mode: i32, offset: u64, length: u64) -> io::Result<()> {
        let mode = nix::fcntl::FallocateFlags::from_bits_retain(mode);
        let (offset, length) = (signed(offset)?, signed(length)?);
        Ok(nix::fcntl::fallocate(&self.file, mode, offset, length)?)
    }

    /// Finds the next data or hole.
    pub fn seek(&self, offset: i64, whence: i32) -> io::Result<i64> {
        // SAFETY: plain system call on a descriptor that we own; it touches no memory of ours.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), offset, whence) };
        if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found) }
    }
}

/// Opens the backing folder itself.
pub fn open_folder(path: &std::path::Path) -> io::Result<File> {
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)
}

fn open_path(parent: &File, name: &OsStr) -> io::Result<File> {
    let fd: OwnedFd = openat(parent, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    Ok(File::from(fd))
}

fn attributes_of(data: &Metadata) -> FileAttr {
    let changed = SystemTime::UNIX_EPOCH + Duration::new(data.ctime().unsigned_abs(), data.ctime_nsec() as u32);
    FileAttr {
        ino: INodeNo(data.ino()),
        size: data.size(),
        blocks: data.blocks(),
        atime: data.accessed().unwrap_or(changed),
        mtime: data.modified().unwrap_or(changed),
        ctime: changed,
        crtime: changed,
        kind: kind_of(data.file_type()),
        perm: (data.mode() & 0o7777) as u16,
        nlink: data.nlink() as u32,
        uid: data.uid(),
        gid: data.gid(),
        rdev: data.rdev() as u32,
        blksize: data.blksize() as u32,
        flags: 0,
    }
}

fn kind_of(kind: std::fs::FileType) -> FileType {
    let special = |is: bool, then| is.then_some(then);
    special(kind.is_dir(), FileType::Directory)
        .or(special(kind.is_symlink(), FileType::Symlink))
        .or(special(kind.is_fifo(), FileType::NamedPipe))
        .or(special(kind.is_socket(), FileType::Socket))
        .or(special(kind.is_char_device(), FileType::CharDevice))
        .or(special(kind.is_block_device(), FileType::BlockDevice))
        .unwrap_or(FileType::RegularFile)
}

fn time_spec(time: Option<TimeOrNow>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(TimeOrNow::Now) => TimeSpec::UTIME_NOW,
        Some(TimeOrNow::SpecificTime(time)) => {
            TimeSpec::from_duration(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
        }
    }
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}
