//! Which faults come when: drawn from the seed alone, before anything happens.
//!
//! ```text
//!  seed, round ──► dice ──► kind by weight ──► target ──► room in its slots? ──► Step { at, fault, lasts }
//!                             ▲                               │ no: drawn again, at most TRIES times
//!                             └───────────────────────────────┘
//!  slots of a host  power │ storage │ net │ agent │ guard │ libvirt      slots of a VM  its QEMU │ its operator
//! ```
//!
//! At least one host is always without a fault of power, storage or guard, but while the storage fails for all. What a
//! step meets when its time has come (a VM that runs nowhere, a host that is off) is not known here; then it is passed
//! over, and told.

use std::fmt;
use std::time::Duration;

use crate::host::Host;
use crate::storage::Fault as StorageFault;

/// Draws for one step before it is given up.
const TRIES: usize = 12;
/// Before the first fault.
const QUIET: Duration = Duration::from_secs(4);
/// Between two steps, in milliseconds.
const PAUSE_MS: (u64, u64) = (1_000, 7_000);

/// One fault, or one deed of an operator.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Since the beginning of the round.
    pub at: Duration,
    /// What.
    pub fault: Fault,
    /// Until it is healed.
    pub lasts: Duration,
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Power loss.
    Kill { host: Host },
    /// All its processes stand still.
    Freeze { host: Host },
    /// Hears nobody, is heard by nobody.
    Cut { host: Host },
    /// From one to the other only.
    CutOneWay { from: Host, to: Host },
    /// The two from each other.
    CutBoth { from: Host, to: Host },
    /// The storage of one host, or of all.
    Storage { host: Option<Host>, how: StorageFault },
    /// A daemon.
    Program { host: Host, program: Program, how: How },
    /// The QEMU of a VM, wherever it is.
    Qemu { vm: String, how: How },
    /// A person at a shell; `back` undoes it later.
    Operator { vm: String, deed: Deed, host: Host, back: Option<Deed> },
}

/// A daemon of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// mainstayd.
    Agent,
    /// The guard's process that systemd knows.
    GuardParent,
    /// Its child; the same where there is one process only.
    GuardChild,
    /// libvirtd.
    Libvirtd,
}

/// What is done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, until it is healed.
    Stop,
}

/// What a person does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// `virsh destroy` where it runs.
    Destroy,
    /// `virsh managedsave` where it runs.
    Save,
    /// `virsh resume` where it runs.
    Resume,
    /// `virsh start`, on a host where it was defined for that.
    VirshStart,
    /// `mainstay vm start`.
    Start,
    /// `virsh migrate` to a host.
    VirshMigrate,
    /// `mainstay vm move` to a host.
    Move,
}

/// Small, and the same everywhere: splitmix64.
pub struct Dice(u64);

impl Dice {
    /// For a round of a run.
    pub fn new(seed: u64, round: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.roll() % limit as u64) as usize
    }

    fn seconds(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from * 1000 + self.roll() % ((to - from) * 1000))
    }

    fn weighted<'a, T>(&mut self, from: &'a [(u32, T)]) -> &'a T {
        let total: u32 = from.iter().map(|(weight, _)| weight).sum();
        let mut left = self.roll() % u64::from(total);
        for (weight, item) in from {
            match left.checked_sub(u64::from(*weight)) {
                Some(rest) => left = rest,
                None => return item,
            }
        }
        unreachable!("the weights sum up to the total")
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Kill,
    Freeze,
    Cut,
    CutOneWay,
    CutBoth,
    Storage,
    StorageOfAll,
    Program(Program, How),
    Qemu(How),
    Operator,
}

const KINDS: &[(u32, Kind)] = &[
    (12, Kind::Kill),
    (12, Kind::Freeze),
    (7, Kind::Cut),
    (6, Kind::CutOneWay),
    (4, Kind::CutBoth),
    (14, Kind::Storage),
    (2, Kind::StorageOfAll),
    (3, Kind::Program(Program::Agent, How::Kill)),
    (3, Kind::Program(Program::Agent, How::Stop)),
    (3, Kind::Program(Program::GuardParent, How::Kill)),
    (3, Kind::Program(Program::GuardChild, How::Kill)),
    (1, Kind::Program(Program::GuardParent, How::Stop)),
    (2, Kind::Program(Program::GuardChild, How::Stop)),
    (3, Kind::Program(Program::Libvirtd, How::Kill)),
    (3, Kind::Program(Program::Libvirtd, How::Stop)),
    (4, Kind::Qemu(How::Kill)),
    (3, Kind::Qemu(How::Stop)),
    (24, Kind::Operator),
];

