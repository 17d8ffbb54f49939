//! What can be made to happen, in words: faults, their ends, people.
//!
//! `at 30s kill a` in a story, or one line of a random run: the words are the same.

use mainstay::core::event::Event;
use mainstay::core::health::Loss;
use mainstay::types::control::{Mover, VmCommand};
use mainstay::types::guests::Inside;
use mainstay::types::settings::{Disarmed, HostChange, OnDoubt, SettingsChange};
use mainstay::types::{DatastoreId, VmId};

use super::faults::{Sick, Weather};
use super::host::Path;
use super::power::Switch;
use super::scenario::span;
use super::world::{Gate, H, World, nanos};

impl World {
    fn named(&self, host: &str) -> H {
        self.host(host).unwrap_or_else(|| panic!("no host {host}"))
    }

    fn named_vm(&self, vm: &str) -> VmId {
        self.vm(vm).unwrap_or_else(|| panic!("no vm {vm}"))
    }

    fn store_named(&self, name: &str) -> DatastoreId {
        self.store(name).unwrap_or_else(|| panic!("no datastore {name}"))
    }

    pub(super) fn hosts_named(&self, names: &[&str]) -> Vec<H> {
        if names == ["all"] {
            return (0..self.hosts.len()).collect();
        }
        names.iter().map(|name| self.named(name)).collect()
    }

    fn sicken(&mut self, h: H, how: impl FnOnce(&mut Sick)) {
        how(&mut self.sick[h]);
        self.excuse(h);
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
            ["cut", "all"] => {
                let all = self.hosts.len();
                (0..all).for_each(|a| (0..all).filter(|b| *b != a).for_each(|b| self.links.cut(a, b)));
            }
            ["silence", a] => {
                let a = self.named(a);
                (0..self.hosts.len()).filter(|b| *b != a).for_each(|b| self.links.cut(a, b));
            }
            ["cut", a] => {
                let a = self.named(a);
                (0..self.hosts.len()).filter(|b| *b != a).for_each(|b| self.cut_pair(a, b));
            }
            // Not even its router answers.
            ["isolate", host] => {
                self.act_out(&format!("cut {host}"));
                let h = self.named(host);
                self.hosts[h].router = false;
            }
            // Network and storage come through one cable: it keeps running, and nobody hears of it.
            ["unplug", host] => {
                self.act_out(&format!("cut {host}"));
                self.set_path(self.named(host), Path::Hung);
            }
            ["plug", host] => {
                let h = self.named(host);
                self.links.heal_host(h);
                self.set_path(h, Path::Well);
            }
            ["heal"] => {
                self.links.heal();
                self.routers_answer();
            }
            ["hang", "storage", "all"] => self.set_hung(true),
            ["hang", "storage", host] => self.set_path(self.named(host), Path::Hung),
            ["break", "storage", host] => self.set_path(self.named(host), Path::Broken),
            ["heal", "storage"] => {
                self.set_hung(false);
                (0..self.hosts.len()).for_each(|h| self.set_path(h, Path::Well));
            }
            ["lose", "storage", host, how] => {
                let h = self.named(host);
                self.sick[h].loss = Some(if *how == "stale" { Loss::Stale } else { Loss::Gone });
                self.set_path(h, Path::Broken);
            }
            ["hang", "datastore", name] => {
                let home = self.store_named(name);
                self.hang_store(home);
            }
            ["hang", "datastore", name, host] => {
                let home = self.store_named(name);
                self.set_path_to(self.named(host), home, Path::Hung);
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
            ["snapshot", "storage"] => self.snapshot_storage(),
            ["roll", "back", "storage"] => self.roll_back_storage(),
            ["accept", "datastore", name, "at", host] => self.accept_datastore(self.named(host), name),
            rest => self.fall_ill(what, rest),
        }
    }

