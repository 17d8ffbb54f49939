//! What a host has for VMs by libvirt's word: networks that are active, CPU models, machine types.
//!
//! ```text
//!   domain capabilities ── usable, or not known to be unusable ─────────────┐
//!                       └─ not usable ── libvirt compares it with the host ─┴─► models
//!   capabilities ── machine types of the host's own architecture ─────────────► machines
//! ```
//!
//! QEMU calls a model unusable for features that libvirt does not ask for when it starts a VM: so a model is missing only where both say
//! so. Not here: features beside the model; a start that fails for one goes elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use quick_xml::events::{BytesStart, Event};
use quick_xml::reader::Reader;
use virt::network::Network;
use virt_sys as sys;

use super::failure::failure;
use super::session::Session;
use super::values::attribute;
use super::xml::BadXml;
use crate::types::vm::DomainFailure;

/// Longest text that is read of libvirt: capabilities of all architectures that QEMU knows have 1 MiB.
const TEXT_MAX: usize = 8 * 1024 * 1024;

/// Models and machine types that libvirt told of. None: it does not say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Models {
    /// CPU models that guests can have.
    pub cpus: Option<BTreeSet<String>>,
    /// Machine types, with their architecture.
    pub machines: Option<BTreeSet<String>>,
}

/// Names of libvirt networks that are active, and of the bridge of each; empty if it has none.
pub(super) fn networks(session: &Session) -> Result<BTreeMap<String, String>, DomainFailure> {
    let error = |error| failure(&error);
    let active = session.connect().list_all_networks(sys::VIR_CONNECT_LIST_NETWORKS_ACTIVE).map_err(error)?;
    let bridge = |network: &Network| network.get_bridge_name().unwrap_or_default();
    active.iter().map(|network| Ok((network.get_name().map_err(error)?, bridge(network)))).collect()
}

/// What guests can have here with KVM.
pub(super) fn models(session: &Session) -> Result<Models, DomainFailure> {
    let connect = session.connect();
    let host = connect.get_capabilities().map_err(|error| failure(&error))?;
    let machines = machines(&host).ok().filter(|all| !all.is_empty());
    // A host without KVM says nothing of models with it.
    let Ok(text) = connect.get_domain_capabilities(None, None, None, Some("kvm"), 0) else {
        return Ok(Models { cpus: None, machines });
    };
    let can = |model: &str| {
        let cpu = format!("<cpu mode='custom' match='exact'><model fallback='forbid'>{model}</model></cpu>");
        // What cannot be compared is not known to be missing.
        connect.compare_cpu(&cpu, 0).ok() != Some(sys::VIR_CPU_COMPARE_INCOMPATIBLE)
    };
    let told = named_models(&text).unwrap_or_default();
    let cpus: BTreeSet<String> =
        told.into_iter().filter(|(name, usable)| *usable || can(name)).map(|(name, _)| name).collect();
    Ok(Models { cpus: Some(cpus).filter(|all| !all.is_empty()), machines })
}

/// Models by name, of domain capabilities, and whether a guest may have each.
fn named_models(text: &str) -> Result<Vec<(String, bool)>, BadXml> {
    let mut found: Vec<(String, bool)> = Vec::new();
    let (mut custom, mut usable) = (false, None);
    read(text, |path, seen| {
        match (path, seen) {
            (["domainCapabilities", "cpu", "mode"], Seen::Begins(element)) => {
                custom = attribute(element, "name")?.as_deref() == Some("custom");
            }
            (["domainCapabilities", "cpu", "mode", "model"], Seen::Begins(element)) => {
                usable = Some(attribute(element, "usable")?.as_deref() != Some("no"));
            }
            (["domainCapabilities", "cpu", "mode", "model"], Seen::Ends(name)) if custom => {
                found.extend(usable.take().map(|usable| (name.to_owned(), usable)));
            }
            _ => {}
        }
        Ok(())
    })?;
    // A name would go into XML as it is.
    found.retain(|(name, _)| !name.is_empty() && !name.contains(['<', '>', '&', '\'', '\0']));
    Ok(found)
}

