//! Where disks lie, and where claims do. People copy the disks of a VM that runs to another datastore.
//!
//! ```text
//!   virsh blockcopy ─ 300 ms ─► pivot: QEMU and its definition have the copy, the old image is closed ─► event
//! ```
//!
//! Each host's definition of a VM says where its disks lie, as of its n-th change; a QEMU knows where it has them open.

use std::time::Duration;

use mainstay::core::event::{Event, Listed};
use mainstay::guard::table::ProcessKey;
use mainstay::types::vm::{DomainChange, DomainInfo};
use mainstay::types::{Claim, DatastoreId, Generation, Holder, VmId, VmRecord};

use super::host::Path;
use super::hypervisor::Domain;
use super::world::{Gate, H, World};

/// A small disk.
const COPIES: Duration = Duration::from_millis(300);

impl World {
    // ---- disks --------------------------------------------------------------------------------------------------

    /// Datastore by name.
    pub fn store(&self, name: &str) -> Option<DatastoreId> {
        self.settings.datastores.iter().find(|datastore| datastore.name == name).map(|datastore| datastore.id)
    }

    fn store_path(&self, id: DatastoreId) -> &str {
        self.settings.datastore(id).map_or("", |datastore| datastore.path.as_str())
    }

    /// Where the n-th change of a definition has its disks.
    pub fn place(&self, vm: VmId, edit: u32) -> DatastoreId {
        self.places.get(&(vm, edit)).copied().unwrap_or(self.vms[&vm].record.home)
    }

    /// Where the disks of a VM lie on a host: those that its QEMU has open, else as it is defined.
    pub fn disk_of(&self, h: H, vm: VmId) -> DatastoreId {
        let domain = self.hosts[h].domains.get(&vm);
        let open = domain.and_then(|domain| domain.qemu.as_ref()).map(|qemu| qemu.disk);
        open.unwrap_or_else(|| self.place(vm, domain.map_or(0, |domain| domain.edit)))
    }

    /// A record whose disks lie there.
    pub fn with_disks(&self, mut record: VmRecord, to: DatastoreId) -> VmRecord {
        let from = self.store_path(record.home).to_owned();
        for disk in &mut record.disks {
            disk.path = disk.path.replacen(&from, self.store_path(to), 1);
            disk.datastore = Some(to);
        }
        record.home = to;
        record
    }

    /// Whose image this is, and where it lies.
    pub fn image(&self, paths: &[String]) -> Option<(VmId, DatastoreId)> {
        let mut all = self.vms.values().flat_map(|spec| self.stores.keys().map(move |home| (spec, *home)));
        let on = |(spec, home): &(&super::world::Spec, DatastoreId)| {
            self.with_disks(spec.record.clone(), *home).disks.iter().any(|disk| paths.contains(&disk.path))
        };
        all.find(on).map(|(spec, home)| (spec.id, home))
    }

    /// `virsh edit`: its disks, which a person has copied there while it stands, lie on another datastore.
    pub fn virsh_redefine(&mut self, h: H, vm: VmId, to: DatastoreId) {
        if self.hosts[h].libvirtd.is_none() || !self.domain(h, vm).defined || self.place_of(vm).is_some() {
            return;
        }
        let edit = self.edit(h, vm, None);
        self.places.insert((vm, edit), to);
        let (host, name) = (self.hosts[h].name.clone(), self.vm_name(vm));
        self.tell(&host, &format!("$ virsh edit {name}: edit {edit}"));
    }

    /// `virsh blockcopy --wait --pivot`.
    pub fn virsh_blockcopy(&mut self, vm: VmId, to: DatastoreId) {
        let Some(h) = self.place_of(vm) else { return };
        let (Some(daemon), Some(key)) = (self.hosts[h].libvirtd, self.qemu(h, vm).map(|qemu| qemu.key)) else { return };
        self.after(Gate::Libvirt(h, daemon), COPIES, move |world| world.pivot(h, vm, key, to));
    }

