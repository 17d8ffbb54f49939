//! The settings document: changed by the master only, followed by all.
//!
//! ```text
//!   a person's change ─► master: does it contradict what is? ─► next version ─► saved, sent to all ─► used
//! ```

use std::time::Duration;

use super::Core;
use super::cx::{Cx, Pending};
use super::event::AskId;
use super::note::Note;
use crate::types::control::{Denial, Reply, Request};
use crate::types::settings::{ClusterSettings, DatastoreSettings, ForeignMigration, MemberSettings, SettingsChange};
use crate::types::store::{StoreAnswer, StoreOrder};
use crate::types::{HostId, MAX_DATASTORES, MAX_HOSTS, Roster, RosterEntry};

/// A datastore's time to be prepared.
const CALL: Duration = Duration::from_secs(20);
/// For another host's answer that it has the document; it asks for it itself later.
const TOLD: Duration = Duration::from_secs(10);

impl Core {
    pub(super) fn change(&mut self, cx: &mut Cx, ask: AskId, from: Option<HostId>, change: SettingsChange) {
        if !self.is_master() {
            let master = self.master();
            return self.forward(cx, ask, from, master, Request::Change(Box::new(change)));
        }
        match self.checked(&change) {
            Ok(false) => cx.answer(ask, Reply::AlreadySo),
            Ok(true) => match &change {
                SettingsChange::AddDatastore(datastore) => {
                    let (id, path) = (datastore.id, datastore.path.clone());
                    let roster = Roster {
                        cluster: self.settings.cluster,
                        datastore: id,
                        generation: 1,
                        members: self.roster_entries(),
                    };
                    cx.act(super::action::Action::OpenDatastore(id, path));
                    cx.store(id, StoreOrder::Prepare(roster), CALL, Pending::Prepare(ask, Box::new(change)));
                }
                SettingsChange::AddMember(_)
                | SettingsChange::ChangeDatastore { .. }
                | SettingsChange::SetTiming(_)
                | SettingsChange::SetOnDoubt(_)
                | SettingsChange::SetApdAfter(_)
                | SettingsChange::SetForeignMigration(_)
                | SettingsChange::SetGuests(_)
                | SettingsChange::SetRules(_)
                | SettingsChange::Host(_)
                | SettingsChange::Disarm(_)
                | SettingsChange::AcceptDatastore { .. }
                | SettingsChange::SetFenceAt(_)
                | SettingsChange::AddFenceDevice(_)
                | SettingsChange::RemoveFenceDevice(_)
                | SettingsChange::TrustFenceDevice { .. } => {
                    self.carry_out(cx, change);
                    cx.answer(ask, Reply::Done);
                }
            },
            Err(denial) => cx.answer(ask, Reply::Denied(denial)),
        }
    }

    fn roster_entries(&self) -> Vec<RosterEntry> {
        self.settings.members.iter().map(|member| RosterEntry { index: member.index, host: member.host }).collect()
    }

