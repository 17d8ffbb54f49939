//! Both directions of a guest's channel under junk: the stories of `fuzz/stories/`, played with the seeds of `fuzz/seeds/` and
//! with a bounded number of their mutations, the same ones every time. `ROUNDS=100000 FROM=5000` plays more, and others.
//!
//! ```text
//!   fuzz/seeds/NAME/* ──► as they are ──► story
//!                    └──► changed, by the number of the round ──► story ── panics ──► the round is named
//! ```
//!
//! `UPDATE=1` writes the seeds that are told here anew: after a change of messages or of a story's turns.

use std::path::PathBuf;

use mainstay_guest::frame::{Message, encode};
use mainstay_guest::message::{
    Application, Beat, FromGuest, GuestHello, HostHello, Order, Report, ReportId, Severity, System, ToGuest, Verdict,
    Wish,
};

#[path = "../fuzz/stories/from_guest.rs"]
mod from_guest;
#[path = "../fuzz/stories/input.rs"]
mod input;
#[path = "../fuzz/stories/to_guest.rs"]
mod to_guest;

const ROUNDS: u64 = 3000;
/// Stories are not made longer than this.
const LONGEST: usize = 8192;

#[test]
fn a_host_survives_its_guests() {
    play("from_guest", &told_by_guests(), from_guest::play);
}

#[test]
fn a_guest_survives_its_host() {
    play("to_guest", &told_by_hosts(), to_guest::play);
}

fn play(name: &str, told: &[(&str, Vec<u8>)], story: fn(&[u8])) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        told.iter().for_each(|(file, bytes)| std::fs::write(folder.join(file), bytes).unwrap());
    }
    for (file, bytes) in told {
        let kept = std::fs::read(folder.join(file)).unwrap_or_default();
        assert!(kept == *bytes, "fuzz/seeds/{name}/{file} is not as told here; UPDATE=1 writes it anew");
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let seeds: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    for (file, seed) in files.iter().zip(&seeds) {
        let _told = OnPanic(format!("the seed {}", file.display()));
        story(seed);
    }
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let from = number("FROM", 0);
    for round in from..from + number("ROUNDS", ROUNDS) {
        let _told = OnPanic(format!("ROUNDS=1 FROM={round}"));
        story(&changed(&seeds, round));
    }
}

/// Says what was played when it ends in a panic.
struct OnPanic(String);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("by {}", self.0);
        }
    }
}

// ---- mutations --------------------------------------------------------------------------------------------------------

/// Chance by number (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % most.max(1) as u64) as usize
    }
}

/// A seed with one to eight changes.
fn changed(seeds: &[Vec<u8>], round: u64) -> Vec<u8> {
    let mut dice = Dice(round.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut bytes = seeds[dice.below(seeds.len())].clone();
    for _ in 0..=dice.below(8) {
        change(&mut bytes, seeds, &mut dice);
    }
    bytes.truncate(LONGEST);
    bytes
}

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], dice: &mut Dice) {
    let at = dice.below(bytes.len());
    let end = (at + 1 + dice.below(64)).min(bytes.len());
    match dice.below(7) {
        0 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
        1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5)],
        2 => drop(bytes.drain(at.min(end)..end)),
        3 => {
            let again = bytes[at.min(end)..end].to_vec();
            bytes.splice(at..at, again);
        }
        4 => {
            let other = &seeds[dice.below(seeds.len())];
            bytes.splice(at..at, other[dice.below(other.len())..].iter().copied());
        }
        5 => {
            let whole = bytes.clone();
            bytes.extend(whole);
        }
        _ => {
            let junk: Vec<u8> = (0..dice.below(16)).map(|_| dice.below(256) as u8).collect();
            bytes.splice(at..at, junk);
        }
    }
}

// ---- seeds ------------------------------------------------------------------------------------------------------------

/// A story in turns, as `fuzz/stories/` reads them.
#[derive(Default)]
struct Told(Vec<u8>);

impl Told {
    fn piece(mut self, bytes: &[u8]) -> Self {
        self.0.extend(u16::try_from(bytes.len()).unwrap().to_le_bytes());
        self.0.extend(bytes);
        self
    }

    fn junk(mut self, bytes: &[u8]) -> Self {
        self.0.push(0);
        self.piece(bytes)
    }

    fn says<M: Message>(mut self, message: &M) -> Self {
        self.0.extend([1, message.kind() as u8]);
        self.piece(&postcard::to_stdvec(message).unwrap())
    }

    fn cut<M: Message>(mut self, message: &M, at: u16) -> Self {
        self.0.extend([3, message.kind() as u8]);
        let mut told = self.piece(&postcard::to_stdvec(message).unwrap());
        told.0.extend(at.to_le_bytes());
        told
    }

    /// Tenths of seconds go by.
    fn waits(mut self, tenths: u16) -> Self {
        self.0.push(4);
        self.0.extend(tenths.to_le_bytes());
        self
    }

