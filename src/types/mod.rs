//! Plain data: what the other modules talk about. No behaviour beyond what keeps a value right.
//!
//! ```text
//! ids ── time ── beat (network) ── record (datastore) ── settings (cluster document)
//!                 │                 │                      │
//!                 └── guard (agent <-> guard)   control (agent <-> agent)   store, vm, power (orders)   view (for people)
//! ```

pub mod beat;
pub mod control;
pub mod failure;
pub mod finding;
pub mod guard;
pub mod guests;
pub mod ids;
pub mod needs;
pub mod power;
pub mod record;
pub mod rules;
pub mod settings;
pub mod store;
pub mod time;
pub mod verdict;
pub mod view;
pub mod vm;

pub use beat::*;
pub use ids::*;
pub use record::*;
pub use time::*;
