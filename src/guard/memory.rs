//! Memory that outlives the process: a memfd that parent, child and the next guard share, and systemd keeps.
//!
//! ```text
//!   0       4096                       4096 + AREA              4096 + 2 AREA
//!   ├ page ──┼── even sequences ─────────┼── odd sequences ───────┤
//!
//!   page:  due · moving · void                       one word each, written and read whole
//!   area:  magic · layout · sequence · length · SHA-256 · content
//!
//!   write: the area that does not hold the newest ─► the whole record in one call
//!   read:  the whole record with the highest sequence; one that was torn by its writer's death fails its digest
//! ```
//!
//! A record that could not be written makes the memory void for ever: what lies there would be older than what was told
//! to others. Who finds nothing, junk, or another layout goes on as if there had been no memory.
//!
//! Deliberately not here: what the content means (`carry`), and how it reaches systemd (`notify`).

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::types::Time;
use crate::wire::record;

/// Of the content. Another layout is as good as no memory: raise it with every change of what `carry` encodes.
pub const LAYOUT: u64 = 4;
/// Room for one record: every row and lease at their largest, and as much again.
const AREA: usize = 2 * 1024 * 1024;
const PAGE: usize = 4096;
const SIZE: usize = PAGE + 2 * AREA;
const MAGIC: u64 = u64::from_le_bytes(*b"MAINMEMO");
const HEAD: usize = 64;

#[repr(C)]
struct Page {
    /// Until then the child has stopped what must be stopped, or its parent does.
    due: AtomicU64,
    /// Since when a VM moves that was told to stand; zero = none.
    moving: AtomicU64,
    /// Not zero: nothing here is to be believed.
    void: AtomicU64,
}

/// Words that are read while they are written: what the child promises its parent.
pub struct Board {
    page: NonNull<Page>,
}

// SAFETY: the page is memory shared with other processes anyway, and only touched through atomics.
unsafe impl Send for Board {}
// SAFETY: as above.
unsafe impl Sync for Board {}

/// See the module.
pub struct Memory {
    file: File,
    board: Arc<Board>,
    sequence: u64,
}

impl Memory {
    /// New and empty.
    ///
    /// # Errors
    /// Of the system.
    pub fn new() -> io::Result<Self> {
        let fd = memfd_create("mainstay-guard", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(SIZE as u64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Self::of(file)
    }

    /// One that an earlier guard made.
    ///
    /// # Errors
    /// When it is no such memory.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS)?;
        if file.metadata()?.len() != SIZE as u64 || seals & SealFlag::F_SEAL_SHRINK.bits() == 0 {
            return Err(io::Error::other("not the memory of a guard of this version"));
        }
        Self::of(file)
    }

    fn of(file: File) -> io::Result<Self> {
        let mut memory = Self { board: Arc::new(Board::of(&file)?), file, sequence: 0 };
        memory.sequence = memory.newest().map_or(0, |(sequence, _)| sequence);
        Ok(memory)
    }

    /// To hand it on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What was written last.
    #[must_use]
    pub fn read(&self) -> Option<Vec<u8>> {
        if self.board.page().void.load(Ordering::SeqCst) != 0 {
            return None;
        }
        self.newest().map(|(_, content)| content)
    }

    /// Which record is the newest; zero = none.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Writes beside what was written last. What does not fit makes the memory void; false then.
    pub fn write(&mut self, content: &[u8]) -> bool {
        let next = self.sequence + 1;
        let mut bytes = vec![0; HEAD + content.len()];
        let words = [MAGIC, LAYOUT, next, content.len() as u64];
        for (at, word) in words.into_iter().enumerate() {
            bytes[8 * at..8 * (at + 1)].copy_from_slice(&word.to_le_bytes());
        }
        bytes[HEAD..].copy_from_slice(content);
        let digest = digest(&bytes);
        bytes[32..HEAD].copy_from_slice(&digest);
        let written = bytes.len() <= AREA && self.file.write_all_at(&bytes, area(next)).is_ok();
        if written {
            self.sequence = next;
        } else {
            self.forget();
        }
        written
    }

    /// Nothing here is to be believed any more.
    pub fn forget(&self) {
        self.board.page().void.store(1, Ordering::SeqCst);
    }

    /// Its words.
    #[must_use]
    pub fn board(&self) -> Arc<Board> {
        Arc::clone(&self.board)
    }

    fn newest(&self) -> Option<(u64, Vec<u8>)> {
        [0, 1].into_iter().filter_map(|parity| self.record(parity)).max_by_key(|(sequence, _)| *sequence)
    }

    /// The record in the area of this parity, if it lies there whole.
    fn record(&self, parity: u64) -> Option<(u64, Vec<u8>)> {
        let mut bytes = vec![0; HEAD];
        self.file.read_exact_at(&mut bytes, area(parity)).ok()?;
        let word = |at: usize| u64::from_le_bytes(bytes[8 * at..8 * (at + 1)].try_into().expect("eight bytes"));
        let (magic, layout, sequence, len) = (word(0), word(1), word(2), usize::try_from(word(3)).ok()?);
        if (magic, layout) != (MAGIC, LAYOUT) || sequence == 0 || AREA < HEAD.checked_add(len)? {
            return None;
        }
        bytes.resize(HEAD + len, 0);
        self.file.read_exact_at(&mut bytes[HEAD..], area(parity) + HEAD as u64).ok()?;
        let whole = bytes[32..HEAD] == digest(&bytes) && sequence % 2 == parity;
        whole.then(|| (sequence, bytes.split_off(HEAD)))
    }
}

impl Board {
    fn of(file: &File) -> io::Result<Self> {
        let size = NonZeroUsize::new(PAGE).expect("a page is not empty");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice. The file is sealed against shrinking, so that the
        // page stays; it is used as atomics only, and unmapped when the last user is gone.
        let page = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { page: page.cast() })
    }

