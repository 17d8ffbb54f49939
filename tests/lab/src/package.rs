//! `cargo lab package guest`: packages of the agent for guests, and whether they are what they have to be.
//!
//! ```text
//!  guest-agent/install.txt ─► folder ─┬─ debian/{control,conffiles,postinst,prerm,postrm} ─► dpkg-deb ─► .deb
//!                                     └─ the same files as they lie in guest-agent/, INSTALL ─► tar ─► .tar.gz
//!  check: program (static, small) · contents · install, upgrade, removal in a folder · unit · at rest (bench/guest.rs)
//! ```
//!
//! Plain dpkg-deb and tar, which every Debian has; the program of one file needs nothing that larger tools bring. Not here:
//! the packages for hosts.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{check as done, run};
use crate::product;

/// The program is not larger than this.
pub const MAX_PROGRAM: usize = 3 << 20;

const NAME: &str = "mainstay-guest";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const CONTROL: [(&str, u32); 4] = [("conffiles", 0o644), ("postinst", 0o755), ("prerm", 0o755), ("postrm", 0o755)];
/// What the tar holds, below its one folder, beside the program.
const IN_TAR: [&str; 5] = [
    "INSTALL",
    "guest.toml",
    "init/mainstay-guest.openrc",
    "init/mainstay-guest.sysv",
    "systemd/mainstay-guest.service",
];
/// What the Debian package installs.
const IN_DEB: [(&str, &str); 5] = [
    ("-rwxr-xr-x", "./etc/init.d/mainstay-guest"),
    ("-rw-r--r--", "./etc/mainstay/guest.toml"),
    ("-rwxr-xr-x", "./usr/bin/mainstay-guest"),
    ("-rw-r--r--", "./usr/lib/systemd/system/mainstay-guest.service"),
    ("-rw-r--r--", "./usr/share/doc/mainstay-guest/copyright"),
];
const ENABLED: &str = "etc/systemd/system/multi-user.target.wants/mainstay-guest.service";

/// What can be packaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// The agent for guests
    Guest,
}

/// Packages that were made.
#[derive(Debug)]
pub struct Made {
    /// For Debian.
    pub deb: PathBuf,
    /// For everything else.
    pub tar: PathBuf,
}

/// Builds the agent for guests and makes its packages in this folder.
pub fn guest(to: &Path) -> Result<Made> {
    eprintln!("building {NAME}");
    let product = product::guest_product()?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-agent");
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    let made = Made {
        deb: to.join(format!("{NAME}_{VERSION}_{}.deb", architecture())),
        tar: to.join(format!("{NAME}-{VERSION}-{}-linux.tar.gz", std::env::consts::ARCH)),
    };
    let folder = tempfile::tempdir()?;
    let stage = folder.path().join("deb");
    product.lay_out(&stage)?;
    control(&stage, &sources.join("debian"))?;
    pack_deb(&stage, &made.deb)?;
    let top = folder.path().join(format!("{NAME}-{VERSION}"));
    copy(&product.binary(NAME)?, &top.join(NAME))?;
    IN_TAR.iter().try_for_each(|file| copy(&sources.join(file), &top.join(file)))?;
    copy(&sources.join("../LICENSE"), &top.join("LICENSE"))?;
    pack_tar(&top, &made.tar)?;
    Ok(made)
}

/// As Debian calls this machine.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The part of a Debian package that describes it.
fn control(stage: &Path, sources: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = stage.join("DEBIAN");
    let kib = run("du", ["--summarize", "--apparent-size", "--block-size=1024", &stage.display().to_string()])?;
    let kib = kib.split_whitespace().next().unwrap_or_default();
    fs::create_dir(&folder)?;
    let text = fs::read_to_string(sources.join("control"))?;
    let text = text.replace("@VERSION@", VERSION).replace("@ARCHITECTURE@", architecture());
    fs::write(folder.join("control"), text.replace("@INSTALLED_KIB@", kib))?;
    for (file, mode) in CONTROL {
        copy(&sources.join(file), &folder.join(file))?;
        fs::set_permissions(folder.join(file), fs::Permissions::from_mode(mode))?;
    }
    let sums = run("sh", ["-c", "cd \"$0\" && md5sum $(find usr -type f | sort)", &stage.display().to_string()])?;
    fs::write(folder.join("md5sums"), sums).context("writing md5sums")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to).map(drop).with_context(|| format!("copying {} to {}", from.display(), to.display()))
}

