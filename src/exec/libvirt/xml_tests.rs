//! Definitions as libvirt writes them, and junk.

use proptest::prelude::*;

use super::*;
use crate::types::power::PowerSettings;
use crate::types::settings::{ClusterSettings, DatastoreSettings, LateWrites, Timing, VmDefaults};
use crate::types::{ClusterId, DatastoreId, DiskNeed, StorageFence};

const WEB1: &str = r#"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web &amp; shop&#33;</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <metadata><libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/"><name>not this</name></libosinfo:libosinfo></metadata>
  <memory unit='KiB'>131072</memory>
  <currentMemory unit='KiB'>65536</currentMemory>
  <vcpu placement='static' current='1'>4</vcpu>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/vm/a/web1_VARS.fd</nvram>
    <kernel>/vm/a/vmlinuz</kernel>
    <initrd>/boot/initrd</initrd>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/vm/a/web1.qcow2' index='1'/>
      <backingStore type='file' index='2'>
        <format type='raw'/>
        <source file='/vm/b/base.img'/>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='network' device='disk'>
      <source protocol='rbd' name='pool/web1'><host name='mon1' port='6789'/></source><shareable/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='file' device='cdrom'>
      <source file='/iso/debian.iso'/><target dev='sdb' bus='sata'/><readonly/>
    </disk>
    <disk type='file' device='floppy'><source file='/vm/a/floppy.img'/><target dev='fda'/></disk>
    <disk type='block' device='disk'>
      <source dev='/dev/vg0/web1'/><target dev='vdc'/><readonly/>
    </disk>
    <disk type='file' device='disk'>
      <source file='/vm/a/extra.qcow2' startupPolicy='optional'>
        <dataStore type='file'><format type='raw'/><source file='/vm/b/extra.raw'/></dataStore>
      </source>
      <target dev='vdd'/>
    </disk>
    <disk type='volume' device='disk'><source pool='default' volume='v1'/><target dev='vde'/></disk>
    <filesystem type='mount'><source dir='/srv/share'/><target dir='share'/></filesystem>
    <interface type='network'><source network='default' portgroup='x'/></interface>
    <interface type='bridge'><source bridge='br0'/></interface>
    <interface type='bridge'><source bridge='br0'/></interface>
    <interface type='direct'><source dev='eth1' mode='bridge'/></interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <hostdev mode='subsystem' type='pci' managed='yes'><source><address bus='0x06'/></source></hostdev>
  </devices>
</domain>"#;

fn disk(path: &str) -> XmlDisk {
    XmlDisk { path: path.into(), readonly: false, shareable: false, removable: false, optional: false, network: false }
}

/// The smallest definition with these parts in it.
fn small(os: &str, devices: &str) -> String {
    format!(
        "<domain><name>a</name><uuid>11111111-2222-3333-4444-555555555555</uuid><memory>1024</memory><vcpu>1</vcpu>\
         <os>{os}</os><devices>{devices}</devices></domain>"
    )
}

fn settings() -> ClusterSettings {
    let datastore = |number: u128, path: &str| DatastoreSettings {
        id: DatastoreId(Uuid::from_u128(number)),
        name: format!("d{number}"),
        path: path.into(),
        fence: StorageFence::None,
        late_writes: LateWrites::Exclude,
        accepted: 0,
    };
    ClusterSettings {
        schema: 1,
        version: 1,
        cluster: ClusterId::default(),
        name: "test".into(),
        timing: Timing::DEFAULT,
        members: Vec::new(),
        datastores: vec![datastore(1, "/vm/a"), datastore(2, "/vm/b")],
        vms: VmDefaults::default(),
        power: PowerSettings::default(),
        foreign_migration: Default::default(),
        guests: Default::default(),
        rules: Default::default(),
        maintenance: Vec::new(),
        disarmed: None,
    }
}

