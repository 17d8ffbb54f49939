//! libvirt's hook, installed as `/etc/libvirt/hooks/qemu.d/50-mainstay`. See `exec/hook/client.rs`.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use mainstay::exec::hook::client::{HookPlaces, run};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Only libvirtd, which is root, sets this environment; tests put the host's files elsewhere.
    let root = std::env::var_os("MAINSTAY_HOOK_ROOT").unwrap_or_else(|| "/".into());
    ExitCode::from(run(&arguments, &HookPlaces::below(Path::new(&root))))
}
