//! The join token: what an operator carries from a member to a new host.
//!
//! ```text
//! mst1-  base32 of:  family │ address │ port │ cluster │ secret │ SHA-256 of the authority │ checksum
//!                    1        4 or 16   2      16        32       32                         4
//! ```
//!
//! The address says whom to ask, the digest that it is really that cluster, the secret that the asker may join. Whoever
//! has the token can become a member: it is as secret as a password.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::BASE32_NOPAD_NOCASE;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::types::{ClusterId, Digest};

const PREFIX: &str = "mst1-";
const CHECKSUM: usize = 4;
/// Without address: family, port, cluster, secret, authority, checksum.
const FIXED: usize = 1 + 2 + 16 + 32 + 32 + CHECKSUM;

/// Lets a host join.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The cluster.
    pub cluster: ClusterId,
    /// Where a member listens.
    pub control: SocketAddr,
    /// Shows that the asker may join.
    pub secret: Zeroizing<[u8; 32]>,
    /// SHA-256 of the authority's certificate (DER).
    pub authority: Digest,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, …)", self.control)
    }
}

/// Why a text is no token.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadToken {
    /// Something else.
    #[error("a join token begins with {PREFIX:?}; `mainstay cluster token` on a member shows it")]
    Prefix,
    /// From a newer version.
    #[error("this token was made by a newer version of Mainstay; install the same version here first")]
    Newer,
    /// A character that no token has.
    #[error("character {at} of the token is none that a token can have; copy it again")]
    Character {
        /// From 1, within the whole text.
        at: usize,
    },
    /// The end is missing.
    #[error("the token is cut off: {have} characters of {want}; copy it again, it may have been wrapped")]
    Short {
        /// What is there.
        have: usize,
        /// What there should be.
        want: usize,
    },
    /// Something follows.
    #[error("the token is too long: {have} characters instead of {want}; copy it alone")]
    Long {
        /// What is there.
        have: usize,
        /// What there should be.
        want: usize,
    },
    /// Every character is possible, but together they are no token.
    #[error("the token has a wrong character somewhere (its checksum does not fit); copy it again")]
    Checksum,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Zeroizing::new(Vec::with_capacity(FIXED + 16));
        match self.control.ip() {
            IpAddr::V4(address) => {
                bytes.push(4);
                bytes.extend(address.octets());
            }
            IpAddr::V6(address) => {
                bytes.push(6);
                bytes.extend(address.octets());
            }
        }
        bytes.extend(self.control.port().to_be_bytes());
        bytes.extend(self.cluster.0.as_bytes());
        bytes.extend(*self.secret);
        bytes.extend(self.authority.0);
        let checksum = digest(&SHA256, &bytes);
        bytes.extend(&checksum.as_ref()[..CHECKSUM]);
        write!(f, "{PREFIX}{}", BASE32_NOPAD_NOCASE.encode(&bytes).to_lowercase())
    }
}

impl FromStr for Token {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let text = text.trim();
        let Some(code) = text.strip_prefix(PREFIX) else {
            let newer = text.strip_prefix("mst").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
            return Err(if newer { BadToken::Newer } else { BadToken::Prefix });
        };
        if let Some(at) = code.bytes().position(|byte| !matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'2'..=b'7')) {
            return Err(BadToken::Character { at: PREFIX.len() + at + 1 });
        }
        // The first character holds the upper five bits of the family, the second its lower three: 4 is "aq" to "at",
        // 6 is "ay" to "a3". So it is known how long the token must be.
        let bytes = match code.as_bytes().get(1).map(u8::to_ascii_lowercase) {
            Some(b'y' | b'z' | b'2' | b'3') => FIXED + 16,
            _ => FIXED + 4,
        };
        let (have, want) = (text.len(), PREFIX.len() + BASE32_NOPAD_NOCASE.encode_len(bytes));
        if have < want {
            return Err(BadToken::Short { have, want });
        }
        if want < have {
            return Err(BadToken::Long { have, want });
        }
        let decoded = BASE32_NOPAD_NOCASE.decode(code.as_bytes()).map_err(|_| BadToken::Checksum)?;
        parse(&Zeroizing::new(decoded)).ok_or(BadToken::Checksum)
    }
}

fn parse(bytes: &[u8]) -> Option<Token> {
    let (body, checksum) = bytes.split_last_chunk::<CHECKSUM>()?;
    if digest(&SHA256, body).as_ref()[..CHECKSUM] != *checksum {
        return None;
    }
    let (family, rest) = body.split_first()?;
    let (ip, rest) = match family {
        4 => rest.split_first_chunk::<4>().map(|(octets, rest)| (IpAddr::from(*octets), rest))?,
        6 => rest.split_first_chunk::<16>().map(|(octets, rest)| (IpAddr::from(*octets), rest))?,
        _ => return None,
    };
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (cluster, rest) = rest.split_first_chunk::<16>()?;
    let (secret, rest) = rest.split_first_chunk::<32>()?;
    Some(Token {
        cluster: ClusterId(Uuid::from_bytes(*cluster)),
        control: SocketAddr::new(ip, u16::from_be_bytes(*port)),
        secret: Zeroizing::new(*secret),
        authority: Digest(rest.try_into().ok()?),
    })
}
