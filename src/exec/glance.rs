//! A short look at a running guest's screen, at the end of its serial console, and at what the guest does.
//!
//! ```text
//!   look: statistics, console, text memory ── text? ── yes ──► its mark, the text
//!                        │                       └ no ──► look: picture ──► its mark; read, if it is the one that is asked for
//!                        └──► the end of its file, if it can be read in time
//! ```
//!
//! `AT_ONCE` are under way at the same time; further ones are refused at once, so that failures that are being kept do not wait for
//! them. Without a program that reads no picture is taken.
//!
//! Deliberately not here: when one looks, and what follows (`core::guests::screen`).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::console::{Consoles, Tail};
use super::evidence::screen;
use super::libvirt::{Part, What, sample};
use super::program::{Places, bounded};
use super::reading::{self, Reader};
use crate::core::guests::{ConsoleEnd, Glimpse, Mark, Shows};
use crate::types::VmId;

/// Looks that are under way.
const AT_ONCE: usize = 4;
/// Time for each of the two looks.
const LOOK: Duration = Duration::from_secs(2);

/// Time for a console's file, beside those.
const READ: Duration = Duration::from_millis(500);
/// Bytes of a console of which something is made: its last lines.
const END: usize = 2048;

/// Looks at a running domain, like `Libvirt::look`.
type Look = Box<dyn Fn(VmId, What, Duration) -> Receiver<Part> + Send + Sync>;

/// Looks at screens; cheap to clone.
#[derive(Clone)]
pub struct Glances(Arc<Inner>);

struct Inner {
    look: Look,
    reader: Arc<Reader>,
    consoles: Consoles,
}

impl Glances {
    /// With what looks, and what reads pictures.
    #[must_use]
    pub fn new(
        reader: Arc<Reader>,
        look: impl Fn(VmId, What, Duration) -> Receiver<Part> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner { look: Box::new(look), reader, consoles: Consoles::default() }))
    }

    /// Looks once; a picture is read if it is `read`. `told` is called exactly once, on another thread or here; none: nothing was to
    /// be seen.
    pub fn glance(&self, vm: VmId, read: Option<Mark>, told: impl FnOnce(Option<Glimpse>) + Send + 'static) {
        static PLACES: Places = Places::new(AT_ONCE);
        let inner = Arc::clone(&self.0);
        let work = move || inner.glance(vm, read);
        bounded(&PLACES, "glance", 2 * LOOK + 2 * reading::TIME, work, |_| None, told);
    }
}

impl Inner {
    fn glance(&self, vm: VmId, read: Option<Mark>) -> Option<Glimpse> {
        let parts = (self.look)(vm, What::Text, LOOK);
        let Ok(Part::Statistics(Ok(statistics))) = parts.recv_timeout(LOOK) else { return None };
        let sample = sample(&statistics)?;
        let tail = match parts.recv_timeout(LOOK) {
            Ok(Part::Console(Ok(Some(path)))) => self.consoles.tail(path).ok(),
            Ok(Part::Console(_)) => None,
            Ok(_) | Err(_) => return None,
        };
        let memory = match parts.recv_timeout(LOOK) {
            Ok(Part::Memory(memory)) => memory,
            Ok(_) | Err(_) => return None,
        };
        let (mark, shows) = match memory.and_then(|memory| screen::text(&memory)) {
            Ok(text) => (mark(text.as_bytes()), Shows::Text(text)),
            Err(_) => self.picture(vm, read).unwrap_or((Mark(0), Shows::Nothing)),
        };
        let console = tail.and_then(|tail| tail.recv_timeout(READ).ok()?.ok()).map(end);
        Some(Glimpse { mark, shows, sample, console })
    }

    fn picture(&self, vm: VmId, read: Option<Mark>) -> Option<(Mark, Shows)> {
        if !self.reader.is_there() {
            return None;
        }
        let Ok(Part::Picture(Ok(picture))) = (self.look)(vm, What::Picture, LOOK).recv_timeout(LOOK) else {
            return None;
        };
        let mark = mark(&picture);
        let shows = if read == Some(mark) {
            Shows::Read(self.reader.read(&picture).unwrap_or_default())
        } else {
            Shows::Picture
        };
        Some((mark, shows))
    }
}

/// Its last lines. Their mark is that of all that was written.
fn end(tail: Tail) -> ConsoleEnd {
    let end = &tail.bytes[tail.bytes.len().saturating_sub(END)..];
    let mark = mark(&[&tail.ends.to_le_bytes()[..], &tail.bytes].concat());
    ConsoleEnd { mark, text: String::from_utf8_lossy(end).into_owned(), written: tail.written }
}

fn mark(content: &[u8]) -> Mark {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    Mark(hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{channel, sync_channel};

    use super::*;

    const WEB: VmId = VmId(uuid::Uuid::from_u128(1));

    /// What is seen of a guest with this text screen (none: graphics) and picture, and what was looked at for it.
    fn seen(text: Option<&str>, picture: &str, read: Option<Mark>) -> (Option<Glimpse>, Vec<What>) {
        let (letters, picture) = (text.map(str::to_owned), picture.as_bytes().to_vec());
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("console");
        std::fs::write(&log, format!("{}\nweb login:", "x".repeat(100_000))).unwrap();
        let path = log.to_str().unwrap().to_owned();
        let looks = Arc::new(Mutex::new(Vec::new()));
        let looked = Arc::clone(&looks);
        let glances = Glances::new(Arc::new(Reader::new(&["/bin/true"])), move |_, what, _| {
            looked.lock().unwrap().push(what);
            let (tell, told) = sync_channel(4);
            let statistics = [("block.count", "0"), ("state.state", "1"), ("vcpu.current", "1")];
            let statistics = statistics.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
            let memory =
                letters.as_ref().map(|text| text.bytes().flat_map(|letter| [letter, 7]).chain([0; 160]).collect());
            if what == What::Picture {
                tell.send(Part::Picture(Ok(picture.clone()))).unwrap();
            } else {
                tell.send(Part::Statistics(Ok(statistics))).unwrap();
                tell.send(Part::Console(Ok(Some(path.clone())))).unwrap();
                tell.send(Part::Memory(memory.ok_or_else(String::new))).unwrap();
            }
            told
        });
        let (tell, told) = channel();
        glances.glance(WEB, read, move |glimpse| tell.send(glimpse).unwrap());
        let glimpse = told.recv_timeout(Duration::from_secs(20)).unwrap();
        let console = glimpse.as_ref().unwrap().console.as_ref().unwrap();
        assert!(console.text.ends_with("x\nweb login:") && console.text.len() == END && console.written.is_some());
        (glimpse, std::mem::take(&mut looks.lock().unwrap()))
    }

    #[test]
    fn a_picture_is_taken_without_text_only_and_read_if_it_is_the_same() {
        let (glimpse, looks) = seen(Some("grub>"), "picture", None);
        assert_eq!((glimpse.unwrap().shows, looks), (Shows::Text("grub>\n".to_owned()), vec![What::Text]));
        let (glimpse, looks) = seen(None, "picture", None);
        let first = glimpse.unwrap();
        assert_eq!((&first.shows, looks), (&Shows::Picture, vec![What::Text, What::Picture]));
        let again = seen(None, "picture", Some(first.mark)).0.unwrap();
        assert_eq!((again.mark, again.shows), (first.mark, Shows::Read(String::new())), "junk is read as nothing");
        let other = seen(None, "another", Some(first.mark)).0.unwrap();
        assert_eq!((other.mark == first.mark, other.shows), (false, Shows::Picture));
    }
}
