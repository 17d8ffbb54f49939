//! One round: faults by the plan, then healing, a bound to settle in, and what the judges say.
//!
//! ```text
//!  watch ──► steps begin and are healed, by time ──► all is healed ──► settled? ──► wishes ──► judges
//!             └─ every LOOK: fenced hosts ─┘                            └ not within SETTLE: a violation
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::faults::Begun;
use super::people::{People, Wanted};
use super::plan::{Fault, Step};
use super::story::Story;
use super::trouble::{Trouble, unexplained};
use crate::agents::View;
use crate::cases::{Ground, seconds};
use crate::judge::{Copy, Excuse, Moment, Wish};
use crate::lab::wait;

/// Between two looks for fenced hosts.
const LOOK: Duration = Duration::from_secs(3);
/// From hosts that are up to a cluster that is whole, with everything wanted running.
const SETTLE: Duration = Duration::from_secs(120);
const BOOT: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(200);
/// Starts are not counted: faults may strike a VM again and again.
const ANY: Wish = Wish::Running { starts: usize::MAX };

/// A round under way.
pub struct Round<'g> {
    pub(super) ground: &'g mut Ground,
    pub(super) story: Arc<Story>,
    pub(super) troubles: Vec<Trouble>,
    /// Troubles of steps that are not healed.
    pub(super) of_step: BTreeMap<usize, Vec<usize>>,
    /// Processes that are stopped, with their names.
    pub(super) stopped: BTreeMap<usize, (i32, String)>,
    pub(super) people: People,
}

/// How a round went, but for the judges' verdict on single copies, writers and the end state (`Ground::finish`).
pub struct Outcome {
    /// What was wrong.
    pub violations: Vec<String>,
    /// Faults and deeds that were done.
    pub done: usize,
    /// From healed to settled.
    pub settled: Duration,
    /// The longest time without a write that nothing explains, and whose.
    pub longest: (Duration, String),
    /// Everything by time.
    pub story: Arc<Story>,
}

enum Event {
    Begin,
    Heal,
}

/// Plays the steps on a healthy lab. The judges go on watching afterwards.
pub fn play(ground: &mut Ground, steps: &[Step]) -> Result<Outcome> {
    ground.watch()?;
    let begun = Moment::now();
    let mut round = Round {
        ground,
        story: Arc::new(Story::new()),
        troubles: Vec::new(),
        of_step: BTreeMap::new(),
        stopped: BTreeMap::new(),
        people: People::default(),
    };
    let done = round.play(steps);
    round.heal_all(steps).context("healing in the end")?;
    let healed = Moment::now();
    round.story.tell("all is healed");
    let mut violations: Vec<String> = round.settle().err().iter().map(|why| format!("not settled: {why:#}")).collect();
    let settled = Moment::now().since(healed);
    round.story.tell(&format!("settled after {}", seconds(settled)));
    violations.extend(round.blame(begun)?);
    let longest = round.longest(begun)?;
    Ok(Outcome { violations, done, settled, longest, story: round.story })
}

