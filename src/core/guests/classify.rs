//! What kind of failure a screen or a console shows: lines in, one word and its reason out.
//!
//! ```text
//!   console ─┐  from the newest line up, until one fits a row of TABLE
//!   screen  ─┴─ … or one of FRESH says that a new boot began: older lines are of another life
//!      the one of the two that says more ──► (family, kind, line) ──► remedy_for(kind)
//! ```
//!
//! Without a text screen there may be text that was read from a picture. Letters that look alike are one there, and gaps count
//! nothing, on both sides of the comparison.
//!
//! Everything here was written by a guest, which is hostile by assumption: a line is cut and cleaned, and the worst that a guest
//! can bring about is a wrong word about itself.
//!
//! Deliberately not here: where the text comes from (`exec::evidence`), how pictures are read (`exec::reading`).

use mainstay_guest::message::System;

use crate::types::failure::{Class, FailureKind, Family};
use crate::types::guests::Remedy;

use FailureKind as K;
use Family as F;

/// Longest reason, in characters.
const MAX_LINE: usize = 200;
/// Columns of a text screen: a row that is full goes on in the next.
const COLUMNS: usize = 80;

/// What is known of a failed guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shown<'a> {
    /// What its agent has said of its system.
    pub system: Option<&'a System>,
    /// What its definition says of it, as libosinfo does: `http://microsoft.com/win/10`.
    pub defined: Option<&'a str>,
    /// Its panic device has fired: what the hypervisor says of it.
    pub panicked: Option<&'a str>,
    /// The text screen, in rows.
    pub screen: Option<&'a str>,
    /// What was read on a picture of the screen, in lines.
    pub picture: Option<&'a str>,
    /// The end of its serial console.
    pub console: Option<&'a str>,
    /// What its screen showed when it was found to have failed.
    pub sign: Option<&'a Class>,
    /// A report, of this guest or about it, has led here.
    pub reported: bool,
}

/// A line that holds all these words is of this kind. In lower case; the first row that fits decides.
type Row = (&'static [&'static str], Family, FailureKind);

const TABLE: &[Row] = &[
    (&["kernel panic - not syncing", "out of memory"], F::Linux, K::OutOfMemory),
    (&["kernel panic - not syncing", "deadlocked on memory"], F::Linux, K::OutOfMemory),
    (&["kernel panic"], F::Linux, K::Panic),
    (&["bug: unable to handle"], F::Linux, K::Oops),
    (&["bug: kernel null pointer"], F::Linux, K::Oops),
    (&["kernel bug at"], F::Linux, K::Oops),
    (&["general protection fault", "[#"], F::Linux, K::Oops),
    (&["oops:"], F::Linux, K::Oops),
    (&["bug: soft lockup"], F::Linux, K::Lockup),
    (&["hard lockup"], F::Linux, K::Lockup),
    (&["rcu", "detected stall"], F::Linux, K::Lockup),
    (&["rcu", "self-detected stall"], F::Linux, K::Lockup),
    (&["info: task ", "blocked for more than"], F::Linux, K::HungTask),
    (&["stop code:"], F::Windows, K::StopScreen),
    (&["stop: 0x"], F::Windows, K::StopScreen), // Behind three stars, which on a picture are read as anything.
    (&["a problem has been detected and windows"], F::Windows, K::StopScreen),
    (&["ran into a problem and needs to restart"], F::Windows, K::StopScreen),
    (&["no bootable device"], F::Boot, K::NoBootDevice),
    (&["no bootable option"], F::Boot, K::NoBootDevice),
    (&["no bootable medium"], F::Boot, K::NoBootDevice),
    (&["boot failed:"], F::Boot, K::NoBootDevice),
    (&["no more network devices"], F::Boot, K::NoBootDevice),
    (&["bdsdxe: failed to "], F::Boot, K::NoBootDevice),
    (&["bdsdxe: no bootable"], F::Boot, K::NoBootDevice),
    (&["operating system not found"], F::Boot, K::NoBootDevice),
    (&["missing operating system"], F::Boot, K::NoBootDevice),
    (&["non-system disk"], F::Boot, K::NoBootDevice),
    (&["grub rescue>"], F::Boot, K::BootLoader),
    (&["grub>"], F::Boot, K::BootLoader),
    (&["gnu grub "], F::Boot, K::BootLoader),
    (&["error: no such partition"], F::Boot, K::BootLoader),
    (&["error: no such device"], F::Boot, K::BootLoader),
    (&["error: unknown filesystem"], F::Boot, K::BootLoader),
    (&["could not find kernel image"], F::Boot, K::BootLoader),
    (&["(initramfs)"], F::Linux, K::Initramfs),
    (&["dropping to a shell"], F::Linux, K::Initramfs),
    (&["dracut:/#"], F::Linux, K::Initramfs),
    (&["entering emergency mode"], F::Linux, K::Initramfs),
    (&["you are in emergency mode"], F::Linux, K::Emergency),
    (&["you are in rescue mode"], F::Linux, K::Emergency),
    (&["for maintenance", "root password"], F::Linux, K::Emergency),
    (&["the root account is locked"], F::Linux, K::Emergency),
];

