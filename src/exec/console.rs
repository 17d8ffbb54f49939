//! The end of a guest's serial console, in its file on this host.
//!
//! The file may lie on storage that hangs: each is read on a thread of its own, `MAX_READERS` at a time of one asker, hung ones
//! included; beyond that no console is read until one of them ends.
//!
//! Not here: what stands on it (`core::guests`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

use super::clock;
use crate::types::Time;

/// Bytes of a console that are kept.
pub const TAIL: u64 = 64 * 1024;
/// Files that are being read.
pub const MAX_READERS: usize = 16;

/// The end of a console's file.
#[derive(Debug)]
pub struct Tail {
    /// At most [`TAIL`].
    pub bytes: Vec<u8>,
    /// How long the whole file was.
    pub ends: u64,
    /// When it was last written; none = its clock says that this is still to come.
    pub written: Option<Time>,
}

impl Tail {
    /// What was written since the file was so long. All of it, if it is another file by now: a shorter one.
    #[must_use]
    pub fn since(&self, before: u64) -> &[u8] {
        let fresh = self.ends.checked_sub(before).and_then(|fresh| usize::try_from(fresh).ok()).unwrap_or(usize::MAX);
        &self.bytes[self.bytes.len().saturating_sub(fresh)..]
    }
}

/// Reads consoles; clones share their limit.
#[derive(Clone, Debug, Default)]
pub struct Consoles(Arc<AtomicUsize>);

impl Consoles {
    /// Reads the end of a console's file on a thread of its own; listen with a deadline.
    ///
    /// # Errors
    /// Too many hang already, or there is no thread.
    pub fn tail(&self, path: String) -> Result<Receiver<Result<Tail, String>>, String> {
        if MAX_READERS <= self.0.fetch_add(1, Ordering::Relaxed) {
            self.0.fetch_sub(1, Ordering::Relaxed);
            return Err(format!("the files of {MAX_READERS} consoles do not answer already"));
        }
        let (tell, told) = sync_channel(1);
        let count = Arc::clone(&self.0);
        let reading = std::thread::Builder::new().name("console".into()).spawn(move || {
            let read = read_tail(Path::new(&path)).map_err(|error| format!("{path}: {error}"));
            count.fetch_sub(1, Ordering::Relaxed);
            let _ = tell.send(read); // Nobody waits for a late one.
        });
        match reading {
            Ok(_) => Ok(told),
            Err(error) => {
                self.0.fetch_sub(1, Ordering::Relaxed);
                Err(format!("no thread: {error}"))
            }
        }
    }
}

fn read_tail(path: &Path) -> io::Result<Tail> {
    // Not blocking: a FIFO without a writer would hang.
    let file: File = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("no regular file"));
    }
    let mut bytes = vec![0; usize::try_from(metadata.len().min(TAIL)).unwrap_or(0)];
    let length = file.read_at(&mut bytes, metadata.len().saturating_sub(TAIL))?;
    bytes.truncate(length);
    let age = metadata.modified()?.elapsed().ok();
    let written = age.and_then(|age| clock::now().since(Time::ZERO).checked_sub(age)).map(|since| Time::ZERO + since);
    Ok(Tail { bytes, ends: metadata.len(), written })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_console_that_is_no_file_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, expected) in [
            (fifo.as_path(), "no regular file"),
            (folder.path(), "no regular file"),
            (&folder.path().join("none"), "No such file"),
        ] {
            let why = read_tail(path).unwrap_err().to_string();
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn a_console_says_what_is_of_this_boot() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        std::fs::write(&path, "Kernel panic - not syncing: old\n").unwrap();
        let before = read_tail(&path).unwrap().ends;
        std::fs::write(&path, "Kernel panic - not syncing: old\nup 1\n").unwrap();
        let tail = read_tail(&path).unwrap();
        assert_eq!(tail.since(before), b"up 1\n");
        assert_eq!(tail.since(tail.ends), b"");
        assert_eq!(tail.since(tail.ends + 1), tail.bytes, "another file");
        let long = Tail { bytes: b"tail".to_vec(), ends: 1 << 40, written: None };
        assert_eq!(long.since(7), b"tail", "more was written than is kept");
    }

    #[test]
    fn when_it_was_written_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let before = clock::now();
        std::fs::write(&path, "up 1\n").unwrap();
        let long = Duration::from_secs(60);
        let written = || read_tail(&path).unwrap().written;
        assert!(written().is_some_and(|at| at < clock::now() + long && before < at + long), "{:?}", written());
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::now() + long).unwrap();
        assert_eq!(written(), None, "a clock that is ahead of ours");
    }
}
