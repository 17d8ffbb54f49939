//! Answers: people through D-Bus and CLI, other agents through the control channel.
pub mod cli;
pub mod control;
pub mod dbus;
pub mod systemd;
