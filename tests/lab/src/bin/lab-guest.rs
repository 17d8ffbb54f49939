//! The whole system inside a lab guest: `/init` of its initramfs, the only program there.
//!
//! ```text
//! mount /proc, /sys, /dev ──► load /modules/* in order ──► "up BOOT" on the console ──► write /dev/vda every 100 ms
//!                                                             │
//!                                     power button pressed ───┴──► power off
//!                                     command sector ────────────► power off, reboot, crash, report, ask VM, stream, or, until
//!                                                                  the next boot: be busy, spin deaf, hang, lose the agent, flood
//! ```
//!
//! With "debian" on the kernel's command line the system on /dev/vdb takes over after the modules.
//!
//! Its disk is described in `guest_disk.rs`, what it says to the host in `guest_talk`. It goes on after a failed write (and says so once on the console), as a
//! system with an error on its disk might. Built statically by `guest.rs` with a single call of rustc, hence `std` only.

#[path = "../guest_disk.rs"]
#[allow(dead_code, reason = "the judge's half is not used here")]
mod guest_disk;
mod guest_talk;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use guest_disk::{
    COMMAND_SECTOR, HEAD_SECTOR, KEPT_BYTES, KEPT_SECTOR, PERIOD_MS, Place, Record, SECTOR, Sector, Stamp, parse,
    ring_sector,
};

const AGENT: &str = "/mainstay-guest";
const SIGKILL: i32 = 9;
const SIGSTOP: i32 = 19;
const O_DIRECT: i32 = 0o40000;
const O_SYNC: i32 = 0o4010000;
const MS_MOVE: u64 = 8192;
const RB_POWER_OFF: i32 = 0x4321_fedc;
const RB_AUTOBOOT: i32 = 0x0123_4567;
const RB_KEXEC: i32 = 0x4558_4543;
const SYS_KEXEC_LOAD: i64 = 246;
const SYS_FINIT_MODULE: i64 = 313;
const CLOCK_BOOTTIME: i32 = 7;
/// Failed writes that are remembered: a minute of them.
const TRIED: usize = 600;

unsafe extern "C" {
    fn mount(source: *const i8, target: *const i8, kind: *const i8, flags: u64, data: *const i8) -> i32;
    fn reboot(how: i32) -> i32;
    fn kill(pid: i32, signal: i32) -> i32;
    fn sync();
    fn syscall(number: i64, ...) -> i64;
    fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
}

fn main() {
    if std::process::id() != 1 {
        eprintln!("lab-guest is the init of a lab guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    std::panic::set_hook(Box::new(|what| {
        say(&format!("guest panics: {what}"));
        std::thread::sleep(Duration::from_secs(1));
    }));
    for (kind, target) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        // SAFETY: the strings are constants with a terminating zero; no data is passed.
        unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    }
    load_modules();
    if std::env::args().any(|arg| arg == "debian") {
        let why = start_system();
        say(&format!("no system: {why}"));
        end_with(RB_POWER_OFF);
    }
    std::thread::spawn(watch_power_button);
    std::thread::spawn(run_agent);
    let boot = boot_id();
    // The kernel passes on what it does not know itself: "once" on its command line is a try of the machine.
    if std::env::args().any(|arg| arg == "once") {
        say(&format!("up {}", hex(&boot)));
        end_with(RB_AUTOBOOT);
    }
    if std::env::args().any(|arg| arg == "panics") {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_secs(2)); // Its agent is heard before.
            crash()
        });
    }
    let Some(disk) = open_disk() else {
        say(&format!("up {} without a disk", hex(&boot)));
        loop {
            std::thread::park();
        }
    };
    say(&format!("up {}", hex(&boot)));
    write_for_ever(&disk, boot);
}

/// The system on the second disk takes over. Returns only when that fails.
fn start_system() -> io::Error {
    use std::os::unix::process::CommandExt;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        // SAFETY: the strings are constants with a terminating zero; no data is passed.
        let done = unsafe { mount(c"/dev/vdb".as_ptr(), c"/root".as_ptr(), c"ext4".as_ptr(), 0, std::ptr::null()) };
        if done == 0 {
            break;
        }
        if deadline < Instant::now() {
            return io::Error::last_os_error();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let moved = std::env::set_current_dir("/root").and_then(|()| {
        // SAFETY: as above.
        match unsafe { mount(c".".as_ptr(), c"/".as_ptr(), std::ptr::null(), MS_MOVE, std::ptr::null()) } {
            0 => std::os::unix::fs::chroot("."),
            _ => Err(io::Error::last_os_error()),
        }
    });
    match moved {
        Ok(()) => Command::new("/sbin/init").exec(),
        Err(why) => why,
    }
}

/// Modules are named in the order of loading (`00-virtio.ko`, …). One that is not needed here may fail.
fn load_modules() {
    let Ok(list) = std::fs::read_dir("/modules") else { return };
    let mut paths: Vec<_> = list.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if let Err(err) = load_module(&path) {
            say(&format!("module {}: {err}", path.display()));
        }
    }
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open for the call, the options are an empty constant string.
    let done = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The disk appears shortly after its driver.
fn open_disk() -> Option<File> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let disk = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT | O_SYNC).open("/dev/vda");
        match disk {
            Ok(disk) => return Some(disk),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => return None,
        }
    }
}

