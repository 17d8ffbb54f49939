//! `mainstay what-if HOST…`: a failure that has not happened.

use super::agent;
use super::out::{Out, Tone, Word};
use super::status::view;
use super::trouble::{Trouble, What};
use crate::api::dbus::resolve;
use crate::types::view::{WhatIfCpu, WhatIfView, WhatIfVm};

/// Asks, and shows a line per VM.
pub async fn run(out: &mut Out, json: bool, hosts: &[String]) -> Result<(), Trouble> {
    let what = "the question was not answered";
    let (_, seen) = view(what).await?;
    let mut names: Vec<&str> = Vec::new();
    for host in hosts {
        names.push(&resolve::host(&seen, host).what(what)?.name);
    }
    let view = agent(what).await?.what_if(&names).await.what(what)?;
    if json {
        return Ok(out.json(&view)?);
    }
    if view.vms.is_empty() {
        return Ok(
            out.line(&format!("No VM would be lost: none that is protected runs on {}.", view.hosts.join(", ")))?
        );
    }
    out.line(&table(out, &view.vms))?;
    out.line("")?;
    for line in slower(&view) {
        out.line(&out.wrapped("", &line))?;
    }
    Ok(out.line(&summary(out, &view))?)
}

fn table(out: &Out, vms: &[WhatIfVm]) -> String {
    let rows = vms.iter().map(|vm| {
        let why = match (&vm.why, vm.after.is_empty()) {
            (Some(why), _) => Word::new(format!("no place: {why}"), Tone::Bad),
            (None, false) => Word::plain(format!("after {}", vm.after.join(", "))),
            (None, true) => Word::plain(""),
        };
        vec![
            Word::name(&vm.name),
            Word::plain(&vm.priority),
            Word::name(&vm.from),
            vm.to.as_deref().map_or(Word::new("nowhere", Tone::Bad), Word::name),
            Word::plain(vm.runs_s.map_or("-".into(), |seconds| format!("{seconds:.1} s"))),
            why,
        ]
    });
    out.table(&["VM", "PRIORITY", "FROM", "TO", "RUNS AFTER", "WHY"], rows.collect())
}

/// Hosts that would have fewer CPUs than vCPUs.
fn slower(view: &WhatIfView) -> Vec<String> {
    let line = |cpu: &WhatIfCpu| {
        let floor = match view.floor_percent {
            Some(floor) if floor < cpu.loss_percent => format!("; the rules tolerate {floor} %"),
            Some(_) | None => String::new(),
        };
        let WhatIfCpu { host, cpus, vcpus, loss_percent } = cpu;
        format!("{host} would have {vcpus} vCPUs on {cpus} CPUs: {loss_percent} % less CPU, if all are busy{floor}.")
    };
    view.cpus.iter().filter(|cpu| 0 < cpu.loss_percent).map(line).collect()
}

fn summary(out: &Out, view: &WhatIfView) -> String {
    let homeless = view.vms.iter().filter(|vm| vm.to.is_none()).count();
    let places = match homeless {
        0 => format!("All {} VMs would have a place.", view.vms.len()),
        _ => format!("{homeless} of {} VMs would have no place.", view.vms.len()),
    };
    let start = if view.measured { "as last measured" } else { "assumed, since none was measured yet" };
    let text = format!(
        "{places} Times are at the latest: {:.1} s until their leases are proven over, {:.1} s for a start ({start}); a fence or a \
         power switch that is waited for is not in them.",
        view.over_s, view.start_s
    );
    out.wrapped("", &text)
}
