//! One copy of a VM: a QEMU process, and when its vCPUs executed.
//!
//! ```text
//!  vCPU time │            ╭───── a sample; rises by more than LAG within WINDOW: it runs
//!            │        ╭───╯
//!            │  ──────╯ ▲
//!            └──────────┼──────────────► time
//!                       first_ran: the first rise, less what had been gained by then
//! ```
//!
//! Why not every rise: a QEMU that is paused, or waits for a migration, spends a millisecond in its vCPU threads when it
//! is made and asked; and `schedstat` of a thread on a CPU lags by a tick (4 ms).

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::Moment;

/// By so much the time of a vCPU that executes can lag behind.
pub const LAG: Duration = Duration::from_millis(4);
/// A copy runs if it gained more than `LAG` within this time.
const WINDOW: Duration = Duration::from_millis(100);
/// A copy runs at present if it gained something in so many samples
const RISES: usize = 3;
/// of so long; an idle guest does so ten times a second, one that is paused or frozen never.
const RECENT: Duration = Duration::from_secs(2);
/// Times without execution up to this are usual: an idle guest writes each 100 ms.
const USUAL_GAP: Duration = Duration::from_millis(150);
/// Samples kept; the oldest go. Forty minutes of a copy that never rests.
const SAMPLES: usize = 120_000;
/// Intervals and gaps kept; later ones are not noted.
const NOTES: usize = 10_000;

/// vCPU times at one moment, summed over the vCPUs of a copy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// When it was taken.
    pub at: Moment,
    /// Time on a CPU.
    pub ran: Duration,
    /// Time ready to run, but without a CPU; that of QEMU's main thread, too.
    pub waited: Duration,
}

/// A time without execution.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// When it last executed.
    pub from: Moment,
    /// When it executed again.
    pub to: Moment,
    /// Time in between for which it only lacked a CPU.
    pub waited: Duration,
}

/// One QEMU process of a VM.
#[derive(Clone, Debug, Serialize)]
pub struct Copy {
    /// Where it is.
    pub host: String,
    /// Whose copy it is.
    #[serde(skip)]
    pub vm: Uuid,
    /// Outside the host.
    pub pid: i32,
    /// When the process began.
    pub began: Moment,
    /// When it first executed.
    pub first_ran: Option<Moment>,
    /// When it was last seen executing.
    pub last_ran: Option<Moment>,
    /// When it was first missing.
    pub gone: Option<Moment>,
    /// From when to when it ran.
    pub intervals: Vec<(Moment, Moment)>,
    #[serde(skip)]
    samples: VecDeque<Sample>,
    #[serde(skip)]
    gaps: Vec<Gap>,
    #[serde(skip)]
    last_rise: Option<Sample>,
}

impl Copy {
    /// A copy that executed for `start.ran` up to `start.at`.
    pub fn new(host: String, vm: Uuid, pid: i32, began: Moment, start: Sample) -> Self {
        Copy {
            host,
            vm,
            pid,
            began,
            first_ran: None,
            last_ran: None,
            gone: None,
            intervals: Vec::new(),
            samples: VecDeque::from([start]),
            gaps: Vec::new(),
            last_rise: None,
        }
    }

    /// Takes the next sample.
    pub fn add(&mut self, sample: Sample) {
        let last = self.latest();
        if last.ran < sample.ran {
            self.note_gap(sample);
            self.last_rise = Some(sample);
        }
        // Of a time without change its first and last sample are enough.
        let count = self.samples.len();
        if 2 <= count && self.samples[count - 2].ran == sample.ran && last.ran == sample.ran {
            self.samples.pop_back();
        }
        self.samples.push_back(sample);
        if SAMPLES < self.samples.len() {
            self.samples.pop_front();
        }
        if let Some(start) = self.start_of_run(sample) {
            self.note_run(start, sample.at);
        }
    }

    /// The time gained since the first sample at or after `moment`: what surely came later.
    pub fn gained_since(&self, moment: Moment) -> Duration {
        let index = self.samples.partition_point(|s| s.at < moment);
        self.gained_over(self.samples.get(index))
    }

    /// The time gained since the last sample before `moment`: all that may have come later.
    pub fn gained_after(&self, moment: Moment) -> Duration {
        let index = self.samples.partition_point(|s| s.at < moment).saturating_sub(1);
        self.gained_over(self.samples.get(index))
    }

    /// When it was last seen to have executed, if only little.
    pub fn last_executed(&self) -> Option<Moment> {
        self.last_rise.map(|rise| rise.at)
    }

    /// When it was first seen to have executed after a moment, if only little.
    pub fn rose_after(&self, moment: Moment) -> Option<Moment> {
        let from = self.samples.partition_point(|s| s.at < moment);
        let later = self.samples.range(from..);
        later.clone().zip(later.skip(1)).find(|(a, b)| a.ran < b.ran).map(|(_, b)| b.at)
    }

    /// Takes an idle one for running that was there before the judges: it will never rise by more than `LAG` at once.
    pub fn note_if_idle(&mut self) {
        if self.first_ran.is_none() && RISES <= self.recent_rises(self.latest().at) {
            let (first, latest) = (self.samples[0].at, self.latest().at);
            self.note_run(first, latest);
        }
    }

    /// Whether it has executed lately, if only little.
    pub fn runs(&self, now: Moment) -> bool {
        self.gone.is_none() && self.first_ran.is_some() && RISES <= self.recent_rises(now)
    }

    /// Times without execution that overlap `from` to `to`, with one that still lasts.
    pub fn gaps(&self, from: Moment, to: Moment) -> Vec<Gap> {
        let latest = self.latest();
        let open = self.last_rise.map(|rise| Gap {
            from: rise.at,
            to: self.gone.unwrap_or(latest.at),
            waited: latest.waited.saturating_sub(rise.waited),
        });
        let all = self.gaps.iter().copied().chain(open.filter(|g| USUAL_GAP < g.to.since(g.from)));
        all.filter(|g| from < g.to && g.from < to).collect()
    }

