//! The CLI's three words with `exec::cluster`: make, join, token. Each works on this host's own files, without an agent.

use super::trouble::{FAILED, Trouble, USAGE};
use crate::config::{Config, Here};
use crate::exec::cluster::{Cluster, Token, join as join_cluster};
use crate::types::settings::Timing;

/// Makes a cluster; the token for others.
pub fn init(own: &Config, name: &str, timing: Timing, what: &str) -> Result<String, Trouble> {
    let made = Cluster::init(&own.paths.state, name, &here(own, what)?, timing);
    made.map(|(_, token)| token.to_string()).map_err(|error| failed(what, error))
}

/// Joins the cluster of a token; its name.
pub async fn join(own: &Config, token: &str, what: &str) -> Result<String, Trouble> {
    let token: Token = token.parse().map_err(|bad| Trouble::new(USAGE, what, format!("{bad}"), ""))?;
    let joined = join_cluster(&own.paths.state, &token, &here(own, what)?).await;
    joined.map(|cluster| cluster.settings.name).map_err(|error| failed(what, error))
}

/// Name of the cluster and a token.
pub fn token(own: &Config, what: &str) -> Result<(String, String), Trouble> {
    let cluster = Cluster::load(&own.paths.state).map_err(|error| failed(what, error))?;
    let next = "make a cluster with `mainstay cluster init NAME`, or join one";
    let cluster = cluster.ok_or_else(|| Trouble::new(FAILED, what, "this host is a member of no cluster", next))?;
    let control = match cluster.me() {
        Some(me) => me.control,
        None => return Err(Trouble::new(FAILED, what, "this host was removed from its cluster", "ask another member")),
    };
    let token = cluster.token(control).to_string();
    Ok((cluster.settings.name, token))
}

fn here(own: &Config, what: &str) -> Result<Here, Trouble> {
    own.here().map_err(|error| failed(what, error))
}

/// These errors name their cure themselves.
fn failed(what: &str, error: impl std::fmt::Display) -> Trouble {
    Trouble::new(FAILED, what, error.to_string(), "")
}