#[test]
fn a_rich_definition_is_read_whole() {
    let found = parse(WEB1).unwrap();
    assert_eq!(found.name, "web & shop!");
    assert_eq!(found.vm.to_string(), "11111111-2222-3333-4444-555555555555");
    assert_eq!((found.memory_kib, found.vcpus), (131_072, 4));
    let expected = [
        disk("/vm/a/web1.qcow2"),
        XmlDisk { readonly: true, ..disk("/vm/b/base.img") },
        XmlDisk { network: true, shareable: true, ..disk("rbd:pool/web1") },
        XmlDisk { readonly: true, removable: true, ..disk("/iso/debian.iso") },
        XmlDisk { removable: true, ..disk("/vm/a/floppy.img") },
        XmlDisk { readonly: true, ..disk("/dev/vg0/web1") },
        XmlDisk { optional: true, ..disk("/vm/a/extra.qcow2") },
        XmlDisk { optional: true, ..disk("/vm/b/extra.raw") },
        XmlDisk { network: true, ..disk("volume:default/v1") },
    ];
    assert_eq!(found.disks, expected);
    assert_eq!(found.nvram.as_deref(), Some("/vm/a/web1_VARS.fd"));
    assert!(!found.nvram_by_libvirt && found.hostdevs);
    assert_eq!(found.firmware.as_deref(), Some("/usr/share/OVMF/OVMF_CODE.fd"));
    assert_eq!(found.boot, ["/vm/a/vmlinuz", "/boot/initrd"]);
    assert_eq!(found.networks, ["network:default", "bridge:br0", "device:eth1"]);
    assert_eq!(found.ports, ["org.qemu.guest_agent.0", "com.redhat.spice.0"]);
    assert_eq!(found.shares, ["/srv/share"]);
    assert_eq!(found.tpm, Some(Tpm::Local));
}

#[test]
fn its_record_names_needs_and_gaps() {
    let record = record(WEB1, &settings()).unwrap();
    let store = |number: u128| Some(DatastoreId(Uuid::from_u128(number)));
    assert_eq!(Some(record.home), store(1));
    assert_eq!(record.xml, WEB1);
    let need = |path: &str, datastore, writable, optional| DiskNeed {
        path: path.into(),
        datastore,
        writable,
        optional,
        shareable: path == "rbd:pool/web1",
    };
    let expected = [
        need("/vm/a/web1.qcow2", store(1), true, false),
        need("/vm/b/base.img", store(2), false, false),
        need("rbd:pool/web1", None, true, false),
        need("/iso/debian.iso", None, false, true),
        need("/vm/a/floppy.img", store(1), true, true),
        need("/dev/vg0/web1", None, false, false),
        need("/vm/a/extra.qcow2", store(1), true, true),
        need("/vm/b/extra.raw", store(2), true, true),
        need("volume:default/v1", None, true, false),
        need("/vm/a/web1_VARS.fd", store(1), true, false),
        need("/vm/a/vmlinuz", store(1), false, false),
    ];
    assert_eq!(record.disks, expected);
    let expected = [
        "disk rbd:pool/web1 is on no datastore",
        "disk /dev/vg0/web1 is on no datastore",
        "disk volume:default/v1 is on no datastore",
        "TPM state is in libvirt's own folder, on no datastore",
        "shared folder /srv/share is on no datastore",
        "devices of the host are passed through",
    ];
    assert_eq!(record.gaps, expected);
}

#[test]
fn where_the_home_is() {
    let image = |path: &str| format!("<disk type='file' device='disk'><source file='{path}'/></disk>");
    let cdrom = |path: &str| format!("<disk type='file' device='cdrom'><source file='{path}'/></disk>");
    let table: [(String, Option<u128>); 7] = [
        (image("/vm/a/x"), Some(1)),
        (image("/vm/b/x") + &image("/vm/a/y"), Some(2)),
        (image("/local/x") + &image("/vm/b/y"), Some(2)),
        (cdrom("/vm/b/x.iso") + &image("/vm/a/y"), Some(1)),
        (cdrom("/vm/b/x.iso"), Some(2)),
        (image("/vm/abc/x"), None),
        (String::new(), None),
    ];
    for (devices, expected) in table {
        let home = record(&small("", &devices), &settings()).map(|record| record.home.0.as_u128());
        assert_eq!(home, expected.ok_or(BadXml::NotOnDatastore), "{devices}");
    }
    // NVRAM alone makes no home.
    let nvram = small("<nvram>/vm/a/vars</nvram>", &image("/local/x"));
    assert_eq!(record(&nvram, &settings()), Err(BadXml::NotOnDatastore));
}

