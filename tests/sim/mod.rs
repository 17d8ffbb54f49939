//! The simulator: whole clusters of real `Core` values, with the guard's real state, table and leases, in virtual time.
//!
//! ```text
//!   scenario / chance ──► world ──► event heap ──► one event ──► core.step / guard.state ──► actions ──► heap
//!                           │                          └─► invariants, after every event
//!                           └── network, datastore, hypervisor, guard's threads: simulated
//! ```
//!
//! Real: every decision of the agent (`core`), and of the guard its leases, epochs, table, beats and reports
//! (`guard::state`, `guard::store`, `guard::table`). Simulated: time, threads, I/O, signals, libvirt, QEMU, people.
//! Same seed, same run, to the nanosecond.
//!
//! Deliberately not here: bytes (`wire` has golden tests), sealing, TLS, systemd's own failures.
#![allow(dead_code)] // Each of the three programs uses a part of it.

pub mod acts;
pub mod agenda;
pub mod blame;
pub mod capacity;
pub mod chance;
pub mod datastore;
pub mod definitions;
pub mod ends;
pub mod faults;
pub mod fences;
pub mod files;
pub mod foreign;
pub mod guard;
pub mod guard_beats;
pub mod homes;
pub mod host;
pub mod hypervisor;
pub mod images;
pub mod invariants;
pub mod means;
pub mod migration;
pub mod network;
pub mod ownership;
pub mod people;
pub mod power;
pub mod recorded;
pub mod rollback;
pub mod rules;
pub mod runs;
pub mod scenario;
pub mod setup;
pub mod shutdown;
pub mod soundness;
pub mod world;
