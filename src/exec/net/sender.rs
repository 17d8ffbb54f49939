//! Sends one datagram everywhere. Used by the guard's beat thread: never waits, never fails as a whole.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use socket2::Socket;

use super::socket;
use crate::types::guard::BeatInterface;

/// All ways by which beats leave this host.
pub struct BeatSender {
    groups: Vec<Group>,
    peers: Vec<Peer>,
    to_peers: ToPeers,
}

/// One interface's group.
struct Group {
    interface: BeatInterface,
    open: Option<Open>,
    trouble: Option<String>,
}

struct Open {
    socket: Socket,
    /// Of the interface when this was opened.
    index: u32,
}

struct Peer {
    address: SocketAddr,
    trouble: Option<String>,
}

/// One socket per family for all peers, opened when it is needed first.
#[derive(Default)]
struct ToPeers {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl BeatSender {
    /// Opens what can be opened, and says what could not be; that is tried again with every beat.
    #[must_use]
    pub fn open(interfaces: &[BeatInterface], peers: &[SocketAddr]) -> (Self, Vec<String>) {
        let groups = interfaces.iter().filter(|interface| interface.group.ip().is_multicast());
        let mut sender = Self {
            groups: groups.map(|i| Group { interface: i.clone(), open: None, trouble: None }).collect(),
            peers: peers.iter().map(|address| Peer { address: *address, trouble: None }).collect(),
            to_peers: ToPeers::default(),
        };
        let opened = sender.groups.iter_mut().filter_map(|group| {
            let result = group.ready().map(drop);
            group.note(&result)
        });
        let troubles = opened.collect();
        (sender, troubles)
    }

    /// Sends a sealed beat by every path. Gives the troubles that were not there with the beat before, for people.
    pub fn send(&mut self, datagram: &[u8]) -> Vec<String> {
        let mut new = Vec::new();
        for group in &mut self.groups {
            let result = group.send(datagram);
            new.extend(group.note(&result));
        }
        for peer in &mut self.peers {
            let result = self.to_peers.send(peer.address, datagram);
            new.extend(peer.note(&result));
        }
        new
    }

    /// What is wrong now, for people.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let groups = self.groups.iter().filter_map(|group| group.trouble.clone());
        groups.chain(self.peers.iter().filter_map(|peer| peer.trouble.clone())).collect()
    }
}

impl Group {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        let group = self.interface.group;
        let Open { socket, index } = self.ready()?;
        let sent = socket.send_to(datagram, &socket::scoped(group, *index).into());
        sent.map(drop).inspect_err(|error| {
            if error.kind() != ErrorKind::WouldBlock {
                self.open = None; // The interface may have been replaced; the next beat opens it anew.
            }
        })
    }

    /// The socket, opened if there is none or it belongs to an interface of the past.
    fn ready(&mut self) -> io::Result<&Open> {
        let index = socket::index_of(&self.interface).inspect_err(|_| self.open = None)?;
        let still = self.open.take().filter(|open| open.index == index);
        let open = match still {
            Some(open) => open,
            None => Open { socket: socket::to_group(&self.interface, index)?, index },
        };
        Ok(self.open.insert(open))
    }

    fn note(&mut self, result: &io::Result<()>) -> Option<String> {
        let trouble = result.as_ref().err().map(|error| socket::describe(&self.interface, "sends", error));
        news(&mut self.trouble, trouble)
    }
}

impl Peer {
    fn note(&mut self, result: &io::Result<()>) -> Option<String> {
        let trouble = result.as_ref().err().map(|error| {
            format!("beats do not reach {}: {error}; check the peer list and this host's routes", self.address)
        });
        news(&mut self.trouble, trouble)
    }
}

impl ToPeers {
    fn send(&mut self, peer: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let socket = if peer.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        let open = match socket.take() {
            Some(open) => open,
            None => socket::to_peer(peer)?,
        };
        socket.insert(open).send_to(datagram, &peer.into()).map(drop)
    }
}

/// Takes the present trouble over; gives it if it is another one than before.
fn news(known: &mut Option<String>, now: Option<String>) -> Option<String> {
    if *known == now {
        return None;
    }
    known.clone_from(&now);
    now
}