    /// Until when the child has stopped what must be stopped.
    #[must_use]
    pub fn due(&self) -> Time {
        match self.page().due.load(Ordering::SeqCst) {
            0 => Time::NEVER, // Nobody has promised anything yet.
            due => Time(due),
        }
    }

    /// The child promises it.
    pub fn promise(&self, due: Time) {
        self.page().due.store(due.0.max(1), Ordering::SeqCst);
    }

    /// Since when a VM moves that was told to stand.
    #[must_use]
    pub fn moving(&self) -> Option<Time> {
        Some(self.page().moving.load(Ordering::SeqCst)).filter(|since| *since != 0).map(Time)
    }

    /// Tells it.
    pub fn tell_moving(&self, since: Option<Time>) {
        self.page().moving.store(since.map_or(0, |since| since.0.max(1)), Ordering::SeqCst);
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped as long as self, aligned to a page, and any bytes are valid atomics.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        // SAFETY: it was mapped with just this size, and self is its only user in this process.
        let _ = unsafe { munmap(self.page.cast::<c_void>(), PAGE) };
    }
}

/// Of all but the digest itself.
fn digest(bytes: &[u8]) -> [u8; 32] {
    let body = record::digest(&bytes[HEAD..]);
    record::digest(&[&bytes[..32], body.0.as_slice()].concat()).0
}

fn area(sequence: u64) -> u64 {
    PAGE as u64 + sequence % 2 * AREA as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(memory: &Memory) -> io::Result<Memory> {
        Memory::adopt(memory.fd().try_clone_to_owned()?)
    }

    #[test]
    fn the_newest_whole_record_counts() {
        let mut memory = Memory::new().unwrap();
        assert_eq!(memory.read(), None);
        for n in 1..20u8 {
            assert!(memory.write(&vec![n; usize::from(n) * 999]));
            let mut next = again(&memory).unwrap();
            assert_eq!((next.read(), next.sequence()), (Some(vec![n; usize::from(n) * 999]), u64::from(n)));
            // Another one goes on from there.
            assert!(next.write(&[0]));
            assert!(again(&memory).unwrap().read() == Some(vec![0]));
        }
    }

    #[test]
    fn a_torn_record_is_none_and_the_one_before_counts() {
        let mut memory = Memory::new().unwrap();
        let (old, new) = ([1; 5000], [2; 6000]);
        memory.write(&old);
        memory.write(&new);
        let at = area(memory.sequence);
        let mut whole = vec![0; HEAD + new.len()];
        memory.file.read_exact_at(&mut whole, at).unwrap();
        // The writer died after any number of bytes, or a byte is wrong.
        for cut in [0, 1, 8, 20, 40, HEAD, HEAD + 1, 4096, 6063] {
            memory.file.write_all_at(&[0; HEAD + 6000], at).unwrap();
            memory.file.write_all_at(&whole[..cut], at).unwrap();
            assert_eq!(again(&memory).unwrap().read(), Some(old.to_vec()), "{cut}");
            let mut wrong = whole.clone();
            wrong[cut] ^= 1;
            memory.file.write_all_at(&wrong, at).unwrap();
            assert_eq!(again(&memory).unwrap().read(), Some(old.to_vec()), "{cut}");
        }
        memory.file.write_all_at(&whole, at).unwrap();
        assert_eq!(again(&memory).unwrap().read(), Some(new.to_vec()));
    }

    #[test]
    fn another_layout_is_no_memory() {
        let mut memory = Memory::new().unwrap();
        memory.write(&[7; 100]);
        let at = area(memory.sequence);
        let mut bytes = vec![0; HEAD + 100];
        memory.file.read_exact_at(&mut bytes, at).unwrap();
        bytes[8..16].copy_from_slice(&(LAYOUT + 1).to_le_bytes());
        let digest = digest(&bytes);
        bytes[32..HEAD].copy_from_slice(&digest);
        memory.file.write_all_at(&bytes, at).unwrap();
        assert_eq!(again(&memory).unwrap().read(), None);
        assert!(Memory::adopt(tempfile::tempfile().unwrap().into()).is_err(), "any file");
    }

    #[test]
    fn what_does_not_fit_makes_it_void() {
        let mut memory = Memory::new().unwrap();
        memory.write(&[1]);
        assert!(!memory.write(&vec![1; AREA]));
        assert_eq!(memory.read(), None);
        memory.write(&[2]);
        assert_eq!(again(&memory).unwrap().read(), None, "for ever");
    }

    #[test]
    fn promises_are_seen_by_others() {
        let memory = Memory::new().unwrap();
        assert_eq!((memory.board().due(), memory.board().moving()), (Time::NEVER, None));
        memory.board().promise(Time(77));
        memory.board().tell_moving(Some(Time(5)));
        let other = again(&memory).unwrap();
        assert_eq!((other.board().due(), other.board().moving()), (Time(77), Some(Time(5))));
        memory.board().tell_moving(None);
        assert_eq!(other.board().moving(), None);
    }
}
