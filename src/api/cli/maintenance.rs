//! `mainstay host maintenance …`: tells the cluster, and waits until the host is empty, or full again.

use std::time::Duration;

use serde_json::json;

use super::agent;
use super::args::MaintenanceCommand;
use super::datastore::need_root;
use super::out::Out;
use super::status::view;
use super::trouble::{FAILED, Trouble, What};
use crate::api::dbus::client::Agent;
use crate::api::dbus::resolve;
use crate::types::HostId;
use crate::types::settings::{HostChange, SettingsChange};
use crate::types::view::{MaintenanceView, VIEW_SCHEMA};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Does it.
pub async fn run(out: &mut Out, json: bool, command: MaintenanceCommand) -> Result<(), Trouble> {
    let (name, enter, back, wait) = match command {
        MaintenanceCommand::Enter { host, no_wait } => (host, true, false, !no_wait),
        MaintenanceCommand::Leave { host, stay, no_wait } => (host, false, !stay, !no_wait),
    };
    let what = format!("maintenance of \"{name}\" was not {}", if enter { "begun" } else { "ended" });
    need_root(&what)?;
    let (_, seen) = view(&what).await?;
    let host = resolve::host(&seen, &name).what(&what)?;
    let (id, name) = (host.id, host.name.clone());
    let change = match enter {
        true => HostChange::EnterMaintenance { host: id },
        false => HostChange::LeaveMaintenance { host: id, back },
    };
    let agent = agent(&what).await?;
    agent.change(&SettingsChange::Host(change)).await.what(&what)?;
    if !wait {
        return done(
            out,
            json,
            &name,
            if enter { "its VMs are being moved away" } else { "its VMs are being moved back" },
        );
    }
    let left = out.progress(&format!("moving VMs of {name}"), until_moved(&agent, id)).await?;
    let stay = left.map(|left| left.stay).unwrap_or_default();
    if !stay.is_empty() {
        let why: Vec<String> = stay.iter().map(|(vm, why)| format!("{vm}: {why}")).collect();
        let next = "they are tried again every 30 s; stop them (mainstay vm stop), or make room";
        return Err(Trouble::new(FAILED, format!("not all VMs of {name} were moved"), why.join("; "), next));
    }
    done(out, json, &name, if enter { "is empty: nothing that is protected runs there" } else { "takes part again" })
}

/// `mainstay host release`.
pub async fn release(out: &mut Out, json: bool, names: &[String]) -> Result<(), Trouble> {
    let what = format!("{} was not released", names.join(", "));
    need_root(&what)?;
    let (_, seen) = view(&what).await?;
    let mut hosts = Vec::new();
    for name in names {
        hosts.push(resolve::host(&seen, name).what(&what)?);
    }
    let agent = agent(&what).await?;
    for host in &hosts {
        agent.change(&SettingsChange::Host(HostChange::Release { host: host.id })).await.what(&what)?;
    }
    let released: Vec<&str> = hosts.iter().map(|host| host.name.as_str()).collect();
    done(out, json, &released.join(", "), "VMs may be placed there again")
}

/// Until none is left, or all that are left stay where they are.
async fn until_moved(agent: &Agent, host: HostId) -> Result<Option<MaintenanceView>, Trouble> {
    loop {
        tokio::time::sleep(LOOK).await;
        let view = agent.view().await.what("it goes on, but how far it is cannot be seen")?;
        let now = view.hosts.into_iter().find(|seen| seen.id == host).and_then(|host| host.maintenance);
        match now {
            None => return Ok(None),
            Some(now) if now.stay.len() == now.left as usize && (!now.ends || now.left > 0) => return Ok(Some(now)),
            Some(_) => {}
        }
    }
}

fn done(out: &mut Out, json: bool, host: &str, text: &str) -> Result<(), Trouble> {
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "host": host, "done": text }))?);
    }
    Ok(out.line(&format!("{host}: {text}."))?)
}
