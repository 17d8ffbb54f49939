//! Does what the core orders: clock, network, datastores, libvirt, guard, hook, fences, power switches, local files. No policy here.
pub mod channels;
pub mod clock;
pub mod cluster;
pub mod console;
pub mod datastore;
pub mod doctor;
pub mod dump;
pub mod echo;
pub mod evidence;
pub mod failures;
pub mod fence;
pub mod glance;
pub mod guard_client;
pub mod guest_hook;
pub mod hook;
pub mod libvirt;
pub mod means;
pub mod net;
pub mod notes;
pub mod power;
pub mod program;
pub mod qemu;
pub mod reading;
pub mod remembered;
#[cfg(test)]
mod scratch;
pub mod state;
pub mod store;
