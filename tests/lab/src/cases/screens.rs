//! Guests without an agent that paint what failed systems show, in text and in graphics: found, classified, and helped or not.
//!
//! ```text
//!  boot sector ─► Windows' stop screen, a boot loader's prompt ─┐  looked at every 2 s      stop screen: reset once, then the limit
//!  empty disk  ─► the firmware's own last word ─────────────────┴─► class and line ──────►  the others: told, left alone
//! ```

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::ground::seconds;
use super::guests::{USUAL, set_policy};
use super::{Ground, failures};
use crate::agents::{self, Note};
use crate::boot_sector::{self, Mode, Paint, disk};
use crate::guest::{Accelerator, Guest};
use crate::host::Host;
use crate::judge::Moment;

const ORDER: Duration = Duration::from_secs(60);
/// From the start to the note, with the firmware's time on a busy machine.
const FOUND: Duration = Duration::from_secs(40);
/// After everything was found: nothing more may come.
const QUIET: Duration = Duration::from_secs(8);
/// One reset, and then no more.
const POLICY: &str = "[limits]\nresets_per_hour = 1\nbackoff_s = 0\n[[monitor]]\nvm = \"screen-*\"\nscreen_s = 2\n";

const STOP: &str = "A problem has been detected and Windows has been shut down to prevent damage
to your computer.

If this is the first time you've seen this Stop error screen,
restart your computer. If this screen appears again, follow
these steps:

Check for viruses on your computer. Remove any newly installed
hard drives or hard drive controllers. Check your hard drive
to make sure it is properly configured and terminated.
Run CHKDSK /F to check for hard drive corruption, and then
restart your computer.

Technical information:

*** STOP: 0x0000007B (0xF78D2524,0xC0000034,0x00000000,0x00000000)
";
const STOP_CODE: &str = "
    :(

    Your PC ran into a problem and needs to restart. We're just
    collecting some error info, and then we'll restart for you.

    100% complete

    For more information about this issue and possible fixes, visit
    https://www.windows.com/stopcode

    If you call a support person, give them this info:
    Stop code: INACCESSIBLE_BOOT_DEVICE
";
const GRUB: &str = "GRUB loading.
Welcome to GRUB!

error: unknown filesystem.
Entering rescue mode...
grub rescue> ";
const NO_DEVICE: &str = "SeaBIOS (version 1.16.3-debian-1.16.3-2)

Booting from Hard Disk...
Boot failed: not a bootable disk

No bootable device.
";

/// What follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Reset,
    Nothing,
}

