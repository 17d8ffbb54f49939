//! Proof "power off" (design 2): a host that is silent everywhere is switched off, and what its switch says proves that
//! everything it ran is over, late writes included.
//!
//! ```text
//!            a VM needs it, the host may be cut (when.rs), a device is trusted
//!   Idle ─────────────────────────────────────────────► Cutting (level n)
//!    ▲ ▲                                                  │ every device of the level: off, done;
//!    │ │ failed, hung, status on: next level;             │ then every device of the level: status, off
//!    │ └── no level left: again later, 1 s … 60 s ────────┤
//!    │                                                    ▼
//!    ├── any sign of life, before all said done: called off, see life.rs
//!    ├── a beat of another boot ── (also from Cutting) ── Off: proof for every claim of that boot that was read before
//!    └── a beat of the same boot, begun later: it was         the first device of the level was asked
//!        no proof: dropped, devices distrusted, alarm
//! ```
//!
//! Only the master switches hosts off, on its own reads; a master that does not read a datastore on which the host beat
//! switches nothing. Other proofs go on meanwhile: whichever is complete first is used. Every other host is told, since
//! it may wait for late writes of that boot. A host that was switched off stays off until a person switches it on.
//!
//! Deliberately not here: programs and their deadlines (`exec/power.rs`), what a proof allows (`failover`).

pub(super) mod devices;
mod life;
mod when;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Core;
use super::attempt::Stage;
use super::cx::{Cx, Pending, Timer};
use super::event::AskId;
use super::note::Note;
use crate::types::control::{Denial, Reply, Request};
use crate::types::power::{PowerAnswer, PowerOrder};
use crate::types::settings::SettingsChange;
use crate::types::{BootId, Claim, HostId, Owner, Ticket, Time, VmId};
use when::May;

/// A device's time to switch a host off, which some do in many steps.
const OFF_TIME: Duration = Duration::from_secs(30);
/// A device's time to say whether a host is on.
const STATUS_TIME: Duration = Duration::from_secs(10);
/// The read that may show the silence tells when it has ended; should it not, the question is asked again after this.
const READ_TIME: Duration = Duration::from_millis(20);
/// After all levels have failed: the first pause and, doubling, the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Others are told again that a host is off, for as long as something waits for it.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// What is known and done about one host's power.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Power {
    state: State,
    /// The boot that state, pause and next try are about.
    boot: Option<BootId>,
    /// The next round of tries is not begun before.
    retry: Time,
    /// How long the pause before it was.
    pause: Duration,
    /// Why each device failed against which boot, as people were last told.
    failed: BTreeMap<String, (BootId, String)>,
    /// A master said, then, that this boot is over.
    told: Option<(BootId, Time)>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
enum State {
    #[default]
    Idle,
    Cutting(Cut),
    Off(Off),
}

/// The devices of one level are asked, one after the other.
#[derive(Debug, Serialize, Deserialize)]
struct Cut {
    boot: BootId,
    level: u8,
    /// The first device of the level was asked.
    started: Time,
    /// The last of them said that it was done: before, what feeds the host may be another one.
    reported: Option<Time>,
    /// All of the level.
    devices: Vec<String>,
    /// What is still to be asked; the first is under way.
    steps: VecDeque<(String, PowerOrder)>,
    ticket: Ticket,
}

#[derive(Debug, Serialize, Deserialize)]
struct Off {
    boot: BootId,
    started: Time,
    reported: Time,
    devices: Vec<String>,
    /// Others were told.
    told: Time,
}

impl Core {
    /// Whether a host was switched off after a claim of `owner` on it was read, then.
    pub(super) fn proves_off(&self, owner: &Owner, known: Time) -> bool {
        match self.power.get(&owner.host).map(|power| &power.state) {
            Some(State::Off(off)) => off.boot == owner.boot && known < off.started,
            Some(State::Idle | State::Cutting(_)) | None => false,
        }
    }

    /// Whether this boot of a host is over by its switch, as this agent or its master found out.
    pub(super) fn is_off(&self, host: HostId, boot: BootId) -> bool {
        let Some(power) = self.power.get(&host) else { return false };
        let found = matches!(&power.state, State::Off(off) if off.boot == boot);
        found || power.told.is_some_and(|(told, _)| told == boot)
    }

    /// The master looks at every host that has a device.
    pub(super) fn cut_power(&mut self, cx: &mut Cx) {
        if self.disarmed().is_some() {
            return;
        }
        let mut hosts: Vec<HostId> = self.settings.power.devices.iter().map(|device| device.host).collect();
        hosts.sort_unstable();
        hosts.dedup();
        for host in hosts {
            self.cut_power_of(cx, host);
        }
    }

