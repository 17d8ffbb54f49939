//! What each order of the agent does.
//!
//! A row is kept in `/run` before its order is answered: so there is no moment in which a claim may exist whose VM a
//! dying guard would leave behind unstopped.
//!
//! Deliberately not here: framing and connections (`socket`).

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::renew::Renew;
use super::shared::Shared;
use super::state::State;
use super::table::Expected;
use crate::core::timing;
use crate::types::guard::{GUARD_PROTOCOL, GuardConfig, GuardOrder, Refusal};
use crate::types::{Attestation, Counter, DatastoreId, Incarnation, MAX_DATASTORES, Tenure, Time};

/// Carries one order out.
///
/// # Errors
/// Why not; nothing was changed then, unless the refusal says that something was barred.
pub fn obey(shared: &Arc<Shared>, order: GuardOrder) -> Result<(), Refusal> {
    match order {
        GuardOrder::Hello { protocol } => hello(shared, protocol),
        GuardOrder::Configure(config) => configure(shared, *config),
        GuardOrder::Beat(beat) => shared.with(|state, now| {
            state.agent_beat(*beat, now);
            Ok(())
        }),
        GuardOrder::Expect { tenure, name, home, epoch, deadline, purpose, writes } => {
            row(shared, tenure, |state, now| {
                let present = state.epoch(home, now)?;
                if present != epoch {
                    return Err(Refusal::EpochChanged { now: present });
                }
                state.table.expect(Expected { tenure, name, home, epoch, deadline, purpose, writes })
            })
        }
        GuardOrder::Incoming { tenure, name, home, deadline } => row(shared, tenure, |state, now| {
            let epoch = state.epoch(home, now)?;
            state.table.incoming(tenure, name, home, epoch, deadline)
        }),
        GuardOrder::Claimed { tenure, epoch, deadline } => change(shared, |state, now| {
            let home = state.table.home(tenure).ok_or_else(|| unknown("it was never expected"))?;
            let present = state.epoch(home, now)?;
            if present != epoch {
                return Err(Refusal::EpochChanged { now: present });
            }
            state.table.claimed(tenure, present, deadline, now)
        }),
        GuardOrder::Abandon { tenure } => change(shared, |state, _| state.table.abandon(tenure)),
        GuardOrder::Forget { tenure } => change(shared, |state, _| state.table.forget(tenure)),
        GuardOrder::HandOver { tenure, to } => change(shared, |state, _| state.table.hand_over(tenure, to)),
        GuardOrder::Kill { tenure, seen } => change(shared, |state, _| {
            state.table.kill(
                tenure,
                seen,
                &format!("the agent read claim {seen}, which ends generation {}", tenure.generation),
            )
        }),
        GuardOrder::Receive { tenure, name, home, deadline } => row(shared, tenure, |state, now| {
            let epoch = state.epoch(home, now)?;
            state.table.receive(tenure, name, home, epoch, deadline)
        }),
        GuardOrder::Switched { tenure } => change(shared, |state, _| state.table.switched(tenure)),
        GuardOrder::Discard { tenure } => change(shared, |state, _| state.table.discard(tenure)),
        GuardOrder::Found { tenure, pid } => found(shared, tenure, pid),
        GuardOrder::Attest { datastore, attestations } => {
            shared.with(|state, now| attest(state, datastore, attestations, now))?;
            shared.wake_all(); // The datastore's thread hurries.
            Ok(())
        }
        GuardOrder::Distrust { datastore, why } => {
            shared.with(|state, now| state.distrust(datastore, &why, now));
            shared.wake_all();
            Ok(())
        }
        GuardOrder::Attested { datastore, incarnation, counter } => {
            shared.with(|state, now| attested(state, datastore, incarnation, counter, now))
        }
    }
}

fn unknown(why: &str) -> Refusal {
    Refusal::WrongState(why.to_owned())
}

fn hello(shared: &Shared, protocol: u16) -> Result<(), Refusal> {
    shared.with(|state, now| state.greet(now));
    if protocol == GUARD_PROTOCOL { Ok(()) } else { Err(Refusal::Version(GUARD_PROTOCOL)) }
}

fn configure(shared: &Arc<Shared>, config: GuardConfig) -> Result<(), Refusal> {
    check(&config)?;
    shared.with(|state, _| fits(state, &config))?;
    shared.name(&config).map_err(|error| Refusal::WrongState(format!("the host's id cannot be kept: {error}")))?;
    let before = shared.with(|state, now| {
        let before: BTreeSet<DatastoreId> = state.stores.keys().copied().collect();
        state.configure(config, now);
        before
    });
    begin(shared, |id| !before.contains(id))?;
    shared.wake_all();
    Ok(())
}

