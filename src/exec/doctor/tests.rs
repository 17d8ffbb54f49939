use super::mounts::Mount;
use super::system::{Daemon, Guests, HookState, Machine, ProgramState};
use super::*;
use crate::types::guard::Standing;

/// A host where all is well.
fn well() -> DoctorInput {
    let datastore = DatastoreFact {
        name: "nfs1".into(),
        path: "/srv/nfs1".into(),
        fence: StorageFence::Lock,
        late_writes: LateWrites::Exclude,
        round_trip_ms: Some(1.5),
        trouble: None,
        peers_seen: 2,
    };
    let peer = |name: &str| PeerFact { name: name.into(), beat_age_ms: Some(400), hears_us: true, skew_ms: Some(3) };
    let agent = AgentFacts {
        cluster: Some("prod".into()),
        libvirt: Ok("11.3.0".into()),
        hook_seen: true,
        guard: GuardFact::Answers { real_time: true, late: false },
        peers: vec![peer("b"), peer("c")],
        datastores: vec![datastore],
        autostart: Vec::new(),
        devices: Vec::new(),
        without_device: vec!["a".into(), "b".into(), "c".into()],
        disarmed: None,
        rules: Vec::new(),
        findings: Vec::new(),
    };
    let mount = Mount {
        point: "/srv/nfs1".into(),
        kind: "nfs4".into(),
        source: "server:/export".into(),
        options: "rw,relatime,rw,vers=4.2,hard,local_lock=none".into(),
    };
    let root = Mount { point: "/".into(), kind: "ext4".into(), ..Mount::default() };
    let system = SystemFacts {
        hook_path: system::HOOK_PATH.into(),
        hook: HookState::Present { changed_unix_s: 100 },
        daemon: Some(Daemon { name: "libvirtd".into(), started_unix_s: 200 }),
        lock_manager: None,
        guests: Guests::Active { after_mainstayd: true },
        machine: Machine::Metal,
        clock_synchronised: Some(true),
        mounts: vec![root, mount],
        recover_lost_locks: Some(false),
        nfs_lease_s: [("/srv/nfs1".to_owned(), 10)].into(),
        watchdog: Some(Standing::Safe("/dev/watchdog: resets this host 4 s after its guard died".into())),
        programs: [("/usr/sbin/expire".to_owned(), ProgramState::Executable)].into(),
        reads_pictures: true,
    };
    DoctorInput { agent: Ok(agent), system }
}

type Change = fn(&mut AgentFacts, &mut SystemFacts);

/// With this one thing changed exactly these findings are not ok.
fn check(what: &str, expected: &[(&str, Level, &str)], change: Change) {
    let mut input = well();
    change(input.agent.as_mut().unwrap(), &mut input.system);
    let found = checks(&input);
    let bad: Vec<_> = found.iter().filter(|finding| finding.level != Level::Ok).collect();
    let ids: Vec<_> = bad.iter().map(|finding| (finding.id.as_ref(), finding.level)).collect();
    let wanted: Vec<_> = expected.iter().map(|(id, level, _)| (*id, *level)).collect();
    assert_eq!(ids, wanted, "{what}: {bad:#?}");
    for (finding, (_, _, part)) in bad.iter().zip(expected) {
        assert!(finding.what.contains(part), "{what}: {finding:#?} does not say {part}");
        assert!(!finding.cure.is_empty(), "{what}: no cure");
    }
}

#[test]
fn rules_for_vms() {
    check("a name", &[("vm-rules", Level::Warning, "no VM is called mial")], |agent, _| {
        agent.rules.push("priority rule 1: no VM is called mial".into());
    });
}

#[test]
fn unwell() {
    check("a bridge", &[("health", Level::Warning, "br0 has lost its uplink")], |agent, _| {
        agent.findings.push("bridge br0 has lost its uplink: no carrier on eno1 (evacuate)".into());
    });
}

#[test]
fn disarmed() {
    check("for an hour", &[("armed", Level::Warning, "is disarmed")], |agent, _| {
        agent.disarmed = Some("the cluster is disarmed until noon".into());
    });
}

#[test]
fn all_is_well() {
    check("nothing changed", &[], |_, _| {});
    let mut all: Vec<_> = checks(&well()).into_iter().map(|finding| finding.id.into_owned()).collect();
    all.sort();
    all.dedup();
    let expected = [
        "agent",
        "autostart",
        "beats",
        "clock",
        "clock-skew",
        "cluster",
        "datastore",
        "fence",
        "guard",
        "health",
        "hook",
        "libvirt",
        "libvirt-guests",
        "lock-manager",
        "machine",
        "mount-options",
        "screens",
        "shared",
        "watchdog",
    ];
    assert_eq!(all, expected, "every check says something");
}

