//! Disks that expect to fail, asked by `smartctl` (smartmontools), if it is there.
//!
//! A disk that sleeps is not woken. A program that is missing, hangs or says something else is no finding.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::Value;

use crate::exec::program::{Ended, run_on};
use crate::types::finding::{Finding, Source};

/// For one call.
const WITHIN: Duration = Duration::from_secs(10);
/// Longest answer.
const TEXT_MAX: u64 = 1 << 20;
/// Disks that are asked.
const DISKS_MAX: usize = 64;

/// Asks all disks.
pub(super) fn read() -> Vec<Finding> {
    let ask = |arguments: &[&str]| answer("smartctl", arguments).ok();
    all(&ask)
}

fn all(ask: &dyn Fn(&[&str]) -> Option<Value>) -> Vec<Finding> {
    let Some(scan) = ask(&["--json", "--scan"]) else { return Vec::new() };
    let disks = scan.get("devices").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut found = Vec::new();
    for disk in disks.iter().take(DISKS_MAX) {
        let text = |key: &str| disk.get(key).and_then(Value::as_str);
        let Some(name) = text("name").filter(|name| name.starts_with("/dev/")) else { continue };
        let kind = text("type").unwrap_or("auto");
        let said = ask(&["--json", "--nocheck=standby", "-H", "-d", kind, name]);
        let passed = said.as_ref().and_then(|said| said.get("smart_status")?.get("passed")?.as_bool());
        if passed == Some(false) {
            // Several disks behind one controller have one name, and a type each.
            let object = if kind.contains(',') { format!("{name} {kind}") } else { name.to_owned() };
            found.push(Finding::new(Source::Disk, &object, &format!("disk {object} expects to fail soon (SMART)")));
        }
    }
    found
}

/// What it says; its exit code has bits for what is wrong with a disk, and is not looked at.
fn answer(program: &str, arguments: &[&str]) -> io::Result<Value> {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = File::from(memfd_create("mainstay-smart", MFdFlags::MFD_CLOEXEC)?);
    match run_on(command, File::open("/dev/null")?, output.try_clone()?, WITHIN)? {
        Ended::Itself(_) => {}
        Ended::Killed | Ended::Stopped | Ended::NotEven => return Err(io::ErrorKind::TimedOut.into()),
        Ended::Unknown(error) => return Err(error),
    }
    let length = output.metadata()?.len().min(TEXT_MAX);
    let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
    output.read_exact_at(&mut text, 0)?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn disks_that_expect_to_fail_are_found() {
        let ask = |arguments: &[&str]| match arguments {
            ["--json", "--scan"] => Some(json!({ "devices": [
                { "name": "/dev/sda", "type": "scsi" },
                { "name": "/dev/sdb", "type": "sat" },
                { "name": "/dev/bus/0", "type": "megaraid,1" },
                { "name": "/dev/nvme0", "type": "nvme" },
                { "name": "-x", "type": "scsi" },
            ] })),
            [.., "sat", "/dev/sdb"] => Some(json!({ "smart_status": { "passed": false } })),
            [.., "megaraid,1", "/dev/bus/0"] => Some(json!({ "smart_status": { "passed": false } })),
            [.., "nvme", "/dev/nvme0"] => Some(json!({ "power_mode": "standby" })),
            [.., "scsi", "/dev/sda"] => Some(json!({ "smart_status": { "passed": true } })),
            other => panic!("{other:?}"),
        };
        let objects: Vec<String> = all(&ask).into_iter().map(|finding| finding.object).collect();
        assert_eq!(objects, ["/dev/sdb", "/dev/bus/0 megaraid,1"]);
        assert!(all(&|_| None).is_empty(), "a program that is missing is no finding");
    }

    #[test]
    fn a_program_is_asked_and_its_exit_code_does_not_matter() {
        let script = |text: &str| answer("sh", &["-c", text]);
        assert_eq!(script("echo '{\"a\": 1}'; exit 8").unwrap(), json!({ "a": 1 }));
        assert!(script("echo no json").is_err());
        assert!(answer("/nowhere/smartctl", &[]).is_err());
    }
}