    fn recent_rises(&self, now: Moment) -> usize {
        let recent = self.samples.iter().rev().take_while(|s| now.since(s.at) < RECENT);
        recent.clone().zip(recent.skip(1)).filter(|(b, a)| a.ran < b.ran).take(RISES).count()
    }

    fn latest(&self) -> Sample {
        *self.samples.back().expect("a copy begins with a sample, and the newest stay")
    }

    fn gained_over(&self, sample: Option<&Sample>) -> Duration {
        sample.map_or(Duration::ZERO, |s| self.latest().ran.saturating_sub(s.ran))
    }

    fn note_gap(&mut self, sample: Sample) {
        let Some(rise) = self.last_rise else { return };
        if USUAL_GAP < sample.at.since(rise.at) && self.gaps.len() < NOTES {
            self.gaps.push(Gap { from: rise.at, to: sample.at, waited: sample.waited.saturating_sub(rise.waited) });
        }
    }

    /// If it runs now: since when, within the window.
    fn start_of_run(&self, now: Sample) -> Option<Moment> {
        let begin = now.at.minus(WINDOW);
        // The last sample before the window, so that a rise into it counts.
        let first = self.samples.partition_point(|s| s.at < begin).saturating_sub(1);
        let window = || self.samples.range(first..);
        if now.ran.saturating_sub(self.samples[first].ran) <= LAG {
            return None;
        }
        let rise = window().zip(window().skip(1)).find(|(a, b)| a.ran < b.ran)?;
        let gained = rise.1.ran - rise.0.ran;
        Some(rise.1.at.minus(gained).max(rise.0.at))
    }

    fn note_run(&mut self, start: Moment, end: Moment) {
        self.first_ran.get_or_insert(start);
        self.last_ran = Some(end);
        let full = NOTES <= self.intervals.len();
        match self.intervals.last_mut() {
            Some(last) if start <= last.1 => last.1 = end,
            Some(_) if full => {}
            Some(_) | None => self.intervals.push((start, end)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: u64, ran_ms: u64) -> Sample {
        let ran = Duration::from_millis(ran_ms);
        Sample { at: Moment(at_ms * 1_000_000), ran, waited: Duration::ZERO }
    }

    fn copy(samples: &[(u64, u64)]) -> Copy {
        let first = sample(samples[0].0, samples[0].1);
        let mut copy = Copy::new("h1".into(), Uuid::nil(), 1, first.at, first);
        samples[1..].iter().for_each(|(at, ran)| copy.add(sample(*at, *ran)));
        copy
    }

    #[test]
    fn what_counts_as_running() {
        type Times = &'static [(u64, u64)];
        let cases: [(Times, Option<u64>, &str); 5] = [
            (&[(0, 50), (20, 50), (40, 50)], None, "paused"),
            (&[(0, 0), (20, 2), (40, 3), (60, 4)], None, "made, and asked, but not started"),
            (&[(0, 0), (20, 0), (40, 13), (60, 33)], Some(27), "starts between two samples"),
            (&[(0, 0), (20, 2), (40, 4), (60, 6)], Some(18), "starts with little"),
            (&[(0, 0), (200, 2), (400, 4), (600, 6)], None, "a millisecond now and then"),
        ];
        for (samples, first_ran, what) in cases {
            let expected = first_ran.map(|ms| Moment(ms * 1_000_000));
            assert_eq!(copy(samples).first_ran, expected, "{what}");
        }
    }

    #[test]
    fn gains_are_counted_from_the_samples_around_a_moment() {
        let copy = copy(&[(0, 0), (20, 20), (40, 20), (60, 20), (80, 20), (100, 27)]);
        let gained = |ms| {
            let moment = sample(ms, 0).at;
            (copy.gained_since(moment).as_millis(), copy.gained_after(moment).as_millis())
        };
        assert_eq!((gained(10), gained(30), gained(90), gained(900)), ((7, 27), (7, 7), (0, 7), (0, 0)));
    }

    #[test]
    fn an_idle_one_of_before_runs() {
        let idle: Vec<_> = (0..10).map(|i| (i * 100, 1000 + i)).collect();
        let (mut runs, mut rests) = (copy(&idle), copy(&[(0, 1000), (500, 1000), (900, 1001)]));
        runs.note_if_idle();
        rests.note_if_idle();
        assert_eq!((runs.first_ran, rests.first_ran), (Some(Moment(0)), None));
        assert!(runs.runs(Moment(1_000_000_000)));
    }

    #[test]
    fn any_rise_after_a_moment_is_found() {
        let copy = copy(&[(0, 0), (20, 20), (40, 20), (500, 20), (520, 21)]);
        for (ms, expected) in [(0, Some(20)), (30, Some(520)), (510, None)] {
            assert_eq!(copy.rose_after(Moment(ms * 1_000_000)), expected.map(|ms| Moment(ms * 1_000_000)), "{ms}");
        }
    }

    #[test]
    fn long_rests_are_gaps() {
        let copy = copy(&[(0, 0), (20, 20), (100, 20), (500, 20), (520, 40), (540, 40), (900, 40)]);
        let gaps = copy.gaps(Moment(0), Moment(u64::MAX));
        let ends: Vec<_> = gaps.iter().map(|g| (g.from.0 / 1_000_000, g.to.0 / 1_000_000)).collect();
        assert_eq!(ends, [(20, 520), (520, 900)]);
        assert_eq!(copy.intervals.len(), 2);
    }
}