const STORAGE: &[(u32, StorageFault)] = &[
    (6, StorageFault::Hang),
    (3, StorageFault::Eio),
    (3, StorageFault::Late(Duration::from_secs(2))),
    (2, StorageFault::Slow(Duration::from_millis(500))),
    (1, StorageFault::Enospc),
];

const DEEDS: &[(u32, Deed)] = &[
    (4, Deed::Destroy),
    (3, Deed::Save),
    (2, Deed::Resume),
    (4, Deed::VirshStart),
    (1, Deed::Start),
    (4, Deed::VirshMigrate),
    (5, Deed::Move),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Power,
    Storage,
    Net,
    Agent,
    Guard,
    Libvirt,
}

const SLOTS: usize = 6;

impl Kind {
    /// Which slots of a host it takes, and for how long after it was healed. All need the host's power to be there.
    fn takes(self) -> (&'static [Slot], Duration) {
        let rest = |seconds| Duration::from_secs(seconds);
        match self {
            Kind::Kill => (&[Slot::Power, Slot::Storage, Slot::Agent, Slot::Guard, Slot::Libvirt], rest(30)),
            // What hangs in the storage cannot be frozen.
            Kind::Freeze => (&[Slot::Power, Slot::Storage, Slot::Agent, Slot::Guard, Slot::Libvirt], rest(10)),
            Kind::Cut | Kind::CutOneWay | Kind::CutBoth => (&[Slot::Net], rest(3)),
            Kind::Storage | Kind::StorageOfAll => (&[Slot::Storage], rest(8)),
            Kind::Program(Program::Agent, _) => (&[Slot::Agent], rest(5)),
            Kind::Program(Program::GuardParent | Program::GuardChild, _) => (&[Slot::Guard], rest(8)),
            Kind::Program(Program::Libvirtd, _) => (&[Slot::Libvirt], rest(5)),
            Kind::Qemu(_) | Kind::Operator => (&[], rest(0)),
        }
    }

    fn lasts(self, dice: &mut Dice) -> Duration {
        match self {
            Kind::Kill => dice.seconds(8, 30),
            Kind::Freeze => dice.seconds(2, 25),
            Kind::Cut | Kind::CutOneWay | Kind::CutBoth => dice.seconds(3, 25),
            Kind::Storage => dice.seconds(3, 25),
            Kind::StorageOfAll => dice.seconds(3, 15),
            Kind::Program(_, How::Kill) => dice.seconds(4, 5),
            Kind::Program(_, How::Stop) => dice.seconds(2, 20),
            Kind::Qemu(How::Kill) => dice.seconds(1, 2),
            Kind::Qemu(How::Stop) => dice.seconds(1, 12),
            Kind::Operator => dice.seconds(3, 20),
        }
    }
}

/// What is taken until when.
struct Room {
    hosts: Vec<[Duration; SLOTS]>,
    qemus: Vec<Duration>,
    operators: Vec<Duration>,
}

/// The steps of one round of that length, in order.
pub fn plan(dice: &mut Dice, hosts: &[Host], vms: &[String], length: Duration) -> Vec<Step> {
    let free = Duration::ZERO;
    let mut room = Room {
        hosts: vec![[free; SLOTS]; hosts.len()],
        qemus: vec![free; vms.len()],
        operators: vec![free; vms.len()],
    };
    let mut steps = Vec::new();
    let mut at = QUIET;
    while at < length {
        for _ in 0..TRIES {
            let kind = *dice.weighted(KINDS);
            let lasts = kind.lasts(dice).min(length.saturating_sub(at)).max(Duration::from_secs(1));
            if let Some(fault) = room.draw(dice, kind, hosts, vms, at, at + lasts) {
                steps.push(Step { at, fault, lasts });
                break;
            }
        }
        at += Duration::from_millis(PAUSE_MS.0 + dice.roll() % (PAUSE_MS.1 - PAUSE_MS.0));
    }
    steps
}

