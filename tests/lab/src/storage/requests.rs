//! FUSE requests of one mount, turned into operations that pass the host's gate.
//!
//! ```text
//!  request ─► copy what it borrows ─► inode or handle (else ESTALE, EBADF) ─► gate ─► closure: do it, answer
//! ```
//!
//! Every method has this shape; the closure owns the reply. Requests that are not here (extended attributes, ioctl,
//! copy_file_range) are answered ENOSYS by `fuser`, and the kernel does without. FUSE_INTERRUPT is not answered: a
//! thread that waits for storage cannot be interrupted, as with a hard mount.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLock,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::host::{Class, Verdict};
use super::mount::{GENERATION, Mount, TTL, answer_attributes, answer_empty, answer_entry};
use super::tree::Node;

const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
/// Asynchronous requests that a host can have under way; more wait in its kernel.
const BACKGROUND: u16 = 256;
/// Largest write; larger ones are cut by the kernel.
const WRITE_BYTES: u32 = 1 << 20;
/// From this size on a torn write is torn.
const TEAR_FROM: usize = 4096;

impl Filesystem for Mount {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_ATOMIC_O_TRUNC | InitFlags::FUSE_PARALLEL_DIROPS;
        if self.0.forwards_locks {
            wanted |= InitFlags::FUSE_POSIX_LOCKS | InitFlags::FUSE_FLOCK_LOCKS;
        }
        let lacks = |flags| io::Error::other(format!("the kernel's FUSE lacks {flags:?}"));
        config.add_capabilities(wanted).map_err(lacks)?;
        config.set_max_background(BACKGROUND).expect("it is not zero");
        config.set_max_write(WRITE_BYTES).expect("it is below what fuser can take");
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(parent) = self.node(parent) else { return reply.error(Errno::ESTALE) };
        let name = name.to_owned();
        self.submit(Class::Look, &parent.clone(), move |shared, verdict| {
            let found = verdict.then(|| shared.nodes.look_up(&parent, &name));
            answer_entry(reply, found.map(|(_, attributes)| attributes));
        });
    }

    fn forget(&self, _: &Request, number: INodeNo, lookups: u64) {
        self.0.nodes.forget(number, lookups);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit(Class::Look, &node.clone(), move |_, verdict| {
            answer_attributes(reply, verdict.then(|| node.attributes()))
        });
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        user: Option<u32>,
        group: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        let class = if size.is_some() { Class::Write } else { Class::Change };
        let handle = handle.and_then(|h| self.handle(h));
        let change = move |node: &Node| {
            if let Some(size) = size {
                node.set_size(size)?;
            }
            if let Some(mode) = mode {
                node.set_mode(mode)?;
            }
            if user.is_some() || group.is_some() {
                node.set_owner(user, group)?;
            }
            if accessed.is_some() || modified.is_some() {
                node.set_times(accessed, modified)?;
            }
            node.attributes()
        };
        self.submit_on(class, &node.clone(), handle.as_ref(), move |_, verdict| {
            answer_attributes(reply, verdict.then(|| change(&node)));
        });
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit(Class::Look, &node.clone(), move |_, verdict| match verdict.then(|| node.read_link()) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(errno) => reply.error(errno),
        });
    }

    fn mknod(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, device: u32, reply: ReplyEntry) {
        self.submit_new(parent, name, reply, move |parent, name| parent.make_node(name, mode, device));
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        self.submit_new(parent, name, reply, move |parent, name| parent.make_folder(name, mode));
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.as_os_str().to_owned();
        self.submit_new(parent, name, reply, move |parent, name| parent.make_symlink(name, &target));
    }

    fn link(&self, _: &Request, number: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit_new(parent, name, reply, move |parent, name| node.link(parent, name));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let Some(parent) = self.node(parent) else { return reply.error(Errno::ESTALE) };
        let name = name.to_owned();
        self.submit(Class::Remove, &parent.clone(), move |_, verdict| {
            answer_empty(reply, verdict.then(|| parent.unlink(&name)));
        });
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let Some(parent) = self.node(parent) else { return reply.error(Errno::ESTALE) };
        let name = name.to_owned();
        self.submit(Class::Remove, &parent.clone(), move |_, verdict| {
            answer_empty(reply, verdict.then(|| parent.remove_folder(&name)));
        });
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (Some(parent), Some(to)) = (self.node(parent), self.node(to)) else { return reply.error(Errno::ESTALE) };
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        self.submit(Class::Change, &parent.clone(), move |_, verdict| {
            answer_empty(reply, verdict.then(|| parent.rename(&name, &to, &new_name, flags.bits())));
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let Some(parent) = self.node(parent) else { return reply.error(Errno::ESTALE) };
        let (name, owner) = (name.to_owned(), (request.uid(), request.gid()));
        self.submit(Class::Change, &parent.clone(), move |shared, verdict| {
            let created = verdict.then(|| {
                let file = parent.create(&name, mode, flags, owner)?;
                let (node, attributes) = shared.nodes.adopt(&parent, &name, &file)?;
                Ok((shared.add_handle(file, node), attributes))
            });
            match created {
                Ok((handle, attributes)) => reply.created(&TTL, &attributes, GENERATION, handle, OPEN_FLAGS),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn open(&self, _: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        let class = if flags.0 & libc::O_TRUNC == 0 { Class::Open } else { Class::Change };
        self.submit(class, &node.clone(), move |shared, verdict| match verdict.then(|| node.open(flags.0)) {
            Ok(file) => reply.opened(shared.add_handle(file, node), OPEN_FLAGS),
            Err(errno) => reply.error(errno),
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(handle) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let of = handle.clone();
        self.submit_on(Class::Read, &of.node, Some(&of), move |_, verdict| {
            match verdict.then(|| handle.read(offset, size)) {
                Ok(bytes) => reply.data(&bytes),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(handle) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let (of, bytes) = (handle.clone(), data.to_vec());
        let durable = flags.0 & libc::O_DSYNC != 0;
        self.submit_on(Class::Write, &of.node, Some(&of), move |shared, verdict| match verdict {
            Verdict::Refuse(errno) => reply.error(errno),
            Verdict::Late(time) => {
                let land = {
                    let handle = handle.clone();
                    move || drop(handle.write(offset, &bytes, durable))
                };
                shared.host.land_later(time, handle, land);
                reply.error(Errno::EIO);
            }
            Verdict::Torn if TEAR_FROM <= bytes.len() => {
                let _ = handle.write(offset, &bytes[..bytes.len() / 2], durable);
                reply.error(Errno::EIO);
            }
            Verdict::Go | Verdict::Torn | Verdict::SkipSync => {
                match handle.write(offset, &bytes, durable && verdict != Verdict::SkipSync) {
                    Ok(()) => reply.written(bytes.len() as u32),
                    Err(error) => reply.error(Errno::from(error)),
                }
            }
        });
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(handle) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let of = handle.clone();
        self.submit_on(Class::Write, &of.node, Some(&of), move |_, verdict| {
            answer_empty(reply, verdict.then(|| handle.allocate(mode, offset, length)));
        });
    }

    fn lseek(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let Some(handle) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let of = handle.clone();
        self.submit_on(Class::Read, &of.node, Some(&of), move |_, verdict| {
            match verdict.then(|| handle.seek(offset, whence)) {
                Ok(offset) => reply.offset(offset),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let Some(handle) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let of = handle.clone();
        self.submit_on(Class::Sync, &of.node, Some(&of), move |_, verdict| match verdict {
            Verdict::SkipSync => reply.ok(),
            Verdict::Go | Verdict::Torn | Verdict::Late(_) | Verdict::Refuse(_) => {
                let sync = || if data_only { handle.file.sync_data() } else { handle.file.sync_all() };
                answer_empty(reply, verdict.then(sync));
            }
        });
    }

    fn flush(&self, _: &Request, number: INodeNo, _: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit(Class::Close, &node.clone(), move |shared, _| {
            if !shared.keeps_locks_on_close() {
                shared.locks.drop_owner(node.number(), &shared.owner(owner));
            }
            reply.ok();
        });
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let Some(of) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        self.submit(Class::Close, &of.node.clone(), move |shared, _| {
            shared.handles.write().expect("no holder panics").remove(&handle.0);
            if !shared.keeps_locks_on_close() {
                shared.locks.drop_handle(of.node.number(), handle.0);
            }
            reply.ok();
        });
    }

    fn opendir(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit(Class::Look, &node, move |shared, verdict| match verdict {
            Verdict::Refuse(errno) => reply.error(errno),
            Verdict::Go | Verdict::Torn | Verdict::Late(_) | Verdict::SkipSync => {
                let handle = shared.next_handle.fetch_add(1, Ordering::Relaxed);
                shared.folders.lock().expect("no holder panics").insert(handle, Vec::new());
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
        });
    }

    fn readdir(&self, _: &Request, number: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit(Class::Look, &node.clone(), move |shared, verdict| {
            let fresh = verdict.then(|| if offset == 0 { node.entries().map(Some) } else { Ok(None) });
            let mut folders = shared.folders.lock().expect("no holder panics");
            let Some(entries) = folders.get_mut(&handle.0) else { return reply.error(Errno::EBADF) };
            match fresh {
                Err(errno) => return reply.error(errno),
                Ok(Some(fresh)) => *entries = fresh,
                Ok(None) => {}
            }
            for (index, entry) in entries.iter().enumerate().skip(offset as usize) {
                if reply.add(INodeNo(entry.number), index as u64 + 1, entry.kind, &entry.name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.0.folders.lock().expect("no holder panics").remove(&handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit(Class::Sync, &node.clone(), move |_, verdict| match verdict {
            Verdict::SkipSync => reply.ok(),
            Verdict::Go | Verdict::Torn | Verdict::Late(_) | Verdict::Refuse(_) => {
                answer_empty(reply, verdict.then(|| node.sync_folder()));
            }
        });
    }

    fn statfs(&self, _: &Request, number: INodeNo, reply: ReplyStatfs) {
        let Some(node) = self.node(number) else { return reply.error(Errno::ESTALE) };
        self.submit(Class::Look, &node.clone(), move |_, verdict| match verdict.then(|| node.room()) {
            Ok(room) => reply.statfs(
                room.blocks(),
                room.blocks_free(),
                room.blocks_available(),
                room.files(),
                room.files_free(),
                room.block_size() as u32,
                room.name_max() as u32,
                room.fragment_size() as u32,
            ),
            Err(errno) => reply.error(errno),
        });
    }

    fn getlk(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let Some(of) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let lock = self.lock(&of, handle, owner, (start, end), kind, pid);
        self.submit_on(Class::Lock, &of.node.clone(), Some(&of.clone()), move |shared, verdict| {
            match verdict.then(|| Ok(shared.locks.test(of.node.number(), &lock))) {
                Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
                Ok(Some(found)) => {
                    let kind = if found.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                    reply.locked(found.start, found.end, kind, found.pid);
                }
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn setlk(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let Some(of) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let lock = self.lock(&of, handle, owner, (start, end), kind, pid);
        self.submit_on(Class::Lock, &of.node.clone(), Some(&of.clone()), move |shared, verdict| {
            let inode = of.node.number();
            match verdict {
                Verdict::Refuse(errno) => reply.error(errno),
                _ if kind == libc::F_UNLCK => {
                    shared.locks.unlock(inode, &lock);
                    reply.ok();
                }
                _ if sleep => shared.locks.set_waiting(inode, lock, reply),
                _ if shared.locks.set(inode, lock) => reply.ok(),
                _ => reply.error(Errno::EAGAIN),
            }
        });
    }
}
