//! Power switches of hosts: fence-agents programs, when they are used, and what they are asked.
//!
//! A device belongs to one host. All devices of a level must say that the host is off (two power supplies); the next
//! level is tried when one fails. Everything lies in the cluster's settings document, which only root can read on a host
//! and which travels over TLS; secrets are never shown, logged, or given to a program but by its standard input.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::HostId;

/// How many devices a cluster can have: two for each host.
pub const MAX_FENCE_DEVICES: usize = 256;
/// Bytes of one device's parameters and secrets, so that the whole document fits into one frame.
pub const MAX_DEVICE_BYTES: usize = 2048;
/// Bytes of a name.
const MAX_NAME: usize = 32;
/// Names of parameters by which fence agents know a secret.
const SECRETS: [&str; 6] = ["password", "passwd", "snmp_priv_passwd", "api_key", "token", "secret"];

/// When a host that is silent everywhere is powered off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FenceAt {
    /// When its lease must have lapsed: a living host loses nothing that it had not lost already.
    #[default]
    Lapse,
    /// As soon as it is suspected: the fastest failover; a stall of network and storage at once may cost a host.
    Suspect,
}

impl fmt::Display for FenceAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lapse => "lapse",
            Self::Suspect => "suspect",
        })
    }
}

/// A value that is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// One power switch of one host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceDevice {
    /// Its name, for people; unique in the cluster.
    pub name: String,
    /// The host that it switches.
    pub host: HostId,
    /// `fence_…`, looked for where packages put it, or an absolute path.
    pub agent: String,
    /// Lower ones are tried first.
    pub level: u8,
    /// Given to the program as `key=value` lines.
    pub parameters: BTreeMap<String, String>,
    /// The same, never shown.
    pub secrets: BTreeMap<String, Secret>,
    /// Instead of the cluster's.
    pub fence_at: Option<FenceAt>,
    /// It said that a host was off which was not: not used until a person trusts it again.
    pub distrusted: Option<String>,
}

/// Why a device cannot be used as it is described.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadDevice {
    /// Of the device.
    #[error("{0:?} cannot be the name of a fence device; use 1 to {MAX_NAME} letters, digits, '-', '_' or '.'")]
    Name(String),
    /// Neither a name nor a path.
    #[error("{0:?} is no fence agent; say fence_… as installed in /usr/sbin, or an absolute path")]
    Agent(String),
    /// Levels count from 1.
    #[error("level 0 does not exist; levels are 1 to 255")]
    Level,
    /// A key that fence agents cannot read, or one that Mainstay sets itself.
    #[error("{0:?} cannot be a parameter; use letters, digits, '-' and '_', and leave 'action' to Mainstay")]
    Key(String),
    /// A line break would be another parameter.
    #[error("the value of {0} holds a line break or another control character")]
    Value(String),
    /// It would be shown.
    #[error("{0} is a secret and would be shown; give it with --secrets FILE")]
    Shown(String),
    /// See there.
    #[error("its parameters are longer than {MAX_DEVICE_BYTES} bytes")]
    Long,
}

impl FenceDevice {
    /// Whether it can be used as it is described.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadDevice> {
        let letters = |text: &str, more: &str| {
            !text.is_empty() && text.chars().all(|letter| letter.is_ascii_alphanumeric() || more.contains(letter))
        };
        if MAX_NAME < self.name.len() || !letters(&self.name, "-_.") {
            return Err(BadDevice::Name(self.name.chars().take(80).collect()));
        }
        let named = self.agent.starts_with("fence_") && letters(&self.agent, "_-");
        let path = self.agent.starts_with('/') && !self.agent.chars().any(char::is_control);
        if !named && !path || MAX_DEVICE_BYTES < self.agent.len() {
            return Err(BadDevice::Agent(self.agent.chars().take(80).collect()));
        }
        if self.level == 0 {
            return Err(BadDevice::Level);
        }
        let secrets = self.secrets.iter().map(|(key, value)| (key, &value.0));
        let mut bytes = 0;
        for (key, value) in self.parameters.iter().chain(secrets) {
            if !letters(key, "-_") || key == "action" {
                return Err(BadDevice::Key(key.chars().take(80).collect()));
            }
            if value.chars().any(char::is_control) {
                return Err(BadDevice::Value(key.clone()));
            }
            bytes += key.len() + value.len() + 2;
        }
        if let Some(key) = self.parameters.keys().find(|key| SECRETS.contains(&key.as_str())) {
            return Err(BadDevice::Shown(key.clone()));
        }
        if MAX_DEVICE_BYTES < bytes { Err(BadDevice::Long) } else { Ok(()) }
    }
}

/// How hosts are powered off.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PowerSettings {
    /// When, for devices that do not say otherwise.
    pub fence_at: FenceAt,
    /// By name.
    pub devices: Vec<FenceDevice>,
}

/// What a device is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PowerOrder {
    /// Switch the host off.
    Off,
    /// Is the host on?
    Status,
    /// Does the device answer at all?
    Monitor,
}

impl PowerOrder {
    /// The word of the fence agents' protocol.
    #[must_use]
    pub fn action(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Status => "status",
            Self::Monitor => "monitor",
        }
    }
}

/// What a device says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PowerAnswer {
    /// Of `Off` and `Monitor`: done.
    Done,
    /// Of `Status`.
    On,
    /// Of `Status`.
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> FenceDevice {
        FenceDevice {
            name: "ipmi-a".into(),
            host: HostId::default(),
            agent: "fence_ipmilan".into(),
            level: 1,
            parameters: [("ip".into(), "10.0.0.1".into())].into(),
            secrets: [("password".into(), Secret("x y=z".into()))].into(),
            fence_at: None,
            distrusted: None,
        }
    }

    #[test]
    fn devices_that_can_and_cannot_be_used() {
        type Change = fn(&mut FenceDevice);
        let table: [(Change, Result<(), &str>); 13] = [
            (|_| {}, Ok(())),
            (|d| d.agent = "/opt/my fence".into(), Ok(())),
            (|d| d.name = String::new(), Err("name of a fence device")),
            (|d| d.name = "a b".into(), Err("name of a fence device")),
            (|d| d.agent = "rm".into(), Err("is no fence agent")),
            (|d| d.agent = "fence_/../x".into(), Err("is no fence agent")),
            (|d| d.agent = "./fence_x".into(), Err("is no fence agent")),
            (|d| d.level = 0, Err("level 0")),
            (|d| drop(d.parameters.insert("action".into(), "on".into())), Err("leave 'action'")),
            (|d| drop(d.parameters.insert("a=b".into(), "c".into())), Err("cannot be a parameter")),
            (|d| drop(d.secrets.insert("token".into(), Secret("a\naction=on".into()))), Err("line break")),
            (|d| drop(d.parameters.insert("passwd".into(), "x".into())), Err("would be shown")),
            (|d| drop(d.parameters.insert("ssh".into(), "x".repeat(3000))), Err("longer than")),
        ];
        for (n, (change, expected)) in table.into_iter().enumerate() {
            let mut device = device();
            change(&mut device);
            match (device.check(), expected) {
                (Ok(()), Ok(())) => {}
                (Err(why), Err(part)) => assert!(why.to_string().contains(part), "{n}: {why}"),
                (found, _) => panic!("{n}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let text = format!("{:?}", device());
        assert!(!text.contains("x y=z") && text.contains("(secret)"), "{text}");
    }
}
