//! Mainstay: high availability for virtual machines on plain libvirt/KVM hosts.
//!
//! ```text
//!              datagrams, blocks, events
//!                       │ wire translates
//!                       ▼
//!   exec ── events ──► agent.rs ── step ──► core decides
//!    ▲                  │   ▲                 │
//!    └──── actions ─────┘   └──── output ─────┘
//!   does                    api answers people and other agents
//!
//!   guard: a process of its own; owns the leases and the right to run
//! ```
//!
//! Modules in reading order: `types`, `core`, `wire`, `exec`, `guard`, `api`, `config`, `agent`.

pub mod agent;
pub mod api;
pub mod config;
pub mod core;
pub mod exec;
pub mod guard;
pub mod mutants;
pub mod types;
pub mod wire;
