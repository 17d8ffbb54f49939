//! What happened in a round, by time: told as it happens, and kept for the report.
//!
//! ```text
//!  12.3 s  h2 freezes                    a fault
//!  26.4 s      healed: h2 freezes        its end
//!  31.0 s      mainstay vm move web to h3: done      what an operator got for an answer
//! ```

use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard};

use crate::agents::{Note, clock_of_day_ms};
use crate::judge::Moment;

/// The story of one round; threads of operators tell, too.
pub struct Story {
    begun: Moment,
    begun_unix_ms: u64,
    lines: Mutex<Vec<(u64, String)>>,
}

impl Story {
    /// Begins now.
    pub fn new() -> Story {
        Story { begun: Moment::now(), begun_unix_ms: clock_of_day_ms(), lines: Mutex::default() }
    }

    /// Tells something that happens now.
    pub fn tell(&self, text: &str) {
        let seconds = Moment::now().since(self.begun).as_secs_f64();
        let line = format!("{seconds:6.1} s  {text}");
        println!("{line}");
        self.lines().push((clock_of_day_ms(), line));
    }

    /// All of it.
    pub fn told(&self) -> String {
        self.with_notes(&[])
    }

    /// All of it with the notes of all hosts in between.
    pub fn with_notes(&self, notes: &[Note]) -> String {
        let mut all: Vec<(u64, String)> = self.lines().clone();
        let since = self.begun_unix_ms;
        for note in notes.iter().filter(|note| since <= note.unix_ms) {
            let (seconds, vm) = ((note.unix_ms - since) as f64 / 1000.0, note.vm.as_deref().unwrap_or("-"));
            let text = format!("{seconds:6.1} s          {} {} [{vm}] {}", note.host, note.kind, note.text);
            all.push((note.unix_ms, text));
        }
        all.sort_by_key(|(at, _)| *at);
        all.iter().fold(String::new(), |mut text, (_, line)| {
            let _ = writeln!(text, "{line}");
            text
        })
    }

    fn lines(&self) -> MutexGuard<'_, Vec<(u64, String)>> {
        self.lines.lock().expect("no teller panics")
    }
}
