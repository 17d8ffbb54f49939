//! Power loss of a host that has a power switch: it confirms at once, hangs or fails; and what must never use it.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Ground;
use crate::host::{Host, Power};
use crate::judge::Moment;
use crate::power::{self, Behaviour};
use crate::{agents, network};

const VMS: usize = 3;
/// With the power switch: three seconds of silence on network and storage, each read at most a second late.
const SUSPECT: Duration = Duration::from_millis(5000);
const SUSPECT_FAST: Duration = Duration::from_millis(2200);
/// Without it: the lapse.
const LAPSE: Duration = Duration::from_secs(8);
/// Longer than any lease of the profile, and the time that a switch may take.
const CUT: Duration = Duration::from_secs(15);

pub fn suspect(ground: &mut Ground) -> Result<()> {
    confirmed(ground, SUSPECT)
}

pub fn suspect_fast(ground: &mut Ground) -> Result<()> {
    confirmed(ground, SUSPECT_FAST)
}

fn confirmed(ground: &mut Ground, limit: Duration) -> Result<()> {
    let (victim, killed) = kill(ground, Behaviour::Works, limit)?;
    if !told(ground, &victim, killed, "host-off") {
        bail!("nobody says that {} was switched off", victim.name());
    }
    Ok(())
}

pub fn hangs(ground: &mut Ground) -> Result<()> {
    let (victim, killed) = kill(ground, Behaviour::Hangs, LAPSE)?;
    if !told(ground, &victim, killed, "power-off-begins") {
        bail!("the power switch was not tried");
    }
    Ok(())
}

pub fn fails(ground: &mut Ground) -> Result<()> {
    let (victim, killed) = kill(ground, Behaviour::Fails, LAPSE)?;
    if !told(ground, &victim, killed, "fence-device-failed") {
        bail!("nobody says that the power switch failed");
    }
    Ok(())
}

fn kill(ground: &mut Ground, switch: Behaviour, limit: Duration) -> Result<(Host, Moment)> {
    let victim = ground.subordinate()?;
    ground.gather(&victim, VMS)?;
    power::set(switch)?;
    ground.watch()?;
    let (killed, guests) = ground.kill(&victim)?;
    ground.demand_started(&guests, killed, &victim, limit)?;
    Ok((victim, killed))
}

/// Whether some other host noted this of the victim since then.
fn told(ground: &Ground, victim: &Host, since: Moment, kind: &str) -> bool {
    let notes = agents::all_notes(&ground.others(&[*victim]), Moment::now().since(since));
    notes.iter().any(|note| note.kind == kind && note.text.contains(&victim.name()))
}

/// A cut network alone, with storage: whatever the policy, the switch is not used.
pub fn cut_network(ground: &mut Ground) -> Result<()> {
    let victim = ground.subordinate()?;
    ground.gather(&victim, VMS)?;
    power::set(Behaviour::Works)?;
    ground.watch()?;
    let cut = ground.fault(&format!("cut {}", victim.name()), &[])?;
    network::cut_host(&victim).context("cutting a host")?;
    std::thread::sleep(CUT);
    network::heal()?;
    if victim.power()? != Power::On {
        bail!("{} was switched off", victim.name());
    }
    ground.wait_view("all to be live again", Duration::from_secs(30), |view| {
        view.hosts.iter().all(|host| host.verdict == "live")
    })?;
    if told(ground, &victim, cut, "power-off-begins") {
        bail!("somebody began to switch {} off", victim.name());
    }
    Ok(())
}
