//! A guest fails, and says nothing; what is kept of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{
    HEARD, NAME, ORDER, Talker, Talkers, USUAL, clear, demand, often, remedies, reset_after, reset_after_a_look,
    set_policy,
};
use crate::agents;
use crate::cases::Ground;
use crate::cases::failures::{self, Class, Failure};
use crate::guest::Talking;
use crate::host::Host;
use crate::judge::Moment;
use crate::lab::wait;
use crate::storage::Fault;

/// To the reset of one whose kernel has told that it panicked.
const PANIC: Duration = Duration::from_secs(1);
/// Without beats and I/O, by the policy of these cases; and how much later the reset may come.
const SILENCE: Duration = Duration::from_secs(4);
const LATER: Duration = Duration::from_secs(2);
/// Times that a case can wait for. On a machine that is overloaded a guest needs more than a silence to boot: it would be reset
/// again and again with less uptime.
const SOON: &str = "[[monitor]]\nsilence_s = 4\nio_s = 4\nuptime_s = 8\n";
/// So long after a failure a further one is kept, and the guest is up for long enough.
const APART: Duration = Duration::from_secs(10);
/// By these nothing is taken for silence in this case's time; and what a panic on a console takes to be seen and to stand: the whole
/// I/O window, since a CPU that spins does not get all of its time on a busy machine.
const PATIENT: &str = "[[monitor]]\nsilence_s = 120\nio_s = 6\nuptime_s = 1\n";
const CONSOLE: Duration = Duration::from_secs(12);
/// A cluster's own limit, with waits that a case can afford: 1 s, then 2 s.
const THREE: &str = "[limits]\nresets_per_hour = 3\nbackoff_s = 1\n";
const DEVICE: Talking = Talking { panic_device: true, words: "" };

pub fn fail(ground: &mut Ground) -> Result<()> {
    let host = ground.subordinate()?;
    ground.watch()?;
    let talkers = Talkers::begin(ground, &[(NAME, &host)], DEVICE, &often(SOON))?;
    let talker = &talkers.0[0];
    let mut kept = Kept { host, last: 0, at: Instant::now() };
    // Before the panic: where a boot begins is not to be seen on the console of a kernel that is told to be quiet.
    for (order, mark) in [("spin", "spinning"), ("hang", "hanging")] {
        kept.will_be();
        let look = || if order == "spin" { spins_deaf(talker) } else { Ok(()) };
        let took = reset_after_a_look(ground, (order, mark), talker, talker, look)?;
        ground.within(&format!("reset of one that is {mark}"), took, SILENCE + LATER)?;
        kept.hang(mark)?;
    }
    kept.will_be();
    let mut took = reset_after(ground, "crash", "crashing", talker, talker)?;
    ground.within("reset after a panic that was told", took, PANIC)?;
    kept.panic()?;
    dumped(ground, talker, &mut kept)?;
    unheard(ground, talker, &mut kept)?;
    mute(ground, talker)?;
    stall(ground, talker)?;
    clear(ground)?;

    let talkers = Talkers::begin(ground, &[(NAME, &host)], Talking::default(), &often(SOON))?;
    kept.at = Instant::now();
    kept.will_be();
    took = reset_after(ground, "crash", "crashing", &talkers.0[0], &talkers.0[0])?;
    ground.within("reset after a panic that nobody tells", took, SILENCE + LATER)?;
    kept.panic()?;
    // Its screen is blank: only its serial console tells before its silence would.
    set_policy(&host, &often(PATIENT))?;
    kept.will_be();
    took = reset_after(ground, "crash", "crashing", &talkers.0[0], &talkers.0[0])?;
    ground.within("reset after a panic that only the console shows", took, CONSOLE)?;
    kept.panic()?;
    clear(ground)
}

/// Its CPU runs, always at the same place, with its interrupts off.
fn spins_deaf(talker: &Talker) -> Result<()> {
    const INTERRUPTS: u64 = 1 << 9;
    let registers = || -> Result<(u64, u64, u64)> {
        let ask = ["virsh", "-q", "qemu-monitor-command", talker.name(), "--hmp", "info registers"];
        let text = agents::ask(&talker.host, ORDER, &ask)?;
        let register = |name: &str| {
            let mut words = text.split_whitespace();
            let value =
                words.find_map(|word| word.strip_prefix(name)).with_context(|| format!("no {name} in {text}"))?;
            u64::from_str_radix(value, 16).with_context(|| format!("{name}{value}"))
        };
        Ok((register("RIP=")?, register("RFL=")?, register("HLT=")?))
    };
    // Linux needs a moment for its devices after its last word.
    let at = wait(Duration::from_secs(2), "its interrupts to be off", || {
        let (at, flags, halted) = registers()?;
        Ok((flags & INTERRUPTS == 0 && halted == 0 && registers()?.0 == at).then_some(at))
    })?;
    demand(registers()?.0 == at, "it went on")
}