    /// Whether a change changes anything, or why it contradicts what is.
    fn checked(&self, change: &SettingsChange) -> Result<bool, Denial> {
        let settings = &self.settings;
        let no = |why: String| Err(Denial::Contradiction(why));
        match change {
            SettingsChange::AddMember(new) => {
                if settings.members.contains(new) {
                    return Ok(false);
                }
                if settings.members.iter().any(|member| member.host == new.host || member.index == new.index) {
                    return no(format!("host id {} (or its index) is a member already", new.host));
                }
                if let Some(other) = settings.members.iter().find(|member| member.name == new.name) {
                    return no(format!("a host named {} is a member already ({})", new.name, other.host));
                }
                if settings.members.iter().any(|member| member.control == new.control) {
                    return no(format!("address {} is a member's already", new.control));
                }
                if MAX_HOSTS <= settings.members.len() {
                    return no(format!("the cluster has {MAX_HOSTS} hosts, which is the limit"));
                }
                Ok(true)
            }
            SettingsChange::AddDatastore(new) => {
                if settings.datastores.contains(new) {
                    return Ok(false);
                }
                if settings.datastores.iter().any(|datastore| datastore.name == new.name) {
                    return no(format!("a datastore named {} exists already", new.name));
                }
                if settings.datastores.iter().any(|datastore| datastore.path == new.path) {
                    return no(format!("{} is a datastore already", new.path));
                }
                if MAX_DATASTORES <= settings.datastores.len() {
                    return no(format!("the cluster has {MAX_DATASTORES} datastores, which is the limit"));
                }
                Ok(true)
            }
            SettingsChange::ChangeDatastore { name, .. } => self.datastore_named(name).map(|_| true),
            SettingsChange::AcceptDatastore { name } => {
                self.datastore_named(name).map(|datastore| self.distrusted(datastore.id).is_some())
            }
            SettingsChange::SetTiming(timing) => {
                super::timing::check(timing).map_err(|why| Denial::Contradiction(why.to_string()))?;
                Ok(settings.timing != *timing)
            }
            SettingsChange::SetOnDoubt(on_doubt) => Ok(settings.vms.on_doubt != *on_doubt),
            SettingsChange::SetApdAfter(span) if *span <= settings.timing.suspect => no(format!(
                "apd-after must be longer than the suspect time, {} ms",
                settings.timing.suspect.as_millis()
            )),
            SettingsChange::SetApdAfter(span) => Ok(settings.vms.apd_after != *span),
            SettingsChange::SetFenceAt(at) => Ok(settings.power.fence_at != *at),
            SettingsChange::AddFenceDevice(new) => self.checked_device(new),
            SettingsChange::RemoveFenceDevice(name) => self.checked_name(name, |_| true),
            SettingsChange::TrustFenceDevice { name, distrusted } => {
                self.checked_name(name, |device| device.distrusted != *distrusted)
            }
            SettingsChange::SetForeignMigration(policy) => Ok(settings.foreign_migration != *policy),
            SettingsChange::SetGuests(guests) => {
                guests.check().map_err(Denial::Contradiction)?;
                Ok(settings.guests != **guests)
            }
            SettingsChange::SetRules(rules) => {
                rules.check().map_err(|why| Denial::Contradiction(why.to_string()))?;
                Ok(settings.rules != **rules)
            }
            SettingsChange::Host(change) => Ok(self.changes_host(change)),
            SettingsChange::Disarm(disarmed) => Ok(settings.disarmed != *disarmed),
        }
    }

    fn datastore_named(&self, name: &str) -> Result<&DatastoreSettings, Denial> {
        let found = self.settings.datastores.iter().find(|datastore| datastore.name == name);
        found.ok_or_else(|| {
            Denial::Contradiction(format!("no datastore is named {name}; 'mainstay datastore list' shows them"))
        })
    }