impl Room {
    fn draw(
        &mut self,
        dice: &mut Dice,
        kind: Kind,
        hosts: &[Host],
        vms: &[String],
        at: Duration,
        to: Duration,
    ) -> Option<Fault> {
        let (host, vm) = (dice.below(hosts.len()), dice.below(vms.len()));
        let other = (host + 1 + dice.below(hosts.len() - 1)) % hosts.len();
        match kind {
            Kind::Qemu(how) => {
                take(&mut self.qemus[vm], at, to + Duration::from_secs(10))?;
                Some(Fault::Qemu { vm: vms[vm].clone(), how })
            }
            Kind::Operator => {
                take(&mut self.operators[vm], at, to + Duration::from_secs(15))?;
                let deed = *dice.weighted(DEEDS);
                let undo = if dice.below(2) == 0 { Deed::VirshStart } else { Deed::Start };
                let back = matches!(deed, Deed::Destroy | Deed::Save).then_some(undo);
                Some(Fault::Operator { vm: vms[vm].clone(), deed, host: hosts[host], back })
            }
            Kind::StorageOfAll => {
                let how = if dice.below(3) == 0 { StorageFault::Eio } else { StorageFault::Hang };
                self.take_hosts(kind, &(0..hosts.len()).collect::<Vec<_>>(), at, to)?;
                Some(Fault::Storage { host: None, how })
            }
            _ => {
                let pair = matches!(kind, Kind::CutBoth | Kind::CutOneWay);
                let both = [host, other];
                self.take_hosts(kind, if pair { &both } else { &both[..1] }, at, to)?;
                Some(of_host(dice, kind, hosts[host], hosts[other]))
            }
        }
    }

    fn take_hosts(&mut self, kind: Kind, hosts: &[usize], at: Duration, to: Duration) -> Option<()> {
        let (slots, rest) = kind.takes();
        let is_free = |host: usize, slot: Slot| self.hosts[host][slot as usize] <= at;
        let fits = |host: &usize| is_free(*host, Slot::Power) && slots.iter().all(|slot| is_free(*host, *slot));
        if !hosts.iter().all(fits) {
            return None;
        }
        let harms = [Slot::Power, Slot::Storage, Slot::Guard];
        if !matches!(kind, Kind::StorageOfAll) && slots.iter().any(|slot| harms.contains(slot)) {
            let whole = |host: usize| !hosts.contains(&host) && harms.iter().all(|slot| is_free(host, *slot));
            if !(0..self.hosts.len()).any(whole) {
                return None;
            }
        }
        for (host, slot) in hosts.iter().flat_map(|host| slots.iter().map(move |slot| (*host, *slot))) {
            self.hosts[host][slot as usize] = to + rest;
        }
        Some(())
    }
}

fn take(slot: &mut Duration, at: Duration, to: Duration) -> Option<()> {
    if at < *slot {
        return None;
    }
    *slot = to;
    Some(())
}

fn of_host(dice: &mut Dice, kind: Kind, host: Host, other: Host) -> Fault {
    match kind {
        Kind::Kill => Fault::Kill { host },
        Kind::Freeze => Fault::Freeze { host },
        Kind::Cut => Fault::Cut { host },
        Kind::CutOneWay => Fault::CutOneWay { from: host, to: other },
        Kind::CutBoth => Fault::CutBoth { from: host, to: other },
        Kind::Storage => Fault::Storage { host: Some(host), how: *dice.weighted(STORAGE) },
        Kind::Program(program, how) => Fault::Program { host, program, how },
        Kind::StorageOfAll | Kind::Qemu(_) | Kind::Operator => unreachable!("these are of no single host"),
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Fault::Kill { host } => write!(f, "power of {} is lost", host.name()),
            Fault::Freeze { host } => write!(f, "{} freezes", host.name()),
            Fault::Cut { host } => write!(f, "{} is cut from all", host.name()),
            Fault::CutOneWay { from, to } => write!(f, "nothing goes from {} to {}", from.name(), to.name()),
            Fault::CutBoth { from, to } => write!(f, "{} and {} are cut from each other", from.name(), to.name()),
            Fault::Storage { host, how } => {
                let whose = host.map_or("all".to_owned(), |host| host.name());
                write!(f, "storage of {whose}: {}", storage_word(*how))
            }
            Fault::Program { host, program, how } => write!(f, "{how} to {program} of {}", host.name()),
            Fault::Qemu { vm, how } => write!(f, "{how} to the QEMU of {vm}"),
            Fault::Operator { vm, deed, host, .. } => write!(f, "{}", deed.told(vm, host)),
        }
    }
}

