//! A guest with a whole system: a unit that fails, file systems that stand still, and an orderly end, by its agent.
//!
//! ```text
//!   "fail" ─► systemd ─► agent: unit/failed ─► rule ─► reset ─► boots anew
//!   mainstayd stopped, the lab in its place on the channel: Freeze ─► no file is written ─► Thaw, or its time is over ─► written
//!                                                           ShutDown ─► off
//! ```
//!
//! The lab plays the host, since mainstayd has no order of people that leads to a freeze.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mainstay_guest::frame::{Decoder, encode};
use mainstay_guest::message::{FromGuest, HostHello, Order, ToGuest};

use super::{Console, ORDER, Talker, clear, demand, often, set_policy};
use crate::agents;
use crate::cases::Ground;
use crate::guest::Guest;
use crate::guest_debian;
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;

const NAME: &str = "debian";
/// systemd on one emulated CPU.
const BOOT: Duration = Duration::from_secs(120);
/// From the failed unit to the reset: the agent looks at most twice a second.
const LIMIT: Duration = Duration::from_secs(2);
/// The agent inside, at most since its start.
const RESIDENT_KIB: u64 = 4096;
const RULE: &str = "[[rule]]\nkind = \"unit/failed\"\nthen = { own = \"reset\" }\n";
/// A freeze without a thaw ends by itself.
const FROZEN: Duration = Duration::from_secs(3);
const HEARD: &str = "the host listens";

pub fn debian(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    ground.watch()?;
    let made = Instant::now();
    let image = guest_debian::image(ground.lab().root())?;
    ground.figure(format!("image {:.0} s", made.elapsed().as_secs_f64()));
    set_policy(&host, &format!("{RULE}{}", often("")))?;
    let guest = Guest::new(NAME)?;
    guest.make_new_disk(&ground.lab().store())?;
    guest.define_debian(&host, ground.lab().accelerator(), &ground.lab().store(), &image)?;
    guest.start(&host)?;
    let started = Instant::now();
    let debian = Talker { guest, host, console: Console::of(&host, NAME)? };
    heard(&debian, 1)?;
    ground.figure(format!("heard {:.0} s after its start", started.elapsed().as_secs_f64()));

    unit_fails(ground, &debian)?;
    agents::ask(&host, ORDER, &["systemctl", "stop", "mainstayd.service"])?;
    let ordered = orders(ground, &debian);
    agents::ask(&host, ORDER, &["systemctl", "start", "mainstayd.service"])?;
    ordered?;
    clear(ground)?;
    std::fs::remove_file(ground.lab().store().join(format!("{NAME}-root.raw"))).context("removing its disk")
}

/// In so many boots.
fn heard(debian: &Talker, boots: usize) -> Result<()> {
    wait(BOOT, "the Debian guest to hear its host and to write", || {
        let text = debian.console.text();
        let last = text.rsplit("\nup ").next().unwrap_or_default();
        let whole = debian.console.count("up ") == boots && text.matches(HEARD).count() >= boots;
        Ok((whole && last.contains("wrote ")).then_some(()))
    })
}

fn unit_fails(ground: &mut Ground, debian: &Talker) -> Result<()> {
    let began = Moment::now();
    debian.tell(ground, "fail")?;
    let marked = debian.console.wait_more("failing", 0)?;
    let is = |note: &agents::Note| note.kind == "guest-remedy" && note.vm.as_deref() == Some(NAME);
    let note = ground.wait_note(began, "the reset", ORDER, is)?;
    demand(note.text.contains("unit/failed: lab-fails.service has failed"), &note.text)?;
    let took = Duration::from_millis(note.unix_ms.saturating_sub(marked));
    ground.within("reset after a unit that failed", took, LIMIT)?;
    let [resident] = debian.console.numbers("resident ")?[..] else { bail!("one number") };
    ground.figure(format!("agent at most {resident} KiB resident of {RESIDENT_KIB}"));
    demand(resident <= RESIDENT_KIB, "the agent inside is larger than it may be")?;
    heard(debian, 2)
}

fn orders(ground: &mut Ground, debian: &Talker) -> Result<()> {
    let mut line = Line::to(&debian.host)?;
    line.ask(Order::Freeze { within_s: 60 })?;
    let still = debian.console.count("wrote ");
    std::thread::sleep(FROZEN);
    // One may have been on its way.
    demand(debian.console.count("wrote ") <= still + 1, "it wrote while its file systems stood still")?;
    line.ask(Order::Thaw)?;
    let still = debian.console.count("wrote ");
    debian.console.wait_more("wrote ", still)?;
    let within_s = u16::try_from(FROZEN.as_secs())?;
    line.ask(Order::Freeze { within_s })?;
    let (frozen, still) = (Instant::now(), debian.console.count("wrote "));
    debian.console.wait_more("wrote ", still + 1)?;
    let stood = frozen.elapsed();
    demand(FROZEN / 2 <= stood, &format!("it stood still for {stood:?} only"))?;
    ground.within("a freeze that nobody ends", stood, FROZEN + LIMIT)?;
    line.ask(Order::ShutDown)?;
    let asked = Instant::now();
    wait(BOOT, "the guest to be off", || {
        let state = agents::ask(&debian.host, ORDER, &["virsh", "domstate", NAME])?;
        Ok((state.trim() == "shut off").then_some(()))
    })?;
    ground.figure(format!("off {:.1} s after it was asked to shut down", asked.elapsed().as_secs_f64()));
    Ok(())
}

/// The lab in the place of mainstayd.
struct Line {
    stream: UnixStream,
    decoder: Decoder,
    asked: u64,
}

impl Line {
    fn to(host: &Host) -> Result<Line> {
        let xml = agents::ask(host, ORDER, &["virsh", "dumpxml", NAME])?;
        let mut paths = xml.split('\'').filter(|text| text.ends_with("/org.mainstay.guest.0"));
        let path = paths.next_back().context("the definition names no socket")?;
        let path = host.root_inside()?.join(path.trim_start_matches('/'));
        let stream = UnixStream::connect(&path).with_context(|| format!("connecting to {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut line = Line { stream, decoder: Decoder::default(), asked: 0 };
        line.say(&ToGuest::Hello(HostHello { protocol: mainstay_guest::PROTOCOL, vm: NAME.to_owned() }))?;
        Ok(line)
    }

    fn say(&mut self, message: &ToGuest) -> Result<()> {
        Ok(self.stream.write_all(&encode(message)?)?)
    }

    /// Asks, and waits until it is done.
    fn ask(&mut self, order: Order) -> Result<()> {
        self.asked += 1;
        self.say(&ToGuest::Ask { ask: self.asked, order })?;
        let until = Instant::now() + ORDER;
        let mut chunk = [0; 4096];
        while Instant::now() < until {
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("the guest's channel was closed"),
                Ok(length) => self.decoder.push(&chunk[..length]),
                Err(why) if why.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(why) => return Err(why).context("reading the guest's channel"),
            }
            while let Some(said) = self.decoder.take::<FromGuest>()? {
                match said {
                    FromGuest::Outcome { ask, result } if ask == self.asked => {
                        return result.map_err(|why| anyhow::anyhow!("{order:?}: {why}"));
                    }
                    _ => {}
                }
            }
        }
        bail!("{order:?}: no answer within {} s", ORDER.as_secs())
    }
}
