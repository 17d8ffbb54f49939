//! The guard's threads of the datastores: open, look on, beat, count what was persisted.

use super::faults::Deed;
use super::files::content;
use super::guard::Renew;
use super::world::{Gate, H, World};
use mainstay::core::timing;
use mainstay::exec::datastore::Stamp;
use mainstay::exec::datastore::slots::{Book, Doubt};
use mainstay::guard::ends;
use mainstay::guard::state::Taken;
use mainstay::guard::store::Stage;
use mainstay::types::*;

impl World {
    pub(super) fn renew(&mut self, h: H, home: DatastoreId) -> Option<&mut Renew> {
        self.hosts[h].guard.as_mut()?.renew.get_mut(&home)
    }

    /// The table changed: beat sooner, if what lies there differs.
    pub(super) fn hurry(&mut self, h: H) {
        let Some(guard) = &self.hosts[h].guard else { return };
        let Some(timing) = guard.state.config.as_ref().map(|(_, config)| config.timing) else { return };
        let differs = |home: &DatastoreId, renew: &Renew| {
            let list = guard.state.table.list(*home);
            let owes = guard.state.stores.get(home).is_some_and(|store| store.owes());
            owes || renew.listed.as_ref().is_none_or(|(_, listed, _)| *listed != list)
        };
        let idle = guard.renew.iter().filter(|(_, renew)| !renew.busy && renew.opened);
        let unverified = |home: &DatastoreId| guard.state.stores.get(home).is_some_and(|store| store.unverified);
        let pace = |(home, renew): (&DatastoreId, &Renew)| {
            if unverified(home) {
                return Some((*home, renew.began));
            }
            let pause = match (guard.state.table.drains_on(*home), differs(home, renew)) {
                (true, _) => timing::SHORTEST_PERIOD,
                (false, true) => timing::hurried_renew(&timing),
                (false, false) => return None,
            };
            Some((*home, renew.began + pause.as_nanos() as u64))
        };
        let turns: Vec<(DatastoreId, u64)> = idle.filter_map(pace).collect();
        for (home, at) in turns {
            self.turn_at(h, home, at);
        }
    }

    pub(super) fn turn_at(&mut self, h: H, home: DatastoreId, at: u64) {
        let wake = self.new_life();
        let Some(life) = self.hosts[h].guard.as_ref().map(|guard| guard.life) else { return };
        let Some(renew) = self.renew(h, home) else { return };
        renew.wake = wake;
        self.at(Gate::Guard(h, life), at, move |world| {
            if world.renew(h, home).is_some_and(|renew| renew.wake == wake) {
                world.turn(h, home);
            }
        });
    }

    pub(super) fn turn(&mut self, h: H, home: DatastoreId) {
        let now = self.now;
        let facts = self.with_guard(h, |state, _| state.stores.get(&home).map(|store| (store.stage, store.unverified)));
        let Some((stage, unverified)) = facts.flatten() else { return };
        let Some(renew) = self.renew(h, home) else { return };
        if renew.busy {
            return;
        }
        renew.busy = true;
        renew.began = now;
        match (renew.opened, stage) {
            _ if unverified => self.verify_there(h, home),
            (false, _) | (true, Stage::Opening) => self.open_beats(h, home),
            (true, Stage::Watching) => self.look_on(h, home),
            (true, Stage::Beating) => self.beat_there(h, home),
        }
    }

    /// The turn is over: the next comes after `renew`, sooner if the rows have changed meanwhile.
    pub(super) fn turned(&mut self, h: H, home: DatastoreId, trouble: Option<String>) {
        if let Some(text) = trouble {
            self.with_guard(h, |state, now| {
                if let Some(store) = state.stores.get_mut(&home) {
                    store.trouble = Some(text);
                }
                state.report_lease(home, now);
            });
        }
        let Some(guard) = &self.hosts[h].guard else { return };
        let Some(timing) = guard.state.config.as_ref().map(|(_, config)| config.timing) else { return };
        let Some(renew) = self.renew(h, home) else { return };
        renew.busy = false;
        let next = renew.began + timing.renew.as_nanos() as u64;
        self.turn_at(h, home, next);
        self.hurry(h);
    }

