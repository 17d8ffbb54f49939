//! `cargo lab bench guest`: what the agent inside a guest costs at rest: the packaged program, a terminal in the place of its port.
//!
//! ```text
//!  host's side (reads, says nothing) ◄── beats ── mainstay-guest run     /proc/PID: memory, time of its threads
//! ```

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::package;

/// It is not larger than this in memory, at any time.
const MAX_RESIDENT_KIB: u64 = 4 << 10;
/// It does not take more than this of a processor.
const MAX_CPU_PERCENT: f64 = 0.1;
/// Until it has started and said hello.
const START: Duration = Duration::from_secs(3);

/// What it costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rest {
    /// How long it was looked at.
    pub seconds: u64,
    /// Bytes of the program.
    pub program_bytes: u64,
    /// Resident at the end.
    pub resident_kib: u64,
    /// Resident at most, since its start.
    pub peak_kib: u64,
    /// Of one processor, without its start.
    pub cpu_percent: f64,
}

impl Rest {
    /// Whether it is within its budgets.
    pub fn check(&self) -> Result<()> {
        let Self { peak_kib, cpu_percent, seconds, .. } = self;
        ensure!(*peak_kib <= MAX_RESIDENT_KIB, "{peak_kib} KiB are resident, at most {MAX_RESIDENT_KIB} are allowed");
        ensure!(
            *cpu_percent <= MAX_CPU_PERCENT,
            "{cpu_percent:.3} % of a processor over {seconds} s, at most {MAX_CPU_PERCENT} are allowed"
        );
        Ok(())
    }
}

/// Makes the packages, and prints what their program costs.
pub fn guest(seconds: u64, as_json: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let made = package::guest(folder.path())?;
    let rest = at_rest(&package::unpacked(&made.tar, folder.path())?, seconds)?;
    if as_json {
        println!("{}", serde_json::to_string_pretty(&rest)?);
    } else {
        println!("{} s at rest: {:.3} % of a processor", rest.seconds, rest.cpu_percent);
        println!(
            "resident {} KiB, at most {} KiB; program {} bytes",
            rest.resident_kib, rest.peak_kib, rest.program_bytes
        );
    }
    rest.check()
}

/// Runs this program for so long.
pub fn at_rest(program: &Path, seconds: u64) -> Result<Rest> {
    let folder = tempfile::tempdir()?;
    let (host, port) = terminal()?;
    let (socket, config) = (folder.path().join("socket"), folder.path().join("guest.toml"));
    fs::write(&config, format!("port = {port:?}\n[socket]\npath = {socket:?}\n"))?;
    let read = Arc::new(AtomicUsize::new(0));
    let count = read.clone();
    // It ends with the terminal's other side, which the agent closes.
    std::thread::spawn(move || {
        let (mut host, mut chunk) = (host, [0; 4096]);
        while let Ok(length @ 1..) = host.read(&mut chunk) {
            count.fetch_add(length, Ordering::Relaxed);
        }
    });
    let mut command = Command::new(program);
    command.args(["run", "--config"]).arg(&config).arg("--state").arg(folder.path().join("state"));
    let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut agent = Running(child.with_context(|| format!("running {}", program.display()))?);
    sleep(START);
    let (begun, before, said) = (Instant::now(), agent.cpu()?, read.load(Ordering::Relaxed));
    sleep(Duration::from_secs(seconds));
    let (took, used) = (begun.elapsed(), agent.cpu()?.saturating_sub(before));
    ensure!(said < read.load(Ordering::Relaxed), "it does not beat");
    Ok(Rest {
        seconds,
        program_bytes: fs::metadata(program)?.len(),
        resident_kib: agent.status("VmRSS:")?,
        peak_kib: agent.status("VmHWM:")?,
        cpu_percent: 100.0 * used.as_secs_f64() / took.as_secs_f64(),
    })
}

/// The agent's process; it ends with this.
struct Running(Child);

impl Running {
    /// Of all its threads.
    fn cpu(&mut self) -> Result<Duration> {
        if let Some(status) = self.0.try_wait()? {
            bail!("it has ended with {status}");
        }
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            nanoseconds += text.split_whitespace().next().unwrap_or_default().parse::<u64>().context("schedstat")?;
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// A line of its status, in KiB.
    fn status(&self, name: &str) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name} {line}"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pair of ends, and the name of the second: bytes pass as they are.
fn terminal() -> Result<(File, PathBuf)> {
    let host = File::options().read(true).write(true).open("/dev/ptmx").context("opening /dev/ptmx")?;
    let fd = host.as_raw_fd();
    let mut name = [0_u8; 64];
    // SAFETY: the descriptor is open; the calls write to `name`, of its length, and to `mode`, which is plain data.
    let failed = unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        libc::unlockpt(fd) != 0 || libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()) != 0 || {
            let read = libc::tcgetattr(fd, &mut mode);
            libc::cfmakeraw(&mut mode);
            read != 0 || libc::tcsetattr(fd, libc::TCSANOW, &mode) != 0
        }
    };
    if failed {
        return Err(std::io::Error::last_os_error()).context("making a terminal");
    }
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok((host, PathBuf::from(String::from_utf8_lossy(&name[..length]).into_owned())))
}
