//! Join tokens, as people paste them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay::exec::cluster::Token;

fuzz_target!(|text: &str| {
    if let Ok(token) = text.parse::<Token>() {
        assert!(token.to_string().parse::<Token>().is_ok_and(|again| again == token));
    }
});
