//! Runs an administrator's program for a message of a guest. What the guest said is in its environment, and nowhere else.
//!
//! ```text
//!   MAINSTAY_VM  MAINSTAY_UUID  MAINSTAY_KIND  MAINSTAY_SEVERITY  MAINSTAY_MESSAGE ──► program ──► exit 0 within the time
//! ```
//!
//! Bounds: `HOOKS` at the same time, hung ones included; each is killed with its whole group at its deadline.
//!
//! Not here: which program, and how often (`core::guests`).

use std::process::Command;
use std::time::Duration;

use super::program::{self, AFTERWARDS, Ended, Places, Stop};
use crate::core::guests::Said;
use crate::types::VmId;

static HOOKS: Places = Places::new(16);
/// What programs find others by.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs it on a thread of its own; `answer` is called exactly once, soon after `within` at the latest.
pub fn run(
    program: String,
    vm: VmId,
    said: Said,
    within: Duration,
    answer: impl FnOnce(Result<(), String>) + Send + 'static,
) {
    let late = format!("{program} did not end within {} s", within.as_secs());
    let work = move || ended(&program, vm, &said, within);
    let failed = move |why: Option<String>| Err(why.unwrap_or(late));
    program::bounded(&HOOKS, "guest-hook", within + 3 * AFTERWARDS, work, failed, answer);
}

fn ended(program: &str, vm: VmId, said: &Said, within: Duration) -> Result<(), String> {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", PATH).current_dir("/");
    let (name, kind, message) = (&said.name, &said.kind, &said.message);
    command.env("MAINSTAY_VM", name).env("MAINSTAY_UUID", vm.to_string()).env("MAINSTAY_KIND", kind);
    command.env("MAINSTAY_SEVERITY", said.severity).env("MAINSTAY_MESSAGE", message);
    let (ended, text) = program::run(command, &[], within, &Stop::default())
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    let text = if text.is_empty() { text } else { format!(": {text}") };
    match ended {
        Ended::Itself(status) if status.success() => Ok(()),
        Ended::Itself(status) => Err(format!("{program} failed ({status}){text}")),
        Ended::Killed | Ended::Stopped => Err(format!("{program} did not end in time, and was killed{text}")),
        Ended::NotEven => Err(format!("{program} did not end in time, nor when killed{text}")),
        Ended::Unknown(error) => Err(format!("cannot wait for {program}: {error}{text}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_a_guest_says_is_text_in_its_environment() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hook");
        let seen = folder.path().join("seen");
        let script = |body: &str| {
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        let hostile = "$(touch /tmp/x); `id` %s \u{e4}";
        let said = |message: &str| Said {
            name: "web".into(),
            kind: "app/db".into(),
            severity: "critical",
            message: message.into(),
        };
        let ends = |within| {
            let (tell, told) = channel();
            let program = path.to_str().unwrap().to_owned();
            run(program, VmId::default(), said(hostile), within, move |result| tell.send(result).unwrap());
            told.recv().unwrap()
        };
        let long = Duration::from_secs(60);
        script(&format!(
            "printf '%s|' \"$#\" \"$MAINSTAY_VM\" \"$MAINSTAY_KIND\" \"$MAINSTAY_MESSAGE\" > {}",
            seen.display()
        ));
        assert_eq!(ends(long), Ok(()));
        assert_eq!(std::fs::read_to_string(&seen).unwrap(), format!("0|web|app/db|{hostile}|"));
        script("echo no disk; exit 3");
        assert!(ends(long).unwrap_err().ends_with("failed (exit status: 3): no disk"));
        script("sleep 60");
        assert!(ends(Duration::from_millis(100)).unwrap_err().contains("was killed"));
        std::fs::remove_file(&path).unwrap();
        assert!(ends(long).unwrap_err().contains("cannot run"));
    }
}
