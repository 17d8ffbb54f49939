//! The language of `tests/scenarios/*.txt`, readable aloud.
//!
//! ```text
//! # Why this story is told.
//! hosts a b c; vms web db on a; fence lock; locks held 10s; memory web 2.5; rule priority high of db*
//! at 30s kill a
//! run 60s
//! ----
//!  30.000    web runs nowhere (was on a)
//!  …
//!  = web runs on b; generation 2, owned by b, wanted running
//! ```
//!
//! A random run is such a story, too, with `seed N` in it: so what a seed found can be kept as a file. `settles` at the
//! end demands that everything that should run runs by then, once, and that nothing waits.
//!
//! Zero is when the cluster has settled; lines from before are not compared (unless it says `from the beginning`). A
//! line without a host is what the judge saw; `$` is a person at that host.

use std::fmt;
use std::path::Path as FilePath;
use std::time::Duration;

use mainstay::exec::recorder::Recording;
use mainstay::types::StorageFence;
use mainstay::types::power::FenceAt;
use mainstay::types::settings::{ForeignMigration, LateWrites, OnDoubt, Timing};

use super::recorded::Tapes;
use super::setup::Setup;
use super::world::{Gate, SETTLING, World, nanos};

/// A story to run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What the world is made of.
    pub setup: Setup,
    /// What happens, by time after the settling.
    pub acts: Vec<(Duration, String)>,
    /// How long it goes on after the settling.
    pub length: Duration,
    /// In the end everything must be as it should.
    pub settles: bool,
    /// Lines of the settling belong to the story.
    pub early: bool,
    /// Every step of every agent is told.
    pub trace: bool,
    /// Verdicts are told, with their evidence.
    pub verdicts: bool,
    /// Agents are recorded, and read again from what was written down.
    pub recorded: bool,
}

impl Scenario {
    /// Nothing happens.
    pub fn quiet(setup: Setup, length: Duration) -> Self {
        Self {
            setup,
            acts: Vec::new(),
            length,
            settles: false,
            early: false,
            trace: std::env::var_os("TRACE").is_some(),
            verdicts: false,
            recorded: false,
        }
    }

    /// Reads the part above `----`.
    pub fn parse(text: &str) -> Self {
        let mut scenario = Self::quiet(Setup::default(), Duration::from_secs(60));
        let lines = text.lines().take_while(|line| *line != "----").filter(|line| !line.starts_with('#'));
        let sentences = lines.flat_map(|line| line.split(';')).map(str::trim).filter(|line| !line.is_empty());
        for sentence in sentences {
            let words: Vec<&str> = sentence.split_whitespace().collect();
            scenario.sentence(sentence, &words);
        }
        if scenario.setup.hosts.is_empty() {
            scenario.setup.hosts = ["a", "b", "c"].map(str::to_owned).to_vec();
        }
        scenario
    }

