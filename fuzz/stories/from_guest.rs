//! What hostile guests can say to a host: bytes on channels, through frames and messages, to what `core::guests` makes of them.
//! The host is its own master; three VMs run on it, of which rules let some ask for others.
//!
//! ```text
//!   story: junk, right frames around any body, cut ones, time, outcomes, reboots, moves
//!     └─► decoder ─► Guests ─► acts ─┬─ words between agents ─► Guests
//!                                    └─ remedies ─► at most one a VM, no more an hour than the limit
//!   after each: nothing is kept beyond its bound
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use mainstay::core::guests::{GuestAct, GuestEvent, Guests, Sample, Step};
use mainstay::types::failure::{Class, FailureKind, Family};
use mainstay::types::guests::{GuestSettings, GuestWord};
use mainstay::types::{HostId, Ticket, Time, VmId};
use mainstay_guest::MAX_MESSAGE;
use mainstay_guest::frame::{Decoder, HEADER, MAX_CHUNK, encode};
use mainstay_guest::message::FromGuest;

use crate::input::Input;

const HERE: HostId = HostId(uuid::Uuid::from_u128(0xa));
const NAMES: [&str; 3] = ["web", "db", "app"];
const HOUR: Duration = Duration::from_secs(3600);
const RESETS: u32 = 3;
/// One event is followed by fewer acts, however they lead to each other.
const MOST_ACTS: usize = 20_000;
const STILL: Sample = Sample { runs: true, io: 1, cpu: Duration::ZERO, cpus: 1 };

const RULES: &str = r#"{
  "rule": [
    { "kind": "count/*", "count": 3, "within_s": 60, "then": { "own": "suspend" } },
    { "kind": "text", "message": "no (space|memory) left", "severity": "warning", "then": { "own": "power-cycle" } },
    { "kind": "hook", "then": { "hook": "/bin/true" } },
    { "kind": "fix", "then": { "other": { "vm": "db", "remedy": "reset" } } },
    { "severity": "critical", "then": "as-asked" }
  ],
  "permission": [
    { "target": "db", "by": "*", "remedy": "reset" },
    { "target": "web", "by": "*", "remedy": "reset", "votes": 2, "within_s": 60 }
  ],
  "limits": { "resets_per_hour": 3, "backoff_s": 30 }
}"#;

/// Plays one story.
pub fn play(data: &[u8]) {
    pieces(data);
    let mut host = Host::new();
    let mut story = Input(data);
    while host.next(&mut story).is_some() {}
}

/// A connection says the same in whatever pieces it comes, and what it says can be said again.
fn pieces(data: &[u8]) {
    let read = |piece: usize| {
        let (mut decoder, mut said) = (Decoder::default(), Vec::new());
        for piece in data.chunks(piece) {
            decoder.push(piece);
            loop {
                match decoder.take::<FromGuest>() {
                    Ok(Some(message)) => said.push(message),
                    Ok(None) => break,
                    Err(why) => return (said, Some(why)),
                }
            }
            assert!(decoder.held() < HEADER + MAX_MESSAGE, "{} bytes are held", decoder.held());
        }
        (said, None)
    };
    let whole = read(MAX_CHUNK);
    assert_eq!(read(7), whole, "in pieces");
    for message in &whole.0 {
        let mut decoder = Decoder::default();
        decoder.push(&encode(message).expect("it came in a frame"));
        assert_eq!(decoder.take().as_ref(), Ok(&Some(message.clone())), "said again");
    }
}

/// One host and its guests' channels.
struct Host {
    now: Time,
    guests: Guests,
    /// By VM.
    channels: [Decoder; 3],
    runs: [bool; 3],
    /// Who speaks.
    who: usize,
    /// What is being looked at, or done.
    underway: VecDeque<(Ticket, Option<Step>)>,
    /// Remedies that have not ended: of which VM, and whether it counts.
    remedies: BTreeMap<Ticket, (usize, bool)>,
    /// When VMs had a remedy that counts: not what failed.
    anew: BTreeMap<usize, Vec<Time>>,
}

impl Host {
    fn new() -> Self {
        let settings: GuestSettings = serde_json::from_str(RULES).expect("rules that can be read");
        let mut host = Self {
            now: Time::ZERO + HOUR,
            guests: Guests::default(),
            channels: Default::default(),
            runs: [true; 3],
            who: 0,
            underway: VecDeque::new(),
            remedies: BTreeMap::new(),
            anew: BTreeMap::new(),
        };
        host.step(GuestEvent::Settings(settings));
        (0..3).for_each(|vm| host.starts(vm));
        host
    }

    fn starts(&mut self, vm: usize) {
        self.runs[vm] = true;
        self.step(GuestEvent::Runs { vm: id(vm), name: NAMES[vm].to_owned(), stores: None });
        self.connects(vm);
    }

    fn connects(&mut self, vm: usize) {
        self.channels[vm] = Decoder::default();
        self.step(GuestEvent::Connected(id(vm)));
    }

