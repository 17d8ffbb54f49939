//! What a definition demands of its host beside devices: a CPU model, a machine type, large pages. Pure.
//!
//! Only what libvirt or KVM surely refuses without counts. With a feature switched off a host may do that lacks it in the model; without
//! KVM, and with check='none', libvirt does not look at the host's CPU at all.

use quick_xml::events::BytesStart;

use super::values::{attribute, kib};
use super::xml::BadXml;
use crate::types::needs::Pages;

/// Reading state.
#[derive(Default)]
pub(super) struct Demands {
    kvm: bool,
    arch: Option<String>,
    machine: Option<String>,
    cpu_mode: Option<String>,
    cpu_check: Option<String>,
    cpu_model: Option<String>,
    /// The model counts with exceptions, or not at all.
    cpu_lenient: bool,
    pages: Pages,
}

impl Demands {
    /// An element has begun.
    pub(super) fn open(&mut self, path: &[&str], element: &BytesStart<'_>) -> Result<(), BadXml> {
        match path {
            ["domain"] => self.kvm = attribute(element, "type")?.as_deref() == Some("kvm"),
            ["domain", "os", "type"] => {
                (self.arch, self.machine) = (attribute(element, "arch")?, attribute(element, "machine")?);
            }
            ["domain", "cpu"] => {
                (self.cpu_mode, self.cpu_check) = (attribute(element, "mode")?, attribute(element, "check")?);
            }
            ["domain", "cpu", "feature"] => {
                let policy = attribute(element, "policy")?;
                self.cpu_lenient |= !matches!(policy.as_deref(), None | Some("require"));
            }
            ["domain", "memoryBacking", "hugepages"] => self.pages = Pages::Usual,
            ["domain", "memoryBacking", "hugepages", "page"] if self.pages == Pages::Usual => {
                let unit = attribute(element, "unit")?;
                let size = attribute(element, "size")?.and_then(|size| kib(&size, unit.as_deref()));
                self.pages = match size {
                    Some(2048) => Pages::Of2Mib,
                    Some(1_048_576) => Pages::Of1Gib,
                    Some(_) => Pages::Other,
                    None => Pages::Usual,
                };
            }
            _ => {}
        }
        Ok(())
    }

    /// An element has ended, with this text.
    pub(super) fn close(&mut self, path: &[&str], text: &str) {
        if let ["domain", "cpu", "model"] = path {
            self.cpu_model = Some(text.to_owned()).filter(|model| !model.is_empty());
        }
    }

    /// CPU model, machine type, pages.
    pub(super) fn read(self) -> (Option<String>, Option<String>, Pages) {
        let custom = matches!(self.cpu_mode.as_deref(), None | Some("custom"));
        let checked = self.cpu_check.as_deref() != Some("none");
        let counts = self.kvm && custom && checked && !self.cpu_lenient;
        let machine =
            self.arch.zip(self.machine).filter(|_| self.kvm).map(|(arch, machine)| format!("{arch}/{machine}"));
        (self.cpu_model.filter(|_| counts), machine, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::super::xml::parse;
    use super::*;

    fn demands(kind: &str, parts: &str) -> (Option<String>, Option<String>, Pages) {
        let text = format!(
            "<domain type='{kind}'><name>web</name><uuid>{}</uuid><memory>1024</memory><vcpu>1</vcpu>{parts}</domain>",
            uuid::Uuid::from_u128(7)
        );
        let found = parse(&text).unwrap();
        (found.cpu_model, found.machine, found.pages)
    }

    #[test]
    fn a_named_model_counts_where_libvirt_insists_on_it() {
        let model = "<model fallback='forbid'>Haswell</model>";
        let table = [
            ("kvm", format!("<cpu mode='custom' match='exact' check='partial'>{model}</cpu>"), Some("Haswell")),
            ("kvm", format!("<cpu match='exact'>{model}<feature policy='require' name='aes'/></cpu>"), Some("Haswell")),
            ("kvm", format!("<cpu mode='custom'>{model}<feature policy='disable' name='hle'/></cpu>"), None),
            ("kvm", format!("<cpu mode='custom' check='none'>{model}</cpu>"), None),
            ("kvm", "<cpu mode='host-model'/>".to_owned(), None),
            ("kvm", "<cpu mode='host-passthrough' check='none'/>".to_owned(), None),
            ("kvm", "<cpu><topology sockets='1' cores='2' threads='1'/></cpu>".to_owned(), None),
            ("qemu", format!("<cpu mode='custom'>{model}</cpu>"), None),
        ];
        for (kind, cpu, expected) in table {
            assert_eq!(demands(kind, &cpu).0.as_deref(), expected, "{kind} {cpu}");
        }
    }

    #[test]
    fn machine_and_pages() {
        let os = "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>";
        assert_eq!(demands("kvm", os).1.as_deref(), Some("x86_64/pc-q35-7.2"));
        assert_eq!(demands("qemu", os).1, None);
        for (backing, expected) in [
            ("", Pages::Ordinary),
            ("<memoryBacking><nosharepages/></memoryBacking>", Pages::Ordinary),
            ("<memoryBacking><hugepages/></memoryBacking>", Pages::Usual),
            ("<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages></memoryBacking>", Pages::Of2Mib),
            (
                "<memoryBacking><hugepages><page size='1' unit='GiB' nodeset='0'/></hugepages></memoryBacking>",
                Pages::Of1Gib,
            ),
            ("<memoryBacking><hugepages><page size='64' unit='KiB'/></hugepages></memoryBacking>", Pages::Other),
        ] {
            assert_eq!(demands("kvm", backing).2, expected, "{backing}");
        }
    }
}
