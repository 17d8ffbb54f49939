//! What has been seen of a failed guest so far, part by part.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::{picture, says_nothing, screen};
use crate::core::guests::classify::{Shown, classify, clean};
use crate::core::guests::{Case, FoundBy};
use crate::exec::clock;
use crate::exec::console::{Consoles, Tail};
use crate::exec::libvirt::Part;
use crate::exec::reading::{self, Reader};
use crate::types::Time;
use crate::types::failure::{Class, FailureFile as F, MissingFile};

/// Bytes of statistics that are kept.
const MAX_STATISTICS: usize = 256 * 1024;

/// A console's file, and how long it was when its guest was last started anew by a remedy: what stands before is of another boot.
#[derive(Clone, Debug)]
pub(super) struct Booted {
    pub(super) path: String,
    pub(super) ends: u64,
}

/// What has been seen so far.
pub(super) struct Sight {
    parts: Receiver<Part>,
    consoles: Consoles,
    reader: Arc<Reader>,
    booted: Option<Booted>,
    /// Of the console.
    path: Option<String>,
    tail: Option<Receiver<Result<Tail, String>>>,
    /// No part comes any more.
    ended: bool,
    /// What its definition says of the system inside.
    system: Option<String>,
    screen: Option<Result<String, String>>,
    picture: Option<Result<Vec<u8>, String>>,
    console: Option<Result<Tail, String>>,
    statistics: Option<Result<String, String>>,
    /// The picture's text is being read.
    reading: Option<Receiver<Result<String, String>>>,
    read: Option<Result<String, String>>,
}

impl Sight {
    pub(super) fn new(parts: Receiver<Part>, consoles: Consoles, reader: Arc<Reader>, booted: Option<Booted>) -> Self {
        Self {
            parts,
            consoles,
            reader,
            booted,
            path: None,
            tail: None,
            ended: false,
            system: None,
            screen: None,
            picture: None,
            console: None,
            statistics: None,
            reading: None,
            read: None,
        }
    }

    /// Until everything is there, or the time is over. A picture's text counts as long as nothing else says what it is, and unless
    /// a message asks for the remedy: that waits for no program.
    pub(super) fn gather(&mut self, until: Time, case: &Case) {
        while !self.ended && !self.is_complete() {
            match self.parts.recv_timeout(until.since(clock::now())) {
                Ok(part) => self.put(part),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => self.ended = true,
            }
            if case.by == FoundBy::Monitoring {
                self.begin_reading();
            }
        }
        self.take_console(until);
        if says_nothing(&self.classify(case)) {
            self.take_reading(until);
        }
    }

    /// After the remedy went: the part that was under way, statistics, the console.
    pub(super) fn gather_late(&mut self, until: Time, waited: Duration) {
        let mut under_way = true;
        while !self.ended && !self.is_complete() {
            let Ok(part) = self.parts.recv_timeout(until.since(clock::now())) else { break };
            match part {
                Part::System(_) | Part::Console(_) | Part::Statistics(_) => self.put(part),
                Part::Memory(_) | Part::Picture(_) if under_way => self.put(part),
                Part::Memory(_) => self.screen = Some(Err(too_late(waited))),
                Part::Picture(_) => self.picture = Some(Err(too_late(waited))),
            }
            under_way = false;
        }
        self.take_console(until);
    }

    /// A picture's text, after everything else.
    pub(super) fn read_late(&mut self) {
        self.begin_reading();
        self.take_reading(clock::now() + 2 * reading::TIME);
    }

    /// Where there is a picture and no text screen.
    fn begin_reading(&mut self) {
        let Some(Ok(picture)) = self.picture.as_ref().filter(|_| matches!(self.screen, Some(Err(_)))) else { return };
        if self.reading.is_some() || self.read.is_some() {
            return;
        }
        let (reader, picture, (tell, told)) = (Arc::clone(&self.reader), picture.clone(), sync_channel(1));
        let reading = std::thread::Builder::new().name("reading".into()).spawn(move || {
            let _ = tell.send(reader.read(&picture)); // Nobody waits for a late one.
        });
        match reading {
            Ok(_) => self.reading = Some(told),
            Err(error) => self.read = Some(Err(format!("no thread: {error}"))),
        }
    }

    fn take_reading(&mut self, until: Time) {
        let Some(reading) = &self.reading else { return };
        match reading.recv_timeout(until.since(clock::now())) {
            Ok(read) => (self.read, self.reading) = (Some(read), None),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.reading = None,
        }
    }

