//! Why datagrams are dropped, and how many were.

use crate::wire::beat::BadBeat;

/// Why a datagram was dropped. Each is counted, none is logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Dropped {
    /// Too short to be sealed.
    #[error("too short")]
    Short,
    /// Not ours.
    #[error("not a beat")]
    Magic,
    /// A layout that we do not know.
    #[error("layout version {0} is unknown")]
    Version(u8),
    /// Another cluster uses the same group and port.
    #[error("of another cluster")]
    OtherCluster,
    /// Not in our ring.
    #[error("sealed with a key that is not in the ring")]
    UnknownKey,
    /// Changed on the way, or sealed by somebody without the key.
    #[error("wrong seal")]
    Seal,
    /// Seen before, or too old to tell. Beats that come by a second interface are dropped like this, too.
    #[error("seen before")]
    Replayed,
    /// The sender has begun a newer incarnation.
    #[error("of an older incarnation")]
    OldIncarnation,
    /// Rightly sealed, but no beat.
    #[error("bad beat: {0}")]
    Bad(BadBeat),
}

/// How many datagrams were dropped, by reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DropCounts {
    /// See `Dropped`.
    pub short: u64,
    /// See `Dropped`.
    pub magic: u64,
    /// See `Dropped`.
    pub version: u64,
    /// See `Dropped`.
    pub other_cluster: u64,
    /// See `Dropped`.
    pub unknown_key: u64,
    /// See `Dropped`.
    pub seal: u64,
    /// See `Dropped`.
    pub replayed: u64,
    /// See `Dropped`.
    pub old_incarnation: u64,
    /// See `Dropped`.
    pub bad: u64,
}

impl DropCounts {
    /// One more of this kind.
    pub fn count(&mut self, dropped: Dropped) {
        *match dropped {
            Dropped::Short => &mut self.short,
            Dropped::Magic => &mut self.magic,
            Dropped::Version(_) => &mut self.version,
            Dropped::OtherCluster => &mut self.other_cluster,
            Dropped::UnknownKey => &mut self.unknown_key,
            Dropped::Seal => &mut self.seal,
            Dropped::Replayed => &mut self.replayed,
            Dropped::OldIncarnation => &mut self.old_incarnation,
            Dropped::Bad(_) => &mut self.bad,
        } += 1;
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            short: self.short + other.short,
            magic: self.magic + other.magic,
            version: self.version + other.version,
            other_cluster: self.other_cluster + other.other_cluster,
            unknown_key: self.unknown_key + other.unknown_key,
            seal: self.seal + other.seal,
            replayed: self.replayed + other.replayed,
            old_incarnation: self.old_incarnation + other.old_incarnation,
            bad: self.bad + other.bad,
        }
    }
}
