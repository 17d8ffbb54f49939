//! Messages on a stream of bytes that can begin and break off anywhere: a guest that is reset stops in the middle of a
//! message, and the next one of that port follows at once.
//!
//! ```text
//! byte 0        4         6        8          12            16             20
//!      ┌────────┬─────────┬────────┬──────────┬─────────────┬──────────────┬─────────────────┐
//!      │ "MSGU" │ version │ kind   │ length   │ check of    │ check of     │ body: postcard  │
//!      │        │ 1       │        │ of body  │ the body    │ bytes 0 … 15 │ ≤ MAX_MESSAGE   │
//!      └────────┴─────────┴────────┴──────────┴─────────────┴──────────────┴─────────────────┘
//!      numbers little endian; checks are CRC-32
//!
//!   seeking ── a good header ──► in step ── anything else ──► BadFrame: the connection is closed
//! ```
//!
//! A new connection seeks: what lies before the first good header is skipped, up to [`MAX_SKIPPED`] bytes. The header has
//! a check of its own, so that a length found by chance in the middle of a body does not hold up what follows it. A body
//! that does not fit its check is skipped while seeking: it is one that broke off.
//!
//! Bounds: a [`Decoder`] holds at most one message and what was read with it.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::MAX_MESSAGE;
use crate::message::{FromGuest, ToGuest};

/// Bytes before the body.
pub const HEADER: usize = 20;
/// A connection whose first so many bytes hold no frame is not ours: the longest message may lie there twice.
pub const MAX_SKIPPED: usize = 2 * (HEADER + MAX_MESSAGE);
/// Messages that broke off before the first whole one: more than a guest leaves behind that is reset twice.
pub const MAX_BROKEN: u32 = 4;
/// At most so many bytes are given to a [`Decoder`] at once.
pub const MAX_CHUNK: usize = 64 * 1024;

const MAGIC: [u8; 4] = *b"MSGU";
const VERSION: u16 = 1;

/// Why a connection has to be closed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadFrame {
    /// Nothing of ours lay in what came first.
    #[error("no message within the first {MAX_SKIPPED} bytes")]
    Foreign,
    /// Something else follows a message.
    #[error("bytes between two messages")]
    Magic,
    /// The header does not fit its check.
    #[error("a damaged header")]
    Header,
    /// An envelope of another version.
    #[error("an envelope of version {found}, this program reads {VERSION}")]
    Version {
        /// What it says.
        found: u16,
    },
    /// Longer than `MAX_MESSAGE`.
    #[error("a message of {len} bytes, at most {MAX_MESSAGE} are allowed")]
    Long {
        /// What it says.
        len: u32,
    },
    /// The body does not fit its check.
    #[error("a damaged message")]
    Damaged,
    /// The body is no message of its kind.
    #[error("an unreadable message ({why})")]
    Body {
        /// What postcard says.
        why: String,
    },
}

/// One side's messages. Sealed by the crate: the guest's and the host's.
pub trait Message: Serialize + DeserializeOwned {
    /// Stands in the header.
    fn kind(&self) -> u16;
    /// Kinds that this version can read.
    const KINDS: std::ops::RangeInclusive<u16>;
}

impl Message for FromGuest {
    const KINDS: std::ops::RangeInclusive<u16> = 1..=5;
    fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 1,
            Self::Beat(_) => 2,
            Self::Report(_) => 3,
            Self::Outcome { .. } => 4,
            Self::Leaves => 5,
        }
    }
}

impl Message for ToGuest {
    const KINDS: std::ops::RangeInclusive<u16> = 0x81..=0x83;
    fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 0x81,
            Self::Answer { .. } => 0x82,
            Self::Ask { .. } => 0x83,
        }
    }
}

/// A whole frame.
///
/// # Errors
/// `Long` when the message does not fit.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, BadFrame> {
    let mut frame =
        postcard::to_extend(message, vec![0; HEADER]).map_err(|error| BadFrame::Body { why: error.to_string() })?;
    let len = u32::try_from(frame.len() - HEADER).unwrap_or(u32::MAX);
    if MAX_MESSAGE < frame.len() - HEADER {
        return Err(BadFrame::Long { len });
    }
    let body = crc32fast::hash(&frame[HEADER..]);
    frame[0..4].copy_from_slice(&MAGIC);
    frame[4..6].copy_from_slice(&VERSION.to_le_bytes());
    frame[6..8].copy_from_slice(&message.kind().to_le_bytes());
    frame[8..12].copy_from_slice(&len.to_le_bytes());
    frame[12..16].copy_from_slice(&body.to_le_bytes());
    let header = crc32fast::hash(&frame[..16]);
    frame[16..20].copy_from_slice(&header.to_le_bytes());
    Ok(frame)
}

/// A header that fits its check.
#[derive(Clone, Copy)]
struct Header {
    version: u16,
    kind: u16,
    len: u32,
    body: u32,
}

