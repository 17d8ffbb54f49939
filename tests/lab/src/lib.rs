//! Mainstay's lab: hosts, guests, faults and judges on one machine.

pub mod guest_disk;
pub mod judge;
pub mod storage;
