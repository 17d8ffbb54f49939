//! What the hook program and the agent say to each other: one question, one verdict, each in a frame (wire/frame.rs).
//!
//! A package upgrade replaces the program before the agent is restarted, so for a moment both may differ: the bodies
//! are frozen once released, and the first number says which they are. A reader that finds another number says no
//! more; the program then acts as if the agent were down.

use std::time::Duration;

use quick_xml::events::Event;
use quick_xml::reader::Reader;
use serde::{Deserialize, Serialize};

use crate::types::VmId;

/// Number of these bodies.
pub const HOOK_PROTOCOL: u16 = 1;
/// How long the program waits for everything together: libvirtd holds the domain meanwhile.
pub const HOOK_WAIT: Duration = Duration::from_secs(3);
/// Longest domain XML that is passed on; a protection record holds less.
pub const HOOK_XML_MAX: usize = 512 * 1024;

/// The operations of libvirt that may be refused. All others must succeed whatever happens: libvirtd answers a failing
/// `reconnect` or `started` by killing the VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum HookOperation {
    /// A VM is about to be started.
    Prepare,
    /// A migration is about to come in here.
    Migrate,
    /// A saved image is about to be loaded; `Prepare` follows. A refusal takes effect only there (client.rs says why).
    Restore,
}

impl HookOperation {
    /// By libvirt's name; none for those that are never refused.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "prepare" => Some(Self::Prepare),
            "migrate" => Some(Self::Migrate),
            "restore" => Some(Self::Restore),
            _ => None,
        }
    }

    /// What it is called in a message for people.
    #[must_use]
    pub fn verb(self) -> &'static str {
        match self {
            Self::Prepare => "start",
            Self::Migrate => "migrate here",
            Self::Restore => "restore",
        }
    }
}

/// From the program.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HookQuestion {
    /// `HOOK_PROTOCOL`.
    pub protocol: u16,
    /// What is about to happen.
    pub operation: HookOperation,
    /// To whom.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Its definition, as libvirt gave it.
    pub xml: String,
}

/// From the agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum HookVerdict {
    /// Go on.
    Allow,
    /// Do not; cause and cure, for people.
    Refuse(String),
}

/// The domain's UUID. None when the text is no domain's XML.
#[must_use]
pub fn vm_of(xml: &str) -> Option<VmId> {
    let mut reader = Reader::from_str(xml);
    let (mut depth, mut in_domain, mut in_uuid) = (0_usize, false, false);
    loop {
        match reader.read_event().ok()? {
            Event::Start(element) => {
                depth += 1;
                in_domain |= depth == 1 && element.name().as_ref() == "domain";
                in_uuid = in_domain && depth == 2 && element.name().as_ref() == "uuid";
            }
            Event::End(_) => {
                depth = depth.saturating_sub(1);
                in_uuid = false;
            }
            Event::Text(text) if in_uuid => return text.xml10_content().trim().parse().ok(),
            Event::Eof => return None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame;

    #[test]
    fn only_three_operations_can_be_refused() {
        let table = [
            ("prepare", Some(HookOperation::Prepare)),
            ("migrate", Some(HookOperation::Migrate)),
            ("restore", Some(HookOperation::Restore)),
            ("start", None),
            ("started", None),
            ("stopped", None),
            ("release", None),
            ("reconnect", None),
            ("attach", None),
            ("Prepare", None),
            ("", None),
        ];
        for (name, expected) in table {
            assert_eq!(HookOperation::named(name), expected, "{name}");
        }
    }

    #[test]
    fn the_uuid_is_the_domains_own() {
        let uuid = "11111111-2222-3333-4444-555555555555";
        let vm = uuid.parse().ok();
        let table = [
            (format!("<domain type='kvm' id='3'>\n <name>a</name>\n <uuid> {uuid}\n</uuid></domain>"), vm),
            (format!("<?xml version='1.0'?><!-- c --><domain><uuid>{uuid}</uuid>"), vm),
            (format!("<domain><os><uuid>{uuid}</uuid></os></domain>"), None),
            (format!("<network><uuid>{uuid}</uuid></network>"), None),
            ("<domain><uuid>junk</uuid></domain>".into(), None),
            ("<domain><uuid/></domain>".into(), None),
            ("<domain>".into(), None),
            (String::new(), None),
            ("\u{0}<<>".into(), None),
        ];
        for (xml, expected) in table {
            assert_eq!(vm_of(&xml), expected, "{xml}");
        }
    }

    #[test]
    fn golden_bytes() {
        let question = HookQuestion {
            protocol: HOOK_PROTOCOL,
            operation: HookOperation::Migrate,
            vm: "11111111-2222-3333-4444-555555555555".parse().unwrap(),
            name: "web1".into(),
            xml: "<d/>".into(),
        };
        let mut expected = vec![1, 1, 16];
        expected
            .extend([0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x44, 0x44, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55]);
        expected.extend(b"\x04web1\x04<d/>");
        assert_eq!(frame::encode(&question).unwrap()[frame::FRAME_HEADER..], expected);
        assert_eq!(frame::encode(&HookVerdict::Allow).unwrap()[frame::FRAME_HEADER..], [0]);
        assert_eq!(frame::encode(&HookVerdict::Refuse("no".into())).unwrap()[frame::FRAME_HEADER..], *b"\x01\x02no");
    }
}