    fn is_complete(&self) -> bool {
        let console = self.console.is_some() || self.tail.is_some();
        console && self.screen.is_some() && self.picture.is_some() && self.statistics.is_some()
    }

    fn put(&mut self, part: Part) {
        match part {
            Part::System(system) => self.system = system,
            Part::Console(Ok(Some(path))) => {
                match self.consoles.tail(path.clone()) {
                    Ok(tail) => self.tail = Some(tail),
                    Err(why) => self.console = Some(Err(why)),
                }
                self.path = Some(path);
            }
            Part::Console(Ok(None)) => {
                let why = "its definition logs no serial console to a file (<serial> with <log file='…'/>)";
                self.console = Some(Err(why.to_owned()));
            }
            Part::Console(Err(why)) => self.console = Some(Err(why)),
            Part::Memory(memory) => self.screen = Some(memory.and_then(|memory| screen::text(&memory))),
            Part::Picture(picture) => self.picture = Some(picture),
            Part::Statistics(statistics) => self.statistics = Some(statistics.map(|all| lines(&all))),
        }
    }

    fn take_console(&mut self, until: Time) {
        let Some(tail) = &self.tail else { return };
        match tail.recv_timeout(until.since(clock::now())) {
            Ok(console) => (self.console, self.tail) = (Some(console), None),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.tail = None,
        }
    }

    pub(super) fn classify(&self, case: &Case) -> Class {
        let console = self.console.as_ref().and_then(|console| console.as_ref().ok());
        let booted = self.booted.as_ref().filter(|booted| self.path.as_ref() == Some(&booted.path));
        let console = console.map(|tail| booted.map_or(tail.bytes.as_slice(), |booted| tail.since(booted.ends)));
        let console = console.map(String::from_utf8_lossy);
        classify(&Shown {
            system: case.system.as_ref(),
            defined: self.system.as_deref(),
            panicked: case.panicked.as_deref(),
            screen: self.screen.as_ref().and_then(|screen| screen.as_deref().ok()),
            picture: self.read.as_ref().and_then(|read| read.as_deref().ok()),
            console: console.as_deref(),
            sign: case.sign.as_ref(),
            reported: case.by == FoundBy::Message,
        })
    }

    /// The system inside, as its definition names it.
    pub(super) fn defined_system(&self) -> Option<String> {
        self.system.as_deref().map(clean)
    }

    /// The console's file, if it has been seen.
    pub(super) fn console_path(&self) -> Option<String> {
        self.path.clone()
    }

    pub(super) fn into_files(self, waited: Duration) -> (Vec<(F, Vec<u8>)>, Vec<MissingFile>) {
        let console = self.console.or_else(|| self.tail.map(|_| Err("its file does not answer".to_owned())));
        // A raw picture is turned into PNG only now: that takes longer than a remedy may wait.
        let all = [
            (F::Screen, self.screen.map(|screen| screen.map(String::into_bytes))),
            (F::Picture, self.picture.map(|picture| picture.and_then(picture::png))),
            (F::Console, console.map(|console| console.map(|tail| tail.bytes))),
            (F::Statistics, self.statistics.map(|text| text.map(String::into_bytes))),
        ];
        // Where there is a text screen, nothing was to be read.
        let read = self.read.map(|read| (F::PictureText, Some(read.map(String::into_bytes))));
        let (mut files, mut missing) = (Vec::new(), Vec::new());
        for (file, found) in all.into_iter().chain(read) {
            match found.unwrap_or_else(|| Err(too_late(waited))) {
                Ok(bytes) => files.push((file, bytes)),
                Err(why) => missing.push(MissingFile { file, why }),
            }
        }
        (files, missing)
    }
}

fn too_late(waited: Duration) -> String {
    format!("not shown within {} ms, for which the remedy waited", waited.as_millis())
}

/// One `name=value` a line.
fn lines(all: &[(String, String)]) -> String {
    let mut text = String::new();
    for (name, value) in all {
        if MAX_STATISTICS < text.len() + name.len() + value.len() {
            break;
        }
        text.push_str(&format!("{name}={value}\n"));
    }
    text
}

/// A guest has been started anew: how long its console's file is now. None if that is not known in time.
pub(super) fn booted(path: String, consoles: &Consoles, within: Duration) -> Option<Booted> {
    let tail = consoles.tail(path.clone()).ok()?.recv_timeout(within).ok()?.ok()?;
    Some(Booted { path, ends: tail.ends })
}
