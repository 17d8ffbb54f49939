//! The file system that all hosts share below their overlays, built once and cached.
//!
//! ```text
//! cache::FOLDER
//!   root-HASH/            complete; HASH covers the recipe below, the mirror and the files put in
//!   root-HASH.part/       being built; removed at the next try
//! ```
//!
//! debootstrap (minbase) ──► apt: systemd, libvirt, QEMU (these from backports, pinned by source, so that systemd stays
//! Debian 12's) ──► kernel for the guests, unpacked from its package ──► our configuration files.
//!
//! The mirror is the one that this machine's apt uses, or `MAINSTAY_LAB_MIRROR`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::command::{check, run};

/// Raise it when the recipe changes in a way that the texts below do not show.
const RECIPE: u32 = 1;
const SUITE: &str = "bookworm";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where a root keeps what guests boot, seen by QEMU under the same path in every host.
pub const GUEST_FILES: &str = "usr/share/mainstay-lab";

const PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "libpam-systemd",
    "dbus",
    "polkitd",
    "iproute2",
    "iputils-ping",
    "kmod",
    "procps",
    "libvirt-daemon-system",
    "libvirt-clients",
    "qemu-system-x86",
    "qemu-utils",
    "tesseract-ocr",
];

/// By source package: a blanket preference for backports would bring a newer systemd than Debian 12 users have.
const FROM_BACKPORTS: &str = "Package: src:libvirt src:qemu src:seabios
Pin: release n=bookworm-backports
Pin-Priority: 990
";

/// Files put into the root: path, mode, text.
const FILES: &[(&str, u32, &str)] = &[
    ("etc/apt/preferences.d/mainstay-lab", 0o644, FROM_BACKPORTS),
    (
        "etc/libvirt/qemu.conf",
        0o600,
        "# Files on the lab's datastore belong to root; there is no other user to keep apart.
user = \"root\"
group = \"root\"
security_driver = \"none\"
namespaces = []
",
    ),
    (
        "etc/libvirt/libvirtd.conf",
        0o644,
        "# Migration inside the lab's own network namespace.
auth_tcp = \"none\"
listen_addr = \"0.0.0.0\"
",
    ),
    (
        // libvirt makes scopes for its VMs only if some controller is visible below its own cgroup.
        "etc/systemd/system/libvirtd.service.d/mainstay-lab.conf",
        0o644,
        "[Unit]
StartLimitIntervalSec=0
[Service]
ExecStartPre=-/bin/sh -c 'echo +hugetlb > /sys/fs/cgroup/cgroup.subtree_control'
Environment=LIBVIRTD_ARGS=
",
    ),
    (
        "etc/systemd/system/mainstay-lab-network.service",
        0o644,
        "[Unit]
Description=Address of a lab host
DefaultDependencies=no
Before=network.target network-online.target
Wants=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/lib/mainstay-lab/network
[Install]
WantedBy=multi-user.target network-online.target
",
    ),
    (
        "usr/lib/mainstay-lab/network",
        0o755,
        "#!/bin/sh
# The lab moves eth0 into this host's network namespace shortly after its start.
for try in $(seq 200); do
    ip link show eth0 >/dev/null 2>&1 && break
    sleep 0.05
done
ip link set lo up
ip address replace \"$(cat /etc/mainstay-lab-address)\" dev eth0
ip link set eth0 up
ip route replace 224.0.0.0/4 dev eth0
ip route replace default via 10.77.0.254 dev eth0
",
    ),
];

/// Units that have no use in a container, or disturb there.
const MASKED: &[&str] = &[
    "systemd-udevd.service",
    "systemd-udevd-kernel.socket",
    "systemd-udevd-control.socket",
    "systemd-udev-trigger.service",
    "systemd-networkd.service",
    "systemd-timesyncd.service",
    "systemd-resolved.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "logrotate.timer",
    "getty@.service",
    "console-getty.service",
    "container-getty@.service",
];

const ENABLED: &[&str] = &[
    "libvirtd.service",
    "libvirtd.socket",
    "libvirtd-tcp.socket",
    "libvirt-guests.service",
    "mainstay-lab-network.service",
];

/// The cached root, built first if need be.
pub fn ensure() -> Result<PathBuf> {
    let mirror = Mirror::of_this_machine()?;
    let root = cache::path("root", key(&mirror));
    if cache::is_there(&root)? {
        return Ok(root);
    }
    let part = root.with_extension("part");
    cache::remove(&part)?;
    fs::create_dir_all(&part)?;
    eprintln!("building the hosts' root in {} (about two minutes, once)", root.display());
    build(&part, &mirror).inspect_err(|_| {
        let _ = cache::remove(&part);
    })?;
    cache::keep(&part, &root)?;
    Ok(root)
}

