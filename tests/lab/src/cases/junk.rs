//! Bad input from the network: datagrams that are no beats, and a host that takes another's name.
//!
//! ```text
//!  host h3 ── `lab junk-from-inside GROUP PORT` ──► listens to real beats, then sends: them again, cut, altered, noise
//!  host h4 ── named like h1, not a member ──► cluster join TOKEN ──► refused
//! ```

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Ground;
use crate::agents;
use crate::host::Host;
use crate::judge::Moment;
use crate::product;

const GROUP: &str = "239.77.83.1";
const PORT: &str = "7783";
/// How long the storm lasts.
const STORM: Duration = Duration::from_secs(6);
/// Lines that a host may log of it all: a count now and then, not one per packet.
const LINES: usize = 10;

pub fn datagrams(ground: &mut Ground) -> Result<()> {
    let hosts = ground.hosts();
    let from = ground.subordinate()?;
    let lab = from.root_inside()?.join("usr/lib/mainstay-lab/lab");
    let part = lab.with_extension("new");
    fs::copy(std::env::current_exe()?, &part).and_then(|_| fs::rename(&part, &lab)).context("copying the lab")?;
    let lines = || hosts.iter().map(log_lines).collect::<Result<Vec<usize>>>();
    ground.watch()?;
    ground.fault("junk on the network", &[])?;
    let before = lines()?;
    let sent = agents::ask(&from, STORM * 5, &["/usr/lib/mainstay-lab/lab", "junk-from-inside", GROUP, PORT])?;
    ground.figure(sent.trim().to_owned());
    ground.healthy()?;
    let after = lines()?;
    let most = after.iter().zip(&before).map(|(after, before)| after.saturating_sub(*before)).max().unwrap_or_default();
    ground.figure(format!("at most {most} lines logged"));
    if LINES < most {
        bail!("a host logged {most} lines");
    }
    Ok(())
}

/// Lines that agent and guard have logged since the boot.
fn log_lines(host: &Host) -> Result<usize> {
    let args = ["journalctl", "--boot", "--quiet", "--output=cat", "--unit=mainstayd", "--unit=mainstay-guard"];
    Ok(agents::ask(host, agents::ANSWER, &args)?.lines().count())
}

/// Runs in a host: sends junk to the beats' port for a while.
pub fn send(group: Ipv4Addr, port: u16) -> Result<()> {
    let beats = overhear(group, port)?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let target = SocketAddrV4::new(group, port);
    let (mut sent, mut random, begun) = (0_u64, 0x9e37_79b9_7f4a_7c15_u64, Instant::now());
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    while begun.elapsed() < STORM {
        for beat in &beats {
            let mut altered = beat.clone();
            let at = next() as usize % altered.len();
            altered[at] ^= 1 << (next() % 8);
            let cut = &beat[..next() as usize % beat.len()];
            let noise: Vec<u8> = (0..next() % 1400).map(|_| next() as u8).collect();
            for datagram in [beat.as_slice(), &altered, cut, &noise] {
                socket.send_to(datagram, target).context("sending junk")?;
                sent += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    println!("{sent} datagrams sent, made of {} real beats", beats.len());
    Ok(())
}

/// Real beats of the others, as they go over the wire.
fn overhear(group: Ipv4Addr, port: u16) -> Result<Vec<Vec<u8>>> {
    const BEATS: usize = 6;
    let socket = reusable(port)?;
    socket.join_multicast_v4(&group, &Ipv4Addr::UNSPECIFIED)?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut beats = Vec::new();
    let mut bytes = [0; 65_536];
    while beats.len() < BEATS {
        let length = socket.recv(&mut bytes).context("no beat is heard")?;
        beats.push(bytes[..length].to_vec());
    }
    beats.retain(|beat| !beat.is_empty());
    Ok(beats)
}

/// The agent listens on the same port.
fn reusable(port: u16) -> Result<UdpSocket> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt};
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    use std::os::fd::AsRawFd;
    bind(fd.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port))?;
    Ok(UdpSocket::from(fd))
}

/// A fourth host that calls itself like the first.
pub fn name_twice(ground: &mut Ground) -> Result<()> {
    let stranger = Host::new(ground.hosts().len() as u8 + 1);
    let taken = ground.hosts()[0].name();
    ground.watch()?;
    ground.fault(&format!("a stranger called {taken} wants to join"), &[])?;
    let refused = try_to_join(ground, &stranger, &taken);
    let storage = ground.lab().storage()?;
    storage.dead(&stranger.name())?;
    stranger.kill()?;
    storage.unmount(&stranger.name())?;
    let why = refused?;
    if !why.contains(&taken) || !why.contains("in use") {
        bail!("the refusal does not say that {taken} is in use: {why}");
    }
    ground.wait_cluster()?;
    let hosts = ground.view()?.hosts.len();
    if hosts != ground.hosts().len() {
        bail!("the cluster has {hosts} hosts now");
    }
    ground.figure("refused, names it".to_owned());
    Ok(())
}

/// The text with which it was refused.
fn try_to_join(ground: &Ground, stranger: &Host, name: &str) -> Result<String> {
    let lab = ground.lab();
    lab.lay_host(stranger)?;
    product::build()?.install(stranger)?;
    let config = stranger.root().join("etc/mainstay/mainstay.toml");
    let text = fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?;
    fs::write(&config, text.replacen("[host]\n", &format!("[host]\nname = \"{name}\"\n"), 1))?;
    lab.start(stranger)?;
    stranger.wait_up(Duration::from_secs(90))?;
    let first = ground.hosts()[0];
    let answer = agents::ask(&first, agents::ANSWER, &["mainstay", "--json", "cluster", "token"])?;
    let answer: serde_json::Value = serde_json::from_str(&answer).context("reading the token")?;
    let token = answer["token"].as_str().context("mainstay printed no token")?;
    let asked = Moment::now();
    match agents::ask(stranger, Duration::from_secs(60), &["mainstay", "cluster", "join", token]) {
        Ok(_) => bail!("a host with the name {name}, which is in use, has joined"),
        Err(why) => {
            let took = Moment::now().since(asked);
            if Duration::from_secs(30) < took {
                bail!("refused only after {} s", took.as_secs());
            }
            Ok(format!("{why:#}"))
        }
    }
}