impl Header {
    /// Of at least `HEADER` bytes that begin with the magic.
    fn read(bytes: &[u8]) -> Option<Self> {
        let two = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let four = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let good = crc32fast::hash(&bytes[..16]) == four(16);
        good.then(|| Self { version: two(4), kind: two(6), len: four(8), body: four(12) })
    }

    fn check(self) -> Result<usize, BadFrame> {
        if self.version != VERSION {
            return Err(BadFrame::Version { found: self.version });
        }
        let len = self.len as usize;
        if MAX_MESSAGE < len { Err(BadFrame::Long { len: self.len }) } else { Ok(HEADER + len) }
    }
}

/// Finds the messages of one connection.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// What lies before it is done with.
    at: usize,
    in_step: bool,
    skipped: usize,
    broken: u32,
    /// Messages of kinds that this version does not know.
    unknown: u64,
}

impl Decoder {
    /// Takes what was read. Every message in it has to be taken by [`Self::take`] before more is given.
    ///
    /// # Panics
    /// When more is given at once than `MAX_CHUNK`.
    pub fn push(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= MAX_CHUNK, "read in pieces of at most MAX_CHUNK");
        self.bytes.drain(..std::mem::take(&mut self.at));
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message.
    ///
    /// # Errors
    /// The connection has to be closed: where the next message begins is not known any more.
    pub fn take<M: Message>(&mut self) -> Result<Option<M>, BadFrame> {
        loop {
            let Some((kind, whole)) = self.find()? else { return Ok(None) };
            let known = M::KINDS.contains(&kind);
            let body = &self.bytes[self.at + HEADER..self.at + whole];
            let message = if known { postcard::from_bytes(body).map(Some) } else { Ok(None) };
            self.at += whole;
            match message {
                Ok(Some(message)) => return Ok(Some(message)),
                Ok(None) => self.unknown += 1,
                Err(why) => return Err(BadFrame::Body { why: why.to_string() }),
            }
        }
    }

    /// How many messages were skipped because this version does not know their kind.
    #[must_use]
    pub fn unknown(&self) -> u64 {
        self.unknown
    }

    /// Bytes that wait for the rest of their message: less than the longest whole one, once everything was taken.
    #[must_use]
    pub fn held(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// How many bytes were skipped before the first message.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Kind and length of the whole frame that lies at the beginning, once it is there.
    fn find(&mut self) -> Result<Option<(u16, usize)>, BadFrame> {
        loop {
            if !self.in_step {
                self.seek()?;
            }
            let bytes = &self.bytes[self.at..];
            if !begins(bytes) {
                return Err(BadFrame::Magic); // Seeking never ends like this.
            }
            if bytes.len() < HEADER {
                return Ok(None);
            }
            let Some(header) = Header::read(bytes) else {
                if self.in_step {
                    return Err(BadFrame::Header);
                }
                self.skip(1)?; // Foreign bytes can look like the magic.
                continue;
            };
            let whole = header.check()?;
            if bytes.len() < whole {
                return Ok(None);
            }
            if crc32fast::hash(&bytes[HEADER..whole]) == header.body {
                self.in_step = true;
                return Ok(Some((header.kind, whole)));
            }
            self.broken += 1;
            if self.in_step || MAX_BROKEN < self.broken {
                return Err(BadFrame::Damaged);
            }
            self.skip(1)?;
        }
    }

    /// To where a header may begin.
    fn seek(&mut self) -> Result<(), BadFrame> {
        let rest = &self.bytes[self.at..];
        let count = (0..rest.len()).find(|at| begins(&rest[*at..])).unwrap_or(rest.len());
        self.skip(count)
    }

    fn skip(&mut self, count: usize) -> Result<(), BadFrame> {
        self.skipped += count;
        self.at += count;
        if MAX_SKIPPED < self.skipped { Err(BadFrame::Foreign) } else { Ok(()) }
    }
}

/// Whether a header may begin here, as far as there are bytes.
fn begins(bytes: &[u8]) -> bool {
    MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Beat, HostHello, Order, Report, ReportId, Severity, Verdict, Wish};

    fn report(text: &str) -> FromGuest {
        FromGuest::Report(Report {
            id: ReportId([7; 16]),
            sequence: 3,
            boot: [9; 16],
            severity: Severity::Critical,
            kind: "app/db".to_owned(),
            message: text.to_owned(),
            wish: Wish::ResetVm("db".to_owned()),
        })
    }

    fn beat() -> FromGuest {
        FromGuest::Beat(Beat {
            boot: [9; 16],
            uptime_s: 1,
            load_centi: 2,
            available_kib: 3,
            root_writable: true,
            failed_units: 0,
            application: crate::message::Application::Active,
            ready: true,
            frozen: false,
            dropped: 0,
        })
    }

    fn all(decoder: &mut Decoder) -> Result<Vec<FromGuest>, BadFrame> {
        std::iter::from_fn(|| decoder.take::<FromGuest>().transpose()).collect()
    }

