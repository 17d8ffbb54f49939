//! What the machine needs: installed with apt where it is missing, named where there is no apt.
//!
//! ```text
//! program there? ── yes ──► nothing to do
//!       └ no ──► apt-get there? ── yes ──► apt-get install (apt-get update first if a package is unknown)
//!                     └ no ──► error: names programs and packages
//! ```

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::{check, output};

/// A file that must be there, and the Debian package that has it.
struct Need {
    file: &'static str,
    package: &'static str,
}

/// For running the lab.
const LAB: &[Need] = &[
    Need { file: "bin/systemd-nspawn", package: "systemd-container" },
    Need { file: "bin/nsenter", package: "util-linux" },
    Need { file: "sbin/debootstrap", package: "debootstrap" },
    Need { file: "sbin/ip", package: "iproute2" },
    Need { file: "sbin/nft", package: "nftables" },
    Need { file: "share/keyrings/debian-archive-keyring.gpg", package: "debian-archive-keyring" },
    Need { file: "bin/xz", package: "xz-utils" },
    Need { file: "bin/cc", package: "gcc" },
    Need { file: "lib/x86_64-linux-gnu/libc.a", package: "libc6-dev" },
];

/// For building the product: libvirt's library and its description.
const BUILD: &[Need] = &[
    Need { file: "bin/pkg-config", package: "pkg-config" },
    Need { file: "lib/x86_64-linux-gnu/pkgconfig/libvirt.pc", package: "libvirt-dev" },
    Need { file: "bin/cc", package: "gcc" },
];

/// For the product's own tests.
const TESTS: &[Need] = &[
    Need { file: "bin/dbus-daemon", package: "dbus-daemon" },
    Need { file: "lib/x86_64-linux-gnu/pkgconfig/cbc.pc", package: "coinor-libcbc-dev" },
];

/// Makes sure that the lab can run here.
pub fn for_lab() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the lab makes namespaces, mounts and cgroups: run it as root");
    }
    ensure(LAB)
}

/// Makes sure that the product can be built here.
pub fn for_build() -> Result<()> {
    ensure(BUILD)
}

/// Makes sure that all tests can be built and run here.
pub fn for_tests() -> Result<()> {
    for_lab()?;
    for_build()?;
    ensure(TESTS)
}

fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<_> = needs.iter().filter(|need| !is_there(need.file)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|need| need.package).collect();
    if !is_there("bin/apt-get") {
        let files: Vec<_> = missing.iter().map(|need| need.file).collect();
        bail!("missing: {}; install what Debian calls {}", files.join(", "), packages.join(", "));
    }
    eprintln!("installing {}", packages.join(" "));
    if !all_known(&packages)? {
        check(apt_get().arg("update"))?;
    }
    check(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(&packages))?;
    if let Some(need) = missing.iter().find(|need| !is_there(need.file)) {
        bail!("package {} was installed, but there is no {}", need.package, need.file);
    }
    Ok(())
}

fn is_there(file: &str) -> bool {
    ["/usr", "/", "/usr/local"].iter().any(|prefix| Path::new(prefix).join(file).exists())
}

fn all_known(packages: &[&str]) -> Result<bool> {
    let simulated = output(apt_get().args(["install", "--simulate", "--no-install-recommends"]).args(packages))?;
    Ok(simulated.status.success())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet");
    command
}
