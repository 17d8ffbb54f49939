use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::types::control::{Denial, JoinRequest};

fn here(name: &str, port: u16) -> Here {
    Here {
        name: name.into(),
        control: format!("127.0.0.1:{port}").parse().unwrap(),
        migration_uri: "qemu+tcp://127.0.0.1/system".into(),
        interfaces: Vec::new(),
        peers: Vec::new(),
        isolation_addresses: Vec::new(),
    }
}

fn cluster() -> (tempfile::TempDir, Cluster, Token) {
    let dir = tempfile::tempdir().unwrap();
    let (cluster, token) = Cluster::init(dir.path(), "c1", &here("a", 7784), Timing::DEFAULT).unwrap();
    (dir, cluster, token)
}

fn request(token: &Token, name: &str, port: u16) -> JoinRequest {
    let Here { name, control, migration_uri, .. } = here(name, port);
    let csr_pem = certificates::request(&certificates::key().unwrap()).unwrap();
    JoinRequest { secret: *token.secret, host: HostId(new_uuid()), name, control, migration_uri, csr_pem }
}

#[test]
fn init_then_load() {
    let (dir, cluster, token) = cluster();
    assert_eq!(dir.path().metadata().unwrap().permissions().mode() & 0o777, 0o700);
    for entry in dir.path().read_dir().unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
    let loaded = Cluster::load(dir.path()).unwrap().unwrap();
    assert_eq!(loaded.settings, cluster.settings);
    assert_eq!((loaded.host, loaded.me().unwrap().index), (cluster.host, HostIndex(0)));
    assert_eq!(loaded.token(token.control), token);
    assert_eq!(loaded.keys[0].secret, cluster.keys[0].secret);
    let again = Cluster::init(dir.path(), "c2", &here("a", 7784), Timing::DEFAULT).unwrap_err();
    assert_eq!(again.to_string(), "this host is a member of cluster \"c1\" already; nothing was changed");
    assert!(Cluster::load(tempfile::tempdir().unwrap().path()).unwrap().is_none());
    assert!(Cluster::load(Path::new("/nonexistent/mainstay")).unwrap().is_none());
}

#[test]
fn names_of_clusters() {
    for name in ["", "a b", "a/b", "ä", &"x".repeat(64)] {
        let dir = tempfile::tempdir().unwrap();
        let error = Cluster::init(dir.path(), name, &here("a", 1), Timing::DEFAULT).unwrap_err();
        assert!(matches!(error, ClusterError::Name(_)), "{name}");
        assert!(Cluster::load(dir.path()).unwrap().is_none());
    }
}

#[test]
fn an_interrupted_init_is_no_membership_and_keeps_the_host_id() {
    let (dir, cluster, _) = cluster();
    std::fs::remove_file(dir.path().join("settings.json")).unwrap();
    assert!(Cluster::load(dir.path()).unwrap().is_none());
    let (again, _) = Cluster::init(dir.path(), "c1", &here("a", 7784), Timing::DEFAULT).unwrap();
    assert_eq!(again.host, cluster.host);
    assert_ne!(again.settings.cluster, cluster.settings.cluster);
}

#[test]
fn two_changes_at_once_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let lock = files::lock(dir.path()).unwrap().unwrap();
    let error = Cluster::init(dir.path(), "c1", &here("a", 1), Timing::DEFAULT).unwrap_err();
    assert!(matches!(error, ClusterError::Busy), "{error}");
    drop(lock);
    Cluster::init(dir.path(), "c1", &here("a", 1), Timing::DEFAULT).unwrap();
}

#[test]
fn damaged_files_are_named_with_their_cure() {
    let (_other_dir, other, _) = cluster();
    let other_key = other.key_pem.as_bytes();
    let cases: [(&str, Option<&[u8]>, &str); 11] = [
        ("settings.json", Some(b"{"), "copy this file"),
        ("keys.json", None, "is missing; copy this file"),
        ("keys.json", Some(b"[]"), "holds no key; copy this file"),
        ("ca.pem", Some(b"junk"), "no certificate in PEM form; copy this file"),
        ("ca.key", Some(other_key), "the key does not belong to the certificate; copy this file"),
        ("host.pem", None, "is missing; restore it"),
        ("host.key", Some(b"junk"), "no key in PEM form; restore it"),
        ("host.key", Some(other_key), "restore it"),
        ("host.id", Some(b"junk"), "is no UUID; restore it"),
        ("host.id", Some(b"00000000-0000-4000-8000-000000000000"), "host.id says 00000000-0000-4000-8000-000000000000"),
        ("join.secret", Some(b"abc"), "is no 32 bytes; copy this file"),
    ];
    for (name, bytes, text) in cases {
        let (dir, ..) = cluster();
        let path = dir.path().join(name);
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = Cluster::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(text), "{name}: {error}");
        assert!(error.starts_with(&dir.path().display().to_string()), "{name}: {error}");
    }
}

