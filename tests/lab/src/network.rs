//! The switch between the hosts: a bridge in a network namespace of its own, so that no packet leaves the machine.
//!
//! ```text
//! namespace mainstay-lab                    10.77.0.254 (the gateway that hosts may ping)
//!   br0 ──┬── h1 ═══ eth0 in host h1        10.77.0.1
//!         ├── h2 ═══ eth0 in host h2        10.77.0.2      ═══ a veth pair, made when the host starts
//!         └── h3 ═══ eth0 in host h3        10.77.0.3
//! nft table bridge mainstay-lab
//!   set hosts   ports cut from everything, the gateway too
//!   set pairs   from . to, cut in that direction only
//! ```
//!
//! Cuts are rules of the switch, not of a link: they stay when a host is killed and started again, and the host still
//! has a carrier, as behind a broken switch. Multicast snooping is off: there is no querier.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use crate::command::run;
use crate::host::{Host, MOST};

const NAMESPACE: &str = "mainstay-lab";
const TABLE: &str = "mainstay-lab";
/// What hosts may ping to see whether they are alone.
pub const GATEWAY: &str = "10.77.0.254";

/// Whether the switch is there.
pub fn is_up() -> bool {
    Path::new("/run/netns").join(NAMESPACE).exists()
}

/// Makes the switch; one that is there is taken away first.
pub fn up() -> Result<()> {
    down()?;
    run("ip", ["netns", "add", NAMESPACE])?;
    ip("link set lo up")?;
    ip("link add br0 type bridge mcast_snooping 0 stp_state 0 forward_delay 0")?;
    ip(&format!("address add {GATEWAY}/24 dev br0"))?;
    ip("link set br0 up")?;
    nft(&format!(
        "table bridge {TABLE} {{
            set hosts {{ type ifname; }}
            set pairs {{ type ifname . ifname; }}
            chain forward {{
                type filter hook forward priority 0;
                iifname @hosts drop; oifname @hosts drop;
                iifname . oifname @pairs drop;
            }}
            chain input {{ type filter hook input priority 0; iifname @hosts drop; }}
            chain output {{ type filter hook output priority 0; oifname @hosts drop; }}
        }}"
    ))
}

/// Takes the switch away, with all that is plugged in.
pub fn down() -> Result<()> {
    if is_up() {
        run("ip", ["netns", "delete", NAMESPACE])?;
    }
    Ok(())
}

/// Plugs a host in that has just started: one end of a new pair goes into the namespace of its init.
pub fn plug(host: &Host, init: Pid) -> Result<()> {
    let name = host.name();
    let _ = ip(&format!("link delete {name}")); // Of its last life; the kernel is slow to take it away.
    let mac = host.mac();
    ip(&format!("link add {name} type veth peer name eth0 address {mac} netns {init}"))
        .with_context(|| format!("plugging {name} in"))?;
    ip(&format!("link set {name} master br0 up"))
}

/// Cuts a host from all others and from the gateway.
pub fn cut_host(host: &Host) -> Result<()> {
    nft(&format!("add element bridge {TABLE} hosts {{ {} }}", host.name()))
}

/// Cuts a host from all others; the gateway still answers it.
pub fn cut_from_hosts(host: &Host) -> Result<()> {
    let others = (1..=MOST).map(Host::new).filter(|other| other != host);
    others.into_iter().try_for_each(|other| {
        cut_one_way(host, &other)?;
        cut_one_way(&other, host)
    })
}

/// Drops what goes from one host to another; the other direction stays.
pub fn cut_one_way(from: &Host, to: &Host) -> Result<()> {
    if from == to {
        bail!("{} cannot be cut from itself", from.name());
    }
    nft(&format!("add element bridge {TABLE} pairs {{ {} . {} }}", from.name(), to.name()))
}

/// Ends what `cut_host` did. One that is not cut is no error.
pub fn mend_host(host: &Host) -> Result<()> {
    // Added first: nft refuses to delete what is not there.
    let element = format!("bridge {TABLE} hosts {{ {} }}", host.name());
    nft(&format!("add element {element}; delete element {element}"))
}

/// Ends what `cut_one_way` did. One that is not cut is no error.
pub fn mend_one_way(from: &Host, to: &Host) -> Result<()> {
    let element = format!("bridge {TABLE} pairs {{ {} . {} }}", from.name(), to.name());
    nft(&format!("add element {element}; delete element {element}"))
}

/// Ends all cuts.
pub fn heal() -> Result<()> {
    nft(&format!("flush set bridge {TABLE} hosts; flush set bridge {TABLE} pairs"))
}

/// Packets that a host has sent and received so far.
pub fn packets(host: &Host) -> Result<u64> {
    let text = run("ip", ["-n", NAMESPACE, "-s", "-j", "link", "show", "dev", &host.name()])?;
    let link: serde_json::Value = serde_json::from_str(&text).context("reading what ip says of a link")?;
    let count = |way: &str| link[0]["stats64"][way]["packets"].as_u64();
    count("rx").zip(count("tx")).map(|(rx, tx)| rx + tx).context("ip shows no packets")
}

/// What is cut now, in nft's words: hosts, and pairs `from . to`.
pub fn cuts() -> Result<Vec<String>> {
    let mut cuts = Vec::new();
    for set in ["hosts", "pairs"] {
        let text = run("ip", ["netns", "exec", NAMESPACE, "nft", "list", "set", "bridge", TABLE, set])?;
        let Some((_, rest)) = text.split_once("elements = {") else { continue };
        let Some((elements, _)) = rest.split_once('}') else { continue };
        cuts.extend(elements.split(',').map(|element| element.trim().replace('"', "")));
    }
    Ok(cuts)
}

/// Runs `ip` on the switch.
fn ip(args: &str) -> Result<()> {
    run("ip", ["-n", NAMESPACE].into_iter().chain(args.split(' '))).map(drop)
}

fn nft(rules: &str) -> Result<()> {
    let path = Path::new(crate::lab::RUN).join("rules.nft");
    fs::write(&path, format!("{rules}\n")).with_context(|| format!("writing {}", path.display()))?;
    run("ip", [Path::new("netns"), Path::new("exec"), Path::new(NAMESPACE), Path::new("nft"), Path::new("-f"), &path])
        .map(drop)
}
