//! `mainstay vm …`.

use serde_json::json;

use super::args::{OnDoubtArgument, VmCommand};
use super::lists::{state, vm_table};
use super::out::{Out, Tone, Word};
use super::status::view;
use super::trouble::{Trouble, What};
use crate::api::dbus::client::Agent;
use crate::api::dbus::resolve;
use crate::types::settings::OnDoubt;
use crate::types::view::{ClusterView, VIEW_SCHEMA, VmView};

/// Runs it.
pub async fn run(out: &mut Out, json: bool, command: VmCommand) -> Result<(), Trouble> {
    match command {
        VmCommand::List => {
            let (_, view) = view("VMs were not listed").await?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "vms": view.vms }))?);
            }
            Ok(out.line(&vm_table(out, &view.vms))?)
        }
        VmCommand::Show { vm } => {
            let what = format!("VM \"{vm}\" was not shown");
            let (_, view) = view(&what).await?;
            let vm = resolve::vm(&view, &vm).what(&what)?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "vm": vm }))?);
            }
            Ok(out.line(&fields(out, vm))?)
        }
        VmCommand::Explain { vm } => {
            let (agent, vm, what) = known(&vm, "explained").await?;
            let vm = agent.explain(&vm.id.to_string()).await.what(&what)?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "vm": vm }))?);
            }
            Ok(explain(out, &vm)?)
        }
        VmCommand::Failures { vm, show, export, host } => {
            super::failures::run(out, json, &vm, host.as_deref(), show, export).await
        }
        VmCommand::Start { vm } => {
            let (agent, vm, what) = known(&vm, "started").await?;
            let id = vm.id.to_string();
            let said = out.progress(&format!("starting {}", vm.name), agent.start(&id)).await.what(&what)?;
            done(out, json, &vm.name, &said)
        }
        VmCommand::Retry { vm } => retry(out, json, &vm).await,
        VmCommand::Stop { vm, force } => {
            let (agent, vm, what) = known(&vm, "stopped").await?;
            let (id, text) = (vm.id.to_string(), format!("stopping {}", vm.name));
            let said = match force {
                true => out.progress(&text, agent.stop_by_force(&id)).await,
                false => out.progress(&text, agent.stop(&id)).await,
            };
            done(out, json, &vm.name, &said.what(&what)?)
        }
        VmCommand::Set { vm, on_doubt } => {
            let (agent, vm, what) = known(&vm, "changed").await?;
            let (id, wanted) = (vm.id.to_string(), policy(on_doubt));
            let said = out.progress(&format!("changing {}", vm.name), agent.set_on_doubt(&id, wanted)).await;
            done(out, json, &vm.name, &said.what(&what)?)
        }
        VmCommand::EnableGuest { vm } => {
            let (agent, vm, what) = known(&vm, "given a port").await?;
            let (id, text) = (vm.id.to_string(), format!("giving {} a port", vm.name));
            let said = out.progress(&text, agent.enable_guest(&id)).await.what(&what)?;
            done(out, json, &vm.name, &said)
        }
        VmCommand::Move { vm, to } => {
            let what = format!("VM \"{vm}\" was not moved");
            let (agent, view) = view(&what).await?;
            let vm = resolve::vm(&view, &vm).what(&what)?;
            let (id, to) = (vm.id.to_string(), target(&view, to, &what)?);
            let said = out.progress(&format!("moving {}", vm.name), agent.move_to(&id, to.as_deref())).await;
            done(out, json, &vm.name, &said.what(&what)?)
        }
    }
}

async fn retry(out: &mut Out, json: bool, vm: &str) -> Result<(), Trouble> {
    let (agent, vm, what) = known(vm, "tried again").await?;
    let said = agent.retry(&vm.id.to_string()).await.what(&what)?;
    done(out, json, &vm.name, &said)
}

fn policy(argument: OnDoubtArgument) -> Option<OnDoubt> {
    match argument {
        OnDoubtArgument::Pause => Some(OnDoubt::Pause),
        OnDoubtArgument::RunUntilStop => Some(OnDoubt::RunUntilStop),
        OnDoubtArgument::Default => None,
    }
}

fn target(view: &ClusterView, to: Option<String>, what: &str) -> Result<Option<String>, Trouble> {
    let Some(name) = to else { return Ok(None) };
    Ok(Some(resolve::host(view, &name).what(what)?.id.to_string()))
}

/// The VM that is meant, and the beginning of an error about it.
async fn known(vm: &str, verb: &str) -> Result<(Agent, VmView, String), Trouble> {
    let what = format!("VM \"{vm}\" was not {verb}");
    let (agent, view) = view(&what).await?;
    let vm = resolve::vm(&view, vm).what(&what)?.clone();
    Ok((agent, vm, what))
}

/// Passes on the agent's word about an object.
pub fn done(out: &mut Out, json: bool, object: &str, said: &str) -> Result<(), Trouble> {
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "object": object, "done": said }))?);
    }
    Ok(out.line(&out.wrapped(&format!("{object}: "), said))?)
}

fn fields(out: &Out, vm: &VmView) -> String {
    let protected = if vm.protected { Word::new("yes", Tone::Good) } else { Word::new("no", Tone::Doubtful) };
    out.fields(&[
        ("VM", Word::plain(&vm.name)),
        ("UUID", Word::plain(vm.id.to_string())),
        ("State", Word::new(&vm.state, state(vm))),
        ("Wanted", Word::or_dash(vm.wanted.as_deref())),
        ("Host", Word::or_dash(vm.host.as_deref())),
        ("Generation", Word::plain(vm.generation.map_or("-".into(), |generation| generation.to_string()))),
        ("Protected", protected),
        ("Home", Word::or_dash(vm.home.as_deref())),
        ("On doubt", Word::or_dash(Some(vm.on_doubt.as_str()).filter(|policy| !policy.is_empty()))),
        ("Why", Word::plain(vm.why.clone().unwrap_or_default())),
    ])
}

fn explain(out: &mut Out, vm: &VmView) -> std::io::Result<()> {
    out.line(&fields(out, vm))?;
    if !vm.explain.is_empty() {
        out.line("")?;
    }
    for line in &vm.explain {
        out.line(&out.wrapped("- ", line))?;
    }
    Ok(())
}
