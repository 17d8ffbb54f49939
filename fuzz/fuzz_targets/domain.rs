//! Domain XML, as libvirt and its hook give it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay::exec::hook::message::vm_of;
use mainstay::exec::libvirt::xml;

fuzz_target!(|text: &str| {
    let _ = vm_of(text);
    let _ = xml::parse(text);
});