    fn cut_power_of(&mut self, cx: &mut Cx, host: HostId) {
        let power = self.power.entry(host).or_default();
        let retry = power.retry;
        match &mut power.state {
            State::Cutting(_) => {
                if self.is_heard_by_others(host, cx.now) {
                    self.call_off(cx, host, "another host hears it");
                }
                return;
            }
            State::Off(off) if TELL_AGAIN <= cx.now.since(off.told) => {
                off.told = cx.now;
                let boot = off.boot;
                let owes = |claim: &Claim| claim.debts.iter().any(|debt| debt.host == host && debt.boot == boot);
                if self.vms.values().filter_map(|vm| vm.claim.as_ref()).any(owes) {
                    self.tell_off(cx, host, boot);
                }
            }
            State::Off(_) | State::Idle => {}
        }
        match self.next_level(host, None, cx.now) {
            May::Now { .. } if self.holds_back(cx, host) => {}
            May::Now { level, boot } if retry <= cx.now => self.begin_cut(cx, host, level, boot),
            May::Now { .. } => cx.set_earlier(Timer::Power(host), retry),
            May::At(at) => {
                cx.set_earlier(Timer::Power(host), at.max(retry).max(cx.now + READ_TIME));
                // Only a complete read that begins then shows that the silence has lasted.
                for datastore in self.listed_by(host) {
                    cx.set_earlier(Timer::Read(datastore), at.max(cx.now) + Duration::from_millis(1));
                }
            }
            May::No => {}
        }
    }

    fn begin_cut(&mut self, cx: &mut Cx, host: HostId, level: u8, boot: BootId) {
        let devices: Vec<String> = self.trusted(host, level).map(|device| device.name.clone()).collect();
        let ask = |order| devices.iter().map(move |name| (name.clone(), order));
        let steps = ask(PowerOrder::Off).chain(ask(PowerOrder::Status)).collect();
        let failed = self.power.get(&host).map(|power| &power.failed);
        // A try that is made again is no news.
        let again = |device: &String| failed.and_then(|failed| failed.get(device)).is_some_and(|(of, _)| *of == boot);
        if !devices.iter().any(again) {
            let (name, evidence) = (self.name_of(host), self.evidence(host, cx.now));
            let text = format!("host {name} is to be switched off by {}: {evidence}", devices.join(" and "));
            cx.note(Note::warning("power-off-begins", text));
        }
        let cut = Cut { boot, level, started: cx.now, reported: None, devices, steps, ticket: Ticket(0) };
        let power = self.power.entry(host).or_default();
        (power.state, power.boot) = (State::Cutting(cut), Some(boot));
        self.next_step(cx, host);
    }

    fn cut_of(&mut self, host: HostId) -> Option<&mut Cut> {
        match self.power.get_mut(&host).map(|power| &mut power.state) {
            Some(State::Cutting(cut)) => Some(cut),
            Some(State::Idle | State::Off(_)) | None => None,
        }
    }

    fn next_step(&mut self, cx: &mut Cx, host: HostId) {
        let Some(cut) = self.cut_of(host) else { return };
        let level = cut.level;
        let Some((name, order)) = cut.steps.front().cloned() else { return self.switched_off(cx, host) };
        let device = self.settings.power.devices.iter().find(|device| device.name == name).cloned();
        let Some(device) = device.filter(|device| device.distrusted.is_none()) else {
            return self.device_failed(cx, host, &name, "it was taken away meanwhile".into());
        };
        // Checked again before each try: the host may be heard by now, or nobody needs it any more.
        if order == PowerOrder::Off && !matches!(self.may_cut(host, level, cx.now), May::Now { .. }) {
            let text =
                format!("host {} is not switched off after all: {}", self.name_of(host), self.evidence(host, cx.now));
            cx.note(Note::info("power-off-left", text));
            return self.rest(cx, host, PAUSES.0);
        }
        let within = if order == PowerOrder::Off { OFF_TIME } else { STATUS_TIME };
        let ticket = cx.power(device, order, within);
        if let Some(cut) = self.cut_of(host) {
            cut.ticket = ticket;
        }
    }

    /// A device has answered, or its time is up.
    pub(super) fn power_answered(
        &mut self,
        cx: &mut Cx,
        host: HostId,
        ticket: Ticket,
        answer: Result<PowerAnswer, String>,
    ) {
        let Some(cut) = self.cut_of(host).filter(|cut| cut.ticket == ticket) else { return };
        let Some((name, order)) = cut.steps.pop_front() else { return };
        let why = match (order, answer) {
            (PowerOrder::Off, Ok(PowerAnswer::Done)) => {
                if !cut.steps.iter().any(|(_, order)| *order == PowerOrder::Off) {
                    cut.reported = Some(cx.now);
                }
                return self.next_step(cx, host);
            }
            (PowerOrder::Status, Ok(PowerAnswer::Off)) => return self.next_step(cx, host),
            (PowerOrder::Status, Ok(PowerAnswer::On)) => {
                "it said that it had switched the host off, but its status is on".to_owned()
            }
            (PowerOrder::Off | PowerOrder::Status | PowerOrder::Monitor, Ok(_)) => {
                "it gave an answer of the wrong kind".to_owned()
            }
            (_, Err(why)) => why,
        };
        self.device_failed(cx, host, &name, why);
    }