#[test]
fn gaps_of_state_beside_the_disks() {
    let image = "<disk type='file' device='disk'><source file='/vm/a/x'/></disk>";
    let tpm = |inner: &str| format!("{image}<tpm model='tpm-tis'>{inner}</tpm>");
    let table: [(&str, String, &[&str]); 12] = [
        ("", image.into(), &[]),
        ("<loader type='rom'>/usr/share/seabios</loader>", image.into(), &[]),
        ("<loader type='pflash' stateless='yes'>/x</loader>", image.into(), &[]),
        ("<loader type='pflash'>/x</loader>", image.into(), &["NVRAM is in libvirt's own folder, on no datastore"]),
        ("<nvram>/var/x_VARS.fd</nvram>", image.into(), &["NVRAM /var/x_VARS.fd is on no datastore"]),
        ("<nvram type='file'><source file='/vm/b/x_VARS.fd'/></nvram>", image.into(), &[]),
        ("", tpm("<backend type='emulator'><source type='dir' path='/vm/a/tpm'/></backend>"), &[]),
        (
            "",
            tpm("<backend type='emulator'><source type='dir' path='/x'/></backend>"),
            &["TPM state /x is on no datastore"],
        ),
        (
            "",
            tpm("<backend type='passthrough'><device path='/dev/tpm0'/></backend>"),
            &["the host's TPM is passed through"],
        ),
        ("", format!("{image}<interface type='hostdev'/>"), &["devices of the host are passed through"]),
        (
            "",
            format!("{image}<disk type='nvme' device='disk'><source type='pci'/></disk>"),
            &["devices of the host are passed through"],
        ),
        ("", format!("{image}<filesystem><source dir='/vm/a/share'/></filesystem>"), &[]),
    ];
    for (os, devices, expected) in table {
        assert_eq!(record(&small(os, &devices), &settings()).unwrap().gaps, expected, "{os} {devices}");
    }
    let by_firmware = small("", image).replace("<os>", "<os firmware='efi'>");
    assert_eq!(record(&by_firmware, &settings()).unwrap().gaps, ["NVRAM is in libvirt's own folder, on no datastore"]);
}

#[test]
fn amounts_of_memory() {
    let table = [
        ("1024", None, Some(1024)),
        ("1", Some("KiB"), Some(1)),
        ("1", Some("b"), Some(1)),
        ("2048", Some("bytes"), Some(2)),
        ("1", Some("KB"), Some(1)),
        ("4", Some("MiB"), Some(4096)),
        ("4", Some("M"), Some(4096)),
        ("1", Some("GB"), Some(976_563)),
        ("2", Some("GiB"), Some(2_097_152)),
        ("1", Some("T"), Some(1 << 30)),
        ("1", Some("parsec"), None),
        ("-1", None, None),
        ("x", None, None),
        ("18446744073709551615", Some("TiB"), None),
    ];
    for (amount, unit, expected) in table {
        assert_eq!(kib(amount, unit), expected, "{amount} {unit:?}");
    }
}

#[test]
fn bad_definitions_say_why() {
    let good = small("", "");
    assert!(parse(&good).is_ok());
    let deep = format!("{}{}", "<a>".repeat(100), "</a>".repeat(100));
    let many = "<disk><source file='/x'/></disk>".repeat(300);
    let table: [(String, BadXml); 12] = [
        (String::new(), BadXml::NotDomain),
        ("<network/>".into(), BadXml::NotDomain),
        (good.replace("<name>a</name>", ""), BadXml::Missing("name")),
        (good.replace("1111-2222", "x"), BadXml::Missing("UUID")),
        (good.replace("<uuid>", "<guid>").replace("</uuid>", "</guid>"), BadXml::Missing("UUID")),
        (good.replace("1024", "lots"), BadXml::Missing("memory")),
        (good.replace("1024", "0"), BadXml::Missing("memory")),
        (good.replace("<vcpu>1</vcpu>", ""), BadXml::Missing("vCPUs")),
        (good.replace("<vcpu>1", "<vcpu>-1"), BadXml::Missing("vCPUs")),
        (small("", &deep), BadXml::TooDeep),
        (small("", &many), BadXml::TooManyDisks),
        (" ".repeat(XML_MAX + 1), BadXml::TooLong { len: XML_MAX + 1 }),
    ];
    for (xml, expected) in table {
        assert_eq!(parse(&xml), Err(expected), "{}", &xml[..xml.len().min(200)]);
    }
    for cut in 1..good.len() {
        assert!(parse(&good[..cut]).is_err(), "cut at {cut}");
    }
    for junk in ["<domain><name>&bomb;</name></domain>", "<a></b>", "<domain", "&#xffffffff;", "<domain a='&x;'/>"] {
        assert!(parse(junk).is_err(), "{junk}");
    }
}

