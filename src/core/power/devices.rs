//! Fence devices in the settings: what may be changed, and how they are shown. Secrets are never shown.

use super::*;
use crate::types::power::{FenceDevice, MAX_FENCE_DEVICES};
use crate::types::settings::ClusterSettings;
use crate::types::view::FenceDeviceView;

impl Core {
    /// Whether a change of fence devices changes anything, or why it contradicts what is.
    pub(in crate::core) fn checked_device(&self, new: &FenceDevice) -> Result<bool, Denial> {
        let devices = &self.settings.power.devices;
        let no = |why: String| Err(Denial::Contradiction(why));
        if let Err(why) = new.check() {
            return no(why.to_string());
        }
        if devices.contains(new) {
            return Ok(false);
        }
        if devices.iter().any(|device| device.name == new.name) {
            return no(format!("a fence device named {} exists already", new.name));
        }
        if self.settings.member(new.host).is_none() {
            return no(format!("host {} is no member of the cluster", new.host));
        }
        if MAX_FENCE_DEVICES <= devices.len() {
            return no(format!("the cluster has {MAX_FENCE_DEVICES} fence devices, which is the limit"));
        }
        Ok(true)
    }

    /// Whether a device of that name exists and `differs`.
    pub(in crate::core) fn checked_name(
        &self,
        name: &str,
        differs: impl Fn(&FenceDevice) -> bool,
    ) -> Result<bool, Denial> {
        match self.settings.power.devices.iter().find(|device| device.name == name) {
            Some(device) => Ok(differs(device)),
            None => Err(Denial::Contradiction(format!(
                "no fence device is named {name}; 'mainstay host fence-device list' shows them"
            ))),
        }
    }

    /// Fence devices as people see them.
    pub(in crate::core) fn device_views(&self) -> Vec<FenceDeviceView> {
        let view = |device: &FenceDevice| FenceDeviceView {
            name: device.name.clone(),
            host: self.name_of(device.host),
            agent: device.agent.clone(),
            level: device.level,
            fence_at: device.fence_at.unwrap_or(self.settings.power.fence_at).to_string(),
            parameters: device.parameters.clone(),
            secrets: device.secrets.keys().cloned().collect(),
            trouble: device
                .distrusted
                .clone()
                .or_else(|| Some(self.power.get(&device.host)?.failed.get(&device.name)?.1.clone())),
            trusted: device.distrusted.is_none(),
        };
        self.settings.power.devices.iter().map(view).collect()
    }

    /// For `vm explain`: what its host's devices would do.
    pub(in crate::core) fn explain_power(&self, host: HostId) -> Option<String> {
        let devices: Vec<&FenceDevice> = self
            .settings
            .power
            .devices
            .iter()
            .filter(|device| device.host == host && device.distrusted.is_none())
            .collect();
        let first = devices.iter().min_by_key(|device| device.level)?;
        let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
        let when = first.fence_at.unwrap_or(self.settings.power.fence_at);
        Some(format!(
            "it would also be switched off, when it is silent on network and storage (fence-at {when}), by {}; that proves it, \
             and excludes late writes",
            names.join(", ")
        ))
    }
}

/// Carries out a change of fence devices; a note for people.
pub(in crate::core) fn change(settings: &mut ClusterSettings, change: SettingsChange) -> Option<Note> {
    let power = &mut settings.power;
    Some(match change {
        SettingsChange::SetFenceAt(at) => {
            power.fence_at = at;
            Note::info("fence-at", format!("silent hosts are switched off at {at}, as far as they have fence devices"))
        }
        SettingsChange::AddFenceDevice(new) => {
            let note = Note::info("fence-device", format!("fence device {} ({}) was added", new.name, new.agent));
            power.devices.push(new);
            power.devices.sort_by(|a, b| a.name.cmp(&b.name));
            note
        }
        SettingsChange::RemoveFenceDevice(name) => {
            power.devices.retain(|device| device.name != name);
            Note::info("fence-device", format!("fence device {name} was removed"))
        }
        SettingsChange::TrustFenceDevice { name, distrusted } => {
            let text = match &distrusted {
                Some(why) => format!("fence device {name} is not used any more: {why}"),
                None => format!("fence device {name} is trusted again"),
            };
            for device in power.devices.iter_mut().filter(|device| device.name == name) {
                device.distrusted.clone_from(&distrusted);
            }
            if distrusted.is_some() { Note::warning("fence-device", text) } else { Note::info("fence-device", text) }
        }
        SettingsChange::AddMember(_)
        | SettingsChange::AddDatastore(_)
        | SettingsChange::ChangeDatastore { .. }
        | SettingsChange::SetTiming(_)
        | SettingsChange::SetOnDoubt(_)
        | SettingsChange::SetApdAfter(_)
        | SettingsChange::SetForeignMigration(_)
        | SettingsChange::SetGuests(_)
        | SettingsChange::SetRules(_)
        | SettingsChange::Host(_)
        | SettingsChange::Disarm(_)
        | SettingsChange::AcceptDatastore { .. } => return None,
    })
}
