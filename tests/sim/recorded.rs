//! Agents whose core is recorded, and written down and read again in the middle of everything: neither may change a story.

use std::sync::{Arc, Mutex};

use mainstay::core::Core;
use mainstay::core::action::Output;
use mainstay::core::event::Event;
use mainstay::core::verdicts::Given;
use mainstay::exec::recorder::{Recorder, Recording};
use mainstay::types::Time;

use super::world::{H, World};

/// Steps after which a core is read again from what was written down: at other moments in each story and host.
const REREAD: u64 = 61;

/// What a recorded world has.
#[derive(Clone, Default)]
pub struct Tapes {
    /// All that were handed out.
    pub recordings: Arc<Mutex<Vec<Recording>>>,
}

/// Records one agent.
pub struct Tape {
    recorder: Recorder,
    steps: u64,
}

impl Tapes {
    /// For an agent of this host.
    pub fn tape(&self, host: &str, life: u64) -> Tape {
        let recordings = Arc::clone(&self.recordings);
        let sink = move |recording| recordings.lock().unwrap().push(recording);
        Tape { recorder: Recorder::new(host, || 1_795_626_000_000, Box::new(sink)), steps: life * 7 }
    }
}

impl Tape {
    /// As `Core::step`.
    pub fn step(&mut self, core: &mut Core, now: Time, event: Event) -> Output {
        self.steps += 1;
        if self.steps.is_multiple_of(REREAD) {
            let settings = core.settings().clone();
            let written = core.shown(settings, postcard::to_stdvec).unwrap();
            let read: Core = postcard::from_bytes(&written).unwrap();
            *core = read;
        }
        self.recorder.keep_up(core, now);
        self.recorder.step(core, now, event)
    }
    /// A recording that is being made is complete.
    pub fn end(&mut self, core: &mut Core, now: Time) {
        self.recorder.hand_out(core, now);
    }
}

impl World {
    /// Told only in stories that are about verdicts.
    pub fn verdict_given(&mut self, h: H, given: &Given) {
        if !self.verdicts {
            return;
        }
        let name = self.hosts[h].name.clone();
        self.tell(&name, &format!("verdict {}: {}", given.kind.name(), given.text));
        for line in &given.evidence {
            self.tell("", &format!("  {line}"));
        }
    }

    /// All recordings that are being made are complete.
    pub fn end_tapes(&mut self) {
        for h in 0..self.hosts.len() {
            let now = self.local(h);
            if let Some(agent) = &mut self.hosts[h].agent
                && let Some(tape) = &mut agent.tape
            {
                tape.end(&mut agent.core, now);
            }
        }
    }
}
