//! `mainstay host fence-device …`: power switches of hosts.
//!
//! Secrets come from a file or standard input, never from the command line, which everybody on the host can read.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde_json::json;
use zeroize::Zeroizing;

use super::args::{FenceAtArgument, FenceDeviceCommand};
use super::out::{Out, Tone, Word};
use super::status::view;
use super::trouble::{FAILED, Trouble, USAGE, What};
use super::vm;
use crate::api::dbus::resolve;
use crate::types::power::{FenceAt, FenceDevice, MAX_DEVICE_BYTES, Secret};
use crate::types::settings::SettingsChange;
use crate::types::view::{FenceDeviceView, VIEW_SCHEMA};

/// Runs it.
pub async fn run(out: &mut Out, json: bool, command: FenceDeviceCommand) -> Result<(), Trouble> {
    match command {
        FenceDeviceCommand::List => {
            let (_, view) = view("fence devices were not listed").await?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "fence_devices": view.fence_devices }))?);
            }
            Ok(out.line(&table(out, &view.fence_devices))?)
        }
        FenceDeviceCommand::Add { name, host, agent, parameters, secrets, level, fence_at } => {
            let what = format!("fence device \"{name}\" was not added");
            let parameters = pairs(parameters.iter().map(String::as_str), &what)?;
            let secrets = secrets.map(|file| read_secrets(&file, &what)).transpose()?.unwrap_or_default();
            let (bus, view) = view(&what).await?;
            let host = resolve::host(&view, &host).what(&what)?.id;
            let fence_at = fence_at.map(FenceAt::from);
            let device =
                FenceDevice { name: name.clone(), host, agent, level, parameters, secrets, fence_at, distrusted: None };
            device.check().map_err(|why| {
                Trouble::new(USAGE, &what, why.to_string(), "mainstay host fence-device add --help shows an example")
            })?;
            let change = SettingsChange::AddFenceDevice(device);
            let said = out.progress("changing the settings", bus.change(&change)).await.what(&what)?;
            vm::done(out, json, &name, &said)?;
            if json {
                return Ok(());
            }
            Ok(out.line(&out.wrapped("Next: ", &format!("mainstay host fence-device test {name}, on each host")))?)
        }
        FenceDeviceCommand::Remove { name } => {
            change(out, json, &name, "removed", SettingsChange::RemoveFenceDevice(name.clone())).await
        }
        FenceDeviceCommand::Trust { name } => {
            let trust = SettingsChange::TrustFenceDevice { name: name.clone(), distrusted: None };
            change(out, json, &name, "trusted again", trust).await
        }
        FenceDeviceCommand::Test { name } => {
            let what = format!("fence device \"{name}\" does not answer this host");
            let bus = super::agent(&what).await?;
            let said = out.progress("asking it for its status", bus.test_fence_device(&name)).await.what(&what)?;
            vm::done(out, json, &name, &said)
        }
    }
}

async fn change(out: &mut Out, json: bool, name: &str, verb: &str, change: SettingsChange) -> Result<(), Trouble> {
    let what = format!("fence device \"{name}\" was not {verb}");
    let bus = super::agent(&what).await?;
    let said = out.progress("changing the settings", bus.change(&change)).await.what(&what)?;
    vm::done(out, json, name, &said)
}

fn pairs<'text>(texts: impl Iterator<Item = &'text str>, what: &str) -> Result<BTreeMap<String, String>, Trouble> {
    let pair = |text: &str| match text.split_once('=') {
        Some((key, value)) => Ok((key.trim().to_owned(), value.trim().to_owned())),
        None => {
            // What stands there may be a secret that lost its key: it is not shown.
            let next = "write KEY=VALUE, for example ip=10.0.0.1; 'fence_… -o metadata' lists the keys of an agent";
            Err(Trouble::new(USAGE, what, "a parameter is not KEY=VALUE", next))
        }
    };
    texts.map(pair).collect()
}

/// `KEY=VALUE` lines; `-` is standard input.
fn read_secrets(file: &Path, what: &str) -> Result<BTreeMap<String, Secret>, Trouble> {
    let mut text = Zeroizing::new(String::new());
    let most = MAX_DEVICE_BYTES as u64 * 2;
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(most).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(most).read_to_string(&mut text))
    };
    read.map_err(|error| Trouble::new(FAILED, what, format!("{}: {error}", file.display()), "is it there, and text?"))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(pairs(lines, what)?.into_iter().map(|(key, value)| (key, Secret(value))).collect())
}

fn table(out: &Out, devices: &[FenceDeviceView]) -> String {
    let rows = devices.iter().map(|device| {
        let state = match (&device.trouble, device.trusted) {
            (Some(why), false) => Word::new(format!("not used: {why}"), Tone::Bad),
            (Some(why), true) => Word::new(format!("failed: {why}"), Tone::Doubtful),
            (None, _) => Word::plain(""),
        };
        vec![
            Word::name(&device.name),
            Word::name(&device.host),
            Word::plain(&device.agent),
            Word::plain(device.level.to_string()),
            Word::plain(&device.fence_at),
            state,
        ]
    });
    out.table(&["DEVICE", "HOST", "AGENT", "LEVEL", "AT", "TROUBLE"], rows.collect())
}

impl From<FenceAtArgument> for FenceAt {
    fn from(argument: FenceAtArgument) -> Self {
        match argument {
            FenceAtArgument::Lapse => Self::Lapse,
            FenceAtArgument::Suspect => Self::Suspect,
        }
    }
}
