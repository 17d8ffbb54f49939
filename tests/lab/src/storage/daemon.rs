//! The storage daemon: its sockets, its mounts, its end.
//!
//! ```text
//!  main thread:     start ─► wait ──stop or SIGTERM──► answer all that waits ─► unmount ─► exit
//!  control.sock ─► thread per connection ─► order ─► host, locks, mounts
//!  expire.sock  ─► thread per connection ─► expire
//! ```
//!
//! A daemon that died leaves dead mounts in its runtime folder; the next one detaches them when it starts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use nix::mount::{MntFlags, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use super::host::Host;
use super::locks::Locks;
use super::mount::Mount;
use super::tree::{Nodes, open_folder};
use super::{Answer, LockMode, Order};

/// Session threads of a mount: so many operations of a host can wait for the backing disk at once.
const THREADS: usize = 4;
/// How long somebody who connected to expire.sock may take to say what he wants.
const EXPIRE_WITHIN: Duration = Duration::from_secs(5);
/// The daemon goes before the guests, as a server of its own would.
const NICENESS: i32 = -10;

struct Daemon {
    folder: File,
    run: PathBuf,
    hosts: Mutex<BTreeMap<String, Arc<Host>>>,
    mounts: Mutex<BTreeMap<String, Mounted>>,
    locks: Arc<Locks>,
    next_mount: AtomicU64,
    stop: Sender<()>,
}

struct Mounted {
    path: PathBuf,
    lock_mode: &'static str,
    _session: BackgroundSession,
}

/// Serves the backing folder `dir` until it is told to stop, or SIGTERM or SIGINT; sockets and mounts are in `run`.
pub fn run_daemon(dir: &Path, run: &Path) -> Result<()> {
    // Before any other thread, so that all inherit the mask.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    std::fs::create_dir_all(run.join("mounts")).with_context(|| format!("create {}", run.display()))?;
    let control = listen(&run.join("control.sock"), 0o600)?;
    let expire = listen(&run.join("expire.sock"), 0o666)?;
    prepare_process()?;
    detach_leftovers(run)?;
    let (stop, stopped) = channel();
    let daemon = Arc::new(Daemon {
        folder: open_folder(dir).with_context(|| format!("open backing folder {}", dir.display()))?,
        run: run.into(),
        hosts: Mutex::default(),
        mounts: Mutex::default(),
        locks: Locks::new()?,
        next_mount: AtomicU64::new(1),
        stop: stop.clone(),
    });
    spawn("signals", move || {
        let _ = signals.wait();
        let _ = stop.send(());
    })?;
    accept(control, "control", daemon.clone(), Daemon::serve_control)?;
    accept(expire, "expire", daemon.clone(), Daemon::serve_expire)?;
    let _ = stopped.recv();
    daemon.shut_down();
    for name in ["control.sock", "expire.sock"] {
        let _ = std::fs::remove_file(run.join(name));
    }
    Ok(())
}

