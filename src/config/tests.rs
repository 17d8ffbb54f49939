use super::read::KEYS;
use super::*;

fn told(text: &str) -> String {
    check(text).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn an_empty_file_means_defaults() {
    assert_eq!(parse(""), Ok(Config::default()));
    assert_eq!(load(Path::new("/nonexistent/mainstay.toml")).unwrap(), Config::default());
}

#[test]
fn the_shipped_file_shows_every_key_with_its_default() {
    let shipped = include_str!("../../systemd/mainstay.toml");
    assert_eq!(parse(shipped), Ok(Config::default()));
    let set: String = shipped
        .lines()
        .map(|line| if line.starts_with("# ") { "" } else { line.trim_start_matches('#') })
        .fold(String::new(), |text, line| text + line + "\n");
    let mut config = parse(&set).unwrap();
    assert_eq!(config.host.name.take().as_deref(), Some("host1"));
    assert_eq!(config.host.address.take().unwrap().to_string(), "192.0.2.11");
    assert_eq!(std::mem::take(&mut config.beat.interfaces), ["eth0"]);
    assert_eq!(config.guard.watchdog.take().as_deref(), Some(Path::new("/dev/watchdog")));
    assert_eq!(config, Config::default(), "a default in the shipped file is not the real one");
    for (section, keys) in KEYS {
        let body = set.split(&format!("[{section}]\n")).nth(1).unwrap_or_else(|| panic!("[{section}] is missing"));
        let body = body.split("\n[").next().unwrap();
        for key in keys {
            let line = format!("{key} = ");
            assert!(body.lines().any(|l| l.starts_with(&line)), "[{section}] {key} is missing in the shipped file");
        }
    }
}

#[test]
fn reads_everything() {
    let config = parse(
        "[host]\nname = \"one\"\naddress = \"fd00::1\"\n\
         [beat]\ninterfaces = [\"eth0\", \"eth1\"]\ngroup = \"ff05::7783\"\nport = 1\nttl = 3\ntransport = \"unicast\"\n\
         peers = [\"10.0.0.2\", \"[fd00::2]:9\"]\n\
         [control]\nport = 0x1e68\n[libvirt]\nuri = \"test:///default\"\nmigration_uri = \"qemu+tls://{name}/system\"\n\
         [guard]\nwatchdog = \"/dev/watchdog0\"\n\
         [log]\nlevel = \"debug\"\n[paths]\nstate = \"/a\"\nrun = \"/b\"\n",
    )
    .unwrap();
    assert_eq!(config.beat.peers, ["10.0.0.2:1".parse().unwrap(), "[fd00::2]:9".parse().unwrap()]);
    assert_eq!((config.beat.ttl, config.control.port, config.log.level.name()), (3, 7784, "debug"));
    assert_eq!(config.paths.state, Path::new("/a"));
    assert_eq!(config.guard.watchdog.as_deref(), Some(Path::new("/dev/watchdog0")));
}

#[test]
fn tells_what_is_wrong_and_what_to_write() {
    let cases = [
        ("[beat]\ninterfces = [\"eth0\"]", "line 2: beat.interfces: no such key; did you mean \"interfaces\"?"),
        ("[beats]\nport = 1", "line 1: beats: no such section; did you mean \"beat\"?"),
        ("[host]\nlevel = \"info\"", "line 2: host.level: no such key; it belongs into [log]"),
        ("[host]\nxyzzy = 1", "line 2: host.xyzzy: no such key; known are name, address"),
        ("beat = 1", "line 1: beat: is a section; write [beat] on a line of its own"),
        ("[beat]\n\nport = \"7783\"", "line 3: beat.port: is a text; write a UDP port from 1 to 65535"),
        ("[beat]\nport = 0", "line 2: beat.port: 0 is out of range; write a UDP port from 1 to 65535"),
        ("[control]\nport = 70000", "line 2: control.port: 70000 is out of range; write a TCP port from 1 to 65535"),
        ("[beat]\nttl = -1", "line 2: beat.ttl: -1 is out of range; write a number of hops from 1 to 255"),
        ("[beat]\nttl = 256", "line 2: beat.ttl: 256 is out of range; write a number of hops from 1 to 255"),
        ("[beat]\ngroup = 1", "line 2: beat.group: is a number; write a multicast address in quotes"),
        (
            "[beat]\ngroup = \"10.0.0.1\"",
            "line 2: beat.group: \"10.0.0.1\" is no multicast address; use one of 239.0.0.0/8 or ff00::/8",
        ),
        (
            "[beat]\ntransport = \"unicast\"",
            "line 2: beat.transport: is \"unicast\", but beat.peers names nobody; list the other hosts' addresses there",
        ),
        (
            "[beat]\ntransport = \"unicats\"",
            "line 2: beat.transport: \"unicats\" is no choice; did you mean \"unicast\"?",
        ),
        ("[beat]\ninterfaces = [\"a\", \"a\"]", "line 2: beat.interfaces: \"a\" stands there twice"),
        ("[beat]\ninterfaces = \"a\"", "line 2: beat.interfaces: is a text; write a list, for example [\"…\"]"),
        ("[beat]\ninterfaces = [1]", "line 2: beat.interfaces: holds a number; write each entry in quotes"),
        (
            "[beat]\ninterfaces = [\n \"a\",\n \"b/c\",\n]",
            "line 4: beat.interfaces: \"b/c\" is no interface name; `ip link` shows them",
        ),
        ("[beat]\npeers = [\"10.0.0.2\", \"10.0.0.2:7783\"]", "line 2: beat.peers: 10.0.0.2:7783 stands there twice"),
        (
            "[beat]\npeers = [\"two\"]\ntransport = \"unicast\"",
            "line 2: beat.peers: \"two\" is no peer; write \"ADDRESS\" or \"ADDRESS:PORT\"",
        ),
        (
            "[host]\naddress = \"10.0.0.2\"\n[beat]\npeers = [\"10.0.0.2\"]",
            "line 4: beat.peers: names this host itself; list the others only",
        ),
        (
            "[host]\naddress = \"0.0.0.0\"",
            "line 2: host.address: 0.0.0.0 is no host's own address; write the one that the other hosts reach",
        ),
        ("[host]\naddress = \"a\"", "line 2: host.address: \"a\" is no IP address; names are not looked up here"),
        (
            "[host]\nname = \"a b\"",
            "line 2: host.name: \"a b\" is no host name; use letters, digits, '-' and '.', at most 63 of them",
        ),
        (
            "[libvirt]\nmigration_uri = \"qemu://{addr}/system\"",
            "line 2: libvirt.migration_uri: \"qemu://{addr}/system\" holds an unknown field; known are {address} and {name}",
        ),
        (
            "[libvirt]\nuri = \"system\"",
            "line 2: libvirt.uri: \"system\" is no libvirt URI; write for example \"qemu:///system\"",
        ),
        (
            "[log]\nlevel = \"warning\"",
            "line 2: log.level: \"warning\" is no choice; known are error, warn, info, debug, trace",
        ),
        ("[guard]\nwatchdg = \"/dev/watchdog\"", "line 2: guard.watchdg: no such key; did you mean \"watchdog\"?"),
        ("[guard]\nwatchdog = \"watchdog\"", "line 2: guard.watchdog: \"watchdog\" is no absolute path"),
        ("[paths]\nrun = \"run\"", "line 2: paths.run: \"run\" is no absolute path"),
        (
            "[paths]\nstate = \"/a\"\nrun = \"/a\"",
            "line 3: paths.run: is the same as paths.state, which must survive a boot while this must not",
        ),
    ];
    for (text, error) in cases {
        assert_eq!(told(text), error, "{text}");
    }
}

#[test]
fn tells_all_mistakes_at_once_by_line() {
    let findings = check("[beat]\nttl = 0\nprot = 1\n[lgo]\n");
    let lines: Vec<_> = findings.iter().map(|finding| finding.line).collect();
    assert_eq!(lines, [2, 3, 4], "{findings:?}");
    let broken = check("[host]\nname = \n");
    assert_eq!((broken.len(), broken[0].line), (1, 2), "{broken:?}");
}

#[test]
fn the_error_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mainstay.toml");
    std::fs::write(&path, "[beat]\nprot = 1\nttl = 0\n").unwrap();
    let error = load(&path).unwrap_err().to_string();
    let file = path.display();
    assert_eq!(
        error,
        format!(
            "{file}: line 2: beat.prot: no such key; did you mean \"port\"?\n\
             {file}: line 3: beat.ttl: 0 is out of range; write a number of hops from 1 to 255"
        )
    );
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(load(&path).unwrap_err().to_string().starts_with(&format!("{file}: cannot be read: ")));
    std::fs::write(&path, "#".repeat(70_000)).unwrap();
    assert!(load(&path).unwrap_err().to_string().ends_with("longer than 65536 bytes"));
}

proptest::proptest! {
    #[test]
    fn junk_is_no_panic(text in "\\PC{0,200}") {
        let _ = check(&text);
    }
    #[test]
    fn junk_values_are_no_panic(key in "[a-z.]{0,9}", value in "\\PC{0,30}") {
        for (section, keys) in KEYS {
            let _ = check(&format!("[{section}]\n{key} = {value}\n"));
            for key in keys {
                let _ = check(&format!("[{section}]\n{key} = {value}\n"));
            }
        }
    }
}
