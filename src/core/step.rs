//! The dispatch: one line per event, one line per answer, one line per timer. Nothing is decided here.

use super::Core;
use super::action::Output;
use super::cx::{Cx, Desk, Pending, Timer};
use super::event::{Event, Outcome};
use super::note::Note;
use crate::types::guard::GuardReport;
use crate::types::store::StoreAnswer;
use crate::types::vm::DomainAnswer;
use crate::types::{Ticket, Time};

impl Core {
    /// Takes one event; says what to save and what to do.
    pub fn step(&mut self, now: Time, event: Event) -> Output {
        let mut desk = std::mem::take(&mut self.desk);
        let mut cx = Cx::new(now, &mut desk);
        self.dispatch(&mut cx, event);
        self.settle(&mut cx);
        let output = cx.into_output();
        self.desk = desk;
        output
    }

    /// First output after `new`: timers and the first questions.
    pub fn start(&mut self, now: Time) -> Output {
        let mut desk: Desk = std::mem::take(&mut self.desk);
        let mut cx = Cx::new(now, &mut desk);
        cx.act(super::action::Action::Apply(Box::new(self.settings.clone())));
        cx.set(Timer::Beat, now);
        cx.set(Timer::Report, now);
        self.read_stores_soon(&mut cx);
        let output = cx.into_output();
        self.desk = desk;
        output
    }

    fn dispatch(&mut self, cx: &mut Cx, event: Event) {
        match event {
            Event::Heard(beat) => self.heard(cx, *beat),
            Event::HeardTwice(beat) => self.heard_twice(cx, &beat),
            Event::GuardConnected => self.guard_connected(cx),
            Event::Guard(report) => self.guard_said(cx, report),
            Event::GuardLost(why) => self.guard_lost(cx, &why),
            Event::LibvirtUp => self.libvirt_up(cx),
            Event::LibvirtDown(why) => self.libvirt_down(cx, &why),
            Event::Listed(domains) => self.listed(cx, domains),
            Event::Changed { vm, name, change } => self.changed(cx, vm, &name, change),
            Event::Done(ticket, outcome) => self.done(cx, ticket, outcome),
            Event::Asked { ask, from, request } => self.asked(cx, ask, from, *request),
            Event::Hooked { ask, vm, name, wish, record } => self.hooked(cx, ask, vm, &name, wish, record),
            Event::Inside { vm, inside } => self.inside(vm, inside),
            Event::Day(unix_ms) => self.day(cx, unix_ms),
            Event::Capacity(capacity) => self.capacity(capacity),
            Event::Means(means) => self.means(means),
            Event::Health(findings) => self.found(cx, findings),
            Event::LockLeases(leases) => self.lock_leases = leases.into_iter().collect(),
            Event::GoingDown => self.going_down(cx),
            Event::Due => self.due(cx),
        }
    }

    /// What follows from all that changed in this step.
    fn settle(&mut self, cx: &mut Cx) {
        // Bounded: each round is only entered when the former one changed something.
        for _ in 0..8 {
            if !std::mem::take(&mut self.check) {
                break;
            }
            self.reconcile(cx);
        }
        self.follow_stops(cx);
        if std::mem::take(&mut self.look) {
            if self.is_master() {
                self.read_rules();
                self.cut_power(cx);
                self.fail_over(cx);
                self.planned_moves(cx);
                self.flee(cx);
            } else {
                self.pass_proofs_on(cx.now);
            }
        }
        if std::mem::take(&mut self.tell) {
            cx.set_earlier(Timer::Report, cx.now);
        }
    }

    fn due(&mut self, cx: &mut Cx) {
        for timer in cx.take_due() {
            match timer {
                Timer::Beat => self.beat(cx),
                Timer::Silent(host) => self.silent(cx, host),
                Timer::Read(datastore) => self.read_store(cx, datastore),
                Timer::Attempt(vm) => self.attempt_due(cx, vm),
                Timer::Place(_) | Timer::Power(_) => self.look = true,
                Timer::Incoming(vm) => self.incoming_due(cx, vm),
                Timer::Receive(vm) => self.receive_due(cx, vm),
                Timer::Judge(vm) => self.judge_due(cx, vm),
                Timer::Doubt(datastore) => self.doubt_due(cx, datastore),
                Timer::Report => self.report(cx),
                Timer::Relist => self.list_claims(cx),
            }
        }
    }

    fn guard_said(&mut self, cx: &mut Cx, report: GuardReport) {
        match report {
            GuardReport::Hello { incarnation, .. } => self.guard_hello(cx, incarnation),
            GuardReport::Done { ticket, result } => self.done(cx, ticket, Outcome::Guard(result)),
            GuardReport::Lease(lease) => self.lease_changed(cx, lease),
            GuardReport::Row(row) => self.row_changed(cx, row),
            GuardReport::Forgotten { tenure } => self.row_forgotten(tenure),
            GuardReport::Beaten { counter } => self.beaten(cx, counter),
            GuardReport::Alarm(text) => {
                self.guard.unpunctual |= text.contains("real-time") || text.contains("late");
                cx.note(Note::alarm("guard", text));
            }
        }
    }

