//! `cargo lab bench`: figures as one JSON object.
//!
//! ```text
//!  failover   N times: healthy ─► kill ─► ms since the kill:
//!             suspected ─► proof ─► start issued        by the agents' notes (clock of day)
//!                          ─► qemu started ─► guest up  by the judges         } one machine, one clock
//!  freeze     what old copies gain when a frozen host goes on (bench/freeze.rs)
//!  watchdog   a machine whose guard dies with its parent is reset in time (bench/watchdog.rs)
//!  new-master how soon 10,000 VMs are seen (bench/new_master.rs)
//!  guest      what the agent inside a guest costs at rest; needs no hosts (bench/guest.rs)
//!  idle       a minute at rest, 3 VMs on each host: CPU, memory, packets and storage operations of our processes
//! ```

mod freeze;
mod guest;
mod new_master;
mod watchdog;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

use crate::agents::{self, Note};
use crate::cases::{GUESTS, Ground, Setting};
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::{Lab, Wish, wait};
use crate::power::{self, Behaviour};
use crate::storage::LockMode;
use crate::{network, processes, product};

pub use freeze::{Freeze, freeze};
pub use guest::{at_rest, guest};
pub use new_master::new_master;
pub use watchdog::watchdog;

const HOSTS: u8 = 3;
const VMS: usize = 3;
const REST: Duration = Duration::from_secs(60);
/// Guests beyond those of the cases, so that each host has three.
const MORE: [&str; 3] = ["news", "blog", "auth"];
/// Processes that are ours.
const OURS: [&str; 2] = [processes::AGENT, processes::GUARD];

/// Which host is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Victim {
    /// The one that decides.
    Master,
    /// Another one.
    Subordinate,
}

/// What `bench failover` is asked.
#[derive(Clone, Debug)]
pub struct Failover {
    /// How often.
    pub runs: usize,
    /// `default`, `fast` or `patient`.
    pub profile: String,
    /// Who.
    pub victim: Victim,
    /// Who keeps locks.
    pub locks: LockMode,
    /// As asked.
    pub locks_text: String,
    /// How the hosts' power switch behaves, and when it is used; none = no fence devices.
    pub power: Option<(Behaviour, String)>,
}

/// One run: milliseconds since the kill, each of the last VM that came so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Run {
    suspected_ms: f64,
    proof_ms: f64,
    start_issued_ms: f64,
    qemu_started_ms: f64,
    guest_up_ms: f64,
}

/// Kills hosts, and prints how long each part took.
pub fn failover(asked: &Failover, as_json: bool) -> Result<()> {
    if asked.runs == 0 {
        bail!("at least one run");
    }
    let lab = Lab::up(Wish { hosts: HOSTS, product: Some(product::Wish::default()) })?;
    lab.upgrade()?;
    let mut ground = Ground::new(lab, true);
    let setting = setting(asked)?;
    let mut runs = Vec::new();
    for number in 1..=asked.runs {
        let behaviour = asked.power.as_ref().map(|(behaviour, _)| *behaviour);
        let run = one_run(&mut ground, setting, asked.victim, behaviour).with_context(|| format!("run {number}"))?;
        eprintln!("run {number} of {}: {}", asked.runs, serde_json::to_string(&run)?);
        runs.push(run);
    }
    let whole = json!({
        "profile": asked.profile, "victim": asked.victim, "locks": asked.locks_text,
        "power": asked.power.as_ref().map(|(switch, at)| format!("{switch:?}, fence-at {at}").to_lowercase()), "runs": runs,
        "median": fold(&runs, median), "min": fold(&runs, |sorted| sorted[0]),
        "max": fold(&runs, |sorted| sorted[sorted.len() - 1]),
    });
    if as_json {
        println!("{whole}");
        return Ok(());
    }
    println!(
        "{:7} {:>10} {:>8} {:>8} {:>8} {:>9}   (ms since the kill)",
        "", "suspected", "proof", "issued", "started", "guest up"
    );
    for (name, row) in ["median", "min", "max"].map(|name| (name, &whole[name])) {
        let of = |key: &str| row[key].as_f64().unwrap_or_default();
        let (suspected, proof, issued) = (of("suspected_ms"), of("proof_ms"), of("start_issued_ms"));
        let (started, up) = (of("qemu_started_ms"), of("guest_up_ms"));
        println!("{name:7} {suspected:10.0} {proof:8.0} {issued:8.0} {started:8.0} {up:9.0}");
    }
    Ok(())
}

