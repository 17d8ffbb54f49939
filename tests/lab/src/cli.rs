//! The command line of the lab.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::json;

use crate::lab::{Lab, Wish};
use crate::storage::{self, Fault, LockMode};
use crate::{bench, cases, chaos, demo, network, package, power, product, sim, test};

/// A lab for Mainstay on one machine: hosts (containers with systemd, libvirt and QEMU), a switch, a datastore, and the
/// faults of all three.
///
/// Hosts are h1, h2, h3, …; their datastore is /srv/shared. Needs root; installs what is missing (Debian, Ubuntu).
#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version, max_term_width = 100)]
struct Cli {
    /// Print results as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a lab, or complete the one that is there (the first time: about two minutes)
    ///
    /// Hosts that are on stay as they are, hosts that are off are started. Hosts of a new lab have fresh disks.
    Up {
        /// Number of hosts
        #[arg(default_value_t = 3)]
        hosts: u8,
        /// Hosts with libvirt and guests only, without Mainstay
        #[arg(long, conflicts_with_all = ["profile", "fence", "late_writes"])]
        bare: bool,
        /// How fast the cluster reacts: default, fast or patient
        #[arg(long, default_value = "default")]
        profile: String,
        /// The datastore's fence: none, lock or command:PATH
        #[arg(long, default_value = product::FENCE)]
        fence: String,
        /// What to do with late writes where there is no fence: exclude or accept
        #[arg(long, default_value = "exclude")]
        late_writes: String,
    },
    /// Build Mainstay anew and put it on all hosts, as an upgrade of its package would
    Upgrade,
    /// Take everything away: no process, mount, namespace or cgroup is left
    Down,
    /// Show hosts, guests, cuts and storage
    Status,
    /// Run a command in a host (without one: a shell); its exit code is passed on
    Sh {
        host: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Power loss: every process of the host is gone at once, its storage is cut before
    Kill { host: String },
    /// Switch a host on again and wait until its libvirt answers
    Start { host: String },
    /// Cut a host from all others (or, with a second host, only from that one)
    Cut {
        host: String,
        other: Option<String>,
        /// Only what goes from the first to the second
        #[arg(long, requires = "other")]
        one_way: bool,
    },
    /// End all cuts
    Heal,
    /// Hold all processes of a host, its VMs included; clocks go on
    Freeze { host: String },
    /// Let a frozen host go on
    Thaw { host: String },
    /// Let a host's datastore fail; or set how locks work for all hosts
    #[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
    Storage {
        #[arg(required = true)]
        host: Option<String>,
        #[arg(required = true)]
        fault: Option<FaultName>,
        #[command(subcommand)]
        command: Option<StorageCommand>,
    },
    /// How the hosts' power switch behaves, for fence_lab in the hosts
    Power { behaviour: power::Behaviour },
    /// Guests
    Vm {
        #[command(subcommand)]
        command: VmCommand,
    },
    /// From nothing to a cluster whose master loses its power, told as it happens; the lab stays up
    Demo,
    /// Everything that CI runs: format, lints, tests, and all lab cases on a new lab
    Test {
        /// Only cases with this in their name, without the checks of the build
        #[arg(long, value_name = "PATTERN")]
        only: Option<String>,
        /// Without format, lints and tests: the lab cases
        #[arg(long)]
        skip_build_checks: bool,
        /// Name all cases and what they show
        #[arg(long)]
        list: bool,
        /// Faults of full length: a minute instead of 20 s, ten moves instead of three
        #[arg(long)]
        full: bool,
        /// Leave the lab up
        #[arg(long)]
        keep: bool,
    },
    /// Run cases by their names, on the lab that is up or a new one; it stays
    Case {
        #[arg(required = true)]
        names: Vec<String>,
        /// Faults of full length
        #[arg(long)]
        full: bool,
    },
    /// Play random stories of whole clusters in virtual time, by seed; `--help` after it names all choices
    #[command(disable_help_flag = true)]
    Sim {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Random faults by seed against a whole cluster with 8 VMs, in rounds: faults, healing, the judges' verdict
    ///
    /// Kills, freezes, cuts, storage that fails, signals to daemons and QEMUs, operators at their shells. The same seed
    /// gives the same faults at the same times. A violation prints its seed and where story and logs are; the lab stays.
    /// The last line: `V violations; longest unexplained downtime X s of VM`.
    Chaos {
        /// How long faults come, healing not counted
        #[arg(long, default_value_t = 5)]
        minutes: u32,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// 3 to 5
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=5))]
        hosts: u8,
        /// Only print which faults would come when
        #[arg(long)]
        dry_run: bool,
    },
    /// Make packages and check them; prints where they are
    Package {
        what: package::What,
        #[arg(long, default_value = "target/packages", value_name = "FOLDER")]
        to: PathBuf,
    },
    /// Measure
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    #[command(hide = true)]
    StorageDaemon { dir: PathBuf, run: PathBuf },
    #[command(hide = true)]
    ExpireFromInside {
        host: String,
        /// The host's id, which every storage fence is given, too
        id: Option<String>,
    },
    #[command(hide = true)]
    PowerDaemon { run: PathBuf },
    #[command(hide = true)]
    FenceFromInside,
    #[command(hide = true)]
    JunkFromInside { group: std::net::Ipv4Addr, port: u16 },
}

