//! Everything that makes it less likely that a process is late or killed.

/// Claims all of it for this process. What is refused is told, and goes on.
#[must_use]
pub fn claim() -> Vec<String> {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    let mut refused = Vec::new();
    let unlimited = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    // Only what is touched is held, so that stacks cost what they use.
    let flags = MlockAllFlags::MCL_CURRENT.union(MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT));
    let flags = if unlimited.is_ok() { flags | MlockAllFlags::MCL_FUTURE } else { flags };
    if let Err(error) = mlockall(flags) {
        refused.push(format!("mainstay-guard: memory cannot be locked ({error}); set LimitMEMLOCK=infinity"));
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        refused.push(format!("mainstay-guard: may be killed when memory runs out ({error}); set OOMScoreAdjust=-1000"));
    }
    // SAFETY: three integers; 0 is this process. Threads to come inherit it.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) } != 0 {
        refused.push("mainstay-guard: has no priority over other processes; it must run as root".to_owned());
    }
    refused
}
