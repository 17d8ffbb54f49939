//! The local store (sled): only what can be rebuilt, recent notes, tickets, the last view. Nothing that safety needs.
//!
//! ```text
//!            ┌── open: panics, errors, strange entries, fewer notes than the mark says ──┐
//!            ▼                                                                           ▼
//!   store ─ in use ── a call panics or fails ──► renamed to store.aside (one is kept) ── fresh and empty
//!            │                                                                           └► a line for people
//!            └── sync: sled's flush, then fsync of its file, then the mark
//! ```
//!
//! sled's own `flush` does not fsync, half a file opens silently with half the entries, and some damage panics: so
//! every call runs under `catch_unwind`, and the mark (number of the newest note that was synced, in a file beside it)
//! shows what is missing.
//!
//! Rules in numbers: at most `KEPT` entries per table, the oldest go first; cache `CACHE_BYTES`; an entry has at most
//! `MAX_ENTRY_BYTES`. Calls block on the disk: they belong on a thread of their own.

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Entries kept per table.
pub const KEPT: u64 = 10_000;
/// Longer entries are not stored: they would make sled's segments large.
pub const MAX_ENTRY_BYTES: usize = 16 * 1024;
/// sled's page cache; its default is 1 GiB.
const CACHE_BYTES: u64 = 1024 * 1024;
/// sled's write buffer; its default is 512 KiB, of which it holds a few.
const SEGMENT_BYTES: usize = 64 * 1024;
/// Tidying begins when a table has this many more than `KEPT`, so that it is not done at each entry.
const SLACK: u64 = 256;

/// sled's own threads hold the lock for a moment after it was closed: 2 s in all.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);
const LOCKED: &str = "another process has it open";
const FOLDER: &str = "store";
const ASIDE: &str = "store.aside";
const MARK: &str = "store.mark";

/// What an entry is. Each has a numbering of its own, which only rises.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Table {
    /// Notes, JSON.
    Notes,
    /// Answers by ticket.
    Tickets,
}

impl Table {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Notes => b"notes",
            Self::Tickets => b"tickets",
        }
    }
}

/// Why an entry was not stored or read. After `Broken` the store is fresh and empty.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The entry is longer than `MAX_ENTRY_BYTES`.
    #[error("an entry of {len} bytes is too long for the local store")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// It was set aside and begun anew; the line is for people.
    #[error("{0}")]
    Broken(String),
    /// It cannot even be begun anew: no disk, no rights.
    #[error("{path}: the local store cannot be used: {why}")]
    Unusable {
        /// Its folder.
        path: PathBuf,
        /// The cause.
        why: String,
    },
}

/// An open store.
pub struct Store {
    folder: PathBuf,
    open: Option<Open>,
}

struct Open {
    db: sled::Db,
    notes: Numbered,
    tickets: Numbered,
}

struct Numbered {
    tree: sled::Tree,
    /// Number of the newest entry; 0 = none yet.
    newest: u64,
    /// Number of the oldest.
    oldest: u64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({}, {})", self.folder.display(), if self.open.is_some() { "open" } else { "unusable" })
    }
}

impl Store {
    /// Opens the store in this folder. The line, if any, says what was lost, and is for people.
    ///
    /// # Errors
    /// `Unusable` when it cannot be begun anew either.
    pub fn open(folder: &Path) -> Result<(Self, Option<String>), StoreError> {
        let mut store = Self { folder: folder.to_owned(), open: None };
        if let Err(error) = fs::create_dir_all(folder) {
            return Err(store.unusable(error.to_string()));
        }
        let mut opened = guarded(|| Open::at(folder));
        for _ in 0..LOCK_TRIES {
            if !matches!(&opened, Err(why) if why == LOCKED) {
                break;
            }
            std::thread::sleep(LOCK_PAUSE);
            opened = guarded(|| Open::at(folder));
        }
        let said = match opened {
            Ok(open) => {
                store.open = Some(open);
                None
            }
            Err(why) => Some(store.begin_anew(&why)?),
        };
        Ok((store, said))
    }

    /// Appends an entry; it is durable after the next `sync`.
    ///
    /// # Errors
    /// See [`StoreError`]; the entry is not stored then.
    pub fn append(&mut self, table: Table, entry: &[u8]) -> Result<(), StoreError> {
        if MAX_ENTRY_BYTES < entry.len() {
            return Err(StoreError::TooLong { len: entry.len() });
        }
        self.with(|open| open.table(table).append(entry))
    }

    /// All entries of a table, oldest first.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn all(&mut self, table: Table) -> Result<Vec<Vec<u8>>, StoreError> {
        self.with(|open| {
            let entries = open.table(table).tree.iter().values();
            entries.map(|entry| entry.map(|bytes| bytes.to_vec()).map_err(|error| error.to_string())).collect()
        })
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn sync(&mut self) -> Result<(), StoreError> {
        let folder = self.folder.clone();
        self.with(|open| open.sync(&folder))
    }

