//! Judge 2: each disk has one writer. Without tolerance.
//!
//! ```text
//!  heads as they were seen:  A A A A B B B   fine
//!                            A A A B A       a boot writes again after a later one
//!  ring at the verdict:      each entry names the one before it (see `guest_disk`)
//! ```
//!
//! The ring reaches back for fifty minutes: what lay in it when the judge began was for earlier judges, who knew what was
//! done to that disk then.

use std::fs::File;
use std::io::Read;

use super::Vm;
use super::disks::Write;
use crate::guest_disk::{Fault, RING, RING_SECTOR, SECTOR, check_chain};

/// Violations told per disk; more of the same say nothing new.
const TOLD: usize = 5;

/// How many boots have written.
pub fn boots(writes: &[Write]) -> usize {
    let mut seen = Vec::new();
    for write in writes {
        if !seen.contains(&write.stamp.boot) {
            seen.push(write.stamp.boot);
        }
    }
    seen.len()
}

/// What is wrong with the ring of a disk now; of one that is not there yet, nothing.
pub fn faults(vm: &Vm) -> Vec<Fault> {
    read_ring(vm).map(|disk| check_chain(&disk).1).unwrap_or_default()
}

/// What is wrong with a disk: by the writes that were seen, and by its ring as it is now, but for what was wrong `before`.
/// `late`: writes of its own may have landed late, so that it met older records of the same boot.
pub fn judge(vm: &Vm, writes: &[Write], late: bool, before: &[Fault]) -> Vec<String> {
    let mut violations: Vec<String> = returns(writes, late).map(|what| format!("{}: {what}", vm.name)).collect();
    match read_ring(vm) {
        Ok(disk) => {
            let (_, mut faults) = check_chain(&disk);
            faults.retain(|fault| !before.contains(fault) && (!late || !of_its_own(fault)));
            violations.extend(faults.iter().map(|fault| format!("{}: two writers on its disk: {fault:?}", vm.name)));
        }
        Err(error) => violations.push(format!("{}: its disk {} cannot be read: {error}", vm.name, vm.disk.display())),
    }
    violations.truncate(TOLD);
    violations
}

/// Boots that wrote again after a later boot had written, and counters that fell within one.
fn returns(writes: &[Write], late: bool) -> impl Iterator<Item = String> {
    let mut left = Vec::new();
    writes.windows(2).filter_map(move |pair| {
        let (before, now) = (pair[0], pair[1]);
        if before.stamp.boot == now.stamp.boot {
            let fell = now.stamp.counter <= before.stamp.counter;
            return (fell && !late).then(|| format!("its disk went back from {:?} to {:?}", before, now));
        }
        left.push(before.stamp.boot);
        left.contains(&now.stamp.boot).then(|| format!("an old boot wrote again: {now:?} after {before:?}"))
    })
}

/// Whether only one boot has part in it: nobody else's write was met or lost. What the next boot found in the head may be
/// another try of the record that lies in the ring: of each record many tries land late, in the head and in the ring, and
/// QEMU, which writes whole pages, puts older neighbours back with each.
fn of_its_own(fault: &Fault) -> bool {
    match fault {
        Fault::Broken { .. } => false,
        Fault::Conflict { at } => at.stamp.boot == at.previous.boot,
        Fault::Chain { before, after } => {
            let one = before.stamp.boot == after.stamp.boot && after.previous.boot == after.stamp.boot;
            let found = &after.previous;
            one || (before.stamp.boot == found.boot && before.stamp.counter == found.counter)
        }
    }
}

fn read_ring(vm: &Vm) -> std::io::Result<Vec<u8>> {
    let bytes = (RING_SECTOR + RING) * SECTOR as u64;
    let mut disk = Vec::new();
    File::open(&vm.disk)?.take(bytes).read_to_end(&mut disk)?;
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    use crate::guest_disk::{Place, Record, Stamp, ring_sector};

    #[test]
    fn another_try_of_the_last_record_is_its_own() {
        let stamp = |boot, counter, uptime_ns| Stamp { boot: [boot; 16], counter, uptime_ns };
        let before = Record { stamp: stamp(1, 96, 129), previous: stamp(1, 95, 127), conflicts: 0 };
        let table = [
            (stamp(1, 96, 128), stamp(2, 97, 1), true), // The next boot found an older try of it.
            (stamp(1, 95, 127), stamp(1, 97, 130), true), // One boot met its own older record.
            (stamp(1, 95, 127), stamp(2, 97, 1), false), // A record landed that the next boot did not find.
            (stamp(3, 96, 128), stamp(2, 97, 1), false), // Somebody else's was found.
        ];
        for (previous, stamp, own) in table {
            let after = Record { stamp, previous, conflicts: 0 };
            assert_eq!(of_its_own(&Fault::Chain { before, after }), own, "{after:?}");
        }
    }

    #[test]
    fn what_lay_there_before_was_for_earlier_judges() {
        let folder = tempfile::tempdir().expect("a folder");
        let vm = Vm { id: Uuid::from_u128(1), name: "web".into(), disk: folder.path().join("web.raw") };
        assert_eq!(faults(&vm), [], "no disk yet");
        let mut disk = vec![0; ((RING_SECTOR + RING) * SECTOR as u64) as usize];
        let mut put = |counter, uptime_ns, found| {
            let stamp = |counter, uptime_ns| Stamp { boot: [7; 16], counter, uptime_ns };
            let record = Record { stamp: stamp(counter, uptime_ns), previous: stamp(counter - 1, found), conflicts: 0 };
            let at = ring_sector(counter) as usize * SECTOR;
            disk[at..at + SECTOR].copy_from_slice(&record.to_bytes(Place::Ring));
            std::fs::write(&vm.disk, &disk).expect("written");
        };
        put(5, 50, 40);
        put(6, 60, 51);
        let before = faults(&vm);
        assert_eq!(before.len(), 1);
        assert_eq!(judge(&vm, &[], false, &before), [""; 0]);
        put(7, 70, 61);
        assert_eq!(judge(&vm, &[], false, &before).len(), 1, "what came since is told");
    }
}