fn setting(asked: &Failover) -> Result<Setting> {
    let profile = match asked.profile.as_str() {
        "default" => "default",
        "fast" => "fast",
        "patient" => "patient",
        other => bail!("{other} is no profile: default, fast or patient"),
    };
    // With locks at a server and no fence the locks' lease decides; with local ones late writes are accepted.
    let base = match asked.locks {
        LockMode::Local => Setting::LOCAL_ACCEPT,
        LockMode::Server { .. } if asked.locks_text.contains('=') => Setting::LEASED,
        LockMode::Server { .. } => Setting::SERVER,
    };
    let power = match asked.power.as_ref().map(|(_, at)| at.as_str()) {
        None => None,
        Some("lapse") => Some("lapse"),
        Some("suspect") => Some("suspect"),
        Some(other) => bail!("hosts are switched off at lapse or suspect, not {other}"),
    };
    Ok(Setting { profile, locks: asked.locks, power, ..base })
}

fn one_run(ground: &mut Ground, setting: Setting, victim: Victim, switch: Option<Behaviour>) -> Result<Run> {
    ground.prepare(setting)?;
    power::set(switch.unwrap_or(Behaviour::Works))?;
    let host = match victim {
        Victim::Master => ground.master()?,
        Victim::Subordinate => ground.subordinate()?,
    };
    ground.gather(&host, VMS)?;
    ground.watch()?;
    let (killed, guests) = ground.kill(&host)?;
    let starts = ground.wait_started(&guests, killed, Duration::from_secs(180))?;
    let judges = ground.judges()?;
    let mut up = Moment::default();
    for guest in &guests {
        let id = ground.id(guest);
        up = up.max(wait(Duration::from_secs(60), &format!("{guest} to write"), || Ok(judges.guest_up(id, killed)))?);
    }
    let back = Moment::now().since(killed);
    let notes = agents::all_notes(&ground.others(&[host]), back);
    let verdict = ground.finish()?;
    verdict.demand()?;
    let noted = figures(&notes, &host.name(), &guests, killed)?;
    let ms = |at: Moment| (at.since(killed).as_secs_f64() * 1e4).round() / 10.0;
    let started = starts.iter().map(|start| start.ran).max().unwrap_or_default();
    Ok(Run { qemu_started_ms: ms(started), guest_up_ms: ms(up), ..noted })
}

/// What the notes say of this kill.
fn figures(notes: &[Note], host: &str, guests: &[String], killed: Moment) -> Result<Run> {
    let since: Vec<(f64, &Note)> = notes
        .iter()
        .filter(|note| killed <= note.at().plus(Duration::from_millis(5)))
        .map(|note| ((note.at().since(killed).as_secs_f64() * 1e4).round() / 10.0, note))
        .collect();
    let suspected =
        since.iter().find(|(_, note)| note.kind.starts_with("host-") && note.text.contains(&format!("host {host} ")));
    let (suspected_ms, _) = suspected.with_context(|| format!("no note says that {host} is suspected"))?;
    let last = |kinds: &[&str]| -> Result<f64> {
        let mut latest: f64 = 0.0;
        for guest in guests {
            let found =
                since.iter().find(|(_, note)| kinds.contains(&note.kind.as_str()) && note.vm.as_ref() == Some(guest));
            latest = latest.max(found.with_context(|| format!("no note {kinds:?} of {guest}"))?.0);
        }
        Ok(latest)
    };
    Ok(Run {
        suspected_ms: *suspected_ms,
        proof_ms: last(&["vm-restart"])?,
        start_issued_ms: last(&["vm-starting", "vm-started"])?,
        ..Run::default()
    })
}

fn fold(runs: &[Run], pick: impl Fn(&[f64]) -> f64) -> Value {
    let of = |field: fn(&Run) -> f64| {
        let mut all: Vec<f64> = runs.iter().map(field).collect();
        all.sort_by(f64::total_cmp);
        pick(&all)
    };
    json!(Run {
        suspected_ms: of(|run| run.suspected_ms),
        proof_ms: of(|run| run.proof_ms),
        start_issued_ms: of(|run| run.start_issued_ms),
        qemu_started_ms: of(|run| run.qemu_started_ms),
        guest_up_ms: of(|run| run.guest_up_ms),
    })
}

/// Of a sorted list that is not empty.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { ((sorted[middle - 1] + sorted[middle]) * 5.0).round() / 10.0 }
}

