//! `cargo lab bench new-master`: how soon an agent that knows nothing has seen 10,000 VMs on one datastore (`benches/new_master.rs`).
//!
//! ```text
//!  a local disk ─► the lab's storage ─► the same, each request some milliseconds later
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::command::check;
use crate::lab::{Lab, Wish};
use crate::packages;
use crate::storage::{Fault, Storage};

const HOST: &str = "h1";

/// Measures all three, and prints what the benchmark says.
pub fn new_master(delay: Duration, as_json: bool) -> Result<()> {
    let program = build()?;
    let lab = Lab::up(Wish { hosts: 1, product: None })?;
    let storage = lab.storage()?;
    let folder = storage.mount(HOST)?.join("new-master");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let words = |place: &[&Path]| forgetting(|| check(Command::new(&program).args(place)));
    let local = words(&[])?;
    let as_it_is = words(&[&folder])?;
    let delayed = slow(&storage, delay, || words(&[&folder]))?;
    fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let all = [("local disk", local), ("storage of the lab", as_it_is), ("the same, slow", delayed)];
    if as_json {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<String>>();
        let all: Vec<_> = all.iter().map(|(name, text)| json!({ "on": name, "said": lines(text) })).collect();
        println!("{}", json!({ "delay_ms": delay.as_millis(), "runs": all }));
        return Ok(());
    }
    for (name, text) in all {
        println!("{name}:");
        text.lines().for_each(|line| println!("  {line}"));
    }
    Ok(())
}

/// While the kernel forgets what it has cached again and again. The storage keeps a descriptor for each inode that the kernel knows, and
/// 10,000 VMs are more than it may have; and a new master has nothing cached either.
fn forgetting<T>(run: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                drop(fs::write("/proc/sys/vm/drop_caches", "2")); // Refused = more is cached.
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let done = run();
        over.store(true, Ordering::Relaxed);
        done
    })
}

/// While each request takes so much longer; it does not stay so.
fn slow<T>(storage: &Storage, delay: Duration, run: impl FnOnce() -> Result<T>) -> Result<T> {
    storage.fault(HOST, Fault::Slow(delay))?;
    let done = run();
    storage.fault(HOST, Fault::None)?;
    done
}

fn build() -> Result<PathBuf> {
    packages::for_build()?;
    eprintln!("building the benchmark");
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["bench", "--bench=new_master", "--no-run", "--message-format=json-render-diagnostics"]);
    let messages = check(command.current_dir(tree)).context("building the benchmark")?;
    let mut found = crate::product::executables(&messages)?;
    found.remove("new_master").context("cargo built no new_master")
}
