//! Bytes <-> types. Pure: no clock, no disk, no network.
pub mod beat;
pub mod frame;
pub mod record;
pub mod seal;