/// What our processes cost at rest.
pub fn idle(as_json: bool) -> Result<()> {
    let lab = Lab::up(Wish { hosts: HOSTS, product: Some(product::Wish::default()) })?;
    lab.upgrade()?;
    let mut ground = Ground::new(lab, true);
    ground.prepare(Setting::SERVER)?;
    for name in MORE {
        ground.also(name)?;
    }
    ground.prepare(Setting::SERVER)?;
    for host in ground.hosts() {
        ground.gather(&host, (GUESTS.len() + MORE.len()) / usize::from(HOSTS))?;
    }
    eprintln!("at rest for {} s", REST.as_secs());
    let before = used(&ground)?;
    std::thread::sleep(REST);
    let after = used(&ground)?;
    let mut hosts = Vec::new();
    for (name, after) in &after {
        let before = before.get(name).context("the same hosts")?;
        if before.pids != after.pids {
            bail!("a process of {name} was restarted meanwhile");
        }
        let seconds = after.at.since(before.at).as_secs_f64();
        let per_second =
            |after: u64, before: u64| (after.saturating_sub(before) as f64 / seconds * 100.0).round() / 100.0;
        hosts.push(json!({
            "host": name, "cpu_percent": per_second(after.cpu_ms, before.cpu_ms) / 10.0, "pss_kib": after.pss_kib,
            "packets_per_s": per_second(after.packets, before.packets),
            "storage_ops_per_s": per_second(after.operations, before.operations),
        }));
    }
    if as_json {
        println!("{}", json!({ "hosts": hosts }));
        return Ok(());
    }
    println!("host  CPU %  PSS KiB  packets/s  storage ops/s");
    for host in hosts {
        let number = |key: &str| host[key].as_f64().unwrap_or_default();
        let name = host["host"].as_str().unwrap_or_default();
        let (cpu, pss) = (number("cpu_percent"), number("pss_kib"));
        println!("{name:5} {cpu:5.2} {pss:8} {:10} {:14}", number("packets_per_s"), number("storage_ops_per_s"));
    }
    Ok(())
}

/// What a host's processes of ours have used up to a moment.
struct Used {
    at: Moment,
    pids: Vec<i32>,
    cpu_ms: u64,
    pss_kib: u64,
    packets: u64,
    operations: u64,
}

fn used(ground: &Ground) -> Result<BTreeMap<String, Used>> {
    let storage = ground.lab().storage()?.status()?;
    let mut all = BTreeMap::new();
    for host in ground.hosts() {
        let pids = processes(&host)?;
        let at = Moment::now();
        let cpu_ms = pids.iter().map(|pid| cpu_ms(*pid)).sum::<Result<u64>>()?;
        let pss_kib = pids.iter().map(|pid| pss_kib(*pid)).sum::<Result<u64>>()?;
        let counts = &storage["hosts"][host.name()]["operations"]["mainstay"];
        let operations = counts.as_object().into_iter().flatten().filter_map(|(_, count)| count.as_u64()).sum();
        let packets = network::packets(&host)?;
        all.insert(host.name(), Used { at, pids, cpu_ms, pss_kib, packets, operations });
    }
    Ok(all)
}

fn processes(host: &Host) -> Result<Vec<i32>> {
    let mut ours = Vec::new();
    for name in OURS {
        ours.extend(processes::named(host, name)?);
    }
    ours.sort_unstable();
    if ours.is_empty() {
        bail!("{} runs neither agent nor guard", host.name());
    }
    Ok(ours)
}

/// User and system time of a process: ticks of 10 ms.
fn cpu_ms(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = text.rsplit_once(')').context("a stat line")?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).context("ticks of a stat line");
    Ok((ticks(11)? + ticks(12)?) * 10)
}

fn pss_kib(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("a line Pss")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_runs() {
        for (sorted, expected) in [(&[3.0][..], 3.0), (&[1.0, 2.0], 1.5), (&[1.0, 2.0, 9.0], 2.0)] {
            assert_eq!(median(sorted), expected);
        }
        let runs = [Run { proof_ms: 9.0, ..Run::default() }, Run { proof_ms: 5.0, ..Run::default() }];
        assert_eq!(fold(&runs, |sorted| sorted[0])["proof_ms"], 5.0);
    }

    #[test]
    fn this_process_uses_something() {
        let pid = std::process::id() as i32;
        assert!(0 < pss_kib(pid).unwrap());
        cpu_ms(pid).unwrap();
    }

    #[test]
    fn figures_come_from_the_right_notes() {
        let killed = Moment::now().minus(Duration::from_secs(10));
        let now = agents::clock_of_day_ms();
        let note = |ago_ms: u64, kind: &str, vm: Option<&str>, text: &str| Note {
            unix_ms: now - ago_ms,
            host: "h2".into(),
            level: "info".into(),
            kind: kind.into(),
            vm: vm.map(str::to_owned),
            text: text.into(),
        };
        let notes = [
            note(20_000, "host-dead", None, "host h1 is dead: long ago"),
            note(7000, "host-unknown", None, "host h1 is unknown: silent"),
            note(5000, "vm-restart", Some("web"), "web is to run"),
            note(4900, "vm-restart", Some("db"), "db is to run"),
            note(4800, "vm-started", Some("web"), "web runs"),
            note(4700, "vm-started", Some("db"), "db runs"),
        ];
        let run = figures(&notes, "h1", &["web".into(), "db".into()], killed).unwrap();
        let near = |measured: f64, expected: f64| (measured - expected).abs() < 60.0;
        assert!(near(run.suspected_ms, 3000.0) && near(run.proof_ms, 5100.0), "{run:?}");
        assert!(near(run.start_issued_ms, 5300.0), "{run:?}");
        assert!(figures(&notes, "h1", &["mail".into()], killed).is_err());
    }
}
