//! Tables of hosts, VMs and datastores, and `mainstay host …`.

use serde_json::json;

use super::args::HostCommand;
use super::out::{Out, Tone, Word};
use super::status::view;
use super::trouble::{Trouble, What};
use crate::api::dbus::resolve;
use crate::types::view::{DatastoreView, HostView, MaintenanceView, VIEW_SCHEMA, VmView};

/// `mainstay host list|show`.
pub async fn hosts(out: &mut Out, json: bool, command: HostCommand) -> Result<(), Trouble> {
    match command {
        HostCommand::Evacuate { for_shutdown } => super::evacuate::run(out, json, for_shutdown).await,
        HostCommand::Release { hosts } => super::maintenance::release(out, json, &hosts).await,
        HostCommand::Health(command) => super::health::run(out, json, command),
        HostCommand::Maintenance(command) => super::maintenance::run(out, json, command).await,
        HostCommand::FenceDevice(command) => super::fence_device::run(out, json, command).await,
        HostCommand::List => {
            let (_, view) = view("hosts were not listed").await?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "hosts": view.hosts }))?);
            }
            Ok(out.line(&host_table(out, &view.hosts))?)
        }
        HostCommand::Show { host } => {
            let what = format!("host \"{host}\" was not shown");
            let (_, view) = view(&what).await?;
            let host = resolve::host(&view, &host).what(&what)?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "host": host }))?);
            }
            Ok(out.line(&host_fields(out, host))?)
        }
    }
}

/// One line per host.
pub fn host_table(out: &Out, hosts: &[HostView]) -> String {
    let rows = hosts.iter().map(|host| {
        vec![
            Word::name(&host.name),
            Word::plain(&host.role),
            match (&host.maintenance, host.quarantined) {
                (Some(_), _) => Word::new(format!("{}, maintenance", host.verdict), Tone::Doubtful),
                (None, true) => Word::new(format!("{}, quarantined", host.verdict), Tone::Doubtful),
                (None, false) if !host.findings.is_empty() => {
                    Word::new(format!("{}, unwell", host.verdict), Tone::Doubtful)
                }
                (None, false) => Word::new(&host.verdict, verdict(&host.verdict)),
            },
            Word::plain(host.beat_age_ms.map_or("-".into(), age)),
            libvirt(host.libvirt),
            Word::plain(host.vms.to_string()),
            Word::plain(host.free_mib.map_or("-".into(), mib)),
        ]
    });
    out.table(&["HOST", "ROLE", "VERDICT", "BEAT", "LIBVIRT", "VMS", "FREE"], rows.collect())
}

fn host_fields(out: &Out, host: &HostView) -> String {
    out.fields(&[
        ("Host", Word::plain(&host.name)),
        ("Id", Word::plain(host.id.to_string())),
        ("Address", Word::plain(&host.address)),
        ("Role", Word::plain(&host.role)),
        ("Verdict", Word::new(&host.verdict, verdict(&host.verdict))),
        ("Evidence", Word::plain(&host.evidence)),
        ("Maintenance", Word::new(host.maintenance.as_ref().map(maintenance).unwrap_or_default(), Tone::Doubtful)),
        ("Quarantine", Word::new(quarantine(host), Tone::Doubtful)),
        ("Findings", Word::new(host.findings.join("; "), Tone::Doubtful)),
        ("Last beat", Word::plain(host.beat_age_ms.map_or("never heard".into(), |ms| format!("{} ago", age(ms))))),
        ("libvirt", libvirt(host.libvirt)),
        ("VMs", Word::plain(host.vms.to_string())),
        ("Free", Word::plain(host.free_mib.map_or("-".into(), mib))),
    ])
}

fn quarantine(host: &HostView) -> String {
    if !host.quarantined {
        return String::new();
    }
    format!(
        "it came and went too often: nothing is placed on it until it is stable (mainstay host release {})",
        host.name
    )
}

fn maintenance(view: &MaintenanceView) -> String {
    let stay: Vec<String> = view.stay.iter().map(|(vm, why)| format!("{vm} stays: {why}")).collect();
    let what = if view.ends { "ends" } else { "on" };
    let left = format!("{what}; {} VM(s) to be moved {}", view.left, if view.ends { "back" } else { "away" });
    [vec![left], stay].concat().join("; ")
}

/// One line per VM; the last column says why when something is not as it should be.
pub fn vm_table(out: &Out, vms: &[VmView]) -> String {
    let rows = vms.iter().map(|vm| {
        vec![
            Word::name(&vm.name),
            Word::new(&vm.state, state(vm)),
            Word::name(vm.host.as_deref().unwrap_or("-")),
            if vm.protected { Word::plain("yes") } else { Word::new("no", Tone::Doubtful) },
            Word::plain(vm.why.clone().unwrap_or_default()),
        ]
    });
    out.table(&["VM", "STATE", "HOST", "PROTECTED", "WHY"], rows.collect())
}

/// One line per datastore.
pub fn datastore_table(out: &Out, datastores: &[DatastoreView]) -> String {
    let rows = datastores.iter().map(|datastore| {
        let lease = match datastore.lease.as_str() {
            "valid" => Tone::Good,
            "lapsed" => Tone::Bad,
            _ => Tone::Doubtful,
        };
        let fence = match (datastore.fence.as_str(), datastore.late_writes.as_str()) {
            ("none", "accept") => Word::new("none, accept", Tone::Doubtful),
            ("none", _) => Word::new("none, wait", Tone::Doubtful),
            (fence, _) => Word::plain(fence),
        };
        vec![
            Word::name(&datastore.name),
            fence,
            Word::new(&datastore.lease, lease),
            Word::plain(datastore.latency_ms.map_or("-".into(), |ms| format!("{ms:.1} ms"))),
            Word::plain(datastore.reached_by.join(" ")),
            match &datastore.trouble {
                Some(trouble) => Word::new(format!("{}: {trouble}", datastore.path), Tone::Bad),
                None => Word::plain(&datastore.path),
            },
        ]
    });
    out.table(&["DATASTORE", "FENCE", "LEASE", "WRITE", "REACHED BY", "PATH"], rows.collect())
}

/// The tone of a VM's state, by what is wanted.
pub fn state(vm: &VmView) -> Tone {
    match vm.state.as_str() {
        "running" => Tone::Good,
        "off" if vm.wanted.as_deref() == Some("running") => Tone::Bad,
        "off" => Tone::Plain,
        "stopped-by-guard" | "waiting" => Tone::Bad,
        _ => Tone::Doubtful,
    }
}

fn verdict(verdict: &str) -> Tone {
    match verdict {
        "live" => Tone::Good,
        "dead" | "isolated" => Tone::Bad,
        "left" => Tone::Plain,
        _ => Tone::Doubtful,
    }
}

fn libvirt(answers: Option<bool>) -> Word {
    match answers {
        Some(true) => Word::plain("up"),
        Some(false) => Word::new("down", Tone::Bad),
        None => Word::plain("-"),
    }
}

/// Milliseconds for people, in a few letters.
pub fn age(ms: u64) -> String {
    match ms {
        0..=9_999 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        10_000..=119_999 => format!("{} s", ms / 1000),
        120_000..=7_199_999 => format!("{} min", ms / 60_000),
        7_200_000..=172_799_999 => format!("{} h", ms / 3_600_000),
        172_800_000.. => format!("{} d", ms / 86_400_000),
    }
}

fn mib(mib: u64) -> String {
    if mib < 10_240 { format!("{mib} MiB") } else { format!("{} GiB", mib / 1024) }
}
