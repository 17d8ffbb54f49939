//! The cluster's rules, in words: `rule app* after db ready agent delay 5s within 20s`, `rule apart dns1 dns2 must`, …
//!
//! ```text
//!   priority P of VMS       VMS after VMS [ready started|agent|application] [delay T] [within T]
//!   together|apart VMS must|should                VMS only|not on HOSTS must|should
//!   isolated VMS power-off|shut-down T            health SOURCE tell|quarantine|evacuate
//!   survive N failures [at most N percent less cpu]    keep N percent    dedicate HOSTS
//!   failback VMS to HOST after T    make room VMS move|stop    make room within T    evacuate at shutdown within T
//!   at most N starts on a host|from a datastore   at most N vcpus on a cpu
//! ```

use mainstay::types::finding::{HealthAction, Source};
use mainstay::types::guests::Glob;
use mainstay::types::rules::{
    Admission, AffinityRule, AtShutdown, DependencyRule, FailbackRule, Floor, Force, HealthRule, HostRule,
    IsolationRule, Priority, PriorityRule, Ready, Response, ShutdownRules, Tie, VmRules, Where,
};

use super::scenario::span;

fn globs(names: &[&str]) -> Vec<Glob> {
    names.iter().map(|name| Glob::new(name).expect("a pattern")).collect()
}

fn force(word: &str) -> Force {
    match word {
        "must" => Force::Must,
        "should" => Force::Should,
        other => panic!("must or should, not {other}"),
    }
}

fn seconds(text: &str) -> u32 {
    span(text).as_secs().try_into().expect("a short time")
}

/// The document that they make.
///
/// # Panics
/// If one is no rule.
pub fn read(words: &[String]) -> VmRules {
    let mut rules = VmRules::default();
    words.iter().for_each(|one| add(&mut rules, &one.split_whitespace().collect::<Vec<_>>()));
    rules
}

fn add(rules: &mut VmRules, words: &[&str]) {
    match words {
        ["priority", priority, "of", vms @ ..] => {
            let priority = Priority::ALL.into_iter().find(|one| one.name() == *priority).expect("a priority");
            rules.priorities.push(PriorityRule { vms: globs(vms), priority });
        }
        [tie @ ("together" | "apart"), vms @ .., how] => {
            let tie = if *tie == "together" { Tie::Together } else { Tie::Apart };
            rules.affinities.push(AffinityRule { vms: globs(vms), tie, force: force(how) });
        }
        ["at", "most", most, "starts", "on", "a", "host"] => rules.limits.starts_per_host = number(most),
        ["at", "most", most, "starts", "from", "a", "datastore"] => rules.limits.starts_per_datastore = number(most),
        ["at", "most", most, "vcpus", "on", "a", "cpu"] => rules.limits.vcpus_per_cpu = Some(number(most)),
        ["failback", vms @ .., "to", host, "after", time] => {
            rules.failbacks.push(FailbackRule { vms: globs(vms), hosts: globs(&[*host]), after_s: seconds(time) });
        }
        ["make", "room", "within", time] => rules.room.within_s = seconds(time),
        ["make", "room", vms @ .., how] => match *how {
            "move" => rules.room.moved.extend(globs(vms)),
            "stop" => rules.room.stopped.extend(globs(vms)),
            other => panic!("VMs move or stop to make room, not {other}"),
        },
        ["evacuate", "at", "shutdown", "within", time] => {
            rules.shutdown = ShutdownRules { vms: AtShutdown::Evacuate, within_s: seconds(time) };
        }
        ["at", "most", percent, "percent", "less", "cpu"] => {
            rules.floor = Some(Floor { cpu_loss_percent: number(percent) });
        }
        ["health", source, action] => {
            let source = Source::ALL.into_iter().find(|one| one.name() == *source).expect("a source");
            let all = [HealthAction::Tell, HealthAction::Quarantine, HealthAction::Evacuate];
            let action = all.into_iter().find(|one| one.name() == *action).expect("an action");
            rules.health.push(HealthRule { source, action });
        }
        ["isolated", vms @ .., "shut-down", time] => {
            isolated(rules, vms, Response::Shutdown { within_s: seconds(time) })
        }
        ["isolated", vms @ .., "power-off"] => isolated(rules, vms, Response::PowerOff),
        ["survive", count, "failures"] => rules.admission = Admission::HostFailures(number(count)),
        ["keep", percent, "percent"] => rules.admission = Admission::Percent(number(percent)),
        ["dedicate", hosts @ ..] => rules.admission = Admission::Dedicated(globs(hosts)),
        _ => either(rules, words),
    }
    rules.check().expect("rules that can be used");
}

fn isolated(rules: &mut VmRules, vms: &[&str], response: Response) {
    rules.isolations.push(IsolationRule { vms: globs(vms), response });
}

fn either(rules: &mut VmRules, words: &[&str]) {
    let is_verb = |word: &&str| ["after", "only", "not"].contains(word);
    let at = words.iter().position(is_verb).unwrap_or_else(|| panic!("no rule: {words:?}"));
    let (vms, rest) = (globs(&words[..at]), &words[at + 1..]);
    if words[at] == "after" {
        let is_more = |word: &&str| ["ready", "delay", "within"].contains(word);
        let end = rest.iter().position(is_more).unwrap_or(rest.len());
        let mut rule =
            DependencyRule { vms, after: globs(&rest[..end]), ready: Ready::Started, delay_s: 0, within_s: 600 };
        for more in rest[end..].chunks(2) {
            match more {
                ["ready", "started"] => rule.ready = Ready::Started,
                ["ready", "agent"] => rule.ready = Ready::Agent,
                ["ready", "application"] => rule.ready = Ready::Application,
                ["delay", time] => rule.delay_s = seconds(time),
                ["within", time] => rule.within_s = seconds(time),
                other => panic!("no condition: {other:?}"),
            }
        }
        return rules.dependencies.push(rule);
    }
    let ["on", hosts @ .., how] = rest else { panic!("no rule: {words:?}") };
    let place = if words[at] == "only" { Where::Only } else { Where::Not };
    rules.placements.push(HostRule { vms, hosts: globs(hosts), place, force: force(how) });
}

fn number(word: &str) -> u32 {
    word.parse().expect("a number")
}
