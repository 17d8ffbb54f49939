//! Definitions: each host has its own of a VM, and people change them. The n-th change of `web` reads `web#n`.

use mainstay::types::settings::OnDoubt;
use mainstay::types::vm::DomainChange;
use mainstay::types::{VmId, VmRecord};

use super::world::{H, World};

impl World {
    /// What the definition of a VM on a host says.
    pub fn definition(&self, h: H, vm: VmId) -> VmRecord {
        let mut record = self.vms[&vm].record.clone();
        let edit = self.domains(h).get(&vm).map_or(0, |domain| domain.edit);
        if edit != 0 {
            record.xml = format!("{}#{edit}", record.name);
        }
        if let Some((_, policy)) = self.policies.range((vm, 0)..=(vm, edit)).next_back() {
            record.on_doubt = *policy;
        }
        self.with_disks(record, self.place(vm, edit))
    }

    /// `virsh define`.
    pub fn define(&mut self, h: H, xml: &str) {
        let (name, edit) = xml.split_once('#').unwrap_or((xml, "0"));
        let vm = self.vm(name).expect("definitions of the world");
        let domain = self.domain(h, vm);
        domain.defined = true;
        domain.edit = edit.parse().expect("edits are numbered");
        self.domain_event(h, vm, DomainChange::Defined);
    }

    /// `virsh define`, as it is recorded.
    pub fn virsh_define(&mut self, h: H, vm: VmId) {
        self.domain(h, vm).defined = true;
        self.domain_event(h, vm, DomainChange::Defined);
    }

    /// `virsh undefine`.
    pub fn virsh_undefine(&mut self, h: H, vm: VmId) {
        self.domain(h, vm).defined = false;
        self.domain_event(h, vm, DomainChange::Undefined);
    }

    /// `virsh edit`: the VM, should it run, has the change from its next start on.
    pub fn virsh_edit(&mut self, h: H, vm: VmId) {
        if self.hosts[h].libvirtd.is_none() || !self.domain(h, vm).defined {
            return;
        }
        let edit = self.edit(h, vm, None);
        let (host, name) = (self.hosts[h].name.clone(), self.vm_name(vm));
        self.tell(&host, &format!("$ virsh edit {name}: edit {edit}"));
    }

    /// The definition on a host is changed; `policy`: this is what it says from now on.
    pub fn edit(&mut self, h: H, vm: VmId, policy: Option<Option<OnDoubt>>) -> u32 {
        let edits = self.edits.entry(vm).or_default();
        *edits += 1;
        let edit = *edits;
        let before = std::mem::replace(&mut self.domain(h, vm).edit, edit);
        self.places.insert((vm, edit), self.place(vm, before));
        if let Some(policy) = policy {
            self.policies.insert((vm, edit), policy);
        }
        self.domain_event(h, vm, DomainChange::Defined);
        edit
    }
}