/// It panics while there is no agent of its host.
fn unheard(ground: &mut Ground, talker: &Talker, kept: &mut Kept) -> Result<()> {
    kept.will_be();
    let (boots, marks) = (talker.console.count("up "), talker.console.count("crashing"));
    agents::ask(&talker.host, ORDER, &["systemctl", "stop", "mainstayd.service"])?;
    talker.tell(ground, "crash")?;
    talker.console.wait_more("crashing", marks)?;
    std::thread::sleep(Duration::from_secs(1));
    agents::ask(&talker.host, ORDER, &["systemctl", "start", "mainstayd.service"])?;
    let began = Instant::now();
    talker.console.wait_more("up ", boots)?;
    ground.figure(format!(
        "panicked without an agent: booted {:.1} s after that one's start",
        began.elapsed().as_secs_f64()
    ));
    talker.console.wait_more_after("up ", HEARD)?;
    let system = kept.panic()?.system;
    demand(system.ends_with("(by its definition)"), &format!("nobody has told this agent that it is {system}"))
}

/// Its memory is kept before it is reset, once in a while.
fn dumped(ground: &mut Ground, talker: &Talker, kept: &mut Kept) -> Result<()> {
    set_policy(&talker.host, &often(&format!("{SOON}dump = true\n")))?;
    for is_first in [true, false] {
        kept.will_be();
        let took = reset_after(ground, "crash", "crashing", talker, talker)?;
        let dump = kept.panic()?.dump;
        if !is_first {
            demand(dump == "not-wanted", &format!("its memory was kept twice: {dump}"))?;
            continue;
        }
        let path = dump["kept"]["path"].as_str().with_context(|| format!("its memory is not kept: {dump}"))?;
        let path = talker.host.root_inside()?.join(path.trim_start_matches('/'));
        let memory = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        demand(memory.starts_with(b"makedumpfile"), "its memory is no kdump")?;
        demand(dump["kept"]["bytes"] == memory.len(), &format!("{} bytes, not {dump}", memory.len()))?;
        let mode = fs::metadata(&path)?.permissions().mode();
        demand(mode & 0o7777 == 0o600, &format!("others may read it: {mode:o}"))?;
        ground.figure(format!("{} KiB of memory kept; from the panic to the remedy {took:?}", memory.len() >> 10));
    }
    set_policy(&talker.host, &often(SOON))
}

/// Of a kernel that panics in each boot.
pub fn panics_always(ground: &mut Ground) -> Result<()> {
    const RESETS: usize = 3;
    const QUIET: Duration = Duration::from_secs(15);
    let host = ground.subordinate()?;
    ground.watch()?;
    let began = Moment::now();
    let always = Talking { panic_device: true, words: "panics" };
    // Of its own for each run: what was done to another one within the hour counts.
    let name = format!("panics-{}", agents::clock_of_day_ms());
    let talkers = Talkers::begin(ground, &[(&name, &host)], always, &format!("{USUAL}{THREE}"))?;
    let given_up = |note: &agents::Note| note.kind == "guest-needs-attention" && note.vm.as_ref() == Some(&name);
    let note = ground.wait_note(began, "needing attention", ORDER, given_up)?;
    demand(note.level == "alarm", "it was to be an alarm")?;
    // More than all that would come: each boot takes a few seconds, each wait less than five.
    std::thread::sleep(QUIET);
    let (count, boots) = (remedies(ground, began, &name), talkers.0[0].console.count("up "));
    demand(count == RESETS, &format!("{count} resets, not {RESETS}"))?;
    demand(boots == RESETS + 1, &format!("{boots} boots, not {}", RESETS + 1))?;
    let notes = agents::all_notes(&ground.hosts_on(), Moment::now().since(began));
    let told = notes.iter().filter(|note| began <= note.at() && given_up(note)).count();
    demand(told == 1, &format!("told {told} times that it needs attention"))?;
    ground.figure(format!("{count} resets, {boots} boots, then told once"));
    clear(ground)
}

