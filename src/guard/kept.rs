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

use super::process::{Process, pid_of};
use super::table::{KeptRow, Table};

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

/// Stops every QEMU of a kept row. Goes on after a failure; gives what was stopped and what failed.
///
/// # Errors
/// When the rows cannot be read.
pub fn stop_all(folder: &Path, libvirt: &Path) -> io::Result<(usize, Vec<String>)> {
    let rows = read(folder)?;
    let mut failed = Vec::new();
    let mut processes = Vec::new();
    for row in &rows {
        match process_of(row, libvirt) {
            Ok(found) => processes.extend(found.map(|process| (row, process))),
            Err(error) => failed.push(format!("VM {}: {error}", row.name)),
        }
    }
    for (row, process) in &processes {
        if let Err(error) = process.halt() {
            failed.push(format!("VM {}: SIGSTOP: {error}", row.name));
        }
    }
    for (row, process) in &processes {
        if let Err(error) = process.freeze() {
            failed.push(format!("VM {}: freezer: {error}", row.name));
        }
    }
    Ok((processes.len(), failed))
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