fn pack_deb(stage: &Path, deb: &Path) -> Result<()> {
    readable(stage)?;
    let mut command = Command::new("dpkg-deb");
    done(command.args(["--root-owner-group", "-Zxz", "--build"]).args([stage, deb])).map(drop)
}

fn pack_tar(top: &Path, tar: &Path) -> Result<()> {
    readable(top)?;
    let (Some(folder), Some(name)) = (top.parent(), top.file_name()) else { bail!("{} is no folder", top.display()) };
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--create", "--gzip", "--file"]);
    done(command.arg(tar).arg("--directory").arg(folder).arg(name)).map(drop)
}

/// Whatever the umask was.
fn readable(folder: &Path) -> Result<()> {
    run("chmod", ["--recursive", "u=rwX,go=rX", &folder.display().to_string()]).map(drop)
}

// ---- checks -----------------------------------------------------------------------------------------------------------

/// Whether packages are what they have to be; a line for people.
pub fn check(made: &Made) -> Result<String> {
    let folder = tempfile::tempdir()?;
    contents(made)?;
    let program = unpacked(&made.tar, folder.path())?;
    let bytes = fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    ensure!(!has_interpreter(&bytes)?, "{NAME} is not linked statically: it names an interpreter");
    ensure!(bytes.len() <= MAX_PROGRAM, "{NAME} has {} bytes, at most {MAX_PROGRAM} are allowed", bytes.len());
    installs(&made.deb, &folder.path().join("root"), &bytes)?;
    Ok(format!("program {:.2} MiB, deb {} KiB, tar {} KiB", mib(bytes.len()), kib(&made.deb)?, kib(&made.tar)?))
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn kib(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file)?.len() / 1024)
}

fn contents(made: &Made) -> Result<()> {
    let listed = run("dpkg-deb", ["--contents", &made.deb.display().to_string()])?;
    let files = listed.lines().filter(|line| !line.starts_with('d')).map(|line| line.split_whitespace().collect());
    let found: BTreeSet<Vec<&str>> =
        files.map(|words: Vec<&str>| vec![words[0], words[1], words[words.len() - 1]]).collect();
    let expected = IN_DEB.iter().map(|(mode, path)| vec![*mode, "root/root", *path]).collect();
    ensure!(found == expected, "the deb holds {found:?}, not {expected:?}");
    let odd = listed.lines().find(|line| line.starts_with('d') && !line.starts_with("drwxr-xr-x root/root "));
    ensure!(odd.is_none(), "a folder of the deb is {odd:?}");
    for (field, expected) in [("Package", NAME), ("Version", VERSION), ("Architecture", architecture())] {
        let found = run("dpkg-deb", ["--field", &made.deb.display().to_string(), field])?;
        ensure!(found.trim() == expected, "{field} of the deb is {found:?}, not {expected}");
    }
    let listed = run("tar", ["--list", "--gzip", "--file", &made.tar.display().to_string()])?;
    let found: BTreeSet<String> = listed.lines().filter(|line| !line.ends_with('/')).map(ToOwned::to_owned).collect();
    let expected = IN_TAR.iter().chain(&[NAME, "LICENSE"]).map(|file| format!("{NAME}-{VERSION}/{file}")).collect();
    ensure!(found == expected, "the tar holds {found:?}, not {expected:?}");
    Ok(())
}

/// The program, out of the tar.
pub fn unpacked(tar: &Path, folder: &Path) -> Result<PathBuf> {
    let to = ["--directory", &folder.display().to_string()].map(ToOwned::to_owned);
    done(Command::new("tar").args(["--extract", "--gzip", "--file"]).arg(tar).args(to))?;
    Ok(folder.join(format!("{NAME}-{VERSION}/{NAME}")))
}