#[repr(align(4096))]
struct Buffer([u8; SECTOR]);

#[repr(align(4096))]
struct Kept([u8; KEPT_BYTES]);

fn write_for_ever(disk: &File, boot: [u8; 16]) -> ! {
    let mut writer = Writer { boot, last: None, tried: Vec::new() };
    let mut failing = false;
    let mut due = Instant::now();
    loop {
        match writer.write(disk) {
            Ok(()) => failing = false,
            Err(err) if !failing => {
                failing = true;
                say(&format!("disk: {err}"));
            }
            Err(_) => {}
        }
        due += Duration::from_millis(PERIOD_MS);
        match due.checked_duration_since(Instant::now()) {
            Some(left) => std::thread::sleep(left),
            None => due = Instant::now(), // Late (frozen, or a slow disk): no burst to catch up.
        }
    }
}

struct Writer {
    boot: [u8; 16],
    /// Our last whole write.
    last: Option<Stamp>,
    /// Writes that failed since then; any may have landed all the same, or may still do so.
    tried: Vec<Stamp>,
}

impl Writer {
    fn write(&mut self, disk: &File) -> io::Result<()> {
        let mut buffer = Box::new(Buffer([0; SECTOR]));
        disk.read_exact_at(&mut buffer.0, COMMAND_SECTOR * SECTOR as u64)?;
        self.obey(disk, &buffer.0)?;
        disk.read_exact_at(&mut buffer.0, HEAD_SECTOR * SECTOR as u64)?;
        let head = match parse(&buffer.0, Place::Head) {
            Sector::Record(record) => record,
            Sector::Empty => Record::default(),
            Sector::Broken => {
                say("the head of the disk is broken");
                Record::default()
            }
        };

        let expected = self.last.is_none() || self.last == Some(head.stamp) || self.tried.contains(&head.stamp);
        let counter = if expected { head.stamp.counter } else { self.last.unwrap_or_default().counter } + 1;
        let stamp = Stamp { boot: self.boot, counter, uptime_ns: uptime_ns() };
        let record = Record { stamp, previous: head.stamp, conflicts: head.conflicts + u64::from(!expected) };
        if !expected {
            say(&format!("another writer: {} {}", hex(&head.stamp.boot), head.stamp.counter));
        }
        if TRIED < self.tried.len() {
            self.tried.remove(0);
        }
        self.tried.push(stamp);
        for (place, sector) in [(Place::Ring, ring_sector(counter)), (Place::Head, HEAD_SECTOR)] {
            buffer.0 = record.to_bytes(place);
            disk.write_all_at(&buffer.0, sector * SECTOR as u64)?;
        }
        self.last = Some(stamp);
        self.tried.clear();
        Ok(())
    }

    /// Does what the command sector says, after clearing it.
    fn obey(&self, disk: &File, command: &[u8]) -> io::Result<()> {
        let end = command.iter().position(|b| *b == 0).unwrap_or(command.len());
        let word = &command[..end];
        if word.is_empty() {
            return Ok(());
        }
        let zeros = Box::new(Buffer([0; SECTOR]));
        disk.write_all_at(&zeros.0, COMMAND_SECTOR * SECTOR as u64)?;
        match word {
            b"poweroff" => end_with(RB_POWER_OFF),
            b"reboot" => reboot_keeping(disk),
            b"crash" => crash(),
            b"report" => aside(|| guest_talk::report("asked by the lab", &["reset"])),
            b"stream" => aside(guest_talk::stream),
            b"tally" => aside(guest_talk::end_stream),
            b"status" => aside(guest_talk::waiting),
            b"spin" => spin(),
            b"hang" => {
                say("hanging");
                signal_agent(SIGSTOP);
                loop {
                    std::thread::park();
                }
            }
            b"mute" => {
                say("muted");
                signal_agent(SIGKILL);
                Ok(())
            }
            flood if flood.starts_with(b"flood ") => {
                signal_agent(SIGKILL);
                let kind = String::from_utf8_lossy(&flood[6..]).into_owned();
                aside(move || guest_talk::flood(&kind))
            }
            ask if ask.starts_with(b"ask ") => {
                let words = String::from_utf8_lossy(&ask[4..]).into_owned();
                aside(move || guest_talk::ask(&words))
            }
            ask if ask.starts_with(b"later ") => {
                let words = String::from_utf8_lossy(&ask[6..]).into_owned();
                say("later");
                aside(move || {
                    std::thread::sleep(Duration::from_secs(4));
                    guest_talk::ask(&words);
                })
            }
            b"busy" => aside(|| {
                loop {
                    std::hint::spin_loop();
                }
            }),
            other => {
                say(&format!("unknown command {}", String::from_utf8_lossy(other)));
                Ok(())
            }
        }
    }
}

fn aside(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::spawn(work);
    Ok(())
}