#[derive(Subcommand)]
enum BenchCommand {
    /// From the kill of a host with three VMs to guests that are up
    Failover {
        #[arg(long, default_value_t = 10)]
        runs: usize,
        /// default, fast or patient
        #[arg(long, default_value = "default")]
        profile: String,
        /// Which host is killed
        #[arg(long, default_value = "subordinate")]
        victim: bench::Victim,
        /// `server` (with a fence), `server=SECONDS` (their lease decides) or `local` (late writes are accepted)
        #[arg(long, default_value = "server")]
        locks: String,
        /// Hosts have a fence device, whose switch behaves like this
        #[arg(long)]
        power: Option<power::Behaviour>,
        /// When they are switched off: lapse or suspect
        #[arg(long, default_value = "suspect", requires = "power", value_parser = ["lapse", "suspect"])]
        fence_at: String,
    },
    /// From the freeze of a host with three VMs to its old copies' end: what they gained in vCPU time after the thaw
    ///
    /// Half of the runs with locks that reach no other host; every run is judged for two writers.
    Freeze {
        #[arg(long, default_value_t = 50)]
        runs: usize,
        /// How long each freeze lasts
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// What the agent inside a guest costs at rest: memory and processor; needs no hosts
    Guest {
        #[arg(long, default_value_t = 120)]
        seconds: u64,
    },
    /// What agent and guard cost at rest, with three VMs on each host
    Idle,
    /// From an agent that knows nothing to its complete view of 10,000 VMs on one datastore: on a local disk, on the lab's storage, and
    /// where each request takes longer; needs one host
    NewMaster {
        /// So much longer, in milliseconds
        #[arg(long, default_value_t = 1)]
        delay_ms: u64,
    },
    /// Whether a machine is reset in time when its guard dies or hangs together with its parent; needs no hosts
    Watchdog,
}

#[derive(Subcommand)]
enum StorageCommand {
    /// How far locks reach: `local` (not to other hosts), or `server`, where a dead host keeps its locks for a lease
    Locks {
        /// `local`, `server` or `server=SECONDS`
        #[arg(value_parser = storage::parse_locks)]
        mode: LockMode,
    },
    /// End the lease of a dead host: its locks go, its late writes fail
    Expire { host: String },
}

#[derive(Clone, Copy, ValueEnum)]
enum FaultName {
    /// Nothing is answered until it is healed
    Hang,
    /// Input/output error
    Eio,
    /// No space left on device
    Enospc,
    /// Stale file handle
    Estale,
    /// Half a second more for each request
    Slow,
    /// The next write is cut off in its middle
    Torn,
    /// Writes are answered with an error, and land two seconds later
    Late,
    /// fsync does nothing
    DropSync,
    /// As it should be
    Heal,
}

#[derive(Subcommand)]
enum VmCommand {
    /// Make a guest with a disk of its own on the datastore, start it on a host and wait until it is up
    Add {
        name: String,
        host: String,
        /// Do not wait for the guest
        #[arg(long)]
        no_wait: bool,
    },
    /// Tell a guest to do something by itself: poweroff, reboot, crash, or to be busy until its next boot
    Tell { name: String, word: String },
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    match act(cli) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Up { hosts, bare, profile, fence, late_writes } => {
            let product = product::Wish { profile, fence, late_writes };
            up(Wish { hosts, product: (!bare).then_some(product) }, cli.json)?;
        }
        Command::Upgrade => upgrade()?,
        Command::Down => Lab::down()?,
        Command::Status => status(&Lab::look()?, cli.json)?,
        Command::Sh { host, command } => return sh(&host, &command),
        Command::Kill { host } => on(&host, Lab::kill)?,
        Command::Start { host } => on(&host, |lab, host| {
            lab.start(host)?;
            host.wait_up(Duration::from_secs(60))
        })?,
        Command::Cut { host, other, one_way } => cut(&host, other.as_deref(), one_way)?,
        Command::Heal => {
            Lab::open()?;
            network::heal()?;
        }
        Command::Freeze { host } => on(&host, |_, host| host.freeze())?,
        Command::Thaw { host } => on(&host, |_, host| host.thaw())?,
        Command::Storage { host: Some(host), fault: Some(fault), .. } => {
            on(&host, |lab, host| lab.storage()?.fault(&host.name(), fault.into()))?;
        }
        Command::Storage { command, .. } => storage(command.context("a host and a fault, or a command")?)?,
        Command::Vm { command } => vm(command)?,
        Command::Demo => demo::run()?,
        Command::Test { list: true, .. } => test::list(),
        Command::Test { only, skip_build_checks, full, keep, .. } => {
            return test::run(&test::Selection { only, skip_build_checks, full, keep });
        }
        Command::Case { names, full } => return test::run_named(&names, full),
        Command::Sim { args } => return sim::run(&args),
        Command::Chaos { minutes, seed, hosts, dry_run } => {
            let violations = chaos::run(chaos::Asked { minutes, seed, hosts, dry_run })?;
            return Ok(if violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Package { what: package::What::Guest, to } => {
            let made = package::guest(&to)?;
            println!("{}\n{}\n{}", made.deb.display(), made.tar.display(), package::check(&made)?);
        }
        Command::Bench { command } => measure(command, cli.json)?,
        Command::JunkFromInside { group, port } => cases::send_junk(group, port)?,
        Command::StorageDaemon { dir, run } => storage::run_daemon(&dir, &run)?,
        Command::ExpireFromInside { host, .. } => storage::expire_from_inside(&host)?,
        Command::PowerDaemon { run } => power::run_daemon(&run)?,
        Command::FenceFromInside => return power::agent(),
        Command::Power { behaviour } => power::set(behaviour)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(command: BenchCommand, json: bool) -> Result<()> {
    match command {
        BenchCommand::Failover { runs, profile, victim, locks, power, fence_at } => {
            let locks_text = locks;
            let locks = storage::parse_locks(&locks_text)?;
            let power = power.map(|power| (power, fence_at));
            bench::failover(&bench::Failover { runs, profile, victim, locks, locks_text, power }, json)
        }
        BenchCommand::Freeze { runs, seconds } => {
            bench::freeze(bench::Freeze { runs, time: Duration::from_secs(seconds) }, json)
        }
        BenchCommand::Guest { seconds } => bench::guest(seconds, json),
        BenchCommand::Idle => bench::idle(json),
        BenchCommand::NewMaster { delay_ms } => bench::new_master(Duration::from_millis(delay_ms), json),
        BenchCommand::Watchdog => bench::watchdog(json),
    }
}

fn up(wish: Wish, json: bool) -> Result<()> {
    let begin = Instant::now();
    let lab = Lab::up(wish)?;
    let seconds = begin.elapsed().as_secs_f64();
    let names: Vec<_> = lab.hosts().iter().map(|host| host.name()).collect();
    if json {
        println!("{}", json!({ "hosts": names, "accelerator": lab.accelerator(), "seconds": seconds }));
    } else {
        let kind = serde_json::to_value(lab.accelerator())?;
        println!("up: {} (guests by {}) in {seconds:.1} s", names.join(", "), kind.as_str().unwrap_or_default());
    }
    Ok(())
}

fn upgrade() -> Result<()> {
    let changed: Vec<_> = Lab::open()?.upgrade()?.iter().map(crate::host::Host::name).collect();
    println!("upgraded: {}", if changed.is_empty() { "nothing, all as built".into() } else { changed.join(", ") });
    Ok(())
}

fn on(host: &str, act: impl FnOnce(&Lab, &crate::host::Host) -> Result<()>) -> Result<()> {
    let lab = Lab::open()?;
    act(&lab, &lab.host(host)?)
}

fn cut(host: &str, other: Option<&str>, one_way: bool) -> Result<()> {
    let lab = Lab::open()?;
    let host = lab.host(host)?;
    let Some(other) = other else { return network::cut_host(&host) };
    let other = lab.host(other)?;
    network::cut_one_way(&host, &other)?;
    if one_way { Ok(()) } else { network::cut_one_way(&other, &host) }
}

/// The command takes the place of this process, so that terminal, signals and exit code are its own.
fn sh(host: &str, args: &[String]) -> Result<ExitCode> {
    let host = Lab::look()?.host(host)?;
    let mut command = host.inside()?;
    match args {
        [] => command.args(["bash", "--login"]),
        // One word with spaces is a line for the shell; more words are taken as they are.
        [line] if line.contains(' ') => command.args(["sh", "-c", line]),
        args => command.args(args),
    };
    Err(command.exec()).context("cannot run sh")
}

fn storage(command: StorageCommand) -> Result<()> {
    let lab = Lab::open()?;
    let storage = lab.storage()?;
    match command {
        StorageCommand::Locks { mode } => storage.locks(mode),
        StorageCommand::Expire { host } => storage.expire(&lab.host(&host)?.name()),
    }
}

fn vm(command: VmCommand) -> Result<()> {
    match command {
        VmCommand::Add { name, host, no_wait } => {
            let mut lab = Lab::open()?;
            let host = lab.host(&host)?;
            let guest = lab.add_guest(&name, &host)?;
            if no_wait { Ok(()) } else { guest.wait_up(&host, Duration::from_secs(60)) }
        }
        VmCommand::Tell { name, word } => {
            let lab = Lab::look()?;
            let guest = lab.guests().iter().find(|guest| guest.name() == name);
            guest.with_context(|| format!("there is no guest {name}"))?.tell(&lab.store(), &word)
        }
    }
}

fn status(lab: &Lab, json: bool) -> Result<()> {
    let qemus = lab.qemu_processes()?;
    let guest_name = |uuid: uuid::Uuid| {
        let known = lab.guests().iter().find(|guest| guest.uuid() == uuid);
        known.map_or_else(|| uuid.to_string(), |guest| guest.name().to_owned())
    };
    let mut hosts = Vec::new();
    for host in lab.hosts() {
        let name = host.name();
        let guests: Vec<_> = qemus.iter().filter(|qemu| qemu.host == name).map(|qemu| guest_name(qemu.uuid)).collect();
        hosts.push((host, host.power()?, guests));
    }
    let cuts = network::cuts()?;
    let storage = lab.storage()?.status()?;
    if json {
        let hosts: Vec<_> = hosts
            .iter()
            .map(|(host, power, guests)| {
                json!({ "host": host.name(), "address": host.address(), "power": power, "guests": guests })
            })
            .collect();
        let guests: Vec<_> =
            lab.guests().iter().map(|guest| json!({ "name": guest.name(), "uuid": guest.uuid() })).collect();
        let all = json!({
            "complete": lab.is_complete(), "accelerator": lab.accelerator(), "hosts": hosts, "guests": guests,
            "qemu": qemus, "cuts": cuts, "storage": storage,
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    if !lab.is_complete() {
        println!("half made: `cargo lab up` begins anew, `cargo lab down` clears it away");
    }
    for (host, power, guests) in hosts {
        let power = serde_json::to_value(power)?;
        println!(
            "{:4} {:12} {:7} {}",
            host.name(),
            host.address(),
            power.as_str().unwrap_or_default(),
            guests.join(" ")
        );
    }
    if !cuts.is_empty() {
        println!("cut: {}", cuts.join(", "));
    }
    let faults = storage["hosts"].as_object().into_iter().flatten().filter(|(_, host)| host["fault"] != "none");
    for (host, state) in faults {
        println!("storage of {host}: {}", state["fault"]);
    }
    println!("locks: {}", storage["locks"]["mode"]);
    Ok(())
}

impl From<FaultName> for Fault {
    fn from(name: FaultName) -> Fault {
        match name {
            FaultName::Hang => Fault::Hang,
            FaultName::Eio => Fault::Eio,
            FaultName::Enospc => Fault::Enospc,
            FaultName::Estale => Fault::Estale,
            FaultName::Slow => Fault::Slow(Duration::from_millis(500)),
            FaultName::Torn => Fault::Torn,
            FaultName::Late => Fault::Late(Duration::from_secs(2)),
            FaultName::DropSync => Fault::DropSync,
            FaultName::Heal => Fault::None,
        }
    }
}
