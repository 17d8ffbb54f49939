//! A look at a running domain, for its failure information: what libvirt can show of a guest that may not answer any more.
//!
//! ```text
//!   Look ──► worker of the lane "look" ──► System, Console, Memory, Picture, Statistics ──► told one by one, as they come
//! ```
//!
//! Each part is told as soon as it is there: a monitor that hangs at one of them costs that one and those behind it. What needs no
//! monitor comes first, statistics without waiting last. Nothing is changed by a look.
//!
//! Not here: what the parts mean, and how long anybody waits for them (`exec::evidence`).

use std::sync::mpsc::SyncSender;
use std::time::Duration;

use virt::domain::Domain;
use virt::error::Error;
use virt::stream::Stream;
use virt_sys as sys;

use super::events::{peek, statistics};
use super::failure::failure;
use super::session::{Session, in_session};
use super::xml;
use crate::core::guests::Sample;
use crate::types::VmId;
use crate::types::vm::DomainAnswer;

/// Where a PC keeps its text screen, with what has scrolled off: 32 KiB from physical 0xB8000 on.
const TEXT_SCREEN: (u64, usize) = (0xb_8000, 0x8000);
/// Longest picture that is taken, in bytes: 3840 × 2160 raw pixels.
const PICTURE_MAX: usize = 25 * 1024 * 1024;
/// What a guest does: state, CPUs, network cards, disks.
const ACTIVITY: u32 = sys::VIR_DOMAIN_STATS_STATE
    | sys::VIR_DOMAIN_STATS_VCPU
    | sys::VIR_DOMAIN_STATS_INTERFACE
    | sys::VIR_DOMAIN_STATS_BLOCK;
/// Bytes of a picture that are read at once.
const CHUNK: usize = 256 * 1024;

/// What is to be looked at, and who is told.
pub(super) struct Look {
    pub vm: VmId,
    pub what: What,
    pub parts: SyncSender<Part>,
}

/// What is wanted of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// All parts, as a failure needs them.
    Everything,
    /// What it does: statistics, fewer of them.
    Activity,
    /// The same, where its console is, and the text screen's memory.
    Text,
    /// A picture only.
    Picture,
}

/// A part of what was seen, or why it is missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    /// The system inside, as its definition names it.
    System(Option<String>),
    /// The file on this host to which its serial console is written; none if its definition has none.
    Console(Result<Option<String>, String>),
    /// Memory of the text screen: cells of letter and colour.
    Memory(Result<Vec<u8>, String>),
    /// The screen as QEMU paints it: PNG or PPM.
    Picture(Result<Vec<u8>, String>),
    /// Name and value.
    Statistics(Result<Vec<(String, String)>, String>),
}

/// Looks, telling each part.
pub(super) fn look(uri: &str, session: &mut Option<Session>, look: &Look, within: Duration) -> DomainAnswer {
    let seen = in_session(uri, session, within, |session, _| {
        let domain = session.domain(look.vm).map_err(|error| failure(&error))?;
        // Who has what they want does not listen any more; then the rest need not be looked at.
        let told = |part| look.parts.send(part).is_ok();
        let activity = || Part::Statistics(statistics(&domain, ACTIVITY).map_err(why));
        let memory = || Part::Memory(peek(&domain, TEXT_SCREEN.0, TEXT_SCREEN.1).map_err(why));
        let _ = match look.what {
            What::Everything => {
                let (system, console) = definition(&domain);
                told(Part::System(system))
                    && told(console)
                    && told(memory())
                    && told(Part::Picture(picture(session, &domain)))
                    && told(Part::Statistics(statistics(&domain, 0).map_err(why)))
            }
            What::Activity => told(activity()),
            What::Text => told(activity()) && told(definition(&domain).1) && told(memory()),
            What::Picture => told(Part::Picture(picture(session, &domain))),
        };
        Ok(DomainAnswer::Done)
    });
    if let DomainAnswer::Failed(failure) = &seen {
        let text = format!("libvirt shows nothing of it: {failure:?}");
        let (memory, statistics) = (Part::Memory(Err(text.clone())), Part::Statistics(Err(text.clone())));
        let (console, picture) = (Part::Console(Err(text.clone())), Part::Picture(Err(text)));
        // No more than what is waited for: the channel may have no room for it.
        let parts = match look.what {
            What::Everything => vec![console, memory, picture, statistics],
            What::Activity => vec![statistics],
            What::Text => vec![statistics, console, memory],
            What::Picture => vec![picture],
        };
        parts.into_iter().for_each(|part| drop(look.parts.send(part)));
    }
    seen
}

fn why(error: Error) -> String {
    format!("libvirt: {}", error.message().trim())
}

/// What its definition says: the system, the console.
fn definition(domain: &Domain) -> (Option<String>, Part) {
    match domain.get_xml_desc(0) {
        Ok(text) => {
            // One that cannot be read has no console, and no system, that we know of.
            let found = xml::parse(&text).ok().map(|found| (found.system, found.console_log));
            let (system, console) = found.unwrap_or_default();
            (system, Part::Console(Ok(console)))
        }
        Err(error) => (None, Part::Console(Err(why(error)))),
    }
}

