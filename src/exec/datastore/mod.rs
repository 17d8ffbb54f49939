//! Datastores of kind `dir`.
pub mod beats;
mod claims;
mod files;
pub mod members;
mod slots;

pub use beats::{BeatFile, OwnSlots, WriteFailed, Written, highest_claim};
pub use members::prepare;
pub use slots::{Doubt, Stamp};
