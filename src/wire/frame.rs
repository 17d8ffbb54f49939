//! One frame = one message on a stream: guard socket and hook socket (blocking), control channel (async).
//!
//! ```text
//! byte 0        2         4            8
//!      ┌────────┬─────────┬────────────┬───────────────────────┐
//!      │ magic  │ version │ length     │ body: postcard        │   numbers little endian
//!      │ "MF"   │ 1       │ of body    │ at most MAX_FRAME     │
//!      └────────┴─────────┴────────────┴───────────────────────┘
//! ```
//!
//! The version is that of the envelope. What a body means is versioned by the protocols above (`GUARD_PROTOCOL`,
//! `CONTROL_PROTOCOL`), since postcard does not describe itself. Once one frame of a stream was bad there is no way to
//! find the next: the connection must be closed.
//!
//! Not here: deadlines (the caller sets them on its socket), encryption, who may say what.

use std::io::{self, ErrorKind, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest body in bytes. Longer ones are neither sent nor read: what can grow is split by its protocol.
pub const MAX_FRAME: usize = 1 << 20;
/// Bytes before the body.
pub const FRAME_HEADER: usize = 8;

const MAGIC: u16 = u16::from_le_bytes(*b"MF");
const VERSION: u16 = 1;

/// Why bytes are no frame, or a message cannot become one. Nothing was sent or taken over.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadFrame {
    /// Somebody else's protocol.
    #[error("not a Mainstay frame (it begins with {found:#06x})")]
    Magic { found: u16 },
    /// An envelope of another version.
    #[error("frame of version {found}, this program speaks {VERSION}")]
    Version { found: u16 },
    /// Longer than `MAX_FRAME`.
    #[error("frame of {len} bytes, at most {MAX_FRAME} are allowed")]
    Long { len: usize },
    /// The body is no message of the type expected.
    #[error("unreadable message ({why})")]
    Body { why: String },
    /// The message ends before the body does.
    #[error("{len} bytes too many after the message")]
    Trailing { len: usize },
}

/// Why no message came or went.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed. From `read` with kind `WouldBlock` or `TimedOut`: no byte of a frame was there yet, nothing
    /// was consumed, reading may go on.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The stream ended within a frame.
    #[error("the connection ended in the middle of a message")]
    Cut,
    /// The rest of a frame did not come before the socket's deadline.
    #[error("the rest of a message did not come in time")]
    Stalled,
    /// See there.
    #[error(transparent)]
    Bad(#[from] BadFrame),
}

/// A whole frame, header and body.
///
/// # Errors
/// When the body is longer than `MAX_FRAME`, or the type cannot be written in postcard.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, BadFrame> {
    let mut frame = postcard::to_extend(message, vec![0; FRAME_HEADER])
        .map_err(|error| BadFrame::Body { why: error.to_string() })?;
    let len = frame.len() - FRAME_HEADER;
    let Some(announced) = u32::try_from(len).ok().filter(|_| len <= MAX_FRAME) else {
        return Err(BadFrame::Long { len });
    };
    frame[0..2].copy_from_slice(&MAGIC.to_le_bytes());
    frame[2..4].copy_from_slice(&VERSION.to_le_bytes());
    frame[4..8].copy_from_slice(&announced.to_le_bytes());
    Ok(frame)
}

/// The message of a body, without its header.
///
/// # Errors
/// When the bytes are not exactly one message of this type.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, BadFrame> {
    if MAX_FRAME < body.len() {
        return Err(BadFrame::Long { len: body.len() });
    }
    let (message, rest) = postcard::take_from_bytes(body).map_err(|error| BadFrame::Body { why: error.to_string() })?;
    if !rest.is_empty() {
        return Err(BadFrame::Trailing { len: rest.len() });
    }
    Ok(message)
}

/// For readers that are not `std::io::Read`: read eight bytes, ask, read the body, `decode` it.
#[derive(Clone, Copy, Debug, Default)]
pub struct FrameCodec;

impl FrameCodec {
    /// Length of the body that follows this header; at most `MAX_FRAME`.
    ///
    /// # Errors
    /// When these bytes begin no frame that we can read.
    pub fn header(bytes: &[u8; FRAME_HEADER]) -> Result<usize, BadFrame> {
        let [m0, m1, v0, v1, len @ ..] = *bytes;
        let found = u16::from_le_bytes([m0, m1]);
        if found != MAGIC {
            return Err(BadFrame::Magic { found });
        }
        let found = u16::from_le_bytes([v0, v1]);
        if found != VERSION {
            return Err(BadFrame::Version { found });
        }
        let len = u32::from_le_bytes(len) as usize;
        if MAX_FRAME < len {
            return Err(BadFrame::Long { len });
        }
        Ok(len)
    }
}

/// The next message of a blocking stream; `None` when it ended between two frames.
///
/// # Errors
/// See `FrameError`. After any of them but a time-out of kind `Io` the stream is of no further use.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut header = [0; FRAME_HEADER];
    let first = loop {
        match from.read(&mut header) {
            Ok(len) => break len,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    };
    if first == 0 {
        return Ok(None);
    }
    fill(from, &mut header[first..])?;
    let mut body = vec![0; FrameCodec::header(&header)?];
    fill(from, &mut body)?;
    Ok(Some(decode(&body)?))
}

/// Sends one message whole.
///
/// # Errors
/// `Bad`: nothing was sent. `Io`: part of it may have been; the stream is of no further use.
pub fn write<T: Serialize>(to: &mut impl Write, message: &T) -> Result<(), FrameError> {
    let frame = encode(message)?;
    to.write_all(&frame)?;
    to.flush()?;
    Ok(())
}