    fn fall_ill(&mut self, what: &str, words: &[&str]) {
        match words {
            ["hold", "agent", host] => self.hold_agent(self.named(host)),
            ["let", "agent", "go", host] => self.let_agent_go(self.named(host)),
            ["hold", "libvirtd", host] => self.hold_libvirtd(self.named(host)),
            ["let", "libvirtd", "go", host] => self.let_libvirtd_go(self.named(host)),
            ["lose", "state", host] => self.lose_state(self.named(host)),
            ["slow", "storage", by, names @ ..] => {
                let slow = span(by);
                self.hosts_named(names).into_iter().for_each(|h| self.sicken(h, |sick| sick.slow = slow));
            }
            ["flaky", "storage", host] => self.sicken(self.named(host), |sick| sick.flaky = true),
            ["unreadable", "storage", host] => self.sicken(self.named(host), |sick| sick.unreadable = true),
            ["stale", "storage", by, host] => {
                let stale = span(by);
                self.sicken(self.named(host), |sick| sick.stale = stale);
            }
            ["cure", "storage", names @ ..] => {
                self.hosts_named(names).into_iter().for_each(|h| self.sicken(h, |sick| *sick = Sick::default()));
            }
            ["lose", "datagrams", percent] => self.weather.loss = percent.parse().expect("a number"),
            ["late", "datagrams", by] => self.weather.late = span(by),
            ["double", "datagrams"] => self.weather.doubled = true,
            ["fair", "weather"] => self.weather = Weather::default(),
            ["heal", "everything"] => self.heal_everything(),
            ["late", "writes", "linger", length] => self.linger = span(length),
            ["stops", "fail"] => self.stops_fail = true,
            ["stops", "work"] => self.stops_fail = false,
            ["migrations", "work"] => self.migrations_fail = false,
            ["fence", "fails"] => self.fence_fails = true,
            ["fence", "works"] => self.fence_fails = false,
            ["switch", name, "takes", by] => {
                self.switches.insert((*name).to_owned(), Switch::Takes(span(by)));
            }
            ["switch", name, how] => {
                let how = Switch::named(how).unwrap_or_else(|| panic!("no switch {how}"));
                self.switches.insert((*name).to_owned(), how);
            }
            ["answers", "are", "lost"] => self.answers_lost = true,
            ["answers", "come"] => self.answers_lost = false,
            ["migrations", "fail"] => self.migrations_fail = true,
            ["starts", "fail", "on", names @ .., "for", what] => self.fail_starts(names, what),
            ["starts", "fail", "on", names @ ..] => self.fail_starts(names, "host"),
            ["starts", "work"] => self.starts_fail.clear(),
            ["host", host, how @ ("loses" | "regains"), "uplink", bridge] => {
                let (h, object) = (self.named(host), format!("bridge:{bridge}"));
                self.set_finding(h, "uplink", &object, *how == "loses");
            }
            ["host", host, "finds", source] => self.set_finding(self.named(host), source, "it", true),
            ["host", host, "no", "longer", "finds", source] => {
                self.set_finding(self.named(host), source, "it", false);
            }
            ["host", host, how @ ("gets" | "loses"), what @ ..] => {
                self.set_means(self.named(host), &what.join(" "), *how == "gets");
            }
            ["lose", "claim", vm] => self.lose_claim(self.named_vm(vm)),
            ["tear", "claim", vm] => {
                let vm = self.named_vm(vm);
                let home = self.home_of(vm);
                self.stores.get_mut(&home).expect("its home").tear(vm);
            }
            rest => self.act_on_vm(what, rest),
        }
    }

