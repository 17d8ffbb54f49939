//! What people are shown: the cluster as this agent sees it.

use super::Core;
use super::health::Health;
use super::proofs::LateWrite;
use super::vms::Vm;
use crate::types::settings::{LateWrites, OnDoubt};
use crate::types::view::{ClusterView, DatastoreView, HostView, VIEW_SCHEMA, VmView};
use crate::types::vm::{DomainState, Underway};
use crate::types::{Claim, DatastoreId, Debt, Holder, HostId, Role, StorageFence, Time, VmId, VmState, Wanted};

impl Core {
    /// The whole view.
    #[must_use]
    pub fn view(&self, now: Time) -> ClusterView {
        let mut ids: Vec<VmId> = self.vms.keys().copied().collect();
        for peer in self.peers.values() {
            ids.extend(peer.report.iter().flat_map(|report| report.vms.iter().map(|vm| vm.vm)));
        }
        ids.sort_unstable();
        ids.dedup();
        let mut vms: Vec<VmView> = ids.into_iter().filter_map(|id| self.vm_view(id, now)).collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        ClusterView {
            schema: VIEW_SCHEMA,
            cluster: Some(self.settings.name.clone()),
            seen_by: self.name_of(self.me.host),
            master: self.master().map(|host| self.name_of(host)),
            term: self.election.term().0,
            settings_version: self.settings.version,
            hosts: self.settings.members.iter().map(|member| self.host_view(member.host, &vms, now)).collect(),
            datastores: self
                .settings
                .datastores
                .iter()
                .map(|datastore| self.datastore_view(datastore.id, now))
                .collect(),
            fence_devices: self.device_views(),
            rule_problems: self.rule_problems(),
            disarmed: self.disarmed().map(super::disarm::text),
            vms,
        }
    }

    /// Where a VM of this name runs, as far as this agent knows.
    #[must_use]
    pub fn whereabouts(&self, name: &str, now: Time) -> Option<(VmId, HostId)> {
        let view = self.view(now);
        let vm = view.vms.into_iter().find(|vm| vm.name == name && vm.state == "running")?;
        let host = self.settings.members.iter().find(|member| Some(&member.name) == vm.host.as_ref())?;
        Some((vm.id, host.host))
    }

    /// Datastores on which something is wrong for this host: what stands there may wait for them.
    #[must_use]
    pub fn unwell_datastores(&self, now: Time) -> Vec<DatastoreId> {
        let ids = self.settings.datastores.iter().map(|datastore| datastore.id);
        ids.filter(|id| self.health(*id, now).0 != Health::Well).collect()
    }

