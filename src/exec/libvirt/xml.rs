//! Domain XML: what Mainstay must know of a VM's definition. Pure.
//!
//! ```text
//!   XML ──parse──► DomainXml (names, sizes, everything that QEMU opens) ──record──► VmRecord (needs.rs)
//! ```
//!
//! The document is read once, from start to end, with the path of open elements; nothing is expanded beyond XML's five
//! entities and characters by number. What we do not know is passed over: libvirt checks definitions, not we.
//! Bounds: 256 KiB of text, 64 elements deep, 256 disks.

use quick_xml::events::{BytesStart, Event};
use quick_xml::reader::Reader;
use uuid::Uuid;

use super::demands::Demands;
use super::needs;
use super::values::{attribute, kib, source};
use crate::types::needs::Pages;
use crate::types::settings::{ClusterSettings, OnDoubt};
use crate::types::{Generation, VmId, VmRecord};

/// Namespace of the element in a running domain's metadata that says under which generation it runs.
pub const MARK: &str = "urn:mainstay:claim:1";
/// Longest definition, as in a protection record.
pub const XML_MAX: usize = 256 * 1024;
/// Namespace of Mainstay's metadata: `<m:policy xmlns:m='urn:mainstay:vm:1' on-doubt='pause|run-until-stop'/>`.
pub const POLICY: &str = "urn:mainstay:vm:1";
/// Deepest nesting.
const DEPTH_MAX: usize = 64;
/// Disks of one domain; libvirt itself runs out of addresses before.
const DISKS_MAX: usize = 256;

/// Why a definition cannot be used. The VM stays as it is, without protection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadXml {
    /// Longer than 256 KiB.
    #[error("the definition has {len} bytes, more than {XML_MAX}")]
    TooLong { len: usize },
    /// No well-formed XML.
    #[error("the definition is no XML: {0}")]
    NotXml(String),
    /// Nested deeper than any real one.
    #[error("the definition is nested too deeply")]
    TooDeep,
    /// More disks than fit.
    #[error("the definition has more than {DISKS_MAX} disks")]
    TooManyDisks,
    /// Well-formed, but no `<domain>`.
    #[error("the definition is no domain")]
    NotDomain,
    /// A part that every definition has is missing or makes no sense.
    #[error("the definition has no valid {0}")]
    Missing(&'static str),
    /// Not one of its disks is on a datastore of the cluster.
    #[error("no disk of the VM is on a datastore")]
    NotOnDatastore,
}

/// One disk, CD-ROM or floppy with something in it, or a file behind one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct XmlDisk {
    /// Path on the host; for a network disk `protocol:name`, for a volume `volume:pool/name`.
    pub path: String,
    /// QEMU never writes to it.
    pub readonly: bool,
    /// Several VMs may write to it at once.
    pub shareable: bool,
    /// A CD-ROM or floppy.
    pub removable: bool,
    /// `startupPolicy` lets the VM start without it.
    pub optional: bool,
    /// No path on this host.
    pub network: bool,
}

/// Where a TPM keeps its state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tpm {
    /// Emulated, in libvirt's own folder on the host.
    Local,
    /// Emulated, at this path.
    At(String),
    /// The host's.
    Passthrough,
}

/// A definition, as far as we care.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DomainXml {
    /// libvirt's name.
    pub name: String,
    /// libvirt's UUID.
    pub vm: VmId,
    /// Guest memory in KiB.
    pub memory_kib: u64,
    /// Most vCPUs that it can have.
    pub vcpus: u32,
    /// In the order of the definition; empty drives are left out.
    pub disks: Vec<XmlDisk>,
    /// NVRAM, if its path is written.
    pub nvram: Option<String>,
    /// UEFI whose NVRAM libvirt puts where it likes.
    pub nvram_by_libvirt: bool,
    /// Kernel, initrd and device tree for direct boot.
    pub boot: Vec<String>,
    /// Firmware, if its path is written.
    pub firmware: Option<String>,
    /// `network:NAME`, `bridge:NAME` or `device:NAME`, each once.
    pub networks: Vec<String>,
    /// Its TPM.
    pub tpm: Option<Tpm>,
    /// Names of virtio channels: `org.qemu.guest_agent.0`.
    pub ports: Vec<String>,
    /// It has a controller on which such channels sit.
    pub has_port_controller: bool,
    /// Socket on the host of the channel to Mainstay's agent inside; only of one that runs, or where its path is written.
    pub guest_channel: Option<String>,
    /// Its QEMU stays when the guest's kernel has panicked (`on_crash` is `preserve`).
    pub stays_after_crash: bool,
    /// What QEMU or libvirt does when its watchdog fires (`action`).
    pub watchdog: Option<String>,
    /// File on the host to which its first serial console is written, or copied.
    pub console_log: Option<String>,
    /// The system inside, as whoever made the definition has said (libosinfo): `http://microsoft.com/win/10`.
    pub system: Option<String>,
    /// Folders of the host that the guest sees.
    pub shares: Vec<String>,
    /// Devices of the host are passed through.
    pub hostdevs: bool,
    /// The named CPU model without which libvirt does not start it.
    pub cpu_model: Option<String>,
    /// Architecture and machine type, `x86_64/pc-q35-7.2`, without which KVM does not run it.
    pub machine: Option<String>,
    /// Where its memory lies.
    pub pages: Pages,
    /// Mainstay's own metadata: what is done in doubt.
    pub on_doubt: Option<OnDoubt>,
    /// The generation that it runs, or was saved, under.
    pub mark: Option<Generation>,
}

