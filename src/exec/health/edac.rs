//! Errors of memory, as the kernel's EDAC drivers count them for each memory controller.
//!
//! One uncorrected error since boot is a finding until the next boot: what lay there is lost, and the module is suspect. Corrected ones
//! are normal now and then: `MANY` within an hour are not.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::{line, names};
use crate::types::Time;
use crate::types::finding::{Finding, Source};

/// Corrected errors of one controller within `WITHIN`.
const MANY: u64 = 10;
const WITHIN: Duration = Duration::from_secs(3600);

/// Of one controller, since boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Counts {
    uncorrected: u64,
    corrected: u64,
}

/// Of all controllers.
pub(super) fn counts(folder: &Path) -> BTreeMap<String, Counts> {
    let count = |name: &str, what: &str| line(&folder.join(name).join(what))?.parse::<u64>().ok();
    let of = |name: String| {
        let (uncorrected, corrected) = (count(&name, "ue_count")?, count(&name, "ce_count").unwrap_or(0));
        Some((name, Counts { uncorrected, corrected }))
    };
    names(folder).into_iter().filter(|name| name.starts_with("mc")).filter_map(of).collect()
}

/// Errors that were not corrected.
pub(super) fn uncorrected(counts: &BTreeMap<String, Counts>) -> Vec<Finding> {
    let bad = counts.iter().filter(|(_, counts)| 0 < counts.uncorrected);
    let text = |(name, counts): (&String, &Counts)| {
        let text = format!("memory had {} uncorrected errors since boot ({name})", counts.uncorrected);
        Finding::new(Source::Memory, name, &text)
    };
    bad.map(text).collect()
}

/// Whether corrected errors are many.
#[derive(Default)]
pub(super) struct Corrected {
    /// What was counted when an hour began.
    before: BTreeMap<String, (Time, u64)>,
    /// When there were many last.
    many: BTreeMap<String, Time>,
}

impl Corrected {
    /// With each look.
    pub(super) fn look(&mut self, now: Time, counts: &BTreeMap<String, Counts>) -> Vec<Finding> {
        for (name, Counts { corrected, .. }) in counts {
            let before = self.before.entry(name.clone()).or_insert((now, *corrected));
            if before.1 + MANY <= *corrected {
                self.many.insert(name.clone(), now);
                *before = (now, *corrected);
            } else if *corrected < before.1 || WITHIN <= now.since(before.0) {
                *before = (now, *corrected); // Somebody has set it to zero, or the next hour begins.
            }
        }
        self.many.retain(|_, at| now.since(*at) < WITHIN);
        let text = |name: &String| {
            let text =
                format!("memory had {MANY} or more corrected errors within an hour ({name}): a module begins to fail");
            Finding::new(Source::MemoryCorrected, name, &text)
        };
        self.many.keys().map(text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        for (name, uncorrected, corrected) in [("mc0", "0\n", "3\n"), ("mc1", "2\n", "0\n"), ("mc2", "x", "0")] {
            let of = folder.path().join(name);
            std::fs::create_dir(&of).unwrap();
            std::fs::write(of.join("ue_count"), uncorrected).unwrap();
            std::fs::write(of.join("ce_count"), corrected).unwrap();
        }
        std::fs::create_dir(folder.path().join("power")).unwrap();
        let counts = counts(folder.path());
        assert_eq!(counts.len(), 2, "{counts:?}");
        let found: Vec<(String, String)> =
            uncorrected(&counts).into_iter().map(|finding| (finding.object, finding.text)).collect();
        assert_eq!(found, [("mc1".to_owned(), "memory had 2 uncorrected errors since boot (mc1)".to_owned())]);
        assert!(uncorrected(&super::counts(&folder.path().join("none"))).is_empty());
    }

    #[test]
    fn many_corrected_errors_within_an_hour_are_found() {
        let mut corrected = Corrected::default();
        // Minutes, the count, whether that is found.
        let table = [(0, 5, false), (10, 14, false), (59, 14, false), (61, 14, false), (70, 23, false), (80, 24, true)];
        let later = [(139, 25, true), (141, 26, false), (150, 0, false), (160, 9, false), (161, 10, true)];
        for (minutes, count, expected) in table.into_iter().chain(later) {
            let now = Time::ZERO + Duration::from_secs(60 * minutes);
            let counts = [("mc0".to_owned(), Counts { uncorrected: 0, corrected: count })].into();
            assert_eq!(!corrected.look(now, &counts).is_empty(), expected, "after {minutes} minutes: {count}");
        }
    }
}
