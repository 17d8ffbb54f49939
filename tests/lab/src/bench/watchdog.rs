//! `cargo lab bench watchdog`: a machine whose guard dies together with its parent is reset by its watchdog, in time.
//!
//! ```text
//! QEMU with an i6300esb ─► Debian's kernel ─► watchdog-init.sh ─► mainstay-guard, which opens /dev/watchdog
//!
//!   kill   SIGKILL to child and parent at once ──► reset within the time-out that the guard set
//!   hang   SIGSTOP to both                     ──► the same
//!   stop   SIGTERM: a planned stop             ──► the watchdog stands still, no reset
//! ```
//!
//! Before that the guard rests for more than two time-outs, through which it must keep the machine alive. Neither systemd nor libvirt
//! is there to help: what is shown is the last line of defence alone. QEMU ends at a reset, and that is what is measured.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::command::{check, run};
use crate::initramfs::{Archive, find};
use crate::{packages, product, root};

const INIT: &str = include_str!("watchdog-init.sh");
const CONFIG: &str = "[guard]\nwatchdog = \"/dev/watchdog\"\n";
/// In the order of loading.
const MODULES: [&str; 2] = ["watchdog", "i6300esb"];
/// The guard rests for so long, which is more than two of the time-outs that it sets (4 s by the default profile).
const REST: Duration = Duration::from_secs(10);
/// From QEMU's start to a guard that is up, translated instruction by instruction on a busy machine.
const BOOT: Duration = Duration::from_secs(180);
/// Lines of ours on the console begin so.
const PREFIX: &str = "watchdog-test: ";
/// The device counts in two halves of whole seconds, and QEMU takes its time to end.
const GRACE: Duration = Duration::from_secs(1);

/// Runs all three, and prints what was measured.
pub fn watchdog(json: bool) -> Result<()> {
    packages::for_lab()?;
    let root = root::ensure()?;
    let folder = tempfile::tempdir()?;
    machine(folder.path())?;
    let mut found = serde_json::Map::new();
    for test in ["kill", "hang", "stop"] {
        let outcome = once(&root, folder.path(), test).with_context(|| format!("test {test}"))?;
        eprintln!("{test}: {outcome}");
        found.insert(test.to_owned(), outcome);
    }
    if json {
        println!("{}", json!(found));
    }
    Ok(())
}

/// Kernel and initramfs of the machine.
fn machine(folder: &Path) -> Result<()> {
    let unpacked = folder.join("unpacked");
    let depends = run("apt-cache", ["depends", "linux-image-amd64"])?;
    let mut names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let kernel = names.next().context("apt knows no linux-image-amd64, whose kernel has the watchdog's driver")?;
    check(Command::new("apt-get").args(["--quiet", "download", kernel, "busybox-static"]).current_dir(folder))?;
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.path().extension().is_some_and(|end| end == "deb") {
            check(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&unpacked))?;
        }
    }
    let image = fs::read_dir(unpacked.join("boot"))?.flatten().map(|entry| entry.path());
    let image =
        image.into_iter().find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz")));
    fs::rename(image.context("no vmlinuz in the kernel's package")?, folder.join("vmlinuz"))?;
    let mut archive = Archive::default();
    for name in ["bin", "dev", "etc", "etc/mainstay", "modules", "proc", "sbin", "sys", "run", "tmp", "var", "var/lib"]
    {
        archive.folder(name);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("etc/mainstay/mainstay.toml", 0o644, CONFIG.as_bytes());
    archive.file("bin/busybox", 0o755, &fs::read(unpacked.join("bin/busybox"))?);
    for (n, module) in MODULES.iter().enumerate() {
        match find(&unpacked, &format!("{module}.ko"))? {
            Some(file) => archive.file(&format!("modules/{n}-{module}.ko"), 0o644, &fs::read(file)?),
            None => bail!("{kernel} has no module {module}"),
        }
    }
    let guard = product::build()?.binary("mainstay-guard")?;
    archive.file("bin/mainstay-guard", 0o755, &fs::read(&guard)?);
    for library in libraries(&guard)? {
        let name = library.strip_prefix("/")?.display().to_string();
        name.match_indices('/').for_each(|(end, _)| archive.folder(&name[..end]));
        archive.file(&name, 0o755, &fs::read(&library)?);
    }
    fs::write(folder.join("initrd"), archive.finish())?;
    Ok(())
}