fn build(root: &Path, mirror: &Mirror) -> Result<()> {
    check(
        Command::new("debootstrap")
            .args(["--variant=minbase", &format!("--keyring={KEYRING}"), SUITE])
            .arg(root)
            .arg(&mirror.uri),
    )
    .context("debootstrap")?;
    put(root, "etc/dpkg/dpkg.cfg.d/mainstay-lab", 0o644, DPKG)?;
    put(root, "usr/sbin/policy-rc.d", 0o755, "#!/bin/sh\nexit 101\n")?;
    put(root, "etc/apt/sources.list", 0o644, &mirror.sources())?;
    put(root, "etc/apt/apt.conf.d/mainstay-lab", 0o644, &apt_settings()?)?;
    put(root, "etc/apt/preferences.d/mainstay-lab", 0o644, FROM_BACKPORTS)?;
    fs::copy("/etc/resolv.conf", root.join("etc/resolv.conf")).context("copying resolv.conf")?;
    in_root(root, &["apt-get", "--quiet", "update"])?;
    let install = ["apt-get", "--quiet", "--yes", "--no-install-recommends", "install"];
    in_root(root, &[&install[..], PACKAGES].concat())?;
    unpack_kernel(root)?;
    in_root(root, &["apt-get", "clean"])?;

    for (path, mode, text) in FILES {
        put(root, path, *mode, text)?;
    }
    for unit in MASKED {
        let link = root.join("etc/systemd/system").join(unit);
        let _ = fs::remove_file(&link);
        symlink("/dev/null", link)?;
    }
    for gone in ["usr/sbin/policy-rc.d", "etc/machine-id", "var/lib/dbus/machine-id", "etc/hostname", "etc/resolv.conf"]
    {
        let _ = fs::remove_file(root.join(gone));
    }
    in_root(root, &[&["systemctl", "--quiet", "enable"], ENABLED].concat())?;
    // libvirt's own network and its start at boot are not wanted: VMs of the lab have no network card.
    let _ = fs::remove_file(root.join("etc/libvirt/qemu/networks/autostart/default.xml"));
    Ok(())
}

const DPKG: &str = "force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/info/*
";

/// Kernel and modules for the guests go below `GUEST_FILES`; the package itself is not installed (it would want an
/// initramfs of its own).
fn unpack_kernel(root: &Path) -> Result<()> {
    let depends = in_root(root, &["apt-cache", "--no-recommends", "depends", "linux-image-cloud-amd64"])?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .context("no kernel package behind linux-image-cloud-amd64")?;
    let script = format!(
        "set -e; mkdir -p /{GUEST_FILES} /tmp/kernel; cd /tmp/kernel; apt-get --quiet download {package}; \
         dpkg-deb -x *.deb x; cp x/boot/vmlinuz-* /{GUEST_FILES}/vmlinuz; cp -r x/lib/modules/* /{GUEST_FILES}/modules; \
         cd /; rm -rf /tmp/kernel"
    );
    in_root(root, &["sh", "-c", &script]).map(drop)
}

/// Runs a command in a root that nothing has booted.
pub fn in_root(root: &Path, args: &[&str]) -> Result<String> {
    let mut command = Command::new("chroot");
    command.arg(root).args(args).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    check(&mut command)
}

/// Writes a file of a root, with its folders.
pub fn put(root: &Path, path: &str, mode: u32, text: &str) -> Result<()> {
    let to = root.join(path);
    let write = || -> std::io::Result<()> {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&to, text)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))
    };
    write().with_context(|| format!("writing {}", to.display()))
}

fn key(mirror: &Mirror) -> u64 {
    let recipe = format!("{RECIPE} {mirror:?} {PACKAGES:?} {FILES:?} {MASKED:?} {ENABLED:?} {DPKG}");
    fnv(recipe.as_bytes())
}

/// A short name for a text; not against anybody's intent.
pub fn fnv(bytes: &[u8]) -> u64 {
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, b| (sum ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    (sum ^ (sum >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ (sum >> 32) // Spread, so that near texts differ plainly.
}

/// Where Debian's packages come from.
#[derive(Debug)]
struct Mirror {
    uri: String,
    security: Option<String>,
}

impl Mirror {
    fn of_this_machine() -> Result<Mirror> {
        if let Ok(uri) = std::env::var("MAINSTAY_LAB_MIRROR") {
            return Ok(Mirror { uri, security: None });
        }
        // apt prints "SITE|SUITE|URI" for each of its indexes, whatever form its configuration has.
        let format = "$(CREATED_BY)|$(CODENAME)|$(ORIGIN)|$(LABEL)|$(REPO_URI)";
        let mut targets = run("apt-get", ["indextargets", "--format", format])?;
        if !targets.contains("|Debian|") {
            run("apt-get", ["--quiet", "update"])?;
            targets = run("apt-get", ["indextargets", "--format", format])?;
        }
        let mut found = Mirror { uri: String::new(), security: None };
        for line in targets.lines() {
            let fields: Vec<_> = line.split('|').collect();
            let [created_by, codename, origin, label, uri] = fields[..] else { continue };
            let uri = uri.trim_end_matches('/');
            if created_by != "Packages" || origin != "Debian" {
                continue;
            }
            match label {
                "Debian-Security" if codename.starts_with(SUITE) => found.security = Some(uri.to_owned()),
                "Debian" => uri.clone_into(&mut found.uri),
                _ => {}
            }
        }
        if found.uri.is_empty() {
            bail!(
                "apt knows no Debian mirror (if its lists are missing: apt-get update); set MAINSTAY_LAB_MIRROR to one"
            );
        }
        Ok(found)
    }

    fn sources(&self) -> String {
        let uri = &self.uri;
        let mut text =
            format!("deb {uri} {SUITE} main\ndeb {uri} {SUITE}-updates main\ndeb {uri} {SUITE}-backports main\n");
        if let Some(security) = &self.security {
            text.push_str(&format!("deb {security} {SUITE}-security main\n"));
        }
        text
    }
}

/// How this machine's apt reaches the mirror (proxies, certificates) holds for the root's, too.
fn apt_settings() -> Result<String> {
    let dump = run("apt-config", ["dump"])?;
    let ours = |line: &&str| {
        let line = line.to_ascii_lowercase();
        line.starts_with("acquire::http::")
            || line.starts_with("acquire::https::")
            || line.starts_with("acquire::retries")
    };
    Ok(dump.lines().filter(ours).map(|line| format!("{line}\n")).collect())
}