    pub(super) fn again_at_once(&mut self, h: H, home: DatastoreId) {
        if let Some(renew) = self.renew(h, home) {
            renew.busy = false;
        }
        let now = self.now;
        self.turn_at(h, home, now);
    }

    pub(super) fn guard_gate(&self, h: H) -> Gate {
        Gate::Guard(h, self.hosts[h].guard.as_ref().map_or(0, |guard| guard.life))
    }

    pub(super) fn open_beats(&mut self, h: H, home: DatastoreId) {
        let (me, index, boot) = (self.hosts[h].id, self.hosts[h].index, self.hosts[h].boot());
        let gate = self.guard_gate(h);
        let read = move |world: &mut World| {
            let (store, now) = (&world.stores[&home], world.local(h));
            let guard = world.hosts[h].guard.as_ref();
            let kept = guard.and_then(|guard| guard.state.stores.get(&home)?.slots.as_ref());
            (store.own(me), store.attestations_of(index, me), store.book(me, boot, kept, now))
        };
        self.io(h, home, gate, Deed::Read, 2000, read, move |world, result| match result {
            Err(why) => world.turned(h, home, Some(why)),
            Ok((own, attested, book)) => world.opened(h, home, own, attested, book),
        });
    }

    pub(super) fn opened(
        &mut self,
        h: H,
        home: DatastoreId,
        own: (Digest, Option<BeatBlock>),
        attested: Vec<Attestation>,
        book: Book,
    ) {
        let (bytes, newest) = own;
        let Some(ours) = self.hosts[h].guard.as_ref().map(|guard| guard.state.last_given()) else { return };
        let mut shown: Vec<(Incarnation, Counter)> = attested.iter().map(|a| (a.incarnation, a.counter)).collect();
        shown.extend(newest.as_ref().map(|beat| (beat.incarnation, beat.counter)));
        if let Some((above, _)) = shown.into_iter().max().filter(|shown| ours < *shown) {
            self.rise(h, above);
            return self.again_at_once(h, home);
        }
        if let Some(why) = self.shows_less(h, home, newest.as_ref()) {
            return self.went_back(h, home, why);
        }
        let old = newest.as_ref().map(|beat| beat.attestations.clone()).unwrap_or_default();
        let facts = self.with_guard(h, |state, now| {
            if let Some(store) = state.stores.get_mut(&home) {
                old.into_iter().for_each(|attestation| store.attest(attestation, now));
            }
            let stage = state.stores.get(&home).map(|store| store.stage);
            let lease = state.config.as_ref().map(|(_, config)| config.timing.lease).unwrap_or_default();
            let doubted = state.stores.get(&home).is_some_and(|store| store.doubt.is_some());
            (state.boot, lease, stage, doubted, Counter(0) < state.last_given().1)
        });
        let Some((boot, lease, stage, doubted, beaten)) = facts else { return };
        let foreign = newest.as_ref().map_or(!attested.is_empty(), |beat| beat.boot != boot);
        // As `guard::renew` has it: after the first beat anywhere a watch comes too late.
        let watches = doubted || foreign && !beaten;
        let now = self.local(h);
        let sequence = newest.as_ref().map_or(Sequence(0), |beat| beat.list.sequence);
        let late = newest.as_ref().is_some_and(|beat| beat.flags.unpunctual);
        let longest = newest.iter().map(|beat| beat.lease).chain(attested.iter().map(|a| a.lease)).max();
        let Some(renew) = self.renew(h, home) else { return };
        renew.opened = true;
        renew.book = Some(book);
        renew.sequence = renew.sequence.max(sequence);
        renew.listed = None;
        if stage == Some(Stage::Opening) {
            let next = if watches {
                let window = timing::window(longest.unwrap_or_default().max(lease), late);
                renew.watch = Some(((bytes, attested), now, window));
                Stage::Watching
            } else {
                Stage::Beating
            };
            self.stage(h, home, next);
        }
        self.again_at_once(h, home);
    }