    fn pivot(&mut self, h: H, vm: VmId, key: ProcessKey, to: DatastoreId) {
        let from = self.disk_of(h, vm);
        let well = [from, to].into_iter().all(|id| self.hosts[h].path(id) == Path::Well && !self.stores[&id].hung);
        let moves = self.qemus().any(|(_, of, qemu)| of == vm && qemu.incoming);
        let able = self.qemu(h, vm).is_some_and(|qemu| qemu.key == key && qemu.cpus && !qemu.halted && !qemu.dying);
        let (host, name) = (self.hosts[h].name.clone(), self.vm_name(vm));
        if from == to || !well || moves || !able || self.domain(h, vm).busy != 0 {
            return self.tell(&host, &format!("$ virsh blockcopy {name}: failed"));
        }
        let boot = self.hosts[h].life.unwrap_or(0);
        self.stores.get_mut(&from).expect("its disks'").release(vm, h, boot);
        let store = self.stores.get_mut(&to).expect("a datastore of the world");
        // A new image: nobody else has it open, and nothing is under way to it.
        store.locks.insert(vm, (h, boot));
        store.writers.insert(vm, [(h, boot)].into());
        let follows = self.domain(h, vm).defined && self.place(vm, self.domains(h)[&vm].edit) == from;
        if follows {
            let edit = self.edit(h, vm, None);
            self.places.insert((vm, edit), to);
        }
        let edit = self.domain(h, vm).edit;
        if let Some(qemu) = self.qemu(h, vm) {
            qemu.disk = to;
            qemu.edit = edit;
        }
        let store = self.settings.datastore(to).map(|datastore| datastore.name.clone()).unwrap_or_default();
        self.tell(&host, &format!("$ virsh blockcopy {name}: its disks lie on {store} now"));
        self.domain_event(h, vm, DomainChange::DisksMoved);
    }

    /// What libvirt lists.
    pub fn list(&self, h: H) -> Event {
        let host = &self.hosts[h];
        let there = host.domains.iter().filter(|(_, domain)| domain.defined || domain.qemu.is_some());
        let listed = |(vm, domain): (&VmId, &Domain)| {
            let record = self.definition(h, *vm);
            // A pause that hangs is such a call, too.
            let busy = domain.starting || 0 < domain.busy || domain.qemu.as_ref().is_some_and(|qemu| qemu.pausing);
            let runs = domain.qemu.as_ref().filter(|_| domain.defined && !busy);
            let live = runs.map(|qemu| Ok(Box::new(self.with_disks(record.clone(), qemu.disk))));
            let domain = DomainInfo {
                vm: *vm,
                name: record.name.clone(),
                state: domain.state(),
                persistent: domain.defined,
                autostart: domain.autostart,
                xml: (!busy).then(|| record.xml.clone()),
                live_xml: None,
                pid: domain.qemu.as_ref().map(|qemu| qemu.key.pid),
                guest_socket: None,
                managed_save: domain.saved.is_some(),
                busy,
            };
            Listed { domain, record: (!busy).then(|| Ok(Box::new(record))), live }
        };
        Event::Listed(there.map(listed).collect())
    }

    // ---- paths --------------------------------------------------------------------------------------------------

    /// A host's path to one datastore changes.
    pub fn set_path_to(&mut self, h: H, home: DatastoreId, path: Path) {
        self.excuse(h);
        self.hosts[h].paths.insert(home, path);
        if path == Path::Well {
            self.reconnect_storage(h);
            self.unpark(home);
        } else {
            self.silence_store(h, home);
        }
    }

    /// One datastore hangs for everybody.
    pub fn hang_store(&mut self, home: DatastoreId) {
        self.stalled();
        self.stores.get_mut(&home).expect("a datastore of the world").hung = true;
    }

    // ---- claims, for the judge ----------------------------------------------------------------------------------

    /// Where the highest claim of a VM lies.
    pub fn home_of(&self, vm: VmId) -> DatastoreId {
        self.judge.homes.get(&vm).copied().unwrap_or(self.vms[&vm].record.home)
    }

    /// Claims have come or gone.
    pub fn find_home(&mut self, vm: VmId) {
        let highest = self.stores.iter().map(|(id, store)| (store.generation(vm), *id)).max();
        if let Some((_, home)) = highest.filter(|(generation, _)| *generation != Generation(0)) {
            self.judge.homes.insert(vm, home);
        }
    }

    /// The claim that this one follows, on whichever datastore. A claim that moves the home is followed there alone.
    pub(super) fn predecessor(&mut self, home: DatastoreId, claim: &Claim) -> Option<Claim> {
        let vm = claim.tenure.vm;
        let below = |store: &super::datastore::Datastore| {
            let all = store.claims.get(&vm)?.range(..claim.tenure.generation);
            all.rev().find_map(|(_, (claim, _))| claim.as_ref().ok().cloned())
        };
        let last = self.stores.values().filter_map(below).max_by_key(|claim| claim.tenure.generation)?;
        let lied = self.stores.values().any(|store| store.lied);
        if last.next_home() != home && last.holder != Holder::Deleted && !lied {
            let (name, generation) = (claim.name.clone(), claim.tenure.generation);
            self.violated(&format!("claim {generation} of {name} is made on another datastore than its home"));
        }
        Some(last)
    }
}
