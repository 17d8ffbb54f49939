//! The file in which this host remembers what it has done about guests (`core::guests::memory`).
//!
//! ```text
//!   save ──► one thread: the newest list ──► written beside, fsynced, renamed, the folder fsynced ──► told
//! ```
//!
//! One JSON document, `guests.json`, replaced whole. What cannot be read counts as nothing: then something may be done twice, and
//! nothing unsafe follows. A version that is not known is not read. Times are of one boot, whose id stands beside them: after
//! another one they mean nothing.
//!
//! Not here: what is remembered, and for how long.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use serde::{Deserialize, Serialize};

use crate::types::BootId;
use crate::types::guests::GuestMemory;

const FILE: &str = "guests.json";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    boot: BootId,
    #[serde(flatten)]
    memory: GuestMemory,
}

/// Writes the file. Its thread ends when this is dropped, or when a disk that hangs comes back.
pub struct Memory {
    lists: Sender<(u64, GuestMemory)>,
}

impl Memory {
    /// What the file in this folder holds, and who writes it from now on. `saved` is told each number, or a later one, when its list
    /// is on disk or could not be written; it should not block.
    ///
    /// # Errors
    /// Without a thread.
    pub fn open(folder: &Path, boot: BootId, saved: impl Fn(u64) + Send + 'static) -> io::Result<(Self, GuestMemory)> {
        let (lists, written) = channel::<(u64, GuestMemory)>();
        let to = folder.to_owned();
        std::thread::Builder::new().name("guest-memory".into()).spawn(move || {
            while let Ok(first) = written.recv() {
                let (number, memory) = written.try_iter().last().unwrap_or(first);
                if let Err(error) = write(&to, boot, memory) {
                    tracing::warn!("{}: {error}; after a restart something may be done twice", path(&to).display());
                }
                saved(number);
            }
        })?;
        Ok((Self { lists }, read(folder, boot)))
    }

    /// Replaces what was saved before.
    pub fn save(&self, number: u64, memory: GuestMemory) {
        let _ = self.lists.send((number, memory)); // Its thread lives as long as this.
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

fn write(folder: &Path, boot: BootId, memory: GuestMemory) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, &Document { version: VERSION, boot, memory })?;
    file.flush()?;
    file.as_file().sync_all()?;
    file.persist(path(folder)).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

fn read(folder: &Path, boot: BootId) -> GuestMemory {
    let bytes = match std::fs::read(path(folder)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return GuestMemory::default(),
        Err(error) => return ignored(folder, &error),
    };
    match serde_json::from_slice::<Document>(&bytes) {
        Ok(Document { version: VERSION, boot: then, memory }) if then == boot => memory,
        Ok(Document { version: VERSION, memory, .. }) => GuestMemory { remedies: Vec::new(), ..memory },
        Ok(document) => ignored(folder, &format!("version {} is not known", document.version)),
        Err(error) => ignored(folder, &error),
    }
}

fn ignored(folder: &Path, why: &dyn std::fmt::Display) -> GuestMemory {
    tracing::warn!("{}: {why}; it is ignored", path(folder).display());
    GuestMemory::default()
}

#[cfg(test)]
mod tests {
    use mainstay_guest::message::{ReportId, Verdict};

    use super::*;
    use crate::types::guests::{Answer, Remembered};
    use crate::types::{Time, VmId};

    const BOOT: BootId = BootId(uuid::Uuid::from_u128(3));

    fn one(n: u8) -> GuestMemory {
        let (vm, id) = (VmId(uuid::Uuid::from_u128(7)), ReportId([n; 16]));
        let reports = vec![Remembered { vm, id, answer: Answer::new(Verdict::Done, "reset") }];
        GuestMemory { reports, remedies: vec![(vm, vec![Time(5), Time(6)])] }
    }

    #[test]
    fn comes_back_as_written_in_this_form_and_junk_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (tell, saved) = channel();
        let open_at = |boot| {
            let tell = tell.clone();
            Memory::open(folder.path(), boot, move |number| tell.send(number).unwrap()).unwrap()
        };
        let open = || open_at(BOOT);
        let (memory, before) = open();
        assert_eq!(before, GuestMemory::default());
        memory.save(1, one(1));
        memory.save(2, one(2));
        while saved.recv().unwrap() != 2 {}
        assert_eq!(open().1, one(2));
        let other = open_at(BootId(uuid::Uuid::from_u128(4))).1;
        assert_eq!(other, GuestMemory { remedies: Vec::new(), ..one(2) }, "after a boot its times mean nothing");
        let (vm, id) = ("00000000-0000-0000-0000-000000000007", "[2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2]");
        let expected = format!(
            r#"{{"version":1,"boot":"00000000-0000-0000-0000-000000000003","reports":[{{"vm":"{vm}","id":{id},"answer":{{"verdict":"done","why":"reset"}}}}],"remedies":[["{vm}",[5,6]]]}}"#
        );
        let file = folder.path().join(FILE);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), expected);
        for junk in ["junk", r#"{"version":2,"reports":[]}"#, ""] {
            std::fs::write(&file, junk).unwrap();
            assert_eq!(open().1, GuestMemory::default(), "{junk}");
        }
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        memory.save(3, one(3));
        assert_eq!(saved.recv().unwrap(), 3, "also one that cannot be written is told");
    }
}