    /// Whatever the pieces are in which it comes.
    fn read(bytes: &[u8], piece: usize) -> Result<Vec<FromGuest>, BadFrame> {
        let mut decoder = Decoder::default();
        let mut found = Vec::new();
        for piece in bytes.chunks(piece) {
            decoder.push(piece);
            found.extend(all(&mut decoder)?);
        }
        Ok(found)
    }

    #[test]
    fn bytes_are_as_released() {
        let answer = ToGuest::Answer { id: ReportId([7; 16]), verdict: Verdict::Done, why: "reset".to_owned() };
        let hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let golden = [
            (
                hex(encode(&beat()).unwrap()),
                "4d534755010002001a000000d5db352c70242e160109090909090909090909090909090909010203010001010000",
            ),
            (
                hex(encode(&report("gone")).unwrap()),
                "4d5347550100030033000000c22d40fe3c68c7590207070707070707070707070707070707030909090909090909090909090909090902066170702f646204676f6e6502026462",
            ),
            (
                hex(encode(&answer).unwrap()),
                "4d534755010082001800000043de3dfdd53ee315010707070707070707070707070707070701057265736574",
            ),
        ];
        for (found, expected) in golden {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn messages_come_in_any_pieces() {
        let sent = vec![report("a"), beat(), report(&"long ".repeat(800))];
        let bytes: Vec<u8> = sent.iter().flat_map(|message| encode(message).unwrap()).collect();
        for piece in [1, 7, 19, 20, 21, 4096, MAX_CHUNK] {
            assert_eq!(read(&bytes, piece).as_ref(), Ok(&sent), "pieces of {piece}");
        }
    }

    #[test]
    fn a_connection_may_begin_in_the_middle_of_a_message() {
        let cut = encode(&report(&"MSGU of its own ".repeat(200))).unwrap();
        let whole: Vec<u8> = [beat(), beat()].iter().flat_map(|message| encode(message).unwrap()).collect();
        for from in [1, 3, 4, 19, 20, 21, 100, cut.len() - 1] {
            let bytes = [&cut[from..], &whole].concat();
            assert_eq!(read(&bytes, 64), Ok(vec![beat(), beat()]), "from byte {from}");
        }
        // Its end is missing: the next one is found all the same, at the latest behind it.
        for to in [1, 19, 20, 100] {
            let bytes = [&cut[..to], &whole, &[0; 8192]].concat();
            assert!(read(&bytes, 64).is_err(), "zeros follow messages: cut at {to}");
            let bytes = [&cut[..to], &whole.repeat(60)].concat();
            assert!(2 <= read(&bytes, 64).unwrap().len(), "cut at {to}");
        }
    }

    #[test]
    fn what_is_wrong_ends_the_connection() {
        let good = encode(&beat()).unwrap();
        let damaged = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            [good.clone(), bytes, good.clone()].concat()
        };
        assert_eq!(read(&damaged(0), 64), Err(BadFrame::Magic));
        assert_eq!(read(&damaged(9), 64), Err(BadFrame::Header));
        assert_eq!(read(&damaged(HEADER), 64), Err(BadFrame::Damaged));
        assert_eq!(read(&vec![0x55; MAX_SKIPPED + 1], 4096), Err(BadFrame::Foreign));
        let with = |change: fn(&mut [u8])| {
            let mut bytes = good.clone();
            change(&mut bytes);
            let check = crc32fast::hash(&bytes[..16]);
            bytes[16..20].copy_from_slice(&check.to_le_bytes());
            bytes
        };
        let two_gib = with(|bytes| bytes[8..12].copy_from_slice(&(1_u32 << 31).to_le_bytes()));
        assert_eq!(read(&two_gib, 64), Err(BadFrame::Long { len: 1 << 31 }));
        assert_eq!(read(&with(|bytes| bytes[4] = 2), 64), Err(BadFrame::Version { found: 2 }));
        let mut empty = encode(&ToGuest::Ask { ask: 1, order: Order::Thaw }).unwrap();
        empty[6..8].copy_from_slice(&3_u16.to_le_bytes());
        let check = crc32fast::hash(&empty[..16]);
        empty[16..20].copy_from_slice(&check.to_le_bytes());
        assert!(matches!(read(&empty, 64), Err(BadFrame::Body { .. })), "an order is no report");
    }

    #[test]
    fn kinds_of_later_versions_are_skipped() {
        let hello = encode(&ToGuest::Hello(HostHello { protocol: 9, vm: "web".to_owned() })).unwrap();
        let mut decoder = Decoder::default();
        decoder.push(&[hello, encode(&beat()).unwrap()].concat());
        assert_eq!(all(&mut decoder), Ok(vec![beat()]));
        assert_eq!(decoder.unknown(), 1);
    }

    #[test]
    fn too_long_is_not_sent() {
        assert!(matches!(encode(&report(&"x".repeat(MAX_MESSAGE))), Err(BadFrame::Long { .. })));
    }
}
