//! Stories by seed: a cluster of 1 to 9 hosts, troubles that come in clusters, then everything heals.
//!
//! ```text
//!   0 ──────── trouble, 450 s ────────► heal everything ──── peace, 120 s ────► settled?      (after 30 s of settling)
//!      ▲▲▲▲        ▲▲        ▲▲▲
//!      several faults within seconds, most of them of one host: that is what breaks rules
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use mainstay::types::StorageFence;
use mainstay::types::power::FenceAt;
use mainstay::types::settings::{LateWrites, Timing};

use super::scenario::Scenario;
use super::setup::Setup;

/// Faults happen for so long.
pub const TROUBLE: Duration = Duration::from_secs(450);
/// After the heal.
pub const PEACE: Duration = Duration::from_secs(120);
/// Fewest and most faults of a story.
pub const FAULTS: (u64, u64) = (3, 14);

const HOSTS: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
const STORES: [&str; 2] = ["nfs", "san"];
const VMS: [&str; 8] = ["web", "db", "mail", "dns", "wiki", "news", "shop", "git"];

/// What is not left to chance.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Number of hosts.
    pub hosts: Option<usize>,
    /// Number of VMs.
    pub vms: Option<usize>,
    /// Number of faults.
    pub faults: Option<u64>,
    /// Only faults that begin with this word.
    pub only: Option<String>,
}

/// Numbers of the story itself, apart from those of the world (splitmix64).
pub struct Dice(u64);

impl Dice {
    /// By seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }

    fn pick<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.roll(all.len() as u64) as usize]
    }

    fn millis(&mut self, below: u64) -> Duration {
        Duration::from_millis(self.roll(below))
    }
}

/// The story of a seed.
pub fn story(seed: u64, wish: &Wish) -> Scenario {
    let mut dice = Dice::new(seed);
    let setup = setup(&mut dice, seed, wish);
    // A switch that says of a living host that it is off breaks what is assumed of a proof. It may do so where nothing
    // hangs on it: after the lapse, with late writes accepted.
    let lies = setup.fence_at == FenceAt::Lapse && setup.late_writes == LateWrites::Accept;
    let several = 1 < setup.datastores.len();
    let mut cast = Cast { hosts: setup.hosts.len(), vms: setup.vms.len(), several, lies, dice };
    let mut story = Scenario::quiet(setup, TROUBLE + PEACE);
    story.settles = true;
    let faults = wish.faults.unwrap_or(FAULTS.0 + cast.dice.roll(FAULTS.1 - FAULTS.0 + 1));
    // Some outlast the longest lease, and everything that follows from its end.
    let longest = (story.setup.timing.lease * 5 / 2).max(Duration::from_secs(60)).as_millis() as u64;
    let mut left = faults;
    let lease = story.setup.timing.lease;
    if wish.only.as_ref().map_or(cast.dice.roll(20) == 0, |only| only.starts_with("roll")) {
        // An operator has to look, and may have to do more than accept: such a story has to be safe, not to settle.
        (left, story.settles) = (left - 1, false);
        story.acts.extend(cast.goes_back_in_time());
    }
    while 0 < left {
        let mut at = cast.dice.millis(TROUBLE.as_millis() as u64);
        let victim = cast.host();
        if wish.only.is_none() && 2 < left && cast.dice.roll(5) == 0 {
            left -= 3;
            let all = cast.dice.roll(4) == 0;
            story.acts.extend(if all { cast.stalls(victim, at, lease) } else { cast.goes_in_steps(victim, at, lease) });
            continue;
        }
        for _ in 0..left.min(1 + cast.dice.roll(4)) {
            // What breaks rules comes within a moment, or within a lease.
            let gap = [300, 2_000, 12_000][cast.dice.roll(3) as usize];
            at = (at + cast.dice.millis(gap)).min(TROUBLE);
            let host = if cast.dice.roll(3) == 0 { cast.host() } else { victim };
            let fault = cast.wished(wish, host);
            left -= 1;
            let Some((what, end)) = fault else { continue };
            let length = match cast.dice.roll(5) {
                4 => cast.about(lease),
                n => cast.dice.millis([500, 4_000, 20_000, longest][n as usize]),
            };
            story.acts.push((at, what));
            if let Some(end) = end {
                story.acts.push((at + length, end));
            }
        }
    }
    story.acts.retain(|(at, what)| *at < TROUBLE || what.starts_with("accept"));
    story.acts.push((TROUBLE, "heal everything".to_owned()));
    let begun: Vec<String> = story
        .acts
        .iter()
        .filter(|(_, what)| what.starts_with("maintenance") && what.contains(" begins "))
        .map(|(_, what)| what.clone())
        .collect();
    for what in begun.iter().filter_map(|what| what.split(" begins").next()) {
        for (n, host) in HOSTS[..cast.hosts].iter().enumerate() {
            story.acts.push((TROUBLE + Duration::from_secs(15 + n as u64), format!("{what} ends at {host}")));
        }
    }
    // A person tries again what has failed too often to be tried soon: the master's answer counts, wherever it is asked.
    for (n, vm) in VMS[..cast.vms].iter().enumerate() {
        for after in [25, 75] {
            let at = TROUBLE + Duration::from_secs(after) + Duration::from_millis(n as u64);
            story.acts.push((at, format!("retry {vm} at {}", HOSTS[n % cast.hosts])));
        }
    }
    story.acts.sort_by_key(|(at, _)| *at);
    story
}

