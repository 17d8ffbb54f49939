//! Guests: what they boot, their disks, their definition in libvirt.
//!
//! ```text
//! in every host   /usr/share/mainstay-lab/vmlinuz   Debian's cloud kernel
//!                 /usr/share/mainstay-lab/initrd    our program (bin/lab-guest.rs) and the modules that it needs
//!                 /var/log/mainstay-lab/NAME.log    serial console: "up BOOT" when it runs
//! datastore       /srv/shared/NAME.raw              its disk (guest_disk.rs), cache=none
//! ```
//!
//! There is nothing else in a guest but Mainstay's own agent: no shell, no libc. It is up about 2 s after its start, also without KVM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use crate::cache;
use crate::command::{check, run};
use crate::guest_disk::{COMMAND_SECTOR, DISK_BYTES, SECTOR};
use crate::host::Host;
use crate::initramfs::{Archive, find};
use crate::product;
use crate::root::{GUEST_FILES, fnv};

/// Where consoles of guests go in a host's root.
pub const CONSOLES: &str = "var/log/mainstay-lab";
/// Name of the port of Mainstay's agent inside.
const CHANNEL: &str = "org.mainstay.guest.0";
/// As virt-install writes it.
const SYSTEM: &str = "<metadata><libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>\
    <libosinfo:os id='http://libosinfo.org/linux/2022'/></libosinfo:libosinfo></metadata>";
const MEMORY_MIB: u32 = 96;
/// With systemd.
const DEBIAN_MIB: u32 = 256;
const PROGRAM: &str = include_str!("bin/lab-guest.rs");
const DISK: &str = include_str!("guest_disk.rs");
const TALK: &str = include_str!("bin/guest_talk/mod.rs");

/// In the order of loading; one that is built into the kernel has no file.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "evdev",
    "button",
    "virtio_console",
    "pvpanic",
    "pvpanic_mmio",
];

/// How a host runs its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By QEMU's translator; slow, and the same everywhere.
    Tcg,
}

/// The initramfs for the guests, built if its parts have changed.
pub fn initrd(root: &Path) -> Result<PathBuf> {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let version = run(&rustc, ["--version"])?;
    let agent = product::guest_agent()?;
    let key =
        fnv(&[format!("{PROGRAM}{DISK}{TALK}{MODULES:?}{version}{}", root.display()).as_bytes(), &agent].concat());
    let path = cache::path("guest", key);
    if cache::is_there(&path)? {
        return Ok(path);
    }
    let mut archive = Archive::default();
    for folder in ["proc", "sys", "dev", "modules", "run", "var", "etc", "root"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", 0o755, &build_program(&rustc)?);
    archive.file("mainstay-guest", 0o755, &agent);
    let modules = root.join(GUEST_FILES).join("modules");
    for (i, name) in MODULES.iter().enumerate() {
        if let Some(file) = find(&modules, &format!("{name}.ko"))? {
            archive.file(&format!("modules/{i:02}-{name}.ko"), 0o644, &fs::read(file)?);
        }
    }
    let part = path.with_extension("part");
    fs::write(&part, archive.finish())?;
    cache::keep(&part, &path)?;
    Ok(path)
}

fn build_program(rustc: &str) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("bin/lab-guest.rs");
    fs::create_dir_all(folder.path().join("bin/guest_talk"))?;
    fs::write(&source, PROGRAM)?;
    fs::write(folder.path().join("bin/guest_talk/mod.rs"), TALK)?;
    fs::write(folder.path().join("guest_disk.rs"), DISK)?;
    let program = folder.path().join("init");
    let mut command = Command::new(rustc);
    command.args(["--edition=2024", "-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols"]);
    command.args(["-Ctarget-feature=+crt-static", "-o"]).args([&program, &source]);
    check(&mut command).context("building the guests' program")?;
    Ok(fs::read(program)?)
}

/// Says whether KVM really runs a guest here: a node /dev/kvm alone promises nothing. Asked once per machine.
pub fn probe(host: &Host, initrd: &Path) -> Result<Accelerator> {
    const SECONDS: &str = "10";
    if !Path::new("/dev/kvm").exists() {
        return Ok(Accelerator::Tcg);
    }
    let kernel = fs::read_to_string("/proc/version")?;
    let processors = fs::read_to_string("/proc/cpuinfo")?;
    let model = processors.lines().find(|line| line.starts_with("model name")).unwrap_or_default();
    let answer = cache::path("kvm", fnv(format!("{kernel}{model}{initrd:?}").as_bytes()));
    if cache::is_there(&answer)? {
        let text = fs::read_to_string(&answer)?;
        return Ok(if text == "works" { Accelerator::Kvm } else { Accelerator::Tcg });
    }
    // The guest says that it is up and ends; a kernel that does not get that far is ended.
    let script = format!(
        "timeout {SECONDS} qemu-system-x86_64 -accel kvm -m {MEMORY_MIB} -nodefaults -display none -no-reboot \
         -kernel /{GUEST_FILES}/vmlinuz -initrd /{GUEST_FILES}/initrd -append 'console=ttyS0 quiet once' -serial stdio \
         2>&1 </dev/null | grep -q '^up '"
    );
    let works = host.exec(&["sh", "-c", &script])?.status.success();
    let part = answer.with_extension("part");
    fs::write(&part, if works { "works" } else { "fails" })?;
    cache::keep(&part, &answer)?;
    Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
}

