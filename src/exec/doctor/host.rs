//! Checks of the host itself: libvirt, hook, lock manager, order at shutdown, autostart, what kind of machine it is.

use super::system::{Guests, HookState, Machine, SystemFacts};
use super::{AgentFacts, Finding, names};
use crate::exec::reading;
use crate::types::guard::Standing;

/// libvirt answers.
pub(super) fn libvirt(agent: &AgentFacts) -> Vec<Finding> {
    vec![match &agent.libvirt {
        Ok(version) if version.starts_with(|first: char| first.is_ascii_digit()) => {
            Finding::ok("libvirt", "libvirt", format!("answers, version {version}"))
        }
        Ok(_) => Finding::ok("libvirt", "libvirt", "answers"),
        Err(why) => Finding::error(
            "libvirt",
            "libvirt",
            why.clone(),
            "systemctl status libvirtd virtqemud; VMs go on meanwhile, but none can be started, stopped or moved here",
        ),
    }]
}

/// The hook is there and the daemon in use calls it. Without it `virsh start` asks nobody.
pub(super) fn hook(agent: Option<&AgentFacts>, system: &SystemFacts) -> Vec<Finding> {
    let (path, daemon) = (system.hook_path.as_str(), system.daemon.as_ref());
    let name = daemon.map_or("libvirtd", |daemon| daemon.name.as_str());
    let reload = format!("systemctl reload {name}");
    let finding = match system.hook {
        HookState::Unknown => Finding::warning("hook", path, "could not be looked at", "run mainstay doctor as root"),
        HookState::Missing => Finding::error(
            "hook",
            path,
            "is not installed: virsh start would start a VM without asking who owns it",
            format!("install mainstay again, then: {reload}"),
        ),
        HookState::NotExecutable => {
            Finding::error("hook", path, "is not executable", format!("chmod 755 {path}; {reload}"))
        }
        HookState::Present { .. } if agent.is_some_and(|agent| agent.hook_seen) => {
            Finding::ok("hook", path, format!("installed, and {name} calls it"))
        }
        HookState::Present { changed_unix_s } => match daemon {
            None => Finding::ok("hook", path, "installed; libvirtd or virtqemud finds it when it is started"),
            Some(daemon) if daemon.started_unix_s < changed_unix_s => Finding::warning(
                "hook",
                path,
                format!("was installed after {name} was started and has not been called yet: {name} may not know it"),
                reload,
            ),
            Some(_) => Finding::ok("hook", path, format!("installed before {name} was started")),
        },
    };
    vec![finding]
}

/// libvirt must not start protected VMs on its own.
pub(super) fn autostart(agent: &AgentFacts) -> Vec<Finding> {
    if agent.autostart.is_empty() {
        return vec![Finding::ok("autostart", "VMs", "no protected VM is started by libvirt at boot")];
    }
    vec![Finding::warning(
        "autostart",
        names(agent.autostart.iter().map(String::as_str)),
        "protected and marked for autostart: at boot libvirt tries to start them and is refused while they run elsewhere",
        "virsh autostart --disable NAME; Mainstay starts what should run",
    )]
}

/// What it finds wrong with itself.
pub(super) fn health(agent: &AgentFacts) -> Vec<Finding> {
    if agent.findings.is_empty() {
        return vec![Finding::ok("health", "this host", "finds nothing wrong with itself")];
    }
    let cure = "mend it; what is done meanwhile stands in mainstay cluster vm-rules ([[health]])";
    agent.findings.iter().map(|text| Finding::warning("health", "this host", text.clone(), cure)).collect()
}

/// sanlock kills VMs and holds the watchdog: two masters.
pub(super) fn lock_manager(system: &SystemFacts) -> Vec<Finding> {
    vec![match system.lock_manager.as_deref() {
        Some("sanlock") => Finding::error(
            "lock-manager",
            "/etc/libvirt/qemu.conf",
            "lock_manager = \"sanlock\": it kills VMs and uses the watchdog by its own rules",
            "remove the line, restart libvirtd or virtqemud; Mainstay's claims and QEMU's image locks replace it",
        ),
        Some(other) => {
            Finding::ok("lock-manager", "/etc/libvirt/qemu.conf", format!("{other}: works like image locks"))
        }
        None => Finding::ok("lock-manager", "/etc/libvirt/qemu.conf", "none but QEMU's image locks"),
    }]
}

/// At shutdown mainstayd must outlive libvirt-guests.
pub(super) fn libvirt_guests(system: &SystemFacts) -> Vec<Finding> {
    let object = "libvirt-guests.service";
    vec![match &system.guests {
        Guests::Inactive => Finding::ok("libvirt-guests", object, "not in use"),
        Guests::Active { after_mainstayd: true } => {
            Finding::ok("libvirt-guests", object, "acts before mainstayd stops")
        }
        Guests::Active { after_mainstayd: false } => Finding::warning(
            "libvirt-guests",
            object,
            "is not ordered after mainstayd: at shutdown its stops may be taken for a person's",
            "install Mainstay's units as shipped, then: systemctl daemon-reload",
        ),
        Guests::Unknown(why) => Finding::warning(
            "libvirt-guests",
            object,
            format!("its order cannot be read: {why}"),
            "systemctl show -p After libvirt-guests.service must name mainstayd.service",
        ),
    }]
}

/// A hypervisor that pauses this host stops its clock, and with it what a lease rests on.
pub(super) fn machine(system: &SystemFacts) -> Vec<Finding> {
    let cure = "give it a power-off fence, and never pause, save or snapshot it with memory while it is a member";
    vec![match &system.machine {
        Machine::Metal => Finding::ok("machine", "this host", "no sign of a hypervisor below it"),
        Machine::Vm(kind) => Finding::warning(
            "machine",
            "this host",
            format!("is itself a VM ({kind}): if it is paused, its clock stands still and its lease with it"),
            cure,
        ),
        Machine::Container(kind) => Finding::warning(
            "machine",
            "this host",
            format!("is a container ({kind}): good for tests; a real host owns its kernel"),
            "use it for tests only",
        ),
        Machine::Unknown => Finding::warning("machine", "this host", "cannot tell whether it is a VM", cure),
    }]
}

/// What is left when guard and systemd hang together.
pub(super) fn watchdog(system: &SystemFacts) -> Vec<Finding> {
    let object = "hardware watchdog";
    vec![match &system.watchdog {
        None => Finding::ok("watchdog", object, "the guard has said nothing about it"),
        Some(Standing::None) => Finding::ok(
            "watchdog",
            object,
            "none: should this host hang so that neither guard nor systemd can act, nothing resets it; \
             set [guard] watchdog in /etc/mainstay/mainstay.toml if it has one",
        ),
        Some(Standing::Safe(text)) => Finding::ok("watchdog", object, text.clone()),
        Some(Standing::Late(text)) => {
            Finding::warning("watchdog", object, text.clone(), "a longer lease, or another device")
        }
        Some(Standing::Failed(text)) => Finding::warning(
            "watchdog",
            object,
            text.clone(),
            "mend [guard] watchdog in /etc/mainstay/mainstay.toml, then: systemctl restart mainstay-guard",
        ),
    }]
}

/// What a failed guest's screen shows in a graphics mode. Nothing depends on it.
pub(super) fn screens(system: &SystemFacts) -> Vec<Finding> {
    let object = "screens of guests";
    vec![if system.reads_pictures {
        Finding::ok("screens", object, "tesseract is there: text on pictures is read")
    } else {
        let what = format!("tesseract is not installed: pictures are kept, not read (package {})", reading::PACKAGE);
        Finding::ok("screens", object, what)
    }]
}
