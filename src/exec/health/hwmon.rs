//! Temperatures over what their sensors call critical.
//!
//! Some sensors lie: they are not connected and show nothing, or something absurd, or have no limit that could be one. Those are left
//! out; what the kernel calls an alarm is not used, since such sensors have it all the time.

use std::path::Path;

use super::{line, names};
use crate::types::finding::{Finding, Source};

/// A limit, or a temperature, that can be true, in thousandths of a degree.
const CREDIBLE: std::ops::Range<i64> = 1..150_000;

/// Reads all sensors.
pub(super) fn read(folder: &Path) -> Vec<Finding> {
    let mut found = Vec::new();
    for chip in names(folder) {
        let of = folder.join(&chip);
        let number = |name: String| line(&of.join(name))?.parse::<i64>().ok().filter(|value| CREDIBLE.contains(value));
        for name in names(&of) {
            let Some(sensor) = name.strip_suffix("_input").filter(|sensor| sensor.starts_with("temp")) else {
                continue;
            };
            let (Some(now), Some(most)) = (number(name.clone()), number(format!("{sensor}_crit"))) else { continue };
            if now < most {
                continue;
            }
            let model = line(&of.join("name")).unwrap_or_else(|| chip.clone());
            let label = line(&of.join(format!("{sensor}_label"))).unwrap_or_else(|| sensor.to_owned());
            let text = format!("{model} {label} is hotter than its critical {} °C", most / 1000);
            found.push(Finding::new(Source::Temperature, &format!("{chip}/{sensor}"), &text));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_true_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let chip = folder.path().join("hwmon1");
        std::fs::create_dir(&chip).unwrap();
        std::fs::write(chip.join("name"), "coretemp\n").unwrap();
        let table = [
            ("temp1", Some("101000"), Some("100000")), // The only one.
            ("temp2", Some("99000"), Some("100000")),
            ("temp3", Some("0"), Some("0")),
            ("temp4", Some("45000"), Some("0")),
            ("temp5", Some("255000"), Some("100000")),
            ("temp6", Some("-128000"), Some("-130000")),
            ("temp7", Some("45000"), None),
            ("temp8", None, Some("100000")),
        ];
        for (sensor, now, most) in table {
            for (name, value) in [("input", now), ("crit", most)] {
                if let Some(value) = value {
                    std::fs::write(chip.join(format!("{sensor}_{name}")), format!("{value}\n")).unwrap();
                }
            }
        }
        std::fs::write(chip.join("temp1_label"), "Package id 0\n").unwrap();
        std::fs::write(chip.join("fan1_input"), "200000\n").unwrap();
        let found = read(folder.path());
        let texts: Vec<(&str, &str)> = found.iter().map(|one| (one.object.as_str(), one.text.as_str())).collect();
        assert_eq!(texts, [("hwmon1/temp1", "coretemp Package id 0 is hotter than its critical 100 °C")]);
        assert!(read(&folder.path().join("none")).is_empty());
    }
}