fn setup(dice: &mut Dice, seed: u64, wish: &Wish) -> Setup {
    let count =
        wish.hosts.unwrap_or([1, 2, 2, 3, 3, 3, 3, 4, 4, 5, 3, 2, 4, 3, 6, 7, 3, 8, 2, 9][dice.roll(20) as usize]);
    let hosts: Vec<String> = HOSTS.iter().take(count).map(|name| (*name).to_owned()).collect();
    let running = wish.vms.unwrap_or(1 + dice.roll(VMS.len().min(count + 1) as u64) as usize);
    let place = |dice: &mut Dice| hosts[dice.roll(hosts.len() as u64) as usize].clone();
    let mut vms: Vec<(String, String, String)> =
        VMS.iter().take(running).map(|vm| ((*vm).to_owned(), place(dice), "nfs".to_owned())).collect();
    let command = StorageFence::Command { program: "/etc/mainstay/fence".to_owned() };
    let (fence, late_writes, locks) = match dice.roll(4) {
        0 => (StorageFence::Lock, LateWrites::Exclude, Some(Duration::from_secs(10))),
        1 => (StorageFence::None, LateWrites::Accept, None),
        2 => (command, LateWrites::Exclude, None),
        _ => (command, LateWrites::Exclude, Some(Duration::from_secs(10))),
    };
    let seconds = Duration::from_secs;
    let timing = match dice.roll(10) {
        0..=4 => Timing::DEFAULT,
        5 => Timing::FAST,
        6 | 7 => Timing::PATIENT,
        // The longest lease there is: clocks have the most time to go apart.
        _ => Timing { beat: seconds(1), renew: seconds(1), suspect: seconds(3), lease: seconds(60) },
    };
    let (power, fence_at) = match dice.roll(3) {
        0 => (false, FenceAt::Lapse),
        1 => (true, FenceAt::Lapse),
        _ => (true, FenceAt::Suspect),
    };
    let switch = |host: &String| (format!("switch-{host}"), host.clone(), 1);
    // A host that comes up watches for a lease before it beats, and would be switched off for its silence.
    let power = power && timing.lease < seconds(60);
    let switches = hosts.iter().filter(|_| power).map(switch).collect();
    let mut datastores = vec!["nfs".to_owned()];
    if dice.roll(3) == 0 {
        datastores.push("san".to_owned());
        vms.iter_mut().for_each(|vm| vm.2.clone_from(&datastores[dice.roll(2) as usize]));
    }
    let mut rules = if dice.roll(3) == 0 { rules(dice, &VMS[..running], &hosts) } else { Vec::new() };
    let mut memory = BTreeMap::new();
    if 1 < count && dice.roll(4) == 0 {
        // Two hosts have room for all, so that nobody waits in the end; one has not.
        let kib = (running.div_ceil(2) as u64 + 1) << 20;
        let limits: BTreeMap<String, u64> = hosts.iter().map(|host| (host.clone(), kib)).collect();
        let (low, more) = (dice.pick(&VMS[..running]), dice.pick(&VMS[..running]));
        rules.push(format!("priority lowest of {low} {more}"));
        rules.push(format!("make room * {}", dice.pick(&["stop", "stop", "move"])));
        rules.push(format!("make room within {}s", 1 + dice.roll(20)));
        memory.extend(limits);
    }
    if dice.roll(2) == 0 {
        rules.push("health vendor evacuate".to_owned());
    }
    Setup {
        hosts,
        datastores,
        vms,
        fence,
        late_writes,
        switches,
        fence_at,
        locks,
        timing,
        rules,
        memory,
        seed,
        ..Setup::default()
    }
}

