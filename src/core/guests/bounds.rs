//! That nothing which guests say is kept without bound, in one place: for tests and fuzzing.

use super::ballots::{MAX_BALLOTS, MAX_VOTES};
use super::memory::MAX_REMEMBERED;
use super::remedies::MAX_CAUSES;
use super::reports::{MAX_ASKED, MAX_COUNTED};
use super::signs::MAX_SIGNS;
use super::{Guests, MAX_ANSWERS};

impl Guests {
    /// The first list that holds more than it may; none, whatever guests say.
    #[must_use]
    pub fn overfull(&self) -> Option<&'static str> {
        let of_guests = self.vms.values().flat_map(|guest| {
            [
                ("answers", guest.answers.0.len(), MAX_ANSWERS),
                ("counted messages", guest.counts.len(), MAX_COUNTED),
                ("open requests", guest.asked.len(), MAX_ASKED),
                ("signs", guest.signs.len(), MAX_SIGNS),
                ("causes of a remedy", guest.history.causes(), MAX_CAUSES),
            ]
        });
        let of_ballots = self.ballots.votes().map(|count| ("votes of one VM", count, MAX_VOTES));
        let of_all = [
            ("remedies under way", self.underway.len(), self.vms.len()),
            ("memory", self.memory.len(), MAX_REMEMBERED),
            ("ballots", self.ballots.open(), MAX_BALLOTS),
            ("decisions", self.ballots.decided(), MAX_ANSWERS),
        ];
        of_guests.chain(of_ballots).chain(of_all).find(|(_, count, most)| most < count).map(|(what, ..)| what)
    }
}