    fn host_view(&self, host: HostId, vms: &[VmView], now: Time) -> HostView {
        let name = self.name_of(host);
        let peer = self.peers.get(&host);
        let me = host == self.me.host;
        let role = match (me, peer.and_then(|peer| peer.beat.as_ref())) {
            (true, _) => Some(self.election.role()),
            (false, Some(beat)) if self.is_heard(host, now) => Some(beat.agent.role),
            (false, _) => None,
        };
        let role = match role {
            Some(Role::Master) => "master",
            Some(Role::Candidate) => "candidate",
            Some(Role::Subordinate { .. }) => "subordinate",
            None => "unknown",
        };
        let report = peer.and_then(|peer| peer.report.as_ref());
        let capacity = if me { Some(self.own_capacity()) } else { report.map(|report| report.capacity) };
        HostView {
            id: host,
            role: role.to_owned(),
            verdict: if me {
                "live".to_owned()
            } else {
                peer.map_or_else(|| "unknown".into(), |peer| peer.verdict.to_string())
            },
            evidence: if me { "this host".to_owned() } else { self.evidence(host, now) },
            beat_age_ms: peer
                .and_then(|peer| peer.heard)
                .map(|at| u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX)),
            window_ms: self
                .stores
                .values()
                .filter_map(|store| store.window_of(host))
                .max()
                .filter(|_| !me)
                .map(|window| u64::try_from(window.as_millis()).unwrap_or(u64::MAX)),
            libvirt: if me { Some(self.libvirt.up) } else { report.map(|report| report.libvirt) },
            vms: u32::try_from(
                vms.iter().filter(|vm| vm.host.as_ref() == Some(&name) && vm.state == "running").count(),
            )
            .unwrap_or(u32::MAX),
            free_mib: capacity.map(|capacity| capacity.free_kib / 1024),
            maintenance: self.maintenance_view(host),
            quarantined: self.is_quarantined(host, now),
            findings: self.findings_of(host),
            address: self.settings.member(host).map(|member| member.control.to_string()).unwrap_or_default(),
            name,
        }
    }

    fn datastore_view(&self, id: DatastoreId, now: Time) -> DatastoreView {
        let settings = self.settings.datastore(id).expect("ids come from the settings");
        let lease = self.guard.leases.get(&id);
        let reads = |host: HostId| {
            let beat = self.peers.get(&host).and_then(|peer| peer.beat.as_ref());
            self.is_heard(host, now) && beat.is_some_and(|beat| self.datastores_in(beat.reaches).contains(&id))
        };
        let mut reached_by: Vec<String> =
            self.peers.keys().copied().filter(|host| reads(*host)).map(|host| self.name_of(host)).collect();
        if lease.is_some_and(|lease| lease.until.is_some()) {
            reached_by.push(self.name_of(self.me.host));
        }
        reached_by.sort();
        DatastoreView {
            id,
            name: settings.name.clone(),
            path: settings.path.clone(),
            fence: fence_name(&settings.fence),
            late_writes: match settings.late_writes {
                LateWrites::Exclude => "exclude".into(),
                LateWrites::Accept => "accept".into(),
            },
            lease: match lease {
                Some(lease) if lease.until.is_some() => "valid".into(),
                Some(_) => "lapsed".into(),
                None => "none".into(),
            },
            latency_ms: lease.map(|lease| lease.latency.as_secs_f64() * 1000.0),
            trouble: lease
                .and_then(|lease| lease.trouble.clone())
                .or_else(|| self.distrusted(id).map(str::to_owned))
                .or_else(|| self.stores.get(&id).and_then(|store| store.trouble().map(str::to_owned)))
                .or_else(|| self.health_text(id, now)),
            rolled_back: self.distrusted(id).is_some(),
            health: health_name(self.health(id, now).0).to_owned(),
            reached_by,
        }
    }

    pub(super) fn vm_view(&self, id: VmId, now: Time) -> Option<VmView> {
        let empty = Vm::default();
        let vm = self.vms.get(&id).unwrap_or(&empty);
        let owner = vm.claim.as_ref().and_then(Claim::owner).map(|owner| owner.host);
        let holder = owner.or_else(|| self.holder_of(id, vm.claim.is_some(), now));
        let report = holder.filter(|host| *host != self.me.host).and_then(|host| self.report_of(host, id));
        let name = if vm.name.is_empty() { report?.name.clone() } else { vm.name.clone() };
        if vm.claim.is_none() && holder.is_none() {
            return None; // Gone: neither claim nor domain anywhere.
        }
        let domain = match holder {
            Some(host) if host == self.me.host => self.libvirt.domains.get(&id).map(|domain| domain.state),
            Some(_) => report.and_then(|report| report.domain),
            None => None,
        };
        let stopped = match holder {
            Some(host) if host == self.me.host => {
                vm.tenure().and_then(|tenure| self.guard.rows.get(&tenure)).is_some_and(|row| row.stopped)
            }
            _ => report.is_some_and(|report| report.stopped),
        };
        let unprotected = vm
            .record
            .as_ref()
            .and_then(|record| record.as_ref().err().cloned())
            .or_else(|| report.and_then(|report| report.unprotected.clone()));
        let doing = self.doing(vm).or_else(|| report.and_then(|report| report.doing.clone()));
        let held = vm.claim.as_ref().filter(|_| stopped).map(|claim| self.held_by(claim.home));
        let silent = owner.is_some_and(|host| !self.is_heard(host, now));
        let placing = vm.placing.is_some()
            || vm.attempt.as_ref().is_some_and(|attempt| matches!(attempt.kind, super::attempt::Kind::Run { .. }));
        let state = if stopped {
            "stopped-by-guard"
        } else if placing {
            "starting"
        } else if silent {
            "unknown"
        } else {
            match (domain, vm.wanted()) {
                (Some(DomainState::Running | DomainState::ShuttingDown), _) => "running",
                (Some(DomainState::Paused { .. }), _) => "paused",
                (Some(DomainState::Off(_)) | None, Some(Wanted::Running)) => "waiting",
                (Some(DomainState::Off(_)) | None, _) => "off",
            }
        };
        Some(VmView {
            id,
            state: state.to_owned(),
            host: holder.map(|host| self.name_of(host)),
            generation: vm.claim.as_ref().map(|claim| claim.tenure.generation.0),
            wanted: vm.wanted().map(|wanted| match wanted {
                Wanted::Running => "running".into(),
                Wanted::Stopped => "stopped".into(),
            }),
            protected: vm.claim.is_some() && unprotected.is_none(),
            home: vm.claim.as_ref().map(|claim| self.store_name(claim.next_home())),
            why: unprotected
                .or(doing)
                .or(held)
                .or_else(|| vm.waits.clone().filter(|_| state != "running" && state != "off")),
            on_doubt: match vm.own_on_doubt() {
                Some(own) if owner.is_none_or(|owner| owner == self.me.host) => self.on_doubt_text(own),
                _ => self.on_doubt_text(report.and_then(|report| report.on_doubt)),
            },
            explain: self.explain(vm, now),
            name,
        })
    }

    /// A host that has the domain, when no claim says who owns it. If a claim says that nobody does, what a host that is not heard
    /// any more has last reported is past.
    fn holder_of(&self, id: VmId, claimed: bool, now: Time) -> Option<HostId> {
        if self.libvirt.domains.contains_key(&id) {
            return Some(self.me.host);
        }
        let mut hosts = self.peers.keys().copied().filter(|host| !claimed || self.is_heard(*host, now));
        hosts.find(|host| self.report_of(*host, id).is_some_and(|report| report.domain.is_some()))
    }

    pub(super) fn doing(&self, vm: &Vm) -> Option<String> {
        if let Some(moving) = &vm.moving {
            return Some(format!("is being moved to {}", self.name_of(moving.to)));
        }
        if let Some(incoming) = &vm.incoming {
            return Some(format!("comes from {}", self.name_of(incoming.from)));
        }
        if let Some(Holder::Handover { from, to }) = vm.claim.as_ref().map(|claim| claim.holder) {
            let (from, to) = (self.name_of(from.host), self.name_of(to.host));
            return Some(format!("is being migrated from {from} to {to} by a person"));
        }
        if let Some(Holder::Moved { to, .. }) = vm.claim.as_ref().map(|claim| claim.holder) {
            return Some(format!("its home moves to datastore {}", self.store_name(to)));
        }
        let yields = vm.tenure().and_then(|tenure| self.underway.get(&tenure.vm)) == Some(&Underway::Yield);
        if yields && vm.attempt.is_none() && self.is_mine(vm) {
            return Some("is shut down to make room for another".to_owned());
        }
        let attempt = vm.attempt.as_ref()?;
        Some(
            attempt
                .waits
                .as_ref()
                .map_or_else(|| format!("{:?}", attempt.stage).to_lowercase(), |what| format!("waits for {what}")),
        )
    }

    /// Lines of `vm explain`.
    fn explain(&self, vm: &Vm, now: Time) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(why) = &vm.bad {
            lines.push(format!("its newest claim cannot be read: {why}; an operator must mend the file"));
        }
        let Some(claim) = &vm.claim else {
            lines.push("not protected: it has no claim; it gets one when it runs on a host of the cluster".into());
            if let Some(Err(why)) = &vm.record {
                lines.push(format!("it cannot be protected: {why}"));
            }
            return lines;
        };
        let wanted = if claim.wanted == Wanted::Running { "running" } else { "stopped" };
        lines.push(format!(
            "generation {} on datastore {}: {}; wanted {wanted}",
            claim.tenure.generation,
            self.store_name(claim.home),
            self.holder_text(claim)
        ));
        if let Some(Ok(record)) = &vm.record {
            lines.extend(record.gaps.iter().map(|gap| format!("only partly protected: {gap}")));
        }
        if let Some(Some(OnDoubt::RunUntilStop)) = vm.own_on_doubt() {
            lines.push("when its lease is in doubt it runs on until the guard's stop (on-doubt run-until-stop)".into());
        }
        if let Holder::Handover { from, to } = claim.holder {
            let (from, to) = (self.name_of(from.host), self.name_of(to.host));
            lines.push(format!(
                "until libvirt's switch it runs on {from}, after it on {to}; whichever keeps it claims the next generation; \
                 anybody else needs a proof against both"
            ));
            if let Some(proof) = self.proof_of(claim, vm.known, now) {
                lines.push(format!("over now: {}", self.proof_text(claim, proof)));
            }
        }
        if let Some(owner) = claim.owner() {
            let host = self.name_of(owner.host);
            let row = self.guard.rows.get(&claim.tenure).map(|row| row.state);
            match row {
                Some(VmState::Running) => {
                    lines.push(format!("the guard of {host} sees it running under that generation"))
                }
                Some(VmState::Over(over)) => lines.push(format!("the guard of {host} says that it is over: {over:?}")),
                Some(VmState::Expected | VmState::Incoming) => lines.push(format!("the guard of {host} expects it")),
                None => {}
            }
            lines.extend(self.explain_failover(claim, &host));
            if let Some(proof) = self.proof_of(claim, vm.known, now) {
                lines.push(format!("over now: {}", self.proof_text(claim, proof)));
            }
        }
        for debt in claim.debts.iter().filter(|debt| !self.is_paid(debt)) {
            lines.push(format!(
                "late writes of {} on {} are not excluded for good before its next boot",
                self.name_of(debt.host),
                self.store_name(debt.datastore)
            ));
        }
        if let Some(what) = self.waits_for_trust(claim.home) {
            lines.push(format!("it cannot be claimed anew, moved or taken over; that waits for {what}"));
        }
        lines.extend(self.explain_stillness(vm, claim));
        lines
    }

    /// Why nothing is done about it here, or not yet.
    fn explain_stillness(&self, vm: &Vm, claim: &Claim) -> Vec<String> {
        let mut lines = Vec::new();
        let elsewhere = claim.owner().is_some_and(|owner| owner.host != self.me.host);
        if let Some(what) =
            vm.kept_stale.as_ref().filter(|_| elsewhere && self.libvirt.domains.contains_key(&claim.tenure.vm))
        {
            lines.push(format!("{} keeps a stale definition: {what}", self.name_of(self.me.host)));
        }
        if let Some((_, why)) = &vm.stays {
            lines.push(format!("it is not moved away: {why}"));
        }
        if let Some(what) = vm.waits.as_ref().or(vm.attempt.as_ref().and_then(|attempt| attempt.waits.as_ref())) {
            lines.push(format!("waits for {what}"));
        }
        lines
    }

    /// What would happen if its host died now.
    fn explain_failover(&self, claim: &Claim, host: &str) -> Vec<String> {
        let Some(owner) = claim.owner() else { return Vec::new() };
        if claim.wanted != Wanted::Running || !matches!(claim.holder, Holder::Host(_)) {
            return Vec::new();
        }
        let timing = self.settings.timing;
        let window = super::timing::window(timing.lease, false).as_secs_f64();
        let mut lines = vec![format!(
            "if {host} died now: its lease lapses, proven {:.1} to {window:.1} s later; then the next host claims generation {}",
            window - timing.renew.as_secs_f64(),
            claim.tenure.generation.next()
        )];
        lines.extend(self.explain_power(owner.host));
        let debt = Debt { host: owner.host, boot: owner.boot, datastore: claim.home };
        lines.push(match self.late_write(&debt) {
            LateWrite::Command { program } => format!("late writes: excluded by the storage fence {program}, then it starts"),
            LateWrite::Lock => {
                let lease = match self.lock_lease(claim.home) {
                    Some(lease) => format!("the lease time of the server's clients: {} s", lease.as_secs()),
                    None => "the lease time of the server's clients: 90 s on NFSv4 unless lowered".to_owned(),
                };
                format!(
                    "late writes: excluded when the image locks of the old copy are free at the storage server; it waits for \
                     that ({lease})"
                )
            }
            LateWrite::Accepted => "late writes: accepted (late-writes = accept); it starts at once".to_owned(),
            LateWrite::Open => format!(
                "late writes: nothing excludes them, so it would wait for a new boot of {host} or proof that it is off; \
                 set a fence with 'mainstay datastore set'"
            ),
        });
        lines
    }
}

