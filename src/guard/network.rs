//! The thread that beats on the network: one sealed datagram per period on every path.
//!
//! With the agent dead it goes on with what the agent said last, flagged. It never waits for a socket.
//!
//! Deliberately not here: receiving (the agent does that), datastores.

use std::sync::Arc;

use super::shared::Shared;
use crate::core::timing::LOOK_EVERY;
use crate::exec::clock;
use crate::exec::net::BeatSender;
use crate::types::guard::{BeatKey, GuardConfig, GuardReport};
use crate::types::{DatastoreId, Incarnation, NetBeat};
use crate::wire::seal::Sealer;

/// What must be made anew when the configuration or the incarnation changes.
struct Paths {
    config: Arc<GuardConfig>,
    incarnation: Incarnation,
    sender: BeatSender,
    sealer: Sealer,
}

/// Runs for ever.
pub fn run(shared: &Shared) {
    let mut paths: Option<Paths> = None;
    loop {
        let began = clock::now();
        let beat = shared.with(super::state::State::net_beat);
        let period = match &beat {
            Some((_, config)) => config.timing.beat,
            None => shared
                .with(|state, _| state.config.as_ref().map(|(_, config)| config.timing.beat))
                .map_or(LOOK_EVERY * 4, |beat| beat.min(LOOK_EVERY * 4)),
        };
        if let Some((beat, config)) = beat {
            send(shared, &mut paths, &beat, config);
        }
        shared.with(|state, now| {
            let homes: Vec<DatastoreId> = state.stores.keys().copied().collect();
            homes.into_iter().for_each(|home| state.report_lease(home, now));
        });
        shared.wait(began + period, |_| false);
    }
}

fn send(shared: &Shared, paths: &mut Option<Paths>, beat: &NetBeat, config: Arc<GuardConfig>) {
    let fits = |paths: &Paths| Arc::ptr_eq(&paths.config, &config) && paths.incarnation == beat.incarnation;
    if !paths.as_ref().is_some_and(fits) {
        let Some(key) = config.keys.first() else { return };
        *paths = Some(open(shared, key, beat, &config));
    }
    let Some(paths) = paths else { return };
    let troubles = paths.sender.send(&paths.sealer.seal_beat(beat));
    shared.with(|state, _| {
        troubles.into_iter().for_each(|trouble| state.alarm(trouble));
        state.report(GuardReport::Beaten { counter: beat.counter });
    });
}

fn open(shared: &Shared, key: &BeatKey, beat: &NetBeat, config: &Arc<GuardConfig>) -> Paths {
    let (sender, troubles) = BeatSender::open(&config.interfaces, &config.peers);
    shared.with(|state, _| troubles.into_iter().for_each(|trouble| state.alarm(trouble)));
    let sealer = Sealer::new(key, config.cluster, config.host, beat.incarnation);
    Paths { config: Arc::clone(config), incarnation: beat.incarnation, sender, sealer }
}
