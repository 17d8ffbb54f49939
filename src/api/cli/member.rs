//! The CLI's three words with `exec::cluster`: make, join, token. Each works on this host's own files, without an agent.

use super::trouble::{DENIED, FAILED, Trouble, USAGE};
use crate::config::{Config, Here};
use crate::exec::cluster::{self, Cluster, ClusterError, JoinError, Token};
use crate::types::settings::Timing;

/// Makes a cluster; the token for others.
pub fn init(own: &Config, name: &str, timing: Timing, what: &str) -> Result<String, Trouble> {
    let here = here(own, what)?;
    match Cluster::init(&own.paths.state, name, &here, timing) {
        Ok((_, token)) => Ok(token.to_string()),
        Err(error) => Err(membership(error, what)),
    }
}

/// Joins the cluster of a token; its name.
pub async fn join(own: &Config, token: &str, what: &str) -> Result<String, Trouble> {
    let token: Token = token.parse().map_err(|bad: cluster::BadToken| {
        Trouble::new(USAGE, what, bad.to_string(), "mainstay cluster token on a member prints one")
    })?;
    let here = here(own, what)?;
    match cluster::join(&own.paths.state, &token, &here).await {
        Ok(cluster) => Ok(cluster.settings.name),
        Err(JoinError::Here(error)) => Err(membership(error, what)),
        Err(error @ JoinError::Denied { .. }) => {
            let next = "nothing was changed; mainstay cluster token on a member prints a fresh token";
            Err(Trouble::new(DENIED, what, error.to_string(), next))
        }
        Err(error) => Err(Trouble::new(FAILED, what, error.to_string(), "then give the same command again")),
    }
}

/// Name of the cluster and a token.
pub fn token(own: &Config, what: &str) -> Result<(String, String), Trouble> {
    let cluster = match Cluster::load(&own.paths.state) {
        Ok(Some(cluster)) => cluster,
        Ok(None) => {
            let next = "say it on a member, or make a cluster with mainstay cluster init";
            return Err(Trouble::new(FAILED, what, "this host is no member of a cluster", next));
        }
        Err(error) => return Err(membership(error, what)),
    };
    let control = match cluster.me() {
        Some(me) => me.control,
        None => return Err(Trouble::new(FAILED, what, "this host was removed from its cluster", "say it on a member")),
    };
    Ok((cluster.settings.name.clone(), cluster.token(control).to_string()))
}

fn here(own: &Config, what: &str) -> Result<Here, Trouble> {
    let next = "edit /etc/mainstay/mainstay.toml, then give the command again";
    own.here().map_err(|error| Trouble::new(FAILED, what, error.to_string(), next))
}

/// `ClusterError` says itself what to do where there is something special.
fn membership(error: ClusterError, what: &str) -> Trouble {
    let (code, next) = match &error {
        ClusterError::Already(_) => (FAILED, "mainstay status shows it; mainstay cluster token lets others join"),
        ClusterError::Busy => (FAILED, "wait until it has ended, then mainstay status"),
        ClusterError::Name(_) => (USAGE, "say another --name"),
        ClusterError::File(_) => (FAILED, "is /var/lib/mainstay writable, with room on its file system?"),
        ClusterError::Broken { .. } | ClusterError::NotHere(_) | ClusterError::Certificate(_) => {
            (FAILED, "mainstay doctor says more")
        }
    };
    Trouble::new(code, what, error.to_string(), next)
}
