//! Questions about failures that have not happened: what if these hosts failed, and may one more VM start?
//!
//! ```text
//!   what-if a b ──────────────► the cluster as it is, without a and b ─► plan ─► schedule ─► who runs where, when; who does not
//!   a person starts v on h ───► the same with v on h, for each failure that the policy wants to survive ─► yes, or no and why
//! ```
//!
//! Admission control is asked for starts by people only, and by the master only: a failover is what the room was kept for, and a host
//! that has no master starts what people want.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Core;
use super::cx::Cx;
use super::event::AskId;
use super::placement::foresight::{House, Live, TooMuch, TooSlow, cpu_loss_percent, schedule};
use super::placement::rules::Meaning;
use super::placement::search::plan;
use super::placement::site::{Ask, Size};
use super::placement::{Bars, Need};
use crate::types::control::{Denial, Reply, Takes};
use crate::types::rules::{Admission, Priority};
use crate::types::view::{VIEW_SCHEMA, VmView, WhatIfCpu, WhatIfView, WhatIfVm};
use crate::types::{Claim, HostId, Time, VmId};

/// What a start takes where none was measured yet.
const START: Duration = Duration::from_secs(1);
/// Names in one refusal.
const NAMED: usize = 3;

impl Core {
    pub(super) fn what_if_asked(&self, cx: &mut Cx, ask: AskId, hosts: &[String]) {
        let reply = self.what_if(hosts, cx.now).map_or_else(Reply::Denied, |view| Reply::WhatIf(Box::new(view)));
        cx.answer(ask, reply);
    }

    /// What would become of VMs if hosts of these names failed.
    ///
    /// # Errors
    /// A name that no host has.
    pub fn what_if(&self, names: &[String], now: Time) -> Result<WhatIfView, Denial> {
        let mut lost = BTreeSet::new();
        for name in names {
            let member = self.settings.members.iter().find(|member| member.name == *name);
            let unknown = || Denial::Contradiction(format!("no host is named {name}; 'mainstay host list' shows them"));
            lost.insert(member.ok_or_else(unknown)?.host);
        }
        Ok(self.without(&lost, now))
    }

    /// What would become of VMs if these hosts failed.
    fn without(&self, lost: &BTreeSet<HostId>, now: Time) -> WhatIfView {
        let meaning = self.meaning();
        let live = self.live(&meaning, now);
        let (site, asks) = live.without(lost);
        let mut plan = plan(&site, &asks);
        let places: Vec<Option<HostId>> = (0..asks.len()).map(|n| plan.host(n)).collect();
        let over = super::timing::window(self.settings.timing.lease, false);
        let start = self.start_took.unwrap_or(START);
        let runs = schedule(&asks, &places, &meaning.order, start, self.settings.rules.limits.starts_per_host);
        let mut vms: Vec<WhatIfVm> = Vec::new();
        for (n, ask) in asks.iter().enumerate() {
            let why = plan.why_nowhere(n);
            let why = why.iter().map(|(host, why)| format!("{} {why}", self.name_of(*host))).collect::<Vec<_>>();
            let after = meaning.order.waits_for(ask.vm).iter().map(|one| self.vm_name(one.after));
            vms.push(WhatIfVm {
                name: self.vm_name(ask.vm),
                priority: ask.priority.name().to_owned(),
                from: ask.from.map(|host| self.name_of(host)).unwrap_or_default(),
                to: places[n].map(|host| self.name_of(host)),
                runs_s: runs[n].map(|after| (over + after).as_secs_f64()),
                after: after.collect(),
                instead: plan.why_there(n).iter().map(|(host, why)| format!("{} {why}", self.name_of(*host))).collect(),
                why: places[n].is_none().then(|| why.join("; ")),
            });
        }
        vms.sort_by(|one, other| {
            let key = |vm: &WhatIfVm| vm.runs_s.unwrap_or(f64::INFINITY);
            key(one).total_cmp(&key(other)).then_with(|| one.name.cmp(&other.name))
        });
        let hosts = lost.iter().map(|host| self.name_of(*host)).collect();
        WhatIfView {
            schema: VIEW_SCHEMA,
            hosts,
            over_s: over.as_secs_f64(),
            start_s: start.as_secs_f64(),
            measured: self.start_took.is_some(),
            vms,
            cpus: self.cpus_then(&live, lost, asks.iter().zip(&places).map(|(ask, host)| (*host, ask.size.vcpus))),
            floor_percent: self.settings.rules.floor.map(|floor| floor.cpu_loss_percent),
        }
    }

