//! `mainstay vm …` as clap sees it.

use clap::{Subcommand, ValueEnum};

/// `mainstay vm …`
#[derive(Subcommand, Debug)]
pub enum VmCommand {
    /// All VMs.
    List,
    /// One VM in detail.
    Show {
        /// Name or UUID.
        vm: String,
    },
    /// Why a VM is where it is, what it waits for, and what would happen if its host died.
    Explain {
        /// Name or UUID.
        vm: String,
    },
    /// What was kept of its guest's failures before something was done about them. Needs root.
    ///
    /// Before Mainstay resets a guest, or does something else to it, because a message or a rule asks for it, it keeps what the
    /// guest shows: the text screen, a screenshot, the last 64 KiB of its serial console, its last messages, libvirt's statistics.
    /// From these it says what kind of failure it was, with the line that says so. What could not be had in time is listed as
    /// missing, with the reason: a remedy never waits longer than half a second.
    ///
    /// Its memory is kept, too, if the policy says so (cluster guest-policy --help): then the remedy waits for that. It lies in the
    /// same folder as the rest, where --show names it; it is not in what --export writes.
    ///
    /// For the console its definition must log it to a file:
    /// <serial type='pty'><log file='/var/log/libvirt/qemu/web-console.log'/></serial>
    ///
    /// Failures lie on the host that saw them (the newest 20, 64 MiB of a VM); all hosts are asked, and those that did not answer
    /// are named. Numbers are those of a host: --host says whose is meant where two hosts have the same.
    Failures {
        /// Name or UUID.
        vm: String,
        /// Print one: its record and all its texts.
        #[arg(long, value_name = "N", conflicts_with = "export")]
        show: Option<u32>,
        /// Write one with everything, also the screenshot, as a tar archive to a new file.
        #[arg(long, num_args = 2, value_names = ["N", "FILE"])]
        export: Option<Vec<String>>,
        /// Only those that this host, by its name, has kept.
        #[arg(long)]
        host: Option<String>,
    },
    /// It should run: here, or where there is room. Needs root.
    Start {
        /// Name or UUID.
        vm: String,
    },
    /// Try again to start it now, wherever its starts have failed before. Needs root.
    ///
    /// A start that fails for want of something on a host is tried on the others at once. When all were tried, or it would start
    /// nowhere, it is tried again 2, 6, 14 and 30 minutes after the first failure; then it has failed, until this is said or its
    /// definition is changed. One that waits for memory or for its disks starts by itself as soon as they are there.
    Retry {
        /// Name or UUID.
        vm: String,
    },
    /// It should not run: its guest is asked to power off. Needs root.
    Stop {
        /// Name or UUID.
        vm: String,
        /// End it at once, as if its power was cut.
        #[arg(long)]
        force: bool,
    },
    /// Change its policy. It is kept in its libvirt definition. Needs root.
    Set {
        /// Name or UUID.
        vm: String,
        /// What is done with it when its host's lease will probably lapse: pause it, so that its clock stands, let it run
        /// until it must be stopped, or what the cluster's default says.
        #[arg(long, value_enum)]
        on_doubt: OnDoubtArgument,
    },
    /// Let its guest speak: give it the port of Mainstay's agent inside. Needs root.
    ///
    /// The virtio-serial port org.mainstay.guest.0 is added to its libvirt definition, and plugged in if it runs. Then install
    /// mainstay-guest in the guest.
    EnableGuest {
        /// Name or UUID.
        vm: String,
    },
    /// Move it to another host while it runs. Needs root.
    Move {
        /// Name or UUID.
        vm: String,
        /// Name or id of the host; without it the best one is chosen.
        #[arg(long, value_name = "HOST")]
        to: Option<String>,
    },
}

/// `--on-doubt`
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnDoubtArgument {
    /// libvirt pauses it when four fifths of the lease have passed.
    Pause,
    /// It runs on, until its guard stops it at the lease's end.
    RunUntilStop,
    /// As `cluster set on-doubt=…` says.
    Default,
}