    pub(super) fn prepared(&mut self, cx: &mut Cx, ask: AskId, change: SettingsChange, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Done if self.is_master() && self.checked(&change) == Ok(true) => {
                self.carry_out(cx, change);
                cx.answer(ask, Reply::Done);
            }
            StoreAnswer::Failed(why) => {
                cx.answer(ask, Reply::Denied(Denial::Unable(format!("the datastore cannot be prepared: {why}"))));
            }
            _ => cx.answer(ask, Reply::Denied(Denial::NotMaster { master: self.master() })),
        }
    }

    pub(super) fn carry_out(&mut self, cx: &mut Cx, change: SettingsChange) {
        let by_rules = matches!(change, SettingsChange::SetRules(_));
        let mut settings = self.settings.clone();
        settings.version += 1;
        match change {
            SettingsChange::AddMember(new) => {
                cx.note(Note::info("host-joined", format!("host {} joined ({})", new.name, new.control)));
                settings.members.push(new);
                settings.members.sort_by_key(|member| member.index);
            }
            SettingsChange::AddDatastore(new) => {
                cx.note(Note::info("datastore-added", format!("datastore {} at {} was added", new.name, new.path)));
                settings.datastores.push(new);
            }
            SettingsChange::ChangeDatastore { name, fence, late_writes } => {
                cx.note(Note::info("datastore-changed", format!("datastore {name} was changed")));
                for datastore in settings.datastores.iter_mut().filter(|datastore| datastore.name == name) {
                    datastore.fence = fence.clone().unwrap_or_else(|| datastore.fence.clone());
                    datastore.late_writes = late_writes.unwrap_or(datastore.late_writes);
                }
            }
            SettingsChange::SetTiming(timing) => {
                cx.note(Note::info("timing", format!("timing was changed: L is {} ms now", timing.lease.as_millis())));
                settings.timing = timing;
            }
            SettingsChange::SetOnDoubt(on_doubt) => {
                cx.note(Note::info("vm-defaults", format!("what VMs do in doubt was changed: {on_doubt:?}")));
                settings.vms.on_doubt = on_doubt;
            }
            SettingsChange::SetApdAfter(span) => {
                let text = format!("a datastore that is silent for {} ms counts as down now", span.as_millis());
                cx.note(Note::info("apd-after", text));
                settings.vms.apd_after = span;
            }
            SettingsChange::SetForeignMigration(policy) => {
                let what = if policy == ForeignMigration::Allow { "allowed" } else { "refused" };
                cx.note(Note::info("foreign-migration", format!("'virsh migrate' of protected VMs is {what} now")));
                settings.foreign_migration = policy;
            }
            SettingsChange::SetGuests(guests) => {
                let (rules, permissions) = (guests.rules.len(), guests.permissions.len());
                let text = format!("guests have {rules} rule(s) and {permissions} permission(s) now");
                cx.note(Note::info("guest-policy", text));
                settings.guests = *guests;
            }
            SettingsChange::SetRules(rules) => {
                cx.note(Note::info("vm-rules", "the rules for order and places of VMs were changed"));
                settings.rules = *rules;
            }
            SettingsChange::Host(change) => self.change_host(cx, &mut settings, change),
            SettingsChange::Disarm(disarmed) => super::disarm::change(cx, &mut settings, disarmed),
            SettingsChange::AcceptDatastore { name } => {
                // Above that of each other, too: generations of a VM whose home moved here have counted on from there.
                let highest = settings.datastores.iter().map(|datastore| datastore.accepted).max().unwrap_or_default();
                for datastore in settings.datastores.iter_mut().filter(|datastore| datastore.name == name) {
                    datastore.accepted = highest + 1;
                }
            }
            other => super::power::devices::change(&mut settings, other).into_iter().for_each(|note| cx.note(note)),
        }
        self.use_settings(cx, settings);
        if by_rules {
            self.tell_rule_problems(cx);
        }
        let others: Vec<HostId> = self.peers.keys().copied().collect();
        for host in others {
            cx.send(host, Request::Settings(Box::new(self.settings.clone())), TOLD, Pending::Nothing);
        }
    }

    fn tell_rule_problems(&mut self, cx: &mut Cx) {
        self.read_rules();
        for problem in self.rule_problems().into_iter().chain(self.admission_broken(cx.now)) {
            cx.note(Note::warning("vm-rules", problem));
        }
    }

    /// Another host has a newer document of the same cluster.
    pub(super) fn take_settings(&mut self, cx: &mut Cx, newer: ClusterSettings) {
        if newer.cluster != self.settings.cluster || newer.version <= self.settings.version {
            return;
        }
        if newer.member(self.me.host).is_none_or(|member| member.index != self.index) {
            return cx.note(Note::alarm("settings", "a settings document that does not name this host was refused"));
        }
        self.use_settings(cx, newer);
    }

    fn use_settings(&mut self, cx: &mut Cx, settings: ClusterSettings) {
        let before = std::mem::replace(&mut self.settings, settings);
        self.follow_settings(cx.now);
        let risen = |datastore: &&DatastoreSettings| {
            before.datastore(datastore.id).is_some_and(|old| old.accepted < datastore.accepted)
        };
        let accepted: Vec<_> = self.settings.datastores.iter().filter(risen).map(|datastore| datastore.id).collect();
        accepted.into_iter().for_each(|id| self.accepted_anew(cx, id));
        let rose = |member: &&MemberSettings| {
            before.member(member.host).is_some_and(|before| before.released < member.released)
        };
        let released: Vec<HostId> = self.settings.members.iter().filter(rose).map(|member| member.host).collect();
        for host in released {
            let text = format!("an operator ends the quarantine of {}", self.name_of(host));
            self.end_quarantine(cx, host, text);
            if host == self.me.host {
                self.release_findings(cx.now);
            }
        }
        cx.save(&self.settings);
        self.list_domains(cx); // What lies on a datastore may have changed.
        self.list_claims(cx);
        self.read_stores_soon(cx);
        self.tell_beat(cx);
    }
}
