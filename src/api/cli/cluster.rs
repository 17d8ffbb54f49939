//! `mainstay cluster …` and `mainstay config check`: what is done by the CLI itself, on this host's own files.
//!
//! ```text
//! init, join ── need root ── mainstay.toml ── member (files below /var/lib/mainstay) ── systemctl restart guard, agent
//!                                                                                          │
//!                                what to do next ◄── the agent answers with this cluster ◄─┘  within 30 s
//! ```
//!
//! A crash at any point leaves either no member, then the command is given again, or a member whose units were not
//! restarted, then systemd or a person restarts them.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::process::Command;

use super::args::{ClusterCommand, ConfigCommand, Profile};
use super::datastore::need_root;
use super::member;
use super::out::{Out, Tone};
use super::trouble::{FAILED, Trouble, UNREACHABLE, USAGE, What};
use super::{agent, vm};
use crate::api::dbus::Bus;
use crate::api::dbus::client::Agent;
use crate::config;
use crate::exec::clock;
use crate::exec::cluster::Cluster;
use crate::types::guests::GuestSettings;
use crate::types::power::FenceAt;
use crate::types::rules::VmRules;
use crate::types::settings::{ClusterSettings, Disarmed, ForeignMigration, OnDoubt, SettingsChange, Timing};
use crate::types::view::VIEW_SCHEMA;

/// Longer is surely forgotten.
const MOST_DISARMED: Duration = Duration::from_secs(7 * 24 * 3600);
/// In this order: the agent needs its guard.
const UNITS: [&str; 2] = ["mainstay-guard.service", "mainstayd.service"];
/// Both are `Type=notify`; starting waits until they are ready.
const RESTART_TIME: Duration = Duration::from_secs(90);
/// From the restart to the agent's first answer that names the cluster.
const ANSWER_TIME: Duration = Duration::from_secs(30);
const ANSWER_POLL: Duration = Duration::from_millis(250);

/// `mainstay cluster …`
pub async fn run(out: &mut Out, json: bool, command: ClusterCommand) -> Result<(), Trouble> {
    match command {
        ClusterCommand::Init { name, profile } => init(out, json, &name, profile).await,
        ClusterCommand::Join { token } => join(out, json, &token).await,
        ClusterCommand::Token => {
            let what = "no token was printed";
            need_root(what)?;
            let (cluster, token) = member::token(&own(what)?, what)?;
            if json {
                return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "cluster": cluster, "token": token }))?);
            }
            out.error(&format!("On a further host, as root (keep it secret, it lets anybody into \"{cluster}\"):"));
            Ok(out.line(&format!("mainstay cluster join {token}"))?)
        }
        ClusterCommand::GuestPolicy { file: None } => {
            show(out, json, "guests", &settings("the rules for guests were not shown")?.guests)
        }
        ClusterCommand::GuestPolicy { file: Some(file) } => {
            let change = |guests: GuestSettings| {
                guests.check()?;
                Ok(SettingsChange::SetGuests(Box::new(guests)))
            };
            take(out, json, "guest-policy", &file, change).await
        }
        ClusterCommand::VmRules { file: None } => {
            show(out, json, "rules", &settings("the rules for VMs were not shown")?.rules)
        }
        ClusterCommand::VmRules { file: Some(file) } => {
            let change = |rules: VmRules| {
                rules.check().map_err(|why| why.to_string())?;
                Ok(SettingsChange::SetRules(Box::new(rules)))
            };
            take(out, json, "vm-rules", &file, change).await
        }
        ClusterCommand::Disarm { length, because } => disarm(out, json, &length, because).await,
        ClusterCommand::Arm => arm(out, json).await,
        ClusterCommand::Set { setting } => {
            let what = format!("{setting} was not set");
            let change = match setting.split_once('=') {
                Some(("profile", profile)) => Timing::profile(profile).map(SettingsChange::SetTiming),
                Some(("on-doubt", "pause")) => Some(SettingsChange::SetOnDoubt(OnDoubt::Pause)),
                Some(("on-doubt", "run-until-stop")) => Some(SettingsChange::SetOnDoubt(OnDoubt::RunUntilStop)),
                Some(("apd-after", span)) => crate::config::duration(span).ok().map(SettingsChange::SetApdAfter),
                Some(("fence-at", "lapse")) => Some(SettingsChange::SetFenceAt(FenceAt::Lapse)),
                Some(("fence-at", "suspect")) => Some(SettingsChange::SetFenceAt(FenceAt::Suspect)),
                Some(("foreign-migration", policy)) => {
                    ForeignMigration::named(policy).map(SettingsChange::SetForeignMigration)
                }
                _ => None,
            };
            let change = change.ok_or_else(|| {
                let next = "say profile=default, profile=fast or profile=patient; fence-at=lapse or fence-at=suspect; \
                            foreign-migration=allow or foreign-migration=refuse; on-doubt=pause or \
                            on-doubt=run-until-stop; apd-after=20s";
                Trouble::new(USAGE, &what, "there is no such setting or value", next)
            })?;
            let agent = agent(&what).await?;
            let said = out.progress("changing the settings", agent.change(&change)).await.what(&what)?;
            vm::done(out, json, &setting, &said)
        }
    }
}

