//! What a host can say to a guest.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../stories/input.rs"]
mod input;
#[path = "../stories/to_guest.rs"]
mod story;

fuzz_target!(|data: &[u8]| story::play(data));
