//! The watching thread: finds QEMUs of rows, sees them exit, bars rows whose deadline passed, keeps the rows, writes the
//! log of threads that must not.
//!
//! It wakes on: an exit (pidfd), a new pid file (inotify), a change of the table, 50 ms while some row waits for a QEMU,
//! else each second.
//!
//! Deliberately not here: signals (`enforce`).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::process::{Process, pid_of};
use super::shared::Shared;
use super::table::ProcessKey;
use crate::core::timing::LOOK_EVERY;
use crate::exec::clock;
use crate::types::{Time, VmId};

/// Looks for everything at least this often.
const LOOK_AT_ALL: Duration = Duration::from_secs(1);
/// A pid file may name a process that is not yet QEMU for this long: libvirt has not executed it.
const COMING: Duration = Duration::from_secs(5);
/// How many second copies are remembered, so that each is told once. When full the memory begins anew.
const TOLD_MAX: usize = 64;

struct Watcher<'a> {
    shared: &'a Shared,
    inotify: Option<Inotify>,
    looked: Time,
    coming: BTreeMap<VmId, Time>,
    told: BTreeSet<ProcessKey>,
    keep_failed: bool,
}

/// Runs for ever.
pub fn run(shared: &Shared) {
    let mut watcher = Watcher {
        shared,
        inotify: None,
        looked: Time::ZERO,
        coming: BTreeMap::new(),
        told: BTreeSet::new(),
        keep_failed: false,
    };
    loop {
        let new_files = watcher.new_files();
        watcher.exits();
        shared.with(|state, now| state.table.deadlines(now));
        let waiting = watcher.look(new_files);
        watcher.keep();
        shared.with(|state, _| std::mem::take(&mut state.log)).iter().for_each(|line| tracing::info!("{line}"));
        watcher.sleep(waiting);
    }
}

impl Watcher<'_> {
    /// Whether pid files may have come since the last call.
    fn new_files(&mut self) -> bool {
        if self.inotify.is_none() {
            // libvirt's folder may come later than we.
            self.inotify = watch(&self.shared.paths.libvirt);
            return true;
        }
        match self.inotify.as_ref().map(Inotify::read_events) {
            Some(Ok(events)) => {
                if events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_IGNORED)) {
                    self.inotify = None; // The folder was removed.
                }
                true
            }
            Some(Err(_)) | None => false,
        }
    }

    fn exits(&self) {
        let processes = self.processes();
        for (vm, process) in processes {
            if process.has_exited() {
                process.thaw();
                self.shared.with(|state, now| {
                    state.say(format!("VM {vm}: QEMU {} has exited", process.key().pid));
                    state.exited(vm, process.key(), now);
                });
            }
        }
    }

    /// Looks for QEMUs; true while some row waits for one.
    fn look(&mut self, new_files: bool) -> bool {
        let now = clock::now();
        let everything = new_files || LOOK_AT_ALL <= now.since(self.looked);
        let (wanted, hints) = self.shared.with(|state, _| {
            let wanted = state.table.wanted().filter(|(_, _, soon)| everything || *soon);
            let wanted: BTreeMap<VmId, (String, bool)> =
                wanted.map(|(vm, name, soon)| (vm, (name.to_owned(), soon))).collect();
            (wanted, std::mem::take(&mut state.hints))
        });
        if everything {
            self.looked = now;
        }
        for (vm, pid) in hints {
            self.adopt(vm, pid);
        }
        let mut waiting = false;
        for (vm, (name, soon)) in wanted {
            waiting |= soon;
            let pid = pid_of(&self.shared.paths.libvirt, &name);
            if pid.is_some_and(|pid| self.adopt(vm, pid)) {
                self.coming.remove(&vm);
            } else if pid.is_some_and(is_alive) && now.since(*self.coming.entry(vm).or_insert(now)) < COMING {
                waiting = true;
            } else {
                self.coming.remove(&vm);
                self.shared.with(|state, _| state.table.absent(vm));
            }
        }
        self.coming.retain(|_, since| now.since(*since) < 2 * COMING);
        waiting
    }

    /// Takes the process into the table, if it is a QEMU of that VM.
    fn adopt(&mut self, vm: VmId, pid: u32) -> bool {
        let process = match Process::of_vm(pid, vm) {
            Ok(Some(process)) => Arc::new(process),
            Ok(None) => return false,
            Err(error) => {
                self.shared.with(|state, _| state.alarm(format!("VM {vm}: QEMU {pid} cannot be held: {error}")));
                return false;
            }
        };
        if self.is_second(vm, &process) {
            // The first may have exited just now.
            self.exits();
            if self.is_second(vm, &process) {
                self.second_copy(vm, &process);
            }
        }
        true
    }

    /// Puts the process into the table; true if another one of this VM stands there.
    fn is_second(&self, vm: VmId, process: &Arc<Process>) -> bool {
        let key = process.key();
        self.shared.with(|state, now| {
            let second = state.table.appeared(vm, key, now);
            if state.table.process(vm) == Some(key) {
                state.processes.entry(key).or_insert_with(|| Arc::clone(process));
            }
            second
        })
    }

    /// The known QEMU of this VM has not exited (it may hang in D): the newcomer must not run beside it.
    fn second_copy(&mut self, vm: VmId, process: &Process) {
        drop(process.halt());
        drop(process.freeze());
        if TOLD_MAX <= self.told.len() {
            self.told.clear();
        }
        if self.told.insert(process.key()) {
            let pid = process.key().pid;
            let text = format!("VM {vm}: a second QEMU ({pid}) came up while the first lives; it is stopped; end one");
            self.shared.with(|state, _| state.alarm(text));
        }
    }

    fn keep(&mut self) {
        let result = self.shared.keep();
        if let (Err(error), false) = (&result, self.keep_failed) {
            let folder = self.shared.paths.kept.display();
            let text = format!("{folder}: the list of VMs cannot be kept ({error}); make room there");
            self.shared.with(|state, _| state.alarm(text));
        }
        self.keep_failed = result.is_err();
    }

    fn processes(&self) -> Vec<(VmId, Arc<Process>)> {
        self.shared.with(|state, _| {
            let known: BTreeSet<ProcessKey> = state.table.processes().map(|(_, key)| key).collect();
            state.processes.retain(|key, _| known.contains(key));
            let found = state.table.processes().filter_map(|(vm, key)| Some((vm, state.processes.get(&key)?.clone())));
            found.collect()
        })
    }

    fn sleep(&self, waiting: bool) {
        let processes = self.processes();
        let deadline = self.shared.with(|state, now| state.table.next_deadline().map(|due| due.since(now)));
        let most = if waiting { LOOK_EVERY } else { LOOK_AT_ALL };
        let pause = deadline.map_or(most, |left| left.min(most)).as_millis() + 1;
        let mut fds: Vec<PollFd> =
            processes.iter().map(|(_, process)| PollFd::new(process.pidfd(), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(self.shared.watcher(), PollFlags::POLLIN));
        if let Some(inotify) = &self.inotify {
            fds.push(PollFd::new(inotify.as_fd(), PollFlags::POLLIN));
        }
        let pause = u16::try_from(pause).unwrap_or(u16::MAX);
        let _ = poll(&mut fds, PollTimeout::from(pause)); // Interrupted = look again, which is always right.
        self.shared.watcher_woken();
    }
}

fn watch(folder: &Path) -> Option<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
    let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
    inotify.add_watch(folder, flags | AddWatchFlags::IN_ONLYDIR).ok()?;
    Some(inotify)
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
