//! The file in which this host remembers for which reports of guests something was begun or done (`core::guests::memory`).
//!
//! ```text
//!   save ──► one thread: the newest list ──► written beside, fsynced, renamed, the folder fsynced ──► told
//! ```
//!
//! One JSON document, `guests.json`, replaced whole. What cannot be read counts as nothing: then something may be done twice, and
//! nothing unsafe follows. A version that is not known is not read.
//!
//! Not here: what is remembered, and for how long.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use serde::{Deserialize, Serialize};

use crate::types::guests::Remembered;

const FILE: &str = "guests.json";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    reports: Vec<Remembered>,
}

/// Writes the file. Its thread ends when this is dropped, or when a disk that hangs comes back.
pub struct Memory {
    lists: Sender<(u64, Vec<Remembered>)>,
}

impl Memory {
    /// What the file in this folder holds, and who writes it from now on. `saved` is told each number, or a later one, when its list
    /// is on disk or could not be written; it should not block.
    ///
    /// # Errors
    /// Without a thread.
    pub fn open(folder: &Path, saved: impl Fn(u64) + Send + 'static) -> io::Result<(Self, Vec<Remembered>)> {
        let (lists, written) = channel::<(u64, Vec<Remembered>)>();
        let to = folder.to_owned();
        std::thread::Builder::new().name("guest-memory".into()).spawn(move || {
            while let Ok(first) = written.recv() {
                let (number, reports) = written.try_iter().last().unwrap_or(first);
                if let Err(error) = write(&to, reports) {
                    tracing::warn!("{}: {error}; after a restart something may be done twice", path(&to).display());
                }
                saved(number);
            }
        })?;
        Ok((Self { lists }, read(folder)))
    }

    /// Replaces what was saved before.
    pub fn save(&self, number: u64, list: Vec<Remembered>) {
        let _ = self.lists.send((number, list)); // Its thread lives as long as this.
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

fn write(folder: &Path, reports: Vec<Remembered>) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, &Document { version: VERSION, reports })?;
    file.flush()?;
    file.as_file().sync_all()?;
    file.persist(path(folder)).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

fn read(folder: &Path) -> Vec<Remembered> {
    let bytes = match std::fs::read(path(folder)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return ignored(folder, &error),
    };
    match serde_json::from_slice::<Document>(&bytes) {
        Ok(document) if document.version == VERSION => document.reports,
        Ok(document) => ignored(folder, &format!("version {} is not known", document.version)),
        Err(error) => ignored(folder, &error),
    }
}

fn ignored(folder: &Path, why: &dyn std::fmt::Display) -> Vec<Remembered> {
    tracing::warn!("{}: {why}; it is ignored", path(folder).display());
    Vec::new()
}

#[cfg(test)]
mod tests {
    use mainstay_guest::message::{ReportId, Verdict};

    use super::*;
    use crate::types::VmId;
    use crate::types::guests::Answer;

    fn one(n: u8) -> Remembered {
        let (vm, id) = (VmId(uuid::Uuid::from_u128(7)), ReportId([n; 16]));
        Remembered { vm, id, answer: Answer::new(Verdict::Done, "reset") }
    }

    #[test]
    fn comes_back_as_written_in_this_form_and_junk_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (tell, saved) = channel();
        let open = || {
            let tell = tell.clone();
            Memory::open(folder.path(), move |number| tell.send(number).unwrap()).unwrap()
        };
        let (memory, before) = open();
        assert_eq!(before, []);
        memory.save(1, vec![one(1)]);
        memory.save(2, vec![one(2)]);
        while saved.recv().unwrap() != 2 {}
        assert_eq!(open().1, [one(2)]);
        let id = "[2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2]";
        let expected = format!(
            r#"{{"version":1,"reports":[{{"vm":"00000000-0000-0000-0000-000000000007","id":{id},"answer":{{"verdict":"done","why":"reset"}}}}]}}"#
        );
        let file = folder.path().join(FILE);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), expected);
        for junk in ["junk", r#"{"version":2,"reports":[]}"#, ""] {
            std::fs::write(&file, junk).unwrap();
            assert_eq!(open().1, [], "{junk}");
        }
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        memory.save(3, vec![one(3)]);
        assert_eq!(saved.recv().unwrap(), 3, "also one that cannot be written is told");
    }
}