/// The agent is dead, the guest works: told, and nothing else.
fn mute(ground: &Ground, talker: &Talker) -> Result<()> {
    let (began, marks) = (Moment::now(), talker.console.count("muted"));
    talker.tell(ground, "mute")?;
    talker.console.wait_more("muted", marks)?;
    let told = |note: &agents::Note| note.kind == "guest-agent-silent" && note.vm.as_deref() == Some(NAME);
    ground.wait_note(began, "its silence", ORDER, told)?;
    std::thread::sleep(SILENCE * 2);
    demand(remedies(ground, began, NAME) == 0, "it works, and was reset")?;
    // Only a new boot brings the agent back.
    let heard = talker.console.count(HEARD);
    agents::ask(&talker.host, ORDER, &["virsh", "-q", "reset", NAME])?;
    talker.console.wait_more(HEARD, heard).map(drop)
}

/// The storage of its host stalls: that is not the guest's fault.
fn stall(ground: &Ground, talker: &Talker) -> Result<()> {
    let mut reach = ground.guests_on(&talker.host)?;
    reach.push(NAME.to_owned());
    let began = ground.fault("its storage stalls", &reach)?;
    ground.lab().storage()?.fault(&talker.host.name(), Fault::Hang)?;
    std::thread::sleep(SILENCE * 4);
    ground.lab().storage()?.fault(&talker.host.name(), Fault::None)?;
    std::thread::sleep(SILENCE * 2);
    demand(remedies(ground, began, NAME) == 0, "its storage stalled, and it was reset")
}

// ---- what is kept ---------------------------------------------------------------------------------------------------

/// One guest's failures.
struct Kept {
    host: Host,
    /// The number of the last that was looked at.
    last: u32,
    /// When that was, or when the guest was started.
    at: Instant,
}

impl Kept {
    /// Waits as long as a further failure would not be kept, or not be acted on.
    fn will_be(&self) {
        std::thread::sleep(APART.saturating_sub(self.at.elapsed()));
    }

    /// The newest, once its remedy is over and all is there that comes after it. It has to be whole.
    fn newest(&mut self) -> Result<Failure> {
        let newest = wait(ORDER, "the failure's record to be complete", || {
            let newest = failures::of(&self.host, NAME)?.pop().context("no failure is kept")?;
            if newest.number <= self.last || newest.outcome != "done" || newest.files.len() < 5 {
                bail!("{newest:?}");
            }
            Ok(Some(newest))
        })?;
        (self.last, self.at) = (newest.number, Instant::now());
        is_whole(&newest)?;
        Ok(newest)
    }

    fn panic(&mut self) -> Result<Failure> {
        const REASON: &str = "Kernel panic - not syncing: sysrq triggered crash";
        let failure = self.newest()?;
        let Class { family, kind, line } = &failure.class;
        let right = (family.as_str(), kind.as_str()) == ("linux", "panic") && line.contains(REASON);
        demand(right, &format!("it was a Linux panic, not {:?}", failure.class))?;
        demand(self.text(&failure, "console.log")?.contains(REASON), "the console does not hold the reason")?;
        Ok(failure)
    }

    /// Nothing is to be seen on its screen, and its console ends with the mark.
    fn hang(&mut self, mark: &str) -> Result<()> {
        let failure = self.newest()?;
        demand(failure.class.kind == "unknown", &format!("it only hung: {:?}", failure.class))?;
        let console = self.text(&failure, "console.log")?;
        demand(console.trim_end().ends_with(mark), "the console does not end where the guest did")
    }

    fn text(&self, failure: &Failure, file: &str) -> Result<String> {
        let show = ["mainstay", "--json", "vm", "failures", NAME, "--show", &failure.number.to_string()];
        let text = agents::ask(&self.host, agents::ANSWER, &show)?;
        let answer: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("reading {text}"))?;
        Ok(answer["texts"][file].as_str().with_context(|| format!("no {file} in {text}"))?.to_owned())
    }
}

/// What there has to be of any guest that still has its QEMU.
fn is_whole(failure: &Failure) -> Result<()> {
    for file in ["console", "messages", "picture", "screen", "statistics"] {
        let kept = failure.files.iter().find(|kept| kept.file == file);
        demand(kept.is_some_and(|kept| 0 < kept.bytes), &format!("no {file} is kept: {failure:?}"))?;
    }
    demand(!failure.system.is_empty(), &format!("its system is not kept: {failure:?}"))
}
