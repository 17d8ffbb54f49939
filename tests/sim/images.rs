//! Saved memory: `virsh managedsave`, `virsh save FILE`, and what is started from it. The judge knows what the disks have
//! seen since: an image that is loaded after its VM ran is a violation.

use std::time::Duration;

use mainstay::core::event::HookWish;
use mainstay::guard::table::ProcessKey;
use mainstay::types::vm::{DomainChange, DomainFailure, OffReason};
use mainstay::types::{Generation, VmId};

use super::hypervisor::Then;
use super::world::{H, World};

/// Memory is written for so long.
const WRITING: Duration = Duration::from_secs(1);

/// Memory in a file.
#[derive(Clone, Debug)]
pub struct Image {
    /// What its definition says about the generation.
    pub mark: Option<Generation>,
    /// How often the VM had begun to run.
    starts: u32,
}

impl World {
    fn starts_of(&self, vm: VmId) -> u32 {
        self.judge.starts.get(&vm).copied().unwrap_or(0)
    }

    /// `virsh managedsave`, or `virsh save FILE`.
    pub fn virsh_save(&mut self, h: H, vm: VmId, file: Option<String>) {
        if self.hosts[h].libvirtd.is_none() {
            return;
        }
        let Some(qemu) = self.qemu(h, vm).filter(|qemu| qemu.cpus && !qemu.halted && !qemu.dying) else { return };
        let (key, mark) = (qemu.key, qemu.mark);
        qemu.cpus = false;
        self.domain_event(h, vm, DomainChange::Suspended { migrated: false, by_io_error: false });
        let gate = self.hosts[h].kernel();
        self.after(gate, WRITING, move |world| world.written(h, vm, key, mark, file));
    }

    fn written(&mut self, h: H, vm: VmId, key: ProcessKey, mark: Option<Generation>, file: Option<String>) {
        let gate = self.hosts[h].kernel();
        let Some(qemu) = self.qemu(h, vm).filter(|qemu| qemu.key == key && !qemu.dying) else { return };
        if qemu.cpus {
            return; // Somebody let it go on: the save has failed.
        }
        if qemu.halted {
            return self.after(gate, Duration::from_millis(100), move |world| world.written(h, vm, key, mark, file));
        }
        let image = Image { mark, starts: self.starts_of(vm) };
        let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
        self.tell(
            &host,
            &format!("$ virsh save {name}: saved{}", file.iter().map(|f| format!(" to {f}")).collect::<String>()),
        );
        match file {
            Some(file) => drop(self.files.insert(file, image)),
            None => self.domain(h, vm).saved = Some(image),
        }
        self.exit(h, vm, key, OffReason::Saved);
    }

    /// `virsh restore FILE`.
    pub fn virsh_restore(&mut self, h: H, vm: VmId, file: &str) {
        let Some(image) = self.files.get(file).cloned() else { return };
        self.domain(h, vm).defined = true;
        let what = format!("virsh restore {}", self.vm_name(vm));
        let then = self.tells(h, what);
        self.start_from(h, vm, Some(image), true, then);
    }

    /// Says how a command of a person ended.
    pub fn tells(&self, h: H, what: String) -> Then {
        let host = self.hosts[h].name.clone();
        Box::new(move |world, result| {
            let text = match result {
                Ok(()) => "started".to_owned(),
                Err(DomainFailure::Refused(why)) => format!("refused: {why}"),
                Err(why) => format!("{why:?}"),
            };
            world.tell(&host, &format!("$ {what}: {text}"));
        })
    }

    /// A start, of saved memory if there is some: then the hook is asked about that first. A refusal is told at once (the
    /// hook program does that at the `prepare` which follows), and the image stays.
    pub fn start_from(&mut self, h: H, vm: VmId, image: Option<Image>, run: bool, then: Then) {
        let domain = self.domain(h, vm);
        let idle = domain.defined && domain.qemu.is_none() && !domain.starting;
        let Some(image) = image.filter(|_| idle && self.hosts[h].libvirtd.is_some()) else {
            return self.start_domain(h, vm, run, None, then);
        };
        self.hook(
            h,
            vm,
            HookWish::Restore { saved: image.mark },
            Box::new(move |world, allowed| match allowed {
                Ok(()) => world.start_domain(h, vm, run, Some(image), then),
                Err(why) => then(world, Err(DomainFailure::Refused(why))),
            }),
        );
    }

    /// A QEMU has its memory from this image; what libvirt kept is used up, or discarded.
    pub(super) fn loaded(&mut self, h: H, vm: VmId, image: Option<&Image>) {
        self.domain(h, vm).saved = None;
        if let Some(image) = image
            && image.starts != self.starts_of(vm)
        {
            let (name, host) = (self.vm_name(vm), self.hosts[h].name.clone());
            self.violated(&format!("{name} is restored on {host} with memory older than its disks"));
        }
    }

    /// `virsh autostart`.
    pub fn virsh_autostart(&mut self, h: H, vm: VmId) {
        self.domain(h, vm).autostart = true;
    }

    /// libvirtd starts what is marked for it, once per boot.
    pub(super) fn autostart(&mut self, h: H) {
        if std::mem::replace(&mut self.hosts[h].autostarted, true) {
            return;
        }
        let marked: Vec<VmId> =
            self.domains(h).iter().filter(|(_, d)| d.autostart && d.defined).map(|(vm, _)| *vm).collect();
        for vm in marked {
            let what = format!("autostart of {}", self.vm_name(vm));
            let (image, then) = (self.domain(h, vm).saved.clone(), self.tells(h, what));
            self.start_from(h, vm, image, true, then);
        }
    }

    /// Orderly shutdown with libvirt-guests that saves.
    pub fn power_off_saving(&mut self, h: H) {
        self.hosts[h].going_down = self.hosts[h].life.is_some();
        let running: Vec<VmId> =
            self.domains(h).iter().filter(|(_, domain)| domain.qemu.is_some()).map(|(vm, _)| *vm).collect();
        for vm in running {
            self.virsh_save(h, vm, None);
        }
        self.power_off(h);
    }
}
