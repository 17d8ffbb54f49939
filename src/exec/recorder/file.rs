//! A recording as a file: `mainstay verdict replay` reads it on any machine.
//!
//! ```text
//!   mainstay-verdict 1 0.1.0 <SHA-256>\n     format, software, checksum of these two and of what follows
//!   deflate ( postcard ( recording ) )
//! ```
//!
//! The state of the core changes with every version of the software, so another version cannot be expected to read it.

use std::io::{Read, Write};
use std::sync::Arc;

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use serde::{Deserialize, Serialize};

use super::{Recording, Segment};
use crate::types::Time;
use crate::wire::record::digest;

/// This software.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const MAGIC: &str = "mainstay-verdict";
const FORMAT: &str = "1";
/// Longest first line.
const MAX_HEAD: usize = 256;
/// A recording is smaller unpacked.
const MAX_BODY: u64 = 1 << 30;

/// Why a file cannot be replayed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadFile {
    /// Something else.
    #[error("it is no recording of a verdict")]
    NotOne,
    /// Another layout of the file.
    #[error("it has format {0}, and this is mainstay {VERSION}, which reads format {FORMAT}")]
    Format(String),
    /// Another core.
    #[error("it was recorded by mainstay {theirs}, and this is {VERSION}, whose core is another")]
    Version { theirs: String },
    /// Cut off or changed.
    #[error("it is damaged: its checksum is wrong")]
    Damaged,
    /// The checksum is right, and yet.
    #[error("it cannot be read: {0}")]
    Body(String),
}

#[derive(Serialize)]
struct ToWrite<'a> {
    id: &'a str,
    host: &'a str,
    clocks: (Time, u64),
    segments: Vec<&'a Segment>,
}

#[derive(Deserialize)]
struct ToRead {
    id: String,
    host: String,
    clocks: (Time, u64),
    segments: Vec<Segment>,
}

/// As bytes. Takes a moment: packs them.
///
/// # Errors
/// Never, as long as there is memory.
pub fn encode(recording: &Recording) -> Result<Vec<u8>, BadFile> {
    encode_as(recording, VERSION)
}

fn encode_as(recording: &Recording, version: &str) -> Result<Vec<u8>, BadFile> {
    let body = |error: &dyn std::fmt::Display| BadFile::Body(error.to_string());
    let Recording { id, host, clocks, segments } = recording;
    let segments = segments.iter().map(|segment| &**segment).collect();
    let plain = postcard::to_stdvec(&ToWrite { id, host, clocks: *clocks, segments }).map_err(|error| body(&error))?;
    let mut packer = DeflateEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(&plain).map_err(|error| body(&error))?;
    let packed = packer.finish().map_err(|error| body(&error))?;
    let mut bytes = format!("{MAGIC} {FORMAT} {version} {}\n", sum(version, &packed)).into_bytes();
    bytes.extend(packed);
    Ok(bytes)
}

/// From bytes. `any_version`: also one of another version of the software is tried.
///
/// # Errors
/// As [`BadFile`] says.
pub fn decode(bytes: &[u8], any_version: bool) -> Result<Recording, BadFile> {
    let end = bytes.iter().take(MAX_HEAD).position(|byte| *byte == b'\n').ok_or(BadFile::NotOne)?;
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| BadFile::NotOne)?;
    let packed = &bytes[end + 1..];
    let (version, wanted) = match head.split(' ').collect::<Vec<_>>()[..] {
        [MAGIC, FORMAT, version, sum] => (version, sum),
        [MAGIC, format, ..] => return Err(BadFile::Format(format.to_owned())),
        _ => return Err(BadFile::NotOne),
    };
    if sum(version, packed) != wanted {
        return Err(BadFile::Damaged);
    }
    if version != VERSION && !any_version {
        return Err(BadFile::Version { theirs: version.to_owned() });
    }
    let mut plain = Vec::new();
    let unpacked = DeflateDecoder::new(packed).take(MAX_BODY).read_to_end(&mut plain);
    unpacked.map_err(|error| BadFile::Body(error.to_string()))?;
    let ToRead { id, host, clocks, segments } =
        postcard::from_bytes(&plain).map_err(|error| BadFile::Body(error.to_string()))?;
    Ok(Recording { id, host, clocks, segments: segments.into_iter().map(Arc::new).collect() })
}

fn sum(version: &str, packed: &[u8]) -> String {
    digest(&[format!("{FORMAT} {version}\n").as_bytes(), packed].concat()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording() -> Recording {
        let segment = Segment { core: vec![1, 2, 3], steps: vec![7; 1000], count: 2 };
        let segments = vec![Arc::new(segment.clone()), Arc::new(segment)];
        Recording { id: "a-1".into(), host: "a".into(), clocks: (Time(5), 6), segments }
    }

    #[test]
    fn there_and_back() {
        let bytes = encode(&recording()).unwrap();
        assert_eq!(decode(&bytes, false).unwrap(), recording());
        assert!(bytes.len() < 500, "{} bytes", bytes.len());
    }

    #[test]
    fn what_is_not_as_it_was_is_refused() {
        let bytes = encode(&recording()).unwrap();
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert!(decode(&other, true).is_err(), "byte {at}");
        }
        assert_eq!(decode(&bytes[..bytes.len() - 1], false), Err(BadFile::Damaged));
        assert_eq!(decode(b"", false), Err(BadFile::NotOne));
        assert_eq!(decode(b"#!/bin/sh\n", false), Err(BadFile::NotOne));
        assert_eq!(decode(b"mainstay-verdict 2 9.9 x\n", false), Err(BadFile::Format("2".into())));
    }

    #[test]
    fn another_version_only_if_that_is_wanted() {
        let bytes = encode_as(&recording(), "0.0.7").unwrap();
        assert_eq!(decode(&bytes, false), Err(BadFile::Version { theirs: "0.0.7".into() }));
        assert_eq!(decode(&bytes, true).unwrap(), recording());
    }
}
