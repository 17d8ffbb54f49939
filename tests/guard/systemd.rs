//! Plays systemd for one guard: its notify socket, and its descriptor store.

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

pub struct Systemd {
    socket: UnixDatagram,
    path: PathBuf,
    stored: Vec<(String, OwnedFd)>,
}

impl Systemd {
    pub fn new(dir: &Path) -> Self {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, path, stored: Vec::new() }
    }

    /// Takes in what was sent so far.
    pub fn take(&mut self) {
        loop {
            let mut bytes = [0; 4096];
            let mut space = nix::cmsg_space!([RawFd; 8]);
            let (text, fds) = {
                let mut parts = [IoSliceMut::new(&mut bytes)];
                let flags = MsgFlags::MSG_CMSG_CLOEXEC;
                let Ok(got) = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags) else {
                    return;
                };
                let fds: Vec<RawFd> = got
                    .cmsgs()
                    .unwrap()
                    .flat_map(|message| match message {
                        ControlMessageOwned::ScmRights(fds) => fds,
                        _ => Vec::new(),
                    })
                    .collect();
                (got.bytes, fds)
            };
            let text = String::from_utf8_lossy(&bytes[..text]).into_owned();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("").to_owned();
            if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
                self.stored.retain(|(other, _)| *other != name);
            }
            let stores = text.lines().any(|line| line == "FDSTORE=1");
            assert!(!stores || text.lines().any(|line| line == "FDPOLL=0"), "{text}");
            for fd in fds {
                assert!(stores, "{text}");
                // SAFETY: the kernel just made it for us.
                self.stored.push((name.clone(), unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }

    /// What the guard stored.
    pub fn stored(&mut self) -> &[(String, OwnedFd)] {
        self.take();
        &self.stored
    }

    /// The store is emptied, as by `systemctl stop`.
    pub fn forget(&mut self) {
        self.take();
        self.stored.clear();
    }

    /// A command that starts `guard` as systemd would: LISTEN_PID is its own pid, descriptors begin at 3.
    pub fn command(&mut self, guard: &Command) -> Command {
        self.take();
        let numbers: Vec<String> = self.stored.iter().map(|(_, fd)| fd.as_raw_fd().to_string()).collect();
        // Moved out of the way first, in case one of them is what another must become.
        let high = numbers.iter().enumerate().map(|(n, fd)| format!("exec {}<&{fd};", 200 + n));
        let low = (0..numbers.len()).map(|n| format!("exec {}<&{}; exec {}<&-;", 3 + n, 200 + n, 200 + n));
        let moves: String = high.chain(low).collect();
        let mut command = Command::new("/bin/bash");
        command.arg("-c").arg(format!("{moves} export LISTEN_PID=$$; exec \"$@\"")).arg("bash");
        command.arg(guard.get_program()).args(guard.get_args());
        command.env("NOTIFY_SOCKET", &self.path).env("LISTEN_FDS", numbers.len().to_string());
        let names: Vec<&str> = self.stored.iter().map(|(name, _)| name.as_str()).collect();
        command.env("LISTEN_FDNAMES", names.join(":"));
        for (_, fd) in &self.stored {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        }
        command
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}