/// A guest: what it shows, and what is to be made of it.
struct Painted {
    name: &'static str,
    /// None: an empty disk.
    disk: Option<(Mode, Paint, &'static str)>,
    class: &'static str,
    line: &'static str,
    then: Then,
}

const fn painted(
    name: &'static str,
    disk: Option<(Mode, Paint, &'static str)>,
    (class, line, then): (&'static str, &'static str, Then),
) -> Painted {
    Painted { name, disk, class, line, then }
}

const ALL: [Painted; 6] = [
    painted(
        "screen-stop-text",
        Some((Mode::Text, Paint::Blue, STOP)),
        ("Windows stop screen", "*** STOP: 0x0000007B (0xF78D2524,0xC0000034,0x00000000,0x00000000)", Then::Reset),
    ),
    painted(
        "screen-stop-picture",
        Some((Mode::Graphics, Paint::Blue, STOP_CODE)),
        ("Windows stop screen", "Stop code: INACCESSIBLE_BOOT_DEVICE", Then::Reset),
    ),
    painted(
        "screen-grub-text",
        Some((Mode::Text, Paint::Dark, GRUB)),
        ("boot loader", "error: unknown filesystem.", Then::Nothing),
    ),
    painted(
        "screen-grub-picture",
        Some((Mode::Graphics, Paint::Dark, GRUB)),
        ("boot loader", "error: unknown filesystem.", Then::Nothing),
    ),
    painted("screen-none-text", None, ("no bootable device", "No bootable device.", Then::Nothing)),
    painted(
        "screen-none-picture",
        Some((Mode::Graphics, Paint::Dark, NO_DEVICE)),
        ("no bootable device", "No bootable device.", Then::Nothing),
    ),
];

pub fn all(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    ground.watch()?;
    set_policy(&host, &format!("{USUAL}{POLICY}"))?;
    for one in &ALL {
        let bytes = one.disk.map_or_else(|| vec![0; boot_sector::DISK], |(mode, paint, text)| disk(mode, paint, text));
        fs::write(ground.lab().store().join(Guest::new(one.name)?.disk()), bytes)?;
        define(ground, &host, one.name)?;
    }
    let began = Moment::now();
    for one in &ALL {
        agents::ask(&host, ORDER, &["virsh", "-q", "start", one.name])?;
    }
    let mut took = Vec::new();
    for one in &ALL {
        let kind = if one.then == Then::Reset { "guest-remedy" } else { "guest-screen" };
        let is = |note: &Note| note.kind == kind && note.vm.as_deref() == Some(one.name);
        let note = ground.wait_note(began, &format!("what {} shows", one.name), FOUND, is)?;
        let expected = format!("{} ({})", one.class, one.line);
        if !note.text.contains(&expected) {
            bail!("{} was to be found as {expected}, not: {}", one.name, note.text);
        }
        took.push(note.at().since(began));
    }
    took.sort_unstable();
    ground.figure(format!("found {} to {} after the first start", seconds(took[0]), seconds(took[ALL.len() - 1])));
    for one in ALL.iter().filter(|one| one.then == Then::Reset) {
        let is = |note: &Note| note.kind == "guest-needs-attention" && note.vm.as_deref() == Some(one.name);
        ground.wait_note(began, &format!("the limit of {}", one.name), FOUND, is)?;
        kept(&host, one)?;
    }
    std::thread::sleep(QUIET);
    let notes = agents::all_notes(&ground.hosts_on(), Moment::now().since(began));
    for one in &ALL {
        let count = |kind: &str| {
            let is = |note: &&Note| began <= note.at() && note.kind == kind && note.vm.as_deref() == Some(one.name);
            notes.iter().filter(is).count()
        };
        let expected = if one.then == Then::Reset { (1, 0) } else { (0, 1) };
        let found = (count("guest-remedy"), count("guest-screen"));
        if found != expected {
            bail!("{}: resets and notes were to be {expected:?}, not {found:?}", one.name);
        }
    }
    for one in &ALL {
        agents::ask(&host, ORDER, &["virsh", "-q", "destroy", one.name])?;
        agents::ask(&host, ORDER, &["virsh", "-q", "undefine", one.name])?;
    }
    set_policy(&host, USUAL)
}

/// What was kept before the reset says the same.
fn kept(host: &Host, one: &Painted) -> Result<()> {
    let all = failures::of(host, one.name)?;
    let failure = all.last().with_context(|| format!("no failure of {} is kept", one.name))?;
    let (class, text) = (&failure.class, if one.name.ends_with("picture") { "picture-text" } else { "screen" });
    let has = |name: &str| failure.files.iter().any(|file| file.file == name);
    if (class.kind.as_str(), class.line.as_str(), failure.outcome.as_str()) != ("stop-screen", one.line, "done")
        || !has("picture")
        || !has(text)
    {
        bail!("{}: another failure is kept: {}", one.name, all.len());
    }
    Ok(())
}

fn define(ground: &Ground, host: &Host, name: &str) -> Result<()> {
    let kind = match ground.lab().accelerator() {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let guest = Guest::new(name)?;
    let (uuid, disk) = (guest.uuid(), guest.disk());
    let xml = format!(
        "<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native'/>
      <source file='/srv/shared/{disk}'/>
      <target dev='hda' bus='ide'/>
    </disk>
    <video><model type='vga'/></video>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"
    );
    guest.define_by(host, &xml)
}