fn fill(from: &mut impl Read, rest: &mut [u8]) -> Result<(), FrameError> {
    from.read_exact(rest).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => FrameError::Cut,
        ErrorKind::WouldBlock | ErrorKind::TimedOut => FrameError::Stalled,
        _ => FrameError::Io(error),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::guard::{GuardMessage, GuardOrder, GuardReport};
    use crate::types::{BootId, Incarnation, Ticket};

    fn hello() -> GuardMessage {
        GuardMessage { ticket: Ticket(300), order: GuardOrder::Hello { protocol: 1 } }
    }

    /// Gives at most `step` bytes per call and then what `end` says.
    struct Slow<'a> {
        bytes: &'a [u8],
        step: usize,
        end: Option<ErrorKind>,
    }

    impl Read for Slow<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if let Some(kind) = self.end.filter(|_| self.bytes.is_empty()) {
                return Err(kind.into());
            }
            let len = self.step.min(into.len());
            self.bytes.read(&mut into[..len])
        }
    }

    #[test]
    fn golden_frame() {
        let frame = encode(&hello()).unwrap();
        assert_eq!(frame, [b'M', b'F', 1, 0, 4, 0, 0, 0, 0xac, 0x02, 0, 1]);
        assert_eq!(FrameCodec::header(frame[..8].try_into().unwrap()), Ok(4));
        assert_eq!(decode::<GuardMessage>(&frame[8..]), Ok(hello()));
    }

    #[test]
    fn headers() {
        let table: [(&[u8; 8], Result<usize, BadFrame>); 7] = [
            (b"MF\x01\0\0\0\0\0", Ok(0)),
            (b"MF\x01\0\x05\x01\0\0", Ok(261)),
            (b"MF\x01\0\0\0\x10\0", Ok(MAX_FRAME)),
            (b"MF\x01\0\x01\0\x10\0", Err(BadFrame::Long { len: MAX_FRAME + 1 })),
            (b"MF\x01\0\xff\xff\xff\xff", Err(BadFrame::Long { len: u32::MAX as usize })),
            (b"MF\x02\0\0\0\0\0", Err(BadFrame::Version { found: 2 })),
            (b"GET / HT", Err(BadFrame::Magic { found: 0x4547 })),
        ];
        for (bytes, expected) in table {
            assert_eq!(FrameCodec::header(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn a_stream_of_frames() {
        let mut bytes = Vec::new();
        for _ in 0..3 {
            write(&mut bytes, &hello()).unwrap();
        }
        for step in [1, 3, 100] {
            let mut stream = Slow { bytes: &bytes, step, end: None };
            for _ in 0..3 {
                assert_eq!(read(&mut stream).unwrap(), Some(hello()));
            }
            assert!(read::<GuardMessage>(&mut stream).unwrap().is_none());
        }
    }

    #[test]
    fn streams_that_end_badly() {
        let frame = encode(&hello()).unwrap();
        for len in 1..frame.len() {
            let mut cut = Slow { bytes: &frame[..len], step: 5, end: None };
            assert!(matches!(read::<GuardMessage>(&mut cut), Err(FrameError::Cut)), "{len}");
            let mut late = Slow { bytes: &frame[..len], step: 5, end: Some(ErrorKind::WouldBlock) };
            assert!(matches!(read::<GuardMessage>(&mut late), Err(FrameError::Stalled)), "{len}");
        }
        let mut idle = Slow { bytes: &[], step: 5, end: Some(ErrorKind::WouldBlock) };
        match read::<GuardMessage>(&mut idle) {
            Err(FrameError::Io(error)) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bodies_that_are_refused() {
        let mut body = encode(&hello()).unwrap().split_off(8);
        body.push(0);
        assert_eq!(decode::<GuardMessage>(&body), Err(BadFrame::Trailing { len: 1 }));
        assert!(matches!(decode::<GuardMessage>(&[0xac, 0x02, 0xff, 0x01]), Err(BadFrame::Body { .. })));
        assert!(matches!(decode::<Vec<u64>>(&[0xff, 0xff, 0xff, 0xff, 0x0f]), Err(BadFrame::Body { .. })));
        assert_eq!(decode::<()>(&vec![0; MAX_FRAME + 1]), Err(BadFrame::Long { len: MAX_FRAME + 1 }));
        let long = vec![0u8; MAX_FRAME];
        assert!(matches!(encode(&long), Err(BadFrame::Long { len }) if MAX_FRAME < len));
        let mut sink = Vec::new();
        assert!(write(&mut sink, &long).is_err() && sink.is_empty());
    }

    proptest! {
        #[test]
        fn junk_never_panics(bytes: Vec<u8>) {
            let _ = read::<GuardReport>(&mut bytes.as_slice());
            let _ = decode::<GuardReport>(&bytes);
            let _ = decode::<GuardMessage>(&bytes);
        }

        #[test]
        fn round_trip(protocol: u16, incarnation: u64, boot: u128, host: Option<u128>) {
            let report = GuardReport::Hello {
                protocol,
                incarnation: Incarnation(incarnation),
                boot: BootId(uuid::Uuid::from_u128(boot)),
                host: host.map(|id| crate::types::HostId(uuid::Uuid::from_u128(id))),
            };
            let bytes = encode(&report).unwrap();
            prop_assert_eq!(read::<GuardReport>(&mut bytes.as_slice()).unwrap(), Some(report));
        }
    }
}
