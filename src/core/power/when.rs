//! Whether a host may be switched off now: the only place that says so.
//!
//! ```text
//!   a VM waits for it ─┬─ no beat of it on the network, here or at anybody heard here, for the suspect time
//!                      ├─ every datastore that it listed: complete reads with nothing new of it, under R4, until now,
//!                      │    for the suspect time (fence_at = suspect) or its window of R3 (lapse); at least one
//!                      └─ no storm: not more than half of the hosts were lost within the last L ──► now
//! ```
//!
//! Whatever cannot be said is a no. Silence on the network alone never gets here, nor does a stall of storage: a reader
//! whose own beats do not come through makes no window.

use std::time::Duration;

use super::*;
use crate::core::members::{low16, low32};
use crate::core::timing;
use crate::types::power::{FenceAt, FenceDevice};
use crate::types::{DatastoreId, Echo, Wanted};

/// A host that this agent has never heard may be booting; it is left alone for so long after the agent's start.
const BOOTING: Duration = Duration::from_secs(300);

/// Whether, or when at the earliest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum May {
    /// By the devices of this level; the host's newest boot known.
    Now { level: u8, boot: BootId },
    /// If a complete read that begins then or later shows no change. It may be past: such a read is under way.
    At(Time),
    /// Something stands against it.
    No,
}

impl Core {
    /// Devices of a host's level that are used.
    pub(super) fn trusted(&self, host: HostId, level: u8) -> impl Iterator<Item = &FenceDevice> {
        let used =
            move |device: &&FenceDevice| device.host == host && device.level == level && device.distrusted.is_none();
        self.settings.power.devices.iter().filter(used)
    }

    /// The first level above `after` by which the host may be switched off now; else when that may be.
    pub(super) fn next_level(&self, host: HostId, after: Option<u8>, now: Time) -> May {
        let devices = &self.settings.power.devices;
        let mut levels: Vec<u8> =
            devices.iter().filter(|device| device.host == host).map(|device| device.level).collect();
        levels.sort_unstable();
        levels.dedup();
        let mut earliest = None;
        for level in levels.into_iter().filter(|level| after.is_none_or(|after| after < *level)) {
            // A level is complete or it is none: what one of two power supplies says proves nothing.
            if devices.iter().any(|device| device.host == host && device.level == level && device.distrusted.is_some())
            {
                continue;
            }
            match self.may_cut(host, level, now) {
                now @ May::Now { .. } => return now,
                May::At(at) => earliest = Some(earliest.map_or(at, |first: Time| first.min(at))),
                May::No => {}
            }
        }
        earliest.map_or(May::No, May::At)
    }

    /// Whether the devices of one level may switch the host off now.
    pub(super) fn may_cut(&self, host: HostId, level: u8, now: Time) -> May {
        let Some(peer) = self.peers.get(&host) else { return May::No };
        let Some((_, boot)) = self.boot_of(host) else { return May::No };
        if !self.is_master() || !self.needs_power_off(host, now) || self.is_heard_by_others(host, now) {
            return May::No;
        }
        let timing = self.settings.timing;
        let mut at = match peer.opened {
            Some(opened) => opened.max(self.awake_since) + timing.suspect,
            None => self.me.started + BOOTING,
        };
        let listed = self.listed_by(host);
        if listed.is_empty() {
            return May::No;
        }
        let mut read = false;
        for id in listed {
            let store = self.stores.get(&id);
            let Some((from, silent)) = store.and_then(|store| store.quiet(host)) else { return May::No };
            let needs = match self.fence_at(host, level) {
                FenceAt::Suspect => Some(timing::power_silence(&timing)),
                FenceAt::Lapse => store.and_then(|store| store.window_of(host)),
            };
            let (Some(needs), true) = (needs, self.reads_well(id, now)) else { return May::No };
            if silent < needs {
                at = at.max(from + needs);
                read = true;
            }
        }
        at = self.storm_ends(now).map_or(at, |end| at.max(end));
        if at <= now && !read { May::Now { level, boot } } else { May::At(at) }
    }

    /// A level waits for the lapse unless each of its devices may be used before.
    fn fence_at(&self, host: HostId, level: u8) -> FenceAt {
        let of = |device: &FenceDevice| device.fence_at.unwrap_or(self.settings.power.fence_at);
        let early = self.trusted(host, level).all(|device| of(device) == FenceAt::Suspect);
        if early { FenceAt::Suspect } else { FenceAt::Lapse }
    }

    /// Whether a VM should run, and has no proof against this host that excludes its late writes, or waits for those.
    pub(super) fn needs_power_off(&self, host: HostId, now: Time) -> bool {
        self.vms.values().any(|vm| {
            let Some(claim) = vm.claim.as_ref().filter(|claim| claim.wanted == Wanted::Running) else { return false };
            let owned = claim.owners().iter().any(|owner| owner.host == host);
            let proven = || self.proof_of(claim, vm.known, now).is_some_and(|proof| proof.excludes_late_writes());
            let owes = claim.debts.iter().any(|debt| debt.host == host && !self.is_paid(debt));
            owes || (owned && !proven())
        })
    }

    /// Datastores on which the host's lease was valid by its newest beat, or on which any beat of it lies.
    pub(super) fn listed_by(&self, host: HostId) -> Vec<DatastoreId> {
        let beat = self.peers.get(&host).and_then(|peer| peer.beat.as_ref());
        let mut listed = beat.map(|beat| self.datastores_in(beat.reaches)).unwrap_or_default();
        listed.extend(self.stores.iter().filter(|(_, store)| store.newest_of(host).is_some()).map(|(id, _)| *id));
        listed.sort_unstable();
        listed.dedup();
        listed
    }

    /// Whether somebody who is heard here has heard the host after this host last did.
    pub(super) fn is_heard_by_others(&self, host: HostId, now: Time) -> bool {
        let Some(index) = self.settings.member(host).map(|member| member.index) else { return false };
        let known = self.peers.get(&host).and_then(|peer| peer.beat.as_ref());
        let newer = |echo: &Echo| {
            known.is_none_or(|beat| {
                let ahead = echo.counter_low.wrapping_sub(low32(beat.counter.0));
                echo.incarnation_low != low16(beat.incarnation.0) || (ahead != 0 && ahead < u32::MAX / 2)
            })
        };
        self.peers
            .iter()
            .filter(|(other, _)| **other != host && self.is_heard(**other, now))
            .filter_map(|(_, peer)| peer.beat.as_ref())
            .any(|beat| beat.agent.echoes.iter().any(|echo| echo.index == index && newer(echo)))
    }

    /// Anti-storm: who loses more than half of the hosts at once may be the one that is lost. It waits one more L.
    fn storm_ends(&self, now: Time) -> Option<Time> {
        let timing = self.settings.timing;
        let lost = self.peers.iter().filter(|(host, _)| !self.is_heard(**host, now));
        let lost = lost.filter_map(|(_, peer)| peer.opened).map(|opened| opened + timing.suspect + timing.lease);
        let held: Vec<Time> = lost.filter(|until| now < *until).collect();
        if self.settings.members.len() < held.len() * 2 { held.into_iter().max() } else { None }
    }
}
