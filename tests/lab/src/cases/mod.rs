//! The lab cases: every promise about failures, tried with real hosts, real VMs and judges from outside.
//!
//! ```text
//!  runner (test.rs) ──► Case ──► Ground::prepare(setting)    all well, cluster set as the case needs it
//!                                run(&mut Ground)            arrange, watch, fault, conditions with deadlines
//!                                Ground::finish              the judges' verdict
//! ```
//!
//! - `ground`: the words in which cases are told. `restore`: from whatever a case left to a healthy lab.
//! - `guests`, `homes`, `images`, `kill`, `power`, `freeze`, `cut`, `storage`, `people`, `restarts`, `guards`, `moves`, `foreign`, `junk`,
//!   `remedies`, `planned`, `split`, `chaos`: the cases.
//! - `pace`: what a limit is held against on a slow machine. `report`: what is kept of a case that failed.
//!
//! Cases are ordered by setting, since another kind of locks needs other mounts, and thus a power loss of all hosts.
//! Limits are those promised for a single run; medians are the benches' (`bench.rs`).

mod chaos;
mod cut;
mod failures;
mod foreign;
mod freeze;
mod ground;
mod guards;
mod guests;
mod homes;
mod images;
mod junk;
mod kill;
mod moves;
mod pace;
mod people;
mod planned;
mod power;
mod remedies;
pub mod report;
mod restarts;
mod restore;
mod screens;
mod split;
mod storage;

use std::time::Duration;

use anyhow::Result;

pub use freeze::for_time as freeze_for;
pub use ground::{GUESTS, Ground, host_of_process, seconds};
pub use junk::send as send_junk;

use crate::product::FENCE;
use crate::storage::LockMode;

/// How the cluster and its datastore are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// `default`, `fast` or `patient`.
    pub profile: &'static str,
    /// Who keeps locks.
    pub locks: LockMode,
    /// The datastore's fence.
    pub fence: &'static str,
    /// Without a fence: `exclude` or `accept`.
    pub late_writes: &'static str,
    /// Every host has a fence device, used at `lapse` or `suspect`; none = no fence devices.
    pub power: Option<&'static str>,
}

const LEASE: Duration = Duration::from_secs(10);

impl Setting {
    /// Locks at a server, fenced by command.
    pub const SERVER: Setting = Setting {
        profile: "default",
        locks: LockMode::Server { lease: LEASE },
        fence: FENCE,
        late_writes: "exclude",
        power: None,
    };
    /// The same, reacting fast.
    pub const FAST: Setting = Setting { profile: "fast", ..Setting::SERVER };
    /// The same, with a power switch that is used as soon as a host is suspected.
    pub const POWER: Setting = Setting { power: Some("suspect"), ..Setting::SERVER };
    /// Both.
    pub const POWER_FAST: Setting = Setting { profile: "fast", ..Setting::POWER };
    /// Locks at a server that drops those of a silent client after a lease; nothing to fence with.
    pub const LEASED: Setting = Setting { fence: "lock", ..Setting::SERVER };
    /// Locks reach no other host; fenced by command.
    pub const LOCAL_FENCED: Setting = Setting { locks: LockMode::Local, ..Setting::SERVER };
    /// Locks reach no other host, no fence, the risk is taken.
    pub const LOCAL_ACCEPT: Setting =
        Setting { locks: LockMode::Local, fence: "none", late_writes: "accept", ..Setting::SERVER };
    /// Locks reach no other host, no fence, no risk is taken.
    pub const LOCAL_EXCLUDE: Setting = Setting { late_writes: "exclude", ..Setting::LOCAL_ACCEPT };
}

/// One case.
pub struct Case {
    /// For the command line.
    pub name: &'static str,
    /// What it shows.
    pub shows: &'static str,
    /// How the cluster is to be set.
    pub setting: Setting,
    /// Does it.
    pub run: fn(&mut Ground) -> Result<()>,
}

const fn case(name: &'static str, shows: &'static str, run: fn(&mut Ground) -> Result<()>) -> Case {
    Case { name, shows, setting: Setting::SERVER, run }
}

const fn with(setting: Setting, case: Case) -> Case {
    Case { setting, ..case }
}

