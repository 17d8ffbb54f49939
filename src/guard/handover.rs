//! Reads how much time the vCPUs of VMs under a handover claim have spent, every 10 ms, in the enforcing thread.
//!
//! `/proc/PID/task/TID/schedstat` is memory: reading it waits for nobody. For a thread that stands it is exact; for one
//! that runs it lags by a tick, so a copy that goes on after the switch is seen at the second sample at the latest. The
//! files are opened when the watch begins, so a sample takes one read per vCPU and no memory.
//!
//! Deliberately not here: what a sample means (`table::handover`).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::shared::Shared;
use super::table::ProcessKey;
use crate::exec::clock;
use crate::types::{Time, VmId};

/// Between two samples.
const EVERY: Duration = Duration::from_millis(10);

struct Watch {
    key: ProcessKey,
    vcpus: Vec<File>,
}

/// See the module.
#[derive(Default)]
pub struct Sampler {
    watches: Vec<Watch>,
    due: Time,
}

impl Sampler {
    /// Samples what is due; when to come again, if anything is watched.
    pub fn turn(&mut self, shared: &Shared) -> Option<Time> {
        let watched: Vec<(VmId, ProcessKey)> = shared.enforce(|state, _| state.table.watched().collect());
        self.watches.retain(|watch| watched.iter().any(|(_, key)| *key == watch.key));
        if watched.is_empty() {
            return None;
        }
        if clock::now() < self.due {
            return Some(self.due);
        }
        for (vm, key) in watched {
            // No vCPU yet: QEMU has not come so far. A process that has exited is seen by its pidfd.
            let Some(spent) = self.spent(key) else { continue };
            shared.enforce(|state, now| {
                let alone = state.is_alone(now);
                state.table.sampled(vm, key, spent, now, alone);
            });
        }
        self.due = clock::now() + EVERY;
        Some(self.due)
    }

    /// Time spent by all vCPUs of a process.
    fn spent(&mut self, key: ProcessKey) -> Option<Duration> {
        if self.watches.iter().all(|watch| watch.key != key) {
            let vcpus = vcpus_of(key.pid);
            if vcpus.is_empty() {
                return None;
            }
            self.watches.push(Watch { key, vcpus });
        }
        let watch = self.watches.iter().find(|watch| watch.key == key)?;
        watch.vcpus.iter().map(spent).sum()
    }
}

/// QEMU names its threads, since libvirt asks it to: `CPU 0/KVM`, `CPU 0/TCG`, `ALL CPUs/TCG`.
fn vcpus_of(pid: u32) -> Vec<File> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let is_vcpu = |name: &str| name.starts_with("CPU ") || name.starts_with("ALL CPU");
    let vcpu = |thread: &fs::DirEntry| fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| is_vcpu(&name));
    let open = |thread: fs::DirEntry| File::open(thread.path().join("schedstat")).ok();
    threads.flatten().filter(vcpu).filter_map(open).collect()
}

/// The first number: nanoseconds on a CPU. None: the thread has gone.
fn spent(schedstat: &File) -> Option<Duration> {
    let mut bytes = [0; 64];
    let length = schedstat.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(bytes.get(..length)?).ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_spends_what_it_works() {
        let own = File::open("/proc/thread-self/schedstat").unwrap();
        let before = spent(&own).unwrap();
        let mut sum = 0_u64;
        while spent(&own).unwrap() < before + Duration::from_millis(5) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(vcpus_of(std::process::id()).is_empty(), "no thread here is a vCPU");
    }
}