/// Reads a definition.
///
/// # Errors
/// When it is no domain, or lacks its name, UUID, memory or vCPUs.
pub fn parse(xml: &str) -> Result<DomainXml, BadXml> {
    if XML_MAX < xml.len() {
        return Err(BadXml::TooLong { len: xml.len() });
    }
    let mut reader = Reader::from_str(xml);
    let mut parser = Parser::default();
    loop {
        match reader.read_event().map_err(BadXml::not_xml)? {
            Event::Start(element) => parser.open(&element)?,
            Event::Empty(element) => {
                parser.open(&element)?;
                parser.close()?;
            }
            Event::End(_) => parser.close()?,
            Event::Text(text) => parser.text.push_str(&text.xml10_content()),
            Event::CData(text) => parser.text.push_str(&text.xml10_content()),
            Event::GeneralRef(entity) => match entity.resolve_char_ref().map_err(BadXml::not_xml)? {
                Some(character) => parser.text.push(character),
                None => parser.text.push_str(
                    quick_xml::escape::resolve_predefined_entity(&entity.xml10_content())
                        .ok_or_else(|| BadXml::NotXml("an unknown entity".into()))?,
                ),
            },
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
            Event::Eof => return parser.finish(),
        }
    }
}

/// What a protection record says of a VM with this definition. Its home is the datastore of its first disk.
///
/// # Errors
/// When the definition cannot be read, or no disk is on a datastore.
pub fn record(xml: &str, settings: &ClusterSettings) -> Result<VmRecord, BadXml> {
    needs::record(&parse(xml)?, xml, settings)
}

/// Under which generation the memory of this image ran; none if its definition does not say.
#[must_use]
pub fn mark(xml: &str) -> Option<Generation> {
    parse(xml).ok()?.mark
}

/// Socket of the channel to the agent inside this running VM.
#[must_use]
pub fn guest_channel(xml: &str) -> Option<String> {
    parse(xml).ok()?.guest_channel
}

impl BadXml {
    /// The reader's own error.
    pub(super) fn not_xml(error: impl std::fmt::Display) -> Self {
        Self::NotXml(error.to_string())
    }
}

/// Reading state: the open elements, and what was found so far.
#[derive(Default)]
struct Parser {
    path: Vec<String>,
    text: String,
    found: DomainXml,
    demands: Demands,
    uuid: Option<Uuid>,
    memory_unit: Option<String>,
    disk: Option<Disk>,
    seen_domain: bool,
    /// Socket of the channel whose element is open.
    channel: Option<String>,
    /// The serial port or console whose element is open is a file.
    console_is_file: bool,
}

/// The disk whose element is open.
#[derive(Default)]
struct Disk {
    removable: bool,
    readonly: bool,
    shareable: bool,
    optional: bool,
    source: Option<(String, bool)>,
    /// Sources of its backing chain (read only) and data files (written).
    behind: Vec<(String, bool, bool)>,
}

