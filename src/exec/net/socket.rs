//! Opens the sockets that `net.rs` describes. All are non-blocking.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};

use crate::types::guard::BeatInterface;

/// Linux: 6 is "interactive", the highest that needs no privilege; traffic control can put it before bulk data.
const PRIORITY: u32 = 6;
const RECEIVE_BUFFER: usize = 1 << 20;

/// The present index of an interface; 0 for that without a name, which stands for all of them.
pub(super) fn index_of(interface: &BeatInterface) -> io::Result<u32> {
    if interface.name.is_empty() {
        return Ok(0);
    }
    Ok(if_nametoindex(interface.name.as_str())?)
}

/// Sends to the interface's group, from that interface only.
pub(super) fn to_group(interface: &BeatInterface, index: u32) -> io::Result<Socket> {
    let socket = open(interface.group)?;
    bind_device(&socket, interface)?;
    match interface.group.ip() {
        // With a bound device the route goes by it: IP_MULTICAST_IF would say the same again.
        IpAddr::V4(_) => {
            socket.set_multicast_loop_v4(false)?;
            socket.set_multicast_ttl_v4(interface.ttl.into())?;
        }
        IpAddr::V6(_) => {
            socket.set_multicast_if_v6(index)?;
            socket.set_multicast_loop_v6(false)?;
            socket.set_multicast_hops_v6(interface.ttl.into())?;
        }
    }
    Ok(socket)
}

/// Sends to peers of this address's family, by the kernel's routes.
pub(super) fn to_peer(peer: SocketAddr) -> io::Result<Socket> {
    open(peer)
}

/// Hears the interface's group, and with `unicast` whatever comes to its port on that interface.
pub(super) fn from_interface(interface: &BeatInterface, index: u32, unicast: bool) -> io::Result<Socket> {
    let group = interface.group;
    let socket = open(group)?;
    bind_device(&socket, interface)?;
    socket.set_reuse_address(true)?;
    // Past rmem_max if we may, else up to it.
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    setsockopt(&socket, sockopt::RxqOvfl, &1)?;
    let anywhere = match group.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    if !group.ip().is_multicast() {
        socket.bind(&SocketAddr::new(anywhere, group.port()).into())?;
        return Ok(socket);
    }
    let address = if unicast { anywhere } else { group.ip() };
    match group.ip() {
        IpAddr::V4(ip) => {
            socket.set_multicast_all_v4(false)?;
            socket.bind(&SocketAddr::new(address, group.port()).into())?;
            socket.join_multicast_v4_n(&ip, &InterfaceIndexOrAddress::Index(index))?;
        }
        IpAddr::V6(ip) => {
            socket.set_only_v6(true)?;
            socket.set_multicast_all_v6(false)?;
            socket.bind(&scoped(SocketAddr::new(address, group.port()), index).into())?;
            socket.join_multicast_v6(&ip, index)?;
        }
    }
    Ok(socket)
}

/// With the interface's index, which IPv6 needs to tell links apart.
pub(super) fn scoped(mut address: SocketAddr, index: u32) -> SocketAddr {
    if let SocketAddr::V6(v6) = &mut address {
        v6.set_scope_id(index);
    }
    address
}

fn bind_device(socket: &Socket, interface: &BeatInterface) -> io::Result<()> {
    if interface.name.is_empty() { Ok(()) } else { socket.bind_device(Some(interface.name.as_bytes())) }
}

fn open(family_of: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(family_of), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.set_priority(PRIORITY)?;
    Ok(socket)
}

/// What is wrong with an interface, for people. `does` is what it cannot do: "sends" or "hears".
pub(super) fn describe(interface: &BeatInterface, does: &str, error: &io::Error) -> String {
    let group = interface.group;
    let name = if interface.name.is_empty() { "this host" } else { &interface.name };
    if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) {
        return format!("{name} {does} no beats: there is no such interface; beats go on when it is there");
    }
    format!("{name} {does} no beats of group {group}: {error}; check the interface, its address and the group")
}