/// Machine types of capabilities, of the host's own architecture, each by all its names.
fn machines(text: &str) -> Result<BTreeSet<String>, BadXml> {
    let mut found = BTreeSet::new();
    let (mut own, mut arch, mut hvm) = (String::new(), String::new(), false);
    read(text, |path, seen| {
        match (path, seen) {
            (["capabilities", "host", "cpu", "arch"], Seen::Ends(name)) => name.clone_into(&mut own),
            (["capabilities", "guest", "os_type"], Seen::Ends(name)) => hvm = name == "hvm",
            (["capabilities", "guest", "arch"], Seen::Begins(element)) => {
                arch = attribute(element, "name")?.unwrap_or_default();
            }
            (["capabilities", "guest", "arch", .., "machine"], Seen::Begins(element)) if hvm && arch == own => {
                found.extend(attribute(element, "canonical")?.map(|name| format!("{arch}/{name}")));
            }
            (["capabilities", "guest", "arch", .., "machine"], Seen::Ends(name)) if hvm && arch == own => {
                found.insert(format!("{arch}/{name}"));
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(found)
}

/// An element, with its path.
enum Seen<'a> {
    Begins(&'a BytesStart<'a>),
    /// With its text.
    Ends(&'a str),
}

fn read(text: &str, mut see: impl FnMut(&[&str], Seen<'_>) -> Result<(), BadXml>) -> Result<(), BadXml> {
    if TEXT_MAX < text.len() {
        return Err(BadXml::TooLong { len: text.len() });
    }
    let mut reader = Reader::from_str(text);
    let (mut path, mut inner): (Vec<String>, String) = (Vec::new(), String::new());
    let names = |path: &[String]| path.iter().map(String::as_str).collect::<Vec<&str>>().join("\n");
    loop {
        let event = reader.read_event().map_err(BadXml::not_xml)?;
        match &event {
            Event::Start(element) | Event::Empty(element) => {
                path.push(element.name().as_ref().to_owned());
                inner.clear();
                see(&names(&path).split('\n').collect::<Vec<_>>(), Seen::Begins(element))?;
            }
            Event::Text(text) => inner.push_str(&text.xml10_content()),
            Event::Eof => return Ok(()),
            _ => {}
        }
        if let Event::End(_) | Event::Empty(_) = event {
            see(&names(&path).split('\n').collect::<Vec<_>>(), Seen::Ends(inner.trim()))?;
            path.pop();
            inner.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_those_of_the_custom_mode() {
        let text = "<domainCapabilities><path>/usr/bin/qemu</path><cpu>\
            <mode name='host-passthrough' supported='yes'><enum name='x'><value>on</value></enum></mode>\
            <mode name='host-model' supported='yes'><model fallback='forbid'>Skylake-Client-IBRS</model>\
            <feature policy='require' name='vmx'/></mode>\
            <mode name='custom' supported='yes'><model usable='yes' vendor='unknown'>qemu64</model>\
            <model usable='no' deprecated='yes'>Icelake-Server</model><blockers model='Icelake-Server'>\
            <feature name='pku'/></blockers><model usable='unknown'>core2duo</model></mode></cpu></domainCapabilities>";
        let expected = [("qemu64", true), ("Icelake-Server", false), ("core2duo", true)];
        let expected: Vec<(String, bool)> = expected.iter().map(|(name, is)| ((*name).to_owned(), *is)).collect();
        assert_eq!(named_models(text).unwrap(), expected);
        assert_eq!(named_models("<domainCapabilities/>").unwrap(), []);
        assert!(named_models("<domainCapabilities>").is_ok_and(|all| all.is_empty()));
    }

    #[test]
    fn machines_are_those_of_the_hosts_own_architecture() {
        let guest = |arch: &str, machines: &str| {
            format!(
                "<guest><os_type>hvm</os_type><arch name='{arch}'><wordsize>64</wordsize>{machines}\
                 <domain type='qemu'/></arch><features/></guest>"
            )
        };
        let text = format!(
            "<capabilities><host><uuid>1</uuid><cpu><arch>x86_64</arch><model>Haswell</model></cpu></host>{}{}</capabilities>",
            guest("aarch64", "<machine maxCpus='8'>virt-7.2</machine>"),
            guest(
                "x86_64",
                "<machine canonical='pc-q35-7.2' maxCpus='288'>q35</machine><machine maxCpus='1'>microvm</machine>"
            ),
        );
        let expected = ["x86_64/microvm", "x86_64/pc-q35-7.2", "x86_64/q35"];
        assert_eq!(machines(&text).unwrap().into_iter().collect::<Vec<_>>(), expected);
    }
}
