//! For tests: two hosts on links of their own, from which no packet leaves the machine. Needs root.
//!
//! Each host is a thread in a network namespace of its own; the links are veth pairs. Everything is gone when the
//! threads are.

use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Pid, gettid};

type Job = Box<dyn FnOnce() + Send>;

/// Runs what it is given inside its network namespace, one thing after another.
pub(super) struct Host {
    tid: Pid,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    fn new() -> Self {
        let (ready, tid) = channel();
        let (jobs, todo) = channel::<Job>();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("tests of the network run as root");
            ready.send(gettid()).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        let tid = tid.recv().expect("tests of the network run as root");
        let host = Self { tid, jobs: Some(jobs), thread: Some(thread) };
        host.ip("link set lo up");
        host
    }

    pub(super) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, outcome) = channel();
        let job = move || drop(done.send(job()));
        self.jobs.as_ref().unwrap().send(Box::new(job)).unwrap();
        outcome.recv().expect("the job panicked, see above")
    }

    pub(super) fn ip(&self, arguments: &str) -> String {
        let arguments: Vec<_> = arguments.split_whitespace().map(str::to_owned).collect();
        self.run(move || {
            let output = Command::new("ip").args(&arguments).output().unwrap();
            assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// Two hosts.
pub(super) struct Lan {
    pub(super) a: Host,
    pub(super) b: Host,
}

impl Lan {
    /// With links `net0` to `net<n−1>`.
    pub(super) fn new(links: u8) -> Self {
        let lan = Self { a: Host::new(), b: Host::new() };
        (0..links).for_each(|n| lan.link(n));
        lan
    }

    /// A link: `net<n>` on both, 10.99.n.1 and fd99:n::1 on a, 10.99.n.2 and fd99:n::2 on b.
    pub(super) fn link(&self, n: u8) {
        self.a.ip(&format!("link add net{n} type veth peer name net{n} netns {}", self.b.tid));
        for (host, last) in [(&self.a, 1), (&self.b, 2)] {
            host.ip(&format!("addr add 10.99.{n}.{last}/24 dev net{n}"));
            host.ip(&format!("addr add fd99:{n}::{last}/64 dev net{n} nodad"));
            host.ip(&format!("link set net{n} up"));
        }
        // Carrier and IPv6 come up some time later, and until then the kernel drops what it is given.
        let end = Instant::now() + Duration::from_secs(20);
        let up = |host: &Host| {
            host.ip(&format!("link show net{n}")).contains("state UP")
                && host.ip(&format!("-6 route show table local dev net{n}")).contains("ff00::/8")
        };
        while !(up(&self.a) && up(&self.b)) {
            assert!(Instant::now() < end, "link {n} does not come up");
        }
    }

    /// Removes it on both.
    pub(super) fn unlink(&self, n: u8) {
        self.a.ip(&format!("link del net{n}"));
    }
}
