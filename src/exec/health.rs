//! What is wrong with this host: small readers, looked at again and again, and what stands for some seconds is told.
//!
//! ```text
//!   uplink, vendor ── each LOOK ───┐
//!   edac, hwmon ───── each SLOW ───┼─► Standing (stands BEGINS, gone ENDS) ─► changed? ─► told
//!   smart ─────────── each DISKS ──┘
//! ```
//!
//! Sensors and disks may take their time, or hang: they are read on threads of their own, and hold up nobody else. What cannot be read
//! is no finding. Not here: what is done about a finding (`core::findings`).

mod edac;
mod hwmon;
mod smart;
mod uplink;
pub mod vendor;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::clock;
use super::means::Bridges;
use crate::types::Time;
use crate::types::finding::{Finding, MAX_FINDINGS, Source};

/// How often links and vendors' files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often counters of errors and temperatures are.
const SLOW: Duration = Duration::from_secs(30);
/// How often disks are asked.
const DISKS: Duration = Duration::from_secs(600);
/// A finding that does not stand so long is none.
const BEGINS: Duration = Duration::from_secs(3);
/// One that comes again within this has not gone.
const ENDS: Duration = Duration::from_secs(10);

/// What readers on threads of their own found last.
#[derive(Default)]
struct Slow {
    host: Vec<Finding>,
    disks: Vec<Finding>,
}

/// Looks for ever, on threads of its own; ends when `tell` says that nobody listens.
///
/// # Errors
/// When they cannot be started.
pub fn spawn(run: &Path, bridges: Bridges, tell: impl Fn(Vec<Finding>) -> bool + Send + 'static) -> io::Result<()> {
    let slow: Arc<Mutex<Slow>> = Arc::default();
    let (host, disks) = (Arc::downgrade(&slow), Arc::downgrade(&slow));
    let mut corrected = edac::Corrected::default();
    let read = move || {
        let counts = edac::counts(Path::new("/sys/devices/system/edac/mc"));
        let mut found = edac::uncorrected(&counts);
        found.extend(corrected.look(clock::now(), &counts));
        found.extend(hwmon::read(Path::new("/sys/class/hwmon")));
        found
    };
    repeat("health-sensors", SLOW, host, read, |slow, found| slow.host = found)?;
    repeat("health-disks", DISKS, disks, smart::read, |slow, found| slow.disks = found)?;
    let (net, vendors) = (PathBuf::from("/sys/class/net"), vendor::folder(run));
    let look = move || {
        let mut standing = Standing::default();
        loop {
            let networks = bridges.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut found = uplink::read(&net, &networks);
            found.extend(vendor::read(&vendors));
            {
                let slow = locked(&slow);
                found.extend(slow.host.iter().chain(&slow.disks).cloned());
            }
            if let Some(all) = standing.look(clock::now(), found)
                && !tell(all)
            {
                return;
            }
            std::thread::sleep(LOOK);
        }
    };
    std::thread::Builder::new().name("health".into()).spawn(look).map(drop)
}

fn repeat(
    name: &str,
    period: Duration,
    slow: Weak<Mutex<Slow>>,
    mut read: impl FnMut() -> Vec<Finding> + Send + 'static,
    keep: impl Fn(&mut Slow, Vec<Finding>) + Send + 'static,
) -> io::Result<()> {
    let work = move || {
        loop {
            let found = read();
            let Some(slow) = slow.upgrade() else { return };
            keep(&mut locked(&slow), found);
            drop(slow);
            std::thread::sleep(period);
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

fn locked(slow: &Mutex<Slow>) -> MutexGuard<'_, Slow> {
    slow.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file's first line; none if it cannot be read.
fn line(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// One thing that was found at least once.
struct Seen {
    finding: Finding,
    /// It is there, or is not, since then.
    there: bool,
    since: Time,
    told: bool,
}

/// What has stood long enough to be told.
#[derive(Default)]
struct Standing {
    seen: BTreeMap<(Source, String), Seen>,
    told: Vec<Finding>,
}

impl Standing {
    /// All that is told now, if that has changed.
    fn look(&mut self, now: Time, found: Vec<Finding>) -> Option<Vec<Finding>> {
        let here: Vec<(Source, String)> = found.iter().map(|one| (one.source, one.object.clone())).collect();
        for finding in found {
            let new = Seen { finding: finding.clone(), there: true, since: now, told: false };
            let seen = self.seen.entry((finding.source, finding.object.clone())).or_insert(new);
            if !seen.there {
                (seen.there, seen.since) = (true, now);
            }
            seen.finding = finding;
        }
        for (_, seen) in self.seen.iter_mut().filter(|(key, seen)| seen.there && !here.contains(key)) {
            (seen.there, seen.since) = (false, now);
        }
        self.seen.retain(|_, seen| seen.there || (seen.told && now.since(seen.since) < ENDS));
        for seen in self.seen.values_mut().filter(|seen| seen.there && BEGINS <= now.since(seen.since)) {
            seen.told = true;
        }
        let all = self.seen.values().filter(|seen| seen.told).map(|seen| seen.finding.clone());
        let all: Vec<Finding> = all.take(MAX_FINDINGS).collect();
        (all != self.told).then(|| {
            self.told.clone_from(&all);
            all
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_is_told_and_what_flickers_is_not() {
        let fan = || vec![Finding::new(Source::Vendor, "ipmi", "fan 3 failed")];
        let at = |seconds: u64| Time::ZERO + Duration::from_secs(seconds);
        // Seconds, whether it is there, and what is told then: nothing new, so many.
        let table = [
            (1, true, None),
            (2, false, None),
            (3, true, None),
            (5, true, None),
            (6, true, Some(1)),
            (7, true, None),
            (8, false, None),
            (12, true, None), // It had not gone.
            (13, false, None),
            (22, false, None),
            (23, false, Some(0)),
            (24, true, None),
            (27, true, Some(1)),
        ];
        let mut standing = Standing::default();
        for (seconds, there, expected) in table {
            let told = standing.look(at(seconds), if there { fan() } else { Vec::new() });
            assert_eq!(told.map(|all| all.len()), expected, "at {seconds} s");
        }
        let other = vec![Finding::new(Source::Vendor, "ipmi", "fans 3 and 4 failed")];
        assert_eq!(standing.look(at(28), other.clone()), Some(other), "other words are told at once");
    }
}