proptest! {
    /// Whatever comes, an answer comes, too.
    #[test]
    fn junk_never_panics(junk in ".{0,400}") {
        let _ = parse(&junk);
        let _ = parse(&small(&junk, &junk));
    }

    /// A definition with a part overwritten.
    #[test]
    fn damaged_definitions_never_panic(at in 0..WEB1.len(), len in 0..200_usize, by in "[<>&'\"a-z/ =]{0,20}") {
        let mut damaged = WEB1.to_owned();
        damaged.replace_range(at..(at + len).min(WEB1.len()), &by);
        if let Ok(found) = parse(&damaged) {
            prop_assert!(!found.name.is_empty() && 0 < found.memory_kib);
            let _ = record(&damaged, &settings());
        }
    }
}

#[test]
fn the_policy_stands_in_our_own_metadata() {
    let with = |metadata: &str| small("", "").replace("<os>", &format!("<metadata>{metadata}</metadata><os>"));
    let table = [
        ("<m:policy xmlns:m='urn:mainstay:vm:1' on-doubt='run-until-stop'/>", Some(OnDoubt::RunUntilStop)),
        ("<mainstay:policy xmlns:mainstay='urn:mainstay:vm:1' on-doubt='pause'/>", Some(OnDoubt::Pause)),
        ("<m:policy xmlns:m='urn:mainstay:vm:1' on-doubt='dance'/>", None),
        ("<m:policy xmlns:m='urn:other' on-doubt='pause'/>", None),
        ("<policy on-doubt='pause'/>", None),
        ("", None),
    ];
    for (metadata, expected) in table {
        assert_eq!(parse(&with(metadata)).map(|domain| domain.on_doubt), Ok(expected), "{metadata}");
    }
}

#[test]
fn a_running_domain_says_its_generation() {
    let with = |metadata: &str| mark(&WEB1.replacen("<metadata>", &format!("<metadata>{metadata}"), 1));
    let table = [
        ("<mainstay:claim xmlns:mainstay='urn:mainstay:claim:1' generation='7'/>", Some(7)),
        ("<claim xmlns='urn:mainstay:claim:1' generation='8'/>", Some(8)),
        ("<x:claim xmlns:x='urn:somebody:else' generation='7'/>", None),
        ("<x:claim xmlns:y='urn:mainstay:claim:1' generation='7'/>", None),
        ("<mainstay:claim xmlns:mainstay='urn:mainstay:claim:1' generation='-7'/>", None),
        ("<mainstay:claim xmlns:mainstay='urn:mainstay:claim:1'/>", None),
        ("", None),
    ];
    for (metadata, expected) in table {
        assert_eq!(with(metadata), expected.map(crate::types::Generation), "{metadata}");
    }
    assert_eq!(mark("no xml"), None);
}

#[test]
fn the_system_inside_as_libosinfo_names_it() {
    let with = |metadata: &str| {
        let xml = format!(
            "<domain><name>w</name><uuid>11111111-2222-3333-4444-555555555555</uuid><memory>1</memory><vcpu>1</vcpu>\
             <metadata>{metadata}</metadata></domain>"
        );
        parse(&xml).unwrap().system
    };
    let of = "<libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>\
              <libosinfo:os id='http://debian.org/debian/12'/></libosinfo:libosinfo>";
    assert_eq!(with(of).as_deref(), Some("http://debian.org/debian/12"));
    for other in ["", "<a:b xmlns:a='c'><a:os id='x'/></a:b>", "<os id='x'/>"] {
        assert_eq!(with(other), None, "{other}");
    }
}

#[test]
fn where_a_console_is_written() {
    let with = |devices: &str| {
        let xml = format!(
            "<domain><name>w</name><uuid>11111111-2222-3333-4444-555555555555</uuid><memory>1</memory><vcpu>1</vcpu>\
             <devices>{devices}</devices></domain>"
        );
        parse(&xml).unwrap().console_log
    };
    for (devices, expected) in [
        ("<serial type='pty'><source path='/dev/pts/3'/><log file='/l' append='on'/></serial>", Some("/l")),
        (
            "<serial type='file'><source path='/f' append='on'/></serial><console type='file'><source path='/g'/></console>",
            Some("/f"),
        ),
        ("<console type='unix'><source mode='bind' path='/s'/></console>", None),
        ("<serial type='pty'/><console type='pty'><log file='/c'/></console>", Some("/c")),
        ("<channel type='file'><source path='/x'/><log file='/y'/></channel>", None),
    ] {
        assert_eq!(with(devices).as_deref(), expected, "{devices}");
    }
}
