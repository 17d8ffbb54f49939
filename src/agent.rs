//! The agent's loop: wait, step, save, do. Joins core, executors and answers; decides nothing.
//!
//! ```text
//!   beats ─┐                                              ┌─ guard, datastores, libvirt, other agents
//!   guard ─┤            ┌──────┐  save, then actions      ├─ storage fence, image locks
//!   libvirt┼─► events ─►│ core │ ────────────────────────►┼─ answers to people, agents and the hook
//!   asks ──┤            └──────┘                          └─ notes: log, D-Bus, event list
//!   timers ┘
//! ```
//!
//! The queue of events is bounded by what is under way: each answer belongs to a question, and questions are bounded by
//! the core; beats beyond `MAX_QUEUED` are dropped, since a newer one follows.

mod answers;
mod devices;
mod ending;
mod executors;
mod facts;
mod failures;
mod guests;
mod ports;
mod pump;
mod underway;

use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, mpsc};
use tokio::time::MissedTickBehavior;

use crate::api::dbus::{self, ASKS_WAITING, AskMessage, Bus};
use crate::config::Config;
use crate::core::event::{Event, Listed};
use crate::core::{Core, Me};
use crate::exec::cluster::Cluster;
use crate::exec::recorder::{Recorder, shelf};
use crate::exec::{clock, libvirt, notes::NoteBook};
use crate::types::guard::GuardReport;
use crate::types::view::{ClusterView, VIEW_SCHEMA};
use crate::types::{BootId, Time};

use answers::Answers;
use ending::Ending;
use executors::Executors;
use guests::GuestSide;

/// Beats that may wait; more are dropped.
const MAX_QUEUED: usize = 4096;
/// How often memory is looked at.
const CAPACITY_PERIOD: Duration = Duration::from_secs(5);
/// How exactly the end of a disarmed time is kept.
const DAY_PERIOD: Duration = Duration::from_secs(2);

/// Where executors put what happened.
pub(crate) type Events = mpsc::UnboundedSender<Event>;

/// Runs the agent until it is told to end.
///
/// # Errors
/// When membership cannot be read, or the port for orders is taken.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let (asks, asked) = mpsc::channel(ASKS_WAITING);
    match Cluster::load(&config.paths.state).context("reading this host's membership")? {
        Some(cluster) => member(config, cluster, asks, asked).await,
        None => stranger(asks, asked).await,
    }
}

/// No member yet: answers people with that, and waits to be restarted by `mainstay cluster init` or `join`.
async fn stranger(asks: mpsc::Sender<AskMessage>, mut asked: mpsc::Receiver<AskMessage>) -> anyhow::Result<()> {
    tracing::info!("this host is no member of a cluster; run 'mainstay cluster init' or 'mainstay cluster join TOKEN'");
    let (_notes, receiver) = broadcast::channel(1);
    let serving = tokio::spawn(dbus::serve(Bus::System, asks, receiver));
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut watchdog = watchdog();
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = watchdog.tick() => { let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]); }
            message = asked.recv() => match message {
                Some(message) => answers::as_stranger(message, ClusterView { schema: VIEW_SCHEMA, ..ClusterView::default() }),
                None => break,
            },
        }
    }
    serving.abort();
    Ok(())
}

async fn member(
    config: Config,
    cluster: Cluster,
    asks: mpsc::Sender<AskMessage>,
    mut asked: mpsc::Receiver<AskMessage>,
) -> anyhow::Result<()> {
    let here = config.here().context("finding out who this host is on the network")?;
    let (events, mut happened) = mpsc::unbounded_channel();
    let notes = NoteBook::open(&config.paths.state.join("store"));
    let serving = tokio::spawn(dbus::serve(Bus::System, asks, notes.subscribe()));
    let boot = clock::boot_id().context("reading the kernel's boot id")?;
    let (mut guests, to_guests) = GuestSide::new(&config.paths.state, boot).context("remembering guests")?;
    let answers = Answers::new(cluster.clone(), notes, to_guests, &config.paths.state);
    let mut core = Core::new(me(&config, &cluster, boot), cluster.settings.clone());
    let verdicts = config.paths.state.join("verdicts");
    let mut recorder = Recorder::new(&here.name, clock::unix_ms, shelf::open(verdicts.clone()));
    let mut executors = Executors::start(&config, &here, &cluster, &answers, events.clone()).await?;
    executors.carry_out(core.start(clock::now()), None);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let (mut watchdog, mut capacity) = (watchdog(), tokio::time::interval(CAPACITY_PERIOD));
    let mut day = tokio::time::interval(DAY_PERIOD);
    let mut ending = Ending::new()?;
    while !ending.is_over(guests.would_be_cut_off()) {
        let event = tokio::select! {
            biased;
            () = ending.told() => {
                guests.leave(&core, &executors);
                continue;
            }
            // What happened comes before what is due: after a stall of ours, beats that wait are no silence.
            Some(event) = happened.recv() => event,
            () = sleep_until(core.next_due()) => Event::Due,
            _ = day.tick() => Event::Day(clock::unix_ms()),
            _ = capacity.tick() => Event::Capacity(libvirt::capacity(guests.qemus())),
            Some(message) = asked.recv() => match answers.person(message, &core, &executors) {
                Some(event) => event,
                None => continue,
            },
            _ = watchdog.tick() => {
                feed(&answers);
                continue;
            }
            next = guests.next() => { // Last: guests that talk without end hold up nobody else.
                guests.step(next, &core, &executors);
                continue;
            }
        };
        if matches!(event, Event::Heard(_)) && MAX_QUEUED < happened.len() {
            continue;
        }
        if let Event::Guard(GuardReport::Hello { incarnation, .. }) = &event {
            executors.own(*incarnation);
        }
        guests.look(&event, &core, &executors);
        recorder.keep_up(&mut core, clock::now());
        let output = recorder.step(&mut core, clock::now(), without_xml(event));
        executors.carry_out(output, recorder.making().map(|id| shelf::path(&verdicts, id)));
    }
    tracing::info!("ending; VMs and the guard go on");
    guests.flush().await;
    serving.abort();
    Ok(())
}

/// Who the core is from now on.
fn me(config: &Config, cluster: &Cluster, boot: BootId) -> Me {
    Me {
        host: cluster.host,
        boot,
        started: clock::now(),
        nonce_seed: clock::nonce().0,
        ticket_seed: clock::unix_ms().wrapping_mul(1_000_000),
        underway: underway::read(&config.paths.run),
    }
}

/// The core has what definitions mean; their texts were for the guests' part.
fn without_xml(mut event: Event) -> Event {
    if let Event::Listed(domains) = &mut event {
        for Listed { domain, .. } in domains {
            (domain.xml, domain.live_xml) = (None, None);
        }
    }
    event
}

/// The loop goes on.
fn feed(answers: &Answers) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    for line in answers.poll_notes() {
        tracing::warn!("{line}");
    }
}

/// A third of systemd's patience; without one, a minute for what else hangs on it.
fn watchdog() -> tokio::time::Interval {
    let patience = sd_notify::watchdog_enabled().unwrap_or(Duration::from_secs(30));
    let mut ticks = tokio::time::interval((patience / 3).max(Duration::from_millis(100)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn sleep_until(at: Option<Time>) {
    match at {
        Some(at) => tokio::time::sleep(at.since(clock::now())).await,
        None => std::future::pending().await,
    }
}