    fn done(&mut self, cx: &mut Cx, ticket: Ticket, outcome: Outcome) {
        let Some(pending) = cx.take(ticket) else { return };
        match (pending, outcome) {
            (Pending::Read(datastore), Outcome::Store(answer)) => self.read_done(cx, datastore, answer),
            (Pending::Claims(datastore), Outcome::Store(answer)) => self.claims_done(cx, datastore, answer),
            (Pending::Taken(datastore), Outcome::Store(answer)) => self.taken_looked(cx, datastore, answer),
            (Pending::Stopped(_), Outcome::Store(StoreAnswer::Claims { ended, claims, .. })) => {
                claims.into_iter().for_each(|claim| self.learn(cx, claim, ended));
            }
            (Pending::Wish(ask), Outcome::Store(answer)) => self.looked(cx, ask, answer),
            (Pending::Settled, Outcome::Guard(_)) => self.guard_settled(cx),
            (Pending::Attempt(vm), outcome) => self.attempt_done(cx, vm, ticket, outcome),
            (Pending::Move(vm), outcome) => self.move_done(cx, vm, ticket, outcome),
            (Pending::Placed(vm, host), Outcome::Reply(reply)) => self.placed_done(cx, vm, host, ticket, reply),
            (Pending::Sized(vm), Outcome::Store(answer)) => self.sized(vm, answer),
            (Pending::Access(vm), Outcome::Access(result)) => self.access_looked(cx, vm, ticket, &result),
            (Pending::Yields(vm), Outcome::Reply(reply)) => self.yield_answered(cx, vm, reply),
            (Pending::Network, Outcome::Network(answered)) => self.network_answered(cx, ticket, answered),
            (Pending::Evacuated(vm), Outcome::Reply(reply)) => self.evacuated(cx, vm, ticket, reply),
            (Pending::Dropped(unheard), Outcome::Reply(reply)) => self.dropped_answered(cx.now, unheard, &reply),
            (Pending::Forward(ask), Outcome::Reply(reply)) => self.forwarded(cx, ask, reply),
            (Pending::Incoming(vm, ask), Outcome::Guard(result)) => self.incoming_done(cx, vm, ask, result),
            (Pending::Receive(vm), outcome) => self.receive_done(cx, vm, ticket, outcome),
            (Pending::Cancelled(vm), Outcome::Domain(answer)) => self.cancelled(vm, &answer),
            (Pending::Prepare(ask, change), Outcome::Store(answer)) => self.prepared(cx, ask, *change, answer),
            (Pending::Roster(datastore), Outcome::Store(answer)) => self.roster_done(cx, datastore, &answer),
            (Pending::Settings, Outcome::Reply(Ok(crate::types::control::Reply::Settings(newer)))) => {
                self.take_settings(cx, *newer);
            }
            (Pending::Power(host), Outcome::Power(answer)) => self.power_answered(cx, host, ticket, answer),
            (Pending::CalledOff(host, device), Outcome::Power(answer)) => self.called_off(cx, host, &device, answer),
            (Pending::List, Outcome::Domain(DomainAnswer::Listed(_))) => {} // Comes as `Event::Listed`.
            (Pending::Stop(vm, ask), Outcome::Domain(answer)) => self.stop_done(cx, vm, ask, answer),
            (Pending::Undefine(vm), Outcome::Domain(answer)) => self.undefined(cx, vm, &answer),
            (Pending::Pause(vm), Outcome::Domain(answer)) => self.pause_done(cx, vm, ticket, &answer),
            (Pending::Policy(ask), Outcome::Domain(answer)) => self.policy_set(cx, ask, &answer),
            (Pending::Mark(vm), Outcome::Domain(answer)) => self.mark_done(cx, vm, &answer),
            (Pending::Restore { vm, ask, saved }, Outcome::Store(answer)) => {
                self.restore_looked(cx, vm, ask, saved, answer)
            }
            (Pending::Twins(vm), outcome) => self.twin_answered(cx, vm, ticket, outcome),
            (Pending::Recorded(vm, digest), Outcome::Store(answer)) => self.record_looked_for(vm, digest, &answer),
            // Any other pair: an answer of the wrong kind, or a failure that nobody waits for.
            (Pending::Stop(_, ask) | Pending::Forward(ask), Outcome::Store(StoreAnswer::Failed(why))) => {
                cx.answer(
                    ask,
                    crate::types::control::Reply::Denied(crate::types::control::Denial::Unable(why.to_string())),
                );
            }
            _ => {}
        }
    }
}