/// Rules that let every VM run in the end, whatever has happened: what must be may have to wait for an operator.
fn rules(dice: &mut Dice, vms: &[&str], hosts: &[String]) -> Vec<String> {
    let mut rules = Vec::new();
    for _ in 0..1 + dice.roll(4) {
        let (one, other) = (dice.pick(vms), dice.pick(vms));
        let seconds = 1 + dice.roll(20);
        rules.push(match dice.roll(12) {
            0 => format!("priority {} of {one}", dice.pick(&["highest", "high", "low", "lowest"])),
            1 => format!("{one} after {other} within {seconds}s"),
            2 => format!("{one} after {other} ready agent delay 2s within {seconds}s"),
            3 => format!("apart {one} {other} should"),
            4 => format!("together {one} {other} should"),
            5 => format!("{one} not on {} should", hosts[dice.roll(hosts.len() as u64) as usize]),
            6 => "at most 1 starts on a host".to_owned(),
            7 => format!("isolated {one} power-off"),
            10 => format!("evacuate at shutdown within {}s", 5 + seconds * 3),
            8 | 9 => format!("failback {one} to {} after {seconds}s", hosts[dice.roll(hosts.len() as u64) as usize]),
            _ => format!("isolated * shut-down {seconds}s"),
        });
    }
    rules
}

struct Cast {
    hosts: usize,
    vms: usize,
    /// There are two datastores.
    several: bool,
    lies: bool,
    dice: Dice,
}

/// A fault, and what ends it.
type Fault = (String, Option<String>);