fn crash() -> io::Result<()> {
    say("crashing");
    std::fs::write("/proc/sysrq-trigger", "c")
}

/// Mainstay's agent, where the machine has its channel.
fn run_agent() {
    if guest_talk::has_port() {
        guest_talk::bring_back(&open_disk().map(|disk| take_kept(&disk)).unwrap_or_default());
        say("agent starts");
        let ended = Command::new(AGENT).args(["run", "--state", guest_talk::STATE]).status();
        say(&format!("the agent ended: {ended:?}"));
    }
}

/// What an earlier boot has kept, which is then gone.
fn take_kept(disk: &File) -> Vec<u8> {
    let mut buffer = Box::new(Kept([0; KEPT_BYTES]));
    let at = KEPT_SECTOR * SECTOR as u64;
    if disk.read_exact_at(&mut buffer.0, at).is_err() {
        return Vec::new();
    }
    let length = u64::from_le_bytes(buffer.0[..8].try_into().expect("8 bytes")) as usize;
    let kept = buffer.0.get(8..8 + length).unwrap_or_default().to_vec();
    buffer.0.fill(0);
    let _ = disk.write_all_at(&buffer.0[..SECTOR], at);
    kept
}

/// Keeps what the agent, which dies, would find on a disk of its own; then boots anew.
fn reboot_keeping(disk: &File) -> ! {
    signal_agent(SIGKILL);
    let kept = guest_talk::kept();
    let mut buffer = Box::new(Kept([0; KEPT_BYTES]));
    if kept.len() + 8 <= KEPT_BYTES {
        buffer.0[..8].copy_from_slice(&(kept.len() as u64).to_le_bytes());
        buffer.0[8..8 + kept.len()].copy_from_slice(&kept);
        let _ = disk.write_all_at(&buffer.0, KEPT_SECTOR * SECTOR as u64);
    }
    end_with(RB_AUTOBOOT)
}

/// The guest's CPU does nothing but this until it is reset, with its interrupts off: a "kernel" of two instructions takes over from
/// Linux, since a program may not switch them off.
fn spin() -> io::Result<()> {
    const CODE: [u8; 3] = [0xfa, 0xeb, 0xfe]; // cli; here: jmp here
    const AT: usize = 1 << 20; // Any page of memory does; entered in 64-bit mode, where it is mapped to itself.
    const PAGE: usize = 4096;
    let segment = Segment { from: CODE.as_ptr(), length: CODE.len(), to: AT, room: PAGE };
    // SAFETY: `segment` has the layout of a kexec_segment; it and the code outlive the call, which copies both.
    if unsafe { syscall(SYS_KEXEC_LOAD, AT, 1_usize, &raw const segment, 0_usize) } < 0 {
        let why = io::Error::last_os_error();
        say(&format!("cannot spin: {why}"));
        return Err(why);
    }
    say("spinning");
    end_with(RB_KEXEC)
}

/// What Linux calls a kexec_segment.
#[repr(C)]
struct Segment {
    from: *const u8,
    length: usize,
    to: usize,
    room: usize,
}

/// All that has the agent's name as its first argument.
fn signal_agent(signal: i32) {
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.starts_with(AGENT.as_bytes()) {
            // SAFETY: a plain call; the process is not ours to be disturbed by it, or gone.
            unsafe { kill(pid, signal) };
        }
    }
}

/// `virsh shutdown` presses the power button: key 116 of some input device.
fn watch_power_button() {
    const EVENT_BYTES: usize = 24; // struct input_event: time 16, type 2, code 2, value 4.
    let Ok(list) = std::fs::read_dir("/dev/input") else { return say("no power button") };
    for path in list.flatten().map(|entry| entry.path()) {
        let Ok(mut device) = File::open(&path) else { continue };
        std::thread::spawn(move || {
            let mut event = [0; EVENT_BYTES];
            while device.read_exact(&mut event).is_ok() {
                let is_key = u16::from_le_bytes([event[16], event[17]]) == 1;
                let code = u16::from_le_bytes([event[18], event[19]]);
                if is_key && code == 116 && event[20] == 1 {
                    say("power button");
                    end_with(RB_POWER_OFF);
                }
            }
        });
    }
}

fn end_with(how: i32) -> ! {
    // SAFETY: plain calls without pointers; the disk is written synchronously, nothing else is kept.
    unsafe {
        sync();
        reboot(how);
    }
    loop {
        std::thread::park();
    }
}

/// The kernel's random boot id. Early in a boot its randomness may be poor, so the clocks are mixed in.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    let day = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    for (byte, mix) in id.iter_mut().zip((day ^ u128::from(uptime_ns()) << 64).to_le_bytes()) {
        *byte ^= mix;
    }
    id
}

fn uptime_ns() -> u64 {
    let mut time = [0; 2];
    // SAFETY: `time` has the layout of a timespec on 64-bit Linux and outlives the call.
    unsafe { clock_gettime(CLOCK_BOOTTIME, &mut time) };
    time[0] as u64 * 1_000_000_000 + time[1] as u64
}

/// A line on the serial console.
fn say(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(format!("{line}\n").as_bytes());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