    fn sentence(&mut self, sentence: &str, words: &[&str]) {
        match words {
            ["hosts", names @ ..] => self.setup.hosts = names.iter().map(|name| (*name).to_owned()).collect(),
            ["datastores", names @ ..] => self.setup.datastores = names.iter().map(|name| (*name).to_owned()).collect(),
            ["vm" | "vms", names @ .., "on", host] => {
                for name in names {
                    let home = self.setup.datastores[0].clone();
                    self.setup.vms.push(((*name).to_owned(), (*host).to_owned(), home));
                }
            }
            ["vm", name, "on", host, "in", store] => {
                self.setup.vms.push(((*name).to_owned(), (*host).to_owned(), (*store).to_owned()));
            }
            ["clone", name, "of", vm] => self.setup.clones.push(((*name).to_owned(), (*vm).to_owned())),
            ["fence", "lock"] => self.setup.fence = StorageFence::Lock,
            ["fence", "command"] => {}
            ["fence", "none"] => self.setup.fence = StorageFence::None,
            ["fence", "accept"] => {
                (self.setup.fence, self.setup.late_writes) = (StorageFence::None, LateWrites::Accept);
            }
            ["fence", "at", at] => self.setup.fence_at = fence_at(at),
            ["switch", name, "of", host] => self.setup.switches.push(((*name).to_owned(), (*host).to_owned(), 1)),
            ["switch", name, "of", host, "level", level] => {
                let level = level.parse().expect("a level");
                self.setup.switches.push(((*name).to_owned(), (*host).to_owned(), level));
            }
            ["locks", "local"] => self.setup.locks = None,
            ["locks", "held", span] => self.setup.locks = Some(self::span(span)),
            ["vms", "run", "until", "stopped"] => self.setup.on_doubt = Some(OnDoubt::RunUntilStop),
            ["foreign-migration", "refuse"] => self.setup.foreign_migration = ForeignMigration::Refuse,
            ["profile", name] => self.setup.timing = Timing::profile(name).expect("a profile"),
            ["timing", beat, renew, suspect, lease] => {
                let (beat, renew, suspect, lease) = (span(beat), span(renew), span(suspect), span(lease));
                self.setup.timing = Timing { beat, renew, suspect, lease };
                mainstay::core::timing::check(&self.setup.timing).expect("a timing that can be used");
            }
            ["clocks", wrong @ ..] => {
                let pairs =
                    wrong.chunks(2).map(|pair| (pair[0].to_owned(), pair[1].parse().expect("parts per million")));
                self.setup.clocks.extend(pairs);
            }
            ["memory", name, gib] => {
                let gib: f64 = gib.parse().expect("a number");
                self.setup.memory.insert((*name).to_owned(), (gib * f64::from(1 << 20)) as u64);
            }
            ["pages", host, gib] => {
                let gib: u64 = gib.parse().expect("a number");
                self.setup.pages.insert((*host).to_owned(), gib << 20);
            }
            ["vm", name, "needs", what @ ..] => self.setup.needs.push(((*name).to_owned(), what.join(" "))),
            ["host", name, "without", what @ ..] => self.setup.without.push(((*name).to_owned(), what.join(" "))),
            ["rule", rule @ ..] => self.setup.rules.push(rule.join(" ")),
            ["seed", seed] => self.setup.seed = seed.parse().expect("a number"),
            ["run", length] => self.length = span(length),
            ["settles"] => self.settles = true,
            ["from", "the", "beginning"] => self.early = true,
            ["trace"] => self.trace = true,
            ["tell", "verdicts"] => self.verdicts = true,
            ["at", at, ..] => {
                let what = sentence.splitn(3, ' ').nth(2).expect("something happens then");
                self.acts.push((span(at), what.to_owned()));
            }
            _ => panic!("not understood: {sentence}"),
        }
    }

    /// Lets it happen, up to its end or to the first violation.
    pub fn play(&self) -> World {
        let mut world =
            if self.recorded { settled_with(&self.setup, Some(Tapes::default())) } else { settled(&self.setup) };
        world.trace = self.trace;
        world.verdicts = self.verdicts;
        if !self.early {
            world.told = world.story.len();
        }
        let zero = nanos(SETTLING);
        for (at, what) in self.acts.clone() {
            let random = self.setup.seed != 0;
            world.at(Gate::World, zero + nanos(at), move |world| {
                let first = what.split(' ').next();
                let told = ["person", "kill", "boot", "freeze", "thaw", "cut", "heal", "hang", "snapshot", "roll"];
                if random || first.is_some_and(|first| told.contains(&first)) {
                    world.tell("--", &what);
                }
                world.act_out(&what);
            });
        }
        let end = zero + nanos(self.length);
        world.run_until(end);
        // Beats that chance loses part two hosts for a moment, also at the end: what has settled is so again a little later.
        if self.settles && world.unsettled().is_some() {
            world.run_until(end + nanos(Duration::from_secs(5)));
        }
        world
    }

    /// What is wrong with a world that this story has gone through.
    pub fn verdict(&self, world: &World) -> Option<String> {
        let unsettled = || world.unsettled().map(|what| format!("does not settle: {what}"));
        world.judge.verdict.clone().or_else(|| if self.settles { unsettled() } else { None })
    }

    /// Runs it; gives the story and what is true at the end.
    pub fn run(self) -> String {
        self.told(&self.play())
    }

    /// Runs it with recorded agents; gives the recordings, too.
    pub fn run_recorded(mut self) -> (String, Vec<Recording>) {
        self.recorded = true;
        let mut world = self.play();
        world.end_tapes();
        let recordings = world.tapes.as_ref().map(|tapes| std::mem::take(&mut *tapes.recordings.lock().unwrap()));
        (self.told(&world), recordings.unwrap_or_default())
    }

    fn told(&self, world: &World) -> String {
        let mut lines: Vec<String> = world.story[world.told..].to_vec();
        lines.extend(world.facts().into_iter().map(|fact| format!("= {fact}")));
        lines.extend(self.verdict(world).map(|verdict| format!("VIOLATED: {verdict}")));
        let mut text = lines.join("\n");
        text.push('\n');
        text
    }
}