    pub(super) fn stage(&mut self, h: H, home: DatastoreId, stage: Stage) {
        self.with_guard(h, |state, _| {
            if let Some(store) = state.stores.get_mut(&home) {
                store.stage = stage;
            }
        });
    }

    pub(super) fn rise(&mut self, h: H, above: Incarnation) {
        let random = u32::try_from(self.chance(1 << 32)).expect("32 bits");
        let next = mainstay::guard::risen_above(above, random);
        self.hosts[h].incarnation = next;
        self.with_guard(h, |state, _| state.restart(next));
    }

    pub(super) fn look_on(&mut self, h: H, home: DatastoreId) {
        let (me, index) = (self.hosts[h].id, self.hosts[h].index);
        let began = self.local(h);
        let gate = self.guard_gate(h);
        let read = move |world: &mut World| {
            let store = &world.stores[&home];
            (store.own(me).0, store.attestations_of(index, me))
        };
        self.io(h, home, gate, Deed::Read, 2000, read, move |world, result| {
            let seen = match result {
                Err(why) => return world.turned(h, home, Some(why)),
                Ok(seen) => seen,
            };
            let now = world.local(h);
            let Some(renew) = world.renew(h, home) else { return };
            let Some((quiet, since, window)) = &mut renew.watch else {
                world.stage(h, home, Stage::Opening);
                return world.again_at_once(h, home);
            };
            if seen != *quiet {
                (*quiet, *since) = (seen, now);
                return world.turned(h, home, Some("another host beats here under our host id".to_owned()));
            }
            if *window <= began.since(*since) {
                renew.watch = None;
                world.stage(h, home, Stage::Beating);
                return world.again_at_once(h, home);
            }
            world.turned(h, home, None);
        });
    }

    /// Roster and list first, then (c, t_c) and the block, then the roster again.
    pub(super) fn beat_there(&mut self, h: H, home: DatastoreId) {
        let me = self.hosts[h].id;
        let Some(guard) = &self.hosts[h].guard else { return };
        let (incarnation, entries) = (guard.state.incarnation, guard.state.table.list(home));
        let same = guard.renew.get(&home).and_then(|renew| renew.listed.as_ref());
        let new = same.is_none_or(|(of, listed, _)| *of != incarnation || *listed != entries);
        let gate = self.guard_gate(h);
        let list = new.then(|| {
            let renew = self.renew(h, home).expect("its thread runs");
            renew.sequence = renew.sequence.next();
            renew.listed = None;
            VmList { host: me, incarnation, sequence: renew.sequence, entries }
        });
        let written = list.clone();
        let first = move |world: &mut World| {
            let store = world.stores.get_mut(&home).expect("a datastore of the world");
            if !store.roster.names(me) {
                return Ok(None);
            }
            let roster = store.roster.generation;
            if let Some(list) = list {
                let over = list.entries.iter().filter(|entry| matches!(entry.state, VmState::Over(_)));
                let over: Vec<Tenure> = over.map(|entry| entry.tenure).collect();
                store.write_list(me, list);
                over.into_iter().for_each(|tenure| world.says_over(h, tenure));
            }
            if world.lives(gate) { world.compare(h, home).map(|()| Some(roster)) } else { Ok(Some(roster)) }
        };
        self.io(h, home, gate, Deed::Write, 1000, first, move |world, result| match result {
            Err(why) => world.turned(h, home, Some(why)),
            Ok(Err(doubt)) => world.doubts(h, home, doubt),
            Ok(Ok(None)) => world.turned(h, home, Some("its roster does not name this host".to_owned())),
            Ok(Ok(Some(roster))) => {
                if let Some(list) = written {
                    let name = ListName { sequence: list.sequence, digest: mainstay::wire::record::list_digest(&list) };
                    if let Some(renew) = world.renew(h, home) {
                        renew.listed = Some((list.incarnation, list.entries, name));
                    }
                    world.with_guard(h, |state, _| state.listed(name));
                }
                world.take_beat(h, home, roster);
            }
        });
    }

