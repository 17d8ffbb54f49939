//! What hostile guests can say to a host.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../stories/input.rs"]
mod input;
#[path = "../stories/from_guest.rs"]
mod story;

fuzz_target!(|data: &[u8]| story::play(data));