    fn act_on_vm(&mut self, what: &str, words: &[&str]) {
        let named: Vec<VmId> = words.iter().filter_map(|word| self.vm(word)).collect();
        named.into_iter().for_each(|vm| self.touch(vm));
        match words {
            ["deafen", vm] => drop(self.deaf.insert(self.named_vm(vm))),
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
            ["person", "defines", vm, "on", host] => self.virsh_define(self.named(host), self.named_vm(vm)),
            ["person", "undefines", vm, "on", host] => self.virsh_undefine(self.named(host), self.named_vm(vm)),
            ["twin", "of", host, "beats", "for", length] => self.twin_beats(self.named(host), nanos(span(length))),
            ["autostart", vm, "on", host] => self.virsh_autostart(self.named(host), self.named_vm(vm)),
            ["person", "edits", vm, "on", host] => self.virsh_edit(self.named(host), self.named_vm(vm)),
            ["person", "copies", vm, "to", store] => self.virsh_blockcopy(self.named_vm(vm), self.store_named(store)),
            ["person", "redefines", vm, "in", store, "on", host] => {
                self.virsh_redefine(self.named(host), self.named_vm(vm), self.store_named(store));
            }
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
            ["person", "pauses", vm] => {
                let vm = self.named_vm(vm);
                if let Some(h) = self.place_of(vm) {
                    self.suspend(h, vm, Box::new(|_, _| {}));
                }
            }
            ["person", "resumes", vm] => {
                let vm = self.named_vm(vm);
                if let Some(h) = self.place_of(vm) {
                    self.virsh_resume(h, vm);
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
                self.command(h, what, VmCommand::Move { vm: id, to: Some(to), by: Mover::Person });
            }
            ["set", vm, "on-doubt", policy, "at", host] => {
                let (vm, on_doubt) = (self.named_vm(vm), OnDoubt::named(policy));
                self.command(self.named(host), what, VmCommand::SetOnDoubt { vm, on_doubt });
            }
            ["start", vm, "at", host] => {
                self.command(self.named(host), what, VmCommand::Start { vm: self.named_vm(vm) });
            }
            ["retry", vm, "at", host] => {
                self.command(self.named(host), what, VmCommand::Retry { vm: self.named_vm(vm) });
            }
            ["stop", vm, "at", host] => {
                self.command(self.named(host), what, VmCommand::Stop { vm: self.named_vm(vm), force: false });
            }
            ["maintenance", "of", host, "begins", "at", at] => {
                let host = self.hosts[self.named(host)].id;
                self.change(self.named(at), what, SettingsChange::Host(HostChange::EnterMaintenance { host }));
            }
            ["maintenance", "of", host, "ends", "at", at] => {
                let host = self.hosts[self.named(host)].id;
                self.change(
                    self.named(at),
                    what,
                    SettingsChange::Host(HostChange::LeaveMaintenance { host, back: true }),
                );
            }
            ["disarm", "for", length, "at", at] => {
                let length = span(length);
                let until_unix_ms = self.unix_ms() + length.as_millis() as u64;
                let change = SettingsChange::Disarm(Some(Disarmed { until_unix_ms, why: String::new() }));
                self.tell_day();
                self.change(self.named(at), what, change);
                self.after(Gate::World, length, Self::tell_day);
            }
            ["arm", "at", at] => self.change(self.named(at), what, SettingsChange::Disarm(None)),
            ["release", "of", host, "at", at] => {
                let host = self.hosts[self.named(host)].id;
                self.change(self.named(at), what, SettingsChange::Host(HostChange::Release { host }));
            }
            ["what", "if", hosts @ .., "fail"] => self.what_if(hosts),
            ["guest", vm, "is", how] => {
                let vm = self.named_vm(vm);
                let inside = match *how {
                    "heard" => Inside::Heard,
                    "ready" => Inside::Ready,
                    other => panic!("a guest is heard or ready, not {other}"),
                };
                if let Some(h) = self.place_of(vm) {
                    self.agent_event(h, Event::Inside { vm, inside });
                }
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

    /// Asked of every host; the master answers.
    fn what_if(&mut self, hosts: &[&str]) {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        for h in 0..self.hosts.len() {
            let Some(agent) =
                self.hosts[h].agent.as_ref().filter(|agent| agent.core.master() == Some(self.hosts[h].id))
            else {
                continue;
            };
            let (view, at) = (agent.core.what_if(&hosts, self.local(h)), self.hosts[h].name.clone());
            let view = view.expect("hosts of the world");
            for cpu in view.cpus.iter().filter(|_| view.floor_percent.is_some()) {
                let (host, vcpus, loss) = (&cpu.host, cpu.vcpus, cpu.loss_percent);
                self.tell(&at, &format!("$ {host}: {vcpus} vCPUs on {} CPUs, {loss} % less", cpu.cpus));
            }
            for vm in view.vms {
                let place = match (vm.to, vm.why) {
                    (Some(to), _) => format!("on {to} after {:.1} s", vm.runs_s.unwrap_or_default()),
                    (None, why) => format!("nowhere: {}", why.unwrap_or_default()),
                };
                self.tell(&at, &format!("$ {} ({}): {place}", vm.name, vm.priority));
            }
        }
    }

    /// Both directions.
    pub fn cut_pair(&mut self, a: H, b: H) {
        self.links.cut(a, b);
        self.links.cut(b, a);
    }

    /// All of them.
    pub fn routers_answer(&mut self) {
        let now = self.now;
        for host in self.hosts.iter_mut().filter(|host| !host.router) {
            (host.router, host.routed) = (true, now);
        }
    }

    /// The story begins in 1970.
    fn unix_ms(&self) -> u64 {
        self.now / 1_000_000
    }

    /// All agents look at their clocks.
    fn tell_day(&mut self) {
        let unix_ms = self.unix_ms();
        (0..self.hosts.len()).for_each(|h| self.agent_event(h, Event::Day(unix_ms)));
    }
}
