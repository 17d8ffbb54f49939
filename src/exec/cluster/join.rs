//! Joining, both sides.
//!
//! ```text
//! new host                                   member (the master)
//! host.id, host.key ── Join(secret, csr) ──► admit: secret, names, place
//!                                            settings with the new member: saved, pushed to the others
//! stores all        ◄── Joined ───────────── signed certificate, keys, authority
//! ```
//!
//! If the answer is lost, the host asks again as the same host and gets the same place. Admitting changes nothing by
//! itself; the caller saves `with_member`'s document before it answers.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use rustls::CertificateError;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::{BadCertificate, Cluster, ClusterError, SETTINGS_SCHEMA, Token, certificates, frames, tls};
use crate::config::{Here, is_host_name};
use crate::types::control::{CONTROL_PROTOCOL, Denial, Envelope, JoinRequest, Joined, Reply, ReplyEnvelope, Request};
use crate::types::settings::{ClusterSettings, MemberSettings};
use crate::types::{HostId, HostIndex, MAX_HOSTS, Ticket};
use crate::wire::frame::{self, FrameError, MAX_FRAME};

/// Longest wait for a member's answer, from the first packet to the last.
const PATIENCE: Duration = Duration::from_secs(20);
const MAX_URI: usize = 255;

/// Why a host did not join. It is no member; whether the cluster counts it as one is said.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody listens there.
    #[error("{address}: cannot be reached: {cause}; is mainstayd running there, and TCP port {} open?", .address.port())]
    Unreachable {
        /// From the token.
        address: SocketAddr,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// Somebody else listens there.
    #[error("{0}: is not the cluster that this token is of; make a new token on a member")]
    OtherCluster(SocketAddr),
    /// The connection failed.
    #[error("{address}: {cause}; give the command again, the host keeps its place if it got one")]
    Broken {
        /// From the token.
        address: SocketAddr,
        /// Why.
        #[source]
        cause: FrameError,
    },
    /// No answer in time.
    #[error("{0}: no answer within {PATIENCE:?}; give the command again, the host keeps its place if it got one")]
    Silent(SocketAddr),
    /// The member said no.
    #[error("{address}: refused: {why}")]
    Denied {
        /// From the token.
        address: SocketAddr,
        /// Its reason.
        why: Denial,
    },
    /// The answer contradicts the token or itself.
    #[error("{address}: its answer cannot be used: {why}")]
    Nonsense {
        /// From the token.
        address: SocketAddr,
        /// What is wrong with it.
        why: String,
    },
    /// On this host.
    #[error(transparent)]
    Here(#[from] ClusterError),
}

impl From<BadCertificate> for JoinError {
    fn from(bad: BadCertificate) -> Self {
        Self::Here(bad.into())
    }
}

/// Whether this host may join, and as what: its entry and its certificate (PEM). Changes nothing. A host that is a
/// member already, under the same name and address, gets its own entry again.
///
/// # Errors
/// `NotAllowed`: wrong secret, or no request to sign. `Contradiction`: name, id or address is in use, or cannot be.
/// `Capacity`: no place left.
pub fn admit(cluster: &Cluster, asked: &JoinRequest) -> Result<(MemberSettings, String), Denial> {
    if verify_slices_are_equal(&asked.secret, &*cluster.join_secret).is_err() {
        return Err(Denial::NotAllowed("the token's secret is not that of this cluster; make a new token".into()));
    }
    let member = match cluster.settings.member(asked.host) {
        Some(member) if member.name == asked.name && member.control == asked.control => member.clone(),
        Some(member) => {
            let why = "is host id in use by";
            let cure = "was this host copied from that one? remove /var/lib/mainstay/host.id on the copy";
            return Err(Denial::Contradiction(format!("{} {why} {:?}; {cure}", asked.host, member.name)));
        }
        None => new_member(&cluster.settings, asked)?,
    };
    let signed = certificates::sign(&cluster.ca_pem, &cluster.ca_key_pem, &asked.csr_pem, member.host, &member.name);
    match signed {
        Ok(certificate_pem) => Ok((member, certificate_pem)),
        Err(error) => Err(Denial::NotAllowed(format!("the request cannot be signed: {error}"))),
    }
}

fn new_member(settings: &ClusterSettings, asked: &JoinRequest) -> Result<MemberSettings, Denial> {
    let no = |why: String| Err(Denial::Contradiction(why));
    if !is_host_name(&asked.name) {
        return no(format!("{:?} is no host name; set host.name on that host", clipped(&asked.name)));
    }
    let ip = asked.control.ip();
    if ip.is_unspecified() || ip.is_multicast() || asked.control.port() == 0 {
        return no(format!("{} is no address to listen at; set host.address on that host", asked.control));
    }
    if MAX_URI < asked.migration_uri.len() || !asked.migration_uri.contains("://") {
        return no(format!("{:?} is no migration URI; set libvirt.migration_uri", clipped(&asked.migration_uri)));
    }
    if let Some(other) = settings.members.iter().find(|member| member.name.eq_ignore_ascii_case(&asked.name)) {
        return no(format!(
            "host name {:?} is in use by host {}; set host.name on the new host",
            other.name, other.host
        ));
    }
    if let Some(other) = settings.members.iter().find(|member| member.control == asked.control) {
        return no(format!("address {} is in use by host {:?}; set host.address", other.control, other.name));
    }
    // One more than the highest ever given, as long as members only come.
    let index = settings.members.iter().map(|member| usize::from(member.index.0) + 1).max().unwrap_or(0);
    match u8::try_from(index) {
        Ok(index) if usize::from(index) < MAX_HOSTS => Ok(MemberSettings {
            index: HostIndex(index),
            host: asked.host,
            name: asked.name.clone(),
            control: asked.control,
            migration_uri: asked.migration_uri.clone(),
            released: 0,
        }),
        _ => Err(Denial::Capacity(format!("a cluster has at most {MAX_HOSTS} hosts in its life"))),
    }
}

fn clipped(text: &str) -> String {
    text.chars().take(80).collect()
}

/// The document with this member in it, one version on; unchanged if it is in it already.
#[must_use]
pub fn with_member(settings: &ClusterSettings, member: MemberSettings) -> ClusterSettings {
    let mut settings = settings.clone();
    if settings.member(member.host).is_none() {
        settings.members.push(member);
        settings.members.sort_by_key(|member| member.index);
        settings.version += 1;
    }
    settings
}

/// Joins the token's cluster; when this returns, the host is a member and everything is durable.
///
/// # Errors
/// When it is a member already, the member cannot be reached or refuses, or a file cannot be written.
pub async fn join(dir: &Path, token: &Token, here: &Here) -> Result<Cluster, JoinError> {
    let _lock = super::lock_for_change(dir)?;
    let host = super::own_host_id(dir)?;
    let key_pem = super::own_key(dir)?;
    let request = JoinRequest {
        secret: *token.secret,
        host,
        name: here.name.clone(),
        control: here.control,
        migration_uri: here.migration_uri.clone(),
        csr_pem: certificates::request(&key_pem)?,
    };
    let address = token.control;
    let joined = match tokio::time::timeout(PATIENCE, ask(token, request)).await {
        Ok(answer) => answer?,
        Err(_) => return Err(JoinError::Silent(address)),
    };
    let cluster = member_of(joined, token, host, key_pem, dir).map_err(|why| JoinError::Nonsense { address, why })?;
    cluster.store(dir)?;
    Ok(cluster)
}

async fn ask(token: &Token, request: JoinRequest) -> Result<Joined, JoinError> {
    let address = token.control;
    let broken = |cause: FrameError| JoinError::Broken { address, cause };
    let connector = TlsConnector::from(tls::joiner(token.authority)?);
    let stream = TcpStream::connect(address).await.map_err(|cause| JoinError::Unreachable { address, cause })?;
    let name = ServerName::IpAddress(address.ip().into());
    let mut stream = connector.connect(name, stream).await.map_err(|error| other_cluster(address, error))?;
    let ticket = Ticket(1);
    let envelope = Envelope { protocol: CONTROL_PROTOCOL, ticket, request: Request::Join(Box::new(request)) };
    let frame = Zeroizing::new(frame::encode(&envelope).map_err(|bad| broken(bad.into()))?);
    frames::write(&mut stream, &frame).await.map_err(|error| broken(error.into()))?;
    let body = frames::read(&mut stream, MAX_FRAME).await.map_err(broken)?.ok_or_else(|| broken(FrameError::Cut))?;
    let answer: ReplyEnvelope = frame::decode(&Zeroizing::new(body)).map_err(|bad| broken(bad.into()))?;
    match answer.reply {
        Reply::Joined(joined) if answer.ticket == ticket => Ok(*joined),
        Reply::Denied(why) => Err(JoinError::Denied { address, why }),
        _ => Err(JoinError::Nonsense { address, why: "it answers another question".into() }),
    }
}

fn other_cluster(address: SocketAddr, error: std::io::Error) -> JoinError {
    let issuer = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    if tls == Some(&issuer) {
        return JoinError::OtherCluster(address);
    }
    JoinError::Broken { address, cause: error.into() }
}

/// What the answer makes of this host; refuses an answer that contradicts the token.
fn member_of(
    joined: Joined,
    token: &Token,
    host: HostId,
    key_pem: Zeroizing<String>,
    dir: &Path,
) -> Result<Cluster, String> {
    if joined.settings.schema != SETTINGS_SCHEMA {
        return Err(format!("settings of format {}, this program reads {SETTINGS_SCHEMA}", joined.settings.schema));
    }
    if joined.settings.cluster != token.cluster {
        return Err("it is of another cluster than the token".into());
    }
    if tls::fingerprint(&joined.ca_pem).ok() != Some(token.authority) {
        return Err("its certificate authority is not the token's".into());
    }
    if joined.settings.member(host).is_none() || joined.keys.is_empty() {
        return Err("this host is not in its settings, or there is no key".into());
    }
    let cluster = Cluster {
        host,
        settings: joined.settings,
        keys: joined.keys,
        ca_pem: joined.ca_pem,
        certificate_pem: joined.certificate_pem,
        ca_key_pem: Zeroizing::new(joined.ca_key_pem),
        key_pem,
        join_secret: Zeroizing::new(joined.join_secret),
    };
    cluster.check(dir).map_err(|error| error.to_string())?;
    Ok(cluster)
}