impl Parser {
    fn open(&mut self, element: &BytesStart<'_>) -> Result<(), BadXml> {
        if DEPTH_MAX <= self.path.len() {
            return Err(BadXml::TooDeep);
        }
        self.text.clear();
        self.path.push(element.name().as_ref().to_owned());
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        self.demands.open(&path, element)?;
        match path.as_slice() {
            ["domain"] => self.seen_domain = true,
            ["domain", "memory"] => self.memory_unit = attribute(element, "unit")?,
            ["domain", "os"] => {
                self.found.nvram_by_libvirt = attribute(element, "firmware")?.as_deref() == Some("efi");
            }
            ["domain", "os", "loader"] => {
                let stateless = attribute(element, "stateless")?.as_deref() == Some("yes");
                let flash = attribute(element, "type")?.as_deref() == Some("pflash");
                self.found.nvram_by_libvirt = !stateless && (flash || self.found.nvram_by_libvirt);
            }
            ["domain", "os", "nvram", "source"] => self.found.nvram = source(element)?.map(|(path, _)| path),
            ["domain", "metadata", "libosinfo:libosinfo", "libosinfo:os"] => {
                self.found.system = attribute(element, "id")?;
            }
            ["domain", "metadata", name] => {
                let name = (*name).to_owned();
                self.metadata(&name, element)?;
            }
            ["domain", "devices", "disk"] => {
                let device = attribute(element, "device")?;
                let removable = matches!(device.as_deref(), Some("cdrom" | "floppy"));
                // libvirt opens every CD-ROM read-only, whether it says so or not.
                let readonly = device.as_deref() == Some("cdrom");
                self.disk = Some(Disk { removable, readonly, ..Disk::default() });
                // These are devices of the host, or served by a process on it.
                let kind = attribute(element, "type")?;
                self.found.hostdevs |= matches!(kind.as_deref(), Some("nvme" | "vhostuser" | "vhostvdpa"));
            }
            ["domain", "devices", "disk", rest @ ..] => self.in_disk(&rest.join("/"), element)?,
            ["domain", "devices", "interface"] => {
                self.found.hostdevs |= attribute(element, "type")?.as_deref() == Some("hostdev");
            }
            ["domain", "devices", "interface", "source"] => self.network(element)?,
            ["domain", "devices", "tpm", "backend"] => {
                let passed = attribute(element, "type")?.as_deref() == Some("passthrough");
                self.found.tpm = Some(if passed { Tpm::Passthrough } else { Tpm::Local });
            }
            ["domain", "devices", "tpm", "backend", "source"] => {
                if let (Some(Tpm::Local), Some(path)) = (&self.found.tpm, attribute(element, "path")?) {
                    self.found.tpm = Some(Tpm::At(path));
                }
            }
            ["domain", "devices", "serial" | "console", rest @ ..] => self.in_console(&rest.join("/"), element)?,
            ["domain", "devices", "controller"] => {
                self.found.has_port_controller |= attribute(element, "type")?.as_deref() == Some("virtio-serial");
            }
            ["domain", "devices", "watchdog"] => self.found.watchdog = attribute(element, "action")?,
            ["domain", "devices", "channel", rest @ ..] => self.in_channel(&rest.join("/"), element)?,
            ["domain", "devices", "filesystem", "source"] => {
                for key in ["dir", "file", "dev", "socket", "name"] {
                    self.found.shares.extend(attribute(element, key)?);
                }
            }
            ["domain", "devices", "hostdev"] => self.found.hostdevs = true,
            _ => {}
        }
        Ok(())
    }

    /// `<serial>` or `<console>`, or an element in it. The first file counts: a console is mostly the serial port said again.
    fn in_console(&mut self, path: &str, element: &BytesStart<'_>) -> Result<(), BadXml> {
        let file = match path {
            "" => {
                self.console_is_file = attribute(element, "type")?.as_deref() == Some("file");
                None
            }
            "log" => attribute(element, "file")?,
            "source" if self.console_is_file => attribute(element, "path")?,
            _ => None,
        };
        self.found.console_log = self.found.console_log.take().or(file);
        Ok(())
    }

    /// `<channel>`, or an element in it.
    fn in_channel(&mut self, path: &str, element: &BytesStart<'_>) -> Result<(), BadXml> {
        match path {
            "" => self.channel = None,
            "source" => self.channel = attribute(element, "path")?,
            "target" => {
                let virtio = attribute(element, "type")?.as_deref() == Some("virtio");
                let name = attribute(element, "name")?.filter(|_| virtio);
                if name.as_deref() == Some(mainstay_guest::PORT) {
                    self.found.guest_channel = self.channel.take(); // libvirt writes the source first.
                }
                self.found.ports.extend(name);
            }
            _ => {}
        }
        Ok(())
    }

    /// What we, or people for us, have written: an element counts if it is in our namespace.
    fn metadata(&mut self, name: &str, element: &BytesStart<'_>) -> Result<(), BadXml> {
        let (space, name) = match name.split_once(':') {
            Some((prefix, name)) => (format!("xmlns:{prefix}"), name),
            None => ("xmlns".to_owned(), name),
        };
        match (name, attribute(element, &space)?.as_deref()) {
            ("claim", Some(MARK)) => {
                self.found.mark = attribute(element, "generation")?.and_then(|text| text.parse().ok()).map(Generation);
            }
            ("policy", Some(POLICY)) => {
                // A word that is not known counts as unsaid.
                self.found.on_doubt = attribute(element, "on-doubt")?.and_then(|word| OnDoubt::named(&word));
            }
            _ => {}
        }
        Ok(())
    }