    /// The next turn of the story.
    fn next(&mut self, story: &mut Input) -> Option<()> {
        match story.byte()? % 8 {
            0 => self.hears(story.piece()?),
            1 | 2 => self.hears(&story.sealed()?),
            3 => {
                let (frame, at) = (story.sealed()?, usize::from(story.word()?));
                self.hears(&frame[..at.min(frame.len())]);
            }
            4 => self.passes(Duration::from_millis(100) * u32::from(story.word()?)),
            5 => self.done(story.byte()? % 2 == 0),
            6 => {
                let turn = story.byte()?;
                self.who = usize::from(turn) % 3;
                if 128 <= turn {
                    self.connects(self.who);
                }
            }
            _ if self.runs[self.who] => {
                self.runs[self.who] = false;
                self.step(GuestEvent::Ended(id(self.who)));
            }
            _ => self.starts(self.who),
        }
        Some(())
    }

    fn hears(&mut self, bytes: &[u8]) {
        let who = self.who;
        if !self.runs[who] {
            return;
        }
        for piece in bytes.chunks(MAX_CHUNK) {
            self.channels[who].push(piece);
            loop {
                match self.channels[who].take() {
                    Ok(Some(said)) => self.step(GuestEvent::Said(id(who), Box::new(said))),
                    Ok(None) => break,
                    Err(_) => return self.connects(who),
                }
            }
        }
    }

    fn passes(&mut self, span: Duration) {
        let until = self.now + span;
        // A loop that is held up looks once for all that is due meanwhile.
        for _ in 0..8 {
            let Some(due) = self.guests.next_due().filter(|due| *due <= until) else { break };
            self.now = self.now.max(due);
            self.step(GuestEvent::Due);
        }
        self.now = until;
        self.step(GuestEvent::Due);
        assert!(self.guests.next_due().is_none_or(|due| self.now < due), "what is due is done");
    }

    fn done(&mut self, well: bool) {
        let Some((ticket, step)) = self.underway.pop_front() else { return };
        let hangs = || "libvirt hangs".to_owned();
        self.step(match step {
            None => GuestEvent::Looked(ticket, unknown()),
            Some(_) => GuestEvent::Done(ticket, if well { Ok(()) } else { Err(hangs()) }),
        });
    }

    fn step(&mut self, event: GuestEvent) {
        let mut events = VecDeque::from([event]);
        let mut count = 0;
        while let Some(event) = events.pop_front() {
            for act in self.guests.step(self.now, event) {
                count += 1;
                assert!(count < MOST_ACTS, "one event leads to more and more");
                match act {
                    GuestAct::Say(_, message) => drop(encode(&message).expect("what a host says fits")),
                    GuestAct::Keep { ticket, vm, remedy, .. } => self.does(ticket, vm, remedy.counts()),
                    GuestAct::Order { ticket, step, .. } => self.underway.push_back((ticket, Some(step))),
                    GuestAct::Outcome(ticket, result) => self.ends(ticket, result.is_ok()),
                    // A guest that does nothing: it is judged by what it says.
                    GuestAct::Sample(vm) => {
                        let (sample, unwell) = (Some(STILL), Vec::new());
                        events.push_back(GuestEvent::Sampled { vm, sample, unwell });
                    }
                    GuestAct::Glance { vm, .. } => {
                        let (glimpse, unwell) = (None, Vec::new());
                        events.push_back(GuestEvent::Glimpsed { vm, glimpse, unwell });
                    }
                    GuestAct::Tell(_, word) | GuestAct::TellMaster(word) => events.push_back(self.told(word)),
                    GuestAct::Save(number, _) => events.push_back(GuestEvent::Saved(number)),
                    GuestAct::Run { ticket, .. } => events.push_back(GuestEvent::Ran(ticket, Ok(()))),
                    GuestAct::TellOthers(_) | GuestAct::Inside(..) => {}
                    GuestAct::Note(note) => assert!(note.text.len() < 16 * 1024, "a line for people"),
                }
            }
            assert_eq!(self.guests.overfull(), None, "is kept beyond its bound");
        }
    }

    fn told(&self, word: GuestWord) -> GuestEvent {
        match word {
            GuestWord::Requested(request) => {
                let at = NAMES.iter().position(|name| *name == request.target).filter(|vm| self.runs[*vm]);
                GuestEvent::Requested { from: HERE, request, at: at.map(|vm| (id(vm), HERE)) }
            }
            word => GuestEvent::Told(word),
        }
    }

    fn does(&mut self, ticket: Ticket, vm: VmId, counts: bool) {
        let vm = (0..3).find(|one| id(*one) == vm).expect("a VM of this host");
        assert!(self.remedies.values().all(|(other, _)| *other != vm), "two remedies at once");
        self.underway.push_back((ticket, None));
        self.remedies.insert(ticket, (vm, counts));
        if counts {
            let (now, anew) = (self.now, self.anew.entry(vm).or_default());
            anew.push(now);
            let lately = anew.iter().filter(|at| now.since(**at) < HOUR).count();
            assert!(lately <= RESETS as usize, "{} had {lately} remedies within an hour", NAMES[vm]);
        }
    }

    fn ends(&mut self, ticket: Ticket, well: bool) {
        let (vm, counts) = self.remedies.remove(&ticket).expect("a remedy ends once");
        if counts && !well {
            self.anew.entry(vm).or_default().pop();
        }
    }
}

fn unknown() -> Class {
    Class { family: Family::Unknown, kind: FailureKind::Unknown, line: String::new() }
}

fn id(vm: usize) -> VmId {
    VmId(uuid::Uuid::from_u128(1 + vm as u128))
}