    /// What the CPUs of the hosts that are left would have to do.
    fn cpus_then(
        &self,
        live: &Live,
        lost: &BTreeSet<HostId>,
        come: impl Iterator<Item = (Option<HostId>, u64)> + Clone,
    ) -> Vec<WhatIfCpu> {
        let left = live.houses.iter().filter(|house| !lost.contains(&house.room.host) && 0 < house.cpus);
        let cpu = |house: &House| {
            let host = house.room.host;
            let come: u64 = come.clone().filter(|(to, _)| *to == Some(host)).map(|(_, vcpus)| vcpus).sum();
            let vcpus = house.vcpus() + come;
            let loss_percent = cpu_loss_percent(house.cpus, vcpus);
            WhatIfCpu { host: self.name_of(host), cpus: house.cpus, vcpus, loss_percent }
        };
        left.map(cpu).collect()
    }

    /// All about one VM, with what would become of it if its host failed.
    pub(super) fn explained(&self, id: VmId, now: Time) -> Option<VmView> {
        let mut view = self.vm_view(id, now)?;
        let owner = self.vms.get(&id).and_then(|vm| vm.claim.as_ref()?.owner()).map(|owner| owner.host);
        let Some(host) = owner.filter(|host| self.is_master() && self.is_heard(*host, now)) else { return Some(view) };
        let foreseen = self.without(&BTreeSet::from([host]), now);
        let meaning = self.meaning();
        let mut lines = vec![format!("priority {}", meaning.priority(id).name())];
        lines.extend(self.belonging_text(id, &meaning, now));
        for one in meaning.order.waits_for(id) {
            let (after, until) = (self.vm_name(one.after), super::depends::until(one.ready));
            lines.push(format!("it starts after {after}: {until}, at most {} s", one.within.as_secs()));
        }
        let name = self.name_of(host);
        let known = if foreseen.measured { "as last measured" } else { "assumed, since none was measured yet" };
        match foreseen.vms.into_iter().find(|vm| vm.name == view.name) {
            Some(WhatIfVm { to: Some(to), runs_s: Some(seconds), instead, .. }) => {
                lines.push(format!(
                    "if {name} failed now it would run on {to}, at most {seconds:.1} s later if nothing but the lease is waited \
                     for ({:.1} s for a start, {known})",
                    foreseen.start_s
                ));
                lines.extend(instead.iter().map(|why| format!("not on another host: {why}")));
            }
            Some(vm) => lines.push(format!("if {name} failed now it would wait: {}", vm.why.unwrap_or_default())),
            None => {}
        }
        view.explain.extend(lines);
        Some(view)
    }

    /// The cluster as it is: hosts that can take VMs, and those that run there.
    fn live(&self, meaning: &Meaning, now: Time) -> Live {
        let site = self.site(meaning, &BTreeSet::new());
        let mut bars = Bars::of_lost(self, meaning, now);
        let houses = site.rooms.into_iter().filter(|room| self.is_heard(room.host, now)).map(|mut room| {
            let runs = std::mem::take(&mut room.runs);
            let vms = runs.into_iter().map(|id| bars.ask(id, &self.need_of(id), None, None)).collect();
            let cpus = self.capacity_of(room.host).map(|capacity| capacity.cpus).unwrap_or_default();
            House { room, vms, cpus }
        });
        Live { houses: houses.collect(), affinities: site.affinities }
    }

    /// What a VM needs, as far as it is known here.
    pub(super) fn need_of(&self, id: VmId) -> Need {
        let Some(vm) = self.vms.get(&id) else { return Need::default() };
        match &vm.record {
            Some(Ok(record)) => Need::of(record),
            Some(Err(_)) | None => {
                Need { datastores: vm.claim.iter().map(Claim::next_home).collect(), takes: vm.takes() }
            }
        }
    }