impl Round<'_> {
    /// Begins and heals, each in its time; counts what was begun.
    fn play(&mut self, steps: &[Step]) -> usize {
        let begun = Moment::now();
        let mut due: BTreeMap<(Moment, usize), Event> =
            steps.iter().enumerate().map(|(number, step)| ((begun.plus(step.at), number), Event::Begin)).collect();
        let (mut done, mut looked) = (0, begun);
        while let Some(((at, number), event)) = due.pop_first() {
            while Moment::now() < at {
                std::thread::sleep(at.since(Moment::now()).min(LOOK));
                self.look(&mut looked);
            }
            let step = &steps[number];
            match event {
                Event::Begin => {
                    if self.try_begin(number, step) {
                        done += 1;
                        due.insert((Moment::now().plus(step.lasts), number), Event::Heal);
                    }
                }
                Event::Heal => self.try_heal(number, step),
            }
            self.look(&mut looked);
        }
        done
    }

    fn look(&mut self, looked: &mut Moment) {
        if LOOK <= Moment::now().since(*looked) {
            *looked = Moment::now();
            if let Err(why) = self.power_cycle_fenced() {
                self.story.tell(&format!("    not done: {why:#}"));
            }
        }
    }

    fn try_begin(&mut self, number: usize, step: &Step) -> bool {
        let what = format!("{} (for {})", step.fault, seconds(step.lasts));
        self.story.tell(&what);
        match self.begin(number, step) {
            Ok(Begun::Yes) => return true,
            Ok(Begun::PassedOver(why)) => self.story.tell(&format!("    passed over: {why}")),
            Err(why) => {
                // It may be half done.
                self.story.tell(&format!("    not done: {why:#}"));
                return true;
            }
        }
        for trouble in self.of_step.remove(&number).unwrap_or_default() {
            self.troubles[trouble].to = Some(Moment::now());
        }
        false
    }

    fn try_heal(&mut self, number: usize, step: &Step) {
        if !matches!(step.fault, Fault::Operator { back: None, .. }) {
            self.story.tell(&format!("    healed: {}", step.fault));
        }
        if let Err(why) = self.heal(number, step) {
            self.story.tell(&format!("    not healed: {why:#}"));
        }
    }

    /// Ends everything, also what could not be healed in its time.
    fn heal_all(&mut self, steps: &[Step]) -> Result<()> {
        for number in self.of_step.keys().copied().collect::<Vec<_>>() {
            self.try_heal(number, &steps[number]);
        }
        self.ground.end_faults()?;
        self.people.wait();
        for host in self.ground.hosts_on() {
            host.wait_up(BOOT)?; // It may have been switched on a moment ago.
        }
        self.ground.hosts_up()
    }

    /// Waits until the cluster is whole and every VM is as wanted; says so to the judges.
    fn settle(&mut self) -> Result<()> {
        let mut deadline = Moment::now().plus(SETTLE);
        let mut whole = self.ground.wait_cluster();
        // A host that came back may be fenced all the same, for what it owed before.
        if whole.is_err() && self.power_cycle_fenced()? {
            deadline = Moment::now().plus(SETTLE);
            whole = self.ground.wait_cluster();
        }
        let names: Vec<String> = self.ground.lab().guests().iter().map(|guest| guest.name().to_owned()).collect();
        let open = |wanted: &[(String, Wanted)]| wanted.iter().any(|(_, wanted)| *wanted == Wanted::Open);
        let wanted: Vec<(String, Wanted)> =
            names.into_iter().map(|name| (name.clone(), self.people.wanted(&name, &self.troubles))).collect();
        if open(&wanted) {
            let told: Vec<&str> =
                wanted.iter().filter(|(_, wanted)| *wanted == Wanted::Open).map(|(name, _)| name.as_str()).collect();
            self.story.tell(&format!("open, so the claim decides: {}", told.join(", ")));
        }
        let left = deadline.since(Moment::now()).max(Duration::from_secs(1));
        let as_wanted = wait(left, "every VM to be as wanted", || {
            std::thread::sleep(PAUSE);
            let view = self.ground.view()?;
            wanted.iter().try_for_each(|(name, wanted)| self.is_as_wanted(&view, name, *wanted))?;
            Ok(Some(view))
        });
        let view = as_wanted.as_ref().ok().cloned().map_or_else(|| self.ground.view(), Ok)?;
        for (name, wanted) in &wanted {
            let wish = if decided(&view, name, *wanted) { ANY } else { Wish::Stopped };
            self.ground.expect(name, wish)?;
        }
        whole?;
        as_wanted.map(drop)
    }

    fn is_as_wanted(&self, view: &View, name: &str, wanted: Wanted) -> Result<()> {
        let running = self.ground.judges()?.running(self.ground.id(name)).len();
        let (runs, vm) = (decided(view, name, wanted), view.vm(name));
        let state = vm.map_or("unknown to the cluster".to_owned(), |vm| {
            let (why, says) = (vm.why.as_deref().unwrap_or("-"), vm.wanted.as_deref().unwrap_or("-"));
            format!("{}, wanted {says}, of {}, waits for: {why}", vm.state, vm.host.as_deref().unwrap_or("nobody"))
        });
        if running != usize::from(runs) {
            bail!(
                "{name} runs {running} times, should {}run ({wanted:?}); it is {state}",
                if runs { "" } else { "not " }
            );
        }
        if runs && vm.is_none_or(|vm| vm.state != "running" || !vm.protected) {
            bail!("{name} runs, but is {state}");
        }
        Ok(())
    }

    fn blame(&self, begun: Moment) -> Result<Vec<String>> {
        let now = Moment::now();
        let excuses: Vec<Excuse> = self.troubles.iter().filter_map(|trouble| trouble.excuse(now)).collect();
        Ok(self.ground.judges()?.unexcused(&excuses, begun))
    }

    fn longest(&self, begun: Moment) -> Result<(Duration, String)> {
        let (judges, now) = (self.ground.judges()?, Moment::now());
        let copies = judges.copies();
        let mut longest = (Duration::ZERO, "none".to_owned());
        for guest in self.ground.lab().guests() {
            let writes = judges.writes_since(guest.uuid(), begun);
            let own: Vec<&Copy> =
                copies.iter().filter(|copy| copy.vm == guest.uuid() && copy.first_ran.is_some()).collect();
            let rests = self.people.rests(guest.name(), &self.troubles);
            let time = unexplained(&writes, &own, &self.troubles, &rests, now);
            longest = longest.max((time, guest.name().to_owned()));
        }
        Ok(longest)
    }
}

/// Whether a VM is to run: where it is open, its claim decides.
fn decided(view: &View, name: &str, wanted: Wanted) -> bool {
    match wanted {
        Wanted::Running => true,
        Wanted::Stopped => false,
        Wanted::Open => view.vm(name).is_some_and(|vm| vm.wanted.as_deref() == Some("running")),
    }
}
