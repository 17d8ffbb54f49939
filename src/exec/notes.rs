//! The note book: what happened lately on this host and was told to people.
//!
//! ```text
//!  agent.rs ── add ──► ring in memory (KEPT) ──► since, merge: answers to people and other agents
//!                 ├──► broadcast ──► D-Bus signals
//!                 └──► queue ──► thread "notes" ── exec/store.rs (sled), synced when the queue is empty
//! ```
//!
//! Rules in numbers: `KEPT` notes in memory and about as many stored; at most `QUEUED` wait for the disk, further ones
//! are only kept in memory; a text is cut at `MAX_TEXT_BYTES`. Adding never waits and never fails: with a broken or
//! full disk notes live in memory, and one note says so.
//!
//! Deliberately not here: the notes of other hosts (the agent asks them when somebody asks it), and the journal (every
//! note is also a log line, which the agent writes).

use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc;

use tokio::sync::broadcast;

use super::store::{Store, StoreError, Table};
use crate::types::view::NoteView;

/// Notes kept in memory.
pub const KEPT: usize = 10_000;
/// Notes that may wait for the disk.
const QUEUED: usize = 1_000;
/// Notes that a slow D-Bus may be behind; then it misses the oldest.
const SIGNALLED: usize = 256;
/// Longest text of a note.
const MAX_TEXT_BYTES: usize = 1_000;

/// All recent notes of this host.
#[derive(Debug)]
pub struct NoteBook {
    ring: VecDeque<NoteView>,
    signals: broadcast::Sender<NoteView>,
    to_disk: Option<mpsc::SyncSender<NoteView>>,
    from_disk: Option<mpsc::Receiver<FromDisk>>,
}

/// What the thread tells.
enum FromDisk {
    /// Notes of an earlier run, oldest first.
    Stored(Vec<NoteView>),
    /// A line for people: what is wrong with the store.
    Trouble(String),
}

impl NoteBook {
    /// A book without a disk.
    #[must_use]
    pub fn in_memory() -> Self {
        Self { ring: VecDeque::new(), signals: broadcast::channel(SIGNALLED).0, to_disk: None, from_disk: None }
    }

    /// A book that is also kept in `folder`. Returns at once; what is stored there appears when the thread has read it
    /// (see [`poll`](Self::poll)).
    #[must_use]
    pub fn open(folder: &Path) -> Self {
        let mut book = Self::in_memory();
        let (to_disk, notes) = mpsc::sync_channel(QUEUED);
        let (told, from_disk) = mpsc::channel();
        let folder = folder.to_owned();
        let thread = std::thread::Builder::new().name("notes".to_owned()).spawn(move || keep(&folder, &notes, &told));
        match thread {
            Ok(_) => (book.to_disk, book.from_disk) = (Some(to_disk), Some(from_disk)),
            Err(error) => tracing::warn!("notes are kept in memory only: no thread: {error}"),
        }
        book
    }

    /// Takes in what the disk has answered; lines of trouble are for the agent to make notes of. Never waits. Call it
    /// now and then, and before answering `Notes`.
    pub fn poll(&mut self) -> Vec<String> {
        let mut troubles = Vec::new();
        let Some(from_disk) = &self.from_disk else { return troubles };
        while let Ok(told) = from_disk.try_recv() {
            match told {
                FromDisk::Trouble(line) => troubles.push(line),
                FromDisk::Stored(stored) => {
                    let room = KEPT.saturating_sub(self.ring.len());
                    for note in stored.into_iter().rev().take(room) {
                        self.ring.push_front(note);
                    }
                }
            }
        }
        troubles
    }

    /// Adds a note. Never waits.
    pub fn add(&mut self, mut note: NoteView) {
        cut(&mut note.text);
        if self.ring.len() == KEPT {
            self.ring.pop_front();
        }
        self.ring.push_back(note.clone());
        if let Some(to_disk) = &self.to_disk {
            // Full: the disk is slower than the notes. Memory has it; nothing else is lost.
            let _ = to_disk.try_send(note.clone());
        }
        // Nobody listens: nothing to do.
        let _ = self.signals.send(note);
    }

    /// Notes not older than this clock-of-day time, of a VM and a host (by name) or of all; oldest first.
    #[must_use]
    pub fn since(&self, unix_ms: u64, vm: Option<&str>, host: Option<&str>) -> Vec<NoteView> {
        let wanted = |note: &&NoteView| {
            unix_ms <= note.unix_ms
                && vm.is_none_or(|vm| note.vm.as_deref() == Some(vm))
                && host.is_none_or(|host| note.host == host)
        };
        self.ring.iter().filter(wanted).cloned().collect()
    }

    /// Every note from now on, for D-Bus.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<NoteView> {
        self.signals.subscribe()
    }
}

/// One list out of those of several hosts: by time, each note once, the newest `KEPT`.
#[must_use]
pub fn merge(lists: Vec<Vec<NoteView>>) -> Vec<NoteView> {
    let mut all: Vec<NoteView> = lists.into_iter().flatten().collect();
    all.sort_by(|a, b| {
        (a.unix_ms, &a.host, &a.kind, &a.vm, &a.text).cmp(&(b.unix_ms, &b.host, &b.kind, &b.vm, &b.text))
    });
    all.dedup();
    all.drain(..all.len().saturating_sub(KEPT));
    all
}

fn cut(text: &mut String) {
    if MAX_TEXT_BYTES < text.len() {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        text.push('…');
    }
}

