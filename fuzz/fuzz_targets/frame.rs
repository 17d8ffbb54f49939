//! Frames and the messages in them: guard socket, control channel, libvirt's hook.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay::exec::hook::message::{HookQuestion, HookVerdict};
use mainstay::types::control::{Envelope, Reply};
use mainstay::types::guard::{GuardMessage, GuardReport};
use mainstay::wire::frame;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    let mut stream = data;
    while let Ok(Some(_)) = frame::read::<GuardMessage>(&mut stream) {}
    again::<GuardMessage>(data);
    again::<GuardReport>(data);
    again::<Envelope>(data);
    again::<Reply>(data);
    again::<HookQuestion>(data);
    again::<HookVerdict>(data);
});

/// What was read can be sent, and reads the same.
fn again<T: Serialize + DeserializeOwned + PartialEq>(body: &[u8]) {
    let Ok(message) = frame::decode::<T>(body) else { return };
    if let Ok(sent) = frame::encode(&message) {
        let read: Option<T> = frame::read(&mut sent.as_slice()).expect("what we sent can be read");
        assert!(read.is_some_and(|read| read == message));
    }
}
