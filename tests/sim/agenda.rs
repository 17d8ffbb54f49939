//! What will happen, by time; of one instant, in the order in which it was put here.
//!
//! Most of it are deadlines far ahead, and the heap moves its entries about: so it holds keys, and the work lies still.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::world::Item;

/// See the module.
#[derive(Default)]
pub struct Agenda {
    /// When, in which order, and where it lies.
    keys: BinaryHeap<Reverse<(u64, u64, u32)>>,
    items: Vec<Option<Item>>,
    free: Vec<u32>,
    order: u64,
}

impl Agenda {
    /// One more.
    pub fn put(&mut self, item: Item) {
        self.order += 1;
        let at = item.at;
        let place = self.free.pop().unwrap_or_else(|| {
            self.items.push(None);
            u32::try_from(self.items.len() - 1).expect("a story has fewer things ahead of it")
        });
        self.items[place as usize] = Some(item);
        self.keys.push(Reverse((at, self.order, place)));
    }

    /// The next, unless it is later than `until`.
    pub fn next(&mut self, until: u64) -> Option<Item> {
        let Reverse((at, ..)) = *self.keys.peek()?;
        if until < at {
            return None;
        }
        let Reverse((.., place)) = self.keys.pop().expect("just seen");
        self.free.push(place);
        self.items[place as usize].take()
    }
}
