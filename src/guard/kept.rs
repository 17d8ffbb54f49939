//! What is kept in `/run`: the rows, so that `--stop-all` finds every QEMU after the guard's death, and the next guard its
//! rows if the memory is lost; and which processes the guard is, so that none of an earlier one lives on.
//!
//! JSON files, written beside and renamed. `/run` is emptied by a boot, so what is found is of this boot.
//!
//! ```text
//! guard dies ──► ExecStopPost: --stop-all ──► SIGSTOP + freeze each ──► Restart: the memory decides which go on; without
//!                                                                      it rows come back as over (lapsed)
//! ```
//!
//! Deliberately not here: who may run again; that needs a new claim.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::process::{Process, pid_of};
use super::table::{KeptRow, ProcessKey, Table};
use crate::exec::clock;
use crate::types::guard::Standing;

/// How long `--stop-all` looks whether all stand. A thread that waits for a CPU shows it late, but runs nothing more.
const STAND: Duration = Duration::from_secs(1);

/// How long the end of a process is waited for that was killed. One that hangs in dead storage ends later, but executes
/// nothing more.
const END: Duration = Duration::from_millis(200);

fn file(folder: &Path) -> PathBuf {
    folder.join("rows.json")
}

fn pair_file(folder: &Path) -> PathBuf {
    folder.join("processes.json")
}

/// The processes of a guard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pair {
    /// Waits for the child.
    pub parent: ProcessKey,
    /// Does the work.
    pub child: ProcessKey,
}

/// Keeps how the hardware watchdog stands, for `mainstay doctor`.
///
/// # Errors
/// Of the file system.
pub fn write_standing(folder: &Path, standing: &Standing) -> io::Result<()> {
    put(folder, &folder.join("watchdog.json"), standing)
}

/// Keeps which processes this guard is.
///
/// # Errors
/// Of the file system.
pub fn write_pair(folder: &Path, pair: &Pair) -> io::Result<()> {
    put(folder, &pair_file(folder), pair)
}

/// Which processes the last guard was; none if nobody knows.
#[must_use]
pub fn read_pair(folder: &Path) -> Option<Pair> {
    serde_json::from_slice(&fs::read(pair_file(folder)).ok()?).ok()
}

/// Kills what is left of an earlier guard: a child that was stopped, or hangs, must not wake up beside a new one. Its
/// parent, too, if `both`: someone started a second guard. Waits for their end for a moment.
pub fn end_last(folder: &Path, both: bool) {
    let Some(pair) = read_pair(folder) else { return };
    let me = std::process::id();
    let left = [Some(pair.child), both.then_some(pair.parent)].into_iter().flatten().filter(|key| key.pid != me);
    let left: Vec<Process> = left.filter_map(|key| Process::open(key).ok().flatten()).collect();
    left.iter().for_each(|process| drop(process.kill())); // Refused = it has exited.
    let begun = clock::now();
    while clock::now().since(begun) < END && !left.iter().all(Process::has_exited) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the last guard's parent lives.
#[must_use]
pub fn is_alive(folder: &Path) -> bool {
    let parent = read_pair(folder).and_then(|pair| Process::open(pair.parent).ok().flatten());
    parent.is_some_and(|parent| !parent.has_exited())
}

fn put(folder: &Path, path: &Path, what: &impl Serialize) -> io::Result<()> {
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut new, what)?;
    new.flush()?;
    new.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Keeps these rows instead of those kept before.
///
/// # Errors
/// Of the file system; then those kept before still stand.
pub fn write(folder: &Path, rows: &[KeptRow]) -> io::Result<()> {
    put(folder, &file(folder), &rows)
}

/// The rows kept last; none if there were none.
///
/// # Errors
/// When the file is there but cannot be read: nobody knows what must be stopped.
pub fn read(folder: &Path) -> io::Result<Vec<KeptRow>> {
    match fs::read(file(folder)) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Stops every QEMU of a kept row, and waits a moment until all stand. Goes on after a failure; gives how many were
/// stopped and what failed. If the rows cannot be read, every QEMU that libvirt has a pid file of is stopped: better a
/// VM too many than one that runs without a lease.
///
/// # Errors
/// When neither rows nor pid files can be read.
pub fn stop_all(folder: &Path, libvirt: &Path) -> io::Result<(usize, Vec<String>)> {
    if !is_alive(folder) {
        end_last(folder, false); // Else a child that hangs could lift what is stopped here.
    }
    let mut failed = Vec::new();
    let mut processes = Vec::new();
    match read(folder) {
        Ok(rows) => {
            for row in &rows {
                match process_of(row, libvirt) {
                    Ok(found) => processes.extend(found.map(|process| (row.name.clone(), process))),
                    Err(error) => failed.push(format!("VM {}: {error}", row.name)),
                }
            }
        }
        Err(error) => {
            failed.push(format!("{}: {error}; all VMs of this host are stopped", file(folder).display()));
            processes = every_process(libvirt)?;
        }
    }
    for (name, process) in &processes {
        if let Err(error) = process.halt() {
            failed.push(format!("VM {name}: SIGSTOP: {error}"));
        }
    }
    for (name, process) in &processes {
        if let Err(error) = process.freeze() {
            failed.push(format!("VM {name}: freezer: {error}"));
        }
    }
    let begun = clock::now();
    while clock::now().since(begun) < STAND && !processes.iter().all(|(_, process)| process.stands()) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let moving = processes.iter().filter(|(_, process)| !process.stands());
    failed.extend(moving.map(|(name, _)| format!("VM {name}: still moves {STAND:?} after SIGSTOP")));
    Ok((processes.len(), failed))
}

/// Every QEMU that libvirt knows, by the name of its pid file.
fn every_process(libvirt: &Path) -> io::Result<Vec<(String, Process)>> {
    let files = match fs::read_dir(libvirt) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let found = files.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?.strip_suffix(".pid")?.to_owned();
        let process = Process::of_any_vm(pid_of(libvirt, &name)?).ok()??;
        Some((name, process))
    });
    Ok(found.collect())
}

/// Fills a table with the rows of an earlier guard of this boot. Gives their processes, still to be stopped.
///
/// # Errors
/// When the rows cannot be read.
pub fn restore(folder: &Path, table: &mut Table) -> io::Result<Vec<Process>> {
    let mut processes = Vec::new();
    for row in read(folder)? {
        let process = match &row.process {
            Some(kept) => Process::open(kept.key)?,
            None => None,
        };
        table.restore(row, process.as_ref().map(Process::key));
        processes.extend(process);
    }
    Ok(processes)
}

/// The row's process, or the one that came up after the row was kept.
fn process_of(row: &KeptRow, libvirt: &Path) -> io::Result<Option<Process>> {
    match &row.process {
        Some(kept) => Process::open(kept.key),
        None => pid_of(libvirt, &row.name).map_or(Ok(None), |pid| Process::of_vm(pid, row.tenure.vm)),
    }
}