/// How a guest with an agent is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Talking {
    /// With a device that tells of a kernel's panic.
    pub panic_device: bool,
    /// For its kernel's command line: `panics` = in each boot; `debian` = a system on the second disk.
    pub words: &'static str,
}

/// A guest: all that is known of it follows from its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Guest {
    name: String,
}

impl Guest {
    /// Names are letters, digits and `-`.
    pub fn new(name: &str) -> Result<Guest> {
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            bail!("{name:?} is no name for a guest: letters, digits and - only");
        }
        Ok(Guest { name: name.to_owned() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Always the same for a name.
    pub fn uuid(&self) -> Uuid {
        let (high, low) = (fnv(self.name.as_bytes()), fnv(format!("{} low", self.name).as_bytes()));
        uuid::Builder::from_random_bytes((u128::from(high) << 64 | u128::from(low)).to_be_bytes()).into_uuid()
    }

    /// The file of its disk within the datastore.
    pub fn disk(&self) -> String {
        format!("{}.raw", self.name)
    }

    /// Makes its disk in the folder behind the datastore, unless it is there.
    pub fn make_disk(&self, store: &Path) -> Result<()> {
        let path = store.join(self.disk());
        if !path.exists() {
            let file = fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
            file.set_len(DISK_BYTES)?;
        }
        Ok(())
    }

    /// Makes its disk anew, empty.
    pub fn make_new_disk(&self, store: &Path) -> Result<()> {
        match fs::remove_file(store.join(self.disk())) {
            Err(why) if why.kind() != std::io::ErrorKind::NotFound => Err(why).context("removing its old disk"),
            _ => self.make_disk(store),
        }
    }

    /// Tells the guest something through its disk: `poweroff`, `reboot`, `crash`; `report` and `ask VM WORDS`: it has its agent ask
    /// for a reset of itself or of another, with these words (`later VM WORDS`: 4 s later); `stream`, `tally`: many reports, and what became of them; until its
    /// next boot `busy`, `spin` and `hang` (without interrupts, or nothing runs), `mute` (no agent), `flood KIND` (what a hostile
    /// guest says: `reports`, `junk`, `halves`, `lengths`).
    pub fn tell(&self, store: &Path, word: &str) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let mut sector = [0; SECTOR];
        sector[..word.len()].copy_from_slice(word.as_bytes());
        let disk = fs::OpenOptions::new().write(true).open(store.join(self.disk()))?;
        disk.write_all_at(&sector, COMMAND_SECTOR * SECTOR as u64)?;
        Ok(disk.sync_data()?)
    }

    /// Defines it on a host: persistent, without autostart.
    pub fn define(&self, host: &Host, accelerator: Accelerator) -> Result<()> {
        self.define_by(host, &self.xml(accelerator))
    }

    /// Defines it otherwise than the cluster knows it, so that the cluster does not take the definition away.
    pub fn define_otherwise(&self, host: &Host, accelerator: Accelerator) -> Result<()> {
        let other = "<description>changed by hand</description>\n  <memory";
        self.define_by(host, &self.xml(accelerator).replacen("<memory", other, 1))
    }

    /// Defines it with a channel to the agent inside, which then runs. QEMU stays after a panic, so that it can be looked at.
    pub fn define_talking(&self, host: &Host, accelerator: Accelerator, talking: Talking) -> Result<()> {
        self.define_by(host, &self.talking(accelerator, talking))
    }

    /// Its QEMU stays when its kernel panics, and its definition says what runs in it.
    fn talking(&self, accelerator: Accelerator, talking: Talking) -> String {
        let panic = if talking.panic_device { "<panic model='isa'/>" } else { "" };
        let channel = format!(
            "<channel type='unix'><target type='virtio' name='{CHANNEL}'/></channel>{panic}
    <video><model type='vga' vram='8192'/></video>
  </devices>"
        );
        let words = format!("quiet {}</cmdline>", talking.words);
        let xml = self.xml(accelerator).replacen("</devices>", &channel, 1).replacen("quiet</cmdline>", &words, 1);
        let system = format!("{SYSTEM}\n  <memory");
        xml.replacen("<on_crash>destroy<", "<on_crash>preserve<", 1).replacen("<memory", &system, 1)
    }

    /// Defines it with Debian on a second disk, which is a copy of this image, and a channel to the agent inside.
    pub fn define_debian(&self, host: &Host, accelerator: Accelerator, store: &Path, image: &Path) -> Result<()> {
        let disk = format!("{}-root.raw", self.name);
        run("cp", ["--sparse=always", &image.display().to_string(), &store.join(&disk).display().to_string()])?;
        let disk = format!(
            "<disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native'/>
      <source file='/srv/shared/{disk}'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <serial"
        );
        let memory = (format!("<memory unit='MiB'>{MEMORY_MIB}<"), format!("<memory unit='MiB'>{DEBIAN_MIB}<"));
        let xml = self.talking(accelerator, Talking { panic_device: false, words: "debian" });
        self.define_by(host, &xml.replacen("<serial", &disk, 1).replacen(&memory.0, &memory.1, 1))
    }

    /// Defines it with a title: a change that any guest survives.
    pub fn define_titled(&self, host: &Host, accelerator: Accelerator, title: &str) -> Result<()> {
        let titled = format!("<title>{title}</title>\n  <memory");
        self.define_by(host, &self.xml(accelerator).replacen("<memory", &titled, 1))
    }

    /// Defines a VM with its disk under another name, and with this UUID.
    pub fn define_clone(&self, host: &Host, accelerator: Accelerator, name: &str, uuid: Uuid) -> Result<()> {
        let xml = self.xml(accelerator).replacen(&format!("<name>{}<", self.name), &format!("<name>{name}<"), 1);
        self.define_by(host, &xml.replacen(&self.uuid().to_string(), &uuid.to_string(), 1))
    }

    /// Writes its definition into a host; names the file as the host sees it.
    pub fn write_definition(&self, host: &Host, accelerator: Accelerator) -> Result<String> {
        self.write_xml(host, &self.xml(accelerator))
    }

    /// Defines it as written there.
    pub fn define_by(&self, host: &Host, xml: &str) -> Result<()> {
        let file = self.write_xml(host, xml)?;
        host.run(&["virsh", "-q", "define", &file]).map(drop)
    }

    fn write_xml(&self, host: &Host, xml: &str) -> Result<String> {
        let file = format!("tmp/{}.xml", self.name);
        let path = host.root_inside()?.join(&file);
        fs::write(&path, xml).with_context(|| format!("writing {}", path.display()))?;
        Ok(format!("/{file}"))
    }

    /// Writes its definition, without a disk, into a file on a host: nobody protects such a guest.
    pub fn write_diskless(&self, host: &Host, accelerator: Accelerator) -> Result<String> {
        let xml = self.xml(accelerator);
        let (before, rest) = xml.split_once("<disk").context("a definition has a disk")?;
        let (_, after) = rest.split_once("</disk>").context("and that ends")?;
        self.write_xml(host, &format!("{before}{after}"))
    }

    /// Starts it by libvirt, as a person would.
    pub fn start(&self, host: &Host) -> Result<()> {
        host.run(&["virsh", "-q", "start", &self.name]).map(drop)
    }

    /// Waits for its word on the console of that host.
    pub fn wait_up(&self, host: &Host, patience: Duration) -> Result<()> {
        let console = host.root_inside()?.join(CONSOLES).join(format!("{}.log", self.name));
        crate::lab::wait(patience, &format!("guest {} on {}", self.name, host.name()), || {
            let text = fs::read_to_string(&console).unwrap_or_default();
            Ok(text.lines().any(|line| line.starts_with("up ")).then_some(()))
        })
    }

    fn xml(&self, accelerator: Accelerator) -> String {
        let kind = match accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "qemu",
        };
        let (name, uuid, disk) = (&self.name, self.uuid(), self.disk());
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{MEMORY_MIB}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>/{GUEST_FILES}/vmlinuz</kernel>
    <initrd>/{GUEST_FILES}/initrd</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native'/>
      <source file='/srv/shared/{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'>
      <source path='/{CONSOLES}/{name}.log'/>
      <target port='0'/>
    </serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids() {
        let web = Guest::new("web-1").expect("a good name");
        assert_eq!(web.uuid(), Guest::new("web-1").expect("a good name").uuid());
        assert_ne!(web.uuid(), Guest::new("web-2").expect("a good name").uuid());
        for bad in ["", "a b", "../x", "a/b"] {
            assert!(Guest::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn archive_is_aligned() {
        let mut archive = Archive::default();
        archive.file("a", 0o644, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
    }
}