/// By these sites libosinfo names Linux systems; others are unknown.
const LINUX: &[&str] = &[
    "//almalinux.org/",
    "//alpinelinux.org/",
    "//altlinux.org/",
    "//archlinux.org/",
    "//centos.org/",
    "//debian.org/",
    "//fedoraproject.org/",
    "//gentoo.org/",
    "//libosinfo.org/linux/",
    "//mageia.org/",
    "//manjaro.org/",
    "//nixos.org/",
    "//opensuse.org/",
    "//oracle.com/ol/",
    "//redhat.com/",
    "//rockylinux.org/",
    "//suse.com/",
    "//ubuntu.com/",
];

/// A new boot: what stands above is of an earlier one.
const FRESH: &[&str] = &["linux version ", "seabios (version", "booting from ", "bdsdxe: starting "];

/// What the guest shows.
#[must_use]
pub fn classify(shown: &Shown<'_>) -> Class {
    let console = shown.console.and_then(|text| newest(text.lines().map(clean), is_in));
    let screen = shown.screen.and_then(|text| newest(unwrapped(text).iter().map(|row| clean(row)), is_in));
    let picture = || shown.picture.and_then(|text| newest(text.lines().map(|line| clean(&digits(line))), looks_in));
    let screen = screen.or_else(picture);
    // A console says a line in full that a screen has broken; but it may be used by the boot loader only.
    let found = match (console, screen) {
        (Some(console), Some(screen)) if says_more(&console) < says_more(&screen) => Some(screen),
        (Some(console), _) => Some(console),
        (None, screen) => screen,
    };
    match (found, shown.panicked) {
        (Some(found), None) => found,
        (Some(found), Some(_)) if 2 <= says_more(&found) => found,
        (_, Some(why)) => Class { family: family(shown), kind: K::Panic, line: clean(why) },
        (None, None) if shown.sign.is_some() => shown.sign.cloned().expect("it was just seen"),
        (None, None) => {
            let kind = if shown.reported { K::Reported } else { K::Unknown };
            Class { family: family(shown), kind, line: String::new() }
        }
    }
}

/// What helps against a failure that monitoring has found; none = only a person can help, and would be disturbed.
#[must_use]
pub fn remedy_for(kind: FailureKind) -> Option<Remedy> {
    match kind {
        K::Panic | K::OutOfMemory | K::Oops | K::Lockup | K::HungTask | K::StopScreen => Some(Remedy::Reset),
        // The same disk is as missing after a reset.
        K::NoBootDevice | K::BootLoader => None,
        // A reset while somebody repairs the file system there does harm.
        K::Initramfs | K::Emergency => None,
        K::Reported | K::Unknown => Some(Remedy::Reset),
    }
}

/// What a person should do where no remedy helps.
#[must_use]
pub fn advice(kind: FailureKind) -> Option<&'static str> {
    match kind {
        K::NoBootDevice => Some("look at its disks: are they there, whole, and in its boot order?"),
        K::BootLoader => Some("look at its console and its boot disk: the boot loader waits"),
        K::Initramfs => Some("look at its console: its root file system was not found, and a shell waits"),
        K::Emergency => Some("look at its console: a file system could not be mounted, and a shell waits"),
        K::Panic | K::OutOfMemory | K::Oops | K::Lockup | K::HungTask | K::StopScreen | K::Reported | K::Unknown => {
            None
        }
    }
}

/// The agent knows better than the definition.
fn family(shown: &Shown<'_>) -> Family {
    let defined = shown.defined.unwrap_or_default();
    match shown.system.map(|system| system.id.as_str()) {
        None | Some("") if defined.contains("//microsoft.com/win") => F::Windows,
        None | Some("") if LINUX.iter().any(|site| defined.contains(site)) => F::Linux,
        None | Some("") => F::Unknown,
        Some(id) if id.contains("windows") => F::Windows,
        Some(_) => F::Linux,
    }
}

/// A system that ran and failed says more than what came before it.
fn says_more(class: &Class) -> u8 {
    match class.kind {
        K::Panic | K::OutOfMemory | K::Oops | K::Lockup | K::HungTask | K::StopScreen => 2,
        K::NoBootDevice | K::BootLoader | K::Initramfs | K::Emergency => 1,
        K::Reported | K::Unknown => 0,
    }
}