/// Whether an ELF program of 64 bits, little endian, has to be started by a dynamic linker.
fn has_interpreter(bytes: &[u8]) -> Result<bool> {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, length: usize| {
        let bytes = bytes.get(at..at + length).context("the program is cut off")?;
        Ok::<_, anyhow::Error>(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "no ELF program of 64 bits");
    let (table, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    for entry in 0..count {
        if number(table + entry * size, 4)? == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Into a folder, with dpkg and the package's own scripts: installed and switched on, upgraded with the administrator's
/// changes kept, removed, purged.
fn installs(deb: &Path, root: &Path, program: &[u8]) -> Result<()> {
    fs::create_dir_all(root.join("var/lib/dpkg/info"))?;
    fs::create_dir(root.join("var/lib/dpkg/updates"))?;
    fs::write(root.join("var/lib/dpkg/status"), "")?;
    let dpkg = |action: &str, what: &str| {
        let mut command = Command::new("dpkg");
        command.arg(format!("--root={}", root.display())).env("DEBIAN_FRONTEND", "noninteractive");
        // What it depends on is not in the folder: its scripts use this machine's.
        command.args(["--force-not-root", "--force-depends", "--force-script-chrootless", "--force-confold"]);
        done(command.args([action, what])).with_context(|| format!("dpkg {action} in a folder"))
    };
    let (deb, on) = (deb.display().to_string(), root.join(ENABLED));
    dpkg("--install", &deb)?;
    ensure!(fs::read(root.join("usr/bin").join(NAME))? == program, "deb and tar hold different programs");
    ensure!(on.is_symlink(), "installing does not switch the service on: there is no {ENABLED}");
    verify_unit(root)?;
    let own = root.join("etc/mainstay/guest.toml");
    fs::write(&own, "kernel_log = false\n")?;
    fs::remove_file(&on)?; // As `systemctl disable` does.
    dpkg("--install", &deb)?;
    ensure!(fs::read_to_string(&own)? == "kernel_log = false\n", "an upgrade writes over the configuration");
    ensure!(!on.is_symlink(), "an upgrade switches the service on again");
    fs::create_dir_all(root.join("var/lib/mainstay-guest"))?;
    dpkg("--remove", NAME)?;
    ensure!(
        own.exists() && !root.join("usr/bin").join(NAME).exists(),
        "removing keeps the program, or no configuration"
    );
    dpkg("--purge", NAME)?;
    let left = run("find", [&root.display().to_string(), "-name", "*mainstay*"])?;
    ensure!(left.is_empty(), "purging leaves {left}");
    Ok(())
}

/// By systemd itself, where it is there.
fn verify_unit(root: &Path) -> Result<()> {
    if !Path::new("/usr/bin/systemd-analyze").exists() {
        return Ok(());
    }
    let unit = fs::read_to_string(root.join("usr/lib/systemd/system/mainstay-guest.service"))?;
    let here = unit.replace("/usr/bin/", &format!("{}/usr/bin/", root.display()));
    let file = root.join("mainstay-guest.service");
    fs::write(&file, here)?;
    let said = crate::command::output(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file))?;
    fs::remove_file(&file)?;
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    let wrong: Vec<&str> = said.lines().filter(|line| line.contains(NAME)).collect();
    ensure!(wrong.is_empty(), "systemd-analyze verify: {}", wrong.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_junk() {
        let me = fs::read(std::env::current_exe().expect("this test")).expect("is a file");
        assert!(has_interpreter(&me).expect("an ELF program"));
        assert!(has_interpreter(b"#!/bin/sh").is_err());
        assert!(has_interpreter(&me[..60]).is_err());
    }

    #[test]
    fn what_is_packaged_is_there() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-agent");
        let list = fs::read_to_string(sources.join("install.txt")).expect("it is there");
        let paths: BTreeSet<String> = list
            .lines()
            .filter(|line| {
                !line.starts_with('#') && line.split_whitespace().count() == 3 && !line.starts_with("enable")
            })
            .filter_map(|line| line.split_whitespace().nth(1).map(|path| format!("./{path}")))
            .collect();
        assert_eq!(paths, IN_DEB.iter().map(|(_, path)| (*path).to_owned()).collect());
        for file in IN_TAR.iter().copied().chain(CONTROL.iter().map(|(file, _)| *file).map(|file| match file {
            "conffiles" => "debian/conffiles",
            "postinst" => "debian/postinst",
            "prerm" => "debian/prerm",
            _ => "debian/postrm",
        })) {
            assert!(sources.join(file).exists(), "{file}");
        }
        let conffiles = fs::read_to_string(sources.join("debian/conffiles")).expect("it is there");
        for path in conffiles.lines() {
            assert!(paths.contains(&format!(".{path}")), "{path} is a conffile, but is not installed");
        }
        let installed_etc = paths.iter().filter(|path| path.starts_with("./etc/")).count();
        assert_eq!(conffiles.lines().count(), installed_etc, "every file in /etc is a conffile");
    }
}