    /// What an entry says makes no sense: the store is not to be trusted. Sets it aside.
    ///
    /// # Errors
    /// `Broken` always, or `Unusable`.
    pub fn doubt(&mut self, why: &str) -> StoreError {
        let open = self.open.take();
        // Closing it may panic, too; what it would still write is thrown away anyhow.
        let _ = guarded(|| {
            drop(open);
            Ok(())
        });
        self.begin_anew(why).map_or_else(|error| error, StoreError::Broken)
    }

    fn with<T>(&mut self, work: impl FnOnce(&mut Open) -> Result<T, String>) -> Result<T, StoreError> {
        let Some(open) = &mut self.open else { return Err(self.unusable("it failed before".to_owned())) };
        match guarded(|| work(open)) {
            Ok(done) => Ok(done),
            Err(why) => Err(self.doubt(&why)),
        }
    }

    /// Renames what is there and opens an empty store.
    fn begin_anew(&mut self, why: &str) -> Result<String, StoreError> {
        if why == LOCKED {
            return Err(self.unusable(why.to_owned())); // Not damaged: another process uses it.
        }
        let (store, aside) = (self.folder.join(FOLDER), self.folder.join(ASIDE));
        let moved = fs::remove_dir_all(&aside).or_else(ignore_missing).and_then(|()| fs::rename(&store, &aside));
        if let Err(error) = moved.or_else(ignore_missing) {
            return Err(self.unusable(format!("{why}; it cannot be set aside: {error}")));
        }
        if let Err(error) = fs::remove_file(self.folder.join(MARK)).or_else(ignore_missing) {
            return Err(self.unusable(error.to_string()));
        }
        match guarded(|| Open::at(&self.folder)) {
            Ok(open) => {
                self.open = Some(open);
                Ok(format!(
                    "the local store was damaged ({why}); it was set aside as {} and begun anew",
                    aside.display()
                ))
            }
            Err(again) => Err(self.unusable(format!("{why}; and again after it was set aside: {again}"))),
        }
    }

    fn unusable(&self, why: String) -> StoreError {
        StoreError::Unusable { path: self.folder.clone(), why }
    }
}

impl Open {
    fn at(folder: &Path) -> Result<Self, String> {
        let config = sled::Config::new()
            .path(folder.join(FOLDER))
            .cache_capacity(CACHE_BYTES)
            .segment_size(SEGMENT_BYTES)
            .mode(sled::Mode::LowSpace)
            // Nothing is written while nothing happens.
            .flush_every_ms(None);
        let db = config.open().map_err(|error| match &error {
            sled::Error::Io(io) if io.to_string().contains("acquire lock") => LOCKED.to_owned(),
            _ => error.to_string(),
        })?;
        let notes = Numbered::open(&db, Table::Notes)?;
        let tickets = Numbered::open(&db, Table::Tickets)?;
        let marked = match fs::read_to_string(folder.join(MARK)) {
            // A power loss can leave it empty; then nothing can be said.
            Ok(text) if text.trim().is_empty() => 0,
            Ok(text) => text.trim().parse::<u64>().map_err(|error| format!("its mark cannot be read: {error}"))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(format!("its mark cannot be read: {error}")),
        };
        if notes.newest < marked {
            return Err(format!("note {marked} was stored, the newest found is {}", notes.newest));
        }
        Ok(Self { db, notes, tickets })
    }

    fn table(&mut self, table: Table) -> &mut Numbered {
        match table {
            Table::Notes => &mut self.notes,
            Table::Tickets => &mut self.tickets,
        }
    }

    fn sync(&mut self, folder: &Path) -> Result<(), String> {
        self.db.flush().map_err(|error| error.to_string())?;
        let sync = |path: PathBuf| fs::File::open(path)?.sync_all();
        let marked = sync(folder.join(FOLDER).join("db")).and_then(|()| {
            // Only after the store: a mark ahead of it would be taken for damage.
            let mut mark = tempfile::NamedTempFile::new_in(folder)?;
            writeln!(mark, "{}", self.notes.newest)?;
            mark.persist(folder.join(MARK)).map_err(|error| error.error)?;
            Ok(())
        });
        marked.map_err(|error| error.to_string())
    }
}

impl Numbered {
    fn open(db: &sled::Db, table: Table) -> Result<Self, String> {
        let tree = db.open_tree(table.name()).map_err(|error| error.to_string())?;
        let number = |entry: sled::Result<Option<(sled::IVec, sled::IVec)>>| match entry {
            Ok(None) => Ok(0),
            Ok(Some((key, _))) => {
                let key: [u8; 8] = key.as_ref().try_into().map_err(|_| "a key of a strange length".to_owned())?;
                Ok(u64::from_be_bytes(key))
            }
            Err(error) => Err(error.to_string()),
        };
        let (newest, oldest) = (number(tree.last())?, number(tree.first())?);
        Ok(Self { tree, newest, oldest })
    }