#[test]
fn checks_of_the_host() {
    use Level::{Error, Warning};
    check("libvirt down", &[("libvirt", Error, "refused")], |agent, _| {
        agent.libvirt = Err("connection refused".into())
    });
    check("no hook", &[("hook", Error, "not installed")], |_, system| system.hook = HookState::Missing);
    check("hook 644", &[("hook", Error, "not executable")], |_, system| system.hook = HookState::NotExecutable);
    check("hook not looked at", &[("hook", Warning, "looked")], |_, system| system.hook = HookState::Unknown);
    check("hook newer than the daemon", &[("hook", Warning, "after libvirtd was started")], |agent, system| {
        agent.hook_seen = false;
        system.hook = HookState::Present { changed_unix_s: 201 };
    });
    check("hook newer, but seen", &[], |_, system| system.hook = HookState::Present { changed_unix_s: 201 });
    check("hook older, not seen yet", &[], |agent, _| agent.hook_seen = false);
    check("no daemon yet", &[], |agent, system| {
        agent.hook_seen = false;
        system.daemon = None;
    });
    check("sanlock", &[("lock-manager", Error, "sanlock")], |_, system| system.lock_manager = Some("sanlock".into()));
    check("virtlockd", &[], |_, system| system.lock_manager = Some("lockd".into()));
    check("guests in disorder", &[("libvirt-guests", Warning, "not ordered")], |_, system| {
        system.guests = Guests::Active { after_mainstayd: false };
    });
    check("guests unused", &[], |_, system| system.guests = Guests::Inactive);
    check("guests unknown", &[("libvirt-guests", Warning, "bus")], |_, system| {
        system.guests = Guests::Unknown("no bus".into());
    });
    check("a VM", &[("machine", Warning, "QEMU")], |_, system| system.machine = Machine::Vm("QEMU".into()));
    check("a container", &[("machine", Warning, "lxc")], |_, system| system.machine = Machine::Container("lxc".into()));
    check("machine unknown", &[("machine", Warning, "cannot tell")], |_, system| system.machine = Machine::Unknown);
    check("no watchdog", &[], |_, system| system.watchdog = Some(Standing::None));
    check("watchdog too late", &[("watchdog", Warning, "60 s")], |_, system| {
        system.watchdog = Some(Standing::Late("takes no time-out under 60 s".into()));
    });
    check("watchdog in use", &[("watchdog", Warning, "busy")], |_, system| {
        system.watchdog = Some(Standing::Failed("busy".into()));
    });
    check("pictures are not read", &[], |_, system| system.reads_pictures = false);
    check("autostart", &[("autostart", Warning, "autostart")], |agent, _| agent.autostart = vec!["web".into()]);
}

#[test]
fn checks_of_fence_devices() {
    use Level::{Error, Warning};
    fn device() -> DeviceFact {
        DeviceFact { name: "d1".into(), host: "a".into(), distrusted: None, answers: Ok(()) }
    }
    fn set(agent: &mut AgentFacts, device: DeviceFact) {
        agent.devices = vec![device];
        agent.without_device.clear();
    }
    check("a device", &[], |agent, _| set(agent, device()));
    check("one host only", &[("fence-device", Warning, "other hosts have one")], |agent, _| {
        agent.devices = vec![device()]
    });
    check("a device that does not answer", &[("fence-device", Error, "not installed")], |agent, _| {
        set(agent, DeviceFact { answers: Err("fence_x is not installed on this host".into()), ..device() });
    });
    check("a device that lied", &[("fence-device", Error, "not used: it said")], |agent, _| {
        set(agent, DeviceFact { distrusted: Some("it said that a was off".into()), ..device() });
    });
}

#[test]
fn checks_between_hosts() {
    use Level::{Error, Warning};
    check("guard silent", &[("guard", Error, "no socket")], |agent, _| {
        agent.guard = GuardFact::Silent("no socket".into());
    });
    check("no real time", &[("guard", Warning, "refused real-time")], |agent, _| {
        agent.guard = GuardFact::Answers { real_time: false, late: false };
    });
    check("late", &[("guard", Warning, "late within")], |agent, _| {
        agent.guard = GuardFact::Answers { real_time: true, late: true };
    });
    check("one peer silent", &[("beats", Warning, "not heard")], |agent, _| agent.peers[0].beat_age_ms = Some(60_000));
    check("all peers silent", &[("beats", Error, "b, c")], |agent, _| {
        agent.peers.iter_mut().for_each(|peer| peer.beat_age_ms = None);
    });
    check("one way", &[("beats", Error, "one way")], |agent, _| agent.peers[1].hears_us = false);
    check("alone", &[], |agent, _| agent.peers.clear());
    check("no member", &[("cluster", Warning, "no member")], |agent, _| agent.cluster = None);
    check("skew", &[("clock-skew", Warning, "-1.5 s")], |agent, _| agent.peers[0].skew_ms = Some(-1500));
    check("a day", &[("clock-skew", Error, "86400.0 s")], |agent, _| agent.peers[0].skew_ms = Some(86_400_000));
    check("free clock", &[("clock", Warning, "not sync")], |_, system| system.clock_synchronised = Some(false));
    check("clock unknown", &[("clock", Warning, "cannot tell")], |_, system| system.clock_synchronised = None);
}

