//! The language of `tests/scenarios/*.txt`, readable aloud.
//!
//! ```text
//! # Why this story is told.
//! hosts a b c; vms web db on a; fence lock; locks held 10s
//! at 30s kill a
//! run 60s
//! ----
//!  30.000    web runs nowhere (was on a)
//!  …
//!  = web runs on b; generation 2, owned by b, wanted running
//! ```
//!
//! Zero is when the cluster has settled; lines from before are not compared (unless it says `from the beginning`). A
//! line without a host is what the judge saw; `$` is a person at that host.

use std::path::Path as FilePath;
use std::time::Duration;

use mainstay::types::control::VmCommand;
use mainstay::types::power::FenceAt;
use mainstay::types::settings::{ForeignMigration, LateWrites, Timing};
use mainstay::types::{StorageFence, VmId};

use super::host::Path;
use super::power::Switch;
use super::world::{Gate, H, SETTLING, Setup, World, nanos};

/// A story to run.
pub struct Scenario {
    setup: Setup,
    acts: Vec<(Duration, String)>,
    length: Duration,
    early: bool,
    trace: bool,
}

impl Scenario {
    /// Reads the part above `----`.
    pub fn parse(text: &str) -> Self {
        let mut scenario = Self {
            setup: Setup::default(),
            acts: Vec::new(),
            length: Duration::from_secs(60),
            early: false,
            trace: std::env::var_os("TRACE").is_some(),
        };
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
            ["foreign-migration", "refuse"] => self.setup.foreign_migration = ForeignMigration::Refuse,
            ["profile", name] => self.setup.timing = Timing::profile(name).expect("a profile"),
            ["run", length] => self.length = span(length),
            ["from", "the", "beginning"] => self.early = true,
            ["trace"] => self.trace = true,
            ["at", at, ..] => {
                let what = sentence.splitn(3, ' ').nth(2).expect("something happens then");
                self.acts.push((span(at), what.to_owned()));
            }
            _ => panic!("not understood: {sentence}"),
        }
    }

    /// Runs it; gives the story and what is true at the end.
    pub fn run(self) -> String {
        let mut world = settled(&self.setup);
        world.trace = self.trace;
        let early = if self.early { 0 } else { world.story.len() };
        let zero = nanos(SETTLING);
        for (at, what) in self.acts {
            world.at(Gate::World, zero + nanos(at), move |world| {
                if matches!(what.split(' ').next(), Some("kill" | "boot" | "freeze" | "thaw" | "cut" | "heal" | "hang"))
                {
                    world.tell("--", &what);
                }
                world.act_out(&what);
            });
        }
        world.run_until(zero + nanos(self.length));
        let mut lines: Vec<String> = world.story[early..].to_vec();
        lines.extend(world.facts().into_iter().map(|fact| format!("= {fact}")));
        lines.extend(world.judge.verdict.iter().map(|verdict| format!("VIOLATED: {verdict}")));
        let mut text = lines.join("\n");
        text.push('\n');
        text
    }
}

