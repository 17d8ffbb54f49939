//! Mainstay's lab: hosts, guests, faults and judges on one machine, driven by `cargo lab`.
//!
//! ```text
//! cli ──► lab ──┬─► packages, space, cache, root
//!               │                      what must be there: programs of the machine, room on its disks, the hosts' file system
//!               ├─► network            the switch, and cuts
//!               ├─► storage            the datastore, and its faults
//!               ├─► power              the hosts' power switch, and its faults
//!               ├─► host ──► cgroup    containers: start, kill, freeze, run commands
//!               ├─► guest, initramfs, boot_sector
//!               │                      what runs on them; guest_debian: one with a whole system
//!               └─► product, package   Mainstay, built and installed; packages of the agent for guests
//! guest_disk, judge                    what guests leave behind, and who reads it
//! agents, processes                    what the agents say of themselves; their processes, from outside
//! cases, test, demo, bench, chaos      what is tried with all this
//! sim                                  the simulator: no hosts at all
//! ```

pub mod agents;
pub mod bench;
pub mod boot_sector;
pub mod cache;
pub mod cases;
pub mod cgroup;
pub mod chaos;
pub mod cli;
pub mod command;
pub mod demo;
pub mod guest;
pub mod guest_debian;
pub mod guest_disk;
pub mod host;
pub mod initramfs;
pub mod judge;
pub mod lab;
pub mod mounts;
pub mod network;
pub mod package;
pub mod packages;
pub mod power;
pub mod processes;
pub mod product;
pub mod root;
pub mod sim;
pub mod space;
pub mod storage;
pub mod test;

/// The storage daemon's second socket as a host sees it; it understands `expire HOST` only.
pub const EXPIRE_INSIDE: &str = "/run/mainstay-lab/expire.sock";
