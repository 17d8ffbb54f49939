use super::*;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

#[test]
fn machines() {
    let metal = ("proc/cpuinfo", "processor : 0\nflags : fpu vme sse\n");
    let guest = ("proc/cpuinfo", "processor : 0\nflags : fpu hypervisor sse\n");
    for (files, expected) in [
        (vec![], Machine::Unknown),
        (vec![metal], Machine::Metal),
        (vec![metal, ("sys/class/dmi/id/sys_vendor", "Dell Inc.\n")], Machine::Metal),
        (vec![guest], Machine::Vm("unknown hypervisor".into())),
        (vec![guest, ("sys/class/dmi/id/sys_vendor", "QEMU\n")], Machine::Vm("QEMU".into())),
        (vec![metal, ("sys/hypervisor/type", "xen\n")], Machine::Vm("xen".into())),
        (vec![guest, ("sys/hypervisor/type", "xen"), ("proc/xen/capabilities", "control_d\n")], Machine::Metal),
        (vec![guest, ("run/systemd/container", "systemd-nspawn\n")], Machine::Container("systemd-nspawn".into())),
        (vec![guest, ("proc/1/environ", "A=b\0container=lxc\0")], Machine::Container("lxc".into())),
        (vec![metal, (".dockerenv", "")], Machine::Container("docker".into())),
    ] {
        assert_eq!(machine(folder(&files).path()), expected, "{files:?}");
    }
}

#[test]
fn daemons() {
    let stat = "7 (virtqemud) S 1 7 7 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 17 0 50000 1 1";
    let root = folder(&[("run/virtqemud.pid", "7\n"), ("proc/7/stat", stat), ("proc/stat", "cpu 1\nbtime 1000\n")]);
    assert_eq!(daemon(root.path(), "virtqemud"), Some(Daemon { name: "virtqemud".into(), started_unix_s: 1500 }));
    assert_eq!(daemon(root.path(), "libvirtd"), None);
    // A stale pid file: another program has that number now.
    let stale = folder(&[("run/libvirtd.pid", "7"), ("proc/7/stat", stat), ("proc/stat", "btime 1000\n")]);
    assert_eq!(daemon(stale.path(), "libvirtd"), None);
}

#[test]
fn hooks() {
    let root = folder(&[("hook", "#!/bin/sh\n")]);
    let path = root.path().join("hook");
    assert_eq!(hook(&path), HookState::NotExecutable);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(hook(&path), HookState::Present { changed_unix_s } if 0 < changed_unix_s));
    assert_eq!(hook(&root.path().join("none")), HookState::Missing);
}

#[test]
fn lock_managers() {
    for (conf, expected) in [
        ("", None),
        ("#lock_manager = \"lockd\"\n", None),
        ("user = \"root\"\nlock_manager = \"sanlock\"\n", Some("sanlock")),
        ("lock_manager=\"lockd\"", Some("lockd")),
    ] {
        assert_eq!(lock_manager(conf).as_deref(), expected, "{conf}");
    }
}

#[test]
fn leases_of_nfs_mounts() {
    let text = "\
device /dev/vda1 mounted on / with fstype ext4
device server:/a mounted on /srv/a with fstype nfs4 statvers=1.1
\topts:\trw,vers=4.2
\tnfsv4:\tbm0=0xfdffbfff,acl=0x3,sessions,pnfs=not configured,lease_time=90,lease_expired=0
device server:/b mounted on /srv/b with fstype nfs statvers=1.1
\topts:\trw,vers=3
";
    assert_eq!(nfs_leases(text), BTreeMap::from([("/srv/a".to_owned(), 90)]));
}

#[test]
fn order_of_libvirt_guests() {
    for (text, expected) in [
        ("ActiveState=inactive\nAfter=a.service\n", Guests::Inactive),
        ("ActiveState=active\nAfter=a.service mainstayd.service\n", Guests::Active { after_mainstayd: true }),
        ("ActiveState=active\nAfter=a.service\n", Guests::Active { after_mainstayd: false }),
        ("", Guests::Unknown("systemd did not say".into())),
    ] {
        assert_eq!(guests_state(text), expected, "{text}");
    }
}

#[test]
fn a_child_that_hangs_is_killed() {
    let ended = output(Command::new("sleep").arg("1000"), Duration::from_millis(50));
    assert!(ended.unwrap_err().contains("no answer"));
    assert_eq!(output(Command::new("echo").arg("well"), SYSTEMCTL_TIME), Ok("well\n".to_owned()));
    assert!(output(&mut Command::new("/no/such/program"), SYSTEMCTL_TIME).is_err());
}

#[test]
fn this_system_can_be_read() {
    let facts = gather(Path::new("/"), &["/bin/true".to_owned(), "/no/such".to_owned()]);
    assert!(mounts::of_path(&facts.mounts, "/").is_some());
    assert_eq!(facts.programs["/bin/true"], ProgramState::Executable);
    assert_eq!(facts.programs["/no/such"], ProgramState::Missing);
}