    /// Why the policy is against one more VM on a host.
    pub(super) fn not_admitted(&self, on: HostId, id: VmId, takes: &Takes, now: Time) -> Option<Denial> {
        let refused = |why: String| {
            let text = format!("admission control: {why}; 'mainstay cluster vm-rules' shows the policy");
            Some(Denial::NotAllowed(text))
        };
        match &self.settings.rules.admission {
            Admission::Off => None,
            Admission::Dedicated(hosts) => {
                let name = self.name_of(on);
                let others = self.settings.members.iter().filter(|member| member.host != on);
                let failed = others.map(|member| member.host).any(|host| !self.is_heard(host, now));
                let kept = !failed && hosts.iter().any(|glob| glob.fits(&name));
                if kept { refused(format!("{name} is kept free for the failure of another host")) } else { None }
            }
            Admission::HostFailures(count) => {
                let why = self.not_survived(self.with(on, id, takes, now), *count as usize)?;
                refused(why)
            }
            Admission::Percent(percent) => {
                let left = percent_free(&self.with(on, id, takes, now));
                if left < u64::from(*percent) {
                    return refused(format!("{left} % of the memory would be free, and {percent} % have to be"));
                }
                None
            }
        }
    }

    /// Why what runs now breaks the policy already: then nothing more may be started by people.
    pub fn admission_broken(&self, now: Time) -> Option<String> {
        let meaning = self.meaning();
        let why = match &self.settings.rules.admission {
            Admission::Off | Admission::Dedicated(_) => return None,
            Admission::HostFailures(count) => self.not_survived(self.live(&meaning, now), *count as usize)?,
            Admission::Percent(percent) => {
                let left = percent_free(&self.live(&meaning, now));
                (left < u64::from(*percent))
                    .then(|| format!("{left} % of the memory are free, and {percent} % have to be"))?
            }
        };
        Some(format!("the present load breaks admission control already: {why}"))
    }

    /// The cluster with one more VM on a host.
    fn with(&self, on: HostId, id: VmId, takes: &Takes, now: Time) -> Live {
        let meaning = self.meaning();
        let mut live = self.live(&meaning, now);
        live.houses.iter_mut().for_each(|house| house.vms.retain(|ask| ask.vm != id));
        let need = Need { takes: takes.clone(), ..self.need_of(id) };
        let ask = Bars::of_lost(self, &meaning, now).ask(id, &need, None, None);
        if let Some(house) = live.houses.iter_mut().find(|house| house.room.host == on) {
            let size: Size = ask.size;
            house.room.free = house.room.free.minus(size);
            house.vms.push(ask);
        }
        live
    }

    /// Why so many failures would be too much: for memory, or for the floor.
    fn not_survived(&self, live: Live, failures: usize) -> Option<String> {
        let live = self.restartable(live);
        if let Err(too_much) = live.survives(failures) {
            return Some(self.too_much_text(&too_much));
        }
        let percent = self.settings.rules.floor?.cpu_loss_percent;
        match live.survives_fast(failures, percent).err()? {
            TooSlow::Now { host, vcpus, cpus } => Some(format!(
                "{vcpus} vCPUs would be on the {cpus} CPUs of {}: that is {} % less CPU than they are made for, and {percent} % may be \
                 missing",
                self.name_of(host),
                cpu_loss_percent(cpus, vcpus)
            )),
            TooSlow::Then(too_much) => {
                Some(format!("{} with at most {percent} % less CPU", self.too_much_text(&too_much)))
            }
        }
    }

    /// Nobody asks for a place for those that no other host could run, whatever is kept free: devices of their hosts are passed through.
    fn restartable(&self, mut live: Live) -> Live {
        let bound = |ask: &&mut Ask| self.vms.get(&ask.vm).is_some_and(|vm| vm.takes().needs.devices);
        let asks = live.houses.iter_mut().flat_map(|house| &mut house.vms);
        asks.filter(bound).for_each(|ask| ask.priority = Priority::Never);
        live
    }

    fn too_much_text(&self, TooMuch { hosts, vms }: &TooMuch) -> String {
        let hosts: Vec<String> = hosts.iter().map(|host| self.name_of(*host)).collect();
        let mut names: Vec<String> = vms.iter().map(|vm| self.vm_name(*vm)).collect();
        let more = names.len().saturating_sub(NAMED);
        names.truncate(NAMED);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        format!("if {} failed then, there would be no place for {}{more}", hosts.join(" and "), names.join(", "))
    }
}

/// Of the memory of all hosts.
fn percent_free(live: &Live) -> u64 {
    let sum = |part: fn(&House) -> u64| live.houses.iter().map(part).sum::<u64>();
    let free = sum(|house| house.room.free.memory_kib);
    let total = sum(|house| house.room.total.memory_kib);
    free * 100 / total.max(1)
}
