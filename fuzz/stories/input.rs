//! Bytes of a fuzzer as a story: numbers and pieces, one after the other, until there are none left.

use mainstay_guest::frame::Message;
use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::{Serialize, SerializeTuple, Serializer};

/// What is left of the story.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// One number; none at the end.
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A larger one.
    pub fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }

    /// A piece, as long as it says, or as much as there is.
    pub fn piece(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.word()?).min(self.0.len());
        let (piece, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(piece)
    }

    /// A piece as the body of a frame that is right around it: no fuzzer guesses a check.
    pub fn sealed(&mut self) -> Option<Vec<u8>> {
        let kind = u16::from(self.byte()?);
        let body = Raw { kind, body: self.piece()? };
        Some(mainstay_guest::frame::encode(&body).expect("a piece is shorter than a message may be"))
    }
}

/// A body of these very bytes. It is only sent.
struct Raw<'a> {
    kind: u16,
    body: &'a [u8],
}

impl Message for Raw<'_> {
    const KINDS: std::ops::RangeInclusive<u16> = 0..=0;
    fn kind(&self) -> u16 {
        self.kind
    }
}

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut bytes = to.serialize_tuple(self.body.len())?;
        self.body.iter().try_for_each(|byte| bytes.serialize_element(byte))?;
        bytes.end()
    }
}

impl<'de> Deserialize<'de> for Raw<'_> {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(D::Error::custom("it is only sent"))
    }
}