impl Daemon {
    fn serve_control(&self, stream: UnixStream) {
        let Ok(mut writer) = stream.try_clone() else { return };
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let done = serde_json::from_str(&line).map_err(anyhow::Error::from).and_then(|order| self.obey(order));
            let answer = match done {
                Ok(value) => Answer::Done(value),
                Err(error) => Answer::Failed(format!("{error:#}")),
            };
            let mut text = serde_json::to_string(&answer).expect("an answer can always be written as JSON");
            text.push('\n');
            if writer.write_all(text.as_bytes()).is_err() {
                return;
            }
        }
    }

    fn serve_expire(&self, stream: UnixStream) {
        let _ = stream.set_read_timeout(Some(EXPIRE_WITHIN));
        let Ok(mut writer) = stream.try_clone() else { return };
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let done = match line.trim().split_once(' ') {
                Some(("expire", host)) => self.expire(host),
                _ => Err(anyhow!("expected `expire HOST`")),
            };
            let answer = match done {
                Ok(()) => "ok\n".to_string(),
                Err(error) => format!("error {error:#}\n"),
            };
            if writer.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    }

    fn obey(&self, order: Order) -> Result<Value> {
        match order {
            Order::Mount { host } => return Ok(json!(self.mount(&host)?)),
            Order::Unmount { host } => self.unmount(&host)?,
            Order::Dead { host } => {
                let host = self.host(&host)?;
                host.set_dead();
                self.locks.dismiss_waiters(&host);
            }
            Order::Alive { host } => {
                let host = self.host(&host)?;
                if host.set_alive() {
                    self.locks.drop_host(&host);
                }
            }
            Order::Fault { host, fault } => self.host(&host)?.set_fault(fault),
            Order::Locks { mode } => self.locks.set_mode(mode),
            Order::Expire { host } => self.expire(&host)?,
            Order::Status => return Ok(self.status()),
            Order::Stop => self.stop.send(())?,
        }
        Ok(Value::Null)
    }

    fn mount(&self, name: &str) -> Result<PathBuf> {
        let valid = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if name.is_empty() || !name.chars().all(valid) {
            bail!("{name:?} is not the name of a host");
        }
        let mut mounts = self.mounts.lock().expect("no holder panics");
        if let Some(mounted) = mounts.get(name) {
            return Ok(mounted.path.clone());
        }
        let path = self.run.join("mounts").join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        let host = match self.hosts.lock().expect("no holder panics").entry(name.into()) {
            std::collections::btree_map::Entry::Occupied(known) => known.get().clone(),
            std::collections::btree_map::Entry::Vacant(new) => new.insert(Host::new(name)?).clone(),
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName(format!("lab-storage-{name}")), MountOption::NoAtime];
        config.acl = SessionACL::All;
        config.n_threads = Some(THREADS);
        let (forwards_locks, lock_mode) = match self.locks.mode() {
            LockMode::Local => (false, "local"),
            LockMode::Server { .. } => (true, "server"),
        };
        let id = self.next_mount.fetch_add(1, Ordering::Relaxed);
        let files = Mount::new(id, host, self.locks.clone(), forwards_locks, Nodes::new(&self.folder)?);
        let session = Session::new(files, &path, &config)
            .and_then(Session::spawn)
            .with_context(|| format!("mount {}", path.display()))?;
        mounts.insert(name.into(), Mounted { path: path.clone(), lock_mode, _session: session });
        Ok(path)
    }

    fn unmount(&self, name: &str) -> Result<()> {
        let host = self.host(name)?;
        let mounted = self.mounts.lock().expect("no holder panics").remove(name);
        host.abandon_waiting();
        self.locks.dismiss_waiters(&host);
        match mounted {
            Some(mounted) => detach(&mounted.path),
            None => Ok(()),
        }
    }

    fn expire(&self, name: &str) -> Result<()> {
        let host = self.host(name)?;
        host.set_fenced();
        self.locks.drop_host(&host);
        eprintln!("storage: {name} is fenced");
        Ok(())
    }

    fn host(&self, name: &str) -> Result<Arc<Host>> {
        let hosts = self.hosts.lock().expect("no holder panics");
        hosts.get(name).cloned().ok_or_else(|| anyhow!("no host {name:?} has mounted this storage"))
    }

    fn status(&self) -> Value {
        let mounts = self.mounts.lock().expect("no holder panics");
        let hosts = self.hosts.lock().expect("no holder panics");
        let of_host = |(name, host): (&String, &Arc<Host>)| {
            let mut status = host.status();
            status["mounted"] = json!(mounts.get(name).map(|m| m.lock_mode));
            (name.clone(), status)
        };
        let hosts: serde_json::Map<String, Value> = hosts.iter().map(of_host).collect();
        json!({ "hosts": hosts, "locks": self.locks.status() })
    }

    fn shut_down(&self) {
        eprintln!("storage: stops; {}", self.status());
        for host in self.hosts.lock().expect("no holder panics").values() {
            host.set_dead();
            self.locks.dismiss_waiters(host);
        }
        for mounted in std::mem::take(&mut *self.mounts.lock().expect("no holder panics")).into_values() {
            if let Err(error) = detach(&mounted.path) {
                eprintln!("storage: {error:#}");
            }
        }
    }
}

/// Takes a mount away, also one in use: its users keep it, and get EIO once the daemon has gone.
fn detach(path: &Path) -> Result<()> {
    umount2(path, MntFlags::empty())
        .or_else(|_| umount2(path, MntFlags::MNT_DETACH))
        .with_context(|| format!("unmount {}", path.display()))
}

fn detach_leftovers(run: &Path) -> Result<()> {
    let mounts = run.join("mounts");
    for entry in std::fs::read_dir(&mounts).with_context(|| format!("read {}", mounts.display()))? {
        while umount2(&entry.as_ref().map_err(|e| anyhow!("{e}"))?.path(), MntFlags::MNT_DETACH).is_ok() {}
    }
    Ok(())
}

fn listen(path: &Path, mode: u32) -> Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        bail!("another storage daemon serves {}", path.display());
    }
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

fn accept(listener: UnixListener, name: &str, daemon: Arc<Daemon>, serve: fn(&Daemon, UnixStream)) -> Result<()> {
    spawn(name, move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let daemon = daemon.clone();
            let _ = std::thread::Builder::new().name("connection".into()).spawn(move || serve(&daemon, stream));
        }
    })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).context("start a thread")?;
    Ok(())
}

fn prepare_process() -> Result<()> {
    // Modes come from the hosts, where their umask was applied already.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    // Each inode that a kernel knows costs a descriptor.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    // SAFETY: plain system call without pointers. A refusal only costs speed.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
    Ok(())
}
