//! A look at a running domain, for its failure information: what libvirt can show of a guest that may not answer any more.
//!
//! ```text
//!   Look ──► worker of the lane "look" ──► Console, Memory, Picture, Statistics ──► told one by one, as they come
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

use super::events::{peek, statistics};
use super::failure::failure;
use super::session::{Session, in_session};
use super::xml;
use crate::types::VmId;
use crate::types::vm::DomainAnswer;

/// Where a PC keeps its text screen, with what has scrolled off: 32 KiB from physical 0xB8000 on.
const TEXT_SCREEN: (u64, usize) = (0xb_8000, 0x8000);
/// Longest picture that is taken, in bytes: 3840 × 2160 raw pixels.
const PICTURE_MAX: usize = 25 * 1024 * 1024;
/// Bytes of a picture that are read at once.
const CHUNK: usize = 256 * 1024;

/// What is to be looked at, and who is told.
pub(super) struct Look {
    pub vm: VmId,
    pub parts: SyncSender<Part>,
}

/// A part of what was seen, or why it is missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
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
        let _ = told(Part::Console(console(&domain).map_err(why)))
            && told(Part::Memory(peek(&domain, TEXT_SCREEN.0, TEXT_SCREEN.1).map_err(why)))
            && told(Part::Picture(picture(session, &domain)))
            && told(Part::Statistics(statistics(&domain).map_err(why)));
        Ok(DomainAnswer::Done)
    });
    if let DomainAnswer::Failed(failure) = &seen {
        let text = format!("libvirt shows nothing of it: {failure:?}");
        for part in
            [Part::Console(Err(text.clone())), Part::Memory(Err(text.clone())), Part::Picture(Err(text.clone()))]
        {
            let _ = look.parts.send(part);
        }
        let _ = look.parts.send(Part::Statistics(Err(text)));
    }
    seen
}

fn why(error: Error) -> String {
    format!("libvirt: {}", error.message().trim())
}

fn console(domain: &Domain) -> Result<Option<String>, Error> {
    // A definition that cannot be read has no console that we know of.
    Ok(xml::parse(&domain.get_xml_desc(0)?).ok().and_then(|found| found.console_log))
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
