//! Reports that wait, on disk, so that a reboot loses none. On a thread of its own: the disk may be what is broken.
//!
//! ```text
//!   the loop ── newest state of the queue ──► thread ── written beside, synced, renamed ──► Spooled(changes)
//! ```
//!
//! A report counts as accepted, towards its application, when it lies there, or when the host has answered it, whichever
//! comes first.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use mainstay_guest::message::Report;

use super::Happened;
use super::wake::Sender;

const NAME: &str = "reports";
/// A file that is longer is none of ours.
const MAX_FILE: u64 = 4 << 20;

/// The thread, and what it has not taken yet.
pub struct Spool {
    to: SyncSender<(u64, Vec<Report>)>,
    /// The newest state that was handed over.
    given: u64,
}

impl Spool {
    /// Starts the thread.
    ///
    /// # Errors
    /// There is none left.
    pub fn start(folder: &Path, tell: Sender) -> io::Result<Self> {
        let (to, from) = sync_channel(1);
        let folder = folder.to_owned();
        std::thread::Builder::new().name("spool".into()).spawn(move || run(&folder, &from, &tell))?;
        Ok(Self { to, given: 0 })
    }

    /// Hands the present state over, if it is new and the thread can take it; else with a later turn.
    pub fn keep<'r>(&mut self, changes: u64, reports: impl Iterator<Item = &'r Report>) {
        if changes == self.given {
            return;
        }
        match self.to.try_send((changes, reports.cloned().collect())) {
            Ok(()) => self.given = changes,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}

fn run(folder: &Path, from: &Receiver<(u64, Vec<Report>)>, tell: &Sender) {
    let mut told = false;
    for (changes, reports) in from {
        match write(folder, &reports) {
            Ok(()) => tell.send(Happened::Spooled(changes)),
            Err(why) if !std::mem::replace(&mut told, true) => tell.send(Happened::SpoolFails(why.to_string())),
            Err(_) => true,
        };
    }
}

fn write(folder: &Path, reports: &[Report]) -> io::Result<()> {
    let path = folder.join(NAME);
    if reports.is_empty() {
        return match fs::remove_file(path) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => Err(why),
            _ => Ok(()),
        };
    }
    fs::create_dir_all(folder)?;
    let beside = folder.join(format!("{NAME}.new"));
    let bytes = postcard::to_stdvec(reports).map_err(io::Error::other)?;
    let mut file = File::create(&beside)?;
    file.write_all(&crc32fast::hash(&bytes).to_le_bytes())?;
    file.write_all(&bytes)?;
    file.sync_data()?;
    fs::rename(&beside, &path)?;
    File::open(folder)?.sync_all()
}

/// What an earlier program has left; of a damaged file nothing, and why.
///
/// # Errors
/// It cannot be read, or is damaged: it is put aside.
pub fn read(folder: &Path) -> Result<Vec<Report>, String> {
    let path: PathBuf = folder.join(NAME);
    let bytes = match fs::metadata(&path) {
        Ok(data) if MAX_FILE < data.len() => Err("longer than any that was written here".to_owned()),
        Ok(_) => fs::read(&path).map_err(|why| why.to_string()),
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(why) => Err(why.to_string()),
    };
    let reports = bytes.and_then(|bytes| {
        let (check, body) = bytes.split_first_chunk().ok_or("too short")?;
        if crc32fast::hash(body) != u32::from_le_bytes(*check) {
            return Err("damaged".to_owned());
        }
        postcard::from_bytes::<Vec<Report>>(body).map_err(|why| why.to_string())
    });
    reports.map_err(|why| {
        let _ = fs::rename(&path, folder.join(format!("{NAME}.bad")));
        format!("{}: {why}; it is put aside as {NAME}.bad", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_guest::message::{ReportId, Severity, Wish};

    #[test]
    fn what_waits_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let folder = &folder.path().join("lib");
        assert_eq!(read(folder), Ok(Vec::new()));
        let (kind, message) = ("app/x".to_owned(), "m".to_owned());
        let (id, severity, wish) = (ReportId([3; 16]), Severity::Info, Wish::ResetVm("db".to_owned()));
        let report = Report { id, sequence: 9, boot: [1; 16], severity, kind, message, wish };
        write(folder, std::slice::from_ref(&report)).unwrap();
        assert_eq!(read(folder), Ok(vec![report]));
        let path = folder.join(NAME);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(read(folder).unwrap_err().contains("damaged"));
        assert_eq!(read(folder), Ok(Vec::new()), "put aside");
        write(folder, &[]).unwrap();
    }
}