/// All cases, in the order in which they run.
pub const ALL: &[Case] = &[
    case("vm-move", "a running guest moves, its gap is at most 1 s", moves::back_and_forth),
    case(
        "move-target-killed",
        "the target dies in the middle of a move: the guest goes on at the source",
        moves::target_killed,
    ),
    case("move-source-killed", "the source dies in the middle of a move: restarted once", moves::source_killed),
    case(
        "virsh-migrate",
        "virsh migrate of a running guest: its gap is at most 1 s, its claim follows",
        foreign::back_and_forth,
    ),
    case("virsh-migrate-refused", "the policy refuses virsh migrate and names vm move", foreign::refused),
    case("virsh-migrate-target-killed", "the target of a virsh migrate dies: one copy runs", foreign::target_killed),
    case("virsh-migrate-source-killed", "the source of a virsh migrate dies: one copy runs", foreign::source_killed),
    case(
        "virsh-migrate-libvirtd-killed",
        "libvirtd of the target of a virsh migrate dies, before, at and after the switch: one copy runs",
        foreign::libvirtd_killed,
    ),
    case("qemu-killed", "kill -9 of a QEMU: restarted in place within 2 s", kill::qemu),
    case(
        "virsh-start",
        "virsh start of what runs elsewhere is refused; of what runs nowhere, claimed",
        people::virsh_start,
    ),
    case(
        "restore-after-run-elsewhere",
        "saved memory goes on; of a VM that ran elsewhere since it is refused",
        images::restore_after_run_elsewhere,
    ),
    case("clones", "a clone with the same UUID, or with the same disk, is refused and the owner named", images::clones),
    case(
        "edit-while-running",
        "a definition changed while its VM runs survives the death of its host",
        images::edit_while_running,
    ),
    case("restart-agents", "mainstayd restarted on each host, then on all at once: no VM is touched", restarts::agents),
    case("restart-libvirtd", "libvirtd restarted on each host: no VM is touched", restarts::libvirtd),
    case(
        "restart-libvirtd-alone",
        "libvirtd restarted while mainstayd is stopped: no VM is touched",
        restarts::libvirtd_alone,
    ),
    case(
        "reload-restart",
        "guard reloaded, agent and libvirtd restarted, in every order: no VM is touched; guard restarted: at most 1 s",
        guards::reloaded,
    ),
    case("libvirtd-hangs", "libvirtd stopped, then hanging: VMs go on, a note names it", restarts::libvirtd_hangs),
    case(
        "junk-datagrams",
        "junk, replayed, cut and altered beats: ignored, nothing logged per packet",
        junk::datagrams,
    ),
    case("name-twice", "a host with a name that is in use is refused, by name", junk::name_twice),
    case("cut-subordinate", "a host without network but with storage: isolated, nothing is touched", cut::subordinate),
    case(
        "cut-master",
        "the master without the other hosts: partitioned, nothing is touched; after healing one master within 2 beats",
        cut::master,
    ),
    case(
        "cut-isolated",
        "the same with isolation responses: powered off, shut down, left; what was ended runs elsewhere within 6 s",
        cut::isolated,
    ),
    case(
        "storage-hangs",
        "the storage hangs 20 s (--full: 60 s) for all: nothing is taken, all run again within 2 s",
        storage::hangs_for_all,
    ),
    case(
        "storage-hangs-one",
        "the storage hangs for one host that is heard: nothing is taken, paused or stopped",
        storage::hangs_for_one,
    ),
    case(
        "resume-after-lapse",
        "virsh resume of a VM whose lease lapsed: stays stopped, with the reason",
        storage::resume_held,
    ),
    case("storage-full", "the storage is full: nothing is taken or killed, all run again", storage::full),
    case(
        "storage-split",
        "the master does not reach the datastore when a host dies: restarted within 8.5 s; a stop asked for meanwhile is kept",
        split::storage_of_the_master,
    ),
    case(
        "delegate-dies",
        "the master does not reach the datastore, and the host that is to start a VM dies, too: the next one starts it within 10 s",
        split::delegate_dies,
    ),
    case(
        "split-both",
        "network and storage part differently: what may run nowhere else waits, says so, and goes on within 3 s of the heal",
        split::both_differently,
    ),
    case("kill-subordinate", "3 VMs run on survivors within 8 s", kill::subordinate),
    case("kill-master", "3 VMs of the master's host run on survivors within 10 s", kill::master),
    case("comes-back", "a killed host rejoins, loses its stale definitions, starts nothing twice", kill::comes_back),
    case(
        "power-loss",
        "all hosts lose their power, come back up to 15 s (--full: 60 s) apart, one never does: every guest runs once",
        kill::all,
    ),
    case("stays-down", "stopped by people or from inside: stays down when the host dies", people::stays_down),
    case("host-poweroff", "an orderly poweroff of a host: its VMs run elsewhere", people::host_poweroff),
    case("freeze", "a frozen host's VMs are taken once; its old copies gain at most 20 ms", freeze::freeze),
    case(
        "cut-and-hang",
        "no network and no storage: stopped before L, taken once, the old copies are killed",
        cut::and_hang,
    ),
    case(
        "guard-killed",
        "guard's child or parent, agent, libvirtd killed or stopped, then no storage: stopped in time, taken once",
        guards::killed,
    ),
    case(
        "home-move",
        "virsh blockcopy to another datastore: the home follows, and the guest starts from there when its host dies",
        homes::follows_blockcopy,
    ),
    case(
        "guest-report",
        "a guest's agent asks for a reset: it follows within 250 ms (median of 5; --full: of 20), and the guest is back",
        guests::report,
    ),
    case(
        "guest-asks",
        "a guest asks for the reset of another: denied; within 1 s; on another host within 1.5 s; by the third of three votes",
        guests::ask_for_others,
    ),
    case(
        "guest-fails",
        "a guest panics, spins, hangs: reset; its agent dies or its storage stalls: it is not",
        guests::fail,
    ),
    case(
        "guest-panics-always",
        "a guest panics in each boot: reset three times, then told once that it needs attention",
        guests::panics_always,
    ),
    case(
        "guest-floods",
        "four hostile guests for 15 s (--full: 5 min): an agent's CPU at most 5 %, memory flat, others reset within 250 ms (median)",
        guests::flood,
    ),
    case(
        "guest-reconnects",
        "agent restarted, guest moved, booted, put back, 2 times each (--full: 20): heard within 2 s, nothing lost or done twice",
        guests::reconnect,
    ),
    case(
        "guest-debian",
        "a Debian guest with systemd: a unit fails: reset; freeze, thaw and shutdown as the host asks",
        guests::debian,
    ),
    case(
        "guest-screens",
        "stop screens are reset; boot loader prompts and missing boot devices are told; in text and in graphics",
        screens::all,
    ),
    case(
        "guest-remedies",
        "a guest is given a port while it runs; power cycle, reboot, migration, restart elsewhere by rules: once",
        remedies::all,
    ),
    case(
        "maintenance",
        "4 guests move away, each gap at most 1 s; a power cycle meanwhile is no failure; they come back",
        planned::maintenance,
    ),
    case(
        "order",
        "priorities, who waits for whom, who must be apart: held; who has no place waits, and starts within 3 s of a host's return \
         (--full: 5 hosts, 12 guests, two hosts killed)",
        planned::order,
    ),
    case("chaos", "a minute of random faults and operators: never two, all as wanted when healed", chaos::short),
    with(Setting::POWER, case("kill-power-suspect", "a power switch confirms at once: within 5 s", power::suspect)),
    with(
        Setting::POWER,
        case("kill-power-hangs", "a power switch that hangs: the lapse decides, within 8 s", power::hangs),
    ),
    with(
        Setting::POWER,
        case("kill-power-fails", "a power switch that fails: the same, and people are told", power::fails),
    ),
    with(Setting::POWER, case("cut-network-power", "a cut network alone: nobody is switched off", power::cut_network)),
    with(Setting::POWER_FAST, case("kill-power-suspect-fast", "profile fast: within 2.2 s", power::suspect_fast)),
    with(Setting::FAST, case("kill-subordinate-fast", "profile fast: within 3 s", kill::subordinate_fast)),
    with(Setting::FAST, case("kill-master-fast", "profile fast: within 3.5 s", kill::master_fast)),
    with(
        Setting::LEASED,
        case("kill-leased-locks", "no fence: started at most 1.5 s after the old locks end", kill::leased_locks),
    ),
    with(
        Setting::LOCAL_ACCEPT,
        case("kill-local-accept", "no fence, late writes accepted: within 8 s", kill::local_accept),
    ),
    with(
        Setting::LOCAL_EXCLUDE,
        case("kill-local-exclude", "no fence: waits, says for what, starts after a new boot", kill::local_exclude),
    ),
];

/// Cases whose name has a part like that, in order; all without a pattern.
pub fn matching(pattern: Option<&str>) -> Vec<&'static Case> {
    ALL.iter().filter(|case| pattern.is_none_or(|pattern| case.name.contains(pattern))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_settings_do_not_alternate() {
        let mut names: Vec<_> = ALL.iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        let mut settings: Vec<Setting> = Vec::new();
        for case in ALL {
            if settings.last() != Some(&case.setting) {
                assert!(!settings.contains(&case.setting), "{} comes too late", case.name);
                settings.push(case.setting);
            }
        }
    }
}
