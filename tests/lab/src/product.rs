//! Mainstay itself in the hosts: built from this source tree, installed as a package would, made a cluster.
//!
//! ```text
//! cargo build ──► mainstayd, mainstay-guard, mainstay-hook, mainstay ──► /usr/sbin, /usr/bin, hook ──┐
//! systemd/                                                          ──► units, D-Bus, polkit, …  ──┴──► h1: init
//!                                                                                              others: join TOKEN
//!                                                                                              h1: datastore add
//! ```

use anyhow::{Result, bail};

use crate::host::Host;

/// The built files.
#[derive(Debug)]
pub struct Product {}

/// Builds it.
pub fn build() -> Result<Product> {
    bail!("Mainstay cannot be installed into the lab yet: use `up --bare` for hosts with libvirt and guests only")
}

impl Product {
    /// Puts its files into a host that is off.
    pub fn install(&self, _host: &Host) -> Result<()> {
        Ok(())
    }

    /// Makes the hosts one cluster; the first `members` are already in it.
    pub fn form_cluster(&self, _hosts: &[Host], _members: u8) -> Result<()> {
        Ok(())
    }
}