/// Starts the threads of those datastores.
///
/// # Errors
/// When there is no thread for one: it is not used then.
pub fn begin(shared: &Arc<Shared>, which: impl Fn(&DatastoreId) -> bool) -> Result<(), Refusal> {
    let new = shared.with(|state, _| {
        let new = state.stores.iter().filter(|(id, _)| which(id));
        new.map(|(id, store)| (*id, store.life, PathBuf::from(&store.path))).collect::<Vec<_>>()
    });
    for (id, life, path) in new {
        let renew = Renew::new(Arc::clone(shared), id, life, path);
        if let Err(error) = super::spawn("datastore", move || renew.run()) {
            shared.with(|state, _| {
                state.stores.remove(&id);
            });
            return Err(Refusal::WrongState(format!("no thread for datastore {id}: {error}")));
        }
    }
    Ok(())
}

/// What can be seen of a configuration alone.
fn check(config: &GuardConfig) -> Result<(), Refusal> {
    timing::check(&config.timing).map_err(|contradiction| Refusal::WrongState(contradiction.to_string()))?;
    let ids: BTreeSet<_> = config.datastores.iter().map(|datastore| datastore.id).collect();
    let positions: BTreeSet<_> = config.datastores.iter().map(|datastore| datastore.position).collect();
    let count = config.datastores.len();
    if ids.len() != count || positions.len() != count {
        return Err(unknown("a datastore or a position stands twice in the configuration"));
    }
    if positions.last().is_some_and(|position| MAX_DATASTORES <= usize::from(*position)) {
        return Err(unknown("a datastore's position is above 63"));
    }
    if config.keys.is_empty() {
        return Err(unknown("the configuration has no beat key"));
    }
    Ok(())
}

/// What a configuration must not change while the guard runs.
fn fits(state: &State, config: &GuardConfig) -> Result<(), Refusal> {
    let Some((_, old)) = &state.config else { return Ok(()) };
    if (old.cluster, old.host, old.index) != (config.cluster, config.host, config.index) {
        return Err(unknown("another cluster or host: stop this host's VMs and restart mainstay-guard"));
    }
    for (id, store) in &state.stores {
        let new = config.datastores.iter().find(|datastore| datastore.id == *id);
        if new.is_some_and(|new| new.path != store.path) {
            return Err(unknown("a datastore has another path: restart mainstay-guard"));
        }
        if new.is_none() && state.table.lives_on(*id) {
            return Err(unknown("VMs have their home on a datastore that is missing in the configuration"));
        }
    }
    Ok(())
}

/// An order that makes a row: it must be kept before it is answered.
fn row(
    shared: &Shared,
    tenure: Tenure,
    make: impl FnOnce(&mut State, Time) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let stood = shared.with(|state, now| {
        let Some(_) = &state.config else { return Err(Refusal::Unconfigured) };
        let stood = state.table.knows(tenure);
        make(state, now).map(|()| stood)
    })?;
    shared.keep().map_err(|error| {
        if !stood {
            shared.with(|state, _| state.table.take_back(tenure));
        }
        Refusal::WrongState(format!("{}: the row cannot be kept: {error}", shared.paths.kept.display()))
    })
}

/// An order that changes rows. The watcher keeps them; what is kept errs towards stopping.
fn change(shared: &Shared, work: impl FnOnce(&mut State, Time) -> Result<(), Refusal>) -> Result<(), Refusal> {
    shared.with(|state, now| if state.config.is_none() { Err(Refusal::Unconfigured) } else { work(state, now) })
}

fn found(shared: &Shared, tenure: Tenure, pid: u32) -> Result<(), Refusal> {
    shared.with(|state, _| {
        if !state.table.knows(tenure) {
            return Err(unknown("it was never expected"));
        }
        state.hint(tenure.vm, pid);
        Ok(())
    })?;
    shared.wake_all();
    Ok(())
}

fn attest(state: &mut State, datastore: DatastoreId, attestations: Vec<Attestation>, now: Time) -> Result<(), Refusal> {
    let store = state.stores.get_mut(&datastore).ok_or(Refusal::UnknownDatastore(datastore))?;
    attestations.into_iter().for_each(|attestation| store.attest(attestation, now));
    Ok(())
}

fn attested(
    state: &mut State,
    datastore: DatastoreId,
    incarnation: Incarnation,
    counter: Counter,
    now: Time,
) -> Result<(), Refusal> {
    if !state.stores.contains_key(&datastore) {
        return Err(Refusal::UnknownDatastore(datastore));
    }
    if incarnation == state.incarnation {
        state.persisted(datastore, counter, now);
        state.report_lease(datastore, now); // The agent's doubt goes by it.
    }
    Ok(())
}
