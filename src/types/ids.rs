//! Ids and counters, each a type of its own, so that two of them cannot be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
        impl std::str::FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

uuid_id!(
    /// The cluster; the name of its folder on every datastore.
    ClusterId
);
uuid_id!(
    /// A host, for its whole life in the cluster.
    HostId
);
uuid_id!(
    /// A VM: libvirt's domain UUID.
    VmId
);
uuid_id!(
    /// A datastore, as named in the cluster's settings.
    DatastoreId
);
uuid_id!(
    /// One boot of a host's kernel (`/proc/sys/kernel/random/boot_id`).
    BootId
);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize, Default,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl $name {
            /// The one after this.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
    };
}

number!(
    /// A host's place in the roster, 0 to 127; never given to another host of the same cluster.
    HostIndex(u8)
);
number!(
    /// Rises whenever a guard starts that cannot carry on (design 2, Records).
    Incarnation(u64)
);
number!(
    /// Rises with every beat of one incarnation.
    Counter(u64)
);
number!(
    /// Generation of a claim; only rises, the highest is the truth.
    Generation(u64)
);
number!(
    /// Term of a master; rises with every election.
    Term(u64)
);
number!(
    /// Sequence of a VM list, a settings document or a slot.
    Sequence(u64)
);
number!(
    /// Names a question so that its answer finds back.
    Ticket(u64)
);
number!(
    /// A verdict of one host; rises, also over restarts of its agent.
    VerdictId(u64)
);

/// How many hosts a cluster can have.
pub const MAX_HOSTS: usize = 128;
/// How many VMs one host can hold claims of.
pub const MAX_VMS_PER_HOST: usize = 1000;
/// How many datastores a cluster can have: one bit each in a beat.
pub const MAX_DATASTORES: usize = 64;

/// A creator's mark on its own claim, so that it knows it again after a lost reply.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Nonce(pub u128);

/// SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({:02x}{:02x}{:02x}{:02x}…)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// The stretch in which a lease never lapsed. A right to run never survives into the next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize, Default)]
pub struct Epoch {
    /// Of the guard.
    pub incarnation: Incarnation,
    /// How often this datastore's lease lapsed in this incarnation.
    pub lapses: u32,
}

impl Incarnation {
    /// Low 32 bits: enough to tell the guards of one host apart.
    #[must_use]
    pub fn low32(self) -> u32 {
        u32::try_from(self.0 & u64::from(u32::MAX)).expect("the rest was masked out")
    }
}

/// Claim (v, g): the thing that can be over.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Tenure {
    /// The VM.
    pub vm: VmId,
    /// The generation of its claim.
    pub generation: Generation,
}
