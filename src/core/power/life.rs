//! Signs of life of a host that is being switched off, or was: what was asked is taken back, what was said is no proof.
//!
//! | what is seen | while a device is asked to switch it off | while only its status is asked | when it was off |
//! |---|---|---|---|
//! | a beat of another boot | the device is called off | nothing follows | somebody switched it on |
//! | a beat of the same boot | the device is called off | the devices lied | the devices lied |
//! | somebody who is heard hears it | the device is called off | | |
//!
//! Called off: its program is killed, and no other device is asked. An order that has gone out already reaches the host
//! all the same, and nothing can be done about that; people are told which of the two it was, as far as that is known.

use super::*;

impl Core {
    /// A beat of a host that was begun after `since`: what its switch said of that boot before was no proof.
    pub(in crate::core) fn shows_life(&mut self, cx: &mut Cx, host: HostId, boot: BootId, since: Time) {
        let Some(power) = self.power.get_mut(&host) else { return };
        if power.told.is_some_and(|(off, at)| off != boot || at < since) {
            power.told = None;
        }
        if power.boot.is_some_and(|of| of != boot) {
            // Somebody switched it on. What was tried against the boot before must not hit this one, nor hold up what is to be
            // done about it.
            self.call_off(cx, host, "it beats with a new boot");
            let power = self.power.entry(host).or_default();
            (power.state, power.boot) = (State::Idle, None);
            (power.retry, power.pause) = (Time::ZERO, Duration::ZERO);
            return;
        }
        let (said, devices) = match &power.state {
            State::Idle => return,
            State::Off(off) => (Some(off.reported), off.devices.clone()),
            State::Cutting(cut) if cut.reported.is_none() => return self.call_off(cx, host, "it beats again"),
            State::Cutting(cut) => (cut.reported, cut.devices.clone()),
        };
        if said.is_some_and(|said| said < since) {
            self.contradicted(cx, host, &devices);
        }
    }

    /// The ground for switching a host off is gone while a device is about to do it.
    pub(super) fn call_off(&mut self, cx: &mut Cx, host: HostId, why: &str) {
        let Some(cut) = self.cut_of(host) else { return };
        let ticket = cut.ticket;
        let Some((device, PowerOrder::Off)) = cut.steps.front().cloned() else { return };
        let text =
            format!("host {} is not to be switched off any more: {why}; {device} is called off", self.name_of(host));
        cx.note(Note::warning("power-off-called-off", text));
        cx.call_off_power(ticket, host, device);
        self.rest(cx, host, PAUSES.0);
    }

    /// What came of it.
    pub(in crate::core) fn called_off(
        &mut self,
        cx: &mut Cx,
        host: HostId,
        device: &str,
        answer: Result<PowerAnswer, String>,
    ) {
        let host = self.name_of(host);
        cx.note(match answer {
            Ok(_) => Note::alarm(
                "power-off-too-late",
                format!(
                    "fence device {device} was called off too late: it has switched host {host} off, which was well again; what \
                     ran there is restarted; switch it on"
                ),
            ),
            Err(why) => Note::warning(
                "power-off-ended",
                format!(
                    "fence device {device} was called off, and has not said that it switched host {host} off: {why}; should \
                     the host go off now, the order had gone out already"
                ),
            ),
        });
    }

    fn contradicted(&mut self, cx: &mut Cx, host: HostId, devices: &[String]) {
        let name = self.name_of(host);
        let list = devices.join(" and ");
        let text = format!(
            "host {name} beats although {list} said that it is off: that is no proof any more, and {list} is not used until \
             a person has mended it and said 'mainstay host fence-device trust {list}'"
        );
        cx.note(Note::alarm("fence-device-lies", text));
        self.rest(cx, host, PAUSES.0);
        for device in devices {
            let distrusted = Some(format!("it said that {name} was off, which then beat"));
            let change = SettingsChange::TrustFenceDevice { name: device.clone(), distrusted };
            match self.master() {
                Some(master) if master != self.me.host => {
                    let within = self.settings.timing.lease;
                    cx.send(master, Request::Change(Box::new(change)), within, Pending::Nothing);
                }
                Some(_) => self.carry_out(cx, change),
                None => {} // Only masters switch hosts off; the next contradiction finds one.
            }
        }
    }
}
