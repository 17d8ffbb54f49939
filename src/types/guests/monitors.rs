//! Which guests are watched, how closely, and what is kept of one before it is reset.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Glob;

/// How soon silence is taken for failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Never.
    Off,
    /// 120 s without a beat and I/O; not in the first 480 s.
    Low,
    /// 60 s without a beat and I/O; not in the first 240 s.
    #[default]
    Medium,
    /// 30 s without a beat, and 60 s without I/O (or 30, if its CPUs show that it hangs); not in the first 120 s.
    High,
}

/// Which guests are watched how. The first that fits decides; one that none fits is not watched.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// Their names.
    #[serde(default = "Glob::any")]
    pub vm: Glob,
    /// The times, where nothing else is said.
    #[serde(default)]
    pub preset: Preset,
    /// Seconds without a beat.
    #[serde(default)]
    pub silence_s: Option<u32>,
    /// Seconds without I/O.
    #[serde(default)]
    pub io_s: Option<u32>,
    /// Seconds after a boot in which nothing is judged.
    #[serde(default)]
    pub uptime_s: Option<u32>,
    /// Seconds between two looks at its screen, whether or not an agent was ever heard. Without it the screen is looked at only while
    /// an agent that was heard is silent: what a screen shows, people and programs write, and a reset by that alone is for the
    /// owner to ask for.
    #[serde(default)]
    pub screen_s: Option<u32>,
    /// Its memory is written to disk before it is reset because of what was seen of it, within the limits of `Dumps`.
    #[serde(default)]
    pub dump: bool,
}

/// The same, as times.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watchfulness {
    /// Without a beat.
    pub silence: Duration,
    /// Without I/O.
    pub io: Duration,
    /// After a boot.
    pub uptime: Duration,
    /// Between two looks at its screen; none = only while its agent is silent.
    pub screen: Option<Duration>,
    /// Its memory is written to disk before what is done about it.
    pub dump: bool,
}

impl Monitor {
    pub(super) fn times(&self) -> Option<Watchfulness> {
        let (silence, io, uptime) = match self.preset {
            Preset::Off => return None,
            Preset::Low => (120, 120, 480),
            Preset::Medium => (60, 60, 240),
            Preset::High => (30, 60, 120),
        };
        let time = |set: Option<u32>, preset: u32| Duration::from_secs(set.unwrap_or(preset).into());
        Some(Watchfulness {
            silence: time(self.silence_s, silence),
            io: time(self.io_s, io),
            uptime: time(self.uptime_s, uptime),
            screen: self.screen_s.map(|screen| Duration::from_secs(screen.into())),
            dump: self.dump,
        })
    }
}

/// Every guest, by the usual times.
pub(super) fn all_watched() -> Vec<Monitor> {
    let (silence_s, io_s, uptime_s, screen_s) = (None, None, None, None);
    vec![Monitor { vm: Glob::any(), preset: Preset::default(), silence_s, io_s, uptime_s, screen_s, dump: false }]
}
