//! `mainstay status [--watch]`.

use std::time::Duration;

use serde_json::json;

use super::out::{Out, Tone, Word};
use super::trouble::{Trouble, What};
use super::{agent, lists};
use crate::api::dbus::client::{Agent, AgentError};
use crate::types::view::{ClusterView, VIEW_SCHEMA, VmView};

const WATCH_PERIOD: Duration = Duration::from_secs(1);
/// VMs that are not as wanted, shown by name; the rest is counted.
const SHOWN: usize = 20;

/// Runs it.
pub async fn run(out: &mut Out, json: bool, watch: bool) -> Result<(), Trouble> {
    let what = "the status is not known";
    if !watch {
        let view = agent(what).await?.view().await.what(what)?;
        return show(out, json, &view);
    }
    let mut connected: Option<Agent> = None;
    loop {
        // An agent or a bus that is being restarted is no reason to stop watching.
        let seen = match &connected {
            Some(agent) => agent.view().await.what(what),
            None => match agent(what).await {
                Ok(agent) => connected.insert(agent).view().await.what(what),
                Err(trouble) => Err(trouble),
            },
        };
        if out.is_terminal() && !json {
            out.line("\x1b[H\x1b[2J")?;
        }
        match seen {
            Ok(view) => show(out, json, &view)?,
            Err(trouble) => {
                connected = None;
                trouble.print(out);
            }
        }
        if !out.is_terminal() && !json {
            out.line("")?;
        }
        tokio::time::sleep(WATCH_PERIOD).await;
    }
}

/// Only the parts that the agent itself was asked for can fail.
pub async fn view(what: &str) -> Result<(Agent, ClusterView), Trouble> {
    let agent = agent(what).await?;
    let view = agent.view().await.what(what)?;
    if view.schema != VIEW_SCHEMA {
        let newer = format!("its answer has schema {}, this command knows {VIEW_SCHEMA}", view.schema);
        return Err(AgentError::Failed(newer)).what(what);
    }
    Ok((agent, view))
}

fn show(out: &mut Out, json: bool, view: &ClusterView) -> Result<(), Trouble> {
    if json {
        return Ok(out.json(&json!(view))?);
    }
    let Some(cluster) = &view.cluster else {
        let host = if view.seen_by.is_empty() { "This host" } else { &view.seen_by };
        out.line(&format!("{host} is no member of a cluster."))?;
        out.line("Make one with `mainstay cluster init`, or `mainstay cluster join TOKEN`.")?;
        return Ok(());
    };
    let master = match &view.master {
        Some(master) => Word::plain(format!("{master}, term {}", view.term)),
        None => Word::new("none yet: nothing is restarted until one is elected", Tone::Bad),
    };
    let running = view.vms.iter().filter(|vm| vm.state == "running").count();
    let protected = view.vms.iter().filter(|vm| vm.protected).count();
    let vms = format!("{}: {running} running, {protected} protected", view.vms.len());
    let summary = [
        ("Cluster", Word::plain(format!("{cluster}, settings {}, seen by {}", view.settings_version, view.seen_by))),
        ("Master", master),
        ("VMs", Word::plain(vms)),
    ];
    out.line(&out.fields(&summary))?;
    out.line(&format!("\n{}", lists::host_table(out, &view.hosts)))?;
    if view.datastores.is_empty() {
        let none = "No datastore: no VM is protected. Add one with `mainstay datastore add NAME PATH`.";
        out.line(&format!("\n{}", out.wrapped("", none)))?;
    } else {
        out.line(&format!("\n{}", lists::datastore_table(out, &view.datastores)))?;
    }
    if let Some(disarmed) = &view.disarmed {
        out.line("")?;
        out.line(&out.paint(&out.wrapped("DISARMED: ", &format!("{disarmed} (mainstay cluster arm)")), Tone::Bad))?;
    }
    let unwell: Vec<_> = view.hosts.iter().filter(|host| !host.findings.is_empty()).collect();
    if !view.rule_problems.is_empty() || !unwell.is_empty() {
        out.line("")?;
    }
    for host in unwell {
        out.line(&out.wrapped(&format!("{}: ", host.name), &host.findings.join("; ")))?;
    }
    for problem in &view.rule_problems {
        out.line(&out.wrapped("Rules: ", problem))?;
    }
    let odd: Vec<VmView> = view.vms.iter().filter(|vm| is_odd(vm)).cloned().collect();
    if !odd.is_empty() {
        out.line(&format!("\n{}", lists::vm_table(out, &odd[..odd.len().min(SHOWN)])))?;
        if SHOWN < odd.len() {
            out.line(&format!("… and {} more: mainstay vm list", odd.len() - SHOWN))?;
        }
    }
    Ok(())
}

/// Not as wanted, or without protection.
fn is_odd(vm: &VmView) -> bool {
    let as_wanted = match vm.wanted.as_deref() {
        Some("running") => vm.state == "running",
        Some("stopped") => vm.state == "off",
        _ => true,
    };
    !as_wanted || !vm.protected
}