#[test]
fn settings_are_replaced_whole() {
    let (dir, mut cluster, _) = cluster();
    cluster.settings.version = 2;
    save_settings(dir.path(), &cluster.settings).unwrap();
    assert_eq!(Cluster::load(dir.path()).unwrap().unwrap().settings.version, 2);
    let nowhere = save_settings(&dir.path().join("no"), &cluster.settings).unwrap_err().to_string();
    assert!(nowhere.contains("settings.json: cannot be written: "), "{nowhere}");
}

#[test]
fn tokens_survive_paper() {
    let (_dir, cluster, token) = cluster();
    let text = token.to_string();
    assert_eq!(text.len(), 5 + 146);
    assert_eq!(text.parse(), Ok(token.clone()));
    assert_eq!(format!("  mst1-{}\n", text[5..].to_uppercase()).parse(), Ok(token.clone()));
    let v6 = cluster.token("[fd00::1]:7784".parse().unwrap());
    assert_eq!(v6.to_string().parse(), Ok(v6));
    let mut wrong = text.clone().into_bytes();
    wrong[40] = if wrong[40] == b'a' { b'b' } else { b'a' };
    let cases = [
        ("hello".into(), "a join token begins with \"mst1-\"; `mainstay cluster token` on a member shows it"),
        ("mst2-aaaa".into(), "this token was made by a newer version of Mainstay; install the same version here first"),
        (text[..100].into(), "the token is cut off: 100 characters of 151; copy it again, it may have been wrapped"),
        ("mst1-".into(), "the token is cut off: 5 characters of 151; copy it again, it may have been wrapped"),
        (format!("{text}aa"), "the token is too long: 153 characters instead of 151; copy it alone"),
        (
            format!("{}1{}", &text[..9], &text[10..]),
            "character 10 of the token is none that a token can have; copy it again",
        ),
        (
            String::from_utf8(wrong).unwrap(),
            "the token has a wrong character somewhere (its checksum does not fit); copy it again",
        ),
    ];
    for (text, error) in cases {
        assert_eq!(text.parse::<Token>().map_err(|e| e.to_string()), Err(error.into()), "{text}");
    }
}

proptest::proptest! {
    #[test]
    fn junk_is_no_token(text in "(mst1-)?[a-z2-7]{0,180}", more in "\\PC{0,40}") {
        assert!(text.parse::<Token>().is_err());
        assert!(more.parse::<Token>().is_err());
    }
}

#[test]
fn admits_each_host_once() {
    let (_dir, mut cluster, token) = cluster();
    let b = request(&token, "b", 1);
    let (member, certificate) = admit(&cluster, &b).unwrap();
    assert_eq!((member.index, member.host, member.name.as_str()), (HostIndex(1), b.host, "b"));
    assert_eq!(host_of(&tls::certificate(&certificate).unwrap()).unwrap(), b.host);
    let settings = with_member(&cluster.settings, member.clone());
    assert_eq!((settings.version, settings.members.len()), (2, 2));
    cluster.settings = settings;
    let (again, _) = admit(&cluster, &b).unwrap();
    assert_eq!(again, member, "a lost answer costs no place");
    assert_eq!(with_member(&cluster.settings, again).version, 2);
    let (third, _) = admit(&cluster, &request(&token, "c", 2)).unwrap();
    assert_eq!(third.index, HostIndex(2));
}

#[test]
fn refuses_with_the_reason() {
    let (_dir, mut cluster, token) = cluster();
    let no = |cluster: &Cluster, change: &dyn Fn(&mut JoinRequest)| {
        let mut asked = request(&token, "b", 1);
        change(&mut asked);
        admit(cluster, &asked).unwrap_err()
    };
    assert!(matches!(no(&cluster, &|asked| asked.secret[31] ^= 1), Denial::NotAllowed(_)));
    assert!(matches!(no(&cluster, &|asked| asked.csr_pem = "junk".into()), Denial::NotAllowed(_)));
    let a = cluster.host;
    type Case<'c> = (&'c dyn Fn(&mut JoinRequest), &'c str);
    let contradictions: [Case<'_>; 8] = [
        (&|asked| asked.name = "A".into(), "host name \"a\" is in use by host"),
        (&|asked| asked.name = "a b".into(), "\"a b\" is no host name"),
        (&|asked| asked.host = a, "is host id in use by \"a\""),
        (&|asked| asked.control = "127.0.0.1:7784".parse().unwrap(), "address 127.0.0.1:7784 is in use by host \"a\""),
        (&|asked| asked.control = "0.0.0.0:1".parse().unwrap(), "0.0.0.0:1 is no address to listen at"),
        (&|asked| asked.control = "10.0.0.1:0".parse().unwrap(), "10.0.0.1:0 is no address to listen at"),
        (&|asked| asked.migration_uri = "x".into(), "\"x\" is no migration URI"),
        (&|asked| asked.name = "x".repeat(64), "is no host name"),
    ];
    for (change, text) in contradictions {
        let Denial::Contradiction(why) = no(&cluster, change) else { panic!("{text}") };
        assert!(why.contains(text), "{why}");
    }
    cluster.settings.members[0].index = HostIndex(127);
    assert!(matches!(no(&cluster, &|_| ()), Denial::Capacity(_)));
}