/// The newest line that fits; lines come oldest first. `has` says whether a line, in lower case, has a word.
fn newest(lines: impl DoubleEndedIterator<Item = String>, has: fn(&str, &str) -> bool) -> Option<Class> {
    let mut is_up = false;
    let mut prompt: Option<Class> = None;
    for line in lines.rev() {
        let lower = line.to_lowercase();
        // A prompt says nothing of its reason, which stands above.
        if let Some(prompt) = prompt.take_if(|_| has(&lower, "error: ")) {
            return Some(Class { line, ..prompt });
        }
        let row = TABLE.iter().find(|(words, ..)| words.iter().all(|word| has(&lower, word)));
        if let Some((_, family, kind)) = row {
            let class = Class { family: *family, kind: *kind, line };
            // Who asks for a login has left its boot behind; an oops it may have survived.
            if !(is_up && says_more(&class) < 2) {
                if prompt.is_some() || !(class.kind == K::BootLoader && class.line.ends_with('>')) {
                    return prompt.or(Some(class));
                }
                prompt = Some(class);
            }
        } else if lower.trim() == ":(" {
            return Some(Class { family: F::Windows, kind: K::StopScreen, line });
        }
        if FRESH.iter().any(|word| has(&lower, word)) {
            break;
        }
        is_up |= lower.ends_with(" login:");
    }
    prompt
}

fn is_in(line: &str, word: &str) -> bool {
    line.contains(word)
}

/// The same for a line that was read from a picture.
fn looks_in(line: &str, word: &str) -> bool {
    alike(line).contains(&alike(word))
}

/// One letter for all that look alike, and no gaps. In lower case.
fn alike(text: &str) -> String {
    let letters = text.chars().filter(|letter| !letter.is_whitespace());
    letters
        .map(|letter| match letter {
            '0' | 'q' | '@' | '©' | '®' => 'o',
            '1' | 'i' | '|' | '!' => 'l',
            'v' | 'w' => 'u',
            '5' => 's',
            '\u{2010}'..='\u{2015}' => '-',
            '‘' | '’' => '\'',
            letter => letter,
        })
        .collect()
}

/// A line of a picture whose hexadecimal numbers are numbers: behind `0x` stand no letters that look like one.
fn digits(line: &str) -> String {
    let number = |word: &str| -> Option<String> {
        let at = word.find('x').filter(|at| 0 < *at)?;
        let (head, rest) = word.split_at(at);
        let zero = head.char_indices().next_back().filter(|(_, letter)| "0OoQ@G".contains(*letter))?.0;
        let end = rest[1..]
            .find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '@')
            .map_or(rest.len(), |end| 1 + end);
        let digits: String = rest[1..end]
            .chars()
            .map(|letter| match letter {
                'O' | 'o' | 'Q' | '@' | 'G' => '0',
                'l' | 'I' => '1',
                letter => letter,
            })
            .collect();
        let is_number = 4 <= digits.len() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_number.then(|| format!("{}0x{digits}{}", &head[..zero], &rest[end..]))
    };
    line.split(' ').map(|word| number(word).unwrap_or_else(|| word.to_owned())).collect::<Vec<_>>().join(" ")
}

/// Rows of a screen as lines: one that is full goes on in the next row.
fn unwrapped(screen: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut goes_on = false;
    for row in screen.lines() {
        match lines.last_mut() {
            Some(line) if goes_on => line.push_str(row),
            Some(_) | None => lines.push(row.to_owned()),
        }
        goes_on = row.chars().count() == COLUMNS;
    }
    lines
}

/// A line for people: without what a terminal would obey, the kernel's time and frame; cut.
#[must_use]
pub fn clean(line: &str) -> String {
    let mut text = String::new();
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\u{1b}' if letters.next_if_eq(&'[').is_some() => {
                while letters.next().is_some_and(|letter| !('@'..='~').contains(&letter)) {}
            }
            letter if letter.is_control() => {}
            letter => text.push(letter),
        }
    }
    let mut rest = text.trim();
    if let Some((level, after)) = rest.strip_prefix('<').and_then(|rest| rest.split_once('>'))
        && level.bytes().all(|digit| digit.is_ascii_digit())
    {
        rest = after.trim_start();
    }
    if let Some((time, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'))
        && time.trim().bytes().all(|digit| digit.is_ascii_digit() || digit == b'.')
    {
        rest = after.trim_start();
    }
    if let Some(inner) = rest.strip_prefix("---[ end ").and_then(|rest| rest.strip_suffix("]---")) {
        rest = inner.trim();
    }
    rest.chars().take(MAX_LINE).collect()
}

#[cfg(test)]
#[path = "classify_tests.rs"]
mod tests;
