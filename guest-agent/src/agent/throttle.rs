//! The agent's own reports of one kind: the first at once, then one every [`PAUSE`] that says how many there were.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mainstay_guest::message::Severity;

/// Between two reports of one kind.
pub const PAUSE: Duration = Duration::from_secs(10);
/// Kinds that are remembered: there are as many as sources and checks.
const KINDS: usize = 256;

struct Window {
    until: Instant,
    more: u32,
    last: (Severity, String),
}

/// See the module.
#[derive(Default)]
pub struct Throttle {
    windows: BTreeMap<String, Window>,
}

impl Throttle {
    /// The text, if it is to be told now.
    pub fn take(&mut self, now: Instant, severity: Severity, kind: &str, text: &str) -> Option<String> {
        if let Some(window) = self.windows.get_mut(kind).filter(|window| now < window.until) {
            window.more += 1;
            window.last = (severity.max(window.last.0), text.to_owned());
            return None;
        }
        if KINDS <= self.windows.len() {
            self.windows.retain(|_, window| now < window.until);
        }
        self.windows.insert(kind.to_owned(), Window { until: now + PAUSE, more: 0, last: (severity, String::new()) });
        Some(text.to_owned())
    }

    /// What has gathered and is to be told now.
    pub fn due(&mut self, now: Instant) -> Vec<(Severity, String, String)> {
        let mut told = Vec::new();
        for (kind, window) in self.windows.iter_mut().filter(|(_, window)| window.until <= now && 0 < window.more) {
            let text = match window.more {
                1 => std::mem::take(&mut window.last.1),
                more => format!("{} ({} more of this kind within {} s)", window.last.1, more - 1, PAUSE.as_secs()),
            };
            told.push((window.last.0, kind.clone(), text));
            *window = Window { until: now + PAUSE, more: 0, last: (Severity::Info, String::new()) };
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_line_each_ten_seconds() {
        let now = Instant::now();
        let at = |s: u64| now + Duration::from_secs(s);
        let mut throttle = Throttle::default();
        assert_eq!(throttle.take(at(0), Severity::Warning, "io", "one"), Some("one".to_owned()));
        assert_eq!(throttle.take(at(0), Severity::Critical, "oops", "x"), Some("x".to_owned()), "another kind");
        for n in 2..=5 {
            assert_eq!(throttle.take(at(n), Severity::Warning, "io", &format!("no {n}")), None);
        }
        assert_eq!(throttle.due(at(9)), []);
        let text = "no 5 (3 more of this kind within 10 s)".to_owned();
        assert_eq!(throttle.due(at(10)), [(Severity::Warning, "io".to_owned(), text)]);
        assert_eq!(throttle.take(at(11), Severity::Warning, "io", "six"), None);
        assert_eq!(throttle.due(at(20)), [(Severity::Warning, "io".to_owned(), "six".to_owned())]);
        assert_eq!(throttle.due(at(40)), []);
        assert_eq!(throttle.take(at(41), Severity::Warning, "io", "later"), Some("later".to_owned()));
    }
}
