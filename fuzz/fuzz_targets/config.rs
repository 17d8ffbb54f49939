//! The configuration file, as people write it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay::config;

fuzz_target!(|text: &str| {
    let findings = config::check(text);
    assert_eq!(config::parse(text).is_ok(), findings.is_empty());
});
