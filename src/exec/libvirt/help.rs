//! What is done beside the core's orders, which know nothing of what is inside a VM: a guest is asked to reboot, is given the port of
//! Mainstay's agent, or has its memory written to a file; and libvirt is asked what this host has for guests.
//!
//! ```text
//!   port ── its definition has none ────► attached to the definition; libvirt adds a controller
//!        └─ it runs, and has none ──────► a controller, if it has none, and the port are plugged in
//!                                           └─ that fails: it has the port from its next start on
//! ```
//!
//! Not here: when, and for whom (`core::guests`, people).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use virt::domain::Domain;
use virt_sys as sys;

use super::failure::failure;
use super::means::{self, Models};
use super::session::{Session, in_session};
use super::xml;
use crate::types::VmId;
use crate::types::vm::{DomainAnswer, DomainFailure};

const CONTROLLER: &str = "<controller type='virtio-serial'/>";

/// One of these.
pub(super) enum Help {
    /// Ask its guest to reboot.
    Reboot { vm: VmId },
    /// Give it the port, and say what was done.
    AddPort { vm: VmId, told: SyncSender<Port> },
    /// Write its memory here, if it has no more bytes than that.
    Dump { vm: VmId, to: PathBuf, format: DumpFormat, most: u64 },
    /// Say which networks are active.
    Networks { told: SyncSender<BTreeMap<String, String>> },
    /// Say what CPUs and machines guests can have.
    Models { told: SyncSender<Models> },
}

/// How memory is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DumpFormat {
    /// Compressed, for `crash` and `makedumpfile`.
    Kdump,
    /// As it is.
    Elf,
}

/// What became of a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Port {
    /// It was there.
    AlreadySo,
    /// It is there now.
    Added,
    /// The definition has it, but the VM that runs could not be given it: why.
    AtNextStart(String),
}

/// Does it.
pub(super) fn help(uri: &str, session: &mut Option<Session>, order: &Help, within: Duration) -> DomainAnswer {
    in_session(uri, session, within, |session, _| match order {
        Help::Reboot { vm } => {
            let rebooted = session.domain(*vm).and_then(|domain| domain.reboot(0).map(drop));
            rebooted.map(|()| DomainAnswer::Done).map_err(|error| failure(&error))
        }
        Help::AddPort { vm, told } => {
            let domain = session.domain(*vm).map_err(|error| failure(&error))?;
            let port = add_port(&domain)?;
            let _ = told.send(port); // Whoever asked may have gone.
            Ok(DomainAnswer::Done)
        }
        Help::Dump { vm, to, format, most } => {
            let domain = session.domain(*vm).map_err(|error| failure(&error))?;
            dump(&domain, to, *format, *most).map(|()| DomainAnswer::Done)
        }
        Help::Networks { told } => {
            let _ = told.send(means::networks(session)?);
            Ok(DomainAnswer::Done)
        }
        Help::Models { told } => {
            let _ = told.send(means::models(session)?);
            Ok(DomainAnswer::Done)
        }
    })
}

fn dump(domain: &Domain, to: &Path, format: DumpFormat, most: u64) -> Result<(), DomainFailure> {
    let kib = domain.get_max_memory().map_err(|error| failure(&error))?;
    if most >> 10 < kib {
        let (has, most) = (kib >> 10, most >> 20);
        let text =
            format!("its {has} MiB of memory are not written: there is room for {most} MiB, or no more are allowed");
        return Err(DomainFailure::Capacity(text));
    }
    let to = to.to_str().ok_or_else(|| DomainFailure::Host(format!("{} is no text", to.display())))?;
    let format = match format {
        DumpFormat::Kdump => sys::VIR_DOMAIN_CORE_DUMP_FORMAT_KDUMP_ZLIB,
        DumpFormat::Elf => sys::VIR_DOMAIN_CORE_DUMP_FORMAT_RAW,
    };
    // Live: libvirt leaves the guest's CPUs to QEMU, which lets them go in any case when it is done, also when that failed.
    let flags = sys::VIR_DUMP_MEMORY_ONLY | sys::VIR_DUMP_LIVE;
    domain.core_dump_with_format(to, format, flags).map(drop).map_err(|error| failure(&error))
}

fn add_port(domain: &Domain) -> Result<Port, DomainFailure> {
    let error = |error| failure(&error);
    let (runs, persistent) = (domain.is_active().map_err(error)?, domain.is_persistent().map_err(error)?);
    let mut port = Port::AlreadySo;
    if persistent {
        let definition = domain.get_xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).map_err(error)?;
        for device in lacking(&definition)?.iter().filter(|device| **device != CONTROLLER) {
            domain.attach_device_flags(device, sys::VIR_DOMAIN_AFFECT_CONFIG).map_err(error)?;
            port = Port::Added;
        }
    }
    if runs {
        let live = domain.get_xml_desc(0).map_err(error)?;
        for device in lacking(&live)? {
            match domain.attach_device_flags(&device, sys::VIR_DOMAIN_AFFECT_LIVE) {
                Ok(_) => port = Port::Added,
                Err(why) if persistent => return Ok(Port::AtNextStart(why.message().trim().to_owned())),
                Err(why) => return Err(failure(&why)),
            }
        }
    }
    Ok(port)
}

/// What has to be attached to a domain with this XML, in this order. libvirt adds the controller to a definition by itself, not to
/// a VM that runs.
fn lacking(text: &str) -> Result<Vec<String>, DomainFailure> {
    let found = xml::parse(text).map_err(|why| DomainFailure::Definition(why.to_string()))?;
    if found.ports.iter().any(|port| port == mainstay_guest::PORT) {
        return Ok(Vec::new());
    }
    let port = format!("<channel type='unix'><target type='virtio' name='{}'/></channel>", mainstay_guest::PORT);
    Ok(if found.has_port_controller { vec![port] } else { vec![CONTROLLER.to_owned(), port] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_domain_lacks() {
        let domain = |devices: &str| {
            format!(
                "<domain><name>web</name><uuid>{}</uuid><memory>1024</memory><vcpu>1</vcpu><devices>{devices}</devices></domain>",
                uuid::Uuid::from_u128(7)
            )
        };
        let channel = |name: &str| format!("<channel type='unix'><target type='virtio' name='{name}'/></channel>");
        let ours = channel("org.mainstay.guest.0");
        let other = "<controller type='usb' index='0'/>";
        let controller = "<controller type='virtio-serial' index='0'/>";
        let table: &[(String, &[&str])] = &[
            (String::new(), &[CONTROLLER, &ours]),
            (other.to_owned(), &[CONTROLLER, &ours]),
            (controller.to_owned(), &[&ours]),
            (format!("{controller}{}", channel("org.qemu.guest_agent.0")), &[&ours]),
            (format!("{controller}{ours}"), &[]),
        ];
        for (devices, expected) in table {
            assert_eq!(lacking(&domain(devices)).unwrap(), *expected, "{devices}");
        }
        assert!(matches!(lacking("<domain/>"), Err(DomainFailure::Definition(_))));
    }
}