/// The thread: reads what is stored, then stores what comes, until the book is gone.
fn keep(folder: &Path, notes: &mpsc::Receiver<NoteView>, told: &mpsc::Sender<FromDisk>) {
    // The book may be gone; then nobody needs the line.
    let trouble = |line: String| drop(told.send(FromDisk::Trouble(line)));
    let mut store = match Store::open(folder) {
        Ok((store, said)) => {
            said.into_iter().for_each(trouble);
            store
        }
        Err(error) => return trouble(format!("{error}; notes are kept in memory only")),
    };
    match stored(&mut store) {
        Ok(stored) => drop(told.send(FromDisk::Stored(stored))),
        Err(error) => trouble(error.to_string()),
    }
    while let Ok(note) = notes.recv() {
        let mut kept = append(&mut store, &note);
        while let Ok(note) = notes.try_recv() {
            kept = kept.and(append(&mut store, &note));
        }
        match kept.and_then(|()| store.sync()) {
            Ok(()) => {}
            Err(error @ StoreError::Unusable { .. }) => {
                return trouble(format!("{error}; notes are kept in memory only"));
            }
            Err(error @ (StoreError::Broken(_) | StoreError::TooLong { .. })) => trouble(error.to_string()),
        }
    }
}

fn append(store: &mut Store, note: &NoteView) -> Result<(), StoreError> {
    let entry = serde_json::to_vec(note).map_err(|error| StoreError::Broken(error.to_string()))?;
    store.append(Table::Notes, &entry)
}

fn stored(store: &mut Store) -> Result<Vec<NoteView>, StoreError> {
    let entries = store.all(Table::Notes)?;
    let notes: Result<Vec<NoteView>, _> = entries.iter().map(|entry| serde_json::from_slice(entry)).collect();
    notes.map_err(|error| store.doubt(&format!("an entry is no note: {error}")))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::exec::scratch::Scratch;

    fn note(unix_ms: u64, host: &str, vm: Option<&str>) -> NoteView {
        NoteView {
            unix_ms,
            host: host.into(),
            level: "info".into(),
            kind: "test".into(),
            vm: vm.map(str::to_owned),
            text: format!("at {unix_ms}"),
            verdict: None,
        }
    }

    fn until(what: &str, mut reached: impl FnMut() -> bool) {
        let start = Instant::now();
        while !reached() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what} within 20 s");
            std::thread::yield_now();
        }
    }

    #[test]
    fn filters() {
        let mut book = NoteBook::in_memory();
        book.add(note(1, "a", None));
        book.add(note(2, "a", Some("web")));
        book.add(note(3, "b", Some("web")));
        let times = |since, vm, host| book.since(since, vm, host).iter().map(|n| n.unix_ms).collect::<Vec<_>>();
        assert_eq!(times(0, None, None), [1, 2, 3]);
        assert_eq!(times(2, None, None), [2, 3]);
        assert_eq!(times(0, Some("web"), None), [2, 3]);
        assert_eq!(times(0, Some("web"), Some("b")), [3]);
        assert_eq!(times(0, Some("db"), None), [0; 0]);
    }

    #[test]
    fn bounded() {
        let mut book = NoteBook::in_memory();
        for at in 0..KEPT as u64 + 5 {
            book.add(note(at, "a", None));
        }
        let all = book.since(0, None, None);
        assert_eq!((all.len(), all[0].unix_ms), (KEPT, 5));
        let long = NoteView { text: "ä".repeat(MAX_TEXT_BYTES), ..note(9, "a", None) };
        book.add(long);
        assert!(book.since(0, None, None).last().unwrap().text.len() <= MAX_TEXT_BYTES + 3);
    }

    #[test]
    fn merged_by_time_without_doubles() {
        let (a, b, c) = (note(1, "a", None), note(2, "b", None), note(3, "a", None));
        let merged = merge(vec![vec![a.clone(), c.clone()], vec![b.clone(), c.clone()], vec![a.clone()]]);
        assert_eq!(merged, [a, b, c]);
    }

    #[test]
    fn kept_over_a_restart() {
        let folder = Scratch::new();
        let mut book = NoteBook::open(folder.path());
        book.add(note(1, "a", Some("web")));
        book.add(note(2, "a", None));
        until("synced", || std::fs::read_to_string(folder.path().join("store.mark")).is_ok_and(|mark| mark == "2\n"));
        let thread_gone = book.to_disk.take();
        drop((thread_gone, book));
        let mut again = None;
        until("read again", || {
            // The old thread may still hold the store for a moment.
            let book = again.get_or_insert_with(|| NoteBook::open(folder.path()));
            if !book.poll().is_empty() {
                again = None;
                return false;
            }
            2 <= book.since(0, None, None).len()
        });
        let mut book = again.unwrap();
        book.add(note(3, "a", None));
        let times: Vec<_> = book.since(0, None, None).iter().map(|note| note.unix_ms).collect();
        assert_eq!(times, [1, 2, 3]);
    }

    #[test]
    fn without_a_disk_notes_stay_in_memory() {
        let folder = Scratch::new();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut book = NoteBook::open(&file);
        book.add(note(1, "a", None));
        let mut troubles = Vec::new();
        until("told", || {
            troubles.extend(book.poll());
            !troubles.is_empty()
        });
        assert!(troubles[0].contains("memory only"), "{troubles:?}");
        assert_eq!(book.since(0, None, None).len(), 1);
    }

    #[test]
    fn subscribers_hear() {
        let mut book = NoteBook::in_memory();
        let mut heard = book.subscribe();
        book.add(note(7, "a", None));
        assert_eq!(heard.try_recv().unwrap().unix_ms, 7);
    }
}
