//! Membership of this host: who it is, which cluster it belongs to, and the keys that prove it.
//!
//! ```text
//! /var/lib/mainstay (0700)                                     token.rs         "mst1-…", what an operator carries
//!   host.id  host.key        chosen by the host, kept           certificates.rs  authority and host certificates
//!   host.pem ca.pem ca.key   from init, or from the member      tls.rs           who may talk to whom
//!   keys.json join.secret      that admitted us                 join.rs          the two sides of joining
//!   settings.json            written last: exists = member      files.rs         beside, fsync, rename
//! ```
//!
//! Every file is replaced whole. A crash in the middle of `init` or `join` leaves no `settings.json`, so the host is no
//! member and the command can be given again; it then uses the same host id and key, and a member that had admitted
//! the host already admits it once more as the same one.
//!
//! Not here: who may change the settings (core), how they travel (api/control.rs), the incarnation (exec/state.rs).

mod certificates;
mod files;
pub mod frames;
mod join;
pub mod tls;
mod token;

use std::path::{Path, PathBuf};

use uuid::Uuid;
use zeroize::Zeroizing;

pub use certificates::{BadCertificate, host_of};
pub use files::FileError;
pub use join::{JoinError, admit, join, with_member};
pub use token::{BadToken, Token};

use crate::config::{Here, NotHere};
use crate::exec::clock;
use crate::types::control::Joined;
use crate::types::guard::BeatKey;
use crate::types::power::PowerSettings;
use crate::types::settings::{ClusterSettings, MemberSettings, Timing, VmDefaults};
use crate::types::{ClusterId, HostId, HostIndex};

/// Version of the settings document's format.
pub const SETTINGS_SCHEMA: u16 = 1;
/// Longest name of a cluster.
const MAX_NAME: usize = 63;

/// This host as a member.
#[derive(Clone)]
pub struct Cluster {
    /// This host's id.
    pub host: HostId,
    /// The cluster's document, as this host knows it.
    pub settings: ClusterSettings,
    /// Ring of beat keys; the first seals.
    pub keys: Vec<BeatKey>,
    /// The cluster's certificate authority, PEM.
    pub ca_pem: String,
    /// This host's certificate, PEM.
    pub certificate_pem: String,
    ca_key_pem: Zeroizing<String>,
    key_pem: Zeroizing<String>,
    join_secret: Zeroizing<[u8; 32]>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cluster({:?}, {:?}, …)", self.settings.name, self.host)
    }
}