async fn disarm(out: &mut Out, json: bool, length: &str, because: String) -> Result<(), Trouble> {
    let what = "the cluster was not disarmed";
    need_root(what)?;
    let example = "for example: mainstay cluster disarm --for 30m --because \"switch is replaced\"";
    let length = config::duration(length).map_err(|why| Trouble::new(USAGE, what, why.to_string(), example))?;
    if length < Duration::from_secs(1) || MOST_DISARMED < length {
        let why = "it is disarmed for 1 s to 7 days";
        return Err(Trouble::new(USAGE, what, why, example));
    }
    let until_unix_ms = clock::unix_ms() + u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
    let change = SettingsChange::Disarm(Some(Disarmed { until_unix_ms, why: because }));
    let said = agent(what).await?.change(&change).await.what(what)?;
    vm::done(out, json, "disarmed", &said)
}

async fn arm(out: &mut Out, json: bool) -> Result<(), Trouble> {
    let what = "the cluster was not armed";
    need_root(what)?;
    let said = agent(what).await?.change(&SettingsChange::Disarm(None)).await.what(what)?;
    vm::done(out, json, "armed", &said)
}

/// The document of this host's cluster.
fn settings(what: &str) -> Result<ClusterSettings, Trouble> {
    need_root(what)?;
    let fails = |why: String| Trouble::new(FAILED, what, why, "mainstay cluster init or join makes this host a member");
    let cluster = Cluster::load(&own(what)?.paths.state).map_err(|why| fails(why.to_string()))?;
    Ok(cluster.ok_or_else(|| fails("this host is no member of a cluster".into()))?.settings)
}

/// Shows a part of it, as it is read.
fn show(out: &mut Out, json: bool, key: &str, part: &impl Serialize) -> Result<(), Trouble> {
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, key: part }))?);
    }
    let text = toml::to_string(part).expect("settings that were read can be written");
    Ok(out.line(text.trim_end())?)
}

/// Gives a part of it, read from a file, to the master.
async fn take<P: DeserializeOwned>(
    out: &mut Out,
    json: bool,
    command: &str,
    file: &Path,
    change: impl Fn(P) -> Result<SettingsChange, String>,
) -> Result<(), Trouble> {
    let what = format!("{} was not taken", file.display());
    need_root(&what)?;
    let text =
        if file == Path::new("-") { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(file) };
    let read = |text: String| toml::from_str(&text).map_err(|why| why.to_string().trim_end().to_owned());
    let change =
        text.map_err(|why| why.to_string()).and_then(read).and_then(change).map_err(|why| {
            Trouble::new(USAGE, &what, why, format!("mainstay cluster {command} shows the rules in use"))
        })?;
    let agent = agent(&what).await?;
    let said = out.progress("changing the settings", agent.change(&change)).await.what(&what)?;
    vm::done(out, json, command, &said)?;
    // The master knows all VMs: what it thinks of new rules is seen in its view.
    let problems = agent.view().await.map(|view| view.rule_problems).unwrap_or_default();
    problems.iter().for_each(|problem| out.error(&format!("warning: {problem}")));
    Ok(())
}

async fn init(out: &mut Out, json: bool, name: &str, profile: Profile) -> Result<(), Trouble> {
    let what = "no cluster was made";
    need_root(what)?;
    let timing = match profile {
        Profile::Default => Timing::DEFAULT,
        Profile::Fast => Timing::FAST,
        Profile::Patient => Timing::PATIENT,
    };
    let token = member::init(&own(what)?, name, timing, what)?;
    // First of all, so that it is not lost when something fails from here on.
    if json {
        out.json(&json!({ "schema": VIEW_SCHEMA, "cluster": name, "token": token }))?;
    } else {
        out.line(&format!("Cluster \"{name}\" was made; this host is its first member."))?;
        out.line("On each further host, as root (keep it secret, it lets anybody in):\n")?;
        out.line(&format!("  mainstay cluster join {token}\n"))?;
    }
    begin(out, name).await?;
    if !json {
        out.line("The agent runs. Next, here or on any host, as soon as shared storage is mounted on all:\n")?;
        out.line("  mainstay datastore add NAME PATH\n  mainstay doctor")?;
    }
    Ok(())
}