    /// An element somewhere below `<disk>`.
    fn in_disk(&mut self, path: &str, element: &BytesStart<'_>) -> Result<(), BadXml> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        match path {
            "readonly" => disk.readonly = true,
            "shareable" => disk.shareable = true,
            "source" => {
                disk.optional = attribute(element, "startupPolicy")?.as_deref() == Some("optional");
                disk.source = source(element)?;
            }
            // What is behind the image: a chain that is written out, or its data file. A mirror is not: it is a copy
            // under way, which the inactive definition does not have.
            _ if path.ends_with("/source") && !path.starts_with("mirror") => {
                if let Some((path_of, network)) = source(element)? {
                    let written = path.ends_with("dataStore/source") && !path.contains("backingStore");
                    disk.behind.push((path_of, network, written));
                }
            }
            _ => {}
        }
        if DISKS_MAX < disk.behind.len() { Err(BadXml::TooManyDisks) } else { Ok(()) }
    }

    fn network(&mut self, element: &BytesStart<'_>) -> Result<(), BadXml> {
        // A portgroup or a physical device comes with one of these; the first that is there names the need.
        for (key, kind) in [("network", "network"), ("bridge", "bridge"), ("dev", "device")] {
            if let Some(name) = attribute(element, key)? {
                let need = format!("{kind}:{name}");
                if !self.found.networks.contains(&need) {
                    self.found.networks.push(need);
                }
                return Ok(());
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), BadXml> {
        let text = std::mem::take(&mut self.text);
        let text = text.trim();
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        self.demands.close(&path, text);
        match path.as_slice() {
            ["domain", "name"] => text.clone_into(&mut self.found.name),
            ["domain", "uuid"] => self.uuid = Uuid::parse_str(text).ok(),
            ["domain", "memory"] => {
                self.found.memory_kib = kib(text, self.memory_unit.as_deref()).ok_or(BadXml::Missing("memory"))?;
            }
            ["domain", "vcpu"] => self.found.vcpus = text.parse().map_err(|_| BadXml::Missing("vCPUs"))?,
            ["domain", "os", "kernel" | "initrd" | "dtb"] if !text.is_empty() => self.found.boot.push(text.to_owned()),
            ["domain", "os", "loader"] if !text.is_empty() => self.found.firmware = Some(text.to_owned()),
            ["domain", "os", "nvram"] if !text.is_empty() => self.found.nvram = Some(text.to_owned()),
            ["domain", "on_crash"] => self.found.stays_after_crash = text == "preserve",
            ["domain", "devices", "disk"] => self.end_disk()?,
            _ => {}
        }
        self.path.pop();
        Ok(())
    }

    fn end_disk(&mut self) -> Result<(), BadXml> {
        let Some(disk) = self.disk.take() else { return Ok(()) };
        let Some((path, network)) = disk.source else { return Ok(()) };
        let Disk { removable, readonly, shareable, optional, behind, .. } = disk;
        self.found.disks.push(XmlDisk { path, readonly, shareable, removable, optional, network });
        self.found.disks.extend(behind.into_iter().map(|(path, network, written)| XmlDisk {
            path,
            readonly: readonly || !written,
            shareable,
            removable,
            optional,
            network,
        }));
        if DISKS_MAX < self.found.disks.len() { Err(BadXml::TooManyDisks) } else { Ok(()) }
    }

    fn finish(mut self) -> Result<DomainXml, BadXml> {
        if !self.seen_domain {
            return Err(BadXml::NotDomain);
        }
        if !self.path.is_empty() {
            return Err(BadXml::NotXml("it ends too early".into()));
        }
        if self.found.name.is_empty() {
            return Err(BadXml::Missing("name"));
        }
        self.found.vm = VmId(self.uuid.ok_or(BadXml::Missing("UUID"))?);
        if self.found.memory_kib == 0 {
            return Err(BadXml::Missing("memory"));
        }
        if self.found.vcpus == 0 {
            return Err(BadXml::Missing("vCPUs"));
        }
        if self.found.nvram.is_some() {
            self.found.nvram_by_libvirt = false;
        }
        (self.found.cpu_model, self.found.machine, self.found.pages) = self.demands.read();
        Ok(self.found)
    }
}

#[cfg(test)]
#[path = "xml_tests.rs"]
mod tests;
