//! Whether disks can be read from this host: opened, and the beginning of each read past the page cache.
//!
//! ```text
//!   probe ──► own thread ──► open, a direct read of one block, of each path ──► all well, or the first that is not
//! ```
//!
//! An open that succeeds shows little: its answer may come from a cache. That a file is not for this agent's eyes (root is nobody on
//! many NFS servers) says that its server answers, and nothing of QEMU, which reads as another user: that counts as well.
//!
//! A look can hang for ever with its storage. Then the asker has its answer at the deadline, and the thread stays; at most 64 are kept.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use super::datastore::files::read_at;
use super::program::{self, Places};
use crate::wire::record::BLOCK;

/// Looks at the same time, hung ones included.
static LOOKS: Places = Places::new(64);

/// Looks on a thread of its own and answers exactly once, at `within` at the latest.
pub fn probe(paths: Vec<String>, within: Duration, answer: impl FnOnce(Result<(), String>) + Send + 'static) {
    let late = format!("no answer within {} ms", within.as_millis());
    let work = move || paths.iter().try_for_each(|path| look(Path::new(path)).map_err(|why| format!("{path}: {why}")));
    program::bounded(&LOOKS, "access", within, work, move |why| Err(why.unwrap_or(late)), answer);
}

fn look(path: &Path) -> Result<(), String> {
    match open(path) {
        Ok(file) => read_at(&file, path, 0, BLOCK).map(drop).map_err(|why| why.to_string()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Directly where the file system can.
fn open(path: &Path) -> io::Result<File> {
    let with =
        |flags| OpenOptions::new().read(true).custom_flags(flags | libc::O_CLOEXEC | libc::O_NONBLOCK).open(path);
    match with(libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => with(0),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_is_there_can_be_read_and_what_is_not_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("whole"), vec![7; 3 * BLOCK]).unwrap();
        std::fs::write(path("short"), b"7").unwrap();
        let said = |paths: &[&str]| {
            let (tell, told) = channel();
            let paths = paths.iter().map(|name| path(name)).collect();
            probe(paths, Duration::from_secs(10), move |result| tell.send(result).unwrap());
            told.recv().unwrap()
        };
        assert_eq!(said(&["whole", "short"]), Ok(()));
        assert_eq!(said(&[]), Ok(()));
        assert!(said(&["whole", "gone"]).unwrap_err().contains("gone: No such file"));
        assert!(said(&["."]).is_err(), "a folder is no disk");
    }
}
