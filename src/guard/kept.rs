//! Rows kept in `/run`, so that `--stop-all` finds every QEMU after the guard's death, and the next guard its rows.
//!
//! One JSON file, written beside and renamed. `/run` is emptied by a boot, so what is found is of this boot.
//!
//! ```text
//! guard dies ──► ExecStopPost: --stop-all ──► SIGSTOP + freeze each ──► Restart: rows come back as over (lapsed)
//! ```
//!
//! Deliberately not here: who may run again; that needs a new claim.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{Process, pid_of};
use super::table::{KeptRow, Table};
use crate::exec::clock;

/// How long `--stop-all` looks whether all stand. A thread that waits for a CPU shows it late, but runs nothing more.
const STAND: Duration = Duration::from_secs(1);

fn file(folder: &Path) -> PathBuf {
    folder.join("rows.json")
}

/// Keeps these rows instead of those kept before.
///
/// # Errors
/// Of the file system; then those kept before still stand.
pub fn write(folder: &Path, rows: &[KeptRow]) -> io::Result<()> {
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut new, rows)?;
    new.flush()?;
    new.persist(file(folder)).map_err(|error| error.error)?;
    Ok(())
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
