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
        if !of_event(event) {
            return None;
        }
        let mut event = event.clone();
        if let Event::Asked { request, .. } = &mut event {
            self.request(request);
        } else if let Event::Done(_, Outcome::Reply(Ok(reply))) = &mut event {
            self.reply(reply);
        }
        Some(event)
    }

    /// The answer without them; none = it has none.
    pub fn output(&self, output: &Output) -> Option<Output> {
        if output.save.is_none() && !output.actions.iter().any(of_action) {
            return None;
        }
        let mut output = output.clone();
        if let Some(settings) = &mut output.save {
            **settings = self.settings(settings);
        }
        for action in &mut output.actions {
            if let Action::Send { request, .. } = action {
                self.request(request);
            } else if let Action::Answer(_, reply) = action {
                self.reply(reply);
            } else if let Action::Apply(settings) = action {
                **settings = self.settings(settings);
            } else if let Action::Power { device, .. } = action {
                self.device(device);
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

// All are listed: a new one that carries settings is not to be written down by oversight.

fn of_event(event: &Event) -> bool {
    match event {
        Event::Asked { request, .. } => of_request(request),
        Event::Done(_, Outcome::Reply(Ok(reply))) => of_reply(reply),
        Event::Done(_, Outcome::Reply(Err(_)))
        | Event::Done(
            _,
            Outcome::Store(_)
            | Outcome::Domain(_)
            | Outcome::Guard(_)
            | Outcome::Power(_)
            | Outcome::Network(_)
            | Outcome::Fenced(_)
            | Outcome::Access(_)
            | Outcome::Locks(_),
        )
        | Event::Heard(_)
        | Event::HeardTwice(_)
        | Event::GuardConnected
        | Event::Guard(_)
        | Event::GuardLost(_)
        | Event::LibvirtUp
        | Event::LibvirtDown(_)
        | Event::Listed(_)
        | Event::Changed { .. }
        | Event::Hooked { .. }
        | Event::Inside { .. }
        | Event::Day(_)
        | Event::Capacity(_)
        | Event::LockLeases(_)
        | Event::Means(_)
        | Event::Health(_)
        | Event::GoingDown
        | Event::Due => false,
    }
}

fn of_action(action: &Action) -> bool {
    match action {
        Action::Send { request, .. } => of_request(request),
        Action::Answer(_, reply) => of_reply(reply),
        Action::Apply(_) | Action::Power { .. } => true,
        Action::Guard(..)
        | Action::Store { .. }
        | Action::Domain { .. }
        | Action::CallOffPower(_)
        | Action::Fence { .. }
        | Action::AskNetwork { .. }
        | Action::ProbeLocks { .. }
        | Action::ProbeAccess { .. }
        | Action::HookAnswer(..)
        | Action::OpenDatastore(..)
        | Action::Unprotected(_)
        | Action::Underway(_)
        | Action::Note(_)
        | Action::Verdict(_) => false,
    }
}

fn of_reply(reply: &Reply) -> bool {
    match reply {
        Reply::Settings(_) => true,
        Reply::Done
        | Reply::AlreadySo
        | Reply::Denied(_)
        | Reply::Ran { .. }
        | Reply::Joined(_) // Not for the core.
        | Reply::View(_)
        | Reply::Notes(_)
        | Reply::Claimed(_)
        | Reply::Failures(_)
        | Reply::Piece(_)
        | Reply::WhatIf(_)
        | Reply::Explain(_)
        | Reply::Verdicts(_)
        | Reply::Evacuating(_) => false,
    }
}

fn of_request(request: &Request) -> bool {
    matches!(request, Request::Settings(_) | Request::Change(_)) // All are listed in `Cover::request`.
}
