//! Ends the QEMU of a VM as a fault would. libvirt, the guard and the core see a VM that has crashed, and it is started again under a
//! claim of its own: a domain that libvirt was told to destroy would count as one that a person wants stopped.
//!
//! The process is held by a pidfd before it is looked at, so that nobody else with the same number is hit.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::types::VmId;

/// Ends it; `done` is called once, on a thread: what the kernel says of a process may hang with it. Done means that the signal was
/// sent, not that it has ended.
pub fn end(pid: Option<u32>, vm: VmId, done: impl FnOnce(Result<(), String>) + Send + Clone + 'static) {
    let told = done.clone();
    let started = std::thread::Builder::new().name("end-qemu".into()).spawn(move || told(kill(pid, vm)));
    if let Err(error) = started {
        done(Err(format!("no thread: {error}")));
    }
}

fn kill(pid: Option<u32>, vm: VmId) -> Result<(), String> {
    let pid = pid.ok_or("libvirt does not say which process it is")?;
    let gone = |error: &dyn std::fmt::Display| format!("process {pid} cannot be ended: {error}");
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| gone(&"no such process"))?;
    let held = pidfd_open(number, PidfdFlags::empty()).map_err(|error| gone(&error))?;
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).map_err(|error| gone(&error))?;
    if !runs(&line, vm) {
        return Err(gone(&"it is no QEMU of this VM"));
    }
    pidfd_send_signal(held, Signal::KILL).map_err(|error| gone(&error))
}

/// Whether this command line is that of a QEMU of this VM, as libvirt writes it.
fn runs(line: &[u8], vm: VmId) -> bool {
    let mut words = line.split(|byte| *byte == 0);
    words.any(|word| word == b"-uuid") && words.next() == Some(vm.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::sync::mpsc::channel;

    use super::*;

    const VM: VmId = VmId(uuid::Uuid::from_u128(7));

    #[test]
    fn only_the_right_process_is_ended() {
        // A shell that gives what follows its script to nobody: it stands for a QEMU.
        let name = VM.to_string();
        let mut qemu = Command::new("sh").args(["-c", "sleep 60; :", "-uuid", &name]).spawn().unwrap();
        let (tell, told) = channel();
        let ended = |pid, vm| {
            let tell = tell.clone();
            end(pid, vm, move |result| tell.send(result).unwrap());
            told.recv().unwrap()
        };
        assert!(ended(None, VM).unwrap_err().contains("which process"));
        assert!(ended(Some(qemu.id()), VmId::default()).unwrap_err().ends_with("it is no QEMU of this VM"));
        assert!(qemu.try_wait().unwrap().is_none(), "it lives");
        assert_eq!(ended(Some(qemu.id()), VM), Ok(()));
        assert_eq!(qemu.wait().unwrap().signal(), Some(9));
        assert!(ended(Some(u32::MAX), VM).is_err());
    }
}