fn storage_word(how: StorageFault) -> &'static str {
    match how {
        StorageFault::None => "as it should be",
        StorageFault::Hang => "hangs",
        StorageFault::Eio => "input/output errors",
        StorageFault::Enospc => "full",
        StorageFault::Estale => "stale handles",
        StorageFault::Slow(_) => "slow",
        StorageFault::Torn => "torn writes",
        StorageFault::Late(_) => "late writes",
        StorageFault::DropSync => "dropped syncs",
    }
}

impl Deed {
    /// For people.
    pub fn told(self, vm: &str, host: &Host) -> String {
        let host = host.name();
        match self {
            Deed::Destroy => format!("virsh destroy {vm}"),
            Deed::Save => format!("virsh managedsave {vm}"),
            Deed::Resume => format!("virsh resume {vm}"),
            Deed::VirshStart => format!("virsh start {vm} on {host}"),
            Deed::Start => format!("mainstay vm start {vm} on {host}"),
            Deed::VirshMigrate => format!("virsh migrate {vm} to {host}"),
            Deed::Move => format!("mainstay vm move {vm} to {host}"),
        }
    }
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            How::Kill => "SIGKILL",
            How::Stop => "SIGSTOP",
        })
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Program::Agent => "the agent",
            Program::GuardParent => "the guard (parent)",
            Program::GuardChild => "the guard (child)",
            Program::Libvirtd => "libvirtd",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(150);

    fn drawn(seed: u64, hosts: u8) -> Vec<Step> {
        let hosts: Vec<Host> = (1..=hosts).map(Host::new).collect();
        let vms: Vec<String> = (0..8).map(|number| format!("vm{number}")).collect();
        plan(&mut Dice::new(seed, 0), &hosts, &vms, LENGTH)
    }

    #[test]
    fn a_seed_is_a_sequence() {
        assert_eq!(drawn(7, 3), drawn(7, 3));
        assert_ne!(drawn(7, 3), drawn(8, 3));
        assert_ne!(
            plan(&mut Dice::new(7, 0), &[Host::new(1), Host::new(2)], &["a".into()], LENGTH),
            plan(&mut Dice::new(7, 1), &[Host::new(1), Host::new(2)], &["a".into()], LENGTH)
        );
    }

    #[test]
    fn all_kinds_come_and_nothing_outlasts_the_round() {
        let steps: Vec<Step> = (1..200).flat_map(|seed| drawn(seed, 3)).collect();
        let has = |is: fn(&Fault) -> bool| steps.iter().any(|step| is(&step.fault));
        assert!(has(|f| matches!(f, Fault::Kill { .. })) && has(|f| matches!(f, Fault::Freeze { .. })));
        assert!(has(|f| matches!(f, Fault::Storage { host: None, .. })));
        assert!(has(|f| matches!(f, Fault::Storage { host: Some(_), how: StorageFault::Late(_) })));
        assert!(has(|f| matches!(f, Fault::Program { program: Program::GuardChild, how: How::Stop, .. })));
        assert!(has(|f| matches!(f, Fault::Qemu { how: How::Kill, .. })));
        for deed in [Deed::Destroy, Deed::Save, Deed::Resume, Deed::VirshStart, Deed::VirshMigrate, Deed::Move] {
            let is = |step: &Step| matches!(&step.fault, Fault::Operator { deed: other, .. } if *other == deed);
            assert!(steps.iter().any(is), "{deed:?}");
        }
        assert!(steps.iter().all(|step| step.at + step.lasts <= LENGTH + Duration::from_secs(1)));
    }

    #[test]
    fn one_host_is_always_whole() {
        for seed in 1..200 {
            for hosts in [2, 3, 5] {
                let steps = drawn(seed, hosts);
                for step in &steps {
                    let now = |s: &&Step| s.at <= step.at && step.at < s.at + s.lasts;
                    let mut harmed: Vec<Host> = steps.iter().filter(now).filter_map(harms).collect();
                    harmed.sort();
                    harmed.dedup();
                    assert!(harmed.len() < usize::from(hosts), "seed {seed}, {hosts} hosts, at {:?}", step.at);
                }
            }
        }
    }

    fn harms(step: &Step) -> Option<Host> {
        match &step.fault {
            Fault::Kill { host } | Fault::Freeze { host } | Fault::Storage { host: Some(host), .. } => Some(*host),
            Fault::Program { host, program: Program::GuardParent | Program::GuardChild, .. } => Some(*host),
            _ => None,
        }
    }
}