async fn join(out: &mut Out, json: bool, token: &str) -> Result<(), Trouble> {
    let what = "this host did not join";
    need_root(what)?;
    let own = own(what)?;
    let cluster = out.progress("joining", member::join(&own, token, what)).await?;
    begin(out, &cluster).await?;
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "cluster": cluster }))?);
    }
    out.line(&format!("This host is a member of \"{cluster}\" and its agent runs. Next:\n"))?;
    Ok(out.line("  mainstay status\n  mainstay doctor")?)
}

/// This host's own file.
fn own(what: &str) -> Result<config::Config, Trouble> {
    config::load(Path::new(config::PATH))
        .map_err(|error| Trouble::new(FAILED, what, error.to_string(), "mainstay config check tells every mistake"))
}

/// Restarts both units and waits for the agent's word that it is a member of this cluster.
async fn begin(out: &Out, cluster: &str) -> Result<(), Trouble> {
    let what = "this host is a member now, but its agent was not started";
    let next = format!("systemctl restart {}; journalctl -u mainstayd -u mainstay-guard", UNITS.join(" "));
    let mut restart = Command::new("systemctl");
    restart.arg("restart").args(UNITS).kill_on_drop(true);
    let restarted = out.progress("starting the agent", tokio::time::timeout(RESTART_TIME, restart.output())).await;
    let why = match restarted {
        Ok(Ok(done)) if done.status.success() => None,
        Ok(Ok(done)) => Some(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
        Ok(Err(error)) => Some(format!("systemctl: {error}")),
        Err(_) => Some(format!("systemctl did not come back within {} s", RESTART_TIME.as_secs())),
    };
    if let Some(why) = why {
        return Err(Trouble::new(FAILED, what, why, next));
    }
    let answers = out.progress("waiting for the agent", tokio::time::timeout(ANSWER_TIME, answers(cluster))).await;
    answers.map_err(|_| {
        let why = format!("it did not answer as a member of \"{cluster}\" within {} s", ANSWER_TIME.as_secs());
        Trouble::new(UNREACHABLE, what, why, next)
    })
}

/// Comes back when the agent says that it is a member of this cluster.
async fn answers(cluster: &str) {
    loop {
        if let Ok(agent) = Agent::connect(&Bus::System).await
            && let Ok(view) = agent.view().await
            && view.cluster.as_deref() == Some(cluster)
        {
            return;
        }
        tokio::time::sleep(ANSWER_POLL).await;
    }
}

/// `mainstay config check [FILE]`
pub fn config(out: &mut Out, json: bool, command: ConfigCommand) -> Result<(), Trouble> {
    let ConfigCommand::Check { file } = command;
    let what = format!("{} was not checked", file.display());
    if !file.exists() && file != Path::new(config::PATH) {
        return Err(Trouble::new(FAILED, what, "there is no such file", "say the path of a file that exists"));
    }
    let mistakes = match config::load(&file) {
        Ok(_) => Vec::new(),
        Err(config::ConfigError::Wrong { findings, .. }) => findings,
        Err(error @ config::ConfigError::Unreadable { .. }) => {
            return Err(Trouble::new(FAILED, what, error.to_string(), "as root, if it belongs to root"));
        }
    };
    if json {
        let list = mistakes.iter().map(|one| json!({ "line": one.line, "key": one.key, "text": one.text }));
        let list: Vec<_> = list.collect();
        out.json(&json!({ "schema": VIEW_SCHEMA, "file": file, "mistakes": list }))?;
    } else if mistakes.is_empty() {
        let well = if file.exists() { "no mistakes" } else { "there is no file: every default" };
        out.line(&format!("{}: {well}", file.display()))?;
    } else {
        for mistake in &mistakes {
            out.line(&format!("{}: {}", file.display(), out.paint(&mistake.to_string(), Tone::Bad)))?;
        }
    }
    if mistakes.is_empty() { Ok(()) } else { Err(Trouble::Found) }
}
