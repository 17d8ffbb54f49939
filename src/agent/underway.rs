//! What this agent has begun with VMs and must end: a file in `/run/mainstay`, which a boot empties.
//!
//! Written whole, beside and renamed, before libvirt is told. Unreadable = nothing is under way: a VM that stands
//! then waits for a person, and nothing unsafe follows.

use std::io::{self, Write};
use std::path::Path;

use crate::types::VmId;
use crate::types::vm::Underway;

const FILE: &str = "underway";

/// Replaces what was written before.
///
/// # Errors
/// Of the file system; then what was written before still stands.
pub(crate) fn write(folder: &Path, list: &[(VmId, Underway)]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, list)?;
    file.flush()?;
    file.persist(folder.join(FILE)).map_err(|error| error.error)?;
    Ok(())
}

/// What an earlier agent of this boot has left.
pub(crate) fn read(folder: &Path) -> Vec<(VmId, Underway)> {
    let Ok(bytes) = std::fs::read(folder.join(FILE)) else { return Vec::new() };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        tracing::warn!("{}: {error}; it is ignored", folder.join(FILE).display());
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::HostId;

    #[test]
    fn comes_back_as_written_and_junk_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()), Vec::new());
        let list =
            vec![(VmId::default(), Underway::Start), (VmId::default(), Underway::Move { to: HostId::default() })];
        write(folder.path(), &list).unwrap();
        assert_eq!(read(folder.path()), list);
        std::fs::write(folder.path().join(FILE), "junk").unwrap();
        assert_eq!(read(folder.path()), Vec::new());
    }
}