    /// The slots as they lie there against what the guard knows of them.
    fn compare(&mut self, h: H, home: DatastoreId) -> Result<(), Doubt> {
        let host = &mut self.hosts[h];
        let (id, boot) = (host.id, host.boot());
        let Some(guard) = &mut host.guard else { return Ok(()) };
        let book = guard.renew.get_mut(&home).and_then(|renew| renew.book.as_mut());
        let (Some(book), Some(files)) = (book, self.stores[&home].slots.get(&id)) else { return Ok(()) };
        book.compare(&files.slots, guard.state.incarnation, boot)
    }

    /// It contradicts the guard: no beats here any more.
    fn doubts(&mut self, h: H, home: DatastoreId, doubt: Doubt) {
        let text = doubt.to_string();
        if let Doubt::RolledBack { .. } = doubt {
            return self.went_back(h, home, text);
        }
        if !self.stores[&home].lied {
            let name = self.hosts[h].name.clone();
            self.violated(&format!("the guard of {name} doubts a datastore that kept its word: {text}"));
        }
        self.with_guard(h, |state, _| {
            let Some(store) = state.stores.get_mut(&home) else { return };
            store.stage = Stage::Watching;
            if store.doubt.replace(text.clone()).is_none() {
                state.alarm(text.clone());
            }
        });
        self.turned(h, home, Some(text));
    }

    /// It shows less than before: no claims, and beats only after own rows were compared with the claims there.
    fn went_back(&mut self, h: H, home: DatastoreId, why: String) {
        if !self.stores[&home].lied {
            let name = self.hosts[h].name.clone();
            self.violated(&format!("the guard of {name} doubts a datastore that kept its word: {why}"));
        }
        self.with_guard(h, |state, now| state.distrust(home, &why, now));
        self.again_at_once(h, home);
    }

    fn take_beat(&mut self, h: H, home: DatastoreId, roster: u64) {
        let now = self.local(h);
        let Some(renew) = self.renew(h, home) else { return };
        let listed = renew.listed.as_ref().map(|(of, _, name)| (*of, *name));
        let resting = renew.book.as_ref().map(|book| book.resting(now)).unwrap_or_default();
        let taken = self.with_guard(h, |state, now| {
            let (_, config) = state.config.clone()?;
            let store = state.stores.get_mut(&home).filter(|store| !store.unverified)?;
            let (accepted, distrusts) = (store.accepted, store.rolled_back.is_some());
            let attestations = store.attestations(config.index, now);
            let (of, list) = listed.filter(|(of, _)| *of == state.incarnation)?;
            let flags = Flags { distrusts, ..state.flags(now) };
            let taken = state.take(now);
            let block = BeatBlock {
                cluster: config.cluster,
                host: config.host,
                index: config.index,
                boot: state.boot,
                incarnation: of,
                counter: taken.counter,
                taken: taken.at,
                lease: taken.lease,
                flags,
                accepted,
                list,
                resting,
                roster,
                attestations,
            };
            Some((taken, block))
        });
        let Some((taken, block)) = taken.flatten() else { return self.turned(h, home, None) };
        self.given(h, taken);
        self.scratch_first(h, home, taken, block);
    }

    /// A beat that is not newer than what lies there asks for a higher incarnation; after an error the scratch block
    /// comes first.
    fn scratch_first(&mut self, h: H, home: DatastoreId, taken: Taken, block: BeatBlock) {
        let Some(book) = self.renew(h, home).and_then(|renew| renew.book.as_ref()) else { return };
        if let Some(newest) = book.newest().filter(|newest| Stamp::of(&block) <= *newest) {
            self.rise(h, newest.incarnation);
            return self.again_at_once(h, home);
        }
        let times = book.scratches();
        self.scratch(h, home, times, taken, block);
    }

