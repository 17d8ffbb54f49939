//! What VMs need and hosts have, in words: `network dmz`, `cpu Haswell`, `machine q35`; VMs also `pages`, `devices`.
//!
//! And what hosts find wrong with themselves.
//!
//! A host has everything that some VM needs, but for what it is without.

use std::collections::BTreeSet;
use std::time::Duration;

use mainstay::core::event::Event;
use mainstay::types::VmId;
use mainstay::types::finding::{Finding, Source};
use mainstay::types::needs::{HostMeans, Needs, Pages};
use mainstay::types::vm::DomainFailure;

use super::setup::Setup;
use super::world::{Gate, H, World};

/// How long an agent takes to see that something has come or gone.
const SEEN: Duration = Duration::from_secs(3);
/// How long something must be wrong before it is told, and gone before that is.
const STANDS: Duration = Duration::from_secs(3);
const GONE: Duration = Duration::from_secs(10);

/// What hosts are short of.
#[derive(Default)]
pub struct Short {
    /// What they have not, in the words above.
    pub without: BTreeSet<(H, String)>,
    /// What is wrong with them, and with what of them.
    pub findings: BTreeSet<(H, Source, String)>,
}

/// What a VM of this name needs.
pub fn needs(all: &[(String, String)], name: &str) -> Needs {
    let mut needs = Needs::default();
    for (_, what) in all.iter().filter(|(vm, _)| vm == name) {
        match what.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["network", network] => needs.networks.push(format!("bridge:{network}")),
            ["cpu", model] => needs.cpu_model = Some((*model).to_owned()),
            ["machine", machine] => needs.machine = Some((*machine).to_owned()),
            ["pages"] => needs.pages = Pages::Usual,
            ["devices"] => needs.devices = true,
            _ => panic!("nobody needs {what}"),
        }
    }
    needs
}

impl World {
    /// A host gets its large pages, and is without what it is without.
    pub fn equip(&mut self, setup: &Setup, h: H, name: &str) {
        self.hosts[h].pages_kib = setup.pages.get(name).copied().unwrap_or_default();
        let without = setup.without.iter().filter(|(host, _)| host == name);
        self.short.without.extend(without.map(|(_, what)| (h, what.clone())));
    }

    /// It has it from now on, or no more.
    pub fn set_means(&mut self, h: H, what: &str, has: bool) {
        if has {
            self.short.without.remove(&(h, what.to_owned()));
        } else {
            self.short.without.insert((h, what.to_owned()));
        }
        if let Some(agent) = &self.hosts[h].agent {
            let gate = Gate::Agent(h, agent.life);
            self.after(gate, SEEN, move |world| world.tell_means(h));
        }
    }

    /// The agent sees what its host has; in a world where nobody needs anything it does not look.
    pub fn tell_means(&mut self, h: H) {
        let means = self.means(h);
        if means != HostMeans::default() {
            self.agent_event(h, Event::Means(means));
        }
    }

    fn means(&self, h: H) -> HostMeans {
        let has = |kind: &str, name: &String| !self.short.without.contains(&(h, format!("{kind} {name}")));
        let needs = || self.vms.values().map(|spec| &spec.record.needs);
        let of = |kind: &str, names: BTreeSet<String>| {
            let any = !names.is_empty();
            any.then(|| names.into_iter().filter(|name| has(kind, name)).collect::<BTreeSet<String>>())
        };
        let networks = needs().flat_map(|needs| &needs.networks).filter_map(|need| need.split_once(':'));
        HostMeans {
            interfaces: of("network", networks.map(|(_, name)| name.to_owned()).collect()),
            networks: None,
            cpu_models: of("cpu", needs().filter_map(|needs| needs.cpu_model.clone()).collect()),
            machines: of("machine", needs().filter_map(|needs| needs.machine.clone()).collect()),
        }
    }

    /// Something is wrong with a host, or no longer.
    pub fn set_finding(&mut self, h: H, source: &str, object: &str, is: bool) {
        let source = Source::ALL.into_iter().find(|one| one.name() == source).expect("a source");
        let what = (h, source, object.to_owned());
        let changed = if is { self.short.findings.insert(what) } else { self.short.findings.remove(&what) };
        if let (true, Some(agent)) = (changed, &self.hosts[h].agent) {
            let gate = Gate::Agent(h, agent.life);
            // What was there in between, and is not, is not told.
            self.after(gate, if is { STANDS } else { GONE }, move |world| world.tell_findings(h));
        }
    }

    /// The agent sees what is wrong with its host.
    pub fn tell_findings(&mut self, h: H) {
        let all: Vec<Finding> = self
            .short
            .findings
            .iter()
            .filter(|(on, _, _)| *on == h)
            .map(|(_, source, object)| {
                let text = match source {
                    Source::Uplink => format!("{object} has lost its uplink"),
                    other => format!("{} is not well", other.name()),
                };
                Finding::new(*source, object, &text)
            })
            .collect();
        if !std::mem::replace(&mut self.hosts[h].found, !all.is_empty()) && all.is_empty() {
            return; // As in most worlds.
        }
        self.agent_event(h, Event::Health(all));
    }

    /// Why libvirt cannot start it there.
    pub fn cannot_start(&self, h: H, vm: VmId) -> Option<DomainFailure> {
        let record = &self.vms[&vm].record;
        if let Some(lack) = self.means(h).lacks(&record.needs) {
            return Some(DomainFailure::Host(format!("this host {lack}")));
        }
        let elsewhere = self.hosts.iter().any(|host| host.n != h && host.domains.contains_key(&vm));
        if record.needs.devices && elsewhere {
            return Some(DomainFailure::Host("no such device".to_owned()));
        }
        let pages = record.needs.pages != Pages::Ordinary && self.pages(h).free_kib < record.memory_kib;
        pages.then(|| DomainFailure::Capacity("cannot allocate large pages".to_owned()))
    }
}