    fn append(&mut self, entry: &[u8]) -> Result<(), String> {
        let number = self.newest + 1;
        self.tree.insert(number.to_be_bytes(), entry).map_err(|error| error.to_string())?;
        self.newest = number;
        self.oldest = self.oldest.max(1);
        if KEPT + SLACK <= self.newest - self.oldest {
            while KEPT <= self.newest - self.oldest {
                self.tree.remove(self.oldest.to_be_bytes()).map_err(|error| error.to_string())?;
                self.oldest += 1;
            }
        }
        Ok(())
    }
}

fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Runs a call into sled; a panic becomes an error. What was touched is thrown away after an error, so nothing half
/// done is ever seen.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("it panicked: {}", said.unwrap_or("no reason given")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::scratch::Scratch;

    fn filled(folder: &Path, count: usize) {
        let (mut store, said) = Store::open(folder).unwrap();
        assert_eq!(said, None);
        for number in 0..count {
            store.append(Table::Notes, format!("note {number}").as_bytes()).unwrap();
        }
        store.sync().unwrap();
    }

    fn notes(folder: &Path) -> (Vec<Vec<u8>>, Option<String>) {
        let (mut store, said) = Store::open(folder).unwrap();
        (store.all(Table::Notes).unwrap(), said)
    }

    #[test]
    fn what_was_synced_is_there_again() {
        let folder = Scratch::new();
        filled(folder.path(), 100);
        filled(folder.path(), 1);
        let (all, said) = notes(folder.path());
        assert_eq!((all.len(), said), (101, None));
        assert_eq!(all[99], b"note 99");
        assert_eq!(all[100], b"note 0");
    }

    #[test]
    fn the_oldest_go_first() {
        let folder = Scratch::new();
        let (mut store, _) = Store::open(folder.path()).unwrap();
        for number in 0..KEPT + 2 * SLACK {
            store.append(Table::Tickets, &number.to_be_bytes()).unwrap();
        }
        let all = store.all(Table::Tickets).unwrap();
        let count = u64::try_from(all.len()).unwrap();
        assert!((KEPT..=KEPT + SLACK).contains(&count), "{count}");
        assert_eq!(*all.last().unwrap(), (KEPT + 2 * SLACK - 1).to_be_bytes());
        assert!(matches!(store.append(Table::Notes, &[0; MAX_ENTRY_BYTES + 1]), Err(StoreError::TooLong { .. })));
    }

    /// Cut at every so many bytes, overwritten, removed: it opens, empty with a line or whole without one.
    #[test]
    fn damage_is_noticed_and_costs_only_the_store() {
        let fresh = Scratch::new();
        filled(fresh.path(), 300);
        let whole = fs::read(fresh.path().join("store/db")).unwrap();
        let mut damages: Vec<Vec<u8>> = (0..8).map(|part| whole[..whole.len() * part / 8].to_vec()).collect();
        for start in [0, 40, whole.len() / 4, whole.len() / 2] {
            let mut bad = whole.clone();
            bad[start..start + 512.min(whole.len() - start)].fill(0xa5);
            damages.push(bad);
        }
        for (case, damage) in damages.into_iter().enumerate() {
            fs::write(fresh.path().join("store/db"), damage).unwrap();
            let (all, said) = notes(fresh.path());
            if all.len() == 300 {
                continue; // The damage hit nothing that was in use.
            }
            assert!(said.unwrap().contains("set aside"), "case {case}");
            assert!(all.is_empty() && fresh.path().join(ASIDE).exists(), "case {case}");
            filled(fresh.path(), 300);
            assert_eq!(notes(fresh.path()).0.len(), 300, "case {case}: works again");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_used_is_told() {
        let folder = Scratch::new();
        fs::write(folder.path().join("file"), "").unwrap();
        assert!(matches!(Store::open(&folder.path().join("file")), Err(StoreError::Unusable { .. })));
    }

    #[test]
    fn a_store_in_use_is_left_alone() {
        let folder = Scratch::new();
        filled(folder.path(), 3);
        let (first, _) = Store::open(folder.path()).unwrap();
        assert!(matches!(Store::open(folder.path()), Err(StoreError::Unusable { why, .. }) if why == LOCKED));
        drop(first);
        assert!(!folder.path().join(ASIDE).exists());
    }

    #[test]
    fn doubt_sets_it_aside() {
        let folder = Scratch::new();
        filled(folder.path(), 3);
        let (mut store, _) = Store::open(folder.path()).unwrap();
        assert!(matches!(store.doubt("an entry is no note"), StoreError::Broken(_)));
        assert!(store.all(Table::Notes).unwrap().is_empty());
        store.append(Table::Notes, b"new").unwrap();
    }
}
