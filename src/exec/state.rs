//! Small local files that safety needs: two slots, written alternately.
//!
//! ```text
//!   0               4096              8192
//!   ├── slot 0 ──────┼── slot 1 ───────┤     each: envelope of wire/record.rs around (sequence, body)
//!
//!   write: slot that does not hold the newest ─► fdatasync.   read: the valid slot with the highest sequence
//! ```
//!
//! A crash in the middle of a write tears one slot at most, and the other still holds what was acknowledged. If none can
//! be read the answer is [`Read::Unknown`], never a default: what was once promised is then not known.
//!
//! Deliberately not here: what to do when it is unknown (design 10, Local state).

use std::fs::{File, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::types::{HostId, Incarnation, Sequence};
use crate::wire::record::{self, BLOCK, BadRecord, Kind};

/// What the guard must know after a restart. In `/var/lib/mainstay/host.state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostState {
    /// This host, once it belongs to a cluster.
    pub host: Option<HostId>,
    /// The highest that any guard here has used, or is about to use.
    pub incarnation: Incarnation,
}

/// What a state file says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Read<T> {
    /// The newest that was written.
    Known(T),
    /// New, or no slot can be read.
    Unknown {
        /// For people.
        why: String,
    },
}

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Of the system.
    #[error("{}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The body does not fit into a slot.
    #[error("{}: {why}", .path.display())]
    Body {
        /// The file.
        path: PathBuf,
        /// Why.
        why: BadRecord,
    },
}

/// One such file. One process writes it; the body's type is part of its format.
pub struct StateFile<T> {
    file: File,
    path: PathBuf,
    body: PhantomData<fn() -> T>,
}

/// A slot as it lies there.
type Slot<T> = Result<(Sequence, T), BadRecord>;

impl<T: Serialize + DeserializeOwned> StateFile<T> {
    /// Opens the file; makes it, durably, if it is not there. Its folder must exist.
    ///
    /// # Errors
    /// Of the system.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let fail = |error| StateError::Io { path: path.to_owned(), error };
        let open = |options: &mut OpenOptions| options.read(true).write(true).mode(0o600).open(path);
        let file = match open(OpenOptions::new().create_new(true)) {
            Ok(file) => {
                // Both slots exist from now on, so that a full disk cannot stop a write.
                file.write_all_at(&[0; 2 * BLOCK], 0).and_then(|()| file.sync_all()).map_err(fail)?;
                file
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                open(OpenOptions::new().create(false)).map_err(fail)?
            }
            Err(error) => return Err(fail(error)),
        };
        // Also when it was there: whoever made it may have died before this.
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail)?;
        Ok(Self { file, path: path.to_owned(), body: PhantomData })
    }

    /// What was written last.
    ///
    /// # Errors
    /// Of the system. A damaged file is no error but [`Read::Unknown`].
    pub fn read(&self) -> Result<Read<T>, StateError> {
        let slots = self.slots()?;
        let whys: Vec<_> = slots.iter().filter_map(|slot| slot.as_ref().err().map(ToString::to_string)).collect();
        let newest = slots.into_iter().flatten().max_by_key(|(sequence, _)| *sequence);
        let unknown = || Read::Unknown { why: format!("{}: slots are {}", self.path.display(), whys.join(" and ")) };
        Ok(newest.map_or_else(unknown, |(_, body)| Read::Known(body)))
    }

    /// Writes durably, beside what was written last.
    ///
    /// # Errors
    /// Of the system: then either the old or the new state is read next. `Body` if it exceeds 4 KiB: nothing was written.
    pub fn write(&mut self, body: &T) -> Result<(), StateError> {
        let slots = self.slots()?;
        let newest = |slot: &Slot<T>| slot.as_ref().ok().map(|(sequence, _)| *sequence);
        let [first, second] = [newest(&slots[0]), newest(&slots[1])];
        let target = usize::from(second < first);
        let sequence = first.max(second).unwrap_or_default().next();
        let bytes = record::seal(Kind::State, &(sequence, body), BLOCK)
            .map_err(|why| StateError::Body { path: self.path.clone(), why })?;
        self.file
            .write_all_at(&bytes, (target * BLOCK) as u64)
            .and_then(|()| self.file.sync_data())
            .map_err(|error| self.failed(error))
    }

    fn slots(&self) -> Result<[Slot<T>; 2], StateError> {
        let mut bytes = Vec::new();
        let mut at = 0;
        // A file that is too short has slots that are cut off, nothing worse.
        while bytes.len() < 2 * BLOCK {
            let mut chunk = [0; BLOCK];
            match self.file.read_at(&mut chunk, at) {
                Ok(0) => break,
                Ok(read) => {
                    bytes.extend_from_slice(&chunk[..read]);
                    at += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        let slot = |n: usize| {
            let from = (n * BLOCK).min(bytes.len());
            record::open::<(Sequence, T)>(Kind::State, &bytes[from..bytes.len().min(from + BLOCK)])
        };
        Ok([slot(0), slot(1)])
    }

    fn failed(&self, error: io::Error) -> StateError {
        StateError::Io { path: self.path.clone(), error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(n: u64) -> HostState {
        HostState { host: Some(HostId(uuid::Uuid::from_u128(7))), incarnation: Incarnation(n) }
    }

    #[test]
    fn keeps_the_newest_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.state");
        assert!(matches!(StateFile::<HostState>::open(&path).unwrap().read().unwrap(), Read::Unknown { .. }));
        for n in 1..10 {
            let mut file = StateFile::open(&path).unwrap();
            file.write(&state(n)).unwrap();
            assert_eq!(StateFile::open(&path).unwrap().read().unwrap(), Read::Known(state(n)));
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 * BLOCK as u64);
    }

    #[test]
    fn a_torn_write_leaves_what_was_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.state");
        let mut file = StateFile::open(&path).unwrap();
        for n in 1..6 {
            file.write(&state(n)).unwrap();
            let whole = std::fs::read(&path).unwrap();
            file.write(&state(n + 1)).unwrap();
            let next = std::fs::read(&path).unwrap();
            // Any prefix of the second write, and a junk byte in it, still gives the first.
            let changed: Vec<_> = (0..whole.len()).filter(|at| whole[*at] != next[*at]).collect();
            let torn = &changed[..changed.len() / 2];
            let mut bytes = whole.clone();
            torn.iter().for_each(|at| bytes[*at] = next[*at]);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(StateFile::open(&path).unwrap().read().unwrap(), Read::Known(state(n)));
            std::fs::write(&path, &whole).unwrap();
            file = StateFile::open(&path).unwrap();
        }
    }

    #[test]
    fn unreadable_is_unknown_and_can_be_written_again() {
        for bytes in [vec![], vec![0; 100], vec![0xa5; 2 * BLOCK], vec![0; 2 * BLOCK], vec![1; 3 * BLOCK]] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("host.state");
            std::fs::write(&path, &bytes).unwrap();
            let mut file = StateFile::open(&path).unwrap();
            assert!(matches!(file.read().unwrap(), Read::Unknown { .. }), "{}", bytes.len());
            file.write(&state(3)).unwrap();
            assert_eq!(StateFile::open(&path).unwrap().read().unwrap(), Read::Known(state(3)));
        }
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let path = Path::new("/nonexistent-folder/host.state");
        let error = StateFile::<HostState>::open(path).err().unwrap();
        assert!(error.to_string().contains("/nonexistent-folder/host.state"), "{error}");
    }
}
