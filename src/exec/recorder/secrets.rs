//! Secrets of fence devices are covered before anything is written down.
//!
//! They come in settings documents, in changes of them, and in orders to a device. Each is replaced by a fingerprint of the same
//! length that only this process can make: equal ones stay equal, and a guess cannot be tried.

use std::hash::{BuildHasher, RandomState};

use crate::core::action::{Action, Output};
use crate::core::event::{Event, Outcome};
use crate::types::control::{Reply, Request};
use crate::types::power::{FenceDevice, Secret};
use crate::types::settings::{ClusterSettings, SettingsChange};

/// Covers secrets. Its key is random and never shown.
#[derive(Debug, Default)]
pub struct Cover(RandomState);

impl Cover {
    /// The document without them.
    pub fn settings(&self, settings: &ClusterSettings) -> ClusterSettings {
        let mut settings = settings.clone();
        settings.power.devices.iter_mut().for_each(|device| self.device(device));
        settings
    }

    /// The event without them; none = it has none.
    pub fn event(&self, event: &Event) -> Option<Event> {
        let mut event = match event {
            Event::Asked { request, .. } if has_settings(request) => event.clone(),
            Event::Done(_, Outcome::Reply(Ok(Reply::Settings(_)))) => event.clone(),
            _ => return None,
        };
        match &mut event {
            Event::Asked { request, .. } => self.request(request),
            Event::Done(_, Outcome::Reply(Ok(reply))) => self.reply(reply),
            _ => {}
        }
        Some(event)
    }

    /// The answer without them; none = it has none.
    pub fn output(&self, output: &Output) -> Option<Output> {
        let has = |action: &Action| match action {
            Action::Send { request, .. } => has_settings(request),
            Action::Answer(_, reply) => matches!(reply, Reply::Settings(_)),
            Action::Apply(_) | Action::Power { .. } => true,
            _ => false,
        };
        if output.save.is_none() && !output.actions.iter().any(has) {
            return None;
        }
        let mut output = output.clone();
        if let Some(settings) = &mut output.save {
            **settings = self.settings(settings);
        }
        for action in &mut output.actions {
            match action {
                Action::Send { request, .. } => self.request(request),
                Action::Answer(_, reply) => self.reply(reply),
                Action::Apply(settings) => **settings = self.settings(settings),
                Action::Power { device, .. } => self.device(device),
                _ => {}
            }
        }
        Some(output)
    }

    fn request(&self, request: &mut Request) {
        match request {
            Request::Settings(settings) => **settings = self.settings(settings),
            Request::Change(change) => {
                if let SettingsChange::AddFenceDevice(device) = &mut **change {
                    self.device(device);
                }
            }
            Request::Report(_)
            | Request::FetchSettings
            | Request::Run(_)
            | Request::PutDown(_)
            | Request::Yield { .. }
            | Request::Evacuate { .. }
            | Request::Vm(_)
            | Request::Incoming(_)
            | Request::Handed { .. }
            | Request::Dropped { .. }
            | Request::Handover(_)
            | Request::Spent { .. }
            | Request::View
            | Request::Notes { .. }
            | Request::PoweredOff { .. }
            | Request::Join(_) // Not for the core.
            | Request::Twins { .. }
            | Request::WhatIf { .. }
            | Request::Explain { .. }
            | Request::Guest(_)
            | Request::Verdicts(_) => {}
        }
    }

    fn reply(&self, reply: &mut Reply) {
        if let Reply::Settings(settings) = reply {
            **settings = self.settings(settings);
        }
    }

    fn device(&self, device: &mut FenceDevice) {
        for Secret(secret) in device.secrets.values_mut() {
            let print = format!("{:016x}", self.0.hash_one(&*secret));
            *secret = print.chars().cycle().take(secret.len()).collect();
        }
    }
}

fn has_settings(request: &Request) -> bool {
    matches!(request, Request::Settings(_) | Request::Change(_))
}