    /// Another turn, with its numbers.
    fn turn(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

const WELL: [u8; 2] = [5, 0];
const FAILS: [u8; 2] = [5, 1];
const DB: [u8; 2] = [6, 1];
const APP: [u8; 2] = [6, 2];
const AGAIN: [u8; 2] = [6, 129];
const ENDS: [u8; 1] = [7];

fn hello(boot: u8) -> FromGuest {
    let system = System { id: "debian".to_owned(), version: "12".to_owned(), kernel: "6.1".to_owned() };
    FromGuest::Hello(GuestHello { protocol: 1, agent: "0.1".to_owned(), boot: [boot; 16], system })
}

fn beat() -> FromGuest {
    FromGuest::Beat(Beat {
        boot: [1; 16],
        uptime_s: 9,
        load_centi: 50,
        available_kib: 1 << 20,
        root_writable: true,
        failed_units: 0,
        application: Application::Active,
        ready: true,
        frozen: false,
        dropped: 0,
    })
}

fn report(n: u8, severity: Severity, kind: &str, message: &str, wish: Wish) -> FromGuest {
    let (kind, message) = (kind.to_owned(), message.to_owned());
    let (id, sequence) = (ReportId([n; 16]), u64::from(n));
    FromGuest::Report(Report { id, sequence, boot: [1; 16], severity, kind, message, wish })
}

fn critical(n: u8, wish: Wish) -> FromGuest {
    report(n, Severity::Critical, "app/db", "no answer", wish)
}

fn told_by_guests() -> Vec<(&'static str, Vec<u8>)> {
    let reset_of = |name: &str| Wish::ResetVm(name.to_owned());
    let greeted = || Told::default().says(&hello(1)).says(&beat());
    let mut resets = greeted();
    for n in 1..=5 {
        resets = resets.says(&critical(n, Wish::Reset)).turn(&WELL).waits(300 << n);
    }
    let mut counted = greeted();
    for n in 1..=4 {
        counted = counted.says(&report(n, Severity::Info, "count/x", "again", Wish::None)).waits(10);
    }
    let asked = greeted().says(&critical(1, reset_of("db"))).waits(20).turn(&WELL).says(&critical(1, reset_of("db")));
    let votes = greeted().turn(&DB).says(&hello(2)).says(&critical(1, reset_of("web"))).waits(30).turn(&APP);
    let votes = votes.says(&hello(3)).says(&critical(2, reset_of("web"))).turn(&FAILS).waits(700);
    let alone = greeted().turn(&APP).says(&critical(1, reset_of("web"))).waits(30_000);
    let rules = greeted().says(&report(1, Severity::Warning, "text", "no space left", Wish::None)).turn(&FAILS);
    let rules = rules.says(&report(2, Severity::Info, "fix", "x", Wish::None)).turn(&WELL);
    let bad = greeted().says(&report(1, Severity::Info, "Not a kind", "two\nlines", reset_of("")));
    let moves =
        greeted().says(&critical(1, Wish::RestartElsewhere)).turn(&ENDS).turn(&WELL).turn(&ENDS).says(&hello(4));
    let torn = greeted().cut(&beat(), 30).turn(&AGAIN).says(&hello(1)).cut(&critical(9, Wish::None), 9).says(&beat());
    let outcome = FromGuest::Outcome { ask: 7, result: Err("busy".to_owned()) };
    let junk = Told::default().junk(b"MSGU, but no header of it").says(&outcome).junk(&[0x55; 64]).says(&hello(1));
    let bytes = [encode(&hello(1)).unwrap(), encode(&beat()).unwrap(), vec![0; 5]].concat();
    vec![
        ("alone", alone.0),
        ("asked", asked.0),
        ("bad", bad.0),
        ("bytes", bytes),
        ("counted", counted.0),
        ("junk", junk.0),
        ("moves", moves.0),
        ("resets", resets.0),
        ("rules", rules.0),
        ("torn", torn.0),
        ("votes", votes.0),
    ]
}

fn told_by_hosts() -> Vec<(&'static str, Vec<u8>)> {
    let hello = ToGuest::Hello(HostHello { protocol: 1, vm: "web".to_owned() });
    let answer = ToGuest::Answer { id: ReportId([0; 16]), verdict: Verdict::Done, why: "reset".to_owned() };
    let ask = |order| ToGuest::Ask { ask: 3, order };
    let greeted = || Told::default().says(&hello);
    let answered =
        greeted().turn(&[5, 3, 2]).turn(&[6, 1, 0]).turn(&[6, 1, 1]).waits(700).turn(&[6, 0, 2]).says(&answer);
    let full = [2, 0, 2, 1, 0].iter().fold(greeted(), |told, severity| told.turn(&[5, 60, *severity]).waits(1));
    let full = full.waits(10).turn(&[5, 9, 1]).waits(200).says(&hello).waits(20);
    let orders =
        greeted().says(&ask(Order::Freeze { within_s: 9 })).says(&ask(Order::Thaw)).says(&ask(Order::ShutDown));
    let torn =
        greeted().cut(&answer, 25).says(&hello).turn(&[7]).cut(&ask(Order::Reboot), 10).says(&hello).says(&hello);
    let later = greeted().turn(&[1, 0x90]).piece(b"of a later version").says(&hello);
    let junk = Told::default().junk(&[0x55; 300]).says(&hello).junk(b"MSGU").says(&hello);
    vec![
        ("answered", answered.0),
        ("full", full.0),
        ("junk", junk.0),
        ("later", later.0),
        ("orders", orders.0),
        ("torn", torn.0),
    ]
}
