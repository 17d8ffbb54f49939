//! Echo requests: is somebody there, in the network of this host?
//!
//! ```text
//!   addresses ──► one ICMP echo request to each, at once ──► the first answer, or none within the time
//! ```

use std::net::IpAddr;
use std::time::Duration;

use surge_ping::{Client, Config, ICMP, IcmpPacket, PingIdentifier, PingSequence};
use tokio::task::JoinSet;

/// Whether one of them answers in time. Without addresses nobody does.
pub async fn anybody(addresses: Vec<IpAddr>, within: Duration) -> bool {
    let mut asked = JoinSet::new();
    for (n, address) in addresses.into_iter().enumerate() {
        asked.spawn(answers(address, n, within));
    }
    while let Some(answered) = asked.join_next().await {
        match answered {
            Ok(Ok(())) => return true,
            Ok(Err(why)) => tracing::debug!("{why}"),
            Err(why) => tracing::debug!("asking an isolation address failed: {why}"),
        }
    }
    false
}

async fn answers(address: IpAddr, n: usize, within: Duration) -> Result<(), String> {
    let fails = |why: &dyn std::fmt::Display| format!("isolation address {address}: {why}");
    let kind = if address.is_ipv4() { ICMP::V4 } else { ICMP::V6 };
    let client = Client::new(&Config::builder().kind(kind).build()).map_err(|why| fails(&why))?;
    let low = u16::try_from((std::process::id() as usize + n) & 0xffff).unwrap_or_default();
    let mut pinger = client.pinger(address, PingIdentifier(low)).await;
    let (packet, _) = pinger.timeout(within).ping(PingSequence(0), b"mainstay").await.map_err(|why| fails(&why))?;
    // That it cannot be reached is told by somebody else: a router, or the kernel of this host.
    let from = match &packet {
        IcmpPacket::V4(packet) => IpAddr::V4(packet.get_source()),
        IcmpPacket::V6(packet) => IpAddr::V6(packet.get_source()),
    };
    if from == address { Ok(()) } else { Err(fails(&format!("{from} says that it cannot be reached"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn this_host_answers_itself_and_nobody_does_not() {
        let within = Duration::from_millis(300);
        assert!(!anybody(Vec::new(), within).await);
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not checked: echo requests need root");
            return;
        }
        assert!(anybody(vec![[127, 0, 0, 1].into()], Duration::from_secs(10)).await);
        // Reserved (RFC 1112): nobody has it.
        assert!(!anybody(vec![[240, 0, 0, 1].into()], within).await);
    }
}