    /// The next level is tried at once; after the last one all are tried again later.
    fn device_failed(&mut self, cx: &mut Cx, host: HostId, name: &str, why: String) {
        let Some((level, boot)) = self.cut_of(host).map(|cut| (cut.level, cut.boot)) else { return };
        let host_name = self.name_of(host);
        let Some(power) = self.power.get_mut(&host) else { return };
        let failure = (boot, why);
        if power.failed.get(name) != Some(&failure) {
            let why = &failure.1;
            let text = format!(
                "fence device {name} did not switch host {host_name} off: {why}; it is tried again; \
                 'mainstay host fence-device test {name}' shows what it says"
            );
            cx.note(Note::warning("fence-device-failed", text));
            power.failed.insert(name.to_owned(), failure);
        }
        let pause = (power.pause * 2).clamp(PAUSES.0, PAUSES.1);
        match self.next_level(host, Some(level), cx.now) {
            May::Now { level, boot } => self.begin_cut(cx, host, level, boot),
            May::At(_) | May::No => self.rest(cx, host, pause),
        }
    }

    fn rest(&mut self, cx: &mut Cx, host: HostId, pause: Duration) {
        let power = self.power.entry(host).or_default();
        power.state = State::Idle;
        power.pause = pause;
        power.retry = cx.now + pause;
        cx.set(Timer::Power(host), power.retry);
    }

    fn switched_off(&mut self, cx: &mut Cx, host: HostId) {
        let name = self.name_of(host);
        let Some(power) = self.power.get_mut(&host) else { return };
        let State::Cutting(cut) = std::mem::take(&mut power.state) else { return };
        let (boot, took) = (cut.boot, cx.now.since(cut.started).as_secs_f64());
        let text =
            format!("host {name} is off: {} said so, and its status agrees ({took:.2} s)", cut.devices.join(" and "));
        power.state = State::Off(Off {
            boot,
            started: cut.started,
            reported: cut.reported.expect("a level has devices, and each was asked to switch off first"),
            devices: cut.devices,
            told: cx.now,
        });
        power.failed.clear();
        power.pause = Duration::ZERO;
        cx.note(Note::warning("host-off", text));
        self.tell_off(cx, host, boot);
        self.debts_paid(cx, host);
    }

    fn tell_off(&mut self, cx: &mut Cx, host: HostId, boot: BootId) {
        let others: Vec<HostId> = self.peers.keys().copied().filter(|other| self.is_heard(*other, cx.now)).collect();
        for other in others {
            cx.send(other, Request::PoweredOff { host, boot }, self.settings.timing.lease, Pending::Nothing);
        }
    }

    /// The master says that a boot of a host is over. Nobody claims anything on this word: it pays debts.
    pub(super) fn told_off(&mut self, cx: &mut Cx, ask: AskId, host: HostId, boot: BootId) {
        let newest = self.boot_of(host).map(|(_, boot)| boot);
        if host != self.me.host && !self.beats_now(host, cx.now) && newest.is_none_or(|newest| newest == boot) {
            self.power.entry(host).or_default().told = Some((boot, cx.now));
            self.debts_paid(cx, host);
        }
        cx.answer(ask, Reply::Done);
    }

    /// The proof of an order: the owner's boot is over. Whoever hears its beats knows better.
    pub(super) fn ordered_off(&mut self, owner: &Owner, now: Time) -> Result<(), Denial> {
        if owner.host == self.me.host || self.beats_now(owner.host, now) {
            let host = self.name_of(owner.host);
            return Err(Denial::Unable(format!("host {host} is said to be off, and is heard here")));
        }
        self.power.entry(owner.host).or_default().told = Some((owner.boot, now));
        Ok(())
    }

    /// A beat of the host was opened within the last beat period: its last words are older.
    fn beats_now(&self, host: HostId, now: Time) -> bool {
        let opened = self.peers.get(&host).and_then(|peer| peer.opened);
        opened.is_some_and(|at| now.since(at) < self.settings.timing.beat)
    }

    /// Starts that wait for late writes of this host look again.
    fn debts_paid(&mut self, cx: &mut Cx, host: HostId) {
        let waits = |stage: &Stage| {
            let against = matches!(stage, Stage::Fencing(debt) | Stage::Sighting(debt) if debt.host == host);
            against || *stage == Stage::Waiting
        };
        let waiting: Vec<VmId> = self
            .vms
            .iter()
            .filter(|(_, vm)| vm.attempt.as_ref().is_some_and(|attempt| waits(&attempt.stage)))
            .filter(|(_, vm)| vm.claim.as_ref().is_some_and(|claim| claim.debts.iter().any(|debt| debt.host == host)))
            .map(|(id, _)| *id)
            .collect();
        for id in waiting {
            self.look_at_debts_again(cx, id);
        }
        let of_host = |vm: &&mut super::vms::Vm| {
            vm.claim.as_ref().is_some_and(|claim| {
                claim.owner().is_some_and(|owner| owner.host == host)
                    || claim.debts.iter().any(|debt| debt.host == host)
            })
        };
        self.vms.values_mut().filter(of_host).for_each(|vm| vm.retry = cx.now);
        self.look = true;
        self.check = true;
    }
}
