//! The local socket: applications speak here, one JSON object a line.
//!
//! ```text
//!   accept (≤ MAX_CLIENTS) ──► lines ──► Request ──► the loop ──► Reply ──► bounded buffer ──► client
//!                              too long, no JSON: an error, and the connection ends
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::PollFlags;

use super::config::SocketConfig;
use super::words::{MAX_LINE, Reply, Request};

/// More are turned away.
const MAX_CLIENTS: usize = 64;
/// A client that does not read is cut off.
const MAX_UNREAD: usize = 64 * 1024;

/// Names a client, also after it has gone.
pub type ClientId = u64;

struct Client {
    stream: UnixStream,
    read: Vec<u8>,
    write: Vec<u8>,
    /// Ends when everything is written.
    ends: bool,
}

/// The socket and who is connected.
pub struct Socket {
    listener: UnixListener,
    clients: BTreeMap<ClientId, Client>,
    next: ClientId,
}

impl Socket {
    /// Takes the place of one that an earlier program left.
    ///
    /// # Errors
    /// Another agent listens there, or the place cannot be used; what was meant.
    pub fn open(config: &SocketConfig) -> Result<Self, String> {
        let path = config.path.display();
        if UnixStream::connect(&config.path).is_ok() {
            return Err(format!("another mainstay-guest listens at {path}"));
        }
        if let Some(folder) = config.path.parent() {
            fs::create_dir_all(folder).map_err(|why| format!("{}: {why}", folder.display()))?;
        }
        let _ = fs::remove_file(&config.path);
        let listener = UnixListener::bind(&config.path).map_err(|why| format!("{path}: {why}"))?;
        listener.set_nonblocking(true).map_err(|why| format!("{path}: {why}"))?;
        let group = config.group.as_deref().map(group).transpose()?;
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::os::unix::fs::chown(&config.path, None, group).map_err(|why| format!("{path}: {why}"))?;
        fs::set_permissions(&config.path, fs::Permissions::from_mode(mode)).map_err(|why| format!("{path}: {why}"))?;
        Ok(Self { listener, clients: BTreeMap::new(), next: 0 })
    }

    /// What is polled, and for what.
    pub fn polled(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let flags = |client: &Client| {
            if client.write.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
        };
        let clients = self.clients.values().map(move |client| (client.stream.as_fd(), flags(client)));
        std::iter::once((self.listener.as_fd(), PollFlags::IN)).chain(clients)
    }

    /// Takes new clients, reads and writes; what they want.
    pub fn turn(&mut self) -> Vec<(ClientId, Request)> {
        self.accept();
        let mut wants = Vec::new();
        let mut gone = Vec::new();
        for (id, client) in &mut self.clients {
            let alive = client.read(*id, &mut wants) && client.write();
            if !alive || client.ends && client.write.is_empty() {
                gone.push(*id);
            }
        }
        gone.iter().for_each(|id| drop(self.clients.remove(id)));
        wants
    }

    /// Says something to a client that may have gone.
    pub fn reply(&mut self, id: ClientId, reply: &Reply) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.say(reply);
        if MAX_UNREAD < client.write.len() || !client.write() {
            self.clients.remove(&id);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if MAX_CLIENTS <= self.clients.len() || stream.set_nonblocking(true).is_err() {
                continue;
            }
            self.next += 1;
            self.clients.insert(self.next, Client { stream, read: Vec::new(), write: Vec::new(), ends: false });
        }
    }
}

impl Client {
    /// False when it has gone.
    fn read(&mut self, id: ClientId, wants: &mut Vec<(ClientId, Request)>) -> bool {
        let mut chunk = [0; 4096];
        for _ in 0..8 {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(length) => self.read.extend_from_slice(&chunk[..length]),
                Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => break,
                Err(_) => return false,
            }
            self.lines(id, wants);
        }
        true
    }

    fn lines(&mut self, id: ClientId, wants: &mut Vec<(ClientId, Request)>) {
        while let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.read.drain(..=end).collect();
            if self.ends || line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice(&line) {
                Ok(request) => wants.push((id, request)),
                Err(why) => self.refuse(&format!("not understood: {why}")),
            }
        }
        if MAX_LINE < self.read.len() {
            self.read.clear();
            self.refuse(&format!("a line is at most {MAX_LINE} bytes"));
        }
    }

    fn refuse(&mut self, why: &str) {
        self.say(&Reply::Error(why.to_owned()));
        self.ends = true;
    }

    fn say(&mut self, reply: &Reply) {
        let mut line = serde_json::to_vec(reply).expect("replies are plain data");
        line.push(b'\n');
        self.write.extend(line);
    }

    /// False when it has gone.
    fn write(&mut self) -> bool {
        while !self.write.is_empty() {
            match self.stream.write(&self.write) {
                Ok(0) => return false,
                Ok(length) => drop(self.write.drain(..length)),
                Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return true,
                Err(_) => return false,
            }
        }
        true
    }
}

/// Number of a group, from /etc/group: a static program has no other way.
fn group(name: &str) -> Result<u32, String> {
    let text = fs::read_to_string("/etc/group").map_err(|why| format!("/etc/group: {why}"))?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name));
    let number = line.and_then(|line| line.split(':').nth(2)?.parse().ok());
    number.ok_or_else(|| format!("there is no group '{name}': make it, or change 'group' of [socket]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufRead;

    #[test]
    fn clients_are_heard_and_answered() {
        let folder = tempfile::tempdir().unwrap();
        let config = SocketConfig { path: folder.path().join("run/s"), group: None };
        let mut socket = Socket::open(&config).unwrap();
        assert!(Socket::open(&config).is_err(), "one at a time");
        let mut good = UnixStream::connect(&config.path).unwrap();
        good.write_all(b"\"sta").unwrap();
        assert_eq!(socket.turn(), []);
        good.write_all(b"tus\"\n{\"ready\":true}\n").unwrap();
        let wants = socket.turn();
        let client = wants[0].0;
        assert_eq!(wants, [(client, Request::Status), (client, Request::Ready(true))]);
        socket.reply(client, &Reply::Ok);
        let mut line = String::new();
        std::io::BufReader::new(&good).read_line(&mut line).unwrap();
        assert_eq!(line, "\"ok\"\n");
        for junk in [b"{\"x\":1}\n".to_vec(), vec![b'x'; MAX_LINE + 1]] {
            let mut bad = UnixStream::connect(&config.path).unwrap();
            bad.write_all(&junk).unwrap();
            while 1 < {
                assert_eq!(socket.turn(), []);
                socket.clients.len()
            } {}
            let mut said = String::new();
            bad.read_to_string(&mut said).unwrap();
            assert!(said.starts_with("{\"error\":"), "{said}");
        }
        assert!(group("root").is_ok() && group("no-such-group").is_err());
    }
}