impl Cast {
    fn host(&mut self) -> &'static str {
        self.dice.pick(&HOSTS[..self.hosts])
    }

    fn vm(&mut self) -> &'static str {
        self.dice.pick(&VMS[..self.vms])
    }

    /// One of the kind that is wished, if it comes within some tries.
    fn wished(&mut self, wish: &Wish, host: &str) -> Option<Fault> {
        let fits = |fault: &Fault| wish.only.as_ref().is_none_or(|only| fault.0.starts_with(only.as_str()));
        (0..200).map(|_| self.fault(host)).find(fits)
    }

    /// A span that ends where leases and windows do.
    fn about(&mut self, lease: Duration) -> Duration {
        lease * 4 / 5 + self.dice.millis(lease.as_millis() as u64 / 2)
    }

    /// A host is lost in two steps: its storage path first, so that it lives on by what others attest, then the rest of
    /// it; while those who watch it read late, or not at all, or fail to claim. It may come back just about when its lease
    /// ends, and its guard may have to come back alone.
    fn goes_in_steps(&mut self, host: &str, at: Duration, lease: Duration) -> Vec<(Duration, String)> {
        let span = lease.as_millis() as u64;
        let path = if self.dice.roll(3) == 0 { "break" } else { "hang" };
        let gap = [300, 3_000, span][self.dice.roll(3) as usize];
        let then = at + self.dice.millis(gap);
        let (rest, end) = match self.dice.roll(7) {
            0..=2 => (format!("cut {host}"), "heal".to_owned()),
            3 => (format!("silence {host}"), "heal".to_owned()),
            4 => (format!("kill {host}"), format!("boot {host}")),
            5 => (format!("freeze {host}"), format!("thaw {host}")),
            _ => (format!("restart guard {host} anew"), "heal".to_owned()),
        };
        let away = |dice: &mut Dice, about| if dice.roll(2) == 0 { about } else { lease + dice.millis(60_000) };
        let about = self.about(lease);
        let (storage, network) = (then + away(&mut self.dice, about), then + away(&mut self.dice, about));
        let mut acts = vec![
            (at, format!("{path} storage {host}")),
            (then, rest),
            (storage, format!("heal storage {host}")),
            (network, end),
        ];
        if self.dice.roll(3) == 0 {
            acts.push((then, format!("hold agent {host}")));
            acts.push((storage + self.dice.millis(10_000), format!("let agent go {host}")));
        }
        let one = self.host();
        let all = self.dice.roll(3) == 0;
        let watchers: Vec<&str> =
            HOSTS[..self.hosts].iter().copied().filter(|w| *w != host && (all || *w == one)).collect();
        // About the moment in which the host is heard last, or in which its window ends.
        let about = if self.dice.roll(2) == 0 { then + lease } else { then };
        let from = about.saturating_sub(self.dice.millis((span / 2).min(4_000)));
        let length = [2_000, 8_000, span][self.dice.roll(3) as usize];
        let (kind, until) = (self.dice.roll(5), from + self.dice.millis(length));
        for watcher in watchers {
            let (what, end) = match kind {
                0 => (format!("unreadable storage {watcher}"), format!("cure storage {watcher}")),
                1 => (format!("hang storage {watcher}"), format!("heal storage {watcher}")),
                2 => (format!("hold agent {watcher}"), format!("let agent go {watcher}")),
                3 => (format!("flaky storage {watcher}"), format!("cure storage {watcher}")),
                _ => {
                    let slow = 200 + self.dice.roll(1300);
                    (format!("slow storage {slow}ms {watcher}"), format!("cure storage {watcher}"))
                }
            };
            acts.extend([(from, what), (until, end)]);
        }
        acts
    }

    /// The storage stalls for everybody, and one host is heard by nobody meanwhile: it is the storage's silence, not its own
    /// (R4).
    fn stalls(&mut self, host: &str, at: Duration, lease: Duration) -> Vec<(Duration, String)> {
        let span = lease.as_millis() as u64;
        let cut = at + self.dice.millis(span);
        let stall = if self.dice.roll(2) == 0 { self.about(lease) } else { lease + self.dice.millis(span * 2) };
        let heard = (at + stall).max(cut) + self.dice.millis(span);
        vec![
            (at, "hang storage all".to_owned()),
            (cut, format!("cut {host}")),
            (at + stall, "heal storage".to_owned()),
            (heard, "heal".to_owned()),
        ]
    }

    /// The datastores show what lay there some time ago. Operators say at last that this is as it has to be.
    fn goes_back_in_time(&mut self) -> Vec<(Duration, String)> {
        let kept = self.dice.millis(TROUBLE.as_millis() as u64 / 2);
        let age = [3_000, 30_000, 200_000][self.dice.roll(3) as usize];
        let back = kept + self.dice.millis(age);
        let mut acts = vec![(kept, "snapshot storage".to_owned()), (back, "roll back storage".to_owned())];
        let early = (back + self.dice.millis(120_000), self.host());
        // Only the master takes it, and only once.
        let last = HOSTS[..self.hosts].iter().map(|host| (TROUBLE + Duration::from_secs(15), *host));
        for (at, host) in [early].into_iter().chain(last) {
            let stores = &STORES[..1 + usize::from(self.several)];
            acts.extend(stores.iter().map(|store| (at, format!("accept datastore {store} at {host}"))));
        }
        acts
    }

    fn fault(&mut self, host: &str) -> Fault {
        match self.dice.roll(16) {
            0..=3 => self.of_host(host),
            4..=6 => self.of_network(host),
            7..=10 => self.of_storage(host),
            11 | 12 => self.of_process(host),
            13 | 14 => self.of_vm(host),
            15 if self.dice.roll(4) == 0 => self.planned(host),
            _ => self.of_hypervisor(host),
        }
    }

    fn of_host(&mut self, host: &str) -> Fault {
        match self.dice.roll(12) {
            9..=11 => (format!("unplug {host}"), Some(format!("plug {host}"))),
            8 => (format!("poweroff {host} saving"), Some(format!("boot {host}"))),
            0..=2 => (format!("kill {host}"), Some(format!("boot {host}"))),
            3..=5 => (format!("freeze {host}"), Some(format!("thaw {host}"))),
            6 => (format!("poweroff {host}"), Some(format!("boot {host}"))),
            _ => (format!("lose state {host}"), Some(format!("kill {host}"))),
        }
    }

    fn of_network(&mut self, host: &str) -> Fault {
        let other = self.host();
        let heal = Some("heal".to_owned());
        match self.dice.roll(12) {
            10 | 11 => (format!("isolate {host}"), heal),
            0..=2 => (format!("cut {host}"), heal),
            3 | 4 if host != other => (format!("cut {host} to {other}"), heal),
            5 if host != other => (format!("cut {host} {other}"), heal),
            6 => (format!("silence {host}"), heal),
            7 => ("lose datagrams 40".to_owned(), Some("fair weather".to_owned())),
            8 => (format!("late datagrams {}ms", 100 + self.dice.roll(3000)), Some("fair weather".to_owned())),
            9 => ("double datagrams".to_owned(), Some("fair weather".to_owned())),
            _ => ("cut all".to_owned(), heal),
        }
    }

    fn of_storage(&mut self, host: &str) -> Fault {
        let cure = Some(format!("cure storage {host}"));
        let heal = Some(format!("heal storage {host}"));
        if self.several && self.dice.roll(3) == 0 {
            let store = self.dice.pick(&STORES);
            return match self.dice.roll(3) {
                0 => (format!("hang datastore {store}"), Some("heal storage".to_owned())),
                _ => (format!("hang datastore {store} {host}"), heal),
            };
        }
        match self.dice.roll(12) {
            11 => (format!("slow storage {}ms all", 200 + self.dice.roll(800)), Some("cure storage all".to_owned())),
            0..=2 => (format!("hang storage {host}"), heal),
            3 => ("hang storage all".to_owned(), Some("heal storage".to_owned())),
            4 => (format!("break storage {host}"), heal),
            5 | 6 => (format!("slow storage {}ms {host}", 20 + self.dice.roll(1500)), cure),
            7 => (format!("slow storage {}ms all", 20 + self.dice.roll(800)), Some("cure storage all".to_owned())),
            8 => (format!("flaky storage {host}"), cure),
            9 => (format!("unreadable storage {host}"), cure),
            _ => (format!("stale storage {}s {host}", 1 + self.dice.roll(60)), cure),
        }
    }

    fn of_process(&mut self, host: &str) -> Fault {
        match self.dice.roll(9) {
            0 => (format!("restart agent {host}"), None),
            1 => (format!("restart guard {host}"), None),
            2 => (format!("restart guard {host} anew"), None),
            3 => (format!("restart libvirtd {host}"), None),
            4 => ("restart agents all".to_owned(), None),
            5 => (format!("restart guards all{}", if self.dice.roll(2) == 0 { "" } else { " anew" }), None),
            6 => (format!("hold agent {host}"), Some(format!("let agent go {host}"))),
            7 => (format!("hold libvirtd {host}"), Some(format!("let libvirtd go {host}"))),
            _ => (format!("stop agent {host}"), Some(format!("start agent {host}"))),
        }
    }

    fn of_vm(&mut self, host: &str) -> Fault {
        let vm = self.vm();
        let other = self.host();
        if self.several && self.dice.roll(3) == 0 {
            let store = self.dice.pick(&STORES);
            return match self.dice.roll(4) {
                0 => (
                    format!("person redefines {vm} in {store} on {host}"),
                    Some(format!("person starts {vm} on {host}")),
                ),
                _ => (format!("person copies {vm} to {store}"), None),
            };
        }
        match self.dice.roll(16) {
            15 => (format!("person destroys {vm}"), Some(format!("person starts {vm} on {other}"))),
            10 => (format!("person saves {vm}"), Some(format!("person starts {vm} on {other}"))),
            11 => (format!("person saves {vm} to f"), Some(format!("person restores {vm} from f on {other}"))),
            12..=14 => (format!("person migrates {vm} to {host}"), None),
            0 | 1 => (format!("crash {vm}"), None),
            9 => (format!("person edits {vm} on {host}"), None),
            2..=4 => (format!("move {vm} to {host}"), None),
            5 => (format!("person starts {vm} on {host}"), None),
            6 => (format!("guest powers off {vm}"), Some(format!("person starts {vm} on {host}"))),
            7 => (format!("person shuts down {vm}"), Some(format!("person starts {vm} on {other}"))),
            _ => (format!("stop {vm} at {host}"), Some(format!("start {vm} at {other}"))),
        }
    }

    /// Its end may be lost with whoever is asked; another comes after the heal.
    fn planned(&mut self, host: &str) -> Fault {
        let at = self.host();
        (format!("maintenance of {host} begins at {at}"), Some(format!("maintenance of {host} ends at {at}")))
    }

    fn of_hypervisor(&mut self, host: &str) -> Fault {
        let works = Some(format!("switch switch-{host} works"));
        match self.dice.roll(10) {
            9 => (format!("host {host} finds vendor"), Some(format!("host {host} no longer finds vendor"))),
            5 => ("answers are lost".to_owned(), Some("answers come".to_owned())),
            6 => (format!("switch switch-{host} hangs"), works),
            7 if self.lies => (format!("switch switch-{host} lies"), works),
            7 => (format!("switch switch-{host} fails"), works),
            8 => (format!("switch switch-{host} idles"), works),
            4 => ("starts fail on all".to_owned(), Some("starts work".to_owned())),
            0 => {
                let what = self.dice.pick(&["host", "storage", "capacity", "definition"]);
                (format!("starts fail on {host} for {what}"), Some("starts work".to_owned()))
            }
            1 => ("stops fail".to_owned(), Some("stops work".to_owned())),
            2 => ("migrations fail".to_owned(), Some("migrations work".to_owned())),
            _ => ("fence fails".to_owned(), Some("fence works".to_owned())),
        }
    }
}
