use super::*;

fn read(text: &str) -> Result<VmRules, String> {
    let rules: VmRules = toml::from_str(text).map_err(|why| why.message().to_owned())?;
    rules.check().map_err(|why| why.to_string())?;
    Ok(rules)
}

#[test]
fn a_document_is_read_or_refused_with_its_reason() {
    for (text, expected) in [
        ("", ""),
        ("[[priority]]\nvms = [\"db*\"]\npriority = \"highest\"", ""),
        ("[[priority]]\nvms = []\npriority = \"low\"", "priority rule 1 names no VMs"),
        ("[[dependency]]\nvms = [\"app\"]\nafter = [\"db\"]\nready = \"agent\"\ndelay_s = 5", ""),
        ("[[dependency]]\nvms = [\"app\"]\nafter = []", "dependency rule 1 names no VMs to wait for"),
        (
            "[[dependency]]\nvms = [\"app\"]\nafter = [\"db\"]\nwithin_s = 0",
            "dependency rule 1: within_s and delay_s are 1 to 3600 and 0 to 3600 seconds",
        ),
        ("[[affinity]]\nvms = [\"dns*\"]\ntie = \"apart\"\nforce = \"must\"", ""),
        ("[[affinity]]\nvms = [\"dns*\"]\ntie = \"near\"", "unknown variant `near`, expected `together` or `apart`"),
        ("[[placement]]\nvms = [\"a\"]\nhosts = [\"h1\"]\nplace = \"only\"", ""),
        ("[[placement]]\nvms = [\"a\"]\nhosts = []\nplace = \"not\"", "placement rule 1 names no hosts"),
        ("[[isolation]]\nvms = [\"web\"]\nresponse = \"power-off\"", ""),
        ("[[isolation]]\nvms = [\"web\"]\nresponse = { shutdown = { within_s = 60 } }", ""),
        (
            "[[isolation]]\nvms = [\"web\"]\nresponse = { shutdown = { within_s = 0 } }",
            "isolation rule 1: within_s is 1 to 3600 seconds",
        ),
        ("[[health]]\nsource = \"uplink\"\naction = \"tell\"", ""),
        (
            "[[health]]\nsource = \"uplink\"\naction = \"panic\"",
            "unknown variant `panic`, expected one of `tell`, `quarantine`, `evacuate`",
        ),
        ("admission = \"off\"", ""),
        ("admission = { host-failures = 1 }", ""),
        ("admission = { host-failures = 0 }", "admission: hosts has to be 1 or more"),
        ("admission = { percent = 100 }", "admission: percent is 1 to 99, not 100"),
        ("admission = { dedicated = [\"spare*\"] }", ""),
        ("admission = { host-failures = 1 }\nfloor = { cpu_loss_percent = 25 }", ""),
        (
            "floor = { cpu_loss_percent = 25 }",
            "floor: cpu_loss_percent is 0 to 99, and needs admission = { host-failures = N }",
        ),
        ("[[failback]]\nvms = [\"db*\"]\nhosts = [\"h1\"]", ""),
        ("[[failback]]\nvms = [\"db*\"]\nhosts = []", "failback rule 1 names no hosts"),
        (
            "[[failback]]\nvms = [\"db*\"]\nhosts = [\"h1\"]\nafter_s = 90000",
            "failback rule 1: after_s is 0 to 86400 seconds",
        ),
        ("[room]\nmove = [\"*\"]\nstop = [\"batch-*\"]", ""),
        ("[room]\nstop = [\"batch-*\"]\nwithin_s = 0", "room: within_s is 1 to 3600 seconds"),
        ("[shutdown]\nvms = \"evacuate\"", ""),
        ("[shutdown]\nvms = \"evacuate\"\nwithin_s = 3601", "shutdown: within_s is 1 to 3600 seconds"),
        ("[limits]\nstarts_per_host = 0", "limits: starts_per_host has to be 1 or more"),
        (
            "[limits]\nstarts = 1",
            "unknown field `starts`, expected one of `starts_per_host`, `starts_per_datastore`, `moves_per_host`, `vcpus_per_cpu`",
        ),
    ] {
        assert_eq!(read(text).err().unwrap_or_default(), expected, "{text}");
    }
}

#[test]
fn the_first_health_rule_of_a_source_counts() {
    let text = "[[health]]\nsource = \"uplink\"\naction = \"tell\"\n\
                [[health]]\nsource = \"uplink\"\naction = \"quarantine\"";
    let rules = read(text).unwrap();
    assert_eq!(rules.action(Source::Uplink), HealthAction::Tell);
    assert_eq!(rules.action(Source::Vendor), HealthAction::Quarantine);
}

#[test]
fn what_is_printed_is_read_again() {
    let text = "admission = { host-failures = 1 }\nfloor = { cpu_loss_percent = 50 }\n[[priority]]\nvms = [\"db*\"]\npriority = \"high\"\n\
                [[placement]]\nvms = [\"a\"]\nhosts = [\"h1\"]\nplace = \"only\"\n[limits]\nvcpus_per_cpu = 8\n\
                [[failback]]\nvms = [\"db*\"]\nhosts = [\"h1\"]\n[room]\nstop = [\"b*\"]\n[shutdown]\nvms = \"evacuate\"";
    for rules in [read(text).unwrap(), VmRules::default()] {
        assert_eq!(read(&toml::to_string(&rules).unwrap()), Ok(rules));
    }
}

#[test]
fn what_is_not_said_has_a_default() {
    let rules = read("[[dependency]]\nvms = [\"app\"]\nafter = [\"db\"]").unwrap();
    assert_eq!(rules.dependencies[0].ready, Ready::Started);
    assert_eq!(rules.dependencies[0].within_s, 600);
    assert_eq!((rules.limits.starts_per_host, rules.limits.starts_per_datastore), (4, 16));
    assert_eq!(rules.admission, Admission::Off);
}
