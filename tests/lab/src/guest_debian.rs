//! A guest with a whole system: Debian with systemd, and the agent installed from its own package.
//!
//! ```text
//!  the hosts' root, without libvirt and QEMU ─► folder ─► dpkg --install mainstay-guest.deb ─► mke2fs -d ─► image, cached
//!  guest:  kernel, lab's initramfs ("debian") ─► /dev/vdb is the root ─► systemd
//!            lab-orders.service   "wrote N" on the console, each 200 ms, when a file was written and synced;
//!                                 command sector of /dev/vda: `fail` = a unit that is watched fails
//! ```
//!
//! Nothing is downloaded: what the hosts' root was made of is enough. There is no udev; the agent finds its port without.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache;
use crate::command::{check, run};
use crate::guest_disk::COMMAND_SECTOR;
use crate::root::{fnv, in_root, put};
use crate::{package, product};

/// Larger than what is in it by what a journal needs.
const SIZE: &str = "512M";
/// Of the hosts' root, not for guests.
const LEFT_OUT: &[&str] = &[
    "./usr/share/mainstay-lab",
    "./usr/share/qemu",
    "./usr/share/libvirt",
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "./usr/bin/qemu*",
    "./usr/lib/ipxe",
    "./usr/lib/udev",
    "./usr/lib/mainstay-lab",
    "./var/lib/apt",
    "./var/lib/libvirt",
    "./var/cache",
    "./etc/libvirt",
    "./etc/systemd/system/*.wants/libvirt*",
    "./etc/systemd/system/*mainstay-lab*",
    "./etc/systemd/system/*.wants/mainstay-lab*",
];
const FILES: &[(&str, u32, &str)] = &[
    ("etc/mainstay/guest.toml", 0o644, "units = [\"lab-*.service\"]\n"),
    ("etc/hostname", 0o644, "debian\n"),
    ("etc/fstab", 0o644, ""),
    ("etc/systemd/system/mainstay-guest.service.d/lab.conf", 0o644, "[Service]\nStandardError=journal+console\n"),
    (
        "etc/systemd/system/lab-fails.service",
        0o644,
        "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo failing >/dev/console; exit 1'\n",
    ),
    (
        "etc/systemd/system/lab-orders.service",
        0o644,
        "[Unit]\nAfter=mainstay-guest.service\n[Service]\nExecStart=/usr/lib/lab-orders\n",
    ),
    (
        "usr/lib/lab-orders",
        0o755,
        "#!/bin/sh
echo \"up $(cat /proc/sys/kernel/random/boot_id)\" >/dev/console
sector=$(cat /etc/lab-command-sector)
n=0
while sleep 0.2; do
    n=$((n + 1))
    echo $n >/var/lab-count && sync /var/lab-count && echo \"wrote $n\" >/dev/console
done &
while sleep 0.3; do
    word=$(dd if=/dev/vda bs=512 skip=$sector count=1 iflag=direct 2>/dev/null | tr -d '\\0')
    [ \"$word\" ] || continue
    dd if=/dev/zero of=/dev/vda bs=512 seek=$sector count=1 oflag=direct conv=notrunc 2>/dev/null
    case $word in
    fail)
        # The agent's two connections: early in a boot there is no bus yet, and it looks again each second.
        until [ \"$(busctl --no-pager --no-legend list | grep -c mainstay-guest)\" -ge 2 ]; do sleep 0.1; done
        pid=$(systemctl show --value --property=MainPID mainstay-guest)
        echo \"resident $(grep VmHWM /proc/$pid/status)\" >/dev/console
        systemctl --no-block start lab-fails.service
        ;;
    esac
done
",
    ),
];
const WANTED: &str = "etc/systemd/system/multi-user.target.wants";

/// The image of its root file system, built if its parts have changed.
pub fn image(root: &Path) -> Result<PathBuf> {
    let agent = product::guest_agent()?;
    let key =
        fnv(&[format!("{LEFT_OUT:?}{FILES:?}{COMMAND_SECTOR}{SIZE}{}", root.display()).as_bytes(), &agent].concat());
    let path = cache::path("debian", key);
    if cache::is_there(&path)? {
        return Ok(path);
    }
    eprintln!("building a guest with Debian in {}", path.display());
    let folder = tempfile::tempdir_in(cache::FOLDER)?;
    fill(root, &folder.path().join("root")).context("filling the guest's root")?;
    let part = folder.path().join("image");
    run("truncate", ["--size", SIZE, &part.display().to_string()])?;
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-m", "0", "-d"]).args([&folder.path().join("root"), &part]);
    check(&mut command)?;
    cache::keep(&part, &path)?;
    Ok(path)
}

fn fill(from: &Path, root: &Path) -> Result<()> {
    fs::create_dir(root)?;
    let left_out: String = LEFT_OUT.iter().map(|path| format!(" --exclude='{path}'")).collect();
    let copy =
        format!("tar --create --one-file-system{left_out} --directory \"$0\" . | tar --extract --directory \"$1\"");
    run("sh", ["-e", "-c", &copy, &from.display().to_string(), &root.display().to_string()])?;
    let packages = tempfile::tempdir()?;
    fs::copy(package::guest(packages.path())?.deb, root.join("mainstay-guest.deb"))?;
    in_root(root, &["dpkg", "--install", "/mainstay-guest.deb"])?;
    fs::remove_file(root.join("mainstay-guest.deb"))?;
    for (path, mode, text) in FILES {
        put(root, path, *mode, text)?;
    }
    put(root, "etc/lab-command-sector", 0o644, &format!("{COMMAND_SECTOR}\n"))?;
    symlink("/etc/systemd/system/lab-orders.service", root.join(WANTED).join("lab-orders.service"))?;
    Ok(())
}