fn picture(session: &Session, domain: &Domain) -> Result<Vec<u8>, String> {
    let stream = Stream::new(session.connect(), 0).map_err(why)?;
    domain.screenshot(&stream, 0, 0).map_err(why)?;
    let (mut bytes, mut chunk) = (Vec::new(), vec![0; CHUNK]);
    loop {
        match stream.recv(&mut chunk) {
            Ok(0) => break,
            Ok(length) if PICTURE_MAX < bytes.len() + length => {
                let _ = stream.abort();
                return Err(format!("it has more than {} MiB", PICTURE_MAX >> 20));
            }
            Ok(length) => bytes.extend_from_slice(&chunk[..length]),
            Err(error) => {
                let _ = stream.abort();
                return Err(why(error));
            }
        }
    }
    let _ = stream.finish(); // All was read; what it says of its end changes nothing.
    Ok(bytes)
}

/// What a guest does, out of its statistics. None while a call about it is under way: libvirt leaves out what it would have to
/// wait for.
#[must_use]
pub fn sample(statistics: &[(String, String)]) -> Option<Sample> {
    let number = |name: &str| -> Option<u64> { statistics.iter().find(|(of, _)| of == name)?.1.parse().ok() };
    let sum = |begin: &str, ends: &[&str]| -> u64 {
        let fits = |name: &str| name.starts_with(begin) && ends.iter().any(|end| name.ends_with(end));
        statistics.iter().filter(|(name, _)| fits(name)).filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
    };
    // It may still count and name the disks then; taken for no I/O, and the next sample for much, that would hide every hang.
    let counted = |name: &str| name.starts_with("block.") && name.ends_with(".rd.reqs");
    if 0 < number("block.count")? && !statistics.iter().any(|(name, _)| counted(name)) {
        return None;
    }
    Some(Sample {
        runs: number("state.state")? == u64::from(sys::VIR_DOMAIN_RUNNING),
        // What others send to it says nothing about it.
        io: sum("block.", &[".rd.reqs", ".wr.reqs", ".fl.reqs"]) + sum("net.", &[".tx.pkts"]),
        cpu: Duration::from_nanos(sum("vcpu.", &[".time"])),
        cpus: u32::try_from(number("vcpu.current")?).ok()?,
    })
}

/// Why a domain's CPUs stand, when its guest is the reason: also for whoever has missed the event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stands {
    /// Its kernel has panicked, and its QEMU was kept.
    Panicked,
    /// Its watchdog has fired.
    Watchdog,
}

/// That, out of its statistics.
#[must_use]
pub fn stands(statistics: &[(String, String)]) -> Option<Stands> {
    let number = |name: &str| -> Option<u32> { statistics.iter().find(|(of, _)| of == name)?.1.parse().ok() };
    match (number("state.state")?, number("state.reason")?) {
        (sys::VIR_DOMAIN_CRASHED, _) | (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_CRASHED) => {
            Some(Stands::Panicked)
        }
        (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_WATCHDOG) => Some(Stands::Watchdog),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_guest_is_why_it_stands() {
        for (state, reason, expected) in [
            ("6", "1", Some(Stands::Panicked)),
            ("3", "10", Some(Stands::Panicked)),
            ("3", "6", Some(Stands::Watchdog)),
            ("3", "1", None), // By a person.
            ("3", "5", None), // By an I/O error.
            ("1", "1", None),
            ("5", "6", None),
        ] {
            let told = [("state.state", state), ("state.reason", reason)];
            let told = told.map(|(name, value)| (name.to_owned(), value.to_owned()));
            assert_eq!(stands(&told), expected, "{state} {reason}");
        }
        assert_eq!(stands(&[]), None);
    }

    #[test]
    fn activity_is_what_the_guest_does_itself() {
        let told = |extra: &[(&str, &str)]| {
            let always = [
                ("state.state", "1"),
                ("vcpu.current", "2"),
                ("vcpu.maximum", "4"),
                ("vcpu.0.time", "1000000000"),
                ("vcpu.0.wait", "77"),
                ("vcpu.1.time", "500000000"),
                ("net.count", "1"),
                ("net.0.rx.pkts", "1000"),
                ("net.0.tx.pkts", "3"),
            ];
            always
                .iter()
                .chain(extra)
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect::<Vec<_>>()
        };
        let disks =
            [("block.count", "2"), ("block.0.rd.reqs", "5"), ("block.0.rd.bytes", "9"), ("block.1.wr.reqs", "7")];
        let expected = Sample { runs: true, io: 15, cpu: Duration::from_millis(1500), cpus: 2 };
        assert_eq!(sample(&told(&disks)), Some(expected));
        for left_out in [&[][..], &[("block.count", "2"), ("block.0.name", "vda"), ("block.1.name", "vdb")]] {
            assert_eq!(sample(&told(left_out)), None, "what its disks do was left out: {left_out:?}");
        }
        let mut paused = told(&disks);
        paused[0].1 = "3".to_owned();
        assert_eq!(sample(&paused), Some(Sample { runs: false, ..expected }));
    }
}