/// Why membership cannot be read, made or changed. Nothing was changed unless the text says so.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file says what it cannot mean.
    #[error("{path}: {why}; {cure}", path = .path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do.
        cure: &'static str,
    },
    /// The host belongs to a cluster.
    #[error("this host is a member of cluster {0:?} already; nothing was changed")]
    Already(String),
    /// Another init or join is under way.
    #[error("another `mainstay cluster init` or `join` is under way on this host; nothing was changed")]
    Busy,
    /// The name cannot be used.
    #[error("{0:?} cannot be the name of a cluster; use 1 to 63 letters, digits, '-', '_' and '.'")]
    Name(String),
    /// The host does not tell who it is.
    #[error(transparent)]
    NotHere(#[from] NotHere),
    /// Keys or certificates cannot be made or used.
    #[error(transparent)]
    Certificate(#[from] BadCertificate),
}

const CURE_COPY: &str = "copy this file from another member, it is the same on all; VMs are not touched meanwhile";
const CURE_OWN: &str = "restore it from a backup of this host; VMs are not touched meanwhile";

impl Cluster {
    /// Reads what this host is a member of; `None` = of nothing.
    ///
    /// # Errors
    /// When it is a member, but a file is missing, unreadable or contradicts the others.
    pub fn load(dir: &Path) -> Result<Option<Self>, ClusterError> {
        let Some(text) = files::read(dir, "settings.json")? else { return Ok(None) };
        let settings: ClusterSettings = from_json(dir, "settings.json", &text)?;
        let keys: Vec<BeatKey> = from_json(dir, "keys.json", &needed(dir, "keys.json", CURE_COPY)?)?;
        let broken = |name, why: &str, cure| ClusterError::Broken { path: dir.join(name), why: why.into(), cure };
        if settings.schema != SETTINGS_SCHEMA {
            let why = format!("has format {}, this program reads {SETTINGS_SCHEMA}", settings.schema);
            return Err(broken("settings.json", &why, "install the version of Mainstay that the other members run"));
        }
        if keys.is_empty() {
            return Err(broken("keys.json", "holds no key", CURE_COPY));
        }
        let host = read_host_id(dir)?.ok_or_else(|| broken("host.id", "is missing", CURE_OWN))?;
        let secret = needed(dir, "join.secret", CURE_COPY)?;
        let cluster = Self {
            host,
            settings,
            keys,
            ca_pem: needed(dir, "ca.pem", CURE_COPY)?.to_string(),
            certificate_pem: needed(dir, "host.pem", CURE_OWN)?.to_string(),
            ca_key_pem: needed(dir, "ca.key", CURE_COPY)?,
            key_pem: needed(dir, "host.key", CURE_OWN)?,
            join_secret: from_hex(&secret).ok_or_else(|| broken("join.secret", "is no 32 bytes", CURE_COPY))?,
        };
        cluster.check(dir)?;
        Ok(Some(cluster))
    }

    /// Makes a cluster with this host as its only member, index 0, and the token that lets others join.
    ///
    /// # Errors
    /// When the host is a member already, the name cannot be used, or a file cannot be written; then it is no member.
    pub fn init(dir: &Path, name: &str, here: &Here, timing: Timing) -> Result<(Self, Token), ClusterError> {
        let usable = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if name.is_empty() || MAX_NAME < name.len() || !name.bytes().all(usable) {
            return Err(ClusterError::Name(name.chars().take(80).collect()));
        }
        let _lock = lock_for_change(dir)?;
        let host = own_host_id(dir)?;
        let key = own_key(dir)?;
        let cluster = ClusterId(new_uuid());
        let (ca_pem, ca_key_pem) = certificates::authority(name, cluster)?;
        let csr = certificates::request(&key)?;
        let certificate_pem = certificates::sign(&ca_pem, &ca_key_pem, &csr, host, &here.name)?;
        let settings = ClusterSettings {
            schema: SETTINGS_SCHEMA,
            version: 1,
            cluster,
            name: name.into(),
            timing,
            members: vec![MemberSettings {
                index: HostIndex(0),
                host,
                name: here.name.clone(),
                control: here.control,
                migration_uri: here.migration_uri.clone(),
                released: 0,
            }],
            datastores: Vec::new(),
            vms: VmDefaults::default(),
            power: PowerSettings::default(),
            foreign_migration: Default::default(),
            guests: Default::default(),
            rules: Default::default(),
            maintenance: Vec::new(),
            disarmed: None,
        };
        let cluster = Self {
            host,
            settings,
            keys: vec![BeatKey { id: 1, secret: clock::random() }],
            ca_pem,
            certificate_pem,
            ca_key_pem,
            key_pem: key,
            join_secret: Zeroizing::new(clock::random()),
        };
        cluster.check(dir)?;
        cluster.store(dir)?;
        let token = cluster.token(here.control);
        Ok((cluster, token))
    }

    /// What another host needs to join through the member that listens at `control`.
    #[must_use]
    pub fn token(&self, control: std::net::SocketAddr) -> Token {
        let authority = tls::fingerprint(&self.ca_pem).expect("the authority was read when the cluster was loaded");
        Token { cluster: self.settings.cluster, control, secret: self.join_secret.clone(), authority }
    }

    /// This host's entry of the document; none once it was removed.
    #[must_use]
    pub fn me(&self) -> Option<&MemberSettings> {
        self.settings.member(self.host)
    }

    /// What is sent to a host that was admitted, with the document in which it is a member.
    #[must_use]
    pub fn joined(&self, settings: ClusterSettings, certificate_pem: String) -> Joined {
        Joined {
            settings,
            keys: self.keys.clone(),
            ca_pem: self.ca_pem.clone(),
            ca_key_pem: self.ca_key_pem.to_string(),
            certificate_pem,
            join_secret: *self.join_secret,
        }
    }

    /// Everything fits together: the certificate is of this host, of this authority and of this key.
    fn check(&self, dir: &Path) -> Result<(), ClusterError> {
        let broken = |name, why: String, cure| ClusterError::Broken { path: dir.join(name), why, cure };
        tls::fingerprint(&self.ca_pem).map_err(|error| broken("ca.pem", error.to_string(), CURE_COPY))?;
        certificates::authority_fits(&self.ca_pem, &self.ca_key_pem)
            .map_err(|error| broken("ca.key", error.to_string(), CURE_COPY))?;
        let named = tls::certificate(&self.certificate_pem)
            .and_then(|der| host_of(&der))
            .map_err(|error| broken("host.pem", error.to_string(), CURE_OWN))?;
        if named != self.host {
            return Err(broken("host.pem", format!("is of host {named}, host.id says {}", self.host), CURE_OWN));
        }
        tls::server(self).map_err(|error| broken("host.key", error.to_string(), CURE_OWN))?;
        Ok(())
    }

    /// Writes every file; `settings.json` last, since it makes the host a member.
    fn store(&self, dir: &Path) -> Result<(), ClusterError> {
        let keys = Zeroizing::new(to_json(&self.keys));
        let secret = Zeroizing::new(to_hex(&*self.join_secret));
        files::write(dir, "host.id", format!("{}\n", self.host).as_bytes())?;
        files::write(dir, "host.key", self.key_pem.as_bytes())?;
        files::write(dir, "host.pem", self.certificate_pem.as_bytes())?;
        files::write(dir, "ca.pem", self.ca_pem.as_bytes())?;
        files::write(dir, "ca.key", self.ca_key_pem.as_bytes())?;
        files::write(dir, "keys.json", keys.as_bytes())?;
        files::write(dir, "join.secret", secret.as_bytes())?;
        save_settings(dir, &self.settings)
    }
}

/// Replaces the document on disk; durable when this returns.
///
/// # Errors
/// When the file cannot be written; the old one then still stands.
pub fn save_settings(dir: &Path, settings: &ClusterSettings) -> Result<(), ClusterError> {
    Ok(files::write(dir, "settings.json", to_json(settings).as_bytes())?)
}

/// Held while membership is made; refuses if there is one.
fn lock_for_change(dir: &Path) -> Result<files::Lock, ClusterError> {
    let lock = files::lock(dir)?.ok_or(ClusterError::Busy)?;
    match files::read(dir, "settings.json")? {
        None => Ok(lock),
        Some(text) => {
            let name = serde_json::from_str::<ClusterSettings>(&text).map_or("?".into(), |settings| settings.name);
            Err(ClusterError::Already(name))
        }
    }
}

/// The host's id; chosen and made durable if there is none, so that a join that is tried again is the same host's.
fn own_host_id(dir: &Path) -> Result<HostId, ClusterError> {
    if let Some(host) = read_host_id(dir)? {
        return Ok(host);
    }
    let host = HostId(new_uuid());
    files::write(dir, "host.id", format!("{host}\n").as_bytes())?;
    Ok(host)
}

fn read_host_id(dir: &Path) -> Result<Option<HostId>, ClusterError> {
    let Some(text) = files::read(dir, "host.id")? else { return Ok(None) };
    text.trim().parse().map(Some).map_err(|_| ClusterError::Broken {
        path: dir.join("host.id"),
        why: "is no UUID".into(),
        cure: CURE_OWN,
    })
}

/// The host's private key, PEM; made and durable if there is none or it cannot be used.
fn own_key(dir: &Path) -> Result<Zeroizing<String>, ClusterError> {
    if let Some(key) = files::read(dir, "host.key")?
        && certificates::request(&key).is_ok()
    {
        return Ok(key);
    }
    let key = certificates::key()?;
    files::write(dir, "host.key", key.as_bytes())?;
    Ok(key)
}

fn needed(dir: &Path, name: &'static str, cure: &'static str) -> Result<Zeroizing<String>, ClusterError> {
    let broken = || ClusterError::Broken { path: dir.join(name), why: "is missing".into(), cure };
    files::read(dir, name)?.ok_or_else(broken)
}

fn from_json<T: serde::de::DeserializeOwned>(dir: &Path, name: &str, text: &str) -> Result<T, ClusterError> {
    serde_json::from_str(text).map_err(|error| ClusterError::Broken {
        path: dir.join(name),
        why: error.to_string(),
        cure: CURE_COPY,
    })
}

fn to_json<T: serde::Serialize>(value: &T) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain data can always be written as JSON");
    text.push('\n');
    text
}

fn to_hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

fn from_hex(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let bytes = Zeroizing::new(data_encoding::HEXLOWER.decode(text.trim().as_bytes()).ok()?);
    Some(Zeroizing::new(<[u8; 32]>::try_from(bytes.as_slice()).ok()?))
}

fn new_uuid() -> Uuid {
    uuid::Builder::from_random_bytes(clock::random()).into_uuid()
}

#[cfg(test)]
mod tests;
