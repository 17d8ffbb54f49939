//! The command line as clap sees it; its doc comments are the help.

mod vm;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
pub use vm::{OnDoubtArgument, VmCommand};

use super::verdict::VerdictCommand;

use super::health::HealthCommand;

/// High availability for virtual machines on plain libvirt/KVM hosts.
///
/// Asks the agent (mainstayd) of this host; any host of the cluster answers for all.
#[derive(Parser, Debug)]
#[command(
    name = "mainstay",
    version,
    max_term_width = 80,
    subcommand_required = true,
    after_help = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 agent not reachable, 4 denied.

First cluster:
  mainstay cluster init              on the first host; prints a token
  mainstay cluster join TOKEN        on each of the others
  mainstay datastore add NAME PATH   once, on any of them
Every persistent VM whose disks lie on a datastore is then protected."
)]
pub struct Arguments {
    /// Print JSON (schema version inside) instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// No colour, even on a terminal. NO_COLOR in the environment does the same.
    #[arg(long = "no-color", global = true)]
    pub no_colour: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// All commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// The cluster at a glance: master, hosts, datastores, VMs that are not as wanted.
    Status {
        /// Show it anew each second, until interrupted.
        #[arg(long)]
        watch: bool,
    },
    /// Hosts and what is known of them.
    #[command(subcommand)]
    Host(HostCommand),
    /// VMs: see, explain, start, stop, move.
    #[command(subcommand)]
    Vm(VmCommand),
    /// What would become of VMs if these hosts failed together: where, in what order and how soon they would run, and which not.
    WhatIf {
        /// Names of hosts.
        #[arg(required = true)]
        hosts: Vec<String>,
    },
    /// What happened, with reasons.
    Events(EventsArguments),
    /// What was decided of hosts and VMs, with the evidence.
    #[command(subcommand)]
    Verdict(VerdictCommand),
    /// Check everything that can be wrong on this host and say how to mend it.
    ///
    /// Exit code 1 when there are errors; warnings alone are 0. Works without an agent, too.
    Doctor,
    /// Make a cluster, join one, change its timing. Needs root.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Shared storage that VMs live on.
    #[command(subcommand)]
    Datastore(DatastoreCommand),
    /// The configuration file of this host.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// `mainstay host …`
#[derive(Subcommand, Debug)]
pub enum HostCommand {
    /// All hosts.
    List,
    /// One host in detail, with the evidence for its verdict.
    Show {
        /// Name or id.
        host: String,
    },
    /// Power switches of hosts: how a silent host is switched off for certain.
    #[command(subcommand)]
    FenceDevice(FenceDeviceCommand),
    /// End the quarantine of hosts that came and went too often, or have found something wrong with themselves: VMs may be placed on
    /// them again. Needs root.
    Release {
        /// Names or ids.
        #[arg(required = true)]
        hosts: Vec<String>,
    },
    /// Say that something is wrong with this host, or is well again. Needs root.
    #[command(subcommand)]
    Health(HealthCommand),
    /// Work on a host: its VMs are moved away, and back afterwards. Needs root.
    #[command(subcommand)]
    Maintenance(MaintenanceCommand),
    /// Move the VMs of this host away now, without maintenance: when this command ends it is a host like others. Needs root.
    Evacuate {
        /// Only if this host goes down, and [shutdown] in the rules for VMs wants it: mainstay-evacuate.service says so.
        #[arg(long)]
        for_shutdown: bool,
    },
}

/// `mainstay host maintenance …`
#[derive(Subcommand, Debug)]
pub enum MaintenanceCommand {
    /// Nothing is started there any more, and all that is protected is moved to other hosts, one after the other (moves_per_host in the rules for VMs). Waits for that.
    ///
    /// Power cycles do not end it. VMs that cannot be moved are named with the reason, and tried again every half minute.
    Enter {
        /// Name or id.
        host: String,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// It takes VMs again, and those that ran there before are moved back, as far as they still run.
    Leave {
        /// Name or id.
        host: String,
        /// Leave them where they are.
        #[arg(long)]
        stay: bool,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
}

/// `mainstay host fence-device …`
#[derive(Subcommand, Debug)]
pub enum FenceDeviceCommand {
    /// Give a host a power switch, driven by a fence agent. Needs root.
    ///
    /// Example: echo password=… | mainstay host fence-device add ipmi-h1 h1 fence_ipmilan ip=10.0.9.1 username=fence
    /// lanplus=1 --secrets -
    Add {
        /// Name, for people.
        name: String,
        /// The host that it switches, by name or id.
        host: String,
        /// fence_… as installed on every host, or the absolute path of a program that speaks like one.
        agent: String,
        /// Parameters of the agent; secrets are not given here.
        #[arg(value_name = "KEY=VALUE")]
        parameters: Vec<String>,
        /// File with KEY=VALUE lines that are never shown; - is standard input.
        #[arg(long, value_name = "FILE")]
        secrets: Option<PathBuf>,
        /// Levels are tried in order; all devices of one level must say that the host is off (two power supplies).
        #[arg(long, default_value_t = 1)]
        level: u8,
        /// When it may be used, instead of the cluster's setting fence-at.
        #[arg(long, value_enum)]
        fence_at: Option<FenceAtArgument>,
    },
    /// All power switches, with what is wrong with them.
    List,
    /// Take a power switch away. Needs root.
    Remove {
        /// Its name.
        name: String,
    },
    /// Ask a power switch, from this host, whether its host is on. Switches nothing. Needs root.
    Test {
        /// Its name.
        name: String,
    },
    /// Use a power switch again that had said that a living host is off. Needs root.
    Trust {
        /// Its name.
        name: String,
    },
}

/// `--fence-at`
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum FenceAtArgument {
    /// When its lease must have lapsed: a living host loses nothing that it had not lost already.
    Lapse,
    /// As soon as it is suspected: the fastest failover; a stall of network and storage at once may cost a host.
    Suspect,
}

/// `mainstay events …`
#[derive(Args, Debug)]
pub struct EventsArguments {
    /// Go on as things happen, until interrupted.
    #[arg(long, short)]
    pub follow: bool,
    /// How far back: a span (90s, 10m, 2h, 3d) or a time (2026-11-25T17:00, 17:00).
    #[arg(long, value_name = "SPAN|TIME", default_value = "1h")]
    pub since: String,
    /// Only of this VM (name or UUID).
    #[arg(long)]
    pub vm: Option<String>,
    /// Only of this host.
    #[arg(long)]
    pub host: Option<String>,
}

/// How fast a cluster reacts.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// VMs of a dead host are started after about 5 s.
    Default,
    /// After about 1.6 s; needs storage and network without stalls.
    Fast,
    /// After about 16 s; for storage that stalls.
    Patient,
}

/// `mainstay cluster …`
#[derive(Subcommand, Debug)]
pub enum ClusterCommand {
    /// Make a new cluster with this host as its first member; prints a token for the others.
    Init {
        /// Name of the cluster, for people.
        #[arg(long, default_value = "mainstay")]
        name: String,
        /// How fast it reacts; can be changed later.
        #[arg(long, value_enum, default_value = "default")]
        profile: Profile,
    },
    /// Join the cluster that a token is from.
    Join {
        /// As printed by `cluster init` or `cluster token`. Keep it secret.
        token: String,
    },
    /// Print a token with which further hosts can join.
    Token,
    /// Change a setting of the whole cluster, for example profile=fast.
    Set {
        /// KEY=VALUE: profile=default|fast|patient, fence-at=lapse|suspect (when silent hosts are switched off),
        /// foreign-migration=allow|refuse (virsh migrate by people), on-doubt=pause|run-until-stop (what is done with a
        /// VM whose lease will probably lapse, before it is stopped), or apd-after=20s (a datastore that is silent for so
        /// long counts as down for a host).
        setting: String,
    },
    /// Nothing is restarted, switched off or reset by itself for a while: for work on the network or the storage. Needs root.
    ///
    /// Leases are as ever: a VM whose lease lapses is stopped, and goes on when its host has the lease again.
    Disarm {
        /// For so long, for example 30m or 2h; then the cluster arms itself.
        #[arg(long = "for", value_name = "TIME")]
        length: String,
        /// Shown wherever the cluster says that it is disarmed.
        #[arg(long, default_value = "")]
        because: String,
    },
    /// End `disarm`. Needs root.
    Arm,
    /// Show, or replace, the rules for what guests say. Needs root.
    ///
    /// Without FILE the rules in use are printed, ready to be edited and given back. Example, which lets any of app1, app2,
    /// app3 have db reset when two of them ask for it within a minute:
    ///
    /// [[rule]]
    /// severity = "critical"
    /// then = "as-asked"
    ///
    /// [[permission]]
    /// target = "db"
    /// by = "app*"
    /// remedy = "reset"
    /// votes = 2
    ///
    /// What follows (then): "note"; "as-asked"; { own = REMEDY }; { other = { vm = "db", remedy = REMEDY } }; or
    /// { hook = "/usr/local/sbin/PROGRAM" }, run on the guest's host with MAINSTAY_VM, MAINSTAY_UUID, MAINSTAY_KIND,
    /// MAINSTAY_SEVERITY and MAINSTAY_MESSAGE in its environment, for at most 60 s. REMEDY is reset, reboot,
    /// power-cycle, restart-elsewhere, migrate, suspend or dump (its memory is written to the folder of its failure).
    ///
    /// With dump = true in a [[monitor]] a guest's memory is kept before it is reset for what was seen of it. [dumps] has the
    /// limits: mib = 8192 for all dumps of a host, within_s = 120 for each; the guest stands meanwhile.
    #[command(verbatim_doc_comment)]
    GuestPolicy {
        /// TOML; - is standard input.
        file: Option<PathBuf>,
    },
    /// Show, or replace, the rules for the order and the places of VMs. Needs root.
    ///
    /// Without FILE the rules in use are printed, ready to be edited and given back. VMs and hosts are named or given as patterns
    /// (db*). Example:
    ///
    /// [[priority]]            # highest, high, medium (the default), low, lowest, never; the first that fits a VM counts
    /// vms = ["db*"]
    /// priority = "high"
    ///
    /// [[dependency]]          # app* start when db1 is ready: "started" (the default), "agent", "application"
    /// vms = ["app*"]
    /// after = ["db1"]
    /// ready = "agent"
    /// delay_s = 5             # and so much later
    /// within_s = 600          # they start at the latest when they have waited for so long, and that is said
    ///
    /// [[affinity]]            # tie: together (on one host) or apart (on a host each); force: should (the default) or must
    /// vms = ["dns*"]
    /// tie = "apart"
    /// force = "must"
    ///
    /// [[placement]]           # place: only or not
    /// vms = ["licensed"]
    /// hosts = ["h1", "h2"]
    /// place = "only"
    /// force = "must"
    ///
    /// [[failback]]            # brought back to one of these hosts when it has been well for so long
    /// vms = ["db*"]
    /// hosts = ["h1"]
    /// after_s = 600
    ///
    /// [room]                  # VMs of priority lowest that go when one of a higher priority has no place
    /// move = ["*"]            # to another host
    /// stop = ["batch-*"]      # until there is room again; powered off after within_s
    /// within_s = 60
    ///
    /// [shutdown]              # of a host: its VMs are started elsewhere when they have ended (release, the default), or
    /// vms = "evacuate"        # moved away before
    /// within_s = 300
    /// [[health]]              # what a host finds wrong with itself; action: tell, quarantine, evacuate
    /// source = "temperature"  # uplink, bond, memory, memory-corrected, temperature, disk, vendor
    /// action = "quarantine"
    ///
    /// [limits]
    /// starts_per_host = 4
    /// starts_per_datastore = 16
    /// moves_per_host = 1      # of a host that goes into maintenance, or is unwell
    /// vcpus_per_cpu = 8       # none: any number
    #[command(verbatim_doc_comment)]
    VmRules {
        /// TOML; - is standard input.
        file: Option<PathBuf>,
    },
}

/// `mainstay datastore …`
#[derive(Subcommand, Debug)]
pub enum DatastoreCommand {
    /// Make a mounted folder a datastore of the cluster. Needs root.
    ///
    /// It must be mounted at the same path on every host.
    Add {
        /// Name, for people.
        name: String,
        /// Where it is mounted.
        path: PathBuf,
        /// How late writes of a dead host are kept out: lock (image locks that the server drops: NFSv4, CephFS), none,
        /// or command:/path/to/program. Without it lock or none is chosen by the file system.
        #[arg(long, value_name = "lock|none|command:/PATH")]
        fence: Option<String>,
        /// What to do with VMs of a dead host when there is no fence: wait until its writes are excluded, or accept the
        /// risk.
        #[arg(long, value_enum, default_value = "exclude")]
        late_writes: LateWritesArgument,
        /// Allow a folder that is on the host's own file system (tests, single host).
        #[arg(long)]
        allow_local: bool,
    },
    /// Change how late writes are kept out. Needs root.
    Set {
        /// Its name.
        name: String,
        /// As in `datastore add`.
        #[arg(long, value_name = "lock|none|command:/PATH", required_unless_present = "late_writes")]
        fence: Option<String>,
        /// As in `datastore add`.
        #[arg(long, value_enum)]
        late_writes: Option<LateWritesArgument>,
    },
    /// Use a datastore again that shows less than before: a server that came back from an older copy, lost claims. Needs
    /// root.
    ///
    /// Until then VMs whose claims are there run on, and nothing on it is started, moved or taken over. Look first: is the
    /// right volume mounted, on every host? Is there a newer copy that should be brought back instead? Are the disks of
    /// your VMs what they should be? What was lost stays lost: a VM whose claim is gone goes on where it stands, or starts
    /// from its disks where its older claim says. Hosts that are away need not be waited for; but switch off every host that
    /// cannot reach this datastore now: what it wrote there may land late, and the claims that would keep it out may be gone.
    Accept {
        /// Its name.
        name: String,
    },
    /// All datastores.
    List,
}

/// `--late-writes`
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LateWritesArgument {
    /// A VM waits until the old host was powered off or has booted again.
    Exclude,
    /// A VM starts at once; a late write may damage its disk.
    Accept,
}

/// `mainstay config …`
#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Read a configuration file and tell every mistake in it, with its line.
    Check {
        /// The file.
        #[arg(default_value = "/etc/mainstay/mainstay.toml")]
        file: PathBuf,
    },
}