fn health_name(health: Health) -> &'static str {
    match health {
        Health::Well => "well",
        Health::Stalls => "stalls",
        Health::Down => "down",
        Health::Full => "full",
        Health::Gone => "gone",
    }
}

fn fence_name(fence: &StorageFence) -> String {
    match fence {
        StorageFence::Lock => "lock".into(),
        StorageFence::Command { program } => format!("command:{program}"),
        StorageFence::None => "none".into(),
    }
}

/// Facts for `doctor`.
impl Core {
    /// Members heard now, this host left out.
    #[must_use]
    pub fn heard_hosts(&self, now: Time) -> Vec<HostId> {
        self.peers.keys().copied().filter(|host| self.is_heard(*host, now)).collect()
    }
    /// Other members whose beats on a datastore are fresh as read here.
    #[must_use]
    pub fn peers_on(&self, datastore: DatastoreId, now: Time) -> usize {
        let fresh = |host: &&HostId| self.freshness(datastore, **host, now) == Some(crate::types::Freshness::Fresh);
        self.peers.keys().filter(fresh).count()
    }
    /// libvirt's hook has asked since the agent started.
    #[must_use]
    pub fn hook_seen(&self) -> bool {
        self.hook_seen.is_some()
    }
    /// Whether the guard is real-time and in time; none = it does not answer.
    #[must_use]
    pub fn guard_punctual(&self) -> Option<bool> {
        self.guard.connected.then_some(!self.guard.unpunctual)
    }
    /// Per peer: name, age of its last opened beat in milliseconds, and whether it hears us.
    #[must_use]
    pub fn peers_heard(&self, now: Time) -> Vec<(String, Option<u64>, bool)> {
        let age = |at: Time| u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX);
        self.peers
            .iter()
            .map(|(host, peer)| (self.name_of(*host), peer.opened.map(age), self.is_heard(*host, now)))
            .collect()
    }
    /// Protected VMs that libvirt starts at boot.
    #[must_use]
    pub fn autostart(&self) -> Vec<String> {
        let protected = |vm: &VmId| self.vms.get(vm).is_some_and(|vm| vm.claim.is_some());
        self.libvirt.domains.values().filter(|d| d.autostart && protected(&d.vm)).map(|d| d.name.clone()).collect()
    }
}