/// As it stands in a file.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setup { hosts, datastores, vms, clones, fence, late_writes, switches, fence_at, .. } = &self.setup;
        let Setup { locks, timing, foreign_migration, seed, clocks, rules, memory, .. } = &self.setup;
        let Setup { pages, needs, without, .. } = &self.setup;
        writeln!(f, "hosts {}; datastores {}", hosts.join(" "), datastores.join(" "))?;
        for (vm, host, store) in vms {
            writeln!(f, "vm {vm} on {host} in {store}")?;
        }
        let fence = match (fence, late_writes) {
            (StorageFence::Lock, _) => "lock",
            (StorageFence::None, LateWrites::Accept) => "accept",
            (StorageFence::None, LateWrites::Exclude) => "none",
            (StorageFence::Command { .. }, _) => "command",
        };
        let locks = locks.map_or_else(|| "local".to_owned(), |held| format!("held {}", words(held)));
        let Timing { beat, renew, suspect, lease } = *timing;
        let timing = [beat, renew, suspect, lease].map(words).join(" ");
        for (clone, vm) in clones {
            writeln!(f, "clone {clone} of {vm}")?;
        }
        for (switch, host, level) in switches {
            writeln!(f, "switch {switch} of {host} level {level}")?;
        }
        let at = if *fence_at == FenceAt::Lapse { "lapse" } else { "suspect" };
        let refuse = if *foreign_migration == ForeignMigration::Refuse { "; foreign-migration refuse" } else { "" };
        writeln!(f, "fence at {at}{refuse}")?;
        for (host, rate) in clocks {
            writeln!(f, "clocks {host} {rate}")?;
        }
        for rule in rules {
            writeln!(f, "rule {rule}")?;
        }
        for (name, kib) in memory {
            writeln!(f, "memory {name} {}", *kib as f64 / f64::from(1 << 20))?;
        }
        for (host, kib) in pages {
            writeln!(f, "pages {host} {}", kib >> 20)?;
        }
        for (vm, what) in needs {
            writeln!(f, "vm {vm} needs {what}")?;
        }
        for (host, what) in without {
            writeln!(f, "host {host} without {what}")?;
        }
        writeln!(f, "fence {fence}; locks {locks}; timing {timing}; seed {seed}")?;
        for (at, what) in &self.acts {
            writeln!(f, "at {} {what}", words(*at))?;
        }
        writeln!(f, "run {}{}", words(self.length), if self.settles { "; settles" } else { "" })
    }
}

/// A span as `span` reads it.
fn words(span: Duration) -> String {
    if span.subsec_nanos() == 0 { format!("{}s", span.as_secs()) } else { format!("{}ms", span.as_millis()) }
}

/// A world whose cluster stands and whose VMs run where they should.
pub fn settled(setup: &Setup) -> World {
    settled_with(setup, None)
}

fn settled_with(setup: &Setup, tapes: Option<Tapes>) -> World {
    let mut world = World::new(setup);
    world.tapes = tapes;
    for h in 0..world.hosts.len() {
        let at = 100_000_000 * h as u64;
        world.at(Gate::World, at, move |world| world.boot(h));
    }
    for (n, (name, host, _)) in setup.vms.iter().enumerate() {
        let (vm, h) = (world.vm(name).expect("its own"), world.host(host).expect("a host of the world"));
        let at = 15_000_000_000 + 300_000_000 * n as u64;
        world.at(Gate::World, at, move |world| world.virsh_start(h, vm));
    }
    world.run_until(nanos(SETTLING));
    world
}

/// `10s`, `250ms`, `2m`.
pub fn span(text: &str) -> Duration {
    let digits = text.find(|letter: char| letter != '.' && !letter.is_ascii_digit()).expect("a unit");
    let number: f64 = text[..digits].parse().expect("a number");
    let unit = match &text[digits..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        other => panic!("no unit: {other}"),
    };
    Duration::from_secs_f64(number * unit)
}

fn fence_at(word: &str) -> FenceAt {
    match word {
        "lapse" => FenceAt::Lapse,
        "suspect" => FenceAt::Suspect,
        other => panic!("hosts are switched off at lapse or suspect, not {other}"),
    }
}

/// Runs one file; Err = what differs. With `UPDATE=1` the file is written anew.
pub fn check(path: &FilePath) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let (story, expected) = text.split_once("----\n").unwrap_or((&text, ""));
    let found = Scenario::parse(story).run();
    if found == expected {
        return Ok(());
    }
    if std::env::var_os("UPDATE").is_some() {
        let new = format!("{}\n----\n{found}", story.trim_end());
        return std::fs::write(path, new).map_err(|error| format!("{}: {error}", path.display()));
    }
    let first = found.lines().zip(expected.lines()).position(|(a, b)| a != b);
    let at = first.unwrap_or_else(|| found.lines().count().min(expected.lines().count()));
    let line = |text: &str| text.lines().nth(at).unwrap_or("(nothing)").to_owned();
    Err(format!("{}: line {at}\n  expected {}\n  found    {}\n{found}", path.display(), line(expected), line(&found)))
}
