//! The CLI's three words with `exec::cluster`: make, join, token. Each works on this host's own files, without an agent.

use super::trouble::{FAILED, Trouble};
use crate::config::Config;
use crate::types::settings::Timing;

/// Makes a cluster; the token for others.
pub fn init(_own: &Config, _name: &str, _timing: Timing, what: &str) -> Result<String, Trouble> {
    Err(Trouble::new(FAILED, what, "not built in yet", ""))
}

/// Joins the cluster of a token; its name.
pub async fn join(_own: &Config, _token: &str, what: &str) -> Result<String, Trouble> {
    Err(Trouble::new(FAILED, what, "not built in yet", ""))
}

/// Name of the cluster and a token.
pub fn token(_own: &Config, what: &str) -> Result<(String, String), Trouble> {
    Err(Trouble::new(FAILED, what, "not built in yet", ""))
}