/// A world whose cluster stands and whose VMs run where they should.
pub fn settled(setup: &Setup) -> World {
    let mut world = World::new(setup);
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
fn span(text: &str) -> Duration {
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

impl World {
    fn named(&self, host: &str) -> H {
        self.host(host).unwrap_or_else(|| panic!("no host {host}"))
    }

    fn named_vm(&self, vm: &str) -> VmId {
        self.vm(vm).unwrap_or_else(|| panic!("no vm {vm}"))
    }

    fn hosts_named(&self, names: &[&str]) -> Vec<H> {
        if names == ["all"] {
            return (0..self.hosts.len()).collect();
        }
        names.iter().map(|name| self.named(name)).collect()
    }

    /// One thing that happens.
    pub fn act_out(&mut self, what: &str) {
        let words: Vec<&str> = what.split_whitespace().collect();
        match words.as_slice() {
            ["kill", host] => self.kill(self.named(host)),
            ["boot", host] => self.boot(self.named(host)),
            ["poweroff", host, "saving"] => self.power_off_saving(self.named(host)),
            ["poweroff", host] => self.power_off(self.named(host)),
            ["freeze", host] => self.freeze(self.named(host)),
            ["thaw", host] => self.thaw(self.named(host)),
            ["cut", a, "to", b] => self.links.cut(self.named(a), self.named(b)),
            ["cut", a, b] => self.cut_pair(self.named(a), self.named(b)),
            ["cut", a] => {
                let a = self.named(a);
                (0..self.hosts.len()).filter(|b| *b != a).for_each(|b| self.cut_pair(a, b));
            }
            ["heal"] => self.links.heal(),
            ["hang", "storage", "all"] => self.set_hung(true),
            ["hang", "storage", host] => self.set_path(self.named(host), Path::Hung),
            ["break", "storage", host] => self.set_path(self.named(host), Path::Broken),
            ["heal", "storage"] => {
                self.set_hung(false);
                (0..self.hosts.len()).for_each(|h| self.set_path(h, Path::Well));
            }
            ["heal", "storage", host] => self.set_path(self.named(host), Path::Well),
            ["restart", "agent" | "agents", names @ ..] => {
                self.hosts_named(names).into_iter().for_each(|h| self.restart_agent(h));
            }
            ["stop", "agent", host] => self.stop_agent(self.named(host)),
            ["start", "agent", host] => self.start_agent(self.named(host)),
            ["restart", "guard" | "guards", names @ .., "anew"] => {
                self.hosts_named(names).into_iter().for_each(|h| self.restart_guard_anew(h));
            }
            ["restart", "guard" | "guards", names @ ..] => {
                self.hosts_named(names).into_iter().for_each(|h| self.restart_guard(h));
            }
            ["restart", "libvirtd", names @ ..] => {
                self.hosts_named(names).into_iter().for_each(|h| self.restart_libvirtd(h));
            }
            ["fence", "fails"] => self.fence_fails = true,
            ["fence", "works"] => self.fence_fails = false,
            ["switch", name, how] => {
                let how = Switch::named(how).unwrap_or_else(|| panic!("no switch {how}"));
                self.switches.insert((*name).to_owned(), how);
            }
            ["migrations", "fail"] => self.migrations_fail = true,
            ["answers", "are", "lost"] => self.answers_lost = true,
            ["answers", "come"] => self.answers_lost = false,
            ["starts", "fail", "on", host] => {
                let h = self.named(host);
                self.starts_fail.insert(h);
            }
            ["starts", "work"] => self.starts_fail.clear(),
            ["tear", "claim", vm] => {
                let vm = self.named_vm(vm);
                let home = self.vms[&vm].record.home;
                self.stores.get_mut(&home).expect("its home").tear(vm);
            }
            rest => self.act_on_vm(what, rest),
        }
    }

    fn act_on_vm(&mut self, what: &str, words: &[&str]) {
        match words {
            ["crash", vm] => {
                let vm = self.named_vm(vm);
                if let Some(h) = self.place_of(vm) {
                    self.crash(h, vm);
                }
            }
            ["person", "saves", vm] | ["person", "saves", vm, "to", _] => {
                let vm = self.named_vm(vm);
                let file = words.get(4).map(|file| (*file).to_owned());
                if let Some(h) = self.place_of(vm) {
                    self.virsh_save(h, vm, file);
                }
            }
            ["person", "restores", vm, "from", file, "on", host] => {
                self.virsh_restore(self.named(host), self.named_vm(vm), file);
            }
            ["person", "undefines", vm, "on", host] => self.virsh_undefine(self.named(host), self.named_vm(vm)),
            ["twin", "of", host, "beats", "for", length] => self.twin_beats(self.named(host), nanos(span(length))),
            ["autostart", vm, "on", host] => self.virsh_autostart(self.named(host), self.named_vm(vm)),
            ["person", "edits", vm, "on", host] => self.virsh_edit(self.named(host), self.named_vm(vm)),
            ["person", "starts", vm, "on", host] => self.virsh_start(self.named(host), self.named_vm(vm)),
            ["person", "migrates", vm, "away"] => {
                let vm = self.named_vm(vm);
                if let Some(h) = self.place_of(vm) {
                    self.virsh_migrate_away(h, vm);
                }
            }
            ["person", "migrates", vm, "to", to] => {
                let (vm, to) = (self.named_vm(vm), self.named(to));
                if let Some(h) = self.place_of(vm) {
                    self.virsh_migrate(h, vm, to);
                }
            }
            ["person", "shuts", "down", vm] => {
                let vm = self.named_vm(vm);
                if let Some(h) = self.place_of(vm) {
                    self.shut_down(h, vm, false);
                }
            }
            ["person", "destroys", vm] => {
                let vm = self.named_vm(vm);
                if let Some(h) = self.place_of(vm) {
                    self.virsh_destroy(h, vm);
                }
            }
            ["guest", "powers", "off", vm] => {
                let vm = self.named_vm(vm);
                if let Some(h) = self.place_of(vm) {
                    self.shut_down(h, vm, true);
                }
            }
            ["move", vm, "to", to] => {
                let (id, to) = (self.named_vm(vm), self.hosts[self.named(to)].id);
                let h = self.place_of(id).unwrap_or(0);
                self.command(h, what, VmCommand::Move { vm: id, to: Some(to) });
            }
            ["start", vm, "at", host] => {
                self.command(self.named(host), what, VmCommand::Start { vm: self.named_vm(vm) });
            }
            ["stop", vm, "at", host] => {
                self.command(self.named(host), what, VmCommand::Stop { vm: self.named_vm(vm), force: false });
            }
            ["explain", vm, "at", host] => {
                let h = self.named(host);
                let Some(agent) = &self.hosts[h].agent else { return };
                let view = agent.core.view(self.local(h));
                let lines: Vec<String> =
                    view.vms.into_iter().filter(|seen| seen.name == *vm).flat_map(|seen| seen.explain).collect();
                lines.iter().for_each(|line| self.tell(host, &format!("$ {line}")));
            }
            _ => panic!("not understood: {what}"),
        }
    }

    /// Both directions.
    pub fn cut_pair(&mut self, a: H, b: H) {
        self.links.cut(a, b);
        self.links.cut(b, a);
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