/// What a program is linked with, where its loader looks for it.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = check(Command::new("ldd").arg(program))?;
    let paths = listed.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

/// One boot, to its reset, or to the end of the time in which none may come.
fn once(root: &Path, folder: &Path, test: &str) -> Result<serde_json::Value> {
    let mut machine = Machine::start(root, folder, test)?;
    machine.wait("up", BOOT)?;
    machine.wait("alive", REST * 2).context("its guard must keep it alive")?;
    let ended = machine.wait("ended", REST)?;
    let limit = machine.time_out()?;
    let reset = machine.wait_reset(ended, limit * 3);
    match (test, reset) {
        ("stop", None) => Ok(json!({"time_out_s": limit.as_secs(), "not_reset_for_s": 3 * limit.as_secs()})),
        ("stop", Some(after)) => bail!("reset {after:?} after a planned stop"),
        (_, Some(after)) if after <= limit + GRACE => {
            Ok(json!({"time_out_s": limit.as_secs(), "reset_after_s": after.as_millis() as f64 / 1000.0}))
        }
        (_, Some(after)) => bail!("reset only after {after:?}; the guard had set {limit:?}"),
        (_, None) => bail!("not reset within {:?}; the guard had set {limit:?}", limit * 3),
    }
}

/// A running QEMU; it is gone when this is dropped.
struct Machine {
    process: Child,
    lines: Receiver<(Instant, String)>,
    told: Vec<String>,
}

impl Machine {
    /// In a container of the hosts' root, which has QEMU; nothing of it stays.
    fn start(root: &Path, folder: &Path, test: &str) -> Result<Machine> {
        let mut command = Command::new("systemd-nspawn");
        command.args([
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--pipe",
            "--volatile=overlay",
            "--machine=mainstay-watchdog",
        ]);
        command.arg("--directory").arg(root).arg(format!("--bind-ro={}:/mnt", folder.display()));
        let qemu = format!(
            "exec qemu-system-x86_64 -accel tcg -m 512 -nodefaults -display none -no-reboot -device i6300esb \
             -action watchdog=reset -serial stdio -kernel /mnt/vmlinuz -initrd /mnt/initrd \
             -append 'console=ttyS0 quiet test={test} rest={} end' 2>&1",
            REST.as_secs()
        );
        command.args(["sh", "-c", &qemu]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().context("systemd-nspawn")?;
        let console = BufReader::new(process.stdout.take().context("no console")?);
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in console.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if tell.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        Ok(Machine { process, lines, told: Vec::new() })
    }

    /// Waits until it says this word of itself.
    fn wait(&mut self, word: &str, within: Duration) -> Result<Instant> {
        let deadline = Instant::now() + within;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((at, line)) => {
                    let reached = line.starts_with(PREFIX) && line.ends_with(&format!(" {word}"));
                    self.told.push(line);
                    if reached {
                        return Ok(at);
                    }
                }
                Err(why) => bail!("the machine did not say {word:?} ({why}); its console:\n{}", self.told.join("\n")),
            }
        }
    }

    /// What the guard said that it had set.
    fn time_out(&self) -> Result<Duration> {
        let seconds = self.told.iter().find_map(|line| {
            let (_, rest) = line.split_once("resets this host ")?;
            rest.split_once(" s ")?.0.parse().ok()
        });
        let told = || format!("the guard did not say that the watchdog is safe; console:\n{}", self.told.join("\n"));
        Ok(Duration::from_secs(seconds.with_context(told)?))
    }

    /// How long after `since` it was reset, which ends QEMU.
    fn wait_reset(&mut self, since: Instant, within: Duration) -> Option<Duration> {
        loop {
            match self.lines.recv_timeout((since + within).saturating_duration_since(Instant::now())) {
                Ok((_, line)) => self.told.push(line),
                Err(RecvTimeoutError::Disconnected) => return Some(since.elapsed()),
                Err(RecvTimeoutError::Timeout) => return None,
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Not SIGKILL: it would leave the container's QEMU behind.
        if let Ok(pid) = i32::try_from(self.process.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.process.wait();
    }
}
