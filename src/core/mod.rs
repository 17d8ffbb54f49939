//! Decides. Pure: no async, clock, disk, network, log.
pub mod lease;
pub mod timing;
