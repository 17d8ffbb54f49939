//! The taker b of `lease`: claims, complete reads, the window, the proof.
//!
//! ```text
//!  Idle ─► Begun (s; roster) ─► Own (a's slots) ─► All (c's attestations) ─► ended (r): window begins, goes on, or proves
//! ```

use super::{At, IDLE, Lease, Read, Rule, State, Steps, Way};

impl Lease {
    pub(super) fn taker(&self, s: &State, to: &mut Steps) {
        let mut go = |what, change: &dyn Fn(&mut State)| {
            let mut next = *s;
            change(&mut next);
            to.push((("b", what), next));
        };
        if s.b.runs != 0 {
            return;
        }
        if s.b.known != s.claims {
            go("reads the newest claim", &|s| s.b.known = s.claims);
        }
        if s.b.proof != 0 && s.b.proof == s.b.known && (s.claims == s.b.known || !self.keeps(Rule::Exclusive)) {
            go("TAKES: creates the next claim and starts the VM", &|s| {
                s.b.runs = s.b.known + 1;
                s.claims = s.claims.max(s.b.runs);
                s.b.read = IDLE;
                (s.b.window, s.b.proof) = (None, 0);
                (s.b.roster_moved, s.b.own_moved, s.b.attested_moved) = (false, false, false);
            });
        }
        match s.b.read.at {
            At::Idle => go("begins a read: roster", &|s| {
                let (span, known) = (s.b.window.unwrap_or(0), s.b.known);
                let (names_a, names_c, anew) = (s.names_a, s.names_c, s.b.roster_moved);
                s.b.read = Read { at: At::Begun, span, known, names_a, names_c, anew, ..IDLE };
                s.b.roster_moved = false;
            }),
            At::Begun if self.bounds.way != Way::Attested => {
                let c = self.bounds.way != Way::Own;
                go("reads a's slots", &|s| {
                    let own = s.b.own_moved && s.b.read.names_a;
                    s.b.read = Read { at: if c { At::Own } else { At::All }, own, ..s.b.read };
                    s.b.own_moved &= !s.b.read.names_a;
                });
                if !self.keeps(Rule::ErrorIsNotSilence) {
                    go("cannot read a's slots, takes it for silence", &|s| {
                        s.b.read.at = if c { At::Own } else { At::All };
                    });
                }
            }
            At::Begun | At::Own => {
                go("reads c's slots", &|s| {
                    let shown = s.b.attested_moved && s.b.read.names_c && self.keeps(Rule::Attestations);
                    s.b.read = Read { at: At::All, attested: shown, ..s.b.read };
                    s.b.attested_moved &= !s.b.read.names_c;
                    if let Some(repeat) = &mut s.c.repeat {
                        repeat.seen = repeat.lies;
                    }
                });
                if !self.keeps(Rule::Complete) {
                    go("leaves out c's slots", &|s| s.b.read.at = At::All);
                }
            }
            At::All => {}
        }
        if s.b.read.at != At::Idle && self.bounds.trouble {
            go("its read fails", &|s| {
                s.b.roster_moved |= s.b.read.anew;
                s.b.own_moved |= s.b.read.own;
                s.b.attested_moved |= s.b.read.attested;
                s.b.read = IDLE;
            });
        }
        if s.b.read.at == At::All {
            self.read_ends(s, to);
        }
    }

    pub(super) fn read_ends(&self, s: &State, to: &mut Steps) {
        let mut next = *s;
        let (b, read) = (&mut next.b, s.b.read);
        b.read = IDLE;
        let missing = !read.names_a && self.keeps(Rule::OwnerNamed);
        let changed = read.own || read.attested || read.anew && self.keeps(Rule::RosterAnew);
        let span = if self.keeps(Rule::ToBegin) { read.span } else { b.window.unwrap_or(0) };
        let what = if missing {
            b.window = None;
            "ends the read: a is not in the roster"
        } else if b.window.is_none() || changed {
            b.window = Some(if self.keeps(Rule::FromEnd) { 0 } else { read.age });
            "ends the read: a window begins"
        } else if span < self.window() {
            "ends the read: nothing changed"
        } else {
            b.proof = if self.keeps(Rule::ClaimFirst) { read.known } else { b.known };
            "ends the read: silent for long enough"
        };
        to.push((("b", what), next));
    }
}
