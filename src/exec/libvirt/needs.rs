//! From a definition to a protection record: what another host must have to run the VM, and what is missing for that.
//! Pure. Policy is not here: whether a VM with gaps is protected is decided elsewhere.

use super::xml::{BadXml, DomainXml, Tpm, XmlDisk};
use crate::types::needs::Needs;
use crate::types::settings::ClusterSettings;
use crate::types::{DatastoreId, DiskNeed, VmRecord};

/// The record. Its home is the datastore of the first disk that a start needs; only if none such lies on a datastore,
/// of the first of the others.
pub(super) fn record(domain: &DomainXml, xml: &str, settings: &ClusterSettings) -> Result<VmRecord, BadXml> {
    let disks = needs(domain, settings);
    let images = disks.iter().take(domain.disks.len());
    let home = images
        .clone()
        .filter(|disk| !disk.optional)
        .chain(images)
        .find_map(|disk| disk.datastore)
        .ok_or(BadXml::NotOnDatastore)?;
    Ok(VmRecord {
        vm: domain.vm,
        name: domain.name.clone(),
        home,
        xml: xml.to_owned(),
        memory_kib: domain.memory_kib,
        vcpus: domain.vcpus,
        gaps: gaps(domain, settings),
        disks,
        needs: Needs {
            networks: domain.networks.clone(),
            cpu_model: domain.cpu_model.clone(),
            machine: domain.machine.clone(),
            pages: domain.pages,
            devices: domain.hostdevs || domain.tpm == Some(Tpm::Passthrough),
        },
        on_doubt: domain.on_doubt,
    })
}

/// Every disk in the definition's order; then what else it opens on a datastore. A kernel or firmware on the host
/// itself is not listed: every host has its own, and libvirt says so if one has not.
fn needs(domain: &DomainXml, settings: &ClusterSettings) -> Vec<DiskNeed> {
    let image = |disk: &XmlDisk| DiskNeed {
        path: disk.path.clone(),
        datastore: place(disk, settings),
        writable: !disk.readonly,
        optional: disk.removable || disk.optional,
        shareable: disk.shareable,
    };
    let mut needs: Vec<DiskNeed> = domain.disks.iter().map(image).collect();
    let tpm = match &domain.tpm {
        Some(Tpm::At(path)) => Some(path),
        Some(Tpm::Local | Tpm::Passthrough) | None => None,
    };
    let state = domain.nvram.iter().chain(tpm).map(|path| (path, true));
    let fixed = domain.boot.iter().chain(&domain.firmware).map(|path| (path, false));
    for (path, writable) in state.chain(fixed) {
        let datastore = on(path, settings);
        if datastore.is_some() {
            needs.push(DiskNeed { path: path.clone(), datastore, writable, optional: false, shareable: false });
        }
    }
    needs
}

/// What another host could not have, for people.
fn gaps(domain: &DomainXml, settings: &ClusterSettings) -> Vec<String> {
    let mut gaps = Vec::new();
    for disk in &domain.disks {
        if !disk.removable && !disk.optional && place(disk, settings).is_none() {
            gaps.push(format!("disk {} is on no datastore", disk.path));
        }
    }
    match &domain.nvram {
        Some(path) if on(path, settings).is_none() => gaps.push(format!("NVRAM {path} is on no datastore")),
        None if domain.nvram_by_libvirt => gaps.push("NVRAM is in libvirt's own folder, on no datastore".into()),
        Some(_) | None => {}
    }
    match &domain.tpm {
        Some(Tpm::Local) => gaps.push("TPM state is in libvirt's own folder, on no datastore".into()),
        Some(Tpm::At(path)) if on(path, settings).is_none() => {
            gaps.push(format!("TPM state {path} is on no datastore"));
        }
        Some(Tpm::Passthrough) => gaps.push("the host's TPM is passed through".into()),
        Some(Tpm::At(_)) | None => {}
    }
    for share in &domain.shares {
        if on(share, settings).is_none() {
            gaps.push(format!("shared folder {share} is on no datastore"));
        }
    }
    if domain.hostdevs {
        gaps.push("devices of the host are passed through".into());
    }
    gaps
}

fn place(disk: &XmlDisk, settings: &ClusterSettings) -> Option<DatastoreId> {
    if disk.network { None } else { on(&disk.path, settings) }
}

fn on(path: &str, settings: &ClusterSettings) -> Option<DatastoreId> {
    settings.datastore_of_path(path).map(|datastore| datastore.id)
}