    fn scratch(&mut self, h: H, home: DatastoreId, times: usize, taken: Taken, block: BeatBlock) {
        if times == 0 {
            if let Some(book) = self.renew(h, home).and_then(|renew| renew.book.as_mut()) {
                book.scratched();
            }
            return self.write_slot(h, home, taken, block);
        }
        let (me, gate, there) = (self.hosts[h].id, self.guard_gate(h), block.clone());
        let write = move |world: &mut World| {
            world.stores.get_mut(&home).expect("a datastore of the world").write_beat(me, None, there, 0);
        };
        self.io(h, home, gate, Deed::Write, 1000, write, move |world, result| match result {
            Err(why) => world.turned(h, home, Some(why)),
            Ok(()) => world.scratch(h, home, times - 1, taken, block),
        });
    }

    /// For the next guard of this boot.
    fn remember(&mut self, h: H, home: DatastoreId, writing: Option<usize>) {
        let kept = self.renew(h, home).and_then(|renew| renew.book.as_ref()).map(|book| book.kept((1, 1), writing));
        self.with_guard(h, |state, _| {
            if let Some(store) = state.stores.get_mut(&home) {
                store.slots = kept;
            }
        });
    }

    fn write_slot(&mut self, h: H, home: DatastoreId, taken: Taken, block: BeatBlock) {
        let (me, now, gate) = (self.hosts[h].id, self.local(h), self.guard_gate(h));
        let slot = self.renew(h, home).and_then(|renew| renew.book.as_ref()?.next(now));
        let Some(slot) = slot else { return self.turned(h, home, Some("every slot rests".to_owned())) };
        self.remember(h, home, Some(slot));
        let (with, content, stamp) = (block.attestations.clone(), content(&block), Stamp::of(&block));
        let write = move |world: &mut World| {
            world.landed(h, home, &block);
            let now = world.now;
            let store = world.stores.get_mut(&home).expect("a datastore of the world");
            store.write_beat(me, Some(slot), block, now);
            store.roster.names(me)
        };
        self.io(h, home, gate, Deed::Write, 2000, write, move |world, result| {
            let (now, torn) = (world.local(h), result.is_err() && world.dice(4) == 0);
            let Some(book) = world.renew(h, home).and_then(|renew| renew.book.as_mut()) else { return };
            match &result {
                Err(_) => book.failed(slot, content, now),
                Ok(_) => book.written(slot, content, stamp),
            }
            world.remember(h, home, None);
            match result {
                Err(why) => {
                    if torn {
                        world.tear(h, home, slot, content);
                    }
                    world.turned(h, home, Some(why));
                }
                Ok(names) => {
                    if names {
                        return world.persisted(h, home, taken, &with);
                    }
                    world.turned(h, home, Some("its roster does not name this host".to_owned()));
                }
            }
        });
    }

    pub(super) fn persisted(&mut self, h: H, home: DatastoreId, taken: Taken, with: &[Attestation]) {
        let lapsed = self.with_guard(h, |state, now| {
            if state.incarnation != taken.incarnation {
                return Vec::new();
            }
            state.counted(home, taken, with, now);
            state.table.lapsed_on(home)
        });
        let lapsed = lapsed.unwrap_or_default();
        if let Some(why) = self.look_for_held(h, home) {
            return self.went_back(h, home, why);
        }
        if lapsed.is_empty() {
            return self.turned(h, home, None);
        }
        let gate = self.guard_gate(h);
        let read = move |world: &mut World| {
            let store = &world.stores[&home];
            let until = world.cached_since(h);
            lapsed.into_iter().filter_map(|at| Some((at, store.highest_of(at.vm, until)?.ok()?))).collect::<Vec<_>>()
        };
        self.io(h, home, gate, Deed::Read, 2000, read, move |world, result| {
            let me = world.hosts[h].id;
            for (tenure, claim) in result.unwrap_or_default() {
                let Some(why) = ends(&claim, tenure, me) else { continue };
                world.with_guard(h, |state, _| state.table.kill(tenure, claim.tenure.generation, &why));
            }
            world.turned(h, home, None);
        });
    }
}