#[test]
fn checks_of_datastores() {
    use Level::{Error, Warning};
    check("none", &[("datastore", Warning, "no datastore")], |agent, _| agent.datastores.clear());
    check("trouble", &[("datastore", Error, "stale")], |agent, _| agent.datastores[0].trouble = Some("stale".into()));
    check("never written", &[("datastore", Error, "nothing")], |agent, _| agent.datastores[0].round_trip_ms = None);
    check(
        "only looks shared",
        &[("fence", Error, "ext4"), ("shared", Warning, "local file system")],
        |agent, system| {
            agent.datastores[0].peers_seen = 0;
            system.mounts.truncate(1);
        },
    );
    check("nobody else there", &[("shared", Warning, "no other")], |agent, _| agent.datastores[0].peers_seen = 0);
    check("first host", &[], |agent, _| {
        agent.datastores[0].peers_seen = 0;
        agent.peers.clear();
    });
    check("soft", &[("mount-options", Warning, "soft")], |_, system| system.mounts[1].options = "rw,soft".into());
    check("nolock", &[("mount-options", Error, "locks stay")], |_, system| {
        system.mounts[1].options = "rw,nolock".into()
    });
    check("local_lock", &[("mount-options", Error, "locks stay")], |_, system| {
        system.mounts[1].options = "rw,hard,local_lock=posix".into();
    });
    check("read-only", &[("mount-options", Error, "read-only")], |_, system| system.mounts[1].options = "ro".into());
    check("lost locks", &[("fence", Error, "recover_lost_locks")], |_, system| system.recover_lost_locks = Some(true));
    check("long lease", &[("fence", Warning, "90 s")], |_, system| {
        system.nfs_lease_s = [("/srv/nfs1".to_owned(), 90)].into();
    });
    check("NFSv3 locks", &[("fence", Error, "until it is back")], |_, system| {
        system.mounts[1].kind = "nfs".into();
        system.mounts[1].options = "rw,hard,vers=3,local_lock=none".into();
    });
    check("command", &[], |agent, _| {
        agent.datastores[0].fence = StorageFence::Command { program: "/usr/sbin/expire".into() };
    });
    check("command missing", &[("fence", Error, "does not exist")], |agent, _| {
        agent.datastores[0].fence = StorageFence::Command { program: "/usr/sbin/other".into() };
    });
    check("command 644", &[("fence", Error, "not executable")], |agent, system| {
        agent.datastores[0].fence = StorageFence::Command { program: "/x".into() };
        system.programs.insert("/x".into(), ProgramState::NotExecutable);
    });
    check("no fence", &[("fence", Warning, "wait until")], |agent, _| agent.datastores[0].fence = StorageFence::None);
    check("no fence, accepted", &[("fence", Warning, "late writes accepted")], |agent, _| {
        agent.datastores[0].fence = StorageFence::None;
        agent.datastores[0].late_writes = LateWrites::Accept;
    });
}

#[test]
fn without_an_agent_the_system_is_judged() {
    let found = checks(&DoctorInput { agent: Err(NoFacts::Silent("not running".into())), system: well().system });
    assert_eq!((found[0].id.as_ref(), found[0].level), ("agent", Level::Error));
    assert!(found.iter().any(|finding| finding.id == "hook"));
    let found = checks(&DoctorInput { agent: Err(NoFacts::NoMember), system: well().system });
    assert_eq!((found[0].id.as_ref(), found[0].level), ("cluster", Level::Warning), "no member is no error");
}

#[test]
fn findings_are_the_same_after_json() {
    let found = checks(&well());
    let text = serde_json::to_string(&found).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Finding>>(&text).unwrap(), found);
}

#[test]
fn many_names_are_counted() {
    let all = ["a", "b", "c", "d", "e", "f", "g"];
    assert_eq!(names(all.into_iter()), "a, b, c, d, e and 2 more");
    assert_eq!(names(all[..2].iter().copied()), "a, b");
}

#[tokio::test]
async fn this_host_can_be_examined() {
    let found = examine(Err("no agent".to_owned())).await;
    assert!(found.iter().any(|finding| finding.id == "machine"), "{found:?}");
}
