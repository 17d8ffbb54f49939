//! What the agents say of themselves, by their own command line: `mainstay --json …` run in a host.
//!
//! ```text
//!  cases, demo, bench ──► view, notes ──► nsenter ──► mainstay --json status | events ──► JSON, read as far as needed
//! ```
//!
//! Deliberately not for the judges: they ask nobody. Here is only what says *when* something is ready to be judged,
//! which figures the product gives, and what people are shown. Every question has a deadline, and a frozen host is not
//! asked: its answer would never come.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::host::{Host, Power};
use crate::judge::Moment;

/// How long a command in a host may take, where nothing else is said.
pub const ANSWER: Duration = Duration::from_secs(10);

/// The cluster as one agent sees it.
#[derive(Clone, Debug, Deserialize)]
pub struct View {
    /// Who decides.
    pub master: Option<String>,
    /// Rises with each change of the settings.
    pub settings_version: u64,
    /// All members.
    pub hosts: Vec<HostView>,
    /// All VMs that have a claim or run.
    pub vms: Vec<VmView>,
    /// All datastores.
    pub datastores: Vec<DatastoreView>,
}

/// One host in a view.
#[derive(Clone, Debug, Deserialize)]
pub struct HostView {
    /// Its name.
    pub name: String,
    /// `master`, `subordinate`, …
    pub role: String,
    /// `live`, `dead`, …
    pub verdict: String,
    /// What the verdict rests on.
    pub evidence: String,
    /// libvirt answers there.
    pub libvirt: Option<bool>,
    /// How long its silence must last to prove a lapse, in milliseconds.
    #[serde(default)]
    pub window_ms: Option<u64>,
    /// People work on it.
    #[serde(default)]
    pub maintenance: Option<serde_json::Value>,
}

/// One VM in a view.
#[derive(Clone, Debug, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// `running`, `off`, …
    pub state: String,
    /// Who owns it.
    pub host: Option<String>,
    /// Newest claim.
    pub generation: Option<u64>,
    /// `running` or `stopped`.
    pub wanted: Option<String>,
    /// Has record and claim.
    pub protected: bool,
    /// The datastore on which its claims lie.
    #[serde(default)]
    pub home: Option<String>,
    /// What it waits for.
    pub why: Option<String>,
    /// Lines of `vm explain`.
    pub explain: Vec<String>,
}

/// One datastore in a view.
#[derive(Clone, Debug, Deserialize)]
pub struct DatastoreView {
    /// Its name.
    pub name: String,
    /// `lock`, `none` or `command:PATH`.
    pub fence: String,
    /// `exclude` or `accept`.
    pub late_writes: String,
    /// The answering host's lease: valid, lapsed or none.
    pub lease: String,
    /// What is wrong with it.
    pub trouble: Option<String>,
    /// Hosts that reach it.
    pub reached_by: Vec<String>,
}

/// One note of an agent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Note {
    /// By the clock of day.
    pub unix_ms: u64,
    /// Who says it.
    pub host: String,
    /// `info`, `warning` or `alarm`.
    pub level: String,
    /// For machines.
    pub kind: String,
    /// The VM meant.
    pub vm: Option<String>,
    /// For people.
    pub text: String,
}

impl View {
    /// The VM with that name.
    pub fn vm(&self, name: &str) -> Option<&VmView> {
        self.vms.iter().find(|vm| vm.name == name)
    }

    /// The host with that name.
    pub fn host(&self, name: &str) -> Option<&HostView> {
        self.hosts.iter().find(|host| host.name == name)
    }
}

impl Note {
    /// When it was made, on the judges' clock.
    pub fn at(&self) -> Moment {
        let now = clock_of_day_ms();
        let ago = Duration::from_millis(now.saturating_sub(self.unix_ms));
        Moment::now().minus(ago)
    }
}

/// Milliseconds since 1970.
pub fn clock_of_day_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.as_millis() as u64
}

/// Runs a command in a host and gives what it printed; it is killed when the time is up.
pub fn ask(host: &Host, patience: Duration, args: &[&str]) -> Result<String> {
    match host.power()? {
        Power::On => {}
        Power::Off => bail!("{} is off", host.name()),
        Power::Frozen => bail!("{} is frozen", host.name()),
    }
    let seconds = patience.as_secs_f64().to_string();
    host.run(&[&["timeout", "--signal=KILL", &seconds], args].concat())
}

/// The cluster as the agent of this host sees it.
pub fn view(host: &Host) -> Result<View> {
    let text = ask(host, ANSWER, &["mainstay", "--json", "status"])?;
    serde_json::from_str(&text).with_context(|| format!("what mainstay of {} said: {}", host.name(), text.trim()))
}

/// Notes of the last seconds, of all hosts that this one reaches, oldest first.
pub fn notes(host: &Host, back: Duration) -> Result<Vec<Note>> {
    #[derive(Deserialize)]
    struct Answer {
        notes: Vec<Note>,
    }
    let since = format!("{}s", back.as_secs() + 1);
    let text = ask(host, ANSWER, &["mainstay", "--json", "events", "--since", &since])?;
    let answer: Answer = serde_json::from_str(&text)
        .with_context(|| format!("what mainstay of {} said: {}", host.name(), text.trim()))?;
    Ok(answer.notes)
}

/// Notes of all hosts that answer, oldest first, each once.
pub fn all_notes(hosts: &[Host], back: Duration) -> Vec<Note> {
    let on = hosts.iter().filter(|host| host.power().is_ok_and(|power| power == Power::On));
    let mut all: Vec<Note> = on.flat_map(|host| notes(host, back).unwrap_or_default()).collect();
    all.sort();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_far_as_needed() {
        let text = r#"{"schema":1,"cluster":"lab","seen_by":"h1","master":"h2","term":3,"settings_version":4,
            "hosts":[{"id":"x","name":"h1","role":"master","verdict":"live","evidence":"this host","beat_age_ms":null,
                      "libvirt":true,"vms":1,"free_mib":1,"address":"a"}],
            "vms":[{"id":"y","name":"web","state":"running","host":"h1","generation":2,"wanted":"running",
                    "protected":true,"home":"shared","why":null,"explain":["a"]}],
            "datastores":[{"id":"z","name":"shared","path":"/srv","fence":"none","late_writes":"exclude",
                           "lease":"valid","latency_ms":0.1,"trouble":null,"reached_by":["h1"]}]}"#;
        let view: View = serde_json::from_str(text).unwrap();
        assert_eq!(view.vm("web").and_then(|vm| vm.generation), Some(2));
        assert_eq!(view.host("h1").map(|host| host.role.as_str()), Some("master"));
        assert!(view.vm("db").is_none() && view.host("h9").is_none());
    }

    #[test]
    fn a_note_is_put_on_the_judges_clock() {
        let (kind, text, host) = ("host-dead".into(), "host h1 is dead".into(), "h2".into());
        let unix_ms = clock_of_day_ms() - 1000;
        let note = Note { unix_ms, host, level: "alarm".into(), kind, vm: None, text };
        let ago = Moment::now().since(note.at());
        assert!(Duration::from_millis(990) < ago && ago < Duration::from_millis(1500), "{ago:?}");
    }
}
